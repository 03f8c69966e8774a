"""One web page to play with: a map of the latent space, and how log p(x) of a datum is found by prior and guide."""

from pvae.explorer.writing import write_explorer

__all__ = ["write_explorer"]
