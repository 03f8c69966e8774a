"""Passes over the data, a step at a time.

On a GPU, captured steps go one further: several of them, with the choice of their batches and the optimizer, become one
CUDA graph, and a pass goes by without the host waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from pvae.capture import InPlace
from pvae.data import InMemory
from pvae.errors import NumericalError
from pvae.runtime import Interrupted
from pvae.svi.adam import clipping, move_where
from pvae.svi.step import Step, StepLike

__all__ = ["CudaEpochs", "Epochs", "fastest_epochs"]

_STEPS_TO_A_REPLAY = 16
# After so many, an update that is compiled would have paid for it: compiling takes some 10 s, and a step 60 us less.
_STEPS_THAT_PAY = 150_000


class Epochs:
    """Passes over the data, a step at a time.

    Attributes:
        total: The loss so far in this epoch, in nats, of this process's shards of the batches.
        seen: Data so far in this epoch, in all of each batch.
        steps: Steps so far in this epoch.
        is_stopped: Whether it was asked to stop; the epoch may have steps left.
    """

    def __init__(self, step: Step, take: StepLike | None = None) -> None:
        """Takes steps by ``take``, which is the step itself or one around it."""
        self.step, self.take = step, step if take is None else take
        self.begin()

    def begin(self, total: float = 0.0, seen: int = 0, steps: int = 0) -> None:
        """Goes to the beginning of an epoch, or to where one was left."""
        self.total, self.seen, self.steps, self.is_stopped = total, seen, steps, False

    @property
    def loss_so_far(self) -> float | None:
        """The loss in this epoch, nats per datum; none where it is not known before the end."""
        return self.total / max(self.seen, 1) if self.take is self.step else None

    def mean_loss(self) -> float:
        """The loss of the whole pass, nats per datum."""
        return self.take.end_pass(self.total) / self.seen

    def is_to_stop(self) -> bool:
        """Whether to stop here, between epochs."""
        return self.take.is_to_stop()

    def epoch(self, number: int) -> Iterator[int]:
        """Takes the steps of an epoch from where it stands, and yields how many data each saw.

        Raises:
            NumericalError: As `Step` does; names the step.
        """
        self.step.look()
        stop = False
        for rows in self.take.feed(self.step.batches.shuffle(number, self.steps)):
            try:
                result = self.take(rows)
            except Interrupted:
                break
            except NumericalError as error:
                raise NumericalError(f"step {self.steps + 1}, before its update: {error}") from None
            if not result.seen:
                break  # there are none left
            self.total += result.loss
            self.seen += result.seen
            self.steps += 1
            yield result.seen
            stop = result.stop or self.step.stop()
            if stop:
                break
        # A loader may have ended early, too, if the signal ended its workers.
        self.is_stopped = stop or self.step.stop()


class CudaEpochs(Epochs):
    """Passes over data that lie on a GPU, several steps to a replay of one CUDA graph.

    Each step of the graph takes its rows of the data by a slice of one static tensor of indices. Losses are summed on
    the device. Where a loss or a gradient is not finite, that update and all after it are skipped on the device, and
    the host learns of it at the end of the epoch. In a long run the update is compiled, too, from some epoch on, by the
    number of steps, so that a run that was stopped goes on as one that was not.
    """

    def __init__(self, step: Step, record: Callable[[Callable[[], None]], Callable[[], None]] | None = None) -> None:
        super().__init__(step)
        self.record = record or _record
        batches: Any = step.batches
        self.batches: InMemory = batches.on_device()
        device = self.batches.device
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.good = torch.zeros((), device=device)  # steps before the first bad one
        self.bad = torch.zeros((), device=device)
        self.rows = torch.zeros(_STEPS_TO_A_REPLAY, self.batches.batch_size, dtype=torch.int64, device=device)
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self.shares: dict[float, Tensor] = {}  # of the loss of a batch, as tensors
        self.account = InPlace(_account, "what follows the gradients of pvae.fit's step")
        self.pays = False  # whether the update is compiled, too
        self.replay: Callable[[], None] | None = None

    @property
    def loss_so_far(self) -> None:
        """None: losses stay on the device."""

    def epoch(self, number: int) -> Iterator[int]:
        """Takes the steps of an epoch from where it stands, and yields how many data each replay saw."""
        self.step.look()
        self.sum.fill_(self.total)
        self.lr.fill_(self.step.adam.optimizer.param_groups[0]["lr"])
        self.good.zero_()
        self.pays = self.step.adam.taken - self.steps >= _STEPS_THAT_PAY
        size, before = self.batches.batch_size, self.steps
        order = self.batches.order(number).to(self.batches.device)
        with suppress(Interrupted):
            for count in self._pieces(order[before * size :]):
                self.seen += count
                self.steps = -(-self.seen // size)
                yield count
                if self.step.stop():
                    break
        self.total = self.sum.item()
        if self.bad.item():
            step = before + int(self.good.item()) + 1
            rows = order[(step - 1) * size : step * size]
            wrong = self.step.what_is_wrong(self.batches.take(rows))
            raise NumericalError(f"step {step}, before its update: {wrong}")
        self.is_stopped = self.step.stop()

    def _pieces(self, order: Tensor) -> Iterator[int]:
        """Takes the steps of an order of the data, and yields how many data it saw at once."""
        size = self.batches.batch_size
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
                self._recorded_for = self._now()
                continue
            self.rows.copy_(rows.view_as(self.rows))
            self.replay()
            yield len(rows)
        for begin in range(full, len(order), size):
            rows = order[begin : begin + size]
            self._one(rows)
            yield len(rows)

    def _one(self, rows: Tensor) -> None:
        batch = self.batches.take(rows)
        loss, finite, grads = self.step.evaluate(batch)
        adam, numbers, share = self.step.adam, tuple(grads), self.step.pair.verified.share(batch)
        if not self.pays:
            _count(loss, finite, share, self.bad, self.good, self.sum)
            adam.update(grads, skip=self.bad)
            return
        group, settings = adam.group(numbers), adam.optimizer.param_groups[0]
        if share not in self.shares:
            self.shares[share] = torch.full_like(self.sum, share)
        tensors = *grads.values(), *group.params, *group.means, *group.squares
        options = {"betas": tuple(settings["betas"]), "eps": settings["eps"], "weight_decay": settings["weight_decay"]}
        counts = self.bad, self.good, self.sum, adam.steps
        options |= {"clip_norm": adam.clip_norm, "numbers": numbers}
        self.account((loss, finite, self.shares[share], self.lr, *counts, *tensors), **options)

    def _many(self) -> None:
        for rows in self.rows:
            self._one(rows)

    def _now(self) -> list[Any]:
        settings = self.step.adam.optimizer.param_groups[0]
        known = ("betas", "eps", "weight_decay") if self.pays else ("betas", "eps", "weight_decay", "lr")
        return [self.pays, *(p.data_ptr() for p in self.step.adam.params), *(settings[key] for key in known)]

    def _fits(self) -> bool:
        """Whether the graph's addresses are still those of the parameters, and its settings those of now."""
        return self._recorded_for == self._now()


def fastest_epochs(step: Step) -> Epochs:
    """The fastest way to run a step over all data: on the GPU if it was captured and the data fit there."""
    batches, on_gpu = step.batches, step.batches.device.type == "cuda"
    if step.captured is not None and step.adam.is_fused and on_gpu and isinstance(batches, InMemory):
        size = sum(t.numel() * t.element_size() for t in batches.tensors)
        if size < torch.cuda.mem_get_info(batches.device)[0] / 2:
            return CudaEpochs(step)
    return Epochs(step)


def _account(
    loss: Tensor,
    finite: Tensor,
    share: Tensor,
    lr: Tensor,
    bad: Tensor,
    good: Tensor,
    total: Tensor,
    steps: Tensor,
    *tensors: Tensor,
    clip_norm: float | None,
    numbers: tuple[int, ...],
    **settings: Any,
) -> None:
    """Sums a loss, counts its step, and moves the parameters unless this or an earlier step was bad."""
    _count(loss, finite, share, bad, good, total)
    grads, others = tensors[: len(numbers)], tensors[len(numbers) :]
    if clip_norm is not None:
        shrink = clipping(grads, clip_norm)
        grads = [grad * shrink for grad in grads]
    move_where(bad == 0, lr, steps, numbers, (*grads, *others), **settings)


def _count(loss: Tensor, finite: Tensor, share: Tensor | float, bad: Tensor, good: Tensor, total: Tensor) -> None:
    """Sums a loss, and counts its step where neither this one nor an earlier one was bad."""
    bad.copy_(torch.maximum(bad, (~finite).to(bad)))
    good.add_(1 - bad)
    total.add_(loss.to(total) * share)


def _record(work: Callable[[], None]) -> Callable[[], None]:
    """Work on the GPU as a CUDA graph; recording does none of it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
