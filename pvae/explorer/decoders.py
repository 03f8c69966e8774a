"""A decoder as data: what `network.js` runs, layer by layer, and what is refused because it cannot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pvae import likelihoods, networks
from pvae.errors import ProgramError
from pvae.explorer.packing import pack

__all__ = ["describe_decoder"]

Layer = dict[str, Any]


def describe_decoder(decoder: Any, z: Tensor) -> dict[str, Any]:
    """The network under p(x|z) and the mean of p(x|z), for `network.js`.

    Args:
        decoder: One of `pvae.likelihoods`, over a network of layers that are known here.
        z: Latents ``(1, D)``, on which the layers are run once, to see shapes.

    Raises:
        ProgramError: It is something else; what, and what to do.
    """
    if type(decoder) not in _MEANS:
        raise ProgramError(
            f"the explorer cannot run the decoder, a {_name(decoder)}: it knows the means of pvae.likelihoods "
            f"({', '.join(sorted(kind.__name__ for kind in _MEANS))}) alone. Build the decoder as one of these."
        )
    layers: list[Layer] = []
    out = _walk(decoder.network, z, layers, "decoder.network")
    if not torch.allclose(out, decoder.network(z), rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ProgramError(
            "the explorer cannot run the decoder's network: layer by layer it gives something else than as a whole. "
            "Does it have hooks? Remove them first."
        )
    event = decoder(z).event_shape
    return {"layers": layers, "mean": {**_MEANS[type(decoder)](decoder), "entries": math.prod(event)}}


def _walk(module: Any, value: Tensor, layers: list[Layer], place: str) -> Tensor:
    """Runs a network layer by layer; adds each layer's description, and returns what comes out."""
    kind = type(module)
    if kind is nn.Sequential:
        for name, child in module.named_children():
            value = _walk(child, value, layers, f"{place}.{name}")
        return value
    if kind is networks.Residual:
        inner: list[Layer] = []
        out = value
        for name, child in module.named_children():
            out = _walk(child, out, inner, f"{place}.{name}")
        layers.append({"op": "residual", "layers": inner})
        return value + out
    if kind is networks.Batched:
        value = value.reshape(-1, *module.in_shape)
        layers.append(_reshape(value))
        return _walk(module.network, value, layers, f"{place}.network")
    if kind not in _LAYERS:
        raise ProgramError(
            f"the explorer cannot run {place} of the decoder, a {_name(module)}, in a web page. It runs Sequential, "
            f"Batched and Residual of these: {', '.join(sorted(k.__name__ for k in _LAYERS))}. Build the decoder's "
            "network from them, or write out what it does as layers."
        )
    out = module(value)
    try:
        described = _LAYERS[kind](module, out)
    except ValueError as error:
        raise ProgramError(f"the explorer cannot run {place} of the decoder, {module}: {error}") from None
    layers.extend([described] if described else [])
    return out


def _name(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _reshape(out: Tensor) -> Layer:
    return {"op": "reshape", "shape": list(out.shape[1:])}


def _linear(module: Any, _: Tensor) -> Layer:
    return {"op": "linear", "weight": pack(module.weight), "bias": _packed(module.bias)}


def _packed(tensor: Tensor | None) -> dict[str, Any] | None:
    return None if tensor is None else pack(tensor)


def _convolution(op: str) -> Callable[[Any, Tensor], Layer]:
    def describe(module: Any, _: Tensor) -> Layer:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise ValueError("padding must be a number, and with zeros.")
        sizes = {name: list(getattr(module, name)) for name in ("stride", "padding", "dilation")}
        layer = {"op": op, "weight": pack(module.weight), "bias": _packed(module.bias), "groups": module.groups}
        return {**layer, **sizes, "outputPadding": list(module.output_padding)}

    return describe


def _upsample(module: Any, out: Tensor) -> Layer:
    if module.mode != "nearest" or out.dim() != 4:
        raise ValueError("of images, by mode='nearest', and no other.")
    factor = None if module.recompute_scale_factor else module.scale_factor
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    return {"op": "upsample", "shape": list(out.shape[1:]), "factors": factors}


def _normalization(module: Any, _: Tensor) -> Layer:
    if module.running_mean is None:
        raise ValueError("without running statistics it makes a datum depend on the others of its batch.")
    factor = (module.running_var + module.eps).rsqrt()
    factor = factor if module.weight is None else factor * module.weight
    shift = -module.running_mean * factor + (0 if module.bias is None else module.bias)
    return {"op": "per_channel", "factor": pack(factor), "shift": pack(shift)}


def _layer_norm(module: Any, _: Tensor) -> Layer:
    parameters = {"weight": _packed(module.weight), "bias": _packed(module.bias)}
    return {"op": "layer_norm", "shape": list(module.normalized_shape), "eps": module.eps, **parameters}


def _units(module: Any, _: Tensor) -> Layer:
    scale = module.scale.item()
    return {"op": "affine", "factor": 1 / scale, "shift": -module.mean.item() / scale}


def _entrywise(op: str, **names: str) -> Callable[[Any, Tensor], Layer]:
    """An activation with its numbers: by their names in the page, those in the module."""

    def describe(module: Any, _: Tensor) -> Layer:
        return {"op": op, **{name: float(getattr(module, theirs)) for name, theirs in names.items()}}

    return describe


def _nothing(module: Any, _: Tensor) -> None:
    """A layer that does nothing in eval mode."""


_LAYERS: dict[type[nn.Module], Callable[[Any, Tensor], Layer | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution("conv2d"),
    nn.ConvTranspose2d: _convolution("conv_transpose2d"),
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.BatchNorm1d: _normalization,
    nn.BatchNorm2d: _normalization,
    nn.LayerNorm: _layer_norm,
    nn.Flatten: lambda _, out: _reshape(out),
    nn.Unflatten: lambda _, out: _reshape(out),
    nn.Identity: _nothing,
    nn.Dropout: _nothing,
    nn.Dropout2d: _nothing,
    networks.GaussianNoise: _nothing,
    networks.Units: _units,
    nn.ReLU: _entrywise("relu"),
    nn.ReLU6: _entrywise("hardtanh", low="min_val", high="max_val"),
    nn.Hardtanh: _entrywise("hardtanh", low="min_val", high="max_val"),
    nn.LeakyReLU: _entrywise("leaky_relu", slope="negative_slope"),
    nn.PReLU: lambda module, _: {"op": "per_channel", "negative": pack(module.weight)},
    nn.ELU: _entrywise("elu", alpha="alpha"),
    nn.CELU: _entrywise("celu", alpha="alpha"),
    nn.SELU: _entrywise("selu"),
    nn.GELU: lambda module, _: {"op": "gelu" if module.approximate == "none" else "gelu_tanh"},
    nn.SiLU: _entrywise("silu"),
    nn.Mish: _entrywise("mish"),
    nn.Softplus: _entrywise("softplus", beta="beta", threshold="threshold"),
    nn.Softsign: _entrywise("softsign"),
    nn.Tanh: _entrywise("tanh"),
    nn.Sigmoid: _entrywise("sigmoid"),
    nn.LogSigmoid: _entrywise("logsigmoid"),
    nn.Hardsigmoid: _entrywise("hardsigmoid"),
    nn.Hardswish: _entrywise("hardswish"),
}


def _bounded(op: str, bound: float) -> Callable[[Any], Layer]:
    return lambda _: {"op": op, "bound": bound}


def _location(decoder: Any) -> Layer:
    return {"op": "units", **_scaling(decoder.units)}


def _scaling(units: networks.Units | None) -> dict[str, float]:
    return {"mean": 0.0, "scale": 1.0} if units is None else {"mean": units.mean.item(), "scale": units.scale.item()}


def _levels(decoder: Any) -> Layer:
    """Rounding moves the mean, so that it depends on the scale."""
    own, fixed = decoder.scale == "network", None if isinstance(decoder.scale, str) else float(decoder.scale)
    log_scale = 0.0 if decoder.log_scale is None else decoder.log_scale.item()
    numbers = {"levels": decoder.num_levels, "logScale": log_scale, "bound": likelihoods._MAX_LOG_SCALE}
    return {"op": "discretized_logistic", "own": own, "fixed": fixed, **numbers, **_scaling(decoder.units)}


_MEANS: dict[type[nn.Module], Callable[[Any], Layer]] = {
    likelihoods.Bernoulli: lambda _: {"op": "sigmoid"},
    likelihoods.ContinuousBernoulli: _bounded("continuous_bernoulli", likelihoods._MAX_LOGIT),
    likelihoods.Gaussian: _location,
    likelihoods.Laplace: _location,
    likelihoods.StudentT: _location,
    likelihoods.DiscretizedLogistic: _levels,
    likelihoods.Poisson: _bounded("exp", likelihoods._MAX_LOG_MEAN),
    likelihoods.NegativeBinomial: _bounded("exp", likelihoods._MAX_LOG_MEAN),
    likelihoods.Categorical: lambda decoder: {"op": "most_probable", "classes": decoder.num_classes},
}
