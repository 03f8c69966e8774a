"""Graphs kept between calls: the same numbers, nothing captured twice, and nobody's programs kept alive."""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import replace
from functools import partial

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

import pvae
from pvae.capture import kept
from pvae.capture.graph import Graph
from pvae.evidence import programs
from pvae.evidence.planning import Settings


@pytest.fixture
def made(never_compiled, monkeypatch):
    monkeypatch.setattr(kept, "_all", {})
    return never_compiled(programs)


def log_px(model, guide, x, **options):
    options = {"num_samples": 40, "chunk_size": 80, "compile": True, "proposal": "guide", **options}
    return pvae.log_evidence(model, guide, x, **options).log_px


def captures(made):
    return [captured.captures for captured in made]


def assert_right(model, guide, x, **options):
    plain = log_px(model, guide, x, **options, compile=False)
    torch.testing.assert_close(log_px(model, guide, x, **options), plain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined"])
def test_a_second_call_captures_nothing_and_gives_the_same_bits(proposal, bits, made, small_vae):
    first, second = (log_px(small_vae.model, small_vae.guide, bits[:12], proposal=proposal) for _ in range(2))
    assert torch.equal(first, second)
    half = len(made) // 2
    assert any(captures(made)[:half])
    assert not any(captures(made)[half:])


def test_a_second_call_compiles_nothing(bits, monkeypatch, small_vae):
    compiled = []

    def compile(graph, inputs):
        compiled.append(1)
        return replace(graph, run=partial(graph.module))

    captured_chunks, original = [], Settings.is_to_be_captured
    monkeypatch.setattr(
        Settings, "is_to_be_captured", lambda *args: captured_chunks.append(original(*args)) or captured_chunks[-1]
    )
    monkeypatch.setattr(kept, "_all", {})
    monkeypatch.setattr(Graph, "compile", compile)
    first = log_px(small_vae.model, small_vae.guide, bits[:12])
    # Even where it would not be worth to compile: the same chunks of the same pair, and no others.
    assert torch.equal(log_px(small_vae.model, small_vae.guide, bits[:12], compile="auto"), first)
    assert captured_chunks[-1]
    for other in ({"num_samples": 30}, {"proposal": "prior"}, {"chunk_size": 40}):
        log_px(small_vae.model, small_vae.guide, bits[:12], compile="auto", **other)
        assert not captured_chunks[-1]
    assert len(compiled) == 1


def test_training_between_two_calls(bits, made, small_vae):
    assert_right(small_vae.model, small_vae.guide, bits[:12])
    pvae.fit(small_vae.model, small_vae.guide, bits, epochs=2, progress=False, compile=False)
    assert_right(small_vae.model, small_vae.guide, bits[:12])
    assert captures(made) == [1, 0]


def _replace_layer(vae):
    vae.decoder.network[0] = nn.Linear(2, 8)


def _replace_parameter(vae):
    vae.decoder.network[0].weight = nn.Parameter(torch.ones(8, 2))


def _replace_activation(vae):
    vae.decoder.network[1] = nn.Tanh()


def _add_hook(vae):
    vae.decoder.network[0].register_forward_hook(lambda module, inputs, out: 2 * out)


@pytest.mark.parametrize("change", [_replace_layer, _replace_parameter, _replace_activation, _add_hook])
def test_changes_between_two_calls(change, bits, made, small_vae):
    assert_right(small_vae.model, small_vae.guide, bits[:12])
    change(small_vae)
    assert_right(small_vae.model, small_vae.guide, bits[:12])
    assert captures(made) == [1, 1]


class Scaled(nn.Module):
    """A pair with a plain attribute and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.register_buffer("shift", torch.zeros(1))
        self.blocked = pyro.poutine.block(self.model)  # which holds its owner

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift.squeeze(), 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_attributes_buffers_and_dtypes(made):
    pair, x = Scaled(), torch.randn(12)
    assert_right(pair.model, pair.guide, x)
    pair.shift.add_(1.0)  # held by reference
    assert_right(pair.model, pair.guide, x)
    assert captures(made) == [1, 0]
    pair.scale = 2.0
    assert_right(pair.model, pair.guide, x)
    pair.shift = torch.ones(1)
    assert_right(pair.model, pair.guide, x)
    pair.double()
    assert_right(pair.model, pair.guide, x.double())
    assert captures(made) == [1, 0, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:parameters .* begin at their initial values")
def test_parameters_in_pyros_store(made):
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    x = torch.randn(12)
    guide(x), model(x)
    assert_right(model, guide, x)
    with torch.no_grad():
        pyro.get_param_store()._params["loc"].add_(1.0)
    assert_right(model, guide, x)
    assert captures(made) == [1, 0]
    pyro.get_param_store()["loc"] = torch.tensor(-1.0)
    assert_right(model, guide, x)
    result = pvae.fit(model, guide, x, epochs=2, progress=False, compile=False)
    assert_right(model, guide, x)
    with result.trained():
        assert_right(model, guide, x)
    pyro.clear_param_store()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initial values
        for _ in range(2):
            assert_right(model, guide, x)


def test_what_cannot_be_captured_is_not_tried_again(made):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, abs(float(z.flatten()[0])) * 0 + 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(12)
    with pytest.warns(UserWarning, match="as plain Pyro, uncaptured"):
        first = log_px(model, guide, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(log_px(model, guide, x), first)


def test_nothing_is_kept_alive(bits, made):
    pairs = [pvae.VAE.mlp(6, 2, [8]), Scaled()]
    inside = [weakref.ref(thing) for pair in pairs for thing in (*pair.modules(), *pair.parameters())]
    log_px(pairs[0].model, pairs[0].guide, bits[:12])
    log_px(pairs[1].model, pairs[1].guide, torch.randn(12))
    assert len(kept._all) == 2
    made.clear()
    pairs.clear()
    gc.collect()
    assert not kept._all
    assert not any(thing() is not None for thing in inside)


def test_so_many_and_no_more(bits, made, monkeypatch, small_vae):
    monkeypatch.setattr(kept, "_MOST_KEPT", 2)
    for num_samples in (30, 40, 50, 30):
        log_px(small_vae.model, small_vae.guide, bits[:12], num_samples=num_samples)
    assert captures(made) == [1, 1, 1, 1]
    assert len(kept._all) == 2


def test_another_default_dtype_or_library(bits, made, small_vae, request):
    request.addfinalizer(lambda: pvae.use_onednn(None))
    for choice in (False, False, None):
        pvae.use_onednn(choice)
        log_px(small_vae.model, small_vae.guide, bits[:12])
    assert captures(made) == [1, 0, 1]
