"""The conditional VAE: p(x | y), for data that come with labels or covariates."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pvae import networks
from pvae.composite import (
    Composite,
    check_latent,
    check_posterior,
    concatenate,
    draw,
    observe,
    one_hot,
    run_decoder,
    run_part,
)
from pvae.data import Array
from pvae.errors import ArgumentError, DataError, positive_int, positive_ints
from pvae.parts import make_decoder, make_encoder, make_prior, make_shape
from pvae.posteriors import DiagonalNormal

__all__ = ["ConditionalVAE"]


class ConditionalVAE(Composite):
    """A VAE of x given y, ``p(x|y) = int p(x|z,y) p(z) dz``, or ``p(z|y)`` in the place of ``p(z)``.

    The parts are those of a `VAE`, whose networks see a vector that ends in y: ``decoder`` is called with
    ``[z, y]``, of shape ``(..., D + C)``, and ``encoder`` with ``[x, y]``, shape ``(N, E + C)``, where x is flat. A
    label is a vector of C numbers, 1 for its class and 0 for the others.

    `model` and `guide` take ``(x, y)``: train them by ``pvae.fit(cvae.model, cvae.guide, (x, y))``, and
    ``pvae.log_evidence(cvae.model, cvae.guide, (x, y))`` is log p(x|y).

    Args:
        prior: ``prior()`` is p(z), with event shape ``(D,)``. A module that takes an argument is called with y, as
            vectors ``(N, C)``, and is p(z|y); any of `pvae.posteriors` can be one.
        decoder: ``decoder([z, y])`` is p(x|z,y), with event shape ``(*event)``.
        encoder: ``encoder([x, y])`` is q(z|x,y), with event shape ``(D,)``.
        num_classes: C, where y are labels, whole numbers from 0 to C - 1 of shape ``(N,)``.
        num_covariates: C, where y are real numbers of shape ``(N, C)``.
        view: A module that the encoder sees x through, such as `pvae.networks.Units`; left out, it sees x itself.

    Raises:
        ArgumentError: Not one of ``num_classes`` and ``num_covariates``.
        ProgramError: The parts do not fit each other; they are tried on two data.

    Source: Sohn, Lee and Yan, 2015, Learning Structured Output Representation using Deep Conditional Generative Models;
    Kingma, Mohamed, Rezende and Welling, 2014, Semi-supervised Learning with Deep Generative Models.
    """

    def __init__(
        self,
        prior: nn.Module,
        decoder: nn.Module,
        encoder: nn.Module,
        *,
        num_classes: int | None = None,
        num_covariates: int | None = None,
        view: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder
        self.num_classes = num_classes
        self.num_covariates = num_covariates
        self.view = view
        self._width = _width(num_classes, num_covariates)
        self.latent_dim, self.event_shape = self._try(self._infer_shapes)

    @classmethod
    def mlp(
        cls,
        event_shape: int | Sequence[int] = (28, 28),
        latent_dim: int = 50,
        hidden: Sequence[int] = (400,),
        likelihood: str = "bernoulli",
        *,
        num_classes: int | None = None,
        num_covariates: int | None = None,
        prior: str = "standard-normal",
        posterior: str = "diagonal",
        has_conditional_prior: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        units: tuple[float, float] | None = None,
    ) -> ConditionalVAE:
        """One of multilayer perceptrons, as `VAE.mlp` makes, whose first layers also see y.

        Args:
            event_shape: Shape of one datum.
            latent_dim: ``D``, the number of latent dimensions.
            hidden: Widths of the encoder's hidden layers; the decoder has them in reverse order.
            likelihood: As for `VAE.mlp`.
            num_classes: As for the class.
            num_covariates: As for the class.
            prior: As for `VAE.mlp`, but not ``"vamp"``.
            posterior: As for `VAE.mlp`.
            has_conditional_prior: Learn a diagonal normal p(z|y), whose mean and log-scale are linear in y: so each
                class has a Gaussian of its own. Otherwise p(z) is ``prior``, and z is what y does not tell.
            activation: Makes the module put after each hidden layer.
            units: As for `VAE.mlp`.
        """
        event_shape = make_shape(event_shape)
        latent_dim, hidden = positive_int("latent_dim", latent_dim), positive_ints("hidden", hidden)
        width, size = _width(num_classes, num_covariates), math.prod(event_shape)
        decoder, view = make_decoder(
            latent_dim + width, hidden[::-1], event_shape, likelihood, activation=activation, units=units
        )
        encoder = make_encoder(size + width, hidden, latent_dim, posterior, activation=activation)
        pz = make_prior(latent_dim, prior, decoder, encoder)
        if has_conditional_prior:
            if prior != "standard-normal":
                raise ArgumentError(f"pass prior={prior!r} or has_conditional_prior=True: either says what p(z) is.")
            pz = DiagonalNormal(networks.mlp(width, [], 2 * latent_dim))
        return cls(pz, decoder, encoder, num_classes=num_classes, num_covariates=num_covariates, view=view)

    def model(self, x: Tensor, y: Tensor) -> None:
        """The generative program: ``z ~ p(z)``, ``x ~ p(x|z,y)``, for each datum.

        Args:
            x: Shape ``(N, *event)``; converted to the parameters' dtype and device.
            y: Labels ``(N,)``, or covariates ``(N, C)``.

        Raises:
            DataError: Another shape, or (where Pyro's validation is on) values that p(x|z,y) cannot take.
        """
        x, condition = self._as_pair(x, y)
        self._register("prior", "decoder")
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self._prior(condition))
            observe(self.decoder(concatenate(z, condition)), x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """The recognition program: ``z ~ q(z|x,y)`` for each datum; arguments as for `model`."""
        x, condition = self._as_pair(x, y)
        self._register("encoder")
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", self._encode(x, condition))

    def encode(self, x: Array, y: Array) -> torch.distributions.Distribution:
        """Returns q(z|x,y), with batch shape ``(N,)`` and event shape ``(D,)``."""
        return self._encode(*self._as_pair(x, y))

    def decode(self, z: Array, y: Array) -> torch.distributions.Distribution:
        """Returns p(x|z,y), for ``z`` of shape ``(..., D)`` and as many y, or ones that they are broadcast with."""
        z, condition = self._as_latents(z), self._as_condition(y)
        try:
            vectors = concatenate(z, condition)
        except RuntimeError as error:
            raise DataError(f"z, {tuple(z.shape)}, and y, {tuple(y.shape)}, have other leading dimensions.") from error
        return self.decoder(vectors)

    def sample(self, y: Array, *, seed: int | None = None, mean: bool = False) -> Tensor:
        """Draws ``z ~ p(z)``, ``x ~ p(x|z,y)``, one for each y.

        Args:
            y: Labels ``(N,)``, or covariates ``(N, C)``: ``torch.full((16,), 3)`` for 16 of class 3.
            seed: Same seed, same draws; ``None`` for fresh ones.
            mean: Return E[x|z,y] in place of the draw of x.

        Returns:
            Shape ``(N, *event)``.
        """
        condition = self._as_condition(y)
        if condition.dim() != 2:
            raise DataError(f"y must have one leading dimension, of the draws wanted; got shape {tuple(y.shape)}.")

        def decode() -> Any:
            pz = self._prior(condition)
            z = pz.sample() if pz.batch_shape else pz.sample((len(condition),))
            return self.decoder(concatenate(z, condition))

        return self._draw(decode, seed, mean=mean)

    def reconstruct(self, x: Array, y: Array, target: Array | None = None) -> Tensor:
        """Returns ``E[x' | z, y]`` at ``z = E[z | x, y]`` under the encoder, shape ``(N, *event)`` like ``x``.

        Args:
            x: Data.
            y: Their labels or covariates.
            target: Decode with these instead of y: what x would be if it had another label, as far as z is
                independent of y.
        """
        target = y if target is None else target
        (x, seen), condition = self._as_pair(x, y), self._as_condition(target)
        if condition.shape != seen.shape:
            raise DataError(f"target must have the shape of y, {tuple(y.shape)}; got {tuple(target.shape)}.")
        with self._isolate(0):
            return self.decoder(concatenate(self._encode(x, seen).mean, condition)).mean

    def extra_repr(self) -> str:
        """What ``repr`` shows beside the parts."""
        of = f"num_classes={self.num_classes}" if self.num_classes else f"num_covariates={self.num_covariates}"
        return f"{super().extra_repr()}, {of}"

    def _prior(self, condition: Tensor) -> Any:
        return self.prior(condition) if _takes_argument(self.prior) else self.prior()

    def _encode(self, x: Tensor, condition: Tensor) -> Any:
        return self.encoder(concatenate(self._flatten(x), condition))

    def _flatten(self, x: Tensor) -> Tensor:
        """Data as the encoder sees them, each a vector."""
        return self._see(x).reshape(len(x), -1)

    def _as_pair(self, x: Array, y: Array) -> tuple[Tensor, Tensor]:
        x, condition = self._as_events(x), self._as_condition(y)
        if condition.shape[:-1] != x.shape[:1]:
            raise DataError(f"y must have one entry for each of the {len(x)} data, got shape {tuple(y.shape)}.")
        return x, condition

    def _as_condition(self, y: Array) -> Tensor:
        """Y as vectors ``(..., C)`` in the parameters' dtype."""
        if self.num_covariates:
            return self._as_latents(y, self.num_covariates, "y")
        return one_hot(self._as_labels(y, self._width), self._width, next(self.parameters()))

    def _infer_shapes(self) -> tuple[int, tuple[int, ...]]:
        """Runs the parts once; returns the latent dimension and the event shape that they agree on."""
        condition = next(self.parameters(), torch.empty(())).new_zeros((2, self._width))
        if _takes_argument(self.prior):
            pz = run_part("prior", self.prior, condition)
            latent_dim = check_latent("prior(y)", pz, (2,))
        else:
            pz = self.prior()
            latent_dim = check_latent("prior()", pz)
        z = pz.sample() if pz.batch_shape else pz.sample((2,))
        px = run_decoder(self.decoder, concatenate(z, condition), "decoder([z, y])", "an argument")
        x = self._flatten(torch.zeros_like(px.mean))
        qz = run_part("encoder", self.encoder, concatenate(x, condition))
        of = f"an argument of shape (2, {x.shape[-1] + self._width})"
        check_posterior("encoder([x, y])", qz, pz.event_shape, of)
        return latent_dim, tuple(px.event_shape)

    def _draw_example(self) -> tuple[Tensor, ...]:
        like = next(self.parameters())
        condition = torch.eye(2, self._width).to(like)
        pz = self._prior(condition)
        z = draw(pz) if pz.batch_shape else draw(pz, (2,))
        return condition, z, draw(self.decoder(concatenate(z, condition)))

    def _log_densities(self, *example: Tensor) -> dict[str, Tensor]:
        condition, z, x = example
        return {
            "prior": self._prior(condition).log_prob(z),
            "decoder": self.decoder(concatenate(z, condition)).log_prob(x),
            "encoder": self._encode(x, condition).log_prob(z),
        }


def _width(num_classes: int | None, num_covariates: int | None) -> int:
    """C, the numbers that y is to the networks."""
    if (num_classes is None) == (num_covariates is None):
        raise ArgumentError(
            "pass num_classes=, for labels, or num_covariates=, for y of real numbers; got "
            f"num_classes={num_classes!r} and num_covariates={num_covariates!r}."
        )
    if num_classes is not None:
        return positive_int("num_classes", num_classes)
    return positive_int("num_covariates", num_covariates)


def _takes_argument(prior: nn.Module) -> bool:
    """Whether a prior is called with y."""
    parameters = inspect.signature(prior.forward).parameters.values()
    return any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
