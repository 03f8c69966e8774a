"""Going on from checkpoints: what is there is held against what is asked for before anything of the caller's moves."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.params.param_store import ParamStoreDict
from torch.distributions import constraints
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pvae.data import Data, Transform
from pvae.errors import ArgumentError, CheckpointError, folder_path, one_of
from pvae.persistence import storage
from pvae.runtime import ALONE, Processes, Program, check_surroundings, in_turn, isolated
from pvae.svi.checkpoints import Folder, Saved
from pvae.svi.pairs import Pair
from pvae.svi.results import FitResult

__all__ = ["begun", "check_same_run", "found", "load_checkpoint", "opened", "outside"]


@in_turn
def load_checkpoint(
    path: str | os.PathLike[str],
    model: Program,
    guide: Program,
    data: Data,
    *,
    which: str = "last",
    transform: Transform | None = None,
    device: str | torch.device = "auto",
) -> FitResult:
    """Gives a pair the weights of a checkpoint that `fit` wrote.

    Args:
        path: The folder that was given to `fit` as ``checkpoint``.
        model: The generative program, of the architecture that was trained.
        guide: The recognition program.
        data: Some data, as for `fit`: the pair is run on a batch of them, because programs make parameters as they run.
        which: ``"last"``, or ``"best"``: the epoch with the best validation ELBO, or without validation the best
            training ELBO.
        transform: As for `fit`.
        device: As for `fit`; checkpoints of any device can be loaded on any other.

    Returns:
        A `FitResult` with the history up to there.

    Raises:
        CheckpointError: There is none, it is damaged, or it is of another architecture, with the differences; before
            any parameter has moved.
    """
    check_surroundings()
    one_of("which", which, ("last", "best"))
    folder = Folder(folder_path("path", path))
    saved = folder.newest() if which == "last" else folder.best()
    if saved is None:
        raise CheckpointError(
            f"{folder.path} has no checkpoint{' that is the best' if which == 'best' else ''}. Is it what fit was "
            "given as checkpoint=? During a warm-up of the KL divergence no epoch is the best."
        )
    pair = Pair.of(model, guide, data, device)
    batches = pair.batches("data", data, 256, transform=transform)
    _, state = pair.verified(batches, None, 0, None)
    _add_unconstrained(saved, state)
    _raise_differences(saved, saved.differences(pair.named_tensors(state["params"])))
    with isolated(pair.modules, seed=0, device=pair.device, params=state) as store:
        begun(pair, store, saved, ALONE)
        history = {name: np.array(values) for name, values in saved.history.items()}
        params, state = outside(pair, store)
    seed = saved.config["arguments"]["seed"]
    return FitResult(history, params, pair.device, seed, 0.0, state, "loaded", checkpoint=saved.folder)


@contextmanager
def opened(path: Path | None, processes: Processes) -> Iterator[Folder | None]:
    """A block that uses a folder of checkpoints, on the first process alone."""
    with ExitStack() as stack:
        folder = None
        with processes.together():
            if path is not None and processes.is_main:
                folder = Folder(path)
                stack.enter_context(storage.exclusive(path, "trains with these checkpoints"))
                folder.check()
        yield folder


def found(
    folder: Folder | None, resume: str, processes: Processes, make: Callable[[Optimizer], Any], schedule: str | None
) -> Saved | None:
    """What there is to go on from, on all processes; the scheduler is as `pvae.svi.settings.scheduled` gives it."""
    saved = None
    with processes.together():
        if folder is not None:
            saved = folder.newest(partial(_check_scheduler, make=make, schedule=schedule))
            if saved is not None and resume == "never":
                raise CheckpointError(
                    f"{folder.path} holds checkpoints of {saved.epoch} epoch(s). Pass resume='auto' to go on from "
                    "them, or another folder for a new run."
                )
    return processes.broadcast(saved)


def _check_scheduler(saved: Saved, make: Callable[[Optimizer], Any], schedule: str | None) -> None:
    """Raises some error where the caller's scheduler cannot go on from its state: tried on an optimizer of nothing."""
    arguments, state = saved.config["arguments"], saved.training["scheduler"]
    if schedule is None or arguments.get("scheduler") != schedule:
        return  # of another run, which is told with all that differs
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=float(arguments["lr"]))
    scheduler = make(optimizer)
    optimizer.param_groups[0] |= saved.training["group"]
    scheduler.load_state_dict(copy.deepcopy(state))
    optimizer.step()
    scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    if not math.isfinite(float(optimizer.param_groups[0]["lr"])):
        raise ValueError("its scheduler gives no learning rate")


def check_same_run(
    saved: Saved, pair: Pair, state: Any, arguments: Mapping[str, Any], kl_weights: Any, epochs: int
) -> None:
    """Raises where a checkpoint is not of a run that is called as this one, with all that differs."""
    _add_unconstrained(saved, state)
    differences = saved.differences(pair.named_tensors(state["params"]), arguments)
    before = saved.config["kl_weights"]
    if (before is None) != (kl_weights is None) or (kl_weights or [])[: len(before or [])] != (before or []):
        differences.append(f"kl_weight was {before or 1.0!r} in its epochs, and is {kl_weights or 1.0!r} now")
    for name, constraint in saved.training["constraints"].items():
        now = repr(state["constraints"].get(name))
        if name in state["params"] and now != constraint:
            differences.append(f"the constraint of {name} was {constraint} and is {now} now")
    _raise_differences(saved, differences)
    if saved.epoch + bool(saved.training["steps"]) > epochs:
        within = f", and is within epoch {saved.epoch + 1}" if saved.training["steps"] else ""
        raise ArgumentError(
            f"epochs={epochs}, and the checkpoint in {saved.folder} already has {saved.epoch}{within}. Pass at least "
            "as many; load_checkpoint only loads."
        )


def _add_unconstrained(saved: Saved, state: Any) -> None:
    """Adds parameters to the store's state that a run of the pair does not make: those of an objective, or made late.

    Only the programs know the constraint of one that has any.
    """
    real = constraints.real
    for name, constraint in saved.training["constraints"].items():
        if name not in state["params"] and constraint == repr(real):
            state["params"][name] = saved.weights[f"param/{name}"].clone().requires_grad_()
            state["constraints"][name] = real


def _raise_differences(saved: Saved, differences: Sequence[str]) -> None:
    if differences:
        raise CheckpointError(
            f"the checkpoint in {saved.folder} is of another model or run: {'; '.join(differences)}. Call with what it "
            "was made with, or use another folder."
        )


def begun(pair: Pair, store: ParamStoreDict, saved: Saved | None, processes: Processes) -> Callable[[], dict[str, Any]]:
    """Gives all processes the same weights to begin from; returns what names them."""

    def tensors() -> dict[str, Any]:
        return pair.named_tensors(store._params)

    with torch.no_grad():
        if saved is not None:
            for name, tensor in tensors().items():
                weight = saved.weights[name].to(tensor.device)
                if not torch.equal(tensor, weight):  # what is expanded cannot be written to, and need not be
                    tensor.copy_(weight)
        if processes.world_size > 1:
            processes.broadcast_tensors(
                [*tensors().values(), *(b for module in pair.modules for b in module.buffers())]
            )
    return tensors


def outside(pair: Pair, store: ParamStoreDict) -> tuple[dict[str, Any], Any]:
    """Parameters that live in no module: their values, and the store's state of them."""
    state = store.get_state()
    names = pair.bare(state["params"])
    state = {key: {name: state[key][name] for name in names} for key in ("params", "constraints")}
    return {name: store[name].detach().clone() for name in names}, state
