"""What may answer for a datum by ``proposal="auto"``: the ways to draw, and what trials tell of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import ProgramError, warn
from pvae.evidence.densities import MAX_JOINT_DIM, Densities
from pvae.evidence.intervals import pooled_khat
from pvae.evidence.proposals import (
    FIT_INFLATION,
    Annealed,
    Defensive,
    Gaussian,
    Guide,
    Inflated,
    Mixture,
    Prior,
    Proposal,
    StudentT,
)
from pvae.evidence.verdicts import ERROR_MARGIN, MIN_ESS
from pvae.evidence.weights import WeightSums

__all__ = [
    "FEWEST_TEMPERATURES",
    "WAYS",
    "Judge",
    "can_draw_prior",
    "can_fit",
    "can_mix",
    "is_of_use",
    "may_reach",
    "surely_above",
]

FEWEST_TEMPERATURES = 16

_KHAT = 0.5  # the most of pilots: weights of a finite variance, and far from the limit, as k-hat scatters
_ERRORS = 4  # standard errors that two estimates may be apart
_SHARE_OF_USE = 0.05
_PRECISION_OF_SUMS = 1e-12  # of float64, over many draws

# What the guide covers stays covered.
_SHARES = (0.95, 0.05)


@dataclass(frozen=True)
class Way:
    """A way to draw.

    Attributes:
        make: From the Gaussian that was fitted to each datum, and a number of temperatures.
        most: Draws for a datum at most, times ``num_samples``.
        is_open: Whether it may take all draws that are allowed, where there is a target for the error.
    """

    make: Callable[[Gaussian, int], Proposal]
    most: int
    is_open: bool = False


def _mix(wide: Gaussian) -> Proposal:
    return Mixture((wide, Guide()), _SHARES)


WAYS = {
    "guide": Way(lambda *_: Guide(), 4),
    "refined": Way(lambda fitted, _: _mix(Inflated(fitted, FIT_INFLATION)), 16),
    "heavy-tailed": Way(lambda fitted, _: _mix(StudentT(Inflated(fitted, FIT_INFLATION))), 16, is_open=True),
    "defensive": Way(lambda *_: Defensive(), 16),
    "half from the prior": Way(lambda *_: Defensive(share=0.5), 16, is_open=True),
    "annealed": Way(lambda fitted, temperatures: Annealed(fitted, temperatures), 4),
    "annealed from the prior": Way(lambda _, temperatures: Annealed(Prior(), temperatures), 4),
}
"""By the names in `pvae.evidence.verdicts.STAGES`."""


def can_draw_prior(densities: Densities) -> bool:
    """Whether there are draws from the prior; a reader is told where there are none."""
    if densities.prior_refusal:
        warn(
            f"the model cannot draw its own latents ({densities.prior_refusal}), so that no draws from the prior tell "
            "of what the guide overlooks, such as a second mode: proposal='auto' goes on without them."
        )
    return not densities.prior_refusal


def can_fit(densities: Densities) -> bool:
    """Whether latents can be moved as real numbers, and have a covariance."""
    try:
        dim = densities.space.dim
    except ProgramError:
        return False
    return not densities.is_joint or dim <= MAX_JOINT_DIM


def can_mix(densities: Densities) -> bool:
    """Whether the density of the guide, or of a Gaussian in its place, is known where the prior draws."""
    if not densities.scores_guide:
        return can_fit(densities) and not densities.prior_refusal
    try:
        densities.log_qz(densities.trial, densities.draw_prior(densities.trial, 1))
    except (ProgramError, RuntimeError) as error:  # of a guide that reads its own latents, and not those of others
        if "memory" in str(error):
            raise
        return False
    return True


def surely_above(sums: WeightSums, precision: float) -> Tensor:
    """What log p(x) is above by all that is known, shape ``(N,)``; -inf where that is nothing.

    Weights are positive and skewed: their mean is more often too low than too high, whatever k-hat says. Where all are
    the same there is no error but that of rounding, which makes a number a little too high as often as too low.

    Args:
        sums: Over draws.
        precision: Machine epsilon of the numbers that densities are computed in.
    """
    rounding = (precision + _PRECISION_OF_SUMS) * sums.log_px.abs().clamp(min=1.0)
    return torch.where(sums.ess >= MIN_ESS, sums.log_px - _ERRORS * sums.std_error - rounding, -torch.inf)


def is_of_use(sums: WeightSums) -> Tensor:
    """Whether of draws from the prior so many count that a share of them adds to others; bool, shape ``(N,)``."""
    return sums.ess >= _SHARE_OF_USE * sums.num_samples


def may_reach(sums: WeightSums, floor: Tensor) -> Tensor:
    """Whether log p(x) by some draws may be as high as it is by others; bool, shape ``(N,)``."""
    return sums.log_px + _ERRORS * sums.std_error >= floor


@dataclass(frozen=True)
class Judge:
    """Tells by pilots how many draws of a stage will do.

    Attributes:
        num_samples: Draws at least.
        limit: Draws at most.
        std_error: Wanted, nats per datum.
        is_target: Whether it was asked for.
    """

    num_samples: int
    limit: int
    std_error: float
    is_target: bool

    def most(self, stage: str) -> int:
        """The most draws of a stage for one datum."""
        way = WAYS[stage]
        return self.limit if way.is_open and self.is_target else min(way.most * self.num_samples, self.limit)

    def find_needed(self, stage: str, pilots: WeightSums, floor: Tensor) -> Tensor:
        """How many draws each datum needs, shape ``(N,)``; 0 where too many, or none will do."""
        needed = pilots.num_samples * (pilots.std_error / (ERROR_MARGIN * self.std_error)).square()
        # Few different numbers, so that many data are drawn for together.
        needed = self.num_samples * 2 ** (needed / self.num_samples).log2().ceil().clamp(min=0.0)
        good = (pooled_khat(pilots)[0] <= _KHAT) & pilots.log_px.isfinite() & may_reach(pilots, floor)
        return torch.where(good & (needed <= self.most(stage)), needed, 0.0).long()

    def find_chains(self, variance: Tensor, least: int) -> int:
        """How many chains bring the error of all to the target, if their log-weights are normal with this variance."""
        needed = (variance.expm1() / (ERROR_MARGIN * self.std_error) ** 2).ceil().amax().long()
        return int(needed.clamp(least, max(least, self.most("annealed"))))

    def may_do(self, pilots: WeightSums) -> Tensor:
        """Whether it is not yet clear that draws will not do; bool, shape ``(N,)``."""
        khat, error = pooled_khat(pilots)
        return khat - 2 * error.nan_to_num(0.0) < _KHAT  # of equal weights k-hat has no error

    def is_unsure(self, pilots: WeightSums) -> Tensor:
        """Whether more pilots may change the verdict; bool, shape ``(N,)``."""
        khat, error = pooled_khat(pilots)
        return (khat - _KHAT).abs() < error
