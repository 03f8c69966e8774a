"""Matrix products of tensor programs on the CPU, to the same results within rounding.

For single precision oneDNN may be much faster than the default library. That may take more than twice as long for a
layer's output for a few rows as for its transpose. And it copies a bias into the result before it multiplies, which for
large ones the compiler's next loop adds on its way. A product that is looked at by its sum need not be read for it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from pvae.errors import ArgumentError

__all__ = [
    "add_biases_later",
    "is_worth_onednn",
    "multiply_by_onednn",
    "onednn_choice",
    "sum_by_factors",
    "swap_matrix_products",
    "use_onednn",
]

logger = logging.getLogger("pvae")

aten: Any = torch.ops.aten

_LARGE = 2**20  # numbers, which no cache next to a core holds


_library = torch.library.Library("pvae", "FRAGMENT")
_library.define("addmm(Tensor? bias, Tensor a, Tensor b) -> Tensor")


def _onednn_addmm(bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return multiply_by_onednn(bias, a, b.t())


_library.impl("addmm", _onednn_addmm, "CPU")
_library.impl("addmm", lambda bias, a, b: a.new_empty(a.shape[0], b.shape[1]), "Meta")

_choice: list[bool | None] = [None]


def use_onednn(choice: bool | None) -> None:
    """Says whether captured programs multiply float32 matrices on the CPU by oneDNN.

    Args:
        choice: Yes, no, or ``None`` for what a short measurement on this machine finds faster; it is taken once in a
            process. Programs that were captured before stay as they are.

    Raises:
        ArgumentError: Yes, and this build of PyTorch has no oneDNN.
    """
    if choice and not _has_onednn():
        raise ArgumentError("choice=True: this build of PyTorch has no oneDNN. Use None or False.")
    _choice[0] = choice


def onednn_choice() -> bool | None:
    """What `use_onednn` was last told."""
    return _choice[0]


def swap_matrix_products(graph: fx.Graph) -> int:
    """Has a graph's float32 matrix products on the CPU done in the way that is faster; returns how many are swapped.

    By oneDNN, where that is the faster on this machine; else by the default library, and those of a few rows, such as
    ``x @ w.T`` of a small batch, as ``(w @ x.T).T`` where a short measurement finds that faster for their shape.
    """
    products = [node for node in graph.nodes if node.op == "call_function" and _is_product(node)]
    by_onednn = [node for node in products if is_worth_onednn(_multiplications(node))]
    swapped = by_onednn or [node for node in products if _is_to_turn(node)]
    for node in swapped:
        bias, a, b = node.args if node.target is aten.addmm.default else (None, *node.args)
        with graph.inserting_before(node):
            result = _by_onednn(graph, bias, a, b) if by_onednn else _turned(graph, bias, a, b)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return len(swapped)


def _by_onednn(graph: fx.Graph, bias: fx.Node | None, a: fx.Node, b: fx.Node) -> fx.Node:
    if not a.meta["val"].is_contiguous():
        # oneDNN would copy it anyway; here the compiler can write it so in the first place.
        meta = dict(a.meta)  # but for the strides
        a = graph.call_function(aten.clone.default, (a,), {"memory_format": torch.contiguous_format})
        a.meta = meta
    return graph.call_function(torch.ops.pvae.addmm.default, (bias, a, b))


def _turned(graph: fx.Graph, bias: fx.Node | None, a: fx.Node, b: fx.Node) -> fx.Node:
    factors = (graph.call_function(aten.t.default, (factor,)) for factor in (b, a))
    product = graph.call_function(aten.t.default, (graph.call_function(aten.mm.default, tuple(factors)),))
    # What follows may view it.
    product = graph.call_function(aten.clone.default, (product,), {"memory_format": torch.contiguous_format})
    return product if bias is None else graph.call_function(aten.add.Tensor, (product, bias))


def add_biases_later(graph: fx.Graph) -> int:
    """Takes biases out of a graph's large products on the CPU, for the compiler to add in a loop; returns how many."""
    products = [node for node in graph.nodes if node.target is aten.addmm.default and _is_large(node)]
    for node in products:
        bias, a, b = node.args
        with graph.inserting_before(node):
            product = graph.call_function(aten.mm.default, (a, b))
            # A sum of the two the compiler would make one again.
            result = graph.call_function(aten.sub.Tensor, (product, graph.call_function(aten.neg.default, (bias,))))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return len(products)


def _is_large(node: fx.Node) -> bool:
    """Whether a product with a row as its bias has a large result on the CPU."""
    bias, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return not node.kwargs and result.device.type == "cpu" and bias.dim() == 1 and result.numel() >= _LARGE


def sum_by_factors(graph: fx.Graph) -> int:
    """Has sums over all of a product on the CPU taken from its factors where these are far smaller; returns how many.

    ``(a @ b).sum() = a.sum(0) @ b.sum(1)``, which is not finite either where an entry of a or b is not: gradients of
    weights for a small batch are looked at without reading them.
    """
    sums = [(node, product) for node in graph.nodes if (product := _summed_product(node)) is not None]
    for node, product in sums:
        with graph.inserting_before(node):
            a, b = product.args[-2:]
            a, b = (graph.call_function(aten.sum.dim_IntList, (factor, [dim])) for factor, dim in ((a, 0), (b, 1)))
            result = graph.call_function(aten.sum.default, (graph.call_function(aten.mul.Tensor, (a, b)),))
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return len(sums)


def _summed_product(node: fx.Node) -> fx.Node | None:
    """The product all of which a node sums, if its factors are far smaller and not rounded to less than 32 bits."""
    if node.target is not aten.sum.default or node.kwargs:
        return None
    product: Any = node.args[0]
    while product.target in (aten.t.default, aten.detach.default, aten.alias.default):
        product = product.args[0]
    is_mm = product.target is aten.mm.default and not product.kwargs
    if not is_mm and not (product.target is torch.ops.pvae.addmm.default and product.args[0] is None):
        return None
    a, b = (factor.meta["val"] for factor in product.args[-2:])
    is_open = a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64)
    return product if is_open and a.numel() + b.numel() < a.shape[0] * b.shape[1] / 2 else None


# Rows for which the default library may be slow, and entries of the matrix that they are multiplied by.
_FEW_ROWS = range(4, 49)
_ENTRIES = range(2**15, 2**20 + 1)


def _is_to_turn(node: fx.Node) -> bool:
    """Whether a product of a few rows with a transposed matrix is faster as the transpose of its transpose."""
    a, b = (arg.meta["val"] for arg in node.args[-2:])  # type: ignore[union-attr]
    # On one thread there is next to no difference.
    is_open = a.shape[0] in _FEW_ROWS and b.numel() in _ENTRIES and torch.get_num_threads() > 1
    is_open = is_open and a.is_contiguous() and b.t().is_contiguous()
    return is_open and _turning_is_faster(*a.shape, b.shape[1], torch.get_num_threads())


def _is_product(node: fx.Node) -> bool:
    """Whether a node multiplies two float32 matrices on the CPU, and at most adds a row to the result."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
        return False
    *bias, a, b = (arg.meta["val"] for arg in node.args)  # type: ignore[union-attr]
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (*bias, a, b)):
        return False
    return all(t.shape == b.shape[1:] for t in bias)


def _multiplications(product: fx.Node) -> int:
    a, b = (factor.meta["val"] for factor in product.args[-2:])  # type: ignore[union-attr]
    return a.numel() * b.shape[1]


# Below so many multiplications a call of oneDNN, which takes some 50 us more, gains nothing where it is twice as fast.
_WORTH_A_CALL = 2**21


def is_worth_onednn(multiplications: int) -> bool:
    """Whether oneDNN does a float32 product of that size on the CPU, where programs run as they are."""
    choice = _choice[0]
    return multiplications >= _WORTH_A_CALL and (_onednn_is_faster() if choice is None else choice)


def multiply_by_onednn(bias: Tensor | None, a: Tensor, weight: Tensor) -> Tensor:
    """``a @ weight.T + bias`` for a of shape ``(..., in)``."""
    # oneDNN reads a bias as if it were contiguous.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _onednn_is_faster() -> bool:
    """Compares the two on a product of a common size, which takes about 20 ms."""
    if not _has_onednn():
        return False
    a, b = (torch.ones(rows, 512, dtype=torch.float32) for rows in (256, 512))
    default, onednn = _seconds(lambda: torch.mm(a, b), lambda: _onednn_addmm(None, a, b))
    logger.info("float32 matrix products: %.0f us, %.0f us by oneDNN", default * 1e6, onednn * 1e6)
    # Half the time or about the same, by the processor. Chance is to decide nothing: results differ by rounding.
    return onednn < 0.75 * default


@cache
def _turning_is_faster(rows: int, inner: int, columns: int, threads: int) -> bool:
    """Compares ``a @ w.T`` with ``(w @ a.T).T``, which takes a few ms for each shape and number of threads."""
    a, w = (torch.ones(length, inner, dtype=torch.float32) for length in (rows, columns))
    default, turned = _seconds(lambda: torch.mm(a, w.t()), lambda: torch.mm(w, a.t()).t().contiguous())
    # Again, less than half the time or little less than the same.
    return turned < 0.6 * default


def _seconds(*ways: Callable[[], Any]) -> list[float]:
    """How long each takes, by turns: the least of some times, which other work on the machine does not change."""
    seconds = [math.inf for _ in ways]
    for _ in range(15):
        for number, run in enumerate(ways):
            start = time.perf_counter()
            run()
            seconds[number] = min(seconds[number], time.perf_counter() - start)
    return seconds
