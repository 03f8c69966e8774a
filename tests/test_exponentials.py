from __future__ import annotations

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pvae.capture import exponentials

EDGES = torch.tensor([-torch.inf, -1e4, -100.0, -20.0, -1e-6, -0.0, 0.0, 1e-6, 20.0, 100.0, 1e4, torch.inf, torch.nan])


def rewritten(function, *inputs):
    """A function as a graph in which the decompositions stand in the place of PyTorch's operations."""
    graph = make_fx(function, exponentials.DECOMPOSITIONS)(*inputs)
    named = {node.target for node in graph.graph.nodes}
    assert not named & exponentials.DECOMPOSITIONS.keys()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_the_compiler_gets_is_the_same_to_rounding(dtype):
    x = torch.cat([torch.linspace(0, 85, 100_001, dtype=dtype), EDGES[6:].to(dtype)])

    def function(x):
        return torch.ops.pvae.log1p_exp_neg(x)

    exponentials.tell_the_compiler()
    graph = make_fx(function, select_decomp_table())(x)
    assert torch.ops.pvae.log1p_exp_neg.default not in {node.target for node in graph.graph.nodes}
    exact = functional.softplus(-x.double(), threshold=1000)
    tolerance = 5e-6 if dtype is torch.float32 else 1e-14
    for result in (graph(x), function(x)):
        assert result.dtype is dtype
        torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=torch.finfo(dtype).tiny, equal_nan=True)


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
