"""`fit`: train any Pyro pair by stochastic variational inference."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pvae.data import Data, Transform
from pvae.runtime import Program, check_surroundings, graceful_stop, in_turn, resolve_processes
from pvae.svi.assembly import start_run
from pvae.svi.checkpointer import open_checkpointer
from pvae.svi.losses import Objective
from pvae.svi.results import FitResult
from pvae.svi.settings import Callback, Settings
from pvae.svi.trainable import make_trainable

__all__ = ["fit"]


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
    objective: Objective | None = None,
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
            epoch, from 1 on, for a warm-up: ``pvae.schedules.linear_warmup(10)``. The history then has
            ``"objective"`` instead of ``"elbo"``; the validation bound has no weight. Latents that are summed out in
            the model cannot be weighed.
        patience: Ends training after so many epochs without a better validation bound, counted from where ``kl_weight``
            no longer changes.
        seed: Fixes shuffling and noise: same seed, same machine, same versions, same bits. ``None`` for a fresh one.
        objective: One of `pvae.objectives`, such as ``pvae.objectives.IWAE(5)``, or of Pyro's ELBO objects, a callable
            ``(model, guide, *batch) -> loss`` in nats summed over the batch, or ``None`` for ``Trace_ELBO()``, and for
            ``TraceEnum_ELBO()`` where latents are marked for enumeration. How deep plates are nested is found out; the
            object need not be told. Of ``ReweightedWakeSleep``, which has two losses, the history has minus their sum;
            of ``TraceTailAdaptive_ELBO``, whose loss Pyro leaves infinite, minus what it differentiates.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"``, ``"cuda"`` or a ``torch.device``. Data are moved
            batch by batch, so put them there first if they fit.
        validation: Data as above, final (``transform`` is not applied). After each epoch their bound is taken, in eval
            mode, with the same noise each time: minus the loss of ``objective`` itself, so of ``RenyiELBO`` its own
            bound and not the ELBO. What changes a bound or its gradient for training alone, as free bits do, is
            measured by that bound. A callable may be no bound; with one it is the ELBO, of one draw, and so it is with
            ``ReweightedWakeSleep`` and ``TraceTailAdaptive_ELBO``.
        start: An earlier result of the pair to go on from. It is needed only for parameters that ``pyro.param`` made,
            which otherwise start from their initial values, also inside of ``with result.trained():`` and whatever is
            in the param store; modules go on from where they are.
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

    Example:
        >>> import pvae
        >>> x = pvae.datasets.digits().train_x[:256]
        >>> vae = pvae.VAE.mlp(event_shape=(8, 8), latent_dim=2, hidden=[16])
        >>> result = pvae.fit(vae.model, vae.guide, x, epochs=5, batch_size=32, progress=False)
        >>> bool(result.history["elbo"][-1] > result.history["elbo"][0])
        True
    """
    check_surroundings()
    processes = resolve_processes(distributed)
    settings = Settings.checked(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        scheduler=scheduler,
        clip_norm=clip_norm,
        kl_weight=kl_weight,
        patience=patience,
        seed=seed,
        objective=objective,
        transform=transform,
        validation=validation,
        start=start,
        checkpoint=checkpoint,
        resume=resume,
        callback=processes.only_on_main(callback),
        compile=compile,
        precision=precision,
        progress=progress and processes.is_main,
    )
    with graceful_stop() as stop, open_checkpointer(settings, processes) as checkpointer:
        settings = settings.settle_seed(checkpointer.seed, processes)
        pair = make_trainable(model, guide, data, validation, device, settings, processes, stop)
        settings = replace(settings, capture=pair.is_to_be_captured(settings))
        checkpointer.check_same_run(pair, settings)
        if checkpointer.last is None:  # else it goes on from there
            pair.warn_of_initial_values(settings.params)
        with pair.isolate(settings.noise_seed), pair.nest():
            run = start_run(pair, settings, checkpointer, processes, stop)
            result = run.train()
        if not run.is_to_stop():
            run.warn_if_collapsed(result)
        return replace(result, stopped="signal", signal=stop.signal) if run.is_to_stop() else result
