"""Adam on all parameters at once: the optimizer of `pvae.fit`, and its state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pvae.svi.contents import FIXED

__all__ = ["FLUSH_EVERY", "Adam", "clipping", "flush", "fused_adam_", "is_dense", "move_where"]

#: PyTorch's kernel, of which its optimizers are made; what they do around it takes longer where parameters are few.
fused_adam_: Any = torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]

FLUSH_EVERY = 64  # steps; what is larger than what is flushed takes more to become denormal, by 0.9 a step


class Adam:
    """Adam on all parameters at once, by PyTorch's fused kernel: pyro.optim makes an optimizer for each of them.

    Source: Kingma and Ba, 2015, Adam: A Method for Stochastic Optimization.

    Args:
        params: Leaves to train, unconstrained.
        lr: The learning rate.
        clip_norm: What gradients are shrunk to, all together, where their norm is larger.
        on_device: Whether counts of steps are kept on a GPU, where the host need not know them.

    Attributes:
        params: The parameters, in the optimizer's order.
        optimizer: Holds the settings, which a scheduler changes, and the state.
        is_fused: Whether the kernel can walk through all of them.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, clip_norm: float | None, on_device: bool) -> None:
        self.params, self.clip_norm = list(params), clip_norm
        self.is_fused = all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") and is_dense(p) for p in self.params
        )
        self.optimizer = torch.optim.Adam(self.params, lr=lr, fused=self.is_fused, capturable=on_device)
        device = self.params[0].device if self.params and (self.is_fused or on_device) else None
        self.steps = torch.zeros(len(self.params), device=device)  # of each parameter, all counted up at once
        self._one = torch.ones((), device=device)  # a number of Python's would be made a tensor each time
        self._groups: dict[tuple[int, ...], _Group] = {}

    def add(self, params: list[Tensor]) -> None:
        """Takes further parameters on."""
        # No group of their own: a scheduler would not know it.
        self.optimizer.param_groups[0]["params"] += params
        for p in params:
            p.data = p.data if is_dense(p) else p.data.contiguous()
        if not self.params and self.is_fused:
            self.steps, self._one = self.steps.to(params[0].device), self._one.to(params[0].device)
        self.params += params
        self.steps = torch.cat([self.steps, self.steps.new_zeros(len(params))])
        self._share_steps()

    @property
    def taken(self) -> int:
        """Steps so far, which a GPU may have to be asked for."""
        return int(self.steps.max()) if len(self.steps) else 0

    def update(self, grads: Mapping[int, Tensor], skip: Tensor | None = None) -> None:
        """Moves the parameters.

        Args:
            grads: By the parameters' number.
            skip: If given, nothing moves where it is 1 rather than 0, and the host need not know which.
        """
        if self.clip_norm is not None and grads:
            shrink = clipping(list(grads.values()), self.clip_norm)
            grads = {number: grad * shrink for number, grad in grads.items()}
        if self.is_fused:
            self._move(grads, skip)
            return
        for number, grad in grads.items():
            self.params[number].grad = grad
        if skip is not None:
            self.optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.zero_grad()

    def group(self, numbers: tuple[int, ...]) -> _Group:
        """Parameters that are moved together, with their state, which is made where there is none."""
        if numbers not in self._groups:
            for number in numbers:
                param = self.params[number]
                if not self.optimizer.state.get(param):
                    moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[param] = {"step": self.steps[number], **moments}
            params = [self.params[number] for number in numbers]
            state = [self.optimizer.state[param] for param in params]
            means, squares = ([one[key] for one in state] for key in ("exp_avg", "exp_avg_sq"))
            steps = [self.steps[number] for number in numbers]
            self._groups[numbers] = _Group(params, means, squares, steps)
            self.optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  (schedulers look for it)
        return self._groups[numbers]

    def _move(self, grads: Mapping[int, Tensor], skip: Tensor | None) -> None:
        """The optimizer's own kernel on its own state, without the looks around that it takes in every step."""
        group, settings, values = self.group(tuple(grads)), self.optimizer.param_groups[0], list(grads.values())
        with torch.no_grad():
            more = self._one if skip is None else 1 - skip
            if len(values) == len(self.params):
                self.steps += more
            else:
                for step in group.steps:
                    step += more
            for places in group.kinds:
                fused_adam_(
                    *([part[i] for i in places] for part in (group.params, values, group.means, group.squares)),
                    [],
                    [group.steps[i] for i in places],
                    lr=settings["lr"],
                    beta1=settings["betas"][0],
                    beta2=settings["betas"][1],
                    eps=settings["eps"],
                    weight_decay=settings["weight_decay"],
                    amsgrad=False,
                    maximize=False,
                    found_inf=skip,
                )
            if group.steps and group.steps[0].is_cpu and group.steps[0].item() % FLUSH_EVERY == 0:
                flush(group.means, group.squares, settings["eps"])

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """State and the parameters' order, as plain values and tensors.

        Args:
            names: Of the parameters, by their ``id``.
        """
        state = {names[id(p)]: {**each, "step": each["step"].clone()} for p, each in self.optimizer.state.items()}
        settings = {key: value for key, value in self.optimizer.param_groups[0].items() if key not in FIXED}
        return {"order": [names[id(p)] for p in self.params], "optimizer": state, "group": settings}

    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Takes over a state of the same parameters, from any device.

        Args:
            state: From `state_dict`.
            params: By name.
        """
        self.params = [params[name] for name in state["order"]]
        self.optimizer.param_groups[0] |= {**state["group"], "params": list(self.params)}
        self.steps = self.steps.new_zeros(len(self.params))
        for name, each in state["optimizer"].items():
            param = params[name]
            # Adam's kernel takes for granted that moments lie in memory as the parameter does.
            moments = {key: torch.empty_like(param).copy_(each[key]) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[param] = {"step": each["step"].to(self.steps), **moments}
        self._share_steps()
        self.optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  (what schedulers look for)

    def _share_steps(self) -> None:
        """Has each parameter's count be a part of one tensor, with the value that it had."""
        if not self.is_fused:
            return
        for number, param in enumerate(self.params):
            if state := self.optimizer.state.get(param):
                self.steps[number] = state["step"].item()
                state["step"] = self.steps[number]
        self._groups.clear()

    def zero_grad(self) -> None:
        """Leaves no parameter with a gradient."""
        for param in self.params:
            param.grad = None


class _Group:
    """Parameters that are moved together, and their state."""

    def __init__(self, params: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: list[Tensor]) -> None:
        self.params, self.means, self.squares, self.steps = params, means, squares, steps
        dtypes = {param.dtype: [] for param in params}
        for place, param in enumerate(params):
            dtypes[param.dtype].append(place)
        self.kinds = list(dtypes.values())  # places of those that one call of the kernel takes


def clipping(grads: Sequence[Tensor], clip_norm: float) -> Tensor:
    """What to multiply gradients by for their norm, all together, to be no larger than ``clip_norm``."""
    return (clip_norm / (get_total_norm(grads) + 1e-6)).clamp(max=1.0)


def flush(means: Sequence[Tensor], squares: Sequence[Tensor], eps: float) -> None:
    """Makes moments zero that are too small to move anything, before a CPU has to compute with them.

    The mean of a gradient that is zero from some step on, as of weights from a pixel that is seldom lit, or into a unit
    that is, shrinks to a denormal number and stays there, as 0.9 times the least of them is rounded to itself. Of
    MNIST's after 3,750 steps 28% were; each takes a CPU a hundred times as long as another number.

    A mean below ``1e-24 eps`` moves a parameter by less than ``1e-23 lr``, and a mean square is beside ``eps`` below
    rounding where its root is.
    """
    for mean, square in zip(means, squares, strict=True):
        kind = torch.finfo(mean.dtype)
        for moment, least in ((mean, 1e-24 * eps), (square, (0.01 * kind.eps * eps) ** 2)):
            if least > kind.tiny:
                torch.ops.aten.hardshrink.out(moment, least, out=moment)  # one pass over it


def move_where(
    keep: Tensor, lr: Tensor, steps: Tensor, numbers: Sequence[int], tensors: Sequence[Tensor], **settings: Any
) -> None:
    """Adam's update in tensor operations that a compiler makes one pass over each parameter of.

    PyTorch's kernel gives each block of a GPU 65,536 entries to walk through, so that most of a large GPU idles.

    Args:
        keep: Whether to move anything, shape ``()``, bool.
        lr: The learning rate, shape ``()``.
        steps: Steps of each parameter, which are counted up; those of others may be among them.
        numbers: The parameters' places there.
        tensors: Their gradients, they themselves, their means and their squares.
        settings: The optimizer's, plain values.
    """
    (beta1, beta2), eps, decay = (settings[key] for key in ("betas", "eps", "weight_decay"))
    if len(numbers) == len(steps):
        steps += keep
    else:
        for number in numbers:
            steps[number] += keep
    for place, number in enumerate(numbers):
        grad, param, mean, square = tensors[place :: len(numbers)]
        step, rate = steps[number].to(param.dtype), lr.to(param.dtype)
        grad = grad + decay * param if decay else grad
        new_mean = mean + (1 - beta1) * (grad - mean)
        new_square = beta2 * square + (1 - beta2) * grad * grad
        # 1 - beta**step, of which little would be left by subtraction in the first steps.
        first, second = (-torch.expm1(step * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2))
        moved = param - rate / first * new_mean / (new_square.sqrt() / second**0.5 + eps)
        for old, new in ((mean, new_mean), (square, new_square), (param, moved)):
            old.copy_(torch.where(keep, new, old))


def is_dense(param: Tensor) -> bool:
    """Whether entries fill one piece of memory, in whatever order: the fused kernel walks through it from its start."""
    return torch.empty_like(param).stride() == param.stride()
