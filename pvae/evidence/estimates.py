"""What an estimate of log p(x) says, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.errors import ArgumentError, real_number
from pvae.evidence.intervals import interval, mean_upper, pooled_khat, quantile
from pvae.evidence.pareto import MIN_SAMPLES_FOR_KHAT
from pvae.evidence.verdicts import (
    KHAT_LIMIT,
    MAX_ROUNDING,
    MIN_ESS,
    MIN_REACH,
    STAGES,
    count_of,
    explain_khat,
    explain_reach,
    explain_rounding,
    summarize,
)
from pvae.evidence.weights import WeightSums

if TYPE_CHECKING:
    import xarray

__all__ = ["KHAT_LIMIT", "EvidenceEstimate"]


@dataclass(frozen=True, eq=False, repr=False)
class EvidenceEstimate:
    """Estimates of log p(x) for N data, with what is known of their error. All tensors are on the CPU.

    Attributes:
        sums: The running sums that all numbers here are made of.
        proposal: Where the draws came from.
        seed: The seed used, also where ``seed=None`` asked for a fresh one.
        shared_draws: Whether data shared draws, so that their errors are correlated.
        seconds: How long it took.
        target_std_error: The standard error asked for, nats per datum, if one was.
        merged_seeds: Those of the runs that `merge` joined with this.
        diagnostics: What the proposal found out on the way, by name, shape ``(N,)`` each, such as ``"acceptance"``.
        precision: Machine epsilon of the numbers that densities were computed in.
        words: Where the draws came from, for a reader.
        num_together: How many data have one log p(data) together, so that N is 1; 0 where each datum has its own.
        product_precision: Of the programs' matrix products and convolutions.
        product_rounding: What that was found to change log-weights by if it is not float32: root mean square, nats.
    """

    sums: WeightSums
    proposal: str
    seed: int
    shared_draws: bool
    seconds: float
    target_std_error: float | None = None
    merged_seeds: tuple[int, ...] = ()
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)
    precision: float = 0.0
    words: str = ""
    num_together: int = 0
    product_precision: str = "float32"
    product_rounding: float = 0.0

    @cached_property
    def log_px(self) -> Tensor:
        """``log (1/K) sum_k w_k``, nats per datum, shape ``(N,)``. Low in the mean by about ``std_error^2 / 2``."""
        return self.sums.log_px

    @cached_property
    def std_error(self) -> Tensor:
        """Its Monte Carlo standard error (delta method), nats, shape ``(N,)``; nan for K = 1."""
        return self.sums.std_error

    @cached_property
    def ess(self) -> Tensor:
        """Effective sample size of the weights, from 1 to K, shape ``(N,)``."""
        return self.sums.ess

    @cached_property
    def khat(self) -> Tensor:
        """Pareto k-hat of the weights, shape ``(N,)``. Above 0.7 do not trust the estimate or its error.

        One k-hat scatters: by ``proposal="auto"``, where it was high, it is that of four times as many draws.

        ``-inf`` for equal weights, ``inf`` where fewer than 5 weights stand out, nan for K < 25.
        """
        looked_at = self.diagnostics.get("khat")
        return self.sums.khat if looked_at is None else torch.where(looked_at.isnan(), self.sums.khat, looked_at)

    @property
    def stage(self) -> list[str]:
        """What answered for each datum: the proposal, or by ``proposal="auto"`` the stage, such as ``"refined"``."""
        if "stage" not in self.diagnostics:
            return [self.proposal] * self.num_data
        return [STAGES[index] for index in self.diagnostics["stage"].tolist()]

    @cached_property
    def elbo(self) -> Tensor:
        """``mean_k log w_k``, nats per datum, shape ``(N,)``; with the guide as proposal, the ELBO."""
        return self.sums.elbo

    @cached_property
    def elbo_std_error(self) -> Tensor:
        """Its Monte Carlo standard error, nats, shape ``(N,)``; nan for K = 1."""
        return self.sums.elbo_std_error

    @cached_property
    def corrected(self) -> Tensor:
        """`log_px` with its second-order bias ``-std_error^2 / 2`` taken out, nats per datum, shape ``(N,)``.

        `log_px` itself where no error is known: for K = 1, and where all weights are zero.
        """
        return self.log_px - self.sums.bias.nan_to_num(0.0)

    @cached_property
    def log_px_psis(self) -> Tensor:
        """`log_px` from Pareto-smoothed weights, nats per datum, shape ``(N,)``; see `WeightSums.log_px_psis`."""
        return self.sums.log_px_psis

    @property
    def samples(self) -> Tensor:
        """How many draws each datum took, shape ``(N,)``."""
        return self.sums.num_samples

    @property
    def num_samples(self) -> int:
        """``K``, draws for each datum; the most that any took, where they differ."""
        return int(self.samples.max())

    @property
    def num_data(self) -> int:
        """How many data, ``N``."""
        return len(self.samples)

    @property
    def is_joint(self) -> bool:
        """Whether this is one log p(data) of all data together, as where latents are outside of the data plate."""
        return self.num_together > 0

    @property
    def mean(self) -> float:
        """Mean of `log_px` over the data, nats per datum."""
        return self.log_px.mean().item()

    @property
    def mean_std_error(self) -> float:
        """Monte Carlo standard error of `mean`, which more draws would make smaller.

        Where data shared draws their errors may all point one way, so this is an upper bound then.
        """
        if self.shared_draws:
            return self.std_error.mean().item()
        return self.std_error.norm().item() / self.num_data

    @property
    def data_std_error(self) -> float:
        """Standard error of `mean` over the choice of data, which more data would make smaller; nan for N = 1."""
        return self.log_px.std().item() / self.num_data**0.5 if self.num_data > 1 else float("nan")

    @property
    def unreliable(self) -> Tensor:
        """Which data have a k-hat above 0.7, or none at all, log-weights too large to be told apart, or chains that
        stayed near their start; bool, shape ``(N,)``.
        """
        return ~(self.khat <= KHAT_LIMIT) | (self.rounding > MAX_ROUNDING) | (self.reach < MIN_REACH)

    @property
    def reach(self) -> Tensor:
        """How far chains came, as the sampler found it, shape ``(N,)``; 1 for other proposals."""
        return self.diagnostics.get("reach", torch.ones_like(self.log_px)).nan_to_num(1.0)

    @property
    def rounding(self) -> Tensor:
        """How finely a log-weight of this size can be told from others, nats, shape ``(N,)``: coarse rounding makes
        weights look equal. `product_rounding` is a part of it.
        """
        densities = self.precision * self.log_px.abs() if self.precision else torch.zeros_like(self.log_px)
        return densities + self.product_rounding

    @property
    def unresolved(self) -> Tensor:
        """Which data are `unreliable`, miss the `target_std_error` or, by ``proposal="auto"``, have no `interval`.

        Bool, shape ``(N,)``.
        """
        unresolved = self.unreliable
        if "stage" in self.diagnostics:
            unresolved = unresolved | self._is_withheld
        if self.target_std_error is not None:
            unresolved = unresolved | ~(self.std_error <= self.target_std_error)
        return unresolved

    @property
    def withheld(self) -> list[str]:
        """Why `interval` gives none, for each datum; empty strings where it does."""
        pooled, limits = pooled_khat(self.sums, self.diagnostics.get("stage"))[0], self._khat_limits
        accepted = self.diagnostics.get("accepted", torch.ones(self.num_data, dtype=torch.bool))
        tensors = (self.khat, self.samples, self.ess, self.rounding, pooled, limits, self.reach, accepted)
        return [
            explain_rounding(rounding, self.product_precision)
            or explain_reach(reach)
            or ("" if good else "by their trials, no draws that were tried will do")
            or explain_khat(k, n, KHAT_LIMIT)
            or (f"only {ess:.1f} effective samples of {MIN_ESS}" if ess < MIN_ESS else "")
            or (f"k-hat {k:.2f}, pooled with those of all data {p:.2f}, is above {limit:.2f}" if p > limit else "")
            for k, n, ess, rounding, p, limit, reach, good in zip(*(t.tolist() for t in tensors), strict=True)
        ]

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """A confidence interval for log p(x) of each datum.

        From ``corrected - z std_error`` up to ``corrected + z std_error``, or to where the fitted tail of the weights
        says that log p(x) may be: large weights are rare, and where few have come the estimate and its error are both
        low. z is a normal quantile, or a Student-t's where the error comes from a few replicates. `rounding` is added
        to both sides.

        Withheld (nan) where no interval would cover as often as it says: where `unreliable`, with fewer than 20
        effective samples, or where k-hat, pooled with those of all data, is above ``min(1 - 1 / log10 K, 0.7)``: among
        data that are nearly all bad, some pass by luck. `withheld` has the reasons.

        Args:
            level: Coverage aimed at, between 0 and 1.

        Returns:
            Lower and upper ends, nats per datum, each of shape ``(N,)``.

        Example:
            >>> import pvae
            >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
            >>> x = pair.sample(20, seed=0)
            >>> estimate = pvae.log_evidence(pair.model, pair.guide, x)
            >>> low, high = estimate.interval(0.999)
            >>> bool(((low < pair.log_px(x)) & (pair.log_px(x) < high)).all())
            True
        """
        level = real_number("level", level, above=0, below=1)
        lower, upper = interval(self.sums, level, self.diagnostics.get("stage"))
        rounding = self.rounding.masked_fill(self._is_withheld, torch.nan)
        return lower - rounding, upper + rounding

    @property
    def _is_withheld(self) -> Tensor:
        return torch.tensor([bool(reason) for reason in self.withheld])

    @property
    def _khat_limits(self) -> Tensor:
        """What a k-hat from so many draws may be: ``min(1 - 1 / log10 K, 0.7)``, shape ``(N,)``."""
        limits = 1 - 1 / self.samples.clamp(min=MIN_SAMPLES_FOR_KHAT).double().log10()
        return limits.clamp(max=KHAT_LIMIT)

    @property
    def mean_khat(self) -> float:
        """The data's k-hats, averaged with weights ``std_error^2``, each datum's share in the mean's variance.

        One datum's k-hat scatters; this scatters less, and shows a few bad data that make up the error of the mean.
        """
        unknown = self.std_error.isnan()
        if unknown.any():
            return self.khat[unknown].max().item()
        # Equal weights have a k-hat of -inf, and next to no error.
        return self._shared_out(self.khat.clamp(min=-1.0))

    @property
    def mean_withheld(self) -> str:
        """Why `mean_interval` gives none; empty if it does.

        The limit for `mean_khat` is ``min(1 - 1 / log10 K, 0.7)``, averaged likewise where data took different K.
        """
        if coarse := explain_rounding(self.rounding.max().item(), self.product_precision):
            return coarse
        if short := explain_reach(self.reach.min().item()):
            return short
        if impossible := int(self.log_px.isneginf().sum()):
            return f"log p(x) is -inf for {count_of(impossible, self.num_data)}"
        what = "the k-hat of the data behind its error," if self.num_data > 1 else "k-hat"
        return explain_khat(self.mean_khat, int(self.samples.min()), self._shared_out(self._khat_limits), what)

    def _shared_out(self, values: Tensor) -> float:
        """The values' mean over data, each with its share in the variance of `mean`; plainly if there is none."""
        shares = self.std_error.square().nan_to_num()
        shares = shares if shares.sum() > 0 else torch.ones_like(shares)
        counted = shares > 0  # 0 times an infinite k-hat is no share
        return ((shares * values)[counted].sum() / shares.sum()).item()

    def mean_interval(self, level: float = 0.95) -> tuple[float, float]:
        """A confidence interval for the mean of log p(x) over these data: its Monte Carlo error, not that of the choice
        of data.

        The mean of `corrected`, ``-+ (z mean_std_error + rounding)``: roundings may all be to one side. The upper end
        is higher where the weights' tails may be heavier than they look, which does not average out. Withheld (nan)
        where `mean_withheld` says why.

        Args:
            level: Coverage aimed at, between 0 and 1.

        Returns:
            Lower and upper end, nats per datum.
        """
        level = real_number("level", level, above=0, below=1)
        # Degrees of freedom of a sum of variances: Satterthwaite, 1946.
        variances = self.std_error.square()
        degrees = variances.sum().square() / (variances.square() / self.sums.degrees_of_freedom).sum()
        degrees = degrees.nan_to_num(torch.inf, posinf=torch.inf)
        half = quantile(level, degrees).item() * self.mean_std_error
        half += self.rounding.mean().item()
        if self.mean_withheld:
            return float("nan"), float("nan")
        return self.corrected.mean().item() - half, mean_upper(self.sums, level, half, self.diagnostics.get("stage"))

    def merge(self, other: EvidenceEstimate) -> EvidenceEstimate:
        """The estimate from the draws of both: of the same data in the same order, by any proposals, with other seeds.

        Raises:
            ArgumentError: They are of different numbers of data, or have the same seed and so the same draws.
        """
        if (self.num_data, self.num_together) != (other.num_data, other.num_together):
            raise ArgumentError(f"estimates of {self.num_data} and of {other.num_data} data cannot be merged.")
        mine, theirs = ({one.seed, *one.merged_seeds} for one in (self, other))
        if mine & theirs:
            raise ArgumentError(f"both estimates have seed {min(mine & theirs)}, so their draws are not independent.")
        return EvidenceEstimate(
            self.sums.combine(other.sums),
            _both(self.proposal, other.proposal),
            self.seed,
            self.shared_draws or other.shared_draws,
            self.seconds + other.seconds,
            self.target_std_error,
            tuple(sorted(mine | theirs)),
            {**other.diagnostics, **self.diagnostics},
            max(self.precision, other.precision),
            _both(self.words, other.words),
            self.num_together,
            _both(self.product_precision, other.product_precision),
            max(self.product_rounding, other.product_rounding),
        )

    def to_dataset(self, coords: Mapping[str, Any] | None = None, *, level: float = 0.95) -> xarray.Dataset:
        """A table with a row for each datum, as an ``xarray.Dataset`` over the dimension ``"datum"``.

        Columns are the numbers (`log_px`, `std_error`, `corrected`, `log_px_psis`, `elbo`, `elbo_std_error`, `ess`,
        `khat`, `samples`, `rounding`, `reach`), the ends of `interval` as ``lower`` and ``upper``, the verdicts
        (`unreliable`, `unresolved`, `withheld`, `stage`), and what else is in `diagnostics`. Units are in the
        attributes; ``to_netcdf`` writes it. xarray comes with ArviZ.

        Args:
            coords: One entry for each datum, by name: ``"datum"`` labels the rows, which are numbered otherwise;
                others, such as ``"label"``, stand beside it.
            level: Of the interval.

        Raises:
            ArgumentError: A coordinate has not one entry for each datum, or a column's name; or there is no such level.
        """
        from pvae.evidence.tables import as_dataset

        return as_dataset(self, coords, level=level)

    def __repr__(self) -> str:
        return summarize(self)


def _both(mine: str, theirs: str) -> str:
    """What two estimates say, in one."""
    return mine if mine == theirs else f"{mine} and {theirs}"
