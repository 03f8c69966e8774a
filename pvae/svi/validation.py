"""The ELBO of held-out data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae.graphs import Captured
from pvae.isolation import Program, isolated
from pvae.ranks import Ranks
from pvae.svi import objectives
from pvae.svi.batches import Batches

__all__ = ["Validation"]


class Validation:
    """The ELBO of held-out data, in eval mode and with the same noise each time."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        modules: Sequence[nn.Module],
        batches: Batches,
        verified: objectives.Verified,
        seed: int,
        capture: bool,
        ranks: Ranks,
    ) -> None:
        self.modules, self.batches, self.verified, self.ranks = modules, batches, verified, ranks
        self.seed = ranks.seed(seed)
        self.captured: Captured | None = None

        def loss(*batch: Tensor) -> Tensor:
            with objectives.ItemsStayTensors() if capture else nullcontext():
                return objectives.validation_loss(model, guide, batch)

        self.loss = loss
        if capture:
            with self._isolated():
                self.captured = Captured(loss, "pvae.fit's validation", (model, guide), capture_after=1)
                self.loss = self.captured

    def __call__(self) -> float:
        """Returns the ELBO in nats per datum, over the data of all processes."""
        total, seen = 0.0, 0
        with self._isolated():
            for batch in self.batches.in_order():
                total += self.loss(*batch).item() * self.verified.share(batch)
                seen += len(batch[0])
        sums = torch.tensor([total, seen], dtype=torch.float64, device=self.batches.device)
        total, seen = self.ranks.sums([sums])[0].tolist()
        return -total / seen

    def _isolated(self) -> AbstractContextManager[Any]:
        state: Any = pyro.get_param_store().get_state()
        return isolated(self.modules, seed=self.seed, device=self.batches.device, params=state)
