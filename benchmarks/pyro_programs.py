"""`pvae.svi.CompiledSVI` in the place of `pyro.infer.SVI` for programs of many kinds: what is captured, what it gains.

Both take the same steps from the same seed, each in a param store of its own. Whole seconds hold capturing and
compiling; with an empty cache of the compiler (`--cold`) as at the very first run. Ends with an error if losses differ.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from pyro_models import PROGRAMS
from side_by_side import arguments, header

from pvae.svi import CompiledSVI

_COMPARED = 20  # steps; after more, rounding grows


class Run(NamedTuple):
    """What a number of steps came to."""

    losses: list[float]
    seconds: float
    step: float  # the median of its second half's steps, in milliseconds
    captures: int
    said: str


def main() -> None:
    parser = arguments(__doc__ or "", repeats=3)
    parser.add_argument("--steps", type=int, default=1000, help="of each program")
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS), metavar="NAME")
    parser.add_argument("--cold", action="store_true", help="begin with an empty cache of the compiler")
    args = parser.parse_args()
    if args.cold:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    if args.cuda:
        torch.set_default_device("cuda")
    device = torch.get_default_device()
    print(header(f"python benchmarks/pyro_programs.py --steps {args.steps}", device))
    print(
        "| program | captured | losses differ by | ms a step: SVI | CompiledSVI | ratio | whole s: SVI | CompiledSVI |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    wrong = []
    for name in args.programs:
        first = {kind: run(kind, name, args.steps) for kind in (SVI, CompiledSVI)}  # holds capturing and compiling
        later = [{kind: run(kind, name, args.steps) for kind in first} for _ in range(args.repeats - 1)]
        plain, ours = (statistics.median(each[kind].step for each in (first, *later)) for kind in first)
        apart = difference(first[SVI].losses, first[CompiledSVI].losses)
        captured = f"{first[CompiledSVI].captures}" if first[CompiledSVI].captures else "no"
        said = f": {first[CompiledSVI].said}" if first[CompiledSVI].said else ""
        print(
            f"| {name} | {captured}{said} | {apart:.0e} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} "
            f"| {first[SVI].seconds:.1f} | {first[CompiledSVI].seconds:.1f} |",
            flush=True,
        )
        if not apart < 1e-4:
            wrong.append(name)
    print(f"\nCaptured: the number of tensor programs. Losses: the largest relative difference in {_COMPARED} steps.")
    if wrong:
        sys.exit(f"losses are not those of pyro.infer.SVI: {', '.join(wrong)}")


def run(kind: type[SVI], name: str, steps: int) -> Run:
    """Steps of a program from its beginning."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    program = PROGRAMS[name]()
    optimizer = pyro.optim.Adam({"lr": program.lr})
    turns: list[Any] = [kind(model, guide, optimizer, loss) for model, guide, loss in program.parts]
    losses, times = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, svi in zip(range(steps), itertools.cycle(turns)):
            start = time.perf_counter()
            losses.append(svi.step(*program.arguments(number)))
            times.append(time.perf_counter() - start)
    said = {str(w.message) for w in caught if issubclass(w.category, UserWarning) and "CompiledSVI" in str(w.message)}
    captures = sum(getattr(svi, "captures", 0) for svi in turns)
    median = statistics.median(times[steps // 2 :]) * 1e3
    return Run(losses, sum(times), median, captures, "; ".join(sorted(said)).replace("|", "/"))


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference of losses in the first steps."""
    pairs = list(zip(ours, theirs, strict=True))[:_COMPARED]
    return max(abs(a - b) / max(abs(a), 1e-6) for a, b in pairs)


if __name__ == "__main__":
    main()
