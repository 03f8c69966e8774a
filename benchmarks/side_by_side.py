"""Timing several ways of doing the same work in one run: alternating, medians, and ratios to the first."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version

import torch


def header(command: str, device: torch.device) -> str:
    """Versions, device and threads: what a figure means nothing without."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    packages = ", ".join(f"{p} {version(p)}" for p in ("pvae", "torch", "pyro-ppl"))
    return f"{command}\n{packages}, Python {platform.python_version()}; {name}, {torch.get_num_threads()} threads\n"


def measure(ways: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, ``repeats`` times; all ways take turns, so that a busy moment hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(unit: str, seconds: Mapping[str, list[float]], scale: float = 1.0) -> str:
    """A Markdown table of medians, spreads and ratios to the first row."""
    lines = [f"| way | {unit}, median | lowest to highest | ratio |", "| --- | ---: | ---: | ---: |"]
    first = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        low, middle, high = min(values) * scale, statistics.median(values), max(values) * scale
        lines.append(f"| {name} | {middle * scale:.3f} | {low:.3f} to {high:.3f} | {middle / first:.3f} |")
    return "\n".join(lines)


def arguments(description: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="measure on the GPU")
    parser.add_argument("--data-dir", help="folder with MNIST (default: $PVAE_DATA, else a cache folder)")
    parser.add_argument("--repeats", type=int, default=repeats, help="times that each way is measured")
    return parser
