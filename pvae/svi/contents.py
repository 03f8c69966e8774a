"""What a checkpoint has to hold, checked before anything is taken from it: kernels that are given it look at nothing.

Whoever can write a file can write its SHA-256, too. So every value has the type and the range that `Training` gives it,
and what is told twice agrees.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["FIXED", "check_contents"]

FIXED = ("params", "fused", "capturable", "foreach", "differentiable")
"""What of Adam's settings belongs to the place where it runs; schedulers may move all others."""

_MOST = 2**53
_IN_MEMORY = re.compile(r"(\d{1,16}) data, [0-9a-f]{16}")
_READ = re.compile(r".*, (\d{1,16}) batches", re.DOTALL)
_STATE_OF_TORCH = 5056
_STATE_OF_CUDA = 16
_WORDS = 624


def check_contents(
    weights: Mapping[str, Tensor],
    training: Mapping[str, Any],
    history: Mapping[str, list[float]],
    config: Mapping[str, Any],
) -> None:
    """Raises some error where a checkpoint is not what `Training` writes. The arguments are those of `Saved`."""
    _check_config(config)
    _check_place(training, config)
    _check_history(training["epoch"], history, config)
    _check_optimizer(weights, training)
    processes = len(_demand_type(list, training["totals"], "totals"))
    _demand(all(_is_number(total) for total in training["totals"]), "its totals are no numbers")
    _demand(processes == len(training["noise"]) == len(training["memory"]) > 0, "it lacks random numbers")
    for noise in training["noise"]:
        _check_noise(noise)
    for memories in training["memory"]:
        _demand(len(_demand_type(list, memories, "memory")) == 2, "of its captures")
        for memory in memories:
            _demand(memory is None or _is_memory(memory), "of its captures")
    for name, constraint in training["constraints"].items():
        known = f"param/{name}" in weights and isinstance(constraint, str) and len(constraint) < 10_000
        _demand(known, "it constrains what it does not hold")
    scheduler = training["scheduler"]
    there = config["arguments"].get("scheduler") is not None
    _demand(isinstance(scheduler, dict) if there else scheduler is None, "of its scheduler")


def _check_config(config: Mapping[str, Any]) -> None:
    arguments = _demand_type(dict, config["arguments"], "arguments")
    _demand_type(dict, config["environment"], "environment")
    _demand(_is_count(arguments["seed"], 2**63 - 1), "it has no seed")
    weights = config["kl_weights"]
    if weights is not None:
        weights = _demand_type(list, weights, "kl_weights")
        _demand(all(_is_number(weight) and weight >= 0 for weight in weights), "its KL weights are no numbers")


def _check_place(training: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """The place in the data."""
    epoch, steps, seen = (training[name] for name in ("epoch", "steps", "seen"))
    _demand(all(_is_count(number) for number in (epoch, steps, seen)), "its place in the data is no number")
    arguments, possible = config["arguments"], seen >= steps and (steps > 0) == (seen > 0)
    data = str(arguments.get("data"))
    if match := _IN_MEMORY.fullmatch(data):
        size, length = arguments["batch_size"], int(match[1])
        _demand(_is_count(size) and size > 0, "its batch size is no number")
        possible = possible and steps <= -(-length // size) and seen == min(steps * size, length)
    elif match := _READ.fullmatch(data):
        possible = possible and steps <= int(match[1])
    _demand(possible, "its place in the data makes no sense")
    weights = config["kl_weights"]
    _demand(weights is None or len(weights) == epoch + bool(steps), "it has KL weights of other epochs")
    seconds = training["seconds"]
    _demand(_is_number(seconds) and seconds >= 0, "its seconds are no number")


def _check_history(epoch: int, history: Mapping[str, list[float]], config: Mapping[str, Any]) -> None:
    arguments = config["arguments"]
    names = {"seconds"} | ({"validation_elbo"} if arguments.get("validation") is not None else set())
    names |= ({"kl_weight"} if config["kl_weights"] is not None else set()) | (
        {"lr"} if arguments.get("scheduler") is not None else set()
    )
    _demand(
        _demand_type(dict, history, "history").keys() - names in ({"elbo"}, {"objective"}), "its history has others"
    )
    _demand(names <= history.keys(), "its history lacks some")
    for name, values in history.items():
        _demand(len(_demand_type(list, values, name)) == epoch, "its history has another length")
        # The ELBO of held-out data alone may be none.
        fine = all(
            isinstance(v, float) or _is_number(v) if name == "validation_elbo" else _is_number(v) for v in values
        )
        _demand(fine, f"{name} in its history holds what is no number")
    best = config["best_epoch"]
    _demand(best is None or (_is_count(best, epoch) and best > 0), "its best epoch is none that was")


def _check_optimizer(weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> None:
    order = _demand_type(list, training["order"], "order")
    _demand(all(isinstance(n, str) for n in order) and len(set(order)) == len(order), "it trains something twice")
    _demand(set(order) <= weights.keys(), "it trains what it does not hold")
    _demand(set(training["optimizer"]) <= set(order), "it optimizes what it does not train")
    for name, state in training["optimizer"].items():
        _demand(state.keys() == {"step", "exp_avg", "exp_avg_sq"} and _fits(weights[name], **state), f"of {name}")
    group = _demand_type(dict, training["group"], "group")
    _demand(not group.keys() & set(FIXED) and all(isinstance(name, str) for name in group), "of its optimizer")
    _demand(all(map(_is_setting, group.values())), "of its optimizer")
    _demand(not any(group.get(n) for n in ("amsgrad", "maximize", "decoupled_weight_decay")), "of its optimizer")
    lr, betas, eps, decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
    numbers = all(map(_is_number, (lr, *betas, eps, decay)))
    _demand(numbers and len(betas) == 2 and all(0 <= b < 1 for b in betas) and min(eps, decay) >= 0, "of its optimizer")


def _fits(weight: Tensor, *, step: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    """Whether Adam's state is one of a weight: places in memory that its kernel will write to, and numbers."""
    if not all(m.shape == weight.shape and m.dtype == weight.dtype for m in (exp_avg, exp_avg_sq)):
        return False
    counts = step.shape == () and step.dtype.is_floating_point and 0 <= step.item() < _MOST
    return counts and not bool(exp_avg.isnan().any()) and bool((exp_avg_sq >= 0).all())


def _check_noise(noise: Mapping[str, Any]) -> None:
    """Random numbers' states. Some generators take places beyond their ends, and read there."""
    state = _words(noise["torch"], torch.uint8, _STATE_OF_TORCH)
    torch.Generator().set_state(noise["torch"])
    left, place = int(state[8:12].view(np.int32)[0]), int(state[16:24].view(np.uint64)[0])
    _demand(left == 1 or left + place == _WORDS + 1, "a state of torch's random numbers is none")
    if noise["cuda"] is not None:
        _words(noise["cuda"], torch.uint8, _STATE_OF_CUDA)
    random.Random().setstate(noise["python"])
    _demand(noise["python"][2] is None or _is_number(noise["python"][2]), "a state of Python's random numbers is none")
    kind, keys, place, more, normal = noise["numpy"]
    words = _words(keys, torch.int64, _WORDS)
    fine = kind == "MT19937" and words.min() >= 0 and words.max() < 2**32 and _is_count(place, _WORDS)
    _demand(fine and _is_count(more, 1) and _is_number(normal), "a state of NumPy's random numbers is none")


def _words(tensor: Tensor, dtype: torch.dtype, size: int) -> np.ndarray:
    _demand(tensor.dtype == dtype and tensor.shape == (size,), "a state of random numbers has another size")
    return tensor.numpy()


def _is_memory(memory: Any) -> bool:
    """Whether it is what `pvae.capture.captured.Captured` remembers."""
    if not (isinstance(memory, dict) and memory.keys() == {"first", "runs", "changes", "given_up"}):
        return False
    runs = memory["runs"]
    counted = isinstance(runs, dict) and all(
        isinstance(n, str) and isinstance(c, list) and len(c) == 2 and all(map(_is_count, c)) for n, c in runs.items()
    )
    plain = isinstance(memory["first"], str) and isinstance(memory["given_up"], bool)
    return counted and plain and _is_count(memory["changes"])


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return len(value) < 100 and all(map(_is_setting, value))
    return value is None or isinstance(value, bool) or _is_number(value)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return (
        isinstance(value, float | int)
        and not isinstance(value, bool)
        and abs(value) < (_MOST if isinstance(value, int) else math.inf)
    )


def _is_count(value: Any, most: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _demand_type(kind: type, value: Any, name: str) -> Any:
    _demand(isinstance(value, kind), f"'{name}' is no {kind.__name__}")
    return value


def _demand(fulfilled: bool, complaint: str) -> None:
    if not fulfilled:
        raise ValueError(complaint)
