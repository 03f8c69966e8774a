"""The loop over epochs, and where it stands: all that a checkpoint has to hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from pvae.errors import CheckpointError, NumericalError
from pvae.runtime import Processes, Stop, noise, set_noise
from pvae.svi import objectives
from pvae.svi.checkpoints import Folder, Saved, check_weights
from pvae.svi.contents import FIXED
from pvae.svi.pairs import Pair
from pvae.svi.passes import Epochs
from pvae.svi.validation import Validation

__all__ = ["Callback", "Plan", "Training"]

Callback = Callable[[dict[str, float]], Any]


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        epochs: Passes over the data, those of earlier processes included.
        kl_weights: One for each epoch; ``None`` where latents have no weight.
        patience: Epochs without a better validation ELBO after which it ends; ``None`` for never.
        arguments: What decides the numbers, as plain values: a checkpoint of other ones is not gone on from.
        environment: Where it runs, as plain values.
    """

    epochs: int
    kl_weights: Sequence[float] | None
    patience: int | None
    arguments: Mapping[str, Any]
    environment: Mapping[str, Any]

    @cached_property
    def settled(self) -> int:
        """The first epoch from which the weight no longer changes: epochs before are compared with none."""
        weights = self.kl_weights or [1.0]
        return max((n + 1 for n, weight in enumerate(weights, 1) if weight != weights[-1]), default=1)


class Training:
    """A run of epochs.

    Attributes:
        history: As in `FitResult`, as lists.
        last: The folder of the last checkpoint.
    """

    def __init__(
        self,
        plan: Plan,
        passes: Epochs,
        validation: Validation | None,
        scheduler: LRScheduler | None,
        tensors: Callable[[], dict[str, Tensor]],
        pair: Pair,
        processes: Processes,
    ) -> None:
        self.plan, self.passes, self.validation, self.scheduler = plan, passes, validation, scheduler
        self.tensors, self.pair, self.processes = tensors, pair, processes
        self.step = passes.step
        self.step.names = tensors
        self.curve = "elbo" if objectives.is_elbo(self.step.objective) and not plan.kl_weights else "objective"
        names = [self.curve]
        names += ["validation_elbo"] if validation else []
        names += ["kl_weight"] if plan.kl_weights else []
        names += ["lr"] if scheduler else []
        self.history: dict[str, list[float]] = {name: [] for name in (*names, "seconds")}
        self.seconds = 0.0  # spent on an epoch that is not done
        self.last: Path | None = None
        self._saved: tuple[int, int] | None = None

    @property
    def records(self) -> list[dict[str, float]]:
        """The history, as a dict for each epoch."""
        rows = zip(*self.history.values(), strict=True)
        return [{"epoch": n, **dict(zip(self.history, row, strict=True))} for n, row in enumerate(rows, 1)]

    @property
    def done(self) -> int:
        """Whole epochs."""
        return len(self.history["seconds"])

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the best validation ELBO, or without validation the best training curve; none yet at first."""
        values = np.array(self.history["validation_elbo" if self.validation else self.curve][self.plan.settled - 1 :])
        return None if np.isnan(values).all() else self.plan.settled + int(np.nanargmax(values))

    @property
    def out_of_patience(self) -> bool:
        """Whether too many epochs were no better."""
        best = self.best_epoch
        return self.plan.patience is not None and best is not None and self.done - best >= self.plan.patience

    def run(self, stop: Stop, folder: Folder | None, callback: Callback | None, progress: bool) -> str:
        """Trains; returns why it ended."""
        total = None if self.step.batches.num_data is None else self.plan.epochs * self.step.batches.num_data
        initial = self.done * (self.step.batches.num_data or 0) + self.passes.seen
        off = None if progress and self.processes.is_main else True
        with tqdm(total=total, initial=initial, unit=" data", unit_scale=True, disable=off) as bar:
            while self.done < self.plan.epochs:
                if self.processes.any(stop()):
                    self._save(folder)
                    return "signal"
                if self.out_of_patience:
                    return "patience"
                if not self._epoch(bar):
                    self._save(folder)
                    return "signal"
                with self.processes.together():
                    if self.processes.is_main:
                        self._tell(folder, callback)
                self._save(folder)
        return "signal" if self.processes.any(stop()) else "epochs"

    def _tell(self, folder: Folder | None, callback: Callback | None) -> None:
        record = {"epoch": self.done, **{name: values[-1] for name, values in self.history.items()}}
        if folder is not None:
            folder.append_history(record)
        if callback is not None:
            before = self._noise()
            try:
                callback(record)
            except Exception:
                if self.processes.world_size == 1:
                    self._set_noise(before)
                    self._save(folder)  # the epoch is not lost for it
                raise
            self._set_noise(before)  # whatever a callback draws, training goes on alike

    def _epoch(self, bar: tqdm) -> bool:
        """Takes the steps of an epoch, from where it stands, and what follows them; not all of it if asked to stop."""
        number, epochs = self.done + 1, self.plan.epochs
        start = time.perf_counter() - self.seconds
        lr = self.step.optimizer.param_groups[0]["lr"]
        if self.plan.kl_weights and self.step.kl_weight is not None:
            self.step.kl_weight.fill_(self.plan.kl_weights[number - 1])
        passes, total = self.passes, self.step.batches.num_data
        for count in passes.epoch(number):
            bar.update(count)
            if (passes.running and self.processes.world_size == 1) or passes.seen == total:
                mean = -passes.total / max(passes.seen, 1)
                bar.set_description(f"epoch {number}/{epochs}, {self.curve} {mean:.2f} nats", False)
        self.seconds = time.perf_counter() - start
        if passes.stopped:
            return False
        self._check_weights()
        # Statistics of batches, such as those of batch normalization, are each process's own.
        self.processes.broadcast_tensors([b for module in self.pair.modules for b in module.buffers()])
        sums = torch.tensor([passes.total], dtype=torch.float64, device=self.step.batches.device)
        values = {self.curve: -self.processes.all_reduce([sums])[0].item() / passes.seen}
        if self.validation is not None:
            held_out = self.validation(number)
            if held_out is None:
                return False
            values["validation_elbo"] = held_out
            bar.set_postfix_str(f"validation {values['validation_elbo']:.2f}")
        if self.plan.kl_weights:
            values["kl_weight"] = self.plan.kl_weights[number - 1]
        if self.scheduler is not None:
            values["lr"] = float(lr)
            watched = -values.get("validation_elbo", values[self.curve])
            needs: Any = [watched] if isinstance(self.scheduler, ReduceLROnPlateau) else []
            self.scheduler.step(*needs)
        values["seconds"] = time.perf_counter() - start
        for name, value in values.items():
            self.history[name].append(value)
        self.seconds = 0.0
        passes.begin()
        return True

    def _check_weights(self) -> None:
        """The loss shows what a step was given, not what its update came to."""
        for name, tensor in self.tensors().items():
            if tensor.requires_grad and not tensor.isfinite().all():
                raise NumericalError(f"after its last step: {name} is not finite")

    def _save(self, folder: Folder | None) -> None:
        """Writes a checkpoint of where it stands; the first process does so for all."""
        if self._saved == (self.done, self.passes.steps) or not self.processes.broadcast(folder is not None):
            return
        noises, totals = self.processes.all_gather(self._noise()), self.processes.all_gather(self.passes.total)
        # Parts of one batch may have other shapes on other processes.
        memories = self.processes.all_gather([c.state_dict() if c else None for c in self._captured()])
        with self.processes.together():
            if folder is not None:
                self.last = folder.write(self.saved(noises, totals, memories))
        self._saved = (self.done, self.passes.steps)

    def check_names(self) -> None:
        """Raises `CheckpointError` where something is trained or held that a checkpoint cannot hold."""
        tensors = self.tensors()
        known = {id(t) for t in tensors.values()}
        for param in self.step.params:
            if id(param) not in known:
                raise CheckpointError(
                    f"a parameter of shape {tuple(param.shape)} is trained, and cannot be in a checkpoint: it belongs "
                    "to a module that was not found in the model or the guide. Make the module an attribute of what "
                    "holds the program, or a variable that the program uses."
                )
        if left_out := self.pair.unnamed():
            raise CheckpointError(f"what a module holds cannot be in a checkpoint: {'; '.join(left_out)}.")
        check_weights(tensors)

    def saved(self, noises: list[Any], totals: list[float], memories: list[Any]) -> Saved:
        """All of it, as a checkpoint holds it."""
        tensors = self.tensors()
        places = {id(t): name for name, t in tensors.items()}
        optimizer, store = self.step.optimizer, pyro.get_param_store()
        training = {
            "epoch": self.done,
            "steps": self.passes.steps,
            "seen": self.passes.seen,
            "totals": totals,
            "seconds": self.seconds,
            "order": [places[id(p)] for p in self.step.params],
            "optimizer": {places[id(p)]: dict(state) for p, state in optimizer.state.items()},
            "group": {k: v for k, v in optimizer.param_groups[0].items() if k not in FIXED},
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "noise": noises,
            "constraints": {name: repr(store._constraints[name]) for name in self.pair.bare(store._params)},
            "memory": memories,
        }
        config = {
            "arguments": dict(self.plan.arguments),
            "environment": dict(self.plan.environment),
            "kl_weights": self.plan.kl_weights and list(self.plan.kl_weights[: self.done + bool(self.passes.steps)]),
            "best_epoch": self.best_epoch,
        }
        return Saved({n: t.detach() for n, t in tensors.items()}, training, dict(self.history), config)

    def restore(self, saved: Saved) -> None:
        """Goes to where a checkpoint stands. Weights are taken over by the caller, before anything is made of them."""
        training = saved.training
        names = self.tensors()
        optimizer = self.step.optimizer
        self.step.params = [names[name] for name in training["order"]]
        optimizer.param_groups[0] |= {**training["group"], "params": list(self.step.params)}
        counts_there = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        for name, state in training["optimizer"].items():
            param = names[name]
            # Adam's kernel takes for granted that moments lie in memory as the parameter does.
            moments = {key: torch.empty_like(param).copy_(state[key]) for key in ("exp_avg", "exp_avg_sq")}
            step = state["step"].to(param.device if counts_there else "cpu")
            optimizer.state[param] = {"step": step, **moments}
        if self.scheduler is not None and training["scheduler"] is not None:
            self.scheduler.load_state_dict(dict(training["scheduler"]))
        self.history = {name: list(values) for name, values in saved.history.items() if name in self.history}
        same_ranks = len(training["totals"]) == self.processes.world_size
        total = (
            training["totals"][self.processes.rank]
            if same_ranks
            else sum(training["totals"]) / self.processes.world_size
        )
        self.passes.begin(total, training["seen"], training["steps"])
        self.seconds, self.last = training["seconds"], saved.folder
        self._saved = (self.done, self.passes.steps)
        optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]  (what schedulers look for)
        if same_ranks:
            for captured, memory in zip(self._captured(), training["memory"][self.processes.rank], strict=True):
                if captured is not None and memory is not None:
                    captured.load_state_dict(memory)
            self._set_noise(training["noise"][self.processes.rank])

    def _captured(self) -> list[Any]:
        return [self.step.captured, self.validation.captured if self.validation else None]

    def _noise(self) -> Any:
        """Random numbers' states, as tensors and plain values."""
        state, python, (kind, keys, *places) = noise()
        device = self.step.batches.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        numpy = [kind, torch.from_numpy(keys.astype(np.int64)), *places]
        return {"torch": state, "cuda": cuda, "python": python, "numpy": numpy}

    def _set_noise(self, states: Any) -> None:
        kind, keys, *places = states["numpy"]
        set_noise((states["torch"], states["python"], (kind, keys.numpy().astype(np.uint32), *places)))
        device = self.step.batches.device
        if device.type == "cuda" and states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"], device)
