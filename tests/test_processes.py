"""Processes of a group: whether there are others, and what each one's share is."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as td
from ranks import fit, small, weights

import pvae
from pvae.errors import ArgumentError
from pvae.runtime.processes import ALONE, Processes, resolve_processes


def test_a_group_has_to_be_there_where_it_is_asked_for(bits, small_vae):
    with pytest.raises(ArgumentError, match=r"torchrun.*init_process_group"):
        fit(small_vae, bits, distributed=True)
    with pytest.raises(ArgumentError, match=r"torchrun.*init_process_group"):
        pvae.log_evidence(small_vae.model, small_vae.guide, bits, distributed=True)
    with pytest.raises(ArgumentError, match="distributed must be True, False or 'auto'"):
        fit(small_vae, bits, distributed="yes")
    assert resolve_processes("auto") is resolve_processes(False) is ALONE


def test_a_group_of_one_is_one_process(bits, tmp_path):
    expected, vae = small(), small()
    fit(expected, bits)
    td.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert resolve_processes(True) == ALONE
        fit(vae, bits, distributed=True)
        pvae.log_evidence(vae.model, vae.guide, bits, num_samples=30, distributed=True)
    finally:
        td.destroy_process_group()
    assert torch.equal(weights(vae), weights(expected))


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 23])
def test_rows_are_dealt_out_once_in_order_and_evenly(rows):
    parts = [Processes(number, 4).shard(torch.arange(rows)) for number in range(4)]
    assert torch.equal(torch.cat(parts), torch.arange(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_seeds_of_ranks_differ_and_fit_torch():
    seeds = [Processes(number, 1000).rank_seed(seed) for number in range(1000) for seed in (0, 1, 2**63 - 1)]
    assert len(set(seeds)) == 3000
    assert seeds[:3] == [0, 1, 2**63 - 1]  # the first one's is the caller's
    assert all(0 <= seed < 2**63 for seed in seeds)
