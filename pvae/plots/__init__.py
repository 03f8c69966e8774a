"""Results to matplotlib Axes. Nothing here trains or samples; every function draws what it is given and returns it."""

from pvae.plots.latents import latent_plane
from pvae.plots.pictures import images, reconstructions
from pvae.plots.training import learning_curve
from pvae.plots.weights import running_estimate, weight_histogram

__all__ = ["images", "latent_plane", "learning_curve", "reconstructions", "running_estimate", "weight_histogram"]
