"""`fit`: train any Pyro pair by stochastic variational inference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pyro.params.param_store import ParamStoreDict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pvae.capture import worth_compiling
from pvae.data import Batches, Data, Transform
from pvae.errors import ArgumentError, NumericalError, folder_path, one_of, positive_int, yes_no_or_auto
from pvae.persistence import storage
from pvae.runtime import Program, check_surroundings, heeded, in_turn, isolated, resolve_processes, resolve_seed
from pvae.svi import elbos as bounds
from pvae.svi import objectives, passes
from pvae.svi import step as engine
from pvae.svi.loading import begun, check_same_run, found, opened, outside
from pvae.svi.pairs import Pair
from pvae.svi.results import FitResult
from pvae.svi.run import Callback, Plan, Training
from pvae.svi.settings import described, kl_weights, patience_for, positive, scheduled
from pvae.svi.validation import Validation

__all__ = ["fit"]

_ENOUGH_TO_JUDGE = 200  # steps; before, an encoder that tells nothing apart is only a new one


@in_turn
def fit(
    model: Program,
    guide: Program,
    data: Data,
    *,
    transform: Transform | None = None,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 1e-3,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    kl_weight: float | Callable[[int], float] = 1.0,
    patience: int | None = None,
    seed: int | None = 0,
    objective: objectives.Objective | None = None,
    device: str | torch.device = "auto",
    validation: Data | None = None,
    start: FitResult | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str = "never",
    callback: Callback | None = None,
    compile: bool | str = "auto",
    precision: str = "float32",
    distributed: bool | str = "auto",
    progress: bool = True,
) -> FitResult:
    """Trains a Pyro model and guide by SVI: Adam on minus the ELBO, ``E_q[log p(x, z) - log q(z|x)]``.

    The pair can be any Pyro programs called with one batch, ``model(*batch)`` and ``guide(*batch)``; parameters come
    from modules, ``pyro.module`` and ``pyro.param``. It starts with a param store of its own, so two models never
    meet, and leaves the caller's param store, random numbers and modes as they were. Modules are trained in place and
    stay on ``device``. Calls in several threads take turns.

    The first SIGINT or SIGTERM (Ctrl-C is one) ends the step that is being taken, saves it where there is a
    ``checkpoint``, and returns; a second one does what it always did.

    Args:
        model: The generative program.
        guide: The recognition program, with the model's latent sites.
        data: ``(N, *event)``, or a tuple of arrays with the same ``N``. Floating-point data are converted to the
            modules' dtype; integers and booleans stay as they are. Or a torch ``Dataset`` of such items, read as they
            are needed, or a ``DataLoader``, whose batches are taken as they come. A new VAE with a Gaussian likelihood
            first finds their mean and standard deviation in a batch of them (see ``VAE.find_units``); a warning says
            where the scale of another site is far from theirs.
        transform: Called with each batch on its device, before model and guide see it; returns the tensor, or the
            tuple, to use in its place. Dynamic binarization is one.
        epochs: Passes over the data.
        batch_size: Data in a batch, except for a ``DataLoader``. The last batch of an epoch may be smaller, and so is
            every batch where ``N`` is smaller.
        lr: Adam's learning rate.
        scheduler: Makes one of torch's learning-rate schedulers of the optimizer; it is stepped after each epoch.
        clip_norm: Gradients whose norm, all together, is larger are scaled down to it. They are those of the loss,
            summed over the batch.
        kl_weight: Multiplies the KL divergence of the guide from the prior: a number (beta), or a function of the
            epoch, from 1 on, for a warm-up: ``lambda epoch: min(1.0, epoch / 10)``. The history then has
            ``"objective"`` instead of ``"elbo"``; the validation bound has no weight. Latents that are summed out in
            the model cannot be weighed.
        patience: Ends training after so many epochs without a better validation bound, counted from where ``kl_weight``
            no longer changes.
        seed: Fixes shuffling and noise: same seed, same machine, same versions, same bits. ``None`` for a fresh one.
        objective: One of Pyro's ELBO objects, a callable ``(model, guide, *batch) -> loss`` in nats summed over the
            batch, or ``None`` for ``Trace_ELBO()``, and for ``TraceEnum_ELBO()`` where latents are marked for
            enumeration. How deep plates are nested is found out; the object need not be told.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"``, ``"cuda"`` or a ``torch.device``. Data are moved
            batch by batch, so put them there first if they fit.
        validation: Data as above, final (``transform`` is not applied). After each epoch their bound is taken, in eval
            mode, with the same noise each time: minus the loss of ``objective`` itself, so of ``RenyiELBO`` its own
            bound and not the ELBO. A callable may be no bound; with one it is the ELBO, of one draw.
        start: An earlier result to go on from. It is needed only for parameters that ``pyro.param`` made, which
            otherwise start from their initial values; modules go on from where they are.
        checkpoint: A folder for this run's checkpoints, written after each epoch; the last two and the best are kept,
            with a line for each epoch in ``history.jsonl``.
        resume: ``"auto"`` goes on from the newest whole checkpoint there, bit for bit as if nothing had happened, or
            begins where there is none. ``"never"`` refuses a folder with checkpoints.
        callback: Called after each epoch with a dict of plain numbers: ``"epoch"`` and the history's newest entries.
        compile: Whether to capture the step, with its gradients, as one tensor program and compile that, which takes
            some seconds at first and then makes each step two to three times as fast. ``"auto"`` does so where the run
            is long enough to gain by it. Where a program cannot be captured a warning says why, and it runs as it is.
            A step draws the same noise either way, and gives the same numbers within rounding. On a GPU the data are
            kept there if they fit, and many steps are one CUDA graph.
        precision: ``"float32"``, or ``"bfloat16"`` for matrix products and convolutions in that format: less exact, and
            up to twice as fast where the processor has instructions for it. Parameters, densities and sums stay in
            float32.
        distributed: Whether the processes of torch.distributed's default group, as torchrun starts them, train
            together: each takes its part of every batch, with noise of its own, and gradients are summed. ``"auto"``
            does so where there is such a group. The first process writes checkpoints and calls ``callback``.
        progress: Show a bar on stderr, with nats per datum and data per second, if that is a terminal.

    Returns:
        A `FitResult`.

    Raises:
        ArgumentError, DataError, DeviceError, ProgramError: Before any parameter has moved.
        CheckpointError: The folder cannot be used, is in use, or holds another run's checkpoints (the differences are
            listed), before any parameter has moved; or a checkpoint cannot be written, as on a full disk.
        NumericalError: The loss or a gradient became nan or infinite; raised before that update.
        RankError: Processes were called differently, or one was lost.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes; Kingma and Ba, 2015, Adam; Hoffman et al., 2013,
    Stochastic Variational Inference; for the warm-up, Sønderby et al., 2016, Ladder Variational Autoencoders.
    """
    check_surroundings()
    epochs, batch_size = positive_int("epochs", epochs), positive_int("batch_size", batch_size)
    lr, clip_norm = positive("lr", lr), None if clip_norm is None else positive("clip_norm", clip_norm)
    compile, resume = yes_no_or_auto("compile", compile), one_of("resume", resume, ("auto", "never"))
    precision = one_of("precision", precision, engine.PRECISIONS)
    weights, patience = kl_weights(kl_weight, epochs), patience_for(patience, validation)
    path = None if checkpoint is None else folder_path("checkpoint", checkpoint)
    make_scheduler, schedule = scheduled(scheduler, lr, checkpoint)
    processes = resolve_processes(distributed)
    bounds.resolve(objective)
    resolve_seed(seed)
    if callback is not None and not callable(callback):
        raise ArgumentError(f"callback must be a function of one dict, got {callback!r}.")
    if start is not None and not isinstance(start, FitResult):
        raise ArgumentError(f"start must be what an earlier fit returned, got {start!r}.")
    if resume == "auto" and checkpoint is None:
        raise ArgumentError("resume='auto' needs a folder to go on from: pass checkpoint=.")

    with heeded() as stop, opened(path, processes) as folder:
        saved = found(folder, resume, processes, make_scheduler, schedule)
        if saved is not None and seed is None:
            seed = saved.config["arguments"]["seed"]
        seed = processes.broadcast(resolve_seed(seed))
        with processes.together():
            pair = Pair.of(model, guide, data, device, objective)
            shared: dict[str, Any] = {"seed": seed, "processes": processes, "asked_to_stop": stop}
            batches = pair.batches("data", data, batch_size, transform=transform, **shared)
            held_out = None
            if validation is not None:
                held_out = pair.batches("validation", validation, batch_size, evaluated=True, **shared)
            verified, state = pair.verified(batches, held_out, seed, start._state if start else None)
            objective = pair.objective(objective, verified, batches, state, weighted=weights is not None)
        capture = _captures(compile, verified, batches, batch_size, epochs, pair.device)
        arguments: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "lr": lr, "clip_norm": clip_norm}
        arguments |= {"scheduler": schedule, "precision": precision}
        arguments |= {"objective": described(objective), "transform": described(transform)}
        if path is not None or processes.world_size > 1:
            arguments["data"] = batches.fingerprint()
            arguments["validation"] = held_out.fingerprint() if held_out else None
        processes.agree(**arguments, epochs=epochs, kl_weights=weights, patience=patience, capture=capture)
        with processes.together():
            if saved is not None:
                check_same_run(saved, pair, state, arguments, weights, epochs)

        environment = {"device": str(pair.device), "threads": torch.get_num_threads(), "ranks": processes.world_size}
        environment |= {"compiled": capture, **storage.versions()}
        plan = Plan(epochs, weights, patience, arguments, environment)
        lent = bounds.nested(objective, verified)
        isolation: Any = {"seed": processes.rank_seed(seed), "device": pair.device, "training": True, "params": state}
        with isolated(pair.modules, **isolation) as store, lent:
            with processes.together():
                if saved is None:
                    pair.find_units(batches, verified, seed)
            tensors = begun(pair, store, saved, processes)
            options: dict[str, Any] = {"precision": precision, "capture": capture, "clip_norm": clip_norm}
            # Where there are other processes, one that ended early would leave them waiting.
            compiling = stop.interrupting if processes.world_size == 1 else nullcontext
            options |= {"weighted": weights is not None, "processes": processes, "compiling": compiling}
            with processes.together():
                step = engine.Step(model, guide, objective, verified, batches, lr=lr, **options)
                evaluate = None
                if held_out is not None:
                    about: Any = (pair.modules, held_out, verified, seed, capture, processes, stop, compiling)
                    evaluate = Validation(model, guide, bounds.bound(objective, verified), *about)
                made = make_scheduler(step.optimizer)
                training = Training(plan, passes.epochs(step, stop), evaluate, made, tensors, pair, processes)
                if saved is not None:
                    if processes.is_main:  # the others' devices have other numbers
                        saved.warn_of_another_place(environment)
                    training.restore(saved)
                    del saved  # as large as all that is trained
                if folder is not None:
                    training.check_names()
                    folder.rewrite_history(training.records)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Encountered NaN")  # Pyro's; our error says where it comes from
                    why = training.run(stop, folder, callback, progress)
            except NumericalError as error:
                raise _explained(error, training) from None
            finally:
                step.forget_gradients()
            result = _result(training, pair, store, seed, why)
        stopped = processes.any(stop())  # all say the same: they go on alike
        if training.done * (batches.steps or 1) >= _ENOUGH_TO_JUDGE and not stopped:
            pair.warn_if_collapsed(held_out or batches, result._state)
        stopped = stopped or (processes.world_size == 1 and stop())
        return replace(result, stopped="signal", signal=stop.signal) if stopped else result


def _captures(
    compile: bool | str, verified: objectives.Verified, batches: Batches, size: int, epochs: int, device: torch.device
) -> bool:
    if compile != "auto":
        return bool(compile)
    steps = batches.steps or 1000  # of a stream whose length is not known
    num_data = batches.num_data or steps * size
    return worth_compiling(epochs * steps, 6.0 * sum(p.numel() for p in verified.params) * epochs * num_data, device)


def _explained(error: NumericalError, training: Training) -> NumericalError:
    last = "There is no checkpoint." if training.last is None else f"The last good checkpoint is {training.last}."
    lr = float(training.step.optimizer.param_groups[0]["lr"])
    return NumericalError(
        f"training stopped at epoch {training.done + 1}, {error}. {last} "
        f"Try a smaller lr than {lr:g}, clip_norm, or rescale the data."
    )


def _result(training: Training, pair: Pair, store: ParamStoreDict, seed: int, why: str) -> FitResult:
    params, state = outside(pair, store)
    history = {name: np.array(values) for name, values in training.history.items()}
    captured = training.step.captured
    seconds = captured.seconds if captured else 0.0
    return FitResult(history, params, pair.device, seed, seconds, state, why, None, training.last)
