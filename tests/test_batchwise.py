"""Work on batches: in the order of the data, with the draws behind the weights, in chunks that fit."""

from __future__ import annotations

import pytest
import torch

import pvae
from pvae.evidence import map_batches
from pvae.testing import linear_gaussian


def log_weights_of(densities, batch, spans):
    parts = []
    for span in spans:
        latents, log_q = densities.draw_guide(batch, span)
        parts.append(densities.log_pxz(batch, latents) - log_q)
    return torch.cat(parts)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_these_are_the_draws_behind_the_weights(caller_state, chunk_size):
    oracle = linear_gaussian(2, 3, guide_shift=0.3)
    x, options = oracle.sample(7), {"num_samples": 40, "seed": 3, "chunk_size": chunk_size}
    before = caller_state()
    found = map_batches(log_weights_of, oracle.model, oracle.guide, x, **options)
    before.assert_unchanged()
    expected = pvae.log_weights(oracle.model, oracle.guide, x, compile=False, **options)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-10)


def test_batches_come_in_the_order_of_the_data(small_vae, bits):
    found = map_batches(
        lambda densities, batch, spans: (batch[0], spans),
        *(small_vae.model, small_vae.guide, bits),
        num_samples=50,
        chunk_size=1000,
    )
    assert torch.equal(torch.cat([batch for batch, _ in found]), bits)
    assert all(sum(spans) == 50 for _, spans in found)
    assert len(found) > 1


def test_it_begins_anew_with_less_where_memory_is_short(small_vae, bits):
    sizes = []

    def measure(densities, batch, spans):
        sizes.append(len(batch[0]) * spans[0])
        if sizes[-1] > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(batch[0])

    found = map_batches(measure, small_vae.model, small_vae.guide, bits, num_samples=10, chunk_size=2000)
    assert sizes[:2] == [2000, 1000]
    assert sum(found) == len(bits)
