"""Calls that take turns: random numbers, Pyro's param store and its handlers belong to the process, not to a thread.

A call that sets them aside has them to itself until it returns, and calls in other threads wait in line, first come
first served. Calls within a call, as in a callback, go on at once. A place in line is given up by setting one flag, so
that no error, signal or generator that is closed late, by whichever thread, leaves the others waiting.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

__all__ = ["in_turn", "turn"]

logger = logging.getLogger("pvae")

P = ParamSpec("P")
T = TypeVar("T")


class _Place:
    """A place in line. It has the turn once there is none before it, until it is over."""

    def __init__(self) -> None:
        self.over = False
        self.before: _Place | None = None
        self.bell = threading.Lock()  # rung, by its release, when it is over
        self.bell.acquire()

    def take(self) -> None:
        """Waits in line. Nothing is held meanwhile, so an error that a signal raises here needs no care."""
        global _last
        with _guard:
            self.before, _last = _last, self
        if self.before is not None and not self.before.over:
            logger.debug("waiting for a call of pvae in another thread to end")
        while self.before is not None:
            if self.before.over:
                self.before = self.before.before  # of one that gave up waiting; there is none of one that had its turn
            else:
                self.before.bell.acquire(timeout=1.0)  # not every system lets a signal end a wait
        _here.place = self


class _Here(threading.local):
    """The place of this thread's call."""

    place = _Place()
    place.over = True


_here = _Here()
_last: _Place | None = None
_guard = threading.RLock()


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function one that no two threads are in at once, nor in any two of such."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _here.place.over:
            return function(*args, **kwargs)
        # Not by `turn`: an interrupt between its end and the block's beginning would leave it held.
        place = _Place()
        try:
            place.take()
            return function(*args, **kwargs)
        finally:
            place.over = True
            place.bell.release()

    return call


@contextmanager
def turn() -> Iterator[None]:
    """A block that is in turn with the calls of functions that are."""
    if not _here.place.over:
        yield
        return
    place = _Place()
    try:
        place.take()
        yield
    finally:
        place.over = True
        place.bell.release()


def _begin_anew() -> None:
    """In a child that was forked, there is one thread, and no call but its own."""
    global _last, _guard
    _guard = threading.RLock()
    _last = None if _here.place.over else _here.place


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
