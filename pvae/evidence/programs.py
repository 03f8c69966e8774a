"""Functions of tensors that an evaluation runs again and again, kept as captured programs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from pvae.capture import Captured

__all__ = ["Programs"]


@dataclass(eq=False)
class Programs:
    """What an evaluation of a pair runs many times, by name: as it is, or captured.

    Attributes:
        pair: The programs that all of it depends on.
        capture: Whether to capture it.
    """

    pair: tuple[Any, ...]
    capture: bool = False
    _captured: dict[Hashable, Captured] = field(default_factory=dict, repr=False)

    def get(self, key: Hashable, function: Callable[..., Any], *depends_on: Any) -> Callable[..., Any]:
        """A function of tensors, to be run in a loop; its graph in its place where programs are captured.

        Args:
            key: Names the function together with all that it closes over, beside the pair; one key, one function.
            function: Takes tensors and returns tensors. It draws noise by torch, and may take gradients inside. It is
                called once as it is before it is captured, since a pair may learn more of itself as it first runs.
            depends_on: What else it uses that may change.
        """
        if not self.capture:
            return function
        if key not in self._captured:
            self._captured[key] = Captured(
                function,
                "pvae.log_evidence",
                (*self.pair, *depends_on),
                tolerances=(1e-3, 1e-3),
                capture_after=1,
                # A chunk is a large piece of work: a shape that comes ten times is worth compiling.
                compile_after=10,
                compile_first=not self._captured,
            )
            return function
        return self._captured[key]
