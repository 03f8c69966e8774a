"""Priors, posteriors and objectives side by side: what each gains in log p(x) over the plain VAE, and what it costs.

All have the networks of `pvae.VAE.mlp`, the same data, epochs, seed and batches. log p(x) is by the default call on the
same test images, so differences are taken image by image, and their errors are those of paired data. The last row is a
VAE with 100 labels: how many test images it names rightly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from side_by_side import arguments, header

import pvae
from pvae.runtime.programs import resolve_device
from pvae.svi import objectives, schedules

LATENTS = 50
HIDDEN = 400
LABELS = 100


@dataclass(frozen=True)
class Family:
    """One row: what differs from the plain VAE."""

    parts: Callable[[], dict[str, Any]] = dict  # for VAE.mlp
    options: Callable[[int], dict[str, Any]] = lambda epochs: {}  # for fit


FAMILIES = {
    "VAE": Family(),
    "KL warm-up": Family(options=lambda epochs: {"kl_weight": schedules.linear_warmup(epochs // 2)}),
    "free bits": Family(options=lambda _: {"objective": objectives.MeanFieldELBO(free_bits=0.05)}),
    "analytic KL": Family(options=lambda _: {"objective": objectives.MeanFieldELBO()}),
    "sticking the landing": Family(options=lambda _: {"objective": objectives.StickingTheLanding()}),
    "IWAE-5": Family(options=lambda _: {"objective": objectives.IWAE(num_particles=5)}),
    "DReG-5": Family(options=lambda _: {"objective": objectives.DReG(num_particles=5)}),
    "mixture prior": Family(lambda: {"prior": "mixture"}),
    "VampPrior": Family(lambda: {"prior": "vamp"}),
    "flow prior": Family(lambda: {"prior": "flow"}),
    "low-rank posterior": Family(lambda: {"posterior": "low-rank"}),
    "full posterior": Family(lambda: {"posterior": "full"}),
    "IAF posterior": Family(lambda: {"posterior": "iaf"}),
    "mixture, IAF, IWAE-5": Family(
        lambda: {"prior": "mixture", "posterior": "iaf"}, lambda _: {"objective": objectives.IWAE(num_particles=5)}
    ),
}


def main() -> None:
    parser = arguments(__doc__ or "", repeats=1)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=1000, help="test images to evaluate")
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES, "M2"], help="rows to measure, beside the plain VAE")
    args = parser.parse_args()
    args.device = resolve_device("cuda" if args.cuda else "cpu")
    data = pvae.datasets.mnist(args.data_dir, "dynamic")
    print(header("python benchmarks/families.py", args.device))
    print(f"\nMNIST, dynamic binarization, {args.epochs} epochs, seed 0, {args.images:,} test images, K = 1,000.\n")
    print(
        "| family | log p(x) | - VAE | +- | ELBO | unresolved | active units | s an epoch | s for log p(x) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    names = [name for name in FAMILIES if not args.only or name in args.only or name == "VAE"]
    plain = None
    for name in names:
        estimate = row(name, FAMILIES[name], data, args, plain)
        plain = plain or estimate
    if not args.only or "M2" in args.only:
        semi_supervised(data, args)


def row(
    name: str,
    family: Family,
    data: pvae.datasets.Dataset,
    args: Any,
    plain: pvae.EvidenceEstimate | None,
) -> pvae.EvidenceEstimate:
    """Trains, measures and prints one family."""
    torch.manual_seed(0)
    vae = pvae.VAE.mlp((28, 28), LATENTS, [HIDDEN], **family.parts())
    begin = time.perf_counter()
    pvae.fit(
        vae.model,
        vae.guide,
        data.train_x,
        transform=data.transform,
        epochs=args.epochs,
        device=args.device,
        progress=False,
        **family.options(args.epochs),
    )
    seconds = (time.perf_counter() - begin) / args.epochs
    x = data.test_x[: args.images].to(args.device)
    estimate = pvae.log_evidence(vae.model, vae.guide, x, device=args.device)
    with torch.no_grad():
        active = int((vae.encode(data.test_x.to(args.device)).mean.var(0) > 0.01).sum())
    difference, error = "-", f"{estimate.mean_std_error:.3f}"
    if plain is not None:
        each = estimate.corrected - plain.corrected
        difference, error = f"{each.mean():+.2f}", f"{each.std() / len(each) ** 0.5:.2f}"
    print(
        f"| {name} | {estimate.mean:.2f} | {difference} | {error} | {estimate.elbo.mean():.2f} | "
        f"{estimate.unresolved.double().mean():.1%} | {active} | {seconds:.1f} | {estimate.seconds:.0f} |",
        flush=True,
    )
    return estimate


def semi_supervised(data: pvae.datasets.Dataset, args: Any) -> None:
    """M2 of Kingma et al., 2014, with ten labels of each digit, beside a network trained on these alone."""
    torch.manual_seed(0)
    y = torch.full_like(data.train_y, -1)
    for digit in range(10):
        rows = (data.train_y == digit).nonzero()[: LABELS // 10, 0]
        y[rows] = digit
    vae = pvae.SemiSupervisedVAE.mlp((28, 28), num_classes=10, latent_dim=LATENTS, hidden=[HIDDEN])

    def transform(x, y):
        return data.transform(x), y

    begin = time.perf_counter()
    pvae.fit(
        vae.model,
        vae.guide,
        (data.train_x, y),
        transform=transform,
        objective=vae.objective(alpha=0.1 * len(y) / LABELS),
        epochs=args.epochs,
        device=args.device,
        progress=False,
    )
    seconds = (time.perf_counter() - begin) / args.epochs
    with torch.no_grad():
        found = vae.predict(data.test_x.to(args.device)).argmax(-1).cpu()
    right = (found == data.test_y).double().mean()
    print(f"\nM2 with {LABELS} labels: {right:.1%} of 10,000 test images named rightly, {seconds:.1f} s an epoch.")


if __name__ == "__main__":
    main()
