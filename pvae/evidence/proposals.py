"""Where importance samples come from: small objects that draw latents and weigh them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pvae.errors import ArgumentError, one_of
from pvae.evidence.traces import Pair

__all__ = ["Guide", "Prior", "Proposal", "resolve"]


class Proposal(Protocol):
    """Draws latents for a batch and weighs them against the model."""

    name: str

    def shares_draws(self, pair: Pair) -> bool:
        """Whether all data of a batch get the same draws, so that a large batch costs little more than a small one."""
        ...

    def log_weights(self, pair: Pair, batch: tuple[Tensor, ...], num_samples: int) -> Tensor:
        """Returns ``log p(x, z) - log q(z)`` for fresh draws of z, nats, shape ``(K, N)``."""
        ...


@dataclass(frozen=True)
class Guide:
    """Draws from the guide, ``z ~ q(z|x)``: few draws are wasted where the guide is near the posterior."""

    name: str = "guide"

    def shares_draws(self, pair: Pair) -> bool:
        """No: every datum has its own q(z|x)."""
        return False

    def log_weights(self, pair: Pair, batch: tuple[Tensor, ...], num_samples: int) -> Tensor:
        """Returns ``log p(x, z) - log q(z|x)`` for fresh draws, nats, shape ``(K, N)``."""
        latents, log_qz = pair.draw_guide(batch, num_samples)
        return pair.log_pxz(batch, num_samples, latents) - log_qz


@dataclass(frozen=True)
class Prior:
    """Draws from the prior, ``z ~ p(z)``, so that the weight is p(x|z): almost all draws explain x badly."""

    name: str = "prior"

    def shares_draws(self, pair: Pair) -> bool:
        """Yes where p(x|z) is a Bernoulli of the latents alone, so that a draw is decoded once for a batch of data."""
        return pair.shares_prior

    def log_weights(self, pair: Pair, batch: tuple[Tensor, ...], num_samples: int) -> Tensor:
        """Returns log p(x|z) for fresh draws, nats, shape ``(K, N)``."""
        if pair.shares_prior:
            return pair.draw_shared_prior(batch, num_samples)
        return pair.draw_prior(batch, num_samples)


_NAMED = {"guide": Guide, "prior": Prior}


def resolve(proposal: str | Proposal) -> Proposal:
    """The proposal itself, or the one with that name."""
    if isinstance(proposal, str):
        return _NAMED[one_of("proposal", proposal, _NAMED)]()
    if isinstance(proposal, type):
        raise ArgumentError(f"proposal must be an object, got the class {proposal.__name__}: make one of it.")
    missing = [name for name in ("name", "shares_draws", "log_weights") if not hasattr(proposal, name)]
    if missing:
        raise ArgumentError(
            f"proposal must be {' or '.join(map(repr, _NAMED))}, or an object like pvae.evidence.proposals.Proposal; "
            f"got {proposal!r}, which has no {', '.join(missing)}."
        )
    return proposal
