"""Whatever is wrong with data that are read is said before it counts."""

from __future__ import annotations

import os
import sys
import time

import pyro
import pytest
import torch
from helpers import Counted, Items, Iterated, Raising, fit_fresh, kills_workers, make_loader, tear
from pyro import distributions as dist
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import pvae
from pvae.data import batches
from pvae.data.streams import Stream
from pvae.runtime.processes import Processes
from pvae.svi import step as engine

# Python 3.12 warns of any fork where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


# --- data that are left out, or come more than once -------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"drop_last": True}, r"the loader drops the last 44 of 300 data in each pass \(drop_last=True\)"),
        ({"sampler": range(200)}, "its range draws 200 of 300 data in each pass"),
        ({"sampler": SubsetRandomSampler(range(100))}, "its SubsetRandomSampler draws 100 of 300 data"),
        ({"sampler": RandomSampler(range(300), num_samples=700)}, "its RandomSampler draws 700 of 300 data"),
        (
            {"batch_sampler": BatchSampler(SequentialSampler(range(299)), 150, True)},
            r"draws 299 of 300 data in each pass; the loader drops the last 149 of 299 data",
        ),
    ],
)
def test_data_left_out_or_repeated_in_training_are_said(options, said, bits):
    with pytest.warns(UserWarning, match=f"^data: .*{said}"):
        fit_fresh(make_loader(bits, **options), epochs=1)


def test_dropping_from_an_iterable_is_said(bits):
    with pytest.warns(UserWarning, match="^data: the loader drops the last 44 of 300 data in each pass"):
        fit_fresh(make_loader(Counted(bits), drop_last=True), epochs=1)
    with pytest.warns(UserWarning, match="^data: the loader drops a last batch that is not full"):
        fit_fresh(make_loader(Iterated(bits), drop_last=True), epochs=1)


def test_dropping_in_what_is_evaluated_is_said(bits, small_vae):
    data = make_loader(bits, drop_last=True)
    with pytest.warns(UserWarning, match="^data: the loader drops the last 44 of 300 data"):
        estimate = pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    assert len(estimate.log_px) == 256
    with pytest.warns(UserWarning, match="^validation: the loader drops the last 44 of 300 data"):
        fit_fresh(bits, validation=data)


@pytest.mark.parametrize(
    "sampler",
    [
        RandomSampler(range(300), replacement=True),
        WeightedRandomSampler([1.0] * 300, 300),
        [0, *range(300)],
    ],
)
def test_data_that_would_count_twice_are_refused_where_they_are_evaluated(sampler, bits, small_vae):
    said = "may draw one of 300 data more than once, so that some would count twice"
    with pytest.raises(pvae.DataError, match=f"data: its {type(sampler).__name__} {said}"):
        pvae.log_evidence(small_vae.model, small_vae.guide, make_loader(bits, sampler=sampler))
    with pytest.raises(pvae.DataError, match=f"validation: its .*{said}"):
        fit_fresh(bits, validation=make_loader(bits, sampler=sampler))


def test_workers_that_give_all_the_data_each_are_noticed(bits, small_vae):
    class Undivided(IterableDataset):
        def __len__(self):
            return len(bits)

        def __iter__(self):
            return iter(bits)

    data = make_loader(Undivided(), num_workers=2)
    with pytest.warns(UserWarning, match="data: 600 data came in a pass, and by its length there are 300"):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    with pytest.warns(UserWarning, match="data: 600 data came in a pass"):
        fit_fresh(data, epochs=1)


def distributed(length, **options):
    sampler = DistributedSampler(range(length), 2, 0, **{"shuffle": False, **options})
    return make_loader(torch.zeros(length, 6), sampler=sampler, batch_size=4)


def test_a_distributed_sampler_says_what_it_pads_and_drops():
    two = Processes(0, 2)
    with pytest.warns(UserWarning, match="data: its DistributedSampler pads 17 data to 18 in each pass"):
        padded = Stream("data", distributed(17), 1, 0, two)
    with pytest.warns(UserWarning, match="data: its DistributedSampler draws 16 of 17 data in each pass"):
        dropped = Stream("data", distributed(17, drop_last=True), 1, 0, two)
    assert (padded.num_data, dropped.num_data, padded.steps) == (18, 16, 3)
    with pytest.raises(pvae.DataError, match="its DistributedSampler pads 17 data to 18, so that some would count"):
        Stream("data", distributed(17), 1, 0, two, evaluated=True)
    plain = Stream("data", distributed(18), 1, 0, two, evaluated=True)
    assert plain.drawn_by == "DistributedSampler"  # each process has every other datum
    assert plain.num_data == 18


def test_what_each_process_drops_is_added_up():
    sampler = DistributedSampler(range(18), 2, 0, shuffle=False)
    data = make_loader(torch.zeros(18, 6), sampler=sampler, batch_size=4, drop_last=True)
    with pytest.warns(UserWarning, match="the loader drops the last 2 of 18 data"):
        assert Stream("data", data, 1, 0, Processes(1, 2)).num_data == 16


def test_a_distributed_sampler_for_other_processes_is_an_error(bits):
    with pytest.raises(
        pvae.DataError, match=r"a DistributedSampler for 2 processes, and there are 1. Pass the dataset"
    ):
        fit_fresh(distributed(18))


@pytest.mark.parametrize(
    "options, who",
    [
        ({"shuffle": True}, "RandomSampler"),
        ({"sampler": [*range(299, -1, -1)]}, "list"),
        ({"batch_sampler": [[2, 1, 0], [5, 4, 3]]}, "list"),
        ({"sampler": DistributedSampler(range(300), 1, 0)}, "DistributedSampler"),
    ],
)
def test_another_order_is_said_where_results_have_one(options, who, bits, small_vae):
    data = make_loader(bits, **options)
    with pytest.warns(UserWarning, match=f"data: results are in the order in which the loader's {who} draws the data"):
        estimate = pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    if "sampler" in options and who == "list":
        plain = pvae.log_evidence(small_vae.model, small_vae.guide, make_loader(bits.flip(0)), num_samples=2)
        assert torch.equal(estimate.log_px, plain.log_px)
    fit_fresh(bits, validation=make_loader(bits, shuffle=True))  # a sum has no order: no warning


# --- what is wrong with the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [Items, make_loader])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_before_its_step(read, value, bits, small_vae):
    bits[200, 3] = value
    steps, count = [], lambda x: steps.append(1) or x
    with pytest.raises(pvae.DataError, match=r"batch \d of data holds 1 nan or infinite entries.* index \(\d+, 3\)"):
        fit_fresh(read(bits), pair=lambda: small_vae, transform=count, epochs=1)
    assert all(p.isfinite().all() for p in small_vae.parameters())
    if read is make_loader:
        assert len(steps) == 1 + 3  # a look, and the three batches before
        with pytest.raises(pvae.DataError, match=r"batch 4 of validation holds 1 nan.* index \(8, 3\)"):
            fit_fresh(torch.zeros(300, 6), validation=read(bits))
        with pytest.raises(pvae.DataError, match=r"batch 4 of data holds 1 nan or infinite.* index \(8, 3\)"):
            pvae.log_evidence(small_vae.model, small_vae.guide, read(bits), num_samples=2)


@pytest.mark.parametrize("value, example", [(0.3, "0.3"), (255.0, "255")])
def test_what_no_bernoulli_gives_is_named_before_its_step(value, example, bits, small_vae, monkeypatch):
    bits[200, 3] = value
    said = f"batch 4 of {{}}: site 'x' is Bernoulli, whose support is Boolean.*for example {example}"
    taken, original = [], engine.Step.__call__
    monkeypatch.setattr(engine.Step, "__call__", lambda *args: taken.append(1) or original(*args))
    with pytest.raises(pvae.DataError, match=said.format("data")):
        fit_fresh(make_loader(bits))
    assert len(taken) == 3
    with pytest.raises(pvae.DataError, match=said.format("validation")):
        fit_fresh(torch.zeros(300, 6), validation=make_loader(bits))
    with pytest.raises(pvae.DataError, match=said.format("data")):
        pvae.log_evidence(small_vae.model, small_vae.guide, make_loader(bits), num_samples=2)
    with pytest.raises(pvae.DataError, match=r"batch . of data: site 'x' is Bernoulli"):
        fit_fresh(Items(bits))


def test_supports_that_a_single_entry_does_not_show(monkeypatch):
    """Counts of at most 3, of which a later batch has 7."""
    monkeypatch.setattr(batches, "_MOST_DATA", 10)

    class Counts:
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Binomial(3, logits=z.expand(-1, 4)).to_event(1), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x[:, :1] / 3, 1.0).to_event(1))

    x = torch.arange(4.0).repeat(30, 1)
    x[25, 1] = 7.0
    pair = Counts()
    with pytest.raises(pvae.DataError, match="batch 3 of data: site 'x' is Binomial"):
        pvae.log_evidence(pair.model, pair.guide, Items(x), num_samples=2)


def test_numbers_too_large_for_the_parameters_are_named():
    x = torch.randn(300, 6, dtype=torch.float64)
    x[200, 3] = 1e200
    pair = pvae.VAE.mlp(6, 2, [8], "gaussian")
    with pytest.raises(pvae.DataError, match=r"batch 4 of data: .* too large for the parameters' torch.float32"):
        fit_fresh(make_loader(x), pair=lambda: pair)
    with pytest.raises(pvae.DataError, match=r"batch 4 of data: .* too large for the parameters' torch.float32"):
        pvae.log_evidence(pair.model, pair.guide, make_loader(x), num_samples=2)


@pytest.mark.parametrize(
    "data",
    [
        Items([]),
        make_loader(Items([])),
        make_loader(Counted([])),
        make_loader(Iterated([])),
        make_loader(torch.zeros(9, 6), drop_last=True),
        make_loader(torch.zeros(9, 6), batch_sampler=[]),
    ],
    ids=["dataset", "loader", "iterable", "iterable of unknown length", "all is dropped", "no batch"],
)
@pytest.mark.filterwarnings("ignore:.*the loader drops")
def test_no_data(data, small_vae):
    said = "data is empty: it gives no batch|data gave no batch"
    with pytest.raises(pvae.DataError, match=said):
        fit_fresh(data)
    with pytest.raises(pvae.DataError, match=said.replace("data", "validation")):
        fit_fresh(torch.zeros(9, 6), validation=data)
    with pytest.raises(pvae.DataError, match=said):
        pvae.log_evidence(small_vae.model, small_vae.guide, data)


def test_a_dataset_without_a_length_is_an_error():
    class Endless(Dataset):
        def __getitem__(self, index):
            return torch.zeros(6)

    with pytest.raises(pvae.DataError, match=r"data is a Endless without a length. Give it __len__, or a DataLoader"):
        fit_fresh(Endless())


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_an_error_of_the_datasets_own_is_seen(workers, bits, small_vae):
    data = Raising(bits, 200, tear)
    data = data if workers is None else make_loader(data, num_workers=workers)
    with pytest.raises(KeyError, match="frame 77 is torn"):
        fit_fresh(data)
    with pytest.raises(KeyError, match="frame 77 is torn"):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)


def test_a_dataset_that_ends_before_its_length_is_an_error(bits, small_vae):
    data = Raising(bits, 200, lambda: next(iter([])))
    with pytest.raises(RuntimeError, match="StopIteration"):
        fit_fresh(data)
    with pytest.raises(RuntimeError, match="StopIteration"):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    with pytest.warns(UserWarning, match="data: 192 data came in a pass, and by its length there are 300"):
        pvae.log_evidence(small_vae.model, small_vae.guide, make_loader(data), num_samples=2)


@kills_workers
@pytest.mark.parametrize("end", [lambda: os._exit(3), lambda: sys.exit(4)])
def test_a_worker_that_ends_is_an_error(end, bits, small_vae):
    """It is heard of by a signal, or by the end of what it was sending."""
    data = make_loader(Raising(bits, 250, end), num_workers=2)
    said = "data: a worker of the DataLoader ended as it read the data"
    with pytest.raises(pvae.DataError, match=said):
        fit_fresh(data)
    with pytest.raises(pvae.DataError, match=said):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    with pytest.raises(pvae.DataError, match="validation: a worker"):
        fit_fresh(bits, validation=data)


def test_a_loader_that_times_out_is_an_error(bits):
    data = make_loader(Raising(bits, 250, lambda: time.sleep(1.5)), num_workers=1, timeout=0.3)
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0.3 seconds"):
        fit_fresh(data)
