"""log p(x) as a function of the datum: the same number whichever other data it comes with, in whichever order.

scikit-learn asks that of a score. `pvae.log_evidence` draws noise for a batch as a whole, so that a datum's draws
depend on its place in there. Here they depend on its numbers and on the seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.evidence import MIN_ESS, STAGES, EvidenceEstimate, log_evidence
from pvae.evidence.proposals import (
    FIT_INFLATION,
    WIDE_START,
    Density,
    Elliptical,
    Gaussian,
    Guide,
    Inflated,
    Latents,
    Mixture,
    Proposal,
    Refined,
    Sampler,
)
from pvae.runtime import Program

__all__ = ["DrawsByDatum", "estimate_by_datum"]


class _Round(Gaussian):
    """A standard normal in the latents' unconstrained space: of a few dimensions it sees what others overlook."""

    @property
    def name(self) -> str:
        return "round"

    def gaussian(self, pair: Any, batch: Any) -> Elliptical:
        like = Guide().gaussian(pair, batch)
        eye = torch.eye(like.loc.shape[1], dtype=like.loc.dtype, device=like.loc.device)
        return replace(like, loc=torch.zeros_like(like.loc), factor=eye.expand_as(like.factor))


@dataclass(frozen=True)
class _Start(Gaussian):
    """Where fits of the default begin; the noise then is the same for any batch."""

    seed: int

    @property
    def name(self) -> str:
        return "start"

    def gaussian(self, pair: Any, batch: Any) -> Elliptical:
        start = WIDE_START.gaussian(pair, batch)
        torch.manual_seed(self.seed)  # inside of `log_evidence`, whose random numbers are its own
        return start


@dataclass(frozen=True)
class DrawsByDatum(Proposal):
    """A Gaussian fitted to each datum, with 5% of the guide and 5% of a standard normal mixed in; draws of its own.

    All data have the same points in the unit cube, each shifted by the datum's own vector, modulo 1. Of any two data
    the points are independent, over the choice of these vectors, so that errors average out over data as usual. A
    vector is a hash of the datum's numbers and the seed.

    Args:
        num_samples: Draws for each datum, as they will be asked for.
        seed: Of points, of vectors, and of the fits' noise.

    Source: for points that are shifted, Cranley and Patterson, 1976, Randomization of Number Theoretic Methods for
    Multiple Integration; for the rest see `pvae.evidence.proposals.Refined` and `pvae.evidence.proposals.Mixture`.
    """

    num_samples: int
    seed: int
    prepares = True

    @property
    def name(self) -> str:
        """What to call it in results."""
        return "fitted to the datum"

    @property
    def words(self) -> str:
        """The same for a reader."""
        return "a Gaussian fitted to each datum, with 5% of the guide and 5% of a standard normal"

    def count_evaluations(self, num_samples: int) -> int:
        """About how often the model is evaluated for each datum."""
        return Refined().count_evaluations(num_samples)

    def on(self, pair: Any, batch: Any) -> Sampler:
        """The proposal for the data of one batch."""
        fitted = Inflated(Refined(start=_Start(self.seed)), FIT_INFLATION)
        mixture: Any = Mixture((fitted, Guide(), _Round()), (0.9, 0.05, 0.05)).on(pair, batch)
        size = mixture.components[0].loc.shape[1] + 1
        points = torch.rand(
            self.num_samples, size, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed)
        )
        return _Shifted(pair, batch, mixture, points, _hash(batch[0], self.seed, size))


@dataclass(eq=False)
class _Shifted(Density):
    """Draws from a mixture of Gaussians by points that are given.

    Attributes:
        mixture: Its components and their shares.
        points: Uniform, shape ``(K, D + 1)``; the last number chooses the component.
        shifts: Each datum's, shape ``(N, D + 1)``.
        done: Points that were used.
    """

    mixture: Any
    points: Tensor
    shifts: Tensor
    done: int = 0

    def draw(self, num_samples: int) -> tuple[Latents, Tensor]:
        """Returns fresh draws and their log q, shape ``(K, N)``."""
        points = self.points[self.done : self.done + num_samples]
        self.done += num_samples
        uniform = (points[:, None] + self.shifts) % 1
        first, *others = self.mixture.components
        uniform = uniform.clamp(2**-54, 1 - 2**-53).to(first.loc.device)  # of 0 and 1 normal numbers are infinite
        normal, chosen, share = torch.special.ndtri(uniform[..., :-1]).to(first.loc), uniform[..., -1:], 0.0
        u = first.place(normal)
        for one, weight in zip(others, self.mixture.weights, strict=False):
            share += weight
            u = torch.where(chosen < share, u, one.place(normal))
        latents, _ = self.pair.space.unflatten(u)
        return latents, self.mixture.log_prob(latents)

    def log_prob(self, latents: Latents) -> Tensor:
        """Returns log q of any latents, shape ``(K, N)``."""
        return self.mixture.log_prob(latents)

    def restart(self) -> None:
        """Begins with the first point again."""
        self.done = 0


def _hash(x: Tensor, seed: int, size: int) -> Tensor:
    """Uniform numbers in [0, 1) that are a function of each datum and the seed, shape ``(N, size)``."""
    rows = x.detach().cpu().flatten(1).numpy() + 0.0  # -0.0 equals 0.0, and is hashed so
    salt = seed.to_bytes(8, "little")
    digests = b"".join(hashlib.shake_128(salt + row.tobytes()).digest(8 * size) for row in rows)
    numbers = np.frombuffer(digests, dtype="<u8").reshape(len(rows), size) >> np.uint64(11)
    return torch.from_numpy(numbers.astype(np.float64) * 2.0**-53)


def estimate_by_datum(
    model: Program, guide: Program, data: np.ndarray, *, num_samples: int, seed: int, **options: Any
) -> EvidenceEstimate:
    """Estimates log p(x) by `DrawsByDatum`, and where its weights will not do, by the default of `pvae.log_evidence`.

    The first is a function of the datum, the seed and ``num_samples``, up to rounding. Of the others, what is drawn
    depends on all of them; which they are does not.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: One array, ``(N, *event)``.
        num_samples: ``K``, draws for each datum.
        seed: As for `pvae.log_evidence`.
        options: Passed on to `pvae.log_evidence`.
    """
    options |= {"num_samples": num_samples, "seed": seed}
    own = log_evidence(model, guide, data, proposal=DrawsByDatum(num_samples, seed), **options)
    hard = (own.unreliable | ~(own.ess >= MIN_ESS)).nonzero()[:, 0]
    told = {
        "stage": torch.full((own.num_data,), STAGES.index("refined")),  # the nearest to this proposal
        "accepted": torch.ones(own.num_data, dtype=torch.float64),
        "khat": torch.full((own.num_data,), torch.nan, dtype=torch.float64),
    }
    sums, seconds = own.sums, own.seconds
    if len(hard):
        harder = log_evidence(model, guide, data[hard.numpy()], **options)
        for name, values in told.items():
            values[hard] = harder.diagnostics[name].to(values)
        sums, seconds = sums.put(hard, harder.sums), seconds + harder.seconds
    words = "a Gaussian fitted to the datum, or from what fits it better"
    return replace(own, sums=sums, seconds=seconds, proposal="auto", words=words, diagnostics=told)
