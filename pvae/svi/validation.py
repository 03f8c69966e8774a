"""The bound of held-out data: what training maximises, at weight 1."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
from torch import Tensor

from pvae.capture import Captured
from pvae.data import Batches, Rows
from pvae.errors import warn
from pvae.runtime import Interrupted, NeverStop, Stop, isolate
from pvae.svi import losses
from pvae.svi.settings import Settings
from pvae.svi.trainable import Trainable

__all__ = ["Validation"]


class Validation:
    """Minus an ELBO object's own loss of held-out data, in eval mode and with the same noise each time.

    Args:
        pair: The pair that is trained.
        batches: The held-out data.
        settings: The seed of the noise, and whether to capture.
        stop: Whether the process was asked to stop.
    """

    def __init__(self, pair: Trainable, batches: Batches, settings: Settings, stop: Stop | None = None) -> None:
        self.pair, self.batches, self.seed = pair, batches, settings.noise_seed
        self.stop = NeverStop() if stop is None else stop
        self.captured: Captured | None = None
        if settings.capture:
            with self._isolate():
                # Few runs an epoch, without gradients: it is compiled in the longest runs alone.
                self.captured = Captured(
                    self._loss,
                    "pvae.fit's validation",
                    (pair.placed.model, pair.placed.guide, pair.bound),
                    capture_after=1,
                    compile_first=False,
                    compiling=self.stop.interrupting,
                )

    def __call__(self, epoch: int) -> float | None:
        """The bound in nats per datum, over all the data; none where it was asked to stop meanwhile."""
        told = False

        def loss_of(batch: Rows) -> float:
            nonlocal told
            loss = (self.captured or self._loss)(*batch).item() * self.pair.verified.share(batch)
            if not told and not math.isfinite(loss):
                told = True
                self._warn(epoch, loss, batch)
            return loss

        try:
            with self._isolate():
                total, seen = self.batches.sum_over(loss_of, self.stop)
        except Interrupted:
            return None
        return None if self.stop() else -total / seen  # the batches may have ended early, too

    def _loss(self, *batch: Tensor) -> Tensor:
        with losses.ItemsStayTensors() if self.captured is not None else nullcontext():
            return losses.loss_of(self.pair.bound, self.pair.placed.model, self.pair.placed.guide, batch)

    def _warn(self, epoch: int, loss: float, batch: Rows) -> None:
        found = self.pair.not_finite(batch)
        warn(f"epoch {epoch}: the loss of a batch of validation data is {loss:g}{found and f': {found}'}.")

    def _isolate(self) -> AbstractContextManager[Any]:
        placed, state = self.pair.placed, pyro.get_param_store().get_state()
        return isolate(placed.modules, seed=self.seed, device=self.batches.device, params=state)
