"""What `fit` is asked for: checked, and described so that two runs can be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pvae.data import Data, Transform
from pvae.errors import ArgumentError, folder_path, one_of, positive_int, real_number, yes_no_or_auto
from pvae.runtime import Processes, resolve_seed
from pvae.svi import elbos
from pvae.svi.checkpoints import check_plain
from pvae.svi.losses import Objective
from pvae.svi.objectives import Bound
from pvae.svi.results import FitResult

__all__ = ["PRECISIONS", "Callback", "MakeScheduler", "Settings"]

PRECISIONS = ("float32", "bfloat16")

Callback = Callable[[dict[str, float]], Any]
MakeScheduler = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Settings:
    """What a run is asked for, as `pvae.fit` documents it; what differs is said here.

    Attributes:
        kl_weights: One for each epoch; ``None`` where latents have no weight.
        schedule: The scheduler in words; ``None`` where there is none.
        params: State of the param store to start from.
        seed: Of order and noise; of several processes the same on all.
        noise_seed: Of this process's noise.
        is_seed_fresh: Whether it was drawn because none was asked for.
        capture: Whether steps are captured and compiled, once that is decided.
    """

    epochs: int
    batch_size: int
    lr: float
    clip_norm: float | None
    kl_weights: Sequence[float] | None
    patience: int | None
    scheduler: MakeScheduler | None
    schedule: str | None
    transform: Transform | None
    objective: Objective | None
    compile: bool | str
    precision: str
    params: Mapping[str, Any] | None
    checkpoint: Path | None
    resume: str
    callback: Callback | None
    progress: bool
    seed: int
    noise_seed: int
    is_seed_fresh: bool
    capture: bool = False

    @classmethod
    def checked(
        cls,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        scheduler: MakeScheduler | None = None,
        clip_norm: float | None = None,
        kl_weight: float | Callable[[int], float] = 1.0,
        patience: int | None = None,
        seed: int | None = 0,
        objective: Objective | None = None,
        transform: Transform | None = None,
        validation: Data | None = None,
        start: FitResult | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: str = "never",
        callback: Callback | None = None,
        compile: bool | str = "auto",
        precision: str = "float32",
        progress: bool = False,
    ) -> Settings:
        """Settings that make sense.

        Raises:
            ArgumentError: They do not.
        """
        epochs, batch_size = positive_int("epochs", epochs), positive_int("batch_size", batch_size)
        lr = real_number("lr", lr, above=0)
        path = None if checkpoint is None else folder_path("checkpoint", checkpoint)
        chosen = resolve_seed(seed)
        settings = cls(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            clip_norm=None if clip_norm is None else real_number("clip_norm", clip_norm, above=0),
            compile=yes_no_or_auto("compile", compile),
            resume=one_of("resume", resume, ("auto", "never")),
            precision=one_of("precision", precision, PRECISIONS),
            kl_weights=_kl_weights(kl_weight, epochs),
            patience=_patience(patience, validation),
            params=start.copy_state() if isinstance(start, FitResult) else None,
            checkpoint=path,
            scheduler=scheduler,
            schedule=None if scheduler is None else _describe_schedule(scheduler, lr, path),
            objective=objective,
            transform=transform,
            callback=callback,
            progress=progress,
            seed=chosen,
            noise_seed=chosen,
            is_seed_fresh=seed is None,
        )
        elbos.resolve(objective)
        if callback is not None and not callable(callback):
            raise ArgumentError(f"callback must be a function of one dict, got {callback!r}.")
        if start is not None and not isinstance(start, FitResult):
            raise ArgumentError(f"start must be what an earlier fit returned, got {start!r}.")
        if resume == "auto" and checkpoint is None:
            raise ArgumentError("resume='auto' needs a folder to go on from: pass checkpoint=.")
        return settings

    def settle_seed(self, before: int | None, processes: Processes) -> Settings:
        """With one seed on all processes: that of the run before where it goes on and none was asked for."""
        seed = before if self.is_seed_fresh and before is not None else self.seed
        seed = processes.broadcast(seed)
        return replace(self, seed=seed, noise_seed=processes.rank_seed(seed))

    def arguments(self, objective: Objective) -> dict[str, Any]:
        """What decides the numbers of a run, as plain values: a checkpoint of other ones is not gone on from."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "clip_norm": self.clip_norm,
            "scheduler": self.schedule,
            "precision": self.precision,
            "objective": _describe(objective),
            "transform": _describe(self.transform),
        }

    def make_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """The scheduler of an optimizer, if there is to be one."""
        return None if self.scheduler is None else self.scheduler(optimizer)

    @cached_property
    def settled_epoch(self) -> int:
        """The first epoch from which the KL weight no longer changes: epochs before are compared with none."""
        weights = self.kl_weights or [1.0]
        return max((n + 1 for n, weight in enumerate(weights, 1) if weight != weights[-1]), default=1)


def _kl_weights(kl_weight: Any, epochs: int) -> list[float] | None:
    """The weight of each epoch, or none where it is always 1."""
    if isinstance(kl_weight, Real) and kl_weight == 1 and not isinstance(kl_weight, bool):
        return None
    if not callable(kl_weight) and not isinstance(kl_weight, Real):
        raise ArgumentError(
            "kl_weight must be a number, or a function of the epoch such as pvae.schedules.linear_warmup(10); got "
            f"{kl_weight!r}."
        )
    weights: list[Any] = [kl_weight(epoch) if callable(kl_weight) else kl_weight for epoch in range(1, epochs + 1)]
    name = "kl_weight(epoch={})" if callable(kl_weight) else "kl_weight"
    return [real_number(name.format(epoch), weight, least=0) for epoch, weight in enumerate(weights, 1)]


def _patience(patience: int | None, validation: Data | None) -> int | None:
    """Patience, where there is something to wait for."""
    if patience is None:
        return None
    if validation is None:
        raise ArgumentError("patience waits for a better validation ELBO: pass validation=.")
    return positive_int("patience", patience)


def _describe(thing: Any) -> str | None:
    """A callable in words that are the same in every process, with what its calls change left out."""
    if thing is None:
        return None
    if isinstance(thing, partial):
        given = [*map(_plain, thing.args), *(f"{k}={_plain(v)}" for k, v in sorted(thing.keywords.items()))]
        return f"{_describe(thing.func)}({', '.join(given)})"
    if isinstance(thing, Bound):
        return f"{type(thing).__module__}.{thing!r}"
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if not isinstance(thing, ELBO):
        return name
    # Pyro's objectives find out the nesting as they run.
    plain = {k: v for k, v in vars(thing).items() if isinstance(v, bool | int | float) and k != "max_plate_nesting"}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in sorted(plain.items()))})"


def _plain(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str | type(None)) else str(_describe(value))


def _describe_schedule(make: MakeScheduler, lr: float, checkpoint: Path | None) -> str:
    """A scheduler in words, tried on an optimizer of nothing."""
    trial = torch.optim.Adam([torch.zeros(1)], lr)
    scheduler = make(trial) if callable(make) else make
    if not isinstance(scheduler, LRScheduler) or scheduler.optimizer is not trial:
        raise ArgumentError(
            "scheduler must be a function that makes one of torch's schedulers of an optimizer, such as lambda "
            f"optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9); got {scheduler!r}."
        )
    if checkpoint is not None:
        check_plain("scheduler", scheduler.state_dict())
    state = json.dumps(
        scheduler.state_dict(), default=lambda other: type(other).__name__, sort_keys=True, skipkeys=True
    )
    return f"{type(scheduler).__name__} {state}"
