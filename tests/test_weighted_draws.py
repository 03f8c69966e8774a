"""Draws kept with their weights, for pairs of every kind, against exact posteriors."""

from __future__ import annotations

import pyro
import pytest
import torch
from helpers import process_state
from pairs import ModulePair, bernoulli_pair
from pyro import distributions as dist
from pyro.infer import autoguide as auto
from pyro.ops.indexing import Vindex

import pvae
from pvae.evidence import weighted_draws
from pvae.evidence.pareto import fit_tail, smooth_tail, tail_length
from pvae.evidence.posterior import choose_draws
from pvae.evidence.proposals import Defensive, Sobol
from pvae.testing import linear_gaussian

PARALLEL = {"enumerate": "parallel"}
SHARES = torch.tensor([0.2, 0.5, 0.3])
CENTRES = torch.tensor([-3.0, 0.0, 2.0])


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def oracle():
    return linear_gaussian(2, 5, guide_shift=0.5, guide_scale=1.3)


@pytest.mark.parametrize("proposal", ["guide", "refined", "student-t", Defensive(), Sobol()])
def test_weighted_means_are_those_of_the_posterior(proposal):
    pair = oracle()
    x = pair.sample(6)
    drawn = weighted_draws(pair.model, pair.guide, x, num_samples=4000, proposal=proposal)
    assert drawn.latents["z"].shape == (4000, 6, 2)
    shares, exact = drawn.log_weights.softmax(0), pair.posterior(x)
    mean = (shares[..., None] * drawn.latents["z"]).sum(0)
    # 12 means with a standard error of at most sd / sqrt(ESS): 4.5 of them fail one run in 10,000.
    errors = exact.stddev / drawn.ess.sqrt()[:, None]
    assert ((mean - exact.mean).abs() < 4.5 * errors).all()
    assert (drawn.log_px - pair.log_px(x)).abs().max() < 0.1
    expected = dist.Normal(drawn.latents["z"] @ pair.weight.T + pair.bias, pair.noise).log_prob(x).sum(-1)
    torch.testing.assert_close(drawn.log_likelihood["x"], expected)


def test_weights_are_those_of_log_weights():
    pair = oracle()
    x = pair.sample(20)
    for chunk_size in (None, 64):
        options = {"num_samples": 300, "seed": 3, "chunk_size": chunk_size}
        kept = pvae.log_weights(pair.model, pair.guide, x, compile=False, **options)
        assert torch.equal(weighted_draws(pair.model, pair.guide, x, **options).log_weights, kept)


def test_states_are_left_as_they_were():
    pair = ModulePair()
    before = process_state()
    drawn = weighted_draws(pair.model, pair.guide, draws(5, 6).sign().clamp(min=0), num_samples=10)
    assert process_state() == before
    assert list(drawn.latents) == ["latent"]
    assert str(drawn) == (
        f"10 weighted draws of latent for 5 data, from guide; median ESS {drawn.ess.median().item():.0f}, "
        "k-hat above 0.7 for 5"
    )


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
        pyro.sample("x", dist.Normal(CENTRES[k], 0.7), obs=x)


def mixed(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(CENTRES[k], 0.5))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def folded(x):
    """Does not broadcast over particles."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.5)).reshape(len(x))
        pyro.sample("x", dist.Normal(CENTRES[k] + z, 0.7), obs=x)


def wide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.9))


def narrow(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 0.6))


def nothing(x):
    """A guide for a model whose latents are all summed out."""


@pytest.mark.parametrize(
    "model, guide, scale", [(mixture, nothing, 0.7), (mixed, wide, 0.74**0.5), (folded, narrow, 0.74**0.5)]
)
def test_latents_that_are_summed_out_are_drawn_given_the_others(model, guide, scale):
    x = 2 * draws(6)
    drawn = weighted_draws(model, guide, x, num_samples=6000)
    assert drawn.summed_out == ("k",)
    assert drawn.latents["k"].shape == (6000, 6)
    shares = torch.stack([(drawn.log_weights.softmax(0) * (drawn.latents["k"] == i)).sum(0) for i in range(3)], -1)
    exact = (SHARES.log() + dist.Normal(CENTRES, scale).log_prob(x[:, None])).softmax(-1).double()
    # 18 shares of standard error at most 0.5 / sqrt(ESS).
    assert ((shares - exact).abs() < 4.5 * 0.5 / drawn.ess.sqrt()[:, None]).all()


def test_chains_of_latents_that_are_summed_out():
    move = torch.tensor([[0.9, 0.1], [0.3, 0.7]])

    def model(x):
        with pyro.plate("data", len(x)):
            k = 0
            for t in pyro.markov(range(x.shape[1])):
                k = pyro.sample(f"k{t}", dist.Categorical(move[k]), infer=PARALLEL)
                pyro.sample(f"x{t}", dist.Normal(2.0 * k, 1.0), obs=x[:, t])

    x = draws(4, 2) + 1
    drawn = weighted_draws(model, nothing, x, num_samples=4000)
    likelihood = [dist.Normal(2.0 * torch.arange(2.0), 1.0).log_prob(x[:, t, None]) for t in range(2)]
    joint = move[0].log()[:, None] + move.log() + likelihood[0][:, :, None] + likelihood[1][:, None, :]
    exact = joint.flatten(1).softmax(1)
    pairs = 2 * drawn.latents["k0"] + drawn.latents["k1"]
    shares = torch.stack([(pairs == i).double().mean(0) for i in range(4)], -1)
    assert (shares - exact).abs().max() < 4.5 * 0.5 / 4000**0.5
    assert list(drawn.log_likelihood) == ["x0_and_x1"]
    torch.testing.assert_close(drawn.log_likelihood["x0_and_x1"][0], joint.flatten(1).logsumexp(1).double())


def groups(x):
    with pyro.plate("components", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("items", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(Vindex(mean)[..., k], 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(z, 2.0), obs=x + 1)


@pytest.mark.filterwarnings("ignore:the guide, AutoNormal, was run for the first time")
@pytest.mark.parametrize("num_data", [3, 5])
def test_joint_latents_and_the_likelihood_of_each_datum(num_data):
    """The other plate has three entries, too, at the same dimension."""
    x = draws(num_data)
    guide = auto.AutoNormal(pyro.poutine.block(groups, hide=["k"]))
    drawn = weighted_draws(groups, guide, x, num_samples=50)
    assert drawn.log_weights.shape == (50, 1)
    assert drawn.num_together == num_data
    shapes = {name: tuple(value.shape) for name, value in drawn.latents.items()}
    assert shapes == {"mean": (50, 1, 3), "weights": (50, 1, 3), "z": (50, 1, num_data), "k": (50, 1, num_data)}
    assert drawn.plates == {"mean": ("components",), "weights": (), "z": ("items",), "k": ("items",)}
    z = drawn.latents["z"][:, 0]
    expected = dist.Normal(z, 1.0).log_prob(x) + dist.Normal(z, 2.0).log_prob(x + 1)
    torch.testing.assert_close(drawn.log_likelihood["x_and_y"], expected.double(), rtol=1e-4, atol=1e-4)
    assert (drawn.latents["weights"].sum(-1) - 1).abs().max() < 1e-5  # in its own space


def test_what_is_summed_out_of_all_data_together_leaves_no_likelihood_of_each():
    def model(x):
        k = pyro.sample("k", dist.Categorical(SHARES), infer=PARALLEL)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("items", len(x)):
            pyro.sample("x", dist.Normal(CENTRES[k] + z, 1.0), obs=x)

    drawn = weighted_draws(model, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), draws(6), num_samples=40)
    assert drawn.log_likelihood["x"].shape == (40, 1)
    torch.testing.assert_close(drawn.log_likelihood["x"], drawn.log_weights, rtol=1e-4, atol=1e-4)


def test_particles_one_by_one():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1)).reshape(3)
        with pyro.plate("items", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=x[:, 0])

    def guide(x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 0.5).to_event(1))

    x = draws(6, 3)
    drawn = weighted_draws(model, guide, x, num_samples=30)
    w = drawn.latents["w"]
    assert w.shape == (30, 1, 3)
    expected = dist.Normal(w @ x.T, 1.0).log_prob(x[:, 0])[:, 0].double()
    torch.testing.assert_close(drawn.log_likelihood["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "proposal, words", [("ais", "name one that does, such as 'guide'"), ("auto", "no weights of one proposal")]
)
def test_proposals_that_keep_no_draws_are_refused(proposal, words):
    pair = oracle()
    with pytest.raises(pvae.ArgumentError, match=words):
        weighted_draws(pair.model, pair.guide, pair.sample(3), num_samples=100, proposal=proposal)


def test_weights_that_are_no_numbers_are_named():
    pair = bernoulli_pair(
        logits=lambda z, x: z @ torch.ones(2, 6) * torch.where(x.sum(-1) > 5, torch.nan, 1.0)[..., None]
    )
    x = torch.zeros(4, 6)
    x[3] = 1
    with pytest.raises(pvae.PVAEError):
        weighted_draws(pair.model, pair.guide, x, num_samples=10)


def test_smoothed_weights_keep_ranks_and_sums():
    log_weights = 2 * draws(2000, 3).double()
    smooth = smooth_tail(log_weights)
    assert torch.equal(smooth.argsort(0), log_weights.argsort(0))
    m = tail_length(2000)
    tail = fit_tail(log_weights.topk(m + 1, 0).values, 2000)
    torch.testing.assert_close(smooth.topk(m, 0).values.logsumexp(0), tail.log_smoothed_sum)
    assert torch.equal(smooth_tail(log_weights[:20]), log_weights[:20])
    assert torch.equal(smooth_tail(torch.zeros(100, 2)), torch.zeros(100, 2).double())


def test_draws_are_chosen_as_often_as_their_weights_say():
    log_weights = torch.stack([draws(1000), torch.zeros(1000), 9 * draws(1000)], 1)
    chosen, is_resampled = choose_draws(log_weights, resample=True)
    assert is_resampled.tolist() == [True, True, False]
    counts = torch.bincount(chosen[:, 0], minlength=1000)
    assert (counts - 1000 * smooth_tail(log_weights)[:, 0].softmax(0)).abs().max() < 1 + 1e-6
    assert torch.equal(chosen[:, 1].sort().values, torch.arange(1000))
    assert not torch.equal(chosen[:, 1], torch.arange(1000))  # in random order
    assert torch.equal(chosen[:, 2], torch.arange(1000))
    assert not choose_draws(log_weights, resample=False)[1].any()
