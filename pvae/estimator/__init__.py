"""VAEs for scikit-learn. Importing this loads scikit-learn, so ``import pvae`` does not: ``pvae.estimator`` does."""

from pvae.estimator.density import VAEDensity

__all__ = ["VAEDensity"]
