"""A pair that can be trained: a look at it and its data before anything moves, which shows what there is to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.modules.batchnorm import _BatchNorm

from pvae.capture import worth_compiling
from pvae.data import Batches, Data, as_source, make_batches, named_shape
from pvae.errors import ArgumentError, CheckpointError, ProgramError, first_line, warn
from pvae.runtime import Pair, Processes, Program, Stop, base_distribution, isolate, kept_buffers, place_pair
from pvae.svi import elbos, verification
from pvae.svi.checkpoints import check_weights
from pvae.svi.settings import Settings

__all__ = ["DENSE", "Trainable", "look_at", "make_trainable"]

DENSE = "pass sparse=False, its default. Gradients are then as large as the table, and training is the same."


@dataclass(frozen=True)
class Trainable:
    """A placed pair, what trains it, and what a trial run found.

    Attributes:
        placed: The pair on its device.
        verified: What the run found.
        objective: What is minimised.
        state: That of the param store, with all that the programs make at first.
        batches: What it is trained on.
        held_out: What it is measured on, if anything.
    """

    placed: Pair
    verified: verification.Verified
    objective: elbos.Objective
    state: Mapping[str, Any]
    batches: Batches
    held_out: Batches | None

    @cached_property
    def bound(self) -> Any:
        """What held-out data are measured by."""
        return elbos.bound(self.objective, self.verified)

    @property
    def is_elbo(self) -> bool:
        """Whether minus the objective estimates the ELBO itself."""
        return elbos.is_elbo(self.objective)

    def check_names(self) -> None:
        """Raises `CheckpointError` where something is trained or held that a checkpoint cannot hold."""
        tensors = self.placed.named_tensors(self.state["params"])
        known = {id(t) for t in tensors.values()}
        for param in self.verified.params:
            if id(param) not in known:
                raise CheckpointError(
                    f"a parameter of shape {tuple(param.shape)} is trained, and cannot be in a checkpoint: it belongs "
                    "to a module that was not found in the model or the guide. Make the module an attribute of what "
                    "holds the program, or a variable that the program uses."
                )
        if left_out := self.placed.nameless_state():
            raise CheckpointError(f"what a module holds cannot be in a checkpoint: {'; '.join(left_out)}.")
        check_weights(tensors)

    def isolate(self, seed: int) -> AbstractContextManager[ParamStoreDict]:
        """A block in which the pair is trained, in a param store of its own."""
        placed = self.placed
        return isolate(placed.modules, seed=seed, device=placed.device, training=True, params=self.state)

    def named_tensors(self) -> dict[str, Tensor]:
        """What training changes, by name; in the block in which the pair is isolated."""
        return self.placed.named_tensors(pyro.get_param_store()._params)

    def is_to_be_captured(self, settings: Settings) -> bool:
        """Whether to capture and compile steps: as asked for, or where the run is long enough to gain by it."""
        if settings.compile != "auto":
            return bool(settings.compile)
        steps = self.batches.steps or 1000  # of a stream whose length is not known
        seen = settings.epochs * (self.batches.num_data or steps * settings.batch_size)
        operations = 6.0 * sum(p.numel() for p in self.verified.params) * seen
        return worth_compiling(settings.epochs * steps, operations, self.placed.device)

    def not_finite(self, batch: tuple[Tensor, ...]) -> str:
        """Which sites' log-densities are not finite on a batch, in words; empty if all are."""
        return verification.not_finite(self.placed.model, self.placed.guide, batch)

    def nest(self) -> AbstractContextManager[None]:
        """A block in which the objective knows how deep plates are nested."""
        return elbos.nest(self.objective, self.verified)

    def find_units(self, seed: int) -> None:
        """Lets modules that want it see the scale of their data, before anything is trained; warns of other scales.

        Such a module has ``wants_units(x)`` and ``find_units(x)``, as `pvae.VAE` does.
        """
        modules = [part for module in self.placed.modules for part in module.modules()]
        parts: list[Any] = [part for part in modules if hasattr(part, "wants_units")]
        for name, distribution, indices in self.verified.observed:
            rows = self.verified.batch[indices[0]]
            wanting = [part for part in parts if part.wants_units(rows)]
            if wanting:
                with isolate(seed=seed, device=self.placed.device):  # a transform may draw
                    rows = self.batches.any()[indices[0]]
                for part in wanting:
                    part.find_units(rows)
            elif found := _far_scale(name, distribution, rows):
                warn(found)

    def warn_of_initial_values(self, start: Mapping[str, Any] | None) -> None:
        """Says so where the caller's param store has other values for parameters that begin at their initial ones.

        Args:
            start: State of the param store that was given to start from.
        """
        begin, there = self.state["params"], pyro.get_param_store()._params
        given = {} if start is None else start["params"]
        names = [name for name in self.placed.bare_params(begin) if name in there and name not in given]
        if other := sorted(name for name in names if not torch.equal(there[name].to(begin[name]), begin[name])):
            warn(
                f"parameters {other} begin at their initial values and not at those in the param store, as each "
                "fit has a store of its own. To go on from an earlier fit, pass start=result; from other values, make "
                "them the initial ones of pyro.param."
            )

    def warn_if_collapsed(self, params: Mapping[str, Any]) -> None:
        """Says so where no latent dimension follows the data."""
        placed = self.placed
        with isolate(placed.modules, seed=0, device=placed.device, params=params), kept_buffers(placed.modules):
            if verification.inactive(placed.model, placed.guide, (self.held_out or self.batches).first()):
                warn(
                    "the posterior has collapsed: no latent dimension follows x, since Var_x(E_q[z]) is below 0.01 of "
                    "the prior's variance for each, so that the model makes no use of its latents. Try a warm-up "
                    "(kl_weight=pvae.schedules.linear_warmup(10)), a smaller lr, or a less powerful decoder.",
                )


def make_trainable(
    model: Program,
    guide: Program,
    data: Data,
    validation: Data | None,
    device: str | torch.device,
    settings: Settings,
    processes: Processes,
    stop: Stop,
) -> Trainable:
    """Puts a pair and its data on a device, looks at them, and finds what trains it.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.fit`.
        validation: As for `pvae.fit`.
        device: As for `pvae.fit`.
        settings: What is asked for.
        processes: Those that share the data.
        stop: Whether this process was asked to stop.

    Raises:
        DataError, DeviceError, ProgramError: Before anything but the modules' device has changed; as `look_at`,
            `pvae.svi.elbos.resolve` and `pvae.svi.elbos.try_out` do. On all processes where one raises.
    """
    with processes.together():
        source = as_source("data", data)
        holders = () if settings.objective is None else (settings.objective,)
        pair = place_pair(model, guide, *holders, device=device, data=source)
        size, seed, own_stop = settings.batch_size, settings.seed, processes.own_stop(stop)
        batches = make_batches(
            "data", source, pair, size, seed=seed, transform=settings.transform, processes=processes, stop=own_stop
        )
        held_out = None
        if validation is not None:
            source = as_source("validation", validation)
            held_out = make_batches(
                "validation", source, pair, size, seed=seed, processes=processes, evaluated=True, stop=own_stop
            )
        if settings.params is not None:
            _check_start(pair, settings.params, look_at(pair, "data", batches, settings.seed, None)[1])
        verified, state = look_at(pair, "data", batches, settings.seed, settings.params)
        batches = batches.watch(verified.observed)
        if held_out is not None:
            other, state = look_at(pair, "validation", held_out, settings.seed, state, transforms=False)
            held_out, verified = held_out.watch(other.observed), verified.join(other)
        _check_dense(pair, verified.params)
        for param in verified.params:
            if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
                param.data = param.data.contiguous()  # entries that share memory could not be moved one by one
        _try_fewest(pair, batches, verified.batch, state)
        objective = elbos.resolve(settings.objective, verified, weighted=settings.kl_weights is not None)
        if elbos.needs_trial(objective, verified):
            with isolate(pair.modules, seed=0, device=pair.device, params=state), kept_buffers(pair.modules):
                elbos.try_out(objective, model, guide, batches.first(), verified)
    return Trainable(pair, verified, objective, state, batches, held_out)


def look_at(
    pair: Pair, name: str, batches: Batches, seed: int, params: Mapping[str, Any] | None, *, transforms: bool = True
) -> tuple[verification.Verified, Mapping[str, Any]]:
    """Runs a pair on a batch.

    Args:
        pair: On its device.
        name: What to call the data in an error.
        batches: Where the batch is taken from.
        seed: Of the run.
        params: State of the param store to start from.
        transforms: Whether the caller takes a ``transform`` for them.

    Returns:
        What was found, and the state of the param store after.

    Raises:
        ProgramError, DataError: As `verification.verify` does.
    """
    whole = batches.whole
    isolated = isolate(pair.modules, seed=seed, device=pair.device, params=params)
    with named_shape(name, whole), isolated as store, kept_buffers(pair.modules):
        verified = verification.verify(pair.model, pair.guide, batches.first(), whole, transforms=transforms)
        return verified, store.get_state()


def _check_start(pair: Pair, start: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Looks at whether values to start from are of a pair's own parameters.

    Args:
        pair: The pair.
        start: State of the param store to start from.
        own: State of the param store after the pair ran without that.

    Raises:
        ArgumentError: They are of another pair.
    """
    given, made = start["params"], own["params"]
    new = sorted(name for name in pair.bare_params(made) if name not in given)
    lacking = sorted(name for name in given if name not in made and not name.startswith("__"))  # else an objective's
    if lacking and new:
        raise ArgumentError(
            f"start is the result of another pair: it has parameters {lacking}, which the model and the guide do not "
            f"make, and lacks {new}. Pass the result of this pair, or leave start out."
        )
    for name in given.keys() & made.keys():
        shapes = tuple(given[name].shape), tuple(made[name].shape)
        bounds = repr(start["constraints"][name]), repr(own["constraints"][name])
        if shapes[0] != shapes[1] or bounds[0] != bounds[1]:
            was, now = (f"{s} in {c}" for s, c in zip(shapes, bounds, strict=True))
            raise ArgumentError(
                f"start is the result of another pair: its parameter '{name}' has the shape {was}, and here it has "
                f"{now}. Pass the result of this pair, or leave start out."
            )
    if lacking:
        warn(
            f"start has parameters {lacking}, which the model and the guide did not make in a trial run: they are kept "
            "only if a step makes them."
        )


def _try_fewest(pair: Pair, batches: Batches, batch: tuple[Tensor, ...], state: Mapping[str, Any]) -> None:
    """Raises `ProgramError` where a pair does not run on the last batch of a pass, which has fewer data than others.

    Args:
        pair: On its device.
        batches: Those that it is trained on.
        batch: One on which it ran.
        state: Of the param store.
    """
    few, size = batches.fewest, len(batch[0])
    # A batch that has one datum only is tried, too: what ran on it may have been in eval mode.
    if few is None or not (few < size or few == size == 1):
        return
    # Batch normalization has no variance of one datum in train mode; others may be left out of that.
    training = any(isinstance(part, _BatchNorm) for root in pair.modules for part in root.modules())
    isolated = isolate(pair.modules, seed=0, device=pair.device, training=training, params=state)
    with isolated, kept_buffers(pair.modules):
        error = verification.failure_on(pair.model, pair.guide, tuple(t[:few] for t in batch))
    if error is not None:
        raise ProgramError(
            f"the model and the guide do not run on {few} of the data, as many as the last batch of a pass leaves of "
            f"{batches.num_data}: {first_line(error).rstrip(' .:,')}. Pass a batch_size that leaves more for it, or "
            "none; or a DataLoader with drop_last=True."
        ) from error


def _check_dense(pair: Pair, params: Sequence[Tensor]) -> None:
    """Raises `ProgramError` where a module that is trained has sparse gradients."""
    trained = {id(param) for param in params if param.requires_grad}
    for root in pair.modules:
        for name, module in root.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and id(module.weight) in trained:
                called = f"module '{name}' ({type(module).__name__})" if name else f"module {module}"
                raise ProgramError(f"{called} has sparse=True, and Adam takes no sparse gradients: {DENSE}")


def _far_scale(site: str, distribution: Any, value: Tensor) -> str:
    """How far the scale of a site of real numbers is from that of its data before training, in words; empty if near.

    Noise ten times as wide as the data hides what varies in them. Data a hundred times as far from the site's mean as
    its noise is wide are out of reach: Adam moves a parameter by about its learning rate in a step. Noise that is
    narrower than the data by less may well be right.
    """
    support = distribution.support
    if getattr(support, "base_constraint", support) not in (constraints.real, constraints.real_vector):
        return ""
    try:
        mean, noise = distribution.mean, distribution.stddev.median().item()
    except (NotImplementedError, AttributeError):  # as of transformed distributions
        return ""
    if mean.numel() != value.numel():  # it broadcasts
        return ""
    value = value.to(mean).reshape(mean.shape)
    spread, distance = value.std(correction=0).item(), (value - mean).abs().median().item()
    said = f"site '{site}' is {type(base_distribution(distribution)).__name__} with a standard deviation of {noise:.2g}"
    advice = (
        "Rescale the data, such as to mean 0 and standard deviation 1, or let the scale begin at theirs: Adam moves "
        "its logarithm by about lr in a step."
    )
    if 0 < 10 * spread < noise < float("inf"):
        return f"{said}, and that of its data is {spread:.2g}: noise so wide hides what varies in them. {advice}"
    if 100 * noise < distance < float("inf"):
        return f"{said}, and its data are {distance:.2g} away from its mean (medians, before training). {advice}"
    return ""
