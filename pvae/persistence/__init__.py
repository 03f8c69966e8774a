"""Folders of files that are complete or count as absent, and modules as data, and back."""

from pvae.persistence.bounds import tried

__all__ = ["tried"]
