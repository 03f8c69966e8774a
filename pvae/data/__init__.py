"""Arrays, streams and batches, for training and for evidence."""

from pvae.data.arrays import Array, Data, as_tensors, check_shape, fingerprint, kind, named_shape
from pvae.data.batches import Batches, InMemory, Rows, Transform, as_source, make_batches

__all__ = [
    "Array",
    "Batches",
    "Data",
    "InMemory",
    "Rows",
    "Transform",
    "as_source",
    "as_tensors",
    "check_shape",
    "fingerprint",
    "kind",
    "make_batches",
    "named_shape",
]
