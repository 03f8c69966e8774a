"""What programs did in a trial run, site by site: checked once, before anything has moved."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.errors import ArgumentError, DataError, ProgramError, warn

__all__ = [
    "base_distribution",
    "check_pair",
    "check_real",
    "check_signature",
    "check_support",
    "check_supports",
    "check_whole",
    "density_sites",
    "enumerated_sites",
    "observed_data",
    "simple_support",
    "tensors_of",
    "warn_of_repeated",
]


_MANY = 8  # tensors of one shape that are hardly several kinds of data

# What to do about data outside of a support, where it does not say so itself.
_ADVICE: dict[constraints.Constraint, str] = {
    constraints.boolean: (
        "Binarize the data by name, pvae.datasets.mnist(binarization='threshold' | 'static' | 'dynamic') or "
        "pvae.datasets.binarize(x, 'threshold'), or choose a likelihood for grey values, such as ContinuousBernoulli."
    ),
    constraints.nonnegative_integer: (
        "It is for counts, 0, 1, 2 and so on: pass them as they were before any scaling (x.round() where they differ "
        "from whole numbers by rounding alone), or choose a likelihood for real numbers, such as Gaussian."
    ),
    constraints.unit_interval: (
        "Bring the data to [0, 1], as pixels of 8 bits by x / 255, or choose a likelihood for real numbers, such as "
        "Gaussian."
    ),
}


def check_support(site: str, distribution: Any, value: Tensor) -> None:
    """Raises `DataError` where ``value`` lies outside the support of an observed site's distribution.

    Looks at supports of single entries that do not depend on parameters (booleans, reals, positive numbers, ...),
    below any ``to_event``, ``expand`` or ``mask``. A support may have an attribute ``advice``: what to do about data
    outside of it, for the error.
    """
    family = type(base_distribution(distribution))
    support = simple_support(distribution)
    if support is None or support is constraints.real:
        return
    bad = ~support.check(value)
    if not bad.any():
        return
    example = value[bad][0].item()
    raise DataError(
        f"site '{site}' is {family.__name__}, whose support is {support}, but {bad.double().mean().item():.3%} of its "
        f"data are outside (for example {example:g}; smallest {value.min().item():g}, "
        f"largest {value.max().item():g}). {_advice(support)}"
    )


def _advice(support: constraints.Constraint) -> str:
    if isinstance(support, type(constraints.integer_interval(0, 1))):
        return (
            f"It is for whole numbers from {support.lower_bound} to {support.upper_bound}, as classes are: number them "
            "from 0, and let the likelihood have as many as there are."
        )
    other = "Rescale the data, or choose a likelihood for such values."
    return getattr(support, "advice", None) or _ADVICE.get(support, other)


def simple_support(distribution: Any) -> constraints.Constraint | None:
    """A distribution's support below any ``to_event``, if it is one of single entries that depends on no tensors."""
    base = base_distribution(distribution)
    support = getattr(type(base), "support", None)
    if not isinstance(support, constraints.Constraint):
        return None
    if constraints.is_dependent(support):
        support = _of_numbers(base)
    return None if support is None or support.event_dim else support


def _of_numbers(base: Any) -> constraints.Constraint | None:
    """A support that belongs to an instance and is told by plain numbers: of classes, how many there are."""
    try:
        support = base.support
    except NotImplementedError:
        return None
    plain = all(isinstance(v, int | float) for v in vars(support).values())
    return support if plain and not constraints.is_dependent(support) else None


def observed_data(sites: Mapping[str, Any], batch: tuple[Tensor, ...]) -> list[tuple[str, Any, list[int]]]:
    """The observed sites that took tensors of a batch as they were: name, distribution, and which tensors by index.

    Args:
        sites: Traced sites of the model, by name.
        batch: What the model was traced on.
    """
    given = {n: site for n, site in sites.items() if site["type"] == "sample" and site["is_observed"]}
    found = [(name, site["fn"], tensors_of(site["value"], batch)) for name, site in given.items()]
    return [entry for entry in found if entry[2]]


def check_supports(found: Iterable[tuple[str, Any, list[int]]], data: tuple[Tensor, ...]) -> None:
    """Checks data against the supports of the sites that observe them.

    Args:
        found: As from `observed_data`.
        data: All the data, or other batches of them.
    """
    for name, distribution, matches in found:
        problems = []
        for index in matches:
            try:
                check_support(name, distribution, data[index])
            except DataError as error:
                problems.append(error)
        # Two tensors may happen to agree on a batch; the site observes one of them.
        if len(problems) == len(matches):
            raise problems[0]


def tensors_of(value: Tensor, batch: tuple[Tensor, ...]) -> list[int]:
    """Which tensors of a batch an observed value is, by index: one it shares memory with, else all that are equal."""
    equal = [
        index
        for index, rows in enumerate(batch)
        if value.numel() == rows.numel()
        and value.is_complex() == rows.is_complex()
        and torch.equal(value.reshape(-1), rows.reshape(-1).to(value))
    ]
    same = [index for index in equal if batch[index].data_ptr() == value.data_ptr()]
    return same or equal


def warn_of_repeated(name: str, site: Any, around: Collection[int | None] = (), advice: str = "") -> None:
    """Says so where an observed site's data do not vary along a plate, so that each entry counts them once more.

    Args:
        name: The site's.
        site: Traced.
        around: Dimensions of plates that are not meant, as of particles or data.
        advice: What else may be wrong, a sentence after a space.
    """
    shape = site["value"].shape[: site["value"].dim() - len(site["fn"].event_shape)]
    plates = [f for f in site["cond_indep_stack"] if f.vectorized and f.size > 1 and f.dim not in around]
    for plate in plates:
        if -plate.dim > len(shape) or shape[plate.dim] == 1:
            warn(
                f"plate '{plate.name}' makes log p(x|z) {plate.size} times as large: the data of site '{name}' do not "
                "vary along it, and are counted once for each of its entries. Take the site out of the plate, or give "
                f"it data for each.{advice}"
            )


def density_sites(sites: Mapping[str, Any]) -> dict[str, Any]:
    """The traced sites that have a density: not plates' subsamples, and not ``pyro.deterministic``."""
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def check_pair(model: Mapping[str, Any], guide: Mapping[str, Any], *, strict: bool) -> None:
    """Raises `ProgramError` where a model and a guide do not fit each other.

    Every latent needs a site in both, but for discrete ones that are summed out, which may be in the model alone, and
    auxiliary variables, which are in the guide alone.

    Args:
        model: The model's sites, as from `density_sites`.
        guide: The guide's.
        strict: Whether importance weights are wanted. An ELBO also allows factors in the guide.
    """
    latent = {name: site for name, site in model.items() if not site["is_observed"]}
    proposed = {name: site for name, site in guide.items() if not site["is_observed"]}
    auxiliary = {name for name, site in proposed.items() if site["infer"].get("is_auxiliary")}
    missing = latent.keys() - proposed.keys() - enumerated_sites(latent)
    extra = proposed.keys() - latent.keys() - auxiliary
    if missing or extra:
        hint = " Give each latent of the model a site of the same name in the guide, and no others."
        discrete = sorted(name for name in missing if latent[name]["fn"].has_enumerate_support)
        if discrete:
            hint += (
                f" Or have discrete ones summed out: pyro.sample('{discrete[0]}', ..., "
                "infer={'enumerate': 'parallel'}) in the model."
            )
        raise ProgramError(
            f"the model and the guide must have the same latent sites. Model: {sorted(latent)}; guide: "
            f"{sorted(proposed)}. Only in the model: {sorted(missing)}; only in the guide: {sorted(extra)}.{hint}"
        )
    if len(latent) == len(model):
        raise ProgramError(
            "the model observes nothing: no site has obs=. Is it given in the place of the guide, or the guide in its?"
        )
    observed = [n for n, site in guide.items() if site["is_observed"] and (strict or not site_is_factor(site))]
    if observed:
        raise ProgramError(f"the guide observes {observed}; only the model can. Does it stand in the model's place?")
    for name in model.keys() - latent.keys():
        _check_complex(name, model[name])


def check_whole(sites: Mapping[str, Any]) -> None:
    """Raises `ProgramError` where a plate takes some of its data for all: then log p is an estimate itself.

    Args:
        sites: All traced sites, with those of plates.
    """
    for name, site in sites.items():
        if site["type"] == "sample" and site_is_subsample(site) and len(site["value"]) != site["fn"].size:
            raise ProgramError(
                f"plate '{name}' stands for {site['fn'].size} data and has {len(site['value'])} of them: "
                "log p(data) would be an estimate from these. Evaluate the model on all data, without subsample= or "
                "subsample_size=, and make a plate as large as the data it gets."
            )


def enumerated_sites(sites: Mapping[str, Any]) -> set[str]:
    """The latents, by name, that are marked ``infer={"enumerate": ...}`` and have values that can be listed."""
    return {
        name
        for name, site in sites.items()
        if site["infer"].get("enumerate") and not site["is_observed"] and site["fn"].has_enumerate_support
    }


def check_real(what: str, tensor: Tensor) -> None:
    """Raises `DataError` where numbers are complex that are taken as real."""
    if tensor.is_complex():
        raise DataError(
            f"{what} takes real numbers, and the data are {tensor.dtype}: their imaginary part would be lost. Pass "
            "torch.view_as_real(x), whose last dimension holds both parts, and let the model observe that."
        )


def _check_complex(name: str, site: Any) -> None:
    """Refuses complex data under a density of real numbers, whose log-density is then complex itself, or fails."""
    value, distribution = site["value"], site["fn"]
    if not isinstance(value, Tensor) or not value.is_complex():
        return
    with suppress(RuntimeError, ValueError, NotImplementedError):
        if not distribution.log_prob(value).is_complex():
            return
    check_real(f"site '{name}', {type(base_distribution(distribution)).__name__},", value)


def base_distribution(distribution: Any) -> Any:
    """The distribution below any ``to_event``, ``mask`` or transform."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def check_signature(
    role: str, program: Callable[..., Any], batch: tuple[Tensor, ...], *, transforms: bool = False
) -> None:
    """Raises where a program cannot be called with the tensors of a batch.

    Args:
        role: What to call the program.
        program: The model or the guide.
        batch: The tensors.
        transforms: Whether the caller takes a ``transform`` for them.

    Raises:
        ArgumentError: It is no program.
        ProgramError: It takes other tensors.
    """
    _check_callable(role, program)
    try:
        signature = inspect.signature(program)
    except (TypeError, ValueError):  # some callables have none
        return
    try:
        signature.bind(*batch)
    except TypeError as error:
        shapes, fewer = _shapes(batch), _fewer(signature, batch, transforms)
        raise ProgramError(
            f"the {role} cannot be called with a batch, which is {len(batch)} tensor(s), {shapes}: {error}. It takes "
            f"{signature}. {fewer}{'l' if fewer else 'L'}et it take one argument for each."
        ) from None


def _check_callable(role: str, program: Any) -> None:
    """Raises `ArgumentError` where something is no program, but may hold one."""
    kind = "None" if program is None else f"a {type(program).__name__}"
    if isinstance(program, type):
        raise ArgumentError(
            f"{role} is the class {program.__name__}. Make one of it, and pass its method, such as vae.{role}."
        )
    if callable(program) and not (isinstance(program, nn.Module) and _lacks_forward(program)):
        return
    if callable(getattr(program, "model", None)) and callable(getattr(program, "guide", None)):
        raise ArgumentError(
            f"{role} is {kind}, which holds programs and is none: pass its methods, vae.model and vae.guide."
        )
    hint = " Pass the program itself, as model and not model(x)." if program is None else ""
    raise ArgumentError(
        f"{role} must be a Pyro program: a function, a method or a module that is called with a batch; got "
        f"{kind}.{hint}"
    )


def _lacks_forward(module: nn.Module) -> bool:
    """Whether a module cannot be called."""
    own = (vars(kind) for kind in type(module).__mro__ if kind.__module__.partition(".")[0] not in ("torch", "pyro"))
    forward = getattr(module.forward, "__func__", module.forward)
    return forward is nn.Module.forward and not any("__call__" in names for names in own)


def _shapes(batch: tuple[Tensor, ...], most: int = 4) -> str:
    """Shapes of tensors in words, of many those of the first ones."""
    more = f" and {len(batch) - most} more" if len(batch) > most else ""
    return ", ".join(str(tuple(t.shape)) for t in batch[:most]) + more


def _fewer(signature: inspect.Signature, batch: tuple[Tensor, ...], transforms: bool) -> str:
    """What to do where a program takes fewer tensors than there are, as of data with labels; else empty."""
    taken = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not 0 < len(taken) < len(batch):
        return ""
    if len(batch) > _MANY and len({t.shape for t in batch}) == 1:
        stack = "torch.stack(data), of arrays np.stack(data)"
        return f"A list is taken as that many arrays. If these are rows of one array, pass {stack}. Or "
    names = ["x", "y", *(f"y{n}" for n in range(2, len(batch)))]
    first, every = ", ".join(names[: len(taken)]), ", ".join(names)
    if transforms:
        return f"To leave out what it does not take, such as labels, pass transform=lambda {every}: {first}. Or "
    return f"Pass only what it takes, {first} of ({every}), without labels; of a loader its collate_fn can. Or "
