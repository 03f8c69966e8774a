"""The VAE: three distributions put together into a Pyro model and a Pyro guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import torch
from torch import Tensor, nn

from pvae import networks
from pvae.composite import Composite, check_latent, check_posterior, draw, observe, run_decoder, run_part
from pvae.data import Array
from pvae.errors import one_of, positive_int, positive_ints
from pvae.parts import PartNames, make_shape

__all__ = ["VAE"]


class VAE(Composite):
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
        self.latent_dim, self.event_shape = self._try(self._infer_shapes)

    @classmethod
    def mlp(
        cls,
        event_shape: int | Sequence[int] = (28, 28),
        latent_dim: int = 50,
        hidden: Sequence[int] = (400,),
        likelihood: str = "bernoulli",
        *,
        prior: str = "standard-normal",
        posterior: str = "diagonal",
        activation: Callable[[], nn.Module] = nn.ReLU,
        units: tuple[float, float] | None = None,
    ) -> VAE:
        """A VAE of two multilayer perceptrons, and of parts by their names.

        Weights are drawn by torch's own initialization, so ``torch.manual_seed`` before the call fixes them.

        Args:
            event_shape: Shape of one datum.
            latent_dim: ``D``, the number of latent dimensions.
            hidden: Widths of the encoder's hidden layers; the decoder has them in reverse order.
            likelihood: A name of `pvae.likelihoods.NAMED`. Bits: ``"bernoulli"``. Grey values in [0, 1]:
                ``"continuous-bernoulli"``; on the 256 levels of 8 bits, ``"discretized-logistic"`` or
                ``"discretized-logistic-per-pixel"``. Real numbers: ``"gaussian"`` (one learned scale),
                ``"gaussian-per-pixel"``; with heavy tails ``"laplace"``, ``"student-t"``. Counts: ``"poisson"``,
                ``"negative-binomial"``. For anything else put the parts together: ``VAE(prior, decoder, encoder)``.
            prior: A name of `pvae.priors.NAMED`: ``"standard-normal"``; ``"mixture"`` of 50 normals; ``"vamp"``, of 100
                pseudo-inputs that begin at data when `pvae.fit` sees some; ``"flow"``.
            posterior: A name of `pvae.posteriors.NAMED`, for q(z|x): ``"diagonal"``; ``"low-rank"``, of rank 4 at most;
                ``"full"``; ``"iaf"``.
            activation: Makes the module put after each hidden layer.
            units: For real numbers and levels, ``(mean, scale)`` of the data: networks see ``(x - mean) / scale`` and
                give locations and scales in these units, so that a learned scale starts at ``scale``. Left out,
                `pvae.fit` finds them in the data, and so does `find_units`; ``(0, 1)`` leaves x as it is, and adds
                nothing to the parts.

        Example:
            >>> import pvae
            >>> vae = pvae.VAE.mlp(event_shape=(8, 8), latent_dim=2, hidden=[16])
            >>> vae.encode(pvae.datasets.digits().test_x[:5]).mean.shape
            torch.Size([5, 2])
            >>> vae.sample(3, seed=0).shape
            torch.Size([3, 8, 8])
        """
        event_shape = make_shape(event_shape)
        names = PartNames(positive_int("latent_dim", latent_dim), likelihood, prior, posterior)
        sizes = positive_ints("hidden", hidden)
        out_shape = (names.likelihood_outputs, *event_shape)
        decoder = networks.mlp(latent_dim, sizes[::-1], out_shape, activation=activation)
        encoder = networks.mlp(event_shape, sizes, names.encoder_outputs, activation=activation)
        return cls(*names.make(decoder, encoder, event_shape, units))

    @classmethod
    def conv(
        cls,
        event_shape: Sequence[int] = (1, 28, 28),
        latent_dim: int = 50,
        channels: Sequence[int] = (32, 64),
        hidden: int = 256,
        likelihood: str = "bernoulli",
        *,
        prior: str = "standard-normal",
        posterior: str = "diagonal",
        network: str = "plain",
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
            prior: As in `mlp`.
            posterior: As in `mlp`.
            network: ``"plain"``, or ``"residual"`` for `pvae.networks.residual_encoder` and its mirror image.
            activation: Makes the module put after each stage and dense layer.
            units: As in `mlp`.
        """
        names = PartNames(positive_int("latent_dim", latent_dim), likelihood, prior, posterior)
        make_encoder, make_decoder = _CONVOLUTIONAL[one_of("network", network, _CONVOLUTIONAL)]
        channels = positive_ints("channels", channels)
        out_shape = (names.likelihood_outputs * event_shape[0], *event_shape[1:])
        encoder = make_encoder(
            event_shape, names.encoder_outputs, channels=channels, hidden=hidden, activation=activation
        )
        decoder = make_decoder(latent_dim, out_shape, channels=channels, hidden=hidden, activation=activation)
        return cls(*names.make(decoder, encoder, tuple(event_shape), units))

    def model(self, x: Tensor) -> None:
        """The generative program: ``z ~ p(z)``, ``x ~ p(x|z)``, for each datum of ``x``, shape ``(N, *event)``.

        ``x`` is converted to the parameters' dtype and device, here and in every method, so integers, float64 and
        NumPy arrays are taken too.

        Raises:
            DataError: ``x`` has another shape, or (where Pyro's validation is on) values that p(x|z) cannot take.
        """
        x = self._as_events(x)
        self._register("prior", "decoder")
        with pyro.plate("data", x.shape[0]):
            observe(self.decoder(pyro.sample("z", self.prior())), x)

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
        return self.decoder(self._as_latents(z))

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
        return self._draw(lambda: self.decoder(self.prior().sample((num_samples,))), seed, mean=mean)

    def reconstruct(self, x: Array) -> Tensor:
        """Returns ``E[x' | z]`` at ``z = E[z | x]`` under the encoder, shape ``(N, *event)`` like ``x``."""
        with self._isolate(0):
            return self.decode(self.encode(x).mean).mean

    def _infer_shapes(self) -> tuple[int, tuple[int, ...]]:
        """Runs the three parts once; returns the latent dimension and the event shape that they agree on."""
        pz = run_part("prior", self.prior)
        latent_dim = check_latent("prior()", pz)
        px = run_decoder(self.decoder, pz.sample((2,)))
        qz = run_part("encoder", self.encoder, torch.zeros_like(px.mean))
        check_posterior("encoder(x)", qz, pz.event_shape, f"x of shape {(2, *px.event_shape)}")
        return latent_dim, tuple(px.event_shape)

    def _draw_example(self) -> tuple[Tensor, ...]:
        z = draw(self.prior(), (2,))
        return z, draw(self.decoder(z))

    def _log_densities(self, *example: Tensor) -> dict[str, Tensor]:
        z, x = example
        return {
            "prior": self.prior().log_prob(z),
            "decoder": self.decoder(z).log_prob(x),
            "encoder": self.encoder(x).log_prob(z),
        }


_CONVOLUTIONAL = {
    "plain": (networks.conv_encoder, networks.conv_decoder),
    "residual": (networks.residual_encoder, networks.residual_decoder),
}
