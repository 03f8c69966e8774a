"""Random numbers of data that are read: they follow the seed alone, and a run goes on in the middle of them."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from itertools import chain

import numpy as np
import pytest
import torch
from helpers import (
    Drawing,
    Flipped,
    Items,
    Iterated,
    Raising,
    assert_same_run,
    batches_of,
    fit_fresh,
    kills_workers,
    make_loader,
    same,
    tear,
    weights,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
)

import pvae
from pvae.data.streams import Stream
from pvae.runtime.processes import ALONE

# Python 3.12 warns of any fork where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


# --- shuffling and other random numbers -------------------------------------------------------------------------------


def differ(ours, theirs):
    return not same(weights(ours[0]), weights(theirs[0]))


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
        data = make_loader(numbers, **options, **SHUFFLED[kind](numbers, own))
        runs.append(batches_of(data, epochs=2, seed=seed))
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
    data = make_loader(Raising(bits, 200, tear), shuffle=True, generator=own)
    with pytest.raises(KeyError, match="frame 77 is torn") as error:
        fit_fresh(data)
    assert torch.equal(own.get_state(), before)
    del error  # which keeps what was half done until here


def test_reading_leaves_the_callers_random_numbers_alone(bits):
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002

    for data in (Drawing(bits), make_loader(Drawing(bits), shuffle=True)):
        before = states()
        pair, _ = fit_fresh(data, validation=data)
        torch.manual_seed(1)  # as `trained` does
        pvae.VAE.mlp(6, 2, [8])
        now = states()
        assert now[1:] == before[1:]
        torch.manual_seed(7)
        state = states()
        pvae.log_evidence(pair.model, pair.guide, Drawing(bits), num_samples=2)
        assert states() == state


def test_noise_does_not_depend_on_random_numbers_that_reading_draws(bits):
    assert_same_run(fit_fresh(Drawing(bits), validation=Drawing(bits)), fit_fresh(bits, validation=bits))
    assert_same_run(fit_fresh(make_loader(Drawing(bits), num_workers=2)), fit_fresh(make_loader(bits)))
    assert_same_run(fit_fresh(make_loader(Drawing(bits))), fit_fresh(make_loader(bits)))


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_workers_change_nothing(options, bits):
    plain = {"shuffle": True}
    reference = fit_fresh(make_loader(bits, **plain), validation=bits[:80])
    assert_same_run(
        fit_fresh(make_loader(bits, **plain, **options), validation=make_loader(bits[:80], **options)), reference
    )


def test_batches_come_in_order_even_from_workers_that_need_not_keep_it(numbers):
    class Slow(Items):
        def __getitem__(self, index):
            if index < 5:
                time.sleep(0.2)
            return self.items[index]

    data = make_loader(Slow(numbers), batch_size=5, num_workers=2, in_order=False)
    assert [batch[0] for batch in batches_of(data)] == [0, 5, 10, 15]


READERS = {
    "dataset": lambda data: data,
    "loader": lambda data: make_loader(data, shuffle=True),
    "workers": lambda data: make_loader(data, shuffle=True, num_workers=2),
    "persistent workers": lambda data: make_loader(data, num_workers=2, persistent_workers=True),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("by", ["torch", "numpy", "python"])
def test_augmentation_follows_the_seed(reader, by, bits):
    """The same loader twice: nothing that it did before counts."""
    data = READERS[reader](Flipped(bits, by))
    first = fit_fresh(data, validation=data if reader == "dataset" else bits)
    torch.rand(5), np.random.rand(5), random.random()  # noqa: NPY002
    assert_same_run(fit_fresh(data, validation=data if reader == "dataset" else bits), first)
    assert differ(fit_fresh(data, seed=1), first)
    if reader == "dataset":
        assert differ(fit_fresh(bits), first)


@pytest.mark.parametrize("read", [None, 0, 2], ids=["dataset", "loader", "workers"])
def test_augmentation_is_other_in_each_pass_and_batch(read):
    """1 becomes 0 at random: two batches of 64 are equal with a chance of 2e-11."""
    data = Flipped(torch.ones(256, 1))
    data = data if read is None else make_loader(data, num_workers=read)
    batches = batches_of(data, epochs=2)
    assert len({tuple(batch) for batch in batches}) == 8


# --- a run that goes on from the middle of an epoch -------------------------------------------------------------------


RESUMED = {
    **{name: lambda x, read=read: read(Flipped(x)) for name, read in READERS.items()},
    "own generator": lambda x: make_loader(Flipped(x, "numpy"), shuffle=True, generator=generator(4)),
    "iterable": lambda x: make_loader(Iterated(x)),
    "batches": lambda x: DataLoader(Items(list(x.split(70))), batch_size=None, shuffle=True),
}


@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("step", [2, 8])
def test_a_run_stopped_within_an_epoch_goes_on_as_if_nothing_had_happened(kind, step, bits, tmp_path, interrupt):
    """Five steps an epoch; the data are random as they are read. What is gone on with is a new loader, as in a new
    process.
    """
    options = {"epochs": 3, "validation": Items(bits[:90]), "transform": pvae.datasets.fresh_bits}
    reference = fit_fresh(RESUMED[kind](bits), **options)
    options |= {"checkpoint": tmp_path, "resume": "auto"}
    interrupt(step)
    pair, stopped = fit_fresh(RESUMED[kind](bits), **options)
    assert stopped.stopped == "signal"
    assert len(stopped.history["elbo"]) == step // 5
    assert differ((pair, stopped), reference)
    np.random.rand(3)  # noqa: NPY002
    assert_same_run(fit_fresh(RESUMED[kind](bits), **options), reference)


def test_a_signal_while_a_datum_is_read(bits, tmp_path):
    options = {"checkpoint": tmp_path, "resume": "auto", "epochs": 3}
    count = []

    class Interrupted(Items):
        def __getitem__(self, index):
            count.append(1)
            if len(count) == 500:  # 64 for a look at the pair, 300 an epoch: in the third step of the second
                os.kill(os.getpid(), signal.SIGTERM)
            return self.items[index]

    _, stopped = fit_fresh(Interrupted(bits), **options)
    assert (stopped.stopped, len(stopped.history["elbo"])) == ("signal", 1)
    assert (tmp_path / "epoch-000001-step-0000003").is_dir()
    count.extend([1] * 1000)
    assert_same_run(fit_fresh(Interrupted(bits), **options), fit_fresh(bits, epochs=3))


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
    data = make_loader(Ended(bits, tmp_path / "flag"), num_workers=1, prefetch_factor=1)
    plain = make_loader(bits)
    options = {"checkpoint": tmp_path / "run", "resume": "auto"}
    options |= {"data": plain, "validation": data} if where == "validation" else {"data": data, "validation": plain}
    _, stopped = fit_fresh(**options)
    assert (stopped.stopped, len(stopped.history["elbo"])) == ("signal", 0)
    steps = 3 if where == "training" else 5
    assert (tmp_path / "run" / f"epoch-000000-step-000000{steps}").is_dir()
    assert_same_run(fit_fresh(**options), fit_fresh(plain, validation=plain))


@kills_workers
def test_a_worker_that_dies_is_heard_of_as_data_are_read(bits):
    """Not in the middle of a step: torch says it by a signal handler, which runs anywhere."""
    before = signal.getsignal(signal.SIGCHLD)
    stream = Stream("data", make_loader(bits, num_workers=1, prefetch_factor=1), 1, 0, ALONE)
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
