"""Stochastic variational inference for any Pyro pair."""

from pvae.svi import objectives, schedules
from pvae.svi.compiled_svi import CompiledSVI
from pvae.svi.fitting import fit
from pvae.svi.loading import load_checkpoint
from pvae.svi.results import FitResult

__all__ = ["CompiledSVI", "FitResult", "fit", "load_checkpoint", "objectives", "schedules"]
