"""log p(data) of somebody's Pyro model, which is no VAE: two regressions of counts, and the Bayes factor between them.

    python examples/any_pyro_model.py
    python examples/any_pyro_model.py --overdispersion 0     # counts that are Poisson
    python examples/any_pyro_model.py --cuda
    python examples/any_pyro_model.py --help

Counts are drawn by this script, more scattered than a Poisson's. Both models are plain Pyro with one of its automatic
guides, and know nothing of pvae. Prints log p(data) of each with its error, their difference, and what each predicts;
writes report.json and a figure to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure
from pyro import distributions as dist
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import pvae
from pvae.evidence import posterior_predictive
from pvae.evidence.proposals import Refined, StudentT
from pvae.persistence import versions, write_file

FIGURES = ("counts",)
SLOPES = (1.5, 0.6)  # the logarithm of the expected count at 0, and what it gains for each step
COLORS = {"Poisson": "#0072b2", "negative binomial": "#d55e00"}


def count(text: str) -> int:
    """A type of argument: a whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A type of argument: a number from 0 to 10."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 10, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare two Pyro models of counts by log p(data).")
    add = parser.add_argument
    add("--cuda", action="store_true", help="train and evaluate on the GPU; an error if there is none")
    add("--num-data", type=count, default=80, metavar="N", help="counts to draw (default: 80)")
    add("--overdispersion", type=share, default=0.3, help="variance of the rates around their mean (default: 0.3)")
    add("--epochs", type=count, default=600, metavar="E", help="steps of training (default: 600)")
    add("--num-samples", type=count, default=2000, metavar="K", help="draws of all latents (default: 2000)")
    add("--seed", type=int, default=0, help="of data, shuffling and noise (default: 0)")
    add("--output-dir", type=Path, default=Path("results"), help="for report.json and the figure (default: results)")
    return parser


def draw_counts(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """What counts depend on, ``(N,)``, and counts, ``(N,)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        x = torch.linspace(-1.5, 1.5, args.num_data)
        rate = (SLOPES[0] + SLOPES[1] * x).exp()
        if args.overdispersion:
            shape = torch.full_like(rate, 1 / args.overdispersion)
            rate = rate * torch.distributions.Gamma(shape, shape).sample()
        return x, torch.poisson(rate)


def poisson(x: Tensor, y: Tensor) -> None:
    """Counts as scattered as a Poisson's."""
    a, b = pyro.sample("a", dist.Normal(0.0, 2.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((a + b * x).exp()), obs=y)


def negative_binomial(x: Tensor, y: Tensor) -> None:
    """Counts with rates that scatter: their variance is ``mean + overdispersion mean^2``."""
    a, b = pyro.sample("a", dist.Normal(0.0, 2.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
    overdispersion = pyro.sample("overdispersion", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        concentration = 1 / overdispersion
        pyro.sample("y", dist.GammaPoisson(concentration, concentration * (-a - b * x).exp()), obs=y)


MODELS = {"Poisson": poisson, "negative binomial": negative_binomial}


def draw_predictions(x: Tensor, y: Tensor, predicted: dict[str, Tensor]) -> Figure:
    """The counts, and where each model expects 90% of new ones."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.plot(x, y, "o", color="black", markersize=3, label="counts")
    for name, draws in predicted.items():
        low, high = draws.quantile(torch.tensor([0.05, 0.95]).to(draws), 0)
        ax.fill_between(x, low, high, step="mid", color=COLORS[name], alpha=0.3, linewidth=0, label=f"{name}, 90%")
    ax.set(xlabel="x", ylabel="count")
    ax.legend(frameon=False)
    return figure


def run(args: argparse.Namespace) -> int:
    """Fits, estimates, compares and predicts; returns the exit code."""
    options: dict[str, Any] = {"device": "cuda" if args.cuda else "cpu"}
    data = x, y = draw_counts(args)
    estimates, predicted, scores = {}, {}, {}
    for number, (name, model) in enumerate(MODELS.items()):
        guide = AutoMultivariateNormal(model)
        training: dict[str, Any] = {"epochs": args.epochs, "batch_size": len(x), "lr": 0.02, "seed": args.seed}
        result = pvae.fit(model, guide, data, **training, **options)
        if result.stopped == "signal":
            return 128 + (result.signal or 0)
        seed = args.seed + number  # errors of the two are independent
        estimates[name] = pvae.log_evidence(model, guide, data, num_samples=args.num_samples, seed=seed, **options)
        drawing: dict[str, Any] = {"proposal": StudentT(Refined()), "num_samples": args.num_samples, "seed": seed}
        new = posterior_predictive(model, guide, data, **drawing, **options)
        predicted[name] = new.draws["y"]
        scores[name] = (new.draws["y"].var(1) >= y.var()).double().mean().item()
        print(f"{name}\n{estimates[name]}\n")
    comparison = pvae.compare(estimates["negative binomial"], estimates["Poisson"])
    print(f"negative binomial against Poisson\n{comparison}\n")
    for name, p_value in scores.items():
        print(f"Of data sets that the {name} model predicts, {p_value:.1%} scatter as much as the data.")
    report = {
        "num_data": args.num_data,
        "overdispersion": args.overdispersion,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.cuda else "cpu",
        "versions": versions() | {"pvae": pvae.__version__},
        "log_p_data": {name: estimate.mean for name, estimate in estimates.items()},
        "log_bayes_factor": comparison.difference,
        "scatter_as_much": scores,
    }
    write_file(args.output_dir / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    draw_predictions(x, y, predicted).savefig(args.output_dir / "counts.png", dpi=150)
    print(f"\nreport.json and the figure are in {args.output_dir}/")
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
