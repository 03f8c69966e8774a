"""Densities that neither torch nor Pyro has, or not for all parameters; each is of single entries.

A distribution's ``mean`` here is what `pvae.VAE.reconstruct` shows, and says so where that is no expectation.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid
from torch.types import _size

from pvae.errors import ArgumentError, positive_int

__all__ = [
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Grid",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
]

_MAX_LEVELS = 2**16  # float32 tells these apart on [0, 1], and some more that rounding needs

# log(sinh(u) / u) at u = l / 2 is the sum of B_2n l^2n / (2n (2n)!), with Bernoulli's numbers B. Below |l| = 1/2 these
# seven terms leave 1e-18.
_NEAR = 0.5
_BERNOULLI_NUMBERS = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)
_SERIES = tuple(b / (2 * n * math.factorial(2 * n)) for n, b in enumerate(_BERNOULLI_NUMBERS, 1))

_BLOCK = 2**20  # numbers to hold at once in a sum over levels


class _Entrywise(dist.TorchDistribution):
    """Of single entries, whose parameters are tensors by the names in ``arg_constraints``."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]]  # type: ignore[override]

    def expand(self, batch_shape: _size, _instance: Any = None) -> Any:
        """The same with another batch shape."""
        new: Any = self._get_checked_instance(type(self), _instance)
        vars(new).update(vars(self))
        vars(new).update({name: getattr(self, name).expand(batch_shape) for name in self.arg_constraints})
        dist.TorchDistribution.__init__(new, Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new


class ContinuousBernoulli(_Entrywise):
    """The density ``p(x) = exp(l x - A(l))`` of x in [0, 1], with ``A(l) = log((exp(l) - 1) / l)``.

    torch's own class knows probabilities, of which a logit above 16 leaves none in float32, and is cut off around 1/2.
    This one is exact to rounding for every logit, and so are its slopes: near ``l = 0`` by a series, elsewhere by
    terms of one sign.

    Args:
        logits: ``l``. At 0 the density is uniform.

    Source: Loaiza-Ganem and Cunningham, 2019, The continuous Bernoulli: fixing a pervasive error in variational
    autoencoders.
    """

    arg_constraints: ClassVar = {"logits": constraints.real}
    support = constraints.unit_interval  # type: ignore[assignment]

    def __init__(self, logits: Tensor | float, *, validate_args: bool | None = None) -> None:
        self.logits = torch.as_tensor(logits)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """``log p(x)``, nats per entry."""
        if self._validate_args:
            self._validate_sample(value)
        near, t = self._split()
        # l x - max(l, 0), without the difference of two large numbers.
        far = -t * torch.where(self.logits > 0, 1 - value, value) - _log_mean_decay(t)
        return torch.where(near, self.logits * (value - 0.5) - _even(self._small(near)), far)

    def log_normalizer(self) -> Tensor:
        """``A(l)``, that of the exponential family whose statistic is x."""
        near, t = self._split()
        small = self._small(near)
        return torch.where(near, small / 2 + _even(small), self.logits.clamp(min=0) + _log_mean_decay(t))

    @property
    def mean(self) -> Tensor:
        """``E[x] = A'(l)``."""
        near, t = self._split()
        small = self._small(near)
        slope = sum((2 * n * c * small ** (2 * n - 1) for n, c in enumerate(_SERIES, 1)), torch.zeros_like(small))
        below = 1 / t - (-t).exp() / -(-t).expm1()  # that of -|l|
        return torch.where(near, 0.5 + slope, torch.where(self.logits > 0, 1 - below, below))

    @property
    def variance(self) -> Tensor:
        """``Var[x] = A''(l)``."""
        near, t = self._split()
        small = self._small(near)
        bends = ((2 * n) * (2 * n - 1) * c * small ** (2 * n - 2) for n, c in enumerate(_SERIES, 1))
        return torch.where(near, sum(bends, torch.zeros_like(small)), t**-2 - (-t).exp() / (-t).expm1().square())

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draws by the inverse of the distribution function."""
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.logits.dtype, device=self.logits.device)
        t = self.logits.abs().clamp(min=1e-20)
        y = (-torch.log1p(u * (-t).expm1()) / t).clamp(0, 1)
        return torch.where(self.logits > 0, 1 - y, y)

    def _split(self) -> tuple[Tensor, Tensor]:
        """Where ``|l|`` is small, and ``|l|``, which is made 1 there: what is not chosen must have finite slopes."""
        near = self.logits.abs() < _NEAR
        return near, torch.where(near, 1.0, self.logits.abs())

    def _small(self, near: Tensor) -> Tensor:
        return torch.where(near, self.logits, 0.0)


def _log_mean_decay(t: Tensor) -> Tensor:
    """``log((1 - exp(-t)) / t)``, which is ``A(-t)``."""
    return (-(-t).expm1() / t).log()


def _even(small: Tensor) -> Tensor:
    """``A(l) - l / 2`` by its series."""
    square, total = small.square(), torch.zeros_like(small)
    for c in reversed(_SERIES):
        total = (total + c) * square
    return total


class Grid(constraints.Constraint):
    """The numbers ``k / (num_levels - 1)`` for k from 0 to num_levels - 1, to rounding in float32.

    Attributes:
        num_levels: How many.
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels

    @property
    def advice(self) -> str:
        """What to do about data that are none of them, for an error."""
        top = self.num_levels - 1
        return (
            f"Bring the data to [0, 1] (whole numbers up to {top} by x / {top}) and there to these levels, by "
            f"x = (x * {top}).round() / {top}; or choose a likelihood for grey values, such as ContinuousBernoulli."
        )

    def check(self, value: Tensor) -> Tensor:
        """Which entries are on the grid."""
        top = self.num_levels - 1
        level = value * top
        # Also in float64, as data may have been in float32 before.
        tolerance = 1e-3 + 4 * torch.finfo(torch.float32).eps * top
        return (value >= 0) & (value <= 1) & ((level - level.round()).abs() <= tolerance)

    def __repr__(self) -> str:
        return f"k / {self.num_levels - 1} for k = 0 ... {self.num_levels - 1}"


class DiscretizedLogistic(_Entrywise):
    """A logistic variable, rounded to the nearest of L levels ``k / (L - 1)`` in [0, 1].

    ``p(x) = sigmoid((x + h - m) / s) - sigmoid((x - h - m) / s)`` with ``h = 1 / (2 (L - 1))``; the first and the last
    level have the tails. With a and b the two arguments it is computed as ``sigmoid(b) sigmoid(-a) (1 - exp(a - b))``:
    the three logarithms have one sign, so that nothing cancels in any tail.

    Args:
        loc: ``m``.
        scale: ``s``, positive.
        num_levels: ``L``, 2 to 65,536; 256 for pixels of 8 bits.

    Source: Salimans, Karpathy, Chen and Kingma, 2017, PixelCNN++; Kingma, Salimans, Jozefowicz, Chen, Sutskever and
    Welling, 2016, Improved variational inference with inverse autoregressive flow.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, num_levels: int = 256, *, validate_args: bool | None = None
    ) -> None:
        self.num_levels = positive_int("num_levels", num_levels)
        if not 2 <= self.num_levels <= _MAX_LEVELS:
            raise ArgumentError(f"num_levels must be from 2 to {_MAX_LEVELS}, got {num_levels}.")
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Grid:  # type: ignore[override]
        """The levels."""
        return Grid(self.num_levels)

    def log_prob(self, value: Tensor) -> Tensor:
        """``log p(x)``, nats per entry."""
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.num_levels - 1)
        is_first, is_last = value < half, value > 1 - half
        below = logsigmoid((value + half - self.loc) / self.scale)  # of all levels up to this
        above = logsigmoid((self.loc - value + half) / self.scale)
        between = (-(-2 * half / self.scale).expm1()).log()
        return torch.where(is_last, above, torch.where(is_first, below, below + above + between))

    @property
    def mean(self) -> Tensor:
        """``E[x]``, by ``E[k] = sum_j P(k > j)``: exact, in about ``num_levels`` times the work of one density."""
        return self._weighed(0, self.loc.dtype) / (self.num_levels - 1)

    @property
    def variance(self) -> Tensor:
        """``Var[x]``, by ``E[k^2] = sum_j (2 j + 1) P(k > j)``."""
        first, second = (self._weighed(slope, torch.float64) for slope in (0, 2))
        return ((second - first.square()).clamp(min=0) / (self.num_levels - 1) ** 2).to(self.loc.dtype)

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draws a logistic variable and rounds it."""
        top = self.num_levels - 1
        y = dist.Logistic(self.loc, self.scale, validate_args=False).sample(sample_shape)
        return (y * top).round().clamp(0, top) / top

    def _weighed(self, slope: int, dtype: torch.dtype) -> Tensor:
        """``sum_j (slope j + 1) P(k > j)`` over all levels but the last, a block of them at once."""
        top, loc, scale = self.num_levels - 1, self.loc.to(dtype)[..., None], self.scale.to(dtype)[..., None]
        total = torch.zeros_like(loc[..., 0])
        for j in torch.arange(top, dtype=dtype, device=loc.device).split(max(1, _BLOCK // max(1, loc.numel()))):
            exceeds = ((loc - (j + 0.5) / top) / scale).sigmoid()
            total = total + (exceeds * (slope * j + 1) if slope else exceeds).sum(-1)
        return total


def _log_prob_in_float64(distribution: dist.TorchDistribution, value: Tensor, *names: str) -> Tensor:
    """What the parent class gives for parameters and data in float64, in the dtype that they are in.

    Logarithms of factorials may be thousands where their difference is 1: in float32 that is off by 0.001 an entry.
    """
    if distribution._validate_args:
        distribution._validate_sample(value)
    parameters = {name: getattr(distribution, name) for name in names}
    parent = type(distribution).__bases__[0]
    wide = parent(**{name: p.double() for name, p in parameters.items()}, validate_args=False)
    return wide.log_prob(value.double()).to(parameters[names[-1]].dtype)


class Poisson(dist.Poisson):
    """Poisson's, whose log-density is exact to rounding for large counts, too."""

    def log_prob(self, value: Tensor) -> Tensor:
        """``x log r - r - log x!``, nats per entry."""
        return _log_prob_in_float64(self, value, "rate")


class NegativeBinomial(dist.NegativeBinomial):
    """The negative binomial, whose log-density is exact to rounding for a large ``total_count``, too.

    There it is nearly Poisson's, and learned to be so where data are.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """``log p(x)``, nats per entry."""
        return _log_prob_in_float64(self, value, "total_count", "logits")


class StudentT(dist.StudentT):
    """Student's t, exact to rounding for many degrees of freedom, whose ``mean`` is its location for any number.

    Up to one it has no expectation; the location is its median and its mode.
    """

    @property
    def mean(self) -> Tensor:
        """The location."""
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        """``log p(x)``, nats per entry."""
        return _log_prob_in_float64(self, value, "df", "loc", "scale")


class Categorical(dist.Categorical):
    """One of C classes, as numbers of the parameters' dtype, so that draws fit where data do.

    ``mean`` is the most probable class: classes have no order, and so no expectation.
    """

    _param: Tensor

    @property
    def mean(self) -> Tensor:
        """The most probable class."""
        return self.mode.to(self._param.dtype)

    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draws classes."""
        return super().sample(sample_shape).to(self._param.dtype)
