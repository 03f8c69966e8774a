"""Likelihood x prior x posterior x objective x dtype: one table of names drives one set of checks of every combination.

Any two values of two columns occur together in some row. Log p(x) has 2 latents here, and is held against quadrature.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import NamedTuple

import pytest
import torch
from helpers import assert_same_run, assert_same_vae, same, weights

import pvae
from pvae import likelihoods, posteriors, priors
from pvae.evidence import gauss_hermite
from pvae.evidence.proposals import Annealed
from pvae.runtime import check_support
from pvae.svi import objectives
from pvae.svi import step as engine

DATA = {
    "bernoulli": lambda u: (u > 0.5).float(),
    "continuous-bernoulli": lambda u: u,
    "discretized-logistic": lambda u: (255 * u).round() / 255,
    "discretized-logistic-per-pixel": lambda u: (255 * u).round() / 255,
    "poisson": lambda u: (6 * u).floor(),
    "negative-binomial": lambda u: (6 * u).floor(),
}
OBJECTIVES = {
    "Trace_ELBO": lambda: None,
    "ELBO": lambda: objectives.ELBO(num_particles=2),
    "MeanFieldELBO": lambda: objectives.MeanFieldELBO(free_bits=0.1, free_bits_per="site"),
    "IWAE": lambda: objectives.IWAE(num_particles=3),
    "Renyi": lambda: objectives.Renyi(alpha=0.5, num_particles=3),
    "StickingTheLanding": objectives.StickingTheLanding,
    "DReG": lambda: objectives.DReG(num_particles=3),
    "ScoreFunction": lambda: objectives.ScoreFunction(num_particles=2),
}


class Case(NamedTuple):
    """A combination."""

    likelihood: str
    prior: str
    posterior: str
    objective: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return "-".join(map(str, self))

    def make(self) -> pvae.VAE:
        torch.manual_seed(0)
        vae = pvae.VAE.mlp(
            4, 2, [8], likelihood=self.likelihood, prior=self.prior, posterior=self.posterior, activation=torch.nn.Tanh
        )
        return vae.to(self.dtype)

    def data(self) -> torch.Tensor:
        """70 data of 4 entries with a common cause."""
        generator = torch.Generator().manual_seed(0)
        cause, own = (torch.rand(70, n, generator=generator, dtype=torch.float64) for n in (1, 4))
        u = (2 * cause + own) / 3
        return DATA.get(self.likelihood, lambda u: 10 + 4 * u)(u).to(self.dtype)

    def fit(self, vae, **options) -> pvae.FitResult:
        defaults = {"epochs": 2, "batch_size": 32, "lr": 0.01, "compile": False, "progress": False}
        objective = OBJECTIVES[self.objective]()
        return pvae.fit(vae.model, vae.guide, self.data(), objective=objective, **{**defaults, **options})


COLUMNS = [likelihoods.NAMED, priors.NAMED, posteriors.NAMED, OBJECTIVES, (torch.float32, torch.float64)]


def _cover(columns) -> list[Case]:
    """Rows in which any two values of two columns meet: each is the one with the most pairs that were not there yet."""
    places = list(combinations(range(len(columns)), 2))
    left = {(i, a, j, b) for i, j in places for a, b in product(columns[i], columns[j])}
    every, rows = list(product(*columns)), []
    while left:
        best = max(every, key=lambda row: sum((i, row[i], j, row[j]) in left for i, j in places))
        left -= {(i, best[i], j, best[j]) for i, j in places}
        rows.append(Case(*best))
    return rows


# Each value once, for every run of the tests; any two together, for the long one.
LONGEST = max(map(len, COLUMNS))
ONCE = [Case(*(list(column)[row % len(column)] for column in COLUMNS)) for row in range(LONGEST)]
MORE = [case for case in _cover(COLUMNS) if case not in ONCE]
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE]
every_case = pytest.mark.parametrize("case", [*ONCE, *SLOW], ids=str)


@every_case
def test_training_is_captured_resumes_and_is_saved(case, tmp_path, never_compiled):
    """Captured and plain steps agree to rounding; a run that was stopped goes on bit for bit; files hold all of it."""
    made = never_compiled(engine)
    plain, captured = case.make(), case.make()
    case.fit(plain)
    case.fit(captured, compile=True)
    assert sum(graph.captures for graph in made)
    assert not any(graph.given_up for graph in made)
    tolerance = 1e-4 if case.dtype == torch.float32 else 1e-9
    for ours, theirs in zip(weights(plain), weights(captured), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not same(weights(plain), weights(case.make()))

    stopped, straight = case.make(), case.make()
    case.fit(stopped, checkpoint=tmp_path / "run", epochs=1)
    resumed = case.fit(stopped, checkpoint=tmp_path / "run", epochs=3, resume="auto")
    assert_same_run((stopped, resumed), (straight, case.fit(straight, epochs=3)))

    stopped.save(tmp_path / "vae")
    loaded = pvae.VAE.load(tmp_path / "vae")
    assert same(weights(stopped), weights(loaded))
    if case.dtype == torch.float32:
        assert_same_vae(stopped, loaded)


def assert_right(case, proposals):
    """Where a datum has an interval, its estimate is within 5 errors; nearly all by the last proposal have one."""
    vae = case.make()
    case.fit(vae, epochs=8)
    x = case.data()[:8]
    exact = gauss_hermite(vae.model, vae.guide, x, num_nodes=60)
    for proposal in proposals:
        estimate = pvae.log_evidence(vae.model, vae.guide, x, num_samples=400, proposal=proposal)
        good = ~estimate.interval()[0].isnan()
        distance = (estimate.corrected - exact.log_px).abs()
        assert (distance <= 5 * estimate.std_error + exact.error + 2e-3)[good].all(), proposal
    assert good.double().mean() >= 0.75


@pytest.mark.parametrize("case", ONCE, ids=str)
def test_log_px_by_default_is_the_one_of_quadrature(case):
    assert_right(case, ["auto"])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ONCE, *MORE], ids=str)
def test_log_px_of_every_proposal_is_the_one_of_quadrature(case):
    assert_right(case, ["guide", "refined", Annealed(temperatures=20), "auto"])


@every_case
def test_what_is_sampled_can_be_observed(case):
    vae = case.make()
    case.fit(vae)
    x = vae.sample(20, seed=0)
    assert x.shape == (20, 4)
    assert x.dtype == case.dtype
    check_support("x", vae.decode(torch.zeros(20, 2)), x)
    assert vae.reconstruct(x).isfinite().all()
    assert torch.equal(x, vae.sample(20, seed=0))
