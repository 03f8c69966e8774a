"""Steps of an optimizer of ``pyro.optim`` for all parameters at once, on the state that it keeps of each.

Pyro makes an optimizer for each parameter, and steps one after the other. Where they are of one kind and have the same
settings, one of PyTorch's that is shown their states does the same in one go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pvae.svi.adam import FLUSH_EVERY, flush, fused_adam_, is_dense

__all__ = ["Together"]

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
_BY_LISTS = (torch.optim.Adadelta, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop)
_MOST = 8  # sets of parameters


class Together:
    """Takes an optimizer's steps for all parameters at once where that is the same to rounding, else as it would.

    Args:
        optim: One of ``pyro.optim``. Its state stays where it is, and may be read, loaded and scheduled as ever.
    """

    def __init__(self, optim: Any) -> None:
        self.optim = optim
        # Another class may do something else when it is called.
        self.is_known = type(optim).__call__ in (PyroOptim.__call__, PyroLRScheduler.__call__)
        self.steps = 0  # taken for all at once
        self._made: dict[tuple[int, ...], tuple[list[Tensor], Any]] = {}

    def __call__(self, params: Sequence[Tensor]) -> None:
        """Moves the parameters by their gradients."""
        ones = self._optimizers(params) if self.is_known else []
        if not ones:
            self.optim(params)
            return
        for param in params:
            if (clip := self.optim.grad_clip[param]) is not None:
                clip(param)
        if type(ones[0]) is ClippedAdam:
            _step_clipped_adam(params, ones)
        else:
            self._step(params, ones)
        self.steps += 1
        on_cpu, has_moments = params[0].device.type == "cpu", isinstance(ones[0], (torch.optim.Adam, ClippedAdam))
        if on_cpu and has_moments and self.steps % FLUSH_EVERY == 0:
            states = [one.state[param] for param, one in zip(params, ones, strict=True)]
            means, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
            flush(means, squares, ones[0].param_groups[0]["eps"])

    def _optimizers(self, params: Sequence[Tensor]) -> list[Any]:
        """Those of the parameters, if one can do for all; else none."""
        known = self.optim.optim_objs
        ones = [known.get(param) for param in params]
        ones = [one.optimizer if isinstance(one, (LRScheduler, ReduceLROnPlateau)) else one for one in ones]
        kind = type(ones[0]) if ones else None
        if kind not in (*_FUSED, *_BY_LISTS, ClippedAdam) or not all(type(one) is kind for one in ones):
            return []
        first = ones[0].param_groups[0]
        for param, one in zip(params, ones, strict=True):
            (settings, *more), grad = one.param_groups, param.grad
            same = not more and all(settings[key] == first[key] for key in first if key != "params")
            # Of a state that is not there yet, it makes one.
            if not same or not one.state.get(param) or grad is None or grad.layout != torch.strided:
                return []
            if grad.dtype != params[0].dtype or param.device != params[0].device or not is_dense(param):
                return []
        plain = params[0].is_floating_point() and not first.get("differentiable") and not first.get("capturable")
        chosen = first.get("fused") is not None or first.get("foreach") is not None  # by the caller
        alike = kind is not ClippedAdam or _are_in_step(params, ones)
        return ones if plain and not chosen and alike else []

    def _step(self, params: Sequence[Tensor], ones: Sequence[Any]) -> None:
        key = tuple(map(id, params))
        if key not in self._made:
            if len(self._made) >= _MOST:
                self._made.clear()
            on_cpu = params[0].device.type == "cpu"
            way = {"fused": True} if on_cpu and type(ones[0]) in _FUSED else {"foreach": True}
            self._made[key] = list(params), type(ones[0])(list(params), lr=ones[0].param_groups[0]["lr"], **way)
        _, one_for_all = self._made[key]
        settings = {k: v for k, v in ones[0].param_groups[0].items() if k not in ("params", "fused", "foreach")}
        one_for_all.param_groups[0].update(settings)
        for param, one in zip(params, ones, strict=True):
            one_for_all.state[param] = one.state[param]
        one_for_all.step()


def _are_in_step(params: Sequence[Tensor], ones: Sequence[Any]) -> bool:
    """Whether optimizers of Pyro's `ClippedAdam` can be written as Adam of all parameters."""
    steps = {one.state[param]["step"] for param, one in zip(params, ones, strict=True)}
    return len(steps) == 1 and not ones[0].param_groups[0].get("centered_variance")


def _step_clipped_adam(params: Sequence[Tensor], ones: Sequence[Any]) -> None:
    """Pyro's `ClippedAdam` by the kernel of Adam.

    It adds eps to the root of the mean square before that is divided by ``sqrt(1 - beta2**t)``, Adam after.
    """
    states = [one.state[param] for param, one in zip(params, ones, strict=True)]
    for one, state in zip(ones, states, strict=True):
        one.param_groups[0]["lr"] *= one.param_groups[0]["lrd"]
        state["step"] += 1
    settings, step = ones[0].param_groups[0], states[0]["step"]
    with torch.no_grad():
        grads: Any = [param.grad for param in params]
        for grad in grads:
            grad.clamp_(-settings["clip_norm"], settings["clip_norm"])
        beta1, beta2 = settings["betas"]
        fused_adam_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.tensor(float(step), device=params[0].device)] * len(params),
            lr=settings["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=settings["weight_decay"],
            eps=settings["eps"] / math.sqrt(1 - beta2**step),
            amsgrad=False,
            maximize=False,
        )
