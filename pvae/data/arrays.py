"""Arrays that are data: checked once, by shape and by what is in them, before anything has moved."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pvae.errors import DataError

__all__ = ["Array", "Data", "as_tensors", "check_shape", "fingerprint", "kind", "named_shape"]


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
        if isinstance(data, tuple | list) and len(wrong) == len(data):
            return f"Pass torch.tensor({name})."
        if name == "validation":
            return "It is data that are held out, not a share of them: pass data=x[n:] and validation=x[:n]."
        return "Pass an array whose first dimension is that of the data."
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
        advice = "" if tensor.isinf().any() else ", or train a pvae.MaskedVAE on pvae.MaskedVAE.from_nan(x)"
        raise DataError(
            f"{name} holds {int(bad.sum())} nan or infinite entries, the first at index {first}. "
            f"Remove or impute them first{advice}."
        )


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
