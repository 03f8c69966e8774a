"""What an evaluation leaves as it was, and what it says of what it finds."""

from __future__ import annotations

import copy
from functools import partial

import helpers
import pyro
import pytest
import torch
from pairs import ModulePair, bernoulli_pair
from pyro import distributions as dist
from torch import nn
from torch.distributions import constraints

import pvae

evidence = partial(helpers.evidence, num_samples=1000)


@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_changes_nothing(proposal, grad, module_pair, bits, caller_state):
    module_pair.encoder[0].eval()
    pyro.module("decoder", nn.Linear(2, 2))  # another model's, under the same name
    pyro.param("free", torch.tensor(1.0))
    before, weights = caller_state(), copy.deepcopy(module_pair.state_dict())
    modes = [m.training for m in module_pair.modules()]
    with torch.set_grad_enabled(grad):
        estimate = evidence(module_pair, bits, num_samples=10, proposal=proposal)
    before.assert_unchanged()
    assert modes == [m.training for m in module_pair.modules()]
    assert all(torch.equal(v, weights[k]) for k, v in module_pair.state_dict().items())
    assert all(p.grad is None for p in module_pair.parameters())
    assert not estimate.log_px.requires_grad


@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("caller", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_do_not_reach_evaluation(proposal, caller, small_vae, bits):
    plain = evidence(small_vae, bits, num_samples=30, proposal=proposal)
    with caller():
        inside = evidence(small_vae, bits, num_samples=30, proposal=proposal)
    assert torch.equal(plain.log_px, inside.log_px)


HIDDEN = {"nets": [nn.Sequential(nn.Dropout(), nn.Linear(2, 6))]}


def test_modules_that_nobody_finds_run_in_eval_mode_too(bits):
    """A module in a list in a dict in a global of a function of a function: with dropout left on, weights vary."""

    def helper(z):
        return HIDDEN["nets"][0](z)

    pair = bernoulli_pair(logits=lambda z, x: helper(z))
    first, again = (evidence(pair, bits[:50], num_samples=4000, seed=s) for s in (0, 1))
    assert HIDDEN["nets"][0].training
    assert HIDDEN["nets"][0][0].training
    HIDDEN["nets"][0].eval()
    assert torch.equal(first.log_px, evidence(pair, bits[:50], num_samples=4000, seed=0).log_px)
    HIDDEN["nets"][0].train()
    assert not torch.equal(first.log_px, again.log_px)


def test_programs_run_in_eval_mode_without_gradients(bits):
    seen = set()

    class Watched(ModulePair):
        def guide(self, x):
            seen.add((self.training, torch.is_grad_enabled()))
            super().guide(x)

    evidence(Watched(), bits, num_samples=3)
    assert seen == {(False, False)}


def test_untrained_pyro_params_warn_and_trained_ones_count():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.0)) * x, scale))

    x = 2**0.5 * torch.randn(300)
    result = pvae.fit(model, guide, x, epochs=150, batch_size=100, lr=0.02, progress=False)
    with pytest.warns(UserWarning, match=r"\['scale', 'slope'\] have their initial values.*result.trained"):
        untrained = pvae.log_evidence(model, guide, x)
    with result.trained():
        trained = pvae.log_evidence(model, guide, x)
    assert trained.elbo.mean() > untrained.elbo.mean() + 0.5
    assert trained.ess.median() > 2 * untrained.ess.median()
    pyro.param("scale", result.params["scale"], constraint=constraints.positive)
    pyro.param("slope", result.params["slope"])
    torch.testing.assert_close(pvae.log_evidence(model, guide, x).log_px, trained.log_px)
