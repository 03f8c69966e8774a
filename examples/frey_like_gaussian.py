"""Faces that turn and smile: real-valued images, a Gaussian likelihood, and two latents that can be seen at a glance.

    python examples/frey_like_gaussian.py
    python examples/frey_like_gaussian.py --cuda       # training and log p(x) on the GPU
    python examples/frey_like_gaussian.py --help

The images are drawn by this script, 28 x 20 as those of the Frey faces, from two factors and Gaussian noise. So what is
learned can be held against what is true: the noise, the factors, and the density of an image given both. Prints
log p(x) with its error, and writes report.json and four figures to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

import pvae
from pvae.persistence import versions, write_file

FIGURES = ("faces", "manifold", "codes", "learning_curve")
FACTORS = ("turn", "smile")
SHAPE = (28, 20)


def count(text: str) -> int:
    """A type of argument: a whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A type of argument: a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fit a VAE with two latents to real-valued images of faces.")
    add = parser.add_argument
    add("--cuda", action="store_true", help="train and evaluate on the GPU; an error if there is none")
    add(
        "--num-images", type=count, default=1965, metavar="N", help="to draw, a fifth of them for tests (default: 1965)"
    )
    add("--noise", type=positive, default=0.05, help="standard deviation of the noise; images reach 1 (default: 0.05)")
    add("--hidden", type=count, nargs="+", default=[200], metavar="H", help="widths of hidden layers (default: 200)")
    add("--epochs", type=count, default=60, metavar="E", help="passes over the training images (default: 60)")
    add("--batch-size", type=count, default=64, metavar="B", help="images in a batch (default: 64)")
    add("--lr", type=positive, default=3e-3, help="Adam's learning rate (default: 0.003)")
    add("--num-samples", type=count, default=1000, metavar="K", help="samples for each image (default: 1000)")
    add("--num-eval", type=count, default=200, metavar="M", help="test images to take log p(x) of (default: 200)")
    add("--seed", type=int, default=0, help="of images, weights, shuffling and noise (default: 0)")
    add("--output-dir", type=Path, default=Path("results"), help="for report.json and the figures (default: results)")
    return parser


def draw_faces(factors: Tensor) -> Tensor:
    """Images without noise, ``(N, 28, 20)``, of factors in (-1, 1), ``(N, 2)``: smooth functions of both."""
    y, x = torch.meshgrid(torch.linspace(-1.4, 1.4, SHAPE[0]), torch.linspace(-1, 1, SHAPE[1]), indexing="ij")
    turn, smile = factors[:, 0, None, None], factors[:, 1, None, None]
    head = torch.sigmoid(8 * (1 - (x / 0.85) ** 2 - (y / 1.25) ** 2))
    light = 0.7 + 0.2 * turn * x
    middle = 0.3 * turn  # where the nose is

    def spot(across: Tensor, down: float, width: float, height: float) -> Tensor:
        return torch.exp(-(((x - across) / width) ** 2) - ((y - down) / height) ** 2)

    side = (x - middle) / 0.45  # of the mouth, whose corners are at -1 and 1
    mouth = torch.exp(-(((y - 0.65 + 0.3 * smile * (side**2 - 0.5)) / 0.1) ** 2)) * torch.sigmoid(8 * (1 - side**2))
    eyes = spot(middle - 0.35, -0.4, 0.14, 0.12) + spot(middle + 0.35, -0.4, 0.14, 0.12)
    nose = spot(middle + 0.1 * turn, 0.1, 0.1, 0.25)
    return head * (light - 0.6 * eyes - 0.25 * nose - 0.5 * mouth)


def make_data(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise, ``(N, 28, 20)``, the same without, and their factors, ``(N, 2)``."""
    generator = torch.Generator().manual_seed(args.seed)
    factors = 2 * torch.rand(args.num_images, 2, generator=generator) - 1
    faces = draw_faces(factors)
    return faces + args.noise * torch.randn(faces.shape, generator=generator), faces, factors


def explain(codes: Tensor, factors: Tensor, test_codes: Tensor, test_factors: Tensor) -> dict[str, float]:
    """How much of each factor's variance the ten nearest codes tell, at most 1."""
    found = KNeighborsRegressor(min(10, len(codes))).fit(codes.numpy(), factors.numpy()).predict(test_codes.numpy())
    left = (test_factors - torch.from_numpy(found)).square().mean(0) / test_factors.var(0, correction=0)
    return dict(zip(FACTORS, (1 - left).tolist(), strict=True))


def draw_codes(codes: Tensor, factors: Tensor) -> Figure:
    """Where test images lie in the plane of the latents, coloured by each factor."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    for name, values, ax in zip(FACTORS, factors.T, figure.subplots(1, 2, sharey=True), strict=True):
        points = ax.scatter(*codes.T, c=values, cmap="cividis", s=8, vmin=-1, vmax=1)
        figure.colorbar(points, ax=ax, label=name)
        ax.set(xlabel="$z_0$", aspect="equal")
    figure.axes[0].set_ylabel("$z_1$")
    figure.suptitle("E[z | x] of test images, by what they were made of")
    return figure


def as_seen(x: Tensor) -> Tensor:
    """Grey levels for `pvae.plots`, which draws ink on paper; these images are light on dark."""
    return 1 - x.clamp(0, 1)


def pictures(vae: pvae.VAE, x: Tensor, codes: Tensor, factors: Tensor, history: dict[str, Any]) -> dict[str, Figure]:
    """The four figures, by their names."""
    sizes = {"faces": (7, 2.2), "manifold": (5, 7), "learning_curve": (5, 3.5)}
    figures = {name: Figure(figsize=size, layout="constrained") for name, size in sizes.items()}
    axes = {name: figure.subplots() for name, figure in figures.items()}
    pvae.plots.reconstructions(as_seen(x[:10]), as_seen(vae.reconstruct(x[:10])), axes["faces"])
    pvae.plots.manifold(lambda z: as_seen(vae.decode(z).mean), axes["manifold"], size=10)
    pvae.plots.learning_curve(history, axes["learning_curve"])
    return figures | {"codes": draw_codes(codes, factors)}


def run(args: argparse.Namespace) -> int:
    """Trains, estimates, reports and draws; returns the exit code."""
    device, start = "cuda" if args.cuda else "cpu", time.perf_counter()
    if args.num_images < 10:
        raise pvae.ArgumentError(f"--num-images must be at least 10, got {args.num_images}.")
    images, faces, factors = make_data(args)
    split = args.num_images - args.num_images // 5
    (train_x, test_x), (train_f, test_f) = images.tensor_split([split]), factors.tensor_split([split])
    torch.manual_seed(args.seed)
    vae = pvae.VAE.mlp(SHAPE, latent_dim=2, hidden=args.hidden, likelihood="gaussian")
    options: dict[str, Any] = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    result = pvae.fit(vae.model, vae.guide, train_x, validation=test_x, seed=args.seed, device=device, **options)
    if result.stopped == "signal":
        return 128 + (result.signal or 0)
    x = test_x[: args.num_eval]
    estimate = pvae.log_evidence(vae.model, vae.guide, x, num_samples=args.num_samples, seed=args.seed, device=device)
    with torch.no_grad():
        codes, test_codes = (vae.encode(t).mean.cpu() for t in (train_x, test_x))
        learned = vae.decode(test_codes[:1]).stddev.mean().item()
    given = torch.distributions.Normal(faces[split:][: args.num_eval], args.noise).log_prob(x).flatten(1).sum(1)
    told = explain(codes, train_f, test_codes, test_f)
    more = given.mean().item() - estimate.mean
    print(
        f"{len(train_x)} training images, {args.epochs} epochs in {result.history['seconds'].sum():.0f} s\n\n"
        f"{estimate}\n\n"
        f"log p(x | both factors) is {given.mean():.3f} nats per datum, {more:.1f} more than log p(x): of these\n"
        f"some are what an image says of its factors, and the rest is what the model has not learned.\n"
        f"Noise: {learned:.4f} learned, {args.noise:.4f} true.\n"
        + "\n".join(f"Of the {name}'s variance the two codes tell {share:.1%}." for name, share in told.items())
    )
    report = {
        "num_train": len(train_x),
        "num_eval": len(x),
        "epochs": args.epochs,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.cuda else "cpu",
        "versions": versions() | {"pvae": pvae.__version__},
        "elbo": result.history["validation_elbo"][-1].item(),
        "log_px": {
            "mean": estimate.mean,
            "std_error": estimate.mean_std_error,
            "data_std_error": estimate.data_std_error,
            "num_samples": estimate.num_samples,
            "unresolved": estimate.unresolved.double().mean().item(),
        },
        "log_px_given_factors": given.mean().item(),
        "noise": {"true": args.noise, "learned": learned},
        "factors_from_codes": told,
        "seconds": time.perf_counter() - start,
    }
    write_file(args.output_dir / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    for name, figure in pictures(vae, x, test_codes, test_f, result.history).items():
        figure.savefig(args.output_dir / f"{name}.png", dpi=150)
    print(f"\nreport.json and figures are in {args.output_dir}/")
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
