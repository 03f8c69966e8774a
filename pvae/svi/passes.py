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

from pvae.data import InMemory, Rows
from pvae.errors import NumericalError
from pvae.runtime import Interrupted
from pvae.svi.step import Step

__all__ = ["CudaEpochs", "Epochs", "epochs"]

_STEPS_TO_A_REPLAY = 16


class Epochs:
    """Passes over the data, a step at a time.

    Attributes:
        step: The step.
        total: The loss so far in this epoch, in nats, of this process's parts of the batches.
        seen: Data so far in this epoch, in all of each batch.
        steps: Steps so far in this epoch.
        stopped: Whether a process was asked to stop; the epoch may have steps left.
        running: Whether the total is known before the epoch's end.
    """

    running = True

    def __init__(self, step: Step, asked_to_stop: Callable[[], bool] = bool) -> None:
        self.step, self.asked_to_stop = step, asked_to_stop
        self.begin()

    def begin(self, total: float = 0.0, seen: int = 0, steps: int = 0) -> None:
        """Goes to the beginning of an epoch, or to where one was left."""
        self.total, self.seen, self.steps, self.stopped = total, seen, steps, False

    def epoch(self, number: int) -> Iterator[int]:
        """Takes the steps of an epoch from where it stands, and yields how many data each saw.

        Raises:
            NumericalError: As `Step` does; names the step.
        """
        self.step.begin()
        stop, alone = False, self.step.processes.world_size == 1
        for rows, problem in self._parts(number, alone):
            try:
                taken = self.step(rows, self.asked_to_stop(), problem)
            except Interrupted:
                break
            except NumericalError as error:
                raise NumericalError(f"step {self.steps + 1}, before its update: {error}") from None
            if not taken.seen:
                break  # no process has a batch left
            self.total += taken.loss
            self.seen += taken.seen
            self.steps += 1
            yield taken.seen
            stop = taken.stop or (alone and self.asked_to_stop())
            if stop:
                break
        # A loader may have ended early, too, if the signal ended its workers. Several processes stop by what all know.
        self.stopped = stop or (alone and self.asked_to_stop())

    def _parts(self, number: int, alone: bool) -> Iterator[tuple[Rows | None, Exception | None]]:
        """This process's parts of the batches. Of several processes, one that has none left, or cannot read it, goes on
        giving none: it is needed in the others' steps.
        """
        batches = iter(self.step.batches.shuffled(number, self.steps))
        if alone:
            yield from ((rows, None) for rows in batches)
        while not alone:
            try:
                part = next(batches, None), None
            except Exception as problem:
                part = None, problem
            yield part


class CudaEpochs(Epochs):
    """Passes over data that lie on a GPU, several steps to a replay of one CUDA graph.

    Each step of the graph takes its rows of the data by a slice of one static tensor of indices. Losses are summed on
    the device. Where a loss or a gradient is not finite, that update and all after it are skipped on the device, and
    the host learns of it at the end of the epoch.
    """

    running = False

    def __init__(
        self,
        step: Step,
        asked_to_stop: Callable[[], bool] = bool,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ) -> None:
        super().__init__(step, asked_to_stop)
        self.record = record or _recorded
        self.batches: Any = step.batches
        device = self.batches.device
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.good = torch.zeros((), device=device)  # steps before the first bad one
        self.bad = torch.zeros((), device=device)
        self.rows = torch.zeros(_STEPS_TO_A_REPLAY, self.batches.batch_size, dtype=torch.int64, device=device)
        self.replay: Callable[[], None] | None = None

    def epoch(self, number: int) -> Iterator[int]:
        """Takes the steps of an epoch from where it stands, and yields how many data each replay saw."""
        self.step.begin()
        self.sum.fill_(self.total)
        self.good.zero_()
        size, before = self.batches.batch_size, self.steps
        order = self.batches.order(number).to(self.batches.device)
        with suppress(Interrupted):
            for count in self._pieces(order[before * size :]):
                self.seen += count
                self.steps = -(-self.seen // size)
                yield count
                if self.asked_to_stop():
                    break
        self.total = self.sum.item()
        if self.bad.item():
            step = before + int(self.good.item()) + 1
            rows = order[(step - 1) * size : step * size]
            wrong = self.step.what_is_wrong(self.batches.take(rows))
            raise NumericalError(f"step {step}, before its update: {wrong}")
        self.stopped = self.asked_to_stop()

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
        self.bad.copy_(torch.maximum(self.bad, (~finite).to(self.bad)))
        self.good.add_(1 - self.bad)
        self.sum.add_(loss.double() * self.step.verified.share(batch))
        self.step.update(grads, skip=self.bad)

    def _many(self) -> None:
        for rows in self.rows:
            self._one(rows)

    def _now(self) -> list[Any]:
        group = self.step.optimizer.param_groups[0]
        return [*(p.data_ptr() for p in self.step.params), group["lr"], group["betas"]]

    def _fits(self) -> bool:
        """Whether the graph's addresses are still those of the parameters, and its settings those of now."""
        return self._recorded_for == self._now()


def epochs(step: Step, asked_to_stop: Callable[[], bool] = bool) -> Epochs:
    """The fastest way to run a step over all data: on the GPU if it was captured and the data fit there."""
    batches = step.batches
    alone = step.processes.world_size == 1
    if (
        step.captured is not None
        and step.fused
        and batches.device.type == "cuda"
        and isinstance(batches, InMemory)
        and alone
    ):
        size = sum(t.numel() * t.element_size() for t in batches.tensors)
        if size < torch.cuda.mem_get_info(batches.device)[0] / 2:
            step.batches = batches.on_device()
            return CudaEpochs(step, asked_to_stop)
    return Epochs(step, asked_to_stop)


def _recorded(work: Callable[[], None]) -> Callable[[], None]:
    """Work on the GPU as a CUDA graph; recording does none of it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
