"""Stochastic variational inference for any Pyro pair."""

from pvae.svi.compiled_svi import CompiledSVI
from pvae.svi.fitting import FitResult, fit

__all__ = ["CompiledSVI", "FitResult", "fit"]
