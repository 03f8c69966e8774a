"""Captured steps against plain Pyro's, for every objective and family; and the loop of the GPU, run on the CPU."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pairs import ModulePair
from pyro import distributions as dist
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import nn

import pvae
from pvae import objectives
from pvae.data.batches import InMemory
from pvae.errors import NumericalError
from pvae.runtime import isolate, place_pair
from pvae.svi import elbos as bounds
from pvae.svi import passes as passes_
from pvae.svi import step as engine
from pvae.svi import verification
from pvae.svi.settings import Settings
from pvae.svi.trainable import Trainable


def vae(likelihood="bernoulli"):
    return pvae.VAE.mlp(6, 2, [8], likelihood)


def conv_vae():
    return pvae.VAE.conv((1, 8, 8), 2, channels=(3, 4), hidden=8)


class Mixture(nn.Module):
    """A discrete latent that Pyro sums out, beside a continuous one."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Linear(2, 6)
        self.encoder = nn.Linear(6, 4)
        self.centres = nn.Parameter(torch.randn(3, 2))

    @config_enumerate
    def model(self, x):
        pyro.module("loc", self.loc)
        centres = pyro.param("centres", lambda: self.centres.detach().clone())
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=x.new_zeros(3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(centres[k], 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.loc(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class TwoLatents(ModulePair):
    """Several sites, a transformed one, a global ``pyro.param``, dropout and a plate that subsamples."""

    def model(self, x):
        pyro.module("decoder", self.decoder)
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", 300, subsample=x):
            z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            gain = pyro.sample("gain", dist.LogNormal(0.0, scale))
            pyro.sample("obs", dist.Bernoulli(logits=gain[:, None] * self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", 300, subsample=x):
            hidden = nn.functional.dropout(self.encoder(x), 0.2, training=self.training)
            loc, raw = hidden.chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))
            pyro.sample("gain", dist.LogNormal(loc[:, 0], 0.3))


def own_objective(model, guide, x):
    return 0.5 * Trace_ELBO().differentiable_loss(model, guide, x)


CASES = {
    "Trace": (vae, Trace_ELBO),
    "Trace, particles": (vae, lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)),
    "Trace, particles one by one": (vae, lambda: Trace_ELBO(num_particles=2)),
    "MeanField": (vae, TraceMeanField_ELBO),
    "Graph": (vae, TraceGraph_ELBO),
    "Renyi": (vae, lambda: RenyiELBO(alpha=0.5, num_particles=3)),
    "IWAE": (vae, lambda: RenyiELBO(0.0, 4, vectorize_particles=True, max_plate_nesting=1)),
    "Enum": (Mixture, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "own objective": (vae, lambda: own_objective),
    "pvae's ELBO": (vae, lambda: objectives.ELBO(2)),
    "free bits": (vae, lambda: objectives.MeanFieldELBO(2, 0.1)),
    "pvae's IWAE": (vae, lambda: objectives.IWAE(3)),
    "sticking the landing": (ModulePair, objectives.StickingTheLanding),
    "doubly reparameterized": (TwoLatents, lambda: objectives.DReG(3, vectorize_particles=False)),
    "score function": (vae, lambda: objectives.ScoreFunction(2, has_baseline=True)),
    "gaussian": (lambda: vae("gaussian"), Trace_ELBO),
    "gaussian-per-pixel": (lambda: vae("gaussian-per-pixel"), Trace_ELBO),
    "conv": (conv_vae, Trace_ELBO),
    "module": (ModulePair, Trace_ELBO),
    "two latents": (TwoLatents, Trace_ELBO),
}


def step_of(pair, x, *, capture, objective=None, transform=None, **options):
    batches = InMemory((x,), 64, torch.device("cpu"), transform)
    placed = place_pair(pair.model, pair.guide, device="cpu")
    verified = verification.verify(pair.model, pair.guide, batches.first(), None)
    trainable = Trainable(placed, verified, bounds.resolve(objective), {}, batches, None)
    settings = Settings.checked(epochs=1, batch_size=64, **{"lr": 1e-2, **options})
    step = engine.Step(trainable, batches, replace(settings, capture=capture))
    if step.captured:
        step.captured.compile_after = None
    return step


@pytest.fixture(autouse=True)
def _as_in_fit():
    with isolate(seed=0, training=True):
        yield


def data_for(name, bits):
    return torch.rand(96, 1, 8, 8).round() if name == "conv" else bits[:96]


def compared(name, bits, compile=False):
    make, objective = CASES[name]
    x = data_for(name, bits)
    pair = make()
    plain = step_of(pair, x, capture=False, objective=objective())
    fast = step_of(pair, x, capture=True, objective=objective())
    if compile:
        fast.captured.compile_after = 0
    fast.evaluate((x[:64],))
    for rows in (x[:64], x[32:96]):
        torch.manual_seed(1)
        loss, finite, grads = plain.evaluate((rows,))
        torch.manual_seed(1)
        fast_loss, fast_finite, fast_grads = fast.evaluate((rows,))
        assert fast_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        assert finite
        assert fast_finite
        # Parameters may be met in another order.
        ours = {id(fast.adam.params[n]): g for n, g in fast_grads.items()}
        theirs = {id(plain.adam.params[n]): g for n, g in grads.items()}
        assert ours.keys() == theirs.keys()
        for key, grad in theirs.items():
            assert torch.linalg.vector_norm(ours[key] - grad) <= 1e-5 * torch.linalg.vector_norm(grad) + 1e-6
    assert fast.captured.captures == 1
    assert not fast.captured.given_up
    assert fast.captured.is_compiled == compile


@pytest.mark.parametrize("name", CASES)
def test_captured_loss_and_gradients_are_plain_pyros(name, bits):
    compared(name, bits)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_loss_and_gradients_are_plain_pyros(name, bits):
    compared(name, bits, compile=True)


def test_an_annealed_weight_needs_no_new_capture(bits):
    beta = torch.tensor(0.1)
    pair = vae()

    def annealed(model, guide, x):
        with pyro.poutine.scale(scale=beta):
            return Trace_ELBO().differentiable_loss(model, guide, x)

    step = step_of(pair, bits, capture=True, objective=annealed)
    losses = []
    for value in (0.1, 0.5, 1.0):
        beta.fill_(value)
        torch.manual_seed(0)
        losses.append(step.evaluate((bits[:64],))[0].item())
    assert np.array(losses) / losses[-1] == pytest.approx([0.1, 0.5, 1.0], rel=1e-5)
    assert step.captured.captures == 1


def test_transforms_are_captured_too(bits):
    pair, grey = vae(), bits * 0.8 + 0.1
    fast = step_of(pair, grey, capture=True, transform=pvae.datasets.fresh_bits)
    plain = step_of(pair, grey, capture=False, transform=pvae.datasets.fresh_bits)
    for step in (fast, plain):
        torch.manual_seed(3)
        step.loss = step.evaluate((grey[:64],))[0].item()
    assert fast.loss == pytest.approx(plain.loss, rel=1e-6)
    assert fast.captured.captures == 1


def test_bfloat16_products_alone(bits):
    """One product has 8 bits of precision, 0.4%; sums, densities and gradients stay float32."""
    pair = pvae.VAE.mlp(6, 2, [64])
    exact = step_of(pair, bits, capture=False)
    for capture in (False, True):
        low = step_of(pair, bits, capture=capture, precision="bfloat16")
        torch.manual_seed(0)
        loss, _, grads = low.evaluate((bits[:64],))
        torch.manual_seed(0)
        assert loss.item() == pytest.approx(exact.evaluate((bits[:64],))[0].item(), rel=5e-3)
        assert loss.item() != exact.evaluate((bits[:64],))[0].item()
        assert {g.dtype for g in grads.values()} == {torch.float32}


# --- the loop of the GPU, with its graph played by plain calls ----------------------------------------------------


def epochs_of(kind, pair, x, epochs, **options):
    step = step_of(pair, x, capture=True, **options)
    # Adam's fused kernel takes `found_inf` on both kinds of device.
    passes = passes_.CudaEpochs(step, record=lambda work: work) if kind == "cuda" else passes_.Epochs(step)
    totals = []
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        passes.begin()
        assert sum(passes.epoch(epoch)) == len(x)
        totals.append(passes.total)
    return totals


@pytest.mark.parametrize("pays", [0, 30, 150_000])
@pytest.mark.parametrize("size", [64 * 17, 64 * 33 + 5, 64 * 16, 100])
def test_the_loop_of_the_gpu_is_the_other_loop(size, pays, bits, monkeypatch):
    """Whole replays, single steps after them, a ragged end, and too few data for a replay; both kinds of update."""
    monkeypatch.setattr(passes_, "_STEPS_THAT_PAY", pays)
    x = bits[torch.arange(size) % len(bits)]
    ours = vae()
    theirs = copy.deepcopy(ours)
    totals = [epochs_of("cuda", ours, x, 3), epochs_of("cpu", theirs, x, 3)]
    np.testing.assert_allclose(*totals, rtol=1e-4)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("pays", [0, 150_000])
def test_on_the_gpu_nothing_moves_from_a_bad_step_on(pays, bits, monkeypatch):
    """The bad datum is in one batch of the epoch: parameters end as after the steps before that batch."""
    x = bits[torch.arange(64 * 40) % len(bits)].clone()
    x[777] = math.nan
    monkeypatch.setattr(passes_, "_STEPS_THAT_PAY", pays)
    order = InMemory((x,), 64, torch.device("cpu")).order(0)
    bad_step = int((order == 777).nonzero()) // 64 + 1
    pair = vae()
    before = copy.deepcopy(pair)
    step = step_of(pair, bits, capture=True)
    passes = passes_.CudaEpochs(step, record=lambda work: work)
    passes.batches = InMemory((x,), 64, torch.device("cpu"))
    torch.manual_seed(0)
    with pytest.raises(NumericalError, match=f"^step {bad_step}, before its update"):
        list(passes.epoch(0))

    plain = step_of(before, bits, capture=False)
    torch.manual_seed(0)
    for rows in order.split(64)[: bad_step - 1]:
        plain((x[rows],))
    for p, q in zip(pair.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_on_the_gpu_what_could_not_be_captured_is_not_recorded(bits):
    pair, recorded = vae(), []

    def by_numpy(x):
        return x * float(np.random.default_rng().random() < 2)

    x = bits[torch.arange(64 * 40) % len(bits)]
    step = step_of(pair, x, capture=True, transform=by_numpy)
    step.captured.given_up = True
    passes = passes_.CudaEpochs(step, record=lambda work: recorded.append(work) or work)
    for epoch in range(2):
        passes.begin()
        assert sum(passes.epoch(epoch)) == len(x)
    assert not recorded


def test_on_the_gpu_a_record_is_not_played_once_capture_was_given_up(bits):
    played = []
    x = bits[torch.arange(64 * 40) % len(bits)]
    step = step_of(vae(), x, capture=True)
    passes = passes_.CudaEpochs(step, record=lambda work: lambda: played.append(1) or work())
    list(passes.epoch(0))
    assert len(played) == 1  # the first sixteen steps come before the record is made, the last eight are single
    step.captured.given_up = True
    passes.begin()
    assert sum(passes.epoch(1)) == len(x)
    assert len(played) == 1
