"""One function of tensors captured as one graph of tensor operations, and compiled."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pvae.capture.exponentials import DECOMPOSITIONS, tell_the_compiler
from pvae.capture.matrix_products import add_biases_later, sum_by_factors, swap_matrix_products

__all__ = ["READS_A_NUMBER", "CaptureError", "Graph"]


@dataclass
class Graph:
    """One flat program of tensor operations.

    Attributes:
        module: Its operations. ``tensors`` are its first inputs.
        tensors: Parameters, buffers and constants that the function used, by reference.
        structure: Of the results: nested tuples, lists and dicts.
        run: The module, or the program that it was compiled to.
        operations: Multiplications and additions in its matrix products and convolutions.
    """

    module: fx.GraphModule
    tensors: list[Tensor]
    structure: pytree.TreeSpec
    run: Callable[..., Any]
    operations: int = 0

    def __post_init__(self) -> None:
        self._kinds = self._tensor_kinds()

    @classmethod
    def capture(cls, function: Callable[..., Any], inputs: Sequence[Tensor], outside: Sequence[Tensor] = ()) -> Graph:
        """Captures a function as it runs on some inputs, with the noise and parameters of now.

        Args:
            function: Takes the inputs; returns tensors, or nested tuples, lists and dicts of them.
            inputs: Tensors in whose place others will come.
            outside: Tensors that the function may use beside its inputs, whose values will change.

        Raises:
            CaptureError: It reads a number out of any of these, or the shape of a result depends on numbers.
        """
        structure: Any = None

        def flat(*tensors: Tensor) -> list[Tensor]:
            nonlocal structure
            results, structure = pytree.tree_flatten(function(*tensors))
            return results

        trace = make_fx(flat, DECOMPOSITIONS, tracing_mode="real", _allow_non_fake_inputs=True)
        # One fake mode holds the shapes of all results; without a context, make_fx makes one for each in half its time.
        shapes = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
        with _ForbidReads(outside), shapes:
            # Each input is a tensor object of its own, so that none is taken for another, or for one that is held.
            captured = trace(*(t.detach() for t in inputs))
        _check_shapes(captured.graph)
        graph, outer = _lift_constants(captured)
        operations = _count_operations(graph)
        swap_matrix_products(graph)
        module = fx.GraphModule({}, graph)
        return cls(module, outer, structure, module, operations)

    def __call__(self, *inputs: Tensor) -> Any:
        """Runs the graph; returns the results of the function, detached."""
        with torch.no_grad():
            return pytree.tree_unflatten(list(self.run(*self.tensors, *inputs)), self.structure)

    @property
    def is_compiled(self) -> bool:
        """Whether it was compiled."""
        return self.run is not self.module

    def with_tensors(self, tensors: list[Tensor]) -> Graph:
        """The same with others in the places of its tensors, which `fits` compares with those it was captured with."""
        other = copy.copy(self)
        other.tensors = tensors
        return other

    def fits(self) -> bool:
        """Whether its tensors still have the shapes, layouts, dtypes and devices that they had."""
        return self._kinds == self._tensor_kinds()

    def _tensor_kinds(self) -> list[Any]:
        return [(t.shape, t.dtype, t.device, t.stride()) for t in self.tensors]

    def compile(self, inputs: Sequence[Tensor]) -> Graph:
        """Compiles it for inputs of these shapes; returns a graph of its own."""
        with _quiet():  # loading the compiler takes more than a second, and most runs do without
            from torch._inductor import config
            from torch._inductor.compile_fx import compile_fx

            tell_the_compiler()
        # Only with symbols for shapes, none of which it needs, does the compiler look for its copy on disk.
        shapes = tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)))
        with torch.no_grad(), _quiet(), shapes, config.patch(_SETTINGS):
            run: Any = compile_fx(_for_the_compiler(self.module), [*self.tensors, *inputs])
            run(*self.tensors, *inputs)
        return Graph(self.module, self.tensors, self.structure, run, self.operations)


_SETTINGS = {
    # Noise comes from the same generators, in the same order, as without compiling; torch 2.11 moves draws, too, to
    # where they are used.
    "fallback_random": True,
    "reorder_for_locality": False,
    # What vectors the CPU has is read from its flags. The compiler would also build and load a program with each kind
    # before the first, which takes 7 to 10 s on a machine; one that cannot be built is told here anyway.
    "cpp.vec_isa_ok": True,
}


class CaptureError(Exception):
    """A function cannot be captured, or its graph does something else."""


def _lift_constants(captured: fx.GraphModule) -> tuple[fx.Graph, list[Tensor]]:
    """Makes inputs of the tensors that a graph refers to; returns the graph, and them in the order of the inputs."""
    graph, tensors, inputs = captured.graph, [], {}
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(captured, node.target)
        if id(tensor) not in inputs:
            with graph.inserting_before(first):
                inputs[id(tensor)] = graph.placeholder(f"tensor_{len(tensors)}")
            inputs[id(tensor)].meta = dict(node.meta)
            tensors.append(tensor)
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.erase_node(node)
    return graph, tensors


class _ForbidReads(TorchFunctionMode):
    """Stops a capture where numbers are read out of tensors that will have others later.

    Capturing itself stops at reads of what was computed from inputs, and would take parameters, buffers and arrays for
    constants.
    """

    def __init__(self, outside: Sequence[Tensor]) -> None:
        super().__init__()
        self.outside = {id(t) for t in outside}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WHOLE_READS or (func in _READS and id(args[0]) in self.outside):
            raise CaptureError(READS_A_NUMBER)
        return func(*args, **(kwargs or {}))


READS_A_NUMBER = "it reads a number out of a tensor, as `.item()`, `float()` and `if tensor:` do"
_READS = {Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__}
_WHOLE_READS = {Tensor.numpy, Tensor.tolist, Tensor.__array__}


def _check_shapes(graph: fx.Graph) -> None:
    """Raises where the shape of a result depends on the data."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is torch.ops.aten.index.Tensor:  # by numbers, or by a mask
            kinds = {index.meta["val"].dtype for index in node.args[1] if isinstance(index, fx.Node)}  # type: ignore[union-attr]
            by_data = bool(kinds & {torch.bool, torch.uint8})
        else:
            by_data = torch.Tag.dynamic_output_shape in node.target.tags
        if by_data:
            raise CaptureError(
                f"the shape of a result depends on the data, in {node.target}; use torch.where or a mask"
            )


def _for_the_compiler(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that reshapes where it views, as tensors are laid out in other ways, and adds and sums otherwise."""
    module = copy.deepcopy(module)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    add_biases_later(module.graph)
    sum_by_factors(module.graph)
    module.recompile()
    return module


def _count_operations(graph: fx.Graph) -> int:
    from torch.utils.flop_counter import flop_registry  # 0.1 s, that most programs can do without

    total = 0
    for node in graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if count is not None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda inner: inner.meta["val"])
            total += count(*args, **kwargs, out_val=node.meta["val"])
    return total


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the compiler says of itself, and of machines without a GPU."""
    loud = logging.getLogger("torch.utils.cpp_extension")
    level = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.setLevel(level)
