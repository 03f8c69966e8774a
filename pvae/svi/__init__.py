"""Stochastic variational inference for any Pyro pair."""

from pvae.svi.compiled_svi import CompiledSVI
from pvae.svi.fitting import fit
from pvae.svi.results import FitResult
from pvae.svi.resuming import load_checkpoint

__all__ = ["CompiledSVI", "FitResult", "fit", "load_checkpoint"]
