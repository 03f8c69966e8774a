"""The masked VAE: trained, measured and used on data of which entries are missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.composite import Composite, check_latent, check_posterior, concatenate, draw, observe, run_decoder
from pvae.data import Array
from pvae.errors import DataError, ProgramError, positive_int, positive_ints
from pvae.parts import make_decoder, make_encoder, make_prior, make_shape
from pvae.runtime import resolve_seed

__all__ = ["MaskedVAE"]

_MOST_NUMBERS = 1 << 24  # that imputing holds at once, of decoded data


class MaskedVAE(Composite):
    """A VAE of the entries that were observed, ``p(x_o) = int p(x_o|z) p(z) dz``, where others are missing at random.

    Given z, the entries of x must be independent, as they are under all of `pvae.likelihoods`: missing ones are then
    integrated out of ``p(x|z)`` by leaving them out. `model` and `guide` take ``(x, mask)``, and

    - ``pvae.fit(vae.model, vae.guide, (x, mask))`` maximizes the bound of log p(x_o);
    - ``pvae.log_evidence(vae.model, vae.guide, (x, mask))`` is log p(x_o), nats per datum.

    What x holds where the mask is 0 is never used. `pvae.fit` refuses nan in data, so `from_nan` makes the two tensors
    of one in which nan stands for what is missing.

    Args:
        prior: ``prior()`` is p(z), with event shape ``(D,)``.
        decoder: ``decoder(z)`` is p(x|z), with event shape ``(*event)`` of independent entries.
        encoder: ``encoder([x, mask])`` is q(z|x_o), with event shape ``(D,)``; it is called with a vector
            ``(N, 2 E)``, of x, 0 where it is missing, and the mask.
        view: A module that the encoder sees x through, such as `pvae.networks.Units`, by which what is missing is seen
            as the mean. It keeps the shape.

    Raises:
        ProgramError: The parts do not fit each other, or the entries of x are not independent given z.

    Source: Mattei and Frellsen, 2019, MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets.
    """

    def __init__(
        self, prior: nn.Module, decoder: nn.Module, encoder: nn.Module, *, view: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = decoder
        self.encoder = encoder
        self.view = view
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
    ) -> MaskedVAE:
        """One of multilayer perceptrons, as `VAE.mlp` makes, whose encoder also sees the mask.

        Args:
            event_shape: Shape of one datum.
            latent_dim: ``D``, the number of latent dimensions.
            hidden: Widths of the encoder's hidden layers; the decoder has them in reverse order.
            likelihood: As for `VAE.mlp`.
            prior: As for `VAE.mlp`, but not ``"vamp"``.
            posterior: As for `VAE.mlp`.
            activation: Makes the module put after each hidden layer.
            units: As for `VAE.mlp`.
        """
        event_shape = make_shape(event_shape)
        latent_dim, hidden = positive_int("latent_dim", latent_dim), positive_ints("hidden", hidden)
        decoder, view = make_decoder(
            latent_dim, hidden[::-1], event_shape, likelihood, activation=activation, units=units
        )
        in_features = 2 * math.prod(event_shape)
        encoder = make_encoder(in_features, hidden, latent_dim, posterior, activation=activation)
        return cls(make_prior(latent_dim, prior, decoder, encoder), decoder, encoder, view=view)

    @staticmethod
    def from_nan(x: Array) -> tuple[Tensor, Tensor]:
        """Makes ``(x, mask)`` of data in which nan stands for what is missing.

        It becomes the mean of what is there, by which `pvae.fit` finds the units of x, or 0 if that is whole numbers.

        Args:
            x: Floating-point data of any shape.

        Raises:
            DataError: Entries are infinite, which is neither a number nor missing, or x has no floating-point numbers.
        """
        x = torch.as_tensor(x)
        if not x.is_floating_point():
            raise DataError(f"x must be floating-point numbers, to hold nan where it is missing; got {x.dtype}.")
        if x.isinf().any():
            raise DataError(f"x holds {int(x.isinf().sum())} infinite entries. Set them to nan if they are missing.")
        mask = ~x.isnan()
        there = x[mask]
        is_whole = not len(there) or torch.equal(there, there.round())
        return torch.where(mask, x, 0.0 if is_whole else there.double().mean().item()), mask

    def model(self, x: Tensor, mask: Tensor) -> None:
        """The generative program, ``z ~ p(z)``, ``x_o ~ p(x_o|z)``, for each datum.

        Args:
            x: Shape ``(N, *event)``; converted to the parameters' dtype and device.
            mask: The same shape, True or 1 where x was observed.

        Raises:
            DataError: Another shape, or (where Pyro's validation is on) a mask of other numbers, or values that p(x|z)
                cannot take where they were observed.
        """
        x, mask = self._as_pair(x, mask)
        self._register("prior", "decoder")
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior())
            px = self.decoder(z)
            observe(_of_observed(px, mask), _fill(px, x, mask))

    def guide(self, x: Tensor, mask: Tensor) -> None:
        """The recognition program: ``z ~ q(z|x_o)`` for each datum; arguments as for `model`."""
        x, mask = self._as_pair(x, mask)
        self._register("encoder")
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", self._encode(x, mask))

    def encode(self, x: Array, mask: Array) -> torch.distributions.Distribution:
        """Returns q(z|x_o), with batch shape ``(N,)`` and event shape ``(D,)``."""
        return self._encode(*self._as_pair(x, mask))

    def decode(self, z: Array) -> torch.distributions.Distribution:
        """Returns p(x|z) of all entries, with batch shape ``(...)``, for ``z`` of shape ``(..., D)``."""
        return self.decoder(self._as_latents(z))

    def sample(self, num_samples: int = 1, *, seed: int | None = None, mean: bool = False) -> Tensor:
        """Draws whole data, ``z ~ p(z)``, ``x ~ p(x|z)``, as `VAE.sample` does; shape ``(num_samples, *event)``."""
        num_samples = positive_int("num_samples", num_samples)
        return self._draw(lambda: self.decoder(self.prior().sample((num_samples,))), seed, mean=mean)

    def reconstruct(self, x: Array, mask: Array) -> Tensor:
        """Returns ``E[x' | z]`` of all entries at ``z = E[z | x_o]`` under the encoder, shape ``(N, *event)``."""
        with self._isolate(0):
            return self.decode(self.encode(x, mask).mean).mean

    def impute(
        self, x: Array, mask: Array, num_samples: int = 100, *, draws: int | None = None, seed: int | None = 0
    ) -> Tensor:
        """Fills in what is missing, by self-normalized importance sampling from the encoder.

        With ``z_k ~ q(z|x_o)`` and ``w_k`` in proportion to ``p(x_o|z_k) p(z_k) / q(z_k|x_o)``, the mean of what is
        missing is ``E[x_m|x_o] ~ sum_k w_k E[x_m|z_k]``; a draw takes z_k with probability w_k, then
        ``x_m ~ p(x_m|z_k)``.

        Args:
            x: Data, as for `model`.
            mask: Where x was observed.
            num_samples: K. Imputations are as good as the weights: see the effective sample sizes of
                `pvae.log_evidence`.
            draws: How many draws to return of each datum, for multiple imputation; left out, the mean.
            seed: Same seed, same draws; ``None`` for fresh ones.

        Returns:
            ``(N, *event)``, or ``(draws, N, *event)``: x where it was observed.
        """
        num_samples = positive_int("num_samples", num_samples)
        draws = None if draws is None else positive_int("draws", draws)
        x, mask = self._as_pair(x, mask)
        size = max(1, _MOST_NUMBERS // (num_samples * max(1, math.prod(self.event_shape))))
        with self._isolate(resolve_seed(seed)):
            parts = [
                self._impute(a, b, num_samples, draws) for a, b in zip(x.split(size), mask.split(size), strict=True)
            ]
        return torch.cat(parts, 0 if draws is None else 1)

    def _impute(self, x: Tensor, mask: Tensor, num_samples: int, draws: int | None) -> Tensor:
        qz = self._encode(x, mask)
        z = qz.sample((num_samples,))
        px: Any = self.decoder(z)
        log_px = _of_observed(px, mask).log_prob(_fill(px, x, mask))
        weights = (log_px + self.prior().log_prob(z) - qz.log_prob(z)).double().softmax(0)
        if draws is None:
            shape = (*weights.shape, *[1] * len(self.event_shape))
            filled = (weights.to(x).reshape(shape) * px.mean).sum(0)
        else:
            chosen = torch.multinomial(weights.T, draws, replacement=True).T
            filled = self.decoder(z.gather(0, chosen[..., None].expand(-1, -1, z.shape[-1]))).sample()
        return torch.where(mask, x, filled)

    def _encode(self, x: Tensor, mask: Tensor) -> Any:
        x = torch.where(mask, x, 0.0)
        seen = torch.where(mask, self._see(x), 0.0)
        return self.encoder(concatenate(seen.reshape(len(x), -1), mask.to(x.dtype).reshape(len(x), -1)))

    def _as_pair(self, x: Array, mask: Array) -> tuple[Tensor, Tensor]:
        mask = torch.as_tensor(mask)
        observed = mask != 0
        if is_validation_enabled() and not mask.is_meta and not torch.equal(observed.to(mask.dtype), mask):
            raise DataError("mask must be True or 1 where x was observed, False or 0 where not; got other numbers.")
        x = torch.as_tensor(x)  # with nan, which other arrays are refused for
        x = self._as_events(x)
        if observed.shape != x.shape:
            raise DataError(f"mask must have the shape of x, {tuple(x.shape)}; got {tuple(mask.shape)}.")
        observed = observed.to(x.device)
        return torch.where(observed | x.isfinite(), x, 0.0), observed

    def _infer_shapes(self) -> tuple[int, tuple[int, ...]]:
        """Runs the parts once; returns the latent dimension and the event shape that they agree on."""
        pz = self.prior()
        latent_dim = check_latent("prior()", pz)
        px = run_decoder(self.decoder, pz.sample((2,)))
        _entries(px)
        size = px.event_shape.numel()
        x = torch.zeros_like(px.mean)
        try:
            qz = self._encode(x, x == 0)
        except (RuntimeError, ValueError) as error:
            raise ProgramError(f"the encoder cannot take an argument of shape (2, {2 * size}): {error}") from error
        check_posterior("encoder([x, mask])", qz, pz.event_shape, f"an argument of shape (2, {2 * size})")
        return latent_dim, tuple(px.event_shape)

    def _draw_example(self) -> tuple[Tensor, ...]:
        z = draw(self.prior(), (2,))
        x = draw(self.decoder(z))
        return z, x, torch.rand_like(x) < 0.7

    def _log_densities(self, *example: Tensor) -> dict[str, Tensor]:
        z, x, mask = example
        return {
            "prior": self.prior().log_prob(z),
            "decoder": self.decoder(z).log_prob(x),
            "encoder": self._encode(x, mask).log_prob(z),
        }


def _entries(px: Any) -> Any:
    """The distribution of single entries, of which p(x|z) is a product."""
    base = px.base_dist if isinstance(px, torch.distributions.Independent) else px
    if base.event_shape:
        raise ProgramError(
            f"decoder(z) must have independent entries, so that missing ones can be left out: some distribution of "
            f"single numbers with .to_event({len(px.event_shape)}). It is {type(base).__name__} with event shape "
            f"{tuple(base.event_shape)}."
        )
    return base


def _of_observed(px: Any, mask: Tensor) -> dist.TorchDistribution:
    """p(x_o|z), for x of which any values may stand where it is missing."""
    return _entries(px).mask(mask).to_event(len(px.event_shape))


def _fill(px: Any, x: Tensor, mask: Tensor) -> Tensor:
    """X with a value that p(x|z) can take where it is missing, so that its density, which is left out, is finite."""
    support: Any = _entries(px).support
    if support is constraints.real:
        return x
    for value in (0.0, 1.0, 0.5):
        with suppress(NotImplementedError, RuntimeError, TypeError, ValueError):  # a support that depends on parameters
            if bool(support.check(torch.tensor(value, device="cpu"))):
                return torch.where(mask, x, value)
    return torch.where(mask, x, 0.0)
