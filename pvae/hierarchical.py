"""The hierarchical VAE: several layers of latents, each drawn given the one above."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae import networks
from pvae.composite import Composite, check_latent, draw, observe, run_decoder, run_part, show_shapes
from pvae.data import Array
from pvae.errors import ArgumentError, ProgramError, positive_int, positive_ints
from pvae.parts import make_decoder, make_shape
from pvae.posteriors import DiagonalNormal
from pvae.priors import StandardNormal

__all__ = ["HierarchicalVAE"]


class HierarchicalVAE(Composite):
    """A VAE with L layers of latents, each drawn given the one above it.

    The model is ``p(x, z) = p(z_L) p(z_{L-1}|z_L) ... p(z_1|z_2) p(x|z_1)``, and the guide goes the other way,
    ``q(z|x) = q(z_1|x) q(z_2|z_1) ... q(z_L|z_{L-1})``. Sites are ``"z1"``, next to x, to ``"zL"``. Any of
    `pvae.posteriors` can be a layer, and any of `pvae.priors` the one on top.

    Args:
        prior: ``prior()`` is p(z_L), with event shape ``(D_L,)``.
        layers: From the top downwards, ``layer(z_{l+1})`` is p(z_l|z_{l+1}), with event shape ``(D_l,)``; L - 1 of
            them, at least one.
        decoder: ``decoder(z_1)`` is p(x|z_1), with event shape ``(*event)``.
        encoders: From x upwards, ``encoders[0](x)`` is q(z_1|x), and ``encoders[l](z_l)`` is q(z_{l+1}|z_l).

    Attributes:
        latent_dims: ``(D_1, ..., D_L)``; ``latent_dim`` is D_1.

    Raises:
        ArgumentError: Not as many encoders as there are layers of latents, or one layer alone, which is a `VAE`.
        ProgramError: The parts do not fit each other; they are tried on two data.

    Source: Rezende, Mohamed and Wierstra, 2014, Stochastic Backpropagation and Approximate Inference in Deep Generative
    Models; Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.
    """

    def __init__(
        self, prior: nn.Module, layers: Iterable[nn.Module], decoder: nn.Module, encoders: Iterable[nn.Module]
    ) -> None:
        super().__init__()
        self.prior = prior
        self.layers = nn.ModuleList(layers)
        self.decoder = decoder
        self.encoders = nn.ModuleList(encoders)
        if not len(self.layers) or len(self.encoders) != len(self.layers) + 1:
            raise ArgumentError(
                "layers must be at least one, and encoders one more, for each layer of latents; got "
                f"{len(self.layers)} layers and {len(self.encoders)} encoders."
            )
        self.latent_dims, self.event_shape = self._try(self._infer_shapes)
        self.latent_dim = self.latent_dims[0]

    @classmethod
    def mlp(
        cls,
        event_shape: int | Sequence[int] = (28, 28),
        latent_dims: Sequence[int] = (100, 50),
        hidden: Sequence[Sequence[int]] = ((200, 200), (100, 100)),
        likelihood: str = "bernoulli",
        *,
        activation: Callable[[], nn.Module] = nn.Tanh,
        units: tuple[float, float] | None = None,
    ) -> HierarchicalVAE:
        """One of multilayer perceptrons, with a standard normal on top and diagonal normals below and in the guide.

        What is left out is as in Burda, Grosse and Salakhutdinov, 2015: two layers of latents.

        Args:
            event_shape: Shape of one datum.
            latent_dims: ``(D_1, ..., D_L)``, from the layer next to x upwards.
            hidden: The same, widths of the hidden layers between x and z_1, between z_1 and z_2, and so on; those of
                the model have them in reverse order.
            likelihood: As for `VAE.mlp`.
            activation: Makes the module put after each hidden layer.
            units: As for `VAE.mlp`.

        Raises:
            ArgumentError: ``latent_dims`` and ``hidden`` are not as many, or fewer than two.
        """
        event_shape = make_shape(event_shape)
        dims = positive_ints("latent_dims", latent_dims)
        if not isinstance(hidden, Iterable):
            raise ArgumentError(f"hidden must be a sequence of widths for each layer of latents, got {hidden!r}.")
        widths = [positive_ints("hidden", one) for one in hidden]
        if len(dims) < 2 or len(widths) != len(dims):
            raise ArgumentError(
                f"latent_dims and hidden must have an entry for each layer of latents, at least two; got {dims} and "
                f"{widths}. One layer is a pvae.VAE."
            )
        decoder, view = make_decoder(
            dims[0], widths[0][::-1], event_shape, likelihood, activation=activation, units=units
        )
        pairs = list(zip(dims, dims[1:], widths[1:], strict=False))  # one layer, the one above, and what is between
        layers = [networks.mlp(above, w[::-1], 2 * below, activation=activation) for below, above, w in pairs[::-1]]
        encoders = [networks.mlp(below, w, 2 * above, activation=activation) for below, above, w in pairs]
        first = networks.mlp(event_shape, widths[0], 2 * dims[0], activation=activation)
        encoders = [first if view is None else nn.Sequential(view, first), *encoders]
        return cls(
            StandardNormal(dims[-1]),
            map(DiagonalNormal, layers),
            decoder,
            map(DiagonalNormal, encoders),
        )

    def model(self, x: Tensor) -> None:
        """The generative program, from the top to x, for each datum of ``x``, shape ``(N, *event)``.

        Raises:
            DataError: ``x`` has another shape, or (where Pyro's validation is on) values that p(x|z) cannot take.
        """
        x = self._as_events(x)
        self._register("prior", "layers", "decoder")
        with pyro.plate("data", x.shape[0]):
            level = len(self.encoders)
            z = pyro.sample(f"z{level}", self.prior())
            for layer in self.layers:
                level -= 1
                z = pyro.sample(f"z{level}", layer(z))
            observe(self.decoder(z), x)

    def guide(self, x: Tensor) -> None:
        """The recognition program, from x to the top."""
        below = self._as_events(x)
        self._register("encoders")
        with pyro.plate("data", below.shape[0]):
            for level, encoder in enumerate(self.encoders, 1):
                below = pyro.sample(f"z{level}", encoder(below))

    def encode(self, x: Array) -> torch.distributions.Distribution:
        """Returns q(z_1|x), with batch shape ``(N,)`` and event shape ``(D_1,)``, for x of shape ``(N, *event)``."""
        return self.encoders[0](self._as_events(x))

    def decode(self, z: Array) -> torch.distributions.Distribution:
        """Returns p(x|z_1), with batch shape ``(...)``, for ``z`` of shape ``(..., D_1)``."""
        return self.decoder(self._as_latents(z))

    def sample(self, num_samples: int = 1, *, seed: int | None = None, mean: bool = False) -> Tensor:
        """Draws latents from the top downwards, then x.

        Args:
            num_samples: How many data to draw.
            seed: Same seed, same draws; ``None`` for fresh ones.
            mean: Return E[x|z_1] in place of the draw of x.

        Returns:
            Shape ``(num_samples, *event)``.
        """
        num_samples = positive_int("num_samples", num_samples)
        return self._draw(lambda: self.decoder(self._draw_latents(num_samples)[0]), seed, mean=mean)

    def reconstruct(self, x: Array) -> Tensor:
        """Returns ``E[x' | z_1]`` at ``z_1 = E[z_1 | x]`` under the guide, shape ``(N, *event)`` like ``x``."""
        with self._isolate(0):
            return self.decode(self.encode(x).mean).mean

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parts."""
        return f"event_shape={self.event_shape}, latent_dims={self.latent_dims}"

    def _draw_latents(self, count: int) -> list[Tensor]:
        """Draws of the latents, from z_1 to z_L."""
        drawn = [draw(self.prior(), (count,))]
        for layer in self.layers:
            drawn.append(draw(layer(drawn[-1])))
        return drawn[::-1]

    def _infer_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Runs the parts once; returns the latent dimensions, from z_1 upwards, and the event shape."""
        pz: Any = self.prior()
        z, dims = pz.sample((2,)), [check_latent("prior()", pz)]
        for place, layer in enumerate(self.layers):
            pz = run_part(f"layers[{place}]", layer, z)
            dims.append(check_latent(f"layers[{place}](z)", pz, (2,)))
            z = pz.sample()
        px = run_decoder(self.decoder, z)
        below = torch.zeros_like(px.mean)
        for place, (encoder, dim) in enumerate(zip(self.encoders, dims[::-1], strict=True)):
            qz: Any = run_part(f"encoders[{place}]", encoder, below)
            if qz.batch_shape != (2,) or qz.event_shape != (dim,):
                raise ProgramError(
                    f"encoders[{place}] must have batch shape (2,) and event shape ({dim},), as the model's "
                    f"z{place + 1} has, for an argument of shape {tuple(below.shape)}; got {show_shapes(qz)}."
                )
            below = torch.zeros_like(qz.mean)
        return tuple(dims[::-1]), tuple(px.event_shape)

    def _draw_example(self) -> tuple[Tensor, ...]:
        drawn = self._draw_latents(2)
        return draw(self.decoder(drawn[0])), *drawn

    def _log_densities(self, *example: Tensor) -> dict[str, Tensor]:
        x, *z = example
        densities = {"prior": self.prior().log_prob(z[-1]), "decoder": self.decoder(z[0]).log_prob(x)}
        for place, layer in enumerate(self.layers):
            densities[f"layers[{place}]"] = layer(z[-1 - place]).log_prob(z[-2 - place])
        for place, encoder in enumerate(self.encoders):
            densities[f"encoders[{place}]"] = encoder(example[place]).log_prob(z[place])
        return densities
