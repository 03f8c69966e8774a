"""The joint density of latents and data with its gradient: what fits and chains evaluate again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from pvae.evidence.densities import Batch, Densities

__all__ = ["log_joint", "log_joint_and_slope", "run_in_tiles"]

# Pairs of a particle and a datum in a tile: on a CPU, its activations fit in the caches.
_PAIRS = {"cpu": 2**11, "cuda": 2**18}
_DATA = {"cpu": 2**8, "cuda": 2**12}
_ENTRIES = {"cpu": 2**22, "cuda": 2**27}
_CALL = 16  # data that could be evaluated while a tile is prepared


def log_joint(pair: Densities, batch: Batch, u: Tensor) -> Tensor:
    """``log p(x, z(u)) + log |dz/du|``, the joint density in unconstrained space, for u of shape ``(K, N, D)``."""
    latents, log_det = pair.space.unflatten(u)
    return pair.log_pxz(batch, latents) + log_det


def log_joint_and_slope(pair: Densities, batch: Batch, u: Tensor, num_data: int | None = None) -> tuple[Tensor, Tensor]:
    """`log_joint`, of shape ``(K, N)``, and its gradient in u, ``(K, N, D)``; both detached.

    Where some data leave a batch on the way, ``num_data`` is how many it had, so that one graph serves for all of it.
    """

    def evaluate(u: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_p = log_joint(pair, batch, u)
            (slope,) = torch.autograd.grad(log_p.sum(), u)
        return log_p.detach(), slope

    log_p, slope = run_in_tiles(pair, "log joint and slope", evaluate, batch, u, num_data=num_data)
    return log_p, slope


def run_in_tiles(
    pair: Densities,
    key: Hashable,
    function: Callable[..., tuple[Tensor, ...]],
    batch: Batch,
    *tensors: Tensor,
    num_data: int | None = None,
) -> tuple[Tensor, ...]:
    """Runs a function of each particle and datum by itself: as it is, or as a graph where programs are captured.

    A graph is of one shape. So it gets tiles of few shapes, filled up with rows that are there already, and one graph
    serves however many data are left of a batch, and however many particles.

    Args:
        pair: Whose `Densities.programs` are asked.
        key: The function's name among them.
        function: Takes ``tensors`` and the batch; returns tensors of shape ``(K, N, ...)``.
        batch: N data.
        tensors: Of shape ``(K, N, ...)`` each.
        num_data: How many data to choose the tiles for, if more than N.
    """
    run = pair.programs.get(key, function)
    if not pair.programs.capture:
        return run(*tensors, *batch)
    shape = num_particles, num_rows = tensors[0].shape[:2]
    tall, wide = _tile(num_particles, num_data or num_rows, pair)
    results: list[Tensor] = []
    for some in _spans(num_particles, tall):
        for rows in _spans(num_rows, wide):
            parts = (_fill(_fill(t[some, rows], 0, tall), 1, wide).contiguous() for t in tensors)
            done = run(*parts, *(_fill(t[rows], 0, wide) for t in batch))
            if not results:
                results = [t.new_empty(*shape, *t.shape[2:]) for t in done]
            for whole, part in zip(results, done, strict=True):
                whole[some, rows] = part[: some.stop - some.start, : rows.stop - rows.start]
    return tuple(results)


def _tile(num_particles: int, num_data: int, pair: Densities) -> tuple[int, int]:
    """How many particles and data a tile has: of the latter a power of 2, so that few shapes occur."""
    device = pair.placed.device.type
    most_pairs, most_data, entries = (table.get(device, table["cuda"]) for table in (_PAIRS, _DATA, _ENTRIES))
    pairs = max(1, min(most_pairs, entries // pair.entries))
    widths = [2**i for i in range(13) if 2**i <= min(pairs, most_data) and 2**i < 2 * num_data]
    wide = min(widths, key=lambda width: -(-num_data // width) * (width + _CALL))
    tiles = -(-num_particles // (pairs // wide))
    return -(-num_particles // tiles), wide


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _fill(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with its last entry along a dimension repeated, up to a size."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    last = tensor.narrow(dim, -1, 1)
    return torch.cat([tensor, last.expand(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])], dim)
