"""p(x|z): modules whose ``forward(z)`` returns the likelihood, a distribution over one datum ``(*event)``.

Each owns every constant of its log density, so that ``log_prob`` is in nats and comparable between models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pvae.errors import ArgumentError, ProgramError
from pvae.networks import Units, soft_clip

__all__ = ["NAMED", "Bernoulli", "Gaussian", "Named"]

# Bound on |log scale| of a learned scale, in its units: from 0.0009 to 1,100. A likelihood whose scale may go to zero
# has no maximum.
_MAX_LOG_SCALE = 7.0


class Bernoulli(nn.Module):
    """Independent bits, ``p(x|z) = prod_j p_j^x_j (1 - p_j)^(1 - x_j)`` with ``logit p = network(z)``.

    Only for x in {0, 1}: grey pixels have no probability under it. See `pvae.datasets` for binarization.

    Args:
        network: ``(..., D) -> (..., *out)``, the logits.
        event_shape: Shape of one datum; the network's output is reshaped to it. Left out, each output vector of
            the network is one datum.
    """

    def __init__(self, network: nn.Module, *, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.network = network
        self.event_shape = None if event_shape is None else tuple(event_shape)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """Returns p(x|z), with batch shape ``(...)`` and event shape ``(*event)``, for ``z`` of shape ``(..., D)``."""
        (logits,) = _per_datum(self.network(z), z, 1, self.event_shape)
        return dist.Bernoulli(logits=logits).to_event(logits.dim() - z.dim() + 1)


class Gaussian(nn.Module):
    """Independent normals, ``p(x|z) = prod_j Normal(x_j; m_j(z), s_j^2)``.

    Args:
        network: ``(..., D) -> (..., *out)``, the means; with ``scale="network"`` twice as many outputs, of which the
            first half are the means and the second half the log-scales.
        scale: A positive number: that scale, fixed, in the units of x itself. ``"learned"``: one scale for all of x,
            learned with the network and started at 1. ``"network"``: a scale for each entry of x, from the network.
        event_shape: As for `Bernoulli`.
        units: In which the network gives means and scales, so that a learned scale starts at ``units.scale``. Left
            out, those of x itself.

    Source: for the single learned scale, Rybkin, Daniilidis and Levine, 2021, Simple and Effective VAE Training with
    Calibrated Decoders.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        scale: float | Literal["learned", "network"] = "learned",
        event_shape: Sequence[int] | None = None,
        units: Units | None = None,
    ) -> None:
        super().__init__()
        fixed = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 < scale < float("inf")
        if not fixed and scale not in ("learned", "network"):
            raise ArgumentError(f"scale must be a positive number, 'learned' or 'network'; got {scale!r}.")
        self.network = network
        self.scale = scale
        self.event_shape = None if event_shape is None else tuple(event_shape)
        self.units = units
        # In units a scale from the network has one for all of x, too: it tells whether anything was trained in them.
        overall = scale == "learned" or (scale == "network" and units is not None)
        self.log_scale = nn.Parameter(torch.zeros(())) if overall else None

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """Returns p(x|z), with batch shape ``(...)`` and event shape ``(*event)``, for ``z`` of shape ``(..., D)``."""
        output = self.network(z)
        if self.scale == "network":
            loc, log_scale = _per_datum(output, z, 2, self.event_shape)
            log_scale = log_scale if self.log_scale is None else log_scale + self.log_scale
        else:
            (loc,) = _per_datum(output, z, 1, self.event_shape)
            log_scale = self.log_scale
        fixed = log_scale is None
        scale = loc.new_tensor(self.scale) if fixed else soft_clip(log_scale, _MAX_LOG_SCALE).exp()
        if self.units is not None:
            loc, scale = self.units.back(loc), scale if fixed else self.units.scale * scale
        return dist.Normal(loc, scale.expand_as(loc)).to_event(loc.dim() - z.dim() + 1)


class Named(NamedTuple):
    """How `pvae.VAE.mlp` and `pvae.VAE.conv` make a likelihood from its name."""

    make: Callable[..., nn.Module]  # (network, event_shape=...) -> the likelihood
    outputs: int  # numbers that the network gives for each entry of x
    has_units: bool = False  # whether data may be in any units


NAMED = {
    "bernoulli": Named(Bernoulli, 1),
    "gaussian": Named(partial(Gaussian, scale="learned"), 1, has_units=True),
    "gaussian-per-pixel": Named(partial(Gaussian, scale="network"), 2, has_units=True),
}


def _per_datum(output: Tensor, z: Tensor, parts: int, event_shape: tuple[int, ...] | None) -> tuple[Tensor, ...]:
    """Cuts a network's output into ``parts`` tensors of shape ``(..., *event)``, for ``z`` of shape ``(..., D)``."""
    leading = z.shape[:-1]
    entries = output.shape[len(leading) :]
    if event_shape is None:
        event_shape = (entries[0] // parts, *entries[1:])
    if entries.numel() != parts * math.prod(event_shape):
        raise ProgramError(
            f"the decoder's network gives {tuple(entries)} for each latent, expected {parts} number(s) for each entry "
            f"of a datum of shape {event_shape}. Change the network's outputs, or the likelihood's event_shape."
        )
    return output.reshape(*leading, parts, *event_shape).unbind(len(leading))
