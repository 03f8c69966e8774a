"""p(z): modules whose ``forward()`` returns the prior over the latent, a distribution with event ``(D,)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pvae.errors import ArgumentError, DataError, ProgramError, positive_int
from pvae.flows import AutoregressiveAffine, masked_networks
from pvae.networks import Units, soft_clip

__all__ = ["NAMED", "Flow", "GaussianMixture", "StandardNormal", "VampPrior"]

_MAX_LOG_SCALE = 7.0  # bound on |log scale| of a mixture's components
_MAX_STEP = 3.0  # bound on |log scale| of an entry in one step of a flow
_NUM_PSEUDO_INPUTS = 100  # of a prior that is made by its name
_MARGIN = 0.05  # how far from its bounds a pseudo-input begins, as a share: there its gradient is not yet 0


class StandardNormal(nn.Module):
    """The standard normal prior, ``p(z) = Normal(z; 0, I)``.

    Args:
        latent_dim: ``D``, the number of latent dimensions.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = positive_int("latent_dim", latent_dim)
        # Buffers, so that the prior follows its model to another device or dtype.
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """Returns p(z), with batch shape ``()`` and event shape ``(D,)``."""
        return dist.Normal(self.loc, self.scale).to_event(1)


class GaussianMixture(nn.Module):
    """A mixture of diagonal normals, ``p(z) = sum_c w_c Normal(z; m_c, diag(s_c^2))``; all of it is learned.

    The means begin as draws of ``Normal(0, 1/2)`` and the variances at 1/2, so that components differ and the whole is
    about standard normal. Weights begin equal. Scales are held by `soft_clip` between 0.0009 and 1,100.

    Args:
        latent_dim: ``D``, the number of latent dimensions.
        num_components: How many components; a density takes ``O(D)`` for each.

    Source: Dilokthanakul et al., 2016, Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders.
    """

    def __init__(self, latent_dim: int, num_components: int = 50) -> None:
        super().__init__()
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.num_components = positive_int("num_components", num_components)
        self.locs = nn.Parameter(torch.randn(self.num_components, self.latent_dim) * math.sqrt(0.5))
        self.log_scales = nn.Parameter(torch.full((self.num_components, self.latent_dim), math.log(0.5) / 2))
        self.logits = nn.Parameter(torch.zeros(self.num_components))

    def forward(self) -> dist.TorchDistribution:
        """Returns p(z), with batch shape ``()`` and event shape ``(D,)``."""
        scales = soft_clip(self.log_scales, _MAX_LOG_SCALE).exp()
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), dist.Normal(self.locs, scales).to_event(1))


class VampPrior(nn.Module):
    """What the encoder makes of learned pseudo-inputs, all alike: ``p(z) = (1/C) sum_c q(z | u_c)``.

    The prior that is best for the ELBO is the mean of q(z|x) over the data; this has C pseudo-inputs in their place,
    which are trained with all else, as the encoder is by both of its roles. It holds the VAE's own encoder:
    ``VAE(VampPrior(encoder, ...), decoder, encoder)``.

    Each density takes one of q for every pseudo-input, and each step of training C more runs of the encoder. With an
    `InverseAutoregressive` encoder it takes D passes through the steps for each: for few latents and inputs only.

    Args:
        encoder: ``encoder(u)`` is q(z|u), with event shape ``(D,)``.
        raw_inputs: The pseudo-inputs before they are put inside of ``bounds`` or into the units of data, shape
            ``(C, *event)``. To start at data use `from_data`.
        bounds: ``(lowest, highest)`` value of data, as ``(0, 1)`` for pixels: ``u = lowest + (highest - lowest)
            sigmoid(raw)``; as ``(0, math.inf)`` for counts: ``u = lowest + softplus(raw)``. Left out, u may be any
            real number.
        units: In which ``raw_inputs`` are, ``u = units.back(raw)``; for data without bounds.
        starts_from_data: Whether `pvae.fit` is to put data in the place of ``raw_inputs`` before its first step, as it
            does where it finds the units of data. A loop of your own calls `find_units`.

    Source: Tomczak and Welling, 2018, VAE with a VampPrior.
    """

    has_started: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        raw_inputs: Tensor,
        *,
        bounds: Sequence[float] | None = None,
        units: Units | None = None,
        starts_from_data: bool = False,
    ) -> None:
        super().__init__()
        if raw_inputs.dim() < 2 or not len(raw_inputs) or not raw_inputs.is_floating_point():
            raise ArgumentError(
                "raw_inputs must be pseudo-inputs of shape (C, *event), of floating-point numbers; got shape "
                f"{tuple(raw_inputs.shape)} and {raw_inputs.dtype}."
            )
        if bounds is not None and (len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1]):
            raise ArgumentError(f"bounds must be (lowest, highest), two numbers in this order; got {bounds!r}.")
        if bounds is not None and units is not None:
            raise ArgumentError("pass bounds or units: units are for data without bounds.")
        self.encoder = encoder
        self.raw_inputs = nn.Parameter(raw_inputs.detach().clone())
        self.bounds = None if bounds is None else tuple(map(float, bounds))
        self.units = units
        self.starts_from_data = starts_from_data
        self.register_buffer("has_started", torch.tensor(not starts_from_data))

    @classmethod
    def from_data(
        cls,
        encoder: nn.Module,
        x: Tensor,
        *,
        bounds: Sequence[float] | None = None,
        units: Units | None = None,
    ) -> VampPrior:
        """A prior whose pseudo-inputs begin at data, a little inside of their bounds.

        Args:
            encoder: As above.
            x: The data, shape ``(C, *event)``: C of a training set, such as ``train_x[:500]``.
            bounds: As above.
            units: As above; those of the encoder, if it has some.

        Raises:
            DataError: Data outside of the bounds.
        """
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        x = x.to(next(encoder.parameters(), x).device)
        prior = cls(encoder, x, bounds=bounds, units=units)
        prior.find_units(x)
        return prior

    def forward(self) -> dist.TorchDistribution:
        """Returns p(z), with batch shape ``()`` and event shape ``(D,)``."""
        weights = torch.zeros(len(self.raw_inputs), dtype=self.raw_inputs.dtype, device=self.raw_inputs.device)
        return dist.MixtureSameFamily(dist.Categorical(logits=weights), self._components())

    def pseudo_inputs(self) -> Tensor:
        """Returns u, shape ``(C, *event)``, as data are: inside of the bounds, or in their units."""
        if self.bounds is None:
            return self.raw_inputs if self.units is None else self.units.back(self.raw_inputs)
        low, high = self.bounds
        return low + (softplus(self.raw_inputs) if math.isinf(high) else (high - low) * self.raw_inputs.sigmoid())

    def wants_units(self, x: Tensor) -> bool:
        """Whether `pvae.fit` is to call `find_units` with ``x``, of the shape of its data: no data were seen yet."""
        return tuple(x.shape[1:]) == tuple(self.raw_inputs.shape[1:]) and not self.has_started.item()

    @torch.no_grad()
    def find_units(self, x: Tensor) -> None:
        """Puts the first C data in the place of the pseudo-inputs; where there are fewer, again, and moved a little.

        Args:
            x: Data of shape ``(N, *event)``.
        """
        raw = self._raw(x.to(self.raw_inputs))
        count = len(self.raw_inputs)
        rows = torch.arange(count, device=raw.device)
        again = (rows >= len(raw)).to(raw).reshape(-1, *(1 for _ in raw.shape[1:]))
        self.raw_inputs.copy_(raw[rows % len(raw)] + 0.1 * again * torch.randn_like(self.raw_inputs))
        self.has_started.fill_(True)

    def _raw(self, x: Tensor) -> Tensor:
        """The inverse of `pseudo_inputs`, for data a little inside of the bounds."""
        if self.bounds is None:
            return x if self.units is None else self.units(x)
        low, high = self.bounds
        if bool(((x < low) | (x > high)).any()):
            raise DataError(
                f"pseudo-inputs begin at data, and these reach from {x.min():g} to {x.max():g}, outside of the bounds "
                f"{self.bounds}. Pass the bounds that all data have, or rescale the data."
            )
        if math.isinf(high):
            x = (x - low).clamp(min=_MARGIN)
            return x + (-(-x).expm1()).log()
        return ((x - low) / (high - low)).clamp(_MARGIN, 1 - _MARGIN).logit()

    def _components(self) -> Any:
        u = self.pseudo_inputs()
        components = self.encoder(u)
        if components.batch_shape != u.shape[:1]:
            raise ProgramError(
                f"encoder(u) must have batch shape ({len(u)},) for pseudo-inputs of shape {tuple(u.shape)}, got "
                f"{tuple(components.batch_shape)}."
            )
        return components


class Flow(nn.Module):
    """A standard normal seen through masked autoregressive steps, ``p(z) = Normal(f(z); 0, I) |df/dz|``.

    Each step of f is ``e_i = m_i(z_<i) + exp(a_i(z_<i)) z_i`` with ``|a| < 3``, every other one through the entries in
    reverse. It begins as the standard normal. A density takes one pass through each step; a draw takes D, which
    training never does.

    Args:
        latent_dim: ``D``, the number of latent dimensions.
        num_steps: How many steps.
        hidden: Widths of the hidden layers of each step's network, none below D; left out, one of ``max(64, 4 D)``.

    Source: Papamakarios, Pavlakou and Murray, 2017, Masked Autoregressive Flow for Density Estimation; as a prior, Chen
    et al., 2017, Variational Lossy Autoencoder.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, num_steps: int = 4, *, hidden: Sequence[int] | None = None) -> None:
        super().__init__()
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.num_steps = num_steps
        self.hidden = hidden
        self.steps, self._orders = masked_networks(self.latent_dim, 0, num_steps, hidden)
        for step in self.steps:
            for parameter in list(step.parameters())[-2:]:  # of the last layer
                nn.init.zeros_(parameter)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        """Returns p(z), with batch shape ``()`` and event shape ``(D,)``."""
        steps = zip(self.steps, self._orders, strict=True)
        inverses = [AutoregressiveAffine(partial(_shift_and_scale, step), order).inv for step, order in steps]
        return dist.TransformedDistribution(dist.Normal(self.loc, self.scale).to_event(1), inverses)


def _shift_and_scale(network: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    shift, raw = network(z, z[..., :0])
    return shift, soft_clip(raw, _MAX_STEP)


def _vamp(latent_dim: int, decoder: nn.Module, encoder: nn.Module, event_shape: Sequence[int]) -> VampPrior:
    """Pseudo-inputs that are to begin at data, within the bounds of the data that a decoder gives."""
    with torch.no_grad():
        bounds = _bounds_of(decoder(torch.zeros(2, latent_dim)).support)
    units = getattr(encoder, "units", None) if bounds is None else None
    raw_inputs = torch.randn(_NUM_PSEUDO_INPUTS, *event_shape)
    return VampPrior(encoder, raw_inputs, bounds=bounds, units=units, starts_from_data=True)


def _bounds_of(support: Any) -> tuple[float, float] | None:
    """The lowest and the highest value in a support, if there is a lowest."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.boolean:
        return 0.0, 1.0
    if not hasattr(support, "lower_bound"):
        return None
    low, high = (torch.as_tensor(getattr(support, key, math.inf)) for key in ("lower_bound", "upper_bound"))
    return low.min().item(), high.max().item()


# (latent_dim, decoder, encoder, event_shape) -> the prior that `pvae.VAE.mlp` makes from its name
NAMED: dict[str, Callable[[int, nn.Module, nn.Module, Sequence[int]], nn.Module]] = {
    "standard-normal": lambda latent_dim, *_: StandardNormal(latent_dim),
    "mixture": lambda latent_dim, *_: GaussianMixture(latent_dim),
    "vamp": _vamp,
    "flow": lambda latent_dim, *_: Flow(latent_dim),
}
