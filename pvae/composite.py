"""What every Pyro pair made of parts needs, whatever its parts are: a name of its own in the param store, data as its
parameters want them, units, a place on disk.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from itertools import count
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pvae import likelihoods, networks, posteriors, priors
from pvae.data import Array, as_tensors, check_shape
from pvae.errors import ArgumentError, CheckpointError, DataError, ProgramError, folder_path
from pvae.networks import Units
from pvae.persistence import check_free, pack_module, read_files, try_run, unpack_module, write_packed
from pvae.runtime import check_real, check_support, in_turn, isolate, resolve_seed

__all__ = [
    "Composite",
    "check_latent",
    "check_posterior",
    "concatenate",
    "draw",
    "observe",
    "one_hot",
    "run_decoder",
    "run_part",
    "show_shapes",
]

_T = TypeVar("_T")

# Pyro's param store knows modules by name alone: two of one name would share an entry, and the second would not train.
# So every pair has a number of its own, copies too.
_numbers: WeakKeyDictionary[Composite, int] = WeakKeyDictionary()
_next_number = count()


class Composite(nn.Module):
    """A Pyro model and guide put together from modules whose ``forward`` returns a distribution.

    What is left to a class of it are the two programs, and what they are at some draws, by `_draw_example` and
    `_log_densities`: `save` compares these with those of the pair that `load` would give. A class keeps its
    constructor's arguments as attributes of the same names.
    """

    decoder: nn.Module
    view: nn.Module | None
    latent_dim: int
    event_shape: tuple[int, ...]

    @abstractmethod
    def _draw_example(self) -> tuple[Tensor, ...]:
        """Two draws of all that the parts' densities are of."""

    @abstractmethod
    def _log_densities(self, *example: Tensor) -> dict[str, Tensor]:
        """Each part's log-density at what `_draw_example` gave, by the name of the part."""

    def wants_units(self, x: Tensor) -> bool:
        """Whether `pvae.fit` is to call `find_units` with ``x``, which has the shape of its data.

        That is so where none were given or found, and the decoder's ``log_scale`` is where it began and not frozen
        there. Else it was trained, loaded or set by hand.
        """
        units = [part for part in self.modules() if isinstance(part, Units)]
        log_scale = getattr(self.decoder, "log_scale", None)
        began = log_scale is None or (log_scale.requires_grad and not log_scale.item())
        fresh = bool(units) and began and not any(part.found for part in units)
        return fresh and tuple(x.shape[1:]) == self.event_shape

    def find_units(self, x: Array) -> None:
        """Lets the networks see data in units in which ``x`` has mean 0 and standard deviation 1.

        `pvae.fit` does so with a batch of its data, before the first step of a new VAE. Before a loop of
        your own, as with ``pyro.infer.SVI``, call it once. Densities stay those of x itself: in nats per datum with
        respect to the units that x came in.

        Args:
            x: Data of shape ``(N, *event)``; some hundred are enough.

        Raises:
            ProgramError: The VAE has no units; those of ``mlp`` and ``conv`` do with a likelihood of real numbers or
                levels.
        """
        x = self._as_events(x)
        units = [part for part in self.modules() if isinstance(part, Units)]
        if not units:
            raise ProgramError(
                "this VAE has no units to find. VAE.mlp and VAE.conv with a likelihood of real numbers or levels have "
                "some; parts take them as likelihoods.Gaussian(..., units=pvae.networks.Units())."
            )
        for part in units:
            part.find(x)

    @in_turn
    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Writes the VAE into a folder: its weights (safetensors) and what it is made of (JSON), for `load`.

        It is described by its parts' classes and constructor arguments, so a module of your own must keep each argument
        as an attribute of the same name (``self.width = width``), as torch.nn's layers do. Before anything is written
        the VAE is rebuilt from what would be, and must have the same parts, tensors and log-densities on two draws.
        That also finds what was changed after a module was made, so save once before a long training to see whether it
        can be. Hooks, train or eval mode and gradients are not saved.

        Args:
            path: The folder; made where it does not exist. One that is there must be empty.
            overwrite: Replace a VAE that was saved there before. It can be loaded until the new one is complete.

        Raises:
            ProgramError: A part cannot be rebuilt; which one, and why.
            CheckpointError: The folder holds something else, or cannot be written. What was there still is.
        """
        folder = folder_path("path", path)
        check_free(folder, overwrite=overwrite)
        try:
            files, rebuilt = pack_module(self)
            _check_densities(self, rebuilt)
        except ProgramError as error:
            raise ProgramError(f"this {type(self).__name__} cannot be saved: {error}") from error
        write_packed(folder, files, overwrite=overwrite)

    @classmethod
    @in_turn
    def load(cls, path: str | os.PathLike[str], *, modules: Iterable[type[nn.Module]] = ()) -> Self:
        """Returns the VAE that `save` wrote into a folder, on the CPU, in train mode; move it with ``.to("cuda")``.

        All files are verified by their SHA-256 before any is used, and nothing is unpickled: the VAE is built by the
        constructors of torch.nn's and pvae's modules and of the classes in ``modules``, and of no others. It has the
        bits that were saved: weights, buffers, dtypes, and which parameters are frozen.

        Args:
            path: The folder.
            modules: Your own module classes in the VAE. A subclass of a VAE's class is one, or has its own ``load``.

        Raises:
            CheckpointError: There is no such folder, a file is damaged or missing, it is of a newer pvae, it holds
                something else, or a class in it was not passed.
        """
        modules = tuple(modules)
        if wrong := [m for m in modules if not (isinstance(m, type) and issubclass(m, nn.Module))]:
            raise ArgumentError(f"modules must be classes of nn.Module, got {wrong[0]!r}.")
        folder = folder_path("path", path)
        files = read_files(folder)
        try:
            found = unpack_module(files, (cls, *_own_classes(Composite), *_PARTS, *modules))
        except CheckpointError as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        if not isinstance(found, cls):
            raise CheckpointError(f"{folder} holds a {type(found).__name__}, not a {cls.__name__}.")
        return found

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parts."""
        return f"event_shape={self.event_shape}, latent_dim={self.latent_dim}"

    def _register(self, *parts: str) -> None:
        """Tells Pyro's param store of parts, under a name that no other pair has."""
        if self not in _numbers:
            _numbers[self] = next(_next_number)
        for part in parts:
            pyro.module(f"vae{_numbers[self]}.{part}", getattr(self, part))

    def _isolate(self, seed: int) -> AbstractContextManager[Any]:
        """A block in which parts run, which leaves everything as it was; see `pvae.runtime.isolate`."""
        return isolate([self], seed=seed, device=_device_of(self))

    def _try(self, look: Callable[[], _T]) -> _T:
        """What a look at the parts, in a block of `_isolate`, has found. Files of strangers are bounded by it."""

        def run() -> _T:
            with self._isolate(0):
                return look()

        return try_run(run)

    def _see(self, x: Tensor) -> Tensor:
        """Data as an encoder sees them, of a pair with a ``view``."""
        return x if self.view is None else self.view(x)

    def _draw(self, decode: Callable[[], Any], seed: int | None, *, mean: bool) -> Tensor:
        """A draw of what ``decode`` returns in a block of `_isolate`, or its mean."""
        with self._isolate(resolve_seed(seed)):
            px = decode()
            return px.mean if mean else px.sample()

    def _as_events(self, x: Array, name: str = "x") -> Tensor:
        """Data ``(N, *event)``, in the parameters' dtype and on their device."""
        x = _as_tensor(name, x)
        check_shape(name, x, self.event_shape)
        check_real(name, x)
        return x.to(next(self.parameters(), x))

    def _as_latents(self, z: Array, latent_dim: int | None = None, name: str = "z") -> Tensor:
        """Latents ``(..., D)``, in the parameters' dtype and on their device."""
        z = _as_tensor(name, z)
        latent_dim = latent_dim or self.latent_dim
        if z.shape[-1:] != (latent_dim,):
            raise DataError(f"{name} must have shape (..., {latent_dim}), got {tuple(z.shape)}.")
        return z.to(next(self.parameters(), z))

    def _as_labels(self, y: Array, num_classes: int, name: str = "y", *, unknown: bool = False) -> Tensor:
        """Labels ``(...)``, whole numbers below ``num_classes``, on the parameters' device.

        Values are looked at where Pyro's validation is on, as outside of training; `one_hot` gives nan for others.

        Args:
            y: The labels.
            num_classes: How many classes there are.
            name: What to call them in an error.
            unknown: Whether -1 stands for a label that is not known.
        """
        y = _as_tensor(name, y)
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise DataError(f"{name} must be labels, whole numbers; got {y.dtype}. Pass {name}.long().")
        least = -1 if unknown else 0
        if is_validation_enabled() and y.numel() and not y.is_meta:
            smallest, largest = int(y.min()), int(y.max())
            if smallest < least or largest >= num_classes:
                advice = "" if unknown else " Where labels are unknown, as -1, take pvae.SemiSupervisedVAE."
                raise DataError(
                    f"{name} must be labels from {least} to {num_classes - 1}, got labels from {smallest} to {largest}."
                    f"{advice if smallest == -1 else ''}"
                )
        return y.to(next(self.parameters(), torch.empty(())).device, torch.int64)


def one_hot(y: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Labels ``(...)`` as ``(..., num_classes)``: 1 for the label, else 0; nan where there is no such class.

    Args:
        y: The labels.
        num_classes: How many classes there are.
        like: Of the dtype wanted.
    """
    # Not torch's own, which reads the labels; nan then tells of one that nobody could look at.
    hot = (y[..., None] == torch.arange(num_classes, device=y.device)).to(like.dtype)
    return torch.where(((y >= 0) & (y < num_classes))[..., None], hot, torch.nan)


def concatenate(*vectors: Tensor) -> Tensor:
    """Vectors ``(..., D_i)`` one after the other, ``(..., sum D_i)``; leading dimensions are broadcast."""
    leading = torch.broadcast_shapes(*(v.shape[:-1] for v in vectors))
    return torch.cat([v.expand(*leading, -1) for v in vectors], -1)


def observe(px: Any, x: Tensor) -> None:
    """The site ``"x"``. Where Pyro's validation is on, raises `DataError` for values that p(x|z) cannot take."""
    if is_validation_enabled():
        check_support("x", px, x)
    pyro.sample("x", px, obs=x)


def run_part(name: str, part: nn.Module, *arguments: Tensor) -> torch.distributions.Distribution:
    """A part's result; `ProgramError` where it cannot take what it is given."""
    try:
        return part(*arguments)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(str(tuple(argument.shape)) for argument in arguments)
        how = f"take an argument of shape {shapes}" if arguments else "be run"
        raise ProgramError(f"the {name} cannot {how}: {error}") from error


def run_decoder(decoder: nn.Module, z: Tensor, call: str = "decoder(z)", of: str = "z") -> Any:
    """p(x|z) of two latents.

    Args:
        decoder: The part.
        z: What it is called with, shape ``(2, D)``.
        call: How an error writes that.
        of: What an error calls its argument.

    Raises:
        ProgramError: It cannot take that, or gives something else than two distributions.
    """
    px = run_part("decoder", decoder, z)
    if px.batch_shape != (2,):
        raise ProgramError(
            f"{call} must have batch shape (2,) for {of} of shape {tuple(z.shape)}, got {show_shapes(px)}. "
            "Does it miss .to_event(...)?"
        )
    return px


def check_posterior(call: str, qz: Any, event_shape: torch.Size, of: str) -> None:
    """Raises `ProgramError` where q(z|x) of two data is not over what the prior is over.

    Args:
        call: How an error writes the encoder's call.
        qz: What it gave.
        event_shape: The prior's.
        of: What an error calls its argument, with the shape.
    """
    if qz.batch_shape != (2,) or qz.event_shape != event_shape:
        raise ProgramError(
            f"{call} must have batch shape (2,) and the prior's event shape {tuple(event_shape)} for {of}, "
            f"got {show_shapes(qz)}."
        )


def check_latent(call: str, pz: torch.distributions.Distribution, batch_shape: tuple[int, ...] = ()) -> int:
    """The dimension D of the latent vector that a distribution is of, such as that of ``call="prior()"``.

    Raises:
        ProgramError: It has other batch dimensions, or its events are no vectors.
    """
    if len(pz.event_shape) != 1 or pz.batch_shape != batch_shape:
        raise ProgramError(
            f"{call} must have batch shape {batch_shape} and event shape (D,), got {show_shapes(pz)}. "
            "Does it miss .to_event(1)?"
        )
    return pz.event_shape[0]


def show_shapes(distribution: torch.distributions.Distribution) -> str:
    """A distribution's shapes, in words."""
    return f"batch shape {tuple(distribution.batch_shape)} and event shape {tuple(distribution.event_shape)}"


def draw(distribution: torch.distributions.Distribution, shape: tuple[int, ...] = ()) -> Tensor:
    """A draw; of parameters that are nan, from which nothing can be drawn, their mean."""
    try:
        return distribution.sample(torch.Size(shape))
    except (RuntimeError, ValueError):
        return distribution.mean.expand(*shape, *distribution.batch_shape, *distribution.event_shape)


def _as_tensor(name: str, x: Array) -> Tensor:
    """A tensor of what is none; tensors stay as they are, with their gradients."""
    if isinstance(x, Tensor):
        return x
    tensors = list(as_tensors(name, x))
    if len(tensors) > 1:
        raise DataError(
            f"{name} must be one array, got {len(tensors)}. Pass the one that the VAE is of, such as data[0]."
        )
    return tensors[0]


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


# What a saved pair may be made of beside torch.nn's modules and the user's.
_PARTS = tuple(
    found
    for module in (networks, priors, likelihoods, posteriors)
    for name in module.__all__
    if isinstance(found := getattr(module, name), type) and issubclass(found, nn.Module)
)


def _own_classes(cls: type[Composite]) -> list[type[Composite]]:
    """Those below a class that are pvae's."""
    own = [below for below in cls.__subclasses__() if below.__module__.startswith("pvae.")]
    return own + [found for below in own for found in _own_classes(below)]


def _check_densities(pair: Composite, rebuilt: Any) -> None:
    """Raises `ProgramError` where a rebuilt pair, moved to the device of the other, computes something else."""
    device = _device_of(pair)
    rebuilt.to(device)
    with isolate([pair], seed=0, device=device):
        example = pair._draw_example()
    found = []
    for one in (pair, rebuilt):
        with isolate([one], seed=0, device=device):
            found.append(one._log_densities(*example))
    for name, ours in found[0].items():
        theirs = found[1][name]
        # Weights that lie in memory otherwise are summed in another order.
        tolerance = torch.finfo(ours.dtype).eps ** 0.5
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, tolerance, tolerance, equal_nan=True):
            raise ProgramError(
                f"the {name} gives other densities when it is rebuilt from its constructors' arguments and weights. "
                "What was set after a module was made must be an argument of its constructor, or a persistent buffer."
            )
