"""A run: the loop over epochs, and where it stands, which is all that a checkpoint has to hold."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from pvae.errors import NumericalError
from pvae.runtime import get_rng_state, set_rng_state
from pvae.svi.checkpointer import Checkpointer
from pvae.svi.checkpoints import Saved
from pvae.svi.passes import Epochs
from pvae.svi.results import FitResult
from pvae.svi.settings import Settings
from pvae.svi.validation import Validation

__all__ = ["Run"]

_ENOUGH_TO_JUDGE = 200  # steps; before, an encoder that tells nothing apart is only a new one


class Run:
    """A run of epochs.

    Args:
        settings: What is asked for.
        passes: Over the data.
        validation: Of held-out data, after each epoch.
        checkpointer: Where it is kept.

    Attributes:
        curve: What the training curve is called: ``"elbo"`` where it is one.
        history: As in `FitResult`, as lists.
    """

    def __init__(
        self, settings: Settings, passes: Epochs, validation: Validation | None, checkpointer: Checkpointer
    ) -> None:
        self.settings, self.passes, self.validation, self.checkpointer = settings, passes, validation, checkpointer
        self.step = passes.step
        self.scheduler: LRScheduler | None = settings.make_scheduler(self.step.adam.optimizer)
        self.curve = "elbo" if self.step.pair.is_elbo and not settings.kl_weights else "objective"
        names = [self.curve]
        names += ["validation_elbo"] if validation else []
        names += ["kl_weight"] if settings.kl_weights else []
        names += ["lr"] if self.scheduler else []
        self.history: dict[str, list[float]] = {name: [] for name in (*names, "seconds")}
        self.seconds = 0.0  # spent on an epoch that is not done

    @property
    def records(self) -> list[dict[str, float]]:
        """The history, as a dict for each epoch."""
        rows = zip(*self.history.values(), strict=True)
        return [{"epoch": n, **dict(zip(self.history, row, strict=True))} for n, row in enumerate(rows, 1)]

    @property
    def num_epochs(self) -> int:
        """Whole epochs so far."""
        return len(self.history["seconds"])

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the best validation ELBO, or without validation the best training curve; none yet at first."""
        first = self.settings.settled_epoch
        values = np.array(self.history["validation_elbo" if self.validation else self.curve][first - 1 :])
        return None if np.isnan(values).all() else first + int(np.nanargmax(values))

    @property
    def is_out_of_patience(self) -> bool:
        """Whether too many epochs were no better."""
        best, patience = self.best_epoch, self.settings.patience
        return patience is not None and best is not None and self.num_epochs - best >= patience

    def train(self) -> FitResult:
        """Trains, from where it stands.

        Raises:
            NumericalError: The loss, a gradient or a parameter is not finite; says where, and what to try.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Encountered NaN")  # Pyro's; our error says where it comes from
                why = self._loop()
        except NumericalError as error:
            raise self._explain(error) from None
        finally:
            self.step.adam.zero_grad()
        placed = self.step.pair.placed
        params, state = placed.bare_state(pyro.get_param_store())
        for name in self._unused(state["params"]):
            del params[name], state["params"][name], state["constraints"][name]
        history = {name: np.array(values) for name, values in self.history.items()}
        seconds = self.step.captured.seconds if self.step.captured else 0.0
        last = self.checkpointer.last
        return FitResult(history, params, placed.device, self.settings.seed, seconds, state, why, None, last)

    def _unused(self, params: Mapping[str, Tensor]) -> list[str]:
        """Parameters that were given to start from, and that neither the trial run nor a step took up."""
        met = {id(param) for param in self.step.pair.verified.params} | self.step.met
        start = {} if self.settings.params is None else self.settings.params["params"]
        return [name for name, param in params.items() if param is start.get(name) and id(param) not in met]

    def is_to_stop(self) -> bool:
        """Whether somebody was asked to stop."""
        return self.passes.is_to_stop()

    def warn_if_collapsed(self, result: FitResult) -> None:
        """Says so where no latent dimension follows the data after a run that was long enough to judge."""
        if self.num_epochs * (self.step.batches.steps or 1) >= _ENOUGH_TO_JUDGE:
            self.step.pair.warn_if_collapsed(result._state)

    def _loop(self) -> str:
        """Takes epoch after epoch; returns why it ended."""
        num_data = self.step.batches.num_data
        total = None if num_data is None else self.settings.epochs * num_data
        initial = self.num_epochs * (num_data or 0) + self.passes.seen
        off = None if self.settings.progress else True
        with tqdm(total=total, initial=initial, unit=" data", unit_scale=True, disable=off) as bar:
            while self.num_epochs < self.settings.epochs:
                if self.is_to_stop():
                    self.checkpointer.save(self.state_dict)
                    return "signal"
                if self.is_out_of_patience:
                    return "patience"
                if not self._epoch(bar):
                    self.checkpointer.save(self.state_dict)
                    return "signal"
                self._tell(self.records[-1])
                self.checkpointer.save(self.state_dict)
        return "signal" if self.is_to_stop() else "epochs"

    def _explain(self, error: NumericalError) -> NumericalError:
        last = self.checkpointer.last
        said = "There is no checkpoint." if last is None else f"The last good checkpoint is {last}."
        lr = float(self.step.adam.optimizer.param_groups[0]["lr"])
        return NumericalError(
            f"training stopped at epoch {self.num_epochs + 1}, {error}. {said} "
            f"Try a smaller lr than {lr:g}, clip_norm, or rescale the data."
        )

    def _tell(self, record: dict[str, float]) -> None:
        self.checkpointer.append_history(record)
        if self.settings.callback is None:
            return
        before = self._rng_state()
        try:
            self.settings.callback(record)
        except Exception:
            self._set_rng_state(before)
            self.checkpointer.rescue(self.state_dict)  # the epoch is not lost for it
            raise
        self._set_rng_state(before)  # whatever a callback draws, training goes on alike

    def _epoch(self, bar: tqdm) -> bool:
        """Takes the steps of an epoch, from where it stands, and what follows them; not all of it if asked to stop."""
        number, settings, passes = self.num_epochs + 1, self.settings, self.passes
        start = time.perf_counter() - self.seconds
        lr = self.step.adam.optimizer.param_groups[0]["lr"]
        if settings.kl_weights and self.step.kl_weight is not None:
            self.step.kl_weight.fill_(settings.kl_weights[number - 1])
        for count in passes.epoch(number):
            bar.update(count)
            if (loss := passes.loss_so_far) is not None:
                bar.set_description(f"epoch {number}/{settings.epochs}, {self.curve} {-loss:.2f} nats", False)
        self.seconds = time.perf_counter() - start
        if passes.is_stopped:
            return False
        self._check_weights()
        values = {self.curve: -passes.mean_loss()}
        bar.set_description(f"epoch {number}/{settings.epochs}, {self.curve} {values[self.curve]:.2f} nats", False)
        if self.validation is not None:
            held_out = self.validation(number)
            if held_out is None:
                return False
            values["validation_elbo"] = held_out
            bar.set_postfix_str(f"validation {held_out:.2f}")
        if settings.kl_weights:
            values["kl_weight"] = settings.kl_weights[number - 1]
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
        for name, tensor in self.step.pair.named_tensors().items():
            if tensor.requires_grad and not tensor.isfinite().all():
                raise NumericalError(f"after its last step: {name} is not finite")

    def state_dict(self) -> Saved:
        """Where this process stands, as a checkpoint holds it."""
        tensors = self.step.pair.named_tensors()
        names = {id(t): name for name, t in tensors.items()}
        store, weights = pyro.get_param_store(), self.settings.kl_weights
        bare = self.step.pair.placed.bare_params(store._params)
        training = {
            "epoch": self.num_epochs,
            "steps": self.passes.steps,
            "seen": self.passes.seen,
            "totals": self.passes.total,
            "seconds": self.seconds,
            **self.step.adam.state_dict(names),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "noise": self._rng_state(),
            "constraints": {name: repr(store._constraints[name]) for name in bare},
            "memory": [c.state_dict() if c else None for c in self._captures()],
        }
        config = {
            "kl_weights": weights and list(weights[: self.num_epochs + bool(self.passes.steps)]),
            "best_epoch": self.best_epoch,
        }
        return Saved({n: t.detach() for n, t in tensors.items()}, training, dict(self.history), config)

    def load_state_dict(self, saved: Saved) -> None:
        """Goes to where a checkpoint stands. Weights are taken over by the caller, before anything is made of them."""
        training = saved.training
        self.step.adam.load_state_dict(training, self.step.pair.named_tensors())
        if self.scheduler is not None and training["scheduler"] is not None:
            self.scheduler.load_state_dict(dict(training["scheduler"]))
        self.history = {name: list(values) for name, values in saved.history.items() if name in self.history}
        self.passes.begin(training["totals"], training["seen"], training["steps"])
        self.seconds = training["seconds"]
        for captured, memory in zip(self._captures(), training["memory"], strict=True):
            if captured is not None and memory is not None:
                captured.load_state_dict(memory)
        if training["noise"] is not None:
            self._set_rng_state(training["noise"])

    def _captures(self) -> list[Any]:
        return [self.step.captured, self.validation.captured if self.validation else None]

    def _rng_state(self) -> dict[str, Any]:
        """Random numbers' states, as tensors and plain values."""
        state, python, (kind, keys, *places) = get_rng_state()
        device = self.step.batches.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        numpy = [kind, torch.from_numpy(keys.astype(np.int64)), *places]
        return {"torch": state, "cuda": cuda, "python": python, "numpy": numpy}

    def _set_rng_state(self, states: dict[str, Any]) -> None:
        kind, keys, *places = states["numpy"]
        set_rng_state((states["torch"], states["python"], (kind, keys.numpy().astype(np.uint32), *places)))
        device = self.step.batches.device
        if device.type == "cuda" and states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"], device)
