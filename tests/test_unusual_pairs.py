"""Pairs that users write and that have something unusual: log p(x) is right, or an error says what to do.

The statistical tests have fixed seeds. An error above 5 standard errors has a probability of 6e-7, for each of fewer
than 100 numbers.
"""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import pvae
from pvae.evidence.proposals import Annealed, Defensive, Prior

pytestmark = pytest.mark.filterwarnings("ignore:the guide, Auto:UserWarning", "ignore:parameters:UserWarning")

X = torch.tensor([-1.5, -0.4, 0.0, 0.3, 0.9, 2.1])
MASK = torch.tensor([True, True, True, False, True, False])  # True for the two data that the pair is tried on


def normal(x):
    """log p(x) where z and x given z are normal with scale 1."""
    return dist.Normal(0.0, math.sqrt(2)).log_prob(x).double()


def within(estimate, exact):
    assert ((estimate.log_px - exact).abs() <= 5 * estimate.std_error + 1e-6).all(), estimate


def gaussian(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# --- masks and scales -------------------------------------------------------------------------------------------------


def with_missing(x, there):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=there)


def missing_guide(mask_of):
    def guide(x, there):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.where(there, x / 2, 0.0), 1.0))
            with poutine.mask(mask=mask_of(there)):
                pyro.sample("x_unobserved", dist.Normal(z, 1.1))

    return guide


@pytest.mark.parametrize("proposal", ["guide", "prior", "defensive", "auto"])
def test_a_latent_that_both_programs_mask_counts_in_neither(proposal):
    estimate = pvae.log_evidence(with_missing, missing_guide(lambda there: ~there), (X, MASK), proposal=proposal)
    within(estimate, torch.where(MASK, normal(X), 0.0))


@pytest.mark.parametrize("there", [MASK, MASK.flip(0)])
@pytest.mark.parametrize(
    "model, guide, match",
    [
        (with_missing, missing_guide(lambda there: True), "'x_unobserved' is masked in the model .*mask=there"),
        (with_missing, AutoNormal(with_missing), "'x_unobserved' is masked in the model where the guide has a density"),
        (with_missing, AutoMultivariateNormal(with_missing), "'x_unobserved' is masked in the model"),
        (lambda x, there: gaussian(x), lambda x, there: masked_guide(x, there), "'z' is masked in the guide where the"),
    ],
)
def test_a_latent_that_one_program_masks_is_refused(model, guide, match, there):
    with pytest.raises(pvae.ProgramError, match=match):
        pvae.log_evidence(model, guide, (X, there))


def without_missing(x, there):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=there):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked_guide(x, there):
    with pyro.plate("data", len(x)), poutine.mask(mask=there):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def test_what_is_missing_may_be_left_out_instead_as_the_error_says():
    guide = AutoNormal(without_missing)
    pvae.fit(without_missing, guide, (X, MASK), epochs=60, batch_size=6, lr=0.1, progress=False, compile=False)
    within(pvae.log_evidence(without_missing, guide, (X, MASK)), normal(X)[MASK].sum())


def test_masks_of_entries_are_compared_however_they_are_put():
    """A mask of a distribution's entries, and the same by a handler in a plate over them."""
    there = torch.tensor([[True, False], [True, True], [False, True]])
    x = torch.randn(3, 2)

    def model(x, there):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).mask(there).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(there).to_event(1), obs=x)

    def guide(x, there, flip=False):
        mask = ~there if flip else there
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0).mask(mask).to_event(1))

    estimate = pvae.log_evidence(model, guide, (x, there), proposal="guide")
    within(estimate, (normal(x) * there).sum(1))
    with pytest.raises(pvae.ProgramError, match="'z' is masked in the model"):
        pvae.log_evidence(model, lambda x, there: guide(x, there, flip=True), (x, there))


def test_a_masked_latent_that_is_summed_out_has_no_density_to_mask():
    @config_enumerate
    def model(x, y, known):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), obs=y, obs_mask=known)
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    @config_enumerate
    def guide(x, y, known):
        with pyro.plate("data", len(x)):
            pyro.sample("k_unobserved", dist.Bernoulli(torch.sigmoid(x)))

    y = torch.arange(6.0) % 2
    parts = [math.log(p) + dist.Normal(k, 1.0).log_prob(X).double() for k, p in ((0.0, 0.7), (1.0, 0.3))]
    known = torch.where(y == 1, parts[1], parts[0])
    estimate = pvae.log_evidence(model, guide, (X, y, MASK))
    torch.testing.assert_close(estimate.log_px, torch.where(MASK, known, torch.logaddexp(*parts)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_a_tempered_likelihood_is_told_of_once_by_name(scale):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.warns(UserWarning, match="scales") as told:
        estimate = pvae.log_evidence(model, guide, X)
    assert [str(one.message).partition(",")[0] for one in told] == ["the model scales the densities of ['x']"]
    within(estimate, normal(X))


# --- priors that cannot be drawn --------------------------------------------------------------------------------------

UNDRAWN = "the model cannot draw its own latents"
FROM_PRIOR = ["prior", "defensive", Defensive(share=0.5), Annealed(Prior())]


def of_two_kinds(default=torch.float32):
    """A prior of one kind of number and a decoder of another, as where ``torch.zeros`` is beside ``.double()``."""
    kind = torch.float64 if default == torch.float32 else torch.float32
    decoder = nn.Linear(2, 3).to(kind)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, -1.0]]))
        decoder.bias.zero_()
    weight = decoder.weight.detach().double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x @ decoder.weight) / 3, 0.7).to_event(1))

    exact = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double() + weight @ weight.T)
    x = torch.randn(5, 3, dtype=kind)
    return model, guide, x, exact.log_prob(x.double())


def improper():
    """A flat prior: x are normal around an unknown mean of any size."""

    def model(x):
        mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.mean(), 0.5))

    n = len(X)
    square = (X - X.mean()).square().sum().double()
    return model, guide, X, -square / 2 - (n - 1) / 2 * math.log(2 * math.pi) - math.log(n) / 2


@pytest.mark.parametrize("make", [of_two_kinds, improper])
def test_where_the_prior_cannot_be_drawn_the_guide_answers(make):
    model, guide, x, exact = make()
    for proposal in ("guide", "refined"):
        within(pvae.log_evidence(model, guide, x, proposal=proposal), exact)
    with pytest.warns(UserWarning, match=rf"{UNDRAWN} .*(dtype|ImproperUniform).*: proposal='auto' goes on without"):
        estimate = pvae.log_evidence(model, guide, x)
    within(estimate, exact)
    assert not estimate.unresolved.any()


@pytest.mark.parametrize("make", [of_two_kinds, improper])
def test_proposals_from_a_prior_that_cannot_be_drawn_say_so(make):
    model, guide, x, _ = make()
    for proposal in FROM_PRIOR:
        with pytest.raises(pvae.ProgramError, match=f"{UNDRAWN}.*proposal='guide'"):
            pvae.log_evidence(model, guide, x, proposal=proposal, num_samples=50)
    with pytest.raises(pvae.ProgramError, match=UNDRAWN):
        pvae.evidence.bidirectional_monte_carlo(model, guide, x)
    with pytest.raises(pvae.ProgramError, match=UNDRAWN):
        pvae.evidence.prior_predictive(model, guide, x, num_samples=5)
    drawn = pvae.evidence.posterior_predictive(model, guide, x, num_samples=5, proposal="refined", resample=False)
    assert drawn.draws.keys() == drawn.data.keys()


def test_networks_in_float32_beside_a_default_of_float64():
    torch.set_default_dtype(torch.float64)
    try:
        model, guide, x, exact = of_two_kinds(torch.float64)
        with pytest.warns(UserWarning, match=f"{UNDRAWN} .*dtype"):
            estimate = pvae.log_evidence(model, guide, x)
    finally:
        torch.set_default_dtype(torch.float32)
    within(estimate, exact)


def test_a_guide_that_cannot_read_the_priors_latents_is_mixed_with_nothing():
    """Its second latent is a network's of float64, and the prior draws float32."""
    network = nn.Linear(1, 1).double()
    nn.init.zeros_(network.bias)

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(a, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x / 3, 0.8).to_event(1))
            pyro.sample("b", dist.Normal(x / 2 + 0 * network(a), 1.0).to_event(1))

    x = X.double()[:, None]
    estimate = pvae.log_evidence(model, guide, x)
    assert "defensive" not in estimate.stage
    within(estimate, dist.Normal(0.0, math.sqrt(6)).log_prob(x[:, 0]))


# --- latents that cannot be moved, and those made of others -----------------------------------------------------------


def two_latents(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(mean + 2 * k, 1.0), obs=x)


class HalfAutomatic:
    """A guide of its author's, with one of Pyro's for what is continuous."""

    def __init__(self):
        self.own = AutoNormal(poutine.block(two_latents, hide=["k"]))

    def __call__(self, x):
        self.own(x)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(torch.sigmoid(2 * x - 2)))


@pytest.fixture(scope="module")
def half_automatic():
    guide = HalfAutomatic()
    pvae.fit(two_latents, guide, X[-2:], epochs=100, batch_size=2, lr=0.05, progress=False, compile=False)
    return guide


def test_the_default_takes_an_automatic_guide_beside_discrete_latents(half_automatic):
    x, grid = X[-2:], torch.linspace(-9, 9, 3601, dtype=torch.float64)
    parts = [math.log(p) + dist.Normal(grid[:, None] + 2 * k, 1.0).log_prob(x) for k, p in ((0, 0.7), (1, 0.3))]
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + torch.logaddexp(*parts).sum(1)
    estimate = pvae.log_evidence(two_latents, half_automatic, x, num_samples=4000)
    assert estimate.stage == ["guide"]
    within(estimate, joint.logsumexp(0) + math.log(grid[1] - grid[0]))


@pytest.mark.parametrize("proposal", ["refined", "defensive", "student-t", "ais"])
def test_what_an_error_advises_works(proposal, half_automatic):
    with pytest.raises(pvae.ProgramError, match=r"'k' is discrete.*proposal='guide' or 'prior'"):
        pvae.log_evidence(two_latents, half_automatic, X[-2:], proposal=proposal)
    for advised in ("guide", "prior"):
        assert pvae.log_evidence(two_latents, half_automatic, X[-2:], proposal=advised).log_px.isfinite().all()


def test_quadrature_advises_what_takes_any_latents(half_automatic):
    with pytest.raises(pvae.ProgramError, match=r"'k' is discrete, and quadrature .* Use pvae.log_evidence\.$"):
        pvae.evidence.gauss_hermite(two_latents, half_automatic, X[-2:])


def test_one_number_for_each_datum_may_be_made_of_another():
    def guide(x):
        with pyro.plate("data", len(x)):
            e = pyro.sample("e", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(x / 2 + 0.8 * e, log_density=-math.log(0.8)))

    for proposal in ("auto", "defensive", "refined"):
        within(pvae.log_evidence(gaussian, guide, X, proposal=proposal), normal(X))


def test_log_p_that_is_exact_is_resolved():
    """Where x is masked all weights are 1, and the prior's floor is above 0 by a rounding alone."""

    def guide(x, there):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(there, x / 2, 0.0), 1.0))

    for kind in (torch.float32, torch.float64):
        estimate = pvae.log_evidence(without_missing, guide, (X.to(kind), MASK))
        assert not estimate.unresolved.any()
        within(estimate, torch.where(MASK, normal(X), 0.0))
