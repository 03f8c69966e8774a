"""Folders of files that are complete or count as absent: written so that no crash can spoil what was there.

Each file is written to a temporary name, flushed to the disk, and renamed. The manifest, which names the files with
their SHA-256, comes last, so that a set of files is in force as a whole or not at all. A set that replaces another
takes other file names until the new manifest is in place. Reading verifies everything before it returns anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pvae.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "DamagedError",
    "append",
    "check_writable",
    "exclusive",
    "holds_set",
    "own_files",
    "put",
    "read",
    "tensors_as_bytes",
    "versions",
    "write",
]

SCHEMA = 1
"""The newest arrangement of files and of what is in them that this version reads, and the one that it writes."""

MANIFEST = "manifest.json"

_PACKAGES = ("pvae", "torch", "pyro-ppl", "numpy", "safetensors")


class DamagedError(CheckpointError):
    """A set of files that is incomplete, or not as it was written."""


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what a run gives."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a set of files with its manifest into a folder, in place of one that is there.

    Args:
        folder: Made where it does not exist.
        files: Contents by name.

    Raises:
        CheckpointError: It cannot be written. What was in force before still is.
    """
    with _clearly(folder):
        folder.mkdir(parents=True, exist_ok=True)
        before = _files_of(folder)
        entries = {}
        for name, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            path = folder / name
            if path.exists():  # of the set in force, or somebody else's
                path = folder / f"{path.stem}-{digest[:12]}{path.suffix}"
            _put(path, content)
            entries[name] = {"file": path.name, "bytes": len(content), "sha256": digest}
        manifest: dict[str, Any] = {"schema": SCHEMA, "versions": versions(), "files": entries}
        manifest["sha256"] = _digest_of(manifest)
        _flush_folder(folder)  # the files' names, before the one that tells of them
        _flush_folder(folder.parent)
        put(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
        for name in before - {entry["file"] for entry in entries.values()}:
            (folder / name).unlink(missing_ok=True)
        for left in _left_behind(folder, entries):
            left.unlink(missing_ok=True)


def read(folder: Path) -> dict[str, bytes]:
    """The verified contents of the set of files in a folder, by name.

    Raises:
        DamagedError: A file is missing, cut short or altered.
        CheckpointError: There is no such folder, it cannot be read, or a newer version of pvae wrote it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder that was saved: there is none of that name.")
    with _clearly(folder):
        while True:
            before = _bytes_of_manifest(folder)
            try:
                return _verified(folder)
            except DamagedError:
                if _bytes_of_manifest(folder) == before:
                    raise  # else another process replaced the set meanwhile


def own_files(folder: Path, names: Iterable[str]) -> list[Path]:
    """The files in a folder that sets of such names, whole or not, have left there."""
    patterns = [MANIFEST, f"*{_TEMPORARY}"]
    patterns += [p for n in names for p in (n, f"{Path(n).stem}-{'[0-9a-f]' * 12}{Path(n).suffix}")]
    return [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]


def tensors_as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a file of safetensors. They are copied: of some that share memory it would write none."""
    return save({n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in tensors.items()})


def holds_set(folder: Path) -> bool:
    """Whether there is a set of files in force, damaged or not."""
    return (folder / MANIFEST).is_file()


def put(path: Path, content: bytes) -> None:
    """Writes one file so that it has the old content or the new one, whatever happens."""
    with _clearly(path.parent):
        _put(path, content)
        _flush_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Adds to the end of a file, on the disk."""
    with _clearly(path.parent), open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Raises `CheckpointError` where no file can be written."""
    with _clearly(folder):
        probe = folder / f".probe{_TEMPORARY}"
        put(probe, b"")
        probe.unlink()


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """A block that no other process is in for the same folder; a process that dies leaves it free.

    Raises:
        CheckpointError: Another process is in it, or the folder cannot be written.
    """
    with _clearly(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+b")  # noqa: SIM115 (held open through the block)
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder} is in use by another process, which {what}. Wait for it, or use another folder."
            ) from None
        except (ImportError, OSError):
            pass  # neither Windows nor every network file system has such locks
        yield


_TEMPORARY = ".part"


def _verified(folder: Path) -> dict[str, bytes]:
    contents = {}
    for name, entry in _manifest(folder)["files"].items():
        path = folder / entry["file"]
        try:
            content = contents[name] = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise DamagedError(f"{path} is missing.") from None
        if len(content) != entry["bytes"]:
            raise DamagedError(f"{path} has {len(content)} bytes, and had {entry['bytes']} when it was written.")
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DamagedError(f"{path} is not as it was written: its SHA-256 is another.")
    return contents


def _bytes_of_manifest(folder: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return (folder / MANIFEST).read_bytes()
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    content = _bytes_of_manifest(folder)
    if content is None:
        raise DamagedError(f"{folder} is incomplete: it has no {MANIFEST}, which is written last.")
    manifest, schema, made_by = {}, 0, {}
    try:
        manifest = json.loads(content)
        digest = manifest.pop("sha256")
        schema, files, made_by = manifest["schema"], manifest["files"], manifest["versions"]
        outside = [
            e for e in files.values() if Path(e["file"]).name != e["file"] or not {"bytes", "sha256"} <= e.keys()
        ]
        whole = digest == _digest_of(manifest) and isinstance(schema, int) and not outside and isinstance(made_by, dict)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{path} is not as it was written.")
    if schema > SCHEMA:
        now = versions()
        differences = [f"{name} {v} (here {now.get(name, 'none')})" for name, v in made_by.items()]
        raise CheckpointError(
            f"{folder} has schema {schema}, and this version of pvae reads up to {SCHEMA}. It was written by "
            f"{', '.join(differences)}. Update pvae to read it."
        )
    return manifest


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _left_behind(folder: Path, entries: Mapping[str, Any]) -> list[Path]:
    """What processes that were killed have left of sets like this one."""
    others = {
        path for name in entries for path in folder.glob(f"{Path(name).stem}-{'[0-9a-f]' * 12}{Path(name).suffix}")
    }
    return [*folder.glob(f"*{_TEMPORARY}"), *(others - {folder / entry["file"] for entry in entries.values()})]


def _files_of(folder: Path) -> set[str]:
    """The files of the set in force."""
    with suppress(CheckpointError):
        return {entry["file"] for entry in _manifest(folder)["files"].values()}
    return set()


def _flush_folder(folder: Path) -> None:
    """Makes a rename last; not every system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _clearly(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be used: {error}. Check the path, its permissions and the space on its disk."
        ) from error
