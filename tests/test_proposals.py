"""Every proposal against exact answers: where it draws, how it weighs, and what it refuses.

Statistical tests have fixed seeds. A share of data within 4 standard errors is 0.9999 where errors are honest; below
0.95 of 60 data it falls with a probability of 1e-11. Bounds of 5 standard errors fail with 6e-7 for each number
compared; no test compares more than 150.
"""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.evidence.densities import Densities
from pvae.evidence.proposals import (
    Annealed,
    Defensive,
    Guide,
    Inflated,
    Laplace,
    Mixture,
    Prior,
    Refined,
    Sobol,
    StudentT,
)
from pvae.evidence.proposals.base import Density
from pvae.runtime import place_pair
from pvae.testing import linear_gaussian, two_modes

EVERY = [
    Guide(),
    Inflated(),
    StudentT(),
    Sobol(),
    Refined(),
    Refined(full=False),
    Laplace(),
    Defensive(),
    Inflated(Laplace(), 1.5),
    Sobol(StudentT(Laplace())),
    Defensive(Refined(full=False)),
    Mixture((StudentT(Laplace()), Inflated(), Guide()), (0.5, 0.3, 0.2)),
    Annealed(temperatures=20),
    Annealed(Laplace(), temperatures=5),
]
# Those that do not find the oracle's posterior itself, and so have an error to judge.
INEXACT = [p for p in EVERY if not isinstance(p, Refined | Laplace | Annealed)] + [Annealed(temperatures=20)]


def named(proposal):
    return proposal.name.replace(" ", "-")


def evidence(pair, x, proposal, num_samples=1000, **options):
    return pvae.log_evidence(pair.model, pair.guide, x, proposal=proposal, num_samples=num_samples, **options)


# --- against exact answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", EVERY, ids=named)
@pytest.mark.parametrize("latent_dim, shift, scale", [(2, 0.4, 1.3), (10, 0.2, 1.1), (50, 0.1, 1.05)])
def test_every_estimator_is_within_its_error(latent_dim, shift, scale, proposal):
    oracle = linear_gaussian(latent_dim, 20, guide_shift=shift, guide_scale=scale)
    x = oracle.sample(60)
    estimate = evidence(oracle, x, proposal, 64 if isinstance(proposal, Annealed) else 1000)
    reliable = ~estimate.unreliable
    # Rounding, where there is nothing else; a dropped constant of any density would be far above it.
    error = (estimate.log_px - oracle.log_px(x)).abs() - 1e-10
    if isinstance(proposal, Inflated) and latent_dim == 50:  # wider in each of 50 dimensions is hopeless, and says so
        assert reliable.double().mean() < 0.6
    else:
        assert reliable.double().mean() > 0.8
    assert (error < 4 * estimate.std_error)[reliable].double().sum() >= 0.95 * reliable.sum()


@pytest.mark.parametrize("proposal", INEXACT, ids=named)
@pytest.mark.parametrize("latent_dim", [2, 10])
def test_errors_are_of_the_right_size(latent_dim, proposal):
    """The scores of 150 data have an sd of 1 to 5 sigma of 0.06, and of Sobol's 10 replicates (Student-t 9) 1.13."""
    oracle = linear_gaussian(latent_dim, 12, guide_shift=0.3, guide_scale=1.2)
    x = oracle.sample(150)
    estimate = evidence(oracle, x, proposal, 64 if isinstance(proposal, Annealed) else 1000)
    scores = ((estimate.corrected - oracle.log_px(x)) / estimate.std_error)[~estimate.unreliable]
    # Few of the prior's draws count, so that a mixture's scores are a Student-t's.
    assert 0.7 < scores.std() < (1.7 if isinstance(proposal, Defensive) else 1.45)


REPEATED = [
    (Guide(), 200),
    (Inflated(), 200),
    (StudentT(), 200),
    (Inflated(Laplace(), 1.3), 200),
    (Inflated(Refined(steps=20), 1.3), 200),
    (Sobol(), 320),
    (Sobol(StudentT()), 320),
    (Defensive(), 200),
    (Defensive(), 37),  # 3.7 of them from the prior
    (Defensive(share=0.5), 100),
    (Defensive(Inflated(Laplace(), 1.1), 0.3), 200),
    (Defensive(Sobol()), 320),
    (Annealed(temperatures=5), 32),
]


@pytest.mark.parametrize(
    "proposal, num_samples", REPEATED, ids=lambda v: named(v) if not isinstance(v, int) else str(v)
)
def test_claimed_errors_are_those_of_repetition(proposal, num_samples):
    """400 times the same datum: the sd of log p(x) has an error of 3.5%, and of the claimed error less: 5 sigma."""
    oracle = linear_gaussian(2, 6, guide_shift=0.3, guide_scale=1.2)
    estimate = evidence(oracle, oracle.sample(1).expand(400, 6), proposal, num_samples)
    claimed = estimate.std_error.square().mean().sqrt()
    assert 0.8 < estimate.log_px.std() / claimed < 1.25
    assert abs(estimate.corrected.mean() - oracle.log_px(oracle.sample(1))) < 5 * claimed / 20 + claimed**2


def test_the_priors_claimed_error_is_that_of_repetition():
    """Its draws are shared by the data, so another seed each time: 60 have an error of 9%; 3.5 sigma."""
    oracle = linear_gaussian(2, 6, noise=1.0)
    x = oracle.sample(1)
    estimates = [evidence(oracle, x, "prior", 1000, seed=seed) for seed in range(60)]
    claimed = torch.cat([e.std_error for e in estimates]).square().mean().sqrt()
    assert 0.7 < torch.cat([e.log_px for e in estimates]).std() / claimed < 1.35


def test_a_guide_that_is_right_leaves_a_mixture_no_error():
    """In 50 dimensions the prior's draws weigh nothing and the guide's all the same: what is left is rounding."""
    oracle = linear_gaussian(50, 60)
    x = oracle.sample(20)
    for num_samples in (1000, 37):
        estimate = evidence(oracle, x, "defensive", num_samples)
        assert (estimate.std_error < 1e-3).all()
        torch.testing.assert_close(estimate.log_px, oracle.log_px(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "proposal",
    [
        Guide(),
        Sobol(),
        Refined(),
        Refined(full=False),
        Laplace(),
        Annealed(temperatures=5),
        Annealed(Laplace(), temperatures=20),
    ],
    ids=named,
)
@pytest.mark.parametrize("latent_dim", [2, 10, 50])
def test_the_exact_posterior_leaves_no_variance(proposal, latent_dim):
    """Where the guide, or the Gaussian fitted, is the posterior, every weight is p(x).

    Wider, heavier or mixed proposals are not the posterior, and their weights must differ.
    """
    oracle = linear_gaussian(latent_dim, 20)
    x = oracle.sample(20)
    estimate = evidence(oracle, x, proposal, 30)
    assert (estimate.std_error < 1e-6).all()
    torch.testing.assert_close(estimate.log_px, oracle.log_px(x), rtol=0, atol=1e-6)
    assert (estimate.khat == -torch.inf).all()
    assert estimate.mean_withheld == ""


@pytest.mark.parametrize("proposal", EVERY[:-2], ids=named)
def test_draws_are_scored_as_they_were_drawn(proposal):
    """log q from a draw is log q of what was drawn; in float64."""
    oracle = linear_gaussian(3, 6, guide_shift=0.3)
    x = oracle.sample(5)
    with torch.no_grad():
        sampler = proposal.on(Densities.of(place_pair(oracle.model, oracle.guide, device="cpu"), (x,)), (x,))
        assert isinstance(sampler, Density)
        latents, log_q = sampler.draw(40)
        torch.testing.assert_close(sampler.log_prob(latents), log_q)


def test_a_density_integrates_to_one():
    """The mean of q(z) / p(z) over draws from the posterior p is 1, for the Student-t and for the mixture; 5 sigma."""
    oracle = linear_gaussian(2, 4)
    x = oracle.sample(1)
    pair = Densities.of(place_pair(oracle.model, oracle.guide, device="cpu"), (x,))
    with torch.no_grad():
        latents, log_p = pair.draw_guide((x,), 20_000)  # bounded ratios: q may be wider than p
        for proposal in (StudentT(df=3), Inflated(scale=0.9), Defensive(share=0.3)):
            ratio = (proposal.on(pair, (x,)).log_prob(latents) - log_p).exp()[:, 0]
            narrow = isinstance(proposal, Inflated)
            # A heavier q than p puts mass where p never draws: its ratio has a heavy tail, so look only where p is.
            inside = ratio if narrow else ratio[ratio < 50]
            assert inside.mean().item() <= 1 + 5 * inside.std().item() / 20_000**0.5
            if narrow:
                assert inside.mean().item() == pytest.approx(1, abs=5 * inside.std().item() / 20_000**0.5)


# --- latents that are not real vectors ----------------------------------------------------------------------------


def conjugate(prior, likelihood, guide, event_dim=0):
    """A pair with one constrained latent; all in float64."""

    class Made:
        @staticmethod
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior())
                pyro.sample("x", likelihood(z), obs=x)

        @staticmethod
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", guide(x))

    return Made


def number(value):
    return torch.tensor(value, dtype=torch.float64)


POISSON = torch.arange(8, dtype=torch.float64)
CONJUGATE = {
    "Beta": (
        conjugate(
            lambda: dist.Beta(number(2.0), number(3.0)),
            lambda z: dist.Binomial(5, z),
            lambda x: dist.Beta(1.5 + x, 8.5 - x),
        ),
        POISSON[:6],
        dist.BetaBinomial(number(2.0), number(3.0), 5),
    ),
    "Gamma": (
        conjugate(
            lambda: dist.Gamma(number(2.0), number(0.5)),
            dist.Poisson,
            lambda x: dist.Gamma(1.5 + x, number(1.2)),
        ),
        POISSON,
        dist.GammaPoisson(number(2.0), number(0.5)),
    ),
    "Dirichlet": (
        conjugate(
            lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
            dist.Categorical,
            lambda x: dist.Dirichlet(
                torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64) + torch.nn.functional.one_hot(x.long(), 3)
            ),
        ),
        torch.arange(3),
        dist.Categorical(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
    ),
    "Uniform": (
        conjugate(
            lambda: dist.Uniform(number(-2.0), number(2.0)),
            lambda z: dist.Bernoulli((z + 2) / 4),
            lambda x: dist.Uniform(number(-2.0), number(2.0)),
        ),
        POISSON[:2],
        dist.Bernoulli(number(0.5)),
    ),
}


@pytest.mark.parametrize(
    "proposal",
    [Guide(), Prior(), StudentT(), Sobol(Inflated()), Refined(), Laplace(), StudentT(Laplace()), Defensive()],
    ids=named,
)
@pytest.mark.parametrize("family", CONJUGATE)
def test_constrained_latents(family, proposal):
    """Proposals move in unconstrained space, so that a missing Jacobian would show."""
    pair, x, exact = CONJUGATE[family]
    estimate = evidence(pair, x, proposal, 4000, seed=2)
    reliable = ~estimate.unreliable
    assert ((estimate.corrected - exact.log_prob(x)).abs() < 5 * estimate.std_error + 1e-9)[reliable].all()
    if isinstance(proposal, StudentT | Prior | Defensive):  # the tails of a logarithm or a logit are not Gaussian
        assert reliable.any()


def test_annealing_moves_constrained_latents():
    pair, x, exact = CONJUGATE["Gamma"]
    for start in (Guide(), Prior()):
        estimate = evidence(pair, x, Annealed(start, temperatures=30), 400)
        assert ((estimate.corrected - exact.log_prob(x)).abs() < 5 * estimate.std_error).all()


def test_several_sites_and_a_nested_plate():
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]

    class Nested:
        @staticmethod
        def model(x):
            with pyro.plate("data", len(x), dim=-1):
                a = pyro.sample("a", dist.Normal(number(0.0), 1.0))
                with pyro.plate("features", 3, dim=-2):
                    b = pyro.sample("b", dist.Normal(a, scale))
                    pyro.sample("x", dist.Normal(b, 1.0), obs=x.T)

        @staticmethod
        def guide(x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("a", dist.Normal(x.mean(1) / 2, 1.0))
                with pyro.plate("features", 3, dim=-2):
                    pyro.sample("b", dist.Normal(x.T / 2, 1.0))

    covariance = torch.ones(3, 3, dtype=torch.float64) + (scale[:, 0] ** 2 + 1).diag()
    exact = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
    x = exact.sample((20,))
    laplace = evidence(Nested, x, Laplace(), 50)
    assert (laplace.std_error < 1e-6).all()
    torch.testing.assert_close(laplace.log_px, exact.log_prob(x))
    for proposal in (StudentT(), Defensive(), Refined()):
        estimate = evidence(Nested, x, proposal, 3000)
        far = (estimate.corrected - exact.log_prob(x)).abs() > 5 * estimate.std_error + 1e-9  # a fit may be exact
        assert not far[~estimate.unreliable].any()


def coin(x):
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(number(0.3)))
        pyro.sample("x", dist.Normal(2 * c, 1.0), obs=x)


def coin_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Bernoulli(torch.sigmoid(x)))


def test_discrete_latents_are_drawn_and_not_moved():
    x = torch.randn(20, dtype=torch.float64)
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    exact = (weights + dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])).logsumexp(1)
    for proposal in ("guide", "prior", "defensive"):
        estimate = pvae.log_evidence(coin, coin_guide, x, num_samples=4000, proposal=proposal)
        assert ((estimate.corrected - exact).abs() < 5 * estimate.std_error).all()
    for proposal in ("refined", "laplace", "student-t", "ais"):
        with pytest.raises(pvae.ProgramError, match=r"site 'c' is discrete.*proposal='guide', 'prior' or 'defensive'"):
            pvae.log_evidence(coin, coin_guide, x, proposal=proposal)


def test_a_support_that_depends_on_the_data_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(x - 1, x + 1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - 1, x + 1))

    x = torch.randn(20, dtype=torch.float64)
    normal = dist.Normal(number(0.0), 1.0)
    exact = (normal.cdf(number(1.0)) - normal.cdf(number(-1.0))).log() - math.log(2)
    estimate = pvae.log_evidence(model, guide, x, num_samples=1000)
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error).all()
    with pytest.raises(pvae.ProgramError, match="support of site 'z' is not the same"):
        pvae.log_evidence(model, guide, x, proposal="laplace")


# --- two modes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_modes_are_missed_by_one_and_found_by_two():
    """The guide knows one mode: it is flagged, or low by log 2, wherever the modes are apart."""
    oracle = two_modes(2, 4, noise=0.7)
    x = oracle.sample(150)
    exact = oracle.log_px(x)
    one = oracle.half.posterior(x)
    apart = torch.linalg.solve_triangular(one.scale_tril, one.loc[..., None], upper=False).norm(dim=(1, 2)) > 4
    assert apart.sum() > 30
    guide = evidence(oracle, x, "guide", 1000)
    wrong = guide.log_px - exact < -0.6
    assert (guide.unreliable | wrong)[apart].all()
    assert wrong[apart].any()
    torch.testing.assert_close(
        (guide.log_px - exact)[apart & ~guide.unreliable].median(),
        torch.tensor(-math.log(2)).double(),
        rtol=0,
        atol=0.01,
    )
    for proposal, num_samples in ((Defensive(share=0.5), 5000), (Annealed(Prior(), temperatures=30), 100)):
        estimate = evidence(oracle, x, proposal, num_samples)
        reliable = ~estimate.unreliable
        assert reliable[apart].double().mean() > 0.3
        assert ((estimate.corrected - exact).abs() < 4 * estimate.std_error)[reliable].double().mean() >= 0.95
        assert abs((estimate.log_px - exact)[apart].mean()) < 0.05


def test_the_prior_has_its_share_however_draws_are_cut():
    """One draw at a time: a guide that is nowhere near leaves all to the prior's half, to 5 standard errors."""

    def far(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((2,), 50.0, dtype=torch.float64), 0.1).to_event(1))

    oracle = linear_gaussian(2, 3, noise=1.0)
    x = oracle.bias[None]  # the prior explains it well
    for share in (0.3, 0.5):
        estimate = evidence(oracle, x, Defensive(Guide(far), share), 400, chunk_size=1)
        assert abs(estimate.corrected - oracle.log_px(x)) < 5 * estimate.std_error
        assert estimate.std_error < 0.2


# --- each proposal's own ------------------------------------------------------------------------------------------


def test_sobol_points_are_more_even_than_chance():
    """In 2 dimensions the error of 1,000 points falls by far more than a half, and is honest."""
    oracle = linear_gaussian(2, 6, guide_shift=0.3, guide_scale=1.2)
    x = oracle.sample(100)
    exact = oracle.log_px(x)
    plain, even = (evidence(oracle, x, p, 1280) for p in (Guide(), Sobol()))
    assert (even.log_px - exact).square().mean().sqrt() < 0.4 * (plain.log_px - exact).square().mean().sqrt()
    assert even.std_error.median() < 0.4 * plain.std_error.median()
    # Ten replicates: scores are Student-t with 9 degrees of freedom, beyond 8 with a probability of 2e-5 for each.
    assert ((even.log_px - exact).abs() < 10 * even.std_error).all()


def test_sobol_data_are_independent():
    """The mean over 200 equal data has the error that independent data have: a shared shift would make it 14 times."""
    oracle = linear_gaussian(2, 3, guide_shift=0.3, guide_scale=1.2)
    x = oracle.sample(1).expand(200, 3)
    scores = [
        (estimate.mean - oracle.log_px(x[:1]).item()) / estimate.mean_std_error
        for estimate in (evidence(oracle, x, Sobol(), 160, seed=s) for s in range(20))
    ]
    assert torch.tensor(scores).square().mean().sqrt() < 2.2


def test_sobol_chunks_go_on_with_the_same_points():
    oracle = linear_gaussian(2, 6, guide_shift=0.3)
    x = oracle.sample(4)
    # A prepared proposal has batches of the same data for both sizes, and chunks of 64 or of 16 draws.
    whole, parts = (evidence(oracle, x, Sobol(Inflated(Laplace())), 640, chunk_size=size) for size in (10_000, 64))
    torch.testing.assert_close(whole.log_px, parts.log_px)
    torch.testing.assert_close(whole.std_error, parts.std_error)


def test_a_refined_guide_has_a_higher_elbo_and_a_full_one_the_highest():
    oracle = linear_gaussian(5, 8)

    def poor(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(5, dtype=torch.float64), 0.5).to_event(1))

    x = oracle.sample(30)
    guide, diagonal, full = (
        pvae.log_evidence(oracle.model, poor, x, proposal=p)
        for p in (Guide(), Refined(full=False, steps=300), Refined(steps=300))
    )
    # The best diagonal Gaussian has the precision's diagonal: KL = (sum_d log P_dd - log |P|) / 2.
    precision = torch.linalg.inv(oracle.posterior(x[:1]).covariance_matrix)[0]
    best = oracle.log_px(x).mean() - (precision.diagonal().log().sum() - precision.logdet()) / 2
    assert guide.elbo.mean() < best - 1
    assert diagonal.elbo.mean().item() == pytest.approx(best.item(), abs=0.03)
    assert full.elbo.mean().item() == pytest.approx(oracle.log_px(x).mean().item(), abs=0.03)


def test_a_mode_is_found_where_the_density_is_not_log_concave():
    """A Student-t likelihood far from the prior: the mode by bisection of the derivative on a grid."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(number(0.0), 3.0))
            pyro.sample("x", dist.StudentT(number(2.0), z, 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1 * x, 1.0))

    x = torch.linspace(-6, 6, 13, dtype=torch.float64)
    pair = Densities.of(place_pair(model, guide, device="cpu"), (x,))
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)[:, None]
    joint = dist.Normal(number(0.0), 3.0).log_prob(grid) + dist.StudentT(number(2.0), grid, 0.3).log_prob(x)
    with torch.no_grad():
        found = Laplace().gaussian(pair, (x,))
        value = pair.log_pxz((x,), pair.space.unflatten(found.loc[None])[0])[0]
    # A local maximum: nothing on the grid within 0.05 of it is higher.
    near = (grid - found.loc[:, 0]).abs() < 0.05
    assert (value >= joint.masked_fill(~near, -torch.inf).amax(0) - 1e-8).all()
    assert (found.factor > 0).all()


def test_another_guide_can_be_the_proposal(small_vae, bits):
    def broad(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.5).to_event(1))

    estimate = evidence(small_vae, bits[:20], broad, 2000)
    assert estimate.proposal == "broad"
    guide = evidence(small_vae, bits[:20], "guide", 2000)
    error = (estimate.std_error.square() + guide.std_error.square()).sqrt()
    assert ((estimate.log_px - guide.log_px).abs() < 5 * error).all()
    mixed = evidence(small_vae, bits[:20], Defensive(Guide(broad)), 2000)
    assert ((mixed.log_px - guide.log_px).abs() < 5 * (mixed.std_error + guide.std_error)).all()
    with pytest.raises(pvae.ProgramError, match=r"only in the guide: \['w'\]"):
        evidence(small_vae, bits, lambda x: pyro.sample("w", dist.Normal(torch.zeros(len(x)), 1.0)))


def test_a_flow_is_seen_through_its_moments(bits):
    """A guide whose second latent depends on the first has no closed form; its Gaussian is fitted to draws."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(number(0.0), 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.5))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x / 2.25, 0.8))
            pyro.sample("b", dist.Normal((4 * a + x) / 5, 0.45))

    x = torch.randn(30, dtype=torch.float64)
    pair = Densities.of(place_pair(model, guide, device="cpu"), (x,))
    with torch.no_grad():
        loc, factor = pair.guide_moments((x,))
    # a ~ N(x/2.25, .8^2), b = .8 a + x/5 + .45 e: from 400 draws, to 5 sigma
    torch.testing.assert_close(loc[:, 1], 0.8 * x / 2.25 + x / 5, rtol=0, atol=5 * 0.8 / 20)
    covariance = factor @ factor.mT
    assert covariance[:, 0, 1].mean().item() == pytest.approx(0.8 * 0.64, abs=0.05)
    exact = dist.Normal(number(0.0), 2.25**0.5).log_prob(x)
    estimate = pvae.log_evidence(model, guide, x, num_samples=3000, proposal=StudentT())
    assert ((estimate.corrected - exact).abs() < 5 * estimate.std_error).all()


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: Inflated(scale=0.0), "scale must be a positive number, got 0"),
        (lambda: StudentT(df=-1.0), "df must be a positive number"),
        (lambda: Defensive(share=1.0), "share must be a number above 0 and below 1, got 1"),
        (lambda: Defensive(Annealed()), "base must be a proposal with a density, got Annealed"),
        (lambda: Refined(steps=0), "steps must be a whole number"),
        (lambda: Refined(lr=0.0), "lr must be a positive number"),
        (lambda: Laplace(max_steps=0), "max_steps"),
        (lambda: StudentT(Sobol(replicates=7)), "num_samples must be a multiple of the 7 replicates, got 1000"),
        (lambda: Sobol(replicates=7), "num_samples must be a multiple of the 7 replicates, got 1000"),
        (lambda: Annealed(temperatures=0), "temperatures"),
        (lambda: Annealed(acceptance=1.5), "acceptance must be a number above 0 and below 1"),
        (lambda: Annealed(start="prior"), r"start must be a Gaussian proposal, such as .*; got 'prior'"),
        (lambda: StudentT(Prior()), r"base must be a Gaussian proposal, such as .*; got Prior\(\)"),
        (lambda: Refined(Prior()), r"start must be a Gaussian proposal"),
        (lambda: Laplace("guide"), r"start must be a Gaussian proposal.*; got 'guide'"),
        (lambda: Sobol(replicates=1), "replicates must be at least 2"),
        (lambda: Defensive("guide"), "base must be a proposal with a density, got 'guide'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_arguments_are_named(make, match, small_vae, bits):
    with pytest.raises(pvae.ArgumentError, match=match):
        evidence(small_vae, bits[:5], make())


@pytest.mark.parametrize("wrapped", [StudentT(Sobol()), Inflated(Sobol(), 1.1), Defensive(Sobol())], ids=named)
def test_replicates_pass_through_what_is_made_of_them(wrapped):
    oracle = linear_gaussian(2, 6, guide_shift=0.3)
    x = oracle.sample(40)
    estimate = evidence(oracle, x, wrapped, 1280)
    assert wrapped.replicates == 10
    # From ten replicates, as Student-t scores of 9 degrees of freedom; from 1,280 weights they would be far too wide.
    scores = (estimate.log_px - oracle.log_px(x)) / estimate.std_error
    assert 0.6 < scores.square().mean().sqrt() < 1.8


@pytest.mark.parametrize("other", [Refined(Sobol()), Annealed(Sobol(), temperatures=2)], ids=named)
def test_replicates_end_where_draws_are_moved(other):
    oracle = linear_gaussian(2, 6, guide_shift=0.3)
    x = oracle.sample(40)
    assert other.replicates is None
    estimate = evidence(oracle, x, other, 1000)
    assert ((estimate.log_px - oracle.log_px(x)).abs() < 5 * estimate.std_error + 1e-6).all()


@pytest.mark.parametrize(
    "proposal", ["refined", "laplace", Annealed(temperatures=5), "defensive", "student-t", Sobol()]
)
def test_nothing_of_the_callers_changes(proposal, module_pair, bits, caller_state):
    before = caller_state()
    weights = {name: value.clone() for name, value in module_pair.state_dict().items()}
    modes = [m.training for m in module_pair.modules()]
    first, again = (evidence(module_pair, bits[:9], proposal, 20) for _ in range(2))
    before.assert_unchanged()
    assert modes == [m.training for m in module_pair.modules()]
    assert all(torch.equal(v, weights[k]) for k, v in module_pair.state_dict().items())
    assert all(p.grad is None for p in module_pair.parameters())
    assert torch.equal(first.log_px, again.log_px)
    assert not any(t.requires_grad for t in (first.log_px, first.std_error, *first.diagnostics.values()))


def test_a_proposal_with_untrained_params_warns():
    """A guide that comes along as a proposal runs only after the pair was looked at."""
    oracle = linear_gaussian(2, 4)

    def other(x):
        scale = pyro.param("width", torch.tensor(1.0, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), scale).to_event(1))

    with pytest.warns(UserWarning, match=r"\['width'\] have their initial values"):
        evidence(oracle, oracle.sample(5), other, 100)
    pyro.param("width", torch.tensor(2.0, dtype=torch.float64))
    evidence(oracle, oracle.sample(5), other, 100)  # warnings are errors here
