"""What programs can see, and whether it has changed: parameters, modes, and plain values that they read.

A captured program no longer runs Python, so it would not notice a layer that was replaced or a weight ``beta`` that was
set anew. A guard notes all that is within a program's reach, and says afterwards what is no longer as it was. Values
inside of tensors may change freely: captured programs hold tensors by reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from pvae.isolation import reached

__all__ = ["Guard"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MISSING = object()


class _Watched(NamedTuple):
    """Some entries of a namespace, as they were."""

    owner: str
    namespace: Any  # with `get` and a length
    entries: dict[Any, Any]
    size: int | None  # of the whole namespace, where additions matter


class Guard:
    """Looks after all that some programs can see.

    Args:
        programs: Functions, methods, modules or other callables, and what they close over, call or hold.
    """

    def __init__(self, *programs: Any) -> None:
        self.programs = programs
        self.renew()

    def renew(self) -> None:
        """Takes note of everything as it is now."""
        self._watched: list[_Watched] = []
        for thing in _parts(self.programs):
            self._watched += _watch(thing)
        found = [v for watched in self._watched for v in watched.entries.values() if isinstance(v, Tensor)]
        self.tensors = list({id(t): t for t in found}.values())
        """Parameters, buffers and other tensors within reach."""
        self._trained = [t.requires_grad for t in self.tensors]

    def changed(self) -> str:
        """The first thing found that is not as it was, such as ``"Decoder.beta"``; empty if there is none."""
        for owner, namespace, entries, size in self._watched:
            for key, value in entries.items():
                now = namespace.get(key, _MISSING)
                if now is not value and not (isinstance(value, _PLAIN) and type(now) is type(value) and now == value):
                    return f"{owner}.{key}"
            if size is not None and len(namespace) != size:
                return f"{owner}.{next((key for key in namespace if key not in entries), '')}"
        return "" if self._trained == [t.requires_grad for t in self.tensors] else "requires_grad of a parameter"


def _parts(programs: tuple[Any, ...]) -> list[Any]:
    """All that is reached, with modules taken apart."""
    seen: dict[int, Any] = {}
    queue = list(programs)
    while queue:
        for thing in reached(*queue):
            seen.setdefault(id(thing), thing)
        queue = []
        for module in [m for root in list(seen.values()) if isinstance(root, nn.Module) for m in root.modules()]:
            new = [module] if id(module) not in seen else []
            inside = [v for k, v in vars(module).items() if not k.startswith("_") and not isinstance(v, nn.Module)]
            if type(module).__module__.split(".")[0] not in ("torch", "pyro"):
                inside.append(type(module).forward)
            queue += [v for v in [*new, *inside] if id(v) not in seen and not isinstance(v, (*_PLAIN, Tensor))]
            seen.setdefault(id(module), module)
    return list(seen.values())


def _watch(thing: Any) -> list[_Watched]:
    owner = getattr(thing, "__qualname__", None) or type(thing).__name__
    if isinstance(thing, nn.Module):
        held = [thing._parameters, thing._buffers, thing._modules]
        return [_Watched(owner, space, dict(space), len(space)) for space in held] + _attributes(owner, thing)
    if not inspect.isfunction(thing):
        return _attributes(owner, thing)
    code, values = thing.__code__, thing.__globals__
    if thing.__module__.split(".")[0] in ("torch", "pyro"):
        return []
    cells = _Cells(zip(code.co_freevars, thing.__closure__ or (), strict=True))
    read = {name: values[name] for name in code.co_names if name in values}
    closed = {name: cells.get(name, _MISSING) for name in code.co_freevars}
    watched = [_Watched(owner, cells, closed, None), _Watched(owner, values, read, None)]
    return [w for w in watched if w.entries] + _containers(owner, [*closed.values(), *read.values()])


def _attributes(owner: str, thing: Any) -> list[_Watched]:
    """An object's own values and tensors; what else it holds is reached, and watched, by itself."""
    namespace = getattr(thing, "__dict__", None)
    if not isinstance(namespace, dict) or inspect.ismodule(thing):
        return []
    public = {k: v for k, v in namespace.items() if not isinstance(v, dict | set) and v is not None}
    return [_Watched(owner, namespace, public, None), *_containers(owner, namespace.values())] if public else []


def _containers(owner: str, values: Iterable[Any]) -> list[_Watched]:
    """Dicts and lists of plain values or tensors, such as a table of settings."""
    watched = []
    for value in values:
        if isinstance(value, list | tuple | dict) and 0 < len(value) <= 100:
            space: Any = value if isinstance(value, dict) else _Items(value)
            entries = {k: v for k, v in space.items() if isinstance(v, (*_PLAIN, Tensor))}
            if entries:
                watched.append(_Watched(owner, space, entries, len(value)))
    return watched


class _Cells(dict[str, Any]):
    """A function's closed-over variables by name."""

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
