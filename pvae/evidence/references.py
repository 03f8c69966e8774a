"""A reference to hold other estimates against: log p(x) by two routes, and how far these agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from pvae.data import Data
from pvae.errors import ArgumentError, positive_int
from pvae.evidence.bidirectional import Bracket, bidirectional_monte_carlo
from pvae.evidence.estimates import EvidenceEstimate
from pvae.evidence.importance import log_evidence
from pvae.evidence.proposals import Annealed, Refined
from pvae.runtime import Program, resolve_seed

__all__ = ["Reference", "reference"]

_ERRORS = 4  # between two routes that agree


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """log p(x) of N data by two routes with draws of their own. All tensors are float64, on the CPU.

    Attributes:
        drawn: By importance sampling, ``proposal="auto"``.
        annealed: By chains annealed from the Gaussian fitted to each datum.
        bracket: Of simulated data, from below and above, by the same chains; none if that was not asked for, or cannot
            be.
    """

    drawn: EvidenceEstimate
    annealed: EvidenceEstimate
    bracket: Bracket | None = None

    @cached_property
    def log_px(self) -> Tensor:
        """Nats per datum, shape ``(N,)``: the mean of both routes' `corrected`, weighted by ``1 / std_error^2``.

        Where one of them is unresolved, the other alone.
        """
        shares = self._shares
        values = torch.stack([one.corrected for one in self._routes])
        return torch.where(shares > 0, shares * values, 0.0).sum(0)

    @cached_property
    def std_error(self) -> Tensor:
        """Its Monte Carlo standard error, nats, shape ``(N,)``."""
        errors = torch.stack([one.std_error for one in self._routes])
        return torch.where(self._shares > 0, self._shares * errors, 0.0).norm(dim=0)

    @cached_property
    def difference(self) -> Tensor:
        """``drawn - annealed``, nats, shape ``(N,)``, each with its bias taken out."""
        return self.drawn.corrected - self.annealed.corrected

    @cached_property
    def difference_std_error(self) -> Tensor:
        """Its standard error, nats, shape ``(N,)``."""
        return torch.hypot(self.drawn.std_error, self.annealed.std_error)

    @cached_property
    def agree(self) -> Tensor:
        """For which data both routes are resolved and within 4 errors of each other; bool, shape ``(N,)``."""
        resolved = ~(self.drawn.unresolved | self.annealed.unresolved)
        return resolved & (self.difference.abs() <= _ERRORS * self.difference_std_error + 1e-9)

    @property
    def mean(self) -> float:
        """Mean of `log_px` over the data, nats per datum."""
        return self.log_px.mean().item()

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of `mean`."""
        return self.std_error.norm().item() / len(self.std_error)

    @property
    def _routes(self) -> tuple[EvidenceEstimate, EvidenceEstimate]:
        return self.drawn, self.annealed

    @cached_property
    def _shares(self) -> Tensor:
        """Each route's share, shape ``(2, N)``."""
        errors = torch.stack([one.std_error for one in self._routes]).clamp(min=1e-12)
        usable = torch.stack([~one.unresolved for one in self._routes])
        usable |= ~usable.any(0)  # where neither is, both
        weights = torch.where(usable & errors.isfinite(), errors**-2, 0.0)
        return weights / weights.sum(0)

    def __repr__(self) -> str:
        n, apart = len(self.log_px), self.difference.mean().item()
        error = self.difference_std_error.norm().item() / n
        lines = [
            f"log p(x) of {n} data by two routes",
            f"  mean         {self.mean:10.3f} +- {self.mean_std_error:.3f} nats per datum",
            f"  drawn        {self.drawn.mean:10.3f} +- {self.drawn.mean_std_error:.3f}",
            f"  annealed     {self.annealed.mean:10.3f} +- {self.annealed.mean_std_error:.3f}",
            f"  difference   {apart:10.3f} +- {error:.3f}",
            f"  agreement    {int(self.agree.sum())} of {n} data are resolved by both, and within {_ERRORS} errors",
        ]
        if self.bracket is not None:
            gap, spread = self.bracket.gap, self.bracket.gap_std_error
            lines.append(f"  both ways    {gap:10.3f} +- {spread:.3f} nats between bounds, of simulated data")
        return "\n".join(lines)


def reference(
    model: Program,
    guide: Program,
    data: Data,
    *,
    target_std_error: float = 0.05,
    num_chains: int = 50,
    temperatures: int = 100,
    num_simulated: int = 100,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    compile: bool | str = "auto",
    progress: bool = False,
) -> Reference:
    """Estimates log p(x) by two routes with draws of their own, and tells how far they agree.

    One is importance sampling by ``proposal="auto"``, with as many draws as ``target_std_error`` takes. The other is
    annealed importance sampling from the Gaussian fitted to each datum. Both begin with the guide, and may both miss a
    mode that it misses. On data simulated from the model, where annealing can run both ways, the gap between the bounds
    says how good the chains are. It takes minutes where `pvae.log_evidence` takes seconds.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`, in memory or read again from its start by each route.
        target_std_error: Of the draws, nats per datum.
        num_chains: For each datum, 25 or more, so that they have a k-hat.
        temperatures: Of the chains.
        num_simulated: Data to simulate; 0 for none, which also programs want that cannot be simulated from.
        seed: Of all draws; ``None`` for a fresh one.
        device: As for `pvae.log_evidence`.
        compile: As for `pvae.log_evidence`.
        progress: As for `pvae.log_evidence`.

    Returns:
        A `Reference`.

    Raises:
        PVAEError: As by `pvae.log_evidence` and `pvae.evidence.bidirectional_monte_carlo`.

    Source: Wu, Burda, Salakhutdinov and Grosse, 2017, On the Quantitative Analysis of Decoder-Based Generative Models.
    """
    seed, chains = resolve_seed(seed), positive_int("num_chains", num_chains)
    annealed = Annealed(Refined(), temperatures=temperatures)
    bracket = None
    if num_simulated:
        few = _take(data, num_simulated)
        bracket = bidirectional_monte_carlo(model, guide, few, proposal=annealed, seed=seed + 2, device=device)

    def estimate(**options: object) -> EvidenceEstimate:
        return log_evidence(model, guide, data, device=device, compile=compile, progress=progress, **options)  # type: ignore[arg-type]

    drawn = estimate(target_std_error=target_std_error, seed=seed)
    return Reference(drawn, estimate(proposal=annealed, num_samples=chains, seed=seed + 1), bracket)


def _take(data: Data, count: int) -> Data:
    """The first so many data."""
    if isinstance(data, DataLoader):
        raise ArgumentError("num_simulated must be 0 for a DataLoader: of its data there are no first ones to take.")
    if isinstance(data, Dataset):
        return Subset(data, range(min(count, len(data))))  # type: ignore[arg-type]
    return tuple(t[:count] for t in data) if isinstance(data, tuple | list) else data[:count]
