"""What a decoder makes of places in the latent space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pvae.errors import ArgumentError, DataError, first_line, positive_int
from pvae.plots.canvas import WIDTH, as_tensor, new_axes, show_number
from pvae.plots.pictures import images, name_columns, name_rows
from pvae.runtime import isolate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["interpolation", "manifold", "traversals"]


def manifold(decode: Callable[[Tensor], Any], ax: Axes | None = None, *, size: int = 12) -> Axes:
    r"""Draws what the decoder makes of a grid over two latents: ``E[x|z]``, for z at equal shares of the prior.

    Coordinates are :math:`z = \Phi^{-1}(u)` for u at the middles of ``size`` equal parts of (0, 1), where
    :math:`\Phi` is the standard normal distribution's function: so each image stands for as much of the prior.

    Args:
        decode: Codes ``(N, 2)`` to images, as `images` takes them, or to a distribution with such a mean: of a VAE
            with two latents ``vae.decode``.
        ax: Where to draw; a new figure if left out.
        size: Images along each side.

    Raises:
        ArgumentError: ``decode`` does not take codes of two latents.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes, figure 4.
    """
    size = positive_int("size", size)
    steps = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size).float()
    # Row by row from above, where the second latent is largest.
    codes = torch.stack(torch.meshgrid(steps, steps.flip(0), indexing="xy"), -1).flatten(0, 1)
    try:
        decoded = _decode(decode, codes)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ArgumentError(
            f"a manifold is of two latents, and decode fails for codes of shape {tuple(codes.shape)}: "
            f"{first_line(error)} Of a model with more latents draw traversals."
        ) from error
    ax = images(decoded, new_axes(ax, figsize=(WIDTH, WIDTH)) if ax is None else ax, columns=size)
    height, width = decoded.shape[-2:]
    shown = sorted({0, size // 4, (size - 1) // 2, size - 1 - size // 4, size - 1})
    name_rows(ax, [show_number(steps[size - 1 - i].item(), ".1f") if i in shown else "" for i in range(size)], height)
    places = [i * (width + 1) + (width - 1) / 2 for i in shown]
    name_columns(ax, places, [show_number(steps[i].item(), ".1f") for i in shown], below=True)
    ax.set(xlabel="$z_0$", ylabel="$z_1$", title="E[x | z] at equal shares of the prior")
    return ax


def interpolation(
    decode: Callable[[Tensor], Any], start: Tensor, end: Tensor, ax: Axes | None = None, *, num_steps: int = 8
) -> Axes:
    """Draws ``E[x|z]`` for z on the straight lines between codes, a line in each row.

    Args:
        decode: Codes ``(N, D)`` to images, as `images` takes them, or to a distribution with such a mean, as
            ``vae.decode``.
        start: Codes, shape ``(N, D)``, or ``(D,)`` for one line.
        end: As many.
        ax: Where to draw; a new figure if left out.
        num_steps: Images in a row, both ends among them, at least 2.
    """
    start, end = as_tensor(start), as_tensor(end)
    if start.shape != end.shape or start.dim() not in (1, 2) or not start.numel():
        raise DataError(
            f"start and end must both have shape (N, D) or (D,), got {tuple(start.shape)} and {tuple(end.shape)}."
        )
    if positive_int("num_steps", num_steps) < 2:
        raise ArgumentError("num_steps must be at least 2, for both ends are drawn; got 1.")
    start, end = start.reshape(-1, start.shape[-1]), end.reshape(-1, end.shape[-1])
    shares = torch.linspace(0, 1, num_steps).to(start)
    decoded = _decode(decode, torch.lerp(start[:, None], end[:, None], shares[:, None]).flatten(0, 1))
    ax = images(decoded, ax, columns=num_steps)
    width = decoded.shape[-1]
    name_columns(ax, _middles([0, num_steps - 1], width), ["start", "end"])
    ax.set_xlabel("E[x | z], z on the line between two codes")
    return ax


def traversals(
    decode: Callable[[Tensor], Any],
    code: Tensor,
    ax: Axes | None = None,
    *,
    dims: Sequence[int] | None = None,
    values: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
) -> Axes:
    """Draws ``E[x|z]`` for one code of which one entry is changed, a dimension in each row, a value in each column.

    Args:
        decode: Codes ``(N, D)`` to images, as `images` takes them, or to a distribution with such a mean, as
            ``vae.decode``.
        code: Where to start, shape ``(D,)``.
        ax: Where to draw; a new figure if left out.
        dims: Which dimensions, counted from 0; the first eight if left out. Those of the largest KL change most.
        values: What they are set to; a standard normal prior has 99.7% within -3 and 3.
    """
    code = as_tensor(code)
    if code.dim() != 1 or not len(code):
        raise DataError(f"code must have shape (D,), got {tuple(code.shape)}. Of several take one, as codes[0].")
    dims = list(range(min(len(code), 8)) if dims is None else dims)
    if not dims or any(not 0 <= dim < len(code) for dim in dims) or not len(values):
        raise ArgumentError(f"dims must be from 0 to {len(code) - 1}, and values some; got {dims} and {list(values)}.")
    codes = code.expand(len(dims), len(values), -1).clone()
    for row, dim in enumerate(dims):
        codes[row, :, dim] = torch.tensor(values).to(codes)
    decoded = _decode(decode, codes.flatten(0, 1))
    ax = images(decoded, ax, columns=len(values))
    height, width = decoded.shape[-2:]
    name_rows(ax, [f"$z_{{{dim}}}$" for dim in dims], height)
    name_columns(ax, _middles(range(len(values)), width), [show_number(value) for value in values])
    ax.set_xlabel("E[x | z], one entry of z set to the value above")
    return ax


def _middles(columns: Sequence[int] | range, width: int) -> list[float]:
    return [column * (width + 1) + (width - 1) / 2 for column in columns]


def _decode(decode: Callable[[Tensor], Any], codes: Tensor) -> Tensor:
    """Images, by a decoder in eval mode, whatever it returns; nothing of the caller's is moved."""
    with isolate(seed=0, params=pyro.get_param_store().get_state()):
        made = decode(codes)
        return as_tensor(made if isinstance(made, Tensor | np.ndarray) else made.mean)
