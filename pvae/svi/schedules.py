"""Weights of the KL divergence by epoch, for ``pvae.fit(kl_weight=...)``: plain functions of an epoch, from 1 on."""

from __future__ import annotations

from collections.abc import Callable

from pvae.errors import ArgumentError, positive_int, real_number

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

    Example:
        >>> import pvae
        >>> weight = pvae.schedules.linear_warmup(epochs=4)
        >>> [weight(epoch) for epoch in range(1, 6)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    epochs = positive_int("epochs", epochs)
    start, end = real_number("start", start, least=0), real_number("end", end, least=0)

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

    Example:
        >>> import pvae
        >>> weight = pvae.schedules.cyclical(epochs=8, cycles=2)
        >>> [weight(epoch) for epoch in range(1, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0]
    """
    epochs, cycles = positive_int("epochs", epochs), positive_int("cycles", cycles)
    start, end = real_number("start", start, least=0), real_number("end", end, least=0)
    if cycles > epochs:
        raise ArgumentError(f"cycles must be at most epochs, so that each has an epoch; got {cycles} in {epochs}.")
    rise = real_number("rise", rise, above=0, most=1)

    def weight(epoch: int) -> float:
        # A cycle ends in the epoch in which the next one would begin, so that this one has the whole weight.
        past = (epoch * cycles - 1) % epochs + 1
        last = past + cycles > epochs
        return end if epoch > epochs or last else _between(start, end, past / epochs / rise)

    return weight


def _between(start: float, end: float, part: float) -> float:
    return start + (end - start) * min(1.0, part)
