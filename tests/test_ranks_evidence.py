"""Two processes evaluate every datum once, and agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import Items
from ranks import error_of, fit, launch, small, some_bits
from torch.utils.data import DataLoader, DistributedSampler

import pvae


def evidence(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exact = pvae.testing.linear_gaussian()
    shifted = pvae.testing.linear_gaussian(guide_shift=0.7, guide_scale=1.3)
    for count in (7, 1):
        x = exact.sample(count)
        loader = DataLoader(Items(x), batch_size=2)
        for name, data in (("tensor", x), ("dataset", Items(x)), ("loader", loader)):
            estimate = pvae.log_evidence(exact.model, exact.guide, data, num_samples=30, proposal="guide")
            log_weights = pvae.log_weights(exact.model, exact.guide, data, num_samples=30)
            found[f"{name} {count}"] = estimate.log_px, log_weights
            options = {"num_samples": 2000, "proposal": "guide", "chunk_size": 3000}
            estimate = pvae.log_evidence(shifted.model, shifted.guide, data, **options)
            log_weights = pvae.log_weights(shifted.model, shifted.guide, data, **options)
            found[f"shifted {name} {count}"] = estimate.log_px, estimate.std_error, estimate.khat, log_weights
    x = exact.sample(7)
    for proposal in ("prior", "refined"):
        estimate = pvae.log_evidence(exact.model, exact.guide, x, num_samples=1000, proposal=proposal)
        found[proposal] = estimate.log_px, estimate.std_error
    options = {"num_samples": 100, "target_std_error": 0.02, "proposal": "guide"}
    target = pvae.log_evidence(shifted.model, shifted.guide, x, **options)
    found["target"] = target.log_px, target.std_error
    alone = pvae.log_evidence(
        exact.model, exact.guide, x[: rank + 1], num_samples=30, proposal="guide", distributed=False
    )
    found["alone"] = alone.log_px
    padded = DataLoader(Items(x), batch_size=2, sampler=DistributedSampler(Items(x)))
    found["padded"] = error_of(lambda: pvae.log_evidence(exact.model, exact.guide, padded, num_samples=30))
    # Equal data: equal noise on two processes would show.
    equal = exact.sample(1).expand(8, -1)
    found["equal"] = (pvae.log_weights(shifted.model, shifted.guide, equal, num_samples=30),)
    # A trained pair: all processes have the same one.
    vae = small(rank)
    fit(vae, some_bits(100))
    found["trained"] = pvae.log_evidence(vae.model, vae.guide, some_bits(9), num_samples=100).log_px
    return found


def test_two_processes_evaluate_every_datum_once(tmp_path):
    first, second = launch(evidence, tmp_path)
    exact = pvae.testing.linear_gaussian()
    for name in first:
        if name not in ("padded", "alone"):
            pairs = zip(first[name], second[name], strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs), f"{name}: not the same bits"
    for count in (7, 1):
        truth = exact.log_px(exact.sample(count))
        for name in ("tensor", "dataset", "loader"):
            log_px, log_weights = first[f"{name} {count}"]
            torch.testing.assert_close(log_px, truth)
            torch.testing.assert_close(log_weights, truth.expand(30, count))
            log_px, std_error, khat, log_weights = first[f"shifted {name} {count}"]
            assert log_weights.shape == (2000, count)
            assert (std_error > 0).all()
            assert (khat < 0.7).all()
            assert ((log_px - truth).abs() < 5 * std_error).all()
            torch.testing.assert_close(log_px, log_weights.logsumexp(0) - torch.tensor(2000.0).log().double())
    assert len(first["equal"][0].unique()) == 30 * 8, "noise came twice"
    truth = exact.log_px(exact.sample(7))
    for name in ("prior", "refined", "target"):
        log_px, std_error = first[name]
        assert ((log_px - truth).abs() < 5 * std_error + 1e-6).all(), name
    assert (first["target"][1] < 0.03).all()
    torch.testing.assert_close(first["alone"], truth[:1])
    torch.testing.assert_close(second["alone"], truth[:2])
    for kind, said in (first["padded"], second["padded"]):
        assert kind == "DataError"
        assert "would count twice" in said
