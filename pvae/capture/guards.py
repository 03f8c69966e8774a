"""What programs depend on, and whether it has changed: parameters, modes, and plain values that they read.

A captured program no longer runs Python, so it would not notice a layer that was replaced or a weight ``beta`` that was
set anew. A guard notes all that is within a program's reach, and finds afterwards what is no longer as it was. Values
inside of tensors may change freely: captured programs hold tensors by reference.
"""

from __future__ import annotations

import array
import inspect
import random
import weakref
from collections import deque
from contextlib import suppress
from enum import Enum
from functools import partial
from operator import is_
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pvae.runtime import MISSING, PLAIN, Look, Space, added_to, is_leaf, put_back, reachable, spaces_of, variables_of

__all__ = ["COPIED", "VALUES", "Guard", "find_opaque", "is_same", "split_up"]

# All of these that `==` tells.
VALUES = (*PLAIN, set, frozenset, range, slice, weakref.ref, torch.device, torch.dtype, np.generic)
COPIED = (set, bytearray, array.array)  # what is changed in place, and told by a copy
_OPEN = (list, tuple, dict, deque, MappingProxyType, SimpleNamespace, Enum)
_SMALL = 2**13  # bytes of an array or a tensor, above which it is taken for data
_MOST_COMPARED = 1000  # parts of two values


class Guard:
    """Notes all that some programs depend on, and finds changes.

    Args:
        programs: Functions, methods, modules or other callables, and what they close over, call, name or hold.
    """

    def __init__(self, *programs: Any) -> None:
        self.programs = programs
        self.renew()

    def renew(self) -> None:
        """Notes everything as it is now."""
        found = reachable(*self.programs)
        self._noted = [(thing, space) for thing in found if not is_leaf(thing) for space in spaces_of(thing)]
        spaces = [space for _, space in self._noted]
        self._looks = [Look.at(space) for space in spaces if space.entries]
        self._sized = [(space, space.namespace, space.size) for space in spaces if space.size is not None]
        self.tensors = [thing for thing in found if isinstance(thing, Tensor)]
        """Parameters, buffers and other tensors within reach."""
        self._tensors = [_tensor_state(t) for t in self.tensors]
        self._copies = [(thing, _copy(thing)) for thing in found if _is_copied(thing)]
        self._generators = [(thing, _generator_state(thing)) for thing in found if isinstance(thing, _GENERATORS)]

    @property
    def watched(self) -> list[Space]:
        """The namespaces within reach, as they were."""
        return [space for _, space in self._noted]

    def find_change(self) -> str:
        """Finds the first thing that is not as it was, such as ``"Decoder.beta"``; empty if there is none."""
        for space, target, get, values in self._looks:
            try:
                if all(map(is_, get(target), values)):
                    continue
            except (LookupError, AttributeError, ValueError):  # an entry is gone
                pass
            if change := _first_change(space):
                return change
        for space, namespace, size in self._sized:
            if len(namespace) != size:
                return _first_change(space)
        if self._tensors != [_tensor_state(t) for t in self.tensors]:
            return "requires_grad or a hook of a parameter"
        return next((_name(thing) for thing, before in self._copies if not _equals(thing, before)), "")

    def put_back(self) -> None:
        """Makes of everything what it was: entries that were set anew, sets, small arrays, and generators.

        Of what was added since only numbers and strings go: others may be what a program makes as it first runs.
        """
        for thing, space in self._noted:
            if _first_change(space):
                with suppress(AttributeError, TypeError):  # of what is read only
                    put_back(thing, space)
        for thing, before in self._copies:
            if not _equals(thing, before):
                _set_contents(thing, before)
        for generator, state in self._generators:
            _set_generator_state(generator, state)


def _first_change(space: Space) -> str:
    for key, value in space.entries.items():
        now = space.namespace.get(key, MISSING)
        if now is not value and not is_same(value, now):
            return f"{space.owner}.{key}"
    if space.size is not None and len(space.namespace) != space.size:
        return f"{space.owner}.{next(iter(added_to(space)), '')}"
    return ""


def is_same(before: Any, now: Any) -> bool:
    """Whether a value in another's place is of the same kind and made of the same parts.

    Parameters are equal to none but themselves, as gradients go to them; so are data, which are large, and tensors that
    are changed in place, as a captured program would go on changing the one that it holds.
    """
    return _is_same(before, now, {})


def _is_same(before: Any, now: Any, compared: dict[tuple[int, int], Any]) -> bool:
    if now is before or (id(before), id(now)) in compared:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(before, VALUES):
        return before == now
    if len(compared) >= _MOST_COMPARED:
        return False
    compared[id(before), id(now)] = before, now  # which ends cycles, and keeps both alive, so that ids are theirs
    if isinstance(before, Tensor):
        constant = not any(t.requires_grad or t.is_inference() or t._version for t in (before, now))
        alike = (now.shape, now.dtype, now.device) == (before.shape, before.dtype, before.device)
        return constant and alike and before.nbytes <= _SMALL and torch.equal(before, now)
    if isinstance(before, np.ndarray):
        return before.nbytes <= _SMALL and before.dtype == now.dtype and np.array_equal(before, now)
    ours, theirs = split_up(before), split_up(now)
    return len(ours) == len(theirs) > 0 and all(
        list(a) == list(b) and all(_is_same(a[key], b[key], compared) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def find_opaque(thing: Any) -> str:
    """Finds the class of what a value is, or holds, that might change without notice; empty if there is none."""
    seen: dict[int, Any] = {}
    queue = [thing]
    while queue:
        part = queue.pop()
        kind = type(part).__name__
        known = isinstance(part, (*VALUES, Tensor, nn.Module, type, ModuleType)) or inspect.isroutine(part)
        if known or id(part) in seen or (isinstance(part, np.ndarray) and part.nbytes <= _SMALL):
            continue
        seen[id(part)] = part
        parts = split_up(part)
        if not parts or len(seen) > _MOST_COMPARED:
            return kind
        queue += [value for entries in parts for value in entries.values() if value is not MISSING]
    return ""


def split_up(thing: Any) -> list[dict[Any, Any]]:
    """Dicts of all that a value is made of, by name; none if that cannot be known."""
    if inspect.isfunction(thing):
        own = {"code": thing.__code__, "defaults": thing.__defaults__, "attributes": vars(thing)}
        return [own, *(space.entries for space in variables_of(thing))]
    if inspect.ismethod(thing):
        return [{"of": thing.__self__, "function": thing.__func__}]
    if isinstance(thing, partial):
        return [{"function": thing.func, "args": thing.args, "keywords": thing.keywords, "attributes": vars(thing)}]
    if isinstance(thing, _OPEN) or type(thing).__new__ is object.__new__:  # nothing hidden in C
        return [space.entries for space in spaces_of(thing)]
    return []


def _tensor_state(tensor: Tensor) -> tuple[bool, int]:
    return tensor.requires_grad, len(tensor._backward_hooks or ())


def _is_copied(thing: Any) -> bool:
    """Whether something is changed in place, and small enough to be compared with a copy."""
    if isinstance(thing, np.ndarray):
        return thing.nbytes <= _SMALL
    return isinstance(thing, COPIED) and len(thing) <= (_MOST_COMPARED if isinstance(thing, set) else _SMALL)


def _copy(thing: Any) -> Any:
    return thing.copy() if isinstance(thing, set | np.ndarray) else thing[:]


def _equals(thing: Any, before: Any) -> bool:
    return np.array_equal(thing, before) if isinstance(thing, np.ndarray) else thing == before


def _name(thing: Any) -> str:
    return "a NumPy array" if isinstance(thing, np.ndarray) else f"a {type(thing).__name__}"


def _set_contents(thing: Any, before: Any) -> None:
    if isinstance(thing, set):
        thing.clear()
        thing.update(before)
    elif not isinstance(thing, np.ndarray):
        thing[:] = before
    elif thing.shape == before.shape and thing.flags.writeable:
        thing[...] = before


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_generator_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
