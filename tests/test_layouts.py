"""Parameters in any layout: channels last, transposed, strided or expanded weights are trained as contiguous ones are.

Pyro's store keeps a copy of a parameter that is not contiguous; with it in the place of the module's own, Pyro's SVI
would train nothing, so it is run on a twin with contiguous weights.
"""

from __future__ import annotations

import copy
from functools import partial

import helpers
import numpy as np
import pyro
import pytest
import torch
from pairs import ModulePair
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pvae
from pvae.svi import step as engine

fit = partial(helpers.fit, epochs=3, lr=0.01, seed=5, compile=False)


def channels_last():
    return pvae.VAE.conv((1, 8, 8), 2, channels=(3, 4), hidden=8).to(memory_format=torch.channels_last)


def transposed():
    pair = pvae.VAE.mlp(6, 2, [8])
    for layer in pair.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return pair


def strided():
    """Weights that are every other entry of a larger tensor."""
    pair = ModulePair()
    for layer in (pair.encoder[0], pair.decoder[0]):
        memory = torch.full((*layer.weight.shape, 2), 3.0)
        memory[..., 0] = layer.weight.detach()
        layer.weight, layer.memory = nn.Parameter(memory[..., 0]), memory
    return pair


def expanded():
    pair = ModulePair()
    for layer in (pair.encoder[0], pair.decoder[0]):
        layer.bias = nn.Parameter(torch.full((1,), 0.1).expand(8))
    return pair


class Direct(ModulePair):
    """A parameter that the program takes from ``pyro.param``, and not from its module."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2).t())

    def model(self, x):
        weight = pyro.param("weight", self.weight)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=z @ weight).to_event(1), obs=x)


class Modules(PyroModule):
    """Pyro's own modules, with a constrained parameter."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = PyroModule[nn.Linear](6, 4), PyroModule[nn.Linear](2, 6)
        self.encode.weight = nn.Parameter(torch.randn(6, 4).t() / 4)
        self.gain = PyroParam(torch.rand(6, 2).t() + 0.5, constraints.positive)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z) + z @ self.gain).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


PAIRS = {make.__name__: make for make in (channels_last, transposed, strided, expanded, Direct, Modules)}


def data_for(pair, bits):
    return torch.rand(150, 1, 8, 8).round() if pair is channels_last else bits[:150]


def contiguous(pair):
    twin = copy.deepcopy(pair)
    for p in twin.parameters():
        p.data = p.detach().contiguous()
    return twin


def by_svi(pair, x, epochs=3):
    """Pyro's own SVI, fed with the batches and the noise of `fit`."""
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    torch.manual_seed(5)
    for epoch in range(1, epochs + 1):
        for rows in torch.from_numpy(np.random.default_rng((5, epoch)).permutation(len(x))).split(64):
            svi.step(x[rows])


def compared(name, bits, **options):
    pair = PAIRS[name]()
    x, twin = data_for(PAIRS[name], bits), contiguous(pair)
    parameters = [(p, p.stride()) for p in pair.parameters()]
    assert not all(p.is_contiguous() for p, _ in parameters)
    result = fit(pair, x, **options)
    by_svi(twin, x)
    assert not result.params
    for (p, stride), now, q in zip(parameters, pair.parameters(), twin.parameters(), strict=True):
        assert now is p
        assert p.stride() == stride or 0 in stride  # entries that share their memory get some of their own
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)  # Adam divides small gradients by their size


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_they_are_trained_as_contiguous_ones_are_by_pyros_svi(name, capture, bits, never_compiled):
    never_compiled(engine)
    compared(name, bits, compile=capture)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["channels_last", "transposed"])
def test_compiled_steps_train_them_too(name, bits):
    compared(name, bits, compile=True)


def test_what_lies_between_the_entries_of_a_strided_weight_stays(bits):
    pair = strided()
    fit(pair, bits)
    assert (pair.encoder[0].memory[..., 1] == 3).all()


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name, bits, tmp_path):
    pairs, x = [], data_for(PAIRS[name], bits)
    for _ in range(3):  # a copy would be contiguous
        torch.manual_seed(1)
        pairs.append(PAIRS[name]())
    first, second, straight = pairs
    fit(straight, x)
    fit(first, x, epochs=2, checkpoint=tmp_path)
    fit(second, x, checkpoint=tmp_path, resume="auto")
    for p, q in zip(second.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", PAIRS)
def test_log_evidence_sees_trained_values_and_warns_of_nothing(name, bits):
    x, pair = data_for(PAIRS[name], bits), PAIRS[name]()
    fit(pair, x)
    twin = contiguous(pair)
    ours, theirs = (pvae.log_evidence(p.model, p.guide, x, num_samples=20) for p in (pair, twin))
    torch.testing.assert_close(ours.log_px, theirs.log_px)


@pytest.mark.parametrize("make", [channels_last, transposed])
def test_a_trained_vae_is_saved_and_loaded(make, bits, tmp_path):
    x, vae = data_for(make, bits), make()
    fit(vae, x)
    vae.save(tmp_path / "vae")
    loaded = pvae.VAE.load(tmp_path / "vae")
    for p, q in zip(vae.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p, q)
