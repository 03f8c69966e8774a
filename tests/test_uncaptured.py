"""Cheaper arithmetic for programs that run as they are: the same results, and only where it is meant to be."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.nn import functional as F

import pvae
from pvae.capture import CheaperArithmetic, uncaptured
from pvae.evidence import drawing


@pytest.fixture
def layer():
    return nn.Linear(20, 30)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of what is summed piece by piece."""
    shapes, original = [], uncaptured._sum_softplus
    monkeypatch.setattr(uncaptured, "_sum_softplus", lambda m: shapes.append(m.shape) or original(m))
    return shapes


def both(function):
    with torch.no_grad():
        plain = function()
        with CheaperArithmetic():
            return function(), plain


def assert_same(ours, theirs):
    assert type(ours + 0) is torch.Tensor
    torch.testing.assert_close(ours + 0, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30,), (5, 6), (3, 2, 5)])
def test_sums_of_binary_losses(dtype, shape, layer, calls):
    layer.to(dtype).weight.data.mul_(20)  # large logits, too
    x = torch.bernoulli(torch.full((7, *shape), 0.3, dtype=dtype))
    h = torch.randn(800, 7, 20, dtype=dtype)

    def log_prob():
        return dist.Bernoulli(logits=layer(h).reshape(800, 7, *shape)).to_event(len(shape)).log_prob(x)

    assert_same(*both(log_prob))
    assert len(calls) > 0


def test_logits_of_any_origin_and_bits_for_each_row(layer, calls):
    h, x = torch.randn(5600, 20), torch.bernoulli(torch.full((7, 30), 0.3))
    copies = x.repeat(800, 1)  # of which nobody sees that they are
    for logits, bits in ((layer(h).detach(), copies), (layer(h).detach().view(800, 7, 30), x)):
        assert_same(*both(lambda own=logits, b=bits: dist.Bernoulli(logits=own).to_event(1).log_prob(b)))
    assert {shape[-1] for shape in calls} == {30}
    one = torch.bernoulli(torch.full((30,), 0.3))
    assert_same(*both(lambda: dist.Bernoulli(logits=layer(h)).to_event(1).log_prob(one)))


@pytest.mark.parametrize(
    "use",
    [
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none"),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(0),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((0, 2)),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1, keepdim=True),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").reshape(-1, 30).sum(1),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x / 3, reduction="none").sum(-1),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, x[0], reduction="none").sum(-1),
        lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1, dtype=torch.float64),
        lambda logits, x: torch.where(x > 0, logits, 0.0).sigmoid()[1:, :3].mean(1),
        lambda logits, x: torch.stack(logits.chunk(2, -1)).exp().add_(1),
        lambda logits, x: logits.mul_(2) + logits.transpose(0, 1).reshape(800, 7, 30),
        lambda logits, x: dist.Categorical(logits=logits).log_prob(x[..., 0].long()),
        lambda logits, x: logits.numpy().sum() + torch.zeros(()),
    ],
)
def test_whatever_else_is_done(use, layer):
    h, x = torch.randn(800, 7, 20), torch.bernoulli(torch.full((7, 30), 0.3)).expand(800, 7, 30)
    assert_same(*both(lambda: use(layer(h), x)))


def test_losses_and_products_that_are_used_twice(layer):
    h, x = torch.randn(800, 7, 20), torch.bernoulli(torch.full((7, 30), 0.3)).expand(800, 7, 30)

    def use():
        logits = layer(h)
        losses = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return losses.sum(-1) + (-losses).exp().sum(-1) + losses[..., 0] + logits[..., 1]

    assert_same(*both(use))


def cheaper_and_not(model, monkeypatch):
    """log p(x) of bits under a model of two latents, with cheaper arithmetic and with PyTorch's own."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x = torch.bernoulli(torch.full((9, 6), 0.5))
    options = {"num_samples": 60, "compile": False, "proposal": "guide"}
    ours = pvae.log_evidence(model, guide, x, **options)
    monkeypatch.setattr(drawing, "CheaperArithmetic", torch.no_grad)
    return ours.log_px, pvae.log_evidence(model, guide, x, **options).log_px


def test_inputs_that_change_in_place(monkeypatch):
    monkeypatch.setattr(uncaptured, "_SMALL", 1)
    layer = nn.Linear(2, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)).clone()
            logits = layer(z)
            z.zero_()
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    ours, theirs = cheaper_and_not(model, monkeypatch)
    assert torch.equal(ours, theirs)


def test_gradients_and_autocast_are_left_alone(layer):
    h = torch.randn(800, 7, 20)
    with CheaperArithmetic():
        assert layer(h).requires_grad
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(h).dtype is torch.bfloat16
            assert type(layer(h)) is torch.Tensor


def test_oneDNN_where_it_is_told_to(layer, request):
    request.addfinalizer(lambda: pvae.use_onednn(None))
    for choice in (True, False):
        pvae.use_onednn(choice)
        assert_same(*both(lambda: layer(torch.ones(3000, 20))))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian-per-pixel"])
@pytest.mark.parametrize("proposal", ["guide", "prior", "defensive"])
def test_estimates(likelihood, proposal, bits, monkeypatch, calls):
    monkeypatch.setattr(uncaptured, "_SMALL", 1)
    vae = pvae.VAE.mlp(6, 2, [8], likelihood)
    options = {"num_samples": 60, "chunk_size": 200, "compile": False, "proposal": proposal}
    ours = pvae.log_evidence(vae.model, vae.guide, bits[:31], **options)
    assert bool(calls) == (likelihood == "bernoulli" and proposal == "guide")
    monkeypatch.setattr(drawing, "CheaperArithmetic", torch.no_grad)
    theirs = pvae.log_evidence(vae.model, vae.guide, bits[:31], **options)
    torch.testing.assert_close(ours.log_px, theirs.log_px, rtol=1e-6, atol=1e-5)


def test_a_program_with_losses_of_its_own(monkeypatch):
    monkeypatch.setattr(uncaptured, "_SMALL", 1)
    layer = nn.Linear(2, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = layer(z)
            losses = F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none")
            pyro.factor("x", -losses.sum(-1))

    torch.testing.assert_close(*cheaper_and_not(model, monkeypatch), rtol=1e-6, atol=1e-5)
