"""`weighted_draws`: latents drawn and weighed, and kept."""

from __future__ import annotations

import torch

from pvae.data import Data
from pvae.evidence.batchwise import map_batches
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.drawer import Drawer, Part, cat_parts
from pvae.evidence.posterior import WeightedDraws
from pvae.evidence.proposals import Proposal, resolve
from pvae.runtime import Program, resolve_seed

__all__ = ["weighted_draws"]


def weighted_draws(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | Proposal | Program = "guide",
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
) -> WeightedDraws:
    """Draws latents from a proposal, ``z_k ~ q(z)``, and keeps them with their weights ``p(x, z_k) / q(z_k)``.

    The pair can be any Pyro programs, as for `pvae.log_evidence`: with several sites, latents outside of the data
    plate, or Pyro's automatic guides. Latents come in their own space, as the model sees them. Discrete ones that are
    marked for enumeration are summed out of the weights, and drawn from ``p(d | z, x)``. Nothing is trained, and the
    caller's state is left as it was.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum. All are kept in memory.
        proposal: As for `pvae.log_evidence`; one that has a density: neither ``"auto"`` nor ``"ais"``.
        seed: Same seed, same machine, same versions, same chunk size: same bits. ``None`` for a fresh one. From the
            guide, these are the draws of `pvae.log_weights`.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Returns:
        `WeightedDraws`.

    Raises:
        PVAEError: As by `pvae.log_evidence`; and an `ArgumentError` where the proposal keeps no draws with a density.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> draws = pvae.evidence.weighted_draws(pair.model, pair.guide, x, num_samples=500)
        >>> draws.latents["z"].shape
        torch.Size([500, 20, 2])
    """
    drawer = Drawer(resolve(proposal), seed=resolve_seed(seed))

    def draw(densities: Densities, batch: Batch, spans: list[int]) -> tuple[Part, ...]:
        return drawer.draw(drawer.look_at(densities), batch, spans)

    options = {"num_samples": num_samples, "proposal": proposal, "device": device, "chunk_size": chunk_size}
    parts = map_batches(draw, model, guide, data, seed=drawer.seed, **options)
    return drawer.gather(cat_parts(parts, 1))
