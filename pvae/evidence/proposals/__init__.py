"""Where importance samples come from: small objects that, for a batch of data, draw latents and give their density.

They combine: ``StudentT(Laplace(), df=5)`` is a Laplace approximation with heavier tails, ``Sobol(Guide())`` the guide
with evenly spread draws, ``Defensive(Refined())`` a refined guide with a share of the prior.
"""

from pvae.evidence.latents import Latents, LatentSpace
from pvae.evidence.proposals.annealing import Annealed
from pvae.evidence.proposals.base import Density, Gaussian, GivenGaussian, Guide, Prior, Proposal, Sampler
from pvae.evidence.proposals.combined import (
    FIT_INFLATION,
    WIDE_START,
    Defensive,
    Inflated,
    Sobol,
    StudentT,
    resolve,
)
from pvae.evidence.proposals.gaussians import Elliptical
from pvae.evidence.proposals.local import Laplace, Refined
from pvae.evidence.proposals.mixtures import Mixture

__all__ = [
    "FIT_INFLATION",
    "WIDE_START",
    "Annealed",
    "Defensive",
    "Density",
    "Elliptical",
    "Gaussian",
    "GivenGaussian",
    "Guide",
    "Inflated",
    "Laplace",
    "LatentSpace",
    "Latents",
    "Mixture",
    "Prior",
    "Proposal",
    "Refined",
    "Sampler",
    "Sobol",
    "StudentT",
    "resolve",
]
