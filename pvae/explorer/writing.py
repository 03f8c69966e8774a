"""`write_explorer`: from a pair and data to one file."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pvae.data import Array, as_tensors, check_shape
from pvae.errors import ArgumentError, DataError, ProgramError, positive_int
from pvae.explorer.decoders import describe_decoder
from pvae.explorer.packing import pack, pack_coarsely, to_json
from pvae.explorer.planes import Plane, choose_plane, spread
from pvae.explorer.weighing import weigh
from pvae.persistence import check_writable, write_file
from pvae.runtime import in_turn, isolate, resolve_seed

__all__ = ["write_explorer"]

_EXAMPLES = 8  # latents at which the page compares its decoder with torch's
_MAX_BARS = 200


@in_turn
def write_explorer(
    vae: Any,
    x: Array,
    labels: Any = None,
    path: str | os.PathLike[str] = "explorer.html",
    *,
    num_data: int = 200,
    num_samples: int = 500,
    num_prior_samples: int = 20_000,
    plane: str | Sequence[int] = "active",
    image_shape: Sequence[int] | None = None,
    budget_seconds: float | None = None,
    title: str = "The latent space of a VAE",
    seed: int | None = 0,
    device: str | torch.device = "auto",
) -> Path:
    """Writes one web page to play with: a map of the latent space, and how log p(x) of each datum is found.

    Moving over the map shows what the decoder makes of the point below the cursor. Choosing a datum shows where draws
    of the prior and of the guide fall, how much each of them counts, and how ``log (1/K) sum_k w_k`` by each converges
    as K grows, beside log p(x) by `pvae.log_evidence` with its interval. The file holds all it needs: the decoder runs
    in the page, which loads nothing and may be opened from disk, sent by mail, or put in a frame of another page.

    The decoder's weights are written in float32, and the page compares its decoder with torch's at 8 latents as it
    opens. Pixels are rounded to 1/255 of their range, log-weights to 0.0001 nats where they count, and the places of
    draws to less than a dot.

    Args:
        vae: A `pvae.VAE`, or another module with a latent vector for each datum: ``model``, ``guide``, ``prior()``,
            ``encode(x)``, ``decode(z)`` and a ``decoder``, one of `pvae.likelihoods`. The network below it is made of
            torch's linear and convolutional layers, usual activations and normalizations, and `pvae.networks`.
        x: Data ``(N, *event)``.
        labels: One for each datum, of any kind that makes a short string; they are what marks on the map show.
        path: The file to write; one that is there is replaced. Its folder must exist.
        num_data: The most data on the map; of more, so many are chosen at random.
        num_samples: Draws of each proposal that are shown for each datum; each takes about 13 bytes a datum.
        num_prior_samples: Up to how many draws the prior's curve goes on.
        plane: What the map shows of more than two latent dimensions. ``"active"``: the two in which codes vary most.
            ``"principal"``: the plane in which they vary most. Or two dimensions, from 0. Other directions are held at
            the chosen datum's code, or at zero; the page says so.
        image_shape: To show each datum as an image of ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)``. Left out, the shape
            of a datum; vectors are shown as bars.
        budget_seconds: For log p(x), as for `pvae.log_evidence`, which takes long for data that nothing explains.
        title: Of the page.
        seed: Of the choice of data and of all draws. ``None`` for a fresh one.
        device: Where to compute, as for `pvae.log_evidence`.

    Returns:
        The file's path.

    Raises:
        ArgumentError: An argument makes no sense, or the folder does not exist.
        DataError: ``x`` does not fit the VAE, cannot be shown, or there is not one label for each datum.
        ProgramError: The page cannot run the decoder, or the pair has other latents; what, and what to do.
        CheckpointError: The file cannot be written. One that was there still is.

    Source: for what the weights show, Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.
    """
    target = _check_path(path)
    num_samples = positive_int("num_samples", num_samples)
    num_prior_samples = positive_int("num_prior_samples", num_prior_samples)
    seed = resolve_seed(seed)
    data, *others = as_tensors("x", x)
    if others:
        raise DataError(f"x must be one array, got {1 + len(others)}. Labels are an argument of their own.")
    if hasattr(vae, "event_shape"):
        check_shape("x", data, tuple(vae.event_shape))
    names = _check_labels(labels, len(data))
    rows = _choose_rows(len(data), positive_int("num_data", num_data), seed)
    chosen = data[rows]
    contents = _show(chosen, image_shape)
    looked, map_plane = _look(vae, chosen, plane, seed)
    weights = weigh(
        vae,
        chosen,
        map_plane,
        num_samples=num_samples,
        num_prior_samples=num_prior_samples,
        budget_seconds=budget_seconds,
        seed=seed,
        device=device,
    )
    contents |= (
        looked
        | weights
        | {
            "indices": rows.tolist(),
            "labels": None if names is None else [names[row] for row in rows.tolist()],
            "numSamples": num_samples,
            "about": _describe(len(rows), len(data), num_samples, seed),
        }
    )
    write_file(target, _fill(title, contents).encode())
    return target


def _check_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise ArgumentError(f"path must be that of the file to write, such as 'explorer.html'; got {path!r}.")
    target = Path(path).expanduser().absolute()
    if target.is_dir():
        raise ArgumentError(
            f"path={str(path)!r} is a folder. Pass the file in it, such as {str(target / 'explorer.html')!r}."
        )
    if not target.parent.is_dir():
        raise ArgumentError(f"path={str(path)!r}: there is no folder {str(target.parent)!r}. Make it first.")
    check_writable(target.parent)
    return target


def _check_labels(labels: Any, num_data: int) -> list[str] | None:
    """Labels as strings; whole numbers without a point."""
    if labels is None:
        return None
    values = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise DataError(f"labels must be a sequence of one for each of {num_data} data, got {labels!r}.")
    values = list(values)
    if len(values) != num_data:
        raise DataError(f"labels must be one for each datum: there are {num_data} data and {len(values)} labels.")
    if any(isinstance(value, list | tuple) for value in values):
        raise DataError(
            "labels must have shape (N,), got more than one number for a datum. Of one-hot rows pass labels.argmax(1)."
        )
    return [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]


def _choose_rows(total: int, num_data: int, seed: int) -> Tensor:
    if total <= num_data:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num_data].sort().values


def _look(vae: Any, x: Tensor, plane: str | Sequence[int], seed: int) -> tuple[dict[str, Any], Plane]:
    """What of the page comes from the pair's parts, and the plane."""
    missing = [name for name in ("model", "guide", "prior", "encode", "decode", "decoder") if not hasattr(vae, name)]
    if missing or not issubclass(type(vae), nn.Module):
        missing = missing or ["the methods of an nn.Module"]
        raise ProgramError(
            f"the explorer needs a pair with {', '.join(missing)}, which {type(vae).__name__} has not. Pass a pvae.VAE."
        )
    with isolate([vae], seed=seed, device=_device_of(vae)):
        codes = _encode(vae, x)
        z = vae.prior().sample((_EXAMPLES,))
        means = vae.decode(z).mean.flatten(1)
        decoder = describe_decoder(vae.decoder, z[:1])
        drawn = vae.prior().sample((1000,)).double().cpu()
    chosen = choose_plane(codes, plane)
    places, drawn = chosen.project(codes), chosen.project(drawn)
    if chosen.has_heights:
        places[:, 1] = spread(len(codes))
    contents = {
        "decoder": decoder,
        "examples": {"z": pack(z), "means": pack(means)},
        "codes": pack(codes),
        "basis": chosen.basis.tolist(),
        "origin": chosen.origin.tolist(),
        "axes": chosen.axes,
        "plane": chosen.words,
        "held": chosen.held,
        "heights": places[:, 1].tolist() if chosen.has_heights else None,
        "view": _find_view(places, drawn),
    }
    return contents, chosen


def _show(x: Tensor, image_shape: Sequence[int] | None) -> dict[str, Any]:
    """What of the page are data as they are shown."""
    x = x.double()
    low, high = x.min(), x.max()
    high = torch.where(high > low, high, low + 1)
    return {
        "picture": _find_picture(tuple(x.shape[1:]), image_shape),
        "range": [low.item(), high.item()],
        "data": pack_coarsely(x.flatten(1), low, high, "u8"),
    }


def _encode(vae: Any, x: Tensor) -> Tensor:
    """The codes ``E[z|x]``, float64, shape ``(N, D)``."""
    try:
        qz = vae.encode(x.to(next(vae.parameters(), x)))
    except TypeError as error:
        raise ProgramError(
            f"the explorer calls encode(x) with data alone, which {type(vae).__name__} cannot take: {error}. Pass a "
            "pvae.VAE, or a pair whose programs take x alone."
        ) from error
    if not hasattr(qz, "mean") or isinstance(qz, Tensor):
        raise ProgramError(
            f"encode(x) of {type(vae).__name__} must be a distribution q(z|x), got {type(qz).__name__}. An autoencoder "
            "without one has no log p(x): pass a pvae.VAE."
        )
    codes = qz.mean
    if codes.dim() != 2 or len(codes) != len(x):
        raise ProgramError(
            f"the explorer shows one latent vector for each datum, got codes of shape {tuple(codes.shape)}."
        )
    return codes.double().cpu()


def _device_of(vae: Any) -> torch.device:
    return next((p.device for p in vae.parameters()), torch.device("cpu"))


def _find_picture(event_shape: tuple[int, ...], image_shape: Sequence[int] | None) -> dict[str, Any] | None:
    """How a datum is an image; ``None`` for a vector that is shown as bars."""
    shape = event_shape if image_shape is None else tuple(image_shape)
    entries = int(np.prod(event_shape))
    if image_shape is not None and int(np.prod(shape)) != entries:
        raise ArgumentError(
            f"image_shape={shape} has {int(np.prod(shape))} entries, and a datum {event_shape} has {entries}."
        )
    if len(shape) == 2:
        return {"height": shape[0], "width": shape[1], "channels": 1, "lastChannel": False}
    if len(shape) == 3 and shape[0] in (1, 3):
        return {"height": shape[1], "width": shape[2], "channels": shape[0], "lastChannel": False}
    if len(shape) == 3 and shape[2] in (1, 3):
        return {"height": shape[0], "width": shape[1], "channels": shape[2], "lastChannel": True}
    if image_shape is not None or len(shape) > 1:
        name = "image_shape" if image_shape is not None else "the shape of a datum"
        raise DataError(
            f"{name} must be (H, W), (C, H, W) or (H, W, C) with 1 or 3 channels to be shown as an image, or (E,) as "
            f"bars; got {shape}. Pass image_shape."
        )
    if entries > _MAX_BARS:
        raise DataError(
            f"a datum of {entries} numbers cannot be shown as bars, of which there may be {_MAX_BARS}. If it is an "
            "image, pass image_shape=(height, width)."
        )
    return None


def _find_view(points: Tensor, drawn: Tensor) -> dict[str, list[float]]:
    """A square with all codes, and 99% of what is drawn from the prior."""
    ends = torch.tensor([0.005, 0.995], dtype=drawn.dtype)
    around = torch.cat([points, drawn.quantile(ends, 0)])
    least, most = around.amin(0), around.amax(0)
    middle, half = (least + most) / 2, 0.54 * (most - least).max()
    return {"low": (middle - half).tolist(), "high": (middle + half).tolist()}


def _describe(shown: int, total: int, num_samples: int, seed: int) -> str:
    """What the page says of itself."""
    which = f"all {total}" if shown == total else f"{shown} of {total:,}, chosen at random"
    return (
        f"Data: {which}. They are rounded to 1/255 of their range, and log-weights to 0.0001 nats if they count; "
        f"the decoder's weights are not. {num_samples} draws for each datum and proposal, seed {seed}; k-hat is of "
        "all of them. Written by pvae.explorer.write_explorer; the page loads nothing."
    )


def _fill(title: str, contents: dict[str, Any]) -> str:
    """The page. Its policy allows the one script by its hash, and no address at all."""
    sources = {name: (files("pvae.explorer") / name).read_text("utf-8") for name in _SOURCES}
    script = sources["network.js"] + sources["page.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:",
        "title": html.escape(title),
        "style": sources["page.css"],
        "contents": to_json(contents),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], sources["page.html"])


_SOURCES = ("page.html", "page.css", "network.js", "page.js")
