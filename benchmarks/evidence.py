"""Microseconds for each pair of a draw and a datum: `pvae.log_evidence` beside Pyro, plain PyTorch and pythae.

784-400-50, Bernoulli; weights as initialized, since the work does not depend on them. Pyro's function gives one weight
for each draw of the whole batch, not one for each datum; the work is the same. Ends with an error if the estimates of
log p(x) do not agree.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import peers
import pyro
import torch
from pyro.infer.importance import vectorized_importance_weights
from side_by_side import Multiply, Values, Way, add_peers, arguments, header, lowest, measure, products, ratio, table
from torch import Tensor

import pvae
from pvae.runtime.programs import resolve_device

PVAE, EAGER = "pvae.log_evidence, compiled, second call", "pvae.log_evidence, not compiled"
FIRST, FEW = "pvae.log_evidence, compiled, first call", "pvae.log_evidence, 300 images, new pair"
PYRO, BY_HAND, PYTHAE = "Pyro, vectorized_importance_weights", "PyTorch by hand", "pythae's get_nll"
PRODUCTS = "products alone"


def main() -> None:
    parser = arguments(__doc__ or "", repeats=5)
    parser.add_argument("--images", type=int, default=1000, help="images to evaluate; slow ways get fewer")
    parser.add_argument("--samples", type=int, default=1000, help="draws for each image")
    parser.add_argument("--prior-large", action="store_true", help="10,000 images x 100,000 samples from the prior")
    parser.add_argument("--growth", action="store_true", help="measure how time grows with images and samples")
    args = parser.parse_args()
    device = resolve_device("cuda" if args.cuda else "cpu")
    torch.manual_seed(0)
    vae = pvae.VAE.mlp((28, 28), 50, [400]).to(device)
    x = torch.bernoulli(torch.full((max(10_000, args.images), 28, 28), 0.13, device=device))
    print(header("python benchmarks/evidence.py", device))
    by_guide(vae, x[: args.images], args.samples, args.repeats)
    if args.prior_large:
        by_prior(vae, x, 100_000, args.repeats)
    if args.growth:
        growth(vae, x)


def by_guide(vae: pvae.VAE, x: Tensor, num_samples: int, repeats: int) -> None:
    """Every way to sample from the guide, and the decoder's products for all pairs alone."""
    few, fewer = x[: max(10, len(x) // 5)], x[: max(10, len(x) // 20)]
    done = dict.fromkeys((PYRO, f"{PYRO}, validation off", BY_HAND, f"{BY_HAND}, torch.compile"), len(few))
    done[PYTHAE] = len(fewer)
    done[FEW] = len(x[:300])
    ways: dict[str, Way] = {
        FIRST: partial(first_call, vae, x, num_samples=num_samples, proposal="guide", compile=True),
        PVAE: partial(log_evidence, vae, x, num_samples=num_samples, proposal="guide", compile=True),
        FEW: partial(first_call, vae, x[:300], num_samples=num_samples, proposal="guide"),
        EAGER: partial(log_evidence, vae, x, num_samples=num_samples, proposal="guide", compile=False),
        PYRO: partial(pyro_weights, vae, few, num_samples, validation=True),
        f"{PYRO}, validation off": partial(pyro_weights, vae, few, num_samples, validation=False),
        BY_HAND: peers.plain_log_px(vae, few, num_samples),
        f"{BY_HAND}, torch.compile": peers.plain_log_px(vae, few, num_samples, compiled=True),
    }
    add_peers(ways, {PYTHAE: partial(peers.pythae_log_px, vae, fewer, num_samples)})
    for name, multiply in products(x.device).items():
        ways[f"{PRODUCTS}, {name}"] = partial(decoding, vae, x, num_samples, multiply)
    measure(ways, 1, x.device)  # first calls pay for start-up
    seconds, results = measure(ways, repeats, x.device)
    micro = {
        name: [1e6 * s / (done.get(name, len(x)) * num_samples) for s in values] for name, values in seconds.items()
    }
    columns = {"to Pyro": ratio(micro, lambda _: PYRO), "to pythae": ratio(micro, lambda _: PYTHAE)}
    print(f"\n{len(x):,} images x {num_samples:,} samples from the guide:\n")
    print(table("microseconds a pair", micro, {**columns, "to the products": to_products(micro)}))
    theirs = f", pythae {len(fewer):,}" if PYTHAE in ways else ""
    print(
        f"\nPyro and PyTorch by hand did {len(few):,} of the images{theirs}. First calls are of a pair that is new to"
    )
    print("pvae: they capture, and load the compiler's copy from disk where there is one. The second compiles nothing.")
    check({name: values[-1] for name, values in results.items()})


def by_prior(vae: pvae.VAE, x: Tensor, num_samples: int, repeats: int) -> None:
    """Many samples from the prior, which all images share, and the same products alone."""
    ways: dict[str, Way] = {
        "pvae.log_evidence, prior": partial(log_evidence, vae, x, num_samples=num_samples, proposal="prior")
    }
    for name, multiply in products(x.device).items():
        ways[f"{PRODUCTS}, {name}"] = partial(sharing, vae, x, num_samples, multiply)
    seconds, _ = measure(ways, repeats, x.device)
    print(f"\n{len(x):,} images x {num_samples:,} samples from the prior:\n")
    print(table("seconds", seconds, {"to the products": to_products(seconds)}))


def growth(vae: pvae.VAE, x: Tensor, most: int = 10**7) -> None:
    """Prints seconds of one call, and microseconds a pair, for several numbers of images and samples.

    The guide is left out where there are more than ``most`` pairs.
    """
    draws = [100, 1000, 10_000, 100_000]
    print("\nGrowth, seconds of one call as users make it (microseconds a pair), by samples:\n")
    print(f"| proposal | images | {' | '.join(f'{k:,}' for k in draws)} |\n| --- {'| ---: ' * (1 + len(draws))}|")
    for proposal in ("guide", "prior"):
        for n in (100, 1000, 10_000):
            cells = []
            for k in draws:
                if proposal == "guide" and n * k > most:
                    cells.append("-")
                    continue
                one = {"": partial(log_evidence, vae, x[:n], num_samples=k, proposal=proposal)}
                ((seconds,),) = measure(one, 1, x.device)[0].values()
                cells.append(f"{seconds:.2f} ({1e6 * seconds / (n * k):.3g})")
            print(f"| {proposal} | {n:,} | {' | '.join(cells)} |", flush=True)


def log_evidence(vae: pvae.VAE, x: Tensor, **options: Any) -> pvae.EvidenceEstimate:
    return pvae.log_evidence(vae.model, vae.guide, x, device=x.device, **options)


def first_call(vae: pvae.VAE, x: Tensor, **options: Any) -> pvae.EvidenceEstimate:
    """`log_evidence` of a pair that no call has seen before: a copy of the VAE."""
    return log_evidence(copy.deepcopy(vae), x, **options)


def pyro_weights(vae: pvae.VAE, x: Tensor, num_samples: int, *, validation: bool) -> None:
    """Pyro's weights, for ten images at once; all at once would need tens of gigabytes."""
    with torch.no_grad(), pyro.validation_enabled(validation):
        for batch in x.split(10):
            vectorized_importance_weights(vae.model, vae.guide, batch, num_samples=num_samples, max_plate_nesting=1)


def decoding(vae: pvae.VAE, x: Tensor, num_samples: int, multiply: Multiply) -> None:
    """The decoder's two products for every pair, some thousands at once: the floor for the guide."""
    *_, first, last = peers.layers(vae)
    size = 2**17 if x.is_cuda else 2**11
    z, hidden = (torch.randn(size, layer.in_features, device=x.device) for layer in (first, last))
    with torch.no_grad():
        for done in range(0, len(x) * num_samples, size):
            rows = min(size, len(x) * num_samples - done)
            multiply(z[:rows], first.weight)
            multiply(hidden[:rows], last.weight)


def sharing(vae: pvae.VAE, x: Tensor, num_samples: int, multiply: Multiply) -> None:
    """The decoder's two products for every draw, and that of all logits with all images: the floor for the prior."""
    *_, first, last = peers.layers(vae)
    images = x.flatten(1)
    size = 2**13 if x.is_cuda else 2**9
    z, hidden, logits = (torch.randn(size, n, device=x.device) for n in (*first.weight.shape[::-1], last.out_features))
    with torch.no_grad():
        for done in range(0, num_samples, size):
            rows = min(size, num_samples - done)
            multiply(z[:rows], first.weight)
            multiply(hidden[:rows], last.weight)
            for batch in images.split(4096):
                multiply(logits[:rows], batch)


def to_products(values: Values) -> Callable[[str], str]:
    """The column of ratios to the fastest products."""
    fastest = lowest(values, [name for name in values if name.startswith(PRODUCTS)])
    return ratio(values, lambda _: fastest)


def check(results: dict[str, Any]) -> None:
    """Compares means over the images that two ways share; ends with an error where they differ by more than noise."""
    compiled, eager = results[PVAE], results[EAGER]
    far = (compiled.log_px - eager.log_px).abs().max().item()
    print(f"Compiled and not, log p(x) of an image is at most {far:.1e} nats apart.")
    if not far < 1e-3:
        sys.exit(f"{PVAE} and {EAGER} differ by {far:.2g} nats for an image.")
    for name in (BY_HAND, f"{BY_HAND}, torch.compile", PYTHAE):
        if name not in results:
            continue
        theirs, n = results[name]
        mean = compiled.log_px[:n].mean().item()
        error = math.sqrt(2 * compiled.std_error[:n].square().sum().item()) / n
        print(f"{name}: {theirs:.3f} nats per datum, {PVAE}: {mean:.3f}, error of the difference {error:.3f}.")
        if not abs(theirs - mean) < 5 * error:
            sys.exit(f"{name} and {PVAE} differ by more than noise.")


if __name__ == "__main__":
    main()
