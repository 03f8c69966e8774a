"""Functions of tensors that an evaluation runs again and again, kept as captured programs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pvae.capture import Captured, is_compiled, keep, take_up

__all__ = ["Programs"]


@dataclass(eq=False)
class Programs:
    """What an evaluation of a pair runs many times, by name: as it is, or captured.

    Attributes:
        pair: The programs that all of it depends on.
        capture: Whether to capture it.
        precision: Of its products; programs of one precision never serve another.
    """

    pair: tuple[Any, ...]
    capture: bool = False
    precision: str = "float32"
    _captured: dict[Hashable, tuple[Hashable, Captured]] = field(default_factory=dict, repr=False)
    _facts: Callable[[], tuple[Any, ...]] | None = field(default=None, repr=False)

    def get(self, key: Hashable, function: Callable[..., Any], *depends_on: Any) -> Callable[..., Any]:
        """A function of tensors, to be run in a loop; its graph in its place where programs are captured.

        Args:
            key: Names the function together with all that it closes over, beside the pair; one key, one function. It is
                made of plain values, and names the function in later calls, too.
            function: Takes tensors and returns tensors. It draws noise by torch, and may take gradients inside. It is
                called once as it is before it is captured, since a pair may learn more of itself as it first runs.
            depends_on: What else it uses that may change.
        """
        if not self.capture:
            return function
        key = self._in_precision(key)
        name = (key, *map(id, depends_on))  # all of which its guard keeps alive
        if name not in self._captured:
            captured = Captured(
                function,
                "pvae.log_evidence",
                (*self.pair, *depends_on, *(self._facts() if self._facts else ())),
                # Of fewer digits a compiled product may round the last one otherwise.
                tolerances=(1e-3, 1e-3) if self.precision == "float32" else (0.01, 0.05),
                capture_after=1,
                # A chunk is a large piece of work: a shape that comes ten times is worth compiling.
                compile_after=10,
                compile_first=not self._captured,
            )
            if self._facts is not None:
                take_up(captured, key, self.pair)
            self._captured[name] = key, captured
            return function
        return self._captured[name][1]

    @contextmanager
    def kept(self, facts: Callable[[], tuple[Any, ...]]) -> Iterator[None]:
        """A block that begins with what was captured in calls before it, and leaves what was to those after it.

        Args:
            facts: Gives what is known of the pair that functions depend on, beside their keys.
        """
        self._facts = facts
        try:
            yield
        finally:
            self._facts = None
            while self._captured:
                _, (key, captured) = self._captured.popitem()
                keep(captured, key, self.pair)

    def is_compiled(self, name: tuple[Hashable, ...], rows: int) -> bool:
        """Whether calls before have left a compiled program whose key begins so, for inputs of so many rows."""
        return is_compiled(self._in_precision(name), self.pair, rows)

    def _in_precision(self, key: Hashable) -> tuple[Hashable, ...]:
        return self.precision, *(key if isinstance(key, tuple) else (key,))
