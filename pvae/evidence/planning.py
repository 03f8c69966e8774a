"""How much to evaluate at once."""

from __future__ import annotations

import math

from pvae.evidence.proposals.base import Proposal
from pvae.evidence.session import Session

__all__ = ["chunk_shape", "default_chunk_size"]


def default_chunk_size(session: Session, proposal: Proposal) -> int:
    """How many pairs of a draw and a datum to evaluate at once."""
    if not proposal.shares_draws(session.pair):
        return session.pairs
    return 2**24 if session.device.type == "cuda" else 2**21


def chunk_shape(num_data: int, num_samples: int, session: Session, proposal: Proposal, pairs: int) -> tuple[int, int]:
    """How many data and how many draws to evaluate at once, for so many pairs of them.

    Where draws are shared there are no activations for each pair, and a draw's decoding is spread over many data. Where
    a proposal is fitted to each datum first, many data are taken at once and few draws.
    """
    if proposal.shares_draws(session.pair):
        draws = min(num_samples, max(1, math.isqrt(pairs // 8)))
        return min(num_data, max(1, pairs // draws)), draws
    draws = num_samples
    if proposal.prepares:
        draws = min(num_samples, 8)
        pairs = max(1, min(pairs, 2**25 // session.pair.space.dim**2))  # matrices of D x D for each datum
    rows = min(num_data, max(1, pairs // draws))
    return rows, max(1, pairs // rows)
