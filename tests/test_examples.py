"""Every example with tiny arguments: as a person runs it where that matters, else in this process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import arviz
import pytest
import torch
import xarray
from matplotlib import pyplot
from PIL import Image

import pvae

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = ["--epochs", "1", "--num-samples", "2", "--num-eval", "3", "--hidden", "8", "--latent-dim", "2"]
TINY = ["--dataset", "digits", *SMALL]
# Tiny arguments for each script; --output-dir is added.
RUNS = {
    "mnist_svi.py": TINY,
    "any_pyro_model.py": ["--num-data", "8", "--epochs", "3", "--num-samples", "200"],
    "bayesian_workflow.py": ["--num-plants", "6", "--epochs", "1", "--num-samples", "200"],
    "ae_vs_vae.py": ["--epochs", "1", "--num-eval", "12", "--hidden", "8", "--latent-dim", "2"],
    "frey_like_gaussian.py": [
        *["--epochs", "1", "--num-images", "60", "--hidden", "8", "--num-samples", "30", "--num-eval", "3"]
    ],
    "image_search.py": [
        "--epochs",
        "1",
        "--num-queries",
        "5",
        "--hidden",
        "8",
        "--latent-dim",
        "2",
        "--num-shown",
        "2",
    ],
}


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def load(script):
    spec = importlib.util.spec_from_file_location(Path(script).stem, EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example():
    return load("mnist_svi.py")


@pytest.fixture
def main(example, capsys, monkeypatch):
    """Runs the example in this process; returns the exit code and what was printed to stdout and stderr.

    Figures are drawn but not painted, which would take most of the time; those of `results` are.
    """
    monkeypatch.setattr(pyplot, "savefig", lambda file, **_: file.write(bytes(1000)))

    def done(*arguments):
        try:
            code = example.main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return done


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUNS.keys()


def call(script, *arguments):
    """The exit code of a script that is run in this process."""
    try:
        return script.main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("name", RUNS)
def test_examples_say_what_they_take(name, capsys):
    assert call(load(name), "--help") == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--cuda", "--seed", "--output-dir"))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "mnist_svi.py"])
def test_an_example_writes_a_report_and_its_figures(name, caller_state, capsys, tmp_path):
    example, before = load(name), caller_state()
    folder = tmp_path / "made by the example"
    assert call(example, *RUNS[name], "--output-dir", folder) == 0, capsys.readouterr().err
    report = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert {"seed", "device", "versions"} <= report.keys()
    assert {path.stem for path in folder.iterdir()} == {"report", *example.FIGURES}
    for figure in folder.glob("*.png"):
        with Image.open(figure) as picture:
            assert picture.width >= 500
            assert picture.convert("L").getextrema()[0] < 128, "something is drawn"
    assert not pyplot.get_fignums(), "no figure is left open"
    after = caller_state()
    assert (after.grad, after.validation) == (before.grad, before.validation)


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'h5py'"), ValueError("no backend\nof these:")])
def test_bayesian_workflow_goes_on_where_no_package_can_write_its_draws(error, capsys, monkeypatch, tmp_path):
    def to_netcdf(*_, **__):
        raise error

    example = load("bayesian_workflow.py")
    kind = vars(arviz).get("InferenceData", xarray.DataTree)  # as in ArviZ 0.x, and 1.x
    monkeypatch.setattr(kind, "to_netcdf", to_netcdf)
    assert call(example, *RUNS["bayesian_workflow.py"], "--output-dir", tmp_path) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "report.nc" in line)
    assert line.startswith(f"report.nc was not written: {str(error).partition(chr(10))[0]}. ")
    assert line.endswith("pip install 'h5netcdf[h5py]'")
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", *(f"{name}.png" for name in example.FIGURES)}


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_that_cannot_be_made_is_one_line_and_exit_2(name, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert call(load(name), *RUNS[name], "--output-dir", tmp_path / "file" / "below") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--output-dir" in error


@pytest.mark.parametrize("name", RUNS)
def test_no_gpu_is_one_line_and_exit_2(name, capsys, tmp_path):
    assert call(load(name), *RUNS[name], "--cuda", "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--cuda: no CUDA device" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in RUNS if name != "mnist_svi.py"])
def test_a_signal_in_training_ends_an_example(name, interrupt, tmp_path):
    interrupt(1, signal.SIGTERM)
    assert call(load(name), *RUNS[name], "--output-dir", tmp_path) == 143
    assert not list(tmp_path.glob("report.json"))


@pytest.mark.parametrize(
    "name, arguments, code, match",
    [
        ("image_search.py", ["--num-neighbors", "2000"], 1, "--num-neighbors: there are 1437 images in the index"),
        ("image_search.py", ["--latent-dim", "0"], 2, "--latent-dim: must be a whole number of at least 1"),
        ("image_search.py", ["--lr", "0"], 1, "lr must be a positive number"),
        ("ae_vs_vae.py", ["--flips", "0.5"], 1, "--flips must lie between 0 and 0.5"),
        ("frey_like_gaussian.py", ["--noise", "0"], 2, "--noise: must be a positive number"),
        ("frey_like_gaussian.py", ["--num-images", "9"], 1, "--num-images must be at least 10"),
    ],
)
def test_what_an_example_cannot_do_is_one_clear_error(name, arguments, code, match, capsys, tmp_path):
    assert call(load(name), *RUNS[name], *arguments, "--output-dir", tmp_path) == code
    assert match in capsys.readouterr().err


def test_faces_are_smooth_functions_of_two_factors():
    draw = load("frey_like_gaussian.py").draw_faces
    factors = torch.zeros(3, 2)
    factors[1, 0], factors[2, 1] = 0.5, 0.5
    rest, turned, smiling = draw(factors)
    assert rest.shape == (28, 20)
    assert rest.min() >= 0
    assert rest.max() <= 1
    torch.testing.assert_close(rest, rest.flip(1))  # looks ahead
    assert (turned - rest).abs().max() > 0.1
    torch.testing.assert_close(smiling, smiling.flip(1))
    above, below = (smiling - rest).abs().tensor_split([14])
    assert above.max() < 0.01
    assert below.max() > 0.1


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
        "log p(x) ",
        "log p(x) by the guide alone",
        "log p(x) by the prior alone",
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
    for proposal, k in (("auto", None), ("guide", 30), ("prior", 30), ("prior_100x", 3000)):
        numbers = report["log_px"][proposal]
        expected = {"mean", "std_error", "num_samples", "ess_median", "khat_median", "khat_above_0.7", "seconds"}
        assert expected <= numbers.keys()
        assert k is None or numbers["num_samples"] == numbers["samples_median"] == k
        assert 0 <= numbers["khat_above_0.7"] <= 1
    auto = report["log_px"]["auto"]
    assert auto["num_samples"] >= auto["samples_median"] >= 30
    assert sum(auto["stages"].values()) == 3
    assert 0 <= auto["unresolved"] <= 1
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["elbo"] == report["history"]["validation_elbo"][-1]


LONG = ["--dataset", "digits", *SMALL[2:], "--epochs", "60"]


@pytest.mark.slow
def test_stopped_by_sigterm_it_exits_143_and_the_same_command_goes_on_to_the_same_numbers(main, tmp_path):
    assert main(*LONG, "--output-dir", tmp_path / "whole")[0] == 0
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
    assert main(*LONG, "--checkpoint", tmp_path / "run", "--output-dir", tmp_path / "parts")[0] == 0
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


def test_too_few_samples_for_a_khat_are_not_called_fine(main, tmp_path):
    _, printed, _ = main(*TINY, "--output-dir", tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["log_px"]["guide"]["khat_median"] is None
    assert report["log_px"]["guide"]["khat_above_0.7"] is None
    assert "nan" in next(line for line in printed.splitlines() if "by the guide" in line)


def test_the_figures_are_pictures_of_this_run(results, example):
    _, folder = results
    report = json.loads((folder / "report.json").read_text())
    assert {path.stem for path in folder.glob("*.png")} == {*example.FIGURES}
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.text["Comment"] == example.origin(report)


def test_the_figures_are_drawn_for_the_image_of_median_gap(example, main, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(example, "evidence", lambda *args, of=example.evidence: seen.setdefault("found", of(*args)))
    monkeypatch.setattr(example, "draw_guide_and_prior", lambda vae, x, *_: seen.update(x=x))
    assert main(*TINY, "--num-eval", "7", "--output-dir", tmp_path)[0] == 0
    gaps = seen["found"]["guide"].log_px - seen["found"]["prior"].log_px
    told = json.loads((tmp_path / "report.json").read_text())["median_gap"]
    assert told["nats"] == gaps.sort().values[3].item()
    torch.testing.assert_close(seen["x"][0], pvae.datasets.digits().test_x[told["test_image"]])


def test_the_title_is_what_the_repetitions_show(example):
    noise = torch.randn(200, 20, dtype=torch.float64)
    lower, same = noise - 30, noise.flip(1)
    assert example.headline({"guide": noise, "prior": lower}).startswith("Why the guide beats the prior:\n30.")
    assert example.headline({"guide": lower, "prior": noise}).startswith("Here the prior beats the guide:\n30.")
    assert example.headline({"guide": noise, "prior": same}) == "Guide and prior agree\nfrom 200 samples"
    nothing = torch.full_like(noise, -torch.inf)
    assert "inf nats more" in example.headline({"guide": noise, "prior": nothing})


def numbers(mean, std_error=0.01, ess=5.0):
    rest = {"num_samples": 1000, "samples_median": 1000, "khat_median": None, "khat_above_0.7": None, "seconds": 1.0}
    return {"mean": mean, "std_error": std_error, "ess_median": ess, **rest}


@pytest.mark.parametrize(
    "prior, long_prior, unresolved, said",
    [
        (numbers(-170.0, ess=1.0), numbers(-130.0), 0.0, ["finds 72.0 nats more", ", because", "still misses 32.0"]),
        (
            numbers(-98.5, ess=9.0),
            numbers(-98.03),
            0.012,
            ["finds 0.5 nats more", "prior: about", "catches up", "1.2%"],
        ),
        (numbers(-98.3, 0.2), numbers(-98.0), 0.0, ["Guide and prior agree"]),  # 0.3 nats are 1.5 standard errors
        (numbers(-97.0), numbers(-97.0), 0.0, ["The prior finds 1.00 nats more of log p(x) than the guide: about"]),
    ],
)
def test_the_sentence_says_what_the_numbers_show(example, prior, long_prior, unresolved, said):
    auto = numbers(-96.5) | {"unresolved": unresolved, "stages": {"refined": 1000}}
    log_px = {"auto": auto, "guide": numbers(-98.0), "prior": prior, "prior_100x": long_prior}
    sentence = example.sentence({"log_px": log_px})
    assert "log p(x) is -96.50 nats in the mean" in sentence
    assert "The guide alone finds 1.50 nats less." in sentence
    assert ("no image unresolved" in sentence) == (unresolved == 0)
    assert all(part in sentence for part in said), sentence


def test_the_table_says_what_is_unresolved(example):
    auto = numbers(-96.5) | {"unresolved": 0.012, "stages": {"refined": 1000}}
    bad = numbers(-98.0) | {"khat_median": 1.2, "khat_above_0.7": 0.9}
    log_px = {"auto": auto, "guide": bad, "prior": bad, "prior_100x": numbers(-98.0)}
    elbo = {"elbo_of_evaluated": -104.0, "elbo_of_evaluated_std_error": 0.01}
    rows = example.table({"log_px": log_px, **elbo}).splitlines()[-4:]
    notes = [row.partition("<- ")[2] for row in rows]
    assert notes == ["1.2% unresolved", "only a lower bound", "only a lower bound", ""]


def test_numbers_that_json_lacks_do_not_lose_a_report(example):
    report = {"elbo": -math.inf, "history": {"validation_elbo": [-1.0, math.nan]}}
    assert json.loads(example.as_json(report)) == {"elbo": None, "history": {"validation_elbo": [-1.0, None]}}


def not_reached(*_, **__):
    raise AssertionError("training began")


@contextmanager
def disk():
    """A block with a function after whose call no file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)  # before pytest writes anything


@pytest.mark.parametrize(
    "taken", ["file/below", "file", "report.json is a folder", "guide_and_prior.png is a folder", "full", "figures"]
)
def test_results_that_could_not_be_kept_are_one_clear_error_before_training(
    taken, example, main, monkeypatch, tmp_path
):
    monkeypatch.setattr(example.pvae, "fit", not_reached)
    folder, match = tmp_path / "out", "--output-dir"
    if taken.startswith("file"):
        (tmp_path / "file").write_text("")
        folder = tmp_path / taken
    elif taken.endswith("folder"):
        (folder / taken.split()[0]).mkdir(parents=True)
        match = f"--output-dir: {folder / taken}, where"
    elif taken == "full":
        match = "File too large"
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        match = "takes matplotlib"
    with disk() as full:
        if taken == "full":
            full(2**19)
        code, _, error = main(*TINY, "--output-dir", folder)
    assert code == 2
    assert error.count("\n") == 1
    assert match in error
    assert not list(tmp_path.glob("**/*.p*t*")), "nothing is left behind"


def test_a_report_that_cannot_be_written_at_the_end_is_printed(example, main, monkeypatch, tmp_path):
    (tmp_path / "report.json").write_text("of an earlier run")

    with disk() as full:

        def then_full(*args, of=example.evidence):
            found = of(*args)
            full(100)
            return found

        monkeypatch.setattr(example, "evidence", then_full)
        code, printed, errors = main(*TINY, "--output-dir", tmp_path)
    assert code == 1
    assert "log p(x) by the guide" in printed
    assert "report.json and figures are in" not in printed
    report, end = json.JSONDecoder().raw_decode(errors, errors.index("{"))
    assert report["log_px"]["guide"]["num_samples"] == 2
    assert errors[end:].count("error: no ") == len(example.FIGURES)
    assert (tmp_path / "report.json").read_text() == "of an earlier run"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_folder_that_vanished_meanwhile_is_made_again(example, main, monkeypatch, tmp_path):
    monkeypatch.setattr(
        example.pvae, "fit", lambda *args, of=pvae.fit, **options: (folder.rmdir(), of(*args, **options))[1]
    )
    folder = tmp_path / "out"
    assert main(*TINY, "--output-dir", folder)[0] == 0
    assert (folder / "report.json").exists()


def test_a_figure_that_fails_loses_neither_the_report_nor_the_others(example, main, monkeypatch, tmp_path):
    monkeypatch.setattr(pvae.plots, "reconstructions", lambda *_: 1 / 0)
    code, printed, errors = main(*TINY, "--output-dir", tmp_path)
    assert code == 1
    assert errors == "error: no reconstructions.png: division by zero\n"
    assert "log p(x) by the guide" in printed
    assert {path.stem for path in tmp_path.iterdir()} == {"report", *example.FIGURES} - {"reconstructions"}


def test_run_from_a_source_tree_that_was_never_installed(main, monkeypatch, tmp_path):
    of = importlib.metadata.Distribution.from_name

    def never_installed(name):
        if name == "pvae":
            raise importlib.metadata.PackageNotFoundError(name)
        return of(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", never_installed)
    assert main(*TINY, "--output-dir", tmp_path)[0] == 0
    versions = json.loads((tmp_path / "report.json").read_text())["versions"]
    assert {"pvae", "python", "torch", "pyro-ppl", "numpy"} <= versions.keys()


@pytest.mark.parametrize(
    "options",
    [
        ["--network", "conv"],
        ["--latent-dim", "1"],
        ["--likelihood", "gaussian"],
        ["--likelihood", "gaussian-per-pixel", "--network", "conv"],
        ["--binarization", "dynamic", "--hidden", "8", "4", "--seed", 2**63 - 1],
    ],
)
def test_every_choice_runs(options, main, tmp_path):
    code, _, errors = main(*TINY, *options, "--output-dir", tmp_path)
    assert code == 0, errors
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["binarization"] == ("none" if "gaussian" in str(options) else report["binarization"])


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty home, and a proxy that refuses: nothing can be downloaded."""
    proxy = "http://127.0.0.1:9"
    nowhere = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "", "PVAE_DATA": "", "http_proxy": proxy, "https_proxy": proxy}
    for name, value in nowhere.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("offline")
def test_without_mnist_and_network_auto_falls_back_aloud(main, tmp_path):
    code, printed, errors = main(*SMALL, "--output-dir", tmp_path / "out")
    assert code == 0, errors
    assert "NO MNIST: USING SCIKIT-LEARN'S 8 x 8 DIGITS INSTEAD" in printed.splitlines()[0]
    assert printed.splitlines()[1].startswith("digits, threshold binarization"), "one line says it all"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dataset"] == "digits"


@pytest.mark.usefixtures("offline")
def test_mnist_that_cannot_be_had_is_an_error(main, tmp_path):
    code, _, errors = main("--dataset", "mnist", "--output-dir", tmp_path / "out")
    assert code == 1
    assert "error: MNIST is not in" in errors


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--epochs", "0"], "--epochs: must be a whole number of at least 1"),
        (["--epochs", "1" + "0" * 30], "--epochs: must be a whole number of at most 2147483647"),
        (["--batch-size", "2147483648"], "--batch-size: must be a whole number of at most 2147483647"),
        (["--num-samples", "-5"], "--num-samples"),
        (["--num-samples", "9" * 5000], "--num-samples: must be a whole number of at most 2147483647"),
        (["--num-eval", "many"], "--num-eval"),
        (["--num-eval", "1" + "0" * 30], "--num-eval"),
        (["--latent-dim", "1" + "0" * 12], "--latent-dim: must be a whole number of at most 16384"),
        (["--hidden", "8", "1" + "0" * 12], "--hidden: must be a whole number of at most 16384"),
        (["--likelihood", "cauchy"], "--likelihood"),
        (["--lr", "0"], "--lr: must be a positive number"),
        (["--seed", "-1"], "--seed"),
        (["--seed", 2**63], "--seed: must be a whole number of at most 9223372036854775807"),
        (["--seed", 2**64], "--seed: must be a whole number of at most"),
        (["--seed", "1" + "0" * 30], "--seed: must be a whole number of at most"),
        (["--dataset", "cifar"], "--dataset"),
    ],
)
def test_a_bad_command_line_is_exit_2(arguments, match, main, example, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "load", not_reached)
    code, _, errors = main(*arguments, "--output-dir", tmp_path / "out")
    assert code == 2
    assert match in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--binarization", "none"], "site 'x' is Bernoulli"),
        (["--network", "conv", "--hidden", "8", "8"], "--hidden takes one width"),
    ],
)
def test_what_cannot_work_is_one_clear_error(arguments, match, main, tmp_path):
    code, _, errors = main(*TINY, *arguments, "--output-dir", tmp_path)
    assert code == 1
    assert match in errors
