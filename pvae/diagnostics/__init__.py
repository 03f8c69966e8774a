"""What a trained pair is made of: its ELBO, its guide and its codes, and how it does beside others."""

from pvae.diagnostics.calibration import Calibration, simulation_based_calibration
from pvae.diagnostics.codes import (
    Coverage,
    SideBySide,
    classification,
    coverage,
    interpolate,
    retrieval,
    side_by_side,
)
from pvae.diagnostics.inference_gaps import Gaps, gaps
from pvae.diagnostics.models import ModelTable, compare_models
from pvae.diagnostics.novelty import OutOfDistribution, out_of_distribution
from pvae.diagnostics.rates import RateDistortion, rate_distortion
from pvae.diagnostics.usage import LatentUsage, latent_usage

__all__ = [
    "Calibration",
    "Coverage",
    "Gaps",
    "LatentUsage",
    "ModelTable",
    "OutOfDistribution",
    "RateDistortion",
    "SideBySide",
    "classification",
    "compare_models",
    "coverage",
    "gaps",
    "interpolate",
    "latent_usage",
    "out_of_distribution",
    "rate_distortion",
    "retrieval",
    "side_by_side",
    "simulation_based_calibration",
]
