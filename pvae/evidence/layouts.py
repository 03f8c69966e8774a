"""Whether a pair's particles run together or apart, found by trying: the densities must be the same."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.evidence.traces import Batch, Runner, UnscoredError
from pvae.runtime import Pair

__all__ = ["lay_out_particles"]

logger = logging.getLogger("pvae")

_PARTICLES = 3  # not 2, which would look like the data


def lay_out_particles(runner: Runner, placed: Pair, batch: Batch, names: Collection[str]) -> Runner:
    """How to run a pair so that particles have the densities together that each has alone.

    Args:
        runner: Of the pair, in any layout.
        placed: The pair.
        batch: Data to try it on.
        names: The model's latents that are drawn.

    Raises:
        ProgramError: There is no such way.
    """
    trials = [_draw_alone(_lay_out(runner, folded=True), placed, batch, names) for _ in range(_PARTICLES)]
    values = {name: torch.cat([trial[0][name] for trial in trials]) for name in trials[0][0]}
    alone = {program: torch.cat([trial[1][program] for trial in trials]) for program in ("model", "guide")}
    problems = []
    for folded in (False, True):
        tried = _lay_out(runner, folded=folded)
        try:
            together = _densities_at(tried, placed, batch, values, names)
        except (RuntimeError, ValueError, IndexError) as error:
            problems.append(str(error))
            continue
        wrong = [p for p in together if not torch.allclose(together[p], alone[p], rtol=1e-4, atol=1e-4, equal_nan=True)]
        if not wrong:
            if folded:
                how = "one by one" if tried.layout.is_joint else "as copies"
                logger.info("the pair does not broadcast over particles (%s): they are run %s", problems[0], how)
            return tried
        problems.append(
            f"the {wrong[0]}'s log-density is {together[wrong[0]].tolist()} among three particles"
            f"{'' if runner.layout.is_joint else ' of two data'}, and {alone[wrong[0]].tolist()} if each is run alone"
        )
    if runner.layout.is_joint:
        raise ProgramError(
            f"log p(data) needs programs that do the same each time they are run: {problems[-1]}. Draw random numbers "
            "by pyro.sample alone, and keep no state from run to run."
        )
    raise ProgramError(
        "log p(x) for each datum needs programs that treat each datum, and each latent, by itself, however many are "
        f"run at once. With a plate over particles: {problems[0]}. With copies of the data: {problems[1]}. Count "
        "dimensions from the right (dim=-1), and let no datum look at the others of its batch."
    )


def _lay_out(runner: Runner, *, folded: bool) -> Runner:
    return replace(runner, layout=replace(runner.layout, folded=folded))


def _densities_at(
    runner: Runner, placed: Pair, batch: Batch, values: dict[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """The densities of both programs at some latents, the guide's with its auxiliary variables."""
    latents = {name: values[name] for name in names}
    run = runner.run(placed.model, batch, _PARTICLES, latents, sums=True)
    together = {"model": run.log_prob(run.sites)}
    if runner.made:
        given = {name: value for name, value in values.items() if name not in runner.made}
        run = runner.run(placed.guide, batch, _PARTICLES, given, sums=True)
        with suppress(KeyError, NotImplementedError):  # of a transform without an inverse
            together["guide"] = run.log_prob(run.sites)
        for name, value in run.values(runner.made).items():
            if value.shape != values[name].shape or not torch.allclose(value, values[name], rtol=1e-4, atol=1e-4):
                raise ValueError(f"the guide makes another '{name}' of the same variables")
    elif latents:
        with suppress(UnscoredError):  # a guide that only knows its own draws can still be drawn from
            together["guide"] = runner.score(placed.guide, batch, latents)
    if latents:
        runner.draw(placed.guide, batch, _PARTICLES)
    return together


def _draw_alone(
    alone: Runner, placed: Pair, batch: Batch, names: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws latents of some data, each run alone: their values ``(1, N, ...)`` and densities ``(1, N)``."""
    rows = []
    for row in range(len(batch[0])):
        one = tuple(t[row : row + 1] for t in batch)
        values, log_qz = alone.draw(placed.guide, one, 1) if names else ({}, torch.zeros(1, 1))
        run = alone.run(placed.model, one, 1, {name: values[name] for name in names}, sums=True)
        rows.append((values, {"model": run.log_prob(run.sites), "guide": log_qz}))
    values, log_probs = ({n: torch.cat([row[part][n] for row in rows], 1) for n in rows[0][part]} for part in (0, 1))
    return values, log_probs
