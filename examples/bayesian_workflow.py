"""A Bayesian workflow on a model of one's own: prior predictive, fit, log p(x), ArviZ, and a predictive check.

    python examples/bayesian_workflow.py
    python examples/bayesian_workflow.py --delay 1     # plants that start late, of which the model knows nothing
    python examples/bayesian_workflow.py --cuda
    python examples/bayesian_workflow.py --help

Plants grow towards a height of their own, at a rate of their own; eight measurements each, drawn by this script. The
model and the guide are Pyro programs, written out below. Prints what each step says, and writes report.json, report.nc
(all draws, for ArviZ, if h5netcdf and h5py are installed) and three figures to the output folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import arviz
import pyro
import torch
from matplotlib.figure import Figure
from pyro import distributions as dist
from torch import Tensor, nn

import pvae
from pvae.errors import first_line
from pvae.evidence import prior_predictive
from pvae.evidence.proposals import Refined, StudentT
from pvae.persistence import versions, write_file

FIGURES = ("prior_predictive", "heights", "predictive_check")
TIMES = torch.arange(1.0, 9.0)  # weeks
DATA, DRAWN = "#0072b2", "#d55e00"


def count(text: str) -> int:
    """A type of argument: a whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text[:12]) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def weeks(text: str) -> float:
    """A type of argument: a number of weeks, from 0 to 8."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 8:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 8, got {text!r}")
    return value


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="A Bayesian workflow on growth curves.")
    add = parser.add_argument
    add("--cuda", action="store_true", help="train and evaluate on the GPU; an error if there is none")
    add("--num-plants", type=count, default=100, metavar="N", help="to draw (default: 100)")
    add("--delay", type=weeks, default=0.0, metavar="W", help="weeks before they grow (default: 0, as in the model)")
    add("--epochs", type=count, default=200, metavar="E", help="passes over the plants (default: 200)")
    add("--num-samples", type=count, default=500, metavar="K", help="draws for each plant (default: 500)")
    add("--seed", type=int, default=0, help="of data, weights, shuffling and noise (default: 0)")
    add("--output-dir", type=Path, default=Path("results"), help="for reports and figures (default: results)")
    return parser


class Growth(nn.Module):
    """``x_t ~ Normal(height (1 - exp(-rate t)), noise)``; each plant has its height (cm) and rate (per week)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros(()))
        self.encoder = pvae.networks.mlp(len(TIMES), [32], 4)

    def model(self, x: Tensor) -> None:
        """The generative program."""
        pyro.module("growth", self)
        with pyro.plate("plants", len(x)):
            height = pyro.sample("height", dist.LogNormal(math.log(30), 0.4))
            rate = pyro.sample("rate", dist.LogNormal(math.log(0.5), 0.3))
            mean = height[..., None] * -torch.expm1(-rate[..., None] * TIMES.to(x))
            pyro.sample("x", dist.Normal(mean, self.log_noise.exp()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The recognition program: both latents log-normal, by a network that sees the curve."""
        pyro.module("growth", self)
        h, r, h_raw, r_raw = self.encoder(x / 30).unbind(-1)
        with pyro.plate("plants", len(x)):
            pyro.sample("height", dist.LogNormal(math.log(30) + h, (h_raw - 3).exp()))
            pyro.sample("rate", dist.LogNormal(math.log(0.5) + r, (r_raw - 2).exp()))


def draw_plants(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Curves, ``(N, 8)``, and the heights that they grow towards, ``(N,)``."""
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(args.num_plants, 2 + len(TIMES), generator=generator)
    height, rate = 30 * (0.4 * noise[:, 0]).exp(), 0.5 * (0.3 * noise[:, 1]).exp()
    grown = height[:, None] * -torch.expm1(-rate[:, None] * (TIMES - args.delay).clamp(min=0))
    return grown + noise[:, 2:], height


def early(x: Any) -> Any:
    """What is checked: how much of the last measurement was there at the first, the mean over plants."""
    return x[..., 0].sum(-1) / x[..., -1].sum(-1)


def write_draws(data: Any, path: Path) -> bool:
    """Writes all groups, where a package is installed that can; otherwise says in a line what to install."""
    try:
        data.to_netcdf(str(path))
    except (ImportError, ValueError) as error:  # by xarray's version, if it finds no package
        reason = first_line(error).rstrip(".")
        print(f"{path.name} was not written: {reason}. Such files take h5netcdf and h5py: pip install 'h5netcdf[h5py]'")
        return False
    return True


def draw_prior(x: Tensor, drawn: Tensor) -> Figure:
    """Curves of the data, and as many of the prior."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, curves, color, title in ((left, x, DATA, "data"), (right, drawn, DRAWN, "prior predictive")):
        ax.plot(TIMES, curves[:60].T, color=color, alpha=0.35, linewidth=0.8)
        ax.set(title=title, xlabel="weeks")
    left.set_ylabel("height (cm)")
    return figure


def draw_heights(heights: Any, truth: Tensor) -> Figure:
    """Each plant's final height: 90% of its posterior against what it is."""
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    ax = figure.subplots()
    low, middle, high = heights.quantile([0.05, 0.5, 0.95], dim=("chain", "draw")).to_numpy()
    ax.errorbar(truth, middle, [middle - low, high - middle], fmt=".", color=DATA, elinewidth=0.6, markersize=3)
    centre = truth.mean().item()
    ax.axline((centre, centre), slope=1, color="grey", linewidth=0.8)
    ax.set(xlabel="true final height (cm)", ylabel="posterior: median and 90%")
    return figure


def draw_check(drawn: Any, observed: float, p_value: float) -> Figure:
    """The statistic of the data among those of data that the posterior predicts."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    ax = figure.subplots()
    ax.hist(drawn, bins=40, color=DRAWN, alpha=0.7)
    ax.axvline(observed, color=DATA)
    ax.text(observed, ax.get_ylim()[1], " data", color=DATA, va="top")
    ax.set(xlabel="first measurement / last", ylabel="predicted data sets", title=f"p = {p_value:.3f}")
    return figure


def run(args: argparse.Namespace) -> int:
    """Goes through the workflow; returns the exit code."""
    device = "cuda" if args.cuda else "cpu"
    x, heights = draw_plants(args)
    torch.manual_seed(args.seed)
    growth = Growth()
    options: dict[str, Any] = {"seed": args.seed, "device": device}

    prior = prior_predictive(growth.model, growth.guide, x, num_samples=10, **options)
    drawn = prior.draws["x"]
    print(
        f"1. Prior: plants of {drawn.quantile(0.05):.0f} to {drawn.quantile(0.95):.0f} cm; data reach {x.max():.0f} cm."
    )

    result = pvae.fit(growth.model, growth.guide, x, epochs=args.epochs, batch_size=25, lr=1e-2, **options)
    if result.stopped == "signal":
        return 128 + (result.signal or 0)
    noise = growth.log_noise.exp().item()
    print(f"2. Fit: ELBO {result.history['elbo'][-1]:.3f} nats per plant; noise {noise:.2f} cm, 1.00 in truth.")

    estimate = pvae.log_evidence(growth.model, growth.guide, x, num_samples=args.num_samples, **options)
    print(f"3. Evidence:\n{estimate}")

    data = pvae.to_arviz(
        growth.model,
        growth.guide,
        x,
        num_samples=args.num_samples,
        proposal=StudentT(Refined()),
        result=result,
        **options,
    )
    posterior, stats = data["posterior"], data["sample_stats"]
    resampled = stats["is_resampled"].to_numpy().mean().item()
    print(f"4. ArviZ: {resampled:.0%} of plants have draws of the posterior. The first two:")
    print(arviz.summary(posterior.sel(datum=[0, 1]), var_names=["height", "rate"], kind="stats"))
    written = write_draws(data, args.output_dir / "report.nc")

    predicted = early(data["posterior_predictive"]["x"].to_numpy()[0])
    p_value = float((predicted >= early(x).item()).mean())
    print(
        f"5. Check: first / last is {early(x):.3f}, predicted {predicted.mean():.3f} +- {predicted.std():.3f}; ", end=""
    )
    print(f"p = {p_value:.3f}." + ("" if 0.01 < p_value < 0.99 else " The model does not know how plants begin."))

    report = {
        "num_plants": args.num_plants,
        "delay": args.delay,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if args.cuda else "cpu",
        "versions": versions() | {"pvae": pvae.__version__, "arviz": arviz.__version__},
        "elbo": float(result.history["elbo"][-1]),
        "noise": noise,
        "log_px": {"mean": estimate.mean, "std_error": estimate.mean_std_error, "num_samples": estimate.num_samples},
        "resampled": resampled,
        "p_value": p_value,
    }
    write_file(args.output_dir / "report.json", (json.dumps(report, indent=2, allow_nan=False) + "\n").encode())
    figures = (
        draw_prior(x, drawn[0]),
        draw_heights(posterior["height"], heights),
        draw_check(predicted, early(x).item(), p_value),
    )
    for name, figure in zip(FIGURES, figures, strict=True):
        figure.savefig(args.output_dir / f"{name}.png", dpi=150)
    print(f"\nreport.json,{' report.nc' * written} and figures are in {args.output_dir}/")
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
