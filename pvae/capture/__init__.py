"""A function that runs Pyro, kept as the tensor programs that it wrote."""

from pvae.capture.captured import Captured, worth_compiling
from pvae.capture.guards import find_opaque, is_same
from pvae.capture.in_place import InPlace
from pvae.capture.kept import is_compiled, keep, take_up
from pvae.capture.matrix_products import use_onednn
from pvae.capture.uncaptured import ChangedInPlace, CheaperArithmetic

__all__ = [
    "Captured",
    "ChangedInPlace",
    "CheaperArithmetic",
    "InPlace",
    "find_opaque",
    "is_compiled",
    "is_same",
    "keep",
    "take_up",
    "use_onednn",
    "worth_compiling",
]
