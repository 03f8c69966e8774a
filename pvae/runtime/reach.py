"""What programs reach: all that they are made of, close over, call, name or hold."""

from __future__ import annotations

import inspect
import os
import sys
from collections import deque
from functools import cache, cached_property, partial
from logging import Logger
from typing import Any

from torch import nn

from pvae.runtime.namespaces import PLAIN, is_mutable, names_in, spaces_of

__all__ = ["MODULES_OWN", "is_leaf", "reachable"]

MODULES_OWN = frozenset(vars(nn.Module()))
_PLACES = [f"{os.sep}{place}{os.sep}" for place in ("site-packages", "dist-packages")]
_WRAPPERS = (property, staticmethod, classmethod, cached_property)
_ALWAYS = ("__", "forward")  # how names begin of what runs without being named


def reachable(*programs: Any, modules_alone: bool = False) -> list[Any]:
    """All that programs reach, nearest first, but for numbers and strings.

    Tensors, arrays and what else PyTorch and NumPy have are not looked into. Functions and classes of an installed
    library that is not the programs' own are, where somebody's code or data have them, and not what these call in turn.

    Args:
        programs: Functions, methods, modules or other callables.
        modules_alone: Whether to look for modules: these are not looked into then, and of a class only what code in
            reach names.
    """
    own = {_package(part) for program in programs if callable(program) for part in (program, *_parts(program))}
    seen: dict[int, Any] = {}
    queue: deque[tuple[Any, bool]] = deque((program, False) for program in programs)
    names: dict[str, None] = {}
    waiting: list[tuple[str, Any, bool]] = []
    while queue:
        thing, by_library = queue.popleft()
        is_library = _is_library(thing) and _package(thing) not in own
        by_next = is_library or (by_library and isinstance(thing, _WRAPPERS))
        if id(thing) not in seen and not isinstance(thing, PLAIN) and not (is_library and by_library):
            seen[id(thing)] = thing
            names |= names_in(thing) if inspect.isfunction(thing) else {}
            queue += [(part, by_next) for part in _parts(thing)]
            is_closed = is_leaf(thing) or (modules_alone and isinstance(thing, nn.Module))
            inside = [] if is_closed else [(name, value, by_next) for name, value in _inside(thing)]
            if modules_alone and isinstance(thing, type):
                waiting += inside
            else:
                queue += [(value, by) for _, value, by in inside]
        if not queue:
            queue += [(value, by) for name, value, by in waiting if name in names or name.startswith(_ALWAYS)]
            waiting = [entry for entry in waiting if not (entry[0] in names or entry[0].startswith(_ALWAYS))]
    return list(seen.values())


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).split(".")[0]


def _is_library(thing: Any) -> bool:
    """Whether something is code of an installed library."""
    return (isinstance(thing, type) or inspect.isfunction(thing)) and _is_installed(str(thing.__module__))


@cache
def _is_installed(module: str) -> bool:
    names = (module, module.split(".")[0])
    files = [getattr(sys.modules.get(name), "__file__", None) or "" for name in names]
    return any(place in file for place in _PLACES for file in files)


def is_leaf(thing: Any) -> bool:
    """Whether something is not looked into."""
    theirs = str(type(thing).__module__).split(".")[0] in ("numpy", "torch") and not isinstance(thing, nn.Module)
    return theirs or isinstance(thing, Logger)


def _inside(thing: Any) -> list[tuple[Any, Any]]:
    """The entries of its namespaces, but for a module's own dicts, whose entries are."""
    entries = [entry for space in spaces_of(thing) for entry in space.entries.items()]
    return [(name, value) for name, value in entries if not (name in MODULES_OWN and isinstance(value, dict))]


def _parts(thing: Any) -> list[Any]:
    """What a thing is made of that has no name in it, or is never set anew."""
    if isinstance(thing, type):
        return list(filter(is_mutable, (*thing.__bases__, type(thing))))
    if inspect.ismethod(thing):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, staticmethod | classmethod):
        return [thing.__func__]
    if isinstance(thing, property):
        return [thing.fget]
    if isinstance(thing, cached_property):
        return [thing.func]
    parts = [cls for cls in type(thing).__mro__ if is_mutable(cls)]
    if isinstance(thing, partial):  # Pyro's handlers wrap programs in partials
        parts += [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, set | frozenset):
        parts += [value for value in thing if not isinstance(value, PLAIN)]
    return parts
