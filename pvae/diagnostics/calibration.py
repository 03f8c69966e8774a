"""Simulation-based calibration: whether a guide is as sure of its codes as it may be."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pvae.data import Data, as_tensors
from pvae.errors import ArgumentError, ProgramError, positive_int, real_number
from pvae.evidence import Batch, Densities, WeightSums, flatten_entries, map_batches, name_entries
from pvae.runtime import Program, in_turn

__all__ = ["Calibration", "simulation_based_calibration"]

_MOST_BINS = 20
_LEAST_COUNT = 5  # expected in each bin, for the chi-squared distribution to hold
_SURE = 3  # standard errors
_NAMED = 8


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Ranks of S simulated codes among L draws of the guide, for each of D latent numbers.

    Attributes:
        ranks: How many of the draws are below the code that made the data, shape ``(S, D)``, from 0 to L. Uniform if
            the draws are the posterior's.
        num_draws: ``L``.
        names: Of the latent numbers, such as ``"z[3]"``, D of them.
        ess: The effective number of draws behind each simulation's L, shape ``(S,)``; 0 where no draw explains the
            datum, and L are chosen at random.
        is_weighted: Whether the draws were chosen among more by their importance weights.
        weighted: The same simulations with draws that were chosen so; none where this is that.
    """

    ranks: Tensor
    num_draws: int
    names: tuple[str, ...]
    ess: Tensor
    is_weighted: bool = False
    weighted: Calibration | None = field(default=None)

    @property
    def num_simulations(self) -> int:
        """``S``."""
        return len(self.ranks)

    @property
    def num_bins(self) -> int:
        """Into how many bins of equally many ranks the test counts them."""
        return _count_bins(self.num_draws, self.num_simulations)

    @property
    def counts(self) -> Tensor:
        """How many ranks are in each bin, shape ``(D, num_bins)``; ``S / num_bins`` expected."""
        bins = self.ranks * self.num_bins // (self.num_draws + 1)
        return torch.stack([torch.bincount(column, minlength=self.num_bins) for column in bins.T])

    @property
    def p_values(self) -> Tensor:
        """Of Pearson's chi-squared test of uniformity, for each latent number, shape ``(D,)``."""
        from scipy.stats import chisquare  # slow to import, and few need it

        return torch.as_tensor(chisquare(self.counts.double().numpy(), axis=1).pvalue)

    @property
    def p_value(self) -> float:
        """Of all latent numbers together: D times the least, at most 1 (Bonferroni)."""
        return min(1.0, len(self.names) * self.p_values.min().item())

    def is_uniform(self, level: float = 0.05) -> bool:
        """Whether uniform ranks are not rejected, as an exact guide's are with a probability of at most ``level``."""
        return self.p_value >= real_number("level", level, above=0, below=1)

    @property
    def verdict(self) -> str:
        """What the ranks say of the guide, in words, at a level of 0.05."""
        what = "the guide, re-weighted," if self.is_weighted else "the guide"
        if self.is_uniform():
            return f"{what} is calibrated, as far as {self.num_simulations} simulations tell (p = {self.p_value:.2g})"
        bad = (self.p_values * len(self.names) < 0.05).nonzero()[:, 0].tolist()
        found = "; ".join(f"{self.names[i]} {self._explain(i)}" for i in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED} more" * (len(bad) > _NAMED)
        return f"{what} is not calibrated (p = {self.p_value:.2g}): {found}{more}"

    def _explain(self, index: int) -> str:
        """How one latent number's ranks differ from uniform ones."""
        u = (self.ranks[:, index].double() + 0.5) / (self.num_draws + 1)
        off = (u.mean() - 0.5).item() * (12 * len(u)) ** 0.5
        spread = ((u - 0.5).square().mean() - (1 - (self.num_draws + 1) ** -2) / 12).item() * (180 * len(u)) ** 0.5
        words = []
        if abs(off) > _SURE:
            words.append("too low" if off > 0 else "too high")
        if abs(spread) > _SURE:
            words.append("too narrow (overconfident)" if spread > 0 else "too wide")
        return " and ".join(words) or "of another shape"

    def __repr__(self) -> str:
        lines = []
        if not self.is_weighted:
            lines = [
                f"ranks of {self.num_simulations} simulated codes among {self.num_draws} draws of the guide, "
                f"{len(self.names)} latent numbers"
            ]
        lines.append(textwrap.fill(self.verdict, 88, initial_indent="  ", subsequent_indent="    "))
        if self.weighted is not None:
            ess = self.weighted.ess.median().item()
            few = f", few for {self.num_draws} draws: raise num_samples" if ess < 2 * self.num_draws else ""
            lines += [repr(self.weighted), f"  median ESS of its weights {ess:.1f}{few}"]
        return "\n".join(lines)


@in_turn
def simulation_based_calibration(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_simulations: int | None = 500,
    num_draws: int = 63,
    num_samples: int = 500,
    seed: int | None = 0,
    device: str | torch.device = "auto",
) -> Calibration:
    """Tests whether a guide is the posterior, on data from the model: where codes lie among the guide's draws for them.

    A code and a datum are drawn from the model, ``z ~ p(z), x ~ p(x|z)``, and L codes from the guide, ``q(z|x)``. If q
    is p(z|x), the rank of each number of z among the L is uniform over ``0 ... L``. Ranks at both ends say that the
    guide is too narrow, in the middle that it is too wide. The same is done with L codes that are chosen among K by
    their importance weights ``p(x, z) / q(z|x)``, as estimates of log p(x) use them: what these repair does no harm.

    It tells of data as the model makes them, of single numbers (not of how they go together), and of the guide alone: a
    wrong model is not found by it.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`. Observed values are replaced by simulated ones; other tensors of a tuple, such
            as labels, are kept.
        num_simulations: ``S``; data are gone through again where there are fewer. ``None`` for one for each datum,
            which data that are read as a stream need.
        num_draws: ``L``; ``L + 1`` must have a divisor from 2 to 20, into which ranks are binned: 63, 99 or 127 do.
        num_samples: ``K``, draws among which L are chosen, at least L.
        seed: As for `pvae.log_evidence`.
        device: As for `pvae.log_evidence`.

    Returns:
        `Calibration`, with the re-weighted one as its ``weighted``.

    Raises:
        ArgumentError: See the message.
        ProgramError: The model does not observe a data tensor as it is, has no latents, or one posterior of all data.
        NumericalError: A log-weight is nan or ``+inf``.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman, 2018, Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration; Yao, Vehtari, Simpson and Gelman, 2018, Yes, but Did It Work?

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5)
        >>> found = pvae.diagnostics.simulation_based_calibration(
        ...     pair.model, pair.guide, pair.sample(10, seed=0), num_simulations=100
        ... )
        >>> found.is_uniform(level=0.001)
        True
    """
    num_draws, num_samples = positive_int("num_draws", num_draws), positive_int("num_samples", num_samples)
    if num_samples < num_draws:
        raise ArgumentError(f"num_samples must be at least num_draws, {num_draws}, got {num_samples}.")
    if num_simulations is not None:
        _count_bins(num_draws, positive_int("num_simulations", num_simulations))
        data = _repeat(data, num_simulations)

    def measure(densities: Densities, batch: Batch, spans: list[int]) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
        return _rank(densities, batch, spans, num_draws)

    found = map_batches(measure, model, guide, data, num_samples=num_samples, seed=seed, device=device)
    names = found[0][0]
    ranks, weighted, ess = (torch.cat(parts) for parts in list(zip(*found, strict=True))[1:])
    _count_bins(num_draws, len(ranks))
    again = Calibration(weighted, num_draws, names, ess, is_weighted=True)
    return Calibration(ranks, num_draws, names, torch.full_like(ess, num_draws), weighted=again)


def _count_bins(num_draws: int, num_simulations: int) -> int:
    """The most bins of equally many ranks for which the test holds."""
    most = min(_MOST_BINS, num_simulations // _LEAST_COUNT)
    if most < 2:
        raise ArgumentError(
            f"num_simulations must be at least {2 * _LEAST_COUNT} for a test of uniform ranks, got {num_simulations}."
        )
    bins = max(b for b in range(1, most + 1) if (num_draws + 1) % b == 0)
    if bins < 2:
        raise ArgumentError(
            f"num_draws + 1 must have a divisor from 2 to {most}, so that ranks fall into equal bins; got "
            f"num_draws={num_draws}. Use 63, 99 or 127."
        )
    return bins


def _repeat(data: Data, count: int) -> tuple[Tensor, ...]:
    """So many data, the first ones again where there are fewer."""
    if isinstance(data, Dataset | DataLoader) and not isinstance(data, TensorDataset):
        raise ArgumentError(
            f"num_simulations must be None for a {type(data).__name__}, of which each datum is simulated once."
        )
    tensors = as_tensors("data", data)
    rows = torch.arange(count) % len(tensors[0])
    return tuple(t[rows.to(t.device)] for t in tensors)


def _rank(
    densities: Densities, batch: Batch, spans: list[int], num_draws: int
) -> tuple[tuple[str, ...], Tensor, Tensor, Tensor]:
    """Names of the entries, ranks and re-weighted ranks ``(N, D)``, and effective sample sizes ``(N,)``."""
    if not densities.has_latents:
        raise ProgramError("the model has no latent sites: there is nothing to calibrate.")
    if densities.is_joint:
        raise ProgramError(
            "all data have one posterior together here, as latents or the guide are outside of a plate over the data; "
            "such a guide was fitted to these data, and does not answer to simulated ones."
        )
    simulated, latents = densities.simulate(batch)
    z = flatten_entries(latents.values)[0]
    values, weights = [], []
    for span in spans:
        drawn, log_qz = densities.draw_guide(simulated, span)
        values.append(flatten_entries(drawn.values))
        weights.append(densities.log_pxz(simulated, drawn) - log_qz)
    draws, log_weights = torch.cat(values), torch.cat(weights).double()
    ess = WeightSums.of(log_weights).ess  # raises where a weight is no number
    shares = log_weights.softmax(0).nan_to_num(1.0)  # where no draw explains the datum, each is as likely to be chosen
    chosen = torch.multinomial(shares.T, num_draws, replacement=True).T
    resampled = draws.gather(0, chosen[..., None].expand(-1, -1, draws.shape[-1]))
    ranks, weighted = (_ranks_among(z, some).cpu() for some in (draws[:num_draws], resampled))
    return name_entries(latents.values), ranks, weighted, ess.cpu()


def _ranks_among(z: Tensor, draws: Tensor) -> Tensor:
    """How many of draws ``(L, N, D)`` are below z ``(N, D)``; among equal ones, as with discrete latents, by chance."""
    below, equal = (draws < z).sum(0), (draws == z).sum(0)
    return below + (torch.rand(below.shape, dtype=torch.float64, device=z.device) * (equal + 1)).long()
