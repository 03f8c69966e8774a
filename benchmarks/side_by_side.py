"""Timing several ways of doing the same work in one run: alternating, medians, and ratios between them."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

Way = Callable[[], Any]
Values = dict[str, list[float]]
Multiply = Callable[[Tensor, Tensor], Tensor]


def header(command: str, device: torch.device) -> str:
    """Versions, device and threads: what a figure means nothing without."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    packages = []
    for package in ("pvae", "torch", "pyro-ppl", "numpyro", "jax", "pythae"):
        try:
            packages.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    threads = f"{torch.get_num_threads()} threads"
    return f"{command}\n{', '.join(packages)}, Python {platform.python_version()}; {name}, {threads}\n"


def measure(ways: Mapping[str, Way], repeats: int, device: torch.device) -> tuple[Values, dict[str, list[Any]]]:
    """Seconds of each way, ``repeats`` times, and what each returned.

    All ways take turns, so that a busy moment hits them alike.
    """
    seconds: Values = {name: [] for name in ways}
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            start = time.perf_counter()
            results[name].append(work())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def add_peers(ways: dict[str, Way], peers: Mapping[str, Callable[[], Way]]) -> None:
    """Adds the ways of other packages, and says which are left out for want of the package, or of its GPU support."""
    for name, make in peers.items():
        try:
            ways[name] = make()
        except (ImportError, AttributeError, RuntimeError) as error:
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")


def table(unit: str, values: Values, columns: Mapping[str, Callable[[str], str]]) -> str:
    """A Markdown table of medians and spreads, and of further columns that are given a row's name."""
    lines = [
        f"| way | {unit}, median | lowest to highest | {' | '.join(columns)} |",
        f"| --- | {' | '.join(['---:'] * (2 + len(columns)))} |",
    ]
    for name, each in values.items():
        cells = [f"{statistics.median(each):.3f}", f"{min(each):.3f} to {max(each):.3f}"]
        lines.append(f"| {' | '.join([name, *cells, *(cell(name) for cell in columns.values())])} |")
    return "\n".join(lines)


def ratio(values: Values, reference: Callable[[str], str]) -> Callable[[str], str]:
    """A table's column: a row's median divided by that of the row which ``reference`` names for it."""

    def cell(name: str) -> str:
        other = values.get(reference(name))
        return f"{statistics.median(values[name]) / statistics.median(other):.2f}" if other else "-"

    return cell


def lowest(values: Values, names: list[str]) -> str:
    """Which of some rows has the lowest median."""
    return min(names, key=lambda name: statistics.median(values[name]))


def products(device: torch.device) -> dict[str, Multiply]:
    """Ways to compute ``a @ b.T``, by name."""
    ways: dict[str, Multiply] = {"torch.mm": lambda a, b: torch.mm(a, b.T)}
    onednn = torch.ops.mkldnn
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(onednn, "_linear_pointwise"):
        ways["oneDNN"] = lambda a, b: onednn._linear_pointwise(a, b, None, "none", [], "")
    return ways


def arguments(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument("--data-dir", help="folder with MNIST (default: $PVAE_DATA, else a cache folder)")
    parser.add_argument("--repeats", type=int, default=repeats, help="times that each way is measured")
    return parser
