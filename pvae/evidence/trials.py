"""A pair's first runs, and what they tell: whether each datum has a log p(x) or all have one, and what latents are."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide

from pvae.errors import ProgramError, first_line, warn
from pvae.evidence.latents import Layout
from pvae.evidence.layouts import lay_out_particles
from pvae.evidence.pair_checks import (
    NotForEachError,
    auxiliary_of,
    check_auxiliary,
    check_densities,
    check_masks,
    check_names,
    check_plates,
    check_shapes,
    data_dim,
    first_other_row,
    is_masked,
    is_scaled,
    latent_of,
    plates_of,
    point_masses,
)
from pvae.evidence.traces import Batch, Runner, Sites, trace_pair
from pvae.runtime import (
    Pair,
    check_pair,
    check_signature,
    check_supports,
    check_whole,
    density_sites,
    enumerated_sites,
    modules_of,
    observed_data,
)

__all__ = ["Trial", "try_pair"]

logger = logging.getLogger("pvae")

_STREAMED = (
    "the data are read as a stream, and this pair has one log p(data) of all of them together: pass them in memory, as "
    "one tensor or a tuple of tensors."
)


@dataclass(frozen=True, eq=False)
class Trial:
    """What a pair's first runs told.

    Attributes:
        runner: How to run it.
        batch: What it was run on: two data; or all, as one datum, ``(1, N, ...)``.
        observed: What observes the data, as `pvae.runtime.sites.observed_data` finds it.
        names: The latents that are drawn, without those that are summed out.
        auxiliary: The guide's variables that the model does not have.
        has_masks: Whether latents are masked in either program.
        scaled: The model's sites whose densities a handler scales.
    """

    runner: Runner
    batch: Batch
    observed: tuple[Any, ...]
    names: tuple[str, ...]
    auxiliary: tuple[str, ...]
    has_masks: bool
    scaled: tuple[str, ...]


def try_pair(
    placed: Pair, data: Batch, *, nesting: int = 0, is_joint: bool | None = None, in_memory: bool = True
) -> Trial:
    """Runs a pair on one datum and on two, and where these have no log p(x) of their own, on all data.

    Args:
        placed: The pair.
        data: All data; the first ones where they are read as a stream.
        nesting: The least number of plates' dimensions to leave room for.
        is_joint: Whether log p is of all data together; ``None`` to find out.
        in_memory: Whether these are all data.

    Raises:
        ProgramError: Latent sites differ, the guide has point masses, or there is neither.
        DataError: Data outside the support of their site.
    """
    check_signature("model", placed.model, data)
    check_signature("guide", placed.guide, data)
    untried = [type(guide).__name__ for guide in _automatic_guides(placed) if guide.prototype_trace is None]
    if is_joint is None and _automatic_guides(placed):
        # Its parameters belong to all data, for which it makes them as it first runs.
        is_joint = True
    if not is_joint:
        try:
            return _try_each(placed, data, nesting)
        except NotForEachError as error:
            if is_joint is False or not in_memory:
                raise ProgramError(f"{error} {'' if in_memory else f'Otherwise: {_STREAMED}'}".rstrip()) from None
            reason = error
        try:
            trial = _try_together(placed, data, nesting)
        except ProgramError as error:
            raise ProgramError(
                f"{reason} Nor is there one log p(data) of all of them together: {_first_part(error)}"
            ) from None
        logger.info("one log p(data) of all data together: %s", first_line(reason))
        return trial
    if not in_memory:
        raise ProgramError(_STREAMED)
    trial = _try_together(placed, data, nesting)
    if untried:
        warn(f"the guide, {untried[0]}, was run for the first time: its parameters have their initial values.")
    return trial


def _automatic_guides(placed: Pair) -> list[AutoGuide]:
    """All in a guide, in whatever holds them."""
    modules = [module for root in modules_of(placed.guide) for module in root.modules()]
    return [module for module in modules if isinstance(module, AutoGuide)]


def _try_each(placed: Pair, data: Batch, nesting: int) -> Trial:
    """Looks for a data plate, whose size follows the number of data."""
    traces: dict[int, dict[str, Sites]] = {}
    with pyro.validation_enabled(True):
        for rows in ([0], [0, first_other_row(data)]):
            batch = tuple(t[rows].to(placed.device) for t in data)
            traces[len(rows)] = _density_sites(_trace_each(placed, batch))
    one, two = traces[1], traces[2]
    observed = _check(two, batch, data)
    # Of sites that come and go, those that are there both times tell of a plate.
    dim = data_dim(one, {program: {n: s for n, s in two[program].items() if n in one[program]} for program in two})
    check_names(one["model"], two["model"])
    _check_made(placed, two, batch)
    return _as_trial(placed, two, batch, observed, dim, nesting)


def _trace_each(placed: Pair, batch: Batch) -> dict[str, Sites]:
    try:
        return trace_pair(placed.model, placed.guide, batch)
    except ProgramError as error:
        raise NotForEachError(
            "log p(x) for each datum needs programs that can be run on any number of data; on "
            f"{len(batch[0])} this pair failed: {_explain(error)}"
        ) from None


def _first_part(error: ProgramError) -> str:
    """What an error says, as a sentence without Pyro's table of shapes."""
    text = str(error).partition("Trace Shapes:")[0].strip()
    return text if text.endswith(".") else f"{text}."


def _explain(error: ProgramError) -> str:
    """The same, and what helps."""
    text = _first_part(error)
    is_event = text.startswith("Shape mismatch inside plate")
    return (
        f"{text} A dimension that is of one draw, and of no plate, is declared by .to_event(1)." if is_event else text
    )


def _try_together(placed: Pair, data: Batch, nesting: int) -> Trial:
    """Takes all data as one datum."""
    batch = tuple(t.to(placed.device) for t in data)
    with pyro.validation_enabled(True):
        traced = trace_pair(placed.model, placed.guide, batch)
        sites = _density_sites(traced)
        observed = _check(sites, batch, data)
        for program in ("model", "guide"):
            check_whole(traced[program])
            check_shapes(sites[program])
        _check_made(placed, sites, batch)
    check_plates(**sites, dim=None)
    return _as_trial(placed, sites, tuple(t[None] for t in batch), observed, None, nesting)


def _density_sites(traced: dict[str, Sites]) -> dict[str, Sites]:
    return {program: density_sites(sites) for program, sites in traced.items()}


def _check(sites: dict[str, Sites], batch: Batch, data: Batch) -> tuple[Any, ...]:
    """Looks at what a pair does, and returns what observes the data."""
    check_pair(sites["model"], sites["guide"], strict=True)
    check_densities(**sites)
    observed = tuple(observed_data(sites["model"], batch))
    check_supports(observed, data)
    return observed


def _check_made(placed: Pair, sites: dict[str, Sites], batch: Batch) -> None:
    """Looks at latents that the guide makes of other variables, by running the pair again."""
    if point_masses(sites["guide"]):
        again = trace_pair(placed.model, placed.guide, batch)
        check_auxiliary(sites["guide"], {**density_sites(again["guide"]), **density_sites(again["model"])})


def _as_trial(
    placed: Pair, sites: dict[str, Sites], batch: Batch, observed: tuple[Any, ...], dim: int | None, nesting: int
) -> Trial:
    depths = [-plate.dim for program in sites.values() for site in program.values() for plate in plates_of(site)]
    summed = enumerated_sites(sites["model"]) | enumerated_sites(sites["guide"]) & sites["model"].keys()
    latent = latent_of(sites["model"])
    dims = {
        name: (len(site["fn"].event_shape), len(site["fn"].batch_shape))
        for name, site in (latent_of(sites["guide"]) | latent).items()
    }
    layout = Layout(dim, -max(nesting, 0, *depths) - 1)
    names = tuple(name for name in latent if name not in summed)
    check_masks(sites["model"], sites["guide"], names)
    runner = Runner(layout, dims, frozenset(summed), frozenset(point_masses(sites["guide"])))
    runner = lay_out_particles(runner, placed, batch, names)
    has_masks = any(is_masked(program[name]) for program in sites.values() for name in names)
    scaled = tuple(name for name, site in sites["model"].items() if is_scaled(site))
    return Trial(runner, batch, observed, names, tuple(auxiliary_of(sites["guide"])), has_masks, scaled)
