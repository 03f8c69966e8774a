"""Incomplete data: log p of what was observed, which what was not has no influence on."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from helpers import assert_captured, assert_comes_back, assert_fit_is_svi, evidence
from pyro import distributions as dist
from torch import nn

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.masked import MaskedVAE


def made(likelihood="bernoulli"):
    torch.manual_seed(0)
    return MaskedVAE.mlp((2, 3), 2, [8], likelihood)


def data(n=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (n, 2, 3), generator=generator).float()
    mask = torch.rand(n, 2, 3, generator=generator) < 0.6
    mask[0] = False
    return torch.where(mask, x, 0.0), mask


def linear(noise=0.5):
    """A linear-Gaussian decoder, of which every marginal is known."""
    torch.manual_seed(0)
    encoder = posteriors.DiagonalNormal(networks.mlp(10, [8], 4))
    return MaskedVAE(priors.StandardNormal(2), likelihoods.Gaussian(nn.Linear(2, 5), scale=noise), encoder).double()


def marginal(vae, noise=0.5):
    weight = vae.decoder.network.weight.detach()
    return vae.decoder.network.bias.detach(), weight @ weight.T + noise**2 * torch.eye(5, dtype=torch.float64)


def incomplete(n=8):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, 5, generator=generator) < 0.6
    mask[:, 0] = True
    return torch.where(mask, x, math.pi), mask


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined", "ais"])
def test_log_evidence_is_that_of_the_observed_entries(proposal):
    """Against the exact marginal; 6 standard errors of each datum fail once in 1e8."""
    vae, (x, mask) = linear(), incomplete()
    loc, covariance = marginal(vae)
    exact = torch.stack(
        [dist.MultivariateNormal(loc[m], covariance[m][:, m]).log_prob(row[m]) for row, m in zip(x, mask, strict=True)]
    )
    estimate = evidence(vae, (x, mask), num_samples=500, proposal=proposal)
    assert ((estimate.corrected - exact).abs() < 6 * estimate.std_error + 1e-6).all()


def test_a_datum_without_any_entry_has_the_evidence_of_nothing():
    vae, (x, mask) = made(), data(4)
    estimate = evidence(vae, (x[:1], mask[:1]), num_samples=200, proposal="prior")
    assert estimate.log_px.item() == pytest.approx(0, abs=1e-5)


def test_imputation_is_the_exact_conditional_mean():
    """Self-normalized weights of 20,000 draws: errors of 0.5 / sqrt(ESS); with an ESS of 300, 0.2 is 7 of them."""
    vae, (x, mask) = linear(), incomplete()
    loc, covariance = marginal(vae)
    imputed = vae.impute(x, mask, 20_000)
    assert torch.equal(imputed[mask], x[mask])
    for row, m, filled in zip(x, mask, imputed, strict=True):
        gain = covariance[~m][:, m] @ torch.linalg.inv(covariance[m][:, m])
        torch.testing.assert_close(filled[~m], loc[~m] + gain @ (row[m] - loc[m]), rtol=0, atol=0.2)
    draws = vae.impute(x, mask, 5_000, draws=2_000)
    assert draws.shape == (2_000, 8, 5)
    torch.testing.assert_close(draws.mean(0), imputed, rtol=0, atol=0.3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -999.0])
@pytest.mark.parametrize(
    "likelihood", ["bernoulli", "gaussian", "poisson", "discretized-logistic", "continuous-bernoulli"]
)
def test_what_is_missing_is_never_used(value, likelihood):
    vae, (x, mask) = made(likelihood), data()
    gradients, imputed = [], []
    for given in (x, torch.where(mask, x, value)):
        vae.zero_grad()
        torch.manual_seed(0)
        with pyro.get_param_store().scope():
            pyro.infer.Trace_ELBO().loss_and_grads(vae.model, vae.guide, given, mask)
        gradients.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
        imputed.append(vae.impute(given, mask, 20))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*gradients, strict=True))
    assert torch.equal(*imputed)
    assert imputed[0].isfinite().all()


def test_pyros_svi_trains_it_to_the_same_place():
    assert_fit_is_svi(made(), data(130))


def test_training_is_captured(monkeypatch):
    assert_captured(made(), data(128), monkeypatch)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_it_comes_back_from_disk(likelihood, tmp_path):
    vae, (x, mask) = made(likelihood), data()
    other = assert_comes_back(vae, tmp_path / "saved")
    assert torch.equal(other.impute(x, mask, 10), vae.impute(x, mask, 10))


def test_nan_become_a_mask():
    x = torch.tensor([[10.5, math.nan], [math.nan, 20.0]])
    filled, mask = MaskedVAE.from_nan(x)
    assert mask.tolist() == [[True, False], [False, True]]
    assert filled.tolist() == [[10.5, 15.25], [15.25, 20.0]]
    assert MaskedVAE.from_nan(torch.tensor([1.0, math.nan]).numpy())[0].tolist() == [1.0, 0.0]
    with pytest.raises(pvae.DataError, match="infinite"):
        MaskedVAE.from_nan(torch.tensor([math.inf]))
    with pytest.raises(pvae.DataError, match="floating-point"):
        MaskedVAE.from_nan(torch.tensor([1]))


def test_fit_names_the_way_for_data_with_nan():
    vae, (x, mask) = made("gaussian"), data()
    with pytest.raises(pvae.DataError, match="from_nan"):
        pvae.fit(vae.model, vae.guide, (torch.where(mask, x, math.nan), mask), progress=False)


def test_real_data_are_seen_in_their_units():
    vae, (x, mask) = made("gaussian"), data(400)
    x, mask = MaskedVAE.from_nan(torch.where(mask, 1000.5 + 50 * x, math.nan))
    pvae.fit(vae.model, vae.guide, (x, mask), epochs=1, progress=False)
    assert vae.view.mean.item() == pytest.approx(1025, abs=5)


def test_wrong_arguments_are_named():
    vae, (x, mask) = made(), data()
    for wrong, match in ((mask[:, :1], "shape of x"), (mask * 2.0, "True or 1"), (mask[:3], "shape of x")):
        for call in (vae.model, vae.guide, vae.encode, vae.impute):
            with pytest.raises(pvae.DataError, match=match):
                call(x, wrong)
    with pytest.raises(pvae.DataError, match="support"):
        vae.model(x + 0.5, torch.ones_like(mask))
    for options in ({"num_samples": 0}, {"draws": 0}):
        with pytest.raises(pvae.ArgumentError, match=next(iter(options))):
            vae.impute(x, mask, **options)


class Correlated(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Linear(2, 3)

    def forward(self, z):
        return dist.MultivariateNormal(self.network(z), torch.eye(3))


def test_entries_that_are_not_independent_are_refused():
    encoder = posteriors.DiagonalNormal(networks.mlp(6, [], 4))
    with pytest.raises(pvae.ProgramError, match="independent entries"):
        MaskedVAE(priors.StandardNormal(2), Correlated(), encoder)
    with pytest.raises(pvae.ProgramError, match="encoder"):
        MaskedVAE(priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(2, [], 4)), encoder)
