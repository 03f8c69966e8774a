"""New data from a pair, given those that were observed or none: posterior and prior predictive draws in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pvae.data import Data
from pvae.evidence.batchwise import map_batches
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.drawer import Drawer, Part, cat_parts, to_cpu
from pvae.evidence.posterior import WeightedDraws, choose_draws, warn_of_proposal_draws
from pvae.evidence.proposals import Prior, Proposal, resolve
from pvae.evidence.site_values import SiteValues
from pvae.runtime import Program, resolve_seed

__all__ = ["Predictive", "posterior_predictive", "prior_predictive"]


@dataclass(frozen=True, eq=False, repr=False)
class Predictive:
    """Draws of new data, with the latents that they come from. All tensors are on the CPU.

    Attributes:
        draws: What was drawn in the place of data, by observed site, shape ``(K, N, *plates, *event)``.
        latents: By site, shape ``(K, N, *plates, *event)``; where all data are one datum, N is 1 for latents.
        data: What the sites observe, shape ``(N, *plates, *event)``.
        plates: Names of the plates behind ``(K, N)``, by site.
        data_plate: The name of the plate over data, where all data are one datum and have one.
        seed: The seed used, also where ``seed=None`` asked for a fresh one.
        weighted: Of posterior predictive draws, the weighted draws that their latents were chosen from.
        chosen: Which of these, shape ``(K, N)``; ``None`` for prior predictive draws.
        is_resampled: For which data they were chosen by weight, so that they are of the posterior; for others they are
            the proposal's as drawn. Bool, shape ``(N,)``.
    """

    draws: Mapping[str, Tensor]
    latents: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    plates: Mapping[str, tuple[str, ...]]
    data_plate: str
    seed: int
    weighted: WeightedDraws | None = None
    chosen: Tensor | None = None
    is_resampled: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """``K``, draws for each datum."""
        return len(next(iter(self.draws.values())))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.draws.items())
        if self.weighted is None or self.is_resampled is None:
            return f"prior predictive draws of {shapes}"
        resampled = f"{int(self.is_resampled.sum())} of {len(self.is_resampled)} data resampled by weight"
        return f"posterior predictive draws of {shapes}, from {self.weighted.proposal}; {resampled}"


def posterior_predictive(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | Proposal | Program = "guide",
    resample: bool = True,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
) -> Predictive:
    """Draws new data for each datum, ``x' ~ p(x' | x) = E[p(x' | z)]`` with z from the posterior ``p(z | x)``.

    Draws of z come from a proposal, such as the guide, and are chosen by their importance weights; of a datum whose
    k-hat is above 0.7 they stay the proposal's, with a warning. The model is then run with what it observes drawn
    instead. The pair can be any Pyro programs, as for `pvae.log_evidence`. A datum's own latents stay with it: x' is
    another datum of the same z, and of the same discrete latents where these are summed out.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum. All are kept in memory.
        proposal: As for `weighted_draws`.
        resample: Whether to choose draws by their weights, where k-hat allows; otherwise ``z ~ q(z)``.
        seed: Same seed, same machine, same versions, same chunk size: same bits. ``None`` for a fresh one.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Returns:
        `Predictive`.

    Raises:
        ProgramError: A site's distribution draws another shape than the data that it observes; or as by
            `weighted_draws`.

    Source: Rubin, 1984, Bayesianly Justifiable and Relevant Frequency Calculations for the Applied Statistician.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> predictive = pvae.evidence.posterior_predictive(pair.model, pair.guide, x, num_samples=500)
        >>> predictive.draws["x"].shape
        torch.Size([500, 20, 5])
    """
    drawer = Drawer(resolve(proposal), seed=resolve_seed(seed))

    def draw(densities: Densities, batch: Batch, spans: list[int]) -> tuple[Part, ...]:
        sites = drawer.look_at(densities)
        weighted = drawer.draw(sites, batch, spans)
        chosen, resampled = choose_draws(weighted[0][""], resample=resample)
        latents = {name: value[chosen, torch.arange(chosen.shape[1])] for name, value in weighted[1].items()}
        return *weighted, {"chosen": chosen, "resampled": resampled[None]}, *_predict(sites, batch, spans, latents)

    options = {"num_samples": num_samples, "proposal": proposal, "device": device, "chunk_size": chunk_size}
    parts = cat_parts(map_batches(draw, model, guide, data, seed=drawer.seed, **options), 1)
    weighted, which = drawer.gather(parts[:3]), parts[3]
    if resample:
        warn_of_proposal_draws(weighted)
    return replace(
        _as_predictive(drawer, parts[4:]),
        weighted=weighted,
        chosen=which["chosen"],
        is_resampled=which["resampled"][0],
    )


def prior_predictive(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
) -> Predictive:
    """Draws new data from the model, ``z ~ p(z)`` and ``x' ~ p(x' | z)``, afresh for each datum.

    What the data are does not matter where the model only observes them; how many, and what else the model takes, such
    as labels or masks, does. Discrete latents that are marked for enumeration are drawn, too.

    Args:
        model: The generative program.
        guide: The recognition program; it tells what latents the pair has, and draws nothing.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum. All are kept in memory.
        seed: Same seed, same machine, same versions, same chunk size: same bits. ``None`` for a fresh one.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Returns:
        `Predictive`, without weights.

    Raises:
        ProgramError: As by `posterior_predictive`.

    Source: Box, 1980, Sampling and Bayes' Inference in Scientific Modelling and Robustness.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> predictive = pvae.evidence.prior_predictive(pair.model, pair.guide, x, num_samples=500)
        >>> predictive.draws["x"].shape
        torch.Size([500, 20, 5])
    """
    drawer = Drawer(Prior(), seed=resolve_seed(seed))

    def draw(densities: Densities, batch: Batch, spans: list[int]) -> tuple[Part, ...]:
        return _predict(drawer.look_at(densities), batch, spans)

    options = {"num_samples": num_samples, "device": device, "chunk_size": chunk_size}
    parts = map_batches(draw, model, guide, data, seed=drawer.seed, **options)
    return _as_predictive(drawer, cat_parts(parts, 1))


def _predict(
    sites: SiteValues, batch: Batch, spans: Sequence[int], latents: Mapping[str, Tensor] | None = None
) -> tuple[Part, ...]:
    """Draws in the place of a batch's data, their latents, and the data themselves, as one draw."""
    data, parts, first = sites.observe(batch), [], 0
    for span in spans:
        rows = slice(first, first + span)
        given = None if latents is None else {name: value[rows].to(batch[0].device) for name, value in latents.items()}
        parts.append(to_cpu(*(sites.trim(values) for values in sites.predict(batch, span, given))))
        first += span
    draws, latents = cat_parts(parts, 0)
    sites.check_prediction(draws, data)
    return draws, latents, *to_cpu({name: value[None] for name, value in data.items()})


def _as_predictive(drawer: Drawer, parts: Sequence[Part]) -> Predictive:
    draws, latents, data = parts
    sites = drawer.sites
    data_plate = sites.data_plate[1] if sites.data_plate else ""
    observed = {name: value[0] for name, value in data.items()}
    return Predictive(draws, latents, observed, sites.plates, data_plate, drawer.seed)
