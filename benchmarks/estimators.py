"""Estimators of log p(x) side by side on one VAE: how far from the truth, how they judge themselves, and how long.

A VAE (784-400-50, Bernoulli) is trained on MNIST, dynamic binarization. The truth is not known; the reference is
annealed importance sampling from each image's own full Gaussian, with another seed. An estimator's error is its root
mean square distance to the reference over the images, with the reference's own error taken out.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from side_by_side import arguments, header

import pvae
from pvae.evidence.proposals import Annealed, Defensive, Guide, Laplace, Prior, Refined, Sobol, StudentT
from pvae.runtime.programs import resolve_device

WAYS = [
    ("guide", Guide(), 100),
    ("guide", Guide(), 1000),
    ("guide", Guide(), 10_000),
    ("guide, Student-t 5", StudentT(), 1000),
    ("guide, 10% prior", Defensive(), 1000),
    ("guide, Sobol", Sobol(), 1000),
    ("prior", Prior(), 100_000),
    ("Laplace", Laplace(), 1000),
    ("Laplace, Student-t 5", StudentT(Laplace()), 1000),
    ("refined, diagonal", Refined(full=False), 1000),
    ("refined", Refined(), 100),
    ("refined", Refined(), 1000),
    ("refined", Refined(), 10_000),
    ("refined, Sobol", Sobol(Refined()), 1000),
    ("refined, 10% prior", Defensive(Refined()), 1000),
    ("AIS from the prior", Annealed(Prior(), temperatures=100), 16),
    ("AIS from the guide", Annealed(Guide(), temperatures=30), 16),
    ("AIS from the guide", Annealed(Guide(), temperatures=100), 16),
    ("AIS from refined", Annealed(Refined(), temperatures=10), 16),
]


def main() -> None:
    parser = arguments(__doc__ or "", repeats=1)
    parser.add_argument("--images", type=int, default=1000, help="test images to evaluate")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--figure", type=Path, default=Path("results/estimators.png"), help="where to draw the figure")
    args = parser.parse_args()
    device = resolve_device("cuda" if args.cuda else "cpu")
    data = pvae.datasets.mnist(args.data_dir, "dynamic")
    torch.manual_seed(0)
    vae = pvae.VAE.mlp((28, 28), 50, [400])
    result = pvae.fit(
        vae.model, vae.guide, data.train_x, transform=data.transform, epochs=args.epochs, device=device, progress=False
    )
    x = data.test_x[: args.images].to(device)

    def evaluate(proposal, num_samples, seed=0):
        return pvae.log_evidence(
            vae.model, vae.guide, x, proposal=proposal, num_samples=num_samples, seed=seed, device=device
        )

    print(header("python benchmarks/estimators.py", device))
    print(
        f"{len(x)} images, seed 0; the VAE's training ELBO after {args.epochs} epochs: {result.history['elbo'][-1]:.2f}"
    )
    reference = evaluate(Annealed(Refined(steps=200), temperatures=100), 16, seed=1)
    print(
        f"reference: {reference.proposal}, {reference.num_samples} chains, seed 1: mean {reference.mean:.3f} +- "
        f"{reference.mean_std_error:.3f} nats per datum, median error of an image {reference.std_error.median():.3f}, "
        f"{reference.seconds:.0f} s\n"
    )
    rows = []
    for name, proposal, num_samples in WAYS:
        steps = f", T = {proposal.temperatures}" if isinstance(proposal, Annealed) else ""
        rows.append((f"{name}, K = {num_samples:,}{steps}", evaluate(proposal, num_samples)))
    errors = {label: error(estimate, reference) for label, estimate in rows}
    best = frontier({label: (estimate.seconds, errors[label]) for label, estimate in rows})
    print("| estimator | mean | +- | error | k-hat, median | above 0.7 | seconds | |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for label, estimate in rows:
        known = estimate.num_samples >= 25
        khat = f"{estimate.khat.median():.2f} | {estimate.unreliable.double().mean():.0%}" if known else "- | -"
        mark = "best for its time" if label in best else ""
        print(
            f"| {label} | {estimate.mean:.2f} | {estimate.mean_std_error:.3f} | {errors[label]:.3f} | {khat} | "
            f"{estimate.seconds:.1f} | {mark} |"
        )
    print("\nBest for its time: no other is both closer to the reference and faster.")
    draw({label: (estimate.seconds, errors[label]) for label, estimate in rows}, best, args.figure)
    print(f"Figure: {args.figure}")


def error(estimate: pvae.EvidenceEstimate, reference: pvae.EvidenceEstimate) -> float:
    """Root mean square distance to the reference, less the reference's share, nats per datum."""
    distance = (estimate.log_px - reference.corrected).square() - reference.std_error.square()
    return distance.mean().clamp(min=0.0).sqrt().item()


def frontier(points: dict[str, tuple[float, float]]) -> set[str]:
    """Those that no other beats in seconds and in error."""
    return {
        label
        for label, (seconds, wrong) in points.items()
        if not any(s <= seconds and e <= wrong and (s, e) != (seconds, wrong) for s, e in points.values())
    }


# Colours that stay apart for colour-blind readers: Wong, 2011, Points of View: Color blindness.
COLORS = {"guide": "#0072B2", "prior": "black", "Laplace": "#009E73", "refined": "#D55E00", "AIS": "#CC79A7"}


def draw(points: dict[str, tuple[float, float]], best: set[str], path: Path) -> None:
    """Seconds against error, both on log scales; a colour for each family, a marker for each of its members."""
    mpl.use("Agg")
    figure, ax = plt.subplots(figsize=(10, 5.5), layout="constrained")
    ax.plot(*zip(*sorted(points[label] for label in best), strict=True), color="0.8", linewidth=6, zorder=0)
    markers = {name: iter("osD^v*P") for name in COLORS}
    for label, (seconds, wrong) in points.items():
        family = label.split(",")[0].split()[0]
        ax.plot(seconds, wrong, next(markers[family]), color=COLORS[family], markersize=8, linestyle="", label=label)
    ax.set(
        xscale="log", yscale="log", xlabel="seconds", ylabel="error of log p(x) of an image, nats (root mean square)"
    )
    ax.set_title("Estimators of log p(x); on the grey line: best for their time")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
