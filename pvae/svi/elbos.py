"""Which objective trains a pair, and which bound measures held-out data: what it enumerates, how its plates are nested.

Latents that are marked for enumeration are summed out by ``TraceEnum_ELBO`` alone. Others would draw those that are not
in the guide from the prior, and train another model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from torch import Tensor

from pvae.errors import ArgumentError, ProgramError, PVAEError, first_line, warn
from pvae.runtime import Program
from pvae.svi.losses import Objective, loss_of
from pvae.svi.objectives import Bound
from pvae.svi.traces import nested_plates
from pvae.svi.verification import Verified

__all__ = ["bound", "is_elbo", "needs_trial", "nest", "resolve", "try_out"]

_ENUMERATING = (TraceEnum_ELBO, TraceTMC_ELBO)
_WITH_GRADIENTS_ALONE = (TraceTailAdaptive_ELBO, ReweightedWakeSleep)
_LIMITS = (
    "It differentiates through the guide's draws, of particles in a dimension of their own, left of all plates. "
    "pyro.infer.Trace_ELBO takes other pairs.",
    "With vectorize_particles=True its particles have a dimension of their own, left of all plates. Below insomnia=1 "
    "it calls guide(*batch, observations=...) with a dict of the values of observed sites, by name.",
)
_DRAWING = (Trace_ELBO, TraceGraph_ELBO, RenyiELBO, ReweightedWakeSleep, Trace_MMD, Bound)


def is_elbo(objective: Objective) -> bool:
    """Whether minus the objective estimates the ELBO itself, not another bound or a weighted loss."""
    if isinstance(objective, Bound):
        return objective.is_elbo
    estimators = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
    return isinstance(objective, estimators) and not isinstance(objective, TraceTailAdaptive_ELBO)


def resolve(objective: Objective | None, verified: Verified | None = None, *, weighted: bool = False) -> Objective:
    """The objective itself, or for ``None`` Pyro's ``Trace_ELBO``, or ``TraceEnum_ELBO`` where latents are enumerated.

    Args:
        objective: What was asked for.
        verified: What was found out about the pair, if it was run.
        weighted: Whether latents' log-densities get a weight.

    Raises:
        ArgumentError: It is no objective.
        ProgramError: It would not sum out latents that are to be summed out, or they cannot have the weight.
    """
    if objective is None:
        objective = Trace_ELBO()
        if verified is not None and verified.to_sum:
            objective = TraceEnum_ELBO(max_plate_nesting=verified.nesting)
    if not callable(objective):
        raise ArgumentError(
            "objective must be one of pvae.objectives or of Pyro's ELBO objects, a callable (model, guide, *batch) -> "
            f"loss, or None for Trace_ELBO; got {objective!r}."
        )
    if isinstance(objective, type):
        raise ArgumentError(f"objective is the class {objective.__name__}: make one, as {objective.__name__}(...).")
    if verified is None:
        return objective
    kind, summed, enumerated = type(objective).__name__, list(verified.summed), list(verified.enumerated)
    if isinstance(objective, TraceTailAdaptive_ELBO) and not objective.vectorize_particles:
        raise ArgumentError(f"objective ranks particles that run together: pass {kind}(vectorize_particles=True, ...).")
    if isinstance(objective, _DRAWING) and summed:
        raise ProgramError(
            f"{kind} would draw {summed} from the prior, which trains another model: they are marked for "
            "enumeration in the model, and are not in the guide. Pass objective=pyro.infer.TraceEnum_ELBO(), which "
            "sums them out, or draw them in the guide."
        )
    if isinstance(objective, _DRAWING) and enumerated:
        warn(
            f"{kind} draws {enumerated}, which the guide marks for enumeration: gradients are noisier than need "
            "be. Pass objective=pyro.infer.TraceEnum_ELBO(), or take the mark away."
        )
    if isinstance(objective, _ENUMERATING) and summed and weighted:
        raise ProgramError(
            f"kl_weight cannot weigh {summed}: they are summed out, and have no KL divergence of their own. Draw "
            "or enumerate them in the guide, or leave kl_weight at 1."
        )
    return objective


def bound(objective: Objective, verified: Verified) -> Any:
    """What held-out data are measured by: an objective's own bound, which has no weights.

    One that changes the ELBO or its gradient for training alone says which bound it is meant for. Another callable may
    be no bound at all, and some objects give gradients alone; for those it is the ELBO.
    """
    if isinstance(objective, Bound):
        return objective.measure
    without = not hasattr(objective, "loss") or isinstance(objective, (*_WITH_GRADIENTS_ALONE, TraceTMC_ELBO))
    return resolve(None, verified) if without or not isinstance(objective, ELBO) else objective


@contextmanager
def nest(objective: Objective, verified: Verified) -> Iterator[None]:
    """A block in which an objective knows how deep plates are nested, whatever it was told or remembers of others.

    To guess it would be to run the pair once more in a first step, with noise of its own.
    """
    if not isinstance(objective, ELBO):
        with nested_plates(verified.nesting):
            yield
        return
    vectorized = objective.vectorize_particles and objective.num_particles > 1
    if not vectorized and not isinstance(objective, _ENUMERATING):
        yield
        return
    elbo: Any = objective
    before, needed = elbo.max_plate_nesting, verified.nesting + vectorized
    elbo.max_plate_nesting = before if needed <= before < math.inf else needed
    try:
        yield
    finally:
        elbo.max_plate_nesting = before


def needs_trial(objective: Objective, verified: Verified) -> bool:
    """Whether it is to be seen before training that an objective runs on a pair."""
    is_tried = isinstance(objective, (Bound, *_WITH_GRADIENTS_ALONE))
    return is_tried or (bool(verified.to_sum) and isinstance(objective, TraceEnum_ELBO))


def try_out(
    objective: Objective, model: Program, guide: Program, batch: tuple[Tensor, ...], verified: Verified
) -> None:
    """Takes an objective's loss once, with Pyro's checks of shapes, which are off in training.

    Raises:
        ProgramError: It does not run.
    """
    with torch.no_grad(), pyro.validation_enabled(True), nest(objective, verified):
        try:
            loss_of(objective, model, guide, batch)
        except PVAEError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            if isinstance(error.__cause__, PVAEError):
                raise
            said, kind = first_line(error), type(objective).__name__
            if isinstance(objective, Bound):
                why = (
                    f"{kind} does not run on this pair: {said} Its {objective.num_particles} particles come in a "
                    "dimension of their own, left of all plates, which programs broadcast over. If this one cannot, "
                    "pass vectorize_particles=False."
                )
            elif isinstance(objective, _WITH_GRADIENTS_ALONE):
                why = f"{kind} does not run on this pair: {said} {_LIMITS[isinstance(objective, ReweightedWakeSleep)]}"
            else:
                why = (
                    f"{kind} cannot enumerate {verified.to_sum} in this pair: {said} Values of an enumerated latent "
                    "come in a dimension of their own, left of all plates, which programs broadcast over."
                )
            raise ProgramError(why) from error
