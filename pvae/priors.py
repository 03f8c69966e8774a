"""p(z): modules whose ``forward()`` returns the prior over the latent, a distribution with event ``(D,)``."""

from __future__ import annotations

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pvae.errors import positive_int

__all__ = ["StandardNormal"]


class StandardNormal(nn.Module):
    """The standard normal prior, ``p(z) = Normal(z; 0, I)``.

    Args:
        latent_dim: ``D``, the number of latent dimensions.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = positive_int("latent_dim", latent_dim)
        # Buffers, so that the prior follows its model to another device or dtype.
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """Returns p(z), with batch shape ``()`` and event shape ``(D,)``."""
        return dist.Normal(self.loc, self.scale).to_event(1)
