"""Puts the picture and the numbers of one run on MNIST into the README.

    python docs/readme.py            # runs the example, and keeps its report.json and its picture under docs/
    python docs/readme.py --kept     # writes the README anew from what is kept

MNIST is read from the folder that PVAE_DATA names, or downloaded. What is written stands between two comments of the
README each; the rest of it is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "mnist_svi.py"
README = ROOT / "README.md"
REPORT = ROOT / "docs" / "results" / "report.json"
PICTURE = ROOT / "docs" / "images" / "guide_and_prior.png"

sys.path.insert(0, str(EXAMPLE.parent))
import mnist_svi as example  # noqa: E402

from pvae.evidence.verdicts import STAGES  # noqa: E402


def picture(report: Mapping[str, Any]) -> str:
    """The picture, and what it is of."""
    k, of = report["log_px"]["guide"]["num_samples"], report["median_gap"]
    alt = "Where samples fall, how well they explain an image, and what they say log p(x) is"
    caption = (
        f"*MNIST test image {of['test_image']:,}, for a VAE trained for {report['epochs']} epochs. The median one: "
        f"of {report['num_eval']:,} test images half have estimates by guide and prior, {k:,} samples each, that are "
        f"further apart than its {of['nats']:.1f} nats.*"
    )
    return f'<img src="{PICTURE.relative_to(ROOT)}" width="450" alt="{alt}">\n\n{wrap(caption)}'


def numbers(report: Mapping[str, Any]) -> str:
    """The table, and what is to be read from it."""
    e, versions = example.estimates(report), report["versions"]
    auto, guide, prior, long_prior = (e[name]["mean"] for name in example.ROWS)
    threads, seconds = report["threads"], report["seconds"]
    busy = ", on a machine that was busy with other work" if report["cpu_seconds"] < 0.8 * seconds else ""
    run = (
        f"(Seed {report['seed']}, {report['num_eval']:,} test images, torch {versions['torch']}, Pyro "
        f"{versions['pyro-ppl']}, {threads} thread{'s' * (threads > 1)} of the CPU: {report['train_seconds']:.0f} s of "
        f"training and {seconds:.0f} s in all, {report['cpu_seconds']:.0f} s of the CPU's time{busy}. The ELBO of all "
        f"{report['num_test']:,} test images is {report['elbo']:.2f}.)"
    )
    stages, heavy, left = e["auto"]["stages"], e["guide"]["khat_above_0.7"], e["auto"]["unresolved"]
    answers = ", ".join(f"{stage} {stages[stage]:,}" for stage in STAGES if stage in stages)
    named = f"{left:.1%} are" if left else "here none is"
    reading = (
        f"The first line of log p(x) is the default. It tries the guide, and where its weights will not do, a Gaussian "
        f"fitted to the image, heavier tails, and chains that are annealed. Here answers come from: {answers}. Where "
        f"none is to be believed an image is unresolved, and named: {named}. The guide alone adds "
        f"{guide - report['elbo_of_evaluated']:.1f} nats to the ELBO. That is still {auto - guide:.1f} nats low, which "
        f"its small standard error does not say. Its k-hat does: for {heavy:.0%} of the images its weights have a "
        f"heavy tail. The prior finds {guide - prior:.0f} nats less than the guide, and {guide - long_prior:.0f} less "
        f"with a hundred times the samples. How such numbers compare with annealed importance sampling is in the "
        f"[benchmarks](docs/benchmarks.md)."
    )
    said = textwrap.fill(example.sentence(report), 100)
    return f"```text\n{example.table(report)}\n\n{said}\n```\n\n{wrap(run)}\n\n{wrap(reading)}"


def wrap(text: str) -> str:
    """Wraps a paragraph at the README's width; a link stays on one line."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def render(readme: str, report: Mapping[str, Any]) -> str:
    """Fills the blocks of the README that a report decides; returns its text."""
    for name, text in (("picture", picture(report)), ("numbers", numbers(report))):
        start, end = f"<!-- {name}: written by docs/readme.py -->\n", f"<!-- end of {name} -->\n"
        if not readme.count(start) == readme.count(end) == 1:
            raise SystemExit(f"{README.name} must have one line {start.strip()!r}, and one {end.strip()!r} below it.")
        before, rest = readme.split(start)
        readme = f"{before}{start}{text}\n{end}{rest.split(end)[1]}"
    return readme


def main() -> None:
    """Runs the example, unless the kept run is asked for, and writes the README."""
    parser = argparse.ArgumentParser(description="Put the picture and the numbers of one run on MNIST into the README.")
    parser.add_argument("--kept", action="store_true", help="of the run whose report.json is kept, not of a new one")
    if not parser.parse_args().kept:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(EXAMPLE), "--dataset", "mnist", "--output-dir", folder]
            subprocess.run(command, check=True)
            for path in (REPORT, PICTURE):
                path.parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(folder) / path.name, path)
    README.write_text(render(README.read_text(), json.loads(REPORT.read_text())))


if __name__ == "__main__":
    main()
