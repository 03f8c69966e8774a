"""What a call is made inside of: Pyro's handlers, and where torch makes tensors. What cannot work is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pvae.errors import DeviceError, ProgramError

__all__ = ["check_surroundings"]

# Pyro's handlers that bring values or densities for the sites of one batch, by what makes them. What is around a call
# acts on the guide as on the model, on trial runs with one and two data, and on every batch.
_OF_ONE_BATCH = {
    "ConditionMessenger": "condition",
    "InterventionMessenger": "do",
    "LiftMessenger": "lift",
    "ReplayMessenger": "replay",
    "TraceMessenger": "trace",
    "UnconditionMessenger": "uncondition",
}


def check_surroundings() -> None:
    """Raises where a call is made inside of a block in which no pair can be run on batches.

    Raises:
        ProgramError: One of Pyro's handlers around the call has values, a mask or scales for the data of one batch.
        DeviceError: Tensors are made on the meta device, without numbers.
    """
    for handler in _PYRO_STACK:
        kind, advice = type(handler).__name__, ""
        if kind in _OF_ONE_BATCH and not getattr(handler, "param_only", False):
            name = _OF_ONE_BATCH[kind]
            advice = f"Handle the one program that is meant, as in poutine.{name}(model, ...), and pass that"
        elif kind in ("MaskMessenger", "ScaleMessenger") and _is_of_data(handler):
            name = kind.removesuffix("Messenger").lower()
            advice = f"Pass it with the data, as in data=(x, {name}), and use it in the model, whose batches have its rows"
        if advice:
            raise ProgramError(
                f"the call is made inside of poutine.{name}, which acts on the model and the guide, in trial runs and "
                f"on every batch. {advice}."
            )
    if torch.get_default_device().type == "meta":
        raise DeviceError(
            "the call is made where tensors are made on the meta device, which holds no numbers: inside of "
            "torch.device('meta'), or after torch.set_default_device('meta'). Call outside of it."
        )


def _is_of_data(handler: Any) -> bool:
    value = getattr(handler, "mask", getattr(handler, "scale", None))
    return isinstance(value, Tensor) and value.numel() > 1
