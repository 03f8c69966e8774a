"""What programs depend on, and whether it has changed: parameters, modes, and plain values that they read.

A captured program no longer runs Python, so it would not notice a layer that was replaced or a weight ``beta`` that was
set anew. A guard notes all that is within a program's reach, and finds afterwards what is no longer as it was. Values
inside of tensors may change freely: captured programs hold tensors by reference.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform

from pvae.runtime import reachable

__all__ = ["MISSING", "MODULES_OWN", "VALUES", "Guard", "find_opaque", "is_same", "split_up"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
MISSING = object()
# All of these that `==` tells.
VALUES = (*_PLAIN, set, frozenset, range, slice, weakref.ref, torch.device, torch.dtype, np.generic)
_LARGE = 100  # entries of a container, above which it is taken for data
_SMALL = 2**13  # bytes of an array or a tensor, above which it is taken for data
_MOST_COMPARED = 1000  # parts of two values
MODULES_OWN = frozenset(vars(nn.Module()))
_KNOWN = frozenset({"torch", "pyro", "numpy", "pvae", *sys.stdlib_module_names})


class _Watched(NamedTuple):
    """Some entries of a namespace, as they were."""

    owner: str
    namespace: Any  # with `get` and a length
    entries: dict[Any, Any]
    size: int | None  # of the whole namespace, where additions matter


class Guard:
    """Notes all that some programs depend on, and finds changes.

    Args:
        programs: Functions, methods, modules or other callables, and what they close over, call or hold.
    """

    def __init__(self, *programs: Any) -> None:
        self.programs = programs
        self.renew()

    def renew(self) -> None:
        """Notes everything as it is now."""
        self.watched: list[_Watched] = []
        for thing in _collect(self.programs):
            self.watched += _watch(thing)
        found = [v for watched in self.watched for v in watched.entries.values()]
        self.tensors = list({id(t): t for t in found if isinstance(t, Tensor)}.values())
        """Parameters, buffers and other tensors within reach."""
        self._tensors = [_tensor_state(t) for t in self.tensors]
        self._arrays = [(a, a.copy()) for a in found if isinstance(a, np.ndarray) and a.nbytes <= _SMALL]

    def find_change(self) -> str:
        """Finds the first thing that is not as it was, such as ``"Decoder.beta"``; empty if there is none."""
        for owner, namespace, entries, size in self.watched:
            for key, value in entries.items():
                now = namespace.get(key, MISSING)
                if now is not value and not is_same(value, now):
                    return f"{owner}.{key}"
            if size is not None and len(namespace) != size:
                return f"{owner}.{next((key for key in namespace if key not in entries), '')}"
        if self._tensors != [_tensor_state(t) for t in self.tensors]:
            return "requires_grad or a hook of a parameter"
        return "" if all(np.array_equal(a, before) for a, before in self._arrays) else "a NumPy array"


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
        return [own, *(watched.entries for watched in _variables(thing))]
    if inspect.ismethod(thing):
        return [{"of": thing.__self__, "function": thing.__func__}]
    if isinstance(thing, partial):
        return [{"function": thing.func, "args": thing.args, "keywords": thing.keywords, "attributes": vars(thing)}]
    if isinstance(thing, list | tuple | dict) or type(thing).__new__ is object.__new__:  # nothing hidden in C
        return [watched.entries for watched in _watch(thing)]
    return []


def _tensor_state(tensor: Tensor) -> tuple[bool, int]:
    return tensor.requires_grad, len(tensor._backward_hooks or ())


def _is_mutable(thing: Any) -> bool:
    """Whether somebody may set anew what a class, function or module holds: not of PyTorch, Pyro and Python's own."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return (name or "builtins").split(".")[0] not in _KNOWN


def _is_public(name: str) -> bool:
    return name == "__call__" or not name.startswith("__")


def _collect(programs: tuple[Any, ...]) -> list[Any]:
    """Collects all within reach: modules, the contents of containers, classes' functions, defaults."""
    seen: dict[int, Any] = {}
    queue = list(programs)
    while queue:
        new = [thing for thing in reachable(*queue) if id(thing) not in seen]
        seen |= {id(thing): thing for thing in new}
        queue = [inner for thing in new for inner in _children(thing) if id(inner) not in seen]
    return list(seen.values())


def _children(thing: Any) -> list[Any]:
    inside: list[Any] = []
    if isinstance(thing, nn.Module):
        inside += thing.modules()
        inside += [value for name, value in _attributes(thing).items() if name not in MODULES_OWN]
    elif inspect.isfunction(thing):
        if _is_mutable(thing):
            inside += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
            inside += [value for watched in _variables(thing) for value in watched.entries.values()]
    elif isinstance(thing, list | tuple | dict) and len(thing) <= _LARGE:
        inside += thing.values() if isinstance(thing, dict) else thing
    elif not isinstance(thing, type | ModuleType):
        inside += [getattr(thing, name, None) for name in _slots(thing)]
        inside += _attributes(thing).values()
    if not isinstance(thing, type | ModuleType) and not inspect.isroutine(thing):
        inside += [v for cls in type(thing).__mro__ if _is_mutable(cls) for n, v in vars(cls).items() if _is_public(n)]
    inside = [getattr(v, "__func__", v) if isinstance(v, staticmethod | classmethod) else v for v in inside]
    inside = [getattr(v, "fget", v) if isinstance(v, property) else v for v in inside]
    return [v for v in inside if not isinstance(v, (*_PLAIN, Tensor, np.ndarray, type))]


def _watch(thing: Any) -> list[_Watched]:
    """Notes the entries of a thing's namespaces."""
    owner = getattr(thing, "__qualname__", None) or type(thing).__name__
    if isinstance(thing, type | ModuleType) or inspect.ismethod(thing):
        return []
    if inspect.isfunction(thing):
        return _variables(thing) if _is_mutable(thing) else []
    watched = []
    if isinstance(thing, list | tuple | dict):
        space = thing if isinstance(thing, dict) else _Items(thing)
        return [_Watched(owner, space, dict(space.items()), len(thing))] if len(thing) <= _LARGE else []
    if isinstance(thing, nn.Module):
        spaces = [thing._parameters, thing._buffers, thing._modules, thing._forward_hooks, thing._forward_pre_hooks]
        watched += [_Watched(owner, space, dict(space), len(space)) for space in spaces]
    namespace = getattr(thing, "__dict__", None)
    if isinstance(namespace, dict):
        space = _Inputs(thing) if isinstance(thing, AutoGuide | Transform) else namespace
        entries = _attributes(thing)
        watched.append(_Watched(owner, space, entries, len(entries)))
    if names := _slots(thing):
        slots = _Slots(thing)
        watched.append(_Watched(owner, slots, {name: slots.get(name, MISSING) for name in names}, None))
    for cls in filter(_is_mutable, type(thing).__mro__):
        entries = {name: v for name, v in vars(cls).items() if isinstance(v, (*_PLAIN, Tensor)) or callable(v)}
        watched.append(_Watched(owner, vars(cls), {n: v for n, v in entries.items() if _is_public(n)}, None))
    return watched


def _variables(function: Any) -> list[_Watched]:
    """Notes what a function and those inside of it read: closed-over and global variables, attributes of modules."""
    owner, space = function.__qualname__, function.__globals__
    cells = _Cells(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    watched = [
        _Watched(owner, cells, {name: cells.get(name, MISSING) for name in cells}, None),
        _Watched(owner, space, {name: space[name] for name in names if name in space}, None),
    ]
    for name, value in list(watched[1].entries.items()):
        if isinstance(value, ModuleType) and _is_mutable(value):
            entries = {inner: vars(value)[inner] for inner in names if inner in vars(value)}
            watched.append(_Watched(name, vars(value), entries, None))
    defaults = function.__kwdefaults__ or {}
    watched.append(_Watched(owner, defaults, dict(defaults), None))
    return [w for w in watched if w.entries]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Code objects of a function and of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _attributes(thing: Any) -> dict[str, Any]:
    """Attributes of an object, without those that a run makes anew before it reads them."""
    attributes = getattr(thing, "__dict__", {})
    if isinstance(thing, AutoGuide):  # plates, whose random indices differ, made of others of its attributes
        return {name: value for name, value in attributes.items() if name != "plates"}
    if isinstance(thing, Transform):  # what it last returned, used only where it is asked the very same again
        made = ("_cached_", "_inv") if type(thing).inv in (Transform.inv, ComposeTransform.inv) else "_cached_"
        return {name: value for name, value in attributes.items() if not name.startswith(made)}
    return dict(attributes)


def _slots(thing: Any) -> list[str]:
    slots = [vars(cls).get("__slots__", ()) for cls in type(thing).__mro__ if _is_mutable(cls)]
    return [name for names in slots for name in ((names,) if isinstance(names, str) else names)]


class _Inputs:
    """Attributes of an object by name, without those that a run makes anew."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __len__(self) -> int:
        return len(_attributes(self.thing))

    def __iter__(self) -> Iterator[str]:
        return iter(_attributes(self.thing))

    def get(self, name: str, default: Any = None) -> Any:
        return vars(self.thing).get(name, default)


class _Slots:
    """Slots of an object by name."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.thing, name, default)


class _Cells(dict[str, Any]):
    """Closed-over variables of a function by name."""

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name].cell_contents
        except ValueError:  # not assigned yet
            return default


class _Items:
    """A list by index."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.values)))

    def get(self, index: int, default: Any = None) -> Any:
        return self.values[index] if index < len(self.values) else default

    def items(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.values)
