"""p(x|z): modules whose ``forward(z)`` returns the likelihood, a distribution over one datum ``(*event)``.

Each owns every constant of its log density, so that ``log_prob`` is in nats and comparable between models. Those of
bits, counts, classes and pixel levels are probabilities; the others are densities, in the units of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pvae import distributions
from pvae.errors import ArgumentError, ProgramError, positive_int, real_number
from pvae.networks import Log1p, Units, soft_clip

__all__ = [
    "NAMED",
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "Laplace",
    "Named",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
]

# Bound on |log scale| of a learned scale, in its units: from 0.0009 to 1,100. A likelihood whose scale may go to zero
# has no maximum.
_MAX_LOG_SCALE = 7.0

# The same for a continuous Bernoulli, whose density is as high as its logit at an entry of exactly 0 or 1.
_MAX_LOGIT = 1000.0

# Bound on |log mean| of a count: up to 9 million, below 2^24, from where float32 has not every whole number.
_MAX_LOG_MEAN = 16.0

Size = float | Literal["learned", "network"]


class _Likelihood(nn.Module):
    """What all have: a network whose outputs are the parameters of a distribution of single entries.

    A subclass says in `_distribution` which, and in `_parts` how many parameters the network gives for each entry.
    """

    def __init__(self, network: nn.Module, *, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.network = network
        self.event_shape = None if event_shape is None else tuple(event_shape)

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """Returns p(x|z), with batch shape ``(...)`` and event shape ``(*event)``, for ``z`` of shape ``(..., D)``."""
        px = self._distribution(*_per_datum(self.network(z), z, self._parts(), self.event_shape))
        return px.to_event(len(px.batch_shape) - z.dim() + 1)

    def _parts(self) -> int:
        return 1

    def _distribution(self, *parts: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError


class Bernoulli(_Likelihood):
    """Independent bits, ``p(x|z) = prod_j p_j^x_j (1 - p_j)^(1 - x_j)`` with ``logit p = network(z)``.

    Only for x in {0, 1}: grey pixels have no probability under it. See `pvae.datasets` for binarization.

    Args:
        network: ``(..., D) -> (..., *out)``, the logits.
        event_shape: Shape of one datum; the network's output is reshaped to it. Left out, each output vector of
            the network is one datum.
    """

    def _distribution(self, *parts: Tensor) -> dist.TorchDistribution:
        (logits,) = parts
        return dist.Bernoulli(logits=logits)


class ContinuousBernoulli(_Likelihood):
    """Independent grey values in [0, 1], ``p(x|z) = prod_j exp(l_j x_j - A(l_j))``, ``A(l) = log((exp(l) - 1) / l)``.

    A density, exponential in x: for values that are mostly near 0 or 1. At an entry of exactly 0 or 1 it is as high as
    ``|l|``, so logits are held inside (-1000, 1000) by `pvae.networks.soft_clip`.

    Args:
        network: ``(..., D) -> (..., *out)``, the logits ``l`` before they are held.
        event_shape: As for `Bernoulli`.

    Source: Loaiza-Ganem and Cunningham, 2019, The continuous Bernoulli: fixing a pervasive error in variational
    autoencoders.
    """

    def _distribution(self, *parts: Tensor) -> dist.TorchDistribution:
        (logits,) = parts
        return distributions.ContinuousBernoulli(soft_clip(logits, _MAX_LOGIT))


class _LocationScale(_Likelihood):
    """Entries with a location from the network, and a scale that is fixed, learned or from the network."""

    def __init__(
        self,
        network: nn.Module,
        *,
        scale: Size = "learned",
        event_shape: Sequence[int] | None = None,
        units: Units | None = None,
    ) -> None:
        super().__init__(network, event_shape=event_shape)
        self.scale = _check_size("scale", scale)
        self.units = units
        # In units a scale from the network has one for all of x, too: it tells whether anything was trained in them.
        overall = scale == "learned" or (scale == "network" and units is not None)
        self.log_scale = nn.Parameter(torch.zeros(())) if overall else None

    def _parts(self) -> int:
        return 2 if self.scale == "network" else 1

    def _distribution(self, *parts: Tensor) -> dist.TorchDistribution:
        loc, log_scale = parts[0], self.log_scale
        if self.scale == "network":
            log_scale = parts[1] if log_scale is None else parts[1] + log_scale
        fixed = log_scale is None
        scale = loc.new_tensor(self.scale) if fixed else soft_clip(log_scale, _MAX_LOG_SCALE).exp()
        if self.units is not None:
            loc, scale = self.units.back(loc), scale if fixed else self.units.scale * scale
        return self._around(loc, scale.expand_as(loc))

    def _around(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError


class Gaussian(_LocationScale):
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

    def _around(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return dist.Normal(loc, scale)


class Laplace(_LocationScale):
    """Independent entries with tails of ``exp(-|x|)``, ``p(x|z) = prod_j exp(-|x_j - m_j(z)| / s_j) / (2 s_j)``.

    The best m is a median, so that few wrong entries do not draw it away.

    Args:
        network: As for `Gaussian`, whose means are the ``m``.
        scale: As for `Gaussian`; entries have a standard deviation of ``sqrt(2) s``.
        event_shape: As for `Bernoulli`.
        units: As for `Gaussian`.
    """

    def _around(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return dist.Laplace(loc, scale)


class StudentT(_LocationScale):
    """Independent entries with Student's t distribution, whose tails are powers: ``|x|^-(df + 1)``.

    ``p(x|z) = prod_j t_df((x_j - m_j(z)) / s_j) / s_j``. Its ``mean`` is the location ``m`` for any ``df``, though it
    has an expectation only for ``df > 1``, and a variance, ``s^2 df / (df - 2)``, only for ``df > 2``.

    Args:
        network: As for `Gaussian`, whose means are the ``m``.
        df: Degrees of freedom, a positive number: 1 is Cauchy's, and the tails of a large one are normal.
        scale: As for `Gaussian`.
        event_shape: As for `Bernoulli`.
        units: As for `Gaussian`.

    Source: Lange, Little and Taylor, 1989, Robust statistical modeling using the t distribution, where 4 degrees of
    freedom serve where nothing is known.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        df: float = 4.0,
        scale: Size = "learned",
        event_shape: Sequence[int] | None = None,
        units: Units | None = None,
    ) -> None:
        super().__init__(network, scale=scale, event_shape=event_shape, units=units)
        self.df = real_number("df", df, above=0)

    def _around(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return distributions.StudentT(loc.new_tensor(self.df), loc, scale)


class DiscretizedLogistic(_LocationScale):
    """Independent entries on the levels ``k / (num_levels - 1)`` in [0, 1], as pixels of 8 bits divided by 255.

    A logistic variable with location ``m_j(z)`` and scale ``s_j``, rounded to the nearest level: a probability, so that
    log p(x) is at most 0, and that of other models of the same levels compares with it.

    Args:
        network: As for `Gaussian`, whose means are the ``m``, in units of the range [0, 1].
        num_levels: 2 to 65,536.
        scale: As for `Gaussian`; before it is rounded an entry has a standard deviation of ``1.81 s``.
        event_shape: As for `Bernoulli`.
        units: As for `Gaussian`.

    Source: Salimans, Karpathy, Chen and Kingma, 2017, PixelCNN++; Kingma, Salimans, Jozefowicz, Chen, Sutskever and
    Welling, 2016, Improved variational inference with inverse autoregressive flow.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_levels: int = 256,
        scale: Size = "learned",
        event_shape: Sequence[int] | None = None,
        units: Units | None = None,
    ) -> None:
        super().__init__(network, scale=scale, event_shape=event_shape, units=units)
        self.num_levels = distributions.DiscretizedLogistic(0.0, 1.0, num_levels).num_levels

    def _around(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return distributions.DiscretizedLogistic(loc, scale, self.num_levels)


class Poisson(_Likelihood):
    """Independent counts, ``p(x|z) = prod_j r_j^x_j exp(-r_j) / x_j!`` with ``log r = network(z)``.

    Logarithms of rates are held inside (-16, 16) by `pvae.networks.soft_clip`. Counts may be large: let the encoder see
    their logarithms, ``nn.Sequential(pvae.networks.Log1p(), network)``, as `pvae.VAE.mlp` does.

    Args:
        network: ``(..., D) -> (..., *out)``, the logarithms of the rates before they are held.
        event_shape: As for `Bernoulli`.
    """

    def _distribution(self, *parts: Tensor) -> dist.TorchDistribution:
        (log_rate,) = parts
        return distributions.Poisson(soft_clip(log_rate, _MAX_LOG_MEAN).exp())


class NegativeBinomial(_Likelihood):
    """Independent counts that vary more than Poisson's: of mean ``m_j(z)`` and variance ``m_j + m_j^2 / r_j``.

    ``p(x|z) = prod_j Gamma(x_j + r_j) / (Gamma(r_j) x_j!) (r_j / (r_j + m_j))^r_j (m_j / (r_j + m_j))^x_j`` with
    ``log m = network(z)``: Poisson counts with Gamma rates. Encoder and bounds as for `Poisson`.

    Args:
        network: ``(..., D) -> (..., *out)``, the logarithms of the means; with ``total_count="network"`` twice as many
            outputs, of which the second half are the logarithms of ``r``.
        total_count: ``r``. A positive number: that, fixed. ``"learned"``: one for all of x, learned with the network
            and started at 1. ``"network"``: one for each entry of x, from the network.
        event_shape: As for `Bernoulli`.
    """

    def __init__(
        self, network: nn.Module, *, total_count: Size = "learned", event_shape: Sequence[int] | None = None
    ) -> None:
        super().__init__(network, event_shape=event_shape)
        self.total_count = _check_size("total_count", total_count)
        self.log_total_count = nn.Parameter(torch.zeros(())) if total_count == "learned" else None

    def _parts(self) -> int:
        return 2 if self.total_count == "network" else 1

    def _distribution(self, *parts: Tensor) -> dist.TorchDistribution:
        log_mean = soft_clip(parts[0], _MAX_LOG_MEAN)
        raw = parts[1] if self.total_count == "network" else self.log_total_count
        log_count = log_mean.new_tensor(self.total_count).log() if raw is None else soft_clip(raw, _MAX_LOG_SCALE)
        return distributions.NegativeBinomial(log_count.exp(), logits=log_mean - log_count)


class Categorical(_Likelihood):
    """Independent classes, ``p(x|z) = prod_j softmax(l_j(z))[x_j]``, each entry of x one of the numbers 0 ... C - 1.

    Its ``mean``, and so what `pvae.VAE.reconstruct` gives, is the most probable class, as classes have no order. For
    the same reason let the encoder see them as `pvae.networks.OneHot`.

    Args:
        network: ``(..., D) -> (..., C, *event)``, the logits ``l``, classes first.
        num_classes: ``C``.
        event_shape: Shape of one datum. Left out, it is that of the network's output with a C-th of the first
            dimension, as of feature maps: outputs ``(C, 64)`` are for data of shape ``(1, 64)``.
    """

    def __init__(self, network: nn.Module, *, num_classes: int, event_shape: Sequence[int] | None = None) -> None:
        super().__init__(network, event_shape=event_shape)
        self.num_classes = positive_int("num_classes", num_classes)

    def _parts(self) -> int:
        return self.num_classes

    def _distribution(self, *parts: Tensor) -> dist.TorchDistribution:
        return distributions.Categorical(logits=torch.stack(parts, -1))


class Named(NamedTuple):
    """How `pvae.VAE.mlp` and `pvae.VAE.conv` make a likelihood from its name."""

    make: Callable[..., nn.Module]  # (network, event_shape=...) -> the likelihood
    outputs: int  # numbers that the network gives for each entry of x
    has_units: bool = False  # whether data may be in any units
    view: Callable[[], nn.Module] | None = None  # makes what the encoder sees data through

    def show(self, network: nn.Module) -> nn.Module:
        """An encoder's network, which sees data through the view."""
        return network if self.view is None else nn.Sequential(self.view(), network)


NAMED = {
    "bernoulli": Named(Bernoulli, 1),
    "continuous-bernoulli": Named(ContinuousBernoulli, 1),
    "gaussian": Named(partial(Gaussian, scale="learned"), 1, has_units=True),
    "gaussian-per-pixel": Named(partial(Gaussian, scale="network"), 2, has_units=True),
    "laplace": Named(Laplace, 1, has_units=True),
    "student-t": Named(StudentT, 1, has_units=True),
    "discretized-logistic": Named(DiscretizedLogistic, 1, has_units=True),
    "discretized-logistic-per-pixel": Named(partial(DiscretizedLogistic, scale="network"), 2, has_units=True),
    "poisson": Named(Poisson, 1, view=Log1p),
    "negative-binomial": Named(NegativeBinomial, 1, view=Log1p),
}


def _check_size(name: str, value: Size) -> Size:
    """A scale or another positive parameter, as it was given, or `ArgumentError`."""
    if value in ("learned", "network"):
        return value
    if isinstance(value, str):
        raise ArgumentError(f"{name} must be a positive number, 'learned' or 'network'; got {value!r}.")
    return real_number(name, value, above=0)


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
