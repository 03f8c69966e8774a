"""The protocol of Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders, beside their Table 1.

Networks of 200-200 tanh units (two layers of latents: 200-200 and 100-100), Glorot weights, the output's bias at the
logit of the pixels' means, fresh bits for each batch of 20, Adam with eps 1e-4 on the batch's mean, and 3^i passes at a
learning rate of 1e-3 * 10^(-i/7) for i = 0 to 7: 3,280 in all, which ``--schedule`` scales. As there, the numbers are
-mean L_5000 on test images, an upper bound of -log p(x); beside it stands -log p(x) by the default call.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from side_by_side import arguments, header
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import pvae
from pvae.runtime.programs import resolve_device
from pvae.svi import objectives

BATCH = 20
STAGES = range(8)
PASSES = sum(3**stage for stage in STAGES)
EPSILON = 1e-4
BOUND_SAMPLES = 5000

# -mean L_5000 on test images and, of one layer, active units, by (layers, objective, k).
PAPER = {
    (1, "vae", 1): (86.76, 19),
    (1, "vae", 5): (86.47, 20),
    (1, "vae", 50): (86.35, 20),
    (1, "iwae", 5): (85.54, 22),
    (1, "iwae", 50): (84.78, 25),
    (2, "vae", 1): (85.33, None),
    (2, "vae", 5): (85.01, None),
    (2, "vae", 50): (84.78, None),
    (2, "iwae", 5): (83.89, None),
    (2, "iwae", 50): (82.90, None),
}
ROWS = {f"{layers}-{kind}-{k}": (layers, kind, k) for layers, kind, k in PAPER}


def main() -> None:
    parser = arguments(__doc__ or "", repeats=1)
    parser.add_argument("--schedule", type=float, default=0.01, help="passes, as a share of the paper's 3,280")
    parser.add_argument("--images", type=int, default=1000, help="test images to evaluate")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=["1-vae-1", "1-iwae-5"], help="layers, objective, k"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.device = resolve_device("cuda" if args.cuda else "cpu")
    data = pvae.datasets.mnist(args.data_dir, "dynamic")
    args.passes = max(1, round(PASSES * args.schedule))
    print(header(f"python benchmarks/burda2015.py --schedule {args.schedule:g}", args.device))
    print(
        f"\nMNIST, dynamic binarization, {args.passes:,} of {PASSES:,} passes, seed {args.seed}, "
        f"{args.images:,} test images.\n"
    )
    print(
        "| layers | objective | k | -L_5000 | +- | the paper's | difference | -log p(x) | active units | the paper's | "
        "minutes |\n| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for name in args.rows:
        row(*ROWS[name], data, args)


def row(layers: int, kind: str, k: int, data: pvae.datasets.Dataset, args: Any) -> None:
    """Trains, measures and prints one row."""
    torch.manual_seed(args.seed)
    vae = make(layers, data.train_x).to(args.device)
    begin = time.perf_counter()
    train(vae, objectives.IWAE(k) if kind == "iwae" else objectives.ELBO(k), data, args)
    minutes = (time.perf_counter() - begin) / 60
    x = data.test_x[: args.images].to(args.device)
    options: dict[str, Any] = {"device": args.device, "seed": args.seed}
    bound = pvae.log_evidence(vae.model, vae.guide, x, num_samples=BOUND_SAMPLES, proposal="guide", **options)
    evidence = pvae.log_evidence(vae.model, vae.guide, x, **options)
    paper, paper_active = PAPER[layers, kind, k]
    active = "-"
    if layers == 1:
        with torch.no_grad():
            active = str(int((vae.encode(data.test_x.to(args.device)).mean.var(0) > 0.01).sum()))
    error = (bound.mean_std_error**2 + bound.log_px.std().item() ** 2 / len(x)) ** 0.5  # of a choice of images, too
    print(
        f"| {layers} | {kind.upper()} | {k} | {-bound.mean:.2f} | {error:.2f} | {paper:.2f} | "
        f"{-bound.mean - paper:+.2f} | {-evidence.mean:.2f} | {active} | {paper_active or '-'} | {minutes:.1f} |",
        flush=True,
    )


def make(layers: int, x: torch.Tensor) -> Any:
    """A VAE of one layer of 50 latents, or of layers of 100 and 50."""
    if layers == 1:
        vae = pvae.VAE.mlp((28, 28), 50, [200, 200], activation=nn.Tanh)
    else:
        vae = pvae.HierarchicalVAE.mlp((28, 28), [100, 50], [[200, 200], [100, 100]], activation=nn.Tanh)
    for layer in vae.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    last = [layer for layer in vae.decoder.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.copy_(x.mean(0).flatten().clamp(1e-3, 1 - 1e-3).logit())
    return vae


def train(vae: Any, objective: Any, data: pvae.datasets.Dataset, args: Any) -> None:
    """Takes the schedule's passes; of a scaled one, each stage is as much shorter."""

    def rate(epoch: int) -> float:
        """Of a pass, by the stage that its middle is in, relative to the first stage's."""
        done = (epoch + 0.5) / args.passes * PASSES
        stage = next((i for i in STAGES if done < sum(3**j for j in range(i + 1))), STAGES[-1])
        return 10 ** (-stage / 7)

    def scheduler(optimizer: torch.optim.Optimizer) -> LambdaLR:
        # Losses are summed over a batch, for which Adam with eps * BATCH is that of their mean with eps.
        optimizer.param_groups[0]["eps"] = EPSILON * BATCH
        return LambdaLR(optimizer, rate)

    pvae.fit(
        vae.model,
        vae.guide,
        data.train_x,
        transform=data.transform,
        objective=objective,
        epochs=args.passes,
        batch_size=BATCH,
        lr=1e-3,
        scheduler=scheduler,
        seed=args.seed,
        compile=True,
        device=args.device,
    )


if __name__ == "__main__":
    main()
