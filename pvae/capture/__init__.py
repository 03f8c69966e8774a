"""A function that runs Pyro, kept as the tensor programs that it wrote."""

from pvae.capture.captured import Captured, pays
from pvae.capture.guards import foreign, same
from pvae.capture.rewriting import use_onednn

__all__ = ["Captured", "foreign", "pays", "same", "use_onednn"]
