"""Functions that change tensors in place, compiled: nothing of Pyro is in them, so they need no guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pvae.capture.graph import Graph
from pvae.errors import first_line, warn

__all__ = ["InPlace"]


class InPlace:
    """A function of tensors and plain settings that changes some of the tensors; compiled if they are on a GPU.

    Args:
        function: Called with the tensors and the settings. No two of the tensors share memory.
        name: What to call it in a warning, where it cannot be compiled and runs as it is.
    """

    def __init__(self, function: Callable[..., None], name: str) -> None:
        self.function, self.name = function, name
        self._made: dict[Any, Callable[..., Any] | None] = {}

    def __call__(self, tensors: Sequence[Tensor], **settings: Any) -> None:
        """Runs it."""
        kinds = *((t.shape, t.stride(), t.dtype, t.device) for t in tensors), *settings.items()
        if kinds not in self._made:
            self._made[kinds] = self._compile(tensors, settings) if tensors[0].is_cuda else None
        run = self._made[kinds]
        with torch.no_grad():
            if run is None:
                self.function(*tensors, **settings)
            else:
                run(*tensors)

    def _compile(self, tensors: Sequence[Tensor], settings: dict[str, Any]) -> Callable[..., Any] | None:
        def changed(*inputs: Tensor) -> tuple[()]:
            self.function(*inputs, **settings)
            return ()

        copies = [t.detach().clone() for t in tensors]  # capturing and compiling run it
        try:
            graph = Graph.capture(changed, copies)
            with _one_kernel_for_many():
                return graph.compile(copies).run
        except Exception as error:
            warn(f"{self.name} runs uncompiled: {first_line(error)}")
            return None


def _one_kernel_for_many() -> AbstractContextManager[Any]:
    """A block in which loops that have nothing to do with each other are compiled to one kernel."""
    from torch._inductor import config

    return config.patch(combo_kernels=True)
