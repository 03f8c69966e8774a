"""Weights of the KL divergence by epoch, for ``pvae.fit(kl_weight=...)``: plain functions of an epoch, from 1 on."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from pvae.errors import ArgumentError, positive_int

__all__ = ["cyclical", "linear_warmup"]


def linear_warmup(epochs: int, start: float = 0.0, end: float = 1.0) -> Callable[[int], float]:
    """A weight that rises linearly, ``start + (end - start) * min(1, epoch / epochs)``, and then stays.

    Args:
        epochs: The first one that has the whole weight.
        start: What it rises from.
        end: What it rises to: 1 for the ELBO, another number for a beta-VAE.

    Raises:
        ArgumentError: Something is not such a number.

    Source: Bowman et al., 2016, Generating Sentences from a Continuous Space; Sønderby et al., 2016, Ladder
    Variational Autoencoders.
    """
    epochs, start, end = positive_int("epochs", epochs), _weight("start", start), _weight("end", end)

    def weight(epoch: int) -> float:
        return _between(start, end, epoch / epochs)

    return weight


def cyclical(
    epochs: int, cycles: int = 4, *, rise: float = 0.5, start: float = 0.0, end: float = 1.0
) -> Callable[[int], float]:
    """A weight that rises several times: linearly in the first part of each cycle, and is whole in the rest of it.

    Each fall lets the guide and the decoder find a use for latents that the KL divergence had switched off. The last
    epoch of each cycle has the whole weight, as have all after the last cycle.

    Args:
        epochs: How many epochs the cycles take together.
        cycles: How many there are.
        rise: The part of a cycle in which the weight rises, above 0 and at most 1.
        start: What it rises from.
        end: What it rises to.

    Raises:
        ArgumentError: Something is not such a number, or there are more cycles than epochs.

    Source: Fu et al., 2019, Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing.
    """
    epochs, cycles = positive_int("epochs", epochs), positive_int("cycles", cycles)
    start, end = _weight("start", start), _weight("end", end)
    if cycles > epochs:
        raise ArgumentError(f"cycles must be at most epochs, so that each has an epoch; got {cycles} in {epochs}.")
    if isinstance(rise, bool) or not isinstance(rise, Real) or not 0 < rise <= 1:
        raise ArgumentError(f"rise must be a number above 0 and at most 1, got {rise!r}.")

    def weight(epoch: int) -> float:
        # A cycle ends in the epoch in which the next one would begin, so that this one has the whole weight.
        past = (epoch * cycles - 1) % epochs + 1
        last = past + cycles > epochs
        return end if epoch > epochs or last else _between(start, end, past / epochs / float(rise))

    return weight


def _between(start: float, end: float, part: float) -> float:
    return start + (end - start) * min(1.0, part)


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise ArgumentError(f"{name} must be a number of at least 0, got {value!r}.")
    return float(value)
