"""Train a VAE on MNIST by SVI, estimate log p(x) three ways, and show why the guide beats the prior.

    python examples/mnist_svi.py                  # MNIST if it can be had, else scikit-learn's digits
    python examples/mnist_svi.py --cuda           # everything on the GPU
    python examples/mnist_svi.py --checkpoint run # goes on from there if it is stopped and started again
    torchrun --nproc-per-node=2 examples/mnist_svi.py     # two processes share each batch, and the test images
    python examples/mnist_svi.py --help

Prints one table and writes report.json and four figures to the output folder. Ctrl-C, or SIGTERM, ends training after
the step at hand, with exit code 130 or 143.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

import pvae

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun says
FIRST = os.environ.get("RANK", "0") == "0"  # the one that prints and writes
PRIOR_FACTOR = 100  # how many times the guide's samples the prior gets for its second try


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def rate(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a VAE by SVI, estimate log p(x) by the guide, refined guides and the prior, and compare."
    )
    add = parser.add_argument
    add("--cuda", action="store_true", help="train and evaluate on the GPU; an error if there is none")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of matrix products in training")
    add(
        "--dataset",
        choices=["auto", "mnist", "digits"],
        default="auto",
        help="auto (default): MNIST if it is on disk or can be downloaded, else scikit-learn's digits",
    )
    add(
        "--data-dir",
        type=Path,
        help="folder with MNIST, or to download it to (default: $PVAE_DATA, else a cache folder)",
    )
    add(
        "--binarization",
        choices=pvae.datasets.BINARIZATIONS,
        help="how bits are made of grey levels (default: dynamic for MNIST, threshold for digits, none for Gaussians)",
    )
    add("--likelihood", choices=list(pvae.likelihoods.NAMED), default="bernoulli", help="p(x|z) (default: bernoulli)")
    add("--network", choices=["mlp", "conv"], default="mlp", help="kind of both networks (default: mlp)")
    add("--latent-dim", type=positive, default=50, metavar="D", help="dimensions of z (default: 50)")
    add("--hidden", type=positive, nargs="+", metavar="H", help="widths of hidden layers (default: 400, for conv 256)")
    add(
        "--epochs",
        type=positive,
        metavar="E",
        help="passes over the training data (default: 10 for MNIST, 200 for digits)",
    )
    add("--batch-size", type=positive, default=256, metavar="B", help="images in a batch (default: 256)")
    add("--lr", type=rate, default=1e-3, help="Adam's learning rate (default: 0.001)")
    add(
        "--num-samples",
        type=positive,
        default=1000,
        metavar="K",
        help=f"samples for each image (default: 1000); the prior then gets {PRIOR_FACTOR} K as well",
    )
    add(
        "--num-eval",
        type=positive,
        default=1000,
        metavar="N",
        help="test images to estimate log p(x) of (default: 1000)",
    )
    add("--seed", type=seed, default=0, help="of weights, shuffling, noise, bits and the choice of images (default: 0)")
    add(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="write a checkpoint there after each epoch, and go on from the newest one if there is any",
    )
    add("--output-dir", type=Path, default=Path("results"), help="for report.json and the figures (default: results)")
    return parser


def load(args: argparse.Namespace) -> pvae.datasets.Dataset:
    """The dataset asked for; "auto" says aloud when it falls back."""

    def binarization(default: str) -> str:
        return args.binarization or (default if args.likelihood == "bernoulli" else "none")

    if args.dataset != "digits":
        try:
            return pvae.datasets.mnist(args.data_dir, binarization("dynamic"), seed=args.seed)
        except pvae.DatasetError as error:
            if args.dataset == "mnist":
                raise
            print(f"*** NO MNIST: USING SCIKIT-LEARN'S 8 x 8 DIGITS INSTEAD. {error} ***", flush=True)
    return pvae.datasets.digits(binarization("threshold"), seed=args.seed)


def build(args: argparse.Namespace, image_shape: tuple[int, ...]) -> pvae.VAE:
    """The VAE asked for, for images of shape ``(H, W)``; the convolutional one sees them as ``(1, H, W)``."""
    if args.network == "conv":
        hidden = args.hidden or [256]
        if len(hidden) != 1:
            raise pvae.ArgumentError(f"--hidden takes one width with --network conv, got {hidden}.")
        return pvae.VAE.conv((1, *image_shape), args.latent_dim, hidden=hidden[0], likelihood=args.likelihood)
    return pvae.VAE.mlp(image_shape, args.latent_dim, args.hidden or [400], args.likelihood)


def above(estimate: pvae.EvidenceEstimate) -> float:
    """The share of data with a k-hat above 0.7; nan where there are too few samples for a k-hat."""
    return math.nan if estimate.khat.isnan().any() else (estimate.khat > 0.7).double().mean().item()


def summary(estimate: pvae.EvidenceEstimate) -> dict[str, float | int | None]:
    """What the report says of one estimate. JSON has no nan and no infinity: they become null."""
    numbers = {
        "mean": estimate.mean,
        "std_error": estimate.mean_std_error,
        "data_std_error": estimate.data_std_error,
        "num_samples": estimate.num_samples,
        "ess_median": estimate.ess.median().item(),
        "khat_median": estimate.khat.median().item(),
        "khat_above_0.7": above(estimate),
        "seconds": estimate.seconds,
    }
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def table(rows: list[tuple[str, pvae.EvidenceEstimate]]) -> str:
    """The ELBO, then a line for each estimate, flagged where k-hat says that most of it cannot be trusted."""
    guide = rows[0][1]
    elbo_std_error = guide.elbo_std_error.norm().item() / guide.num_data
    head = f"{'nats per datum':28}  samples     mean  std error      ESS   k-hat  k-hat > 0.7  seconds"
    lines = [head, "-" * len(head)]
    lines.append(f"{'ELBO':28}{guide.num_samples:9}{guide.elbo.mean().item():9.2f}{elbo_std_error:11.3f}")
    for name, e in rows:
        bad = above(e)
        lines.append(
            f"{name:28}{e.num_samples:9}{e.mean:9.2f}{e.mean_std_error:11.3f}{e.ess.median().item():9.1f}"
            f"{e.khat.median().item():8.2f}{bad:13.0%}{e.seconds:9.1f}" + "  <- only a lower bound" * (bad > 0.5)
        )
    return "\n".join(lines)


def sentence(
    guide: pvae.EvidenceEstimate,
    refined: pvae.EvidenceEstimate,
    prior: pvae.EvidenceEstimate,
    long_prior: pvae.EvidenceEstimate,
) -> str:
    """What the table shows, in plain words and only as far as it shows it."""
    gap, long_gap = guide.mean - prior.mean, guide.mean - long_prior.mean
    counted = (
        f"about {guide.ess.median().item():.0f} of the guide's {guide.num_samples} samples counted for an image, "
        f"and {prior.ess.median().item():.0f} of the prior's"
    )
    gain = refined.mean - guide.mean
    found = f"finds {gain:.2f} nats more than the guide" if gain >= 0.05 else "finds the same as the guide"
    fitted = f"A Gaussian fitted to each image {found}, with {refined.ess.median().item():.0f} samples that count."
    if gap < 0.05:
        return f"Guide and prior agree, but {counted}. {fitted}"
    rest = f"still misses {long_gap:.1f}" if long_gap >= 0.05 else "catches up"
    return (
        f"The guide finds {gap:.1f} nats more of log p(x) than the prior, because {counted}; "
        f"with {PRIOR_FACTOR} times as many, the prior {rest}. {fitted}"
    )


def draw_figures(vae: pvae.VAE, result: pvae.FitResult, x: torch.Tensor, args: argparse.Namespace) -> None:
    """Writes the four figures. ``x`` are the evaluated test images; the last figure is about the first of them."""
    import matplotlib

    matplotlib.use("Agg")  # files only: works without a screen
    import matplotlib.pyplot as plt

    def save(name: str) -> None:
        plt.savefig(args.output_dir / f"{name}.png", dpi=150)
        plt.close("all")

    pvae.plots.learning_curve(result.history)
    save("learning_curve")

    few = x[:10]
    _, ax = plt.subplots(figsize=(8, 2.2), layout="constrained")
    pvae.plots.reconstructions(few, vae.reconstruct(few), ax)
    save("reconstructions")

    _, ax = plt.subplots(figsize=(5, 5.3), layout="constrained")
    pvae.plots.images(vae.sample(64, seed=args.seed, mean=True), ax).set_title("E[x | z] for z from the prior")
    save("samples")

    one = x[:1]

    def draws(proposal: str) -> torch.Tensor:
        options = {"num_samples": 20_000, "seed": args.seed, "device": x.device, "distributed": False}
        return pvae.log_weights(vae.model, vae.guide, one, proposal=proposal, **options)[:, 0]

    weights = {"prior": draws("prior"), "guide": draws("guide")}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    pvae.plots.latent_plane(latent_samples(vae, one, args.seed), axes[0])
    pvae.plots.weight_histogram(weights, axes[1])
    pvae.plots.running_estimate(weights, axes[2], elbo=weights["guide"].mean().item())
    figure.suptitle("Why the guide beats the prior: one test image, 20,000 samples from each")
    pvae.plots.images(one, axes[0].inset_axes((0.02, 0.74, 0.24, 0.24)))
    save("why_the_guide_beats_the_prior")


def latent_samples(vae: pvae.VAE, x: torch.Tensor, seed: int, num_samples: int = 1000) -> dict[str, torch.Tensor]:
    """Draws of z from prior and guide, in the two dimensions where the guide is narrowest: where x says most."""
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        qz = vae.encode(x)
        dims = qz.stddev[0].argsort()[[0, min(1, vae.latent_dim - 1)]]  # the same one twice if there is only one
        prior, guide = vae.prior().sample((num_samples,)), qz.sample((num_samples,))[:, 0]
    return {"prior": prior[:, dims], "guide": guide[:, dims]}


@contextlib.contextmanager
def processes(args: argparse.Namespace) -> Iterator[None]:
    """A block in which the processes that torchrun started work together; only the first one prints."""
    if PROCESSES == 1:
        yield
        return
    if args.cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A process that hangs is given up after this long; one that dies is noticed at once.
    dist.init_process_group("nccl" if args.cuda else "gloo", timeout=timedelta(minutes=5))
    try:
        with contextlib.ExitStack() as stack:
            if not FIRST:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
    finally:
        dist.destroy_process_group()


def load_in_turn(args: argparse.Namespace) -> pvae.datasets.Dataset:
    """The dataset; the first process downloads it if that has to be done."""
    if PROCESSES == 1:
        return load(args)
    if not FIRST:
        dist.barrier()
    data = load(args)
    if FIRST:
        dist.barrier()
    return data


def run(args: argparse.Namespace) -> int:
    """Trains, estimates, reports and draws; returns the exit code."""
    device = torch.device("cuda", torch.cuda.current_device()) if args.cuda else torch.device("cpu")
    if FIRST:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    data = load_in_turn(args)
    epochs = args.epochs or (10 if data.name == "mnist" else 200)

    torch.manual_seed(args.seed)
    vae = build(args, tuple(data.train_x.shape[1:])).to(device)
    train_x, test_x = (x.reshape(-1, *vae.event_shape).to(device) for x in (data.train_x, data.test_x))
    shared = f", {PROCESSES} processes" if PROCESSES > 1 else ""
    print(f"{data.name}, {data.binarization} binarization, {len(train_x)} training images, on {device}{shared}")

    options = {"transform": data.transform, "epochs": epochs, "batch_size": args.batch_size, "lr": args.lr}
    options |= {"precision": args.precision, "checkpoint": args.checkpoint}
    options |= {"resume": "auto" if args.checkpoint else "never"}
    start = time.perf_counter()
    result = pvae.fit(vae.model, vae.guide, train_x, validation=test_x, seed=args.seed, device=device, **options)
    train_seconds = time.perf_counter() - start
    if result.stopped == "signal":
        kept = f"; {result.checkpoint} holds it, and the same command goes on from there" if args.checkpoint else ""
        print(f"stopped by a signal after {len(result.history['seconds'])} of {epochs} epochs{kept}")
        return 128 + (result.signal or 0)
    elbo = result.history["validation_elbo"][-1]
    compiling = f", {result.compile_seconds:.0f} s of it compiling" if result.compile_seconds else ""
    print(f"{epochs} epochs in {train_seconds:.0f} s{compiling}, ELBO of all {len(test_x)} test images: {elbo:.2f}")

    chosen = torch.randperm(len(test_x), generator=torch.Generator().manual_seed(args.seed))[: args.num_eval]
    x = test_x[chosen.to(device)]
    print(f"log p(x) of {len(x)} test images:\n")

    def evidence(proposal: str, factor: int = 1) -> pvae.EvidenceEstimate:
        k = factor * args.num_samples
        return pvae.log_evidence(
            vae.model, vae.guide, x, num_samples=k, proposal=proposal, seed=args.seed, device=device, progress=True
        )

    guide, refined = evidence("guide"), evidence("refined")
    prior, long_prior = evidence("prior"), evidence("prior", PRIOR_FACTOR)
    rows = [("log p(x) by the guide", guide), ("  refined for each image", refined), ("log p(x) by the prior", prior)]
    print(table([*rows, (f"  with {PRIOR_FACTOR} times the samples", long_prior)]))
    print("\n" + textwrap.fill(sentence(guide, refined, prior, long_prior), 100))
    if not FIRST:
        return 0

    report = {
        "dataset": data.name,
        "binarization": data.binarization,
        "num_train": len(train_x),
        "num_test": len(test_x),
        "num_eval": len(x),
        "epochs": epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "network": args.network,
        "latent_dim": args.latent_dim,
        "likelihood": args.likelihood,
        "seed": args.seed,
        "device": torch.cuda.get_device_name(device) if args.cuda else "cpu",
        "threads": torch.get_num_threads(),
        "processes": PROCESSES,
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("pvae", "torch", "pyro-ppl", "numpy")},
        "precision": args.precision,
        "train_seconds": train_seconds,
        "compile_seconds": result.compile_seconds,
        "elbo": elbo,
        "elbo_of_evaluated": guide.elbo.mean().item(),
        "log_px": {
            "guide": summary(guide),
            "refined": summary(refined),
            "prior": summary(prior),
            f"prior_{PRIOR_FACTOR}x": summary(long_prior),
        },
        "history": {name: values.tolist() for name, values in result.history.items()},
    }
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    draw_figures(vae, result, x, args)
    print(f"\nreport.json and figures are in {args.output_dir}/")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the example; exits with 2 for a bad command line or a missing GPU, with 1 for any other error of pvae, and
    with 130 or 143 where training was stopped by a signal.
    """
    parser = arguments()
    args = parser.parse_args(argv)
    if args.cuda and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: error: --cuda: no CUDA device was found; leave it out to run on the CPU\n")
    try:
        with processes(args):
            return run(args)
    except (pvae.PVAEError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
