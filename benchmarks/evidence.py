"""Microseconds for each pair of a draw and a datum: `pvae.log_evidence` beside Pyro's vectorized importance weights.

784-400-50, Bernoulli; weights as initialized, since the work does not depend on them. Pyro's function gives one weight
for each draw of the whole batch, not one for each datum; the work is the same.
"""

from __future__ import annotations

import pyro
import torch
from pyro.infer.importance import vectorized_importance_weights
from side_by_side import arguments, header, measure, table

import pvae
from pvae.isolation import resolve_device


def main() -> None:
    args = arguments(__doc__ or "", repeats=5).parse_args()
    device = resolve_device("cuda" if args.cuda else "cpu")
    torch.manual_seed(0)
    vae = pvae.VAE.mlp((28, 28), 50, [400]).to(device)
    x = torch.bernoulli(torch.full((1000, 28, 28), 0.13, device=device))

    def ours(num_data: int, num_samples: int, proposal: str = "guide"):
        return lambda: pvae.log_evidence(
            vae.model, vae.guide, x[:num_data], num_samples=num_samples, proposal=proposal, device=device
        )

    def theirs(num_data: int, num_samples: int):
        def run() -> None:
            with torch.no_grad(), pyro.validation_enabled(False):
                for batch in x[:num_data].split(10):  # all at once would need tens of gigabytes
                    vectorized_importance_weights(
                        vae.model, vae.guide, batch, num_samples=num_samples, max_plate_nesting=1
                    )

        return run

    print(header("python benchmarks/evidence.py", device))
    print("200 images x 1,000 samples:\n")
    ways = {
        "Pyro, vectorized_importance_weights": theirs(200, 1000),
        "pvae.log_evidence, guide": ours(200, 1000),
        "pvae.log_evidence, prior": ours(200, 1000, "prior"),
    }
    for work in ways.values():
        work()
    print(table("microseconds a pair", measure(ways, args.repeats, device), 1e6 / 200_000))
    print("\nGrowth, seconds of one call:\n\n| proposal | images | samples | seconds |\n| --- | ---: | ---: | ---: |")
    for proposal, num_data, num_samples in (
        ("guide", 100, 100),
        ("guide", 100, 1000),
        ("guide", 100, 10_000),
        ("guide", 1000, 1000),
        ("prior", 1000, 1000),
        ("prior", 1000, 100_000),
    ):
        (seconds,) = measure({"one": ours(num_data, num_samples, proposal)}, 1, device)["one"]
        print(f"| {proposal} | {num_data:,} | {num_samples:,} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
