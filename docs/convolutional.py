"""Trains a convolutional VAE and a VAE of MLPs on MNIST alike, and keeps what the page about them shows.

    python docs/convolutional.py    # writes docs/results/convolutional.json, and two pictures into docs/images/

MNIST is read from the folder that PVAE_DATA names, or downloaded. With ``--checkpoint FOLDER`` a run that was stopped
goes on when it is started again; its seconds and the CPU's are then those since the last start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("MATPLOTLIBRC", str(Path(__file__).parent))  # pictures for light and dark pages

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import pvae
from pvae.persistence import versions

DOCS = Path(__file__).parent
SEED = 0
LATENTS = 50
BATCH_SIZE = 256
MAKE = {  # of about as many parameters
    "conv": lambda: pvae.VAE.conv((1, 28, 28), LATENTS, channels=(16, 32), hidden=200),
    "mlp": lambda: pvae.VAE.mlp((28, 28), LATENTS, hidden=[400]),
}


def count(module: torch.nn.Module) -> int:
    """The number of its parameters."""
    return sum(p.numel() for p in module.parameters())


def train(name: str, data: pvae.datasets.Dataset, args: argparse.Namespace) -> tuple[pvae.VAE, dict[str, Any]]:
    """One network of the two, and what its training took and gave."""
    torch.manual_seed(SEED)
    vae = MAKE[name]()
    train_x, test_x = (x.reshape(-1, *vae.event_shape) for x in (data.train_x, data.test_x))
    kept = {"checkpoint": args.checkpoint / name, "resume": "auto"} if args.checkpoint else {}
    start, cpu_start = time.perf_counter(), time.process_time()
    result = pvae.fit(
        vae.model, vae.guide, train_x, transform=data.transform, validation=test_x, epochs=args.epochs,
        batch_size=BATCH_SIZE, lr=1e-3, seed=SEED, device="cpu", progress=False, **kept,
    )  # fmt: skip
    if result.stopped == "signal":
        raise SystemExit(128 + (result.signal or 0))
    told = {
        "parameters": {"encoder": count(vae.encoder), "decoder": count(vae.decoder)},
        "train_seconds": time.perf_counter() - start,
        "train_cpu_seconds": time.process_time() - cpu_start,
        "elbo": result.history["validation_elbo"][-1].item(),
        "history": {key: values.tolist() for key, values in result.history.items()},
    }
    print(f"{name}: ELBO {told['elbo']:.2f}, {told['train_seconds']:.0f} s", flush=True)
    return vae, told


def evaluate(
    vae: pvae.VAE, x: torch.Tensor, seed: int, args: argparse.Namespace
) -> tuple[pvae.EvidenceEstimate, dict[str, Any]]:
    """log p(x) by the default call, with its errors, and what the table shows of it."""
    cpu_start = time.process_time()
    estimate = pvae.log_evidence(
        vae.model, vae.guide, x.reshape(-1, *vae.event_shape), num_samples=args.num_samples, seed=seed, device="cpu",
        progress=False,
    )  # fmt: skip
    print(estimate, flush=True)
    return estimate, {
        "log_px": estimate.mean,
        "std_error": estimate.mean_std_error,
        "data_std_error": estimate.data_std_error,
        "unresolved": estimate.unresolved.sum().item(),
        "evidence_seconds": estimate.seconds,
        "evidence_cpu_seconds": time.process_time() - cpu_start,
    }


def step_seconds(layout: torch.memory_format, steps: int = 12) -> float:
    """The CPU's seconds for gradients of one batch, in the median, with weights and images in this layout."""
    torch.manual_seed(SEED)
    vae = MAKE["conv"]().to(memory_format=layout)
    x = torch.rand(BATCH_SIZE, 1, 28, 28).round().to(memory_format=layout)
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        (-vae.decode(vae.encode(x).rsample()).log_prob(x).sum()).backward()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[2:])


def draw(vaes: dict[str, pvae.VAE], x: torch.Tensor) -> None:
    """The two pictures: draws from the prior, decoded, and reconstructions."""

    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.reshape(-1, 28, 28)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), layout="constrained")
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        pvae.plots.images(pixels(vae.sample(64, seed=SEED, mean=True)), ax, columns=8)
        ax.set_title(name)
    figure.savefig(DOCS / "images" / "convolutional_samples.png", dpi=110)
    rows = {"x": x, **{name: vae.reconstruct(x.reshape(-1, *vae.event_shape)) for name, vae in vaes.items()}}
    figure, axes = plt.subplots(3, 1, figsize=(9, 2.6), layout="constrained")
    for ax, (name, row) in zip(axes, rows.items(), strict=True):
        pvae.plots.images(pixels(row), ax, columns=len(x))
        ax.set_title(name, loc="left")
    figure.savefig(DOCS / "images" / "convolutional_reconstructions.png", dpi=110)


def main() -> None:
    """Trains, evaluates, draws, and writes."""
    parser = argparse.ArgumentParser(description="Train a convolutional VAE and one of MLPs on MNIST, and compare.")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--num-eval", type=int, default=100, help="test images to estimate log p(x) of")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--checkpoint", type=Path, help="folder for checkpoints, to go on from")
    args = parser.parse_args()
    start, cpu_start = time.perf_counter(), time.process_time()
    data = pvae.datasets.mnist(binarization="dynamic")
    chosen = torch.randperm(len(data.test_x), generator=torch.Generator().manual_seed(SEED))[: args.num_eval]
    x = data.test_x[chosen]
    vaes, estimates, told = {}, {}, {}
    for seed, name in enumerate(MAKE):  # draws of their own for each
        vaes[name], told[name] = train(name, data, args)
        estimates[name], found = evaluate(vaes[name], x, seed, args)
        told[name] |= found
    draw(vaes, x[:12])
    difference = pvae.compare(estimates["conv"], estimates["mlp"])
    report = {
        "command": "python docs/convolutional.py",
        "dataset": data.name,
        "binarization": data.binarization,
        "num_train": len(data.train_x),
        "num_test": len(data.test_x),
        "num_eval": args.num_eval,
        "num_samples": args.num_samples,
        "epochs": args.epochs,
        "batch_size": BATCH_SIZE,
        "lr": 1e-3,
        "latent_dim": LATENTS,
        "seed": SEED,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions() | {"pvae": pvae.__version__},
        "networks": told,
        "conv_minus_mlp": {
            "log_px": difference.difference,
            "std_error": difference.std_error,
            "data_std_error": difference.data_std_error,
        },
        "step_cpu_seconds": {
            "contiguous": step_seconds(torch.contiguous_format),
            "channels_last": step_seconds(torch.channels_last),
        },
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }
    (DOCS / "results" / "convolutional.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
