"""Folders of files that are complete or count as absent: written so that no crash can spoil what was there.

Each file is written to a temporary name, flushed to the disk, and renamed. The manifest, which names the files with
their SHA-256, comes last, so that a set of files is in force as a whole or not at all. A set that replaces another
takes other file names until the new manifest is in place. Reading verifies everything before it returns anything.

Only regular files are read, never more of them than the manifest tells, and no link is followed to one. Only what a
manifest names is removed: that of a set which is being written or removed lies beside it under a temporary name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from pvae.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "DamagedError",
    "append_to_file",
    "check_writable",
    "holds_files",
    "lock_folder",
    "read_files",
    "remove_files",
    "versions",
    "write_file",
    "write_files",
]

SCHEMA = 1
"""The newest arrangement of files and of what is in them that this version reads, and the one that it writes."""

MANIFEST = "manifest.json"

_MAX_MANIFEST_BYTES = 1 << 20
_SMALL = 64 << 20
_PACKAGES = ("pvae", "torch", "pyro-ppl", "numpy", "safetensors")


class DamagedError(CheckpointError):
    """A set of files that is incomplete, or not as it was written."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run gives."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a set of files with its manifest into a folder, in place of one that is there.

    Args:
        folder: Made where it does not exist.
        files: Contents by name.

    Raises:
        CheckpointError: It cannot be written. What was in force before still is.
    """
    with _explain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        entries = {}
        for name, content in files.items():
            digest, file = hashlib.sha256(content).hexdigest(), name
            if os.path.lexists(folder / name):  # of the set in force, or somebody else's
                file = f"{Path(name).stem}-{digest[:12]}{Path(name).suffix}"
            entries[name] = {"file": file, "bytes": len(content), "sha256": digest}
        manifest: dict[str, Any] = {"schema": SCHEMA, "versions": versions(), "files": entries}
        manifest["sha256"] = _digest_of(manifest)
        try:
            temporary = _write_temporary(folder / MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n")
            for name, content in files.items():
                _put(folder / entries[name]["file"], content)
            _flush_folder(folder)  # the files' names, before the one that tells of them
            _flush_folder(folder.parent)
            if _files_of(folder):
                _write_temporary(
                    folder / MANIFEST, _read_manifest_bytes(folder / MANIFEST) or b""
                )  # it names what goes
            os.replace(temporary, folder / MANIFEST)
            _flush_folder(folder)
        finally:
            with suppress(OSError):
                _tidy(folder, files)


def read_files(folder: Path) -> dict[str, bytes]:
    """Reads and verifies the set of files in a folder; returns their contents by name.

    Raises:
        DamagedError: A file is missing, cut short or altered.
        CheckpointError: There is no such folder, it cannot be read, or a newer version of pvae wrote it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder that was saved: there is none of that name.")
    with _explain_errors(folder):
        while True:
            before = _read_manifest_bytes(folder / MANIFEST)
            try:
                return _read_verified(folder)
            except DamagedError:
                if _read_manifest_bytes(folder / MANIFEST) == before:
                    raise  # else another process replaced the set meanwhile


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes a set of files of such names, whole or not, and its folder; what else is there stays, and so do links."""
    with suppress(OSError):
        if folder.is_symlink():
            return
        if _files_of(folder):
            os.replace(folder / MANIFEST, _temporary_path(folder / MANIFEST))  # what is left is no set
        _tidy(folder, names)
        folder.rmdir()


def holds_files(folder: Path) -> bool:
    """Whether there is a set of files in force, damaged or not."""
    return os.path.lexists(folder / MANIFEST)


def write_file(path: Path, content: bytes) -> None:
    """Writes one file so that it has the old content or the new one, whatever happens."""
    with _explain_errors(path.parent):
        _put(path, content)
        _flush_folder(path.parent)


def append_to_file(path: Path, content: bytes) -> None:
    """Adds to the end of a file, on the disk."""
    with _explain_errors(path.parent), _open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put(path: Path, content: bytes) -> None:
    temporary = _write_temporary(path, content)
    try:
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _write_temporary(path: Path, content: bytes) -> Path:
    """Writes what is to be a file under a temporary name; returns that path."""
    temporary = _temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def _temporary_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")


def check_writable(folder: Path) -> None:
    """Raises `CheckpointError` where no file can be written."""
    with _explain_errors(folder):
        probe = folder / f".probe{_TEMPORARY}"
        write_file(probe, b"")
        probe.unlink()


@contextmanager
def lock_folder(folder: Path, what: str) -> Iterator[None]:
    """A block that no other process is in for the same folder; a process that dies leaves it free.

    Raises:
        CheckpointError: Another process is in it, or the folder cannot be written.
    """
    with _explain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _open(folder / ".lock", "a+b")  # held open through the block
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


def _read_verified(folder: Path) -> dict[str, bytes]:
    """Reads a set of files, if all are as they were written: sizes first, then contents."""
    entries = _read_manifest(folder)["files"]
    paths = {name: folder / entry["file"] for name, entry in entries.items()}
    size = sum(entry["bytes"] for entry in entries.values())
    on_disk = 0
    for name, entry in entries.items():
        with _open_to_read(paths[name]) as file:
            found = os.fstat(file.fileno()).st_size
            if found != entry["bytes"]:
                raise DamagedError(f"{paths[name]} has {found} bytes, and had {entry['bytes']} when it was written.")
            on_disk += _bytes_on_disk(file.fileno(), found) if size > _SMALL else found
    if 8 * on_disk < size:
        raise DamagedError(f"{folder} holds {size} bytes, and all but {on_disk} of them are holes in its files.")
    contents = {}
    for name, entry in entries.items():
        with _open_to_read(paths[name]) as file:
            contents[name] = file.read(entry["bytes"])
        if hashlib.sha256(contents[name]).hexdigest() != entry["sha256"]:
            raise DamagedError(f"{paths[name]} is not as it was written: its SHA-256 is another.")
    return contents


def _open_to_read(path: Path) -> IO[bytes]:
    """Opens a regular file and nothing else."""
    try:
        return _open(path, "rb")
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing.") from None


def _open(path: Path, mode: str) -> IO[bytes]:
    """Opens a regular file: a pipe would wait, a device has no end, and a link leads elsewhere."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)

    special = (
        f"{path} is a link, a pipe, a folder or the like, and has to be a regular file. Put the file itself there."
    )
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):  # to open a device may already do something
            raise DamagedError(special)
    file = open(path, mode, opener=opener)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedError(special)
    return file


def _bytes_on_disk(descriptor: int, size: int) -> int:
    """Bytes of a file that are on the disk. Holes read as zeros, and anybody can make a file that is nothing else."""
    found = end = 0
    if not hasattr(os, "SEEK_DATA"):
        return size
    while end < size:
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            return found if error.errno == errno.ENXIO else size  # no more data, or not a system that tells
        found += end - begin
    return found


def _read_manifest_bytes(path: Path) -> bytes | None:
    """Reads no more than a manifest can have; ``None`` where there is none."""
    try:
        with _open(path, "rb") as file:
            return file.read(_MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None


def _read_manifest(folder: Path) -> dict[str, Any]:
    content = _read_manifest_bytes(folder / MANIFEST)
    if content is None:
        raise DamagedError(f"{folder} is incomplete: it has no {MANIFEST}, which is written last.")
    return _parse_manifest(content, folder / MANIFEST)


def _parse_manifest(content: bytes, path: Path) -> dict[str, Any]:
    manifest, schema, made_by = {}, 0, {}
    try:
        manifest = json.loads(content)
        digest = manifest.pop("sha256")
        schema, files, made_by = manifest["schema"], manifest["files"], manifest["versions"]
        whole = digest == _digest_of(manifest) and type(schema) is int and isinstance(made_by, dict)
        whole = whole and all(_is_entry(name, entry) for name, entry in files.items())
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(f"{path} is not as it was written.")
    if schema > SCHEMA:
        now = versions()
        differences = [f"{name} {v} (here {now.get(name, 'none')})" for name, v in made_by.items()]
        raise CheckpointError(
            f"{path.parent} has schema {schema}, and this version of pvae reads up to {SCHEMA}. It was written by "
            f"{', '.join(differences)}. Update pvae to read it."
        )
    return manifest


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_entry(name: str, entry: Any) -> bool:
    """Whether a manifest's entry could have been written here; a name that leads out of the folder could not."""
    path = Path(name)
    inside = path.name == name and name not in ("", "..", MANIFEST) and "\0" not in name
    named = re.fullmatch(f"{re.escape(path.stem)}(-[0-9a-f]{{12}})?{re.escape(path.suffix)}", entry["file"])
    return inside and bool(named) and type(entry["bytes"]) is int and entry["bytes"] >= 0 and "sha256" in entry


def _files_of(folder: Path) -> set[str]:
    """Names of the files of the set in force."""
    with suppress(CheckpointError):
        return {entry["file"] for entry in _read_manifest(folder)["files"].values()}
    return set()


def _tidy(folder: Path, names: Iterable[str]) -> None:
    """Removes the files of manifests that are not in force: of sets unfinished, replaced or to be removed."""
    in_force, names = _files_of(folder), set(names)
    candidates = {*names, *in_force}
    for journal in _find_unfinished(folder, MANIFEST):
        entries = {}
        with suppress(CheckpointError):
            entries = _parse_manifest(_read_manifest_bytes(journal) or b"", journal)["files"]
        for file in (entry["file"] for name, entry in entries.items() if name in names):
            candidates.add(file)
            path = folder / file
            if file not in in_force and not path.is_symlink() and path.is_file():
                path.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
    for left in (path for file in candidates for path in _find_unfinished(folder, file)):
        left.unlink(missing_ok=True)


def _find_unfinished(folder: Path, name: str) -> list[Path]:
    """Finds temporary files that were to become one of some name."""
    pattern = re.compile(f"{re.escape(name)}\\.[0-9a-f]{{8}}{re.escape(_TEMPORARY)}")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    return [path for path in found if not path.is_symlink() and path.is_file()]


def _flush_folder(folder: Path) -> None:
    """Makes a rename last; not every system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _explain_errors(folder: Path) -> Iterator[None]:
    """A block whose `OSError` becomes a `CheckpointError` that says what to do."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be used: {error}. Check the path, its permissions and the space on its disk."
        ) from error
