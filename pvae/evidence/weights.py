"""Importance weights, summed as they stream by: pure tensors, nothing of Pyro.

For each datum ``n``, K draws from a proposal give log-weights ``log w_k = log p(x, z_k) - log q(z_k)``. All that is
wanted of them are a few running sums and the largest few weights; so memory does not grow with K, chunks may have any
size, and the sums of several chunks, calls or processes can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.errors import ArgumentError, NumericalError, positive_int
from pvae.evidence.pareto import Tail, fit_tail, tail_length

__all__ = ["Chunk", "WeightSums", "iwae_bounds"]


class Chunk(NamedTuple):
    """One chunk's log-weights and their sums, in the weights' own dtype and relative to the largest of each datum.

    Only tensor operations lead from the first to the others, so that they can be captured together with the draws.

    Attributes:
        log_weights: Shape ``(K, N)``.
        top: The largest, shape ``(N,)``; nan where any is nan.
        base: The same, but 0 where it is ``-inf``.
        relative: ``sum_k exp(log w_k - base)``.
        relative_squares: ``sum_k exp(log w_k - base)^2``.
        below: ``mean_k log w_k - base``.
        spread: ``sum_k (log w_k - mean)^2``.
    """

    log_weights: Tensor
    top: Tensor
    base: Tensor
    relative: Tensor
    relative_squares: Tensor
    below: Tensor
    spread: Tensor

    @classmethod
    def of(cls, log_weights: Tensor) -> Chunk:
        """The sums of log-weights of shape ``(K, N)``; in float32 at least."""
        w = log_weights.detach()
        w = w if w.dtype in (torch.float32, torch.float64) else w.float()
        top = w.amax(0)
        base = top.nan_to_num(neginf=0.0)
        below = w - base
        mean = below.mean(0)
        spread = (below - mean).square().sum(0)
        # What is lost below exp(lowest) is beyond float64, and spares the processor subnormal numbers.
        lowest = math.log(torch.finfo(w.dtype).tiny) / 2
        relative = below.clamp(min=lowest).exp()
        return cls(w, top, base, relative.sum(0), relative.square().sum(0), mean, spread)


@dataclass(frozen=True, eq=False)
class WeightSums:
    """Running sums over the log-weights of N data, in float64.

    Make one by `of`, go on with `add`, and join two by `merge`; the order and the sizes of the chunks do not matter
    beyond rounding. It holds nothing but tensors and an int, so it can be pickled and sent between processes.

    Attributes:
        num_samples: ``K``, how many draws each datum has had, shape ``(N,)``.
        log_sum: ``log sum_k w_k``, shape ``(N,)``.
        log_sum_squares: ``log sum_k w_k^2``, shape ``(N,)``.
        mean_log: ``mean_k log w_k``, shape ``(N,)``.
        squares_log: ``sum_k (log w_k - mean_log)^2``, shape ``(N,)``.
        log_variance: Log of the estimated variance of ``sum_k w_k``, shape ``(N,)``; nan for ``K = 1``.
        degrees_of_freedom: Of that estimate, shape ``(N,)``: ``inf`` for independent draws, ``R - 1`` from R
            replicates, fewer than draws from strata.
        candidates: Blocks of log-weights, ``(M, N)`` each, among which the largest ``capacity`` are, in no order;
            ``-inf`` fills up.
        floor: No log-weight at or below this is wanted any more, shape ``(N,)``.
        capacity: How many of the largest are kept, and known.
    """

    num_samples: Tensor
    log_sum: Tensor
    log_sum_squares: Tensor
    mean_log: Tensor
    squares_log: Tensor
    log_variance: Tensor
    degrees_of_freedom: Tensor
    candidates: tuple[Tensor, ...]
    floor: Tensor
    capacity: int

    @classmethod
    def of(cls, log_weights: Tensor | Chunk, max_samples: int | None = None) -> WeightSums:
        """The sums of one chunk.

        Args:
            log_weights: Shape ``(K, N)``, any floating dtype, or what was made of them. ``-inf`` is a weight of zero.
            max_samples: The number of draws in all chunks together; this chunk's by default.

        Raises:
            NumericalError: A log-weight is nan or ``+inf``.
        """
        chunk = Chunk.of(log_weights) if isinstance(log_weights, Tensor) else log_weights
        capacity = tail_length(max_samples or len(chunk.log_weights)) + 1
        return cls._of(chunk, capacity, torch.full_like(chunk.top, -torch.inf, dtype=torch.float64))

    @classmethod
    def _of(cls, chunk: Chunk, capacity: int, floor: Tensor) -> WeightSums:
        w, top, base, relative, relative_squares, below, spread = chunk
        _check(w, top)
        k, n = w.shape
        base = base.double()
        nothing = top.isneginf()
        log_sum = (relative.double().log() + base).masked_fill(nothing, -torch.inf)
        log_sum_squares = (relative_squares.double().log() + 2 * base).masked_fill(nothing, -torch.inf)
        # A weight of zero makes mean and spread of the logs -inf and nan; the ELBO is -inf then.
        mean = below.double() + base
        spread = torch.where(mean.isfinite(), spread.double(), torch.inf)
        counts = torch.full((n,), k, device=w.device)
        variance = _log_variance(counts, log_sum, log_sum_squares)
        kept = _above(w, floor, capacity)
        infinite = torch.full_like(variance, torch.inf)
        return cls(counts, log_sum, log_sum_squares, mean, spread, variance, infinite, (kept,), floor, capacity)

    def add(self, log_weights: Tensor | Chunk) -> WeightSums:
        """The sums with one more chunk, shape ``(K, N)``, of the same data."""
        chunk = Chunk.of(log_weights) if isinstance(log_weights, Tensor) else log_weights
        return self.merge(WeightSums._of(chunk, self.capacity, self.floor))

    def merge(self, other: WeightSums) -> WeightSums:
        """The sums over the draws of both, for the same data."""
        k, m = self.num_samples.double(), other.num_samples.double()
        # Of sums that dropped the smaller weights, only so many of the largest of both are known.
        dropped = [one.capacity for one in (self, other) if (one.num_samples > one.capacity).any()]
        capacity = min(dropped) if dropped else max(self.capacity, other.capacity)
        mean = (k * self.mean_log + m * other.mean_log) / (k + m)
        between = (self.mean_log - other.mean_log).square() * (k * m / (k + m))
        log_sum = torch.logaddexp(self.log_sum, other.log_sum)
        log_sum_squares = torch.logaddexp(self.log_sum_squares, other.log_sum_squares)
        candidates, floor = self.candidates + other.candidates, torch.maximum(self.floor, other.floor)
        if sum(map(len, candidates)) > 2 * capacity:
            candidates = (_largest(torch.cat(candidates), capacity),)
            floor = candidates[0].amin(0).double()
        counts = self.num_samples + other.num_samples
        return WeightSums(
            counts,
            log_sum,
            log_sum_squares,
            mean,
            torch.where(mean.isfinite(), self.squares_log + other.squares_log + between, torch.inf),
            _log_variance(counts, log_sum, log_sum_squares),
            torch.full_like(log_sum, torch.inf),
            candidates,
            floor,
            capacity,
        )

    @classmethod
    def of_replicates(cls, replicates: Sequence[WeightSums]) -> WeightSums:
        """The sums over R independent replicates of equal size whose draws are not independent within each.

        As with randomized quasi-Monte Carlo, whose points are made to fill space evenly: only the scatter of the
        replicates' means tells of the error, and that is what `std_error` is then.
        """
        if len(replicates) < 2:
            raise ArgumentError(f"an error from replicates needs at least 2 of them, got {len(replicates)}.")
        total = reduce(WeightSums.merge, replicates)
        sums = torch.stack([one.log_sum for one in replicates])
        counts = torch.full_like(total.num_samples, len(replicates))
        variance = _log_variance(counts, sums.logsumexp(0), (2 * sums).logsumexp(0))
        degrees = torch.full_like(variance, len(replicates) - 1.0)
        return replace(total, log_variance=variance, degrees_of_freedom=degrees)

    @classmethod
    def of_strata(cls, strata: Sequence[WeightSums], shares: Sequence[float]) -> WeightSums:
        """The sums over the parts of a mixture whose numbers of draws were not left to chance.

        ``sum_j share_j mean_j(w)``: only the scatter within each part is error, not how far apart their means are. It
        is known from as many draws as count in that part, ``ESS_j``, and has Satterthwaite's degrees of freedom. Where
        a share of K is less than one draw, or a part has had none, the draws are those of the mixture.

        Source: Owen and Zhou, 2000, Safe and Effective Importance Sampling.
        """
        total = int(sum(part.num_samples[0] for part in strata))
        if len(strata) < len(shares) or total * min(shares) < 1:
            return reduce(WeightSums.merge, strata)
        factors = [share * total / int(part.num_samples[0]) for part, share in zip(strata, shares, strict=True)]
        scaled = [part._times(math.log(factor)) for part, factor in zip(strata, factors, strict=True)]
        pooled = reduce(WeightSums.combine, scaled)
        if len(strata) == 1:
            return pooled
        spread = sum((2 * part.log_variance - 2 * pooled.log_variance).exp() / (part.ess - 1) for part in scaled)
        degrees = (1 / torch.as_tensor(spread)).nan_to_num(torch.inf, posinf=torch.inf)
        return replace(pooled, degrees_of_freedom=degrees.clamp(min=1.0))

    def _times(self, log_factor: float) -> WeightSums:
        """The sums of weights that are so much larger; what is known of the logs themselves stays."""
        moved = {name: getattr(self, name) + log_factor for name in ("log_sum", "floor")}
        moved |= {name: getattr(self, name) + 2 * log_factor for name in ("log_sum_squares", "log_variance")}
        return replace(self, **moved, candidates=tuple(block + log_factor for block in self.candidates))

    def combine(self, other: WeightSums) -> WeightSums:
        """As `merge`, for sums whose draws came about in different ways: their variances are added, not pooled.

        Where one has no variance, as for K = 1, they are pooled after all.
        """
        pooled, added = self.merge(other), torch.logaddexp(self.log_variance, other.log_variance)
        variance = torch.where(added.isnan(), pooled.log_variance, added)
        degrees = torch.minimum(self.degrees_of_freedom, other.degrees_of_freedom)
        return replace(pooled, log_variance=variance, degrees_of_freedom=degrees)

    def __getitem__(self, rows: Tensor) -> WeightSums:
        """The sums of some of the data, by their indices."""
        return self._map(lambda t: t[..., rows])

    def put(self, rows: Tensor, sums: WeightSums) -> WeightSums:
        """A copy with the sums of some of the data replaced."""
        longest = max(len(self.largest), len(sums.largest))
        mine, theirs = self._tensors(longest), sums._tensors(longest)
        for name, tensor in mine.items():
            tensor[..., rows] = theirs[name]
        return self._from(mine, max(self.capacity, sums.capacity))

    @classmethod
    def cat(cls, parts: Iterable[WeightSums]) -> WeightSums:
        """The sums of several sets of data, one after the other."""
        parts = list(parts)
        tensors = [part._tensors(max(len(one.largest) for one in parts)) for part in parts]
        joined = {name: torch.cat([t[name] for t in tensors], dim=-1) for name in tensors[0]}
        return cls._from(joined, max(part.capacity for part in parts))

    def cpu(self) -> WeightSums:
        """The sums on the CPU, with no more candidates than wanted."""
        return replace(self, candidates=(self.largest,))._map(torch.Tensor.cpu)

    @cached_property
    def largest(self) -> Tensor:
        """The largest log-weights in descending order, shape ``(min(M, capacity), N)``."""
        joined = torch.cat(self.candidates)
        return joined.topk(min(self.capacity, len(joined)), dim=0).values.double()

    @property
    def log_px(self) -> Tensor:
        """``log (1/K) sum_k w_k``, nats per datum, shape ``(N,)``: consistent, and low in the mean (Jensen)."""
        return self.log_sum - self.num_samples.double().log()

    @property
    def bias(self) -> Tensor:
        """Second-order bias of `log_px`, ``-Var(w) / (2 K mean(w)^2) = -std_error^2 / 2``, nats, shape ``(N,)``."""
        return -self.std_error.square() / 2

    @property
    def ess(self) -> Tensor:
        """Effective sample size ``(sum_k w_k)^2 / sum_k w_k^2``, from 1 to K, shape ``(N,)``; 0 if all weights are.

        Source: Kong, 1992, A Note on Importance Sampling using Standardized Weights.
        """
        ess = torch.minimum((2 * self.log_sum - self.log_sum_squares).exp(), self.num_samples.double())
        return ess.masked_fill(self.log_sum.isneginf(), 0.0)

    @property
    def std_error(self) -> Tensor:
        """Delta-method standard error of `log_px`, ``sd(w) / (sqrt(K) mean(w))``, nats, shape ``(N,)``; nan for K = 1.

        Low where the weights' tail is heavy: see `khat`.
        """
        return (self.log_variance / 2 - self.log_sum).exp()

    @property
    def elbo(self) -> Tensor:
        """``mean_k log w_k``, nats per datum, shape ``(N,)``: estimates ``E_q[log p(x, z) - log q(z)] <= log p(x)``."""
        return self.mean_log

    @property
    def elbo_std_error(self) -> Tensor:
        """Standard error of `elbo`, nats, shape ``(N,)``; nan for K = 1."""
        k = self.num_samples.double()
        return torch.where(k > 1, self.squares_log / (k - 1) / k, torch.nan).sqrt()

    @property
    def khat(self) -> Tensor:
        """Pareto k-hat of the weights' tail, shape ``(N,)``; see `pvae.evidence.pareto.pareto_khat`."""
        return self._tail.khat

    @property
    def log_px_psis(self) -> Tensor:
        """`log_px` with the largest weights smoothed, nats per datum, shape ``(N,)``; `log_px` where there is no fit.

        The M largest weights are replaced by quantiles of the generalized Pareto distribution fitted to them: less
        variance for some bias. Source: Vehtari et al., 2024, Pareto Smoothed Importance Sampling.
        """
        _, log_tail, log_smoothed = self._tail
        # log(1 - exp(-d)) for the share of the weights outside of the tail
        share = (log_tail - self.log_sum).clamp(max=0.0)
        rest = self.log_sum + torch.log(-torch.expm1(share))
        smoothed = torch.logaddexp(rest, log_smoothed) - self.num_samples.double().log()
        return torch.where(log_smoothed.isnan(), self.log_px, smoothed)

    @cached_property
    def _tail(self) -> Tail:
        """The fit for each datum, those with the same number of draws together."""
        largest = self.largest
        tail = Tail(*(torch.full_like(self.log_sum, torch.nan) for _ in Tail._fields))
        for k in self.num_samples.unique().tolist():
            rows = (self.num_samples == k).nonzero()[:, 0]
            for whole, part in zip(tail, fit_tail(largest[:, rows], k), strict=True):
                whole[rows] = part
        return tail

    def _map(self, function: Callable[[Tensor], Tensor]) -> WeightSums:
        tensors = {f.name: function(getattr(self, f.name)) for f in fields(self) if f.name not in _NOT_TENSORS}
        return WeightSums(**tensors, candidates=tuple(map(function, self.candidates)), capacity=self.capacity)

    def _tensors(self, rows: int) -> dict[str, Tensor]:
        """Copies of all tensors by name, the candidates as one of so many rows."""
        tensors = {f.name: getattr(self, f.name).clone() for f in fields(self) if f.name not in _NOT_TENSORS}
        fill = self.largest.new_full((rows - len(self.largest), len(self.log_sum)), -torch.inf)
        return tensors | {"candidates": torch.cat([self.largest, fill])}

    @classmethod
    def _from(cls, tensors: dict[str, Tensor], capacity: int) -> WeightSums:
        return cls(**tensors | {"candidates": (tensors["candidates"],)}, capacity=capacity)  # type: ignore[arg-type]


_NOT_TENSORS = ("candidates", "capacity")


def iwae_bounds(log_weights: Tensor, num_samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The IWAE bounds ``L_k = E[log (1/k) sum_{i<=k} w_i]`` of several k, from one set of weights.

    The K weights of a datum are cut into ``K // k`` groups of k, and the groups' values averaged; ``L_1`` is the ELBO,
    and the bounds rise with k towards log p(x). Where one k divides the next, so do their estimates.

    Args:
        log_weights: Nats, shape ``(K, N)``, as from `pvae.log_weights`.
        num_samples: The k wanted, each at most K.

    Returns:
        The bounds and their standard errors, nats per datum, each of shape ``(len(num_samples), N)``; an error is nan
        where K has room for one group only.

    Source: Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.
    """
    bounds, errors = [], []
    for k in num_samples:
        groups = len(log_weights) // positive_int("num_samples", k)
        if not groups:
            raise ArgumentError(f"num_samples must be at most K = {len(log_weights)}, the weights there are; got {k}.")
        grouped = log_weights[: groups * k].double().reshape(groups, k, -1)
        values = grouped.logsumexp(1) - math.log(k)
        bounds.append(values.mean(0))
        errors.append(values.std(0) / groups**0.5 if groups > 1 else torch.full_like(values[0], torch.nan))
    return torch.stack(bounds), torch.stack(errors)


def _check(w: Tensor, top: Tensor) -> None:
    if not (top.isnan() | top.isposinf()).any():
        return
    bad = w.isnan() | w.isposinf()
    datum = int(bad.any(0).nonzero()[0])
    raise NumericalError(
        f"{int(bad.sum())} of {w.numel()} log-weights are nan or +inf, the first for datum {datum} of its "
        "batch. A density of the model or the guide is not finite there: look at its scales."
    )


def _log_variance(num_samples: Tensor, log_sum: Tensor, log_sum_squares: Tensor) -> Tensor:
    """``log(K^2 Var(mean_k w_k))`` of K independent terms, ``(K sum w^2 - (sum w)^2) / (K - 1)``; nan for K = 1."""
    k = num_samples.double()
    ess = torch.minimum((2 * log_sum - log_sum_squares).exp(), k)
    relative = torch.where(k > 1, (k / ess - 1) / (k - 1), torch.nan)
    return relative.log() + 2 * log_sum


def _largest(w: Tensor, count: int) -> Tensor:
    """The largest entries of each column, in no order."""
    if w.is_cuda:
        return w.topk(count, dim=0, sorted=False).values
    # NumPy's selection is several times as fast as torch's on a CPU.
    rows = w.T.contiguous()
    rows.numpy().partition(len(w) - count, axis=1)
    return rows[:, len(w) - count :].T.contiguous()


def _above(w: Tensor, floor: Tensor, most: int) -> Tensor:
    """The at most ``most`` largest entries above ``floor`` of each column, ``(M, N)``, filled up with ``-inf``."""
    if floor.isneginf().any():
        return w if most >= len(w) else w.topk(most, dim=0).values
    rows, columns = (w > floor.to(w)).nonzero(as_tuple=True)
    counts = torch.bincount(columns, minlength=w.shape[1])
    columns, order = columns.sort(stable=True)
    places = torch.arange(len(columns), device=w.device) - (counts.cumsum(0) - counts)[columns]
    kept = w.new_full((int(counts.max()), w.shape[1]), -torch.inf)
    kept[places, columns] = w[rows[order], columns]
    return kept
