"""A Gaussian fitted to each datum by natural gradients of its ELBO, from few evaluations of the slope.

In coordinates e in which q is standard normal, ``g(e) = d [log p(x, u) - log q(u)] / de`` is 0 where q is the
posterior, and ``g(0) - L e`` where that is another Gaussian, whose precision is then ``1 + L``. So g is regressed on e:
intercept and slope are the ELBO's gradients for the mean and for the covariance, and K draws show ``K - 1`` directions
of a Gaussian posterior without noise. The draws of one step are the same for all data, and sets of them take turns to
show all directions: a Gaussian posterior is found when all have been seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.evidence.densities import Batch, Densities
from pvae.evidence.proposals.gaussians import Elliptical
from pvae.evidence.proposals.slopes import log_joint_and_slope

__all__ = ["climb"]

_HALF = 3  # steps without gain, after which they are half as long
_MEMORY = 0.8  # of averages over steps
_NOTHING = 1e-3  # a divergence that is nearly none
_WIDER = 0.2  # how much of the misfit goes into the width
_LEAST = 0.25  # of what the precision along a direction may become in a step, in units of that before
_MOST = 16.0
_SHEAR = 2.0  # of directions seen into others, at most


def climb(
    pair: Densities, batch: Batch, start: Elliptical, *, full: bool, steps: int, particles: int, lr: float
) -> tuple[Tensor, Tensor]:
    """Climbs to the Gaussian of the highest ELBO for each datum, and makes it wider where it does not fit.

    ``E|g|^2``, the Fisher divergence between q and the posterior, is 0 where q is exact. The rate falls with the steps
    after a turn in which that has not fallen by half. A datum leaves when ``rate E|g|^2``, by which noise moves it, is
    below ``40 / steps``; in less than 50 dimensions noise weighs more, and that is times ``(D / 50)^(1/2)``.
    The Gaussian of the highest ELBO is too narrow where the posterior is none, so that its weights have heavy tails.
    ``E[g g']`` says in which directions. There a full covariance is made wider in the end; not where it is exact.

    Args:
        pair: The model.
        batch: N data.
        start: Where to begin.
        full: Whether the covariance is full, or along the axes of the start.
        steps: The most steps that a datum takes.
        particles: Draws for each datum and step at most; at least 2 are taken.
        lr: Length of the first step; 1 is Newton's where the posterior is Gaussian.

    Returns:
        Mean ``(N, D)`` and lower triangular factor ``(N, D, D)`` of the covariance.
    """
    loc, factor = start.loc.clone(), start.factor.clone()
    num_data, dim = loc.shape
    turn, sets = _take_turns(max(2, particles), loc)
    patience = min(turn, max(1, steps // 4))
    fit = _Fit(num_data, patience, full, lr, reach=dim**0.5, enough=min(1.0, (dim / 50) ** 0.5) * 40 / steps)
    rows, state = torch.arange(num_data, device=loc.device), _State.of(loc, factor)
    for step, noise in zip(range(steps), sets, strict=False):
        state = _step(pair, batch, state, noise, fit, is_first=step < turn <= patience)
        left = fit.gains(state) & (step < steps - 1)
        if not left.all():
            loc[rows[~left]], factor[rows[~left]] = state.loc[~left], (_widen(state) if full else state.factor)[~left]
            rows, batch, state = rows[left], tuple(t[left] for t in batch), _State(*(t[left] for t in state))
        if not len(rows):
            break
    upper = torch.linalg.qr(factor.mT, mode="r").R  # factor factor' = upper' upper
    return loc, upper.mT * upper.diagonal(dim1=-2, dim2=-1).sign()[:, None]


class _State(NamedTuple):
    """Gaussians ``u = loc + factor e``, and how far they are from their posteriors.

    Attributes:
        loc: Shape ``(N, D)``.
        factor: Of any form, ``(N, D, D)``.
        misfit: About ``E[g g']``, averaged over steps since the divergence last fell by half, ``(N, D, D)``.
        divergence: About ``E|g|^2``, averaged likewise, ``(N,)``.
        least: ``E|g|^2`` when it last fell by half.
        waited: Steps since then.
        age: Steps of no gain after that.
    """

    loc: Tensor
    factor: Tensor
    misfit: Tensor
    divergence: Tensor
    least: Tensor
    waited: Tensor
    age: Tensor

    @classmethod
    def of(cls, loc: Tensor, factor: Tensor) -> _State:
        """Before the first step."""
        none = loc.new_zeros(len(loc))
        unknown = torch.full_like(none, torch.inf)
        return cls(loc, factor, torch.zeros_like(factor), unknown, unknown, none, none)


class _Fit(NamedTuple):
    """What does not change between steps.

    Attributes:
        num_data: How many there were.
        patience: Steps in which the divergence may fall by half: those that see all directions, if not too many.
        full: Whether the covariance is full.
        lr: The first rate.
        reach: How far a mean moves at most, as far as draws are from it.
        enough: How far noise may move what is done.
    """

    num_data: int
    patience: int
    full: bool
    lr: float
    reach: float
    enough: float

    def rate(self, age: Tensor) -> Tensor:
        """How much of what a step sees is taken."""
        return self.lr / (1 + age / _HALF)

    def gains(self, state: _State) -> Tensor:
        """Whether data gain by more steps: noise moves them far, or the divergence has just fallen by half."""
        is_far = self.rate(state.age) * state.divergence > self.enough
        falls = (state.waited < self.patience) & (state.divergence > _NOTHING)
        return is_far | falls | ~state.divergence.isfinite()


def _step(pair: Densities, batch: Batch, state: _State, noise: Tensor, fit: _Fit, *, is_first: bool) -> _State:
    """A natural-gradient step for the data that are left, with the same noise ``(K, D)``; where slopes are nan, none.

    Args:
        pair: The model.
        batch: Those data.
        state: Their Gaussians.
        noise: With a mean of zero.
        fit: What does not change.
        is_first: Whether there are directions that no step before has seen. Then the mean moves in those of this noise.
    """
    u = state.loc + torch.einsum("nij,kj->kni", state.factor, noise)
    _, slope = log_joint_and_slope(pair, batch, u, fit.num_data)
    g = torch.einsum("nji,knj->nki", state.factor, slope) + noise
    misfit, divergence = g.mT @ g / g.shape[1], g.square().sum(-1).mean(1)
    falls = divergence < state.least / 2
    waited = torch.where(falls, 0.0, state.waited + 1)
    age = state.age + (waited > fit.patience)
    rate = fit.rate(age)[:, None, None]
    change, seen = (_full_change if fit.full else _diagonal_change)(g, noise, rate)
    mean = g.mean(1)[..., None]
    if is_first:
        move = seen @ mean
    else:
        move = mean + change.mT @ mean
        move = move + change @ move
    move = rate * move
    move = move * (fit.reach / torch.linalg.matrix_norm(move).clamp(min=fit.reach))[:, None, None]
    memory = torch.where(falls, 0.0, _MEMORY).to(g)  # of what is past, none
    new = _State(
        state.loc + (state.factor @ move)[..., 0],
        state.factor + state.factor @ change,
        torch.lerp(misfit, state.misfit, memory[:, None, None]),
        torch.lerp(divergence, state.divergence.nan_to_num(posinf=0.0), memory),
        torch.where(falls, divergence, state.least),
        waited,
        age,
    )
    fine = torch.stack([t.flatten(1).isfinite().all(1) for t in new[:3]]).all(0)
    return _State(*(torch.where(fine.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, state, strict=True)))


def _full_change(g: Tensor, noise: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """What makes ``factor (1 + change)`` of the factor, and the covariance seen, both in units of it, ``(N, D, D)``.

    The precision along the noise is averaged with that of q, which is 1, by the rate. What of the covariance is not
    seen is filled up by the BFGS formula for R directions at once. Where these are orthogonal to all directions seen
    before, the precision along those stays 1, so that a Gaussian is found when all have been seen.

    Source: Schnabel, 1983, Quasi-Newton Methods Using Multiple Secant Equations; Gower, Goldfarb and Richtárik, 2016,
    Stochastic Block BFGS: Squeezing More Curvature out of Data.
    """
    basis, along = _regress(g, noise)
    core = basis @ along
    size = torch.eye(len(basis)).to(core) + rate * (core + core.mT) / 2
    values, vectors = torch.linalg.eigh(size.nan_to_num(1.0, 1.0, 1.0))
    values = values.clamp(_LEAST, _MOST)[:, None, :]
    inverse, root = vectors / values @ vectors.mT, vectors / values.sqrt() @ vectors.mT
    shear = rate * inverse @ (along - basis.mT @ core).mT
    shear = shear * (_SHEAR / torch.linalg.matrix_norm(shear).clamp(min=_SHEAR))[:, None, None]
    return basis.mT @ (root @ basis - basis - shear), basis.mT @ inverse @ basis


def _diagonal_change(g: Tensor, noise: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """The same with axes that stay."""
    basis, along = _regress(g, noise)
    precision = 1 + rate[..., 0] * (basis.mT * along).sum(-1)
    precision = precision.clamp(_LEAST, _MOST)
    return (precision.rsqrt() - 1).diag_embed(), (1 / precision).diag_embed() @ basis.mT @ basis


def _regress(g: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions of the noise, ``(R, D)``, and L along them, ``(N, D, R)``."""
    count = min(len(noise) - 1, noise.shape[1])
    left, sizes, basis = torch.linalg.svd(noise, full_matrices=False)
    return basis[:count], -g.mT @ (left[:, :count] / sizes[:count])


def _take_turns(particles: int, like: Tensor) -> tuple[int, Iterator[Tensor]]:
    """How many sets of at most K draws make a turn, which shows all directions, and sets without end, ``(K, D)`` each.

    Draws are standard normal, and those of a set have a mean of zero. Where they are not more than dimensions, they are
    the corners of a simplex, and sets of a turn are orthogonal, but for what the last shares with the one before it.
    """
    dim, options = like.shape[1], {"dtype": like.dtype, "device": like.device}
    num_sets = -(-dim // (particles - 1))
    width = -(-dim // num_sets)
    corners = torch.linalg.svd(torch.ones(1, width + 1, **options)).Vh[1:].mT * (1 + 1 / width) ** 0.5  # of length 1

    def draw() -> Iterator[Tensor]:
        while num_sets == 1:
            noise = torch.randn(particles, dim, **options)
            yield (noise - noise.mean(0)) * (particles / (particles - 1)) ** 0.5
        while True:
            rotation = torch.linalg.qr(torch.randn(dim, dim, **options)).Q
            for i in range(num_sets):
                begin = min(i * width, dim - width)
                yield torch.randn(dim, **options).norm() * corners @ rotation[begin : begin + width]

    return num_sets, draw()


def _widen(state: _State) -> Tensor:
    """The factor, wider by ``_WIDER E[gg'] / |E[gg']|^(1/2)`` in units of itself."""
    size = torch.linalg.matrix_norm(state.misfit).clamp(min=1e-30)[:, None, None]
    wider = _WIDER * state.misfit / size.sqrt()
    return state.factor + state.factor @ wider / (1 + _WIDER * size.sqrt())
