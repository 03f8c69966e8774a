"""Draws from the prior: whether there are any, and where the model allows it, such as serve all data at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pvae.errors import ProgramError, PVAEError, first_line
from pvae.evidence.exponential_families import is_constant_along, is_family, leaf_of, shared_log_prob
from pvae.evidence.pair_checks import check_names, latent_of, observed_of, plates_of
from pvae.evidence.traces import Batch, Run, Runner
from pvae.runtime import Program

__all__ = ["check_refusal", "draw_shared", "find_refusal", "shares_draws"]


def find_refusal(runner: Runner, model: Program, trial: Batch) -> str:
    """Why a model that runs on a guide's latents cannot be run on its own; empty where it can."""
    try:
        runner.run(model, trial, 1)
    except (RuntimeError, ValueError, IndexError) as error:
        # Of operations that torch lacks for a kind of number it is said elsewhere what to do.
        if isinstance(error, PVAEError) or any(said in str(error) for said in ("memory", "not implemented for")):
            raise
        return first_line(error).rstrip(".")
    return ""


def check_refusal(reason: str) -> None:
    """Raises `ProgramError` where `find_refusal` found a reason."""
    if reason:
        raise ProgramError(
            f"the model cannot draw its own latents: {reason}. A prior to draw from is a proper distribution, of "
            "numbers that the model takes: of float64 by x.new_zeros(4) in the place of torch.zeros(4), where x is. Or "
            "use proposal='guide', which needs no draws from the prior."
        )


def shares_draws(runner: Runner, model: Program, trial: Batch) -> bool:
    """Whether p(x|z) is of a known exponential family, and depends on the latents alone.

    Args:
        runner: How to run the model.
        model: The model.
        trial: Two data.
    """
    dim = runner.layout.data_dim
    if runner.layout.folded or dim is None or runner.summed:
        return False
    try:
        run = _run(runner, model, trial, 3)
    except (RuntimeError, ValueError, IndexError):  # the model wants one latent for each datum
        return False
    observed = observed_of(run.sites)
    in_two_plates = all(len(plates_of(site)) == 2 for site in run.sites.values())  # of particles and of data
    constant = all(is_constant_along(site["fn"], dim) for site in run.sites.values())
    if len(observed) != 1 or not in_two_plates or not constant:
        return False
    (site,) = observed.values()
    plain = is_family(leaf_of(site["fn"])) and site["mask"] is None
    if not plain or site["value"].shape != (len(trial[0]), *site["fn"].event_shape):
        return False
    product = shared_log_prob(site["fn"], dim, site["value"]).double()
    return torch.allclose(product, run.log_prob(observed), rtol=1e-4, atol=1e-4)


def draw_shared(runner: Runner, model: Program, batch: Batch, num_samples: int, *, exact: bool = True) -> Tensor:
    """Draws K latents and decodes them once; returns log p(x|z) of all data, shape ``(K, N)``.

    Args:
        runner: How to run the model.
        model: One that `shares_draws`.
        batch: The data.
        num_samples: ``K``.
        exact: As for `pvae.evidence.exponential_families.product`.
    """
    (site,) = observed_of(_run(runner, model, batch, num_samples).sites).values()
    return shared_log_prob(site["fn"], runner.layout.data_dim or -1, site["value"], exact=exact)


def _run(runner: Runner, model: Program, batch: Batch, num_samples: int) -> Run:
    """Runs a model on a batch with K latents that were drawn for its first datum."""
    first = runner.run(model, tuple(t[:1] for t in batch), num_samples)
    values = first.values(latent_of(first.sites))
    run = runner.run(model, batch, num_samples, values)
    check_names(latent_of(run.sites).keys(), values.keys())
    return run
