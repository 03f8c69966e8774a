"""Whole seconds of short runs, capturing and compiling included: `CompiledSVI` beside `pyro.infer.SVI`, `pvae.fit` too.

Each run is a process of its own, timed from its first step. "cold" has an empty folder for the compiler's cache, "warm"
the one that a cold run left.

    python benchmarks/short_runs.py [--steps 60 300 3000] [--repeats 3]
    python benchmarks/short_runs.py --epochs 1 3 10 30     # of pvae.fit, by compile=False and by default
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from side_by_side import header

SIZES = {"small": (64, 6, 2, 8), "MNIST": (256, 784, 50, 400)}  # batch, data, latents, hidden units
RUN = """
import sys, time, pyro, torch, pvae
name, steps, batch, data, latents, hidden = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(int({threads}))
torch.manual_seed(0)
vae = pvae.VAE.mlp(data, latents, [hidden])
svi = {{"SVI": pyro.infer.SVI, "CompiledSVI": pvae.svi.CompiledSVI}}[name](
    vae.model, vae.guide, pyro.optim.Adam({{"lr": 1e-3}}), pyro.infer.Trace_ELBO()
)
x = torch.bernoulli(torch.full((batch, data), 0.3))
start = time.perf_counter()
for _ in range(steps):
    loss = svi.step(x)
print(time.perf_counter() - start, loss, any(r.captured.is_compiled for r in getattr(svi, "_gradients", ())))
"""
FIT = """
import sys, time, torch, pvae
compile, epochs, images = eval(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(int({threads}))
torch.manual_seed(0)
vae = pvae.VAE.mlp((28, 28), 50, [400])
x = torch.bernoulli(torch.full((images, 28, 28), 0.13))
start = time.perf_counter()
result = pvae.fit(vae.model, vae.guide, x, epochs=epochs, batch_size=256, compile=compile, progress=False)
print(time.perf_counter() - start, result.history["elbo"][-1], result.compile_seconds)
"""


def fits(epochs: list[int], images: int, threads: int, repeats: int) -> None:
    """Prints a table of runs of `pvae.fit`."""
    print("| epochs | compile=False, s | by default, cold | warm | cold / False | compiling cold, s | warm, s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for number in epochs:
        runs = []
        for _ in range(repeats):  # in turns, so that a busy moment hits all alike
            with tempfile.TemporaryDirectory() as folder:
                ways = ("False", "'auto'", "'auto'")
                runs.append([run(FIT, folder, threads, way, str(number), str(images)) for way in ways])
        plain, cold, warm = (statistics.median(float(run[way][0]) for run in runs) for way in range(3))
        ratio = statistics.median(float(run[1][0]) / float(run[0][0]) for run in runs)
        compiling = [statistics.median(float(run[way][2]) for run in runs) for way in (1, 2)]
        print(
            f"| {number} | {plain:.1f} | {cold:.1f} | {warm:.1f} | {ratio:.2f} | {compiling[0]:.1f} | "
            f"{compiling[1]:.1f} |",
            flush=True,
        )


def run(script: str, folder: str, threads: int, *arguments: str) -> list[str]:
    """What a script prints, as words, in a process of its own."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
    command = [sys.executable, "-c", script.format(threads=threads), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def seconds(name: str, steps: int, size: str, folder: str, threads: int) -> tuple[float, float, bool]:
    """Of all steps, the last loss, and whether anything was compiled."""
    taken, loss, compiled = run(RUN, folder, threads, name, str(steps), *map(str, SIZES[size]))
    return float(taken), float(loss), compiled == "True"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 300, 3000])
    parser.add_argument("--epochs", type=int, nargs="+", help="of pvae.fit, in place of steps of CompiledSVI")
    parser.add_argument("--images", type=int, default=60_000, help="in an epoch of pvae.fit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    print(header("python benchmarks/short_runs.py", torch.device("cpu")))
    if arguments.epochs:
        fits(arguments.epochs, arguments.images, arguments.threads, arguments.repeats)
        return
    print("| model | steps | SVI, s | cold, s | warm, s | cold / SVI | warm / SVI | compiled | losses' difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        for steps in arguments.steps:
            runs = []
            for _ in range(arguments.repeats):  # in turns, so that a busy moment hits all alike
                with tempfile.TemporaryDirectory() as folder:
                    ways = ("SVI", "CompiledSVI", "CompiledSVI")
                    runs.append([seconds(way, steps, size, folder, arguments.threads) for way in ways])
            plain, cold, warm = (statistics.median(run[way][0] for run in runs) for way in range(3))
            ratios = [statistics.median(run[way][0] / run[0][0] for run in runs) for way in (1, 2)]
            difference = max(abs(run[1][1] / run[0][1] - 1) for run in runs)
            print(
                f"| {size} | {steps} | {plain:.1f} | {cold:.1f} | {warm:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | "
                f"{'yes' if runs[0][1][2] else 'no'} | {difference:.0e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
