"""Building what somebody else describes within bounds: a few bytes can describe what would fill any memory.

It is built on torch's meta device first, where tensors have shapes and no memory, and operations are counted. Only what
then fits the tensors at hand is built in earnest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pvae.errors import CheckpointError

__all__ = ["Bounded", "BoundsError", "needs_numbers", "record_trials", "replay_trials", "try_run"]

_T = TypeVar("_T")


class BoundsError(CheckpointError):
    """What is described would take more memory or time than what is at hand allows."""


class Bounded(TorchDispatchMode):
    """A block that may only take so many operations and so much memory for their results, all together.

    Args:
        size: Bytes of the tensors at hand.
        count: How many they are.
        trusted: Whether classes of the caller's are built, which may do more than layers do.

    Attributes:
        memory: Bytes that may still be taken.
    """

    def __init__(self, size: int, count: int, *, trusted: bool) -> None:
        super().__init__()
        self.operations = (2_000_000 if trusted else 100_000) + 200 * count
        self.memory = ((4 << 30) if trusted else (32 << 20)) + 4 * size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, if it is not one too many."""
        kwargs = kwargs or {}
        self.operations -= 1
        if self.operations < 0:
            raise BoundsError("what it describes takes more operations to build than its weights allow.")
        self.take(_new_bytes(func, args, kwargs))
        return func(*args, **kwargs)

    def take(self, size: int) -> None:
        """Takes memory from what may be taken."""
        self.memory -= size
        if self.memory < 0:
            raise BoundsError("what it describes takes more memory to build than its weights allow.")


def _new_bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes of new memory that an operation will take, computed on the meta device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device.type for tensor in tensors} or {torch.device(kwargs.get("device") or "cpu").type}
    if devices == {"meta"} or all(returned.alias_info for returned in func._schema.returns):
        return 0
    try:
        results = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
    except Exception:  # not every operation can; those that fail anyway do so in earnest, too
        return 0
    return sum(leaf.nbytes for leaf in tree_leaves(results) if isinstance(leaf, Tensor))


def _to_meta(value: Any) -> Any:
    """The same on the meta device: a tensor's shape without its memory."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def needs_numbers(error: BaseException | None) -> bool:
    """Whether an error on the meta device says that numbers were needed there, which it has none of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error may be the cause of its own
        if isinstance(error, NotImplementedError) or "meta" in str(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


_trials: ContextVar[tuple[list[Any], bool] | None] = ContextVar("trials", default=None)


def try_run(run: Callable[[], _T]) -> _T:
    """Result of a trial run; in a block with `replay_trials`, the one that the same run had before."""
    results, again = _trials.get() or ([], False)
    if again and results:
        return results.pop(0)
    result = run()
    results.append(result)
    return result


@contextmanager
def record_trials(results: list[Any]) -> Iterator[None]:
    """A block in which the results of trial runs are added to a list."""
    token = _trials.set((results, False))
    try:
        yield
    finally:
        _trials.reset(token)


@contextmanager
def replay_trials(results: Sequence[Any]) -> Iterator[None]:
    """A block in which the same trial runs have these results, and nothing runs: how large it would be is not known."""
    token = _trials.set((list(results), True))
    try:
        yield
    finally:
        _trials.reset(token)
