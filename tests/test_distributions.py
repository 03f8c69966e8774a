"""Densities of our own against 150 digits, finite differences, sums and integrals, and their own draws."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from pyro import distributions as dist
from scipy import integrate, stats
from torch.autograd import gradcheck, gradgradcheck

from pvae.distributions import (
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Grid,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from pvae.errors import ArgumentError

LOGITS = [0.0, 1e-30, -1e-4, 0.01, 0.1, -0.3, 0.499, 0.5, -0.501, 1.0, -2.0, 5.0, 16.0, -17.0, 100.0, -1e3, 1e5]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(150):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_is_exact_to_rounding(logit, dtype):
    """Density, slope, curvature, normalizer and moments; a rounding or two of each, and 200 of a variance near 1/2."""
    logits = torch.tensor(logit, dtype=dtype, requires_grad=True)
    px, eps, natural = ContinuousBernoulli(logits), torch.finfo(dtype).eps, mpmath.mpf(logits.item())
    normalizer = mpmath.log(mpmath.expm1(natural) / natural) if natural else mpmath.mpf(0)
    mean = 1 / (1 - mpmath.exp(-natural)) - 1 / natural if natural else mpmath.mpf(0.5)
    variance = (
        1 / natural**2 - mpmath.exp(-abs(natural)) / (1 - mpmath.exp(-abs(natural))) ** 2
        if natural
        else 1 / mpmath.mpf(12)
    )
    assert abs(px.log_normalizer().item() - normalizer) <= 2 * eps * (1 + abs(natural))
    assert abs(px.mean.item() - mean) <= 4 * eps * mean
    assert abs(px.variance.item() - variance) <= 200 * eps * variance
    for x in (0.0, 0.1, 0.5, 0.99999, 1.0):
        value = torch.tensor(x, dtype=dtype)
        exact = natural * mpmath.mpf(value.item()) - normalizer
        log_prob = px.log_prob(value)
        (slope,) = torch.autograd.grad(log_prob, logits, create_graph=True)
        (bend,) = torch.autograd.grad(slope, logits)
        assert abs(log_prob.item() - exact) <= 2 * eps * (1 + abs(exact))
        assert abs(slope.item() - (value.item() - mean)) <= 6 * eps
        assert abs(bend.item() + variance) <= 200 * eps * variance


@pytest.mark.parametrize("logit", [-40.0, -0.3, 0.0, 0.6, 900.0])
def test_continuous_bernoulli_integrates_to_one(logit):
    px = ContinuousBernoulli(torch.tensor(logit, dtype=torch.float64))
    points = [0.001, 0.01, 0.1, 0.9, 0.99, 0.999]
    total, _ = integrate.quad(
        lambda x: px.log_prob(torch.tensor(x, dtype=torch.float64)).exp().item(), 0, 1, points=points
    )
    assert total == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("logit", [-300.0, -3.0, 1e-9, 0.0, 0.4, 0.6, 50.0])
def test_continuous_bernoulli_draws_follow_its_density(logit):
    """Kolmogorov and Smirnov's test against the distribution function; each of 7 fails with 1e-6."""
    x = ContinuousBernoulli(torch.tensor(logit)).sample((10_000,)).double().numpy()
    # F of -|l| has no large numbers, and 1 - x has F of l for x of -l.
    y, t = (1 - x, logit) if logit > 0 else (x, -logit)
    decayed = -np.expm1(-t * y) / -np.expm1(-t) if t else y
    assert ((x >= 0) & (x <= 1)).all()
    assert stats.kstest(decayed, "uniform").pvalue > 1e-6


def test_slopes_of_a_continuous_bernoulli_by_finite_differences():
    logits = torch.tensor([-30.0, -0.50001, -0.2, 0.0, 1e-3, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    x = torch.linspace(0.1, 0.9, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p, x: ContinuousBernoulli(p).log_prob(x), (logits, x))
    assert gradgradcheck(lambda p: ContinuousBernoulli(p).log_prob(x.detach()), (logits,))
    assert gradcheck(lambda p: ContinuousBernoulli(p).mean, (logits,))


# --- the discretized logistic ---------------------------------------------------------------------------------------


def exact_level(loc: float, scale: float, k: int, num_levels: int):
    """log p of a level, from whichever tail leaves the digits."""
    loc, scale, top = mpmath.mpf(loc), mpmath.mpf(scale), num_levels - 1
    low = (mpmath.mpf(2 * k - 1) / (2 * top) - loc) / scale
    high = (mpmath.mpf(2 * k + 1) / (2 * top) - loc) / scale
    if low > 0:
        low, high, first, last = -high, -low, k == top, k == 0
    else:
        first, last = k == 0, k == top
    sigmoid = lambda t: 1 / (1 + mpmath.exp(-t))  # noqa: E731
    return mpmath.log((mpmath.mpf(1) if last else sigmoid(high)) - (mpmath.mpf(0) if first else sigmoid(low)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_levels", [2, 17, 256, 2**16])
@pytest.mark.parametrize("scale", [3e-4, 0.01, 0.3, 1e3])
def test_discretized_logistic_is_exact_to_rounding(num_levels, scale, dtype):
    """Also 10,000 scales away. x itself is rounded, by eps, and that is eps / scale of what it is divided by."""
    eps = torch.finfo(dtype).eps
    for loc in (-3.0, 0.0, 0.5, 1.0, 40.0):
        m, s = torch.tensor(loc, dtype=dtype), torch.tensor(scale, dtype=dtype)
        for k in {0, 1, num_levels // 2, num_levels - 2, num_levels - 1}:
            x = torch.tensor(float(k), dtype=dtype) / (num_levels - 1)
            log_prob = DiscretizedLogistic(m, s, num_levels).log_prob(x).item()
            exact = exact_level(m.item(), s.item(), k, num_levels)
            assert abs(log_prob - exact) <= 4 * eps * (1 + abs(exact) + 1 / scale)


@pytest.mark.parametrize("num_levels", [2, 3, 256, 2**16])
def test_discretized_logistic_sums_to_one_and_has_its_moments(num_levels):
    loc = torch.tensor([-1.0, 0.0, 0.31, 0.5, 1.0, 3.0], dtype=torch.float64)
    scale = torch.tensor([0.3, 1e-3, 0.02, 2.0, 0.1, 0.2], dtype=torch.float64)
    px = DiscretizedLogistic(loc, scale, num_levels)
    x = torch.arange(num_levels, dtype=torch.float64)[:, None] / (num_levels - 1)
    p = px.log_prob(x).exp()
    torch.testing.assert_close(p.sum(0), torch.ones_like(loc), rtol=0, atol=1e-12)
    mean = (p * x).sum(0)
    torch.testing.assert_close(px.mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(px.variance, (p * (x - mean).square()).sum(0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("loc, scale", [(0.4, 0.1), (-0.2, 0.05), (0.5, 1e-3), (1.3, 2.0)])
def test_discretized_logistic_draws_follow_its_density(loc, scale):
    """Chi-squared over levels that are expected 5 times or more and the rest; each of 4 fails with 1e-6."""
    px = DiscretizedLogistic(torch.tensor(loc), torch.tensor(scale), 17)
    x = px.sample((20_000,))
    counts = torch.bincount((x * 16).round().long(), minlength=17).double()
    expected = 20_000 * px.log_prob(torch.arange(17.0) / 16).double().exp()
    often = expected >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    statistic = ((observed - expected).square() / expected.clamp(min=0.01)).sum()
    assert stats.chi2.sf(statistic.item(), int(often.sum())) > 1e-6
    assert px.support.check(x).all()


def test_slopes_of_a_discretized_logistic_by_finite_differences():
    loc = torch.tensor([-2.0, 0.1, 0.5, 0.9, 1.5], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.1, 0.05, 2.0, 0.01, 0.2], dtype=torch.float64, requires_grad=True)
    for k in (0, 1, 100, 255):
        x = torch.full((5,), k / 255, dtype=torch.float64)
        assert gradcheck(lambda m, s, x=x: DiscretizedLogistic(m, s).log_prob(x), (loc, scale))
        assert gradgradcheck(lambda m, s, x=x: DiscretizedLogistic(m, s).log_prob(x), (loc, scale), atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_levels", [2, 17, 256, 2**16])
def test_a_grid_has_all_levels_and_nothing_between(num_levels, dtype):
    levels = torch.arange(num_levels) / torch.tensor(num_levels - 1, dtype=torch.float32)
    grid = Grid(num_levels)
    assert grid.check(levels.to(dtype)).all()
    assert not grid.check(levels.to(dtype) + 0.4 / (num_levels - 1)).any()
    assert not grid.check(torch.tensor([-1.0, 2.0, math.nan, math.inf])).any()


@pytest.mark.parametrize("num_levels", [0, 1, 2.5, True, 2**16 + 1])
def test_impossible_levels_are_refused(num_levels):
    with pytest.raises(ArgumentError, match="num_levels"):
        DiscretizedLogistic(0.0, 1.0, num_levels)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: ContinuousBernoulli(p),
        lambda p: DiscretizedLogistic(p, 0.3, 5),
        lambda p: StudentT(0.5, p, 2.0),
        lambda p: Poisson(p.exp()),
        lambda p: NegativeBinomial(torch.tensor(3.0), logits=p),
        lambda p: Categorical(logits=torch.stack([p, -p], -1)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_ones_are_the_same(make, dtype):
    px = make(torch.randn(3, dtype=dtype))
    wide = px.expand([2, 3])
    assert type(wide) is type(px)
    x = px.sample()
    assert x.dtype == wide.log_prob(x).dtype == wide.mean.dtype == dtype
    assert torch.equal(wide.log_prob(x), px.log_prob(x).expand(2, 3))
    assert torch.equal(wide.mean, px.mean.expand(2, 3))
    assert wide.to_event(1).expand([4, 2]).sample((5,)).shape == (5, 4, 2, 3)


@pytest.mark.parametrize(
    "px, value",
    [
        (ContinuousBernoulli(0.0, validate_args=True), 1.5),
        (DiscretizedLogistic(0.0, 1.0, validate_args=True), 0.5),
    ],
)
def test_values_outside_are_refused_where_they_are_validated(px, value):
    with pytest.raises(ValueError, match="support"):
        px.log_prob(torch.tensor(value))


@pytest.mark.parametrize("size", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("mean", [0.1, 10.0, 1000.0])
def test_counts_and_tails_are_exact_to_rounding_in_float32(mean, size):
    """Against scipy's in float64, to rounding of what comes out; torch's own are off by up to 0.003."""
    k = torch.cat([torch.arange(20.0), torch.tensor([100.0, 1000.0, 3000.0])])
    mean, size = (torch.tensor(value).item() for value in (mean, size))  # as float32 has them
    logits = torch.tensor(mean / size).log()
    found = {
        "poisson": (Poisson(torch.tensor(mean)), stats.poisson.logpmf(k.double(), mean)),
        "negative binomial": (
            NegativeBinomial(torch.tensor(size), logits=logits),
            stats.nbinom.logpmf(k.double(), size, (-logits.double()).sigmoid().item()),
        ),
        "student": (StudentT(size, 0.0, torch.tensor(mean)), stats.t.logpdf(k.double(), size, scale=mean)),
    }
    for name, (px, exact) in found.items():
        error = (px.log_prob(k).double() - torch.as_tensor(exact)).abs()
        assert (error <= 1e-6 * (1 + torch.as_tensor(exact).abs())).all(), name


def test_what_mean_is_where_there_is_no_expectation():
    assert StudentT(0.5, torch.tensor([1.0, 2.0]), 3.0).mean.tolist() == [1, 2]
    assert Categorical(logits=torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]])).mean.tolist() == [1, 0]
    x = torch.tensor([2.0, 0.0])
    logits = torch.randn(2, 3)
    assert torch.equal(Categorical(logits=logits).log_prob(x), dist.Categorical(logits=logits).log_prob(x.long()))
