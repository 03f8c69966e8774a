"""`fit`: train any Pyro pair by stochastic variational inference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pvae.checks import Data, as_tensors
from pvae.errors import ArgumentError, NumericalError, one_of, positive_int, yes_no_or_auto
from pvae.graphs import Captured, pays
from pvae.isolation import Program, isolated, modules_of, outside_modules, place, resolve_seed
from pvae.svi import engine, objectives
from pvae.svi.batches import Batches

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
        compile_seconds: Spent on capturing and compiling, within the first epochs; 0 where that was not done.
    """

    history: dict[str, np.ndarray]
    params: dict[str, Tensor]
    device: torch.device
    seed: int
    compile_seconds: float
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
    compile: bool | str = "auto",
    precision: str = "float32",
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
        compile: Whether to capture the step, with its gradients, as one tensor program and compile that, which takes
            some seconds at first and then makes each step two to three times as fast. ``"auto"`` does so where the run
            is long enough to gain by it. Where a program cannot be captured a warning says why, and it runs as it is.
            A step draws the same noise either way, and gives the same numbers within rounding. On a GPU the data are
            kept there if they fit, and many steps are one CUDA graph.
        precision: ``"float32"``, or ``"bfloat16"`` for matrix products and convolutions in that format: less exact, and
            up to twice as fast where the processor has instructions for it. Parameters, densities and sums stay in
            float32.
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
    compile = yes_no_or_auto("compile", compile)
    precision = one_of("precision", precision, engine.PRECISIONS)
    objective, seed = objectives.resolve(objective), resolve_seed(seed)
    tensors = as_tensors("data", data)
    held_out = None if validation is None else as_tensors("validation", validation)
    modules = modules_of(model, guide)
    chosen, tensors = place(modules, tensors, device)
    batches = Batches(tensors, batch_size, chosen, transform)
    held_out_batches = None
    if held_out is not None:
        held_out_batches = Batches(place(modules, held_out, chosen)[1], batch_size, chosen)

    with isolated(modules, seed=seed, device=chosen, params=start._state if start else None) as store:
        verified = objectives.verify(model, guide, batches.first(), tensors if transform is None else None)
        if held_out_batches is not None:
            objectives.verify(model, guide, held_out_batches.first(), held_out_batches.tensors)
        state = store.get_state()

    capture = bool(compile)
    if compile == "auto":
        size = sum(p.numel() for p in verified.params)
        capture = pays(epochs * batches.steps, 6.0 * size * epochs * len(batches), chosen)
    with isolated(modules, seed=seed, device=chosen, training=True, params=state) as store:
        step = engine.Step(
            model, guide, objective, verified, batches, lr=float(lr), precision=precision, capture=capture
        )
        passes = engine.epochs(step)
        evaluate = None
        if held_out_batches is not None:
            evaluate = _Validation(model, guide, modules, held_out_batches, verified, seed, capture)
        try:
            history = _run(passes, evaluate, epochs, seed, progress)
        finally:
            step.forget_gradients()
        state = outside_modules(store)
        params = {name: store[name].detach().clone() for name in state["params"]}
    seconds = step.captured.seconds if step.captured else 0.0
    return FitResult({k: np.array(v) for k, v in history.items()}, params, chosen, seed, seconds, state)


class _Validation:
    """The ELBO of held-out data, in eval mode and with the same noise each time."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        modules: list[torch.nn.Module],
        batches: Batches,
        verified: objectives.Verified,
        seed: int,
        capture: bool,
    ) -> None:
        self.modules, self.batches, self.verified, self.seed = modules, batches, verified, seed

        def loss(*batch: Tensor) -> Tensor:
            with objectives.ItemsStayTensors() if capture else nullcontext():
                return objectives.validation_loss(model, guide, batch)

        self.loss = loss
        if capture:
            with self._isolated():
                self.loss = Captured(loss, "pvae.fit's validation", (model, guide), capture_after=1)

    def __call__(self) -> float:
        """Returns the ELBO in nats per datum."""
        with self._isolated():
            total = sum(self.loss(*batch).item() * self.verified.share(batch) for batch in self.batches.in_order())
        return -total / len(self.batches)

    def _isolated(self) -> AbstractContextManager[Any]:
        state: Any = pyro.get_param_store().get_state()
        return isolated(self.modules, seed=self.seed, device=self.batches.device, params=state)


def _run(
    passes: engine.Epochs, evaluate: _Validation | None, epochs: int, seed: int, progress: bool
) -> dict[str, list[float]]:
    """The loop over epochs; returns the history."""
    step, num_data = passes.step, len(passes.step.batches)
    curve = "elbo" if objectives.is_elbo(step.objective) else "objective"
    history: dict[str, list[float]] = {curve: [], "seconds": []}
    if evaluate is not None:
        history["validation_elbo"] = []
    with tqdm(total=epochs * num_data, unit=" data", unit_scale=True, disable=None if progress else True) as bar:
        for epoch in range(1, epochs + 1):
            start, seen = time.perf_counter(), 0
            try:
                for count in passes.epoch(step.batches.order(seed, epoch)):
                    seen += count
                    bar.update(count)
                    if passes.running or seen == num_data:
                        bar.set_description(f"epoch {epoch}/{epochs}, {curve} {-passes.total / seen:.2f} nats", False)
            except NumericalError as error:
                raise NumericalError(
                    f"training stopped at epoch {epoch}, {error}. "
                    f"Try a smaller lr than {step.optimizer.defaults['lr']:g}, or rescale the data."
                ) from None
            history[curve].append(-passes.total / num_data)
            if evaluate is not None:
                history["validation_elbo"].append(evaluate())
                bar.set_postfix_str(f"validation {history['validation_elbo'][-1]:.2f}")
            history["seconds"].append(time.perf_counter() - start)
    return history
