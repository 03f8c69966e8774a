"""Train a VAE on MNIST by SVI, estimate log p(x), and show what the guide alone and the prior find of it.

    python examples/mnist_svi.py                  # MNIST if it can be had, else scikit-learn's digits
    python examples/mnist_svi.py --cuda           # everything on the GPU
    python examples/mnist_svi.py --checkpoint run # goes on from there if it is stopped and started again
    torchrun --nproc-per-node=2 examples/mnist_svi.py     # two processes share each batch, and the test images
    python examples/mnist_svi.py --help

Prints one table and writes report.json and four figures to the output folder; that it can is tried before training.
Ctrl-C, or SIGTERM, ends training after the step at hand, with exit code 130 or 143.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pvae
from pvae.persistence import versions, write_file

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun says
FIRST = os.environ.get("RANK", "0") == "0"  # the one that prints and writes
PRIOR_FACTOR = 100  # how many times the guide's samples the prior gets for its second try
REPETITIONS = 20  # of the estimates in the last figure
COUNTS = ("poisson", "negative-binomial")
PARTS = ("likelihood", "prior", "posterior")
FIGURES = ("learning_curve", "reconstructions", "samples", "guide_and_prior")
ROWS = {
    "auto": "log p(x)",
    "guide": "log p(x) by the guide alone",
    "prior": "log p(x) by the prior alone",
    f"prior_{PRIOR_FACTOR}x": f"  with {PRIOR_FACTOR} times the samples",
}


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type of argument: a whole number within these bounds."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text[:20]) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        if int(text[:20]) > most:
            raise argparse.ArgumentTypeError(f"must be a whole number of at most {most}, got {text[:20]!r}")
        return int(text)

    return number


count = whole(1, 2**31 - 1)
width = whole(1, 2**14)  # a square matrix of that size takes 1 GiB
seed = whole(0, 2**63 - 1)


def rate(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train a VAE by SVI, estimate log p(x), by the guide and by the prior alone too, and compare."
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
    add("--prior", choices=list(pvae.priors.NAMED), default="standard-normal", help="p(z) (default: standard-normal)")
    add("--posterior", choices=list(pvae.posteriors.NAMED), default="diagonal", help="q(z|x) (default: diagonal)")
    add("--network", choices=["mlp", "conv"], default="mlp", help="kind of both networks (default: mlp)")
    add("--latent-dim", type=width, default=50, metavar="D", help="dimensions of z (default: 50)")
    add("--hidden", type=width, nargs="+", metavar="H", help="widths of hidden layers (default: 400, for conv 256)")
    add(
        "--epochs",
        type=count,
        metavar="E",
        help="passes over the training data (default: 10 for MNIST, 200 for digits)",
    )
    add("--batch-size", type=count, default=256, metavar="B", help="images in a batch (default: 256)")
    add("--lr", type=rate, default=1e-3, help="Adam's learning rate (default: 0.001)")
    add(
        "--num-samples",
        type=count,
        default=1000,
        metavar="K",
        help=f"samples for each image, or more where needed (default: 1000); the prior gets {PRIOR_FACTOR} K as well",
    )
    add(
        "--num-eval",
        type=count,
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

    def suited(data: pvae.datasets.Dataset) -> pvae.datasets.Dataset:
        """The data as the likelihood takes them: pixels as levels of 8 bits, or as counts of 0 to 255."""
        if args.likelihood.startswith("discretized"):
            return replace(data, train_x=(255 * data.train_x).round() / 255, test_x=(255 * data.test_x).round() / 255)
        if args.likelihood in COUNTS:
            return replace(data, train_x=(255 * data.train_x).round(), test_x=(255 * data.test_x).round())
        return data

    if args.dataset != "digits":
        try:
            return suited(pvae.datasets.mnist(args.data_dir, binarization("dynamic"), seed=args.seed))
        except pvae.DatasetError as error:
            if args.dataset == "mnist":
                raise
            print(f"*** NO MNIST: USING SCIKIT-LEARN'S 8 x 8 DIGITS INSTEAD. {error} ***", flush=True)
    return suited(pvae.datasets.digits(binarization("threshold"), seed=args.seed))


def build(args: argparse.Namespace, image_shape: tuple[int, ...]) -> pvae.VAE:
    """The VAE asked for, for images of shape ``(H, W)``; the convolutional one sees them as ``(1, H, W)``."""
    parts = {name: getattr(args, name) for name in PARTS}
    if args.network == "conv":
        hidden = args.hidden or [256]
        if len(hidden) != 1:
            raise pvae.ArgumentError(f"--hidden takes one width with --network conv, got {hidden}.")
        return pvae.VAE.conv((1, *image_shape), args.latent_dim, hidden=hidden[0], **parts)
    return pvae.VAE.mlp(image_shape, args.latent_dim, args.hidden or [400], **parts)


def above(estimate: pvae.EvidenceEstimate) -> float:
    """The share of data with a k-hat above 0.7; nan where there are too few samples for a k-hat."""
    return math.nan if estimate.khat.isnan().any() else (estimate.khat > 0.7).double().mean().item()


def summary(estimate: pvae.EvidenceEstimate) -> dict[str, Any]:
    """What the report says of one estimate; of the one that tries several proposals also what came of that."""
    told = {
        "mean": estimate.mean,
        "std_error": estimate.mean_std_error,
        "data_std_error": estimate.data_std_error,
        "num_samples": estimate.num_samples,
        "samples_median": estimate.samples.median().item(),
        "ess_median": estimate.ess.median().item(),
        "khat_median": estimate.khat.median().item(),
        "khat_above_0.7": above(estimate),
        "seconds": estimate.seconds,
    }
    if estimate.proposal == "auto":
        told |= {"unresolved": estimate.unresolved.double().mean().item(), "stages": dict(Counter(estimate.stage))}
    return told


def as_json(report: Mapping[str, Any]) -> str:
    """The report as text. JSON has no nan and no infinity: they become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(report), indent=2, allow_nan=False) + "\n"


def estimates(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The report's numbers of each estimate, null read as nan."""
    numbers = report["log_px"]
    return {name: {k: math.nan if v is None else v for k, v in numbers[name].items()} for name in ROWS}


def table(report: Mapping[str, Any]) -> str:
    """The ELBO, then a line for each estimate, with what is to be known of it."""
    head = f"{'nats per datum':28}  samples     mean  std error      ESS   k-hat  k-hat > 0.7  seconds"
    lines = [head, "-" * len(head)]
    every = estimates(report)
    elbo, elbo_std_error = report["elbo_of_evaluated"], report["elbo_of_evaluated_std_error"]

    def nats(number: float) -> str:
        return f" {number:.2f}".rjust(9)

    lines.append(f"{'ELBO':28}{every['guide']['num_samples']:9}{nats(elbo)}{elbo_std_error:11.3f}")
    for name, e in every.items():
        lines.append(
            f"{ROWS[name]:28}{e['samples_median']:9}{nats(e['mean'])}{e['std_error']:11.3f}{e['ess_median']:9.1f}"
            f"{e['khat_median']:8.2f}{e['khat_above_0.7']:13.0%}{e['seconds']:9.1f}{note(e)}"
        )
    return "\n".join(lines)


def note(e: Mapping[str, float]) -> str:
    """How much of an estimate is unresolved, or that k-hat says that most of it cannot be trusted."""
    if "unresolved" in e:
        return f"  <- {e['unresolved']:.1%} unresolved" if e["unresolved"] else "  <- all resolved"
    return "  <- only a lower bound" * (e["khat_above_0.7"] > 0.5)


def sentence(report: Mapping[str, Any]) -> str:
    """What the table shows, in plain words and only as far as it shows it."""
    auto, guide, prior, long_prior = estimates(report).values()

    def below(e: Mapping[str, float], best: Mapping[str, float]) -> float:
        """Nats; 0 where they are within two standard errors."""
        gap = best["mean"] - e["mean"]
        return 0.0 if abs(gap) < max(0.05, 2 * math.hypot(best["std_error"], e["std_error"])) else gap

    gap, long_gap, lost = below(prior, guide), below(long_prior, guide), below(guide, auto)
    counted = (
        f"about {guide['ess_median']:.0f} of the guide's {guide['num_samples']} samples counted for an image, "
        f"and {prior['ess_median']:.0f} of the prior's"
    )
    left = (
        f"with {auto['unresolved']:.1%} of the images unresolved" if auto["unresolved"] else "with no image unresolved"
    )
    found = f"{abs(lost):.2f} nats {'less' if lost > 0 else 'more'}" if lost else "the same"
    best = f"log p(x) is {auto['mean']:.2f} nats in the mean, {left}. The guide alone finds {found}."
    if gap == 0:
        return f"{best} Guide and prior agree, but {counted}."
    if gap < 0:
        return f"{best} The prior finds {-gap:.2f} nats more of log p(x) than the guide: {counted}."
    why = ", because" if guide["ess_median"] > prior["ess_median"] else ":"
    rest = f"still misses {long_gap:.1f}" if long_gap > 0 else "catches up"
    return (
        f"{best} The guide finds {gap:.1f} nats more of log p(x) than the prior{why} {counted}; "
        f"with {PRIOR_FACTOR} times as many, the prior {rest}."
    )


def origin(report: Mapping[str, Any]) -> str:
    """The run that a figure is of; it is kept in its file."""
    return f"{report['dataset']}, {report['binarization']}, seed {report['seed']}, ELBO {report['elbo']:.6f}"


def draw_figures(
    vae: pvae.VAE, result: pvae.FitResult, x: torch.Tensor, place: int, report: dict, folder: Path
) -> bool:
    """Writes the four figures, the last one about image ``place`` of ``x``; says why where one fails, and goes on."""
    import matplotlib.pyplot as plt

    def draw_reconstructions() -> None:
        pvae.plots.reconstructions(x[:10], vae.reconstruct(x[:10]))

    def draw_samples() -> None:
        pvae.plots.samples(vae.sample(64, seed=report["seed"], mean=True)).set_title("E[x | z] for z from the prior")

    most = min(10 * report["log_px"]["guide"]["num_samples"], 10_000)
    compare = partial(draw_guide_and_prior, vae, x[place : place + 1], most, report["seed"])
    curve = partial(pvae.plots.learning_curve, result.history)
    failed = False
    for name, draw in zip(FIGURES, (curve, draw_reconstructions, draw_samples, compare), strict=True):
        try:
            draw()
            picture = io.BytesIO()
            plt.savefig(picture, format="png", dpi=200, metadata={"Comment": origin(report)})
            write_file(folder / f"{name}.png", picture.getvalue())
        except Exception as error:  # one figure is not worth the others
            failed = True
            print(f"error: no {name}.png: {error}", file=sys.stderr)
        finally:
            plt.close("all")
    return not failed


def draw_guide_and_prior(vae: pvae.VAE, x: torch.Tensor, num_samples: int, seed: int) -> None:
    """Draws where samples for one image fall, how well they explain it, and what estimates they make, repeatedly."""

    def draws(proposal: str) -> torch.Tensor:
        options = {"num_samples": num_samples * REPETITIONS, "seed": seed, "device": x.device, "distributed": False}
        every = pvae.log_weights(vae.model, vae.guide, x, proposal=proposal, **options)
        return every.reshape(REPETITIONS, num_samples).T

    weights = {"prior": draws("prior"), "guide": draws("guide")}
    # As narrow as a phone, so that the letters stay large on one.
    figure, axes = pvae.plots.subplots(3, figsize=(4.5, 10.5), height_ratios=[1.2, 1, 1.1])
    points, dims = latent_samples(vae, x, seed)
    pvae.plots.latent_plane(points, axes[0], names=(f"$z_{{{dims[0]}}}$", f"$z_{{{dims[1]}}}$"))
    pvae.plots.images(x, axes[0].inset_axes((0.02, 0.74, 0.24, 0.24)))
    pvae.plots.weight_histogram({name: w.flatten() for name, w in weights.items()}, axes[1])
    pvae.plots.running_estimate(weights, axes[2], elbo=weights["guide"].mean().item())
    axes[2].set_title(f"What they say log p(x) is:\nmedian and middle 80% of {REPETITIONS} repetitions")
    figure.suptitle(headline(weights), fontweight="bold", color=axes[0].title.get_color())


def headline(log_weights: Mapping[str, torch.Tensor]) -> str:
    """Which estimate from all K draws is higher, where the bands of repetitions, shape ``(K, R)``, lie apart."""
    num_samples = len(log_weights["guide"])
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def at_the_end(name: str) -> list[float]:
        estimate = log_weights[name].logsumexp(0) - math.log(num_samples)
        return estimate.quantile(levels, interpolation="nearest").tolist()

    (low, guide, high), (prior_low, prior, prior_high) = at_the_end("guide"), at_the_end("prior")
    more = f"{abs(guide - prior):.1f} nats more from {num_samples:,} samples"
    if low > prior_high:
        return f"Why the guide beats the prior:\n{more}"
    if prior_low > high:
        return f"Here the prior beats the guide:\n{more}"
    return f"Guide and prior agree\nfrom {num_samples:,} samples"


def latent_samples(
    vae: pvae.VAE, x: torch.Tensor, seed: int, num_samples: int = 1000
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Draws of z from prior and guide in the two dimensions where the guide is narrowest: where x says most."""
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        prior, guide = vae.prior().sample((num_samples,)), vae.encode(x).sample((num_samples,))[:, 0]
        dims = guide.std(0).argsort()[[0, min(1, vae.latent_dim - 1)]]  # the same one twice if there is only one
    return {"prior": prior[:, dims], "guide": guide[:, dims]}, dims.tolist()


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


def ready(folder: Path) -> None:
    """Tries what the end of a run needs, so that no work is done which cannot be kept."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # files only: works without a screen
        import matplotlib.pyplot
    except Exception as error:  # a broken installation fails in many ways
        raise pvae.PVAEError(f"to draw takes matplotlib, which cannot be imported: {error}.") from error
    probe = folder / ".probe.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(probe, os.urandom(2**20))  # more than the report and the figures take
    except OSError as error:
        raise pvae.ArgumentError(f"--output-dir: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    for path in (folder / name for name in ("report.json", *(f"{figure}.png" for figure in FIGURES))):
        if path.is_dir():
            raise pvae.ArgumentError(f"--output-dir: {path} is a folder, where a file will be written. Move it away.")


def run(args: argparse.Namespace) -> int:
    """Trains, estimates, reports and draws; returns the exit code."""
    device = torch.device("cuda", torch.cuda.current_device()) if args.cuda else torch.device("cpu")
    start, cpu_start = time.perf_counter(), time.process_time()
    data = load_in_turn(args)
    torch.manual_seed(args.seed)
    vae = build(args, tuple(data.train_x.shape[1:])).to(device)
    train_x, test_x = (x.reshape(-1, *vae.event_shape).to(device) for x in (data.train_x, data.test_x))
    shared = f", {PROCESSES} processes" if PROCESSES > 1 else ""
    print(f"{data.name}, {data.binarization} binarization, {len(train_x)} training images, on {device}{shared}")

    epochs = args.epochs or (10 if data.name == "mnist" else 200)
    result, train_seconds = train(vae, train_x, test_x, data.transform, epochs, args)
    if result.stopped == "signal":
        return 128 + (result.signal or 0)
    chosen = torch.randperm(len(test_x), generator=torch.Generator().manual_seed(args.seed))[: args.num_eval]
    x = test_x[chosen.to(device)]
    print(f"log p(x) of {len(x)} test images:\n")
    found = evidence(vae, x, args)
    guide = found["guide"]
    gap, place = (guide.log_px - found["prior"].log_px).nanmedian(0)
    if not FIRST:
        return 0

    as_asked = ("batch_size", "lr", "network", "latent_dim", *PARTS, "seed", "precision")
    report = {
        "dataset": data.name,
        "binarization": data.binarization,
        "num_train": len(train_x),
        "num_test": len(test_x),
        "num_eval": len(x),
        "epochs": epochs,
        **{name: getattr(args, name) for name in as_asked},
        "device": torch.cuda.get_device_name(device) if args.cuda else "cpu",
        "threads": torch.get_num_threads(),
        "processes": PROCESSES,
        "versions": versions() | {"pvae": pvae.__version__},
        "train_seconds": train_seconds,
        "compile_seconds": result.compile_seconds,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "elbo": result.history["validation_elbo"][-1],
        "elbo_of_evaluated": guide.elbo.mean().item(),
        "elbo_of_evaluated_std_error": guide.elbo_std_error.norm().item() / guide.num_data,
        "log_px": {name: summary(estimate) for name, estimate in found.items()},
        "median_gap": {"test_image": chosen[place].item(), "nats": gap.item()},
        "history": {name: values.tolist() for name, values in result.history.items()},
    }
    kept = keep(report, args.output_dir)
    print(f"{table(report)}\n\n{textwrap.fill(sentence(report), 100)}", flush=True)
    kept &= draw_figures(vae, result, x, int(place), report, args.output_dir)
    if kept:
        print(f"\nreport.json and figures are in {args.output_dir}/")
    return 0 if kept else 1


def train(
    vae: pvae.VAE,
    x: torch.Tensor,
    test_x: torch.Tensor,
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
    epochs: int,
    args: argparse.Namespace,
) -> tuple[pvae.FitResult, float]:
    """What training gave, with its seconds; says how it ended."""
    options = {"epochs": epochs, "batch_size": args.batch_size, "lr": args.lr, "precision": args.precision}
    options |= {"seed": args.seed, "checkpoint": args.checkpoint, "resume": "auto" if args.checkpoint else "never"}
    start = time.perf_counter()
    result = pvae.fit(vae.model, vae.guide, x, transform=transform, validation=test_x, device=x.device, **options)
    seconds = time.perf_counter() - start
    if result.stopped == "signal":
        kept = f"; {result.checkpoint} holds it, and the same command goes on from there" if args.checkpoint else ""
        print(f"stopped by a signal after {len(result.history['seconds'])} of {epochs} epochs{kept}")
    else:
        elbo = result.history["validation_elbo"][-1]
        compiling = f", {result.compile_seconds:.0f} s of it compiling" if result.compile_seconds else ""
        print(f"{epochs} epochs in {seconds:.0f} s{compiling}, ELBO of all {len(test_x)} test images: {elbo:.2f}")
    return result, seconds


def evidence(vae: pvae.VAE, x: torch.Tensor, args: argparse.Namespace) -> dict[str, pvae.EvidenceEstimate]:
    """The estimates of the table, by the names of its rows."""

    def of(proposal: str, factor: int = 1) -> pvae.EvidenceEstimate:
        options = {"num_samples": factor * args.num_samples, "proposal": proposal, "progress": True}
        return pvae.log_evidence(vae.model, vae.guide, x, seed=args.seed, device=x.device, **options)

    found = of("auto"), of("guide"), of("prior"), of("prior", PRIOR_FACTOR)
    return dict(zip(ROWS, found, strict=True))


def keep(report: Mapping[str, Any], folder: Path) -> bool:
    """Writes report.json, or prints it where that cannot be done: minutes or days of work are in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "report.json", as_json(report).encode())
    except (pvae.PVAEError, OSError) as error:
        print(f"error: no report.json: {error}\n{as_json(report)}", file=sys.stderr, flush=True)
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Runs the example; exits with 2 for a bad command line, a missing GPU or results that could not be kept, with 1
    for any other error of pvae, and with 130 or 143 where training was stopped by a signal.
    """
    parser = arguments()
    args = parser.parse_args(argv)
    if args.cuda and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: error: --cuda: no CUDA device was found; leave it out to run on the CPU\n")
    try:
        if FIRST:
            ready(args.output_dir)
    except pvae.PVAEError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    try:
        with processes(args):
            return run(args)
    except (pvae.PVAEError, OSError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
