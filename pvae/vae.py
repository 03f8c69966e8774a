"""The VAE: three distributions put together into a Pyro model and a Pyro guide."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, Self
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pvae import likelihoods, networks, posteriors, priors
from pvae.data import Array, as_tensors, check_shape
from pvae.errors import ArgumentError, CheckpointError, DataError, ProgramError, folder_path, one_of, positive_int
from pvae.networks import Units
from pvae.persistence import check_free, pack_module, read_files, try_run, unpack_module, write_packed
from pvae.posteriors import DiagonalNormal
from pvae.priors import StandardNormal
from pvae.runtime import check_real, check_support, in_turn, isolate, resolve_seed

__all__ = ["VAE"]

# Pyro's param store knows modules by name alone: two of one name would share an entry, and the second would not train.
# So every VAE has a number of its own, copies too.
_numbers: WeakKeyDictionary[VAE, int] = WeakKeyDictionary()
_next_number = count()


class VAE(nn.Module):
    """A variational autoencoder: a prior p(z), a decoder p(x|z) and an encoder q(z|x), each a module that returns a
    distribution.

    `model` and `guide` are ordinary Pyro programs with a plate ``"data"`` and the sites ``"z"`` and ``"x"``. Train them
    with `pvae.fit` or with ``pyro.infer.SVI``, and measure log p(x) with `pvae.log_evidence`.

    Args:
        prior: ``prior()`` is p(z), with event shape ``(D,)``.
        decoder: ``decoder(z)`` is p(x|z), with event shape ``(*event)``.
        encoder: ``encoder(x)`` is q(z|x), with event shape ``(D,)``.

    Raises:
        ProgramError: The three do not fit each other; they are tried on two data of zeros.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes; Rezende, Mohamed and Wierstra, 2014, Stochastic
    Backpropagation and Approximate Inference in Deep Generative Models.
    """

    def __init__(self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder
        self.latent_dim, self.event_shape = try_run(lambda: _infer_shapes(self))

    @classmethod
    def mlp(
        cls,
        event_shape: int | Sequence[int] = (28, 28),
        latent_dim: int = 50,
        hidden: Sequence[int] = (400,),
        likelihood: str = "bernoulli",
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        units: tuple[float, float] | None = None,
    ) -> VAE:
        """A VAE of two multilayer perceptrons, with a standard normal prior and a diagonal normal encoder.

        Weights are drawn by torch's own initialization, so ``torch.manual_seed`` before the call fixes them.

        Args:
            event_shape: Shape of one datum.
            latent_dim: ``D``, the number of latent dimensions.
            hidden: Widths of the encoder's hidden layers; the decoder has them in reverse order.
            likelihood: ``"bernoulli"``, ``"gaussian"`` (one learned scale) or ``"gaussian-per-pixel"``. For anything
                else put the parts together: ``VAE(prior, decoder, encoder)``.
            activation: Makes the module put after each hidden layer.
            units: For a Gaussian, ``(mean, scale)`` of the data: networks see ``(x - mean) / scale`` and give means and
                scales in these units, so that a learned scale starts at ``scale``. Left out, `pvae.fit` finds them in
                the data, and so does `find_units`; ``(0, 1)`` leaves x as it is, and adds nothing to the parts.
        """
        event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        latent_dim = positive_int("latent_dim", latent_dim)
        named = likelihoods.NAMED[one_of("likelihood", likelihood, likelihoods.NAMED)]
        hidden = list(hidden)
        return cls(
            StandardNormal(latent_dim),
            named.make(
                networks.mlp(latent_dim, hidden[::-1], (named.outputs, *event_shape), activation=activation),
                event_shape=event_shape,
                **_units_argument(named, likelihood, units),
            ),
            DiagonalNormal(
                networks.mlp(event_shape, hidden, 2 * latent_dim, activation=activation),
                **_units_argument(named, likelihood, units),
            ),
        )

    @classmethod
    def conv(
        cls,
        event_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 50,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        likelihood: str = "bernoulli",
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        units: tuple[float, float] | None = None,
    ) -> VAE:
        """A VAE of two convolutional networks, for images ``(C, H, W)`` of any size; weights as in `mlp`.

        Args:
            event_shape: ``(C, H, W)`` of one image; the sizes are halved at each stage while they are even.
            latent_dim: ``D``, the number of latent dimensions.
            channels: Channels after each stage of the encoder; the decoder has them in reverse order.
            hidden: Width of the dense layer between the stages and the latent.
            likelihood: As in `mlp`.
            activation: Makes the module put after each stage and dense layer.
            units: As in `mlp`.
        """
        latent_dim = positive_int("latent_dim", latent_dim)
        named = likelihoods.NAMED[one_of("likelihood", likelihood, likelihoods.NAMED)]
        channels, out_shape = tuple(channels), (named.outputs * event_shape[0], *event_shape[1:])
        encoder = networks.conv_encoder(
            event_shape, 2 * latent_dim, channels=channels, hidden=hidden, activation=activation
        )
        decoder = networks.conv_decoder(latent_dim, out_shape, channels=channels, hidden=hidden, activation=activation)
        return cls(
            StandardNormal(latent_dim),
            named.make(decoder, event_shape=event_shape, **_units_argument(named, likelihood, units)),
            DiagonalNormal(encoder, **_units_argument(named, likelihood, units)),
        )

    def model(self, x: Tensor) -> None:
        """The generative program: ``z ~ p(z)``, ``x ~ p(x|z)``, for each datum of ``x``, shape ``(N, *event)``.

        ``x`` is converted to the parameters' dtype and device, here and in every method, so integers, float64 and
        NumPy arrays are taken too.

        Raises:
            DataError: ``x`` has another shape, or (where Pyro's validation is on) values that p(x|z) cannot take.
        """
        x = self._as_events(x)
        self._register("prior")
        self._register("decoder")
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior())
            px = self.decoder(z)
            if is_validation_enabled():
                check_support("x", px, x)
            pyro.sample("x", px, obs=x)

    def guide(self, x: Tensor) -> None:
        """The recognition program: ``z ~ q(z|x)`` for each datum of ``x``, shape ``(N, *event)``."""
        x = self._as_events(x)
        self._register("encoder")
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", self.encoder(x))

    def encode(self, x: Array) -> torch.distributions.Distribution:
        """Returns q(z|x), with batch shape ``(N,)`` and event shape ``(D,)``, for ``x`` of shape ``(N, *event)``."""
        return self.encoder(self._as_events(x))

    def decode(self, z: Array) -> torch.distributions.Distribution:
        """Returns p(x|z), with batch shape ``(...)`` and event shape ``(*event)``, for ``z`` of shape ``(..., D)``."""
        z = _as_tensor("z", z)
        if z.shape[-1:] != (self.latent_dim,):
            raise DataError(f"z must have shape (..., {self.latent_dim}), got {tuple(z.shape)}.")
        return self.decoder(z.to(next(self.parameters(), z)))

    def sample(self, num_samples: int = 1, *, seed: int | None = None, mean: bool = False) -> Tensor:
        """Draws ``z ~ p(z)``, ``x ~ p(x|z)``.

        Args:
            num_samples: How many data to draw.
            seed: Same seed, same draws; ``None`` for fresh ones.
            mean: Return E[x|z] in place of the draw of x (smoother to look at, not a sample of the model).

        Returns:
            Shape ``(num_samples, *event)``.
        """
        num_samples = positive_int("num_samples", num_samples)
        with isolate([self], seed=resolve_seed(seed), device=_device_of(self)):
            px = self.decoder(self.prior().sample((num_samples,)))
            return px.mean if mean else px.sample()

    def reconstruct(self, x: Array) -> Tensor:
        """Returns ``E[x' | z]`` at ``z = E[z | x]`` under the encoder, shape ``(N, *event)`` like ``x``."""
        with isolate([self], seed=0):
            return self.decode(self.encode(x).mean).mean

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
            ProgramError: The VAE has no units; those of `mlp` and `conv` do with a Gaussian likelihood.
        """
        x = self._as_events(x)
        units = [part for part in self.modules() if isinstance(part, Units)]
        if not units:
            raise ProgramError(
                "this VAE has no units to find. VAE.mlp and VAE.conv with a Gaussian likelihood have some; parts take "
                "them as likelihoods.Gaussian(..., units=pvae.networks.Units())."
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
            modules: Your own module classes in the VAE. A subclass of `VAE` is one, or has its own ``load``.

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
            vae = unpack_module(files, (cls, VAE, *_PARTS, *modules))
        except CheckpointError as error:
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        if not isinstance(vae, cls):
            raise CheckpointError(f"{folder} holds a {type(vae).__name__}, not a {cls.__name__}.")
        return vae

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parts."""
        return f"event_shape={self.event_shape}, latent_dim={self.latent_dim}"

    def _register(self, part: str) -> None:
        if self not in _numbers:
            _numbers[self] = next(_next_number)
        pyro.module(f"vae{_numbers[self]}.{part}", getattr(self, part))

    def _as_events(self, x: Array) -> Tensor:
        x = _as_tensor("x", x)
        check_shape("x", x, self.event_shape)
        check_real("x", x)
        return x.to(next(self.parameters(), x))


def _infer_shapes(vae: VAE) -> tuple[int, tuple[int, ...]]:
    """Runs the three parts once; returns the latent dimension and the event shape that they agree on."""
    with isolate([vae], seed=0, device=_device_of(vae)):
        pz = vae.prior()
        if len(pz.event_shape) != 1 or pz.batch_shape:
            raise ProgramError(
                f"prior() must have batch shape () and event shape (D,), got {_shapes(pz)}. Does it miss .to_event(1)?"
            )
        px = _run_part("decoder", vae.decoder, pz.sample((2,)))
        if px.batch_shape != (2,):
            raise ProgramError(
                f"decoder(z) must have batch shape (2,) for z of shape (2, {pz.event_shape[0]}), got {_shapes(px)}. "
                "Does it miss .to_event(...)?"
            )
        qz = _run_part("encoder", vae.encoder, torch.zeros_like(px.mean))
        if qz.batch_shape != (2,) or qz.event_shape != pz.event_shape:
            raise ProgramError(
                f"encoder(x) must have batch shape (2,) and the prior's event shape {tuple(pz.event_shape)} for x of "
                f"shape {(2, *px.event_shape)}, got {_shapes(qz)}."
            )
    return pz.event_shape[0], tuple(px.event_shape)


def _units_argument(named: likelihoods.Named, likelihood: str, given: tuple[float, float] | None) -> dict[str, Any]:
    """Keyword of a part that has units: units of its own."""
    if not named.has_units and given is not None:
        raise ArgumentError(f"units={given!r}: likelihood={likelihood!r} has none. They are for data of real numbers.")
    return {"units": Units(given)} if named.has_units and given != (0, 1) else {}


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


def _run_part(name: str, part: nn.Module, argument: Tensor) -> torch.distributions.Distribution:
    try:
        return part(argument)
    except (RuntimeError, ValueError) as error:
        raise ProgramError(f"the {name} cannot take an argument of shape {tuple(argument.shape)}: {error}") from error


def _shapes(distribution: torch.distributions.Distribution) -> str:
    return f"batch shape {tuple(distribution.batch_shape)} and event shape {tuple(distribution.event_shape)}"


# What a saved VAE may be made of beside torch.nn's modules and the user's.
_PARTS = tuple(
    found
    for module in (networks, priors, likelihoods, posteriors)
    for name in module.__all__
    if isinstance(found := getattr(module, name), type) and issubclass(found, nn.Module)
)


def _check_densities(vae: VAE, rebuilt: Any) -> None:
    """Raises `ProgramError` where a rebuilt VAE, which is moved to the device of the other, computes something else."""
    device = _device_of(vae)
    rebuilt.to(device)
    with isolate([vae], seed=0, device=device):
        z = _draw(vae.prior(), (2,))
        x = _draw(vae.decoder(z))
    found = []
    for one in (vae, rebuilt):
        with isolate([one], seed=0, device=device):
            found.append((one.prior().log_prob(z), one.decoder(z).log_prob(x), one.encoder(x).log_prob(z)))
    for name, ours, theirs in zip(("prior", "decoder", "encoder"), *found, strict=True):
        # Weights that lie in memory otherwise are summed in another order.
        tolerance = torch.finfo(ours.dtype).eps ** 0.5
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, tolerance, tolerance, equal_nan=True):
            raise ProgramError(
                f"the {name} gives other densities when it is rebuilt from its constructors' arguments and weights. "
                "What was set after a module was made must be an argument of its constructor, or a persistent buffer."
            )


def _draw(distribution: torch.distributions.Distribution, shape: tuple[int, ...] = ()) -> Tensor:
    """A draw; of parameters that are nan, from which nothing can be drawn, their mean."""
    try:
        return distribution.sample(torch.Size(shape))
    except (RuntimeError, ValueError):
        return distribution.mean.expand(*shape, *distribution.batch_shape, *distribution.event_shape)
