"""The plane of the latent space that is the page's map, and what the page says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.errors import ArgumentError

__all__ = ["Plane", "choose_plane", "spread"]

_ACTIVE = 0.01  # variance of a code's entry over data, from which on Burda et al. count a unit as active
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Plane:
    """Two directions in the latent space.

    Attributes:
        origin: What is on the map's point (0, 0), shape ``(D,)``.
        basis: The directions, orthonormal, shape ``(D, 2)``; the second is 0 where there is one latent dimension.
        axes: Their names, short and long.
        words: How they were chosen.
        held: At what all other directions are held while no datum is chosen.
    """

    origin: Tensor
    basis: Tensor
    axes: list[dict[str, str]]
    words: str
    held: str

    def project(self, z: Tensor) -> Tensor:
        """Coordinates ``(..., 2)`` of latents ``(..., D)``."""
        return (z - self.origin) @ self.basis

    @property
    def has_heights(self) -> bool:
        """Whether the second coordinate means nothing, and is left to spread points."""
        return len(self.origin) == 1


def spread(count: int) -> Tensor:
    """Heights in (-1, 1) that spread points of one dimension evenly, each unlike those before."""
    return torch.arange(1, count + 1, dtype=torch.float64) * _GOLDEN % 1 * 2 - 1


def choose_plane(codes: Tensor, plane: str | Sequence[int]) -> Plane:
    """The plane that an argument asks for.

    Args:
        codes: Of the data, float64, shape ``(N, D)``.
        plane: ``"active"``, ``"principal"``, or two dimensions.
    """
    latent_dim = codes.shape[1]
    if not isinstance(plane, str):
        return _along(latent_dim, *_check_dimensions(plane, latent_dim), "The map shows {}, as was asked.")
    if plane not in ("active", "principal"):
        raise ArgumentError(f"plane must be 'active', 'principal' or two latent dimensions, got {plane!r}.")
    if latent_dim == 1:
        basis = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        axes = [{"short": "z", "long": "z"}, {"short": "height", "long": ""}]
        words = "The latent space has one dimension, from left to right; heights mean nothing, and keep points apart."
        return Plane(torch.zeros(1, dtype=torch.float64), basis, axes, words, "0")
    if latent_dim == 2:
        return _along(2, 0, 1, "The latent space has two dimensions, and the map shows both.")
    if len(codes) < 3:
        words = (
            f"Of {latent_dim} latent dimensions the map shows the first two: data are too few to tell what is active."
        )
        return _along(latent_dim, 0, 1, words)
    variances = codes.var(0)
    active = int((variances > _ACTIVE).sum())
    much = f"Of {latent_dim} latent dimensions {active} are active: codes vary in them by a variance above {_ACTIVE}."
    if plane == "principal":
        return _principal(codes, much)
    first, second = variances.topk(2).indices.tolist()
    share = _share(variances[[first, second]], variances)
    words = f"{much} The map shows the two in which they vary most, {{}}, with {share} of the variance of the codes."
    return _along(latent_dim, first, second, words)


def _principal(codes: Tensor, much: str) -> Plane:
    origin = codes.mean(0)
    values, vectors = torch.linalg.eigh((codes - origin).T.cov())
    basis = vectors[:, -2:].flip(1)
    # A sign for each that does not depend on the machine.
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    names = {1: "first principal direction", 2: "second principal direction"}
    axes = [{"short": f"u{_sub(n)}", "long": name} for n, name in names.items()]
    share = _share(values[-2:], values)
    words = f"{much} The map shows the principal plane of the codes, with {share} of their variance, around their mean."
    return Plane(origin, basis, axes, words, "the mean of all codes")


def _share(some: Tensor, every: Tensor) -> str:
    total = every.sum()
    return f"{some.sum() / total:.0%}" if total > 0 else "none"


def _along(latent_dim: int, first: int, second: int, words: str) -> Plane:
    """A plane of two of the dimensions, whose names take the place of ``{}`` in its words."""
    origin, basis = torch.zeros(latent_dim, dtype=torch.float64), torch.zeros(latent_dim, 2, dtype=torch.float64)
    basis[first, 0] = basis[second, 1] = 1.0
    names = [f"z{_sub(first + 1)}", f"z{_sub(second + 1)}"]
    axes = [{"short": name, "long": name} for name in names]
    return Plane(origin, basis, axes, words.replace("{}", " and ".join(names)), "0")


def _sub(number: int) -> str:
    """A number as subscript."""
    return str(number).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def _check_dimensions(plane: Sequence[int], latent_dim: int) -> tuple[int, int]:
    found = [d for d in plane if hasattr(d, "__index__") and not isinstance(d, bool) and 0 <= d < latent_dim]
    if len(plane) != 2 or len(set(found)) != 2:
        raise ArgumentError(
            f"plane must be 'active', 'principal' or two of the dimensions 0 to {latent_dim - 1}; got {plane!r}."
        )
    return int(found[0]), int(found[1])
