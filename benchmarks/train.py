"""Seconds an epoch: `pvae.fit` beside `pyro.infer.SVI`, on the same VAE, data and batches.

MNIST, 784-400-50, batch 256, Adam, dynamic binarization. Checks that both end at the same ELBO.
"""

from __future__ import annotations

import copy

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from side_by_side import arguments, header, measure, table

import pvae
from pvae.isolation import resolve_device


def main() -> None:
    args = arguments(__doc__ or "", repeats=5).parse_args()
    device = resolve_device("cuda" if args.cuda else "cpu")
    data = pvae.datasets.mnist(args.data_dir, "dynamic")
    x = data.train_x.to(device)
    torch.manual_seed(0)
    vae = pvae.VAE.mlp((28, 28), 50, [400]).to(device)
    ours, theirs = copy.deepcopy(vae), copy.deepcopy(vae)

    history: list[float] = []
    losses: list[float] = []

    def fit() -> None:
        seed = len(history)
        result = pvae.fit(
            ours.model, ours.guide, x, transform=torch.bernoulli, epochs=1, seed=seed, device=device, progress=False
        )
        history.append(result.history["elbo"][0])

    pyro.clear_param_store()
    svi = SVI(theirs.model, theirs.guide, Adam({"lr": 1e-3}), Trace_ELBO())

    def pyro_svi() -> None:
        order = torch.randperm(len(x), device=device)
        losses.append(sum(svi.step(torch.bernoulli(x[rows])) for rows in order.split(256)) / len(x))

    def without_validation() -> None:
        with pyro.validation_enabled(False):
            pyro_svi()

    print(header("python benchmarks/train.py", device))
    ways = {"pyro.infer.SVI": pyro_svi, "pyro.infer.SVI, validation off": without_validation, "pvae.fit": fit}
    for work in ways.values():
        work()  # first calls pay for start-up
    print(table("seconds an epoch", measure(ways, args.repeats, device)))
    n = len(history)  # SVI has had twice as many
    print(f"\nELBO after {n} epochs: pvae.fit {history[-1]:.2f}, pyro.infer.SVI {-losses[n - 1]:.2f} nats per datum")


if __name__ == "__main__":
    main()
