"""Where the ELBO loses against log p(x): in the guide's family, or in its amortization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from pvae.data import Data
from pvae.errors import DataError
from pvae.evidence import EvidenceEstimate, log_evidence
from pvae.evidence.proposals import Guide, Proposal, Refined
from pvae.runtime import Program, in_turn, resolve_seed

__all__ = ["Gaps", "gaps"]


@dataclass(frozen=True, eq=False, repr=False)
class Gaps:
    """``log p(x) - ELBO`` of N data, split in two. All tensors are float64, on the CPU, in nats per datum.

    Attributes:
        evidence: The estimate of log p(x).
        refined: The best Gaussian for each datum; its ELBO is the best of its family, up to its optimization.
        guide: The guide; its ELBO is the model's.
    """

    evidence: EvidenceEstimate
    refined: EvidenceEstimate
    guide: EvidenceEstimate

    @property
    def approximation(self) -> Tensor:
        """``log p(x) - ELBO(q*)``: what no Gaussian of the family can reach, shape ``(N,)``."""
        return self.evidence.corrected - self.refined.elbo

    @property
    def approximation_std_error(self) -> Tensor:
        """Its Monte Carlo standard error, shape ``(N,)``; too small where ``evidence.unreliable``."""
        return (self.evidence.std_error.square() + self.refined.elbo_std_error.square()).sqrt()

    @property
    def amortization(self) -> Tensor:
        """``ELBO(q*) - ELBO(q)``: what one encoder for all data loses against a fit to each, shape ``(N,)``."""
        return self.refined.elbo - self.guide.elbo

    @property
    def amortization_std_error(self) -> Tensor:
        """Its Monte Carlo standard error, shape ``(N,)``."""
        return (self.refined.elbo_std_error.square() + self.guide.elbo_std_error.square()).sqrt()

    def __repr__(self) -> str:
        rows = (
            ("log p(x)", self.evidence.corrected, self.evidence.std_error),
            ("approximation", self.approximation, self.approximation_std_error),
            ("amortization", self.amortization, self.amortization_std_error),
            ("ELBO", self.guide.elbo, self.guide.elbo_std_error),
        )
        bad, together = int(self.evidence.unreliable.sum()), self.evidence.num_together
        what = f"{together} data together, nats" if together else f"{self.evidence.num_data} data, nats per datum"
        return "\n".join(
            [f"log p(x) - ELBO of {what}"]
            + [f"  {n:<14}{v.mean().item():10.3f} +- {e.norm().item() / len(e):.3f}" for n, v, e in rows]
            + [f"  log p(x) is unreliable for {together or bad} data: the approximation gap is a lower bound"]
            * bool(bad)
        )


@in_turn
def gaps(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    refined: Refined | None = None,
    proposal: str | Proposal | Program = "refined",
    seed: int | None = 0,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> Gaps:
    """Splits ``log p(x) - ELBO`` for each datum into an approximation gap and an amortization gap.

    ``log p(x) - ELBO(q) = [log p(x) - ELBO(q*)] + [ELBO(q*) - ELBO(q)]``, where q* is the best Gaussian of its family
    for that datum alone. A large approximation gap asks for a richer family, a large amortization gap for a larger
    encoder.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`; read three times, so a loader must not shuffle.
        num_samples: Draws for each datum and each of the three estimates.
        refined: How q* is found and of what family it is; ``Refined(full=False, steps=200)`` if left out, for guides
            with a diagonal covariance.
        proposal: For log p(x), as for `pvae.log_evidence`: a full covariance for each datum if left out.
        seed: As for `pvae.log_evidence`; the three estimates use ``seed``, ``seed + 1`` and ``seed + 2``.
        device: As for `pvae.log_evidence`.
        progress: Show bars on stderr, if that is a terminal.

    Returns:
        `Gaps`.

    Raises:
        DataError: A loader draws the data in another order each time.
        ProgramError: Latents are not continuous; or as by `pvae.log_evidence`.

    Source: Cremer, Li and Duvenaud, 2018, Inference Suboptimality in Variational Autoencoders.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> found = pvae.diagnostics.gaps(pair.model, pair.guide, x)
        >>> bool((found.approximation.abs() < 0.1).all())  # the posterior is Gaussian, and so is the guide
        True
    """
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise DataError(
            "data: the loader shuffles, and three estimates of each datum are held against each other. Pass "
            "shuffle=False, or the dataset."
        )
    best, seed = Refined(full=False, steps=200) if refined is None else refined, resolve_seed(seed)
    estimates = [
        log_evidence(
            model, guide, data, num_samples=num_samples, proposal=p, seed=seed + i, device=device, progress=progress
        )
        for i, p in enumerate((proposal, best, Guide()))
    ]
    return Gaps(*estimates)
