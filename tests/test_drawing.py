"""Draws by chunks: exactly that many, the same ones for a seed, and the same estimate whatever the chunks."""

from __future__ import annotations

import math
from functools import partial

import helpers
import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.evidence import proposals

evidence = partial(helpers.evidence, num_samples=1000)


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
