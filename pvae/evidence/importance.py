"""`log_evidence`: log p(x) of any Pyro pair by importance sampling, and how far each number can be trusted."""

from __future__ import annotations

import time
from operator import itemgetter
from typing import TypeVar

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pvae.data import Batches, Data, fingerprint
from pvae.evidence.cascade import Cascade
from pvae.evidence.drawing import Draws, DrawSums
from pvae.evidence.estimates import EvidenceEstimate
from pvae.evidence.evaluation import open_evaluation, place_evaluation
from pvae.evidence.planning import Settings, halve_chunks_until_they_fit
from pvae.evidence.proposals import Proposal
from pvae.runtime import Pair, Processes, Program, in_turn, outside_modules, resolve_processes, resolve_seed

__all__ = ["log_evidence", "log_weights"]

T = TypeVar("T")


@in_turn
def log_evidence(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | Proposal | Program = "auto",
    target_std_error: float | None = None,
    max_samples: int | None = None,
    budget_seconds: float | None = None,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
    compile: bool | str = "auto",
    precision: str = "float32",
    distributed: bool | str = "auto",
    progress: bool = False,
) -> EvidenceEstimate:
    """Estimates log p(x) for each datum by importance sampling.

    ``log p(x) = log E_q[w]`` with ``w = p(x, z) / q(z)``, estimated by ``log (1/K) sum_k w_k`` over K draws of z. The
    pair can be any Pyro programs. With one plate over the data around all their sites each datum has its own log p(x);
    otherwise all have one log p(data) together. Discrete latents that are marked ``infer={"enumerate": ...}`` are
    summed out. Masks are applied; scales, as of ``poutine.scale``, are no part of log p(x), and there is a warning of
    those that are not a subsampling plate's. Draws and data stream through in chunks; memory does not grow with K.
    Nothing is trained: parameters, modes, random numbers and param store are left as they were, but modules stay on
    ``device``. Calls in several threads take turns.

    Args:
        model: The generative program.
        guide: The recognition program, with the model's latent sites.
        data: ``(N, *event)``, or a tuple of arrays with the same ``N``. Converted as by `pvae.fit`. Or a torch
            ``Dataset`` or ``DataLoader``, which is read once, in order.
        num_samples: ``K``, draws for each datum; exactly that many are made, by ``"auto"`` at least that many, or 100
            annealed chains.
        proposal: ``"auto"`` begins with the guide; where its weights say that they will not do, a Gaussian is fitted to
            the datum, then given heavier tails, then chains are annealed from it. Each datum has a number to believe
            then, or is named in `EvidenceEstimate.unresolved`. By name: ``"guide"`` draws from q(z|x); ``"prior"`` from
            p(z). ``"refined"`` and ``"laplace"`` fit a Gaussian to each datum, ``"student-t"`` gives the guide heavier
            tails, ``"defensive"`` mixes in the prior, ``"ais"`` anneals from the guide. Or a
            `pvae.evidence.proposals.Proposal`, or another Pyro guide.
        target_std_error: In nats per datum. Data whose standard error is above it, or whose k-hat is above 0.7, get
            more draws: twice as many, and so on until none are left or they have had ``max_samples``; by ``"auto"``
            also those of other proposals. These draws only decide what each datum needs. It then gets fresh ones,
            because an estimate that stopped where its error looked small would be biased.
        max_samples: The most draws for one datum then, or by ``"auto"``; 100,000 with a target, else 16 times
            ``num_samples`` if left out.
        budget_seconds: After so many, ``"auto"`` tries no more: data that wait get draws of what was tried last, and
            are unresolved. What comes depends on the clock then, not on the seed alone.
        seed: Same seed, same machine, same versions, same chunk size: same bits. ``None`` for a fresh one.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"``, ``"cuda"`` or a ``torch.device``.
        chunk_size: How many pairs of a draw and a datum to evaluate at once; bounds memory. Chosen by the size of a
            datum if left out. Where memory does not suffice, it is halved, which is logged, and all is begun again: the
            result is that of the smaller number.
        compile: Whether to capture and compile what is done for a chunk, as in `pvae.fit`: some seconds at first, then
            three times as fast. ``"auto"`` does so for large runs. The same draws, and the same numbers within
            rounding. For ``"refined"`` and ``"ais"`` the density with its gradient is captured, too. Draws of
            ``"defensive"`` and Sobol points are not.
        precision: Of the matrix products and convolutions of both programs; densities and sums stay in float32.
            ``"bfloat16"`` or, on a GPU, ``"tf32"`` are for processors that have fast products of them, and pairs in
            float32. What that does to log-weights is measured first, on up to 64 of the data; intervals are wider by
            it, and there is a warning if the mean of log p(x) surely moves by more than 0.01 nats per datum, or
            single log-weights by more than 0.1. Binary VAEs of MNIST stayed below that by ``"bfloat16"``, one of
            Gaussian pixels did not.
        distributed: Whether the processes of torch.distributed's default group, as torchrun starts them, share the
            data; each datum is evaluated once, and all get the whole result. ``"auto"`` does so where there is a group.
        progress: Show a bar on stderr, if that is a terminal.

    Returns:
        An `EvidenceEstimate`.

    Raises:
        ArgumentError, DataError, DeviceError: See the message.
        ProgramError: Dimensions that are no plate's, latent sites that differ or are masked in one program alone, a
            guide with point masses, one log p(data) of a stream, latents that the proposal cannot move, such as
            discrete ones, or a prior that it draws from and that cannot be drawn.
        NumericalError: A log-weight is nan or ``+inf``.
        MemoryError: There is none for even one draw of one datum.

    Source: Rezende, Mohamed and Wierstra, 2014, Stochastic Backpropagation and Approximate Inference in Deep
    Generative Models, appendix E; Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> estimate = pvae.log_evidence(pair.model, pair.guide, x)
        >>> (estimate.log_px - pair.log_px(x)).abs().max().item() < 0.2
        True
    """
    start = time.perf_counter()
    processes = resolve_processes(distributed)
    settings = Settings.of(
        proposal=proposal,
        num_samples=num_samples,
        target_std_error=target_std_error,
        max_samples=max_samples,
        budget_seconds=budget_seconds,
        seed=processes.broadcast(resolve_seed(seed)),
        chunk_size=chunk_size,
        compile=compile,
        precision=precision,
        progress=progress and processes.is_main,
    )
    pair, batches = _place(model, guide, data, device, settings, processes)
    with processes.together():
        blocks = _sum_blocks(pair, batches, settings)
    draws = DrawSums.cat(_gather(blocks, processes))
    name, words = settings.proposal.name, settings.proposal.words
    if settings.cascade:
        name, words = "auto", "the guide, or from what fits a datum better"
    if draws.is_exact:
        name = words = "an exact sum over discrete latents"
    return EvidenceEstimate(
        draws.weights,
        name,
        settings.seed,
        draws.shared_draws,
        time.perf_counter() - start,
        target_std_error=target_std_error,
        diagnostics=draws.diagnostics,
        precision=draws.precision,
        product_precision=settings.precision,
        product_rounding=draws.product_rounding,
        words=words,
        num_together=draws.num_together,
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
    precision: str = "float32",
    distributed: bool | str = "auto",
    progress: bool = False,
) -> Tensor:
    """The log-weights behind `log_evidence`, ``log p(x, z_k) - log q(z_k)``, kept instead of summed.

    Takes and raises what `log_evidence` does; for the same arguments these are the same draws.

    Returns:
        Nats, float64, on the CPU, of shape ``(K, N)``, which takes ``8 K N`` bytes of memory.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> pvae.log_weights(pair.model, pair.guide, x, num_samples=50).shape
        torch.Size([50, 20])
    """
    processes = resolve_processes(distributed)
    settings = Settings.of(
        proposal=proposal,
        num_samples=num_samples,
        seed=processes.broadcast(resolve_seed(seed)),
        chunk_size=chunk_size,
        compile=compile,
        precision=precision,
        progress=progress and processes.is_main,
    )
    settings.check_one_proposal()
    pair, batches = _place(model, guide, data, device, settings, processes)
    with processes.together():
        blocks = _keep_blocks(pair, batches, settings)
    return torch.cat(_gather(blocks, processes), dim=1)


def _place(
    model: Program,
    guide: Program,
    data: Data,
    device: str | torch.device,
    settings: Settings,
    processes: Processes,
) -> tuple[Pair, Batches]:
    """Looks at the data and puts the pair on its device; of several processes each has to have the same.

    Raises:
        RankError: They have not.
    """
    weights = rows = ""
    with processes.together():
        pair, batches = place_evaluation(
            model, guide, data, settings.proposal, seed=settings.seed, device=device, processes=processes
        )
        if processes.world_size > 1:
            states = (t for module in pair.modules for t in module.state_dict().values() if isinstance(t, Tensor))
            weights = fingerprint([*states, *outside_modules(pyro.get_param_store())["params"].values()])
            rows = batches.fingerprint() if batches.whole is not None else ""
    processes.agree(num_samples=settings.num_samples, proposal=settings.proposal.name, weights=weights, data=rows)
    return pair, batches


@halve_chunks_until_they_fit
def _sum_blocks(pair: Pair, batches: Batches, settings: Settings) -> list[tuple[int, DrawSums]]:
    """The sums over the draws for this process's data, block by block, each with its number."""
    with (
        open_evaluation(pair, batches, settings.seed, settings.precision) as evaluation,
        _show_progress(settings.progress) as bar,
    ):
        cascade = settings.cascade and evaluation.densities.has_latents  # otherwise there is nothing to choose
        draws = (Cascade if cascade else Draws)(evaluation, settings, bar)
        return [(number, draws.sum_block(block)) for number, block in evaluation.blocks()]


@halve_chunks_until_they_fit
def _keep_blocks(pair: Pair, batches: Batches, settings: Settings) -> list[tuple[int, Tensor]]:
    """The log-weights of the draws for this process's data, block by block, each with its number."""
    with (
        open_evaluation(pair, batches, settings.seed, settings.precision) as evaluation,
        _show_progress(settings.progress) as bar,
    ):
        draws = Draws(evaluation, settings, bar)
        return [(number, draws.keep_block(block)) for number, block in evaluation.blocks()]


def _show_progress(progress: bool) -> tqdm:
    return tqdm(total=0, unit=" draws", unit_scale=True, disable=None if progress else True)


def _gather(blocks: list[tuple[int, T]], processes: Processes) -> list[T]:
    """The blocks of all processes, in the order of the data."""
    numbered = [block for blocks in processes.all_gather(blocks) for block in blocks]
    return [block for _, block in sorted(numbered, key=itemgetter(0))]
