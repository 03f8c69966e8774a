"""A step that several processes take together: each on its shard of the batch, all with the same update.

Losses are summed over a batch, so gradients of its shards are, too. One exchange for each step carries them, the count
of data, whether numbers are finite, and whether somebody was asked to stop: all go on or stop at the same step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce

import torch
from torch import Tensor

from pvae.data import Rows
from pvae.errors import NumericalError
from pvae.runtime import Processes, Stop
from pvae.svi.passes import Epochs, fastest_epochs
from pvae.svi.step import Step, StepResult

__all__ = ["DistributedStep", "make_passes"]


class DistributedStep:
    """A `Step` on this process's shard of each batch, with what the other processes find on theirs.

    Args:
        step: The step; the processes begin with the same parameters.
        processes: Those that take it together.
        stop: Whether this process was asked to stop.
    """

    def __init__(self, step: Step, processes: Processes, stop: Stop) -> None:
        self.step, self.processes, self.stop = step, processes, stop
        self._num_shared = 0  # so many parameters are known to be the same on all processes
        self._error: Exception | None = None  # why this process has no shard of the next batch

    def __call__(self, rows: Rows | None) -> StepResult:
        """Takes one step.

        Args:
            rows: This process's shard of a batch, which may be empty; ``None`` where it has no batch left.

        Raises:
            NumericalError: The loss or a gradient is not finite on some process; nothing was updated.
            RankError: Another process raised something else; nothing was updated.
        """
        step, before, known = self.step, torch.get_rng_state(), len(self.step.adam.params)
        seen, value, fine, grads = len(rows[0]) if rows else 0, 0.0, True, {}
        error, self._error = self._error, None
        try:
            if rows and seen:
                loss, finite, grads = step.evaluate(rows)
                value, fine = loss.item(), bool(finite)
        except Exception as caught:
            error = caught
        seen, all_fine, stop, grads = self._exchange(known, seen, fine, error, grads)
        if fine and not all_fine:
            raise NumericalError("the loss or a gradient is not finite on another rank")
        if rows and not fine:
            torch.set_rng_state(before)  # for the same noise again
            raise NumericalError(step.what_is_wrong(rows, value, grads))
        step.adam.update(grads)
        return StepResult(value * step.pair.verified.share(rows) if rows else 0.0, seen, stop)

    def feed(self, batches: Iterable[Rows]) -> Iterator[Rows | None]:
        """Shards of batches, and ``None`` for ever once there are no more or one cannot be read.

        A process that has none left is needed in the others' steps, and there they learn of its error.
        """
        iterator = iter(batches)
        while True:
            try:
                rows = next(iterator, None)
            except Exception as error:
                rows, self._error = None, error
            yield rows

    def end_pass(self, total: float) -> float:
        """The loss of a whole pass on all processes, given the sum of this one's steps."""
        # Statistics of batches, such as those of batch normalization, are each process's own.
        modules = self.step.pair.placed.modules
        self.processes.broadcast_tensors([buffer for module in modules for buffer in module.buffers()])
        sums = torch.tensor([total], dtype=torch.float64, device=self.step.batches.device)
        return self.processes.all_reduce([sums])[0].item()

    def is_to_stop(self) -> bool:
        """Whether to stop here, between steps: where any process was asked to."""
        return self.processes.any(self.stop())

    def _exchange(
        self, known: int, seen: int, fine: bool, error: Exception | None, grads: dict[int, Tensor]
    ) -> tuple[int, bool, bool, dict[int, Tensor]]:
        """What the shards of a batch come to together. Where something went wrong on one process, all learn of it here.

        Args:
            known: How many parameters there were before the step; those after them are new.
            seen: Data in this process's shard.
            fine: Whether its loss and gradients are finite.
            error: What it raised.
            grads: Its gradients, by their parameters' number.

        Returns:
            Of all processes: data, whether all are fine, whether any is to stop, and gradients.
        """
        params, processes = self.step.adam.params, self.processes
        if self._num_shared < known:  # at first
            processes.broadcast_tensors(params[self._num_shared : known], "parameter")
        flags = [not fine, self.stop(), error is not None, len(params) > known]
        seen_by_all, (wrong, stops, failed, late), sums = self._all_reduce(range(known), seen, flags, grads)
        if failed:
            with processes.together():
                if error is not None:
                    raise error
        if late and not wrong:
            processes.broadcast_tensors(params[known:], "parameter made in a later step")
            sums |= self._all_reduce(range(known, len(params)), seen, [], grads)[2]
        self._num_shared = len(params)
        return seen_by_all, not wrong, stops > 0, sums

    def _all_reduce(
        self, numbers: range, seen: int, flags: list[bool], grads: dict[int, Tensor]
    ) -> tuple[int, list[float], dict[int, Tensor]]:
        """Data, flags, and the gradients of some parameters, summed over all processes by one exchange."""
        # A plate that scales a shard up to all the data does so on each process: there, the shards are averaged.
        averages = self.step.pair.verified.subsampled_from is not None
        params = [self.step.adam.params[n] for n in numbers]
        kind = reduce(torch.promote_types, (p.dtype for p in params), torch.float32)  # counts are exact to 2^24
        device = self.step.batches.device
        counts = torch.tensor([seen, *flags, *(n in grads for n in numbers)], dtype=kind, device=device)
        dense = [grads[n] if n in grads else torch.zeros_like(p) for n, p in zip(numbers, params, strict=True)]
        dense = [g.to(counts) * seen if averages else g.to(counts) for g in dense]
        counts, *dense = self.processes.all_reduce([counts, *dense])
        seen_by_all, *numbers_of = counts.tolist()
        divisor = seen_by_all if averages else 1
        sums = {
            n: torch.empty_like(p).copy_(grad / divisor)  # in the layout that the optimizer's kernel takes for granted
            for n, p, grad, present in zip(numbers, params, dense, numbers_of[len(flags) :], strict=True)
            if present
        }
        return int(seen_by_all), numbers_of[: len(flags)], sums


def make_passes(step: Step, processes: Processes, stop: Stop) -> Epochs:
    """Passes over the data by a step, alone or with other processes."""
    return fastest_epochs(step) if processes.world_size == 1 else Epochs(step, DistributedStep(step, processes, stop))
