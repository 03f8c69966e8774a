"""Every likelihood: a probability over one entry, that draws follow, that trains, and whose log p(x) is right."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from scipy import stats
from torch import nn

import pvae
from pvae import likelihoods, networks
from pvae.errors import ArgumentError, DataError
from pvae.posteriors import DiagonalNormal
from pvae.priors import StandardNormal
from pvae.svi import step as engine


class Row(NamedTuple):
    """A likelihood, the numbers that its network gives for an entry, and the values that an entry may have."""

    make: Any
    outputs: int
    values: torch.Tensor | tuple[float, float]  # all of them that count, or an interval
    view: Any = nn.Identity


COUNTS = torch.arange(3000.0)
LEVELS = torch.arange(256) / 255
UNIT, REAL = (0.0, 1.0), (-math.inf, math.inf)

ROWS = {
    "bernoulli": Row(likelihoods.Bernoulli, 1, torch.tensor([0.0, 1.0])),
    "continuous-bernoulli": Row(likelihoods.ContinuousBernoulli, 1, UNIT),
    "gaussian": Row(likelihoods.Gaussian, 1, REAL),
    "gaussian-network": Row(partial(likelihoods.Gaussian, scale="network"), 2, REAL),
    "laplace": Row(likelihoods.Laplace, 1, REAL),
    "laplace-fixed": Row(partial(likelihoods.Laplace, scale=0.3), 1, REAL),
    "laplace-network": Row(partial(likelihoods.Laplace, scale="network"), 2, REAL),
    "student-t": Row(likelihoods.StudentT, 1, REAL),
    "student-t-network": Row(partial(likelihoods.StudentT, df=2.5, scale="network"), 2, REAL),
    "discretized-logistic": Row(likelihoods.DiscretizedLogistic, 1, LEVELS),
    "discretized-logistic-network": Row(partial(likelihoods.DiscretizedLogistic, scale="network"), 2, LEVELS),
    "poisson": Row(likelihoods.Poisson, 1, COUNTS, networks.Log1p),
    "negative-binomial": Row(likelihoods.NegativeBinomial, 1, COUNTS, networks.Log1p),
    "negative-binomial-fixed": Row(partial(likelihoods.NegativeBinomial, total_count=3.0), 1, COUNTS, networks.Log1p),
    "negative-binomial-network": Row(
        partial(likelihoods.NegativeBinomial, total_count="network"), 2, COUNTS, networks.Log1p
    ),
    "categorical": Row(
        partial(likelihoods.Categorical, num_classes=3), 3, torch.arange(3.0), partial(networks.OneHot, 3)
    ),
}


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


class Given(nn.Module):
    """A network whose outputs are given."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, z):
        return self.output.expand(*z.shape[:-1], *self.output.shape)


def test_all_names_are_here():
    assert {row.make.func if isinstance(row.make, partial) else row.make for row in ROWS.values()} == {
        found
        for name in likelihoods.__all__
        if isinstance(found := getattr(likelihoods, name), type) and issubclass(found, nn.Module)
    }


def one_entry(row, dtype=torch.float64):
    """p(x|z) of one entry, at outputs that are no round numbers."""
    outputs = torch.tensor([0.4, -0.7, 0.2], dtype=dtype)[: row.outputs]
    return row.make(Given(outputs)).to(dtype)(torch.zeros(1, dtype=dtype))


def grid_of(interval):
    """Points of an interval, and what each stands for; far out where there is no end."""
    if interval == UNIT:
        x = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        return x, torch.full_like(x, 1 / 20_000).index_fill(0, torch.tensor([0, 20_000]), 0.5 / 20_000)
    u = torch.linspace(-25, 25, 400_001, dtype=torch.float64)
    return 0.4 + u.sinh(), u.cosh() * (50 / 400_000)


def test_it_is_a_probability_over_one_entry(row):
    """Sums over all values; integrals by the trapezoidal rule, of a kink at the location with its error of h^2."""
    with torch.no_grad():
        px = one_entry(row)
        if isinstance(row.values, torch.Tensor):
            total = px.log_prob(row.values.double()[:, None]).exp().sum()
        else:
            x, weight = grid_of(row.values)
            total = (px.log_prob(x[:, None]).exp() * weight).sum()
    assert total.item() == pytest.approx(1, abs=1e-7)


def test_draws_follow_the_density(row):
    """Kolmogorov and Smirnov's or the chi-squared test; each of 16 fails with 1e-6."""
    with torch.no_grad():
        px = one_entry(row)
        x = px.sample((10_000,))[:, 0]
        if not isinstance(row.values, torch.Tensor):
            grid, weight = grid_of(row.values)
            mass = (px.log_prob(grid[:, None]).exp() * weight).cumsum(0)
            below = torch.searchsorted(grid, x)
            assert stats.kstest(mass[below.clamp(max=len(grid) - 1)].numpy(), "uniform").pvalue > 1e-6
            return
        expected = 10_000 * px.log_prob(row.values.double()[:, None]).exp()
    found = torch.searchsorted(row.values.double(), x - 1e-6)
    counts = torch.bincount(found, minlength=len(row.values)).double()
    assert torch.allclose(row.values[found].double(), x, atol=1e-6)
    often = expected >= 5
    observed, expected = (torch.cat([t[often], t[~often].sum()[None]]) for t in (counts, expected))
    statistic = ((observed - expected).square() / expected.clamp(min=0.01)).sum().item()
    assert stats.chi2.sf(statistic, int(often.sum())) > 1e-6


def data_of(row, num, size):
    """Data that the likelihood could have, in float32."""
    with torch.no_grad():
        return one_entry(row, torch.float32).sample((num, size))[..., 0]


def test_slopes_by_finite_differences(row):
    x = data_of(row, 1, 4)[0].double()

    def log_prob(outputs):
        return row.make(Given(outputs)).double()(torch.zeros(1).double()).log_prob(x)

    outputs = 1.5 * torch.randn(row.outputs, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda o: log_prob(o.flatten()), (outputs.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("raw", [-1e6, -30.0, 0.0, 30.0, 1e6])
def test_no_output_makes_a_density_or_its_slope_nan_or_infinite(row, raw, dtype):
    outputs = torch.full((row.outputs * 4,), raw, dtype=dtype, requires_grad=True)
    px = row.make(Given(outputs)).to(dtype)(torch.zeros(1, dtype=dtype))
    x = data_of(row, 1, 4)[0].to(dtype)
    log_prob = px.log_prob(x)
    log_prob.backward()
    assert log_prob.isfinite()
    assert outputs.grad.isfinite().all()
    assert px.mean.isfinite().all()
    assert px.sample().isfinite().all()


def vae_of(row, event=4, latent=1):
    inputs = row.view()(torch.zeros(event)).numel()
    return pvae.VAE(
        StandardNormal(latent),
        row.make(networks.mlp(latent, [8], row.outputs * event, activation=nn.Tanh)),
        DiagonalNormal(
            nn.Sequential(row.view(), nn.Flatten(1), nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 2 * latent))
        ),
    )


def on_a_grid(vae, x):
    """log p(x) by the trapezoidal rule; a likelihood may have kinks, which Gauss and Hermite's does not see."""
    vae = copy.deepcopy(vae).double()
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_pxz = vae.decode(z[:, None]).log_prob(x.double()) + vae.prior().log_prob(z)[:, None]
    return log_pxz.logsumexp(0) + math.log(16 / 4000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_trains_captured_and_its_evidence_is_right(row, dtype, never_compiled):
    """Of 6 data with one latent each: 5 sigma, and what the grid and float32 leave. 384 numbers: fails with 2e-4."""
    x = data_of(row, 40, 4)
    vae = vae_of(row).to(dtype)
    made = never_compiled(engine)
    result = pvae.fit(vae.model, vae.guide, x, epochs=2, batch_size=20, lr=0.01, compile=True, seed=0, progress=False)
    assert sum(run.captures for run in made) > 0
    assert all(math.isfinite(elbo) for elbo in result.history["elbo"])
    exact = on_a_grid(vae, x[:6])
    for options in ({}, {"proposal": "guide"}):
        estimate = pvae.log_evidence(vae.model, vae.guide, x[:6], num_samples=200, seed=0, progress=False, **options)
        assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error + 1e-4).all()
    assert vae.reconstruct(x[:3]).shape == vae.sample(3, mean=True).shape == (3, 4)
    assert vae.sample(3).dtype == dtype


OUTSIDE = {
    "continuous-bernoulli": (lambda x: 255 * x, r"x / 255"),
    "discretized-logistic": (lambda x: x + 0.001, r"\(x \* 255\).round\(\) / 255.*ContinuousBernoulli"),
    "poisson": (lambda x: x / 2 + 0.1, r"counts.*before any scaling"),
    "negative-binomial": (lambda x: -1 - x, r"counts.*before any scaling"),
    "categorical": (lambda x: x + 1, r"from 0 to 2.*number them from 0"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_are_refused_with_what_to_do(name):
    spoil, advice = OUTSIDE[name]
    x = data_of(ROWS[name], 40, 4)
    vae = vae_of(ROWS[name])
    vae.model(x)
    x[30:] = spoil(x[30:])
    with pytest.raises(DataError, match=f"site 'x'.*{advice}"):
        pvae.fit(vae.model, vae.guide, x, epochs=1, batch_size=10, progress=False)
    with pytest.raises(DataError, match=f"site 'x'.*{advice}"):
        pvae.log_evidence(vae.model, vae.guide, x, num_samples=30, progress=False)
    with pytest.raises(DataError, match=f"site 'x'.*{advice}"):
        vae.model(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64])
@pytest.mark.parametrize("name", ["poisson", "categorical"])
def test_whole_numbers_of_every_dtype_are_taken(name, dtype):
    x = data_of(ROWS[name], 20, 4)
    vae = vae_of(ROWS[name])
    ours, theirs = (
        pvae.log_evidence(vae.model, vae.guide, data, num_samples=30, seed=0, proposal="guide", progress=False)
        for data in (x, x.to(dtype))
    )
    assert torch.equal(ours.log_px, theirs.log_px)


# --- each by hand -----------------------------------------------------------------------------------------------------


def log_prob_at(make, outputs, x):
    """log p(x|z) of one entry whose network gives ``outputs``."""
    with torch.no_grad():
        return make(Given(torch.tensor(outputs).double())).double()(torch.zeros(1).double()).log_prob(torch.tensor([x]))


def test_continuous_bernoulli_by_hand():
    """At logit log 3, so p = 3/4: the density 2 artanh(1 - 2 p) / (1 - 2 p) p^x (1 - p)^(1 - x) of the paper."""
    logit = math.log(3)
    exact = math.log(2 * math.atanh(0.5) / 0.5) + 0.3 * math.log(0.75) + 0.7 * math.log(0.25)
    held = 1000 * math.atanh(logit / 1000)
    assert log_prob_at(likelihoods.ContinuousBernoulli, [held], 0.3).item() == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("scale", [0.1, 2.5])
def test_laplace_and_student_t_by_hand(scale):
    loc, x = 0.3, 1.0
    y = (x - loc) / scale
    laplace = log_prob_at(partial(likelihoods.Laplace, scale=scale), [loc], x).item()
    assert laplace == pytest.approx(-abs(y) - math.log(2 * scale))
    cauchy = log_prob_at(partial(likelihoods.StudentT, df=1, scale=scale), [loc], x).item()
    assert cauchy == pytest.approx(-math.log(math.pi * scale * (1 + y * y)))


def test_negative_binomial_has_the_mean_and_the_variance_it_says():
    """With log-scales held by 16 tanh(m / 16)."""
    px = likelihoods.NegativeBinomial(Given(torch.tensor([1.2])), total_count=3.0)(torch.zeros(1))
    mean = math.exp(16 * math.tanh(1.2 / 16))
    assert px.mean.item() == pytest.approx(mean, rel=1e-5)
    assert px.variance.item() == pytest.approx(mean + mean**2 / 3, rel=1e-5)


def test_categorical_takes_classes_first_and_gives_the_most_probable():
    logits = torch.randn(3, 2, 4)
    px = likelihoods.Categorical(Given(logits), num_classes=3, event_shape=(2, 4))(torch.zeros(5, 1))
    assert (px.batch_shape, px.event_shape) == ((5,), (2, 4))
    assert torch.equal(px.mean[0], logits.argmax(0).float())
    x = torch.randint(3, (2, 4))
    exact = logits.log_softmax(0).gather(0, x[None]).sum()
    torch.testing.assert_close(px.log_prob(x.float())[0], exact)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "per pixel", True, None])
def test_impossible_sizes_are_refused(value):
    for name, make in (
        ("scale", likelihoods.Laplace),
        ("scale", likelihoods.StudentT),
        ("scale", likelihoods.DiscretizedLogistic),
        ("total_count", likelihoods.NegativeBinomial),
        ("df", likelihoods.StudentT),
    ):
        with pytest.raises(ArgumentError, match=name):
            make(nn.Identity(), **{name: value})


def test_impossible_counts_are_refused():
    with pytest.raises(ArgumentError, match="num_levels must be from 2"):
        likelihoods.DiscretizedLogistic(nn.Identity(), num_levels=1)
    with pytest.raises(ArgumentError, match="num_classes"):
        likelihoods.Categorical(nn.Identity(), num_classes=0)


@pytest.mark.parametrize("name", likelihoods.NAMED)
def test_every_name_makes_a_vae_of_both_kinds(name):
    for vae in (
        pvae.VAE.mlp((1, 4, 4), 2, [8], likelihood=name),
        pvae.VAE.conv((1, 4, 4), 2, (4,), 8, likelihood=name),
    ):
        x = vae.sample(3, seed=0)
        assert vae.reconstruct(x).shape == (3, 1, 4, 4)
        vae.model(x)
        viewed = likelihoods.NAMED[name].view
        assert viewed is None or isinstance(vae.encoder.network[0], viewed)


def test_levels_have_units_that_fit_finds():
    x = (torch.rand(50, 6) * 0.2 * 255).round() / 255
    vae = pvae.VAE.mlp(6, 1, [8], likelihood="discretized-logistic")
    pvae.fit(vae.model, vae.guide, x, epochs=1, batch_size=50, compile=False, progress=False)
    assert vae.decoder.units.mean.item() == pytest.approx(0.1, abs=0.02)


def test_views():
    assert torch.equal(networks.Log1p()(torch.tensor([0.0, 1.0])), torch.tensor([0.0, math.log(2)]))
    x = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert networks.OneHot(3)(x).tolist() == [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [0, 1, 0]]]
