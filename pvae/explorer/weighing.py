"""What the page knows of log p(x): draws of prior and guide with their weights, a longer run, and a reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pvae import evidence
from pvae.errors import ProgramError
from pvae.explorer.packing import pack, pack_coarsely, pack_depths
from pvae.explorer.planes import Plane, spread

__all__ = ["weigh"]

_LATER = 60  # points of the longer run's curve
_ROWS = 500  # data at once in it


def weigh(
    vae: Any,
    x: Tensor,
    plane: Plane,
    *,
    num_samples: int,
    num_prior_samples: int,
    budget_seconds: float | None,
    seed: int,
    device: Any,
) -> dict[str, Any]:
    """Parts of the page's contents: ``"guide"``, ``"prior"``, ``"later"`` and ``"reference"``.

    Args:
        vae: A pair.
        x: Data, all of which can be chosen.
        plane: On which the draws are shown.
        num_samples: Draws that are shown, for each datum and proposal.
        num_prior_samples: How many of the prior's the curve goes on to.
        budget_seconds: For the reference.
        seed: Of the draws.
        device: Where to compute.
    """
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"seed": seed, "device": device}
    for name in ("guide", "prior"):
        z, weights, khat = _draw(vae, x, name, num_samples, options)
        # The prior's are spread over the whole map, where steps of 1/255 would be seen.
        packed = _pack_draws(plane, z, weights, "u8" if name == "guide" else "u16")
        found[name] = {**packed, "khat": [_show_khat(k) for k in khat.tolist()]}
        if name == "prior":
            found["later"] = _go_on(vae, x, weights, num_prior_samples - num_samples, {**options, "seed": seed + 1})
    estimate = evidence.log_evidence(
        vae.model, vae.guide, x, budget_seconds=budget_seconds, **{**options, "seed": seed + 2}
    )
    low, high = estimate.interval()
    numbers = {"value": estimate.corrected, "low": low, "high": high}
    found["reference"] = {key: [_number(v) for v in value.tolist()] for key, value in numbers.items()}
    found["reference"] |= {"stage": estimate.stage, "withheld": estimate.withheld}
    return found


def _pack_draws(plane: Plane, z: Tensor, weights: Tensor, kind: str) -> dict[str, Any]:
    """Draws ``(N, K, D)`` with their log-weights ``(K, N)``."""
    points = plane.project(z)
    if plane.has_heights:
        points[..., 1] = spread(points.shape[1])
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    top = weights.amax(0)
    top = torch.where(top.isfinite(), top, 0.0)
    depth = top - weights
    deepest = max(depth[depth.isfinite()].max().item() if depth.isfinite().any() else 0.0, 1.0)
    return {
        "points": pack_coarsely(points, low, high, kind),
        "low": pack(low[:, 0]),
        "high": pack(high[:, 0]),
        "depths": pack_depths(weights.T, top[:, None], deepest),
        "deepest": deepest,
        "top": top.tolist(),
    }


def _go_on(vae: Any, x: Tensor, first: Tensor, count: int, options: dict[str, Any]) -> dict[str, Any] | None:
    """The prior's estimates from the first draws and ever more of later ones."""
    if count < 1:
        return None
    steps = torch.logspace(math.log10(len(first) + 1), math.log10(len(first) + count), _LATER, dtype=torch.float64)
    draws = sorted({int(step) for step in steps.round().clamp(max=len(first) + count).tolist()})
    sums = []
    for some, before in zip(x.split(_ROWS), first.split(_ROWS, 1), strict=True):  # for want of memory
        later = evidence.log_weights(vae.model, vae.guide, some, num_samples=count, proposal="prior", **options)
        whole = torch.logaddexp(later.logcumsumexp(0), before.logsumexp(0))
        sums.append(whole[[k - len(first) - 1 for k in draws]])
    estimates = torch.cat(sums, 1) - torch.tensor(draws, dtype=torch.float64).log()[:, None]
    return {"draws": draws, "estimates": pack(estimates.T)}


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def _show_khat(khat: float) -> str:
    if math.isnan(khat):
        return "too few draws"
    text = f"{khat:.2f}" if math.isfinite(khat) else "∞" if khat > 0 else "-∞"
    return f"{text}, {'good' if khat <= evidence.KHAT_LIMIT else 'too heavy'}"


def _draw(vae: Any, x: Tensor, name: str, num_samples: int, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Draws ``(N, K, D)``, their log-weights ``(K, N)``, and k-hats ``(N,)``."""
    drawn = evidence.weighted_draws(vae.model, vae.guide, x, num_samples=num_samples, proposal=name, **options)
    if len(drawn.latents) != 1 or (z := next(iter(drawn.latents.values())).double()).dim() != 3:
        shapes = {site: tuple(value.shape[2:]) for site, value in drawn.latents.items()}
        raise ProgramError(f"the explorer shows one latent vector for each datum, got latents of shapes {shapes}.")
    if drawn.num_data != len(x):
        raise ProgramError("the explorer shows a latent for each datum, and all data of this pair have one together.")
    return z.transpose(0, 1), drawn.log_weights, drawn.khat
