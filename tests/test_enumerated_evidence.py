"""Discrete latents that are marked for enumeration are summed out of log p(x), exactly."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import autoguide as auto
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

import pvae
from pvae.evidence.proposals import Annealed, Defensive, Guide, Laplace, Prior, Refined

WEIGHTS = torch.tensor([0.2, 0.5, 0.3])
CENTRES = torch.tensor([-3.0, 0.0, 2.0])
PARALLEL = {"enumerate": "parallel"}


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 2


def nothing(*batch):
    """A guide for a model whose latents are all summed out."""


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=PARALLEL)
        pyro.sample("x", dist.Normal(CENTRES[k], 0.7), obs=x)


def log_mixture(x, scale):
    return (WEIGHTS.double().log() + dist.Normal(CENTRES.double(), scale).log_prob(x[:, None].double())).logsumexp(-1)


@pytest.mark.parametrize("num_data", [1, 2, 3, 30])
@pytest.mark.parametrize("proposal", ["guide", "refined", "ais"])
def test_a_mixture_is_exact_whatever_the_proposal(num_data, proposal):
    x = draws(num_data)
    estimate = pvae.log_evidence(mixture, nothing, x, num_samples=50, proposal=proposal)
    torch.testing.assert_close(estimate.log_px, log_mixture(x, 0.7), rtol=0, atol=1e-5)
    assert (estimate.std_error == 0).all()
    assert estimate.khat.isneginf().all()
    assert "an exact sum over discrete latents" in repr(estimate)


class Mixed:
    """A component, summed out, and a position around its centre, drawn; the guide may draw the component, too."""

    def __init__(self, guide_draws=False, mark_model=True, mode=PARALLEL):
        self.guide_draws, self.mark_model, self.mode = guide_draws, mark_model, mode

    def model(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer=self.mode if self.mark_model else {})
            z = pyro.sample("z", dist.Normal(CENTRES[k], 0.5))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = 0.8 * x
            if self.guide_draws:
                mark = {} if self.mark_model else self.mode
                k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.4, 0.3]).expand(len(x), 3)), infer=mark)
                loc = loc + 0.3 * (k - 1.0)
            pyro.sample("z", dist.Normal(loc, 0.9))


MIXED = {
    "in the model": Mixed(),
    "in both": Mixed(True),
    "marked in the guide": Mixed(True, mark_model=False),
    "one after the other": Mixed(mode={"enumerate": "sequential"}),
}


@pytest.mark.parametrize("pair", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("num_data", [1, 2, 7])
def test_discrete_and_continuous_latents(pair, num_data):
    """The guide's own density is that of z alone, however it came by it."""
    x = draws(num_data)
    estimate = pvae.log_evidence(pair.model, pair.guide, x, num_samples=2000)
    exact = log_mixture(x, math.hypot(0.5, 0.7))
    assert ((estimate.corrected - exact).abs() < 4.5 * estimate.std_error).all()
    assert (estimate.std_error < 0.1).all()


@pytest.mark.parametrize(
    "proposal",
    [Prior(), Defensive(), Defensive(Refined(steps=20), 0.5), Defensive(Laplace(), 0.5), Annealed(temperatures=20)],
    ids=["prior", "defensive", "refined", "laplace", "ais"],
)
def test_every_proposal_works_on_the_continuous_rest(proposal):
    """Some posteriors have two modes, of which one Gaussian sees one: the prior covers the other."""
    x, pair = draws(5) / 2, MIXED["in both"]
    count = 100 if isinstance(proposal, Annealed) else 2000
    estimate = pvae.log_evidence(pair.model, pair.guide, x, num_samples=count, proposal=proposal)
    exact = log_mixture(x, math.hypot(0.5, 0.7))
    assert ((estimate.corrected - exact).abs() < 5 * estimate.std_error).all()
    assert (estimate.std_error < 0.2).all()


def test_sums_are_captured_and_stay_the_same():
    x, pair = draws(40), MIXED["in the model"]
    plain, captured = (
        pvae.log_evidence(pair.model, pair.guide, x, num_samples=400, chunk_size=2000, compile=c) for c in (False, True)
    )
    torch.testing.assert_close(plain.log_px, captured.log_px, rtol=0, atol=1e-4)


class Chain:
    """A hidden Markov model of two states for each datum, whose emissions may have a scale that is drawn."""

    move = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    centres = torch.tensor([-1.0, 1.5])

    def __init__(self, drawn=False):
        self.drawn = drawn

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if self.drawn else 0.0
            s = 0
            for t in pyro.markov(range(x.shape[1])):
                s = pyro.sample(f"s{t}", dist.Categorical(Vindex(self.move)[s]), infer=PARALLEL)
                pyro.sample(f"x{t}", dist.Normal(self.centres[s] + shift, 1.0), obs=x[:, t])

    def guide(self, x):
        if self.drawn:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("shift", dist.Normal(0.5 * x.mean(1), 0.7))

    def forward(self, x, shift=0.0):
        """The forward algorithm, for data of shape ``(N, T)``."""
        log_move = self.move.double().log()
        alpha = torch.full((len(x), 2), -math.inf, dtype=torch.float64)
        alpha[:, 0] = 0
        for t in range(x.shape[1]):
            alpha = (alpha[..., None] + log_move).logsumexp(-2)
            alpha = alpha + dist.Normal(self.centres.double() + shift, 1.0).log_prob(x[:, t, None].double())
        return alpha.logsumexp(-1)


@pytest.mark.parametrize("num_data", [1, 2, 6])
@pytest.mark.parametrize("length", [1, 2, 12])
def test_a_hidden_markov_model_is_the_forward_algorithm(num_data, length):
    x, chain = draws(num_data, length), Chain()
    estimate = pvae.log_evidence(chain.model, chain.guide, x, num_samples=25)
    torch.testing.assert_close(estimate.log_px, chain.forward(x), rtol=0, atol=1e-4)
    assert (estimate.std_error == 0).all()


def test_a_hidden_markov_model_with_a_continuous_latent():
    """Against a sum of the forward algorithm over a fine grid of the shift."""
    x, chain = draws(4, 6), Chain(drawn=True)
    grid = torch.linspace(-6, 6, 601, dtype=torch.float64)
    prior = dist.Normal(0.0, 1.0).log_prob(grid) + math.log(grid[1] - grid[0])
    exact = torch.stack([chain.forward(x, shift) + p for shift, p in zip(grid, prior, strict=True)]).logsumexp(0)
    estimate = pvae.log_evidence(chain.model, chain.guide, x, num_samples=2000)
    assert ((estimate.corrected - exact).abs() < 4.5 * estimate.std_error).all()


def test_a_linear_state_space_model_is_gaussian():
    """Continuous states in a chain; the guide is the exact posterior of independent ones, made wider."""

    def model(x):
        with pyro.plate("data", len(x)):
            s = torch.zeros(())
            for t in pyro.markov(range(4)):
                s = pyro.sample(f"s{t}", dist.Normal(0.5 * s, 1.0))
                pyro.sample(f"x{t}", dist.Normal(s, 1.0), obs=x[:, t])

    def guide(x):
        with pyro.plate("data", len(x)):
            for t in range(4):
                pyro.sample(f"s{t}", dist.Normal(0.5 * x[:, t], 0.9))

    x = draws(5, 4) / 2
    step = torch.linalg.inv(torch.eye(4) - 0.5 * torch.diag(torch.ones(3), -1))
    exact = dist.MultivariateNormal(torch.zeros(4), step @ step.T + torch.eye(4)).log_prob(x)
    for proposal in (Guide(), Laplace()):
        estimate = pvae.log_evidence(model, guide, x, num_samples=3000, proposal=proposal)
        assert ((estimate.corrected - exact).abs() < 4.5 * estimate.std_error + 1e-4).all()


def test_sites_in_a_plate_within():
    """Three measurements, each of a component of its own, and one of the datum that all share."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.4), infer=PARALLEL)
            with pyro.plate("measurements", 3, dim=-2):
                k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * c), infer=PARALLEL)
                pyro.sample("x", dist.Normal(2 * k - c, 1.0), obs=x.T)

    x, total = draws(5, 3), []
    for c in (0.0, 1.0):
        on = 0.2 + 0.5 * c
        terms = [math.log(p) + dist.Normal(2 * k - c, 1.0).log_prob(x) for k, p in ((0.0, 1 - on), (1.0, on))]
        total.append(math.log(0.4 if c else 0.6) + torch.stack(terms).logsumexp(0).sum(-1))
    estimate = pvae.log_evidence(model, nothing, x, num_samples=25)
    torch.testing.assert_close(estimate.log_px, torch.stack(total).logsumexp(0).double(), rtol=0, atol=1e-4)


def test_labels_that_some_data_have():
    """``obs_mask`` lets a label be given for some data and summed out for others."""

    @config_enumerate  # pyro.sample leaves the mark out for what is not observed
    def model(x, y, known):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(WEIGHTS), obs=y, obs_mask=known)
            pyro.sample("x", dist.Normal(CENTRES[k], 0.7), obs=x)

    x, y, known = draws(4), torch.tensor([0, 1, 2, 1]), torch.tensor([True, False, True, False])
    labelled = WEIGHTS.log()[y] + dist.Normal(CENTRES[y], 0.7).log_prob(x)
    estimate = pvae.log_evidence(model, nothing, (x, y, known), num_samples=25)
    exact = torch.where(known, labelled.double(), log_mixture(x, 0.7))
    torch.testing.assert_close(estimate.log_px, exact, rtol=0, atol=1e-5)


def test_a_discrete_latent_of_all_data():
    """All data come from one component: one log p(data), with the centre drawn and the component summed out."""

    @config_enumerate
    def model(x):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        shift = pyro.sample("shift", dist.Normal(0.0, 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(CENTRES[k] + shift, 1.0), obs=x)

    guide = auto.AutoNormal(pyro.poutine.block(model, hide=["k"]))
    x = draws(6) / 2
    covariance = torch.eye(6) + 0.09 * torch.ones(6, 6)
    parts = [
        w.log() + dist.MultivariateNormal(c.expand(6), covariance).log_prob(x)
        for w, c in zip(WEIGHTS, CENTRES, strict=True)
    ]
    with pytest.warns(UserWarning, match="run for the first time"):
        estimate = pvae.log_evidence(model, guide, x, proposal=Refined(steps=30), num_samples=1000)
    assert estimate.is_joint
    assert abs(estimate.corrected.item() - torch.stack(parts).logsumexp(0).item()) < 5 * estimate.std_error.item()
