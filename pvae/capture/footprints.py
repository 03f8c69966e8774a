"""What programs were like when they were captured, known afterwards without keeping any of them alive.

A `Guard` holds what it watches. Between two calls nobody's programs may be held, so what a guard has noted is written
down as marks: plain values as they are, all else by weak references, and what only holds other things by its parts.
Programs are as they were if a new guard's marks equal the old ones.
"""

from __future__ import annotations

import inspect
import re
import weakref
from contextvars import ContextVar
from functools import cached_property
from logging import Logger
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pvae.capture.guards import COPIED, VALUES, Guard, split_up
from pvae.runtime import MISSING, MODULES_OWN, PLAIN

__all__ = ["Untold", "footprint"]

_MOST_MARKS = 100_000


class Untold(Exception):
    """Something has no mark: it is neither a value nor made of any, and there are no weak references to it."""


def footprint(guard: Guard) -> list[Any]:
    """Marks of all that a guard has noted, to be compared by ``==``.

    Raises:
        Untold: There is something that has none.
    """
    marks = _Marks()
    noted = [
        (watched.owner, watched.size, [(key, marks.of(v)) for key, v in watched.entries.items() if _counts(key, v)])
        for watched in guard.watched
    ]
    return [[marks.of(program) for program in guard.programs], noted]


def _counts(key: Any, value: Any) -> bool:
    """Whether an entry says more than those of a module's own dicts, which are noted by themselves."""
    return not (key in MODULES_OWN and isinstance(value, dict))


# What is looked into by itself, or never changes.
_KNOWN_ALONE = (ModuleType, CodeType, ContextVar, Logger, np.ufunc, re.Pattern, torch.layout, torch.memory_format)


class _Same:
    """One object; equal to another mark of it, while it lives."""

    def __init__(self, thing: Any) -> None:
        try:
            self.thing = weakref.ref(thing)
        except TypeError:
            raise Untold(type(thing).__name__) from None

    def __eq__(self, other: object) -> bool:
        thing = self.thing()
        return isinstance(other, _Same) and thing is not None and thing is other.thing()

    __hash__ = None  # type: ignore[assignment]


class _Marks:
    """Makes marks of many things, of each but one."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, Any]] = {}  # with the thing, so that ids are theirs

    def of(self, thing: Any) -> Any:
        if isinstance(thing, set | frozenset):
            return type(thing), self._elements(thing)
        if isinstance(thing, VALUES):
            return type(thing), thing
        if isinstance(thing, COPIED):
            return type(thing), getattr(thing, "typecode", ""), bytes(thing)
        if id(thing) in self.seen:
            return self.seen[id(thing)][0]
        self.seen[id(thing)] = len(self.seen), thing
        if len(self.seen) > _MOST_MARKS:
            raise Untold("too much")
        if isinstance(thing, Tensor):
            return _Same(thing), thing.requires_grad, len(thing._backward_hooks or ())
        if isinstance(thing, np.ndarray):
            return _Same(thing), thing.shape, thing.tobytes()
        if inspect.ismethod(thing):
            return self.of(thing.__self__), self.of(thing.__func__)
        if isinstance(thing, property):
            return self.of(thing.fget), self.of(thing.fset)
        if isinstance(thing, staticmethod | classmethod):
            return type(thing), self.of(thing.__func__)
        if isinstance(thing, cached_property):
            return self.of(thing.func)
        if isinstance(thing, (nn.Module, type, *_KNOWN_ALONE)) or inspect.isroutine(thing):
            return _Same(thing)
        if thing is MISSING:
            return "missing"
        parts = split_up(thing)
        if not parts and type(thing) is object:  # tells itself from others
            return _Same(thing)
        if not parts:
            raise Untold(type(thing).__name__)
        return type(thing), [[(self.of(key), self.of(value)) for key, value in part.items()] for part in parts]

    def _elements(self, values: Any) -> frozenset[Any]:
        if not all(isinstance(value, PLAIN) for value in values):
            raise Untold("an object in a set")
        return frozenset((type(value), value) for value in values)
