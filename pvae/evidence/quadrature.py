"""Adaptive Gauss-Hermite quadrature: log p(x) without sampling, for models whose latent has 1 to 3 dimensions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pvae.data import Data
from pvae.errors import ArgumentError, ProgramError, positive_int
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.evaluation import name_batch, open_evaluation, place_evaluation
from pvae.evidence.proposals.gaussians import Elliptical
from pvae.evidence.proposals.local import Laplace
from pvae.evidence.proposals.slopes import log_joint
from pvae.runtime import Program, in_turn

__all__ = ["QuadratureEstimate", "gauss_hermite"]

_MAX_DIM = 3
_PAIRS = 2**13  # of a node and a datum to evaluate at once


@dataclass(frozen=True, eq=False, repr=False)
class QuadratureEstimate:
    """log p(x) of N data by a rule of n nodes in each dimension. All tensors are float64, on the CPU.

    Attributes:
        log_px: Nats per datum, shape ``(N,)``.
        error: How far a rule of half as many nodes is from it, nats, shape ``(N,)``; the error itself is far smaller
            where the posterior is smooth and has one mode.
        num_nodes: In each dimension.
    """

    log_px: Tensor
    error: Tensor
    num_nodes: int

    @property
    def mean(self) -> float:
        """Mean of `log_px` over the data, nats per datum."""
        return self.log_px.mean().item()

    def __repr__(self) -> str:
        return (
            f"log p(x) of {len(self.log_px)} data by quadrature, {self.num_nodes} nodes in each dimension\n"
            f"  mean   {self.mean:10.3f} nats per datum\n"
            f"  error  {self.error.max().item():10.1e} (largest; distance to the rule of half as many nodes)"
        )


@in_turn
def gauss_hermite(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_nodes: int = 32,
    device: str | torch.device = "auto",
) -> QuadratureEstimate:
    """Computes log p(x) for each datum by adaptive Gauss-Hermite quadrature, for latents of 1 to 3 dimensions.

    ``p(x) = int p(x, u) du``, in the coordinates ``u = u* + sqrt(2) L t`` around the posterior's mode ``u*``, with
    ``L L'`` the inverse of its curvature, by the product rule with n Gauss-Hermite nodes t in each dimension. Exact
    for Gaussian posteriors; see ``error`` for others. It covers ``sqrt(4 n)`` standard deviations to each side of the
    mode; a second mode farther away is not seen.

    Args:
        model: The generative program.
        guide: The recognition program; the search for the mode begins at its mean.
        data: As for `pvae.log_evidence`.
        num_nodes: ``n``, in each dimension; even.
        device: As for `pvae.log_evidence`.

    Returns:
        A `QuadratureEstimate`.

    Raises:
        ProgramError: The latents have more than 3 dimensions, or are discrete; or as by `pvae.log_evidence`.

    Source: Liu and Pierce, 1994, A Note on Gauss-Hermite Quadrature.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> found = pvae.evidence.gauss_hermite(pair.model, pair.guide, x)
        >>> (found.log_px - pair.log_px(x)).abs().max().item() < 1e-6
        True
    """
    if positive_int("num_nodes", num_nodes) % 2:
        raise ArgumentError(f"num_nodes must be even, as the error is taken from half of them; got {num_nodes}.")
    pair, batches = place_evaluation(model, guide, data, seed=0, device=device)
    with open_evaluation(pair, batches, seed=0) as evaluation:
        densities, parts = evaluation.densities, []
        if refusal := densities.space.refusal:
            raise ProgramError(f"{refusal}, and quadrature is over real numbers. Use pvae.log_evidence.")
        dim = densities.space.dim
        if dim > _MAX_DIM:
            raise ProgramError(
                f"quadrature is for latents of up to {_MAX_DIM} dimensions, these have {dim}: a rule of {num_nodes} "
                f"nodes in each would need {num_nodes}^{dim} of them. Use pvae.log_evidence."
            )
        size = max(1, min(256, 2**22 // densities.entries))
        for _, block in evaluation.blocks():
            for rows in torch.arange(block.num_data).split(size):
                with name_batch(block, rows):
                    parts.append(_integrate(densities, block.take(rows), num_nodes))
    log_px, error = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuadratureEstimate(log_px, error, num_nodes)


def _integrate(densities: Densities, batch: Batch, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Log p(x) by the rule, and how far that of half as many nodes is from it, each of shape ``(N,)``."""
    around = Laplace().gaussian(densities, batch)
    fine, coarse = (_apply_rule(densities, batch, around, n) for n in (num_nodes, num_nodes // 2))
    return fine.cpu(), (fine - coarse).abs().cpu()


def _apply_rule(densities: Densities, batch: Batch, around: Elliptical, num_nodes: int) -> Tensor:
    """``log sum_t w_t exp(t't) p(x, u_t) |sqrt(2) L|``, shape ``(N,)``."""
    nodes, weights = np.polynomial.hermite.hermgauss(num_nodes)
    dim = around.loc.shape[1]
    t = torch.tensor(list(itertools.product(nodes, repeat=dim)), dtype=torch.float64, device=around.loc.device)
    # Far out a weight underflows; its node is left out, and contributes nothing.
    log_w = torch.tensor(list(itertools.product(weights, repeat=dim)), dtype=torch.float64).log().sum(-1).to(t.device)
    chunks, size = [], max(1, _PAIRS // len(batch[0]))
    for part, log_weight in zip(t.split(size), log_w.split(size), strict=True):
        e = (math.sqrt(2) * part[:, None]).expand(-1, len(batch[0]), -1).to(around.loc)
        joint = log_joint(densities, batch, around.place(e))
        chunks.append((joint + (log_weight + part.square().sum(-1))[:, None]).logsumexp(0))
    return torch.stack(chunks).logsumexp(0) + around.log_scale + dim / 2 * math.log(2)
