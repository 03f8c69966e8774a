"""What codes are good for: interpolation, retrieval, classification, and samples that look like data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvae.errors import ArgumentError, DataError, positive_int
from pvae.runtime import in_turn, isolate, resolve_seed

__all__ = ["Coverage", "SideBySide", "classification", "coverage", "interpolate", "retrieval", "side_by_side"]


def interpolate(start: Tensor, end: Tensor, num_steps: int = 8) -> Tensor:
    """Points on the straight lines between codes, both ends among them.

    Args:
        start: Codes, shape ``(N, D)``.
        end: As many.
        num_steps: Points on each line, at least 2.

    Returns:
        Shape ``(num_steps, N, D)``, to be decoded.

    Example:
        >>> import torch
        >>> import pvae
        >>> pvae.diagnostics.interpolate(torch.zeros(2), torch.ones(2), num_steps=3).tolist()
        [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    """
    if start.shape != end.shape:
        raise DataError(f"start and end must have the same shape, got {tuple(start.shape)} and {tuple(end.shape)}.")
    if positive_int("num_steps", num_steps) < 2:
        raise ArgumentError("num_steps must be at least 2, for both ends are among them; got 1.")
    shares = torch.linspace(0, 1, num_steps).to(start)
    return torch.lerp(start, end.to(start.device), shares.reshape(-1, *[1] * start.dim()))


@dataclass(frozen=True)
class Coverage:
    """How two sets of points lie to each other.

    Attributes:
        precision: Share of the points that lie where data do.
        recall: Share of the data that lie where points do.
    """

    precision: float
    recall: float


def coverage(points: Tensor, data: Tensor, *, num_neighbors: int = 3) -> Coverage:
    """Whether points, such as samples or decoded interpolations, look like data, and reach all of them.

    A point lies where the data do if it is within the distance of some datum to its ``num_neighbors``-th neighbour
    among the data; and the other way round. Distances are Euclidean, of entries: for images, of pixels.

    Args:
        points: Shape ``(M, *event)``.
        data: Shape ``(N, *event)``, best of about as many as there are points.
        num_neighbors: A larger one is more lenient.

    Source: Kynkäänniemi, Karras, Laine, Lehtinen and Aila, 2019, Improved Precision and Recall Metric for Assessing
    Generative Models.

    Example:
        >>> import torch
        >>> import pvae
        >>> data = torch.arange(20.0)[:, None]
        >>> pvae.diagnostics.coverage(data[:5] + 0.1, data)
        Coverage(precision=1.0, recall=0.4)
    """
    points = points.flatten(1).double()
    data = data.flatten(1).to(points)
    return Coverage(_share_inside(points, data, num_neighbors), _share_inside(data, points, num_neighbors))


def retrieval(codes: Tensor, labels: Tensor, *, num_neighbors: int = 10) -> float:
    """Share of each code's nearest neighbours, itself left out, that have its label; the mean over all codes.

    Args:
        codes: Shape ``(N, D)``.
        labels: Shape ``(N,)``.
        num_neighbors: How many to retrieve.

    Example:
        >>> import torch
        >>> import pvae
        >>> labels = torch.arange(2).repeat_interleave(10)
        >>> pvae.diagnostics.retrieval(10.0 * labels[:, None], labels, num_neighbors=5)
        1.0
    """
    near = _neighbors(codes, codes, num_neighbors + 1)[1]
    # Itself is left out by its place: of equal codes another one may come first.
    others = near != torch.arange(len(codes), device=near.device)[:, None]
    others[others.all(1), -1] = False
    labels = labels.to(near.device)
    right = (labels[near] == labels[:, None]) & others
    return right.sum().item() / (num_neighbors * len(codes))


def classification(
    codes: Tensor, labels: Tensor, test_codes: Tensor, test_labels: Tensor, *, num_neighbors: int = 10
) -> float:
    """Share of test codes to which most of their nearest neighbours among the other codes give the right label.

    Args:
        codes: Shape ``(N, D)``.
        labels: Whole numbers, shape ``(N,)``.
        test_codes: Shape ``(M, D)``.
        test_labels: Shape ``(M,)``.
        num_neighbors: How many vote.

    Example:
        >>> import torch
        >>> import pvae
        >>> labels = torch.arange(2).repeat_interleave(10)
        >>> codes = 10.0 * labels[:, None]
        >>> pvae.diagnostics.classification(codes, labels, codes + 1, labels, num_neighbors=5)
        1.0
    """
    near = _neighbors(test_codes, codes.to(test_codes.device), num_neighbors)[1]
    votes = labels.to(near.device)[near]
    return (votes.mode(1).values == test_labels.to(near.device)).double().mean().item()


@dataclass(frozen=True)
class SideBySide:
    """What codes of several models are good for, as `side_by_side` measures it.

    Attributes:
        rows: For each model, by name: ``"error"``, the mean squared error of an entry's reconstruction;
            ``"interpolation"``, the share of points halfway between codes that decode to where data are;
            ``"precision"`` and ``"recall"`` of samples; ``"retrieval"`` and ``"classification"``. All but the first are
            better if higher, and at most 1.
    """

    rows: Mapping[str, Mapping[str, float]]

    def __repr__(self) -> str:
        names = list(next(iter(self.rows.values())))
        lines = [" " * 16 + "".join(f"{name:>15}" for name in names)]
        lines += [f"{key:<16}" + "".join(f"{row[name]:15.4f}" for name in names) for key, row in self.rows.items()]
        return "\n".join(lines)


@in_turn
def side_by_side(
    models: Mapping[str, Any], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, seed: int | None = 0
) -> SideBySide:
    """Measures what trained models of the same data are good for, such as an `Autoencoder` beside a `VAE`.

    A VAE's code is E[z|x]. Samples are the model's own; of one that has none, as an autoencoder, codes are drawn from a
    normal distribution with the mean and the covariance of the training data's.

    Args:
        models: By name, each with ``encode``, ``decode`` and ``reconstruct``.
        train: Data ``(N, *event)`` and labels ``(N,)``, whole numbers.
        test: Others, on which all is measured; at least 11.
        seed: Of samples and of the pairs that are interpolated. ``None`` for a fresh one.
    """
    (train_x, train_y), (x, y), seed = train, test, resolve_seed(seed)
    rows: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        with isolate([model], seed=seed, device=_device_of(model)):
            codes, train_codes = _codes(model, x), _codes(model, train_x)
            halfway = interpolate(codes, codes[torch.randperm(len(codes))], 3)[1]
            if hasattr(model, "sample"):
                drawn = model.sample(len(x), seed=seed)
            else:
                drawn = model.decode(_draw_like(train_codes, len(x))).sample()
            samples = coverage(drawn, x)
            rows[name] = {
                "error": (model.reconstruct(x) - x.to(drawn)).square().mean().item(),
                "interpolation": coverage(model.decode(halfway).mean, x).precision,
                "precision": samples.precision,
                "recall": samples.recall,
                "retrieval": retrieval(codes, y),
                "classification": classification(train_codes, train_y, codes, y),
            }
    return SideBySide(rows)


def _device_of(model: Any) -> torch.device:
    """Where a model computes, if it is one of tensors."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


def _codes(model: Any, x: Tensor) -> Tensor:
    code = model.encode(x)
    return code if isinstance(code, Tensor) else code.mean


def _draw_like(codes: Tensor, count: int) -> Tensor:
    """Draws of the normal distribution that has the moments of codes, some of whose dimensions may be constant."""
    values, vectors = torch.linalg.eigh(codes.double().T.cov().reshape(codes.shape[1], -1))
    noise = torch.randn(count, codes.shape[1], dtype=torch.float64).to(values)
    return (codes.double().mean(0) + (noise * values.clamp(min=0).sqrt()) @ vectors.T).to(codes)


def _neighbors(points: Tensor, data: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distances of points to their nearest data, nearest first, and which these are, shape ``(M, count)``."""
    if positive_int("num_neighbors", count) > len(data):
        raise DataError(f"{count} neighbours are wanted among {len(data)} data. Pass a smaller num_neighbors, or more.")
    found = [torch.cdist(rows, data).topk(count, largest=False) for rows in points.split(1024)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _share_inside(points: Tensor, data: Tensor, num_neighbors: int) -> float:
    radii = _neighbors(data, data, num_neighbors + 1)[0][:, -1]  # the nearest is the datum itself
    inside = [(torch.cdist(rows, data) <= radii).any(1) for rows in points.split(1024)]
    return torch.cat(inside).double().mean().item()
