"""The autoencoder: a code and its decoding without a distribution over codes, the baseline of a VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae import likelihoods, networks
from pvae.composite import Composite, draw, observe, run_decoder, run_part
from pvae.data import Array
from pvae.errors import ProgramError, one_of, positive_int, positive_ints
from pvae.parts import make_decoder, make_likelihood, make_shape, make_view

__all__ = ["Autoencoder"]


class Autoencoder(Composite):
    """A deterministic autoencoder, ``z = encoder(x)``, trained on ``-log p(x|z)``, nats per datum.

    With a ``likelihoods.Gaussian(network, scale=s)`` the loss is the squared error over 2 s^2, but for a constant.
    `model` and `guide` are a Pyro pair without latents, so that `pvae.fit` trains it with all of its options.

    It has no p(z), so no samples and no p(x): ``-log p(x | z = encoder(x))`` is an error of reconstruction, whatever
    `pvae.log_evidence` makes of it.

    Args:
        decoder: ``decoder(z)`` is p(x|z), with event shape ``(*event)``, as for a `VAE`.
        encoder: A network ``(N, *event) -> (N, D)``.
        latent_dim: ``D``, the numbers in a code.
        noise: A module that changes what the encoder sees in training, which makes it a denoising autoencoder:
            ``nn.Dropout(0.3)`` drops entries, ``pvae.networks.GaussianNoise(0.5)`` adds to them.
        view: A module that the encoder sees x through, before the noise, such as `pvae.networks.Units`.

    Raises:
        ProgramError: The two do not fit each other; they are tried on two data of zeros.

    Source: Hinton and Salakhutdinov, 2006, Reducing the Dimensionality of Data with Neural Networks; for the noise,
    Vincent, Larochelle, Bengio and Manzagol, 2008, Extracting and Composing Robust Features with Denoising
    Autoencoders.
    """

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        latent_dim: int,
        *,
        noise: nn.Module | None = None,
        view: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.encoder = encoder
        self.noise = noise
        self.view = view
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.event_shape = self._try(self._infer_shapes)

    @classmethod
    def mlp(
        cls,
        event_shape: int | Sequence[int] = (28, 28),
        latent_dim: int = 50,
        hidden: Sequence[int] = (400,),
        likelihood: str = "bernoulli",
        *,
        noise: nn.Module | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        units: tuple[float, float] | None = None,
    ) -> Autoencoder:
        """One of two multilayer perceptrons, those of `VAE.mlp`.

        Args:
            event_shape: Shape of one datum.
            latent_dim: ``D``, the numbers in a code.
            hidden: Widths of the encoder's hidden layers; the decoder has them in reverse order.
            likelihood: As for `VAE.mlp`.
            noise: As for the class.
            activation: Makes the module put after each hidden layer.
            units: As for `VAE.mlp`.
        """
        event_shape = make_shape(event_shape)
        latent_dim, hidden = positive_int("latent_dim", latent_dim), positive_ints("hidden", hidden)
        decoder, view = make_decoder(
            latent_dim, hidden[::-1], event_shape, likelihood, activation=activation, units=units
        )
        encoder = networks.mlp(event_shape, hidden, latent_dim, activation=activation)
        return cls(decoder, encoder, latent_dim, noise=noise, view=view)

    @classmethod
    def conv(
        cls,
        event_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 50,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        likelihood: str = "bernoulli",
        *,
        noise: nn.Module | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        units: tuple[float, float] | None = None,
    ) -> Autoencoder:
        """One of two convolutional networks, those of `VAE.conv`.

        Args:
            event_shape: ``(C, H, W)`` of one image.
            latent_dim: ``D``, the numbers in a code.
            channels: Channels after each stage of the encoder; the decoder has them in reverse order.
            hidden: Width of the dense layer between the stages and the code.
            likelihood: As for `VAE.mlp`.
            noise: As for the class.
            activation: Makes the module put after each stage and dense layer.
            units: As for `VAE.mlp`.
        """
        latent_dim, layers = positive_int("latent_dim", latent_dim), positive_ints("channels", channels)
        outputs = likelihoods.NAMED[one_of("likelihood", likelihood, likelihoods.NAMED)].outputs
        out_shape = (outputs * event_shape[0], *event_shape[1:])
        encoder = networks.conv_encoder(event_shape, latent_dim, channels=layers, hidden=hidden, activation=activation)
        network = networks.conv_decoder(latent_dim, out_shape, channels=layers, hidden=hidden, activation=activation)
        decoder = make_likelihood(network, event_shape, likelihood, units)
        return cls(decoder, encoder, latent_dim, noise=noise, view=make_view(likelihood, units))

    def model(self, x: Tensor) -> None:
        """Observes ``x ~ p(x | z = encoder(x))`` for each datum of ``x``, shape ``(N, *event)``.

        Raises:
            DataError: ``x`` has another shape, or (where Pyro's validation is on) values that p(x|z) cannot take.
        """
        x = self._as_events(x)
        self._register("encoder", "decoder")
        seen = self._see(x)
        px = self.decoder(self.encoder(seen if self.noise is None else self.noise(seen)))
        with pyro.plate("data", x.shape[0]):
            observe(px, x)

    def guide(self, x: Tensor) -> None:
        """Draws nothing: there are no latents."""
        with pyro.plate("data", self._as_events(x).shape[0]):
            pass

    def encode(self, x: Array) -> Tensor:
        """Returns the codes, shape ``(N, D)``, of ``x``, shape ``(N, *event)``; without noise."""
        return self.encoder(self._see(self._as_events(x)))

    def decode(self, z: Array) -> torch.distributions.Distribution:
        """Returns p(x|z), with batch shape ``(...)`` and event shape ``(*event)``, for ``z`` of shape ``(..., D)``."""
        return self.decoder(self._as_latents(z))

    def reconstruct(self, x: Array) -> Tensor:
        """Returns ``E[x' | z]`` at ``z = encoder(x)``, shape ``(N, *event)`` like ``x``."""
        with self._isolate(0):
            return self.decode(self.encode(x)).mean

    def _infer_shapes(self) -> tuple[int, ...]:
        """Runs the two parts once; returns the event shape that they agree on."""
        like = next(self.parameters(), torch.empty(()))
        px = run_decoder(self.decoder, like.new_zeros((2, self.latent_dim)))
        x = torch.zeros_like(px.mean)
        code: Any = run_part("encoder", self.encoder, self._see(x))
        if not isinstance(code, Tensor) or code.shape != (2, self.latent_dim):
            came = tuple(code.shape) if isinstance(code, Tensor) else type(code).__name__
            raise ProgramError(
                f"encoder(x) must be a network that gives codes of shape (2, {self.latent_dim}) for x of shape "
                f"{tuple(x.shape)}; got {came}."
            )
        return tuple(px.event_shape)

    def _draw_example(self) -> tuple[Tensor, ...]:
        z = torch.randn(2, self.latent_dim).to(next(self.parameters()))
        return z, draw(self.decoder(z))

    def _log_densities(self, *example: Tensor) -> dict[str, Tensor]:
        z, x = example
        return {"decoder": self.decoder(z).log_prob(x), "encoder": self.encoder(self._see(x))}
