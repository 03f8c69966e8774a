"""How often intervals cover: every proposal's, on a VAE of MNIST, against a long run.

A VAE (784-400-50, Bernoulli) is trained on MNIST, dynamic binarization. The truth is not known; the reference for each
image is a long run of importance sampling from a Gaussian fitted twice as long, with another seed. Images whose
reference has a k-hat above 0.7 are left out, and the reference's own error is added to each interval in quadrature.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from side_by_side import arguments, header

import pvae
from pvae.evidence.proposals import Annealed, Defensive, Guide, Laplace, Prior, Refined, Sobol, StudentT
from pvae.runtime.programs import resolve_device

WAYS = [
    ("guide", Guide(), 1000),
    ("guide, Student-t 5", StudentT(), 1000),
    ("guide, 10% prior", Defensive(), 1000),
    ("guide, Sobol", Sobol(), 1000),
    ("prior", Prior(), 1000),
    ("Laplace", Laplace(), 1000),
    ("Laplace, Student-t 5", StudentT(Laplace()), 1000),
    ("refined", Refined(), 1000),
    ("refined, Sobol", Sobol(Refined()), 1000),
    ("refined, 10% prior", Defensive(Refined()), 1000),
    ("AIS from the guide, T = 100", Annealed(), 64),
    ("AIS from refined, T = 10", Annealed(Refined(), temperatures=10), 64),
]


def main() -> None:
    parser = arguments(__doc__ or "", repeats=1)
    parser.add_argument("--images", type=int, default=500, help="test images to evaluate")
    parser.add_argument("--ais-images", type=int, default=100, help="of these, how many to anneal for, which is slow")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images")
    parser.add_argument("--long", type=int, default=100_000, help="draws of the reference")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "pvae-coverage", help="of reference"
    )
    parser.add_argument("--only", nargs="*", help="parts of the names of the proposals to measure")
    args = parser.parse_args()
    device = resolve_device("cuda" if args.cuda else "cpu")
    data = pvae.datasets.mnist(args.data_dir, "dynamic")
    torch.manual_seed(0)
    vae = pvae.VAE.mlp((28, 28), 50, [400])
    args.cache.mkdir(parents=True, exist_ok=True)
    weights = args.cache / f"vae-{args.epochs}-{device.type}.pt"
    if weights.exists():
        vae.load_state_dict(torch.load(weights, weights_only=True))
        vae.to(device)
    else:
        options = {"transform": data.transform, "epochs": args.epochs, "device": device, "progress": False}
        pvae.fit(vae.model, vae.guide, data.train_x, **options)
        torch.save(vae.state_dict(), weights)
    x = data.test_x[: args.images].to(device)

    def evaluate(x, proposal, num_samples, seed):
        options = {"proposal": proposal, "num_samples": num_samples, "seed": seed, "device": device}
        return pvae.log_evidence(vae.model, vae.guide, x, **options)

    print(header("python benchmarks/coverage.py", device))
    kept = args.cache / f"reference-{args.epochs}-{len(x)}-{args.long}-{device.type}.pt"
    if not kept.exists():
        long = evaluate(x, Refined(steps=200), args.long, 1)
        torch.save({"value": long.corrected, "error": long.std_error, "known": ~long.unreliable}, kept)
    reference = torch.load(kept, weights_only=True)
    value, error, known = (reference[name] for name in ("value", "error", "known"))
    print(
        f"reference: {args.long:,} draws from a refined Gaussian, seed 1: mean {value.mean():.3f}, median error of an "
        f"image {error.median():.4f}; {int((~known).sum())} of {len(x)} images have a k-hat above 0.7, left out\n"
    )
    print(
        "| proposal | images | given | they cover | normal ones, k-hat <= 0.7 | cover | mean: off by | its interval | |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, proposal, num_samples in WAYS:
        if args.only and not any(part in name for part in args.only):
            continue
        n = args.ais_images if isinstance(proposal, Annealed) else len(x)
        estimates = [evaluate(x[:n], proposal, num_samples, seed) for seed in range(args.repeats)]
        print(row(f"{name}, K = {num_samples:,}", estimates, value[:n], error[:n], known[:n]), flush=True)


def row(name: str, estimates: list[pvae.EvidenceEstimate], value, error, known) -> str:
    """A line of the table: of the per-datum intervals, of the normal ones beside them, and of the mean's."""
    shares = []
    for estimate in estimates:
        centre, half = estimate.corrected, 1.96 * estimate.std_error
        normal = (torch.where(estimate.khat <= 0.7, centre - half, torch.nan), centre + half)
        for lower, upper in (estimate.interval(), normal):
            given, own = ~lower.isnan(), 1.96 * error
            low, high = centre - torch.hypot(centre - lower, own), centre + torch.hypot(upper - centre, own)
            covered = ((low <= value) & (value <= high))[given & known].double()
            shares += [given.double().mean().item(), covered.sum().item(), float(len(covered))]
    columns = torch.tensor(shares).reshape(len(estimates), 2, 3)
    cells = []
    for given, covered, count in zip(
        columns[..., 0].mean(0), columns[..., 1].sum(0), columns[..., 2].sum(0), strict=True
    ):
        cells += [f"{given:.1%}", f"{covered / count:.1%} of {int(count):,}" if count else "-"]
    off = estimates[0].corrected.mean() - value.mean()
    lower, upper = estimates[0].mean_interval()
    mean = f"{lower - value.mean():+.3f} to {upper - value.mean():+.3f}" if lower == lower else "withheld"
    inside = sum(bool(low <= value.mean() <= high) for low, high in (e.mean_interval() for e in estimates))
    given = sum(not e.mean_withheld for e in estimates)
    return f"| {name} | {len(value)} | {' | '.join(cells)} | {off:+.3f} | {mean} | {inside} of {given} cover |"


if __name__ == "__main__":
    main()
