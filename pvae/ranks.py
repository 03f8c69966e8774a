"""The processes that work on one thing together, if there are several: `torch.distributed`, asked in one place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pvae.errors import ArgumentError, RankError, yes_no_or_auto

__all__ = ["ALONE", "Ranks", "resolve"]

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the default process group. With one process everything here is the identity.

    Attributes:
        number: Of this process, from 0.
        count: How many there are.
    """

    number: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.number == 0

    def seed(self, seed: int) -> int:
        """A seed for this process: the seed itself on the first, and an unrelated one on each other."""
        if self.first:
            return seed
        return int(np.random.SeedSequence((seed, self.number)).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def part(self, rows: Tensor) -> Tensor:
        """This process's rows: all are dealt out once, nearly evenly and in order; there may be none."""
        return rows.tensor_split(self.count)[self.number]

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over all processes, by one exchange; the same bits on all of them."""
        if self.count == 1:
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with self._in_contact():
            dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Gives every process's tensors the first one's values, in place."""
        if self.count == 1:
            return
        with torch.no_grad(), self._in_contact():
            for tensor in tensors:
                values = tensor.detach().contiguous()
                dist.broadcast(values, 0)
                if values.data_ptr() != tensor.data_ptr():
                    tensor.copy_(values)

    def gathered(self, thing: T) -> list[T]:
        """Every process's thing, in the order of their numbers, on all of them."""
        if self.count == 1:
            return [thing]
        things: list[Any] = [None] * self.count
        with self._in_contact():
            dist.all_gather_object(things, thing)
        return things

    def from_first(self, thing: T) -> T:
        """The first process's thing."""
        if self.count == 1:
            return thing
        things: list[Any] = [thing]
        with self._in_contact():
            dist.broadcast_object_list(things, 0)
        return things[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return any(self.gathered(flag))

    def agree(self, **values: Any) -> None:
        """Raises `RankError` on all processes where they were not called alike.

        Args:
            values: What has to be the same, by name.
        """
        for number, others in enumerate(self.gathered(values)):
            wrong = [f"{name} is {others[name]!r} on rank {number}, {values[name]!r} on rank {self.number}"
                     for name in values if others[name] != values[name]]  # fmt: skip
            if wrong:
                raise RankError(f"all ranks must be called alike: {'; '.join(wrong)}.")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that one process does for all: where it raises there, all raise."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [text for text in self.gathered(None if error is None else str(error)) if text is not None]
        if error is not None:
            raise error
        if failed:
            raise RankError(f"another rank stopped: {failed[0]}")

    @contextmanager
    def _in_contact(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            first_line = str(error).strip().splitlines()[0]
            raise RankError(
                f"rank {self.number} of {self.count} lost contact with another one, which has died or hangs: "
                f"{first_line}. Look for the first error among the ranks."
            ) from error


ALONE = Ranks(0, 1)


def resolve(distributed: bool | str) -> Ranks:
    """The processes to work with: those of `torch.distributed`'s default group where there is one.

    Args:
        distributed: ``"auto"``; ``False`` for this process alone; ``True`` where a missing group is an error.

    Raises:
        ArgumentError: Not one of these, or ``True`` without a group.
    """
    distributed = yes_no_or_auto("distributed", distributed)
    if distributed and dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if distributed is True:
        raise ArgumentError(
            "distributed=True needs a process group: start the program by torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    return ALONE
