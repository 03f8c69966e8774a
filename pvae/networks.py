"""Tensors to features: the trunks under the distributions. Nothing here knows a distribution.

Every network takes any leading dimensions, ``(..., *in_shape) -> (..., *out_shape)``, so that the same
module serves a batch ``(N, ...)`` and a set of particles for each datum ``(K, N, ...)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pvae.errors import ArgumentError, positive_int, positive_ints, real_number

__all__ = [
    "Batched",
    "GaussianNoise",
    "Log1p",
    "OneHot",
    "Residual",
    "Units",
    "conv_decoder",
    "conv_encoder",
    "mlp",
    "residual_decoder",
    "residual_encoder",
    "soft_clip",
]

Shape = int | Sequence[int]


def soft_clip(x: Tensor, bound: float) -> Tensor:
    """``bound * tanh(x / bound)``: the identity near zero, smoothly held inside ``(-bound, bound)``.

    Keeps a log-scale away from values whose exponential under- or overflows, without the dead gradient
    of a hard clamp.
    """
    return bound * torch.tanh(x / bound)


class Units(nn.Module):
    """The units that networks see data in, ``y = (x - mean) / scale``: one mean and one scale for all entries.

    Weights begin at the size that suits data of mean 0 and standard deviation 1, and Adam moves each by about its
    learning rate in a step, whatever the data's size. In these units data have that size.

    Args:
        given: ``(mean, scale)``. Left out, data are seen as they are until `find` is called.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, given: Sequence[float] | None = None) -> None:
        super().__init__()
        pair = (0.0, 1.0) if given is None else tuple(map(float, given))
        if len(pair) != 2 or not (math.isfinite(pair[0]) and 0 < pair[1] < math.inf):
            raise ArgumentError(f"units must be (mean, scale), a number and a positive number; got {given!r}.")
        self.given = None if given is None else pair
        self.register_buffer("mean", torch.tensor(pair[0]))
        self.register_buffer("scale", torch.tensor(pair[1]))

    @property
    def found(self) -> bool:
        """Whether they were given, or found in data."""
        return self.given is not None or (self.mean.item(), self.scale.item()) != (0.0, 1.0)

    def find(self, x: Tensor) -> None:
        """Takes the mean and the standard deviation of all entries of ``x``.

        Nothing is taken where all are alike, or where one, as a slip of the pen, makes up most of their variance.
        """
        x = x.detach().to(torch.float64)
        mean = x.mean()
        squares = (x - mean).square()
        scale = squares.mean().sqrt().to(self.scale)
        if scale > 0 and scale.isfinite() and 2 * squares.max() <= squares.sum():
            self.mean.copy_(mean)
            self.scale.copy_(scale)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, neutral in (("mean", 0.0), ("scale", 1.0)):  # weights without units are in those of x
            state_dict.setdefault(prefix + name, torch.tensor(neutral))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps data, of any shape, to what networks see."""
        return (x - self.mean) / self.scale

    def back(self, y: Tensor) -> Tensor:
        """The inverse of `forward`."""
        return self.mean + self.scale * y


class GaussianNoise(nn.Module):
    """Adds independent normal noise in train mode, and nothing in eval mode, as ``nn.Dropout`` drops entries.

    Args:
        scale: Its standard deviation.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        real_number("scale", scale, above=0)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Maps data of any shape."""
        return x + self.scale * torch.randn_like(x) if self.training else x


class Log1p(nn.Module):
    """``log(1 + x)``: how an encoder is best shown counts, of which some are far larger than others."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps counts of any shape."""
        return x.log1p()


class OneHot(nn.Module):
    """Classes 0 ... C - 1 as vectors with a 1 at the class: how an encoder is best shown what has no order.

    Args:
        num_classes: ``C``.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = positive_int("num_classes", num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps classes, ``(..., *event)``, to ``(..., *event, C)`` in their own dtype."""
        # torch's one_hot looks at the values, which a captured program cannot.
        return (x[..., None] == torch.arange(self.num_classes, device=x.device)).to(x.dtype)


class Batched(nn.Module):
    """Runs a network that wants exactly one batch dimension over any number of them.

    Args:
        network: Maps ``(B, *in_shape)`` to ``(B, *out_shape)``.
        in_shape: The shape of one input; all dimensions left of it are folded into ``B``.
    """

    def __init__(self, network: nn.Module, in_shape: Shape) -> None:
        super().__init__()
        self.network = network
        self.in_shape = _shape("in_shape", in_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., *in_shape)`` to ``(..., *out_shape)``."""
        leading = x.shape[: x.dim() - len(self.in_shape)]
        y = self.network(x.reshape(-1, *self.in_shape))
        return y.reshape(*leading, *y.shape[1:])


def mlp(
    in_shape: Shape,
    hidden: Sequence[int],
    out_shape: Shape,
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """A multilayer perceptron ``(..., *in_shape) -> (..., *out_shape)``.

    Args:
        in_shape: Shape of one input; an int for a vector. More than one dimension is flattened first.
        hidden: Widths of the hidden layers; empty for a linear map.
        out_shape: Shape of one output; an int for a vector.
        activation: Makes the module put after each hidden layer.
    """
    in_shape, out_shape = _shape("in_shape", in_shape), _shape("out_shape", out_shape)
    widths = [math.prod(in_shape), *positive_ints("hidden", hidden)]
    layers: list[nn.Module] = [nn.Flatten(-len(in_shape))] if len(in_shape) > 1 else []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), activation()]
    layers.append(nn.Linear(widths[-1], math.prod(out_shape)))
    if len(out_shape) > 1:
        layers.append(nn.Unflatten(-1, out_shape))
    return nn.Sequential(*layers)


def conv_encoder(
    in_shape: Sequence[int],
    out_features: int,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 256,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Batched:
    """A convolutional trunk ``(..., C, H, W) -> (..., out_features)``.

    Each stage halves the height and the width while they are even: 28 -> 14 -> 7, 8 -> 4 -> 2, 10 -> 5 -> 5.

    Args:
        in_shape: ``(C, H, W)`` of one image.
        out_features: Width of the output.
        channels: Channels after each stage.
        hidden: Width of the dense layer between the last stage and the output.
        activation: Makes the module put after each stage and after the dense layer.
    """
    return _encoder(in_shape, out_features, channels, hidden, activation, lambda _: [])


def _encoder(
    in_shape: Sequence[int],
    out_features: int,
    channels: Sequence[int],
    hidden: int,
    activation: Callable[[], nn.Module],
    blocks: Callable[[int], list[nn.Module]],
) -> Batched:
    """The trunk of `conv_encoder`, with more layers for so many channels after each stage's convolution."""
    in_channels, height, width = _image_shape("in_shape", in_shape)
    channels, hidden = positive_ints("channels", channels), positive_int("hidden", hidden)
    sizes = _stages(height, width, len(channels))
    layers: list[nn.Module] = []
    for (h, w), (h_next, w_next), c_in, c_out in _pairs(sizes, [in_channels, *channels]):
        kernel, stride = _kernel_and_stride(h, h_next), _kernel_and_stride(w, w_next)
        layers += [nn.Conv2d(c_in, c_out, *zip(kernel, stride, strict=True), padding=1), *blocks(c_out), activation()]
    features = math.prod(sizes[-1]) * [in_channels, *channels][-1]
    layers += [nn.Flatten(), nn.Linear(features, hidden), activation(), nn.Linear(hidden, out_features)]
    return Batched(nn.Sequential(*layers), in_shape)


def conv_decoder(
    in_features: int,
    out_shape: Sequence[int],
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 256,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Batched:
    """The mirror image of `conv_encoder`: ``(..., in_features) -> (..., C, H, W)``.

    Args:
        in_features: Width of the input.
        out_shape: ``(C, H, W)`` of one output.
        channels: Channels after each stage of the encoder that this mirrors, so they are run through backwards.
        hidden: Width of the dense layer between the input and the first stage.
        activation: Makes the module put after the dense layers and between stages.
    """
    return _decoder(in_features, out_shape, channels, hidden, activation, lambda _: [])


def _decoder(
    in_features: int,
    out_shape: Sequence[int],
    channels: Sequence[int],
    hidden: int,
    activation: Callable[[], nn.Module],
    blocks: Callable[[int], list[nn.Module]],
) -> Batched:
    """The network of `conv_decoder`, with more layers for so many channels before each stage's convolution."""
    out_channels, height, width = _image_shape("out_shape", out_shape)
    channels, hidden = positive_ints("channels", channels), positive_int("hidden", hidden)
    sizes = _stages(height, width, len(channels))
    widths = [out_channels, *channels]
    smallest = (widths[-1], *sizes[-1])
    layers: list[nn.Module] = [nn.Linear(in_features, hidden), activation()]
    layers += [nn.Linear(hidden, math.prod(smallest)), activation(), nn.Unflatten(-1, smallest)]
    for (h, w), (h_next, w_next), c_in, c_out in _pairs(sizes[::-1], widths[::-1]):
        kernel, stride = _kernel_and_stride(h_next, h), _kernel_and_stride(w_next, w)
        convolution = nn.ConvTranspose2d(c_in, c_out, *zip(kernel, stride, strict=True), padding=1)
        layers += [*blocks(c_in), convolution, activation()]
    # The last stage gives the output itself, so nothing is put after it.
    return Batched(nn.Sequential(*layers[:-1] if channels else layers), in_features)


class Residual(nn.Sequential):
    """Layers whose result is added to what they are given, ``x + layers(x)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``(...)`` to the same shape."""
        return input + super().forward(input)


def residual_encoder(
    in_shape: Sequence[int],
    out_features: int,
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 256,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Batched:
    """`conv_encoder` with a residual block after each stage's convolution; the arguments are the same.

    A block is ``x + conv(act(conv(act(x))))``, of two 3 x 3 convolutions. It has no normalization, so that a datum does
    not depend on the others of its batch.

    Source: He, Zhang, Ren and Sun, 2016, Identity Mappings in Deep Residual Networks.
    """
    return _encoder(in_shape, out_features, channels, hidden, activation, partial(_residual, activation=activation))


def residual_decoder(
    in_features: int,
    out_shape: Sequence[int],
    *,
    channels: Sequence[int] = (32, 64),
    hidden: int = 256,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> Batched:
    """The mirror image of `residual_encoder`: `conv_decoder` with a block before each stage's convolution."""
    return _decoder(in_features, out_shape, channels, hidden, activation, partial(_residual, activation=activation))


def _residual(channels: int, activation: Callable[[], nn.Module]) -> list[nn.Module]:
    convolutions = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return [Residual(*(layer for convolution in convolutions for layer in (activation(), convolution)))]


def _stages(height: int, width: int, count: int) -> list[tuple[int, int]]:
    """Heights and widths before the first and after each of ``count`` stages."""
    sizes = [(height, width)]
    for _ in range(count):
        h, w = sizes[-1]
        sizes.append((h // 2 if h % 2 == 0 else h, w // 2 if w % 2 == 0 else w))
    return sizes


def _kernel_and_stride(larger: int, smaller: int) -> tuple[int, int]:
    """With padding 1, kernel 4 and stride 2 halve an even size exactly; kernel 3 and stride 1 keep any size."""
    return (4, 2) if smaller < larger else (3, 1)


def _pairs(sizes: list[tuple[int, int]], channels: list[int]):
    return zip(sizes, sizes[1:], channels, channels[1:], strict=False)


def _shape(name: str, shape: Shape) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes:
        raise ArgumentError(f"{name} must have at least one dimension, got ().")
    return tuple(positive_int(name, size) for size in sizes)


def _image_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int]:
    sizes = _shape(name, shape)
    if len(sizes) != 3:
        raise ArgumentError(
            f"{name} must be (channels, height, width), got {sizes}. "
            "Give images without a channel one: x[:, None] has shape (N, 1, height, width)."
        )
    return sizes[0], sizes[1], sizes[2]
