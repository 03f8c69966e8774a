"""q(z|x): modules whose ``forward(x)`` returns the recognition distribution over the latent, event ``(D,)``."""

from __future__ import annotations

from pyro import distributions as dist
from torch import Tensor, nn

from pvae.errors import ProgramError
from pvae.networks import Units, soft_clip

__all__ = ["DiagonalNormal"]


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
        output = self.network(x if self.units is None else self.units(x))
        if output.shape[-1] % 2:
            raise ProgramError(
                "DiagonalNormal needs a network with an even number of outputs, the mean and the log-scale of each "
                f"latent; this one gives {output.shape[-1]}. For D latents let it end in 2 * D outputs."
            )
        loc, log_scale = output.chunk(2, -1)
        return dist.Normal(loc, soft_clip(log_scale, self.max_log_scale).exp()).to_event(1)
