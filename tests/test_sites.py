"""Observed sites: data outside of their support, and numbers of a kind that their densities do not take."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.distributions import constraints

import pvae
from pvae.errors import DataError
from pvae.runtime.sites import check_support, check_supports, observed_data


@pytest.mark.parametrize(
    "distribution, value",
    [
        (dist.Bernoulli(0.5), 0.5),
        (dist.Bernoulli(torch.full((3,), 0.5)).to_event(1).expand([2]), 255.0),
        (dist.Bernoulli(0.5).mask(True), -1.0),
        (dist.Poisson(1.0), 1.5),
        (dist.Exponential(1.0), -0.1),
        (dist.Beta(1.0, 1.0), 2.0),
    ],
)
def test_values_outside_the_support_are_refused(distribution, value):
    x = torch.ones(2, 3)
    x[1, 2] = value
    with pytest.raises(DataError, match=rf"site 'obs' .* 16\.667% .* example {value:g}"):
        check_support("obs", distribution, x)


@pytest.mark.parametrize("distribution", [dist.Bernoulli(0.5), dist.Normal(0.0, 1.0), dist.Poisson(1.0)])
def test_values_inside_the_support_pass(distribution):
    check_support("obs", distribution, torch.tensor([0.0, 1.0]))


def test_all_data_are_checked_not_only_the_batch():
    data = torch.zeros(100, 4)
    data[99, 3] = 0.5
    batch = (data[:10],)
    site = {"type": "sample", "is_observed": True, "value": data[:10].reshape(10, 2, 2), "fn": dist.Bernoulli(0.5)}
    with pytest.raises(DataError, match="site 'x'"):
        check_supports(observed_data({"x": site}, batch), (data,))
    assert not observed_data({"x": site | {"is_observed": False}}, batch)
    assert not observed_data({"x": site | {"value": 1 - data[:10]}}, batch)  # the model changed its data: its affair


class ComplexNormal(dist.TorchDistribution):
    """A circular normal distribution of complex numbers, as somebody may have written it."""

    support = constraints.real
    arg_constraints: ClassVar = {}

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value):
        return -math.log(math.pi) - (value - self.loc).abs().square()

    def expand(self, batch_shape, _instance=None):
        return ComplexNormal(self.loc.expand(batch_shape))


def complex_pair(observe):
    def model(x):
        w = pyro.param("w", torch.ones(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            observe(w * z, x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.real[:, :1], 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("estimate", [pvae.log_evidence, partial(pvae.fit, epochs=1, progress=False)])
def test_complex_data_under_a_real_density_are_refused_by_name(estimate):
    """Before, the estimate was that of the real part, and training ended in an error of torch's."""
    x = torch.randn(6, 4, dtype=torch.complex64)
    pair = complex_pair(lambda z, x: pyro.sample("x", dist.Normal(z * torch.ones(4), 1.0).to_event(1), obs=x))
    with pytest.raises(pvae.DataError, match=r"site 'x', Normal, takes real .*complex64.*view_as_real"):
        estimate(*pair, x)
    vae = pvae.VAE.mlp(4, 2, [8], likelihood="gaussian")
    with pytest.raises(pvae.DataError, match=r"x takes real numbers.*view_as_real"):
        estimate(vae.model, vae.guide, x)


def test_complex_data_that_a_program_makes_real_or_has_a_density_for_are_taken():
    """Of N(0, 1) latents, log p(x) with a circular normal of variance 1 around them is checked on a grid."""
    x = torch.randn(3, 1, dtype=torch.complex64)
    direct = complex_pair(lambda z, x: pyro.sample("x", ComplexNormal(z + 0j).to_event(1), obs=x))
    parts = complex_pair(
        lambda z, x: pyro.sample(
            "x", dist.Normal(torch.cat([z, 0 * z], -1), 0.5**0.5).to_event(1), obs=torch.view_as_real(x)[:, 0]
        )
    )
    z = torch.linspace(-8, 8, 4001)
    exact = torch.trapezoid((dist.Normal(0.0, 1.0).log_prob(z) + ComplexNormal(z + 0j).log_prob(x)).exp(), z).log()
    for pair in (direct, parts):
        with pytest.warns(UserWarning, match="initial values"):
            estimate = pvae.log_evidence(*pair, x, num_samples=5000)
        assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error).all()  # 3 numbers: fails with 2e-6
