"""Data as batches on a device: tensors in memory, or a stream that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pvae.data.arrays import fingerprint
from pvae.data.streams import Stream
from pvae.errors import ArgumentError
from pvae.runtime import ALONE, Processes, cast, check_supports

__all__ = ["Batches", "InMemory", "Rows", "Streamed", "Transform"]

Rows = tuple[Tensor, ...]
Transform = Callable[..., Any]

_LOST = (RuntimeError, OSError, EOFError)  # what reading from a worker raises that was ended


class Batches(Protocol):
    """What steps are taken on; of several processes, each sees its part.

    Attributes:
        device: Where batches go.
        transform: What is made of each batch there before a program sees it; nothing if left out.
        num_data: ``N``, where that is known before a pass.
        steps: Batches in one pass, where that is known.
    """

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    @property
    def transform(self) -> Transform | None: ...  # noqa: D102

    @property
    def num_data(self) -> int | None: ...  # noqa: D102

    @property
    def steps(self) -> int | None: ...  # noqa: D102

    def shuffled(self, epoch: int, begin: int = 0) -> Iterator[Rows]:
        """The batches of a pass from one of them on, as they are; a part may have no rows."""
        ...

    def in_order(self) -> Iterator[Rows]:
        """Batches with every datum once among all processes, as they are."""
        ...

    def first(self) -> Rows:
        """One batch, transformed; the same on all processes."""
        ...

    def any(self) -> Rows:
        """The first batch of the first shuffled pass, transformed: rows from all over the data, the same anywhere."""
        ...

    def transformed(self, *rows: Tensor) -> Rows:
        """A batch as programs see it."""
        ...

    def fingerprint(self) -> str:
        """A short text that other data are unlikely to have."""
        ...


def _transformed(transform: Transform | None, rows: Rows) -> Rows:
    if transform is None:
        return rows
    changed = transform(*rows)
    changed = changed if isinstance(changed, tuple) else (changed,)
    if not all(isinstance(t, Tensor) and t.dim() and len(t) == len(rows[0]) for t in changed):
        came = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in changed)
        raise ArgumentError(
            f"transform must make a tensor, or a tuple of tensors, of the {len(rows[0])} data of a batch; it made "
            f"{came}."
        )
    return changed


@dataclass(frozen=True)
class InMemory:
    """Tensors with the same N, taken ``batch_size`` rows at a time and moved to a device.

    Attributes:
        tensors: Shape ``(N, ...)`` each.
        batch_size: Rows in a batch; the last one of a pass may have fewer.
        device: Where batches go.
        transform: What is made of each batch there before a program sees it; nothing if left out.
        seed: Of the order of each pass.
        processes: The processes that take parts of each batch.
    """

    tensors: Rows
    batch_size: int
    device: torch.device
    transform: Transform | None = None
    seed: int = 0
    processes: Processes = ALONE

    @property
    def num_data(self) -> int:
        """``N``."""
        return len(self.tensors[0])

    @property
    def steps(self) -> int:
        """Batches in one pass."""
        return -(-self.num_data // self.batch_size)

    def on_device(self) -> InMemory:
        """The same with all data on the device."""
        return replace(self, tensors=tuple(t.to(self.device) for t in self.tensors))

    def order(self, epoch: int) -> Tensor:
        """The order of all rows in a pass, the same on every device."""
        return torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(self.num_data))

    def take(self, rows: Tensor) -> Rows:
        """Some rows, on the device, as they are."""
        return tuple(t.index_select(0, rows.to(t.device)).to(self.device) for t in self.tensors)

    def shuffled(self, epoch: int, begin: int = 0) -> Iterator[Rows]:
        """The batches of a pass from one of them on, as they are; a part may have no rows."""
        return (self.take(self.processes.shard(rows)) for rows in self.order(epoch).split(self.batch_size)[begin:])

    def in_order(self) -> Iterator[Rows]:
        """Batches with every datum once among all processes, as they are."""
        batches = zip(*(t.split(self.batch_size) for t in self.tensors), strict=True)
        for rows in islice(batches, self.processes.rank, None, self.processes.world_size):
            yield tuple(t.to(self.device) for t in rows)

    def first(self) -> Rows:
        """One batch, transformed; the same on all processes."""
        # Of several processes a part: a plate over all the data shows that it scales up only on fewer of them.
        part = Processes(0, self.processes.world_size).shard
        return self.transformed(*(part(t[: self.batch_size]).to(self.device) for t in self.tensors))

    def any(self) -> Rows:
        """The first batch of the first shuffled pass, transformed."""
        return self.transformed(*self.take(self.order(1)[: self.batch_size]))

    def transformed(self, *rows: Tensor) -> Rows:
        """A batch as programs see it."""
        return _transformed(self.transform, rows)

    def fingerprint(self) -> str:
        """Of all that is in them."""
        return f"{self.num_data} data, {fingerprint(self.tensors)}"


@dataclass
class Streamed:
    """A stream's batches, moved to a device and, where programs take them as they are, checked on their way.

    Attributes:
        stream: Where they are read.
        device: Where they go.
        dtype: Of floating-point data; ``None`` leaves it.
        transform: As for `InMemory`.
        asked_to_stop: Asked where reading fails: an interrupt from the keyboard ends a loader's workers, too.
        observed: What `pvae.runtime.sites.observed` found in a trial run on one batch.
    """

    stream: Stream
    device: torch.device
    dtype: torch.dtype | None = None
    transform: Transform | None = None
    asked_to_stop: Callable[[], bool] = bool
    observed: Iterable[Any] = ()

    @property
    def num_data(self) -> int | None:
        """``N``, where that is known."""
        return self.stream.num_data

    @property
    def steps(self) -> int | None:
        """Batches in one pass, where that is known."""
        return self.stream.steps

    def shuffled(self, epoch: int, begin: int = 0) -> Iterator[Rows]:
        """The batches of a pass from one of them on, as they are; fewer where a signal ended the workers, too."""
        batches = self._read(epoch, begin)
        while True:
            try:
                rows = next(batches, None)
            except _LOST:
                if self.asked_to_stop():
                    return
                raise
            if rows is None:
                return
            yield rows

    def in_order(self) -> Iterator[Rows]:
        """Batches with every datum once among all processes, as they are; fewer as `shuffled`."""
        return self.shuffled(0)

    def first(self) -> Rows:
        """One batch, transformed; the same on all processes."""
        alone = replace(self, stream=self.stream.alone())
        part = Processes(0, 1 if self.stream.dealt else self.stream.processes.world_size).shard
        return self.transformed(*map(part, next(alone._read(0))))

    def any(self) -> Rows:
        """The first batch of the first shuffled pass, transformed."""
        return self.transformed(*next(replace(self, stream=self.stream.alone())._read(1)))

    def transformed(self, *rows: Tensor) -> Rows:
        """A batch as programs see it."""
        return _transformed(self.transform, rows)

    def _read(self, epoch: int, begin: int = 0) -> Iterator[Rows]:
        for number, rows in self.stream.batches(epoch, begin):
            with self.stream.named(number):
                moved = self._moved(rows)
            yield moved

    def _moved(self, rows: Rows) -> Rows:
        dtype = self.dtype
        moved = tuple((cast(t, dtype) if dtype and t.is_floating_point() else t).to(self.device) for t in rows)
        if self.transform is None and len(rows[0]):
            check_supports(self.observed, moved)
        return moved

    def fingerprint(self) -> str:
        """Of what is known of a stream: its type and its lengths."""
        source = self.stream.data if self.stream.loader is None else self.stream.loader.dataset
        return f"{type(source).__name__}, {self.num_data} data, {self.steps} batches"
