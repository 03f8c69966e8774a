"""Data that need not fit in memory: torch's ``Dataset`` and ``DataLoader``, read batch by batch.

The random numbers with which data are shuffled and read are a stream of their own, seeded for each pass. So noise does
not depend on how data are read, and a pass can be begun again from its middle.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler, TensorDataset

from pvae.checks import as_tensors
from pvae.errors import DataError
from pvae.isolation import noise, set_noise
from pvae.ranks import ALONE, Ranks

__all__ = ["Stream", "is_stream"]


def is_stream(data: Any) -> bool:
    """Whether data are to be read batch by batch. Those of a ``TensorDataset`` are in memory anyway."""
    return isinstance(data, Dataset | DataLoader) and not isinstance(data, TensorDataset)


class Stream:
    """Batches read from a ``Dataset`` or a ``DataLoader``.

    A dataset is read in this process, in an order drawn for each pass or, to evaluate it, as it is. A loader is taken
    as it is, with its sampler and its workers; its shuffling follows ``seed``. Of several processes each takes its part
    of every batch (to evaluate: every so many batches), unless the loader has a ``DistributedSampler``, which deals out
    the data itself.

    Args:
        name: What to call the data in an error.
        data: The dataset or the loader.
        batch_size: For a dataset.
        seed: Of the order, and of random numbers drawn in reading.
        ranks: The processes that read it.
        evaluated: Whether every datum has to come once, in an order that the caller knows.

    Raises:
        DataError: There are no data, or they cannot be read in the way that is asked for.
    """

    def __init__(
        self, name: str, data: Any, batch_size: int, seed: int, ranks: Ranks, *, evaluated: bool = False
    ) -> None:
        self.name, self.data, self.batch_size, self.seed, self.ranks = name, data, batch_size, seed, ranks
        self.evaluated = evaluated
        self.loader = data if isinstance(data, DataLoader) else None
        if isinstance(data, IterableDataset):
            raise DataError(
                f"{name} is an IterableDataset, which only a DataLoader makes batches of: pass "
                "torch.utils.data.DataLoader(dataset, batch_size=...)."
            )
        self.num_data = _length(data if self.loader is None else data.dataset)
        self.steps = -(-self.num_data // batch_size) if self.loader is None and self.num_data is not None else None
        if self.loader is not None:
            self.steps = _length(self.loader)
            sampler = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
            self.dealt = isinstance(sampler, DistributedSampler)
            self._look_at_the_loader(sampler)
        else:
            self.dealt = False
            if self.num_data is None:
                raise DataError(
                    f"{name} is a {type(data).__name__} without a length. Give it __len__, or a DataLoader."
                )
        if self.num_data == 0 or self.steps == 0:
            raise DataError(f"{name} is empty: it gives no batch. Pass some data.")

    def batches(self, epoch: int, begin: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """This process's batches of one pass, checked, where the data are.

        Args:
            epoch: Number of the pass, on which its order depends.
            begin: How many batches to leave out at its beginning.

        Raises:
            DataError: A batch is no tensor or sequence of tensors, or holds nan or infinite entries.
        """
        reading = _Noise(self.seed, epoch)
        loader, generator = self._loader(epoch, begin), self.loader.generator if self.loader is not None else None
        with _restored(generator):
            if generator is not None:
                generator.manual_seed(_derived(self.seed, epoch, generator.initial_seed()))
            with reading.drawn():
                iterator = iter(loader)
            number = 0 if self.loader is not None else begin
            while True:
                with reading.drawn():
                    batch = next(iterator, None)
                if batch is None:
                    return
                number += 1
                if number > begin and self._ours(number):
                    yield self._part(as_tensors(f"batch {number} of {self.name}", _sequence(batch)))

    def alone(self) -> Stream:
        """The same for this process alone."""
        stream = copy.copy(self)
        stream.ranks = ALONE
        return stream

    def _loader(self, epoch: int, begin: int) -> Any:
        if self.loader is not None:
            sampler = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            return self.loader
        length = self.num_data or 0
        order = torch.arange(length)
        if not self.evaluated:
            order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(length))
        batches = [rows.tolist() for rows in order.split(self.batch_size)[begin:]]
        return DataLoader(self.data, batch_sampler=batches)

    def _ours(self, number: int) -> bool:
        return not self.evaluated or self.dealt or (number - 1) % self.ranks.count == self.ranks.number

    def _part(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.evaluated or self.dealt or self.ranks.count == 1:
            return batch
        return tuple(self.ranks.part(t) for t in batch)

    def _look_at_the_loader(self, sampler: Any) -> None:
        """Says so where a sampler leaves data out or repeats them, which the caller may not expect."""
        loader: Any = self.loader
        if self.num_data is None or isinstance(loader.dataset, IterableDataset):
            return
        drawn, what = _length(sampler), "its sampler"
        if self.dealt and drawn is not None:
            drawn, what = drawn * sampler.num_replicas, "its DistributedSampler"
            if sampler.num_replicas != self.ranks.count:
                raise DataError(
                    f"{self.name} has a DistributedSampler for {sampler.num_replicas} processes, and there are "
                    f"{self.ranks.count}. Pass the dataset, or a loader without it: each process then takes its part."
                )
        size, drop_last = loader.batch_size, loader.drop_last
        if size is None and loader.batch_sampler is not None:
            size, drop_last = (getattr(loader.batch_sampler, n, None) for n in ("batch_size", "drop_last"))
        dropped = drawn % size if drawn is not None and drop_last and size else 0
        if drawn is not None and drawn > self.num_data and self.evaluated:
            raise DataError(
                f"{self.name}: {what} pads {self.num_data} data to {drawn}, so that some would count twice. Pass the "
                "dataset, or a loader without it: each process then takes its part."
            )
        said = []
        if drawn is not None and drawn != self.num_data:
            verb = "pads" if self.dealt and drawn > self.num_data else "drops" if self.dealt else "draws"
            amount = f"{self.num_data} data to {drawn}" if verb == "pads" else f"{drawn} of {self.num_data} data"
            amount = f"{self.num_data - drawn} of {self.num_data} data" if verb == "drops" else amount
            said.append(f"{what} {verb} {amount} in each pass")
        if dropped:
            said.append(f"the loader drops the last {dropped} of {drawn} data in each pass (drop_last=True)")
        if self.evaluated and not isinstance(sampler, SequentialSampler | DistributedSampler):
            said.append("the loader shuffles, so that results are in the order in which it gave the data")
        if said:
            warnings.warn(f"{self.name}: {'; '.join(said)}.", stacklevel=4)


class _Noise:
    """Random numbers for reading data, of all the generators that a dataset may use."""

    def __init__(self, *seeds: int) -> None:
        seed = _derived(*seeds)
        generator = torch.Generator().manual_seed(seed)
        python = random.Random(seed)
        numpy = np.random.RandomState(seed % 2**32)
        self.states: Any = generator.get_state(), python.getstate(), numpy.get_state()

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """A block that draws them; the process's own are put back."""
        outside = noise()
        set_noise(self.states)
        try:
            yield
        finally:
            self.states = noise()
            set_noise(outside)


@contextmanager
def _restored(generator: torch.Generator | None) -> Iterator[None]:
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)


def _derived(*seeds: int) -> int:
    return int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _length(thing: Any) -> int | None:
    try:
        return len(thing)
    except TypeError:
        return None


def _sequence(batch: Any) -> Any:
    """A batch as a tensor or a tuple, from the lists that loaders make of tuples."""
    return tuple(batch) if isinstance(batch, list) else batch
