"""What training gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pvae.runtime import turn

__all__ = ["FitResult"]


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """What `fit` returns. The trained parameters of modules are in the modules themselves.

    Attributes:
        history: One-dimensional arrays with an entry for each epoch. ``"elbo"`` is the training ELBO in nats per datum,
            averaged over the epoch while the parameters moved (``"objective"`` in its place, minus the loss, where the
            objective is not an ELBO); ``"validation_elbo"`` is there where validation data were given: the bound that
            the objective is, without weights, which is another than the ELBO for ``IWAE``, say; ``"kl_weight"``
            and ``"lr"`` where they could change; ``"seconds"``.
        params: Trained values of parameters made by ``pyro.param``, by name, in their constrained space. They have
            no module to live in; see `trained`.
        device: Where it was trained.
        seed: The seed used, also where ``seed=None`` asked for a fresh one.
        compile_seconds: Spent on capturing and compiling, within the first epochs; 0 where that was not done.
        stopped: Why training ended: ``"epochs"`` (all were done), ``"patience"``, or ``"signal"``; ``"loaded"`` for
            what `load_checkpoint` returns.
        signal: The signal's number, where that was it.
        checkpoint: The folder of the last checkpoint, where there are any.
    """

    history: dict[str, np.ndarray]
    params: dict[str, Tensor]
    device: torch.device
    seed: int
    compile_seconds: float
    _state: Mapping[str, Any]
    stopped: str = "epochs"
    signal: int | None = None
    checkpoint: Path | None = None

    def __repr__(self) -> str:
        last = [f"{name} {values[-1]:.2f}" for name, values in self.history.items() if name in _CURVES and len(values)]
        parts = [f"{len(self.history['seconds'])} epochs", *last, f"on {self.device}", f"seed {self.seed}"]
        if self.stopped not in ("epochs", "loaded"):
            parts.append(f"stopped by {self.stopped}")
        return f"FitResult({', '.join(parts)})"

    def copy_state(self) -> dict[str, Any]:
        """What `trained` puts in force, as a state of the param store that may be trained further."""
        params = {name: value.detach().clone().requires_grad_() for name, value in self._state["params"].items()}
        return {"params": params, "constraints": dict(self._state["constraints"])}

    @contextmanager
    def trained(self) -> Iterator[None]:
        """A block in which ``pyro.param`` finds the trained values; needed only for parameters outside modules.

        The param store is the whole process's: calls of pvae in other threads wait until the block ends.

        Example::

            with result.trained():
                estimate = pvae.log_evidence(model, guide, x)
        """
        with turn():
            store = pyro.get_param_store()
            outside = store.get_state()
            merged: Any = {key: {**outside[key], **self._state[key]} for key in ("params", "constraints")}
            with store.scope(merged):
                yield


_CURVES = ("elbo", "objective", "validation_elbo")
