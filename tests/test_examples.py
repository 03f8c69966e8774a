"""Every example, run as a person runs it, with tiny arguments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--epochs", "1", "--num-samples", "2", "--num-eval", "3", "--hidden", "8", "--latent-dim", "2"]
TINY = ["--dataset", "digits", *SMALL]
RUNS = {"mnist_svi.py": TINY}


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUNS.keys()


@pytest.mark.parametrize("script", RUNS)
def test_examples_say_what_they_take(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert "--cuda" in done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "made by the example"
    done = run("mnist_svi.py", *TINY, "--num-samples", 30, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, folder


def test_the_table_has_every_row(results):
    printed, _ = results
    for row in (
        "ELBO",
        "log p(x) by the guide",
        "refined for each image",
        "log p(x) by the prior",
        "with 100 times the samples",
    ):
        assert row in printed
    assert "digits, threshold binarization, 1437 training images, on cpu" in printed


def test_the_report_has_every_number(results):
    _, folder = results
    report = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    keys = "dataset binarization num_train num_test epochs seed device versions train_seconds elbo log_px"
    assert set(keys.split()) <= report.keys()
    assert report["dataset"] == "digits"
    assert report["binarization"] == "threshold"
    assert (report["num_train"], report["num_test"], report["num_eval"], report["epochs"]) == (1437, 360, 3, 1)
    for proposal, k in (("guide", 30), ("refined", 30), ("prior", 30), ("prior_100x", 3000)):
        numbers = report["log_px"][proposal]
        expected = {"mean", "std_error", "num_samples", "ess_median", "khat_median", "khat_above_0.7", "seconds"}
        assert expected <= numbers.keys()
        assert numbers["num_samples"] == k
        assert 0 <= numbers["khat_above_0.7"] <= 1
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["elbo"] == report["history"]["validation_elbo"][-1]


LONG = ["--dataset", "digits", *SMALL[2:], "--epochs", "150"]


def test_stopped_by_sigterm_it_exits_143_and_the_same_command_goes_on_to_the_same_numbers(tmp_path):
    whole = run("mnist_svi.py", *LONG, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, EXAMPLES / "mnist_svi.py", *LONG, "--checkpoint", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = set(tmp_path.glob("run/epoch-*"))
        going = subprocess.Popen(
            [*map(str, command), "--output-dir", str(tmp_path / "parts")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        while not set(tmp_path.glob("run/epoch-*/manifest.json")) - {p / "manifest.json" for p in before}:
            assert going.poll() is None
            time.sleep(0.005)
        going.send_signal(number)
        printed, _ = going.communicate()
        assert going.returncode == code
        assert "stopped by a signal after" in printed
        assert "the same command goes on from there" in printed
    done = run("mnist_svi.py", *LONG, "--checkpoint", tmp_path / "run", "--output-dir", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "parts")]
    for report in reports:
        report["history"].pop("seconds")
        for numbers in report["log_px"].values():
            numbers.pop("seconds")
    assert reports[0]["history"] == reports[1]["history"]
    assert reports[0]["log_px"] == reports[1]["log_px"]


@pytest.mark.slow
def test_two_processes_make_one_report(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [EXAMPLES / "mnist_svi.py", *LONG, "--output-dir", tmp_path, "--checkpoint", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("log p(x) by the guide") == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["processes"] == 2
    assert report["num_eval"] == 3


def test_too_few_samples_for_a_khat_are_not_called_fine(tmp_path):
    done = run("mnist_svi.py", *TINY, "--output-dir", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["log_px"]["guide"]["khat_median"] is None
    assert report["log_px"]["guide"]["khat_above_0.7"] is None
    assert "nan" in next(line for line in done.stdout.splitlines() if "by the guide" in line)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("mnist_svi.py", *TINY, "--output-dir", tmp_path / "file" / "below")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "file" in done.stderr


def test_the_figures_are_pictures(results):
    _, folder = results
    names = {"learning_curve", "reconstructions", "samples", "why_the_guide_beats_the_prior"}
    assert {path.stem for path in folder.glob("*.png")} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


@pytest.mark.parametrize(
    "options",
    [
        ["--network", "conv"],
        ["--latent-dim", "1"],
        ["--likelihood", "gaussian"],
        ["--likelihood", "gaussian-per-pixel", "--network", "conv"],
        ["--binarization", "dynamic", "--hidden", "8", "4", "--seed", "3"],
    ],
)
def test_every_choice_runs(options, tmp_path):
    done = run("mnist_svi.py", *TINY, *options, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["binarization"] == ("none" if "gaussian" in " ".join(options) else report["binarization"])


def offline(tmp_path):
    """An empty home, and a proxy that refuses: nothing can be downloaded."""
    proxy = "http://127.0.0.1:9"
    return {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "PVAE_DATA": "", "http_proxy": proxy, "https_proxy": proxy}


def test_without_mnist_and_network_auto_falls_back_aloud(tmp_path):
    done = run("mnist_svi.py", *SMALL, "--output-dir", tmp_path / "out", **offline(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "NO MNIST: USING SCIKIT-LEARN'S 8 x 8 DIGITS INSTEAD" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1].startswith("digits, threshold binarization"), "one line says it all"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dataset"] == "digits"


def test_mnist_that_cannot_be_had_is_an_error(tmp_path):
    done = run("mnist_svi.py", "--dataset", "mnist", "--output-dir", tmp_path / "out", **offline(tmp_path))
    assert done.returncode == 1
    assert "error: MNIST is not in" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_one_line_and_exit_2(tmp_path):
    done = run("mnist_svi.py", "--cuda", "--output-dir", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--cuda: no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1"),
        (["--num-samples", "-5"], "--num-samples"),
        (["--num-eval", "many"], "--num-eval"),
        (["--likelihood", "poisson"], "--likelihood"),
        (["--lr", "0"], "--lr: must be a positive number"),
        (["--seed", "-1"], "--seed"),
        (["--dataset", "cifar"], "--dataset"),
    ],
)
def test_a_bad_command_line_is_exit_2(arguments, match):
    done = run("mnist_svi.py", *arguments)
    assert done.returncode == 2
    assert match in done.stderr


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--binarization", "none"], "site 'x' is Bernoulli"),
        (["--network", "conv", "--hidden", "8", "8"], "--hidden takes one width"),
    ],
)
def test_what_cannot_work_is_one_clear_error(arguments, match, tmp_path):
    done = run("mnist_svi.py", *TINY, *arguments, "--output-dir", tmp_path)
    assert done.returncode == 1
    assert match in done.stderr
    assert "Traceback" not in done.stderr
