"""The step of SVI as fast as the hardware: loss, gradients, a look at them, and Adam's update.

A step is plain Pyro, or the tensor program that was captured from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pvae.capture import Captured
from pvae.data import Batches, Rows
from pvae.errors import NumericalError, ProgramError
from pvae.runtime import NeverStop, Stop, in_precision
from pvae.svi import losses
from pvae.svi.adam import Adam
from pvae.svi.settings import Settings
from pvae.svi.trainable import DENSE, Trainable

__all__ = ["Step", "StepLike", "StepResult"]


class StepResult(NamedTuple):
    """What a step came to."""

    loss: float  # of this process's shard of the batch, in nats summed over it
    seen: int  # data in the whole batch
    stop: bool  # whether it is time to stop


class StepLike(Protocol):
    """What a pass over the data takes steps by: a `Step`, or what is around one."""

    def __call__(self, rows: Any) -> StepResult: ...  # noqa: D102

    def feed(self, batches: Iterable[Rows]) -> Iterator[Any]: ...  # noqa: D102

    def end_pass(self, total: float) -> float: ...  # noqa: D102

    def is_to_stop(self) -> bool: ...  # noqa: D102


class Step:
    """Loss and gradients of a batch, and Adam's update.

    Args:
        pair: The pair that is trained.
        batches: Where batches come from.
        settings: Learning rate, precision, clipping, KL weights, whether to capture.
        stop: Whether the process was asked to stop.

    Attributes:
        adam: What moves the parameters, and holds those that are trained.
        kl_weight: What multiplies latents' log-densities, shape ``()``, an input of captured programs, which see its
            changes; ``None`` where they have no weight.
    """

    def __init__(self, pair: Trainable, batches: Batches, settings: Settings, stop: Stop | None = None) -> None:
        self.pair, self.batches, self.settings = pair, batches, settings
        self.stop = NeverStop() if stop is None else stop
        self.kl_weight = None if settings.kl_weights is None else torch.ones((), device=batches.device)
        on_gpu = batches.device.type == "cuda"
        self.adam = Adam(pair.verified.params, settings.lr, settings.clip_norm, settings.capture and on_gpu)
        self.adam.zero_grad()
        self.met: set[int] = set()  # parameters that the programs and the objective take up, by their ids
        self.captured = None
        if settings.capture:
            self.captured = Captured(
                self._loss_and_grads,
                "pvae.fit's step",
                (pair.placed.model, pair.placed.guide, pair.objective, batches.transform),
                check_each_run=False,
                tolerances=(1e-5, 0.05) if settings.precision == "float32" else (0.01, 0.2),
                compiling=self.stop.interrupting,
            )

    def __call__(self, rows: Rows) -> StepResult:
        """Takes one step on a batch.

        Raises:
            NumericalError: The loss or a gradient is not finite; nothing was updated.
        """
        before = torch.get_rng_state()
        loss, finite, grads = self.evaluate(rows)
        value = loss.item()
        if not finite:
            torch.set_rng_state(before)  # for the same noise again
            raise NumericalError(self.what_is_wrong(rows, value, grads))
        self.adam.update(grads)
        return StepResult(value * self.pair.verified.share(rows), len(rows[0]), self.stop())

    def feed(self, batches: Iterable[Rows]) -> Iterator[Rows]:
        """What to call it with in a pass over the data: each batch."""
        return iter(batches)

    def end_pass(self, total: float) -> float:
        """The loss of a whole pass, given the sum of what its steps returned."""
        return total

    def is_to_stop(self) -> bool:
        """Whether to stop here, between steps."""
        return self.stop()

    def what_is_wrong(self, rows: Rows, loss: float = math.nan, grads: dict[int, Tensor] | None = None) -> str:
        """Where a loss or a gradient that is not finite may come from, in words."""
        said = "the loss or a gradient is not finite"
        if grads is not None:
            said = "a gradient is not finite" if math.isfinite(loss) else f"the loss is {loss:g}"
        found = self.pair.not_finite(self.batches.apply_transform(*rows))
        if not found and grads is not None and math.isfinite(loss):
            bad = {id(self.adam.params[number]) for number, grad in grads.items() if not grad.isfinite().all()}
            found = (
                f"that of {', '.join(name for name, param in self.pair.named_tensors().items() if id(param) in bad)}"
            )
        return f"{said}: {found}" if found else said

    @property
    def is_captured(self) -> bool:
        """Whether steps are captured programs; else Python has to run in each of them."""
        return self.captured is not None and not self.captured.given_up

    def look(self) -> None:
        """Looks at what the programs can see, once for the steps that follow: nothing of the caller's runs between."""
        if self.captured is not None:
            self.captured.drop_if_changed()

    def evaluate(self, rows: Rows) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """Loss, whether it and all gradients are finite, and gradients by their parameters' number."""
        inputs = rows if self.kl_weight is None else (*rows, self.kl_weight)
        return (self.captured or self._loss_and_grads)(*inputs)

    def _loss_and_grads(self, *inputs: Tensor) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        rows, weight = (inputs, None) if self.kl_weight is None else (inputs[:-1], inputs[-1])
        batch = self.batches.apply_transform(*rows)
        try:
            with ExitStack() as stack:
                stack.enter_context(in_precision(self.settings.precision, self.batches.device))
                if self.is_captured:  # innermost, where it sees who calls
                    stack.enter_context(losses.ItemsStayTensors())
                loss, params = losses.loss_and_grads(
                    self.pair.objective, self.pair.placed.model, self.pair.placed.guide, batch, weight
                )
            self._add_new(params)
            grads = {number: p.grad for number, p in enumerate(self.adam.params) if p.grad is not None}
        finally:
            self.adam.zero_grad()
        if not grads:
            raise ProgramError("the loss has a gradient for no parameter: does the objective depend on them?")
        if sparse := [self.adam.params[number] for number, grad in grads.items() if grad.layout is not torch.strided]:
            names = [name for name, tensor in self.pair.named_tensors().items() if any(tensor is p for p in sparse)]
            raise ProgramError(f"the gradient of {names or 'a parameter'} is sparse, which Adam does not take: {DENSE}")
        # A sum is finite where all its terms are, unless they are so large that it overflows.
        sums = torch.stack([loss, *(grad.sum() for grad in grads.values())])
        return loss, sums.isfinite().all(), grads

    def _add_new(self, params: list[Tensor]) -> None:
        """Parameters that a program only makes in a later step."""
        self.met |= {id(p) for p in params}
        known = {id(p) for p in self.adam.params}
        # One without a gradient is nothing to train, such as the running averages of an objective.
        late = [p for p in params if id(p) not in known and p.grad is not None]
        if late:
            self.adam.add(late)
