"""Proposals fitted to each datum by itself: the posterior's mode and curvature, and a Gaussian of the highest ELBO.

An encoder answers for all data at once and so for none exactly; both start from its answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pvae.errors import positive_int, real_number
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.proposals.ascent import climb
from pvae.evidence.proposals.base import Gaussian, Guide
from pvae.evidence.proposals.gaussians import Elliptical
from pvae.evidence.proposals.slopes import log_joint

__all__ = ["Laplace", "Refined", "find_mode"]

_PAIRS = 2**13  # of a particle and a datum to differentiate at once


@dataclass(frozen=True)
class Laplace(Gaussian):
    """The Gaussian at the posterior's mode with the curvature there: ``Normal(u*, (-d^2 log p(x, u) / du^2)^-1)``.

    The mode is found from the mean of ``start`` by Newton steps in unconstrained space. Full covariance. A narrow peak
    beside a broad mass, or a second mode, are not seen: wrap it in `pvae.evidence.proposals.StudentT` or
    `pvae.evidence.proposals.Defensive` for safety.

    Args:
        start: Where to begin.
        max_steps: Newton steps at most.

    Source: Tierney and Kadane, 1986, Accurate Approximations for Posterior Moments and Marginal Densities.
    """

    start: Gaussian = field(default_factory=Guide)
    max_steps: int = 30
    prepares = True

    def __post_init__(self) -> None:
        self.check("start", self.start)
        positive_int("max_steps", self.max_steps)

    @property
    def name(self) -> str:
        """What to call it in results."""
        return "laplace"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return "a Laplace approximation made for each datum"

    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """The approximation for each datum of a batch."""
        start = self.start.gaussian(pair, batch)
        mode, factor = find_mode(pair, batch, start.loc, self.max_steps)
        return Elliptical(pair.space, mode, factor)


@dataclass(frozen=True)
class Refined(Gaussian):
    """The Gaussian with the highest ELBO for each datum by itself, found from ``start``'s by natural gradients.

    It is a little wider in the directions in which the posterior is not Gaussian, since the ELBO makes it too narrow
    there for weights to be even. Data leave the batch when they have converged.

    Args:
        start: Where to begin, usually the encoder's answer.
        full: A full covariance; else means and scales only, along the axes of ``start``, which is the family of most
            encoders, but makes weights with heavier tails.
        steps: The most steps that a datum takes; most data need half of them.
        particles: Draws for each datum and step.
        lr: Length of the first step, in natural gradients; the later ones are shorter.

    Source: Hjelm et al., 2016, Iterative Refinement of the Approximate Posterior; Cremer, Li and Duvenaud, 2018,
    Inference Suboptimality in Variational Autoencoders; natural gradients as in Khan and Rue, 2023, The Bayesian
    Learning Rule, from the slope of log p - log q, so that a perfect start stays, as in Roeder, Wu and Duvenaud, 2017,
    Sticking the Landing; for fitting it by linear regression, Salimans and Knowles, 2013, Fixed-Form Variational
    Posterior Approximation through Stochastic Linear Regression.
    """

    start: Gaussian = field(default_factory=Guide)
    full: bool = True
    steps: int = 40
    particles: int = 16
    lr: float = 1.0
    prepares = True

    def __post_init__(self) -> None:
        self.check("start", self.start)
        positive_int("steps", self.steps)
        positive_int("particles", self.particles)
        real_number("lr", self.lr, above=0)

    @property
    def name(self) -> str:
        """What to call it in results."""
        return "refined"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return "a Gaussian fitted to each datum"

    def count_evaluations(self, num_samples: int) -> int:
        """About how often the model is evaluated for each datum and so many draws; a gradient counts as two more."""
        return num_samples + 3 * self.steps * self.particles

    def gaussian(self, pair: Densities, batch: Batch) -> Elliptical:
        """The refined Gaussian for each datum of a batch."""
        start = self.start.gaussian(pair, batch)
        loc, factor = climb(pair, batch, start, full=self.full, steps=self.steps, particles=self.particles, lr=self.lr)
        return replace(start, loc=loc, factor=factor, df=math.inf, sobol=None)


def find_mode(pair: Densities, batch: Batch, start: Tensor, max_steps: int = 30) -> tuple[Tensor, Tensor]:
    """Climbs to a mode of ``log p(x, u)`` for each datum, by damped Newton steps.

    Where the density is not log-concave the curvature's absolute value is used, so that steps lead away from saddles.

    Args:
        pair: The model.
        batch: N data.
        start: Where to begin, shape ``(N, D)``.
        max_steps: Steps at most; data that are done earlier rest.

    Returns:
        The mode, ``(N, D)``, and the Cholesky factor of the inverse of the negative Hessian there, ``(N, D, D)``.

    Source: Dauphin et al., 2014, Identifying and Attacking the Saddle Point Problem.
    """
    mode, factor = start.clone(), torch.zeros(*start.shape, start.shape[1]).to(start)
    active = torch.arange(len(start), device=start.device)
    enough = torch.finfo(start.dtype).eps ** 0.5  # nats that a step would gain
    fractions = 0.5 ** torch.arange(8, dtype=start.dtype, device=start.device)
    for step in range(max_steps + 1):
        rows = tuple(t[active] for t in batch)
        value, gradient, hessian = _curvature(pair, rows, mode[active])
        precision = _absolute(-hessian)
        factor[active] = torch.linalg.cholesky(torch.cholesky_inverse(precision)).to(start)
        move = torch.cholesky_solve(gradient[..., None].to(precision), precision)[..., 0].to(start)
        if step == max_steps:
            break
        tried = mode[active] + fractions[:, None, None] * move
        values = log_joint(pair, rows, tried)
        best, which = values.nan_to_num(-torch.inf).max(0)
        gains = (best > value) & ((gradient * move).sum(-1) / 2 > enough)
        mode[active[gains]] = tried[which, torch.arange(len(active), device=start.device)][gains]
        active = active[gains]
        if not len(active):
            break
    return mode, factor


def _curvature(pair: Densities, batch: Batch, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``(N,)``, gradient ``(N, D)`` and Hessian ``(N, D, D)`` of the log joint at u, shape ``(N, D)``."""
    dim = u.shape[1]
    parts = []
    size = max(1, _PAIRS // dim)
    for rows, batch_rows in zip(u.split(size), zip(*(t.split(size) for t in batch), strict=True), strict=True):
        with torch.enable_grad():
            # One copy of the data for each row of the Hessian, so that two backward passes give it all.
            copies = rows.detach().expand(dim, *rows.shape).clone().requires_grad_()
            value = log_joint(pair, batch_rows, copies)
            (gradient,) = torch.autograd.grad(value.sum(), copies, create_graph=True)
            own = gradient.diagonal(dim1=0, dim2=2)  # (N, D): entry d of copy d
            hessian = torch.zeros_like(gradient)
            if own.requires_grad:
                (second,) = torch.autograd.grad(own.sum(), copies, allow_unused=True)
                hessian = hessian if second is None else second
        parts.append((value[0].detach(), gradient[0].detach(), hessian.transpose(0, 1).detach()))
    value, gradient, hessian = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return value, gradient, (hessian + hessian.mT) / 2


def _absolute(matrix: Tensor) -> Tensor:
    """The Cholesky factor, in float64, of symmetric matrices with negative eigenvalues turned positive."""
    matrix = matrix.double()
    factor, failed = torch.linalg.cholesky_ex(matrix)
    bad = failed.nonzero()[:, 0]
    if len(bad):
        values, vectors = torch.linalg.eigh(matrix[bad])
        size = values.abs().amax(-1, keepdim=True)
        values = torch.maximum(values.abs(), (1e-4 * size).clamp(min=1e-6))
        factor[bad] = torch.linalg.cholesky(vectors @ values.diag_embed() @ vectors.mT)
    return factor
