"""Data that need not fit in memory: torch's ``Dataset`` and ``DataLoader``, read batch by batch.

The random numbers with which data are shuffled and read are a stream of their own, seeded for each pass. So noise does
not depend on how data are read, and a pass can be begun again from its middle.
"""

from __future__ import annotations

import copy
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from pvae.data.arrays import as_tensors
from pvae.errors import DataError, first_line, warn
from pvae.runtime import ALONE, Processes, get_rng_state, set_rng_state

__all__ = ["Stream", "is_stream"]

Rows = tuple[Tensor, ...]

_END = object()


def is_stream(data: Any) -> bool:
    """Whether data are to be read batch by batch. A ``TensorDataset`` is in memory, if its items are its rows."""
    if isinstance(data, TensorDataset):
        return type(data).__getitem__ is not TensorDataset.__getitem__
    return isinstance(data, Dataset | DataLoader)


class Stream:
    """Batches read from a ``Dataset`` or a ``DataLoader``.

    A dataset is read in this process, in an order drawn for each pass or, to evaluate it, as it is. A loader is used
    with its sampler, its batches and its workers; shuffling and random numbers, those of generators that it was given
    included, follow ``seed``. For that its workers are started for each pass, and give batches in order. Of several
    processes each takes its part of every batch (to evaluate: every so many batches), unless the loader has a
    ``DistributedSampler``, which deals out the data itself.

    Args:
        name: What to call the data in an error.
        data: The dataset or the loader.
        batch_size: For a dataset.
        seed: Of the order, and of random numbers drawn in reading.
        processes: The processes that read it.
        evaluated: Whether every datum has to come once.

    Attributes:
        num_data: In one pass, of all processes; ``None`` where that is not known.
        steps: Batches in one pass, where that is known.
        drawn_by: What draws the data in an order that may not be the dataset's, by its class; empty if nothing does.

    Raises:
        DataError: There are no data, or they cannot be read in the way that is asked for.
    """

    def __init__(
        self, name: str, data: Any, batch_size: int, seed: int, processes: Processes, *, evaluated: bool = False
    ) -> None:
        self.name, self.data, self.batch_size, self.seed, self.processes = name, data, batch_size, seed, processes
        self.evaluated, self.dealt, self.drawn_by = evaluated, False, ""
        self.loader = _reproducible(data) if isinstance(data, DataLoader) else None
        if isinstance(data, IterableDataset):
            raise DataError(
                f"{name} is an IterableDataset, which only a DataLoader makes batches of: pass "
                "torch.utils.data.DataLoader(dataset, batch_size=...)."
            )
        if self.loader is not None:
            self._look_at(self.loader)
        elif (length := _length(data)) is not None:
            self.num_data, self.steps = length, -(-length // batch_size)
        else:
            raise DataError(f"{name} is a {type(data).__name__} without a length. Give it __len__, or a DataLoader.")
        if self.num_data == 0 or self.steps == 0:
            raise DataError(f"{name} is empty: it gives no batch. Pass some data, or a loader without drop_last=True.")

    def batches(self, epoch: int, begin: int = 0) -> Iterator[tuple[int, Rows]]:
        """This process's batches of one pass, checked, where the data are, each with its number from 1 on.

        Args:
            epoch: Number of the pass, on which its order depends; 0 for a dataset as it is.
            begin: How many batches to leave out at its beginning.

        Raises:
            DataError: A batch is no tensor or sequence of tensors, or holds nan or infinite entries; or there is none.
        """
        for source in self._sources:
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)
        return self._of_dataset(epoch, begin) if self.loader is None else self._of_loader(self.loader, epoch, begin)

    @contextmanager
    def name_errors(self, number: int) -> Iterator[None]:
        """A block in which a `DataError` is about a batch, and says so."""
        try:
            yield
        except DataError as error:
            raise DataError(f"batch {number} of {self.name}: {error}") from None

    def alone(self) -> Stream:
        """The same for this process alone."""
        stream = copy.copy(self)
        stream.processes = ALONE
        return stream

    @property
    def fewest(self) -> int | None:
        """The least data that a process is given at once in a pass, where that is known."""
        size = self.batch_size if self.loader is None else getattr(self.loader.batch_sampler, "batch_size", None)
        if not size or self.num_data is None or (self.loader and isinstance(self.loader.dataset, IterableDataset)):
            return None
        processes = self.processes.world_size
        data, sharing = (self.num_data // processes, 1) if self.dealt else (self.num_data, processes)
        return max(1, (data % size or min(size, data)) // sharing)

    @property
    def _sources(self) -> tuple[Any, ...]:
        """The dataset, and a loader's samplers."""
        loader = self.loader
        return (self.data,) if loader is None else (loader.dataset, loader.batch_sampler, _sampler(loader))

    def _of_dataset(self, epoch: int, begin: int) -> Iterator[tuple[int, Rows]]:
        length = self.num_data or 0
        order = None
        if epoch and not self.evaluated:
            order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(length))
        for number in range(begin, self.steps or 0):
            if self.evaluated and number % self.processes.world_size != self.processes.rank:
                continue
            rows = torch.arange(number * self.batch_size, min((number + 1) * self.batch_size, length))
            rows = rows if order is None else order[rows]
            ours = rows if self.evaluated else self.processes.shard(rows)
            # Each batch has noise of its own, so that one need not be read for the sake of the next.
            with _Noise(self.seed, epoch, number, self.processes.rank).swap_in():
                batch = self._collate((ours if len(ours) else rows[:1]).tolist())
            yield number + 1, tuple(t[: len(ours)] for t in self._tensors(number + 1, batch))

    def _collate(self, rows: list[int]) -> Any:
        fetch = getattr(self.data, "__getitems__", None)
        return default_collate(fetch(rows) if fetch else [self.data[row] for row in rows])

    def _of_loader(self, loader: DataLoader[Any], epoch: int, begin: int) -> Iterator[tuple[int, Rows]]:
        processes, seen, number = self.processes, 0, 0
        for number, batch in enumerate(self._read(loader, epoch), 1):
            ours = not self.evaluated or self.dealt or (number - 1) % processes.world_size == processes.rank
            if number > begin and ours:
                rows = self._tensors(number, batch)
                seen += len(rows[0])
                whole = self.evaluated or self.dealt
                place = (number - 1) * processes.world_size + processes.rank + 1 if self.dealt else number
                yield place, rows if whole else tuple(processes.shard(t) for t in rows)
        if not number:
            raise DataError(
                f"{self.name} gave no batch in pass {epoch}. An iterable dataset has to begin anew in each __iter__."
            )
        if not begin and processes.world_size == 1 and self.num_data not in (None, seen):
            self._warn([f"{seen} data came in a pass, and by its length there are {self.num_data}"])

    def _read(self, loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
        """A loader's batches as it gives them."""
        found = [getattr(source, "generator", None) for source in (loader, *self._sources[1:])]
        reading = _Noise(self.seed, epoch, generators=[g for g in found if isinstance(g, torch.Generator)])
        with reading.swap_in():
            iterator = iter(loader)
        with _Workers(self.name, iterator) as workers:
            try:
                while True:
                    with reading.swap_in(), workers.listen():
                        batch = next(iterator, _END)
                    if batch is _END:
                        return
                    yield batch
            finally:
                # An error holds on to the iterator; workers that wait for the garbage collector end seconds later.
                getattr(iterator, "_shutdown_workers", bool)()

    def _tensors(self, number: int, batch: Any) -> Rows:
        """A batch as a tuple of tensors, from the lists that are made of tuples."""
        return as_tensors(f"batch {number} of {self.name}", tuple(batch) if isinstance(batch, list) else batch)

    def _look_at(self, loader: DataLoader[Any]) -> None:
        """Finds out how many data come, and says so where a sampler leaves some out or repeats them."""
        sampler = _sampler(loader)
        there, iterable = _length(loader.dataset), isinstance(loader.dataset, IterableDataset)
        what, copies = type(loader.batch_sampler if sampler is None else sampler).__name__, 1
        in_order = iterable or isinstance(sampler, SequentialSampler)
        if isinstance(sampler, DistributedSampler):
            self.dealt, copies = True, sampler.num_replicas
            in_order = copies == 1 and not sampler.shuffle
            if copies != self.processes.world_size:
                raise DataError(
                    f"{self.name} has a DistributedSampler for {copies} processes, and there are "
                    f"{self.processes.world_size}. Pass the dataset, or a loader without it: each process then takes "
                    "its part."
                )
        self.drawn_by = "" if in_order else what
        each = there if iterable else _length(sampler)
        size = getattr(loader.batch_sampler, "batch_size", None)
        drops = bool(size and getattr(loader.batch_sampler, "drop_last", False))
        drawn = None if each is None else each * copies
        dropped = each % size * copies if drops and size and each is not None else 0
        self.steps = _length(loader)
        # Of items that are batches their number alone is known.
        self.num_data = None if drawn is None or loader.batch_sampler is None else drawn - dropped

        repeated = drawn is not None and there is not None and drawn > there
        if self.evaluated and (repeated or getattr(sampler, "replacement", False)):
            how = f"pads {there} data to {drawn}" if self.dealt else f"may draw one of {there} data more than once"
            raise DataError(
                f"{self.name}: its {what} {how}, so that some would count twice. Pass the dataset, or a loader that "
                "gives each once."
            )
        said = []
        if drawn is not None and there is not None and drawn != there:
            verb = f"pads {there} data to {drawn}" if self.dealt and repeated else f"draws {drawn} of {there} data"
            said.append(f"its {what} {verb} in each pass")
        if dropped:
            said.append(f"the loader drops the last {dropped} of {drawn} data in each pass (drop_last=True)")
        elif drops and drawn is None:
            said.append("the loader drops a last batch that is not full (drop_last=True)")
        self._warn(said)

    def _warn(self, said: Sequence[str]) -> None:
        if said:
            warn(f"{self.name}: {'; '.join(said)}.")


class _Noise:
    """Random numbers for reading data, of all the generators that a dataset or a sampler may use."""

    def __init__(self, *seeds: int, generators: Sequence[torch.Generator] = ()) -> None:
        self.generators = list({id(g): g for g in generators}.values())
        drawn = np.random.SeedSequence(seeds).generate_state(1 + len(self.generators), np.uint64) >> np.uint64(1)
        seed, *others = drawn.tolist()
        state = torch.Generator().manual_seed(seed).get_state()
        numbers = state, random.Random(seed).getstate(), np.random.RandomState(seed % 2**32).get_state()
        own = zip(self.generators, others, strict=True)
        self.states: Any = numbers, [torch.Generator(g.device).manual_seed(s).get_state() for g, s in own]

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """A block that draws them; those of the process and of the generators are put back."""
        outside = self._now()
        self._set(self.states)
        try:
            yield
        finally:
            self.states = self._now()
            self._set(outside)

    def _now(self) -> Any:
        return get_rng_state(), [generator.get_state() for generator in self.generators]

    def _set(self, states: Any) -> None:
        set_rng_state(states[0])
        for generator, state in zip(self.generators, states[1], strict=True):
            generator.set_state(state)


class _WorkerEnded(DataError, RuntimeError):  # a RuntimeError is what torch makes of it
    """A worker of a loader is no more."""


class _Workers:
    """A block in which torch's news that a worker has died, an error in a signal handler, waits until data are read.

    Else it would be raised wherever the process happens to be, such as in the middle of an update.
    """

    def __init__(self, name: str, iterator: Any) -> None:
        self.name = name
        self.processes: list[Any] = getattr(iterator, "_workers", [])
        self.before: Any = None
        self.error: RuntimeError | None = None
        self.reading = False

    def __enter__(self) -> _Workers:
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            self.before = signal.getsignal(signal.SIGCHLD)
            if callable(self.before):
                signal.signal(signal.SIGCHLD, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if callable(self.before) and signal.getsignal(signal.SIGCHLD) == self._on_signal:
            signal.signal(signal.SIGCHLD, self.before)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """A block that reads.

        Raises:
            DataError: A worker has ended before its time; torch says so in many ways.
        """
        self.reading = True
        try:
            if self.error is not None:
                raise self.error
            yield
        except (RuntimeError, OSError, EOFError) as error:
            self.reading = False  # a signal may tell of the same
            # A dataset's own error is one that a worker tells of, and lives on.
            if "in DataLoader worker process" in str(error) or not self._one_has_ended():
                raise
            said = first_line(error)
            raise _WorkerEnded(
                f"{self.name}: a worker of the DataLoader ended as it read the data ({said.rstrip('.')}). Does the "
                "dataset exit, or was there no memory left? With num_workers=0 it is read in this process, which shows "
                "where."
            ) from error
        finally:
            self.reading = False

    def _one_has_ended(self) -> bool:
        ends = [process.sentinel for process in self.processes]
        return bool(ends and wait(ends, timeout=1.0))  # the end may be heard of before it is complete

    def _on_signal(self, number: int, frame: Any) -> None:
        try:
            self.before(number, frame)
        except RuntimeError as error:
            if self.reading:
                raise
            self.error = error


def _reproducible(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, where batches come in order from workers whose random numbers do not go on from pass to pass."""
    loader = copy.copy(loader)
    vars(loader).update(persistent_workers=False, in_order=True)  # past DataLoader's own guard
    return loader


def _sampler(loader: DataLoader[Any]) -> Any:
    """What a loader draws its data by, one by one; ``None`` where its batches have an order of their own."""
    return loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except (TypeError, NotImplementedError):
        return None
