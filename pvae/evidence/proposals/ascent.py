"""A Gaussian fitted to each datum by natural gradients of its ELBO, from few evaluations of the slope.

In coordinates e in which q is standard normal, ``g(e) = d [log p(x, u) - log q(u)] / de`` is 0 where q is the
posterior, and linear in e where that is another Gaussian. So g is regressed on e: the ELBO's gradient for the mean and
for the covariance follows from intercept and slope, and K draws show K directions of a Gaussian posterior without
noise. The draws of one step are orthogonal, and the same for all data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pvae.evidence.densities import Batch, Densities
from pvae.evidence.proposals.gaussians import Elliptical
from pvae.evidence.proposals.slopes import log_joint_and_slope

__all__ = ["climb"]

_FIRST_STEPS = 5  # before a datum may leave
_HALF = 10  # steps after which they are half as long
_MEMORY = 0.8  # of averages over steps
_NOTHING = 1e-3  # a divergence that is nearly none
_WIDER = 0.2  # how much of the misfit goes into the width


def climb(
    pair: Densities, batch: Batch, start: Elliptical, *, full: bool, steps: int, particles: int, lr: float
) -> tuple[Tensor, Tensor]:
    """Climbs to the Gaussian of the highest ELBO for each datum, and makes it wider where it does not fit.

    A datum leaves when ``rate E|g|^2``, by which noise moves it, is below ``40 / steps`` and does not fall fast; below
    50 dimensions noise weighs more, and that is times ``(D / 50)^(1/2)``. The rate falls with the steps, and
    ``E|g|^2``, the Fisher divergence between q and the posterior, is 0 where q is exact.
    The Gaussian of the highest ELBO is too narrow where the posterior is none, so that its weights have heavy tails.
    ``E[g g']`` says in which directions. There a full covariance is made wider in the end; not where it is exact.

    Args:
        pair: The model.
        batch: N data.
        start: Where to begin.
        full: Whether the covariance is full, or along the axes of the start.
        steps: The most steps that a datum takes.
        particles: Draws for each datum and step; at least 2 are taken.
        lr: Length of the first step; 1 is Newton's where the posterior is Gaussian.

    Returns:
        Mean ``(N, D)`` and lower triangular factor ``(N, D, D)`` of the covariance.
    """
    loc, factor = start.loc.clone(), start.factor.clone()
    rows = torch.arange(len(loc), device=loc.device)
    state = _State(loc, factor, torch.zeros_like(factor), *loc.new_full((2, len(loc)), torch.inf))
    enough = min(1.0, (loc.shape[1] / 50) ** 0.5) * 40 / steps
    for step in range(steps):
        rate = lr / (1 + step / _HALF)
        state = _step(pair, batch, state, _orthogonal_noise(max(2, particles), loc), rate, full, len(loc))
        left = _gains(state, rate, enough) | (step < _FIRST_STEPS)
        left &= step < steps - 1
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
        misfit: About ``E[g g']``, averaged over steps, ``(N, D, D)``.
        divergence: About ``E|g|^2``, averaged likewise, ``(N,)``.
        last: That of the last step alone.
    """

    loc: Tensor
    factor: Tensor
    misfit: Tensor
    divergence: Tensor
    last: Tensor


def _gains(state: _State, rate: float, enough: float) -> Tensor:
    """Whether data gain by more steps: their divergence is large, or still falls by half from its average."""
    falls = (state.last < state.divergence / 2) & (state.divergence > _NOTHING)
    return (rate * state.divergence > enough) | falls | ~state.divergence.isfinite()


def _step(
    pair: Densities, batch: Batch, state: _State, noise: Tensor, rate: float, full: bool, num_data: int
) -> _State:
    """A natural-gradient step for those left of N data, with the same noise ``(K, D)``; where slopes are nan, none."""
    u = state.loc + torch.einsum("nij,kj->kni", state.factor, noise)
    _, slope = log_joint_and_slope(pair, batch, u, num_data)
    g = torch.einsum("nji,knj->nki", state.factor, slope) + noise
    centred = noise - noise.mean(0)
    dual = torch.linalg.pinv(centred, rtol=1e-4)
    linear = torch.einsum("nki,jk->nij", g - g.mean(1, keepdim=True), dual)
    shift = g.mean(1) - linear @ noise.mean(0)
    # g shows a symmetric matrix along the directions of the noise: the rows of it, then also the columns.
    seen = dual @ centred
    change = rate / 2 * (linear + linear.mT - seen @ (linear + linear.mT) / 2 @ seen)
    if not full:
        change = change.diagonal(dim1=-2, dim2=-1).diag_embed()
    change = change / (1 + 2 * _largest(change, noise[0]))[:, None, None]  # of no direction by more than a half
    move = shift + (change @ shift[..., None])[..., 0]
    move = rate * (move + (change @ move[..., None])[..., 0])
    move = move / (1 + move.norm(dim=1, keepdim=True) / 2)
    misfit, divergence = g.mT @ g / g.shape[1], g.square().sum(-1).mean(1)
    memory = torch.where(state.divergence.isfinite(), _MEMORY, 0.0).to(g)  # none before the first step
    new = _State(
        state.loc + (state.factor @ move[..., None])[..., 0],
        state.factor + state.factor @ change,
        torch.lerp(misfit, state.misfit, memory[:, None, None]),
        torch.lerp(divergence, state.divergence.nan_to_num(posinf=0.0), memory),
        divergence,
    )
    fine = torch.stack([t.flatten(1).isfinite().all(1) for t in new[:3]]).all(0)
    return _State(*(torch.where(fine.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(new, state, strict=True)))


def _orthogonal_noise(particles: int, like: Tensor) -> Tensor:
    """K standard normal draws, ``(K, D)``, orthogonal to each other where there are not more than dimensions."""
    dim = like.shape[1]
    noise = torch.randn(particles, dim, dtype=like.dtype, device=like.device)
    if particles > dim:
        return noise
    return torch.linalg.qr(noise.mT).Q.mT * noise.norm(dim=1, keepdim=True)


def _largest(matrix: Tensor, vector: Tensor) -> Tensor:
    """About the largest absolute eigenvalue of symmetric matrices, ``(N,)``, by a few powers."""
    product = matrix @ vector
    for _ in range(3):
        product = product / product.norm(dim=1, keepdim=True).clamp(min=1e-30)
        product = (matrix @ product[..., None])[..., 0]
    return product.norm(dim=1)


def _widen(state: _State) -> Tensor:
    """The factor, wider by ``_WIDER E[gg'] / |E[gg']|^(1/2)`` in units of itself."""
    size = torch.linalg.matrix_norm(state.misfit).clamp(min=1e-30)[:, None, None]
    wider = _WIDER * state.misfit / size.sqrt()
    return state.factor + state.factor @ wider / (1 + _WIDER * size.sqrt())
