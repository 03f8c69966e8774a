"""Gaussians fitted to each datum, against exact posteriors."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pvae
from pvae.evidence.densities import Densities
from pvae.evidence.proposals import Elliptical, Guide, Laplace, Refined
from pvae.evidence.proposals import ascent as ascent_module
from pvae.runtime import place_pair
from pvae.testing import linear_gaussian


def densities_of(oracle, x):
    return Densities.of(place_pair(oracle.model, oracle.guide, device="cpu"), (x,))


def fit(proposal, pair, x):
    torch.manual_seed(0)
    with torch.no_grad(), pyro.validation_enabled(False):
        return proposal.gaussian(pair, (x,))


@pytest.mark.parametrize("latent_dim", [1, 2, 10, 40])
@pytest.mark.parametrize("guide", [(3.0, 0.2), (-1.0, 5.0)], ids=["far and narrow", "wide"])
def test_a_gaussian_posterior_is_found(latent_dim, guide):
    """Its slope has no noise: from a wide start it is found when all directions were seen, from a narrow one as the
    width doubles, until the divergence is a thousandth or does not fall by half any more."""
    oracle = linear_gaussian(latent_dim, latent_dim + 3, noise=0.7, guide_shift=guide[0], guide_scale=guide[1])
    x = oracle.sample(6)
    fitted = fit(Refined(), densities_of(oracle, x), x)
    exact = oracle.posterior(x)
    torch.testing.assert_close(fitted.loc, exact.loc, rtol=0, atol=1e-2)
    covariance = fitted.factor @ fitted.factor.mT
    torch.testing.assert_close(covariance, exact.covariance_matrix.expand_as(covariance), rtol=0, atol=1e-2)
    assert (fitted.factor.triu(1) == 0).all()
    assert (fitted.factor.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_a_perfect_start_stays():
    oracle = linear_gaussian(5, 8)
    x = oracle.sample(3)
    pair = densities_of(oracle, x)
    start, fitted = Guide().gaussian(pair, (x,)), fit(Refined(), pair, x)
    torch.testing.assert_close(fitted.loc, start.loc, rtol=0, atol=1e-4)
    torch.testing.assert_close(fitted.factor, start.factor, rtol=0, atol=1e-4)


def test_data_that_have_converged_leave_the_batch(monkeypatch):
    """Of a guide that is exact for one half of the data and wrong for the other, the exact half is done sooner."""
    exact, wrong = linear_gaussian(8, 12), linear_gaussian(8, 12, guide_shift=2.0, guide_scale=3.0)
    x = exact.sample(20)
    pair = densities_of(exact, x)
    good, bad = (Guide().gaussian(densities_of(oracle, x), (x,)) for oracle in (exact, wrong))
    start = Elliptical(
        pair.space, torch.cat([good.loc[:10], bad.loc[10:]]), torch.cat([good.factor[:10], bad.factor[10:]])
    )
    sizes, evaluate = [], ascent_module.log_joint_and_slope

    def count(pair, batch, u, num_data):
        sizes.append(u.shape[1])
        return evaluate(pair, batch, u, num_data)

    monkeypatch.setattr(ascent_module, "log_joint_and_slope", count)
    torch.manual_seed(0)
    with torch.no_grad():
        loc, _ = ascent_module.climb(pair, (x,), start, full=True, steps=40, particles=4, lr=1.0)
    assert sizes[:2] == [20, 10]  # one step sees that the exact half has nothing to gain
    assert len(sizes) >= 3  # 4 draws see 3 directions of 8
    assert sizes == sorted(sizes, reverse=True)
    torch.testing.assert_close(loc, exact.posterior(x).loc, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("latent_dim", "particles"), [(1, 2), (2, 16), (8, 4), (50, 16), (50, 51)])
def test_a_gaussian_is_found_when_all_directions_were_seen(latent_dim, particles, monkeypatch):
    """In a turn, and one more to see that nothing is left to gain; in double precision, to rounding."""
    pyro.set_rng_seed(1)
    oracle = linear_gaussian(latent_dim, latent_dim + 3, guide_shift=1.0, guide_scale=3.0, dtype=torch.float64)
    x, evaluations, evaluate = oracle.sample(4), [], ascent_module.log_joint_and_slope

    def count(*args):
        evaluations.append(args[2].shape)
        return evaluate(*args)

    monkeypatch.setattr(ascent_module, "log_joint_and_slope", count)
    fitted, exact = fit(Refined(particles=particles), densities_of(oracle, x), x), oracle.posterior(x)
    assert len(evaluations) <= 2 * -(-latent_dim // (particles - 1))
    torch.testing.assert_close(fitted.loc, exact.loc, rtol=0, atol=1e-7)
    covariance = fitted.factor @ fitted.factor.mT
    torch.testing.assert_close(covariance, exact.covariance_matrix.expand_as(covariance), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dim", "particles"), [(50, 16), (7, 3), (3, 2), (2, 16)])
def test_draws_of_a_turn(dim, particles):
    """They have a mean of zero and show all directions; each is standard normal: |e|^2 has mean D, within 5 errors."""
    torch.manual_seed(0)
    turn, sets = ascent_module._take_turns(particles, torch.zeros(1, dim, dtype=torch.float64))
    drawn = [next(sets) for _ in range(turn * (1000 // turn))]
    assert all(len(noise) <= particles and noise.mean(0).abs().max() < 1e-9 for noise in drawn)
    assert torch.linalg.matrix_rank(torch.cat(drawn[:turn])) == dim
    squares = torch.stack([noise.square().sum(-1).mean() for noise in drawn])
    assert abs(squares.mean() - dim) < 5 * squares.std() / len(squares) ** 0.5


@pytest.mark.parametrize("particles", [1, 2, 5, 50])
def test_any_number_of_particles_fits(particles):
    oracle = linear_gaussian(5, 8, guide_shift=1.0, guide_scale=2.0)
    x = oracle.sample(4)
    fitted = fit(Refined(particles=particles, steps=200), densities_of(oracle, x), x)
    torch.testing.assert_close(fitted.loc, oracle.posterior(x).loc, rtol=0, atol=0.1)


def test_one_datum_with_nan_spoils_no_other():
    """A datum whose density is nan stays where it began; the others are fitted as if it were not there."""
    oracle = linear_gaussian(3, 5, guide_shift=1.0, guide_scale=2.0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0).mask(True), obs=x[:, 0] + torch.log(x[:, 1]))

    x = oracle.sample(6).abs()
    pair = Densities.of(place_pair(model, oracle.guide, device="cpu"), (x,))
    alone = fit(Refined(), pair, x)
    spoiled = x.clone()
    spoiled[2, 1] = -1.0
    start, fitted = Guide().gaussian(pair, (spoiled,)), fit(Refined(), pair, spoiled)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(fitted.loc[others], alone.loc[others], rtol=0, atol=1e-2)
    torch.testing.assert_close(fitted.loc[2], start.loc[2])


def test_captured_fits_are_those_of_the_programs(monkeypatch):
    """The same noise, in tiles that are filled up: three steps of 5 particles for 301 data, to rounding."""
    monkeypatch.setattr("pvae.capture.captured._no_compiler", [True])  # which would take seconds
    oracle = linear_gaussian(4, 7, guide_shift=1.0, guide_scale=2.0)
    x = oracle.sample(301)
    fitted = []
    for capture in (False, True):
        pair = densities_of(oracle, x)
        pair.programs.capture = capture
        fitted.append(fit(Refined(steps=3, particles=5), pair, x))
    torch.testing.assert_close(fitted[0].loc, fitted[1].loc, rtol=0, atol=1e-3)
    torch.testing.assert_close(fitted[0].factor, fitted[1].factor, rtol=0, atol=1e-3)


def test_a_posterior_that_is_no_gaussian_gets_a_wider_one():
    """Against the widest ELBO's, a fit to a Student-t's tails has a smaller error of its weights."""
    torch.manual_seed(0)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.StudentT(2.0, z.cumsum(-1), 0.2).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 0.5).to_event(1))

    x = torch.randn(60, 4).cumsum(-1)
    errors = {}
    for wider in (0.0, ascent_module._WIDER):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ascent_module, "_WIDER", wider)
            errors[wider] = pvae.log_evidence(model, guide, x, num_samples=2000, proposal="refined").std_error.median()
    assert errors[ascent_module._WIDER] < errors[0.0]


def test_laplace_is_exact_for_a_gaussian_posterior():
    oracle = linear_gaussian(6, 9, guide_shift=2.0, guide_scale=3.0)
    x = oracle.sample(5)
    fitted = fit(Laplace(), densities_of(oracle, x), x)
    torch.testing.assert_close(fitted.loc, oracle.posterior(x).loc, rtol=0, atol=1e-3)
