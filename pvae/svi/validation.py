"""The bound of held-out data: what training maximises, at weight 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.capture import Captured
from pvae.data import Batches
from pvae.errors import warn
from pvae.runtime import Interrupted, Processes, Program, isolated
from pvae.svi import objectives

__all__ = ["Validation"]


class Validation:
    """Minus an ELBO object's own loss of held-out data, in eval mode and with the same noise each time."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        bound: Any,
        modules: Sequence[nn.Module],
        batches: Batches,
        verified: objectives.Verified,
        seed: int,
        capture: bool,
        processes: Processes,
        asked_to_stop: Callable[[], bool] = bool,
        compiling: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.guide = model, guide
        # Where there are other processes, one that ended early would leave them waiting.
        self.asked_to_stop = asked_to_stop if processes.world_size == 1 else bool
        self.modules, self.batches, self.verified, self.processes = modules, batches, verified, processes
        self.seed = processes.rank_seed(seed)
        self.captured: Captured | None = None

        def loss(*batch: Tensor) -> Tensor:
            with objectives.ItemsStayTensors() if capture else nullcontext():
                return objectives.loss_of(bound, model, guide, batch)

        self.loss = loss
        if capture:
            with self._isolated():
                # Few runs an epoch, without gradients: it is compiled in the longest runs alone.
                options: dict[str, Any] = {"capture_after": 1, "compile_first": False, "compiling": compiling}
                self.captured = Captured(loss, "pvae.fit's validation", (model, guide, bound), **options)
                self.loss = self.captured

    def __call__(self, epoch: int) -> float | None:
        """Returns the bound in nats per datum, over the data of all processes; nothing if asked to stop meanwhile."""
        total, seen = 0.0, 0
        with self.processes.together(), self._isolated():
            for batch in self.batches.in_order():
                try:
                    loss = self.loss(*batch).item() * self.verified.share(batch)
                except Interrupted:
                    return None
                if math.isfinite(total) and not math.isfinite(loss):
                    self._warn(epoch, loss, batch)
                total += loss
                seen += len(batch[0])
                if self.asked_to_stop():
                    break
        if self.asked_to_stop():  # the batches may have ended early, too
            return None
        sums = torch.tensor([total, seen], dtype=torch.float64, device=self.batches.device)
        total, seen = self.processes.all_reduce([sums])[0].tolist()
        return -total / seen

    def _warn(self, epoch: int, loss: float, batch: tuple[Tensor, ...]) -> None:
        found = objectives.not_finite(self.model, self.guide, batch)
        warn(f"epoch {epoch}: the loss of a batch of validation data is {loss:g}{found and f': {found}'}.")

    def _isolated(self) -> AbstractContextManager[Any]:
        state: Any = pyro.get_param_store().get_state()
        return isolated(self.modules, seed=self.seed, device=self.batches.device, params=state)
