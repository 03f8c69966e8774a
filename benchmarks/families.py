"""Priors, posteriors and objectives side by side: what each gains in log p(x) over the plain VAE, and what it costs.

All have the networks of `pvae.VAE.mlp`, the same data, epochs, seed and batches. log p(x) is by the default call on the
same test images, so differences are taken image by image, and their errors are those of paired data. The last rows are
VAEs with 100 labels: how many test images they name rightly.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from side_by_side import arguments, header
from torch import nn

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
    parser.add_argument("--stacked-epochs", type=int, default=50, help="of M2 on the codes of a VAE")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches, noise and the choice of labels")
    parser.add_argument("--images", type=int, default=1000, help="test images to evaluate")
    parser.add_argument(
        "--only", nargs="+", choices=[*FAMILIES, "M2", "M1+M2"], help="rows to measure, beside the plain VAE"
    )
    args = parser.parse_args()
    args.device = resolve_device("cuda" if args.cuda else "cpu")
    data = pvae.datasets.mnist(args.data_dir, "dynamic")
    print(header("python benchmarks/families.py", args.device))
    conditions = f"{args.epochs} epochs, seed {args.seed}, {args.images:,} test images, K = 1,000"
    print(f"\nMNIST, dynamic binarization, {conditions}.\n")
    print(
        "| family | log p(x) | - VAE | +- | ELBO | unresolved | active units | s an epoch | s for log p(x) |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    needs_plain = not args.only or set(args.only) & FAMILIES.keys()
    names = [n for n in FAMILIES if not args.only or n in args.only or (n == "VAE" and needs_plain)]
    plain = None
    for name in names:
        estimate = row(name, FAMILIES[name], data, args, plain)
        plain = plain or estimate
    if not args.only or "M2" in args.only:
        semi_supervised(data, args)
    if not args.only or "M1+M2" in args.only:
        stacked(data, args)


def row(
    name: str,
    family: Family,
    data: pvae.datasets.Dataset,
    args: Any,
    plain: pvae.EvidenceEstimate | None,
) -> pvae.EvidenceEstimate:
    """Trains, measures and prints one family."""
    torch.manual_seed(args.seed)
    vae = pvae.VAE.mlp((28, 28), LATENTS, [HIDDEN], **family.parts())
    begin = time.perf_counter()
    pvae.fit(
        vae.model,
        vae.guide,
        data.train_x,
        transform=data.transform,
        epochs=args.epochs,
        seed=args.seed,
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
    """M2 of Kingma et al., 2014, with ten labels of each digit.

    z has five dimensions, so that it cannot hold what the class is for. Images with labels are moved by up to two
    pixels. First all is trained on them alone; then for an epoch on all images, of which they are a ninth, while labels
    weigh so much that the classifier follows nothing else, and the decoder learns what its classes look like; then by
    the bound.
    """
    torch.manual_seed(args.seed)
    vae = pvae.SemiSupervisedVAE.mlp(
        (28, 28), latent_dim=5, hidden=[HIDDEN], num_classes=10, classifier=convolutional_classifier()
    )
    rows = labelled(data, args.seed)
    few = data.train_x[rows], data.train_y[rows]
    copies = rows.repeat(len(data.train_x) // (8 * LABELS))
    x = torch.cat([data.train_x, data.train_x[copies]])
    y = torch.cat([torch.full_like(data.train_y, -1), data.train_y[copies]])

    def transform(x, y):
        return data.transform(torch.where((y != -1)[:, None, None], moved(x, 2), x)), y

    begin = time.perf_counter()
    stages = {
        "labels alone": (few, 400, 1e3),
        "the decoder": ((x, y), 1, 1e5),
        "all": ((x, y), args.epochs - 1, 1.0),
    }
    for name, (images, epochs, alpha) in stages.items():
        pvae.fit(
            vae.model,
            vae.guide,
            images,
            transform=transform,
            objective=vae.objective(alpha),
            epochs=epochs,
            lr=2e-3,
            seed=args.seed,
            device=args.device,
            progress=False,
        )
        tell(f"M2, {name}, {epochs} epochs at alpha={alpha:g}, with", vae, data.test_x, data.test_y, args, begin)


def convolutional_classifier() -> nn.Sequential:
    """``(N, 28, 28) -> (N, 10)``, with dropout, as there are few labels."""
    return nn.Sequential(
        nn.Unflatten(-2, (1, 28)),
        nn.AvgPool2d(2),
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64 * 9, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(128, 10),
    )


def moved(x: torch.Tensor, most: int) -> torch.Tensor:
    """Images ``(N, H, W)``, each by up to ``most`` pixels along either axis, with black where nothing was."""
    height, width = x.shape[1:]
    corner = torch.randint(2 * most + 1, (2, len(x), 1), device=x.device)
    rows = corner[0] + torch.arange(height, device=x.device)
    columns = corner[1] + torch.arange(width, device=x.device)
    image = torch.arange(len(x), device=x.device)[:, None, None]
    return nn.functional.pad(x, [most] * 4)[image, rows[:, :, None], columns[:, None]]


def stacked(data: pvae.datasets.Dataset, args: Any) -> None:
    """M1+M2 of the same authors: M2 on draws of a plain VAE's codes, with labels for a seventh of each batch."""
    torch.manual_seed(args.seed)
    m1 = pvae.VAE.mlp((28, 28), LATENTS, [HIDDEN])
    options = {"epochs": args.epochs, "seed": args.seed, "device": args.device, "progress": False}
    pvae.fit(m1.model, m1.guide, data.train_x, transform=data.transform, **options)
    with torch.no_grad():
        codes = [m1.encode(data.transform(x).to(args.device)).base_dist for x in data.train_x.split(5000)]
        loc, scale = (torch.cat([getattr(q, name).cpu() for q in codes]) for name in ("loc", "scale"))
        test_codes = m1.encode(data.test_x.to(args.device)).mean.cpu()
    rows = labelled(data, args.seed).repeat(100)
    y = torch.cat([torch.full_like(data.train_y, -1), data.train_y[rows]])
    rows = torch.cat([torch.arange(len(loc)), rows])
    m2 = pvae.SemiSupervisedVAE.mlp(
        LATENTS, num_classes=10, latent_dim=20, hidden=[256], likelihood="gaussian", units=(0.0, 1.0)
    )

    def transform(loc, scale, y):
        return loc + scale * torch.randn_like(loc), y

    begin = time.perf_counter()
    pvae.fit(
        m2.model,
        m2.guide,
        (loc[rows], scale[rows], y),
        transform=transform,
        objective=m2.objective(alpha=30.0),
        lr=2e-3,
        **(options | {"epochs": args.stacked_epochs}),
    )
    tell("M1+M2 with", m2, test_codes, data.test_y, args, begin)


def labelled(data: pvae.datasets.Dataset, seed: int) -> torch.Tensor:
    """Numbers of the first training images of each digit, or with another seed of as many further on."""
    each = LABELS // 10
    chosen = slice(seed * each, (seed + 1) * each)
    return torch.cat([(data.train_y == digit).nonzero()[chosen, 0] for digit in range(10)])


def tell(name: str, vae: Any, x: torch.Tensor, y: torch.Tensor, args: Any, begin: float) -> None:
    """Prints how many test images are named rightly."""
    with torch.no_grad():
        right = (vae.predict(x.to(args.device)).argmax(-1).cpu() == y).double().mean()
    print(
        f"\n{name} {LABELS} labels: {right:.1%} of {len(y):,} test images named rightly, "
        f"{time.perf_counter() - begin:.0f} s.",
        flush=True,
    )


if __name__ == "__main__":
    main()
