"""Variational autoencoders as Pyro programs: trained by SVI, and measured by log p(x) with its error."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from pvae import (
    datasets,
    diagnostics,
    evidence,
    explorer,
    likelihoods,
    networks,
    plots,
    posteriors,
    priors,
    svi,
    testing,
)
from pvae.autoencoder import Autoencoder
from pvae.capture import use_onednn
from pvae.conditional import ConditionalVAE
from pvae.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    DatasetError,
    DeviceError,
    NumericalError,
    ProgramError,
    PVAEError,
    RankError,
)
from pvae.evidence import EvidenceEstimate, compare, log_evidence, log_weights
from pvae.hierarchical import HierarchicalVAE
from pvae.io_arviz import to_arviz
from pvae.masked import MaskedVAE
from pvae.semi_supervised import SemiSupervisedVAE
from pvae.svi import FitResult, fit, objectives, schedules
from pvae.vae import VAE

try:
    __version__ = version("pvae")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "VAE",
    "ArgumentError",
    "Autoencoder",
    "CheckpointError",
    "ConditionalVAE",
    "DataError",
    "DatasetError",
    "DeviceError",
    "EvidenceEstimate",
    "FitResult",
    "HierarchicalVAE",
    "MaskedVAE",
    "NumericalError",
    "PVAEError",
    "ProgramError",
    "RankError",
    "SemiSupervisedVAE",
    "compare",
    "datasets",
    "diagnostics",
    "evidence",
    "explorer",
    "fit",
    "likelihoods",
    "log_evidence",
    "log_weights",
    "networks",
    "objectives",
    "plots",
    "posteriors",
    "priors",
    "schedules",
    "svi",
    "testing",
    "to_arviz",
    "use_onednn",
]


def __getattr__(name: str) -> ModuleType:
    """Imports ``pvae.estimator`` where it is asked for: it takes scikit-learn."""
    if name == "estimator":
        return import_module("pvae.estimator")
    raise AttributeError(f"module 'pvae' has no attribute {name!r}")
