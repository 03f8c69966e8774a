"""What a trained pair is made of: where the ELBO loses against log p(x), and what its codes are good for."""

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

__all__ = [
    "Coverage",
    "Gaps",
    "SideBySide",
    "classification",
    "coverage",
    "gaps",
    "interpolate",
    "retrieval",
    "side_by_side",
]
