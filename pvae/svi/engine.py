"""The steps of SVI as fast as the hardware: loss, gradients, a look at them, and Adam's update, over and over.

A step is plain Pyro, or the tensor program that was captured from it. On a GPU, captured steps go one further: several
of them, with the choice of their batches and the optimizer, become one CUDA graph, and an epoch passes without the host
waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.overrides import TorchFunctionMode

from pvae.errors import NumericalError, ProgramError
from pvae.graphs import Captured
from pvae.isolation import Program
from pvae.svi import objectives
from pvae.svi.batches import Batches, Rows

__all__ = ["PRECISIONS", "CudaEpochs", "Epochs", "Step", "epochs", "in_precision"]

PRECISIONS = ("float32", "bfloat16")

_STEPS_TO_A_REPLAY = 16


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
    ) -> None:
        self.model, self.guide, self.objective, self.verified = model, guide, objective, verified
        self.batches, self.precision = batches, precision
        self.params = list(verified.params)
        # One fused optimizer for all parameters: pyro.optim makes one for each, which is slower.
        self.fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in self.params)
        self.optimizer = torch.optim.Adam(
            self.params, lr=lr, fused=self.fused, capturable=capture and batches.device.type == "cuda"
        )
        self.forget_gradients()
        self.captured = None
        if capture:
            sees = (model, guide, objective, batches.transform)
            tolerances = (1e-5, 0.05) if precision == "float32" else (0.01, 0.2)
            self.captured = Captured(self._loss_and_grads, "pvae.fit's step", sees, looks=False, tolerances=tolerances)

    def __call__(self, rows: Rows) -> float:
        """Takes one step and returns the loss, in nats summed over the batch.

        Raises:
            NumericalError: The loss or a gradient is not finite; nothing was updated.
        """
        loss, finite, grads = self.evaluate(rows)
        value = loss.item()
        if not finite:
            raise NumericalError("a gradient is not finite" if math.isfinite(value) else f"the loss is {value:g}")
        self.update(grads)
        return value * self.verified.share(rows)

    @property
    def is_captured(self) -> bool:
        """Whether steps are captured programs; else Python has to run in each of them."""
        return self.captured is not None and not self.captured.given_up

    def begin(self) -> None:
        """Looks at what the programs can see, once for the steps that follow: nothing of the caller's runs between."""
        if self.captured is not None:
            self.captured.look()

    def evaluate(self, rows: Rows) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Loss, whether it and all gradients are finite, and gradients by their parameters' number."""
        return (self.captured or self._loss_and_grads)(*rows)

    def update(self, grads: dict[int, Tensor], skip: Tensor | None = None) -> None:
        """Moves the parameters.

        Args:
            grads: By the parameters' number.
            skip: If given, nothing moves where it is 1 rather than 0, and the host need not know which.
        """
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

    def _loss_and_grads(self, *rows: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        batch = self.batches.transformed(*rows)
        try:
            with ExitStack() as stack:
                stack.enter_context(in_precision(self.precision, self.batches.device))
                if self.is_captured:  # innermost, where it sees who calls
                    stack.enter_context(objectives.ItemsStayTensors())
                loss, params = objectives.loss_and_grads(self.objective, self.model, self.guide, batch)
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
        late = [p for p in params if id(p) not in known]
        if late:
            self.optimizer.add_param_group({"params": late})
            self.params += late


class Epochs:
    """Passes over the data, a step at a time.

    Attributes:
        total: The loss so far in this epoch, in nats.
        running: Whether that is known before the epoch's end.
    """

    running = True

    def __init__(self, step: Step) -> None:
        self.step = step
        self.total = 0.0

    def epoch(self, order: Tensor) -> Iterator[int]:
        """Takes a step for each batch of an order of the data, and yields how many data it saw.

        Raises:
            NumericalError: As `Step` does; names the step.
        """
        self.total = 0.0
        self.step.begin()
        for number, rows in enumerate(order.split(self.step.batches.batch_size), 1):
            try:
                self.total += self.step(self.step.batches.take(rows))
            except NumericalError as error:
                raise NumericalError(f"step {number}, before its update: {error}") from None
            yield len(rows)


class CudaEpochs(Epochs):
    """Passes over data that lie on a GPU, several steps to a replay of one CUDA graph.

    Each step of the graph takes its rows of the data by a slice of one static tensor of indices. Losses are summed on
    the device. Where a loss or a gradient is not finite, that update and all after it are skipped on the device, and
    the host learns of it at the end of the epoch.
    """

    running = False

    def __init__(self, step: Step, record: Callable[[Callable[[], None]], Callable[[], None]] | None = None) -> None:
        super().__init__(step)
        self.record = record or _recorded
        device = step.batches.device
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.good = torch.zeros((), device=device)  # steps before the first bad one
        self.bad = torch.zeros((), device=device)
        self.rows = torch.zeros(_STEPS_TO_A_REPLAY, step.batches.batch_size, dtype=torch.int64, device=device)
        self.replay: Callable[[], None] | None = None

    def epoch(self, order: Tensor) -> Iterator[int]:
        """Takes a step for each batch of an order of the data, and yields how many data each replay saw."""
        self.step.begin()
        size = self.step.batches.batch_size
        for tensor in (self.sum, self.good):
            tensor.zero_()
        order = order.to(self.step.batches.device)
        many = size * len(self.rows)
        full = len(order) // many * many
        for rows in order[:full].view(-1, many):
            if not self.step.is_captured or self.replay is None or not self._fits():
                # Everything is compiled, and every kernel loaded, before a graph is recorded.
                for batch in rows.split(size):
                    self._one(batch)
                    yield size
                if not self.step.is_captured:
                    continue
                self.rows.copy_(rows.view_as(self.rows))
                with torch.cuda.device(order.device) if order.is_cuda else nullcontext():
                    self.replay = self.record(self._many)
                self._pointers = self._now()
                continue
            self.rows.copy_(rows.view_as(self.rows))
            self.replay()
            yield len(rows)
        for begin in range(full, len(order), size):
            rows = order[begin : begin + size]
            self._one(rows)
            yield len(rows)
        self.total = self.sum.item()
        if self.bad.item():
            number = int(self.good.item()) + 1
            raise NumericalError(f"step {number}, before its update: the loss or a gradient is not finite")

    def _one(self, rows: Tensor) -> None:
        batch = self.step.batches.take(rows)
        loss, finite, grads = self.step.evaluate(batch)
        self.bad.copy_(torch.maximum(self.bad, (~finite).to(self.bad)))
        self.good.add_(1 - self.bad)
        self.sum.add_(loss.double() * self.step.verified.share(batch))
        self.step.update(grads, skip=self.bad)

    def _many(self) -> None:
        for rows in self.rows:
            self._one(rows)

    def _now(self) -> list[int]:
        return [p.data_ptr() for p in self.step.params]

    def _fits(self) -> bool:
        """Whether the graph's addresses are still those of the parameters."""
        return self._pointers == self._now()


def epochs(step: Step) -> Epochs:
    """The fastest way to run a step over all data: on the GPU if it was captured and the data fit there."""
    device = step.batches.device
    if step.captured is not None and device.type == "cuda":
        size = sum(t.numel() * t.element_size() for t in step.batches.tensors)
        if size < torch.cuda.mem_get_info(device)[0] / 2:
            step.batches = step.batches.on_device()
            return CudaEpochs(step)
    return Epochs(step)


def _recorded(work: Callable[[], None]) -> Callable[[], None]:
    """Work on the GPU as a CUDA graph; recording does none of it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


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
