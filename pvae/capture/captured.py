"""Captured programs: a function that runs Pyro once, kept as what it did to tensors, and run many times.

Pyro's handlers cost milliseconds of Python in every call. What they do to tensors is the same each time, as long as the
inputs have the same shapes; so it is recorded once, with its gradients, as one flat graph of tensor operations, and
that graph is rewritten, compiled and run in their place. Parameters are held by reference, and noise is drawn afresh.

A graph is compared with the function, on other inputs and noise, before it is used, and dropped when anything that the
function depends on has changed. A function that cannot be captured is run as it is.
"""

from __future__ import annotations

import logging
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import pvae
from pvae.capture.graph import READS_A_NUMBER, CaptureError, Graph
from pvae.capture.guards import Guard
from pvae.errors import PVAEError, first_line, warn

__all__ = ["Captured", "Made", "worth_compiling"]

logger = logging.getLogger("pvae")

_MOST_GRAPHS = 32
_MOST_CHANGES = 8

# Seconds to save at least. With an empty cache on disk compiling one set of shapes takes a quiet CPU 5 to 20, and runs
# that would save less than 12 were measured to end up to an eighth later than uncompiled.
_COMPILE_SECONDS = {"cpu": 12.0, "cuda": 25.0}

_UNSEEN = "it may draw random numbers by Python or NumPy, or depend on something that cannot be seen"

_no_compiler: list[bool] = []


def worth_compiling(runs: int, operations: float, device: torch.device) -> bool:
    """Whether compiling a function for one set of shapes saves more time than it takes.

    A rule without a clock, so that the same call does the same thing each time. Pyro's handlers cost about 2.5 ms a
    run, and a CPU does twice as much work in a second when compiled.

    Args:
        runs: How often it will be run.
        operations: Multiplications and additions in all of them.
        device: Where.
    """
    saved = runs * 2.5e-3 + (operations / 4e11 if device.type == "cpu" else 0.0)
    return saved > _COMPILE_SECONDS.get(device.type, 25.0)


@dataclass
class Captured:
    """A function of tensors, run as the graphs it was captured as: one for each set of shapes, dtypes and devices.

    Attributes:
        function: Takes tensors and returns tensors, or nested tuples, lists and dicts of them. It draws noise by torch.
        name: What to call it in messages.
        depends_on: Programs, with all that they use: parameters, other tensors and plain values.
        capture_after: So many runs of the function itself, for each set of shapes, come before it is captured.
        compile_after: So many runs of a graph come before it is compiled; ``None`` for never, and ``"auto"`` for as
            many as would have paid for it.
        compile_first: Whether the graph for the first set of shapes, likely the common one, is compiled at once.
        compiling: Makes the block in which a graph is compiled. What it raises, no `Exception`, ends compiling and
            the call, with nothing changed.
        check_each_run: Whether to look for changes before each run; else the caller calls `drop_if_changed` where there
            may be any.
        tolerances: How far results of function, graph and compiled graph may be apart, relative to their norm: for
            single numbers, and for other tensors. Gradients jump where rounding takes a unit across its kink.
        original: What the graph is compared with beside the function, on the same inputs, if the function is given
            them in another form than programs were meant to be.
        captures: How many graphs were made.
        seconds: Spent on capturing and compiling.
        given_up: Whether it could not be captured, and is run as it is.
        made: All graphs that there are, by the names of their variants; those that are there from before are taken
            when it would be their turn to be captured or compiled.
    """

    function: Callable[..., Any]
    name: str
    depends_on: tuple[Any, ...]
    capture_after: int = 0
    compile_after: int | str | None = "auto"
    compile_first: bool = True
    compiling: Callable[[], AbstractContextManager[Any]] = nullcontext
    check_each_run: bool = True
    tolerances: tuple[float, float] = (1e-5, 1e-4)
    original: Callable[..., Any] | None = None
    captures: int = 0
    seconds: float = 0.0
    given_up: bool = False
    made: dict[str, Made] = field(default_factory=dict, repr=False)
    _variants: dict[Any, _Variant] = field(default_factory=dict)
    _first: str = ""  # name of the variant that ran first as a graph
    _changes: int = 0
    _loaded_runs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.guard = Guard(*self.depends_on)

    def __call__(self, *inputs: Tensor) -> Any:
        """Runs the function, or its graph for these inputs; returns its results, detached."""
        variant = self._captured_for(inputs)
        return self.function(*inputs) if variant is None else self._run(variant, inputs)

    def run_graph(self, *inputs: Tensor) -> Any:
        """Runs the graph for these inputs; returns ``None``, and has run nothing, where there is none."""
        variant = self._captured_for(inputs)
        return None if variant is None else self._run(variant, inputs)

    def _captured_for(self, inputs: Sequence[Tensor]) -> _Variant | None:
        """The variant for these inputs, captured now if it is its turn; none where the function is to be run."""
        if self.given_up:
            return None
        if self.check_each_run:
            self.drop_if_changed()
        key = (*[(t.shape, t.dtype, t.device, t.stride()) for t in inputs], *_modes(inputs))
        variant = self._variants.get(key)
        if variant is None:
            if len(self._variants) >= _MOST_GRAPHS:
                self.made.pop(self._variants.pop(next(iter(self._variants))).name, None)
            name = repr(key)
            variant = self._variants[key] = _Variant(name, *self._loaded_runs.get(name, ()))
        if variant.graph is None:
            variant.runs += 1
            early = variant.runs <= self.capture_after and not variant.graph_runs
            if self.given_up or early or not self._capture(variant, inputs):
                return None
        return variant

    def _run(self, variant: _Variant, inputs: Sequence[Tensor]) -> Any:
        graph: Any = variant.graph
        self._first = self._first or variant.name
        if not variant.compile_attempted and self._should_compile(variant, graph, inputs):
            graph = variant.graph = self._compile(variant.name, graph, inputs)
            variant.compile_attempted = True
        variant.graph_runs += 1
        return graph(*inputs)

    def _should_compile(self, variant: _Variant, graph: Graph, inputs: Sequence[Tensor]) -> bool:
        after = self.compile_after
        if after is None or (self.compile_first and self._first == variant.name):
            return after is not None
        if isinstance(after, int):
            return variant.graph_runs >= after
        tensors = [*inputs, *graph.tensors]
        device = tensors[0].device if tensors else torch.device("cpu")
        return worth_compiling(variant.graph_runs, variant.graph_runs * graph.operations, device)

    @property
    def is_compiled(self) -> bool:
        """Whether any graph was compiled."""
        return any(variant.graph is not None and variant.graph.is_compiled for variant in self._variants.values())

    def state_dict(self) -> dict[str, Any]:
        """What decides when shapes are captured and compiled, as plain values; checkpoints hold it."""
        runs = {variant.name: [variant.runs, variant.graph_runs] for variant in self._variants.values()}
        return {
            "first": self._first,
            "runs": self._loaded_runs | runs,
            "changes": self._changes,
            "given_up": self.given_up,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state: the same runs are compiled, as compiled and uncompiled graphs differ in rounding."""
        self._first, self._loaded_runs = state["first"], dict(state["runs"])
        self._changes, self.given_up = state["changes"], state["given_up"]

    def drop_if_changed(self) -> bool:
        """Drops all graphs if anything that the function depends on has changed, and returns whether it has."""
        change = self.guard.find_change()
        fits = all(variant.graph is None or variant.graph.fits() for variant in self._variants.values())
        if change or not fits:
            self._reset(change)
        return bool(change) or not fits

    def _reset(self, change: str) -> None:
        self._variants.clear()
        self.made.clear()
        self._loaded_runs.clear()
        self.guard.renew()
        self._changes += 1
        if change and self._changes == _MOST_CHANGES:
            self._give_up(
                f"{change} changed between calls, {_MOST_CHANGES} times so far. A tensor in its place, changed in "
                "place or passed as an argument, would need no new capture"
            )

    def _capture(self, variant: _Variant, inputs: Sequence[Tensor]) -> bool:
        """Captures a graph and compares it with the function; returns whether that went well."""
        if variant.name in self.made:
            variant.graph = self.made[variant.name].graph
            return True
        start = time.perf_counter()
        before, drawn = Guard(*self.guard.programs), (random.getstate(), np.random.get_state())  # noqa: NPY002
        try:
            with _rollback(inputs, self.guard.tensors):
                self.function(*inputs)  # makes whatever is made by a first run
                self.guard.renew()
                others, stored = _other_rng_states(), dict(pyro.get_param_store()._params)
                graph = Graph.capture(self.function, inputs, self.guard.tensors)
                if change := self.guard.find_change():
                    raise CaptureError(f"it changes {change} as it runs")
                if others != _other_rng_states():
                    others = _other_rng_states()  # a module that capturing imported may have drawn some, once
                    graph = Graph.capture(self.function, inputs, self.guard.tensors)
                if others != _other_rng_states():
                    raise CaptureError("it draws random numbers by Python or NumPy")
                if replaced := [n for n, p in pyro.get_param_store()._params.items() if p is not stored.get(n)]:
                    raise CaptureError(f"it replaces {replaced} in the param store as it runs")
                self._compare(graph, self.function, inputs)
                if self.original is not None:
                    self._compare(graph, self.original, inputs, "a float among its arguments is not what a tensor is")
        except (PVAEError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            before.put_back()
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])  # noqa: NPY002
            self._give_up(_cause(error))
            return False
        variant.graph = graph
        self.made[variant.name] = Made(graph)
        self.captures += 1
        self.seconds += time.perf_counter() - start
        logger.info("captured %s: %d operations", self.name, len(graph.module.graph.nodes))
        return True

    def _compile(self, name: str, graph: Graph, inputs: Sequence[Tensor]) -> Graph:
        """Compiles a graph and compares the two; returns the graph as it was where that fails."""
        if _no_compiler:
            return graph
        made = self.made.setdefault(name, Made(graph))
        if made.compiled is not None:
            return made.compiled
        start = time.perf_counter()
        try:
            with _rollback(inputs, self.guard.tensors):
                with self.compiling():
                    compiled = graph.compile(inputs)
                self._compare(compiled, graph, inputs)
        except Exception as error:
            warn(f"{self.name} runs captured but uncompiled: {_cause(error)}.")
            compiled = graph
            if "Invalid" in type(error).__name__ or "No working C++ compiler" in str(error):
                _no_compiler.append(True)  # one warning in a process is enough
        seconds = time.perf_counter() - start
        self.seconds += seconds
        logger.info("compiled %s in %.1f s", self.name, seconds)
        made.compiled = compiled
        return compiled

    def _compare(
        self, graph: Callable[..., Any], reference: Callable[..., Any], inputs: Sequence[Tensor], cause: str = _UNSEEN
    ) -> None:
        """Runs both on rows drawn from the inputs, with equal noise that no capture has seen."""
        results = []
        for run in (reference, graph):
            with _rollback(inputs, self.guard.tensors) as devices:
                _seed(20_240_229, devices)
                results.append(pytree.tree_leaves(run(*_resample_rows(inputs))))
        norms = [torch.linalg.vector_norm(t.detach().double().nan_to_num()).item() for t in results[0]]
        for ours, theirs, norm in zip(*results[::-1], norms, strict=True):
            same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities too
            difference = (ours.detach().double() - theirs.detach().double()).masked_fill(same, 0.0)
            tolerance = self.tolerances[ours.numel() > 1]
            # A result may be nothing but the rounding of others, as a gradient whose terms cancel.
            if not torch.linalg.vector_norm(difference).item() <= tolerance * norm + 1e-6 * max(norms):
                raise CaptureError(f"its results are not those of its graph: {cause}")

    def _give_up(self, cause: str) -> None:
        self._variants.clear()
        self.made.clear()
        self.given_up = True
        warn(f"{self.name} runs as plain Pyro, uncaptured: {cause}.")


@dataclass
class Made:
    """What was made for inputs of one kind.

    Attributes:
        graph: The graph as it was captured.
        compiled: What came of compiling it, if that was tried: the graph itself where it failed.
    """

    graph: Graph
    compiled: Graph | None = None


@dataclass
class _Variant:
    """The function for inputs of one kind: their shapes, dtypes, devices and strides, and the caller's modes."""

    name: str
    runs: int = 0  # of the function itself
    graph_runs: int = 0
    graph: Graph | None = None
    compile_attempted: bool = False


def _modes(inputs: Sequence[Tensor]) -> tuple[Any, ...]:
    """Settings of the caller that change what operations do: autocast's dtype, and the default one."""
    kind = inputs[0].device.type if inputs else "cpu"
    lowered = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return lowered, torch.get_default_dtype()


def _resample_rows(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Draws rows of the inputs, some more than once and some never; the same for all tensors of the same length."""
    generator = torch.Generator().manual_seed(20_240_229)
    rows: dict[int, Tensor] = {}
    results = []
    for tensor in inputs:
        if tensor.dim() and len(tensor):
            if len(tensor) not in rows:
                rows[len(tensor)] = torch.randint(len(tensor), (len(tensor),), generator=generator)
            with suppress(RuntimeError):  # of a tensor whose entries share memory
                values = tensor[rows[len(tensor)].to(tensor.device)]
                # In the same layout, which a graph relies on.
                tensor = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                ).copy_(values)
        results.append(tensor)
    return tuple(results)


def _other_rng_states() -> tuple[Any, ...]:
    """States of the random numbers of Python and NumPy, which no graph draws."""
    _, keys, *places = np.random.get_state()  # noqa: NPY002 (of those who use it)
    return random.getstate(), keys.tobytes(), *places  # type: ignore[union-attr]


def _seed(seed: int, devices: Sequence[torch.device]) -> None:
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def _rollback(inputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[list[torch.device]]:
    """Puts random numbers, tensors changed in place and Pyro's param store back as they were; yields the GPUs."""
    before = [(t, t.detach().clone()) for t in tensors]
    devices = list({t.device for t in (*inputs, *tensors) if t.is_cuda})
    store = pyro.get_param_store()
    stored = dict(store._params)
    with torch.random.fork_rng(devices=devices):
        try:
            yield devices
        finally:
            # Entries that a program sets anew, as running averages; those that it made stay.
            store._params.update({name: p for name, p in stored.items() if store._params.get(name) is not p})
            with torch.no_grad():
                for tensor, values in before:
                    if not torch.equal(tensor, values):  # not all kernels count up a tensor's version
                        tensor.copy_(values)


_PACKAGE_PATHS = [os.path.join(path, "") for module in (pvae, torch, pyro) for path in module.__path__]


def _cause(error: Exception) -> str:
    """Words for what went wrong and, where one can tell, at which line of the user's."""
    cause = first_line(error).strip().rstrip(".")
    if "_local_scalar_dense" in str(error):
        cause = READS_A_NUMBER
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*_PACKAGE_PATHS, "<"))]
    return f"{cause} ({frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else cause
