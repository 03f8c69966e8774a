"""Gradients of the objectives, on a pair whose ELBO is known: their mean, their noise, and what the KL weight does."""

from __future__ import annotations

import math

import pytest
import torch
from pairs import RowGaussian

from pvae import objectives as of
from pvae.svi import losses

ROWS = 20_000
ELBOS = {
    "ELBO": of.ELBO(),
    "ELBO, particles": of.ELBO(2),
    "MeanFieldELBO": of.MeanFieldELBO(),
    "StickingTheLanding": of.StickingTheLanding(),
    "StickingTheLanding, particles one by one": of.StickingTheLanding(2, vectorize_particles=False),
    "ScoreFunction": of.ScoreFunction(),
    "ScoreFunction, baseline": of.ScoreFunction(3, has_baseline=True),
    "IWAE of one": of.IWAE(1),
    "DReG of one": of.DReG(1),
}


def gradients(objective, offset=0.1, beta=None, rows=ROWS):
    """Draws of the gradient of one datum's loss, shape ``(rows, parameters)``: of phi, 5, and of theta, 10."""
    pair = RowGaussian(rows, offset)
    weight = None if beta is None else torch.tensor(beta, dtype=torch.float64)
    torch.manual_seed(0)
    losses.loss_and_grads(objective, pair.model, pair.guide, (pair.x,), weight)
    return torch.cat([pair.phi.grad, pair.theta.grad], 1)


def assert_same_mean(draws, other):
    """Within 5 standard errors: a right program fails for one of 15 entries with a probability below 1e-5."""
    exact = other.dim() == 1
    variance = draws.var(0) / len(draws) + (0 if exact else other.var(0) / len(other))
    difference = draws.mean(0) - (other if exact else other.mean(0))
    assert (difference.abs() <= 5 * variance.sqrt() + 1e-10).all()


def exact_gradient(offset=0.1, beta=1.0):
    pair = RowGaussian(1, offset)
    phi, theta = (p.detach()[0].requires_grad_() for p in (pair.phi, pair.theta))
    return -torch.cat(torch.autograd.grad(pair.elbo(phi, theta, beta), (phi, theta)))


def test_the_closed_form_is_the_oracles():
    pair = RowGaussian(1)
    assert pair.elbo(pair.phi[0], pair.theta[0]).item() == pytest.approx(pair.oracle.log_px(pair.row).item(), abs=1e-10)


@pytest.mark.parametrize("name", ELBOS)
def test_the_mean_is_the_exact_gradient(name):
    assert_same_mean(gradients(ELBOS[name]), exact_gradient())


@pytest.mark.parametrize("name", [name for name in ELBOS if "of one" not in name])
def test_a_kl_weight_weighs_the_divergence_from_the_prior(name):
    assert_same_mean(gradients(ELBOS[name], beta=0.3), exact_gradient(beta=0.3))


@pytest.mark.parametrize("beta", [None, 0.3])
def test_both_gradients_of_the_importance_weighted_bound_have_one_mean(beta):
    plain = gradients(of.IWAE(4), offset=0.3, beta=beta)
    assert_same_mean(gradients(of.DReG(4), offset=0.3, beta=beta), plain)
    assert_same_mean(gradients(of.DReG(4, vectorize_particles=False), offset=0.3, beta=beta), plain)
    assert_same_mean(gradients(of.Renyi(0.0, 4), offset=0.3, beta=beta), plain)
    difference = (plain.mean(0) - exact_gradient(0.3, beta or 1.0)).abs() / (plain.var(0) / ROWS).sqrt()
    assert difference.max() > 20  # another bound than the ELBO


def test_many_particles_gradient_is_that_of_log_px():
    """Where log w hardly varies, the bound of 50 particles is log p(x) within Var(w) / 100, far below the noise."""
    pair = RowGaussian(1)
    theta = pair.theta.detach()[0].requires_grad_()
    marginal = torch.distributions.MultivariateNormal(theta, pair.oracle._marginal().covariance_matrix)
    exact = -torch.autograd.grad(marginal.log_prob(pair.row[0]), theta)[0]
    assert_same_mean(gradients(of.IWAE(50), offset=0.01, rows=2000)[:, 5:], exact)


def test_variances_are_ordered():
    """Near the optimum: the score function's is above reparameterization's by far, and that above what has none."""
    score, plain, path = (
        gradients(objective, offset=0.02)[:, :5].var(0).sum()
        for objective in (of.ScoreFunction(), of.ELBO(), of.StickingTheLanding())
    )
    assert score > 10 * plain > 100 * path
    with_baseline = gradients(of.ScoreFunction(2, has_baseline=True), offset=0.02)[:, :5].var(0).sum()
    assert with_baseline < gradients(of.ScoreFunction(2), offset=0.02)[:, :5].var(0).sum() / 3


@pytest.mark.parametrize("objective", [of.StickingTheLanding(), of.StickingTheLanding(3), of.DReG(3)])
def test_at_the_posterior_no_noise_is_left(objective):
    """Also where a latent depends on another one, whose draw must keep its part in q(b|a)."""
    assert gradients(objective, offset=0.0, rows=100)[:, :5].abs().max() < 1e-10
    assert gradients(of.ELBO(), offset=0.0, rows=100)[:, :5].abs().max() > 0.1


def test_the_signal_drowns_in_noise_unless_doubly_reparameterized():
    """Of the guide's gradient, as sqrt(K) either way: 4 in theory from K = 4 to 64; measured within about 10%."""

    def signal_to_noise(objective):
        draws = gradients(objective, offset=0.1)[:, :5]
        return (draws.mean(0).norm() / draws.var(0).sum().sqrt()).item()

    plain, doubly = ([signal_to_noise(kind(k)) for k in (4, 64)] for kind in (of.IWAE, of.DReG))
    assert plain[1] < plain[0] / 2
    assert doubly[1] > 0.95 * doubly[0]


@pytest.mark.parametrize("objective", [of.ELBO(3), of.IWAE(3), of.Renyi(0.5, 3), of.Renyi(-1.0, 3), of.DReG(3)])
def test_with_the_posterior_every_bound_is_log_px(objective):
    """So each datum weighs alike in batches of any size."""
    pair = RowGaussian(1)
    x = pair.oracle.sample(10)
    for rows in (x, x[:7], x[7:]):
        loss = objective(pair.oracle.model, pair.oracle.guide, rows)
        assert loss.item() == pytest.approx(-pair.oracle.log_px(rows).sum().item(), rel=1e-9)


def test_bounds_rise_with_particles_and_fall_with_the_order():
    pair = RowGaussian(ROWS, 0.3)
    with torch.no_grad():
        values = [
            -objective(pair.model, pair.guide, pair.x).item() / ROWS
            for objective in (of.ELBO(), of.Renyi(0.5, 4), of.IWAE(4), of.IWAE(64))
        ]
    exact = pair.oracle.log_px(pair.row).item()
    assert values == sorted(values)
    assert values[0] == pytest.approx(pair.elbo(pair.phi[0], pair.theta[0]).item(), abs=0.1)  # sd / sqrt(rows): 0.01
    assert values[-1] < exact + 0.01
    assert math.isclose(values[-1], exact, abs_tol=0.1)
