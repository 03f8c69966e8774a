"""The default call of `pvae.log_evidence` on VAEs of many kinds, held against a reference datum by datum.

The truth is not known; the reference is annealed importance sampling from each datum's own Gaussian, 32 chains over 100
temperatures, with another seed. A datum counts as wrong where its number is 0.1 nats or more from the reference's, and
more than the reference's own error explains.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from pyro.infer import RenyiELBO
from side_by_side import arguments, header
from torch import Tensor

import pvae
from pvae.evidence.proposals import Annealed, Refined
from pvae.runtime.programs import resolve_device

WRONG = 0.1  # nats


@dataclass
class Case:
    """A VAE, and data that it has not seen."""

    name: str
    vae: pvae.VAE
    x: Tensor


def cases(args) -> list[Case]:
    """Trains one VAE of each kind, seed 0."""
    dynamic, grey = (pvae.datasets.mnist(args.data_dir, b) for b in ("dynamic", "none"))
    digits = pvae.datasets.digits("threshold")

    def train(name, x, test, *, event=(28, 28), latent=50, hidden=400, likelihood="bernoulli", **options) -> Case:
        torch.manual_seed(0)
        vae = pvae.VAE.mlp(event, latent, [hidden], likelihood=likelihood)
        pvae.fit(vae.model, vae.guide, x, device=args.device, progress=False, **options)
        return Case(name, vae, test[: args.images])

    iwae = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    moving = {"transform": dynamic.transform}
    return [
        train("MNIST, 10 epochs", dynamic.train_x, dynamic.test_x, epochs=10, **moving),
        train("MNIST, 20 epochs", dynamic.train_x, dynamic.test_x, epochs=20, **moving),
        train("MNIST, as an IWAE", dynamic.train_x, dynamic.test_x, epochs=5, objective=iwae, **moving),
        train("MNIST, overfitted", dynamic.test_x[5000:6000], dynamic.test_x, epochs=400, batch_size=100),
        train("MNIST, Gaussian", grey.train_x, grey.test_x, latent=20, likelihood="gaussian", epochs=5),
        train("digits", digits.train_x, digits.test_x, event=(8, 8), latent=10, hidden=200, epochs=100, batch_size=64),
    ]


def main() -> None:
    parser = arguments(__doc__ or "", repeats=1)
    parser.add_argument("--images", type=int, default=1000, help="test images to evaluate")
    parser.add_argument(
        "--figure", type=Path, default=Path("results/default_call.png"), help="where to draw the figure"
    )
    args = parser.parse_args()
    args.device = resolve_device("cuda" if args.cuda else "cpu")
    print(header("python benchmarks/default_call.py", args.device))
    print(f"\nSeed 0, {args.images:,} test images at most, K = 1,000; the reference has seed 1.\n")
    print(
        "| VAE | mean | - reference | +- | unresolved | of these wrong | of others | covered | seconds | stages |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    )
    results = [row(case, args.device) for case in cases(args)]
    print(
        f"\nWrong: {WRONG} nats or more from the reference, beyond 2 of its errors. Covered: of the intervals that are "
        "given, those that\nhold the reference within 2 of its errors."
    )
    draw(results, args.figure)
    print(f"Figure: {args.figure}")


def row(case: Case, device: torch.device) -> tuple[str, pvae.EvidenceEstimate, Tensor]:
    """Prints one line, and returns what the figure shows: the estimate, and its distance to the reference."""
    vae, x = case.vae, case.x.to(device)
    estimate = pvae.log_evidence(vae.model, vae.guide, x, device=device)
    chains = Annealed(Refined(), temperatures=100)
    reference = pvae.log_evidence(vae.model, vae.guide, x, proposal=chains, num_samples=32, seed=1, device=device)
    distance = estimate.log_px - reference.corrected
    wrong = distance.abs() >= WRONG + 2 * reference.std_error
    unresolved = estimate.unresolved
    lower, upper = estimate.interval()
    covered = (lower - 2 * reference.std_error <= reference.corrected) & (
        reference.corrected <= upper + 2 * reference.std_error
    )
    error = (estimate.mean_std_error**2 + reference.mean_std_error**2) ** 0.5
    counts = ", ".join(f"{stage} {count}" for stage, count in Counter(estimate.stage).most_common())
    print(
        f"| {case.name} | {estimate.mean:.3f} | {distance.mean():.3f} | {error:.3f} | "
        f"{unresolved.double().mean():.1%} | {share(wrong[unresolved])} | {share(wrong[~unresolved])} | "
        f"{share(covered[~lower.isnan()])} | {estimate.seconds:.1f} | {counts} |",
        flush=True,
    )
    return case.name, estimate, distance


def share(flags: Tensor) -> str:
    """A share of data, if there are any."""
    return f"{flags.double().mean():.1%}" if len(flags) else "-"


def draw(results: list[tuple[str, pvae.EvidenceEstimate, Tensor]], path: Path) -> None:
    """The distance of each datum to the reference against the standard error that the default call says it has."""
    mpl.use("Agg")
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex=True, sharey=True)
    for ax, (name, estimate, distance) in zip(axes.flat, results, strict=True):
        bad = estimate.unresolved
        line = torch.logspace(-3, 0.5, 50)
        ax.fill_between(line, -2 * line, 2 * line, color="0.9", zorder=0)
        ax.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
        ax.plot(estimate.std_error[~bad], distance[~bad], ".", color="#0072B2", markersize=3, alpha=0.6)
        ax.plot(estimate.std_error[bad], distance[bad], "x", color="#D55E00", markersize=5)
        ax.set(xscale="log", xlim=(3e-3, 1.5), ylim=(-1, 1), title=name)
    figure.supxlabel("standard error of log p(x), as said (nats)")
    figure.supylabel("distance to the reference (nats)")
    axes[0, 0].text(0.004, 0.85, "resolved", color="#0072B2")
    axes[0, 0].text(0.004, 0.7, "x unresolved", color="#D55E00")
    axes[0, 0].text(0.004, -0.9, "grey: within 2 standard errors", color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
