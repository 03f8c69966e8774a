"""`log_evidence`: log p(x) of any Pyro pair by importance sampling, and how far each number can be trusted."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from pvae.capture import Captured, worth_compiling
from pvae.data import Data
from pvae.errors import ArgumentError, positive_int, yes_no_or_auto
from pvae.evidence import proposals
from pvae.evidence.estimates import KHAT_LIMIT, EvidenceEstimate
from pvae.evidence.planning import chunk_shape, default_chunk_size
from pvae.evidence.proposals.base import Proposal, Sampler
from pvae.evidence.session import Session, fingerprints, opened
from pvae.evidence.traces import Batch
from pvae.evidence.weights import Chunk, WeightSums
from pvae.runtime import Processes, Program, in_turn, modules_of, resolve_processes, resolve_seed

__all__ = ["log_evidence", "log_weights"]

logger = logging.getLogger("pvae")

_MAX_SAMPLES = 100_000
# What errors say that have no class of their own.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

T = TypeVar("T")


@in_turn
def log_evidence(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | Proposal | Program = "guide",
    target_std_error: float | None = None,
    max_samples: int | None = None,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
    compile: bool | str = "auto",
    distributed: bool | str = "auto",
    progress: bool = False,
) -> EvidenceEstimate:
    """Estimates log p(x) for each datum by importance sampling.

    ``log p(x) = log E_q[w]`` with ``w = p(x, z) / q(z)``, estimated by ``log (1/K) sum_k w_k`` over K draws of z. The
    pair can be any Pyro programs with one plate over the data around all their sites. Draws and data stream through in
    chunks; memory does not grow with K. Nothing is trained: parameters, modes, random numbers and param store are left
    as they were, but modules stay on ``device``. Calls in several threads take turns.

    Args:
        model: The generative program.
        guide: The recognition program, with the model's latent sites.
        data: ``(N, *event)``, or a tuple of arrays with the same ``N``. Converted as by `pvae.fit`. Or a torch
            ``Dataset`` or ``DataLoader``, which is read once, in order.
        num_samples: ``K``, draws for each datum; exactly that many are made.
        proposal: ``"guide"`` draws from q(z|x); ``"prior"`` from p(z). ``"refined"`` and ``"laplace"`` fit a Gaussian
            to each datum, ``"student-t"`` gives the guide heavier tails, ``"defensive"`` mixes in the prior, ``"ais"``
            anneals from the guide. Or a `pvae.evidence.proposals.Proposal`, or another Pyro guide.
        target_std_error: In nats per datum. Data whose standard error is above it, or whose k-hat is above 0.7, get
            twice as many draws, and so on until none are left or they have had ``max_samples``. These draws only decide
            how many each datum needs. It then gets as many fresh ones, because an estimate that stopped where its error
            looked small would be biased.
        max_samples: The most draws for one datum then; 100,000 if left out.
        seed: Same seed, same machine, same versions, same chunk size: same bits. ``None`` for a fresh one.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"``, ``"cuda"`` or a ``torch.device``.
        chunk_size: How many pairs of a draw and a datum to evaluate at once; bounds memory. Chosen by the size of a
            datum if left out. Where memory does not suffice, it is halved, which is logged, and all is begun again: the
            result is that of the smaller number.
        compile: Whether to capture and compile what is done for a chunk, as in `pvae.fit`: some seconds at first, then
            three times as fast. ``"auto"`` does so for large runs. The same draws, and the same numbers within
            rounding. Proposals that keep more than a Gaussian for each datum (``"ais"``, ``"defensive"``, Sobol points)
            are not captured.
        distributed: Whether the processes of torch.distributed's default group, as torchrun starts them, share the
            data; each datum is evaluated once, and all get the whole result. ``"auto"`` does so where there is a group.
        progress: Show a bar on stderr, if that is a terminal.

    Returns:
        An `EvidenceEstimate`.

    Raises:
        ArgumentError, DataError, DeviceError: See the message.
        ProgramError: No plate over the data, sites outside of it, latent sites that differ, a guide with point masses,
            or latents that the proposal cannot move, such as discrete ones.
        NumericalError: A log-weight is nan or ``+inf``.
        MemoryError: There is none for even one draw of one datum.

    Source: Rezende, Mohamed and Wierstra, 2014, Stochastic Backpropagation and Approximate Inference in Deep
    Generative Models, appendix E; Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.
    """
    start = time.perf_counter()
    num_samples, seed = positive_int("num_samples", num_samples), resolve_seed(seed)
    compile = yes_no_or_auto("compile", compile)
    chosen = proposals.resolve(proposal)
    limit = _limit(num_samples, target_std_error, max_samples, chosen.replicates or 1)

    def summed(draws: _Draws) -> tuple[WeightSums, dict[str, Tensor]]:
        if target_std_error is None:
            return draws.summed(num_samples, num_samples)
        return draws.summed_each(draws.plan(num_samples, limit, target_std_error), limit)

    task = _Task(model, guide, data, chosen, num_samples, seed, device, compile, distributed, progress)
    parts, seed, shared, precision = task.done(summed, chunk_size)
    sums = WeightSums.cat(part[0] for part in parts)
    diagnostics = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    return EvidenceEstimate(
        sums,
        chosen.name,
        seed,
        shared,
        time.perf_counter() - start,
        target_std_error=target_std_error,
        diagnostics=diagnostics,
        precision=precision,
        words=chosen.words,
    )


@in_turn
def log_weights(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | Proposal | Program = "guide",
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
    compile: bool | str = "auto",
    distributed: bool | str = "auto",
    progress: bool = False,
) -> Tensor:
    """The log-weights behind `log_evidence`, ``log p(x, z_k) - log q(z_k)``, kept instead of summed.

    Takes and raises what `log_evidence` does; for the same arguments these are the same draws.

    Returns:
        Nats, float64, on the CPU, of shape ``(K, N)``, which takes ``8 K N`` bytes of memory.
    """
    num_samples, seed = positive_int("num_samples", num_samples), resolve_seed(seed)
    compile = yes_no_or_auto("compile", compile)
    chosen = proposals.resolve(proposal)
    _limit(num_samples, None, None, chosen.replicates or 1)
    task = _Task(model, guide, data, chosen, num_samples, seed, device, compile, distributed, progress)
    parts, *_ = task.done(lambda draws: draws.kept(num_samples), chunk_size)
    return torch.cat(parts, dim=1)


class _Task(NamedTuple):
    """What is to be evaluated."""

    model: Program
    guide: Program
    data: Data
    proposal: Proposal
    num_samples: int
    seed: int
    device: str | torch.device
    compile: bool | str
    distributed: bool | str
    progress: bool

    def done(self, work: Callable[[_Draws], T], chunk_size: int | None) -> tuple[list[T], int, bool, float]:
        """The work's results for each block of the data, in order; the seed; if data shared draws; the precision."""
        processes = resolve_processes(self.distributed)
        seed = processes.broadcast(self.seed)
        alike: dict[str, Any] = {"num_samples": self.num_samples, "proposal": self.proposal.name}
        if processes.world_size > 1:
            with processes.together():
                alike |= fingerprints(self.data, self.model, self.guide, self.proposal)
        processes.agree(**alike)
        size = None if chunk_size is None else positive_int("chunk_size", chunk_size)
        with processes.together():
            done, shared, precision = _with_the_memory_there_is(
                lambda halvings: self._tried(work, size, halvings, processes, seed)
            )
        parts = sorted((part for parts in processes.all_gather(done) for part in parts), key=itemgetter(0))
        return [part for _, part in parts], seed, shared, precision

    def _tried(
        self, work: Callable[[_Draws], T], chunk_size: int | None, halvings: int, processes: Processes, seed: int
    ) -> tuple[list[tuple[int, T]], bool, float]:
        options: dict[str, Any] = {"others": (self.proposal,), "processes": processes, "streams": True}
        with (
            opened(self.model, self.guide, self.data, seed=seed, device=self.device, **options) as session,
            _bar(self.progress and processes.is_main) as bar,
        ):
            capture = _to_capture(self.compile, session, self.proposal, self.num_samples)
            size = (chunk_size or default_chunk_size(session, self.proposal)) >> halvings
            if not size:
                raise MemoryError("there is no memory for even one draw of one datum at a time")
            if halvings:
                logger.warning("out of memory: beginning again with chunks of chunk_size=%d", size)
            draws = _Draws(session, self.proposal, size, capture, bar)
            done = []
            for number, block in session.blocks():
                draws.session = block
                done.append((number, work(draws)))
            return done, self.proposal.shares_draws(session.pair), session.precision


def _with_the_memory_there_is(work: Callable[[int], T]) -> T:
    """Does work that takes a number of halvings of its chunks, as few as memory allows.

    The work raises `MemoryError` where there is nothing left to halve.
    """
    halvings, cause = 0, None
    while True:
        try:
            return work(halvings)
        except MemoryError as error:
            raise error from cause
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and not any(said in str(error) for said in _OUT_OF_MEMORY):
                raise
            cause = error.with_traceback(None)  # without the frames, which hold on to memory
        halvings += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Draws:
    """Draws from a proposal, batch by batch and chunk by chunk."""

    def __init__(self, session: Session, proposal: Proposal, chunk_size: int, capture: bool, bar: tqdm) -> None:
        self.session = session
        self.proposal = proposal
        self.chunk_size = chunk_size
        self.replicates = proposal.replicates or 1
        self.capture = capture
        self.captured: dict[int, Captured] = {}
        self.bar = bar

    def summed(self, num_samples: int, limit: int, rows: Tensor | None = None) -> tuple[WeightSums, dict[str, Tensor]]:
        """The sums over K draws for each datum, ready for ``limit`` of them, and the proposal's diagnostics."""

        def one(batch: Batch, size: int) -> tuple[WeightSums, dict[str, Tensor]]:
            sampler = self.proposal.on(self.session.pair, batch)
            replicates = [
                _summed(chunks, limit, sampler.shares)
                for _, chunks in groupby(self._chunks(sampler, num_samples, size), key=itemgetter(0))
            ]
            sums = WeightSums.of_replicates(replicates) if self.proposal.replicates else replicates[0]
            return sums.cpu(), {name: value.cpu() for name, value in sampler.diagnostics.items()}

        parts = self._each_batch(one, num_samples, rows)
        diagnostics = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
        return WeightSums.cat(part[0] for part in parts), diagnostics

    def plan(self, num_samples: int, limit: int, target: float) -> Tensor:
        """How many draws each datum needs for a standard error of ``target`` and a good k-hat, found by doubling."""
        sums, _ = self.summed(num_samples, limit)
        rows = torch.arange(self.session.num_data)
        while True:
            # A margin, since the error of the fresh draws scatters.
            enough = (sums.khat[rows] <= KHAT_LIMIT) & (sums.std_error[rows] <= 0.8 * target)
            rows = rows[~enough]
            done = int(sums.num_samples.max())
            if not len(rows) or done == limit:
                return sums.num_samples
            more = min(done, limit - done) // self.replicates * self.replicates
            extra, _ = self.summed(more, limit, rows)
            sums = sums.put(rows, sums[rows].combine(extra))

    def summed_each(self, wanted: Tensor, limit: int) -> tuple[WeightSums, dict[str, Tensor]]:
        """As `summed`, for a number of draws for each datum, shape ``(N,)``."""
        groups = [(wanted == k).nonzero()[:, 0] for k in wanted.unique()]
        parts = [self.summed(int(wanted[rows[0]]), limit, rows) for rows in groups]
        order = torch.cat(groups).argsort()
        diagnostics = {name: torch.cat([part[1][name] for part in parts])[order] for name in parts[0][1]}
        return WeightSums.cat(part[0] for part in parts)[order], diagnostics

    def kept(self, num_samples: int) -> Tensor:
        """The log-weights themselves, ``(K, N)``."""

        def one(batch: Batch, size: int) -> Tensor:
            sampler = self.proposal.on(self.session.pair, batch)
            # One block from the start: small ones, made between large ones that go, would keep the heap from shrinking.
            kept, done = torch.empty(num_samples, len(batch[0]), dtype=torch.float64), 0
            for *_, (w, *_) in self._chunks(sampler, num_samples, size):
                kept[done : done + len(w)] = w
                done += len(w)
            return kept

        return torch.cat(self._each_batch(one, num_samples), dim=1)

    def _each_batch(self, function: Callable[[Batch, int], T], num_samples: int, rows: Tensor | None = None) -> list[T]:
        total = self.session.num_data if rows is None else len(rows)
        self.bar.total += num_samples * total
        size, draws = chunk_shape(total, num_samples, self.session, self.proposal, self.chunk_size)
        return self.session.each_batch(lambda batch: function(batch, draws), size, rows)

    def _chunks(self, sampler: Sampler, num_samples: int, size: int) -> Iterator[tuple[int, int, Chunk]]:
        """Log-weights ``(k, n)`` as they are drawn, with their sums, and the numbers of their replicate and stratum."""
        each = num_samples // self.replicates
        for replicate in range(self.replicates):
            sampler.restart()
            for done in range(0, each, size):
                for stratum, chunk in self._strata(sampler, min(size, each - done)):
                    yield replicate, stratum, chunk
                    self.bar.update(chunk.log_weights.numel())

    def _strata(self, sampler: Sampler, num_samples: int) -> Iterator[tuple[int, Chunk]]:
        tensors = sampler.tensors
        if tensors is None or not self.capture:
            yield from ((i, Chunk.of(part)) for i, part in enumerate(sampler.strata(num_samples)) if len(part))
        else:
            yield 0, self._chunk(sampler, tensors, num_samples)

    def _chunk(self, sampler: Sampler, tensors: tuple[Tensor, ...], num_samples: int) -> Chunk:
        if num_samples not in self.captured:
            split = len(sampler.batch)

            def drawn(*tensors: Tensor) -> tuple[Tensor, ...]:
                drawing = sampler.with_tensors(tensors[:split], tensors[split:])
                return tuple(Chunk.of(drawing.log_weights(num_samples)))

            depends_on = (self.session.pair.model, self.session.pair.guide, self.proposal)
            first = not self.captured  # of the numbers of draws at once, the common one
            # A chunk is a large piece of work: a shape that comes ten times is worth compiling.
            options: Any = {"capture_after": 1, "compile_after": 10, "compile_first": first}
            self.captured[num_samples] = Captured(
                drawn, "pvae.log_evidence", depends_on, tolerances=(1e-3, 1e-3), **options
            )
            # A pair learns more of itself on its first draws, and takes random numbers for that.
            return Chunk.of(sampler.log_weights(num_samples))
        device = self.session.device
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        chunk = Chunk(*self.captured[num_samples](*sampler.batch, *tensors))
        if chunk.top.isnan().any():
            # Rare draws need more than tensor operations: the same draws once more, as they come.
            torch.set_rng_state(before[0])
            if before[1] is not None:
                torch.cuda.set_rng_state(before[1], device)
            chunk = Chunk.of(sampler.log_weights(num_samples))
        return chunk


def _summed(chunks: Iterable[tuple[int, int, Chunk]], limit: int, shares: Sequence[float]) -> WeightSums:
    """The sums over the chunks of a replicate."""
    sums: dict[int, WeightSums] = {}
    for _, stratum, chunk in chunks:
        sums[stratum] = sums[stratum].add(chunk) if stratum in sums else WeightSums.of(chunk, limit)
    return WeightSums.of_strata([sums[stratum] for stratum in sorted(sums)], shares)


def _to_capture(compile: bool | str, session: Session, proposal: Proposal, num_samples: int) -> bool:
    """Whether to capture, given what the caller says and how much there is to do."""
    if compile != "auto":
        return bool(compile)
    pairs = num_samples * session.expected
    if proposal.shares_draws(session.pair):
        # Beside the product, the sums over weights take as long as 2,000 operations each unless compiled.
        return worth_compiling(pairs // 2**21, pairs * (2.0 * session.entries + 2000), session.device)
    modules = modules_of(session.pair.model, session.pair.guide)
    size = sum(p.numel() for p in {p for module in modules for p in module.parameters()})
    return worth_compiling(pairs // session.pairs, 2.0 * pairs * size, session.device)


def _limit(num_samples: int, target_std_error: float | None, max_samples: int | None, replicates: int) -> int:
    """The most draws that a datum may take."""
    if num_samples % replicates:
        raise ArgumentError(f"num_samples must be a multiple of the {replicates} replicates, got {num_samples}.")
    if target_std_error is None:
        if max_samples is not None:
            raise ArgumentError("max_samples needs a target_std_error; num_samples says how many draws without one.")
        return num_samples
    if isinstance(target_std_error, bool) or not target_std_error > 0:
        raise ArgumentError(f"target_std_error must be a positive number of nats, got {target_std_error!r}.")
    limit = max(num_samples, _MAX_SAMPLES) if max_samples is None else positive_int("max_samples", max_samples)
    if limit < num_samples:
        raise ArgumentError(f"max_samples must be at least num_samples, {num_samples}, got {limit}.")
    return limit - limit % replicates


def _bar(progress: bool) -> tqdm:
    return tqdm(total=0, unit=" draws", unit_scale=True, disable=None if progress else True)
