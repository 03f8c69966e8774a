"""Likelihoods of many draws and many data at once, where one matrix product gives them all.

In an exponential family ``log p(x | z) = <T(x), eta(z)> - A(eta(z)) + log h(x)``: the first term, for K draws and N
data, is a product of a ``(K, T)`` and a ``(T, N)`` matrix, and the others are vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from pvae import distributions

__all__ = [
    "FAMILIES",
    "PARAMETERS",
    "Family",
    "is_constant_along",
    "is_family",
    "leaf_of",
    "parameters_of",
    "product",
    "shared_log_prob",
]


class Family(NamedTuple):
    """A family in its natural form; the functions return tensors with a leading dimension of draws or of data.

    Attributes:
        natural: A distribution to ``eta``, one tensor for each statistic.
        normalizer: A distribution to ``A``.
        statistics: Data and a distribution to ``T(x)``, one tensor for each.
        carrier: Data and a distribution to ``log h(x)``; none if that is 0. It may depend on ``fixed`` alone.
        dtype: In which to multiply; float64 where terms may nearly cancel.
        fixed: Names of parameters that must be one number for all draws, data and entries.
    """

    natural: Callable[[Any], tuple[Tensor, ...]]
    normalizer: Callable[[Any], Tensor]
    statistics: Callable[[Tensor, Any], tuple[Tensor, ...]]
    carrier: Callable[[Tensor, Any], Tensor] | None = None
    dtype: torch.dtype | None = torch.float64
    fixed: tuple[str, ...] = ()


def _itself(x: Tensor, _: Any) -> tuple[Tensor, ...]:
    return (x,)


def _one_hot(x: Tensor, p: Any) -> tuple[Tensor, ...]:
    return (x.long()[..., None] == torch.arange(p.logits.shape[-1], device=x.device),)


def _of_counts(x: Tensor, p: Any) -> Tensor:
    """The negative binomial's, with its one ``total_count``."""
    r = p.total_count.reshape(-1)[0]
    return torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)


_CATEGORICAL = Family(lambda p: (p.logits,), lambda p: torch.zeros_like(p.logits[..., 0]), _one_hot, dtype=None)

_NEGATIVE_BINOMIAL = Family(
    lambda p: (logsigmoid(p.logits),),
    lambda p: -p.total_count * logsigmoid(-p.logits),
    _itself,
    _of_counts,
    fixed=("total_count",),
)
_POISSON = Family(lambda p: (p.rate.log(),), lambda p: p.rate, _itself, lambda x, _: -torch.lgamma(x + 1))


FAMILIES: dict[type, Family] = {
    dist.Bernoulli: Family(lambda p: (p.logits,), lambda p: softplus(p.logits), _itself, dtype=None),
    dist.Categorical: _CATEGORICAL,
    distributions.Categorical: _CATEGORICAL,
    distributions.ContinuousBernoulli: Family(lambda p: (p.logits,), lambda p: p.log_normalizer(), _itself),
    dist.Exponential: Family(lambda p: (-p.rate,), lambda p: -p.rate.log(), _itself),
    dist.Gamma: Family(
        lambda p: (p.concentration - 1, -p.rate),
        lambda p: p.concentration.lgamma() - p.concentration * p.rate.log(),
        lambda x, _: (x.log(), x),
    ),
    dist.NegativeBinomial: _NEGATIVE_BINOMIAL,
    distributions.NegativeBinomial: _NEGATIVE_BINOMIAL,
    dist.Normal: Family(
        lambda p: (p.loc / p.scale.square(), -0.5 / p.scale.square()),
        lambda p: (p.loc / p.scale).square() / 2 + p.scale.log(),
        lambda x, _: (x, x.square()),
        lambda x, _: torch.full_like(x, -math.log(2 * math.pi) / 2),
    ),
    dist.Poisson: _POISSON,
    distributions.Poisson: _POISSON,
}
"""Univariate families whose parameters and data stand entry by entry."""


PARAMETERS = {
    dist.Bernoulli: ("logits",),
    dist.Categorical: ("logits",),
    distributions.Categorical: ("logits",),
    distributions.ContinuousBernoulli: ("logits",),
    dist.Exponential: ("rate",),
    dist.Gamma: ("concentration", "rate"),
    dist.Laplace: ("loc", "scale"),
    dist.NegativeBinomial: ("total_count", "logits"),
    distributions.NegativeBinomial: ("total_count", "logits"),
    dist.Normal: ("loc", "scale"),
    dist.Poisson: ("rate",),
    distributions.Poisson: ("rate",),
    dist.StudentT: ("df", "loc", "scale"),
    dist.Uniform: ("low", "high"),
}
"""Univariate families by the names of their parameters, which say all there is to say about them."""


def is_family(leaf: Any) -> bool:
    """Whether a distribution, below ``to_event``, is one of `FAMILIES`, with those parameters fixed that must be."""
    if type(leaf) not in FAMILIES:
        return False
    return all(not any(getattr(leaf, name).stride()) for name in FAMILIES[type(leaf)].fixed)


def parameters_of(leaf: Any) -> dict[str, Tensor]:
    """A distribution's parameters as it was given them: probabilities or logits."""
    names = ["probs" if n == "logits" and "probs" in leaf.__dict__ else n for n in PARAMETERS[type(leaf)]]
    return {name: getattr(leaf, name) for name in names}


def leaf_of(distribution: Any) -> Any:
    """The distribution below ``to_event``."""
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution


def product(family: type, parameters: dict[str, Tensor], x: Tensor, *, exact: bool = True) -> Tensor:
    """``log p(x_n | z_k)`` summed over the entries of a datum, for all draws and data.

    Args:
        family: One of `FAMILIES`.
        parameters: By name, each of shape ``(K, *event)``; a categorical's with one more dimension of classes.
        x: Shape ``(N, *event)``.
        exact: Whether draws with a probability of 0 or 1, for which this form has no number, are done by themselves.
            Otherwise they are nan, and all is done by tensor operations alone.

    Returns:
        Shape ``(K, N)``, in the family's dtype.
    """
    rule = FAMILIES[family]
    dtype = rule.dtype or next(iter(parameters.values())).dtype
    p = family(**{name: value.to(dtype) for name, value in parameters.items()}, validate_args=False)
    natural = torch.cat([_rows(eta) for eta in rule.natural(p)], 1)
    x = x.to(dtype)
    statistics = torch.cat([_rows(t.to(dtype)) for t in rule.statistics(x, p)], 1)
    log_px = natural @ statistics.T - _rows(rule.normalizer(p)).sum(1, keepdim=True)
    if rule.carrier is not None:
        log_px = log_px + _rows(rule.carrier(x, p)).sum(1)
    # A probability of 0 is infinite here, and 0 times that is nan, where the density itself is well defined.
    for k in () if not exact else (~natural.isfinite().all(1)).nonzero()[:, 0].tolist():
        one = family(**{name: value[k].to(dtype) for name, value in parameters.items()}, validate_args=False)
        log_px[k] = _rows(one.log_prob(x)).sum(1)
    return log_px


def is_constant_along(distribution: Any, dim: int) -> bool:
    """Whether a distribution is the same all along a plate, which stands at ``dim`` of its batch shape.

    A plate expands what does not depend on its data without copying, so that the stride of every parameter along it is
    0. Univariate families below ``to_event`` show all of their parameters in this way, and so do mixtures of them.
    """
    if isinstance(distribution, dist.MixtureSameFamily):
        components = distribution.component_distribution  # along one more dimension
        return is_constant_along(distribution.mixture_distribution, dim) and is_constant_along(components, dim - 1)
    leaf = leaf_of(distribution)
    if type(leaf) not in PARAMETERS:
        return False
    return all(t.stride(_parameter_dim(distribution, n, dim)) == 0 for n, t in parameters_of(leaf).items())


def shared_log_prob(distribution: Any, dim: int, x: Tensor, *, exact: bool = True) -> Tensor:
    """`product` for K distributions that are constant along a plate, which stands at ``dim`` of their batch shape."""
    leaf = leaf_of(distribution)
    parameters = {n: t.select(_parameter_dim(distribution, n, dim), 0) for n, t in parameters_of(leaf).items()}
    return product(type(leaf), parameters, x, exact=exact)


def _parameter_dim(distribution: Any, parameter: str, dim: int) -> int:
    """Where the plate stands in a parameter of the distribution below ``to_event``."""
    classes = isinstance(leaf_of(distribution), dist.Categorical) and parameter in ("logits", "probs")
    return dim - len(distribution.event_shape) - classes


def _rows(t: Tensor) -> Tensor:
    return t.reshape(len(t), -1)
