"""`log_evidence` on pairs whose log p(x) is exact.

Statistical tests have fixed seeds. Where a bound is K sigma of a statistic that is normal to good accuracy, the chance
that a right program fails under another seed is below 1e-6 for 5 sigma.
"""

from __future__ import annotations

from functools import partial

import helpers
import pytest
import torch

import pvae
from pvae.evidence import proposals
from pvae.testing import linear_gaussian

evidence = partial(helpers.evidence, num_samples=1000)


def z_scores(estimate, exact):
    return (estimate.log_px - exact) / estimate.std_error


@pytest.mark.parametrize("latent_dim, shift, scale", [(2, 0.4, 1.3), (10, 0.2, 1.1), (50, 0.1, 1.05)])
def test_guide_estimates_the_exact_log_px(latent_dim, shift, scale):
    """100 data: the share within 4 standard errors is 0.9999 where the errors are honest; 95% are asked for."""
    oracle = linear_gaussian(latent_dim, 20, guide_shift=shift, guide_scale=scale)
    x = oracle.sample(100)
    estimate = evidence(oracle, x, num_samples=1000)
    z = z_scores(estimate, oracle.log_px(x))
    assert (estimate.khat < 0.7).all()
    assert (z.abs() < 4).double().mean() >= 0.95
    # The scores are close to N(0, 1): a dropped 1/K or a wrong sign moves them by hundreds. sd of a mean of 100: 0.1.
    assert abs(z.mean()) < 5 * 0.1
    assert z.std() == pytest.approx(1, abs=5 * 0.07)


def test_prior_estimates_the_exact_log_px_where_that_is_possible():
    oracle = linear_gaussian(1, 2, noise=1.0)
    x = oracle.sample(400)
    estimate = evidence(oracle, x, num_samples=1000, proposal="prior")
    z = z_scores(estimate, oracle.log_px(x))[estimate.khat < 0.5]
    assert len(z) > 300
    assert (z.abs() < 5.5).all()  # 400 normal scores, whether or not they are correlated: 2e-5
    assert estimate.shared_draws


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-7), (torch.float32, 1e-4)])
@pytest.mark.parametrize("latent_dim", [2, 10, 50])
def test_an_exact_guide_has_no_variance(latent_dim, dtype, error):
    oracle = linear_gaussian(latent_dim, 20, dtype=dtype)
    x = oracle.sample(50)
    estimate = evidence(oracle, x, num_samples=100)
    assert (estimate.std_error < error).all()
    assert (estimate.khat == -torch.inf).all()
    assert not estimate.unreliable.any()
    torch.testing.assert_close(estimate.log_px, oracle.log_px(x).double(), rtol=0, atol=20 * error)


def test_elbo_is_below_iwae_is_below_log_px_and_both_are_right():
    """In the mean over 2,000 data, ELBO <= IWAE_k <= log p(x), and the ELBO is the exact one to 5 sigma."""
    oracle = linear_gaussian(3, 6, guide_shift=0.5, guide_scale=1.3)
    x = oracle.sample(2000)
    bounds = [evidence(oracle, x, num_samples=k, seed=k).mean for k in (1, 5, 50)]
    estimate = evidence(oracle, x, num_samples=50)
    exact, elbo = oracle.log_px(x).mean().item(), oracle.elbo(x).mean().item()
    assert elbo < bounds[1] < bounds[2] < exact + 5 * estimate.mean_std_error
    error = estimate.elbo_std_error.norm().item() / len(x)
    assert estimate.elbo.mean().item() == pytest.approx(elbo, abs=5 * error)
    assert bounds[0] == pytest.approx(elbo, abs=5 * error * 50**0.5)


def test_the_mean_of_p_hat_is_p():
    """p-hat is unbiased on the linear scale: 10,000 replicates of K = 5 at one datum, 5 sigma of their mean."""
    oracle = linear_gaussian(2, 3, guide_shift=0.3, guide_scale=1.2)
    x = oracle.sample(1)
    ratio = (evidence(oracle, x.expand(10_000, 3), num_samples=5).log_px - oracle.log_px(x)).exp()
    assert ratio.mean().item() == pytest.approx(1, abs=5 * ratio.std().item() / 100)


def test_the_error_of_the_mean_is_right():
    """100 replicates of a mean over 20 data: the sd of their scores is 1 to 5 sigma, that is to 0.35."""
    oracle = linear_gaussian(2, 3, guide_shift=0.3, guide_scale=1.2)
    x = oracle.sample(20)
    exact = oracle.log_px(x).mean().item()
    estimates = [evidence(oracle, x, num_samples=100, seed=s) for s in range(100)]
    scores = torch.tensor([(e.mean - exact) / e.mean_std_error for e in estimates])
    assert scores.std() == pytest.approx(1, abs=0.35)


def test_intervals_cover():
    """The share of 2,000 data that a 95% interval covers has sd 0.005; 5 sigma."""
    oracle = linear_gaussian(2, 5, guide_shift=0.5, guide_scale=1.2)
    x = oracle.sample(2000)
    lower, upper = evidence(oracle, x, num_samples=500).interval(0.95)
    covered = (lower < oracle.log_px(x)) & (oracle.log_px(x) < upper)
    assert covered.double().mean() == pytest.approx(0.95, abs=0.025)


def test_a_narrow_guide_is_flagged_and_its_interval_withheld():
    oracle = linear_gaussian(10, 20, guide_scale=0.4)
    estimate = evidence(oracle, oracle.sample(50), num_samples=1000)
    assert estimate.unreliable.double().mean() > 0.9
    lower, upper = estimate.interval()
    assert lower[estimate.unreliable].isnan().all()
    assert upper[estimate.unreliable].isnan().all()
    assert "unreliable (k-hat > 0.7)" in str(estimate)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"num_samples": -3}, "num_samples"),
        ({"num_samples": 2.5}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"proposal": "posterior"}, "proposal must be one of 'auto', 'guide', 'prior'.*; got 'posterior'"),
        ({"proposal": proposals.Prior}, "class Prior: make one"),
        ({"proposal": None}, "proposal must be one of 'auto', 'guide'.*or a Pyro guide; got None"),
        ({"seed": -1}, "seed"),
        ({"device": "tpu7"}, "device"),
        ({"data": torch.zeros(0, 6)}, "data is empty"),
        ({"data": torch.full((3, 6), torch.nan)}, "18 nan"),
        ({"data": torch.zeros(3, 7)}, r"\(N, 6\)"),
        ({"data": torch.full((3, 6), 0.3)}, "Bernoulli.*'dynamic'"),
        ({"data": torch.cat([torch.zeros(50, 6), torch.full((1, 6), 255.0)])}, "site 'x'.*255"),
    ],
)
def test_bad_input_is_named(options, match, small_vae, bits):
    options = {"data": bits, **options}
    with pytest.raises(pvae.PVAEError, match=match):
        pvae.log_evidence(small_vae.model, small_vae.guide, **options)
