"""`log_evidence` on pairs whose log p(x) is exact, and on pairs that people write.

Statistical tests have fixed seeds. Where a bound is K sigma of a statistic that is normal to good accuracy, the chance
that a right program fails under another seed is below 1e-6 for 5 sigma.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import types

import numpy as np
import pyro
import pytest
import torch
from conftest import ModulePair
from pyro import distributions as dist
from torch import nn
from torch.distributions import constraints

import pvae
from pvae.evidence import proposals
from pvae.evidence.planning import chunk_shape, default_chunk_size
from pvae.evidence.session import Session
from pvae.evidence.traces import Densities
from pvae.testing import linear_gaussian


def evidence(pair, x, **options):
    return pvae.log_evidence(pair.model, pair.guide, x, **options)


def z_scores(estimate, exact):
    return (estimate.log_px - exact) / estimate.std_error


# --- against exact answers ----------------------------------------------------------------------------------------


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


# --- draws, chunks, seeds -----------------------------------------------------------------------------------------


class Counted(proposals.Proposal):
    """Deals out the columns of one matrix of draws, and counts them."""

    name = "counted"

    def __init__(self, num_samples, num_data):
        self.deck = -90 + torch.randn(num_samples, num_data, dtype=torch.float64)
        self.dealt = torch.zeros(num_data, dtype=torch.long)

    def on(self, pair, batch):
        return Dealt(pair, batch, self)


class Dealt(proposals.Sampler):
    def __init__(self, pair, batch, deck):
        super().__init__(pair, batch)
        self.proposal = deck

    def log_weights(self, num_samples):
        columns = self.batch[1]
        taken = int(self.proposal.dealt[columns[0]])
        self.proposal.dealt[columns] += num_samples
        return self.proposal.deck[taken : taken + num_samples, columns]


@pytest.mark.parametrize("num_samples", [1, 7, 250])
@pytest.mark.parametrize("chunk_size", [1, 3, 64, 1000, None])
def test_chunks_that_do_not_divide_give_the_same_estimate_of_exactly_that_many(num_samples, chunk_size):
    def model(x, i):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x, i):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    counted = Counted(num_samples, 11)
    data = (torch.zeros(11), torch.arange(11))
    estimate = pvae.log_evidence(model, guide, data, num_samples=num_samples, proposal=counted, chunk_size=chunk_size)
    assert counted.dealt.tolist() == [num_samples] * 11
    assert estimate.num_samples == num_samples
    exact = counted.deck.logsumexp(0) - math.log(num_samples)
    torch.testing.assert_close(estimate.log_px, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("chunk_size", [5, 33, None])
def test_every_chunk_size_estimates_the_same(proposal, chunk_size, small_vae, bits):
    """Other chunks make other draws, so the estimates agree to 5 sigma of both; K = 200, 9 data."""
    one = evidence(small_vae, bits[:9], num_samples=200, proposal=proposal, chunk_size=4000)
    other = evidence(small_vae, bits[:9], num_samples=200, proposal=proposal, chunk_size=chunk_size, seed=1)
    error = (one.std_error.square() + other.std_error.square()).sqrt()
    assert ((one.log_px - other.log_px).abs() < 5 * error).all()


class Shared(proposals.Prior):
    def shares_draws(self, pair):
        return True


@pytest.mark.parametrize("proposal", [proposals.Guide(), Shared(), proposals.Laplace(), proposals.Annealed()])
@pytest.mark.parametrize("num_samples", [1, 1000, 10**6])
def test_chunks_are_bounded_whatever_the_order_of_the_data(proposal, num_samples):
    labels, images = torch.zeros(100_000), torch.zeros(1, 3, 64, 64).expand(100_000, 3, 64, 64)
    pair = types.SimpleNamespace(space=types.SimpleNamespace(dim=50))
    sessions = [Session(pair, data, torch.device("cpu")) for data in ((labels, images), (images, labels))]
    shapes = [chunk_shape(100_000, num_samples, s, proposal, default_chunk_size(s, proposal)) for s in sessions]
    assert shapes[0] == shapes[1]
    rows, draws = shapes[0]
    entries = rows * min(draws, num_samples) * (1 if isinstance(proposal, Shared) else images[0].numel())
    assert rows >= 1
    assert draws >= 1
    assert entries <= 2**22


@pytest.mark.parametrize("proposal", ["guide", "prior"])
def test_log_weights_are_the_draws_behind_the_estimate(proposal, small_vae, bits):
    options = {"num_samples": 40, "proposal": proposal, "chunk_size": 60, "seed": 3}
    weights = pvae.log_weights(small_vae.model, small_vae.guide, bits[:9], **options)
    estimate = evidence(small_vae, bits[:9], **options)
    assert weights.shape == (40, 9)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights.logsumexp(0) - math.log(40), estimate.log_px)


def test_same_seed_same_bits(small_vae, bits):
    first, again, other = (evidence(small_vae, bits, num_samples=50, seed=s).log_px for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert evidence(small_vae, bits, num_samples=2, seed=None).seed != 0


# --- the prior's shared draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: pvae.VAE.mlp((2, 3), 2, [8]), lambda: pvae.VAE.conv((1, 2, 4), 2, (4,), 8)])
def test_shared_draws_are_weighed_as_the_model_weighs_them(make):
    vae = make()
    x = torch.bernoulli(torch.full((9, *vae.event_shape), 0.5))
    with torch.no_grad():
        pair = Densities.of(vae.model, vae.guide, (x,), torch.device("cpu"))
        assert pair.shares_prior
        torch.manual_seed(0)
        shared = pair.draw_shared_prior((x,), 20)
        torch.manual_seed(0)
        z = vae.prior().sample((20, 1))
        exact = torch.stack([vae.decode(z[:, 0]).log_prob(row) for row in x], 1)
    torch.testing.assert_close(shared, exact, rtol=1e-5, atol=1e-5)


def test_shared_and_separate_draws_estimate_the_same(small_vae, bits):
    class Separate(proposals.Prior):
        def shares_draws(self, pair):
            return False

        def on(self, pair, batch):
            separate = dataclasses.replace(pair)
            vars(separate)["shares_prior"] = False
            return super().on(separate, batch)

    shared = evidence(small_vae, bits[:50], num_samples=2000, proposal="prior")
    separate = evidence(small_vae, bits[:50], num_samples=2000, proposal=Separate())
    assert shared.shared_draws
    assert not separate.shared_draws
    error = (shared.std_error.square() + separate.std_error.square()).sqrt()
    assert ((shared.log_px - separate.log_px).abs() < 5 * error).all()
    assert shared.mean_std_error == pytest.approx(shared.std_error.mean().item())
    assert shared.mean_std_error > separate.mean_std_error


def bernoulli(logits):
    return dist.Bernoulli(logits=logits)


def bernoulli_pair(
    prior=lambda x: dist.Normal(torch.zeros(2), 1.0), logits=lambda z, x: z @ torch.ones(2, 6), **options
):
    """A pair whose parts may or may not depend on the data, beyond observing them."""

    class Made:
        @staticmethod
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior(x).to_event(1))
                fn = options.get("family", bernoulli)(logits(z, x))
                fn = fn.mask(options["mask"]) if "mask" in options else fn
                pyro.sample("x", fn.to_event(1), obs=x)

        @staticmethod
        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return Made


class HalfBernoulli(dist.Bernoulli):
    """A family of its own, that only descends from Bernoulli."""

    def log_prob(self, value):
        return super().log_prob(value) / 2


def mixture(loc):
    components = dist.Normal(torch.stack([loc, loc + 1], -1), torch.tensor([0.5, 1.0]))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)


@pytest.mark.parametrize(
    "pair",
    [
        bernoulli_pair(prior=lambda x: dist.Normal(x[:, :2], 1.0)),
        bernoulli_pair(logits=lambda z, x: z @ torch.ones(2, 6) + x.mean(1, keepdim=True)),
        bernoulli_pair(logits=lambda z, x: z @ torch.ones(2, 6) + z.new_zeros(len(x), 1)),
        bernoulli_pair(mask=torch.arange(6) % 2 == 0),
        bernoulli_pair(prior=lambda x: mixture(x[:, :2])),
        bernoulli_pair(family=lambda logits: HalfBernoulli(logits=logits)),
    ],
    ids=["prior", "likelihood", "copies", "masked", "mixture", "subclass"],
)
def test_draws_are_shared_only_where_that_is_sound(pair, bits):
    prior, guide = (evidence(pair, bits[:20], num_samples=4000, proposal=p) for p in ("prior", "guide"))
    assert not prior.shared_draws
    error = (prior.std_error.square() + guide.std_error.square()).sqrt()
    assert ((prior.log_px - guide.log_px).abs() < 5 * error + 1e-3)[~prior.unreliable & ~guide.unreliable].all()


@pytest.mark.parametrize("family", [bernoulli, lambda logits: dist.Bernoulli(logits.sigmoid())])
def test_draws_are_shared_for_logits_and_for_probabilities(family, bits):
    pair = bernoulli_pair(family=family)
    shared, guide = (evidence(pair, bits[:20], num_samples=4000, proposal=p) for p in ("prior", "guide"))
    assert shared.shared_draws
    error = (shared.std_error.square() + guide.std_error.square()).sqrt()
    assert ((shared.log_px - guide.log_px).abs() < 5 * error).all()


def test_a_conditional_prior_is_drawn_from_for_each_datum():
    """z | c ~ N(c, 1), x | z ~ Bernoulli: draws of one datum's prior would be wrong for another's; 5 sigma."""
    c = torch.tensor([-3.0, 3.0]).repeat(10)
    pair = bernoulli_pair(
        prior=lambda x: dist.Normal((6 * x[:, :1] - 3).expand(-1, 2), 1.0), logits=lambda z, x: z @ torch.ones(2, 1)
    )
    x = (c > 0).float()[:, None]
    estimate = evidence(pair, x, num_samples=4000, proposal="prior")
    draws = torch.randn(1_000_000) * 2**0.5 + 6
    exact = torch.sigmoid(draws).mean().log()  # by symmetry the same for both kinds of data
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error + 1e-3).all()


# --- any Pyro pair ------------------------------------------------------------------------------------------------


def test_pyros_own_style_of_vae_goes_through(module_pair, bits):
    pvae.fit(module_pair.model, module_pair.guide, bits, epochs=10, batch_size=32, lr=0.01, progress=False)
    guide, prior = (evidence(module_pair, bits[:100], num_samples=1000, proposal=p) for p in ("guide", "prior"))
    assert not guide.unreliable.any()
    error = (guide.std_error.square() + prior.std_error.square()).sqrt()
    assert ((guide.log_px - prior.log_px).abs() < 5 * error).all()


def test_a_probability_over_all_data_sums_to_one():
    """p(x) over all 64 patterns of 6 bits sums to 1; the sum's standard error is known, 5 sigma."""
    pair = ModulePair()
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    estimate = evidence(pair, x, num_samples=5000)
    px = estimate.log_px.exp()
    assert px.sum().item() == pytest.approx(1, abs=5 * (px * estimate.std_error).norm().item())


def test_several_latents_and_a_nested_plate():
    """Two latents, one for each of 3 features in a plate inside the data plate; the exact log p(x) is normal."""
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None]

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            with pyro.plate("features", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(a, scale))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.mean(1) / 2, 1.0))
            with pyro.plate("features", 3, dim=-2):
                pyro.sample("b", dist.Normal((a + x.T) / 2, 1.0))

    covariance = torch.ones(3, 3, dtype=torch.float64) + (scale[:, 0] ** 2 + 1).diag()
    exact = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
    x = exact.sample((50,))
    for proposal in ("guide", "prior"):
        estimate = pvae.log_evidence(model, guide, x, num_samples=5000, proposal=proposal)
        assert ((estimate.log_px - exact.log_prob(x)).abs() < 5 * estimate.std_error + 1e-3).all()


def test_scales_are_no_part_of_log_px_and_masks_are():
    oracle = linear_gaussian(2, 3, guide_shift=0.3)
    x = oracle.sample(20)
    plain = evidence(oracle, x, num_samples=100)
    scaled = pvae.log_evidence(
        pyro.poutine.scale(oracle.model, 10.0), pyro.poutine.scale(oracle.guide, 0.1), x, num_samples=100
    )
    assert torch.equal(plain.log_px, scaled.log_px)

    def subsampled(program):
        def run(x):
            with pyro.plate("data", 10_000, subsample=torch.arange(len(x))):
                z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
                if program == "model":
                    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return run

    one = torch.randn(20, 1, dtype=torch.float64)
    estimate = pvae.log_evidence(subsampled("model"), subsampled("guide"), one, num_samples=4000)
    exact = dist.Normal(torch.zeros((), dtype=torch.float64), 2**0.5).log_prob(one[:, 0])
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error).all()

    seen = torch.rand(20, 3) < 0.5

    def masked(data):
        x, seen = data[:, :3], data[:, 3:].bool()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            px = dist.Normal(z @ oracle.weight.T + oracle.bias, oracle.noise)
            pyro.sample("x", px.mask(seen).to_event(1), obs=x)

    estimate = pvae.log_evidence(
        masked, lambda d: oracle.guide(d[:, :3]), torch.cat([x, seen.double()], 1), num_samples=4000, proposal="prior"
    )
    covariance = oracle.weight @ oracle.weight.T + oracle.noise**2 * torch.eye(3, dtype=torch.float64)
    for row, s, value, error in zip(x, seen, estimate.log_px, estimate.std_error, strict=True):
        exact = 0.0
        if s.any():
            exact = dist.MultivariateNormal(oracle.bias[s], covariance[s][:, s]).log_prob(row[s])
        assert abs(value - exact) < 6 * error + 1e-9


def test_a_site_masked_by_a_handler_says_nothing():
    """Where ``poutine.mask`` hides x, every weight of the prior is p(nothing | z) = 1."""
    oracle = linear_gaussian(2, 3)
    x = oracle.sample(20)

    def model(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z @ oracle.weight.T + oracle.bias, oracle.noise).to_event(1), obs=x)

    seen = torch.arange(20) % 2 == 0
    estimate = pvae.log_evidence(model, lambda x, seen: oracle.guide(x), (x, seen), num_samples=4000, proposal="prior")
    assert (estimate.log_px[~seen] == 0).all()
    assert ((estimate.log_px - oracle.log_px(x)).abs() < 5 * estimate.std_error)[seen].all()


def test_plates_may_have_any_name():
    oracle = linear_gaussian(2, 3, guide_shift=0.3)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", oracle.proposal(x))

    x = oracle.sample(9)
    assert torch.equal(
        pvae.log_evidence(oracle.model, guide, x, num_samples=9).log_px, evidence(oracle, x, num_samples=9).log_px
    )


def test_a_tuple_of_data(bits):
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y.double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 2, 0.5**0.5))

    x, y = torch.randn(30, dtype=torch.float64), torch.arange(30)
    estimate = pvae.log_evidence(model, guide, (x, y), num_samples=30)
    torch.testing.assert_close(estimate.log_px, dist.Normal(y.double(), 2**0.5).log_prob(x), rtol=0, atol=1e-6)


def test_untrained_pyro_params_warn_and_trained_ones_count():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.0)) * x, scale))

    x = 2**0.5 * torch.randn(300)
    result = pvae.fit(model, guide, x, epochs=150, batch_size=100, lr=0.02, progress=False)
    with pytest.warns(UserWarning, match=r"\['scale', 'slope'\] have their initial values.*result.trained"):
        untrained = pvae.log_evidence(model, guide, x)
    with result.trained():
        trained = pvae.log_evidence(model, guide, x)
    assert trained.elbo.mean() > untrained.elbo.mean() + 0.5
    assert trained.ess.median() > 2 * untrained.ess.median()
    pyro.param("scale", result.params["scale"], constraint=constraints.positive)
    pyro.param("slope", result.params["slope"])
    torch.testing.assert_close(pvae.log_evidence(model, guide, x).log_px, trained.log_px)


# --- nothing of the caller's changes ------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_changes_nothing(proposal, grad, module_pair, bits, caller_state):
    module_pair.encoder[0].eval()
    pyro.module("decoder", nn.Linear(2, 2))  # another model's, under the same name
    pyro.param("free", torch.tensor(1.0))
    before, weights = caller_state(), copy.deepcopy(module_pair.state_dict())
    modes = [m.training for m in module_pair.modules()]
    with torch.set_grad_enabled(grad):
        estimate = evidence(module_pair, bits, num_samples=10, proposal=proposal)
    before.assert_unchanged()
    assert modes == [m.training for m in module_pair.modules()]
    assert all(torch.equal(v, weights[k]) for k, v in module_pair.state_dict().items())
    assert all(p.grad is None for p in module_pair.parameters())
    assert not estimate.log_px.requires_grad


@pytest.mark.parametrize("proposal", ["guide", "prior"])
@pytest.mark.parametrize("caller", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_do_not_reach_evaluation(proposal, caller, small_vae, bits):
    plain = evidence(small_vae, bits, num_samples=30, proposal=proposal)
    with caller():
        inside = evidence(small_vae, bits, num_samples=30, proposal=proposal)
    assert torch.equal(plain.log_px, inside.log_px)


HIDDEN = {"nets": [nn.Sequential(nn.Dropout(), nn.Linear(2, 6))]}


def test_modules_that_nobody_finds_run_in_eval_mode_too(bits):
    """A module in a list in a dict in a global of a function of a function: with dropout left on, weights vary."""

    def helper(z):
        return HIDDEN["nets"][0](z)

    pair = bernoulli_pair(logits=lambda z, x: helper(z))
    first, again = (evidence(pair, bits[:50], num_samples=4000, seed=s) for s in (0, 1))
    assert HIDDEN["nets"][0].training
    assert HIDDEN["nets"][0][0].training
    HIDDEN["nets"][0].eval()
    assert torch.equal(first.log_px, evidence(pair, bits[:50], num_samples=4000, seed=0).log_px)
    HIDDEN["nets"][0].train()
    assert not torch.equal(first.log_px, again.log_px)


def test_programs_run_in_eval_mode_without_gradients(bits):
    seen = set()

    class Watched(ModulePair):
        def guide(self, x):
            seen.add((self.training, torch.is_grad_enabled()))
            super().guide(x)

    evidence(Watched(), bits, num_samples=3)
    assert seen == {(False, False)}


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"num_samples": -3}, "num_samples"),
        ({"num_samples": 2.5}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"proposal": "posterior"}, "proposal must be one of 'guide', 'prior', 'refined'.*; got 'posterior'"),
        ({"proposal": proposals.Prior}, "class Prior: make one"),
        ({"proposal": None}, "proposal must be one of 'guide'.*or a Pyro guide; got None"),
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


def no_plate(x):
    pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[:, 0])


def fixed_plate(x):
    with pyro.plate("pixels", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[0])


def global_latent(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def guide_of(*names, fn=None, plate=True):
    def guide(x):
        with pyro.plate("data", len(x)) if plate else pyro.poutine.block():
            for name in names:
                pyro.sample(name, fn or dist.Normal(0.0, 1.0))

    return guide


def global_guide(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    guide_of("z")(x)


def sequential(x):
    for i in pyro.plate("data", 2):
        pyro.sample(f"x_{i}", dist.Normal(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)), 1.0), obs=x[i % len(x), 0])


def sequential_guide(x):
    for i in pyro.plate("data", 2):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def couples(x):
    """A datum's mean depends on the others of its batch."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + x[:, 1].mean(), 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    "model, guide, match",
    [
        (
            no_plate,
            lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)),
            "one plate over the data.*'x \\(model\\)' has plates",
        ),
        (fixed_plate, lambda x: [fixed_guide(x)], "one plate over the data.*pixels"),
        (global_latent, global_guide, "one plate over the data.*'w \\(model\\)' has plates \\[\\]"),
        (local, guide_of("w"), r"Only in the model: \['z'\]; only in the guide: \['w'\]"),
        (local, guide_of(), r"Model: \['z'\]; guide: \[\]"),
        (local, guide_of("z", "extra"), r"only in the guide: \['extra'\]"),
        (local, guide_of("z", fn=dist.Delta(torch.tensor(0.0))), r"point mass at \['z'\]"),
        (sequential, sequential_guide, r"one plate over the data.*'x_0 \(model\)' has plates \[\]"),
        (couples, guide_of("z"), r"treat each datum.*the model's log-density is .* if each is run alone"),
    ],
)
def test_pairs_without_an_evidence_for_each_datum_are_refused(model, guide, match, bits):
    with pytest.raises(pvae.ProgramError, match=match):
        pvae.log_evidence(model, guide, bits)


def fixed_guide(x):
    with pyro.plate("pixels", 6):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined", "laplace", "defensive", "ais"])
def test_a_program_that_does_not_broadcast_gives_the_same_answer(proposal):
    """A convolution wants exactly 4 dimensions, and softmax over dimension 1 means another thing with particles."""
    weight = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def made(decode):
        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decode(z), 0.5).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x[:, :2] / 4, 0.4).to_event(1))

        return model, guide

    def conv(z):
        return nn.functional.conv2d(torch.softmax(z, 1)[:, :, None, None], weight)[:, :, 0, 0]

    broadcasting = made(lambda z: torch.softmax(z, -1) @ weight[:, :, 0, 0].T)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimates = [pvae.log_evidence(*pair, x, num_samples=400, proposal=proposal) for pair in (made(conv), broadcasting)]
    error = torch.stack([e.std_error for e in estimates]).norm(dim=0)
    assert ((estimates[0].log_px - estimates[1].log_px).abs() < 5 * error).all()


def test_nested_plates_fold_too():
    """Two latents, one in a plate inside the data plate, and a program that asserts what it is given."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            if a.shape[0] != len(x):
                raise ValueError("not for particles")
            with pyro.plate("features", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(b, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.mean(1) / 2, 1.0))
            with pyro.plate("features", 3, dim=-2):
                pyro.sample("b", dist.Normal((a + x.T) / 2, 1.0))

    exact = dist.MultivariateNormal(torch.zeros(3).double(), (torch.ones(3, 3) + 2 * torch.eye(3)).double())
    x = exact.sample((30,))
    for proposal in ("guide", "prior", "laplace", "student-t"):
        estimate = pvae.log_evidence(model, guide, x, num_samples=3000, proposal=proposal)
        assert ((estimate.log_px - exact.log_prob(x)).abs() < 5 * estimate.std_error + 1e-6).all()


def test_model_and_guide_that_changed_places_are_refused(small_vae, bits):
    with pytest.raises(pvae.ProgramError, match=r"the model observes nothing.*in the place of the guide"):
        pvae.log_evidence(small_vae.guide, small_vae.model, bits)
    with pytest.raises(pvae.ProgramError, match=r"the guide observes \['x'\]"):
        pvae.log_evidence(small_vae.model, small_vae.model, bits)


def test_an_enumerated_latent_is_refused_by_name_and_the_guide_may_draw_it(bits):
    """What the message says to do next works: 1,000 draws of two values, against the exact sum over both."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c, 1.0), obs=x[:, 0])

    with pytest.raises(pvae.ProgramError, match=r"enumerated \(\['c'\]\).* guide draw them.* sum them out"):
        pvae.log_evidence(model, lambda x: None, bits)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.4)))

    estimate = pvae.log_evidence(model, guide, bits)
    x = bits[:, 0].double()
    exact = torch.stack([dist.Normal(c, 1.0).log_prob(x) for c in (0.0, 1.0)]).logsumexp(0) - np.log(2)
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error).all()


def test_a_density_that_is_not_finite_is_an_error(bits):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(torch.arange(len(x)) == 2, torch.nan, 0.0), 1.0))

    with pytest.raises(pvae.NumericalError, match=r"begins with datum 0: 5 of 1500 log-weights .*datum 2 of its batch"):
        pvae.log_evidence(local, guide, bits, num_samples=5)


# --- the estimate -------------------------------------------------------------------------------------------------


@pytest.fixture
def estimate():
    oracle = linear_gaussian(2, 5, guide_shift=0.3)
    return evidence(oracle, oracle.sample(30), num_samples=100, seed=4)


def test_the_estimate_describes_itself(estimate):
    assert estimate.num_data == 30
    assert estimate.mean == pytest.approx(estimate.log_px.mean().item())
    assert estimate.mean_std_error == pytest.approx((estimate.std_error**2).sum().sqrt().item() / 30)
    assert estimate.data_std_error == pytest.approx(estimate.log_px.std().item() / 30**0.5)
    assert str(estimate).splitlines()[0] == "log p(x) of 30 data, 100 samples each from the guide"
    assert len(str(estimate).splitlines()) < 24
    assert repr(estimate) == str(estimate)


def test_too_few_samples_for_khat_are_said(small_vae, bits):
    few = evidence(small_vae, bits, num_samples=24)
    assert few.khat.isnan().all()
    assert "k-hat needs at least 25 samples" in str(few)
    assert few.unreliable.all()
    one = evidence(small_vae, bits[:1], num_samples=1)
    assert one.std_error.isnan().all()
    assert math.isnan(one.data_std_error)
    str(one)


def test_to_dataset(estimate):
    data = estimate.to_dataset()
    assert dict(data.sizes) == {"datum": 30}
    np.testing.assert_array_equal(data["log_px"], estimate.log_px.numpy())
    assert set(data.data_vars) == {"log_px", "std_error", "ess", "khat", "elbo", "elbo_std_error", "samples"}
    assert data.attrs["num_samples"] == 100
    assert data.attrs["units"] == "nats"


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan])
def test_impossible_levels(estimate, level):
    with pytest.raises(pvae.ArgumentError, match="level"):
        estimate.interval(level)


def test_intervals_are_the_bias_corrected_normal_ones(estimate):
    """Up to what a tail heavier than it looks may add above, which is little for light ones: see test_intervals.py."""
    lower, upper = estimate.interval(0.95)
    centre, half = estimate.log_px + estimate.std_error**2 / 2, 1.959963984540054 * estimate.std_error
    torch.testing.assert_close(lower, centre - half)
    assert (upper > centre + half - 1e-12).all()
    assert ((upper - lower) / (2 * half)).median() < 1.15


def test_weights_too_large_for_their_precision_are_not_called_reliable():
    """At 1e20 nats float32 tells weights apart by 1e13 only, so that they look equal; float64 by 1e4."""
    for dtype, size in ((torch.float32, 1e10), (torch.float64, 1e10), (torch.float32, 1.0)):
        oracle = linear_gaussian(2, 5, guide_shift=0.5, dtype=dtype)
        x = torch.zeros(3, 5, dtype=dtype)
        x[2, 0] = size
        estimate = pvae.log_evidence(oracle.model, oracle.guide, x)
        large = size > 1
        assert estimate.unreliable.tolist() == [False, False, large]
        assert ("rounded to" in estimate.withheld[2]) == ("rounded to" in estimate.mean_withheld) == large
        assert ("1 of 3 data are unreliable: log-weights of this size are rounded to" in str(estimate)) == large
        assert estimate.interval()[0].isnan().tolist() == [False, False, large]


def test_a_pair_that_takes_another_number_of_tensors_is_told_so(small_vae, bits):
    with pytest.raises(pvae.ProgramError, match=r"the model cannot be called with a batch, which is 2 tensor\(s\)"):
        evidence(small_vae, (bits, bits[:, 0]))
