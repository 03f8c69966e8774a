"""Products in fewer digits, and what they do to log p(x): measured on the pair and the data at hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.errors import ArgumentError, warn
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.latents import Latents
from pvae.runtime import spare_noise

__all__ = ["PRECISIONS", "lower_products"]

PRECISIONS = ("float32", "bfloat16", "tf32")

_MAX_BIAS = 0.01  # nats per datum
_MAX_CHANGE = 0.1  # nats, of single log-weights

# What is compared: so many data and draws, or fewer where a datum has many entries.
_DATA = 64
_DRAWS = 32
_ENTRIES = 2**22


def lower_products(densities: Densities, data: Batch, precision: str) -> Densities:
    """The same densities by programs whose products are in some precision, with what that does to them.

    Log-weights by the two kinds of products are compared for the same draws from the guide, for up to 64 data.

    Args:
        densities: By products as they are.
        data: The data; the first ones where they are read as a stream.
        precision: One of `PRECISIONS`.

    Raises:
        ArgumentError: The device or the pair's numbers do not have it.
    """
    if precision == "float32":
        return densities
    _check(densities, precision)
    lowered = densities.with_products(precision)
    with spare_noise(densities.placed.device), torch.no_grad():  # draws are the same for all precisions
        change = _measure(densities, lowered, _some(densities, data))
    if math.isinf(change.size):
        warn(f"precision='{precision}': the guide's draws do not tell what it does. Use precision='float32'.")
    elif change.surely > _MAX_BIAS or change.size > _MAX_CHANGE:
        warn(
            f"precision='{precision}' moves log p(x) by {change.bias:+.2g} nats per datum in the mean of those that "
            f"were compared, and single log-weights by {change.size:.2g} nats. Use precision='float32'."
        )
    return densities.with_products(precision, change.size)


def _check(densities: Densities, precision: str) -> None:
    device = densities.placed.device
    if precision == "tf32" and device.type != "cuda":
        raise ArgumentError(
            f"precision='tf32' is of CUDA devices, and the pair is on {device}. Use precision='float32' or 'bfloat16', "
            "or device='cuda' where there is one."
        )
    if densities.dtype != torch.float32:
        kind = str(densities.dtype).removeprefix("torch.")
        reason = "asks for more digits, not for fewer" if kind == "float64" else "has its own products"
        raise ArgumentError(
            f"precision='{precision}' is for pairs in float32, and this one is in {kind}, which {reason}. Leave "
            "precision='float32', which changes no products, or convert modules and data with .float()."
        )


class _Change(NamedTuple):
    """What products in fewer digits do, in nats.

    Attributes:
        size: Root mean square of single log-weights' changes; inf where nothing could be compared. That of log p(x), a
            mean over draws, is smaller.
        bias: Mean change of log p(x) per datum.
        surely: What its size is above, but for two standard errors; 0 where that is not known.
    """

    size: float
    bias: float = math.nan
    surely: float = 0.0


def _some(densities: Densities, data: Batch) -> tuple[Batch, int]:
    """Data from all over the data set, and how many draws of each to compare."""
    pairs = max(1, min(_DATA * _DRAWS, _ENTRIES // densities.entries))
    draws = min(_DRAWS, pairs)
    if densities.is_joint:
        return densities.trial, draws
    rows = torch.linspace(0, len(data[0]) - 1, min(len(data[0]), pairs // draws)).long()
    return tuple(t[rows.to(t.device)].to(densities.placed.device) for t in data), draws


def _measure(densities: Densities, lowered: Densities, some: tuple[Batch, int]) -> _Change:
    batch, draws = some
    latents, log_qz = densities.draw_guide(batch, draws)
    known = (one.log_pxz(batch, Latents(latents.values, draws)) - log_qz for one in (densities, lowered))
    full, low = (log_weights.double() for log_weights in known)
    changes = _finite(low - full)
    size = changes.square().mean().sqrt().item() if len(changes) else math.inf
    each = _finite(low.logsumexp(0) - full.logsumexp(0))
    if not len(each):
        return _Change(size)
    bias = each.mean().item()
    error = each.std().item() / len(each) ** 0.5 if len(each) > 1 else math.inf
    return _Change(size, bias, max(0.0, abs(bias) - 2 * error))


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]
