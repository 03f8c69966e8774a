"""Going on from checkpoints: what is there is held against what is asked for before anything of the caller's moves."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch.distributions import constraints
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pvae.data import Data, Transform, as_source, make_batches
from pvae.errors import ArgumentError, CheckpointError, folder_path, one_of
from pvae.runtime import Pair, Program, check_surroundings, in_turn, isolate, place_pair
from pvae.svi.checkpoints import Folder, Saved
from pvae.svi.results import FitResult
from pvae.svi.settings import Settings
from pvae.svi.trainable import Trainable, look_at

__all__ = ["check_same_run", "find_checkpoint", "load_checkpoint", "load_initial"]


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
    source = as_source("data", data)
    pair = place_pair(model, guide, device=device, data=source)
    batches = make_batches("data", source, pair, 256, transform=transform)
    _, state = look_at(pair, "data", batches, 0, None)
    _add_unconstrained(saved, state)
    _raise_differences(saved, saved.differences(pair.named_tensors(state["params"])))
    with isolate(pair.modules, seed=0, device=pair.device, params=state) as store:
        load_initial(pair, saved)
        params, state = pair.bare_state(store)
    history = {name: np.array(values) for name, values in saved.history.items()}
    seed = saved.config["arguments"]["seed"]
    return FitResult(history, params, pair.device, seed, 0.0, state, "loaded", checkpoint=saved.folder)


def find_checkpoint(folder: Folder, settings: Settings) -> Saved | None:
    """What there is to go on from; none where a run begins.

    Raises:
        CheckpointError: There is some, and that is not wanted; or as by `Folder.newest`.
    """
    saved = folder.newest(partial(_check_scheduler, settings=settings))
    if saved is not None and settings.resume == "never":
        raise CheckpointError(
            f"{folder.path} holds checkpoints of {saved.epoch} epoch(s). Pass resume='auto' to go on from "
            "them, or another folder for a new run."
        )
    return saved


def _check_scheduler(saved: Saved, settings: Settings) -> None:
    """Raises some error where the caller's scheduler cannot go on from its state: tried on an optimizer of nothing."""
    arguments, state = saved.config["arguments"], saved.training["scheduler"]
    if settings.schedule is None or arguments.get("scheduler") != settings.schedule:
        return  # of another run, which is told with all that differs
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=float(arguments["lr"]))
    scheduler: Any = settings.make_scheduler(optimizer)
    optimizer.param_groups[0] |= saved.training["group"]
    scheduler.load_state_dict(copy.deepcopy(state))
    optimizer.step()
    scheduler.step(*([0.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    if not math.isfinite(float(optimizer.param_groups[0]["lr"])):
        raise ValueError("its scheduler gives no learning rate")


def check_same_run(saved: Saved, pair: Trainable, settings: Settings, arguments: Mapping[str, Any]) -> None:
    """Raises where a checkpoint is not of a run that is called as this one, with all that differs."""
    state: Any = pair.state
    weights = settings.kl_weights
    _add_unconstrained(saved, state)
    differences = saved.differences(pair.placed.named_tensors(state["params"]), arguments)
    before = saved.config["kl_weights"]
    if (before is None) != (weights is None) or (weights or [])[: len(before or [])] != (before or []):
        differences.append(f"kl_weight was {before or 1.0!r} in its epochs, and is {weights or 1.0!r} now")
    for name, constraint in saved.training["constraints"].items():
        now = repr(state["constraints"].get(name))
        if name in state["params"] and now != constraint:
            differences.append(f"the constraint of {name} was {constraint} and is {now} now")
    _raise_differences(saved, differences)
    if saved.epoch + bool(saved.training["steps"]) > settings.epochs:
        within = f", and is within epoch {saved.epoch + 1}" if saved.training["steps"] else ""
        raise ArgumentError(
            f"epochs={settings.epochs}, and the checkpoint in {saved.folder} already has {saved.epoch}{within}. Pass "
            "at least as many; load_checkpoint only loads."
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


def load_initial(pair: Pair, saved: Saved) -> None:
    """Gives a pair a checkpoint's weights, in the block in which it is isolated."""
    with torch.no_grad():
        for name, tensor in pair.named_tensors(pyro.get_param_store()._params).items():
            weight = saved.weights[name].to(tensor.device)
            if not torch.equal(tensor, weight):  # what is expanded cannot be written to, and need not be
                tensor.copy_(weight)
