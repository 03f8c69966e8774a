"""`log_evidence`: log p(x) of any Pyro pair by importance sampling, and how far each number can be trusted."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, TypeVar

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pvae.checks import Data, as_tensors
from pvae.errors import ArgumentError, NumericalError, positive_int
from pvae.evidence import proposals
from pvae.evidence.traces import Pair
from pvae.evidence.weights import MIN_SAMPLES_FOR_KHAT, WeightSums
from pvae.isolation import Program, isolated, modules_of, outside_modules, place, resolve_seed

if TYPE_CHECKING:
    import xarray

__all__ = ["KHAT_LIMIT", "EvidenceEstimate", "log_evidence", "log_weights"]

KHAT_LIMIT = 0.7
"""Above this k-hat neither an estimate nor its standard error can be trusted (Vehtari et al., 2024)."""


@dataclass(frozen=True, eq=False, repr=False)
class EvidenceEstimate:
    """Estimates of log p(x) for N data, with what is known of their error. All tensors are float64, on the CPU.

    Attributes:
        log_px: ``log (1/K) sum_k w_k``, nats per datum, shape ``(N,)``. Low in the mean by about ``std_error^2 / 2``.
        std_error: Its Monte Carlo standard error (delta method), nats, shape ``(N,)``; nan for K = 1.
        ess: Effective sample size, from 1 to K, shape ``(N,)``.
        khat: Pareto k-hat of the weights, shape ``(N,)``: above 0.7 do not trust the estimate or its error; ``-inf``
            for equal weights, nan for K < 25.
        elbo: ``mean_k log w_k``, nats per datum, shape ``(N,)``; with the guide as proposal, the ELBO.
        elbo_std_error: Its Monte Carlo standard error, nats, shape ``(N,)``; nan for K = 1.
        num_samples: ``K``, draws for each datum.
        proposal: Where the draws came from.
        seed: The seed used, also where ``seed=None`` asked for a fresh one.
        shared_draws: Whether data shared draws, so that their errors are correlated.
        seconds: How long it took.
    """

    log_px: Tensor
    std_error: Tensor
    ess: Tensor
    khat: Tensor
    elbo: Tensor
    elbo_std_error: Tensor
    num_samples: int
    proposal: str
    seed: int
    shared_draws: bool
    seconds: float

    @property
    def num_data(self) -> int:
        """How many data, ``N``."""
        return len(self.log_px)

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
        """Which data have a k-hat above 0.7, or none at all; bool, shape ``(N,)``."""
        return ~(self.khat <= KHAT_LIMIT)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """A confidence interval for log p(x) of each datum.

        ``log_px + std_error^2 / 2 -+ z std_error``: the second-order bias of the logarithm is added back, without which
        such an interval covers too little. Withheld (nan) where `unreliable`, as no interval is honest there.

        Args:
            level: Coverage aimed at, between 0 and 1.

        Returns:
            Lower and upper ends, nats per datum, each of shape ``(N,)``.
        """
        if not 0 < level < 1:
            raise ArgumentError(f"level must lie between 0 and 1, got {level!r}.")
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2, dtype=torch.float64))
        centre = (self.log_px + self.std_error.square() / 2).masked_fill(self.unreliable, torch.nan)
        return centre - z * self.std_error, centre + z * self.std_error

    def to_dataset(self) -> xarray.Dataset:
        """The estimates as an ``xarray.Dataset`` over the dimension ``"datum"`` (xarray comes with ArviZ)."""
        import xarray

        values = {
            name: getattr(self, name) for name in ("log_px", "std_error", "ess", "khat", "elbo", "elbo_std_error")
        }
        attributes = {"num_samples": self.num_samples, "proposal": self.proposal, "seed": self.seed, "units": "nats"}
        return xarray.Dataset({k: ("datum", v.numpy()) for k, v in values.items()}, attrs=attributes)

    def __repr__(self) -> str:
        bad = int(self.unreliable.sum())
        if self.num_samples < MIN_SAMPLES_FOR_KHAT:
            verdict = f"k-hat needs at least {MIN_SAMPLES_FOR_KHAT} samples: how far to trust this is not known"
        elif bad:
            verdict = (
                f"{bad} of {self.num_data} data are unreliable (k-hat > {KHAT_LIMIT}): take theirs as lower bounds"
            )
        else:
            verdict = f"all {self.num_data} data have k-hat <= {KHAT_LIMIT}"
        return "\n".join(
            [
                f"log p(x) of {self.num_data} data, {self.num_samples} samples each from the {self.proposal}",
                f"  mean       {self.mean:10.3f} nats per datum",
                f"  std error  {self.mean_std_error:10.3f} (Monte Carlo), {self.data_std_error:.3f} (over the data)",
                f"  ELBO       {self.elbo.mean().item():10.3f}",
                f"  ESS        {self.ess.median().item():10.1f} (median, of {self.num_samples})",
                f"  k-hat      {self.khat.median().item():10.2f} (median)",
                f"  {verdict}",
            ]
        )


def log_evidence(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | proposals.Proposal = "guide",
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
    progress: bool = False,
) -> EvidenceEstimate:
    """Estimates log p(x) for each datum by importance sampling.

    ``log p(x) = log E_q[w]`` with ``w = p(x, z) / q(z)``, estimated by ``log (1/K) sum_k w_k`` over K draws of z. The
    pair can be any Pyro programs with one plate over the data around all their sites. Draws and data stream through in
    chunks; memory does not grow with K. Nothing is trained: parameters, modes, random numbers and param store are left
    as they were, but modules stay on ``device``.

    Args:
        model: The generative program.
        guide: The recognition program, with the model's latent sites.
        data: ``(N, *event)``, or a tuple of arrays with the same ``N``. Converted as by `pvae.fit`.
        num_samples: ``K``, draws for each datum; exactly that many are made.
        proposal: ``"guide"`` draws from q(z|x); ``"prior"`` draws from p(z). Or a `pvae.evidence.proposals.Proposal`.
        seed: Same seed, same machine, same versions, same chunk size: same bits. ``None`` for a fresh one.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"``, ``"cuda"`` or a ``torch.device``.
        chunk_size: How many pairs of a draw and a datum to evaluate at once; bounds memory. Chosen by the size of a
            datum if left out.
        progress: Show a bar on stderr, if that is a terminal.

    Returns:
        An `EvidenceEstimate`.

    Raises:
        ArgumentError, DataError, DeviceError: See the message.
        ProgramError: No plate over the data, sites outside of it, latent sites that differ, a guide with point masses.
        NumericalError: A log-weight is nan or ``+inf``.

    Source: Rezende, Mohamed and Wierstra, 2014, Stochastic Backpropagation and Approximate Inference in Deep
    Generative Models, appendix E; Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.
    """
    start = time.perf_counter()
    num_samples, seed = positive_int("num_samples", num_samples), resolve_seed(seed)
    proposal = proposals.resolve(proposal)

    def summed(chunks: Iterator[Tensor]) -> dict[str, Tensor]:
        sums = reduce(WeightSums.merge, (WeightSums.of(chunk, num_samples) for chunk in chunks))
        return {name: getattr(sums, name).cpu() for name in _PER_DATUM}

    shared, parts = _each_batch(summed, model, guide, data, num_samples, proposal, seed, device, chunk_size, progress)
    return EvidenceEstimate(
        **{name: torch.cat([part[name] for part in parts]) for name in _PER_DATUM},
        num_samples=num_samples,
        proposal=proposal.name,
        seed=seed,
        shared_draws=shared,
        seconds=time.perf_counter() - start,
    )


def log_weights(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | proposals.Proposal = "guide",
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """The log-weights behind `log_evidence`, ``log p(x, z_k) - log q(z_k)``, kept instead of summed.

    Takes and raises what `log_evidence` does; for the same arguments these are the same draws.

    Returns:
        Nats, float64, on the CPU, of shape ``(K, N)``, which takes ``8 K N`` bytes of memory.
    """
    num_samples, seed = positive_int("num_samples", num_samples), resolve_seed(seed)
    proposal = proposals.resolve(proposal)

    def kept(chunks: Iterator[Tensor]) -> Tensor:
        return torch.cat([chunk.cpu() for chunk in chunks])

    _, parts = _each_batch(kept, model, guide, data, num_samples, proposal, seed, device, chunk_size, progress)
    return torch.cat(parts, dim=1)


_PER_DATUM = ("log_px", "std_error", "ess", "khat", "elbo", "elbo_std_error")

T = TypeVar("T")


def _each_batch(
    consume: Callable[[Iterator[Tensor]], T],
    model: Program,
    guide: Program,
    data: Data,
    num_samples: int,
    proposal: proposals.Proposal,
    seed: int,
    device: str | torch.device,
    chunk_size: int | None,
    progress: bool,
) -> tuple[bool, list[T]]:
    """Hands each batch's log-weights to ``consume``, as an iterator over chunks ``(k, n)``.

    Returns:
        Whether data shared draws, and what ``consume`` returned for each batch.
    """
    if chunk_size is not None:
        chunk_size = positive_int("chunk_size", chunk_size)
    modules = modules_of(model, guide)
    chosen, tensors = place(modules, as_tensors("data", data), device)
    total = len(tensors[0]) * num_samples
    known = outside_modules(pyro.get_param_store())
    with (
        isolated(modules, seed=seed, device=chosen, params=known) as store,
        tqdm(total=total, unit=" draws", unit_scale=True, disable=None if progress else True) as bar,
    ):
        pair = Pair.of(model, guide, tensors, chosen)
        _warn_of_initial_values(outside_modules(store)["params"].keys() - known["params"].keys())
        shared = proposal.shares_draws(pair)
        rows, draws = _chunk_shape(tensors, num_samples, chunk_size, chosen, shared)

        def chunks(batch: tuple[Tensor, ...]) -> Iterator[Tensor]:
            for done in range(0, num_samples, draws):
                k = min(draws, num_samples - done)
                yield proposal.log_weights(pair, batch, k)
                bar.update(k * len(batch[0]))

        results = []
        for number, batch in enumerate(zip(*(t.split(rows) for t in tensors), strict=True)):
            try:
                results.append(consume(chunks(tuple(t.to(chosen) for t in batch))))
            except NumericalError as error:
                raise NumericalError(f"in the batch that begins with datum {number * rows}: {error}") from None
        return shared, results


def _chunk_shape(
    tensors: tuple[Tensor, ...], num_samples: int, chunk_size: int | None, device: torch.device, shared: bool
) -> tuple[int, int]:
    """How many data and how many draws to evaluate at once.

    Chosen so that activations fit the caches of a CPU, or use a small part of a GPU's memory. Shared draws make a
    square: what is computed for each draw is spread over many data, and there are no activations for each pair.
    """
    num_data, cuda = len(tensors[0]), device.type == "cuda"
    if shared:
        pairs = chunk_size or (2**24 if cuda else 2**21)
        draws = min(num_samples, math.isqrt(pairs))
        return min(num_data, max(1, pairs // draws)), draws
    most, entries = (2**18, 2**27) if cuda else (2**13, 2**22)
    pairs = chunk_size or max(1, min(most, entries // max(t[0].numel() for t in tensors)))
    rows = min(num_data, max(1, pairs // num_samples))
    return rows, max(1, pairs // rows)


def _warn_of_initial_values(names: Iterable[str]) -> None:
    if names:
        warnings.warn(
            f"parameters {sorted(names)} have their initial values: the param store holds none of these names. After "
            "pvae.fit, evaluate inside `with result.trained():`.",
            stacklevel=4,
        )
