"""Checkpoints of a run on disk: written so that one is always complete, verified before anything is taken from them.

A run's folder holds ``history.jsonl``, a line for each epoch, and a folder for each checkpoint that is kept: the last
two and the best. Each has the weights (safetensors), the training state (tensors and plain values), the history, the
configuration, and a manifest. Nothing is unpickled that could run code.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from pvae import storage
from pvae.checks import kind
from pvae.errors import CheckpointError, warn

__all__ = ["Folder", "Saved", "check_plain", "check_weights"]

_NAME = re.compile(r"epoch-(\d{6,})(-step-(\d{7,}))?")
_HISTORY = "history.jsonl"
_KEPT = 2
_FILES = ("weights.safetensors", "training.pt", "history.json", "config.json")

# What reading a file raises that holds something else, and looking for what it ought to hold.
_NOT_OURS = (
    SafetensorError,
    pickle.UnpicklingError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    RuntimeError,
    EOFError,
)


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
        storage.check_writable(self.path)
        for path in self.path.iterdir():
            if _NAME.fullmatch(path.name) and not path.is_dir():
                raise CheckpointError(f"{path} is in the way of a checkpoint of that name. Use another folder.")

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, or none; says so where it passes over a damaged one. The folder may be
        that of one checkpoint, too.

        Raises:
            CheckpointError: It is of a newer version of pvae, cannot be read, or all are damaged.
        """
        problems = []
        for folder in [self.path] if storage.holds_set(self.path) else self._all():
            try:
                found = _read(folder)
            except storage.DamagedError as error:
                problems.append(str(error))
                continue
            if problems:
                warn(f"{'; '.join(problems)} Going back to the checkpoint before, {folder}.")
            return found
        if problems:
            raise CheckpointError(f"no checkpoint in {self.path} is whole. {' '.join(problems)}")
        return None

    def best(self) -> Saved | None:
        """The checkpoint of the epoch that the newest one calls the best, or none."""
        newest = self.newest()
        if newest is None or newest.config["best_epoch"] is None:
            return None
        folder = self.path / _named(newest.config["best_epoch"], 0)
        return newest if folder == newest.folder else _read(folder)

    def write(self, saved: Saved) -> Path:
        """Writes a checkpoint, and removes those that need not be kept.

        Raises:
            CheckpointError: It cannot be written; those before are as they were.
        """
        folder = self.path / _named(saved.epoch, saved.training["steps"])
        buffer = io.BytesIO()
        torch.save(dict(saved.training), buffer)
        contents = {
            "weights.safetensors": storage.tensors_as_bytes(saved.weights),
            "training.pt": buffer.getvalue(),
            "history.json": json.dumps(saved.history).encode(),
            "config.json": json.dumps(saved.config, indent=2).encode(),
        }
        if folder.exists():
            try:
                storage.read(folder)
            except storage.DamagedError:
                _remove(folder)
        storage.write(folder, contents)
        self._remove_all_but(folder, saved.config["best_epoch"])
        return folder

    def rewrite_history(self, records: list[dict[str, float]]) -> None:
        """Makes ``history.jsonl`` say what a run begins from."""
        storage.put(self.path / _HISTORY, b"".join(_line(record) for record in records))

    def append_history(self, record: dict[str, float]) -> None:
        """Adds an epoch's line to ``history.jsonl``."""
        storage.append(self.path / _HISTORY, _line(record))

    def _all(self, *, unfinished: bool = False) -> list[Path]:
        """Folders of checkpoints, the newest first. One without a manifest was never finished, and is none."""
        if not self.path.is_dir():
            return []
        found = [(m, path) for path in self.path.iterdir() if (m := _NAME.fullmatch(path.name))]
        order = sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][3] or 0)), reverse=True)
        return [path for _, path in order if unfinished or storage.holds_set(path)]

    def _remove_all_but(self, newest: Path, best_epoch: int | None) -> None:
        """Those ahead of the newest were damaged, or it would not have been written after them."""
        order = self._all(unfinished=True)
        place = order.index(newest)
        whole = [path for path in order[place:] if storage.holds_set(path)]
        keep = whole[:_KEPT] + ([] if best_epoch is None else [self.path / _named(best_epoch, 0)])
        for old in order:
            if old not in keep:
                _remove(old)


def check_plain(name: str, state: Any) -> None:
    """Raises `CheckpointError` where a state holds more than can be read from a file without running code."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name} cannot be in a checkpoint: its state holds more than tensors and plain values ({first_line})."
        ) from None


def check_weights(weights: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where safetensors cannot hold them."""
    for name, tensor in weights.items():
        try:
            storage.tensors_as_bytes({name: tensor.new_empty(0, device="cpu")})
        except (KeyError, ValueError, SafetensorError):
            raise CheckpointError(f"'{name}' cannot be in a checkpoint: its dtype is {tensor.dtype}.") from None


def _read(folder: Path) -> Saved:
    contents = storage.read(folder)
    if missing := set(_FILES) - contents.keys():
        raise CheckpointError(f"{folder} is not a checkpoint of pvae.fit: it has no {', '.join(sorted(missing))}.")
    try:
        saved = Saved(
            load_tensors(contents["weights.safetensors"]),
            torch.load(io.BytesIO(contents["training.pt"]), map_location="cpu", weights_only=True),
            json.loads(contents["history.json"]),
            json.loads(contents["config.json"]),
            folder,
        )
        _check(saved)
    except _NOT_OURS as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise storage.DamagedError(f"{folder} holds a file that was not written by pvae.fit: {first_line}") from None
    return saved


def _check(saved: Saved) -> None:
    """Raises some error where a checkpoint is not what `Training` writes: kernels that are given it look at nothing."""
    training, config = saved.training, saved.config
    epoch, steps, seen = (int(training[name]) for name in ("epoch", "steps", "seen"))
    ranks = len(training["totals"])
    _demand(min(epoch, steps, seen) >= 0 and (steps > 0) == (seen > 0), "its place in the data makes no sense")
    _demand(all(len(values) == epoch for values in saved.history.values()), "its history has another length")
    _demand(set(training["order"]) <= saved.weights.keys(), "it trains what it does not hold")
    _demand(set(training["optimizer"]) <= set(training["order"]), "it optimizes what it does not train")
    for name, state in training["optimizer"].items():
        weight = saved.weights[name]
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        fits = all(m.shape == weight.shape and m.dtype == weight.dtype for m in moments)
        _demand(
            fits and state["step"].numel() == 1 and len(state) == 3, f"the optimizer's state of {name} does not fit"
        )
    _demand(len(training["noise"]) == ranks > 0, "it lacks random numbers")
    for noise in training["noise"]:
        torch.Generator().set_state(noise["torch"])
        random.Random().setstate(noise["python"])
        kind, keys, *places = noise["numpy"]
        np.random.RandomState().set_state((kind, keys.numpy().astype(np.uint32), *places))
    _demand(
        all(isinstance(v, int | float | tuple | list | None) for v in training["group"].values()), "of its optimizer"
    )
    for memory in (memory for memories in training["memory"] for memory in memories):
        _demand(memory is None or memory.keys() == {"first", "runs", "changes", "given_up"}, "of its captures")
    _demand({"seconds", "scheduler", "constraints"} <= training.keys(), "it is incomplete")
    _demand(
        {"arguments", "environment", "kl_weights", "best_epoch"} <= config.keys(), "its configuration is incomplete"
    )
    _demand("seed" in config["arguments"], "it has no seed")


def _demand(fulfilled: bool, complaint: str) -> None:
    if not fulfilled:
        raise ValueError(complaint)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; what else is in its folder stays."""
    with suppress(OSError):
        for path in storage.own_files(folder, _FILES):
            path.unlink(missing_ok=True)  # the manifest first: what is left is no checkpoint
        folder.rmdir()


def _named(epoch: int, steps: int) -> str:
    return f"epoch-{epoch:06d}" + (f"-step-{steps:07d}" if steps else "")


def _line(record: dict[str, float]) -> bytes:
    # JSON has no nan and no infinity.
    return json.dumps({name: v if math.isfinite(v) else None for name, v in record.items()}).encode() + b"\n"
