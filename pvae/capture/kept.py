"""Graphs kept in the process between calls, for programs that are called with again.

What is kept belongs to programs and goes when any of them does. It holds compiled code and constants; programs and
their parameters are known by weak references, and a graph is taken up again only where they are as they were.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.capture.captured import Captured, Made
from pvae.capture.footprints import Untold, footprint
from pvae.capture.matrix_products import onednn_choice

__all__ = ["is_compiled", "keep", "take_up"]

_MOST_KEPT = 32


@dataclass
class _Kept:
    """What a captured function leaves behind.

    Attributes:
        key: The function's name, and what else graphs depend on that is plain.
        owners: What programs belong to.
        marks: Of the programs.
        given_up: Whether it could not be captured.
        graphs: By the names of their variants, each with what came of compiling it, and without tensors.
        tensors: Those, for each graph: by reference if programs or Pyro's store have them too.
        stored: Those of Pyro's store, by name, with their constraints.
    """

    key: tuple[Hashable, ...]
    owners: tuple[weakref.ref[Any], ...]
    marks: Any
    given_up: bool = False
    graphs: dict[str, Made] = field(default_factory=dict)
    tensors: dict[str, list[Callable[[], Tensor | None]]] = field(default_factory=dict)
    stored: dict[str, tuple[weakref.ref[Tensor], Any]] = field(default_factory=dict)

    def is_of(self, key: Hashable, owners: Sequence[Any]) -> bool:
        alive = [owner() for owner in self.owners]
        return self.key == key and len(alive) == len(owners) and all(a is b for a, b in zip(alive, owners, strict=True))


_all: dict[int, _Kept] = {}  # in the order in which they were put here
_numbers = itertools.count()


def keep(captured: Captured, key: Hashable, programs: Sequence[Any]) -> None:
    """Keeps what was captured for calls to come with the same programs, if these can be told again.

    Args:
        captured: Not to be used any more.
        key: Names the function.
        programs: What it belongs to: functions, methods or other callables.
    """
    if not captured.made and not captured.given_up:
        return
    owners = _owners(programs)
    try:
        kept = _Kept((key, *_surroundings()), tuple(map(weakref.ref, owners)), footprint(captured.guard))
    except (TypeError, Untold):
        return
    kept.given_up = captured.given_up
    _put_away(kept, captured)
    for number in [n for n, one in _all.items() if one.is_of(kept.key, owners) and one.marks == kept.marks]:
        _all.pop(number, None)
    number = next(_numbers)
    kept.owners = tuple(weakref.ref(owner, lambda _: _all.pop(number, None)) for owner in owners)
    _all[number] = kept
    while len(_all) > _MOST_KEPT:
        _all.pop(next(iter(_all)), None)


def take_up(captured: Captured, key: Hashable, programs: Sequence[Any]) -> None:
    """Gives a function that is about to be captured what was kept of it, if all is as it was then."""
    owners, key = _owners(programs), (key, *_surroundings())
    numbers = [number for number, kept in _all.items() if kept.is_of(key, owners)]
    if not numbers:
        return
    try:
        marks = footprint(captured.guard)
    except Untold:
        return
    for number in numbers:
        kept = _all.get(number)
        if kept is None or kept.marks != marks:
            continue
        _all.pop(number, None)
        if all(_is_stored(name, *was) for name, was in kept.stored.items()):
            captured.given_up = kept.given_up
            captured.made = _with_tensors(kept)
        return


def is_compiled(name: tuple[Hashable, ...], programs: Sequence[Any], rows: int) -> bool:
    """Whether a function has a compiled graph from before, though perhaps of programs that have changed since.

    Args:
        name: How its key begins.
        programs: What it belongs to.
        rows: Length of its first input.
    """
    owners, around = _owners(programs), _surroundings()
    return any(
        made.compiled is not None
        and made.compiled.is_compiled
        and _first_length(made, len(kept.tensors[variant])) == rows
        for kept in list(_all.values())
        if _begins(kept.key, name) and kept.is_of((kept.key[0], *around), owners)
        for variant, made in kept.graphs.items()
    )


def _begins(key: Any, name: tuple[Hashable, ...]) -> bool:
    return isinstance(key[0], tuple) and key[0][: len(name)] == name


def _first_length(made: Made, num_tensors: int) -> int:
    """Length of a graph's first input, which stands behind its tensors."""
    inputs = [node for node in made.graph.module.graph.nodes if node.op == "placeholder"][num_tensors:]
    return inputs[0].meta["val"].shape[0] if inputs else 0


def _owners(programs: Sequence[Any]) -> list[Any]:
    """What programs live and die with: a method's object, and else they themselves."""
    return [getattr(program, "__self__", program) for program in programs]


def _surroundings() -> tuple[Any, ...]:
    """What graphs, and what compilers make of them, depend on beside programs and the kinds of inputs."""
    return (
        onednn_choice(),
        torch.get_num_threads(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _put_away(kept: _Kept, captured: Captured) -> None:
    """Lets go of all tensors that others have, too."""
    store = pyro.get_param_store()
    names = {id(p): name for name, p in store._params.items()}
    outside = {id(t) for t in captured.guard.tensors}
    for variant, made in captured.made.items():
        kept.tensors[variant] = []
        for tensor in made.graph.tensors:
            ours = id(tensor) not in outside and id(tensor) not in names and not tensor.requires_grad
            kept.tensors[variant].append((lambda t: lambda: t)(tensor) if ours else weakref.ref(tensor))
            if id(tensor) in names:
                name = names[id(tensor)]
                kept.stored[name] = weakref.ref(tensor), store._constraints.get(name)
        compiled = None if made.compiled is None else made.compiled.with_tensors([])
        kept.graphs[variant] = Made(made.graph.with_tensors([]), compiled)


def _with_tensors(kept: _Kept) -> dict[str, Made]:
    """The graphs whose tensors are all there, and of the same kinds."""
    results = {}
    for variant, made in kept.graphs.items():
        tensors = [tensor for get in kept.tensors[variant] if (tensor := get()) is not None]
        if len(tensors) == len(kept.tensors[variant]):
            graph = made.graph.with_tensors(tensors)
            if graph.fits():
                results[variant] = Made(graph, made.compiled and made.compiled.with_tensors(tensors))
    return results


def _is_stored(name: str, tensor: weakref.ref[Tensor], constraint: Any) -> bool:
    store = pyro.get_param_store()
    return name in store._params and store._params[name] is tensor() and store._constraints.get(name) == constraint
