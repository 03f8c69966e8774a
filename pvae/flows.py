"""Autoregressive flows: bijections of vectors whose Jacobian is triangular, so that densities go through them.

Pyro's masked networks are used as they are. Its transforms are not: they keep what they computed in modules, across
calls; what is here is made anew for each distribution, keeps the dtype, and is inverted without reading numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import cast

import torch
from pyro import distributions as dist
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pvae.errors import ArgumentError, positive_int, positive_ints

__all__ = ["AutoregressiveAffine", "Flowed", "masked_networks"]


class AutoregressiveAffine(Transform):
    """``y_i = m_i(x_<i) + exp(a_i(x_<i)) x_i``, for the entries of a vector in some order.

    y and its density take one pass through the network of m and a; the inverse takes D passes, and none for the y that
    was computed last.

    Args:
        parameters: ``x -> (m, a)``, all of shape ``(..., D)``, masked so that entry i depends on those before it alone.
        order: The entries, from the first to the last.

    Source: Papamakarios, Pavlakou and Murray, 2017, Masked Autoregressive Flow for Density Estimation.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, parameters: Callable[[Tensor], tuple[Tensor, Tensor]], order: Sequence[int]) -> None:
        super().__init__(cache_size=1)
        self.parameters = parameters
        self.order = list(order)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def push(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns y and a; nothing is kept."""
        shift, log_scale = self.parameters(x)
        return shift + log_scale.exp() * x, log_scale

    def _call(self, x: Tensor) -> Tensor:
        y, log_scale = self.push(x)
        self._last = x, y, log_scale
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        entries = list(torch.zeros_like(y).unbind(-1))
        for i in self.order:
            shift, log_scale = self.parameters(torch.stack(torch.broadcast_tensors(*entries), -1))
            entries[i] = (y[..., i] - shift[..., i]) * (-log_scale[..., i]).exp()
        return torch.stack(torch.broadcast_tensors(*entries), -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns ``log |dy/dx| = sum_i a_i``, shape ``(...)``."""
        if self._last is not None and x is self._last[0] and y is self._last[1]:
            return self._last[2].sum(-1)
        return self.parameters(x)[1].sum(-1)


class Flowed(dist.TransformedDistribution):
    """A normal that went through `AutoregressiveAffine` steps."""

    @property
    def mean(self) -> Tensor:
        """The normal's mean after the steps, ``(..., D)``: a point in the middle, as E[z] has no closed form."""
        z = self.base_dist.mean
        for step in self.transforms:
            z, _ = step.push(z)
        return z


def masked_networks(
    dim: int, context_dim: int, num_steps: int, hidden: Sequence[int] | None
) -> tuple[nn.ModuleList, list[list[int]]]:
    """Networks for the steps of a flow, ``(x, context) -> (m, s)``, and the order of each; every other is reversed.

    Args:
        dim: ``D``, entries of x.
        context_dim: Entries of the context, on which all of m and s may depend.
        num_steps: How many.
        hidden: Widths of the hidden layers of each; left out, one of ``max(64, 4 D)``.

    Source: Germain, Gregor, Murray and Larochelle, 2015, MADE: Masked Autoencoder for Distribution Estimation.
    """
    widths = [max(64, 4 * dim)] if hidden is None else positive_ints("hidden", hidden)
    if not widths or min(widths) < dim:
        raise ArgumentError(
            f"hidden must have at least one width, and none below the {dim} latents: a narrower layer cannot tell all "
            f"orders of entries apart. Got {hidden!r}."
        )
    forwards = list(range(dim))
    orders = [forwards[::-1] if step % 2 else forwards for step in range(positive_int("num_steps", num_steps))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one latent, for which a flow is an affine map
        networks = [
            ConditionalAutoRegressiveNN(
                dim, context_dim, widths, permutation=cast(torch.LongTensor, torch.tensor(order))
            )
            for order in orders
        ]
    return nn.ModuleList(networks), orders
