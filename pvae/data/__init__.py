"""Arrays, streams and batches, for training and for evidence."""

from pvae.data.arrays import Array, Data, as_tensors, check_shape, fingerprint, kind, named_shape
from pvae.data.batches import Batches, InMemory, Rows, Streamed, Transform
from pvae.data.streams import Stream, is_stream

__all__ = [
    "Array",
    "Batches",
    "Data",
    "InMemory",
    "Rows",
    "Stream",
    "Streamed",
    "Transform",
    "as_tensors",
    "check_shape",
    "fingerprint",
    "is_stream",
    "kind",
    "named_shape",
]
