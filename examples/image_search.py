"""Search images by their codes: the nearest neighbours of a query, by autoencoder, by VAE and by raw pixels.

    python examples/image_search.py                    # scikit-learn's 8 x 8 digits
    python examples/image_search.py --dataset mnist    # MNIST, which is downloaded where it is not on disk
    python examples/image_search.py --cuda             # training on the GPU
    python examples/image_search.py --help

The index holds the training images, the queries are test images. Prints how many of the ten nearest have the query's
label (precision@10), and writes report.json and neighbors.png to the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import pvae
from pvae.persistence import versions, write_file

FIGURES = ("neighbors",)
NAMES = ("raw pixels", "autoencoder", "VAE")


def count(text: str) -> int:
    """A type of argument: a whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Search images by the codes of an autoencoder and of a VAE.")
    add = parser.add_argument
    add("--cuda", action="store_true", help="train on the GPU; an error if there is none")
    add("--dataset", choices=["digits", "mnist"], default="digits", help="(default: digits)")
    add("--data-dir", type=Path, help="folder with MNIST, or to download it to (default: $PVAE_DATA, else a cache)")
    add("--latent-dim", type=count, default=16, metavar="D", help="numbers in a code (default: 16)")
    add("--hidden", type=count, nargs="+", default=[256], metavar="H", help="widths of hidden layers (default: 256)")
    add("--epochs", type=count, metavar="E", help="passes over the training images (default: 60, for MNIST 10)")
    add("--batch-size", type=count, default=64, metavar="B", help="images in a batch (default: 64)")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (default: 0.001)")
    add("--num-neighbors", type=count, default=10, metavar="K", help="images to find for each query (default: 10)")
    add("--num-queries", type=count, default=1000, metavar="N", help="test images to search for (default: 1000)")
    add("--num-shown", type=count, default=4, metavar="M", help="queries in the figure (default: 4)")
    add("--seed", type=int, default=0, help="of weights, shuffling, noise and the choice of queries (default: 0)")
    add("--output-dir", type=Path, default=Path("results"), help="for report.json and the figure (default: results)")
    return parser


def encode(model: pvae.VAE | pvae.Autoencoder, x: Tensor) -> Tensor:
    """Codes of images: those of an autoencoder, or the means of q(z|x)."""
    with torch.no_grad():
        code = model.encode(x)
    return (code if isinstance(code, Tensor) else code.mean).cpu()


def search(index: Tensor, queries: Tensor, num_neighbors: int) -> tuple[np.ndarray, float]:
    """Which of the index are nearest to each query, nearest first, ``(N, K)``, and how many seconds that took."""
    neighbors = NearestNeighbors(n_neighbors=num_neighbors).fit(index.numpy())
    start = time.perf_counter()
    return neighbors.kneighbors(queries.numpy(), return_distance=False), time.perf_counter() - start


def mean_and_error(values: np.ndarray) -> dict[str, float]:
    """The mean over queries and its standard error."""
    error = values.std(ddof=1).item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": values.mean().item(), "std_error": error}


def table(rows: dict[str, dict[str, Any]], num_neighbors: int) -> str:
    """A line for each way to search."""
    head = (
        f"{'':12}{'numbers':>9}{f'precision@{num_neighbors}':>15}{'+-':>8}{'over pixels':>13}{'+-':>8}{'ms/query':>10}"
    )
    lines = [head, "-" * len(head)]
    for name, row in rows.items():
        found, gain = row["precision"], row["over_pixels"]
        lines.append(
            f"{name:12}{row['numbers']:9}{found['mean']:15.3f}{found['std_error']:8.3f}{gain['mean']:+13.3f}"
            f"{gain['std_error']:8.3f}{1000 * row['seconds_per_query']:10.2f}"
        )
    return "\n".join(lines)


def draw(queries: Tensor, images: Tensor, found: dict[str, np.ndarray], labels: Tensor, theirs: Tensor) -> Figure:
    """Some queries and what each search found for them; wrong labels are crossed out."""
    figure = Figure(figsize=(7, 0.6 + 2.2 * len(found)), layout="constrained")
    for (name, places), ax in zip(found.items(), np.atleast_1d(figure.subplots(len(found), 1)), strict=True):
        beside = images[torch.from_numpy(places)]
        pvae.plots.neighbors(queries, beside, ax, labels=labels, found_labels=theirs[torch.from_numpy(places)])
        ax.set_title(f"by {name}")
    return figure


def run(args: argparse.Namespace) -> int:
    """Trains, searches, reports and draws; returns the exit code."""
    device, start = "cuda" if args.cuda else "cpu", time.perf_counter()
    if args.dataset == "mnist":
        data = pvae.datasets.mnist(args.data_dir, "dynamic", seed=args.seed)
    else:
        data = pvae.datasets.digits("threshold", seed=args.seed)
    # An index of bits that are drawn would change with every draw.
    images = pvae.datasets.binarize(data.train_x, "threshold") if data.transform else data.train_x
    if args.num_neighbors > len(images):
        raise pvae.ArgumentError(f"--num-neighbors: there are {len(images)} images in the index.")
    chosen = torch.randperm(len(data.test_x), generator=torch.Generator().manual_seed(args.seed))[: args.num_queries]
    queries, labels = data.test_x[chosen], data.test_y[chosen]
    epochs, shape = args.epochs or (10 if args.dataset == "mnist" else 60), tuple(images.shape[1:])

    codes: dict[str, tuple[Tensor, Tensor]] = {"raw pixels": (images.flatten(1), queries.flatten(1))}
    for name, kind in (("autoencoder", pvae.Autoencoder), ("VAE", pvae.VAE)):
        torch.manual_seed(args.seed)
        model = kind.mlp(shape, args.latent_dim, args.hidden, likelihood="bernoulli")
        options = {"epochs": epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed, "device": device}
        result = pvae.fit(model.model, model.guide, data.train_x, transform=data.transform, **options)
        if result.stopped == "signal":
            return 128 + (result.signal or 0)
        print(f"{name}: {epochs} epochs in {result.history['seconds'].sum():.0f} s")
        codes[name] = encode(model, images), encode(model, queries)

    found, rows, pixels = {}, {}, None
    for name in NAMES:
        found[name], seconds = search(*codes[name], args.num_neighbors)
        right = (data.train_y[torch.from_numpy(found[name])] == labels[:, None]).double().mean(1).numpy()
        pixels = right if pixels is None else pixels
        rows[name] = {
            "numbers": codes[name][0].shape[1],
            "precision": mean_and_error(right),
            "over_pixels": mean_and_error(right - pixels),
            "seconds_per_query": seconds / len(queries),
        }
    print(f"\n{len(queries)} queries among {len(images)} images:\n\n{table(rows, args.num_neighbors)}")
    report = {
        "dataset": data.name,
        "binarization": data.binarization,
        "num_index": len(images),
        "num_queries": len(queries),
        "num_neighbors": args.num_neighbors,
        "latent_dim": args.latent_dim,
        "epochs": epochs,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.cuda else "cpu",
        "versions": versions() | {"pvae": pvae.__version__},
        "search": rows,
        "seconds": time.perf_counter() - start,
    }
    write_file(args.output_dir / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    some = slice(args.num_shown)
    shown = {name: places[some] for name, places in found.items()}
    draw(queries[some], images, shown, labels[some], data.train_y).savefig(args.output_dir / "neighbors.png", dpi=150)
    print(f"\nreport.json and neighbors.png are in {args.output_dir}/")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the example; exits with 2 for a bad command line, a missing GPU or an output folder that cannot be made, and
    with 1 for any other error of pvae.
    """
    parser = arguments()
    args = parser.parse_args(argv)
    if args.cuda and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: error: --cuda: no CUDA device was found; leave it out to run on the CPU\n")
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: --output-dir: {error}\n")
    try:
        return run(args)
    except (pvae.PVAEError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
