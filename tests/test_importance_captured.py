"""log p(x) from captured chunks: the same draws and, to rounding, the same numbers."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.evidence import programs
from pvae.evidence.proposals import Annealed, Guide, Inflated, Mixture, StudentT

MIXTURE = Mixture((StudentT(), Inflated(), Guide()), (0.5, 0.3, 0.2))


@pytest.fixture
def made(never_compiled):
    return never_compiled(programs)


def estimates(model, guide, x, **options):
    return [
        pvae.log_evidence(
            model,
            guide,
            x,
            **{"num_samples": 60, "chunk_size": 200, "proposal": "guide", **options, "compile": compile},
        )
        for compile in (True, False)
    ]


def assert_same(ours, theirs):
    for name in ("elbo", "std_error", "ess"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-3, atol=1e-3)
    # Where all weights are nearly equal, their tail is one of rounding.
    torch.testing.assert_close(ours.khat, theirs.khat, rtol=0.1, atol=0.1, equal_nan=True)
    torch.testing.assert_close(ours.log_px, theirs.log_px, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("proposal", ["guide", "prior", "student-t", "refined", "laplace", MIXTURE])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian-per-pixel"])
def test_captured_chunks_give_the_same_numbers(proposal, likelihood, bits, made):
    vae = pvae.VAE.mlp(6, 2, [8], likelihood)
    assert_same(*estimates(vae.model, vae.guide, bits[:31], proposal=proposal))
    assert sum(captured.captures for captured in made)
    assert not any(captured.given_up for captured in made)


def test_what_keeps_a_state_is_not_captured(bits, made, small_vae):
    assert_same(*estimates(small_vae.model, small_vae.guide, bits[:5], proposal="defensive"))
    assert not made


def test_of_chains_the_slopes_are_captured(bits, made, small_vae):
    """Rounding may take a move across the edge of acceptance: then a chain is another, of the same law."""
    ours, theirs = estimates(small_vae.model, small_vae.guide, bits[:5], proposal=Annealed(temperatures=5))
    error = (ours.std_error.square() + theirs.std_error.square()).sqrt()
    assert ((ours.log_px - theirs.log_px).abs() < 5 * error).all()
    assert sum(captured.captures for captured in made)
    assert not made[0].given_up


def test_copies_of_the_data_in_place_of_a_plate(made):
    vae = pvae.VAE.conv((1, 8, 8), 2, channels=(3,), hidden=8)

    def model(x):
        vae.model(x.reshape(len(x), 1, 8, 8))  # counts dimensions from the left

    def guide(x):
        vae.guide(x.reshape(len(x), 1, 8, 8))

    assert_same(*estimates(model, guide, torch.rand(9, 64).round()))
    assert sum(captured.captures for captured in made)


def test_draws_for_which_the_product_has_no_number(made):
    """Rates of zero, under which the prior's matrix product is 0 times infinity: those chunks are done as they come."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(torch.where(z > 1.0, 0.0, z.exp())).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ours, theirs = estimates(model, guide, x, proposal="prior", num_samples=200, chunk_size=120)
    assert ours.shared_draws
    assert_same(ours, theirs)
    assert ours.log_px.isfinite().all()
    assert sum(captured.captures for captured in made)


def test_kept_weights_and_targets(bits, made, small_vae):
    pair = (small_vae.model, small_vae.guide, bits[:20])
    options = {"num_samples": 50, "chunk_size": 100, "proposal": "guide"}
    ours, theirs = (pvae.log_weights(*pair, **options, compile=c) for c in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    ours, theirs = (
        pvae.log_evidence(*pair, **options, target_std_error=0.1, max_samples=400, compile=c) for c in (True, False)
    )
    torch.testing.assert_close(ours.log_px, theirs.log_px, rtol=1e-5, atol=1e-4)
    assert sum(captured.captures for captured in made)


def test_compiled(bits, small_vae):
    assert_same(*estimates(small_vae.model, small_vae.guide, bits[:40]))


def test_compile_is_checked(bits, small_vae):
    with pytest.raises(pvae.ArgumentError, match="compile must be True, False or 'auto', got 1"):
        pvae.log_evidence(small_vae.model, small_vae.guide, bits, compile=1)
