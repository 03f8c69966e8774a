"""Latents as tensors: how programs lay them out, and how they become vectors of real numbers.

Nothing of Pyro runs here. Everywhere else particles come first and data second: ``(K, N, ...)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.mixture import MaskedConstraint
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from pvae.errors import ProgramError

__all__ = ["LatentSpace", "Latents", "Layout", "Site", "inner_support"]


@dataclass(eq=False)
class Latents:
    """K draws of every latent of N data.

    Attributes:
        values: By site, each of shape ``(K, N, *plates, *event)``.
        num_samples: ``K``.
        densities: log p(z) and log p(x|z) at them, each ``(K, N)``, once they are known.
    """

    values: dict[str, Tensor]
    num_samples: int
    densities: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """Where particles and data stand in the tensors of a program.

    Attributes:
        data_dim: Dimension of the data plate in a site's batch shape, negative; none where all data are one datum.
        particle_dim: Dimension of the particle plate, left of all others, negative.
        folded: Whether there is no such plate, and particles are copies of the data: row ``k N + n`` is particle k of
            datum n. Where all data are one datum, particles are then run one by one.
    """

    data_dim: int | None
    particle_dim: int
    folded: bool = False

    @property
    def is_joint(self) -> bool:
        """Whether all data are one datum."""
        return self.data_dim is None

    @property
    def one_by_one(self) -> bool:
        """Whether a program takes one particle at a time."""
        return self.is_joint and self.folded

    def gather(self, value: Tensor, event_dim: int, num_samples: int) -> Tensor:
        """A site's value as ``(K, N, *plates, *event)``, with a plate of size 1 where the site has none."""
        if self.folded:
            value = value.reshape((1,) * (self._nesting + event_dim - value.dim()) + value.shape)
        if self.data_dim is None:
            return value[None, None] if self.folded else value.unsqueeze(1)
        axis = self.data_dim - event_dim
        return value.movedim(axis, 0).unflatten(0, (num_samples, -1)) if self.folded else value.movedim(axis, 1)

    def lay_out(self, value: Tensor, event_dim: int, depth: int) -> Tensor:
        """The inverse of `gather`, for a site whose plates reach ``depth`` dimensions to the left."""
        if self.data_dim is None:
            value = value[0, 0] if self.folded else value.squeeze(1)
        else:
            axis = self.data_dim - event_dim
            value = value.flatten(0, 1).movedim(0, axis) if self.folded else value.movedim(1, axis)
        return value.reshape(value.shape[self._nesting - depth :]) if self.folded else value

    def arguments(self, batch: tuple[Tensor, ...], num_samples: int) -> tuple[Tensor, ...]:
        """What programs take for K particles: the data, K times where they are folded."""
        if self.is_joint:
            return tuple(t[0] for t in batch)
        return tuple(t.expand(num_samples, *t.shape).flatten(0, 1) for t in batch) if self.folded else batch

    def sum_out(self, log_prob: Tensor, num_samples: int) -> Tensor:
        """Sums a site's log-densities over all but particles and data, in float64; broadcasts with ``(K, N)``."""
        dims = self._nesting + (not self.folded)
        log_prob = log_prob.reshape((1,) * (dims - log_prob.dim()) + log_prob.shape)
        inner = [d for d in range(-dims + (not self.folded), 0) if d != self.data_dim]
        summed = (log_prob.sum(inner) if inner else log_prob).double()
        if self.is_joint:
            return summed.reshape(-1, 1)
        return summed.unflatten(0, (num_samples, -1)) if self.folded else summed

    @property
    def _nesting(self) -> int:
        return -self.particle_dim - 1


@dataclass(frozen=True)
class Site:
    """How one latent becomes a part of the vector.

    Attributes:
        shape: ``(*plates, *event)``.
        unconstrained: The same for the real numbers in its place.
        transform: From real numbers to the support; none where the support is all real numbers.
        refusal: Why there is no such transform; empty if there is.
        half: The dtype of 16 bits that programs see this latent in, if they do. The vector has 32: there is no linear
            algebra for less, and a draw's density is that of the draw before it was rounded.
    """

    shape: torch.Size
    unconstrained: torch.Size
    transform: Transform | None
    refusal: str = ""
    half: torch.dtype | None = None


@dataclass(frozen=True)
class LatentSpace:
    """The latents of one datum as a vector u of D real numbers, by a bijection for each site.

    Densities of u and of the latents differ by the bijections' Jacobian; none is needed where a site is real.
    """

    sites: dict[str, Site]
    takes_any: tuple[str, ...] = ("guide", "prior", "defensive")
    """Proposals that take latents as they are, for where one has no vector."""

    @classmethod
    def of(cls, sites: Mapping[str, tuple[Any, Tensor]], refusals: Mapping[str, str] | None = None) -> LatentSpace:
        """From each site's support and its values ``(K, N, *plates, *event)``, and why some have no vector."""
        refusals = refusals or {}
        return cls({name: _site(name, *site, refusals.get(name, "")) for name, site in sites.items()})

    @property
    def refusal(self) -> str:
        """Why a latent has no vector; empty if all have one."""
        return next((site.refusal for site in self.sites.values() if site.refusal), "")

    @property
    def dim(self) -> int:
        """``D``, how many real numbers."""
        return sum(site.unconstrained.numel() for site in self._movable_sites().values())

    def flatten(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Returns u, shape ``(K, N, D)``, and ``log |dz/du|``, shape ``(K, N)`` or broadcasting with it."""
        parts: list[Tensor] = []
        log_det = torch.zeros((), dtype=torch.float64)
        for name, site in self._movable_sites().items():
            z = u = latents.values[name] if site.half is None else latents.values[name].float()
            if site.transform is not None:
                u = torch.as_tensor(site.transform.inv(z))
                log_det = log_det.to(z.device) + _sum_over_event(site.transform.log_abs_det_jacobian(u, z))
            parts.append(u.flatten(2) if u.dim() > 2 else u[..., None])
        return torch.cat(parts, -1), log_det

    def unflatten(self, u: Tensor) -> tuple[Latents, Tensor]:
        """Returns the latents at u, shape ``(K, N, D)``, and ``log |dz/du|``, shape ``(K, N)`` or broadcasting."""
        values, log_det = {}, torch.zeros((), dtype=torch.float64)
        sites = self._movable_sites()
        parts = u.split([site.unconstrained.numel() for site in sites.values()], -1)
        for part, (name, site) in zip(parts, sites.items(), strict=True):
            one = part.reshape(*u.shape[:2], *site.unconstrained)
            values[name] = one if site.transform is None else site.transform(one)
            if site.transform is not None:
                log_det = log_det.to(u.device) + _sum_over_event(site.transform.log_abs_det_jacobian(one, values[name]))
            if site.half is not None:
                values[name] = values[name].to(site.half)
        return Latents(values, len(u)), log_det

    def _movable_sites(self) -> dict[str, Site]:
        """All sites, or a `ProgramError` where one of them has no vector."""
        if self.refusal:
            *others, last = map(repr, self.takes_any)
            names = f"{', '.join(others)} or {last}" if others else last
            raise ProgramError(
                f"{self.refusal}, and this proposal moves real numbers. Use proposal={names}, which "
                f"take{'' if others else 's'} any latents."
            )
        if not self.sites:
            raise ProgramError("the model has no latent sites: log p(x) is its density, and needs no proposal.")
        return self.sites


def inner_support(support: Any) -> Any:
    """What a support asks of a single entry or vector, below ``to_event`` and, where all components agree, mixtures."""
    if isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        return inner_support(support.base_constraint)
    if isinstance(support, MaskedConstraint):
        components = inner_support(support.constraint0), inner_support(support.constraint1)
        return components[0] if components[0] is components[1] else support
    return support


def _sum_over_event(log_det: Tensor) -> Tensor:
    """A Jacobian's logarithm of shape ``(K, N, ...)`` as ``(K, N)``."""
    return log_det.flatten(2).sum(-1).double() if log_det.dim() > 2 else log_det.double()


def _site(name: str, support: Any, values: Tensor, refusal: str) -> Site:
    shape, half = values.shape[2:], values.dtype if values.dtype in (torch.float16, torch.bfloat16) else None
    inner = inner_support(support)
    if support is None:
        refusal = "does not say what its support is"
    elif support.is_discrete:
        refusal = "is discrete"
    if refusal:
        return Site(shape, shape, None, f"site '{name}' {refusal}")
    if inner is constraints.real:
        return Site(shape, shape, None, half=half)
    bounds = {key: getattr(inner, key) for key in ("lower_bound", "upper_bound") if hasattr(inner, key)}
    numbers = {key: torch.as_tensor(value).flatten() for key, value in bounds.items()}
    if any((value != value[0]).any() for value in numbers.values()):
        return Site(shape, shape, None, f"the support of site '{name}' is not the same for all of its entries")
    if bounds:
        inner = type(inner)(*(value[0].item() for value in numbers.values()))
    try:
        transform = biject_to(inner)
    except NotImplementedError:
        refusal = f"the support of site '{name}', {inner}, is not known to be that of some real numbers"
        return Site(shape, shape, None, refusal)
    return Site(shape, torch.Size(transform.inverse_shape(shape)), transform, half=half)
