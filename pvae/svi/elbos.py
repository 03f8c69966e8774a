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
from pvae.svi.objectives import Objective, Verified, loss_of

__all__ = ["bound", "nest", "resolve", "try_out"]

_ENUMERATING = (TraceEnum_ELBO, TraceTMC_ELBO)
_DRAWING = (Trace_ELBO, TraceGraph_ELBO, RenyiELBO, ReweightedWakeSleep, Trace_MMD)


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
            "objective must be one of Pyro's ELBO objects, a callable (model, guide, *batch) -> loss, or None for "
            f"Trace_ELBO; got {objective!r}."
        )
    if verified is None:
        return objective
    kind, summed, enumerated = type(objective).__name__, list(verified.summed), list(verified.enumerated)
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
    """What held-out data are measured by: an ELBO object's own loss, which has no weights.

    A callable may be no bound at all, and some objects give gradients alone; for those it is the ELBO.
    """
    without = not hasattr(objective, "loss") or isinstance(objective, TraceTailAdaptive_ELBO | TraceTMC_ELBO)
    return resolve(None, verified) if without or not isinstance(objective, ELBO) else objective


@contextmanager
def nest(objective: Objective, verified: Verified) -> Iterator[None]:
    """A block in which an ELBO object knows how deep plates are nested, whatever it was told or remembers of others.

    Pyro's own guess would run the pair once more in a first step, with noise of its own, and stay in the object.
    """
    vectorized = isinstance(objective, ELBO) and objective.vectorize_particles and objective.num_particles > 1
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


def try_out(
    objective: Objective, model: Program, guide: Program, batch: tuple[Tensor, ...], verified: Verified
) -> None:
    """Takes an enumerating objective's loss once, with Pyro's checks of shapes, which are off in training.

    Raises:
        ProgramError: It does not run.
    """
    if not verified.to_sum or not isinstance(objective, TraceEnum_ELBO):
        return
    with torch.no_grad(), pyro.validation_enabled(True), nest(objective, verified):
        try:
            loss_of(objective, model, guide, batch)
        except PVAEError:
            raise
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            said = first_line(error)
            raise ProgramError(
                f"{type(objective).__name__} cannot enumerate {verified.to_sum} in this pair: {said} Values of an "
                "enumerated latent come in a dimension of their own, left of all plates, which programs broadcast over."
            ) from error
