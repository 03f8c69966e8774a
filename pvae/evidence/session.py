"""A checked pair and its data on their device, with the process's state set aside: what every estimator runs in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pyro
import torch
from torch import Tensor

from pvae.checks import Data, as_tensors
from pvae.errors import NumericalError
from pvae.evidence.traces import Batch, Pair
from pvae.isolation import Program, isolated, modules_of, outside_modules, place

__all__ = ["Session", "opened"]

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """What an estimator works with.

    Attributes:
        pair: The checked pair.
        data: The tensors, where the caller keeps them.
        device: Where programs run.
    """

    pair: Pair
    data: Batch
    device: torch.device

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
) -> Iterator[Session]:
    """Checks a pair and its data, and runs a block in which they can be evaluated.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        seed: Of the block's random numbers.
        device: As for `pvae.log_evidence`.
        others: What else may hold modules to place.
    """
    modules = modules_of(model, guide, *others)  # type: ignore[arg-type]
    chosen, tensors = place(modules, as_tensors("data", data), device)
    known = outside_modules(pyro.get_param_store())
    with isolated(modules, seed=seed, device=chosen, params=known) as store:
        pair = Pair.of(model, guide, tensors, chosen)
        untrained = outside_modules(store)["params"].keys() - known["params"].keys()
        _warn_of_initial_values(untrained)
        session = Session(pair, tensors, chosen)
        if pair.has_other_supports:
            session.each_batch(pair.check_data, max(1, 2**20 // session.entries))
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
