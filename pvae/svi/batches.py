"""Data cut into batches, in order or shuffled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batches", "Rows", "Transform"]

Rows = tuple[Tensor, ...]
Transform = Callable[..., Any]


@dataclass(frozen=True)
class Batches:
    """Tensors with the same N, taken ``batch_size`` rows at a time and moved to a device.

    Attributes:
        tensors: Shape ``(N, ...)`` each.
        batch_size: Rows in a batch; the last one of a pass may have fewer.
        device: Where batches go.
        transform: What is made of each batch there before a program sees it; nothing if left out.
    """

    tensors: Rows
    batch_size: int
    device: torch.device
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.tensors[0])

    @property
    def steps(self) -> int:
        """Batches in one pass."""
        return -(-len(self) // self.batch_size)

    def on_device(self) -> Batches:
        """The same with all data on the device."""
        return Batches(tuple(t.to(self.device) for t in self.tensors), self.batch_size, self.device, self.transform)

    def order(self, *seeds: int) -> Tensor:
        """A random order of all rows, the same for the same seeds on every device."""
        return torch.from_numpy(np.random.default_rng(seeds).permutation(len(self)))

    def take(self, rows: Tensor) -> Rows:
        """Some rows, on the device, as they are."""
        return tuple(t.index_select(0, rows.to(t.device)).to(self.device) for t in self.tensors)

    def in_order(self) -> Iterator[Rows]:
        """All batches of one pass, as they are."""
        for rows in zip(*(t.split(self.batch_size) for t in self.tensors), strict=True):
            yield tuple(t.to(self.device) for t in rows)

    def first(self) -> Rows:
        """One batch, transformed."""
        return self.transformed(*next(self.in_order()))

    def transformed(self, *rows: Tensor) -> Rows:
        """A batch as programs see it."""
        if self.transform is None:
            return rows
        changed = self.transform(*rows)
        return changed if isinstance(changed, tuple) else (changed,)
