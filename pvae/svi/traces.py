"""Programs run for training: the only file that traces them for SVI.

A pair is run once as it is, to look at it, or for K particles, as densities that the objectives are written in.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pvae.errors import ProgramError
from pvae.runtime import Program, base_distribution, density_sites

__all__ = [
    "Particles",
    "Sites",
    "WeightedLatents",
    "inside_handlers",
    "nested_plates",
    "num_nested",
    "params_met",
    "params_of",
    "run_particles",
    "trace_pair",
]

Sites = Mapping[str, Any]

_PARTICLES = "pvae_particles"
_LENT: ContextVar[int | None] = ContextVar("how deep plates are nested", default=None)


# --- as it is -------------------------------------------------------------------------------------------------------


def trace_pair(model: Program, guide: Program, args: Any, kwargs: Any = None) -> tuple[Any, Any]:
    """The model's trace on the guide's latents, and the guide's."""
    guide_trace = poutine.trace(guide).get_trace(*args, **(kwargs or {}))
    return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **(kwargs or {})), guide_trace


@contextmanager
def params_met() -> Iterator[list[Tensor]]:
    """A block that yields a list, which after it holds the unconstrained parameters that programs met inside."""
    params: list[Tensor] = []
    with poutine.trace(param_only=True) as met:
        yield params
    params += params_of(met.trace.nodes)


def params_of(sites: Any) -> list[Tensor]:
    """The unconstrained parameters among sites, each once."""
    values = [site["value"] for site in sites.values() if site["type"] == "param"]
    # With Pyro's setting module_local_params, values are the modules' parameters themselves.
    params = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]
    return list({id(p): p for p in params}.values())


def inside_handlers() -> bool:
    """Whether the caller runs inside of Pyro's effect handlers, which a captured program would not feel."""
    return am_i_wrapped()


class WeightedLatents(Messenger):
    """Scales the log-densities of latents, and with them the KL divergence of the guide from the prior.

    Args:
        weight: Their factor; ``None`` for 1.
    """

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if self.weight is not None and not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


# --- how deep plates are nested -------------------------------------------------------------------------------------


@contextmanager
def nested_plates(depth: int) -> Iterator[None]:
    """A block in which it is known how many dimensions a pair's plates take, so that it need not be found out."""
    token = _LENT.set(depth)
    try:
        yield
    finally:
        _LENT.reset(token)


def num_nested(model: Program, guide: Program, args: Any, kwargs: Any) -> int:
    """How many dimensions plates take: as lent, or as remembered, or as a run without particles shows."""
    lent = _LENT.get()
    if lent is not None:
        return lent
    owners, seen = [_owner(program) for program in (model, guide)], _SEEN.get(_key(model, guide))
    if seen is not None and all(ref() is owner for ref, owner in zip(seen.owners, owners, strict=True)):
        return seen.depth
    with poutine.block(), torch.no_grad():
        traces = trace_pair(model, guide, args, kwargs)
    sites = [site for trace in traces for site in trace.nodes.values()]
    depth = -min((f.dim for site in sites for f in site.get("cond_indep_stack", ()) if f.vectorized), default=0)
    if len(_SEEN) >= _MOST_SEEN:
        _SEEN.clear()
    with suppress(TypeError):  # of which it cannot be known whether they are still the same
        _SEEN[_key(model, guide)] = _Seen([weakref.ref(owner) for owner in owners], depth)
    return depth


class _Seen(NamedTuple):
    """A pair that was run outside of `nested_plates`, which must not be kept alive by that."""

    owners: Sequence[weakref.ref[Any]]
    depth: int


_SEEN: dict[Any, _Seen] = {}
_MOST_SEEN = 100


def _owner(program: Program) -> Any:
    return getattr(program, "__self__", program)


def _key(model: Program, guide: Program) -> Any:
    return tuple((id(_owner(program)), getattr(program, "__func__", None)) for program in (model, guide))


# --- for K particles ------------------------------------------------------------------------------------------------


class _Cut(Messenger):
    """Passes on what a guide draws without its history, so that what depends on it is a function of the draws alone.

    Args:
        differentiable: Whether gradients with respect to the draws are wanted. Else those of a point mass, which are
            no draws, keep their history.
    """

    def __init__(self, *, differentiable: bool) -> None:
        super().__init__()
        self.differentiable = differentiable
        self.draws: list[tuple[Tensor, Tensor]] = []  # as drawn, and as passed on, in the guide's order

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        drawn, is_point = msg["value"], isinstance(base_distribution(msg["fn"]), Delta)
        if self.differentiable and msg["fn"].has_rsample:
            msg["value"] = drawn.detach().requires_grad_()
            self.draws.append((drawn, msg["value"]))
        elif not is_point:
            msg["value"] = drawn.detach()


@dataclass(frozen=True, eq=False)
class Particles:
    """The log-densities of K particles of a pair.

    A block is what is independent of the rest given parameters: one element of the plates that are around all sites,
    which is one datum. Densities have the shape ``(K, *blocks)``, with a 1 for each dimension of other plates.

    Attributes:
        models: Sites of the model: of all particles together, or of each.
        guides: Those of the guide.
        draws: The guide's, as drawn and as they were passed on, for each of its runs.
        dim: The particles' dimension, where they run together.
    """

    models: Sequence[Sites]
    guides: Sequence[Sites]
    draws: Sequence[Sequence[tuple[Tensor, Tensor]]]
    dim: int | None

    @property
    def log_pxz(self) -> Tensor:
        """``log p(x, z)``, with all weights but the scale."""
        return self._gather(self.models, "log_prob")

    @property
    def log_qz(self) -> Tensor:
        """``log q(z|x)``, with all weights but the scale."""
        return self._gather(self.guides, "log_prob")

    @property
    def log_qz_unweighted(self) -> Tensor:
        """``log q(z|x)`` of what is not masked, without weights."""
        return self._gather(self.guides, "unscaled_log_prob")

    @cached_property
    def scale(self) -> float:
        """What a plate that subsamples multiplies each block's bound by, to stand for all the data."""
        product = 1.0
        for frame in self._blocks:
            product *= frame.full_size / frame.size
        return product

    @property
    def latent_weight(self) -> Any:
        """By what the log-densities of the guide are multiplied, beside the scale; that of its first site."""
        sites = [site for site in self.guides[0].values() if not site["is_observed"]]
        return sites[0]["scale"] / self.scale if sites else 1.0

    def demand_blocks(self, wanted_by: str) -> None:
        """Raises `ProgramError` where there is no plate around all sites, or one inside of it subsamples."""
        common = self._blocks
        for name, site in self._all_sites:
            frames = {f for f in site["cond_indep_stack"] if f.name != _PARTICLES}
            if not common:
                around = {f for _, other in self._all_sites for f in other["cond_indep_stack"]} - frames
                data = next((f for f in around if f.name != _PARTICLES), None)
                if data is None:
                    continue
                raise ProgramError(
                    f"{wanted_by} is a bound for each datum, and site '{name}' lies outside of plate '{data.name}': it "
                    "belongs to all data. Take pvae.objectives.ELBO or StickingTheLanding, or put all sites into the "
                    "plate over the data."
                )
            inner = [f.name for f in frames - common if f.full_size != f.size]
            if inner:
                raise ProgramError(
                    f"{wanted_by} is a bound for each datum, and plate '{inner[0]}' of site '{name}' takes some of a "
                    "datum's parts for all, so that no particle has its weight. Take pvae.objectives.ELBO."
                )
        if not common:
            name = next(iter(self.models[0]))
            raise ProgramError(
                f"{wanted_by} is a bound for each datum, and site '{name}' is in no plate. Put pyro.plate('data', "
                "len(x)) around all sites, or take pvae.objectives.ELBO."
            )

    def demand_reparameterized(self, wanted_by: str) -> None:
        """Raises `ProgramError` where draws of the guide have no gradient."""
        for name, site in self.guides[0].items():
            if site["is_observed"] or site["fn"].has_rsample:
                continue
            kind = type(base_distribution(site["fn"])).__name__
            listed = ""
            if site["fn"].has_enumerate_support:
                listed = " Or have it summed out: infer={'enumerate': 'parallel'}, and pyro.infer.TraceEnum_ELBO."
            raise ProgramError(
                f"{wanted_by} differentiates through the guide's draws, and those of site '{name}', {kind}, are not "
                "reparameterized: they have no gradient. Take pyro.infer.Trace_ELBO or TraceGraph_ELBO, or "
                f"pvae.objectives.ScoreFunction.{listed}"
            )

    def through_draws(self, total: Tensor) -> Tensor:
        """A number whose gradient is that of ``total`` by way of the draws alone, ``d total / dz * dz / dphi``.

        Where a draw depends on those before it, its gradient goes on to them.

        Args:
            total: A scalar made of densities at the draws that were passed on.
        """
        surrogate = torch.zeros_like(total)
        passed = [leaf for draws in self.draws for _, leaf in draws]
        if not (torch.is_grad_enabled() and total.requires_grad and passed):
            return surrogate
        slopes = iter(torch.autograd.grad(total, passed, retain_graph=True, allow_unused=True))
        for draws in self.draws:
            leaves = [leaf for _, leaf in draws]
            parts: list[Tensor | None] = [next(slopes) for _ in draws]
            for place in reversed(range(len(draws))):
                drawn, slope = draws[place][0], parts[place]
                if slope is None or not drawn.requires_grad:
                    continue
                surrogate = surrogate + (slope * drawn).sum()
                if place:
                    further = torch.autograd.grad(drawn, leaves[:place], slope, retain_graph=True, allow_unused=True)
                    parts[:place] = [_add(a, b) for a, b in zip(parts[:place], further, strict=True)]
        return surrogate

    @property
    def _all_sites(self) -> list[tuple[str, Any]]:
        return [*self.models[0].items(), *self.guides[0].items()]

    @cached_property
    def _blocks(self) -> set[Any]:
        """The plates that are around all sites, but the particles' own."""
        frames = [{f for f in s["cond_indep_stack"] if f.vectorized} for _, s in self._all_sites]
        return {f for f in set.intersection(*frames) if f.name != _PARTICLES} if frames else set()

    def _gather(self, runs: Iterable[Sites], kind: str) -> Tensor:
        kept = {f.dim for f in self._blocks} | {self.dim}
        sums = []
        for sites in runs:
            total: Any = 0.0
            for site in sites.values():
                term = site[kind]
                if kind == "unscaled_log_prob":
                    term = scale_and_mask(term, mask=site["mask"])
                elif self.scale != 1:
                    term = term / self.scale
                dims = [dim for dim in range(-term.dim(), 0) if dim not in kept]
                total = total + (term.sum(dims, keepdim=True) if dims else term)
            sums.append(torch.as_tensor(total))
        return sums[0] if self.dim is not None else torch.stack(sums)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _demand_in_guide(model_trace: Any, guide_trace: Any) -> None:
    latents = [n for n, site in density_sites(model_trace.nodes).items() if not site["is_observed"]]
    missing = sorted(name for name in latents if name not in guide_trace.nodes)
    if missing:
        raise ProgramError(
            f"latents {missing} of the model are not in the guide: they would be drawn from the prior, which trains "
            "another model. Draw them in the guide, or mark discrete ones infer={'enumerate': 'parallel'} and take "
            "pyro.infer.TraceEnum_ELBO."
        )


def run_particles(
    model: Program,
    guide: Program,
    args: Any,
    kwargs: Any,
    num_particles: int,
    *,
    together: bool = True,
    cut: str | None = None,
) -> Particles:
    """Draws K particles from a guide, and runs the model on them.

    Args:
        model: The model.
        guide: The guide.
        args: What both are called with.
        kwargs: As ``args``.
        num_particles: ``K``.
        together: Whether they get a plate of their own, outside of all others; else the pair is run K times.
        cut: ``"differentiable"`` for draws whose history is set aside, for `Particles.through_draws`; ``"all"`` for
            draws without gradients; ``None`` for draws as they are.

    Raises:
        ProgramError: Latents of the model are not in the guide.
    """
    together = together and num_particles > 1
    dim = -1 - num_nested(model, guide, args, kwargs) if together else None
    models, guides, draws = [], [], []
    if together:  # innermost, as a replay leaves no site to broadcast for handlers around it
        model, guide = (pyro.plate(_PARTICLES, num_particles, dim=dim)(program) for program in (model, guide))
    for _ in range(1 if together else num_particles):
        handler = _Cut(differentiable=cut == "differentiable")
        with handler if cut else nullcontext():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        _demand_in_guide(model_trace, guide_trace)
        depth: Any = float("inf") if dim is None else -dim
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, depth)
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        for trace in (model_trace, guide_trace):
            trace.compute_log_prob()
            for site in density_sites(trace.nodes).values() if is_validation_enabled() else ():
                check_site_shape(site, depth)
        models.append(density_sites(model_trace.nodes))
        guides.append(density_sites(guide_trace.nodes))
        draws.append(handler.draws)
    return Particles(models, guides, draws, dim)
