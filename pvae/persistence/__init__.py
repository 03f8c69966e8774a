"""Folders of files that are complete or count as absent, and modules as data, and back."""

from pvae.persistence import saving, serialization, storage
from pvae.persistence.bounds import try_run

__all__ = ["saving", "serialization", "storage", "try_run"]
