"""A reference by two routes, against exact answers."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.evidence import reference
from pvae.testing import linear_gaussian


@pytest.fixture(scope="module")
def known():
    oracle = linear_gaussian(4, 8, guide_shift=0.8, guide_scale=0.9)
    x = oracle.sample(40)
    return reference(oracle.model, oracle.guide, x, num_chains=30, temperatures=10, num_simulated=20), oracle.log_px(x)


def test_both_routes_and_their_mean_are_right(known):
    found, exact = known
    for values, errors in (
        (found.log_px, found.std_error),
        (found.drawn.corrected, found.drawn.std_error),
        (found.annealed.corrected, found.annealed.std_error),
    ):
        # 40 data within 5 errors, an exceedance of 6e-7 each; what is exact has errors of rounding.
        assert ((values - exact).abs() <= 5 * errors + 1e-3).all()
    assert (found.std_error <= torch.minimum(found.drawn.std_error, found.annealed.std_error) + 1e-12).all()
    assert found.agree.double().mean() >= 0.9
    assert found.mean == pytest.approx(exact.mean().item(), abs=5 * found.mean_std_error + 1e-3)


def test_it_says_how_far_the_routes_agree(known):
    found, _ = known
    assert found.bracket is not None
    assert found.bracket.gap > -0.1
    for word in ("drawn", "annealed", "difference", "agreement", "both ways"):
        assert word in repr(found)


def test_an_unresolved_route_does_not_count():
    """A guide that is far off, and chains that are too few to lead back."""
    oracle = linear_gaussian(3, 6)
    x = oracle.sample(8)
    found = reference(oracle.model, oracle.guide, x, num_chains=5, temperatures=2, num_simulated=0)
    assert found.bracket is None
    assert found.annealed.unresolved.all()  # no k-hat of 5 chains
    torch.testing.assert_close(found.log_px, found.drawn.corrected)
    assert not found.agree.any()


def test_without_a_model_to_simulate_from_it_says_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x + 1.0)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 1.0) / 2, 0.7))

    with pytest.raises(pvae.ProgramError, match="cannot simulate data"):
        reference(model, guide, torch.randn(5))
    assert reference(model, guide, torch.randn(5), num_simulated=0, num_chains=30, temperatures=5).agree.all()
