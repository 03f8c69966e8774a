"""A checked pair and its data on their device, with the process's state set aside: what every estimator runs in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import pyro
import torch
from torch import Tensor

from pvae.checks import Data, as_tensors, check_supports
from pvae.errors import NumericalError
from pvae.evidence.traces import Batch, Pair
from pvae.isolation import Program, isolated, modules_of, outside_modules, place
from pvae.ranks import ALONE, Ranks
from pvae.streams import Stream, is_stream

__all__ = ["Session", "opened"]

_BLOCK = 4096  # data of a dataset to read at once

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """What an estimator works with.

    Attributes:
        pair: The checked pair.
        data: The tensors, where the caller keeps them; of a stream, some.
        device: Where programs run.
        ranks: The processes that share the data.
        stream: Where the data are read, if that is so.
    """

    pair: Pair
    data: Batch
    device: torch.device
    ranks: Ranks = ALONE
    stream: Stream | None = None

    @property
    def num_data(self) -> int:
        """``N``."""
        return len(self.data[0])

    @property
    def entries(self) -> int:
        """Numbers in the largest tensor of one datum."""
        return max(t[0].numel() for t in self.data)

    @property
    def pairs(self) -> int:
        """How many pairs of a draw and a datum to evaluate at once: activations fit the caches of a CPU, or use a small
        part of a GPU's memory.
        """
        most, entries = (2**18, 2**27) if self.device.type == "cuda" else (2**13, 2**22)
        return max(1, min(most, entries // self.entries))

    @property
    def expected(self) -> int:
        """About how many data this process will evaluate; many if a stream does not know."""
        known = self.num_data if self.stream is None else self.stream.num_data
        return 2**20 if known is None else -(-known // self.ranks.count)

    def blocks(self) -> Iterator[tuple[int, Session]]:
        """The same pair with one part after another of the data of this process, each with its place among all."""
        if self.stream is None:
            data = tuple(self.ranks.part(t) for t in self.data)
            if len(data[0]):
                yield self.ranks.number, replace(self, data=data)
            return
        modules = modules_of(self.pair.model, self.pair.guide)
        for number, rows in enumerate(self.stream.batches(0)):
            block = replace(self, data=place(modules, rows, self.device)[1])
            block.check()
            yield number * self.ranks.count + self.ranks.number, block

    def check(self) -> None:
        """Raises `DataError` where data are outside of the support of the site that observes them."""
        if self.stream is not None:
            check_supports(self.pair.observed, self.data)
        if self.pair.has_other_supports:
            self.each_batch(self.pair.check_data, max(1, 2**20 // self.entries))

    def each_batch(self, function: Callable[[Batch], T], size: int, rows: Tensor | None = None) -> list[T]:
        """Calls a function with batches of at most ``size`` data, all or those of some rows, on the device.

        Raises:
            NumericalError: As raised by the function; says where the batch begins.
        """
        rows = torch.arange(self.num_data) if rows is None else rows
        results = []
        for part in rows.split(size):
            try:
                results.append(function(tuple(t[part.to(t.device)].to(self.device) for t in self.data)))
            except NumericalError as error:
                raise NumericalError(f"in the batch that begins with datum {int(part[0])}: {error}") from None
        return results


@contextmanager
def opened(
    model: Program,
    guide: Program,
    data: Data,
    *,
    seed: int,
    device: str | torch.device,
    others: tuple[object, ...] = (),
    ranks: Ranks = ALONE,
    streams: bool = False,
) -> Iterator[Session]:
    """Checks a pair and its data, and runs a block in which they can be evaluated.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        seed: Of the block's random numbers.
        device: As for `pvae.log_evidence`.
        others: What else may hold modules to place.
        ranks: The processes that share the data.
        streams: Whether the block takes data that come in `Session.blocks`.
    """
    modules = modules_of(model, guide, *others)  # type: ignore[arg-type]
    stream = None
    if streams and is_stream(data):
        stream = Stream("data", data, _BLOCK, seed, ranks, evaluated=True)
        tensors = next(stream.alone().batches(0))
    else:
        tensors = as_tensors("data", data)
    chosen, tensors = place(modules, tensors, device)
    known = outside_modules(pyro.get_param_store())
    with isolated(modules, seed=ranks.seed(seed), device=chosen, params=known) as store:
        pair = Pair.of(model, guide, tensors, chosen)
        untrained = outside_modules(store)["params"].keys() - known["params"].keys()
        _warn_of_initial_values(untrained)
        session = Session(pair, tensors, chosen, ranks, stream)
        if stream is None:
            session.check()
        yield session
        # Another guide, which a proposal brought along, runs only inside of the block.
        _warn_of_initial_values(outside_modules(store)["params"].keys() - known["params"].keys() - untrained)


def _warn_of_initial_values(names: Collection[str]) -> None:
    if names:
        warnings.warn(
            f"parameters {sorted(names)} have their initial values: the param store holds none of these names. "
            "After pvae.fit, evaluate inside `with result.trained():`.",
            stacklevel=5,
        )
