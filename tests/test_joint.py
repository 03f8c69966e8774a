"""Pairs whose data have one log p(data) together: latents outside of a data plate, and Pyro's automatic guides."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from helpers import make_loader
from pyro import distributions as dist
from pyro.infer import autoguide as auto

import pvae

GENERATOR = torch.Generator().manual_seed(0)


class Regression:
    """Bayesian linear regression with known noise, and its exact posterior as the guide."""

    def __init__(self, dim, num_data=40, noise=0.5):
        self.dim, self.noise = dim, noise
        self.x = torch.randn(num_data, dim, generator=GENERATOR) / dim**0.5
        self.y = self.x @ torch.randn(dim, generator=GENERATOR) + noise * torch.randn(num_data, generator=GENERATOR)
        self.data = self.x, self.y
        precision = torch.eye(dim) + self.x.T @ self.x / noise**2
        self.scale_tril = torch.linalg.cholesky(torch.linalg.inv(precision))
        self.loc = torch.linalg.solve(precision, self.x.T @ self.y / noise**2)

    @property
    def log_py(self):
        covariance = (self.x @ self.x.T + self.noise**2 * torch.eye(len(self.y))).double()
        return dist.MultivariateNormal(torch.zeros(len(self.y)).double(), covariance).log_prob(self.y.double()).item()

    def model(self, x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(self.dim), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((w * x).sum(-1), self.noise), obs=y)

    def guide(self, x, y):
        pyro.sample("w", dist.MultivariateNormal(self.loc, scale_tril=1.1 * self.scale_tril))


def within(estimate, exact, errors=4):
    assert estimate.is_joint
    assert estimate.log_px.shape == (1,)
    assert abs(estimate.corrected.item() - exact) < errors * estimate.std_error.item() + 1e-3


def test_latents_outside_of_the_plate_have_one_log_p_of_all_data():
    regression = Regression(3)
    estimate = pvae.log_evidence(regression.model, regression.guide, regression.data, num_samples=500)
    within(estimate, regression.log_py)
    assert estimate.num_together == 40
    assert "log p(data) of 40 data together, 500 samples from the guide" in repr(estimate)
    kept = pvae.log_weights(regression.model, regression.guide, regression.data, num_samples=500)
    assert kept.shape == (500, 1)
    assert (kept.logsumexp(0) - estimate.log_px).item() == pytest.approx(math.log(500))


def test_an_automatic_guide_is_looked_at_on_all_data():
    regression = Regression(3)
    guide = auto.AutoNormal(regression.model)
    with pytest.warns(UserWarning, match=r"the guide, AutoNormal, was run for the first time"):
        estimate = pvae.log_evidence(regression.model, guide, regression.data, proposal="laplace", num_samples=100)
    within(estimate, regression.log_py)


def test_data_that_are_read_are_to_be_passed_in_memory():
    regression = Regression(3)
    stream = make_loader(list(zip(*regression.data, strict=True)))
    with pytest.raises(pvae.ProgramError, match=r"read as a stream.* pass them in memory"):
        pvae.log_evidence(regression.model, regression.guide, stream)
