"""Losses and activations of binary data by arithmetic that is cheap on the CPU, to the same results within rounding.

What they share is ``log(1 + exp(-|x|))``, for which PyTorch calls a slow function. It is an operation of its own here,
which the compiler turns into a few multiplications within its loops.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DECOMPOSITIONS", "tell_the_compiler"]

aten: Any = torch.ops.aten

_library = torch.library.Library("pvae", "FRAGMENT")


_library.define("exp_neg(Tensor x) -> Tensor")
_library.define("log1p_exp_neg(Tensor x) -> Tensor")


def _exp_neg(x: Tensor) -> Tensor:
    """``exp(-x)`` for ``x >= 0``."""
    return torch.exp(-x)


def _log1p_exp_neg(x: Tensor) -> Tensor:
    """``log(1 + exp(-x))`` for ``x >= 0``, relative error near 2e-7 in float32.

    ``log1p`` itself is a slow library call on the CPU. ``1 + u`` is rounded, and the last term puts back what was lost.
    """
    u = torch.exp(-x)
    w = 1 + u
    return torch.log(w) - ((w - 1) - u) / w


def _exp_neg_in_a_loop(x: Tensor) -> Tensor:
    """By a power of two: what the compiler takes for the exponential, it writes to memory to use it twice."""
    return torch.exp(-x) if x.dtype == torch.float64 else torch.exp2(x * -math.log2(math.e))


def _log1p_exp_neg_in_a_loop(x: Tensor) -> Tensor:
    """By a polynomial of ``exp(-x)``, which costs a quarter of a logarithm and a division."""
    if x.dtype == torch.float64:
        return _log1p_exp_neg(x)
    u, total = _exp_neg_in_a_loop(x), 0.0
    for coefficient in reversed(_log1p_coefficients()):
        total = total * u + coefficient
    return total * u


@cache
def _log1p_coefficients() -> list[float]:
    """Of a polynomial that is ``log(1 + u) / u`` to 5e-9 of itself for u between 0 and 1."""
    from numpy.polynomial import Chebyshev, Polynomial

    interpolant = Chebyshev.interpolate(lambda u: np.log1p(u) / u, 9, domain=[0, 1])
    return interpolant.convert(kind=Polynomial).coef.tolist()


for name, function in (("exp_neg", _exp_neg), ("log1p_exp_neg", _log1p_exp_neg)):
    _library.impl(name, function, "CompositeExplicitAutograd")
    _library.impl(name, torch.empty_like, "Meta")


@cache
def tell_the_compiler() -> None:
    """Has the compiler do these in its loops in ways of its own."""
    from torch._inductor.decomposition import register_decomposition

    register_decomposition(torch.ops.pvae.exp_neg.default)(_exp_neg_in_a_loop)
    register_decomposition(torch.ops.pvae.log1p_exp_neg.default)(_log1p_exp_neg_in_a_loop)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x * beta
    smooth = (scaled.clamp(min=0) + torch.ops.pvae.log1p_exp_neg(scaled.abs())) / beta
    return torch.where(scaled > threshold, x, smooth)


def _sigmoid(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return NotImplemented
    # By the exponential that the losses above take too, so that a compiler takes it once.
    u = torch.ops.pvae.exp_neg(x.abs())
    return torch.where(x >= 0, 1.0, u) / (1 + u)


def _log_sigmoid_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    # The second output is what PyTorch's kernel keeps for its backward pass.
    kept = x.new_zeros((0,)) if x.is_cuda else torch.ops.pvae.exp_neg(x.abs())
    return x.clamp(max=0) - torch.ops.pvae.log1p_exp_neg(x.abs()), kept


def _binary_cross_entropy_with_logits(
    x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None, reduction: int = 1
) -> Tensor:
    if pos_weight is None:
        loss = x.clamp(min=0) - x * target + torch.ops.pvae.log1p_exp_neg(x.abs())
    else:
        loss = (1 - target) * x + (1 + (pos_weight - 1) * target) * (
            torch.ops.pvae.log1p_exp_neg(x.abs()) + (-x).clamp(min=0)
        )
    if weight is not None:
        loss = loss * weight
    return {0: lambda: loss, 1: loss.mean, 2: loss.sum}[reduction]()


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.sigmoid.default: _sigmoid,
    aten.softplus.default: _softplus,
    aten.log_sigmoid_forward.default: _log_sigmoid_forward,
    aten.binary_cross_entropy_with_logits.default: _binary_cross_entropy_with_logits,
}
"""What `torch.fx.experimental.proxy_tensor.make_fx` puts in the place of some operations."""
