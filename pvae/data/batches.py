"""Data as batches on a device: tensors in memory, or a stream that is read; each process sees its shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.data.arrays import Data, as_tensors, fingerprint
from pvae.data.streams import Stream, is_stream
from pvae.errors import ArgumentError
from pvae.runtime import ALONE, Pair, Processes, check_supports

__all__ = ["Batches", "InMemory", "Rows", "Streamed", "Transform", "as_source", "make_batches"]

Rows = tuple[Tensor, ...]
Transform = Callable[..., Any]

_LOST = (RuntimeError, OSError, EOFError)  # what reading from a worker raises that was ended

# How much of a dataset to read at once where the caller leaves it open: data, and numbers in all of them.
_MOST_DATA = 4096
_MOST_ENTRIES = 2**24


class _Shared:
    """What batches in memory and read ones have in common."""

    device: torch.device
    transform: Transform | None
    processes: Processes

    @property
    def drawn_by(self) -> str:
        """What draws the data in an order that may not be their own, by its class; empty if nothing does."""
        return ""

    def in_order(self) -> Iterator[Rows]:
        """Batches with every datum once among all processes, as they are."""
        raise NotImplementedError

    def apply_transform(self, *rows: Tensor) -> Rows:
        """A batch as programs see it."""
        if self.transform is None:
            return rows
        changed = self.transform(*rows)
        changed = changed if isinstance(changed, tuple) else (changed,)
        if not all(isinstance(t, Tensor) and t.dim() and len(t) == len(rows[0]) for t in changed):
            came = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in changed)
            raise ArgumentError(
                f"transform must make a tensor, or a tuple of tensors, of the {len(rows[0])} data of a batch; it made "
                f"{came}."
            )
        return changed

    def sum_over(self, function: Callable[[Rows], float], stop: Callable[[], bool]) -> tuple[float, int]:
        """Sums a function of batches over every datum once, those of all processes; ends early where it is to stop.

        An error on one process is raised on all.

        Returns:
            The sum, and how many data were seen.
        """
        total, seen = 0.0, 0
        with self.processes.together():
            for batch in self.in_order():
                total += function(batch)
                seen += len(batch[0])
                if stop():
                    break
        (sums,) = self.processes.all_reduce([torch.tensor([total, seen], dtype=torch.float64, device=self.device)])
        total, seen = sums.tolist()
        return total, int(seen)


@dataclass(frozen=True)
class InMemory(_Shared):
    """Tensors with the same N, taken ``batch_size`` rows at a time and moved to a device.

    Attributes:
        tensors: Shape ``(N, ...)`` each.
        batch_size: Rows in a batch; the last one of a pass may have fewer.
        device: Where batches go.
        transform: What is made of each batch there before a program sees it; nothing if left out.
        seed: Of the order of each pass.
        processes: The processes that take shards of each batch.
        place: What part of a stream they are, in words; empty if they are all.
    """

    tensors: Rows
    batch_size: int
    device: torch.device
    transform: Transform | None = None
    seed: int = 0
    processes: Processes = ALONE
    place: str = ""

    @property
    def num_data(self) -> int:
        """``N``."""
        return len(self.tensors[0])

    @property
    def steps(self) -> int:
        """Batches in one pass."""
        return -(-self.num_data // self.batch_size)

    @property
    def fewest(self) -> int:
        """The least rows that a process is given at once in a pass."""
        last = self.num_data % self.batch_size or min(self.batch_size, self.num_data)
        return max(1, last // self.processes.world_size)

    @property
    def whole(self) -> Rows | None:
        """All the data, untransformed."""
        return self.tensors if self.transform is None else None

    def on_device(self) -> InMemory:
        """The same with all data on the device."""
        return replace(self, tensors=tuple(t.to(self.device) for t in self.tensors))

    def together(self) -> InMemory:
        """All data as one datum: tensors of shape ``(1, N, ...)``."""
        return replace(self, tensors=tuple(t[None] for t in self.tensors), batch_size=1)

    def order(self, epoch: int) -> Tensor:
        """The order of all rows in a pass, the same on every device."""
        return torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(self.num_data))

    def take(self, rows: Tensor) -> Rows:
        """Some rows, on the device, as they are."""
        return tuple(t.index_select(0, rows.to(t.device)).to(self.device) for t in self.tensors)

    def shuffle(self, epoch: int, begin: int = 0) -> Iterator[Rows]:
        """The batches of a pass from one of them on, as they are; a shard of one may have no rows."""
        return (self.take(self.processes.shard(rows)) for rows in self.order(epoch).split(self.batch_size)[begin:])

    def in_order(self) -> Iterator[Rows]:
        """Batches with every datum once among all processes, as they are."""
        batches = zip(*(t.split(self.batch_size) for t in self.tensors), strict=True)
        for rows in islice(batches, self.processes.rank, None, self.processes.world_size):
            yield tuple(t.to(self.device) for t in rows)

    def first(self) -> Rows:
        """One batch, transformed; the same on all processes."""
        # Of several processes a shard: a plate over all the data shows that it scales up only on fewer of them.
        shard = Processes(0, self.processes.world_size).shard
        return self.apply_transform(*(shard(t[: self.batch_size]).to(self.device) for t in self.tensors))

    def any(self) -> Rows:
        """The first batch of the first shuffled pass, transformed."""
        return self.apply_transform(*self.take(self.order(1)[: self.batch_size]))

    def peek(self) -> Rows:
        """All of them, where they are."""
        return self.tensors

    def blocks(self) -> Iterator[tuple[int, InMemory]]:
        """This process's shard, if it has data; its number is the process's."""
        shard = tuple(self.processes.shard(t) for t in self.tensors)
        if len(shard[0]):
            yield self.processes.rank, replace(self, tensors=shard, processes=ALONE)

    def watch(self, observed: Iterable[Any]) -> InMemory:
        """Itself: all of them are looked at where the pair is."""
        return self

    def name_errors(self, number: int) -> AbstractContextManager[None]:
        """A block; nothing is to be added to its errors."""
        return nullcontext()

    def fingerprint(self) -> str:
        """Of all that is in them."""
        return f"{self.num_data} data, {fingerprint(self.tensors)}"


@dataclass
class Streamed(_Shared):
    """A stream's batches, moved to a device and, where programs take them as they are, checked on their way.

    Attributes:
        stream: Where they are read.
        pair: For whom: its device, and the dtype of floating-point data.
        transform: As for `InMemory`.
        stop: Asked where reading fails: an interrupt from the keyboard ends a loader's workers, too.
        observed: What `pvae.runtime.sites.observed_data` found in a trial run on one batch.
    """

    stream: Stream
    pair: Pair
    transform: Transform | None = None
    stop: Callable[[], bool] = bool
    observed: Iterable[Any] = ()
    _begun: Iterator[tuple[int, Rows]] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where they go."""
        return self.pair.device

    @property
    def processes(self) -> Processes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those that read them."""
        return self.stream.processes

    @property
    def num_data(self) -> int | None:
        """``N``, where that is known."""
        return self.stream.num_data

    @property
    def steps(self) -> int | None:
        """Batches in one pass, where that is known."""
        return self.stream.steps

    @property
    def fewest(self) -> int | None:
        """The least rows that a process is given at once in a pass, where that is known."""
        return self.stream.fewest

    @property
    def whole(self) -> Rows | None:
        """None: they are not in memory."""
        return None

    @property
    def drawn_by(self) -> str:
        """What draws them, where their order may not be the dataset's."""
        return self.stream.drawn_by

    def shuffle(self, epoch: int, begin: int = 0) -> Iterator[Rows]:
        """The batches of a pass from one of them on, as they are; fewer where a signal ended the workers, too."""
        batches = self._read(epoch, begin)
        while True:
            try:
                rows = next(batches, None)
            except _LOST:
                if self.stop():
                    return
                raise
            if rows is None:
                return
            yield rows

    def in_order(self) -> Iterator[Rows]:
        """Batches with every datum once among all processes, as they are; fewer as `shuffle`."""
        return self.shuffle(0)

    def first(self) -> Rows:
        """One batch, transformed; the same on all processes."""
        shard = Processes(0, 1 if self.stream.dealt else self.processes.world_size).shard
        return self.apply_transform(*map(shard, next(self._alone()._read(0))))

    def any(self) -> Rows:
        """The first batch of the first shuffled pass, transformed."""
        return self.apply_transform(*next(self._alone()._read(1)))

    def peek(self) -> Rows:
        """The first batch, where it was read; the same on all processes."""
        if self.processes.world_size > 1:
            return self.pair.cast(next(self.stream.alone().batches(0))[1])
        batches = self.stream.batches(0)
        first = next(batches)
        self._begun = chain([first], batches)
        return self.pair.cast(first[1])

    def blocks(self) -> Iterator[tuple[int, InMemory]]:
        """This process's batches, each with its number; goes on from what `peek` has read."""
        batches, self._begun = self._begun or self.stream.batches(0), None
        for number, rows in batches:
            with self.name_errors(number):
                rows = self.pair.cast(rows)
                check_supports(self.observed, rows)
            place = f" of batch {number} of {self.stream.name}"
            yield number, InMemory(rows, len(rows[0]), self.device, place=place)

    def watch(self, observed: Iterable[Any]) -> Streamed:
        """The same, with each batch held against the supports of the sites that `observed_data` finds."""
        return replace(self, observed=observed)

    def name_errors(self, number: int) -> AbstractContextManager[None]:
        """A block in which a `DataError` is about a batch, and says so."""
        return self.stream.name_errors(number)

    def _alone(self) -> Streamed:
        return replace(self, stream=self.stream.alone())

    def _read(self, epoch: int, begin: int = 0) -> Iterator[Rows]:
        for number, rows in self.stream.batches(epoch, begin):
            with self.name_errors(number):
                batch = tuple(t.to(self.device) for t in self.pair.cast(rows))
                if self.transform is None and len(batch[0]):
                    check_supports(self.observed, batch)
            yield batch

    def fingerprint(self) -> str:
        """Of what is known of a stream: its type and its lengths."""
        source = self.stream.data if self.stream.loader is None else self.stream.loader.dataset
        return f"{type(source).__name__}, {self.num_data} data, {self.steps} batches"


Batches = InMemory | Streamed
"""What steps are taken on; of several processes, each sees its shard."""


def as_source(name: str, data: Data) -> Rows | Any:
    """Data in memory as tensors, looked at once and for all; a ``Dataset`` or ``DataLoader`` as it is.

    Raises:
        DataError: As `as_tensors` does.
    """
    return data if is_stream(data) else as_tensors(name, data)


def make_batches(
    name: str,
    source: Any,
    pair: Pair,
    batch_size: int | None,
    *,
    seed: int = 0,
    transform: Transform | None = None,
    processes: Processes = ALONE,
    evaluated: bool = False,
    stop: Callable[[], bool] = bool,
) -> Batches:
    """Batches of a pair's data on its device, in the dtype of its modules.

    Args:
        name: What to call the data in an error.
        source: As from `as_source`.
        pair: The placed pair.
        batch_size: Rows in a batch; ``None`` for all that are in memory, and as many of a dataset as it is good to read
            at once. A loader has its own.
        seed: Of the order of each pass, and of random numbers drawn in reading.
        transform: What is made of each batch.
        processes: Those that share the data.
        evaluated: Whether every datum has to come once.
        stop: Asked where reading fails.

    Raises:
        DataError: Data are too large for the modules' dtype, or a stream cannot be read in the way that is asked for.
    """
    if isinstance(source, tuple):
        tensors = pair.cast(source)
        return InMemory(tensors, batch_size or len(tensors[0]), pair.device, transform, seed, processes)
    stream = Stream(name, source, batch_size or 1, seed, processes, evaluated=evaluated)
    if batch_size is None and stream.loader is None:
        _, datum = next(stream.alone().batches(0))
        batch_size = max(1, min(_MOST_DATA, _MOST_ENTRIES // max(t.numel() for t in datum)))
        stream = Stream(name, source, batch_size, seed, processes, evaluated=evaluated)
    return Streamed(stream, pair, transform, stop)
