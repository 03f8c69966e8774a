"""Products in fewer digits: what is rounded and what is not, what that does to log p(x), and who says so.

Seeds are fixed. Where the same draws are weighed twice there is no Monte Carlo error: bounds are of rounding alone.
"""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

import pvae
from pvae.capture import kept
from pvae.evidence import programs
from pvae.evidence.proposals import Annealed
from pvae.runtime import in_precision
from pvae.testing import linear_gaussian


@pytest.fixture
def vae():
    return pvae.VAE.mlp(6, 2, [64])


def estimate_of(vae, x, **options):
    return pvae.log_evidence(vae.model, vae.guide, x, **{"num_samples": 200, "compile": False, **options})


# --- the block ------------------------------------------------------------------------------------------------------


def test_what_comes_out_of_a_product_is_float32():
    """Rounded to 8 bits by the product itself, and by nothing after it."""
    x, w = torch.randn(64, 100), torch.randn(50, 100)
    with in_precision("bfloat16", torch.device("cpu")):
        y = nn.functional.linear(x, w)
        z = y + 1e-3
    assert y.dtype is z.dtype is torch.float32
    torch.testing.assert_close(y, (x.bfloat16() @ w.bfloat16().T).float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(y.bfloat16().float(), y)
    assert torch.equal(z, y + 1e-3)


def test_tf32_is_a_setting_that_is_put_back():
    """Seen by products of a GPU alone."""
    before = torch.get_float32_matmul_precision()
    for precision, inside in [("tf32", "high"), ("float32", before), ("bfloat16", before)]:
        with in_precision(precision, torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == before
        assert not torch.is_autocast_enabled("cpu")


# --- what is rounded ------------------------------------------------------------------------------------------------


class Rounded(nn.Module):
    """A linear decoder whose products are in bfloat16 by hand; or in float32, for others to round."""

    def __init__(self, by_hand):
        super().__init__()
        self.by_hand = by_hand
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(50, 2, generator=generator))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            low = torch.bfloat16 if self.by_hand else torch.float32
            logits = (z.to(low) @ self.weight.to(low).T).float()
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2] - 0.5, 1.0).to_event(1))


def test_programs_round_their_products_and_nothing_else():
    """The same as rounding by hand: sums over 50 bits in 8 digits would be off by about 0.1 nats."""
    x = torch.randint(2, (30, 50)).float()
    options = {"num_samples": 50, "proposal": "guide", "compile": False}
    by_hand, ours = Rounded(True), Rounded(False)
    expected = pvae.log_weights(by_hand.model, by_hand.guide, x, **options)
    found = pvae.log_weights(ours.model, ours.guide, x, precision="bfloat16", **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)
    full = pvae.log_weights(ours.model, ours.guide, x, **options)
    assert 1e-3 < (found - full).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("proposal", ["auto", "guide", "prior", "refined", "laplace", "ais"])
def test_log_px_is_near_that_of_float32(proposal, bits, vae):
    """A root mean square of changes bounds all but few of them; here the most of 20 is below five times that."""
    proposal = Annealed(temperatures=10) if proposal == "ais" else proposal
    full, low = (estimate_of(vae, bits[:20], proposal=proposal, precision=p) for p in ("float32", "bfloat16"))
    assert not torch.equal(low.log_px, full.log_px)
    errors = torch.hypot(low.std_error, full.std_error) if proposal == "auto" or isinstance(proposal, Annealed) else 0
    assert ((low.log_px - full.log_px).abs() <= 5 * (low.rounding + errors)).all()
    assert 1e-5 < low.rounding.max() < 0.1
    assert low.product_precision == "bfloat16"


@pytest.mark.parametrize("proposal", ["guide", "refined"])
def test_captured_programs_round_alike_and_none_serves_another_precision(
    proposal, bits, vae, never_compiled, monkeypatch
):
    monkeypatch.setattr(kept, "_all", {})
    made = never_compiled(programs)
    options = {"proposal": proposal, "num_samples": 40, "chunk_size": 80}
    for precision in ("bfloat16", "float32", "bfloat16"):
        begun = len(made)
        captured = estimate_of(vae, bits[:12], precision=precision, compile=True, **options)
        plain = estimate_of(vae, bits[:12], precision=precision, **options)
        # Fits may go on from the last digit of a product.
        atol = 1e-4 if proposal == "guide" else 5 * captured.rounding.max().item()
        torch.testing.assert_close(captured.log_px, plain.log_px, rtol=1e-6, atol=atol)
        assert not any(one.given_up for one in made)
    assert not any(one.captures for one in made[begun:])  # those of the first call
    assert any(one.captures for one in made)


def test_compiled_programs_round_alike(bits, vae):
    options = {"proposal": "guide", "num_samples": 160, "chunk_size": 480, "precision": "bfloat16"}  # in 4 chunks
    compiled, plain = (estimate_of(vae, bits[:12], compile=c, **options) for c in (True, False))
    assert ((compiled.log_px - plain.log_px).abs() <= 5 * plain.rounding).all()


# --- what is said ---------------------------------------------------------------------------------------------------


def test_the_estimate_says_what_its_products_were_in(bits, vae):
    full, low = (estimate_of(vae, bits[:9], precision=p, seed=s) for s, p in enumerate(("float32", "bfloat16")))
    assert full.product_precision == "float32"
    assert "products" not in str(full)
    assert "products     in bfloat16, which moves log-weights by" in str(low)
    assert low.to_dataset().attrs["product_precision"] == "bfloat16"
    both = full.merge(low)
    assert both.product_precision == "float32 and bfloat16"
    assert both.product_rounding == low.product_rounding > full.product_rounding == 0
    assert low.merge(estimate_of(vae, bits[:9], precision="bfloat16", seed=5)).product_precision == "bfloat16"


def test_intervals_hold_what_rounding_does(bits, vae):
    full, low = (estimate_of(vae, bits[:40], proposal="refined", precision=p) for p in ("float32", "bfloat16"))
    lower, upper = low.interval()
    widened = (upper - lower) - 2 * low.rounding
    assert (low.rounding > 100 * full.rounding).all()
    given = ~lower.isnan()
    assert given.any()
    assert (widened[given] > 0).all()


def test_a_pair_that_needs_its_digits_is_warned_of_and_unreliable():
    """Numbers with a noise of 0.02: a mean that is off by 2^-9 of its size, 1 or so, is off by a tenth of that."""
    pair = linear_gaussian(2, 5, noise=0.02, dtype=torch.float32)
    x = pair.sample(30)
    with pytest.warns(UserWarning, match=r"precision='bfloat16' moves log p\(x\) by .* Use precision='float32'"):
        estimate = pvae.log_evidence(pair.model, pair.guide, x, proposal="guide", precision="bfloat16", compile=False)
    assert estimate.unreliable.all()
    assert "products in bfloat16 move log-weights by" in estimate.withheld[0]
    assert "use precision='float32'" in str(estimate)


def test_weights_that_are_kept(bits, vae):
    kept_weights = [
        pvae.log_weights(vae.model, vae.guide, bits[:5], num_samples=30, precision=p) for p in ("float32", "bfloat16")
    ]
    assert kept_weights[0].shape == kept_weights[1].shape
    assert 0 < (kept_weights[0] - kept_weights[1]).abs().max() < 0.2


def test_the_callers_settings_stay(bits, vae):
    before = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), torch.get_rng_state()
    estimate_of(vae, bits[:5], precision="bfloat16", num_samples=40)
    assert (torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, "precision must be one of 'float32', 'bfloat16', 'tf32'; got 'float16'"),
        ({"precision": "tf32", "device": "cpu"}, "precision='tf32' is of CUDA devices, and the pair is on cpu. Use"),
    ],
)
def test_what_there_is_not_is_refused(options, message, bits, vae):
    for call in (pvae.log_evidence, pvae.log_weights):
        with pytest.raises(pvae.ArgumentError, match=message.replace("(", r"\(")):
            call(vae.model, vae.guide, bits[:5], **options)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "more digits"), (torch.bfloat16, "its own products")])
def test_only_float32_has_digits_to_spare(dtype, reason, bits, vae):
    vae = vae.to(dtype)
    with pytest.raises(pvae.ArgumentError, match=reason):
        estimate_of(vae, bits[:5].to(dtype), precision="bfloat16")
