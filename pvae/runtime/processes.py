"""The processes that work on one thing together, if there are several: `torch.distributed`, asked in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pvae.errors import ArgumentError, RankError, first_line, yes_no_or_auto
from pvae.runtime.signals import NeverStop, Stop

__all__ = ["ALONE", "Processes", "resolve_processes"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the default process group. With one process everything here is the identity.

    Attributes:
        rank: Number of this process, from 0.
        world_size: How many there are.
    """

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def rank_seed(self, seed: int) -> int:
        """A seed for this process: the seed itself on the first, and an unrelated one on each other."""
        if self.is_main:
            return seed
        return int(np.random.SeedSequence((seed, self.rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def shard(self, rows: Tensor) -> Tensor:
        """This process's rows: all are dealt out once, nearly evenly and in order; there may be none."""
        return rows.tensor_split(self.world_size)[self.rank]

    def all_reduce(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over all processes, by one exchange; the same bits on all of them."""
        if self.world_size == 1:
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with self._in_contact():
            dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    def broadcast_tensors(self, tensors: Sequence[Tensor], name: str = "tensor") -> None:
        """Gives every process's tensors the first one's values, bit for bit and in place.

        Args:
            tensors: As many as on the other processes, in the same order.
            name: What to call them in an error.

        Raises:
            RankError: They are not of the same shapes on all processes.
        """
        if self.world_size == 1:
            return
        # Else what arrives would be cut off, or end the process.
        self.agree(**{f"{name} {n}": f"{t.dtype}{list(t.shape)}" for n, t in enumerate(tensors, 1)})
        with torch.no_grad(), self._in_contact():
            for tensor in tensors:
                if not tensor.numel():
                    continue
                sent = tensor.detach().reshape(-1).view(torch.uint8)  # of any dtype
                dist.broadcast(sent, 0)
                if sent.data_ptr() != tensor.data_ptr():
                    tensor.copy_(sent.view(tensor.dtype).view(tensor.shape))

    def all_gather(self, thing: T) -> list[T]:
        """Every process's thing, in the order of their numbers, on all of them."""
        return self._all_gather("all_gather", thing)

    def broadcast(self, thing: T) -> T:
        """The first process's thing."""
        if self.world_size == 1:
            return thing
        self._all_gather("broadcast", None)
        things: list[Any] = [thing]
        with self._in_contact():
            dist.broadcast_object_list(things, 0)
        return things[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return any(self._all_gather("any", flag))

    def agree(self, **values: Any) -> None:
        """Raises `RankError` on all processes where they were not called alike.

        Args:
            values: What has to be the same, by name.
        """
        everyone = self._all_gather("agree", values)
        names = {name: None for theirs in everyone for name in theirs}
        wrong = [
            f"{name} is {', '.join(f'{theirs.get(name)!r} on rank {rank}' for rank, theirs in enumerate(everyone))}"
            for name in names
            if any(theirs.get(name) != everyone[0].get(name) for theirs in everyone)
        ]
        if wrong:
            raise RankError(f"all ranks must be called alike: {'; '.join(wrong[:10])}.")

    def own_stop(self, stop: Stop) -> Stop:
        """What may end a process's own work midway: of several one that ended early would leave the others waiting."""
        return stop if self.world_size == 1 else NeverStop()

    def only_on_main(self, function: Callable[P, Any] | None) -> Callable[P, Any] | None:
        """A function that the main process calls for all; where it raises there, it does so on all."""
        if self.world_size == 1 or not callable(function):
            return function

        def call_on_main(*args: P.args, **kwargs: P.kwargs) -> None:
            with self.together():
                if self.is_main:
                    function(*args, **kwargs)

        return call_on_main

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that one process does for all, or each for itself: where it raises on one, it does so on all."""
        error = None
        try:
            yield
        except RankError:
            raise  # all know already, or are out of reach
        except Exception as caught:
            error = caught
        said = None if error is None else f"{type(error).__name__}: {error}"
        try:
            everyone = self._all_gather("together", said)
        finally:
            if error is not None:
                raise error  # whatever became of the others
        for rank, text in enumerate(everyone):
            if text is not None:
                raise RankError(f"rank {rank} stopped, and with it all others: {text}")

    def _all_gather(self, call: str, thing: T) -> list[T]:
        """As `all_gather`. A call that meets another one on another process would wait for what never comes."""
        if self.world_size == 1:
            return [thing]
        things: list[Any] = [None] * self.world_size
        with self._in_contact():
            dist.all_gather_object(things, (call, thing))
        if len({theirs for theirs, _ in things}) > 1:
            raise RankError(
                "the ranks are not at the same place: each has to make the same calls of pvae, in the same order. A "
                "call on one of them alone needs distributed=False."
            )
        return [thing for _, thing in things]

    @contextmanager
    def _in_contact(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of another process's making, it may be anything
            raise RankError(
                f"rank {self.rank} of {self.world_size} lost contact with another one, which has died, hangs or does "
                f"something else: {first_line(error)}. Look for the first error among the ranks. A call on one of "
                "them alone needs distributed=False."
            ) from error


ALONE = Processes(0, 1)


def resolve_processes(distributed: bool | str) -> Processes:
    """The processes to work with: those of `torch.distributed`'s default group where there is one.

    Args:
        distributed: ``"auto"``; ``False`` for this process alone; ``True`` where a missing group is an error.

    Raises:
        ArgumentError: Not one of these, or ``True`` without a group.
    """
    distributed = yes_no_or_auto("distributed", distributed)
    if distributed and dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    if distributed is True:
        raise ArgumentError(
            "distributed=True needs a process group: start the program by torchrun, and call "
            "torch.distributed.init_process_group() first."
        )
    return ALONE
