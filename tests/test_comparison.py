"""Two models of the same data: differences of log p with errors, against exact ones."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.testing import linear_gaussian


def regression(dim, x, y, noise=0.5):
    """A regression on the first columns of x with its exact posterior, made wider, as the guide; and its log p(y)."""
    x = x[:, :dim]
    precision = torch.eye(dim) + x.T @ x / noise**2
    scale_tril = torch.linalg.cholesky(torch.linalg.inv(precision))
    loc = torch.linalg.solve(precision, x.T @ y / noise**2)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((w * x).sum(-1), noise), obs=y)

    def guide(y):
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=1.2 * scale_tril))

    covariance = (x @ x.T + noise**2 * torch.eye(len(y))).double()
    exact = dist.MultivariateNormal(torch.zeros(len(y)).double(), covariance).log_prob(y.double()).item()
    return model, guide, exact


def test_the_bayes_factor_of_nested_regressions_is_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator)
    y = x[:, 0] - 0.4 * x[:, 2] + 0.5 * torch.randn(30, generator=generator)
    (model, guide, exact), (smaller, its_guide, less) = (regression(dim, x, y) for dim in (3, 1))
    a = pvae.log_evidence(model, guide, y, num_samples=2000, seed=0)
    b = pvae.log_evidence(smaller, its_guide, y, num_samples=2000, seed=1)
    comparison = pvae.compare(a, b)
    assert comparison.is_joint
    assert abs(comparison.difference - (exact - less)) < 4 * comparison.std_error
    assert comparison.std_error == pytest.approx(math.hypot(a.std_error.item(), b.std_error.item()))
    low, high = comparison.interval()
    assert low < exact - less < high
    assert high - low < 8 * comparison.std_error
    back = pvae.compare(b, a)
    assert back.interval() == pytest.approx((-high, -low))
    assert "log p_a(data) - log p_b(data) of 30 data together" in repr(comparison)


def test_models_of_each_datum_are_compared_pairwise():
    """The data scatter far more than the difference between two models of them."""
    torch.manual_seed(0)
    oracle = linear_gaussian(2, 5, guide_shift=0.2)
    other = linear_gaussian(2, 5, noise=1.1)
    x = oracle.sample(100)
    a, b = (
        pvae.log_evidence(p.model, p.guide, x, num_samples=500, seed=seed) for seed, p in enumerate((oracle, other))
    )
    comparison, exact = pvae.compare(a, b), oracle.log_px(x) - other.log_px(x)
    assert abs(comparison.difference - exact.mean().item()) < 4 * comparison.std_error + 1e-5
    assert comparison.data_std_error == pytest.approx(exact.std().item() / 10, rel=0.2)
    assert "over 100 data" in repr(comparison)
    assert "from the choice of data" in repr(comparison)


def test_an_interval_is_withheld_where_one_of_two_is():
    oracle = linear_gaussian(2, 5)
    x = oracle.sample(20)
    good, few = (pvae.log_evidence(oracle.model, oracle.guide, x, num_samples=k) for k in (100, 10))
    comparison = pvae.compare(good, few)
    assert comparison.withheld.startswith("b: k-hat needs at least 25 samples")
    assert all(map(math.isnan, comparison.interval()))
    assert "withheld: b:" in repr(comparison)


def test_what_is_not_of_the_same_data_is_refused():
    oracle = linear_gaussian(2, 5)
    x = oracle.sample(20)
    a, b = (pvae.log_evidence(oracle.model, oracle.guide, part, num_samples=30) for part in (x, x[:10]))
    with pytest.raises(pvae.ArgumentError, match="of 20 and of 10 data"):
        pvae.compare(a, b)
    model, guide, _ = regression(1, torch.ones(20, 1), torch.zeros(20))
    joint = pvae.log_evidence(model, guide, torch.zeros(20), num_samples=30)
    with pytest.raises(pvae.ArgumentError, match="'b' is of all data together and 'a' of each datum"):
        pvae.compare(a, joint)
    with pytest.raises(pvae.ArgumentError, match=r"b must be what pvae\.log_evidence returns"):
        pvae.compare(a, 3.0)  # type: ignore[arg-type]
