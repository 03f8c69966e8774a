"""Stochastic variational inference for any Pyro pair."""

from pvae.svi.fitting import FitResult, fit

__all__ = ["FitResult", "fit"]
