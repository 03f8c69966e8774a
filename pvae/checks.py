"""What programs are run on and what they did in a trial run: checked once, before anything has moved."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pvae.errors import DataError, ProgramError

__all__ = [
    "Array",
    "Data",
    "as_tensors",
    "base_distribution",
    "check_pair",
    "check_real",
    "check_shape",
    "check_signature",
    "check_support",
    "check_supports",
    "density_sites",
    "fingerprint",
    "kind",
    "named_shape",
    "observed",
    "simple_support",
    "tensors_of",
]

Array = Tensor | np.ndarray
"""One array."""

Data = Tensor | np.ndarray | Sequence[Tensor | np.ndarray] | Dataset[Any] | DataLoader[Any]
"""One array ``(N, *event)``, or a tuple of arrays with the same ``N``, passed on as ``model(*batch)``; or a torch
``Dataset`` or ``DataLoader`` that gives such batches, where they do not fit in memory."""


def as_tensors(name: str, data: Data) -> tuple[Tensor, ...]:
    """Checks data and returns them as a tuple of tensors with the same leading ``N >= 1``, all entries finite.

    Args:
        name: What to call the data in an error.
        data: One array or a sequence of arrays. NumPy arrays share memory with the tensors where they can.

    Raises:
        DataError: Not arrays, no data, different lengths, or nan, infinite or masked entries (how many, and the index
            of the first).
    """
    arrays: Any = data.tensors if isinstance(data, TensorDataset) else data
    arrays = arrays if isinstance(arrays, tuple | list) else (arrays,)
    wrong = {n: a for n, a in enumerate(arrays) if not isinstance(a, Tensor | np.ndarray)}
    if wrong or not arrays:
        came = ", ".join(dict.fromkeys(type(a).__name__ for a in wrong.values())) or "an empty sequence"
        advice = _as_array(name, data, wrong) if wrong else "Pass some data."
        raise DataError(f"{name} must be a tensor, a NumPy array or a tuple of them; got {came}. {advice}")
    tensors = tuple(_from_numpy(name, a) if isinstance(a, np.ndarray) else torch.as_tensor(a) for a in arrays)
    layouts = [t.layout for t in tensors if t.layout is not torch.strided]
    if layouts:
        raise DataError(f"{name} must be dense, got a tensor of layout {layouts[0]}. Pass x.to_dense().")
    if any(t.is_meta for t in tensors):
        raise DataError(f"{name} must be numbers, got a tensor on the meta device, which holds none.")
    shapes = [tuple(t.shape) for t in tensors]
    if any(t.dim() == 0 for t in tensors) or len({t.shape[0] for t in tensors}) != 1:
        raise DataError(f"{name} must have one leading dimension of N data, the same for every tensor; got {shapes}.")
    if any(t.numel() == 0 for t in tensors):
        raise DataError(f"{name} is empty: its shape is {shapes if len(shapes) > 1 else shapes[0]}. Pass some data.")
    for position, tensor in enumerate(tensors):
        _check_finite(name if len(tensors) == 1 else f"{name}[{position}]", tensor)
    return tuple(t.detach() if t.requires_grad else t for t in tensors)  # gradients are for parameters


def _as_array(name: str, data: Any, wrong: Mapping[int, Any]) -> str:
    """How to make arrays of what is none among data, by its place in them, in words."""
    place, thing = next(iter(wrong.items()))
    if isinstance(thing, int | float | list):
        return f"Pass torch.tensor({name})."
    name = f"{name}[{place}]" if isinstance(data, tuple | list) else name
    for method in ("to_numpy", "toarray", "to_array"):  # of data frames and series, sparse matrices, xarray's datasets
        if callable(getattr(thing, method, None)):
            return f"Pass {name}.{method}(){'.to_numpy()' if method == 'to_array' else ''}."
    return f"Pass np.asarray({name}), if that makes an array of numbers."


def _from_numpy(name: str, array: np.ndarray) -> Tensor:
    """Shares the array's memory where torch can: not with negative strides, foreign byte order or read-only memory."""
    if np.ma.is_masked(array):
        masked = int(np.ma.count_masked(array))
        first = tuple(np.argwhere(np.ma.getmaskarray(array))[0].tolist())
        raise DataError(
            f"{name} holds {masked} masked entries, the first at index {first}. Remove or impute them first."
        )
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise DataError(
            f"{name} must be of a number type of torch's, got an array of dtype {array.dtype}. Leave out what is no "
            "number, then .astype('float32')."
        ) from error


def check_shape(name: str, x: Tensor, event_shape: tuple[int, ...]) -> None:
    """Raises `DataError` where ``x`` is not of shape ``(N, *event_shape)``."""
    if error := _wrong_shape(name, x, event_shape):
        raise error


def _wrong_shape(name: str, x: Tensor, event_shape: tuple[int, ...]) -> DataError | None:
    if x.dim() and tuple(x.shape[1:]) == event_shape:
        return None
    advice = "Reshape the data, or build the VAE with another event_shape."
    if x.dim() and x.shape[1:].numel() == math.prod(event_shape):
        advice = f"Reshape the data, x.reshape(len(x), *{event_shape}), or build the VAE with that event_shape."
    if tuple(x.shape) == event_shape:
        advice = "Is it one datum, as X[0] is? Pass X[:1], or x[None]: the first dimension is that of the data."
    elif len(event_shape) == 3 and tuple(x.shape[1:]) == (*event_shape[1:], event_shape[0]):
        advice = "Its channels stand last: x.permute(0, 3, 1, 2) puts them first."
    expected = ", ".join(["N", *map(str, event_shape)])
    error = DataError(f"{name} must have shape ({expected}), got {tuple(x.shape)}. {advice}")
    vars(error)["shapes"] = x.shape, event_shape
    return error


@contextmanager
def named_shape(name: str, data: tuple[Tensor, ...] | None) -> Iterator[None]:
    """A block that runs programs on parts of data: where these have another shape, the error names that of the data.

    Args:
        name: What to call them.
        data: As they were passed, or ``None`` where batches are something else.
    """
    try:
        yield
    except DataError as error:
        part, event_shape = getattr(error, "shapes", (None, ()))
        for tensor in data or ():
            whole = _wrong_shape(name, tensor, event_shape) if part and part[1:] == tensor.shape[1:] else None
            if whole:
                raise whole from None
        raise


def _check_finite(name: str, tensor: Tensor) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # The sum is finite where every entry is, and far cheaper than a mask; a sum that overflowed is looked at closely.
    if torch.isfinite(tensor.sum(dtype=torch.float64 if tensor.is_floating_point() else None)):
        return
    bad = ~torch.isfinite(tensor)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"{name} holds {int(bad.sum())} nan or infinite entries, the first at index {first}. "
            "Remove or impute them first."
        )


def check_support(site: str, distribution: Any, value: Tensor) -> None:
    """Raises `DataError` where ``value`` lies outside the support of an observed site's distribution.

    Looks at supports of single entries that do not depend on parameters (booleans, reals, positive numbers, ...),
    below any ``to_event``, ``expand`` or ``mask``.
    """
    family = type(base_distribution(distribution))
    support = simple_support(distribution)
    if support is None or support is constraints.real:
        return
    bad = ~support.check(value)
    if not bad.any():
        return
    example = value[bad][0].item()
    advice = "Rescale the data, or choose a likelihood for such values."
    if support is constraints.boolean:
        advice = (
            "Binarize the data by name, pvae.datasets.mnist(binarization='threshold' | 'static' | 'dynamic') or "
            "pvae.datasets.binarize(x, 'threshold'), or choose a likelihood for grey values, such as Gaussian."
        )
    raise DataError(
        f"site '{site}' is {family.__name__}, whose support is {support}, but {bad.double().mean().item():.3%} of its "
        f"data are outside (for example {example:g}; smallest {value.min().item():g}, "
        f"largest {value.max().item():g}). {advice}"
    )


def simple_support(distribution: Any) -> constraints.Constraint | None:
    """A distribution's support below any ``to_event``, if it is one of single entries that depends on no parameters."""
    support = getattr(type(base_distribution(distribution)), "support", None)
    if not isinstance(support, constraints.Constraint) or constraints.is_dependent(support) or support.event_dim:
        return None
    return support


def observed(sites: Mapping[str, Any], batch: tuple[Tensor, ...]) -> list[tuple[str, Any, list[int]]]:
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
        found: As from `observed`.
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


def density_sites(sites: Mapping[str, Any]) -> dict[str, Any]:
    """The traced sites that have a density: not plates' subsamples, and not ``pyro.deterministic``."""
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def check_pair(model: Mapping[str, Any], guide: Mapping[str, Any], *, strict: bool) -> None:
    """Raises `ProgramError` where a model and a guide do not fit each other.

    Args:
        model: The model's sites, as from `density_sites`.
        guide: The guide's.
        strict: Whether every site must have a twin, as importance weights want it. An ELBO also allows discrete latents
            that are summed out (in the model alone), auxiliary variables and factors (in the guide alone).
    """
    latent = {name: site for name, site in model.items() if not site["is_observed"]}
    proposed = {name: site for name, site in guide.items() if not site["is_observed"]}
    summed = {name for name, site in latent.items() if site["infer"].get("enumerate")}
    auxiliary = {name for name, site in proposed.items() if site["infer"].get("is_auxiliary")}
    missing = latent.keys() - proposed.keys() - (set() if strict else summed)
    extra = proposed.keys() - latent.keys() - (set() if strict else auxiliary)
    if missing or extra:
        enumerated = sorted(summed) if strict else []
        hint = " Give each latent of the model a site of the same name in the guide, and no others."
        if enumerated:
            hint = (
                f" Latents that are enumerated ({enumerated}) cannot be summed out here. Let the guide draw them, too, "
                f"by pyro.sample('{enumerated[0]}', ...) with probabilities that depend on x; or sum them out in "
                "the model, as MixtureSameFamily does."
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
    """Raises `ProgramError` where a program cannot be called with the tensors of a batch.

    Args:
        role: What to call the program.
        program: The model or the guide.
        batch: The tensors.
        transforms: Whether the caller takes a ``transform`` for them.
    """
    try:
        signature = inspect.signature(program)
    except (TypeError, ValueError):  # some callables have none
        return
    try:
        signature.bind(*batch)
    except TypeError as error:
        shapes, fewer = ", ".join(str(tuple(t.shape)) for t in batch), _fewer(signature, batch, transforms)
        raise ProgramError(
            f"the {role} cannot be called with a batch, which is {len(batch)} tensor(s), {shapes}: {error}. It takes "
            f"{signature}. {fewer}{'l' if fewer else 'L'}et it take one argument for each."
        ) from None


def _fewer(signature: inspect.Signature, batch: tuple[Tensor, ...], transforms: bool) -> str:
    """What to do where a program takes fewer tensors than there are, as of data with labels; else empty."""
    taken = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not 0 < len(taken) < len(batch):
        return ""
    names = ["x", "y", *(f"y{n}" for n in range(2, len(batch)))]
    first, every = ", ".join(names[: len(taken)]), ", ".join(names)
    if transforms:
        return f"To leave out what it does not take, such as labels, pass transform=lambda {every}: {first}. Or "
    return f"Pass only what it takes, {first} of ({every}), without labels; of a loader its collate_fn can. Or "


def kind(tensor: Tensor) -> str:
    """Dtype and shape in a few letters, such as ``float32[64, 6]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Sixteen digits that depend on all that is in some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        for rows in (tensor if tensor.dim() else tensor[None]).detach().split(4096):
            digest.update(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
