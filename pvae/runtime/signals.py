"""What to do when the process is asked to stop: finish what is at hand the first time, stop at once the second."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "NeverStop", "Stop", "graceful_stop"]

logger = logging.getLogger("pvae")


class Interrupted(BaseException):
    """Work that the process was asked to stop, and that can be thrown away."""


class Stop:
    """Whether the process was asked to stop, and by which signal.

    Attributes:
        signal: Its number; ``None`` while there was none.
    """

    signal: int | None = None
    raises = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """A block that a signal ends at once, by `Interrupted`: for work that takes long and moves nothing."""
        self.raises = True
        try:
            if self():
                raise Interrupted
            yield
        finally:
            self.raises = False

    def __call__(self) -> bool:
        """Whether it was asked."""
        return self.signal is not None


class NeverStop(Stop):
    """What nobody asks to stop, whatever comes."""

    def __call__(self) -> bool:
        """No."""
        return False


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """A block in which the first SIGINT or SIGTERM only sets a flag, and the next does what it always did.

    Handlers can only be set in the main thread; in others, and for signals that the process ignores, nothing changes.
    """
    stop = Stop()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    process = os.getpid()

    def first(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child that was forked, such as a loader's worker
            restore()
            if number != signal.SIGINT:  # of the keyboard's, the parent tells it what to do
                signal.raise_signal(number)
            return
        stop.signal = number
        restore()
        if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
            # Some schedulers signal all processes, and torchrun its own once more; it kills those that do not end.
            signal.signal(number, signal.SIG_IGN)
        outer: Any = before.get(number)
        if getattr(outer, "heeds", False):  # of a fit whose callback this one is called in
            outer(number, frame)
        else:
            logger.warning("%s: finishing this step; once more to stop at once", signal.Signals(number).name)
        if stop.raises:
            raise Interrupted

    first.heeds = True  # type: ignore[attr-defined]
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # None: not set by Python, so that it could not be restored
                before[number] = handler
                signal.signal(number, first)
    try:
        yield stop
    finally:
        if not stop() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
            restore()
