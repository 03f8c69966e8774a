"""An autoencoder beside a VAE of the same networks: reconstruction, interpolation, generation, denoising.

    python examples/ae_vs_vae.py                    # scikit-learn's 8 x 8 digits
    python examples/ae_vs_vae.py --dataset mnist    # MNIST, which is downloaded where it is not on disk
    python examples/ae_vs_vae.py --cuda             # training on the GPU
    python examples/ae_vs_vae.py --help

Prints a table, and writes report.json and four figures to the output folder. An autoencoder has no p(z): to generate,
codes are drawn from a normal distribution with the mean and the covariance of the training images' codes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pvae
from pvae.persistence import versions, write_file

FIGURES = ("reconstruction", "interpolation", "generation", "denoising")
SHOWN = 10  # images in a row

Model = pvae.VAE | pvae.Autoencoder


def count(text: str) -> int:
    """A type of argument: a whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare what an autoencoder and a VAE are good for.")
    add = parser.add_argument
    add("--cuda", action="store_true", help="train on the GPU; an error if there is none")
    add("--dataset", choices=["digits", "mnist"], default="digits", help="(default: digits)")
    add("--data-dir", type=Path, help="folder with MNIST, or to download it to (default: $PVAE_DATA, else a cache)")
    add("--latent-dim", type=count, default=8, metavar="D", help="numbers in a code (default: 8)")
    add("--hidden", type=count, nargs="+", default=[256], metavar="H", help="widths of hidden layers (default: 256)")
    add("--epochs", type=count, metavar="E", help="passes over the training images (default: 60, for MNIST 10)")
    add("--batch-size", type=count, default=64, metavar="B", help="images in a batch (default: 64)")
    add("--lr", type=float, default=2e-3, help="Adam's learning rate (default: 0.002)")
    add("--flips", type=float, default=0.1, help="share of bits to flip, for the models to put right (default: 0.1)")
    add("--num-eval", type=count, default=1000, metavar="N", help="test images to measure on (default: 1000)")
    add("--seed", type=int, default=0, help="of weights, shuffling, noise and the choice of images (default: 0)")
    add("--output-dir", type=Path, default=Path("results"), help="for report.json and the figures (default: results)")
    return parser


def build(args: argparse.Namespace, shape: tuple[int, ...]) -> dict[str, Model]:
    """The models by name, with the same networks and the same initial weights where they have the same parts."""
    options: dict[str, Any] = {"latent_dim": args.latent_dim, "hidden": args.hidden, "likelihood": "bernoulli"}

    def make(kind: Callable[..., Model], **more: Any) -> Model:
        torch.manual_seed(args.seed)
        return kind(shape, **options, **more)

    return {
        "autoencoder": make(pvae.Autoencoder.mlp),
        "denoising AE": make(pvae.Autoencoder.mlp, noise=nn.Dropout(0.3)),
        "VAE": make(pvae.VAE.mlp),
    }


def encode(model: Model, x: Tensor) -> Tensor:
    """Codes of images: those of an autoencoder, or the means of q(z|x)."""
    with torch.no_grad():
        code = model.encode(x)
    return code if isinstance(code, Tensor) else code.mean


def decode(model: Model, z: Tensor) -> Tensor:
    """Mean images of codes ``(..., D)``."""
    with torch.no_grad():
        return model.decode(z).mean.cpu()


def generate(model: Model, codes: Tensor, seed: int) -> Tensor:
    """Mean images of new codes: from p(z), or from a normal distribution with the moments of these codes."""
    if isinstance(model, pvae.VAE):
        return model.sample(2 * SHOWN, seed=seed, mean=True).cpu()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2 * SHOWN, codes.shape[1], generator=generator).to(codes)
    # The root of a covariance that may be singular.
    values, vectors = torch.linalg.eigh(codes.T.cov().reshape(codes.shape[1], -1))
    return decode(model, codes.mean(0) + (noise * values.clamp(min=0).sqrt()) @ vectors.T)


def flip(x: Tensor, share: float, seed: int) -> Tensor:
    """Bits of which this share is wrong."""
    wrong = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)).to(x) < share
    return torch.where(wrong, 1 - x, x)


def wrong_bits(restored: Tensor, x: Tensor) -> dict[str, float]:
    """The share of bits that are wrong once they are rounded: the mean over images and its standard error."""
    wrong = ((restored > 0.5) != (x > 0.5)).flatten(1).double().mean(1)
    return {"mean": wrong.mean().item(), "std_error": wrong.std().item() / len(wrong) ** 0.5}


def draw(rows: dict[str, Tensor], title: str) -> Figure:
    """Images ``(M, H, W)`` by the names of their rows, ten to a row."""
    heights = [-(-len(images) // SHOWN) for images in rows.values()]
    figure = Figure(figsize=(7, 0.4 + 0.75 * sum(heights)), layout="constrained")
    for (name, images), ax in zip(
        rows.items(), figure.subplots(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0], strict=True
    ):
        pvae.plots.images(images, ax, columns=SHOWN)
        ax.set_axis_on()
        ax.set(xticks=[], yticks=[], xlabel="", title="")
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
        ax.spines[:].set_visible(False)
    figure.suptitle(title)
    return figure


def pictures(models: dict[str, Model], x: Tensor, train_x: Tensor, noisy: Tensor, seed: int) -> dict[str, Figure]:
    """The four figures, by their names."""
    shown, noisy = x[:SHOWN], noisy[:SHOWN]

    def each(picture: Callable[[Model], Tensor]) -> dict[str, Tensor]:
        return {name: picture(model) for name, model in models.items()}

    def between(model: Model) -> Tensor:
        ends = encode(model, x[:2])
        return decode(model, pvae.diagnostics.interpolate(ends[:1], ends[1:], SHOWN)[:, 0])

    return {
        "reconstruction": draw({"images": shown} | each(lambda m: m.reconstruct(shown).cpu()), "Test images, decoded"),
        "interpolation": draw(each(between), "From one test image to another, by their codes"),
        "generation": draw(each(lambda m: generate(m, encode(m, train_x), seed)), "New images"),
        "denoising": draw(
            {"images": shown, "with flips": noisy} | each(lambda m: m.reconstruct(noisy).cpu()),
            "Test images with wrong bits, decoded",
        ),
    }


def run(args: argparse.Namespace) -> int:
    """Trains, measures, reports and draws; returns the exit code."""
    device, start = "cuda" if args.cuda else "cpu", time.perf_counter()
    if not 0 < args.flips < 0.5:
        raise pvae.ArgumentError(f"--flips must lie between 0 and 0.5, got {args.flips}.")
    if args.dataset == "mnist":
        data = pvae.datasets.mnist(args.data_dir, "static", seed=args.seed)
    else:
        data = pvae.datasets.digits("threshold", seed=args.seed)
    epochs = args.epochs or (10 if args.dataset == "mnist" else 60)
    models = build(args, tuple(data.train_x.shape[1:]))
    for name, model in models.items():
        options = {"epochs": epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed, "device": device}
        result = pvae.fit(model.model, model.guide, data.train_x, **options)
        if result.stopped == "signal":
            return 128 + (result.signal or 0)
        print(f"{name}: {epochs} epochs in {result.history['seconds'].sum():.0f} s")

    order = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(data.test_x), generator=order)[: args.num_eval]
    some = torch.randperm(len(data.train_x), generator=order)[:10_000]
    x, y, train_x, train_y = (
        t.to(device) for t in (data.test_x[chosen], data.test_y[chosen], data.train_x[some], data.train_y[some])
    )
    noisy = flip(x, args.flips, args.seed)
    side = pvae.diagnostics.side_by_side(models, (train_x, train_y), (x, y), seed=args.seed)
    denoised = {"as they came": wrong_bits(noisy, x)}
    denoised |= {name: wrong_bits(model.reconstruct(noisy), x) for name, model in models.items()}
    print(f"\n{side}\n\nof {len(x)} test images with {args.flips:.0%} of their bits flipped, wrong bits:")
    for name, wrong in denoised.items():
        print(f"{name:16}{wrong['mean']:8.2%} +- {wrong['std_error']:.2%}")
    report = {
        "dataset": data.name,
        "binarization": data.binarization,
        "num_train": len(data.train_x),
        "num_eval": len(x),
        "latent_dim": args.latent_dim,
        "epochs": epochs,
        "flips": args.flips,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.cuda else "cpu",
        "versions": versions() | {"pvae": pvae.__version__},
        "models": {name: dict(row) for name, row in side.rows.items()},
        "wrong_bits": denoised,
        "seconds": time.perf_counter() - start,
    }
    write_file(args.output_dir / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    for name, figure in pictures(models, x, train_x, noisy, args.seed).items():
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
