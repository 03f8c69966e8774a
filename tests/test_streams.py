"""Data larger than memory: read from a ``Dataset`` or a ``DataLoader``, training and estimates are those of the same
data in memory, bit for bit where nothing else differs; whatever is wrong with them is said before it counts.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
import weakref
from itertools import chain

import numpy as np
import pyro
import pytest
import torch
from conftest import ModulePair
from pyro import distributions as dist
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import pvae
from pvae.data.streams import Stream
from pvae.evidence import importance, session
from pvae.runtime.processes import ALONE, Processes
from pvae.svi import step as engine
from pvae.testing import linear_gaussian

# Python 3.12 warns of any fork where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
# A loader that is left in the middle of a pass hears once more of a worker's end, as it is cleared away.
kills_workers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Items(Dataset):
    """Any sequence, item by item."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Flipped(Items):
    """Bits that are flipped at random, by one of the generators that a dataset may use."""

    def __init__(self, items, by="torch"):
        super().__init__(items)
        self.by = by

    def __getitem__(self, index):
        draw = {"torch": lambda: torch.rand(()).item(), "numpy": np.random.rand, "python": random.random}[self.by]
        return self.items[index] if draw() < 0.8 else 1 - self.items[index]


class Drawing(Items):
    """Draws random numbers, and makes nothing of them."""

    def __getitem__(self, index):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return self.items[index]


class Iterated(IterableDataset):
    """Any sequence, from its beginning to its end; workers divide it."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(self.items[first::step])


class Counted(Iterated):
    def __len__(self):
        return len(self.items)


class Raising(Items):
    """Fails at one of its items."""

    def __init__(self, items, at, fail):
        super().__init__(items)
        self.at, self.fail = at, fail

    def __getitem__(self, index):
        if index == self.at:
            self.fail()
        return self.items[index]


def broken():
    raise KeyError("frame 77 is torn")


class Conditional(ModulePair):
    """Bits given a label, which is passed on beside them."""

    def model(self, x, y):
        super().model(x)

    def guide(self, x, y):
        super().guide((x + y[:, None]) / 2)


def batched(data, **options):
    """A loader over a dataset of items; a batch sampler brings its own size."""
    if "batch_sampler" not in options:
        options = {"batch_size": 64, **options}
    if options.get("num_workers"):
        options["multiprocessing_context"] = "fork"  # whatever Python's default: datasets here are not all pickled
    return DataLoader(data if isinstance(data, Dataset) else Items(data), **options)


def trained(data, *, pair=None, **options):
    """A fresh small pair after training."""
    torch.manual_seed(1)
    pair = pvae.VAE.mlp(6, 2, [8]) if pair is None else pair()
    options = {"epochs": 2, "batch_size": 64, "lr": 0.01, "progress": False, "compile": False, **options}
    return pair, pvae.fit(pair.model, pair.guide, data, **options)


def assert_same(ours, theirs):
    """Weights and curves, to the bit."""
    (pair, result), (other, reference) = ours, theirs
    assert all(torch.equal(p, q) for p, q in zip(pair.parameters(), other.parameters(), strict=True))
    assert result.history.keys() == reference.history.keys()
    for name in result.history.keys() - {"seconds"}:
        assert result.history[name].tolist() == reference.history[name].tolist(), name


def differ(ours, theirs):
    return any(not torch.equal(p, q) for p, q in zip(ours[0].parameters(), theirs[0].parameters(), strict=True))


def taken(data, **options):
    """The rows of each batch that is trained on, by the first of their numbers."""
    batches = []

    def transform(x):
        batches.append([int(value) for value in x[:, 0]])
        return x

    pair = pvae.VAE.mlp(1, 1, [4], "gaussian", units=(0, 1))
    trained(data, pair=lambda: pair, transform=transform, **{"epochs": 1, **options})
    return batches[1:]  # the first is a look at the pair


@pytest.fixture
def numbers():
    return torch.arange(20.0)[:, None]


@pytest.fixture
def made(never_compiled):
    return never_compiled(engine)


# --- a dataset is its tensor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 100, 500], ids=["a ragged last batch", "full batches", "less than a batch"])
def test_a_dataset_trains_as_its_tensor_does(size, bits):
    reference = trained(bits, batch_size=size, seed=3, validation=bits[:70])
    assert_same(trained(Items(bits), batch_size=size, seed=3, validation=Items(bits[:70])), reference)


def test_so_does_one_that_is_transformed(bits):
    options = {"transform": pvae.datasets.fresh_bits, "validation": bits}
    assert_same(trained(Items(bits * 0.8 + 0.1), **options), trained(bits * 0.8 + 0.1, **options))


def test_so_does_one_whose_steps_are_captured(bits, made):
    options = {"compile": True, "transform": pvae.datasets.fresh_bits}
    assert_same(trained(Items(bits), **options), trained(bits, **options))
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
    assert_same(trained(make(bits)), trained(bits))


def test_bytes_stay_bytes_until_they_are_transformed(bits):
    grey, seen = (bits * 255).to(torch.uint8), []

    def transform(x):
        seen.append(x.dtype)
        return x.float() / 255

    assert_same(trained(Items(grey), transform=transform), trained(grey, transform=transform))
    assert set(seen) == {torch.uint8}


def test_several_tensors_are_passed_on_in_order(bits):
    labels = bits[:, 0]
    reference = trained((bits, labels), pair=Conditional)
    assert_same(trained(Items(list(zip(bits, labels, strict=True))), pair=Conditional), reference)
    assert_same(trained(TensorDataset(bits, labels), pair=Conditional), reference)


def test_a_transform_drops_labels(bits):
    labelled = Items([(x, int(x[0])) for x in bits])
    assert_same(trained(labelled, transform=lambda x, y: x), trained(bits))


def test_a_tensor_dataset_with_items_of_its_own_is_read_by_them(bits):
    class Inverted(TensorDataset):
        def __getitem__(self, index):
            return (1 - self.tensors[0][index],)

    assert_same(trained(Inverted(bits)), trained(1 - bits))


def test_items_may_be_fetched_many_at_once(bits):
    class Fetched(Items):
        def __getitems__(self, indices):
            return list(self.items[indices])

        def __getitem__(self, index):
            pytest.fail("one at a time")

    assert_same(trained(Fetched(bits)), trained(bits))


@pytest.mark.parametrize(
    "items, said",
    [
        ([{"x": 1.0}] * 9, "batch 1 of data must be a tensor, a NumPy array or a tuple of them; got dict"),
        (["zero"] * 9, "batch 1 of data must be a tensor, a NumPy array or a tuple of them; got str"),
        ([(torch.zeros(6), "zero")] * 9, "batch 1 of data must be a tensor, a NumPy array or a tuple of them; got"),
    ],
)
def test_items_that_are_no_tensors_are_an_error(items, said, bits, small_vae):
    for data in (Items(items), batched(Items(items))):
        with pytest.raises(pvae.DataError, match=said):
            trained(data)
        with pytest.raises(pvae.DataError, match=said):
            pvae.log_evidence(small_vae.model, small_vae.guide, data)
    with pytest.raises(pvae.DataError, match=said.replace("data", "validation")):
        trained(bits, validation=Items(items))


def test_programs_that_take_another_number_of_tensors_are_an_error(bits):
    labelled = Items([(x, 0) for x in bits])
    said = r"the model cannot be called with a batch, which is 2 tensor\(s\), \(64, 6\), \(64,\)"
    with pytest.raises(pvae.ProgramError, match=said):
        trained(labelled)
    with pytest.raises(pvae.ProgramError, match=said):
        trained(bits, validation=labelled)


# --- a loader's batches ---------------------------------------------------------------------------------------------


def test_batches_are_the_loaders_own(numbers):
    assert taken(batched(numbers, batch_size=8)) == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]
    own = [[3, 1], [0, 2, 4], [19]]
    assert taken(batched(numbers, batch_sampler=own), epochs=2) == own + own


@pytest.mark.parametrize("workers", [0, 2])
def test_items_that_are_batches(workers, numbers):
    pieces = Items(list(numbers.split([7, 1, 12])))
    loader = DataLoader(pieces, batch_size=None, num_workers=workers)
    assert taken(loader) == [[*range(7)], [7], [*range(8, 20)]]
    own = batched(numbers, batch_sampler=[[*range(7)], [7], [*range(8, 20)]])
    gaussian = {"pair": lambda: pvae.VAE.mlp(1, 1, [4], "gaussian")}
    assert_same(trained(loader, **gaussian), trained(own, **gaussian))


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
    assert_same(trained(batched(bits, collate_fn=collate)), trained(batched(bits)))


def test_a_batch_of_nothing_does_not_end_a_pass(bits):
    def collate(items):
        return None if any(torch.equal(x, bits[130]) for x in items[2:3]) else torch.stack(items)

    data = batched(Items(list(bits)), batch_sampler=[[0, 1, 2], [3, 4, 130], [5, 6, 7]], collate_fn=collate)
    with pytest.raises(pvae.DataError, match=r"batch 2 of data must be a tensor.*got NoneType"):
        trained(data)


@pytest.mark.parametrize("kind", [Iterated, Counted])
@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_datasets(kind, workers, bits):
    """The same batches in order, so the same numbers, per datum, whether or not their number is known."""
    data = batched(kind(bits), num_workers=workers)
    assert_same(trained(data, validation=data), trained(batched(bits), validation=bits))


def test_iterable_datasets_are_divided_by_workers(numbers):
    batches = taken(batched(Iterated(numbers), num_workers=2, batch_size=5))
    assert batches == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9], [10, 12, 14, 16, 18], [11, 13, 15, 17, 19]]


def test_an_iterable_dataset_needs_a_loader(bits, small_vae):
    said = r"is an IterableDataset, which only a DataLoader makes batches of: pass torch.utils.data.DataLoader\("
    with pytest.raises(pvae.DataError, match=f"data {said}"):
        trained(Iterated(bits))
    with pytest.raises(pvae.DataError, match=f"validation {said}"):
        trained(bits, validation=Iterated(bits))
    with pytest.raises(pvae.DataError, match=f"data {said}"):
        pvae.log_evidence(small_vae.model, small_vae.guide, Iterated(bits))


def test_what_can_be_read_only_once_is_an_error_and_measured_whole(bits, small_vae):
    class Once(IterableDataset):
        def __init__(self):
            self.iterator = iter(bits)

        def __iter__(self):
            return self.iterator

    with pytest.raises(pvae.DataError, match=r"data gave no batch in pass 2. An iterable dataset has to begin anew"):
        trained(batched(Once()))
    estimate = pvae.log_evidence(small_vae.model, small_vae.guide, batched(Once()), num_samples=2)
    assert len(estimate.log_px) == 300


def test_set_epoch_is_told_which_pass_it_is(numbers):
    told = []

    class Told(Items):
        def set_epoch(self, epoch):
            told.append(epoch)

    for data in (Told(numbers), batched(Told(numbers), sampler=DistributedSampler(numbers, 1, 0))):
        told.clear()
        batches = taken(data, epochs=3)
        assert told == [0, 1, 2, 3]
        assert batches[0] != batches[1]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # where there is no GPU
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory_is_left_to_the_loader(workers, bits):
    assert_same(trained(batched(bits, pin_memory=True, num_workers=workers)), trained(batched(bits)))


# --- shuffling and other random numbers -----------------------------------------------------------------------------


def generator(seed):
    return torch.Generator().manual_seed(seed)


SHUFFLED = {
    "shuffle": lambda x, g: {"shuffle": True},
    "the loader's generator": lambda x, g: {"shuffle": True, "generator": g},
    "the sampler's generator": lambda x, g: {"sampler": RandomSampler(x, generator=g)},
    "a subset": lambda x, g: {"sampler": SubsetRandomSampler(range(len(x)), generator=g)},
    "a batch sampler's": lambda x, g: {"batch_sampler": BatchSampler(RandomSampler(x, generator=g), 8, False)},
}


@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_follows_the_seed_alone(kind, numbers):
    runs = []
    for state, seed in ((0, 0), (1, 0), (2, 3)):
        torch.manual_seed(state)
        own = generator(state)
        before = own.get_state()
        options = {"batch_size": 8} if "batch" not in kind else {}
        data = batched(numbers, **options, **SHUFFLED[kind](numbers, own))
        runs.append(taken(data, epochs=2, seed=seed))
        assert torch.equal(own.get_state(), before)
        assert own.initial_seed() == state
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    first, second = [*chain(*runs[0][:3])], [*chain(*runs[0][3:])]
    assert sorted(first) == sorted(second) == [*range(20)]
    assert first != second


def test_a_loaders_generator_is_put_back_after_an_error(bits):
    own = generator(5)
    before = own.get_state()
    data = batched(Raising(bits, 200, broken), shuffle=True, generator=own)
    with pytest.raises(KeyError, match="frame 77 is torn") as error:
        trained(data)
    assert torch.equal(own.get_state(), before)
    del error  # which keeps what was half done until here


def test_reading_leaves_the_callers_random_numbers_alone(bits):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    for data in (Drawing(bits), batched(Drawing(bits), shuffle=True)):
        before = states()
        pair, _ = trained(data, validation=data)
        torch.manual_seed(1)  # as `trained` does
        pvae.VAE.mlp(6, 2, [8])
        now = states()
        assert now[1:] == before[1:]
        torch.manual_seed(7)
        state = states()
        pvae.log_evidence(pair.model, pair.guide, Drawing(bits), num_samples=2)
        assert states() == state


def test_noise_does_not_depend_on_random_numbers_that_reading_draws(bits):
    assert_same(trained(Drawing(bits), validation=Drawing(bits)), trained(bits, validation=bits))
    assert_same(trained(batched(Drawing(bits), num_workers=2)), trained(batched(bits)))
    assert_same(trained(batched(Drawing(bits))), trained(batched(bits)))


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_change_nothing(options, bits):
    plain = {"shuffle": True}
    reference = trained(batched(bits, **plain), validation=bits[:80])
    assert_same(trained(batched(bits, **plain, **options), validation=batched(bits[:80], **options)), reference)


def test_batches_come_in_order_even_from_workers_that_need_not_keep_it(numbers):
    class Slow(Items):
        def __getitem__(self, index):
            if index < 5:
                time.sleep(0.2)
            return self.items[index]

    data = batched(Slow(numbers), batch_size=5, num_workers=2, in_order=False)
    assert [batch[0] for batch in taken(data)] == [0, 5, 10, 15]


READERS = {
    "dataset": lambda data: data,
    "loader": lambda data: batched(data, shuffle=True),
    "workers": lambda data: batched(data, shuffle=True, num_workers=2),
    "persistent workers": lambda data: batched(data, num_workers=2, persistent_workers=True),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("by", ["torch", "numpy", "python"])
def test_augmentation_follows_the_seed(reader, by, bits):
    """The same loader twice: nothing that it did before counts."""
    data = READERS[reader](Flipped(bits, by))
    first = trained(data, validation=data if reader == "dataset" else bits)
    torch.rand(5), np.random.rand(5), random.random()  # noqa: NPY002
    assert_same(trained(data, validation=data if reader == "dataset" else bits), first)
    assert differ(trained(data, seed=1), first)
    if reader == "dataset":
        assert differ(trained(bits), first)


@pytest.mark.parametrize("read", [None, 0, 2], ids=["dataset", "loader", "workers"])
def test_augmentation_is_other_in_each_pass_and_batch(read):
    """1 becomes 0 at random: two batches of 64 are equal with a chance of 2e-11."""
    data = Flipped(torch.ones(256, 1))
    data = data if read is None else batched(data, num_workers=read)
    batches = taken(data, epochs=2)
    assert len({tuple(batch) for batch in batches}) == 8


# --- a run that goes on from the middle of an epoch -----------------------------------------------------------------


def stopping_at(monkeypatch, step, also=lambda: None):
    """Sends a signal in the step of some number."""
    count, original = [], engine.Step.__call__

    def call(self, *args):
        count.append(1)
        if len(count) == step:
            os.kill(os.getpid(), signal.SIGTERM)
            also()
        return original(self, *args)

    monkeypatch.setattr(engine.Step, "__call__", call)


RESUMED = {
    **{name: lambda x, read=read: read(Flipped(x)) for name, read in READERS.items()},
    "own generator": lambda x: batched(Flipped(x, "numpy"), shuffle=True, generator=generator(4)),
    "iterable": lambda x: batched(Iterated(x)),
    "batches": lambda x: DataLoader(Items(list(x.split(70))), batch_size=None, shuffle=True),
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("step", [2, 8])
def test_a_run_stopped_within_an_epoch_goes_on_as_if_nothing_had_happened(kind, step, bits, tmp_path, monkeypatch):
    """Five steps an epoch; the data are random as they are read. What is gone on with is a new loader, as in a new
    process.
    """
    options = {"epochs": 3, "validation": Items(bits[:90]), "transform": pvae.datasets.fresh_bits}
    reference = trained(RESUMED[kind](bits), **options)
    options |= {"checkpoint": tmp_path, "resume": "auto"}
    with monkeypatch.context() as patch:
        stopping_at(patch, step)
        pair, stopped = trained(RESUMED[kind](bits), **options)
    assert stopped.stopped == "signal"
    assert len(stopped.history["elbo"]) == step // 5
    assert differ((pair, stopped), reference)
    np.random.rand(3)  # noqa: NPY002
    assert_same(trained(RESUMED[kind](bits), **options), reference)


def test_a_signal_while_a_datum_is_read(bits, tmp_path):
    options = {"checkpoint": tmp_path, "resume": "auto", "epochs": 3}
    count = []

    class Interrupted(Items):
        def __getitem__(self, index):
            count.append(1)
            if len(count) == 500:  # 64 for a look at the pair, 300 an epoch: in the third step of the second
                os.kill(os.getpid(), signal.SIGTERM)
            return self.items[index]

    _, stopped = trained(Interrupted(bits), **options)
    assert (stopped.stopped, len(stopped.history["elbo"])) == ("signal", 1)
    assert (tmp_path / "epoch-000001-step-0000003").is_dir()
    count.extend([1] * 1000)
    assert_same(trained(Interrupted(bits), **options), trained(bits, epochs=3))


class Ended(Items):
    """Once, as the fourth batch is read, the process gets a signal and its worker ends."""

    def __init__(self, items, flag):
        super().__init__(items)
        self.flag = flag

    def __getitem__(self, index):
        if index == 200 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getppid(), signal.SIGTERM)
            os._exit(143)
        return self.items[index]


@kills_workers
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_signal_that_ends_the_workers_too(where, bits, tmp_path):
    """As from a batch system, which signals all processes of a job. A validation is not one of some of the data."""
    data = batched(Ended(bits, tmp_path / "flag"), num_workers=1, prefetch_factor=1)
    plain = batched(bits)
    options = {"checkpoint": tmp_path / "run", "resume": "auto"}
    options |= {"data": plain, "validation": data} if where == "validation" else {"data": data, "validation": plain}
    _, stopped = trained(**options)
    assert (stopped.stopped, len(stopped.history["elbo"])) == ("signal", 0)
    steps = 3 if where == "training" else 5
    assert (tmp_path / "run" / f"epoch-000000-step-000000{steps}").is_dir()
    assert_same(trained(**options), trained(plain, validation=plain))


@kills_workers
def test_a_worker_that_dies_is_heard_of_as_data_are_read(bits):
    """Not in the middle of a step: torch says it by a signal handler, which runs anywhere."""
    before = signal.getsignal(signal.SIGCHLD)
    stream = Stream("data", batched(bits, num_workers=1, prefetch_factor=1), 1, 0, ALONE)
    batches = stream.batches(1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.kill()
    time.sleep(0.2)  # in which the handler runs
    with pytest.raises(RuntimeError, match="is killed by signal: Killed"):
        next(batches)
    del batches
    if before is not signal.SIG_DFL:  # torch sets its own once, where a process first has workers
        assert signal.getsignal(signal.SIGCHLD) is before
    assert "_Workers" not in repr(signal.getsignal(signal.SIGCHLD))


# --- data that are left out, or come more than once -----------------------------------------------------------------


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
        trained(batched(bits, **options), epochs=1)


def test_dropping_from_an_iterable_is_said(bits):
    with pytest.warns(UserWarning, match="^data: the loader drops the last 44 of 300 data in each pass"):
        trained(batched(Counted(bits), drop_last=True), epochs=1)
    with pytest.warns(UserWarning, match="^data: the loader drops a last batch that is not full"):
        trained(batched(Iterated(bits), drop_last=True), epochs=1)


def test_dropping_in_what_is_evaluated_is_said(bits, small_vae):
    data = batched(bits, drop_last=True)
    with pytest.warns(UserWarning, match="^data: the loader drops the last 44 of 300 data"):
        estimate = pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    assert len(estimate.log_px) == 256
    with pytest.warns(UserWarning, match="^validation: the loader drops the last 44 of 300 data"):
        trained(bits, validation=data)


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
        pvae.log_evidence(small_vae.model, small_vae.guide, batched(bits, sampler=sampler))
    with pytest.raises(pvae.DataError, match=f"validation: its .*{said}"):
        trained(bits, validation=batched(bits, sampler=sampler))


def test_workers_that_give_all_the_data_each_are_noticed(bits, small_vae):
    class Undivided(IterableDataset):
        def __len__(self):
            return len(bits)

        def __iter__(self):
            return iter(bits)

    data = batched(Undivided(), num_workers=2)
    with pytest.warns(UserWarning, match="data: 600 data came in a pass, and by its length there are 300"):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    with pytest.warns(UserWarning, match="data: 600 data came in a pass"):
        trained(data, epochs=1)


def distributed(length, **options):
    sampler = DistributedSampler(range(length), 2, 0, **{"shuffle": False, **options})
    return batched(torch.zeros(length, 6), sampler=sampler, batch_size=4)


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
    data = batched(torch.zeros(18, 6), sampler=sampler, batch_size=4, drop_last=True)
    with pytest.warns(UserWarning, match="the loader drops the last 2 of 18 data"):
        assert Stream("data", data, 1, 0, Processes(1, 2)).num_data == 16


def test_a_distributed_sampler_for_other_processes_is_an_error(bits):
    with pytest.raises(
        pvae.DataError, match=r"a DistributedSampler for 2 processes, and there are 1. Pass the dataset"
    ):
        trained(distributed(18))


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
    data = batched(bits, **options)
    with pytest.warns(UserWarning, match=f"data: results are in the order in which the loader's {who} draws the data"):
        estimate = pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    if "sampler" in options and who == "list":
        plain = pvae.log_evidence(small_vae.model, small_vae.guide, batched(bits.flip(0)), num_samples=2)
        assert torch.equal(estimate.log_px, plain.log_px)
    trained(bits, validation=batched(bits, shuffle=True))  # a sum has no order: no warning


# --- what is wrong with the data ------------------------------------------------------------------------------------


def states(pair):
    return [p.detach().clone() for p in pair.parameters()]


@pytest.mark.parametrize("read", [Items, batched])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_before_its_step(read, value, bits, small_vae):
    bits[200, 3] = value
    steps, count = [], lambda x: steps.append(1) or x
    with pytest.raises(pvae.DataError, match=r"batch \d of data holds 1 nan or infinite entries.* index \(\d+, 3\)"):
        trained(read(bits), pair=lambda: small_vae, transform=count, epochs=1)
    assert all(p.isfinite().all() for p in small_vae.parameters())
    if read is batched:
        assert len(steps) == 1 + 3  # a look, and the three batches before
        with pytest.raises(pvae.DataError, match=r"batch 4 of validation holds 1 nan.* index \(8, 3\)"):
            trained(torch.zeros(300, 6), validation=read(bits))
        with pytest.raises(pvae.DataError, match=r"batch 4 of data holds 1 nan or infinite.* index \(8, 3\)"):
            pvae.log_evidence(small_vae.model, small_vae.guide, read(bits), num_samples=2)


@pytest.mark.parametrize("value, example", [(0.3, "0.3"), (255.0, "255")])
def test_what_no_bernoulli_gives_is_named_before_its_step(value, example, bits, small_vae, monkeypatch):
    bits[200, 3] = value
    said = f"batch 4 of {{}}: site 'x' is Bernoulli, whose support is Boolean.*for example {example}"
    taken, original = [], engine.Step.__call__
    monkeypatch.setattr(engine.Step, "__call__", lambda *args: taken.append(1) or original(*args))
    with pytest.raises(pvae.DataError, match=said.format("data")):
        trained(batched(bits))
    assert len(taken) == 3
    with pytest.raises(pvae.DataError, match=said.format("validation")):
        trained(torch.zeros(300, 6), validation=batched(bits))
    with pytest.raises(pvae.DataError, match=said.format("data")):
        pvae.log_evidence(small_vae.model, small_vae.guide, batched(bits), num_samples=2)
    with pytest.raises(pvae.DataError, match=r"batch . of data: site 'x' is Bernoulli"):
        trained(Items(bits))


def test_supports_that_a_single_entry_does_not_show(monkeypatch):
    """Counts of at most 3, of which a later batch has 7."""
    monkeypatch.setattr(session, "_MOST_DATA", 10)

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
        trained(batched(x), pair=lambda: pair)
    with pytest.raises(pvae.DataError, match=r"batch 4 of data: .* too large for the parameters' torch.float32"):
        pvae.log_evidence(pair.model, pair.guide, batched(x), num_samples=2)


@pytest.mark.parametrize(
    "data",
    [
        Items([]),
        batched(Items([])),
        batched(Counted([])),
        batched(Iterated([])),
        batched(torch.zeros(9, 6), drop_last=True),
        batched(torch.zeros(9, 6), batch_sampler=[]),
    ],
    ids=["dataset", "loader", "iterable", "iterable of unknown length", "all is dropped", "no batch"],
)
@pytest.mark.filterwarnings("ignore:.*the loader drops")
def test_no_data(data, small_vae):
    said = "data is empty: it gives no batch|data gave no batch"
    with pytest.raises(pvae.DataError, match=said):
        trained(data)
    with pytest.raises(pvae.DataError, match=said.replace("data", "validation")):
        trained(torch.zeros(9, 6), validation=data)
    with pytest.raises(pvae.DataError, match=said):
        pvae.log_evidence(small_vae.model, small_vae.guide, data)


def test_a_dataset_without_a_length_is_an_error():
    class Endless(Dataset):
        def __getitem__(self, index):
            return torch.zeros(6)

    with pytest.raises(pvae.DataError, match=r"data is a Endless without a length. Give it __len__, or a DataLoader"):
        trained(Endless())


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_an_error_of_the_datasets_own_is_seen(workers, bits, small_vae):
    data = Raising(bits, 200, broken)
    data = data if workers is None else batched(data, num_workers=workers)
    with pytest.raises(KeyError, match="frame 77 is torn"):
        trained(data)
    with pytest.raises(KeyError, match="frame 77 is torn"):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)


def test_a_dataset_that_ends_before_its_length_is_an_error(bits, small_vae):
    data = Raising(bits, 200, lambda: next(iter([])))
    with pytest.raises(RuntimeError, match="StopIteration"):
        trained(data)
    with pytest.raises(RuntimeError, match="StopIteration"):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    with pytest.warns(UserWarning, match="data: 192 data came in a pass, and by its length there are 300"):
        pvae.log_evidence(small_vae.model, small_vae.guide, batched(data), num_samples=2)


@kills_workers
@pytest.mark.parametrize("end", [lambda: os._exit(3), lambda: sys.exit(4)])
def test_a_worker_that_ends_is_an_error(end, bits, small_vae):
    """It is heard of by a signal, or by the end of what it was sending."""
    data = batched(Raising(bits, 250, end), num_workers=2)
    said = "data: a worker of the DataLoader ended as it read the data"
    with pytest.raises(pvae.DataError, match=said):
        trained(data)
    with pytest.raises(pvae.DataError, match=said):
        pvae.log_evidence(small_vae.model, small_vae.guide, data, num_samples=2)
    with pytest.raises(pvae.DataError, match="validation: a worker"):
        trained(bits, validation=data)


def test_a_loader_that_times_out_is_an_error(bits):
    data = batched(Raising(bits, 250, lambda: time.sleep(1.5)), num_workers=1, timeout=0.3)
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0.3 seconds"):
        trained(data)


# --- several processes, each of which reads its part ----------------------------------------------------------------


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
    for make in (Items, lambda x: batched(x, batch_size=8)):
        parts = [
            dict(Stream("data", make(numbers), 8, 0, Processes(rank, 2), evaluated=True).batches(0))
            for rank in range(2)
        ]
        assert [[*part] for part in parts] == [[1, 3], [2]]
        found = parts[0] | parts[1]
        assert torch.equal(torch.cat([found[n][0] for n in (1, 2, 3)]), numbers)


def test_a_loaders_batches_are_divided(numbers):
    parts = [
        [x for _, (x,) in Stream("", batched(numbers, batch_size=9), 1, 0, Processes(r, 2)).batches(1)] for r in (0, 1)
    ]
    assert [[len(x) for x in part] for part in parts] == [[5, 5, 1], [4, 4, 1]]
    assert torch.equal(torch.cat([torch.cat(both) for both in zip(*parts, strict=True)]), numbers)


# --- log p(x) -------------------------------------------------------------------------------------------------------


@pytest.fixture
def oracle():
    return linear_gaussian(2, 5, guide_shift=0.3, guide_scale=1.2)


def evidence(pair, data, **options):
    return pvae.log_evidence(pair.model, pair.guide, data, **{"compile": False, **options})


STREAMS = {
    "dataset": lambda x: Items(x),
    "float32": lambda x: Items(list(x.float().numpy())),
    "loader": lambda x: batched(x, batch_size=50),
    "workers": lambda x: batched(x, batch_size=50, num_workers=2),
    "iterable": lambda x: batched(Iterated(x), batch_size=50),
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
    monkeypatch.setattr(session, "_MOST_DATA", 60)
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
    monkeypatch.setattr(session, "_MOST_DATA", 20)
    x = oracle.sample(20)
    log_px = evidence(oracle, Items(torch.cat([x, x])), num_samples=20).log_px
    assert not torch.equal(log_px[:20], log_px[20:])


def test_blocks_hold_fewer_of_larger_data(oracle, monkeypatch):
    monkeypatch.setattr(session, "_MOST_ENTRIES", 52)
    sizes, summed = [], importance._Draws.summed
    monkeypatch.setattr(
        importance._Draws, "summed", lambda self, *args: sizes.append(self.session.num_data) or summed(self, *args)
    )
    assert len(evidence(oracle, Items(oracle.sample(24)), num_samples=5).log_px) == 24
    assert sizes == [10, 10, 4]


def test_a_target_for_the_error_is_met_in_each_block(oracle):
    x = oracle.sample(90)
    data = batched(x, batch_size=40)
    estimate = evidence(oracle, data, num_samples=50, target_std_error=0.02, max_samples=20_000)
    assert ((estimate.std_error < 0.02) | (estimate.samples == 20_000)).double().mean() > 0.95
    assert len(estimate.samples.unique()) > 1
    assert ((estimate.log_px - oracle.log_px(x)).abs() < 5 * estimate.std_error + 1e-9).all()


def test_kept_weights_are_those_that_are_summed(oracle):
    data = batched(oracle.sample(90), batch_size=40)
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
    estimate = evidence(oracle, batched(x, batch_size=8), proposal=Other(), num_samples=10)
    assert estimate.log_px.isfinite().all()


def test_all_data_are_never_held_at_once(oracle, monkeypatch):
    """Data that are made as they are read: of 2,000, those of two blocks of 100 are there at most, and one datum."""
    monkeypatch.setattr(session, "_MOST_DATA", 100)
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

    data = batched(Items(torch.zeros(2000, 5).double()), batch_size=100, collate_fn=collate)
    assert len(evidence(oracle, data, num_samples=3).log_px) == 2000
    assert most[0] <= 3  # the first, on which the pair was tried, the last, and the next
    most[0] = 0
    trained(data, pair=lambda: pvae.VAE.mlp(5, 1, [4], "gaussian"))
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
        evidence(Torn(), batched(x, batch_size=50), num_samples=5)


# --- memory that does not suffice -----------------------------------------------------------------------------------


def from_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def from_the_cpu():
    torch.empty(2**58, dtype=torch.uint8)  # what the allocator itself says


class Hungry(ModulePair):
    """Has memory for so many pairs of a draw and a datum."""

    def __init__(self, most, fail):
        super().__init__()
        self.most, self.fail, self.largest = most, fail, 0
        self.decoder.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        pairs = inputs[0].numel() // self.latent
        if pairs > self.most:
            self.fail()
        self.largest = max(self.largest, pairs)


def sizes_said(caplog):
    return [int(r.message.split("=")[1]) for r in caplog.records if r.message.startswith("out of memory: beginning")]


@pytest.mark.parametrize("fail", [from_cuda, from_the_cpu])
@pytest.mark.parametrize("stream", [False, True])
def test_chunks_are_halved_until_there_is_memory(fail, stream, bits, caplog):
    data = batched(bits, batch_size=100) if stream else bits
    hungry = Hungry(300, fail)
    with caplog.at_level(logging.WARNING, "pvae"):
        estimate = evidence(hungry, data, num_samples=40, chunk_size=2000)
        log_w = pvae.log_weights(hungry.model, hungry.guide, data, num_samples=40, chunk_size=2000)
    assert sizes_said(caplog) == [1000, 500, 250] * 2
    assert hungry.largest <= 300
    hungry.most = 10**9
    reference = evidence(hungry, data, num_samples=40, chunk_size=250)
    assert torch.equal(estimate.log_px, reference.log_px)
    assert torch.equal(estimate.khat, reference.khat)
    options = {"num_samples": 40, "chunk_size": 250}
    assert torch.equal(log_w, pvae.log_weights(hungry.model, hungry.guide, data, **options))


def test_so_are_those_of_a_proposal_that_is_fitted(bits, caplog):
    hungry, options = Hungry(60, from_cuda), {"num_samples": 20, "proposal": "laplace"}
    with caplog.at_level(logging.WARNING, "pvae"):
        estimate = evidence(hungry, bits[:20], chunk_size=160, **options)
    assert sizes_said(caplog) == [80, 40]
    hungry.most = 10**9
    assert torch.equal(estimate.log_px, evidence(hungry, bits[:20], chunk_size=40, **options).log_px)


def test_the_chunk_that_is_chosen_is_halved_too(bits, caplog):
    hungry = Hungry(3000, from_cuda)
    with caplog.at_level(logging.WARNING, "pvae"):
        estimate = evidence(hungry, bits, num_samples=100)
    assert sizes_said(caplog) == [4096, 2048]
    hungry.most = 10**9
    assert torch.equal(estimate.log_px, evidence(hungry, bits, num_samples=100, chunk_size=2048).log_px)


def test_enough_memory_is_no_news(bits, caplog):
    with caplog.at_level(logging.WARNING, "pvae"):
        evidence(Hungry(10**9, from_cuda), bits, num_samples=10)
    assert not caplog.records


def test_other_errors_pass_unchanged(bits, caplog):
    def fail():
        raise RuntimeError("the disk caught fire")

    with pytest.raises(RuntimeError, match=r"^the disk caught fire"):
        evidence(Hungry(20, fail), bits, num_samples=10)
    assert not caplog.records


@pytest.mark.parametrize("fail", [from_cuda, from_the_cpu])
def test_no_memory_for_a_single_draw_is_an_error_with_its_cause(fail, bits, small_vae, caplog, monkeypatch):
    monkeypatch.setattr(importance._Draws, "_strata", lambda *_: fail())
    said = "there is no memory for even one draw of one datum at a time"
    with caplog.at_level(logging.WARNING, "pvae"), pytest.raises(MemoryError, match=said) as caught:
        evidence(small_vae, bits[:3], chunk_size=4)
    assert sizes_said(caplog) == [2, 1]
    assert "allocate" in str(caught.value.__cause__)


def test_what_is_out_of_memory_lets_go_of_it_before_the_next_attempt(bits, monkeypatch):
    held = []

    class Large:
        pass

    def chunk(*_):
        assert not any(reference() for reference in held)
        large = Large()
        held.append(weakref.ref(large))
        from_cuda()

    monkeypatch.setattr(importance._Draws, "_strata", chunk)
    pair = ModulePair()
    with pytest.raises(MemoryError):
        evidence(pair, bits[:3], chunk_size=4)
    assert len(held) == 3


@pytest.mark.parametrize("fail", [from_cuda, from_the_cpu])
def test_training_never_takes_smaller_batches_than_it_was_told_to(fail, bits):
    """The third step has no memory: parameters are those after the second."""
    hungry = Hungry(10**9, fail)
    steps = []

    def transform(x):
        steps.append(states(hungry))
        if len(steps) == 4:  # the first is a look at the pair
            hungry.most = 63
        return x

    with pytest.raises(RuntimeError, match="allocate"):
        trained(Items(bits), pair=lambda: hungry, transform=transform)
    assert len(steps) == 4
    assert all(torch.equal(p, q) for p, q in zip(hungry.parameters(), steps[-1], strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(steps[-2], steps[-1], strict=True))
