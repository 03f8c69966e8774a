"""A function that runs Pyro, kept as the tensor programs that it wrote."""

from pvae.capture.captured import Captured, worth_compiling
from pvae.capture.guards import find_opaque, is_same
from pvae.capture.rewriting import use_onednn

__all__ = ["Captured", "find_opaque", "is_same", "use_onednn", "worth_compiling"]
