"""Checkpoints of a run on disk: written so that one is always complete, verified before anything is taken from them.

A run's folder holds ``history.jsonl``, a line for each epoch, and a folder for each checkpoint that is kept: the last
two and the best. Each has the weights (safetensors), the training state (tensors and plain values), the history, the
configuration, and a manifest. Nothing is unpickled that could run code.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from pvae.data import kind
from pvae.errors import CheckpointError, first_line, warn
from pvae.persistence import (
    DamagedError,
    append_to_file,
    check_writable,
    holds_files,
    json_from_bytes,
    read_files,
    remove_files,
    state_from_bytes,
    state_to_bytes,
    tensors_from_bytes,
    tensors_to_bytes,
    write_file,
    write_files,
)
from pvae.svi.contents import check_contents

__all__ = ["Folder", "Saved", "check_plain", "check_weights"]

_NAME = re.compile(r"epoch-(\d{6,})(-step-(\d{7,}))?")
_HISTORY = "history.jsonl"
_KEPT = 2
_FILES = ("weights.safetensors", "training.pt", "history.json", "config.json")


@dataclass(frozen=True)
class Saved:
    """What is in a checkpoint.

    Attributes:
        weights: Parameters and buffers by name.
        training: The optimizer's state, the place in the data, random numbers.
        history: As in `FitResult`, as lists.
        config: What was asked for, and where it ran.
        folder: Where it is; none yet for one to be written.
    """

    weights: Mapping[str, Tensor]
    training: Mapping[str, Any]
    history: Mapping[str, list[float]]
    config: Mapping[str, Any]
    folder: Path | None = None

    @property
    def epoch(self) -> int:
        """Whole epochs that were done."""
        return self.training["epoch"]

    def differences(self, weights: Mapping[str, Tensor], arguments: Mapping[str, Any] | None = None) -> list[str]:
        """What is not as in another run: names and shapes of weights, and what it was called with."""
        ours, theirs = ({name: kind(t) for name, t in those.items()} for those in (self.weights, weights))
        found = [f"only in the checkpoint: {name} {ours[name]}" for name in ours.keys() - theirs.keys()]
        found += [f"not in the checkpoint: {name} {theirs[name]}" for name in theirs.keys() - ours.keys()]
        both = [name for name in ours if name in theirs and ours[name] != theirs[name]]
        found = sorted(found) + [f"{name} is {ours[name]} in the checkpoint and {theirs[name]} here" for name in both]
        given = self.config["arguments"]
        for name, value in (arguments or {}).items():
            if given.get(name) != value:
                found.append(f"{name} was {given.get(name)!r} and is {value!r} now")
        return found

    def warn_of_another_place(self, environment: Mapping[str, Any]) -> None:
        """Says so where a run cannot go on bit for bit, because machine, versions or the like are others."""
        before = self.config["environment"]
        changed = [f"{k} was {before.get(k)!r} and is {v!r} now" for k, v in environment.items() if before.get(k) != v]
        if changed:
            warn(
                f"going on from {self.folder}, but not bit for bit as it would have: {'; '.join(changed)}.",
            )


class Folder:
    """A run's folder.

    Args:
        path: Made where it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def check(self) -> None:
        """Raises `CheckpointError` where checkpoints cannot be written, before anything is trained."""
        check_writable(self.path)
        ahead = list(takewhile(lambda path: not holds_files(path), self._all(unfinished=True)))
        for path in self._all(unfinished=True):
            if not path.is_dir() or (path in ahead and path.is_symlink()):
                raise CheckpointError(f"{path} is in the way of a checkpoint of that name. Use another folder.")

    def newest(self, check: Callable[[Saved], None] | None = None) -> Saved | None:
        """The newest checkpoint that is whole, or none; says so where it passes over a damaged one. The folder may be
        that of one checkpoint, too.

        Args:
            check: Raises some error where the caller cannot go on from a checkpoint that is whole otherwise.

        Raises:
            CheckpointError: It is of a newer version of pvae, cannot be read, or all are damaged.
        """
        while True:
            there, problems = self._sets(), []
            for folder in there:
                try:
                    found = _read(folder, check)
                except CheckpointError as error:
                    if self._sets() != there:
                        break  # another process has written one meanwhile, and removed others
                    if not isinstance(error, DamagedError):
                        raise
                    problems.append(str(error))
                    continue
                if problems:
                    warn(f"{'; '.join(problems)} Going back to the checkpoint before, {folder}.")
                return found
            else:
                if problems:
                    raise CheckpointError(f"no checkpoint in {self.path} is whole. {' '.join(problems)}")
                return None

    def best(self) -> Saved | None:
        """The checkpoint of the epoch that the newest one calls the best, or none."""
        newest = self.newest()
        while newest is not None and newest.config["best_epoch"] is not None:
            folder = self.path / _folder_name(newest.config["best_epoch"], 0)
            if folder == newest.folder:
                return newest
            try:
                return _read(folder)
            except CheckpointError:
                before, newest = newest, self.newest()
                if newest is None or newest.folder == before.folder:
                    raise  # else another epoch became the best meanwhile
        return None

    def write(self, saved: Saved) -> Path:
        """Writes a checkpoint, and removes those that need not be kept.

        Raises:
            CheckpointError: It cannot be written; those before are as they were.
        """
        folder = self.path / _folder_name(saved.epoch, saved.training["steps"])
        contents = {
            "weights.safetensors": tensors_to_bytes(saved.weights),
            "training.pt": state_to_bytes(dict(saved.training)),
            "history.json": json.dumps(saved.history).encode(),
            "config.json": json.dumps(saved.config, indent=2).encode(),
        }
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a link, and in the way of a checkpoint. Use another folder.")
        if folder.exists():
            try:
                read_files(folder)
            except DamagedError:
                remove_files(folder, _FILES)
        write_files(folder, contents)
        self._remove_all_but(folder, saved.config["best_epoch"])
        return folder

    def rewrite_history(self, records: list[dict[str, float]]) -> None:
        """Makes ``history.jsonl`` say what a run begins from."""
        write_file(self.path / _HISTORY, b"".join(_line(record) for record in records))

    def append_history(self, record: dict[str, float]) -> None:
        """Adds an epoch's line to ``history.jsonl``."""
        append_to_file(self.path / _HISTORY, _line(record))

    def _sets(self) -> list[Path]:
        """Folders of checkpoints, or the folder itself if it is that of one."""
        return [self.path] if holds_files(self.path) else self._all()

    def _all(self, *, unfinished: bool = False) -> list[Path]:
        """Folders of checkpoints, the newest first. One without a manifest was never finished, and is none."""
        if not self.path.is_dir():
            return []
        found = [(m, path) for path in self.path.iterdir() if (m := _NAME.fullmatch(path.name))]
        order = sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][3] or 0)), reverse=True)
        return [path for _, path in order if unfinished or holds_files(path)]

    def _remove_all_but(self, newest: Path, best_epoch: int | None) -> None:
        """Those ahead of the newest were damaged, or it would not have been written after them."""
        order = self._all(unfinished=True)
        place = order.index(newest)
        whole = [path for path in order[place:] if holds_files(path)]
        keep = whole[:_KEPT] + ([] if best_epoch is None else [self.path / _folder_name(best_epoch, 0)])
        for old in order:
            if old not in keep:
                remove_files(old, _FILES)


def check_plain(name: str, state: Any) -> None:
    """Raises `CheckpointError` where a state holds more than can be read from a file without running code."""
    try:
        state_to_bytes(state)
    except CheckpointError as error:
        raise CheckpointError(
            f"{name} cannot be in a checkpoint: its state holds more than tensors and plain values ({error})."
        ) from None


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where safetensors cannot hold them."""
    for name, tensor in weights.items():
        try:
            tensors_to_bytes({name: tensor.new_empty(0, device="cpu")})
        except (KeyError, ValueError, SafetensorError):
            raise CheckpointError(f"'{name}' cannot be in a checkpoint: its dtype is {tensor.dtype}.") from None


def _read(folder: Path, check: Callable[[Saved], None] | None = None) -> Saved:
    contents = read_files(folder)
    if missing := set(_FILES) - contents.keys():
        raise CheckpointError(f"{folder} is not a checkpoint of pvae.fit: it has no {', '.join(sorted(missing))}.")
    try:
        weights = tensors_from_bytes(contents.pop("weights.safetensors"))
        training = state_from_bytes(contents.pop("training.pt"))
        history, config = (json_from_bytes(contents[name]) for name in ("history.json", "config.json"))
        check_contents(weights, training, history, config)
        saved = Saved(weights, training, history, config, folder)
        if check is not None:
            check(saved)
    except Exception as error:  # of files that may hold anything
        raise DamagedError(f"{folder} holds a file that was not written by pvae.fit: {first_line(error)}") from None
    return saved


def _folder_name(epoch: int, steps: int) -> str:
    return f"epoch-{epoch:06d}" + (f"-step-{steps:07d}" if steps else "")


def _line(record: dict[str, float]) -> bytes:
    # JSON has no nan and no infinity.
    return json.dumps({name: v if math.isfinite(v) else None for name, v in record.items()}).encode() + b"\n"
