"""The look at a pair before it is trained: one run of it, and what would go wrong said before anything has moved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pvae.data import kind
from pvae.errors import NumericalError, ProgramError, PVAEError, first_line
from pvae.runtime import (
    Program,
    base_distribution,
    check_pair,
    check_signature,
    check_supports,
    density_sites,
    observed_data,
    warn_of_repeated,
)
from pvae.svi.traces import params_of, trace_pair

__all__ = ["Verified", "failure_on", "inactive", "not_finite", "verify"]

_OF_TYPES = re.compile("dtype|scalar type|Byte|Char|Short|Int|Long|Bool")  # errors of torch's about types of numbers


class Verified(NamedTuple):
    """What `verify` found out about a pair."""

    params: list[Tensor]  # unconstrained, as an optimizer moves them
    observed: list[Any]  # as `pvae.runtime.sites.observed_data` finds them
    subsampled_from: int | None  # the size that a plate scales each batch up to; None where no plate does
    batch: tuple[Tensor, ...]  # what it was run on
    summed: tuple[str, ...] = ()  # latents that are enumerated in the model and are not in the guide
    enumerated: tuple[str, ...] = ()  # latents that are enumerated in the guide
    nesting: int = 0  # how many dimensions plates take

    @property
    def to_sum(self) -> list[str]:
        """All latents that are to be enumerated."""
        return [*self.summed, *self.enumerated]

    def join(self, other: Verified) -> Verified:
        """With what a run on other data, as held-out ones, has shown: a batch of all data does not show that a plate
        would scale up a smaller one.
        """
        size = other.subsampled_from if self.subsampled_from is None else self.subsampled_from
        return self._replace(subsampled_from=size, nesting=max(self.nesting, other.nesting))

    def share(self, batch: tuple[Tensor, ...]) -> float:
        """What to multiply a batch's loss by, to undo the scale of a plate that subsamples."""
        return 1.0 if self.subsampled_from is None else len(batch[0]) / self.subsampled_from


def verify(
    model: Program,
    guide: Program,
    batch: tuple[Tensor, ...],
    data: tuple[Tensor, ...] | None,
    *,
    transforms: bool = False,
) -> Verified:
    """Runs the pair once without training it, and raises where it would go wrong.

    Args:
        model: The model.
        guide: The guide.
        batch: One batch, as it would be trained on.
        data: All the data that batches are drawn from, to check them against the observed sites' supports; ``None`` if
            the batch was transformed.
        transforms: Whether the caller takes a ``transform`` for them.

    Raises:
        ProgramError: The latent sites of the model and the guide differ, the model observes nothing or the guide
            something, a parameter's name is used twice, or there is nothing to train.
        DataError: Data outside the support of their site.
    """
    for role, program in (("model", model), ("guide", guide)):
        check_signature(role, program, batch, transforms=transforms)
    with torch.no_grad(), pyro.validation_enabled(True):
        try:
            model_trace, guide_trace = trace_pair(model, guide, batch)
        except PVAEError:
            raise
        except (RuntimeError, ValueError) as error:  # torch's, of shapes, and Pyro's, of values; both say much
            if isinstance(error.__cause__, PVAEError):
                raise
            with pyro.validation_enabled(False):
                found = not_finite(model, guide, batch)
            if found:
                raise NumericalError(
                    f"before the first step, {found}. Bound what its parameters come from, such as a log-scale."
                ) from None
            raise _does_not_run(error, batch, data) from error
    sites: dict[str, Any] = {**guide_trace.nodes, **model_trace.nodes}
    latent, proposed = density_sites(model_trace.nodes), density_sites(guide_trace.nodes)
    check_pair(latent, proposed, strict=False)
    _check_names(sites)
    found = observed_data(model_trace.nodes, batch)
    check_supports(found, batch if data is None else data)
    for name, _, _ in found:
        warn_of_repeated(name, model_trace.nodes[name], advice=" If the data are one datum, as X[0], pass X[:1].")
    params = params_of(sites)
    if not params:
        raise ProgramError(
            "neither the model nor the guide has parameters to train. Register modules with pyro.module, or make "
            "parameters with pyro.param."
        )
    plates = {plate for site in model_trace.nodes.values() for plate in site.get("cond_indep_stack", ())}
    subsampled = (p.full_size for p in plates if p.size == len(batch[0]) and p.full_size != p.size)
    dims = [p.dim for site in sites.values() for p in site.get("cond_indep_stack", ()) if p.vectorized]
    enumerated = tuple(name for name, site in proposed.items() if site["infer"].get("enumerate"))
    depth = -min(dims, default=0)
    return Verified(
        params, found, next(subsampled, None), batch, _latents_to_sum_out(latent, proposed), enumerated, depth
    )


def _does_not_run(error: Exception, batch: tuple[Tensor, ...], data: tuple[Tensor, ...] | None) -> ProgramError:
    """What to say where programs fail on a batch."""
    said = first_line(error).rstrip(" .:,")
    whole = f" All data are {', '.join(map(kind, data))}: if that is one, as X[0], pass X[:1]." if data else ""
    advice = f"Do the data have the shape and the values that they expect?{whole}"
    whole_numbers = [t.dtype for t in batch if not (t.is_floating_point() or t.is_complex())]
    if whole_numbers and _OF_TYPES.search(str(error)):
        advice = (
            f"Integers and booleans stay as they are, and these are {str(whole_numbers[0]).removeprefix('torch.')}: "
            "where they are numbers to compute with, pass x.float()."
        )
    return ProgramError(
        f"the model and the guide do not run on a batch of {', '.join(map(kind, batch))}: {said}. {advice}"
    )


def _latents_to_sum_out(latent: Mapping[str, Any], proposed: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the latents that are to be summed out in the model."""
    summed = [name for name, site in latent.items() if not site["is_observed"] and name not in proposed]
    for name in summed:
        if (mark := latent[name]["infer"]["enumerate"]) != "parallel":
            raise ProgramError(
                f"latent '{name}' is only in the model, and marked {mark!r} for enumeration: there Pyro sums out "
                "'parallel' ones alone. Mark it infer={'enumerate': 'parallel'}, or draw it in the guide too."
            )
    return tuple(summed)


def not_finite(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> str:
    """Which sites' log-densities are not finite on a batch, in words; empty if all are, or the pair does not run."""
    with torch.no_grad():
        try:
            model_trace, guide_trace = trace_pair(model, guide, batch)
            wrong = []
            for role, trace in (("guide", guide_trace), ("model", model_trace)):
                for name, site in density_sites(trace.nodes).items():
                    log_prob = site["fn"].log_prob(site["value"])
                    if bad := int((~log_prob.isfinite()).sum()):
                        family = type(base_distribution(site["fn"])).__name__
                        wrong.append(f"'{name}' of the {role} ({family}; {bad} of {log_prob.numel()})")
        except (RuntimeError, ValueError):  # as of torch and Pyro, given numbers that are not finite
            return ""
    return f"the log-density of {', '.join(wrong)} is not finite" if wrong else ""


def failure_on(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> Exception | None:
    """What a pair raises of torch's or Pyro's on a batch that has fewer data than its programs may take for granted."""
    with torch.no_grad():
        try:
            trace_pair(model, guide, batch)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, PVAEError) or isinstance(error.__cause__, PVAEError):
                raise
            return error
    return None


def inactive(model: Program, guide: Program, batch: tuple[Tensor, ...]) -> bool:
    """Whether no dimension of the latents follows the data: Var_x(E_q[z]) is below 0.01 of the prior's variance.

    Source: for the measure and its threshold, Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.
    """
    if len(batch[0]) < 2:
        return False  # it cannot be told
    with torch.no_grad():
        model_trace, guide_trace = trace_pair(model, guide, batch)
        shares = []
        for name, site in density_sites(guide_trace.nodes).items():
            dims = [f.dim for f in site["cond_indep_stack"] if f.vectorized and f.size == len(batch[0])]
            try:
                mean, spread = site["fn"].mean, model_trace.nodes[name]["fn"].variance
            except (NotImplementedError, AttributeError, KeyError):
                return False
            if dims and mean.is_floating_point():
                variance = mean.movedim(dims[0] - site["fn"].event_dim, 0).var(0)
                shares.append((variance / spread.mean(dims[0] - site["fn"].event_dim)).max())
    return bool(shares) and bool(torch.stack(shares).max() < 0.01)


def _check_names(sites: Any) -> None:
    """Pyro knows parameters by name alone: of two modules' parameters with one name, one would not be trained."""
    for name, site in sites.items():
        offered = site["args"][1] if site["type"] == "param" and len(site["args"]) > 1 else None
        if isinstance(offered, nn.Parameter) and not any(offered is p for p in params_of({name: site})):
            raise ProgramError(
                f"two modules register a parameter under the name '{name}', so that one of them would not be trained. "
                "Give the modules, or their attributes, different names in the model and the guide."
            )
