"""What `fit` is asked for: checked, and described so that two runs can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
from pyro.infer import ELBO
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pvae.data import Data
from pvae.errors import ArgumentError, positive_int
from pvae.svi.checkpoints import check_plain

__all__ = ["described", "kl_weights", "patience_for", "positive", "scheduled"]


def positive(name: str, value: Any) -> float:
    """A positive number as a float."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ArgumentError(f"{name} must be a positive number, got {value!r}.")
    return float(value)


def kl_weights(kl_weight: Any, epochs: int) -> list[float] | None:
    """The weight of each epoch, or none where it is always 1."""
    if isinstance(kl_weight, Real) and kl_weight == 1 and not isinstance(kl_weight, bool):
        return None
    weights: list[Any] = [kl_weight(epoch) if callable(kl_weight) else kl_weight for epoch in range(1, epochs + 1)]
    for epoch, weight in enumerate(weights, 1):
        if not isinstance(weight, Real) or isinstance(weight, bool) or not 0 <= float(weight) < math.inf:
            where = f" for epoch {epoch}" if callable(kl_weight) else ""
            raise ArgumentError(f"kl_weight must be a number of at least 0, or give one; got {weight!r}{where}.")
    return [float(weight) for weight in weights]


def patience_for(patience: int | None, validation: Data | None) -> int | None:
    """Patience, where there is something to wait for."""
    if patience is None:
        return None
    if validation is None:
        raise ArgumentError("patience waits for a better validation ELBO: pass validation=.")
    return positive_int("patience", patience)


def described(thing: Any) -> str | None:
    """A callable in words that are the same in every process, with what its calls change left out."""
    if thing is None:
        return None
    if isinstance(thing, partial):
        given = [*map(_plain, thing.args), *(f"{k}={_plain(v)}" for k, v in sorted(thing.keywords.items()))]
        return f"{described(thing.func)}({', '.join(given)})"
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if not isinstance(thing, ELBO):
        return name
    # Pyro's objectives find out the nesting as they run.
    plain = {k: v for k, v in vars(thing).items() if isinstance(v, bool | int | float) and k != "max_plate_nesting"}
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in sorted(plain.items()))})"


def scheduled(
    make: Callable[[Optimizer], LRScheduler] | None, lr: float, checkpoint: Any
) -> tuple[Callable[[Optimizer], LRScheduler | None], str | None]:
    """What makes the scheduler, tried on an optimizer of nothing, and its description."""
    if make is None:
        return lambda optimizer: None, None
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
    return make, f"{type(scheduler).__name__} {state}"


def _plain(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str | type(None)) else str(described(value))
