"""How much is evaluated at once."""

from __future__ import annotations

import types

import pytest
import torch

from pvae.evidence import proposals
from pvae.evidence.densities import Densities
from pvae.evidence.latents import Layout
from pvae.evidence.planning import chunk_shape, default_chunk_size
from pvae.evidence.traces import Runner
from pvae.evidence.trials import Trial
from pvae.runtime import Pair


class Shared(proposals.Prior):
    def shares_draws(self, pair):
        return True


@pytest.mark.parametrize("proposal", [proposals.Guide(), Shared(), proposals.Laplace(), proposals.Annealed()])
@pytest.mark.parametrize("num_samples", [1, 1000, 10**6])
def test_chunks_are_bounded_whatever_the_order_of_the_data(proposal, num_samples):
    labels, images = torch.zeros(100_000), torch.zeros(1, 3, 64, 64).expand(100_000, 3, 64, 64)
    placed, layout = Pair(None, None, [], torch.device("cpu")), Layout(-1, -2)
    trials = [
        Trial(Runner(layout), data, (), (), (), has_masks=False, scaled=())
        for data in ((labels, images), (images, labels))
    ]
    pairs = [Densities(placed, trial) for trial in trials]
    for pair in pairs:
        vars(pair)["space"] = types.SimpleNamespace(dim=50)
    shapes = [chunk_shape(100_000, num_samples, p, proposal, default_chunk_size(p, proposal)) for p in pairs]
    assert shapes[0] == shapes[1]
    rows, draws = shapes[0]
    entries = rows * min(draws, num_samples) * (1 if isinstance(proposal, Shared) else images[0].numel())
    assert rows >= 1
    assert draws >= 1
    assert entries <= 2**22
