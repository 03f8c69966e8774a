"""The ELBO in its two parts: what codes cost, and what they fail to tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.data import Data
from pvae.errors import ArgumentError
from pvae.evidence import Batch, Densities, EvidenceEstimate, draw_rates, map_batches
from pvae.runtime import Program

__all__ = ["RateDistortion", "rate_distortion"]


@dataclass(frozen=True, eq=False, repr=False)
class RateDistortion:
    """The ELBO of N data, split in two. All tensors are float64, on the CPU, of shape ``(N,)``, in nats per datum.

    Attributes:
        distortion: ``-E_q log p(x|z)``: how badly codes explain the datum.
        distortion_std_error: Its Monte Carlo standard error; nan for K = 1.
        rate: ``E_q[log q(z|x) - log p(z)] = KL(q(z|x) || p(z))``: how far codes are from the prior.
        rate_std_error: Its Monte Carlo standard error.
        elbo: ``-(distortion + rate)``.
        elbo_std_error: Its Monte Carlo standard error, of the same draws: not that of the sum of independent parts.
        num_samples: ``K``, draws for each datum.
        num_together: How many data have one ELBO together, so that N is 1; 0 where each datum has its own.
    """

    distortion: Tensor
    distortion_std_error: Tensor
    rate: Tensor
    rate_std_error: Tensor
    elbo: Tensor
    elbo_std_error: Tensor
    num_samples: int
    num_together: int = 0

    def posterior_kl(self, evidence: EvidenceEstimate) -> tuple[Tensor, Tensor]:
        """``KL(q(z|x) || p(z|x)) = log p(x) - ELBO``: what the guide loses against the posterior.

        Args:
            evidence: Of the same data, with the same model and draws of its own: another ``seed``.

        Returns:
            The divergences and their Monte Carlo standard errors, nats per datum, each of shape ``(N,)``. An estimate
            may be below 0 by its error; where ``evidence.unreliable`` it is low.

        Raises:
            ArgumentError: The estimate is of other data, by their number.
        """
        mine, theirs = (len(self.elbo), self.num_together), (evidence.num_data, evidence.num_together)
        if mine != theirs:
            raise ArgumentError(
                f"evidence is of {theirs[1] or theirs[0]} data{' together' * bool(theirs[1])}, and the ELBO of "
                f"{mine[1] or mine[0]}{' together' * bool(mine[1])}: pass pvae.log_evidence of the same data."
            )
        return evidence.corrected - self.elbo, torch.hypot(evidence.std_error, self.elbo_std_error)

    def __repr__(self) -> str:
        n = len(self.elbo)
        head = f"ELBO of {n} data, {self.num_samples} draws each: means, nats per datum"
        if self.num_together:
            head = f"ELBO of {self.num_together} data together, {self.num_samples} draws, nats"
        lines = [head]
        for name, sign in (("ELBO", ""), ("distortion", "-E log p(x|z)"), ("rate", "KL(q(z|x) || p(z))")):
            key = name.lower()
            value, error = getattr(self, key), getattr(self, f"{key}_std_error")
            data = f", {value.std().item() / n**0.5:.3f} from the choice of data" if n > 1 else ""
            lines.append(
                f"  {name:<11}{value.mean().item():10.3f} +- {error.norm().item() / n:.3f}{data}  {sign}".rstrip()
            )
        return "\n".join(lines)


def rate_distortion(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    device: str | torch.device = "auto",
) -> RateDistortion:
    """Splits the ELBO of each datum into distortion and rate.

    ``ELBO = E_q log p(x|z) - KL(q(z|x) || p(z)) = -distortion - rate``. The ELBO is the mean of K log-weights, which
    scatter less the nearer the guide is to the posterior. The rate is in closed form where torch has one, with an error
    of 0, else a mean over the same draws; distortion is what is left. Any Pyro pair: discrete latents that are marked
    for enumeration are summed out, and their divergence counts as distortion; where all data have latents together, N
    is 1.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        num_samples: ``K``, draws for each datum.
        seed: As for `pvae.log_evidence`.
        device: As for `pvae.log_evidence`.

    Returns:
        `RateDistortion`.

    Raises:
        PVAEError: As by `pvae.log_evidence`.

    Source: Alemi, Poole, Fischer, Dillon, Saurous and Murphy, 2018, Fixing a Broken ELBO; Hoffman and Johnson, 2016,
    ELBO Surgery.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> found = pvae.diagnostics.rate_distortion(pair.model, pair.guide, x)
        >>> bool(((-found.distortion - found.rate - found.elbo).abs() < 1e-6).all())
        True
    """

    def measure(densities: Densities, batch: Batch, spans: list[int]) -> tuple[Tensor, int]:
        parts = [torch.stack(draw_rates(densities, batch, span)).cpu() for span in spans]
        return torch.cat(parts, 1), densities.num_together

    found = map_batches(measure, model, guide, data, num_samples=num_samples, seed=seed, device=device)
    elbo, rate = torch.cat([terms for terms, _ in found], -1)
    columns = [column for values in (-elbo - rate, rate, elbo) for column in _mean_and_error(values)]
    return RateDistortion(*columns, num_samples=len(rate), num_together=found[0][1])


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each column, shape ``(K, N)``."""
    k = len(values)
    error = values.std(0) / k**0.5 if k > 1 else torch.full_like(values[0], torch.nan)
    return values.mean(0), error
