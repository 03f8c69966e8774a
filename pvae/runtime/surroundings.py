"""What a call is made inside of: Pyro's handlers, and where torch makes tensors. What cannot work is refused."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch._guards import detect_fake_mode

from pvae.errors import DeviceError, ProgramError

__all__ = ["check_surroundings"]

# Pyro's handlers that bring values or densities for the sites of one batch, by what makes them. What is around a call
# acts on the guide as on the model, on trial runs with one and two data, and on every batch.
_OF_ONE_BATCH = {
    "ConditionMessenger": "condition",
    "DoMessenger": "do",
    "LiftMessenger": "lift",
    "ReplayMessenger": "replay",
    "TraceMessenger": "trace",
    "UnconditionMessenger": "uncondition",
}


def check_surroundings() -> None:
    """Raises where a call is made inside of a block in which no pair can be run on batches.

    Raises:
        ProgramError: One of Pyro's handlers around the call has values, a mask or scales for the data of one batch, or
            is a plate.
        DeviceError: Tensors are made without numbers.
    """
    for handler in _PYRO_STACK:
        if isinstance(handler, IndepMessenger) and handler._vectorized:
            raise ProgramError(
                f"the call is made inside of pyro.plate('{handler.name}', {handler.size}), which would count every "
                f"density {handler.size} times. Call outside of it: the model and the guide have their own plate over "
                "the data."
            )
        name, advice = _trouble(handler)
        if name:
            raise ProgramError(
                f"the call is made inside of poutine.{name}, which acts on the model and the guide, in trial runs and "
                f"on every batch. {advice}."
            )
    if torch.get_default_device().type == "meta" or detect_fake_mode() is not None:
        raise DeviceError(
            "the call is made where tensors hold no numbers: inside of torch.device('meta') or a FakeTensorMode, or "
            "after torch.set_default_device('meta'). Call outside of it."
        )


def _trouble(handler: Any) -> tuple[str, str]:
    """The name of a handler that is for one batch alone, and what to do in its place; empty for any other."""
    kind = type(handler).__name__
    if kind in _OF_ONE_BATCH and not getattr(handler, "param_only", False):
        name = _OF_ONE_BATCH[kind]
        return name, f"Handle the one program that is meant, as in poutine.{name}(model, ...), and pass that"
    name = {"MaskMessenger": "mask", "ScaleMessenger": "scale"}.get(kind, "")
    value = getattr(handler, name, None) if name else None
    if isinstance(value, Tensor) and value.numel() > 1:
        return (
            name,
            f"Pass it with the data, as in data=(x, {name}), and use it in the model, whose batches have its rows",
        )
    return "", ""
