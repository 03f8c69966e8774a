"""`fit`: train any Pyro pair by stochastic variational inference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pvae.checks import Data, as_tensors
from pvae.errors import ArgumentError, NumericalError, ProgramError, positive_int
from pvae.isolation import Program, isolated, modules_of, outside_modules, place, resolve_seed
from pvae.svi import objectives

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """What `fit` returns. The trained parameters of modules are in the modules themselves.

    Attributes:
        history: One-dimensional arrays with an entry for each epoch. ``"elbo"`` is the training ELBO in nats per datum,
            averaged over the epoch while the parameters moved (``"objective"`` in its place, minus the loss, where the
            objective is not an ELBO); ``"validation_elbo"`` is there where validation data were given; ``"seconds"``.
        params: Trained values of parameters made by ``pyro.param``, by name, in their constrained space. They have
            no module to live in; see `trained`.
        device: Where it was trained.
        seed: The seed used, also where ``seed=None`` asked for a fresh one.
    """

    history: dict[str, np.ndarray]
    params: dict[str, Tensor]
    device: torch.device
    seed: int
    _state: Mapping[str, Any]

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.2f}" for name, values in self.history.items() if name != "seconds")
        return f"FitResult({len(self.history['seconds'])} epochs, {last}, on {self.device}, seed {self.seed})"

    @contextmanager
    def trained(self) -> Iterator[None]:
        """A block in which ``pyro.param`` finds the trained values; needed only for parameters outside modules.

        Example::

            with result.trained():
                estimate = pvae.log_evidence(model, guide, x)
        """
        store = pyro.get_param_store()
        outside = store.get_state()
        merged: Any = {key: {**outside[key], **self._state[key]} for key in ("params", "constraints")}
        with store.scope(merged):
            yield


def fit(
    model: Program,
    guide: Program,
    data: Data,
    *,
    transform: Callable[..., Any] | None = None,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int | None = 0,
    objective: objectives.Objective | None = None,
    device: str | torch.device = "auto",
    validation: Data | None = None,
    start: FitResult | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains a Pyro model and guide by SVI: Adam on minus the ELBO, ``E_q[log p(x, z) - log q(z|x)]``.

    The pair can be any Pyro programs called with one batch, ``model(*batch)`` and ``guide(*batch)``; parameters come
    from modules, ``pyro.module`` and ``pyro.param``. It starts with a param store of its own, so two models never
    meet, and leaves the caller's param store, random numbers and modes as they were. Modules are trained in place and
    stay on ``device``.

    Args:
        model: The generative program.
        guide: The recognition program, with the model's latent sites.
        data: ``(N, *event)``, or a tuple of arrays with the same ``N``. Floating-point data are converted to the
            modules' dtype; integers and booleans stay as they are.
        transform: Called with each batch on its device, before model and guide see it; returns the tensor, or the
            tuple, to use in its place. Dynamic binarization is one.
        epochs: Passes over the data.
        batch_size: Data in a batch. The last batch of an epoch may be smaller, and so is every batch where ``N`` is
            smaller.
        lr: Adam's learning rate.
        seed: Fixes shuffling and noise: same seed, same machine, same versions, same bits. ``None`` for a fresh one.
        objective: One of Pyro's ELBO objects, a callable ``(model, guide, *batch) -> loss`` in nats summed over the
            batch, or ``None`` for ``Trace_ELBO()``.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"``, ``"cuda"`` or a ``torch.device``. Data are moved
            batch by batch, so put them there first if they fit.
        validation: Data as above, final (``transform`` is not applied); their ELBO is taken after each epoch, in eval
            mode, with the same noise each time.
        start: An earlier result to go on from. It is needed only for parameters that ``pyro.param`` made, which
            otherwise start from their initial values; modules go on from where they are.
        progress: Show a bar on stderr, with nats per datum and data per second, if that is a terminal.

    Returns:
        A `FitResult`.

    Raises:
        ArgumentError, DataError, DeviceError, ProgramError: Before any parameter has moved.
        NumericalError: The loss or a gradient became nan or infinite; raised before that update.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes; Kingma and Ba, 2015, Adam; Hoffman et al., 2013,
    Stochastic Variational Inference.
    """
    epochs, batch_size = positive_int("epochs", epochs), positive_int("batch_size", batch_size)
    if not isinstance(lr, Real) or isinstance(lr, bool) or not 0 < lr < math.inf:
        raise ArgumentError(f"lr must be a positive number, got {lr!r}.")
    objective, seed = objectives.resolve(objective), resolve_seed(seed)
    tensors = as_tensors("data", data)
    held_out = None if validation is None else as_tensors("validation", validation)
    modules = modules_of(model, guide)
    chosen, tensors = place(modules, tensors, device)
    batches = _Batches(tensors, batch_size, chosen, transform)
    held_out_batches = None
    if held_out is not None:
        held_out_batches = _Batches(place(modules, held_out, chosen)[1], batch_size, chosen)

    with isolated(modules, seed=seed, device=chosen, params=start._state if start else None) as store:
        verified = objectives.verify(model, guide, batches.first(), tensors if transform is None else None)
        if held_out_batches is not None:
            objectives.verify(model, guide, held_out_batches.first(), held_out_batches.tensors)
        state = store.get_state()

    with isolated(modules, seed=seed, device=chosen, training=True, params=state) as store:
        step = _Step(model, guide, objective, verified, float(lr))
        evaluate = _Validation(model, guide, modules, held_out_batches, verified, seed) if held_out_batches else None
        try:
            history = _run(step, batches, evaluate, epochs, seed, progress)
        finally:
            step.optimizer.zero_grad()
        state = outside_modules(store)
        params = {name: store[name].detach().clone() for name in state["params"]}
    return FitResult({k: np.array(v) for k, v in history.items()}, params, chosen, seed, state)


@dataclass(frozen=True)
class _Batches:
    """Data cut into batches, each moved to the device and transformed there."""

    tensors: tuple[Tensor, ...]
    batch_size: int
    device: torch.device
    transform: Callable[..., Any] | None = None

    def __len__(self) -> int:
        return len(self.tensors[0])

    def first(self) -> tuple[Tensor, ...]:
        return next(self.in_order())

    def in_order(self) -> Iterator[tuple[Tensor, ...]]:
        for rows in zip(*(t.split(self.batch_size) for t in self.tensors), strict=True):
            yield self._ready(rows)

    def shuffled(self, *seeds: int) -> Iterator[tuple[Tensor, ...]]:
        order = torch.from_numpy(np.random.default_rng(seeds).permutation(len(self)))
        for indices in order.split(self.batch_size):
            yield self._ready(tuple(t[indices.to(t.device)] for t in self.tensors))

    def _ready(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        batch = tuple(t.to(self.device) for t in rows)
        if self.transform is None:
            return batch
        transformed = self.transform(*batch)
        return transformed if isinstance(transformed, tuple) else (transformed,)


class _Step:
    """Loss, gradients, a look at them, and Adam's update."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: objectives.Objective,
        verified: objectives.Verified,
        lr: float,
    ) -> None:
        self.model, self.guide, self.objective = model, guide, objective
        self.verified = verified
        # One fused optimizer for all parameters: pyro.optim makes one for each, which is slower.
        self.optimizer = torch.optim.Adam(verified.params, lr=lr, fused=_can_fuse(verified.params))
        self.optimizer.zero_grad()
        self.known = {id(p) for p in verified.params}
        self.is_elbo = objectives.is_elbo(objective)

    def __call__(self, batch: tuple[Tensor, ...]) -> float:
        """Takes one step and returns minus the loss, in nats summed over the batch."""
        loss, params = objectives.loss_and_grads(self.objective, self.model, self.guide, batch)
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            raise ProgramError("the loss has a gradient for no parameter: does the objective depend on them?")
        if not (math.isfinite(loss) and torch.nn.utils.get_total_norm(grads).isfinite()):
            raise NumericalError(f"the loss is {loss:g}" if not math.isfinite(loss) else "a gradient is not finite")
        late = [p for p in params if id(p) not in self.known]
        if late:
            self.optimizer.add_param_group({"params": late})
            self.known |= {id(p) for p in late}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return -loss * self.verified.share(batch)


@dataclass(frozen=True)
class _Validation:
    """The ELBO of held-out data, in eval mode and with the same noise each time."""

    model: Program
    guide: Program
    modules: list[torch.nn.Module]
    batches: _Batches
    verified: objectives.Verified
    seed: int

    def __call__(self) -> float:
        """Returns the ELBO in nats per datum."""
        state: Any = pyro.get_param_store().get_state()
        total = 0.0
        with isolated(self.modules, seed=self.seed, device=self.batches.device, params=state):
            for batch in self.batches.in_order():
                total -= objectives.validation_loss(self.model, self.guide, batch) * self.verified.share(batch)
        return total / len(self.batches)


def _run(
    step: _Step, batches: _Batches, evaluate: _Validation | None, epochs: int, seed: int, progress: bool
) -> dict[str, list[float]]:
    """The loop over epochs and batches; returns the history."""
    curve = "elbo" if step.is_elbo else "objective"
    history: dict[str, list[float]] = {curve: [], "seconds": []}
    if evaluate is not None:
        history["validation_elbo"] = []
    with tqdm(total=epochs * len(batches), unit=" data", unit_scale=True, disable=None if progress else True) as bar:
        for epoch in range(1, epochs + 1):
            start, total, seen = time.perf_counter(), 0.0, 0
            for number, batch in enumerate(batches.shuffled(seed, epoch), 1):
                try:
                    total += step(batch)
                except NumericalError as error:
                    raise NumericalError(
                        f"training stopped at epoch {epoch}, step {number}, before its update: {error}. "
                        f"Try a smaller lr than {step.optimizer.defaults['lr']:g}, or rescale the data."
                    ) from None
                seen += len(batch[0])
                bar.update(len(batch[0]))
                bar.set_description(f"epoch {epoch}/{epochs}, {curve} {total / seen:.2f} nats", refresh=False)
            history[curve].append(total / seen)
            if evaluate is not None:
                history["validation_elbo"].append(evaluate())
                bar.set_postfix_str(f"validation {history['validation_elbo'][-1]:.2f}")
            history["seconds"].append(time.perf_counter() - start)
    return history


def _can_fuse(params: list[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params)
