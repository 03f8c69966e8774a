"""What keeps a run: it finds where one may go on, and writes where it stands; of several processes the main one does.

States of processes are gathered there, and what is found is broadcast, so that a run knows of itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from pvae.persistence import lock_folder, versions
from pvae.runtime import Processes
from pvae.svi.checkpoints import Folder, Saved
from pvae.svi.loading import check_same_run, find_checkpoint, load_initial
from pvae.svi.settings import Settings
from pvae.svi.trainable import Trainable

__all__ = ["Checkpointer", "open_checkpointer"]

_OF_EACH_PROCESS = ("totals", "noise", "memory")  # a list over all in a checkpoint


class Resumable(Protocol):
    """A run, as far as going on from a checkpoint needs it."""

    @property
    def records(self) -> list[dict[str, float]]: ...

    def load_state_dict(self, saved: Saved) -> None: ...


class Checkpointer:
    """What keeps no run at all: nothing is found, and nothing written.

    Attributes:
        seed: That of the run that is gone on from; none where a run begins.
        last: The folder of the last checkpoint.
    """

    seed: int | None = None
    last: Path | None = None

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def check_same_run(self, pair: Trainable, settings: Settings) -> None:
        """Raises where processes were called differently, or what was found is not of a run that is called as this one.

        Args:
            pair: The pair, before anything of it has moved.
            settings: What is asked for.
        """
        if self.processes.world_size > 1:
            self._agree(pair, settings)

    def _agree(self, pair: Trainable, settings: Settings) -> dict[str, Any]:
        """What decides the numbers of a run, as plain values, the same on all processes."""
        arguments = settings.arguments(pair.objective)
        arguments["data"] = pair.batches.fingerprint()
        arguments["validation"] = pair.held_out.fingerprint() if pair.held_out else None
        plan = {"epochs": settings.epochs, "kl_weights": settings.kl_weights, "patience": settings.patience}
        self.processes.agree(**arguments, **plan, capture=settings.capture)
        return arguments

    def load_initial(self, pair: Trainable) -> bool:
        """Gives the pair the weights that were found, in the block in which it is isolated; false if there are none."""
        return False

    def restore(self, run: Resumable) -> None:
        """Puts a run where the one before stood."""

    def append_history(self, record: dict[str, float]) -> None:
        """Adds an epoch's line to the history on disk."""

    def save(self, state_dict: Callable[[], Saved]) -> None:
        """Writes where the run stands, if that has not been written."""

    def rescue(self, state_dict: Callable[[], Saved]) -> None:
        """As `save` after an error, where that can be done."""


class _Keeper(Checkpointer):
    """What keeps a run in a folder, which the main process alone uses."""

    def __init__(self, folder: Folder | None, found: Saved | None, processes: Processes) -> None:
        super().__init__(processes)
        self.folder, self.found = folder, found
        self.seed = None if found is None else found.config["arguments"]["seed"]
        self.last = None if found is None else found.folder
        self._place: tuple[int, int] | None = None  # in the data, where it was written last

    def check_same_run(self, pair: Trainable, settings: Settings) -> None:
        arguments = self._agree(pair, settings)
        device, processes = str(pair.placed.device), self.processes
        place = {"device": device, "threads": torch.get_num_threads(), "ranks": processes.world_size}
        environment = {**place, "compiled": settings.capture, **versions()}
        self.config = {"arguments": arguments, "environment": environment}
        with processes.together():
            pair.check_names()
            if self.found is not None:
                check_same_run(self.found, pair, settings, arguments)

    def load_initial(self, pair: Trainable) -> bool:
        if self.found is not None:
            load_initial(pair.placed, self.found)
        return self.found is not None

    def restore(self, run: Resumable) -> None:
        if self.found is not None:
            if self.processes.is_main:  # the others' devices have other numbers
                self.found.warn_of_another_place(self.config["environment"])
            run.load_state_dict(self._own(self.found))
            self._place = (self.found.epoch, self.found.training["steps"])
            self.found = None  # as large as all that is trained
        if self.folder is not None:
            self.folder.rewrite_history(run.records)

    def append_history(self, record: dict[str, float]) -> None:
        with self.processes.together():
            if self.folder is not None:
                self.folder.append_history(record)

    def save(self, state_dict: Callable[[], Saved]) -> None:
        saved = state_dict()
        place = (saved.epoch, saved.training["steps"])
        if place == self._place:
            return
        # Shards of one batch may have other shapes on other processes.
        everyone = self.processes.all_gather({name: saved.training[name] for name in _OF_EACH_PROCESS})
        lists = {name: [own[name] for own in everyone] for name in _OF_EACH_PROCESS}
        with self.processes.together():
            if self.folder is not None:
                whole = replace(saved, training={**saved.training, **lists}, config={**self.config, **saved.config})
                self.last = self.folder.write(whole)
        self._place = place

    def rescue(self, state_dict: Callable[[], Saved]) -> None:
        if self.processes.world_size == 1:  # others may be out of reach
            self.save(state_dict)

    def _own(self, saved: Saved) -> Saved:
        """What is this process's own of a checkpoint; of other processes than these, what can be told apart."""
        training, count, rank = saved.training, self.processes.world_size, self.processes.rank
        if len(training["totals"]) == count:
            own = {name: training[name][rank] for name in _OF_EACH_PROCESS}
        else:
            own = {"totals": sum(training["totals"]) / count, "noise": None, "memory": [None, None]}
        return replace(saved, training={**training, **own})


@contextmanager
def open_checkpointer(settings: Settings, processes: Processes) -> Iterator[Checkpointer]:
    """A block that keeps a run, in a folder that nobody else uses meanwhile.

    Raises:
        CheckpointError: The folder cannot be used, is in use, or holds checkpoints that are not to be gone on from.
    """
    with ExitStack() as stack:
        folder = None
        with processes.together():
            if settings.checkpoint is not None and processes.is_main:
                folder = Folder(settings.checkpoint)
                stack.enter_context(lock_folder(settings.checkpoint, "trains with these checkpoints"))
                folder.check()
        if not processes.broadcast(folder is not None):
            yield Checkpointer(processes)
            return
        yield _Keeper(folder, _find(folder, settings, processes), processes)


def _find(folder: Folder | None, settings: Settings, processes: Processes) -> Saved | None:
    found = None
    with processes.together():
        if folder is not None:
            found = find_checkpoint(folder, settings)
    return processes.broadcast(found)
