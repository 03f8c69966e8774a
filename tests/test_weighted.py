"""Draws that are kept: the same as those that are summed, of any pair, with densities that add up."""

from __future__ import annotations

import pyro
import pytest
import torch
from pairs import ParamPair, RowGaussian
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal

import pvae
from pvae.evidence import map_batches, weighted_draws
from pvae.evidence.proposals import Sobol
from pvae.testing import linear_gaussian


@pytest.mark.parametrize("proposal", ["guide", "prior", "defensive", "student-t", Sobol(replicates=4)])
def test_they_are_the_draws_behind_the_weights(proposal, caller_state):
    oracle = linear_gaussian(2, 3, guide_shift=0.3)
    x, options = oracle.sample(7), {"num_samples": 40, "proposal": proposal, "seed": 3, "compile": False}
    if proposal == "prior":
        options["chunk_size"] = 7 * 40
    before = caller_state()
    kept = weighted_draws(oracle.model, oracle.guide, x, **{k: v for k, v in options.items() if k != "compile"})
    before.assert_unchanged()
    if proposal != "prior":  # whose weights share draws
        torch.testing.assert_close(
            kept.log_weights, pvae.log_weights(oracle.model, oracle.guide, x, **options), rtol=0, atol=1e-10
        )
    z = kept.latents["z"]
    assert (kept.num_samples, kept.num_data, z.shape) == (40, 7, (40, 7, 2))
    prior = dist.Normal(torch.zeros(2, dtype=z.dtype), 1.0).to_event(1)
    torch.testing.assert_close(kept.log_pz, prior.log_prob(z))
    likelihood = dist.Normal(z @ oracle.weight.T + oracle.bias, oracle.noise).to_event(1)
    torch.testing.assert_close(kept.log_px_given_z, likelihood.log_prob(x))
    assert repr(kept) == f"40 draws from {kept.proposal} for each of 7 data: z (40, 7, 2)"


def test_the_identity_holds_for_each_draw():
    """log p(x) = ELBO + KL(q || posterior), to 1e-5, whatever the guide: for each draw the logs add up."""
    oracle = linear_gaussian(3, 5, guide_shift=0.5, guide_scale=0.7)
    x = oracle.sample(20)
    kept = weighted_draws(oracle.model, oracle.guide, x, num_samples=50)
    elbo = kept.log_weights.mean(0)
    divergence = (kept.log_q - oracle.posterior(x).log_prob(kept.latents["z"])).mean(0)
    assert (divergence.abs() > 0.1).any()
    torch.testing.assert_close(elbo + divergence, oracle.log_px(x), rtol=0, atol=1e-5)


def test_chunks_and_several_sites():
    pair = RowGaussian(6)
    x = pair.row.repeat(3, 1)
    guide = RowGaussian(3).guide
    kept = weighted_draws(pair.oracle.model, pair.oracle.guide, x, num_samples=10, chunk_size=4)
    assert kept.latents["z"].shape == (10, 3, 2)
    with pytest.raises(pvae.ProgramError):
        weighted_draws(pair.oracle.model, guide, x, num_samples=10)  # other sites


def test_all_data_as_one_datum():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    guide, x = AutoNormal(model), torch.arange(5.0)
    guide(x)
    kept = weighted_draws(model, guide, x, num_samples=30)
    assert (kept.is_joint, kept.num_together, kept.num_data) == (True, 5, 1)
    loc = kept.latents["loc"]
    assert loc.shape == (30, 1, 1)  # with the plate that only the data have
    torch.testing.assert_close(kept.log_px_given_z[:, 0], dist.Normal(loc[:, 0], 1.0).log_prob(x).sum(-1).double())


def test_what_has_no_density_is_refused():
    pair, x = ParamPair(), torch.zeros(4)
    with pytest.raises(pvae.ArgumentError, match="'auto' has no draws"):
        weighted_draws(pair.model, pair.guide, x, proposal="auto")
    pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    pair.model(x), pair.guide(x)
    with pytest.raises(pvae.ArgumentError, match="no density of single draws"):
        weighted_draws(pair.model, pair.guide, x, proposal="ais", num_samples=10)


def test_batches_come_in_the_order_of_the_data(small_vae, bits):
    found = map_batches(
        lambda densities, batch, spans: (batch[0], spans), small_vae.model, small_vae.guide, bits, num_samples=50,
        chunk_size=1000,
    )  # fmt: skip
    assert torch.equal(torch.cat([batch for batch, _ in found]), bits)
    assert all(sum(spans) == 50 for _, spans in found)
    assert len(found) > 1
