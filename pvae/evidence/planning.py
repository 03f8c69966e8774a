"""How many draws to make, how many at once and whether to compile that, and fewer at once where memory is short."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from pvae.capture import worth_compiling
from pvae.data import Batches
from pvae.errors import ArgumentError, one_of, positive_int, real_number, yes_no_or_auto
from pvae.evidence import proposals
from pvae.evidence.densities import Densities
from pvae.evidence.evaluation import Evaluation
from pvae.evidence.products import PRECISIONS
from pvae.evidence.proposals.base import Proposal
from pvae.runtime import Pair, Program

__all__ = ["Settings", "chunk_shape", "default_chunk_size", "draws_name", "halve_chunks_until_they_fit"]

logger = logging.getLogger("pvae")

_MAX_SAMPLES = 100_000
# What errors say that have no class of their own.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes:
        proposal: Where draws come from.
        num_samples: ``K``, draws for each datum; the first ones where there is a target.
        limit: The most draws that a datum may take.
        target_std_error: In nats per datum, if there is one.
        seed: Of the draws.
        chunk_size: Pairs of a draw and a datum to evaluate at once; ``None`` for what is good.
        compile: Whether to capture and compile what is done for a chunk, or ``"auto"``.
        progress: Whether to show a bar.
        precision: Of the programs' products.
        cascade: Whether other proposals answer where this one does not.
        deadline: Of `time.monotonic`, after which no more is tried.
        halvings: How often to halve the chunks.
    """

    proposal: Proposal
    num_samples: int
    limit: int
    target_std_error: float | None
    seed: int
    chunk_size: int | None
    compile: bool | str
    progress: bool
    precision: str
    cascade: bool = False
    deadline: float = math.inf
    halvings: int = 0

    @classmethod
    def of(
        cls,
        *,
        proposal: str | Proposal | Program,
        num_samples: int,
        seed: int,
        chunk_size: int | None,
        compile: bool | str,
        progress: bool,
        precision: str,
        target_std_error: float | None = None,
        max_samples: int | None = None,
        budget_seconds: float | None = None,
    ) -> Settings:
        """The settings that the arguments of `pvae.log_evidence` stand for.

        Raises:
            ArgumentError: See the message.
        """
        cascade = isinstance(proposal, str) and proposal == "auto"
        chosen, num_samples = proposals.resolve(proposal), positive_int("num_samples", num_samples)
        return cls(
            proposal=chosen,
            num_samples=num_samples,
            limit=_most_samples(num_samples, target_std_error, max_samples, chosen.replicates or 1, cascade),
            target_std_error=target_std_error,
            seed=seed,
            chunk_size=None if chunk_size is None else positive_int("chunk_size", chunk_size),
            compile=yes_no_or_auto("compile", compile),
            progress=progress,
            precision=one_of("precision", precision, PRECISIONS),
            cascade=cascade,
            deadline=_find_deadline(budget_seconds, cascade),
        )

    def check_one_proposal(self) -> None:
        """Raises where draws may come from several proposals."""
        if self.cascade:
            raise ArgumentError("proposal='auto' has no weights of one proposal to keep; name one, such as 'guide'.")

    def find_chunk_size(self, densities: Densities) -> int:
        """How many pairs of a draw and a datum to evaluate at once, by what is asked for and what memory allows.

        Raises:
            MemoryError: There is nothing left to halve.
        """
        size = self._halved_chunk_size(densities)
        if not size:
            raise MemoryError("there is no memory for even one draw of one datum at a time")
        if self.halvings:
            logger.warning("out of memory: beginning again with chunks of chunk_size=%d", size)
        return size

    def _halved_chunk_size(self, densities: Densities) -> int:
        return (self.chunk_size or default_chunk_size(densities, self.proposal)) >> self.halvings

    def is_to_be_captured(
        self, evaluation: Evaluation, proposal: Proposal | None = None, num_data: int | None = None
    ) -> bool:
        """Whether to capture and compile chunks: as asked for, or where there is enough to do to gain by it.

        Args:
            evaluation: Of the pair.
            proposal: Where draws come from, if not from the settings' own.
            num_data: How many data, if not all.
        """
        proposal, num_data = proposal or self.proposal, evaluation.expected_data if num_data is None else num_data
        densities = evaluation.densities
        # A graph would repeat the program for each particle; and what is known needs one run.
        if densities.layout.one_by_one or not densities.has_latents:
            return False
        if self.compile != "auto":
            return bool(self.compile)
        if self._is_compiled(evaluation):
            return True
        pairs, device = proposal.count_evaluations(self.num_samples) * num_data, densities.placed.device
        if proposal.shares_draws(densities):
            # Beside the product, the sums over weights take as long as 2,000 operations each unless compiled.
            return worth_compiling(pairs // 2**21, pairs * (2.0 * densities.entries + 2000), device)
        size = sum(p.numel() for p in {p for module in densities.placed.modules for p in module.parameters()})
        # Half of the parameters or so are in play for a pair: those of the model.
        return worth_compiling(pairs // default_chunk_size(densities, proposal), 1.0 * pairs * size, device)

    def _is_compiled(self, evaluation: Evaluation) -> bool:
        """Whether a call before, on the same pair, has left compiled chunks of the shape that most will have."""
        densities, num_data = evaluation.densities, evaluation.expected_data
        rows, draws = chunk_shape(
            num_data, self.num_samples, densities, self.proposal, self._halved_chunk_size(densities)
        )
        return densities.programs.is_compiled(draws_name(self.proposal, min(draws, self.num_samples)), rows)


def draws_name(proposal: Proposal, num_samples: int) -> tuple[str, str, int]:
    """How the names of programs that make so many draws begin."""
    return "draws", proposal.name, num_samples


def _find_deadline(budget_seconds: float | None, cascade: bool) -> float:
    """When to end, by `time.monotonic`."""
    if budget_seconds is None:
        return math.inf
    if not cascade:
        raise ArgumentError("budget_seconds needs proposal='auto'; num_samples says how many draws without it.")
    return time.monotonic() + real_number("budget_seconds", budget_seconds, above=0)


def _most_samples(
    num_samples: int, target_std_error: float | None, max_samples: int | None, replicates: int, cascade: bool
) -> int:
    """The most draws that a datum may take."""
    if num_samples % replicates:
        raise ArgumentError(f"num_samples must be a multiple of the {replicates} replicates, got {num_samples}.")
    if target_std_error is None and not cascade:
        if max_samples is not None:
            raise ArgumentError("max_samples needs a target_std_error; num_samples says how many draws without one.")
        return num_samples
    if target_std_error is not None:
        real_number("target_std_error", target_std_error, above=0)
    most = _MAX_SAMPLES if target_std_error is not None else 16 * num_samples
    limit = max(num_samples, most) if max_samples is None else positive_int("max_samples", max_samples)
    if limit < num_samples:
        raise ArgumentError(f"max_samples must be at least num_samples, {num_samples}, got {limit}.")
    return limit - limit % replicates


def default_chunk_size(densities: Densities, proposal: Proposal) -> int:
    """How many pairs of a draw and a datum to evaluate at once: activations fit the caches of a CPU, or use a small
    part of a GPU's memory.
    """
    on_cuda = densities.placed.device.type == "cuda"
    if proposal.shares_draws(densities):
        return 2**24 if on_cuda else 2**21
    most, entries = (2**18, 2**27) if on_cuda else (2**13, 2**22)
    return max(1, min(most, entries // densities.entries))


def chunk_shape(
    num_data: int, num_samples: int, densities: Densities, proposal: Proposal, chunk_size: int
) -> tuple[int, int]:
    """How many data and how many draws to evaluate at once, for so many pairs of them.

    Where draws are shared there are no activations for each pair, and a draw's decoding is spread over many data. Where
    a proposal is fitted to each datum first, many data are taken at once and few draws.
    """
    if proposal.shares_draws(densities):
        draws = min(num_samples, max(1, math.isqrt(chunk_size // 8)))
        return min(num_data, max(1, chunk_size // draws)), draws
    draws = num_samples
    if proposal.prepares:
        draws = min(num_samples, 8)
        chunk_size = max(1, min(chunk_size, 2**25 // densities.space.dim**2))  # matrices of D x D for each datum
    rows = min(num_data, max(1, chunk_size // draws))
    return rows, max(1, chunk_size // rows)


def halve_chunks_until_they_fit(
    evaluate: Callable[[Pair, Batches, Settings], T],
) -> Callable[[Pair, Batches, Settings], T]:
    """Makes a function begin anew with chunks of half the size as often as memory is short.

    It raises `MemoryError` where there is nothing left to halve.
    """

    @functools.wraps(evaluate)
    def evaluate_as_memory_allows(pair: Pair, batches: Batches, settings: Settings) -> T:
        cause = None
        while True:
            try:
                return evaluate(pair, batches, settings)
            except MemoryError as error:
                raise error from cause
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                cause = error.with_traceback(None)  # without the frames, which hold on to memory
            settings = replace(settings, halvings=settings.halvings + 1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    return evaluate_as_memory_allows


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _OUT_OF_MEMORY)
