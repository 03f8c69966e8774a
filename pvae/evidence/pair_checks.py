"""What the sites of a trial run tell of a pair: its data plate, and which latents are what. Nothing is run here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import reduce
from typing import Any

import torch
from pyro import distributions as dist
from pyro.util import check_site_shape
from torch import Tensor
from torch.distributions import biject_to

from pvae.errors import ProgramError, first_line
from pvae.evidence.exponential_families import leaf_of
from pvae.evidence.latents import Layout, inner_support
from pvae.runtime import base_distribution, simple_support, warn_of_repeated

__all__ = [
    "NotForEachError",
    "auxiliary_of",
    "check_auxiliary",
    "check_densities",
    "check_masks",
    "check_names",
    "check_plates",
    "check_shapes",
    "data_dim",
    "first_other_row",
    "is_masked",
    "is_scaled",
    "latent_of",
    "normal_moments",
    "observed_of",
    "other_support",
    "plates_of",
    "point_masses",
    "refusal",
    "support_of",
]

_OBS_MASK = (
    " Or, where nothing depends on what is missing, leave it out: with poutine.mask(mask=there): pyro.sample(..., "
    "obs=x), in the place of obs_mask=there, needs no latents, and goes with any guide."
)
_CIRCULAR = ("VonMises", "VonMises3D", "SineBivariateVonMises", "SineSkewed")  # torch calls their support real


class NotForEachError(ProgramError):
    """A pair that has no log p(x) for each datum, but may have one of all data together."""


def latent_of(sites: Mapping[str, Any]) -> dict[str, Any]:
    """The sites that are drawn."""
    return {name: site for name, site in sites.items() if not site["is_observed"]}


def observed_of(sites: Mapping[str, Any]) -> dict[str, Any]:
    """The sites that are given."""
    return {name: site for name, site in sites.items() if site["is_observed"]}


def plates_of(site: Any) -> list[Any]:
    """The plates that a site is in, without sequential ones."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def refusal(site: Any) -> str:
    """Why a latent cannot be moved as real numbers, beyond what its support says; empty if it can."""
    if type(base_distribution(site["fn"])).__name__ in _CIRCULAR:
        return "is an angle"
    # A masked latent has no density, so that nothing holds a Gaussian's draws of it in place.
    return "is masked" if is_masked(site) else ""


def is_masked(site: Any) -> bool:
    """Whether there is a mask on a site's density, of a handler or of its distribution."""
    return bool(_masks_of(site))


def is_scaled(site: Any) -> bool:
    """Whether a handler scales a site's density; a plate that takes some of its data for all scales it, too."""
    frames = site["cond_indep_stack"]
    by_plates = math.prod(float(frame.full_size / frame.size) for frame in frames if frame.full_size and frame.size)
    scale = torch.as_tensor(site["scale"], dtype=torch.float64)
    return not torch.allclose(scale, torch.full_like(scale, by_plates))


def _masks_of(site: Any) -> list[Tensor]:
    """The masks on a site's density, each with a dimension for all of its value's, or fewer on the left."""
    masks, layer = [(site["mask"], site["fn"])], site["fn"]
    while hasattr(layer, "base_dist"):
        if isinstance(layer, dist.MaskedDistribution):
            masks.append((layer._mask, layer))
        layer = layer.base_dist
    tensors = ((torch.as_tensor(mask), len(fn.event_shape)) for mask, fn in masks if mask is not None)
    return [mask.reshape(mask.shape + (1,) * event_dim) for mask, event_dim in tensors]


def check_masks(model: Mapping[str, Any], guide: Mapping[str, Any], names: Collection[str]) -> None:
    """Raises `ProgramError` where a latent's density counts for other entries in one program than in the other.

    Args:
        model: The model's sites.
        guide: The guide's.
        names: The latents that are drawn; those that are summed out have no density, masked or not.
    """
    for name in names:
        ours, theirs = (
            reduce(torch.logical_and, _masks_of(sites[name]), torch.tensor(True)) for sites in (model, guide)
        )
        for here, there, mask, other in (("model", "guide", ours, theirs), ("guide", "model", theirs, ours)):
            if (~mask & other).any():
                raise ProgramError(
                    f"site '{name}' is masked in the {here} where the {there} has a density of it: the two would be "
                    "densities of different latents. Put the same poutine.mask(mask=...) around it in both."
                    f"{_OBS_MASK if name.endswith('_unobserved') else ''}"
                )


def other_support(site: Any) -> Any:
    """An observed site's support where it is of whole numbers or vectors and `check_supports` does not know it.

    None elsewhere: a support of real numbers may depend on the latents, and then data outside of it are no mistake.
    """
    support = support_of(site)
    if support is None or simple_support(site["fn"]) is not None:
        return None
    return support if support.is_discrete or inner_support(support).event_dim else None


def support_of(site: Any) -> Any:
    """The support of a site's distribution; none where that does not say."""
    try:
        return site["fn"].support
    except NotImplementedError:
        return None


def check_names(here: Collection[str], there: Collection[str]) -> None:
    """Raises `ProgramError` where two runs have other sites."""
    if set(here) != set(there):
        raise ProgramError(
            f"the latent sites are not the same in every batch, or for one datum and for two: {sorted(here)} and "
            f"{sorted(there)}. Use the same sites for all data, and mask those that a datum does not have."
        )


def first_other_row(data: tuple[Tensor, ...]) -> int:
    """A datum that differs from the first, so that they cannot stand in for each other; 0 if they are all alike."""
    differs = torch.zeros(min(len(data[0]), 1024), dtype=torch.bool)
    for tensor in data:
        differs |= (tensor[:1024] != tensor[:1]).reshape(len(differs), -1).any(1).cpu()
    return int(differs.double().argmax())


def check_densities(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """Raises `ProgramError` where the guide has point masses, or a distribution cannot be used inside of a plate."""
    points = sorted(point_masses(guide))
    if points and not auxiliary_of(guide):
        raise _point_mass(points)
    for name, site in (*model.items(), *guide.items()):
        try:
            with suppress(ValueError):  # values outside of the support are told of elsewhere
                site["fn"].log_prob(site["value"])
        except (AssertionError, NotImplementedError) as error:
            raise ProgramError(
                f"site '{name}' ({type(base_distribution(site['fn'])).__name__}) gives no density inside of a plate "
                f"over the data: {error or type(error).__name__}. Use a distribution that has one for each datum."
            ) from error


def point_masses(guide: Mapping[str, Any]) -> set[str]:
    """A guide's sites that are a function of its other ones, as those of automatic guides are, or of none at all."""
    return {name for name, site in guide.items() if isinstance(base_distribution(site["fn"]), dist.Delta)}


def auxiliary_of(guide: Mapping[str, Any]) -> set[str]:
    """A guide's sites that the model has not, of which its point masses are functions."""
    return {name for name, site in guide.items() if site["infer"].get("is_auxiliary")}


def check_auxiliary(guide: Mapping[str, Any], again: Mapping[str, Any]) -> None:
    """Looks at latents that are functions of auxiliary variables: their density is known if that is one to one.

    Args:
        guide: The guide's sites.
        again: The same of another run.

    Raises:
        ProgramError: Latents do not vary with the auxiliary variables, or are more or fewer numbers than these.
    """
    points, auxiliary = sorted(point_masses(guide)), sorted(auxiliary_of(guide))
    fixed = [name for name in points if torch.equal(guide[name]["value"], again[name]["value"])]
    if fixed:
        raise _point_mass(fixed)
    drawn = sum(guide[name]["value"].numel() for name in auxiliary)
    made = sum(_real_numbers(guide[name]["value"], support_of(again[name])) for name in points)
    if auxiliary and drawn != made:
        raise ProgramError(
            f"the guide draws {drawn} numbers at {auxiliary}, which the model does not have, and makes {made} real "
            f"numbers of them at {points}: where the two differ the density of the latents is not known. Make the "
            "latents a one-to-one function of them, pyro.sample(name, dist.Delta(f(a), log_density=...)), or draw the "
            "latents themselves."
        )


def _real_numbers(value: Tensor, support: Any) -> int:
    """How many real numbers a latent with a support is."""
    try:
        return biject_to(support).inv(value).numel()
    except NotImplementedError:
        return value.numel()


def _point_mass(points: list[str]) -> ProgramError:
    return ProgramError(
        f"the guide has a point mass at {points}: a Delta has no density to weigh draws by. Use a guide with a "
        "density, such as a Normal; of Pyro's automatic guides AutoNormal in the place of AutoDelta, and of "
        "AutoLaplaceApproximation its laplace_approximation(*data)."
    )


def check_shapes(sites: Mapping[str, Any]) -> None:
    """Raises `ProgramError` where a site has a dimension that no plate declares."""
    for name, site in sites.items():
        try:
            check_site_shape({**site, "log_prob": site["fn"].log_prob(site["value"])}, math.inf)  # type: ignore[arg-type]
        except ValueError as error:
            raise ProgramError(f"site '{name}' has a dimension that is no plate's. {first_line(error)}.") from error


def check_plates(model: Mapping[str, Any], guide: Mapping[str, Any], dim: int | None) -> None:
    """Looks for densities that plates multiply: a latent's that only one program repeats, and the data's.

    Raises:
        ProgramError: A latent has more entries in one program than in the other.
    """
    for name, site in model.items():
        if site["is_observed"]:
            warn_of_repeated(name, site, (dim,))
            continue
        if name not in guide:
            continue
        ours, theirs = (tuple(one["fn"].shape()) for one in (site, guide[name]))
        depth = max(len(ours), len(theirs))
        if (1,) * (depth - len(ours)) + ours != (1,) * (depth - len(theirs)) + theirs:
            plates = [[(p.name, p.size) for p in plates_of(one)] for one in (site, guide[name])]
            raise ProgramError(
                f"site '{name}' has shape {ours} in the model, in plates {plates[0]}, and {theirs} in the guide, in "
                f"plates {plates[1]}{'' if dim is None else ', on two data'}: each would count its density another "
                "number of times. Use the same plates in both."
            )


def normal_moments(site: Any, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """Mean and Cholesky factor of a site run for three particles, where that is normal and the same in all.

    None where it is not.
    """
    leaf, event_dim = leaf_of(site["fn"]), len(site["fn"].event_shape)
    if type(leaf) not in (dist.Normal, dist.MultivariateNormal) or site["mask"] is not None:
        return None
    scale = leaf.stddev if type(leaf) is dist.Normal else leaf.scale_tril
    loc = layout.gather(leaf.loc, event_dim, 3)
    scale = layout.gather(scale, event_dim + scale.dim() - leaf.loc.dim(), 3)
    loc, scale = (t.float() if t.dtype.itemsize == 2 else t for t in (loc, scale))  # as `LatentSpace` has vectors
    if not (torch.equal(loc, loc[:1].expand_as(loc)) and torch.equal(scale, scale[:1].expand_as(scale))):
        return None
    if type(leaf) is dist.Normal:
        flat = loc[0].reshape(loc.shape[1], -1)
        return flat, scale[0].reshape(flat.shape).diag_embed()
    return (loc[0], scale[0]) if loc.dim() == 3 else None  # a nested plate would make many blocks


def data_dim(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> int:
    """The dimension at which every site has a plate of size 1 for one datum, and of size 2 for two."""

    def dims(site: Any, size: int) -> set[int]:
        return {plate.dim for plate in plates_of(site) if plate.size == size}

    sites = {f"{name} ({program})": (program, name, site) for program in two for name, site in two[program].items()}
    follows = [
        dims(site, 2) & dims(one[program][name], 1) if name in one[program] else set()
        for program, name, site in sites.values()
    ]
    common = set.intersection(*follows) if follows else set()
    if len(common) == 1:
        check_plates(two["model"], two["guide"], *common)
        return common.pop()
    shown = "; ".join(
        f"'{label}' has plates {[(p.name, p.size) for p in plates_of(site)]}, "
        f"batch shape {tuple(site['fn'].batch_shape)}"
        for label, (_, _, site) in sites.items()
    )
    raise NotForEachError(
        "log p(x) for each datum needs one plate over the data, of size len(x), around every sample site of the model "
        f"and the guide: with pyro.plate('data', len(x)): ... On two data, {shown or 'there are no sample sites'}."
    )
