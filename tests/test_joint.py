"""Pairs whose data have one log p(data) together: latents outside of a data plate, and Pyro's automatic guides."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from helpers import make_loader
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer import autoguide as auto

import pvae
from pvae.evidence import bidirectional_monte_carlo
from pvae.evidence.proposals import Annealed, Defensive, Guide, Prior, Refined


class Regression:
    """Bayesian linear regression with known noise, and its exact posterior as the guide."""

    def __init__(self, dim, num_data=40, noise=0.5, seed=0):
        self.dim, self.noise = dim, noise
        generator = torch.Generator().manual_seed(seed)  # its own, so that no test depends on those before it
        self.x = torch.randn(num_data, dim, generator=generator) / dim**0.5
        self.y = self.x @ torch.randn(dim, generator=generator) + noise * torch.randn(num_data, generator=generator)
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
    estimate = pvae.log_evidence(regression.model, regression.guide, regression.data, num_samples=500, proposal="guide")
    within(estimate, regression.log_py)
    assert estimate.num_together == 40
    assert "log p(data) of 40 data together, 500 samples from the guide" in repr(estimate)
    kept = pvae.log_weights(regression.model, regression.guide, regression.data, num_samples=500, proposal="guide")
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


@pytest.mark.parametrize("dim", [2, 10, 50])
def test_regressions_of_any_size(dim):
    """Against the closed form: the posterior itself, a guide without its correlations, and chains."""
    regression = Regression(dim)
    full, diagonal = auto.AutoMultivariateNormal(regression.model), auto.AutoNormal(regression.model)
    for guide in (full, diagonal):
        guide(*regression.data)
    scale = regression.scale_tril.diagonal()
    with torch.no_grad():
        full.loc.copy_(regression.loc)
        full.scale = scale
        full.scale_tril = regression.scale_tril / scale[:, None]
        diagonal.locs.w.copy_(regression.loc)
        diagonal.scales.w = (regression.scale_tril @ regression.scale_tril.T).diagonal().sqrt()
    exact = pvae.log_evidence(regression.model, full, regression.data, num_samples=30)
    assert exact.log_px.item() == pytest.approx(regression.log_py, abs=1e-3)
    assert exact.std_error.item() < 1e-3
    independent = pvae.log_evidence(regression.model, diagonal, regression.data, num_samples=4000)
    if not independent.unreliable.any():
        within(independent, regression.log_py)
    for start in (Guide(), Prior()) if dim < 50 else (Guide(),):  # so few temperatures come no further
        chains = Annealed(start, temperatures=60)
        within(
            pvae.log_evidence(regression.model, diagonal, regression.data, num_samples=100, proposal=chains),
            regression.log_py,
        )


def list_of_guides(model, **kinds):
    """An `AutoGuideList` with a guide of some kind for each latent."""
    guide = auto.AutoGuideList(model)
    for name, kind in kinds.items():
        guide.append(kind(poutine.block(model, expose=[name])))
    return guide


def train(model, guide, data, objective):
    return pvae.fit(
        model,
        guide,
        data,
        objective=objective,
        epochs=200,
        batch_size=len(data[0]),
        lr=0.03,
        compile=False,
        progress=False,
    )


def test_a_list_of_automatic_guides():
    """Some latents by one guide and some by another, of which neither knows their correlations."""
    regression = Regression(3)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((w * x[:, :2]).sum(-1) + v * x[:, 2], regression.noise), obs=y)

    guide = list_of_guides(model, w=auto.AutoMultivariateNormal, v=auto.AutoNormal)
    train(model, guide, regression.data, Trace_ELBO())
    for proposal in ("guide", "auto"):
        within(pvae.log_evidence(model, guide, regression.data, proposal=proposal), regression.log_py)


def test_a_list_of_guides_with_enumerated_latents():
    """Two kinds of data: against the sum over all 64 assignments of the evidence of a regression."""
    regression = Regression(2, num_data=6)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal((w * x).sum(-1) + k, regression.noise), obs=y)

    guide = list_of_guides(model, w=auto.AutoNormal, k=auto.AutoDiscreteParallel)
    train(model, guide, regression.data, TraceEnum_ELBO(max_plate_nesting=1))
    kinds = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    covariance = regression.x @ regression.x.T + regression.noise**2 * torch.eye(6)
    given = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(regression.y - kinds)
    exact = (given + dist.Bernoulli(0.3).log_prob(kinds).sum(1)).logsumexp(0).item()
    for proposal in ("guide", "auto"):
        within(pvae.log_evidence(model, guide, regression.data, proposal=proposal), exact)


def test_bounds_from_both_sides_of_all_data_together():
    """One log p(data) of simulated data, between chains there and back.

    The weights of both have the exact mean, so by Markov's inequality the lower bound is above log p(data) by t with a
    probability of at most exp(-t), and so is the upper one below it: 0.1% for 7. With this much noise the posterior is
    near the prior, and chains are good: over 20 seeds both bounds were within 0.15 of log p(data).
    """
    regression = Regression(3, noise=2.0)
    bracket = bidirectional_monte_carlo(regression.model, regression.guide, regression.data, num_samples=200)
    x, y = bracket.data
    covariance = x @ x.T + regression.noise**2 * torch.eye(len(x))
    exact = dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(y).item()
    assert bracket.lower.shape == (1,)
    lower, upper = bracket.lower.item(), bracket.upper.item()
    assert lower - 7 < exact < upper + 7
    assert abs(lower - exact) < 0.5
    assert abs(upper - exact) < 0.5


class Schools:
    """Eight schools: a global mean and scale, and an effect of each; Rubin, 1981."""

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    s = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    @staticmethod
    def model(y, s):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, s), obs=y)

    @classmethod
    def log_py(cls):
        """Effects and mean integrated out, the scale by a fine rule in its angle: its law is uniform there."""
        angle = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * math.pi / 2
        tau, y, s = 5 * angle.tan(), cls.y.double(), cls.s.double()
        covariance = 25.0 + torch.diag_embed(s.square() + tau[:, None].square().clamp(max=1e12))
        joint = dist.MultivariateNormal(torch.zeros(8, dtype=torch.float64), covariance).log_prob(y)
        return (joint.logsumexp(0) - math.log(len(tau))).item()


@pytest.mark.parametrize(
    "proposal", [Annealed(Prior(), temperatures=60), Refined(), Defensive()], ids=["ais", "refined", "defensive"]
)
def test_eight_schools(proposal):
    guide = auto.AutoNormal(Schools.model)
    guide(Schools.y, Schools.s)
    with torch.no_grad():
        for name, loc, scale in (("mu", 5.0, 4.0), ("tau", 1.3, 0.8), ("theta", 5.0, 5.0)):
            getattr(guide.locs, name).fill_(loc)
            setattr(guide.scales, name, torch.full_like(getattr(guide.locs, name), scale))
    count = 200 if isinstance(proposal, Annealed) else 4000
    estimate = pvae.log_evidence(
        Schools.model, guide, (Schools.y, Schools.s), num_samples=count, proposal=proposal, seed=1
    )
    assert estimate.std_error < (0.2 if isinstance(proposal, Annealed) else 1.0)
    if isinstance(proposal, Annealed) or not estimate.unreliable.any():  # a funnel, for Gaussians
        within(estimate, Schools.log_py())


@pytest.mark.parametrize("proposal", ["auto", Annealed(Prior(), temperatures=60)], ids=["auto", "ais"])
def test_logistic_regression(proposal):
    """Two weights, by a grid that is fine beside their posterior."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 2, generator=generator)
    y = torch.bernoulli(torch.sigmoid(x @ torch.tensor([2.0, -1.0])), generator=generator)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=(w * x).sum(-1)), obs=y)

    line = torch.linspace(-6, 6, 601, dtype=torch.float64)
    w = torch.cartesian_prod(line, line)
    joint = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + dist.Bernoulli(logits=w @ x.T.double()).log_prob(y).sum(-1)
    exact = joint.logsumexp(0).item() + 2 * (line[1] - line[0]).log().item()
    guide = auto.AutoNormal(model)
    guide(x, y)  # not fitted: standard deviations of 0.1 around a draw of the prior
    count = 200 if isinstance(proposal, Annealed) else 1000
    estimate = pvae.log_evidence(model, guide, (x, y), num_samples=count, proposal=proposal)
    assert not estimate.unresolved.any()
    within(estimate, exact)


@pytest.mark.parametrize("dim", [2, 10, 50])
def test_the_default_call_refines_a_guide_that_is_off(dim):
    regression = Regression(dim)

    def guide(x, y):
        pyro.sample("w", dist.Normal(regression.loc + 0.3, 0.2).to_event(1))

    estimate = pvae.log_evidence(regression.model, guide, regression.data)
    assert not estimate.unresolved.any()
    within(estimate, regression.log_py)


def test_a_program_that_takes_one_particle_at_a_time():
    """As most regressions are written; the same as one that broadcasts."""
    regression = Regression(3)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    single = pvae.log_weights(model, regression.guide, regression.data, num_samples=40)
    assert single.shape == (40, 1)
    within(pvae.log_evidence(model, regression.guide, regression.data, num_samples=200), regression.log_py)
    laplace = pvae.log_evidence(model, regression.guide, regression.data, num_samples=30, proposal="laplace")
    assert laplace.log_px.item() == pytest.approx(regression.log_py, abs=1e-3)


def test_probabilistic_pca_with_a_loading_that_is_drawn():
    """One plate for latents of each datum, and one latent outside of it, so that all data are one.

    Given the loading w, x ~ Normal(0, w w' + s^2): log p(data) by a fine rule over w in one dimension.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 2, generator=generator) + torch.randn(12, 1, generator=generator)
    direction = torch.tensor([1.0, 1.0])

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((w * z)[..., None] * direction, 1.0).to_event(1), obs=x)

    def guide(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            precision = 1 + 2 * w**2
            pyro.sample("z", dist.Normal(w * x.sum(-1) / precision, precision**-0.5))

    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    covariance = grid[:, None, None] ** 2 * torch.ones(2, 2) + torch.eye(2)
    given = dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance[:, None]).log_prob(x.double())
    exact = (given.sum(-1) + dist.Normal(0.0, 1.0).log_prob(grid)).logsumexp(0) + math.log(grid[1] - grid[0])
    within(pvae.log_evidence(model, guide, x, num_samples=4000), exact.item())


def test_a_model_with_a_fixed_number_of_data_is_joint():
    """A guide with a parameter for each datum is for all of them."""
    x = torch.linspace(-1, 1, 6)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 6):
            pyro.sample("z", dist.Normal(torch.linspace(-0.5, 0.5, 6), 0.75))

    within(pvae.log_evidence(model, guide, x, num_samples=2000), dist.Normal(0.0, 2**0.5).log_prob(x).sum().item())


def test_a_subsample_is_no_evidence():
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[rows])

    with pytest.raises(pvae.ProgramError, match=r"plate 'data' stands for 8 data and has 2 of them.* on all data"):
        pvae.log_evidence(model, lambda x: pyro.sample("m", dist.Normal(0.0, 1.0)), torch.randn(8))


def test_point_masses_are_refused_with_what_to_take():
    regression = Regression(2)
    for guide in (auto.AutoDelta(regression.model), auto.AutoLaplaceApproximation(regression.model)):
        guide(*regression.data)
        with pytest.raises(pvae.ProgramError, match=r"a point mass at .*AutoNormal in the place of AutoDelta"):
            pvae.log_evidence(regression.model, guide, regression.data)


def test_auxiliary_variables_that_are_no_latents_are_refused():
    def guide(x, y):
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(a[..., :2], event_dim=1))

    regression = Regression(2)
    with pytest.raises(pvae.ProgramError, match=r"draws 3 numbers at \['a'\].* makes 2 real numbers .*\['w'\]"):
        pvae.log_evidence(regression.model, guide, regression.data)


def test_quadrature_of_one_latent_of_all_data():
    regression = Regression(2)
    estimate = pvae.evidence.gauss_hermite(regression.model, regression.guide, regression.data)
    assert estimate.log_px.item() == pytest.approx(regression.log_py, abs=1e-3)
