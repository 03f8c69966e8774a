"""What the sites of a trial run tell of a pair: its data plate, and which latents are what. Nothing is run here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import distributions as dist
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pvae.errors import ProgramError, warn
from pvae.evidence.exponential_families import leaf_of
from pvae.evidence.latents import Layout, inner_support
from pvae.runtime import Program, base_distribution, simple_support

__all__ = [
    "check_densities",
    "check_names",
    "check_takes_batches",
    "data_dim",
    "first_other_row",
    "latent_of",
    "normal_moments",
    "observed_of",
    "other_support",
    "plates_of",
    "refusal",
    "support_of",
]

_CIRCULAR = ("VonMises", "VonMises3D", "SineBivariateVonMises", "SineSkewed")  # torch calls their support real


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
    layers = [site["fn"]]
    while hasattr(layers[-1], "base_dist"):
        layers.append(layers[-1].base_dist)
    if type(layers[-1]).__name__ in _CIRCULAR:
        return "is an angle"
    # A masked latent has no density, so that nothing holds a Gaussian's draws of it in place.
    masked = site["mask"] is not None or any(isinstance(layer, dist.MaskedDistribution) for layer in layers)
    return "is masked" if masked else ""


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


def check_takes_batches(guide: Program) -> None:
    """Raises `ProgramError` where a guide is for one data set as a whole."""
    if isinstance(guide, AutoGuide):
        raise ProgramError(
            f"the guide is an {type(guide).__name__}, whose parameters belong to the data that it was fitted on. "
            "log p(x) is estimated in batches: write a guide that takes a batch, such as an encoder."
        )


def check_densities(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """Raises `ProgramError` where the guide has point masses, or a distribution cannot be used inside of a plate."""
    points = sorted(name for name, site in guide.items() if isinstance(base_distribution(site["fn"]), dist.Delta))
    if points:
        raise ProgramError(
            f"the guide has a point mass at {points}: a Delta has no density to weigh draws by. Use a guide with a "
            "density, such as a Normal."
        )
    for name, site in (*model.items(), *guide.items()):
        try:
            with suppress(ValueError):  # values outside of the support are told of elsewhere
                site["fn"].log_prob(site["value"])
        except (AssertionError, NotImplementedError) as error:
            raise ProgramError(
                f"site '{name}' ({type(base_distribution(site['fn'])).__name__}) gives no density inside of a plate "
                f"over the data: {error or type(error).__name__}. Use a distribution that has one for each datum."
            ) from error


def _check_plates(model: Mapping[str, Any], guide: Mapping[str, Any], dim: int) -> None:
    """Looks for densities that plates multiply: a latent's that only one program repeats, and the data's.

    Raises:
        ProgramError: A latent has more entries in one program than in the other.
    """
    for name, site in model.items():
        if site["is_observed"]:
            shape = site["value"].shape[: site["value"].dim() - len(site["fn"].event_shape)]
            others = [plate for plate in plates_of(site) if plate.size > 1 and plate.dim != dim]
            many = [plate for plate in others if -plate.dim > len(shape) or shape[plate.dim] == 1]
            for plate in many:
                warn(
                    f"plate '{plate.name}' makes log p(x|z) {plate.size} times as large: the data of site '{name}' do "
                    "not vary along it, and are counted once for each of its entries. Take the site out of the plate, "
                    "or give it data for each."
                )
            continue
        ours, theirs = (tuple(one["fn"].shape()) for one in (site, guide[name]))
        depth = max(len(ours), len(theirs))
        if (1,) * (depth - len(ours)) + ours != (1,) * (depth - len(theirs)) + theirs:
            plates = [[(p.name, p.size) for p in plates_of(one)] for one in (site, guide[name])]
            raise ProgramError(
                f"site '{name}' has shape {ours} in the model, in plates {plates[0]}, and {theirs} in the guide, in "
                f"plates {plates[1]}, on two data: each would count its density another number of times. Use the same "
                "plates in both."
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
        _check_plates(two["model"], two["guide"], *common)
        return common.pop()
    shown = "; ".join(
        f"'{label}' has plates {[(p.name, p.size) for p in plates_of(site)]}, "
        f"batch shape {tuple(site['fn'].batch_shape)}"
        for label, (_, _, site) in sites.items()
    )
    raise ProgramError(
        "log p(x) for each datum needs one plate over the data, of size len(x), around every sample site of the model "
        f"and the guide: with pyro.plate('data', len(x)): ... On two data, {shown or 'there are no sample sites'}."
    )
