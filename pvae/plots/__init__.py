"""Results to matplotlib Axes. Nothing here trains or samples; every function draws what it is given and returns it."""

from pvae.plots.canvas import COLORS, subplots
from pvae.plots.checks import comparison, gap_decomposition, ranks
from pvae.plots.decoded import interpolation, manifold, traversals
from pvae.plots.latents import kl_per_dimension, latent_map, latent_plane
from pvae.plots.lecture import prior_against_guide
from pvae.plots.pictures import images, neighbors, reconstructions, samples
from pvae.plots.training import learning_curve
from pvae.plots.weights import reliability, running_estimate, weight_histogram

__all__ = [
    "COLORS",
    "comparison",
    "gap_decomposition",
    "images",
    "interpolation",
    "kl_per_dimension",
    "latent_map",
    "latent_plane",
    "learning_curve",
    "manifold",
    "neighbors",
    "prior_against_guide",
    "ranks",
    "reconstructions",
    "reliability",
    "running_estimate",
    "samples",
    "subplots",
    "traversals",
    "weight_histogram",
]
