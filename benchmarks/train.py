"""Seconds an epoch: `pvae.fit` beside `pyro.infer.SVI`, plain PyTorch, NumPyro, pythae and its own matrix products.

MNIST, static binarization, 784-400-50, Adam; the same data and initial weights for all. Ends with an error if the ways
do not end at the same training ELBO.
"""

from __future__ import annotations

import copy
import statistics
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import parts
import peers
import pyro
import torch
from peers import LR, Epoch
from pyro.infer import SVI, Trace_ELBO
from side_by_side import Multiply, Values, Way, add_peers, arguments, header, lowest, measure, products, ratio, table
from torch import Tensor

import pvae
from pvae.runtime import ALONE, Stop, isolate
from pvae.runtime.programs import resolve_device
from pvae.svi import CompiledSVI
from pvae.svi.passes import fastest_epochs
from pvae.svi.settings import Settings
from pvae.svi.step import Step
from pvae.svi.trainable import make_trainable

PYRO, NUMPYRO, FIT, PRODUCTS = "pyro.infer.SVI", "NumPyro, an epoch jitted", "pvae.fit, compiled", "products alone"


def main() -> None:
    parser = arguments(__doc__ or "", repeats=5)
    parser.add_argument("--images", type=int, default=60_000, help="training images")
    parser.add_argument("--batch-size", type=int, default=256, help="images in a batch")
    parser.add_argument("--figure", type=Path, help="where to draw what takes the time, on the CPU")
    parser.add_argument("--growth", action="store_true", help="measure how time grows with the batch instead")
    parser.add_argument("--kinds", action="store_true", help="measure a Gaussian and a convolutional VAE instead")
    args = parser.parse_args()
    device = resolve_device("cuda" if args.cuda else "cpu")
    x = pvae.datasets.mnist(args.data_dir, "static").train_x[: args.images].to(device)
    torch.manual_seed(0)
    vae = pvae.VAE.mlp((28, 28), 50, [400]).to(device)
    print(header("python benchmarks/train.py", device))
    if args.growth:
        growth(vae, x, args.repeats)
        return
    if args.kinds:
        grey = pvae.datasets.mnist(args.data_dir, "none").train_x[: args.images].to(device)
        kinds(x, grey, args.batch_size, args.repeats)
        return

    ways = all_ways(vae, x, args.batch_size)
    first, _ = measure(ways, 1, device)
    measure(ways, 1, device)  # the last batch, of another size, is compiled late by some
    seconds, elbos = measure(ways, args.repeats, device)
    print(f"\n{len(x):,} images, batches of {args.batch_size}:\n")
    columns = {
        "to Pyro": ratio(seconds, lambda _: PYRO),
        "to NumPyro": ratio(seconds, lambda _: NUMPYRO),
        "to its products": ratio(seconds, lambda name: floor_of(seconds, name)),
        "first epoch": lambda name: f"{first[name][0]:.1f}",
        "ELBO": lambda name: "-" if elbos[name][-1] is None else f"{elbos[name][-1]:.2f}",
    }
    print(table("seconds an epoch", seconds, columns))
    print(
        f"\nELBO: training, after {args.repeats + 2} epochs, nats per datum. The first epoch holds compiling, which "
        "takes longer where the compiler\nfinds no copy on disk. Products: the fastest of the same precision."
    )
    if args.figure:
        draw_parts(vae, x[: 20 * args.batch_size], args.batch_size, seconds, args.figure)
    result = pvae.fit(
        vae.model, vae.guide, x, epochs=3, batch_size=args.batch_size, compile=True, device=device, progress=False
    )
    times = ", ".join(f"{s:.2f}" for s in result.history["seconds"])
    print(f"One call of pvae.fit, compile=True: epochs of {times} s, with {result.compile_seconds:.1f} s of compiling.")
    reference = elbos[PYRO][-1]
    for name, values in elbos.items():
        if values[-1] is not None and not abs(values[-1] - reference) < 0.02 * abs(reference):
            sys.exit(f"{name} ends at an ELBO of {values[-1]:.2f}, {PYRO} at {reference:.2f}: not the same work.")


def all_ways(vae: pvae.VAE, x: Tensor, batch_size: int) -> dict[str, Way]:
    """Every way to train for an epoch, each with a copy of the VAE; and the products alone."""
    args = vae, x, batch_size
    compiled, by_hand = partial(pvae_fit, *args, compile=True), partial(peers.plain, *args, compiled=True)
    ways: dict[str, Way] = {
        PYRO: pyro_svi(*args),
        f"{PYRO}, validation off": pyro_svi(*args, validation=False),
        "pvae.svi.CompiledSVI": pyro_svi(*args, kind=partial(CompiledSVI, compile=True)),
        "pvae.fit, not compiled": pvae_fit(*args, compile=False),
        FIT: compiled(),
        f"{FIT}, bfloat16": compiled(precision="bfloat16"),
        "PyTorch by hand": peers.plain(*args),
        "PyTorch by hand, torch.compile": by_hand(),
    }
    others = {NUMPYRO: partial(peers.numpyro_svi, *args), "pythae's trainer": partial(peers.pythae_trainer, *args)}
    if x.is_cuda:
        ways[f"{FIT}, TF32"] = in_tf32(compiled())
        ways["PyTorch by hand, torch.compile, TF32"] = in_tf32(by_hand())
        others[f"{NUMPYRO}, TF32"] = partial(peers.numpyro_svi, *args, matmul="tensorfloat32")
    add_peers(ways, others)
    multiply = products(x.device)
    for kind, product in multiply.items():
        ways[f"{PRODUCTS}, {kind}"] = products_alone(*args, product)
    ways[f"{PRODUCTS}, torch.mm, bfloat16"] = products_alone(*args, multiply["torch.mm"], torch.bfloat16)
    if x.is_cuda:
        ways[f"{PRODUCTS}, torch.mm, TF32"] = in_tf32(products_alone(*args, multiply["torch.mm"]))
    return ways


def draw_parts(vae: pvae.VAE, x: Tensor, batch_size: int, seconds: Values, path: Path) -> None:
    """Draws the medians, taken apart as some steps are whose operations PyTorch's profiler sees."""
    ways = {name: work for name, work in all_ways(vae, x, batch_size).items() if not name.startswith(PRODUCTS)}
    seen = {name: work for name, work in ways.items() if name != NUMPYRO and not name.startswith("pythae")}
    measure(seen, 2, x.device)
    shares = {name: parts.parts_of(work) for name, work in seen.items()}
    medians = {name: statistics.median(seconds[name]) for name in ways}
    parts.draw(medians, shares, statistics.median(seconds[floor_of(seconds, FIT)]), path)
    print(f"\n| way | {' | '.join(parts.PARTS)} |\n| --- {'| ---: ' * len(parts.PARTS)}|")
    for name, each in shares.items():
        print(f"| {name} | {' | '.join(f'{value:.0%}' for value in each.values())} |")
    print(f"Figure: {path}")


def pyro_svi(vae: pvae.VAE, x: Tensor, batch_size: int, *, kind: type[SVI] = SVI, validation: bool = True) -> Epoch:
    """Pyro's SVI, or pvae's drop-in for it, with the loop that a user writes."""
    vae = copy.deepcopy(vae)
    svi = kind(vae.model, vae.guide, pyro.optim.Adam({"lr": LR}), Trace_ELBO())

    def epoch() -> float:
        with pyro.validation_enabled(validation):
            order = torch.randperm(len(x), device=x.device)
            return -sum(svi.step(x[rows]) for rows in order.split(batch_size)) / len(x)

    return epoch


def pvae_fit(vae: pvae.VAE, x: Tensor, batch_size: int, *, compile: bool, precision: str = "float32") -> Epoch:
    """What `pvae.fit` does for an epoch, one at a time, so that it can take turns with others."""
    vae = copy.deepcopy(vae)
    settings = Settings.checked(epochs=1, batch_size=batch_size, lr=LR, precision=precision, compile=compile)
    pair = make_trainable(vae.model, vae.guide, x, None, x.device, settings, ALONE, Stop())
    passes = fastest_epochs(Step(pair, pair.batches, replace(settings, capture=compile)))
    numbers = count(1)

    def epoch() -> float:
        number = next(numbers)
        with isolate([vae], seed=number, device=x.device, training=True):
            passes.begin()
            for _ in passes.epoch(number):
                pass
        return -passes.total / len(x)

    return epoch


def products_alone(
    vae: pvae.VAE,
    x: Tensor,
    batch_size: int,
    multiply: Multiply,
    dtype: torch.dtype = torch.float32,
) -> Way:
    """The eleven matrix products of each step and nothing else: the floor under every way that does them so.

    Each layer has one going forward, one for its weights' gradient and, but for the first, one for its inputs'.
    """

    def step(size: int) -> Way:
        pairs = []
        for number, layer in enumerate(peers.layers(vae)):
            weight = layer.weight.detach().to(dtype)
            inputs, grads = (torch.randn(size, n, device=x.device, dtype=dtype) for n in weight.shape[::-1])
            pairs += [(inputs, weight), (grads.T.contiguous(), inputs.T)]
            if number:
                pairs.append((grads, weight.T))

        def work() -> None:
            for a, b in pairs:
                multiply(a, b)

        return as_cuda_graph(work) if x.is_cuda else work

    steps, rest = divmod(len(x), batch_size)
    full, last = step(batch_size), step(rest) if rest else lambda: None

    def epoch() -> None:
        for _ in range(steps):
            full()
        last()

    return epoch


def as_cuda_graph(work: Way) -> Way:
    """Work on the GPU as one CUDA graph, recorded at the first call, so that launching it costs little."""
    graph = None

    def run() -> None:
        nonlocal graph
        if graph is None:
            work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
        graph.replay()

    return run


def in_tf32(work: Way) -> Way:
    """Work with float32 matrix products in TF32."""

    def run() -> float:
        torch.set_float32_matmul_precision("high")
        try:
            return work()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


def floor_of(seconds: Values, name: str) -> str:
    """The fastest products of a way's own precision."""

    def precision(of: str) -> str:
        return next((p for p in ("bfloat16", "TF32") if p in of), "float32")

    same = [n for n in seconds if n.startswith(PRODUCTS) and precision(n) == precision(name)]
    return lowest(seconds, same)


def growth(vae: pvae.VAE, x: Tensor, repeats: int) -> None:
    """Prints seconds an epoch, and microseconds a datum, for batches of several sizes."""
    rows: dict[str, list[str]] = {}
    sizes = [16, 64, 256, 1024, 4096]
    for size in sizes:
        ways: dict[str, Way] = {PYRO: pyro_svi(vae, x, size), FIT: pvae_fit(vae, x, size, compile=True)}
        add_peers(ways, {NUMPYRO: partial(peers.numpyro_svi, vae, x, size)})
        measure(ways, 2, x.device)
        seconds, _ = measure(ways, repeats, x.device)
        for name, values in seconds.items():
            middle = statistics.median(values)
            rows.setdefault(name, []).append(f"{middle:.3f} ({1e6 * middle / len(x):.1f})")
    print(f"Seconds an epoch of {len(x):,} images (microseconds a datum), by batch size:\n")
    print(f"| way | {' | '.join(f'{size:,}' for size in sizes)} |\n| --- | {' | '.join(['---:'] * len(sizes))} |")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


def kinds(x: Tensor, grey: Tensor, batch_size: int, repeats: int) -> None:
    """Prints seconds an epoch of VAEs of other kinds."""
    gaussian = pvae.VAE.mlp((28, 28), 20, [400], likelihood="gaussian", units=(0.0, 1.0))
    cases = {"Gaussian, 784-400-20": (gaussian, grey), "convolutional": (pvae.VAE.conv((1, 28, 28), 20), x[:, None])}
    for name, (vae, data) in cases.items():
        args = vae.to(x.device), data, batch_size
        ways: dict[str, Way] = {
            PYRO: pyro_svi(*args),
            "pvae.svi.CompiledSVI": pyro_svi(*args, kind=partial(CompiledSVI, compile=True)),
            "pvae.fit, not compiled": pvae_fit(*args, compile=False),
            FIT: pvae_fit(*args, compile=True),
        }
        measure(ways, 2, x.device)
        seconds, elbos = measure(ways, repeats, x.device)
        columns = {
            "to Pyro": ratio(seconds, lambda _: PYRO),
            "ELBO": lambda way, elbos=elbos: f"{elbos[way][-1]:.2f}",
        }
        print(f"\n{name}, {len(data):,} images, batches of {batch_size}:\n")
        print(table("seconds an epoch", seconds, columns), flush=True)


if __name__ == "__main__":
    main()
