"""The arguments of a step, taken apart into tensors, which may change freely, and the rest, which decides what runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pvae.capture import find_opaque, is_same

__all__ = ["Arguments", "most_varied", "name_of"]

_FLOATS = (float, np.floating)
_TENSOR = object()


class _Number:
    """In the place of a float of some class."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


_NUMBERS: dict[type, _Number] = {}


class _Part(NamedTuple):
    """One argument without its tensors."""

    spec: pytree.TreeSpec
    rest: tuple[Any, ...]
    shapes: tuple[Any, ...]

    def same(self, other: _Part) -> bool:
        return self.spec == other.spec and all(map(is_same, self.rest, other.rest))


class Arguments(NamedTuple):
    """What a program is called with.

    Attributes:
        tensors: Those among the arguments, in lists and dicts too; and floats, as tensors.
        parts: All else of each argument, by its number or keyword.
    """

    tensors: tuple[Tensor, ...]
    parts: dict[int | str, _Part]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Takes arguments apart."""
        tensors: list[Tensor] = []
        parts: dict[int | str, _Part] = {}
        for key, value in (*enumerate(args), *kwargs.items()):
            leaves, spec = pytree.tree_flatten(value)
            # A number in float64 leaves a program of float32 in float32.
            numbers = (torch.tensor(v, dtype=torch.float64) if isinstance(v, _FLOATS) else v for v in leaves)
            found = [v for v in numbers if isinstance(v, Tensor)]
            rest = tuple(_without_value(v) for v in leaves)
            parts[key] = _Part(spec, rest, tuple((t.shape, t.stride(), t.dtype, t.device) for t in found))
            tensors += found
        return cls(tuple(tensors), parts)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Of the tensors."""
        return tuple(part.shapes for part in self.parts.values())

    @property
    def objects(self) -> tuple[Any, ...]:
        """Whatever is among the arguments that may change without being replaced."""
        return tuple(v for part in self.parts.values() for v in part.rest if not _is_input(v))

    def same(self, other: Arguments) -> bool:
        """Whether they differ in nothing but tensors."""
        parts = zip(self.parts.values(), other.parts.values(), strict=False)
        return list(self.parts) == list(other.parts) and all(ours.same(theirs) for ours, theirs in parts)

    def foreign(self) -> tuple[int | str, str] | None:
        """An argument that nobody can compare with another, and what of it; ``None`` if there is none."""
        found = ((key, find_opaque(v)) for key, part in self.parts.items() for v in part.rest if not _is_input(v))
        return next(((key, what) for key, what in found if what), None)

    @property
    def has_floats(self) -> bool:
        """Whether there are floats among them."""
        return any(isinstance(v, _Number) for part in self.parts.values() for v in part.rest)

    def put_together(
        self, tensors: Sequence[Tensor], *, floats: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors, and where asked for with floats in the places of floats."""
        left = iter(tensors)

        def filled(v: Any) -> Any:
            if not _is_input(v):
                return v
            return v.kind(next(left).item()) if floats and isinstance(v, _Number) else next(left)

        args, kwargs = [], {}
        for key, part in self.parts.items():
            value = pytree.tree_unflatten(list(map(filled, part.rest)), part.spec)
            if isinstance(key, str):
                kwargs[key] = value
            else:
                args.append(value)
        return tuple(args), kwargs


def _without_value(value: Any) -> Any:
    if isinstance(value, _FLOATS):
        return _NUMBERS.setdefault(type(value), _Number(type(value)))
    return _TENSOR if isinstance(value, Tensor) else value


def _is_input(value: Any) -> bool:
    return value is _TENSOR or isinstance(value, _Number)


def most_varied(seen: Sequence[Arguments]) -> int | str:
    """The argument that has taken the most values, tensors aside."""

    def count(key: int | str) -> int:
        kinds: list[_Part] = []
        for part in (one.parts[key] for one in seen if key in one.parts):
            if not any(part.same(kind) for kind in kinds):
                kinds.append(part)
        return len(kinds)

    return max((key for one in seen for key in one.parts), key=count)


def name_of(key: int | str, program: Callable[..., Any]) -> str:
    """An argument's name in a program's signature, in quotes."""
    names: list[str] = []
    if isinstance(key, int):
        try:
            names = list(inspect.signature(program).parameters)
        except (TypeError, ValueError):  # of a program without one
            names = []
    return f"'{key}'" if isinstance(key, str) else f"'{names[key]}'" if key < len(names) else f"number {key + 1}"
