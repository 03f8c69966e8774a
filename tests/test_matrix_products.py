from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pvae.capture import matrix_products
from pvae.errors import ArgumentError


@pytest.fixture
def onednn():
    if not matrix_products._has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    matrix_products.use_onednn(True)
    yield
    matrix_products.use_onednn(None)


def test_matrix_products_by_onednn(onednn):
    """All layouts that a layer, its input's gradient and its weight's gradient have."""
    x, w, b, g = torch.randn(256, 100), torch.randn(150, 100), torch.randn(150), torch.randn(256, 150)

    def products(x, w, b, g):
        return functional.linear(x, w, b), x @ w.t(), g @ w, g.t() @ x

    graph = make_fx(products)(x, w, b, g)
    assert matrix_products.swap_matrix_products(graph.graph) == 4
    graph.recompile()
    for ours, theirs in zip(graph(x, w, b, g), products(x, w, b, g), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.ones(2, 3), torch.ones(3, 4)),  # too small to gain
        (torch.ones(256, 256, dtype=torch.float64), torch.ones(256, 256, dtype=torch.float64)),
    ],
)
def test_other_products_stay(onednn, inputs):
    assert matrix_products.swap_matrix_products(make_fx(torch.mm)(*inputs).graph) == 0


def test_a_product_that_adds_a_matrix_stays(onednn):
    a = torch.ones(256, 256)
    assert matrix_products.swap_matrix_products(make_fx(torch.addmm)(a, a, a).graph) == 0


def test_the_choice_can_be_made(monkeypatch):
    a = torch.ones(256, 256)
    matrix_products.use_onednn(False)
    assert matrix_products.swap_matrix_products(make_fx(torch.mm)(a, a).graph) == 0
    matrix_products.use_onednn(None)
    assert isinstance(matrix_products._onednn_is_faster(), bool)
    monkeypatch.setattr(matrix_products, "_has_onednn", lambda: False)
    with pytest.raises(ArgumentError, match="no oneDNN"):
        matrix_products.use_onednn(True)


def test_libraries_are_compared_whatever_the_default_dtype(monkeypatch):
    if not matrix_products._has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(matrix_products, "_onednn_is_faster", matrix_products._onednn_is_faster.__wrapped__)
    torch.set_default_dtype(torch.float64)
    try:
        assert isinstance(matrix_products._onednn_is_faster(), bool)
    finally:
        torch.set_default_dtype(torch.float32)


def test_biases_of_other_layouts(onednn):
    """A column of a table, and one number for all."""
    x, w, table = torch.randn(256, 100), torch.randn(150, 100), torch.randn(150, 3)
    for bias in (table[:, 1], table[:1, 0].expand(150)):
        graph = make_fx(functional.linear)(x, w, bias)
        assert matrix_products.swap_matrix_products(graph.graph) == 1
        graph.recompile()
        torch.testing.assert_close(graph(x, w, bias), functional.linear(x, w, bias), rtol=1e-5, atol=1e-4)


def test_biases_of_large_results_are_added_later():
    """A row, of two layouts; neither a matrix nor the bias of a small result."""
    x, w = torch.randn(2000, 8), torch.randn(600, 8)
    for bias, count in ((torch.randn(600), 1), (torch.randn(600, 2)[:, 1], 1), (torch.randn(2000, 600), 0)):
        graph = make_fx(torch.addmm)(bias, x, w.t())
        assert matrix_products.add_biases_later(graph.graph) == count
        graph.recompile()
        torch.testing.assert_close(graph(bias, x, w.t()), torch.addmm(bias, x, w.t()), rtol=1e-5, atol=1e-5)
    assert matrix_products.add_biases_later(make_fx(torch.addmm)(torch.ones(600), x[:100], w.t()).graph) == 0


def products_of(x, w, g):
    """What a layer's step sums: its weights' gradient, as it is and transposed back."""
    gradient = g.t() @ x
    return gradient, gradient.sum(), gradient.t().detach().sum(), (x @ w.t()).sum()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("by_onednn", [False, True])
def test_sums_of_products_of_a_few_rows_are_those_of_their_factors(dtype, tolerance, by_onednn, request):
    inputs = [torch.randn(shape, dtype=dtype) for shape in ((16, 700), (400, 700), (16, 400))]
    graph = make_fx(products_of)(*inputs)
    if by_onednn:
        request.getfixturevalue("onednn")
        matrix_products.swap_matrix_products(graph.graph)
    assert matrix_products.sum_by_factors(graph.graph) == 2  # the layer's result is smaller than its weights
    graph.recompile()
    exact = products_of(*(t.double() for t in inputs))
    for ours, theirs in zip(graph(*inputs), exact, strict=True):
        # Rounding is of the terms, 280,000 of size 4, which cancel.
        assert (ours - theirs).abs().max() < tolerance * 4 * 280_000**0.5


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("number", [0, 2])
def test_sums_by_factors_are_not_finite_where_an_entry_of_the_product_is_not(bad, number):
    inputs = [torch.zeros(16, 700), torch.zeros(400, 700), torch.zeros(16, 400)]  # infinity times zero is not a number
    graph = make_fx(products_of)(*inputs)
    assert matrix_products.sum_by_factors(graph.graph) == 2
    graph.recompile()
    inputs[number][3, 5] = bad
    gradient, one, other, _ = graph(*inputs)
    assert not gradient.isfinite().all()
    assert not one.isfinite()
    assert not other.isfinite()


@pytest.mark.parametrize("rows, dtype", [(300, torch.float32), (16, torch.bfloat16)])
def test_other_products_are_summed_as_they_are(rows, dtype):
    inputs = [torch.ones(shape, dtype=dtype) for shape in ((rows, 700), (400, 700), (rows, 400))]
    assert matrix_products.sum_by_factors(make_fx(products_of)(*inputs).graph) == 0


@pytest.fixture
def turning(monkeypatch):
    """As if the transpose were always the faster, on two threads."""
    matrix_products.use_onednn(False)
    monkeypatch.setattr(matrix_products, "_turning_is_faster", lambda *_: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    yield
    matrix_products.use_onednn(None)


def test_layers_of_a_few_rows_are_multiplied_as_transposes(turning):
    x, w, b, g = torch.randn(16, 200), torch.randn(300, 200), torch.randn(300), torch.randn(16, 300)

    def products(x, w, b, g):
        return functional.linear(x, w, b).view(4, 4, 300), x @ w.t(), g @ w, g.t() @ x

    graph = make_fx(products)(x, w, b, g)
    assert matrix_products.swap_matrix_products(graph.graph) == 2  # gradients are fast as they are
    graph.recompile()
    for ours, theirs in zip(graph(x, w, b, g), products(x, w, b, g), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "rows, columns, dtype",
    [(3, 900, torch.float32), (64, 300, torch.float32), (16, 100, torch.float32), (16, 300, torch.float64)],
)
def test_other_layers_stay(turning, rows, columns, dtype):
    x, w = torch.ones(rows, 200, dtype=dtype), torch.ones(columns, 200, dtype=dtype)
    assert matrix_products.swap_matrix_products(make_fx(functional.linear)(x, w).graph) == 0


def test_on_one_thread_layers_stay(turning, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    graph = make_fx(functional.linear)(torch.ones(16, 200), torch.ones(300, 200))
    assert matrix_products.swap_matrix_products(graph.graph) == 0


def test_the_two_are_compared_for_a_shape():
    assert isinstance(matrix_products._turning_is_faster(16, 50, 40, 1), bool)
