"""The README shows what the kept run reported, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made():
    """The script that writes the README."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(made):
    return json.loads(made.REPORT.read_text())


def test_the_readme_is_what_the_report_gives(made, report):
    assert made.README.read_text() == made.render(made.README.read_text(), report)


def test_another_report_changes_both_blocks_and_nothing_else(made, report):
    before = made.README.read_text()
    after = made.render(before, {**report, "seed": 7, "median_gap": {"test_image": 123, "nats": 45.6}})
    assert "MNIST test image 123," in after
    assert "than its 45.6 nats.*" in " ".join(after.split())
    assert "(Seed 7," in after
    assert made.render(after, report) == before


def test_the_table_has_a_row_for_each_estimate_with_the_reports_numbers(made, report):
    lines = made.README.read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("nats per datum"))
    columns = ["nats per datum", "samples", "mean", "std error", "ESS", "k-hat", "k-hat > 0.7", "seconds"]
    assert [part.strip() for part in lines[head].split("  ") if part.strip()] == columns
    elbo, *rows = lines[head + 2 : head + 2 + 1 + len(made.example.ROWS)]
    assert elbo.split() == ["ELBO", "1000", f"{report['elbo_of_evaluated']:.2f}", elbo.split()[-1]]
    assert list(made.example.ROWS) == list(report["log_px"])
    for row, (name, title) in zip(rows, made.example.ROWS.items(), strict=True):
        assert row.startswith(title)
        values = row.removeprefix(title).split()
        e = report["log_px"][name]
        digits = {"samples_median": 0, "mean": 2, "std_error": 3, "ess_median": 1, "khat_median": 2}
        assert values[:5] == [f"{e[key]:.{places}f}" for key, places in digits.items()]
        assert values[5] == f"{e['khat_above_0.7']:.0%}"
        assert ("resolved" in row) == (name == "auto")
        assert ("only a lower bound" in row) == (name != "auto" and e["khat_above_0.7"] > 0.5)


def test_the_picture_is_of_the_same_run(made, report):
    with Image.open(made.PICTURE) as picture:
        assert picture.text["Comment"] == made.example.origin(report)
        assert picture.height > 2 * picture.width, "one panel above another, for a phone"
    assert str(made.PICTURE.relative_to(ROOT)) in made.README.read_text()


def test_what_the_prose_calls_it_holds(report):
    """The words around the numbers: low, heavy, less, unresolved."""
    auto, guide, prior, long_prior = (report["log_px"][name] for name in report["log_px"])
    assert report["dataset"] == "mnist"
    assert report["binarization"] == "dynamic"
    assert long_prior["num_samples"] == 100 * prior["num_samples"]
    assert guide["mean"] - report["elbo_of_evaluated"] > 1
    assert prior["mean"] < long_prior["mean"] < guide["mean"] - 10
    assert guide["khat_above_0.7"] > 0.9
    assert auto["mean"] - guide["mean"] > 10 * auto["std_error"]
    assert auto["unresolved"] < 0.05
    assert sum(auto["stages"].values()) == report["num_eval"]
    assert 0 < report["median_gap"]["nats"] < 2 * (guide["mean"] - prior["mean"])


def test_a_readme_without_a_block_is_refused(made, report):
    with pytest.raises(SystemExit, match="must have one line '<!-- picture"):
        made.render("# pvae", report)


def test_the_code_does_what_the_readme_shows(made, capsys):
    text = made.README.read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    shown = re.search(r"^```text\n(log p\(x\) of .*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1]
    assert len(code) == 2
    names = {}
    exec(code[0], names)
    printed = capsys.readouterr().out
    assert [line[:16] for line in printed.splitlines()][:7] == [line[:16] for line in shown.splitlines()][:7]
    mean, elbo = (float(re.search(rf"{name} +(-\d+\.\d+)", shown)[1]) for name in ("mean", "ELBO"))
    # Other processors round otherwise, and training goes another way: without its seed it came to -19.22.
    assert abs(names["estimate"].mean - mean) < 0.5
    assert elbo < mean
    exec(code[1], names)
    assert all(len(each) == 360 for each in names["per_datum"])
    plt.close("all")
