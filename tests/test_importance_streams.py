"""log p(x) of data that are read: that of the same data in memory, while all are never held at once."""

from __future__ import annotations

import weakref
from functools import partial

import helpers
import numpy as np
import pyro
import pytest
import torch
from helpers import Drawing, Items, Iterated, fit_fresh, make_loader
from pairs import Conditional
from pyro import distributions as dist
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    default_collate,
)

import pvae
from pvae.data import batches as data_batches
from pvae.evidence import drawing
from pvae.testing import linear_gaussian

evidence = partial(helpers.evidence, compile=False)

# Python 3.12 warns of any fork where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def oracle():
    return linear_gaussian(2, 5, guide_shift=0.3, guide_scale=1.2)


STREAMS = {
    "dataset": lambda x: Items(x),
    "float32": lambda x: Items(list(x.float().numpy())),
    "loader": lambda x: make_loader(x, batch_size=50),
    "workers": lambda x: make_loader(x, batch_size=50, num_workers=2),
    "iterable": lambda x: make_loader(Iterated(x), batch_size=50),
    "batches": lambda x: DataLoader(Items(list(x.split(50))), batch_size=None),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_an_exact_guide_gives_log_px_of_every_datum_in_order(kind):
    oracle = linear_gaussian(2, 5)
    x = oracle.sample(170)
    estimate = evidence(oracle, STREAMS[kind](x), num_samples=30)
    torch.testing.assert_close(estimate.log_px, oracle.log_px(x), rtol=0, atol=1e-5)
    assert (estimate.std_error < 1e-6).all()


def test_one_block_of_a_dataset_is_evaluated_as_in_memory(oracle):
    """To the bit: reading takes no random numbers away."""
    x = oracle.sample(150)
    options = {"num_samples": 40, "chunk_size": 900}
    for proposal in ("guide", "prior", "refined"):
        ours = evidence(oracle, Drawing(x), proposal=proposal, **options)
        theirs = evidence(oracle, x, proposal=proposal, **options)
        assert torch.equal(ours.log_px, theirs.log_px)
        assert ours.shared_draws == theirs.shared_draws
        assert ours.mean_std_error == theirs.mean_std_error


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined"])
@pytest.mark.parametrize("kind", ["dataset", "loader"])
def test_blocks_agree_with_memory_within_the_errors(proposal, kind, oracle, monkeypatch):
    """170 data: 5 combined standard errors, where k-hat lets errors be trusted, have a chance of 1e-4 to be passed."""
    monkeypatch.setattr(data_batches, "_MOST_DATA", 60)
    x = oracle.sample(170)
    ours = evidence(oracle, STREAMS[kind](x), proposal=proposal, num_samples=500)
    theirs = evidence(oracle, x, proposal=proposal, num_samples=500)
    assert ours.log_px.shape == (170,)
    good = (ours.khat < 0.5) & (theirs.khat < 0.5)
    assert good.double().mean() > 0.5
    error = (ours.std_error.square() + theirs.std_error.square()).sqrt() + 1e-9
    assert ((ours.log_px - theirs.log_px).abs() < 5 * error)[good].all()
    exact = (ours.log_px - oracle.log_px(x)).abs() / (ours.std_error + 1e-9)
    assert (exact[good] < 5).all()
    assert ours.shared_draws == (proposal == "prior")


def test_blocks_get_draws_of_their_own(oracle, monkeypatch):
    monkeypatch.setattr(data_batches, "_MOST_DATA", 20)
    x = oracle.sample(20)
    log_px = evidence(oracle, Items(torch.cat([x, x])), num_samples=20).log_px
    assert not torch.equal(log_px[:20], log_px[20:])


def test_blocks_hold_fewer_of_larger_data(oracle, monkeypatch):
    monkeypatch.setattr(data_batches, "_MOST_ENTRIES", 52)
    sizes, sum_block = [], drawing.Draws.sum_block
    monkeypatch.setattr(
        drawing.Draws, "sum_block", lambda self, block: sizes.append(block.num_data) or sum_block(self, block)
    )
    assert len(evidence(oracle, Items(oracle.sample(24)), num_samples=5).log_px) == 24
    assert sizes == [10, 10, 4]


def test_a_target_for_the_error_is_met_in_each_block(oracle):
    x = oracle.sample(90)
    data = make_loader(x, batch_size=40)
    estimate = evidence(oracle, data, num_samples=50, target_std_error=0.02, max_samples=20_000)
    assert ((estimate.std_error < 0.02) | (estimate.samples == 20_000)).double().mean() > 0.95
    assert len(estimate.samples.unique()) > 1
    assert ((estimate.log_px - oracle.log_px(x)).abs() < 5 * estimate.std_error + 1e-9).all()


def test_kept_weights_are_those_that_are_summed(oracle):
    data = make_loader(oracle.sample(90), batch_size=40)
    log_w = pvae.log_weights(oracle.model, oracle.guide, data, num_samples=60)
    assert log_w.shape == (60, 90)
    estimate = evidence(oracle, data, num_samples=60)
    torch.testing.assert_close(log_w.logsumexp(0) - np.log(60), estimate.log_px)


def test_several_tensors_are_evaluated(bits):
    pair, labels = Conditional(), bits[:, 0]
    ours = evidence(pair, Items(list(zip(bits, labels, strict=True))), num_samples=10)
    assert torch.equal(ours.log_px, evidence(pair, (bits, labels), num_samples=10).log_px)


def test_another_guide_with_modules_decides_the_dtype_of_every_block():
    """The pair has no modules, and float32 of its own; float64 data fit it because of the guide that is brought."""
    oracle = linear_gaussian(2, 5, dtype=torch.float32)

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(5, 2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.network(x), 1.0).to_event(1))

    x = oracle.sample(20).double()
    estimate = evidence(oracle, make_loader(x, batch_size=8), proposal=Other(), num_samples=10)
    assert estimate.log_px.isfinite().all()


def test_all_data_are_never_held_at_once(oracle, monkeypatch):
    """Data that are made as they are read: of 2,000, those of two blocks of 100 are there at most, and one datum."""
    monkeypatch.setattr(data_batches, "_MOST_DATA", 100)
    alive, most = weakref.WeakSet(), [0]

    class Made(Dataset):
        def __len__(self):
            return 2000

        def __getitem__(self, index):
            datum = torch.full((5,), index / 1000, dtype=torch.float64)
            alive.add(datum)
            most[0] = max(most[0], len(alive))
            return datum

    assert len(evidence(oracle, Made(), num_samples=3).log_px) == 2000
    assert most[0] <= 201

    batches, most[0] = weakref.WeakSet(), 0

    def collate(items):
        batches.add(batch := default_collate(items))
        most[0] = max(most[0], len(batches))
        return batch

    data = make_loader(Items(torch.zeros(2000, 5).double()), batch_size=100, collate_fn=collate)
    assert len(evidence(oracle, data, num_samples=3).log_px) == 2000
    assert most[0] <= 3  # the first, on which the pair was tried, the last, and the next
    most[0] = 0
    fit_fresh(data, pair=lambda: pvae.VAE.mlp(5, 1, [4], "gaussian"))
    assert most[0] <= 2


def test_a_weight_that_is_nan_names_its_batch():
    class Torn:
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, torch.where(x > 1e3, torch.nan, 1.0)), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 1.0))

    x = torch.randn(100)
    x[75] = 1e4
    with pytest.raises(pvae.NumericalError, match=r"that begins with datum 0 of batch 2 of data: .*nan"):
        evidence(Torn(), make_loader(x, batch_size=50), num_samples=5)
