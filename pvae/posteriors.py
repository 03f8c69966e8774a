"""q(z|x): modules whose ``forward(x)`` returns the recognition distribution over the latent, event ``(D,)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from pvae.errors import ProgramError, positive_int
from pvae.flows import AutoregressiveAffine, Flowed, masked_networks
from pvae.networks import Units, soft_clip

__all__ = ["NAMED", "DiagonalNormal", "FullNormal", "InverseAutoregressive", "LowRankNormal", "Named"]

_MAX_GATE = 7.0  # bound on a gate before its bias and sigmoid, so that each step can be inverted
_GATE_BIAS = 2.0  # at which gates begin nearly open, and a step near the identity


class DiagonalNormal(nn.Module):
    """An amortized Gaussian with independent dimensions, ``q(z|x) = Normal(z; m(x), diag(s(x)^2))``.

    The network's output is split in two: the mean ``m`` and a raw log-scale, which `soft_clip` holds inside
    ``(-max_log_scale, max_log_scale)``: no input makes the scale 0 or infinite.

    Args:
        network: ``(N, *event) -> (N, 2 D)``.
        max_log_scale: Bound on ``|log s|``; 7 allows scales from 0.0009 to 1,100.
        units: In which the network sees x; left out, it sees x itself.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes.
    """

    def __init__(self, network: nn.Module, *, max_log_scale: float = 7.0, units: Units | None = None) -> None:
        super().__init__()
        self.network = network
        self.max_log_scale = max_log_scale
        self.units = units

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """Returns q(z|x), with batch shape ``(N,)`` and event shape ``(D,)``, for ``x`` of shape ``(N, *event)``."""
        output = _run(self.network, self.units, x)
        if output.shape[-1] % 2:
            raise _wrong_outputs(self, output, "2 * D outputs, the mean and the log-scale of each latent")
        loc, log_scale = output.chunk(2, -1)
        return dist.Normal(loc, soft_clip(log_scale, self.max_log_scale).exp()).to_event(1)


class LowRankNormal(nn.Module):
    """A normal whose dimensions are correlated along a few directions, ``q(z|x) = Normal(z; m, S (I + W W^T) S)``.

    ``S = diag(s(x))`` holds the scales as in `DiagonalNormal`, and ``W(x)`` of shape ``(D, R)`` the directions; at
    ``W = 0`` it is a `DiagonalNormal`.

    Args:
        network: ``(N, *event) -> (N, (2 + R) D)``: means, log-scales, and W row by row.
        rank: ``R``, the number of directions. A density takes ``O(R^2 D)``.
        max_log_scale: As for `DiagonalNormal`.
        units: As for `DiagonalNormal`.

    Source: Ong, Nott and Smith, 2018, Gaussian Variational Approximation with a Factor Covariance Structure.
    """

    def __init__(
        self, network: nn.Module, rank: int, *, max_log_scale: float = 7.0, units: Units | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.rank = positive_int("rank", rank)
        self.max_log_scale = max_log_scale
        self.units = units

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """Returns q(z|x), with batch shape ``(N,)`` and event shape ``(D,)``, for ``x`` of shape ``(N, *event)``."""
        output = _run(self.network, self.units, x)
        dim, rest = divmod(output.shape[-1], 2 + self.rank)
        if rest:
            needed = f"(2 + rank) * D = {2 + self.rank} * D outputs"
            raise _wrong_outputs(self, output, f"{needed}: mean, log-scale and {self.rank} directions of each latent")
        loc, log_scale, directions = output.split([dim, dim, self.rank * dim], -1)
        scale = soft_clip(log_scale, self.max_log_scale).exp()
        factor = scale[..., None] * directions.unflatten(-1, (dim, self.rank))
        return dist.LowRankMultivariateNormal(loc, factor, scale.square())


class FullNormal(nn.Module):
    """A normal with any covariance, ``q(z|x) = Normal(z; m, L L^T)`` with ``L = S (I + U)``.

    ``S = diag(s(x))`` holds the scales as in `DiagonalNormal`, and ``U(x)`` is strictly lower triangular; at ``U = 0``
    it is a `DiagonalNormal`. The network's outputs, and the cost of a density, grow as ``D^2``.

    Args:
        network: ``(N, *event) -> (N, D (D + 3) / 2)``: means, log-scales, and the rows of U below the diagonal.
        max_log_scale: As for `DiagonalNormal`.
        units: As for `DiagonalNormal`.
    """

    def __init__(self, network: nn.Module, *, max_log_scale: float = 7.0, units: Units | None = None) -> None:
        super().__init__()
        self.network = network
        self.max_log_scale = max_log_scale
        self.units = units

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """Returns q(z|x), with batch shape ``(N,)`` and event shape ``(D,)``, for ``x`` of shape ``(N, *event)``."""
        output = _run(self.network, self.units, x)
        dim = (math.isqrt(9 + 8 * output.shape[-1]) - 3) // 2
        if not dim or dim * (dim + 3) // 2 != output.shape[-1]:
            raise _wrong_outputs(
                self, output, "D * (D + 3) / 2 outputs: 2 for one latent, 5 for two, 9 for three, 1325 for fifty"
            )
        loc, log_scale, below = output.split([dim, dim, dim * (dim - 1) // 2], -1)
        rows, columns = torch.tril_indices(dim, dim, -1, device=output.device)
        flat = output.new_zeros(*loc.shape[:-1], dim * dim).index_copy(-1, rows * dim + columns, below)
        factor = flat.unflatten(-1, (dim, dim)) + torch.eye(dim, dtype=output.dtype, device=output.device)
        scale = soft_clip(log_scale, self.max_log_scale).exp()
        return dist.MultivariateNormal(loc, scale_tril=scale[..., None] * factor)


class InverseAutoregressive(nn.Module):
    """A diagonal normal that went through autoregressive steps, each of which sees x by a context.

    ``z_0 ~ Normal(m(x), diag(s(x)^2))``, ``z_t = g_t z_(t-1) + (1 - g_t) m_t`` and ``z = z_T``, where the gates ``g_t =
    sigmoid(...)`` and ``m_t`` are of a masked network of ``z_(t-1)`` and the context ``h(x)``, and entry i depends on
    those before it alone. Then ``log q(z|x) = log q(z_0|x) - sum_t sum_i log g_(t,i)``.

    A draw and its own density take one pass through each step. The density of any other z, as other proposals than the
    guide ask for, takes D. Its ``mean``, of which `pvae.VAE.reconstruct` makes use, is that of ``z_0`` after the steps:
    E[z|x] has no closed form.

    Args:
        network: ``(N, *event) -> (N, 2 D + C)``: means and log-scales of ``z_0``, as in `DiagonalNormal`, and h.
        latent_dim: ``D``, the number of latent dimensions.
        context_dim: ``C``, the width of the context; left out, that of the latent.
        num_steps: ``T``. Every other one runs through the entries in reverse.
        hidden: Widths of the hidden layers of each step's network, none below D; left out, one of ``max(64, 4 D)``.
            Entry i sees the context and the entries before it by a share of them alone, so wider ones pay: ``"iaf"`` by
            name has one of ``max(64, 12 D)``.
        max_log_scale: As for `DiagonalNormal`.
        units: As for `DiagonalNormal`.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling, 2016, Improved Variational Inference with Inverse
    Autoregressive Flow.
    """

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        *,
        context_dim: int | None = None,
        num_steps: int = 2,
        hidden: Sequence[int] | None = None,
        max_log_scale: float = 7.0,
        units: Units | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.context_dim = None if context_dim is None else positive_int("context_dim", context_dim)
        self.num_steps = num_steps
        self.hidden = hidden
        self.max_log_scale = max_log_scale
        self.units = units
        self.steps, self._orders = masked_networks(latent_dim, context_dim or latent_dim, num_steps, hidden)

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        """Returns q(z|x), with batch shape ``(N,)`` and event shape ``(D,)``, for ``x`` of shape ``(N, *event)``."""
        output = _run(self.network, self.units, x)
        context_dim = self.context_dim or self.latent_dim
        if output.shape[-1] != 2 * self.latent_dim + context_dim:
            raise _wrong_outputs(
                self,
                output,
                f"2 * D + C = {2 * self.latent_dim + context_dim} outputs: mean and log-scale of each of the "
                f"{self.latent_dim} latents, and a context of {context_dim}",
            )
        loc, log_scale, context = output.split([self.latent_dim, self.latent_dim, context_dim], -1)
        base = dist.Normal(loc, soft_clip(log_scale, self.max_log_scale).exp()).to_event(1)
        steps = zip(self.steps, self._orders, strict=True)
        return Flowed(
            base, [AutoregressiveAffine(partial(_gate, step, context=context), order) for step, order in steps]
        )


def _gate(network: nn.Module, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and log-scale of a step, ``(1 - g) m`` and ``log g``."""
    leading = torch.broadcast_shapes(z.shape[:-1], context.shape[:-1])  # of a mixture's components, all z alike
    shift, raw = network(z.expand(*leading, -1), context)
    raw = soft_clip(raw, _MAX_GATE) + _GATE_BIAS
    return torch.sigmoid(-raw) * shift, logsigmoid(raw)


def _run(network: nn.Module, units: Units | None, x: Tensor) -> Tensor:
    """A network's output for data in its units."""
    return network(x if units is None else units(x))


def _wrong_outputs(part: nn.Module, output: Tensor, needed: str) -> ProgramError:
    return ProgramError(f"{type(part).__name__} needs a network with {needed}; this one gives {output.shape[-1]}.")


class Named(NamedTuple):
    """How `pvae.VAE.mlp` and `pvae.VAE.conv` make an encoder from its name."""

    make: Callable[..., nn.Module]  # (network, latent_dim, units=...) -> the encoder
    count_outputs: Callable[[int], int]  # D -> numbers that the network gives for each datum


def _rank(latent_dim: int) -> int:
    return min(4, latent_dim)


def _make_iaf(network: nn.Module, latent_dim: int, *, units: Units | None = None) -> InverseAutoregressive:
    # The class's own width is that of files that were saved without one.
    return InverseAutoregressive(network, latent_dim, hidden=[max(64, 12 * latent_dim)], units=units)


NAMED = {
    "diagonal": Named(lambda network, _, **units: DiagonalNormal(network, **units), lambda d: 2 * d),
    "low-rank": Named(
        lambda network, d, **units: LowRankNormal(network, _rank(d), **units), lambda d: (2 + _rank(d)) * d
    ),
    "full": Named(lambda network, _, **units: FullNormal(network, **units), lambda d: d * (d + 3) // 2),
    "iaf": Named(_make_iaf, lambda d: 3 * d),
}
