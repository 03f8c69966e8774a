"""Arrays and text inside of a page: numbers in base64, and JSON that no label can break out of."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack", "pack_coarsely", "pack_depths", "to_json"]

_TYPES = {"f32": "<f4", "u8": "u1", "u16": "<u2"}


def pack(values: Tensor | np.ndarray, kind: str = "f32") -> dict[str, Any]:
    """Numbers as the page reads them: ``"f32"``, ``"u8"`` or ``"u16"``, little-endian, in base64."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    encoded = base64.b64encode(np.ascontiguousarray(array, _TYPES[kind]).tobytes()).decode("ascii")
    return {"type": kind, "shape": list(array.shape), "base64": encoded}


def pack_coarsely(values: Tensor, low: Tensor, high: Tensor, kind: str) -> dict[str, Any]:
    """Numbers between ``low`` and ``high``, which are broadcast with them, in even steps: 255 or 65,535 of them."""
    steps = 2 ** (8 if kind == "u8" else 16) - 1
    width = torch.where(high > low, high - low, torch.ones_like(high))
    return pack(((values - low) / width * steps).round().clamp(0, steps), kind)


def pack_depths(log_weights: Tensor, top: Tensor, deepest: float) -> dict[str, Any]:
    """How far log-weights lie below ``top``, on a scale that is finest near it: ``log(1 + depth)`` in 65,534 steps.

    A depth d is off by at most ``(1 + d) log(1 + deepest) / 131068`` nats: 0.00006 at the top where the deepest is
    1,000 nats. The last code stands for weights of zero.
    """
    depth = (top - log_weights).clamp(min=0)
    codes = (depth.log1p() / math.log1p(deepest) * 65534).round().clamp(max=65534)
    return pack(torch.where(log_weights.isneginf(), 65535.0, codes), "u16")


def to_json(value: Any) -> str:
    """JSON for a ``<script>`` element: characters that could end it, or open a comment, are written as escapes."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
