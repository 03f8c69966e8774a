"""The step of SVI as fast as the hardware: loss, gradients, a look at them, and Adam's update.

A step is plain Pyro, or the tensor program that was captured from it. Of several processes each takes its part of the
batch; what they find is summed, and all make the same update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adam import adam
from torch.overrides import TorchFunctionMode

from pvae.capture import Captured
from pvae.data import Batches, Rows
from pvae.errors import NumericalError, ProgramError
from pvae.runtime import ALONE, Processes, Program
from pvae.svi import objectives

__all__ = ["PRECISIONS", "Step", "Taken", "in_precision"]

PRECISIONS = ("float32", "bfloat16")


class Taken(NamedTuple):
    """What a step came to."""

    loss: float  # of this process's part of the batch, in nats summed over it
    seen: int  # data in the whole batch
    stop: bool  # whether any process was asked to stop


class Step:
    """Loss and gradients of a batch, and Adam's update.

    Args:
        model: The generative program.
        guide: The recognition program.
        objective: What to minimise.
        verified: What was found out about the pair.
        batches: Where batches come from.
        lr: Adam's learning rate.
        precision: One of `PRECISIONS`, for matrix products and convolutions.
        capture: Whether to capture and compile.
        clip_norm: The most that the norm of all gradients together may be; longer ones are shortened to it.
        weighted: Whether latents' log-densities get a weight, `kl_weight`, which the caller sets.
        processes: The processes that take the step together.
        compiling: As for `Captured`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: objectives.Objective,
        verified: objectives.Verified,
        batches: Batches,
        *,
        lr: float,
        precision: str = "float32",
        capture: bool = False,
        clip_norm: float | None = None,
        weighted: bool = False,
        processes: Processes = ALONE,
        compiling: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.guide, self.objective, self.verified = model, guide, objective, verified
        self.batches, self.precision, self.clip_norm, self.processes = batches, precision, clip_norm, processes
        self.names: Callable[[], dict[str, Tensor]] = dict  # of parameters, for messages; the caller may know better
        # An input of captured programs, which see its changes.
        self.kl_weight = torch.ones((), device=batches.device) if weighted else None
        self.params = list(verified.params)
        self.shared = 0  # so many of them are known to be the same on all processes
        # One fused optimizer for all parameters: pyro.optim makes one for each, which is slower.
        self.fused = all(
            p.is_floating_point() and p.device.type in ("cpu", "cuda") and _is_dense(p) for p in self.params
        )
        self.optimizer = torch.optim.Adam(
            self.params, lr=lr, fused=self.fused, capturable=capture and batches.device.type == "cuda"
        )
        self.forget_gradients()
        self.captured = None
        if capture:
            depends_on = (model, guide, objective, batches.transform)
            tolerances = (1e-5, 0.05) if precision == "float32" else (0.01, 0.2)
            options: dict[str, Any] = {"check_each_run": False, "tolerances": tolerances, "compiling": compiling}
            self.captured = Captured(self._loss_and_grads, "pvae.fit's step", depends_on, **options)

    def __call__(self, rows: Rows | None, stop: bool = False, error: Exception | None = None) -> Taken:
        """Takes one step.

        Args:
            rows: This process's part of a batch. Where there are several, it may be empty, or ``None``: there is none.
            stop: Whether this process was asked to stop; the step is taken all the same.
            error: Why this process has no part. It is raised here, where the others learn of it.

        Raises:
            NumericalError: The loss or a gradient is not finite; nothing was updated.
            RankError: Another process raised something else; nothing was updated.
        """
        before, known = torch.get_rng_state(), len(self.params)
        seen, value, fine, grads = len(rows[0]) if rows else 0, 0.0, True, {}
        try:
            if rows and seen:
                loss, finite, grads = self.evaluate(rows)
                value, fine = loss.item(), bool(finite)
        except Exception as caught:
            if self.processes.world_size == 1:
                raise
            error = caught
        if self.processes.world_size > 1:
            seen, all_fine, stop, grads = self._over_ranks(known, seen, fine, stop, error, grads)
            if fine and not all_fine:
                raise NumericalError("the loss or a gradient is not finite on another rank")
        if rows and not fine:
            torch.set_rng_state(before)  # for the same noise again
            raise NumericalError(self.what_is_wrong(rows, value, grads))
        self.update(grads)
        return Taken(value * self.verified.share(rows) if rows else 0.0, seen, stop)

    def what_is_wrong(self, rows: Rows, loss: float = math.nan, grads: dict[int, Tensor] | None = None) -> str:
        """Where a loss or a gradient that is not finite may come from, in words."""
        said = "the loss or a gradient is not finite"
        if grads is not None:
            said = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss:g}"
        found = objectives.not_finite(self.model, self.guide, self.batches.transformed(*rows))
        if not found and grads is not None and math.isfinite(loss):
            bad = {id(self.params[number]) for number, grad in grads.items() if not grad.isfinite().all()}
            found = f"that of {', '.join(name for name, param in self.names().items() if id(param) in bad)}"
        return f"{said}: {found}" if found else said

    @property
    def is_captured(self) -> bool:
        """Whether steps are captured programs; else Python has to run in each of them."""
        return self.captured is not None and not self.captured.given_up

    def begin(self) -> None:
        """Looks at what the programs can see, once for the steps that follow: nothing of the caller's runs between."""
        if self.captured is not None:
            self.captured.drop_if_changed()

    def evaluate(self, rows: Rows) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Loss, whether it and all gradients are finite, and gradients by their parameters' number."""
        inputs = rows if self.kl_weight is None else (*rows, self.kl_weight)
        return (self.captured or self._loss_and_grads)(*inputs)

    def update(self, grads: dict[int, Tensor], skip: Tensor | None = None) -> None:
        """Moves the parameters.

        Args:
            grads: By the parameters' number.
            skip: If given, nothing moves where it is 1 rather than 0, and the host need not know which.
        """
        if self.clip_norm is not None and grads:
            shrink = (self.clip_norm / (get_total_norm(grads.values()) + 1e-6)).clamp(max=1.0)
            grads = {number: grad * shrink for number, grad in grads.items()}
        state = [self.optimizer.state.get(self.params[number]) for number in grads]
        if all(state) and self.fused:
            self._move(grads, state, skip)
            return
        for number, grad in grads.items():
            self.params[number].grad = grad
        if skip is not None:
            self.optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.forget_gradients()

    def _move(self, grads: dict[int, Tensor], state: list[Any], skip: Tensor | None) -> None:
        """The optimizer's own kernel on its own state, without the looks around that it takes in every step."""
        group = self.optimizer.param_groups[0]
        with torch.no_grad():
            adam(
                [self.params[number] for number in grads],
                list(grads.values()),
                [one["exp_avg"] for one in state],
                [one["exp_avg_sq"] for one in state],
                [],
                [one["step"] for one in state],
                fused=True,
                capturable=group["capturable"],
                found_inf=skip,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                amsgrad=False,
                maximize=False,
            )

    def forget_gradients(self) -> None:
        """Leaves no parameter with a gradient."""
        for param in self.params:
            param.grad = None

    def _loss_and_grads(self, *inputs: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        rows, weight = (inputs, None) if self.kl_weight is None else (inputs[:-1], inputs[-1])
        batch = self.batches.transformed(*rows)
        try:
            with ExitStack() as stack:
                stack.enter_context(in_precision(self.precision, self.batches.device))
                if self.is_captured:  # innermost, where it sees who calls
                    stack.enter_context(objectives.ItemsStayTensors())
                loss, params = objectives.loss_and_grads(self.objective, self.model, self.guide, batch, weight)
            self._add_new(params)
            grads = {number: p.grad for number, p in enumerate(self.params) if p.grad is not None}
        finally:
            self.forget_gradients()
        if not grads:
            raise ProgramError("the loss has a gradient for no parameter: does the objective depend on them?")
        # A sum is finite where all its terms are, unless they are so large that it overflows.
        sums = torch.stack([loss, *(grad.sum() for grad in grads.values())])
        return loss, sums.isfinite().all(), grads

    def _add_new(self, params: list[Tensor]) -> None:
        """Parameters that a program only makes in a later step."""
        known = {id(p) for p in self.params}
        # One without a gradient is nothing to train, such as the running averages of an objective.
        late = [p for p in params if id(p) not in known and p.grad is not None]
        if late:
            # No group of their own: a scheduler would not know it.
            self.optimizer.param_groups[0]["params"] += late
            for p in late:
                p.data = p.data if _is_dense(p) else p.data.contiguous()
            self.params += late

    def _over_ranks(
        self, known: int, seen: int, fine: bool, stop: bool, error: Exception | None, grads: dict[int, Tensor]
    ) -> tuple[int, bool, bool, dict[int, Tensor]]:
        """What the parts of a batch come to together. Where something went wrong on one process, all learn of it here.

        Args:
            known: How many parameters there were before the step; those after them are new.
            seen: Data in this process's part.
            fine: Whether its loss and gradients are finite.
            stop: Whether it was asked to stop.
            error: What it raised.
            grads: Its gradients.

        Returns:
            Of all processes: data, whether all are fine, whether any is to stop, and gradients.
        """
        if self.shared < known:  # at first
            self.processes.broadcast_tensors(self.params[self.shared : known], "parameter")
        told = [not fine, stop, error is not None, len(self.params) > known]
        seen_by_all, (wrong, stops, failed, late), whole = self._summed(range(known), seen, told, grads)
        if failed:
            with self.processes.together():
                if error is not None:
                    raise error
        if late and not wrong:
            self.processes.broadcast_tensors(self.params[known:], "parameter made in a later step")
            whole |= self._summed(range(known, len(self.params)), seen, [], grads)[2]
        self.shared = len(self.params)
        return seen_by_all, not wrong, stops > 0, whole

    def _summed(
        self, numbers: range, seen: int, told: list[bool], grads: dict[int, Tensor]
    ) -> tuple[int, list[float], dict[int, Tensor]]:
        """Losses are summed over a batch, so gradients of its parts are, too; with what is told, by one exchange."""
        # A plate that scales a part up to all the data does so on each process: there, the parts are averaged.
        averaged = self.verified.subsampled_from is not None
        params = [self.params[n] for n in numbers]
        kind = reduce(torch.promote_types, (p.dtype for p in params), torch.float32)  # counts are exact to 2^24
        said = torch.tensor([seen, *told, *(n in grads for n in numbers)], dtype=kind, device=self.batches.device)
        dense = [grads[n] if n in grads else torch.zeros_like(p) for n, p in zip(numbers, params, strict=True)]
        said, *dense = self.processes.all_reduce(
            [said, *(g.to(said) * seen if averaged else g.to(said) for g in dense)]
        )
        seen_by_all, *counts = said.tolist()
        divisor = seen_by_all if averaged else 1
        summed = {
            n: torch.empty_like(p).copy_(grad / divisor)  # in the layout that the optimizer's kernel takes for granted
            for n, p, grad, present in zip(numbers, params, dense, counts[len(told) :], strict=True)
            if present
        }
        return int(seen_by_all), counts[: len(told)], summed


def _is_dense(param: Tensor) -> bool:
    """Whether entries fill one piece of memory, in whatever order: the fused kernel walks through it from its start."""
    return torch.empty_like(param).stride() == param.stride()


class _ProductsAlone(TorchFunctionMode):
    """Under autocast, lets no bfloat16 go on from the product it came from: sums and densities are in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        lowered = isinstance(result, Tensor) and result.dtype is torch.bfloat16
        return result.float() if lowered else result


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A block whose matrix products and convolutions are done in some precision; all else, parameters too, stays."""
    stack = ExitStack()
    if precision == "bfloat16":
        # Autocast empties its cache of weights only where the outermost block ends, which may be after many steps.
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False))
        stack.enter_context(_ProductsAlone())
    return stack
