"""Plates that are not the data's: around a call they are refused, around data that do not vary along them they warn."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.testing import linear_gaussian


@pytest.fixture
def oracle():
    return linear_gaussian(2, 3)


@pytest.mark.parametrize("dim", [None, -2, -4])
def test_a_plate_around_the_call_is_refused(oracle, small_vae, bits, dim):
    """Before, log p(x) came out 5 times as large."""
    with pyro.plate("outer", 5, dim=dim), pytest.raises(pvae.ProgramError, match=r"plate\('outer', 5\).*5 times"):
        pvae.log_evidence(oracle.model, oracle.guide, oracle.sample(8))
    with pyro.plate("outer", 5, dim=dim), pytest.raises(pvae.ProgramError, match=r"plate\('outer', 5\).*5 times"):
        pvae.fit(small_vae.model, small_vae.guide, bits, epochs=1, progress=False)


def test_a_loop_over_a_plate_changes_nothing(oracle):
    x = oracle.sample(8)
    for _ in pyro.plate("runs", 2):
        estimate = pvae.log_evidence(oracle.model, oracle.guide, x, proposal="guide")
        torch.testing.assert_close(estimate.log_px, oracle.log_px(x))


def within(program, size):
    def inside(x):
        with pyro.plate("copies", size, dim=-2):
            program(x)

    return inside


def test_data_that_do_not_vary_along_a_plate_warn(oracle):
    x = oracle.sample(8)
    with pytest.warns(UserWarning, match=r"plate 'copies' makes log p\(x\|z\) 4 times as large.*site 'x'"):
        estimate = pvae.log_evidence(within(oracle.model, 4), within(oracle.guide, 4), x)
    torch.testing.assert_close(estimate.log_px, 4 * oracle.log_px(x))  # as in Pyro


def test_latents_that_only_one_program_repeats_are_refused(oracle):
    x = oracle.sample(8)

    model = within(oracle.model, 4)
    for proposal in ("guide", "refined"):
        with pytest.raises(pvae.ProgramError, match=r"site 'z' has shape \(4, 2, 2\) in the model"):
            pvae.log_evidence(model, oracle.guide, x, proposal=proposal)


@pytest.mark.parametrize("proposal", ["guide", "refined"])
def test_plates_left_and_right_of_the_data_go_on_working(proposal):
    """Parts to the left of the data, entries to the right: x_np = z_n + y_np + noise, with y a latent of each part."""

    def model(x):
        data, parts = pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2)
        with data:
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            with parts:
                y = pyro.sample("y", dist.Normal(x.new_tensor(0.0), 0.5))
                pyro.sample("x", dist.Normal(z + y, 0.5), obs=x.T)

    def guide(x):
        data, parts = pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2)
        with data:
            z = pyro.sample("z", dist.Normal(0.8 * x.mean(-1), 0.5))
            with parts:
                pyro.sample("y", dist.Normal((x.T - z) / 2, 0.4))

    x = torch.randn(10, 3, dtype=torch.float64)
    covariance = torch.ones(3, 3, dtype=torch.float64) + 0.5 * torch.eye(3, dtype=torch.float64)
    exact = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)
    estimate = pvae.log_evidence(model, guide, x, proposal=proposal, num_samples=2000, compile=False)
    # 5 standard errors fail with 6e-7 for each of 10 data; a Gaussian that is fitted is exact, but for rounding.
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error + 1e-12).all()
