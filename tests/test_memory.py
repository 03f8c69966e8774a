"""Peak memory of the process does not grow with the number of draws: measured in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import fork_lines

PEAK = """
import resource
import torch, pvae
torch.manual_seed(0)
vae = pvae.VAE.mlp(16, latent_dim=2, hidden=[16])
x = torch.bernoulli(torch.full((300, 16), 0.3))
estimate = pvae.log_evidence(vae.model, vae.guide, x, num_samples={num_samples}, proposal={proposal!r})
assert estimate.samples.tolist() == [{num_samples}] * 300
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def peak(proposal: str, num_samples: int, folder: Path) -> float:
    """Megabytes."""
    return run(PEAK.format(proposal=proposal, num_samples=num_samples), folder)


def run(code: str, folder: Path) -> float:
    """What a program prints."""
    return float(fork_lines(code, folder=folder)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize("proposal", ["prior", pytest.param("guide", marks=pytest.mark.slow)])
def test_peak_memory_does_not_grow_with_the_draws(proposal, tmp_path):
    """300 data; from 1,000 to 100,000 draws the largest weights kept grow from 96 to 950 a datum, 2 MB."""
    few, many = peak(proposal, 1000, tmp_path), peak(proposal, 100_000, tmp_path)
    print(f"{proposal}: {few:.0f} MB with 1,000 draws, {many:.0f} MB with 100,000")
    assert many < few + 120  # all weights would be 240 MB


KEPT = """
import resource
import torch, pvae
vae = pvae.VAE.mlp(784, latent_dim=2, hidden=[400])
proposal = pvae.evidence.proposals.Refined(steps=1)
pvae.log_weights(vae.model, vae.guide, torch.zeros(250, 784), num_samples={num_samples}, proposal=proposal)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_kept_weights_take_their_own_memory_and_no_more(tmp_path):
    """Of 40 chunks of 16 MB each but 2 MB of weights are kept; small pieces kept between them would hold on to all."""
    few, many = (run(KEPT.format(num_samples=num_samples), tmp_path) for num_samples in (21, 840))
    assert many < few + 300
