"""Data larger than memory: read from a ``Dataset`` or a ``DataLoader``, training is that of the same data in
memory, bit for bit where nothing else differs.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Counted, Items, Iterated, assert_same_run, batches_of, fit_fresh, make_loader
from pairs import Conditional
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
)

import pvae
from pvae.data.streams import Stream
from pvae.runtime.processes import ALONE, Processes
from pvae.svi import step as engine

# Python 3.12 warns of any fork where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def made(never_compiled):
    return never_compiled(engine)


# --- a dataset is its tensor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 100, 500], ids=["a ragged last batch", "full batches", "less than a batch"])
def test_a_dataset_trains_as_its_tensor_does(size, bits):
    reference = fit_fresh(bits, batch_size=size, seed=3, validation=bits[:70])
    assert_same_run(fit_fresh(Items(bits), batch_size=size, seed=3, validation=Items(bits[:70])), reference)


def test_so_does_one_that_is_transformed(bits):
    options = {"transform": pvae.datasets.fresh_bits, "validation": bits}
    assert_same_run(fit_fresh(Items(bits * 0.8 + 0.1), **options), fit_fresh(bits * 0.8 + 0.1, **options))


def test_so_does_one_whose_steps_are_captured(bits, made):
    options = {"compile": True, "transform": pvae.datasets.fresh_bits}
    assert_same_run(fit_fresh(Items(bits), **options), fit_fresh(bits, **options))
    assert [captured.captures for captured in made] == [2, 2]  # full batches, and the last one


@pytest.mark.parametrize(
    "make",
    [
        lambda x: TensorDataset(x),
        lambda x: Subset(TensorDataset(torch.cat([x, x])), range(300)),
        lambda x: Items(list(x.numpy())),
        lambda x: Items(x.double()),
        lambda x: Items([(row,) for row in x]),
    ],
    ids=["TensorDataset", "Subset", "NumPy", "float64", "tuples of one"],
)
def test_so_do_items_of_other_kinds(make, bits):
    assert_same_run(fit_fresh(make(bits)), fit_fresh(bits))


def test_bytes_stay_bytes_until_they_are_transformed(bits):
    grey, seen = (bits * 255).to(torch.uint8), []

    def transform(x):
        seen.append(x.dtype)
        return x.float() / 255

    assert_same_run(fit_fresh(Items(grey), transform=transform), fit_fresh(grey, transform=transform))
    assert set(seen) == {torch.uint8}


def test_several_tensors_are_passed_on_in_order(bits):
    labels = bits[:, 0]
    reference = fit_fresh((bits, labels), pair=Conditional)
    assert_same_run(fit_fresh(Items(list(zip(bits, labels, strict=True))), pair=Conditional), reference)
    assert_same_run(fit_fresh(TensorDataset(bits, labels), pair=Conditional), reference)


def test_a_transform_drops_labels(bits):
    labelled = Items([(x, int(x[0])) for x in bits])
    assert_same_run(fit_fresh(labelled, transform=lambda x, y: x), fit_fresh(bits))


def test_a_tensor_dataset_with_items_of_its_own_is_read_by_them(bits):
    class Inverted(TensorDataset):
        def __getitem__(self, index):
            return (1 - self.tensors[0][index],)

    assert_same_run(fit_fresh(Inverted(bits)), fit_fresh(1 - bits))


def test_items_may_be_fetched_many_at_once(bits):
    class Fetched(Items):
        def __getitems__(self, indices):
            return list(self.items[indices])

        def __getitem__(self, index):
            pytest.fail("one at a time")

    assert_same_run(fit_fresh(Fetched(bits)), fit_fresh(bits))


@pytest.mark.parametrize(
    "items, said",
    [
        ([{"x": 1.0}] * 9, "batch 1 of data must be a tensor, a NumPy array or a tuple of them; got dict"),
        (["zero"] * 9, "batch 1 of data must be a tensor, a NumPy array or a tuple of them; got str"),
        ([(torch.zeros(6), "zero")] * 9, "batch 1 of data must be a tensor, a NumPy array or a tuple of them; got"),
    ],
)
def test_items_that_are_no_tensors_are_an_error(items, said, bits, small_vae):
    for data in (Items(items), make_loader(Items(items))):
        with pytest.raises(pvae.DataError, match=said):
            fit_fresh(data)
        with pytest.raises(pvae.DataError, match=said):
            pvae.log_evidence(small_vae.model, small_vae.guide, data)
    with pytest.raises(pvae.DataError, match=said.replace("data", "validation")):
        fit_fresh(bits, validation=Items(items))


def test_programs_that_take_another_number_of_tensors_are_an_error(bits):
    labelled = Items([(x, 0) for x in bits])
    said = r"the model cannot be called with a batch, which is 2 tensor\(s\), \(64, 6\), \(64,\)"
    with pytest.raises(pvae.ProgramError, match=said):
        fit_fresh(labelled)
    with pytest.raises(pvae.ProgramError, match=said):
        fit_fresh(bits, validation=labelled)


# --- a loader's batches -----------------------------------------------------------------------------------------------


def test_batches_are_the_loaders_own(numbers):
    assert batches_of(make_loader(numbers, batch_size=8)) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    own = [[3, 1], [0, 2, 4], [19]]
    assert batches_of(make_loader(numbers, batch_sampler=own), epochs=2) == own + own


@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_are_batches(workers, numbers):
    pieces = Items(list(numbers.split([7, 1, 12])))
    loader = DataLoader(pieces, batch_size=None, num_workers=workers)
    assert batches_of(loader) == [[*range(7)], [7], [*range(8, 20)]]
    own = make_loader(numbers, batch_sampler=[[*range(7)], [7], [*range(8, 20)]])
    gaussian = {"pair": lambda: pvae.VAE.mlp(1, 1, [4], "gaussian")}
    assert_same_run(fit_fresh(loader, **gaussian), fit_fresh(own, **gaussian))


@pytest.mark.parametrize(
    "collate",
    [
        lambda items: np.stack([x.numpy() for x in items]),
        lambda items: (torch.stack(items),),
        lambda items: [torch.stack(items)],
        lambda items: torch.stack(items).double(),
    ],
    ids=["NumPy", "a tuple", "a list", "float64"],
)
def test_a_loaders_own_collating(collate, bits):
    assert_same_run(fit_fresh(make_loader(bits, collate_fn=collate)), fit_fresh(make_loader(bits)))


def test_a_batch_of_nothing_does_not_end_a_pass(bits):
    def collate(items):
        return None if any(torch.equal(x, bits[130]) for x in items[2:3]) else torch.stack(items)

    data = make_loader(Items(list(bits)), batch_sampler=[[0, 1, 2], [3, 4, 130], [5, 6, 7]], collate_fn=collate)
    with pytest.raises(pvae.DataError, match=r"batch 2 of data must be a tensor.*got NoneType"):
        fit_fresh(data)


@pytest.mark.parametrize("kind", [Iterated, Counted])
@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_datasets(kind, workers, bits):
    """The same batches in order, so the same numbers, per datum, whether or not their number is known."""
    data = make_loader(kind(bits), num_workers=workers)
    assert_same_run(fit_fresh(data, validation=data), fit_fresh(make_loader(bits), validation=bits))


def test_iterable_datasets_are_divided_by_workers(numbers):
    batches = batches_of(make_loader(Iterated(numbers), num_workers=2, batch_size=5))
    assert batches == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9], [10, 12, 14, 16, 18], [11, 13, 15, 17, 19]]


def test_an_iterable_dataset_needs_a_loader(bits, small_vae):
    said = r"is an IterableDataset, which only a DataLoader makes batches of: pass torch.utils.data.DataLoader\("
    with pytest.raises(pvae.DataError, match=f"data {said}"):
        fit_fresh(Iterated(bits))
    with pytest.raises(pvae.DataError, match=f"validation {said}"):
        fit_fresh(bits, validation=Iterated(bits))
    with pytest.raises(pvae.DataError, match=f"data {said}"):
        pvae.log_evidence(small_vae.model, small_vae.guide, Iterated(bits))


def test_what_can_be_read_only_once_is_an_error_and_measured_whole(bits, small_vae):
    class Once(IterableDataset):
        def __init__(self):
            self.iterator = iter(bits)

        def __iter__(self):
            return self.iterator

    with pytest.raises(pvae.DataError, match=r"data gave no batch in pass 2. An iterable dataset has to begin anew"):
        fit_fresh(make_loader(Once()))
    estimate = pvae.log_evidence(small_vae.model, small_vae.guide, make_loader(Once()), num_samples=2)
    assert len(estimate.log_px) == 300


def test_set_epoch_is_told_which_pass_it_is(numbers):
    told = []

    class Told(Items):
        def set_epoch(self, epoch):
            told.append(epoch)

    for data in (Told(numbers), make_loader(Told(numbers), sampler=DistributedSampler(numbers, 1, 0))):
        told.clear()
        batches = batches_of(data, epochs=3)
        assert told == [0, 1, 2, 3]
        assert batches[0] != batches[1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # where there is no GPU
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory_is_left_to_the_loader(workers, bits):
    assert_same_run(fit_fresh(make_loader(bits, pin_memory=True, num_workers=workers)), fit_fresh(make_loader(bits)))


# --- several processes, each of which reads its part ------------------------------------------------------------------


def test_each_process_reads_its_part_of_a_dataset_alone(numbers):
    """17 data in batches of 8 for three processes; of the last datum two of them get nothing."""
    read = [[] for _ in range(3)]

    class Watched(Items):
        def __getitem__(self, index):
            read[self.rank].append(index)
            return self.items[index]

    parts = []
    for rank in range(3):
        data = Watched(numbers[:17])
        data.rank = rank
        parts.append(list(Stream("data", data, 8, 0, Processes(rank, 3)).batches(1)))
    assert [[number for number, _ in batches] for batches in parts] == [[1, 2, 3]] * 3
    whole = [torch.cat([batches[n][1][0] for batches in parts]) for n in range(3)]
    reference = [rows for _, (rows,) in Stream("data", Items(numbers[:17]), 8, 0, ALONE).batches(1)]
    assert all(torch.equal(a, b) for a, b in zip(whole, reference, strict=True))
    assert [len(batches[2][1][0]) for batches in parts] == [1, 0, 0]
    assert max(len(rows) for rows in read) <= 7


def test_each_process_evaluates_every_so_many_batches(numbers):
    for make in (Items, lambda x: make_loader(x, batch_size=8)):
        parts = [
            dict(Stream("data", make(numbers), 8, 0, Processes(rank, 2), evaluated=True).batches(0))
            for rank in range(2)
        ]
        assert [[*part] for part in parts] == [[1, 3], [2]]
        found = parts[0] | parts[1]
        assert torch.equal(torch.cat([found[n][0] for n in (1, 2, 3)]), numbers)


def test_a_loaders_batches_are_divided(numbers):
    parts = [
        [x for _, (x,) in Stream("", make_loader(numbers, batch_size=9), 1, 0, Processes(r, 2)).batches(1)]
        for r in (0, 1)
    ]
    assert [[len(x) for x in part] for part in parts] == [[5, 5, 1], [4, 4, 1]]
    assert torch.equal(torch.cat([torch.cat(both) for both in zip(*parts, strict=True)]), numbers)
