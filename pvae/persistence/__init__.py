"""Folders of files that are complete or count as absent, and modules as data, and back."""

from pvae.persistence.bounds import try_run
from pvae.persistence.saving import check_free, pack_module, unpack_module, write_packed
from pvae.persistence.serialization import (
    json_from_bytes,
    state_from_bytes,
    state_to_bytes,
    tensors_from_bytes,
    tensors_to_bytes,
)
from pvae.persistence.storage import (
    DamagedError,
    append_to_file,
    check_writable,
    holds_files,
    lock_folder,
    read_files,
    remove_files,
    versions,
    write_file,
    write_files,
)

__all__ = [
    "DamagedError",
    "append_to_file",
    "check_free",
    "check_writable",
    "holds_files",
    "json_from_bytes",
    "lock_folder",
    "pack_module",
    "read_files",
    "remove_files",
    "state_from_bytes",
    "state_to_bytes",
    "tensors_from_bytes",
    "tensors_to_bytes",
    "try_run",
    "unpack_module",
    "versions",
    "write_file",
    "write_files",
    "write_packed",
]
