from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pvae.capture import rewriting
from pvae.errors import ArgumentError

EDGES = torch.tensor([-torch.inf, -1e4, -100.0, -20.0, -1e-6, -0.0, 0.0, 1e-6, 20.0, 100.0, 1e4, torch.inf, torch.nan])


def rewritten(function, *inputs):
    """A function as a graph in which the decompositions stand in the place of PyTorch's operations."""
    graph = make_fx(function, rewriting.DECOMPOSITIONS)(*inputs)
    named = {node.target for node in graph.graph.nodes}
    assert not named & rewriting.DECOMPOSITIONS.keys()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "function",
    [
        functional.softplus,
        lambda x: functional.softplus(x, beta=0.3, threshold=18.0),
        lambda x: functional.softplus(x, beta=4.0),
        functional.logsigmoid,
        torch.sigmoid,
    ],
)
def test_rewritten_functions_are_the_same_to_rounding_everywhere(function, dtype):
    """Relative to the same in float64, also where results are tiny or infinite. Rounding an x of 85 is worth 3e-6."""
    x = torch.cat([torch.linspace(-85, 85, 100_001, dtype=dtype), EDGES.to(dtype)])
    exact = function(x.double())
    tolerance = 5e-6 if dtype is torch.float32 else 1e-14
    result = rewritten(function, x)(x)
    assert result.dtype is dtype
    smallest = torch.finfo(dtype).tiny
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=smallest, equal_nan=True)


@pytest.mark.parametrize("function", [functional.softplus, functional.logsigmoid, torch.sigmoid])
def test_their_gradients_are_too(function):
    x = torch.linspace(-60, 60, 10_001)

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    # Of sigmoid, PyTorch's own backward takes 1 - y, which is rounded where y is near 1.
    atol = 1e-7 if function is torch.sigmoid else 1e-30
    torch.testing.assert_close(rewritten(gradient, x)(x).double(), gradient(x.double()), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_binary_cross_entropy(reduction, weighted, positive):
    x, target = 10 * torch.randn(40, 7), torch.rand(40, 7)
    options = {"reduction": reduction}
    options["weight"] = torch.rand(7) if weighted else None
    options["pos_weight"] = 3 * torch.rand(7) if positive else None

    def loss(x, target):
        return functional.binary_cross_entropy_with_logits(x, target, **options)

    torch.testing.assert_close(rewritten(loss, x, target)(x, target), loss(x, target), rtol=1e-5, atol=1e-6)


@pytest.fixture
def onednn():
    if not rewriting._has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    rewriting.use_onednn(True)
    yield
    rewriting.use_onednn(None)


def test_matrix_products_by_onednn(onednn):
    """All layouts that a layer, its input's gradient and its weight's gradient have."""
    x, w, b, g = torch.randn(64, 100), torch.randn(150, 100), torch.randn(150), torch.randn(64, 150)

    def products(x, w, b, g):
        return functional.linear(x, w, b), x @ w.t(), g @ w, g.t() @ x

    graph = make_fx(products)(x, w, b, g)
    assert rewriting.swap_matrix_products(graph.graph) == 4
    graph.recompile()
    for ours, theirs in zip(graph(x, w, b, g), products(x, w, b, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(2, 3), torch.ones(3, 4)),  # too small to gain
        (torch.ones(128, 128, dtype=torch.float64), torch.ones(128, 128, dtype=torch.float64)),
    ],
)
def test_other_products_stay(onednn, inputs):
    assert rewriting.swap_matrix_products(make_fx(torch.mm)(*inputs).graph) == 0


def test_a_product_that_adds_a_matrix_stays(onednn):
    a = torch.ones(128, 128)
    assert rewriting.swap_matrix_products(make_fx(torch.addmm)(a, a, a).graph) == 0


def test_the_choice_can_be_made(monkeypatch):
    a = torch.ones(128, 128)
    rewriting.use_onednn(False)
    assert rewriting.swap_matrix_products(make_fx(torch.mm)(a, a).graph) == 0
    rewriting.use_onednn(None)
    assert isinstance(rewriting._onednn_is_faster(), bool)
    monkeypatch.setattr(rewriting, "_has_onednn", lambda: False)
    with pytest.raises(ArgumentError, match="no oneDNN"):
        rewriting.use_onednn(True)


def test_biases_of_other_layouts(onednn):
    """A column of a table, and one number for all."""
    x, w, table = torch.randn(64, 100), torch.randn(150, 100), torch.randn(150, 3)
    for bias in (table[:, 1], table[:1, 0].expand(150)):
        graph = make_fx(functional.linear)(x, w, bias)
        assert rewriting.swap_matrix_products(graph.graph) == 1
        graph.recompile()
        torch.testing.assert_close(graph(x, w, bias), functional.linear(x, w, bias), rtol=1e-5, atol=1e-4)
