"""A checked pair and its data on their device, with the process's state set aside: what every estimator runs in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import pyro
import torch
from torch import Tensor, nn

from pvae.data import Data, Stream, as_tensors, fingerprint, is_stream, named_shape
from pvae.errors import NumericalError, ProgramError, first_line, warn
from pvae.evidence.traces import Batch, Densities
from pvae.runtime import (
    ALONE,
    Processes,
    Program,
    check_supports,
    check_surroundings,
    dtype_of,
    isolate,
    modules_of,
    outside_modules,
    place_pair,
)
from pvae.runtime import (
    Pair as PlacedPair,
)

__all__ = ["Session", "fingerprints", "opened"]

# How much of a dataset to read at once: data, and numbers in all of them.
_MOST_DATA = 4096
_MOST_ENTRIES = 2**24

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """What an estimator works with.

    Attributes:
        pair: The checked pair.
        data: The tensors, where the caller keeps them; of a stream, some.
        device: Where programs run.
        processes: The processes that share the data.
        modules: Those that were placed, whose dtype data get.
        stream: Where the data are read, if that is so.
        batches: Of the stream, this process's, each with its number.
        where: Of which batch of a stream the data are, in words.
    """

    pair: Densities
    data: Batch
    device: torch.device
    processes: Processes = ALONE
    modules: Sequence[nn.Module] = ()
    stream: Stream | None = None
    batches: Iterator[tuple[int, Batch]] | None = None
    where: str = ""

    @property
    def num_data(self) -> int:
        """``N``."""
        return len(self.data[0])

    @property
    def precision(self) -> float:
        """Machine epsilon of the numbers that densities are computed in."""
        dtype = dtype_of(modules_of(self.pair.model, self.pair.guide))
        floating = (t.dtype for t in self.data if t.is_floating_point())
        return torch.finfo(dtype or next(floating, torch.get_default_dtype())).eps

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
        return 2**20 if known is None else -(-known // self.processes.world_size)

    def blocks(self) -> Iterator[tuple[int, Session]]:
        """The same pair with one part after another of the data of this process, each with its place among all."""
        if self.stream is None or self.batches is None:
            data = tuple(self.processes.shard(t) for t in self.data)
            if len(data[0]):
                yield self.processes.rank, replace(self, data=data)
            return
        for number, rows in self.batches:
            with self.stream.name_errors(number):
                data = PlacedPair(self.pair.model, self.pair.guide, self.modules, self.device).cast(rows)
                block = replace(self, data=data, where=f" of batch {number} of {self.stream.name}")
                block.check()
            yield number, block

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
                place = f"datum {int(part[0])}{self.where}"
                raise NumericalError(f"in the batch that begins with {place}: {error}") from None
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
    processes: Processes = ALONE,
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
        processes: The processes that share the data.
        streams: Whether the block takes data that come in `Session.blocks`.
    """
    check_surroundings()
    stream = batches = None
    if streams and is_stream(data):
        stream = _stream(data, seed, processes)
        tensors, batches = _begun(stream)
    else:
        tensors = as_tensors("data", data)
    placed = place_pair(model, guide, *others, device=device, data=tensors if stream is None else ())
    chosen, modules, tensors = placed.device, placed.modules, placed.cast(tensors)
    known = outside_modules(pyro.get_param_store())
    whole = tensors if stream is None else None
    with (
        named_shape("data", whole),
        _half_precision_told(),
        isolate(modules, seed=processes.rank_seed(seed), device=chosen, params=known) as store,
    ):
        pair = Densities.of(model, guide, tensors, chosen)
        untrained = outside_modules(store)["params"].keys() - known["params"].keys()
        _warn_of_initial_values(untrained)
        session = Session(pair, tensors, chosen, processes, modules, stream, batches)
        if stream is None:
            session.check()
        yield session
        # Another guide, which a proposal brought along, runs only inside of the block.
        _warn_of_initial_values(outside_modules(store)["params"].keys() - known["params"].keys() - untrained)


@contextmanager
def _half_precision_told() -> Iterator[None]:
    """Says what to do where torch lacks an operation for numbers of 16 bits."""
    try:
        yield
    except NotImplementedError as error:
        if not any(f"not implemented for '{kind}'" in str(error) for kind in ("Half", "BFloat16")):
            raise
        raise ProgramError(
            f"the pair computes in numbers of 16 bits, and torch says: {first_line(error)}. Convert the "
            "modules and the data with .float()."
        ) from error


def fingerprints(data: Data, *programs: object) -> dict[str, str]:
    """What processes that share the data have to have alike: the data, and the weights they are evaluated under."""
    modules = modules_of(*programs)  # type: ignore[arg-type]
    tensors = [t for module in modules for t in module.state_dict().values() if isinstance(t, Tensor)]
    found = {"weights": fingerprint([*tensors, *outside_modules(pyro.get_param_store())["params"].values()])}
    if not is_stream(data):
        tensors = as_tensors("data", data)
        found["data"] = f"{len(tensors[0])} data, {fingerprint(tensors)}"
    return found


def _stream(data: Data, seed: int, processes: Processes) -> Stream:
    """A dataset in blocks of a size that fits its data, or a loader's batches."""
    stream = Stream("data", data, 1, seed, processes, evaluated=True)
    if stream.loader is None:
        _, datum = next(stream.alone().batches(0))
        size = max(1, min(_MOST_DATA, _MOST_ENTRIES // max(t.numel() for t in datum)))
        stream = Stream("data", data, size, seed, processes, evaluated=True)
    if stream.drawn_by:
        warn(f"data: results are in the order in which the loader's {stream.drawn_by} draws the data.")
    return stream


def _begun(stream: Stream) -> tuple[Batch, Iterator[tuple[int, Batch]]]:
    """The first batch, the same on all processes, and all of this process's."""
    batches = stream.batches(0)
    if stream.processes.world_size > 1:
        return next(stream.alone().batches(0))[1], batches
    first = next(batches)
    return first[1], chain([first], batches)


def _warn_of_initial_values(names: Collection[str]) -> None:
    if names:
        warn(
            f"parameters {sorted(names)} have their initial values: the param store holds none of these names. "
            "After pvae.fit, evaluate inside `with result.trained():`.",
        )
