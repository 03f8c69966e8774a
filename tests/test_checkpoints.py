"""Nothing is lost: a run goes on exactly where it stopped, whatever stopped it, and damage is seen before it counts."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from conftest import ModulePair
from pyro import distributions as dist
from pyro.infer import autoguide
from safetensors.torch import load_file
from torch import nn
from torch.distributions import constraints

import pvae
from pvae.capture import captured as graphs
from pvae.capture.graph import Graph
from pvae.persistence import storage
from pvae.svi import load_checkpoint
from pvae.svi import step as engine
from pvae.svi.checkpoints import Folder
from pvae.svi.validation import Validation


class Bare:
    """Parameters made by ``pyro.param``, one of them constrained."""

    def model(self, x):
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(-1, 6), noise).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.0)) * x.sum(-1), 1.0))


class Busy(ModulePair):
    """Dropout, running statistics, and weights shared by two layers."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 6), nn.Linear(6, 4))
        self.encoder[3].weight = self.encoder[0].weight


class Auto:
    """A guide whose parameters are only made when it first runs."""

    def __init__(self):
        self.guide = autoguide.AutoNormal(self.model)

    def model(self, x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


PAIRS = {"vae": lambda: pvae.VAE.mlp(6, 2, [8]), "module": ModulePair, "bare": Bare, "busy": Busy, "auto": Auto}


def fit(pair, x, **options):
    defaults = {"epochs": 4, "batch_size": 64, "lr": 0.01, "progress": False, "validation": x[:100]}
    return pvae.fit(pair.model, pair.guide, x, **{**defaults, **options})


def state(pair, result):
    modules = [m for m in (pair, getattr(pair, "guide", None)) if isinstance(m, nn.Module)]
    weights = {f"{n}.{k}": v for n, m in enumerate(modules) for k, v in m.state_dict().items()}
    return {**weights, **result.params}


def assert_same(ours, theirs):
    """Weights, parameters and curves, to the bit."""
    (pair, result), (other, reference) = ours, theirs
    a, b = state(pair, result), state(other, reference)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert result.history.keys() == reference.history.keys()
    for name in result.history.keys() - {"seconds"}:
        assert result.history[name].tolist() == reference.history[name].tolist(), name


@pytest.fixture
def interrupt(monkeypatch):
    """A function that makes the process get a signal during the step of some number."""

    def at(step, number=signal.SIGTERM, times=1):
        taken, original = [], engine.Step.__call__

        def call(self, *args):
            taken.append(1)
            if len(taken) == step:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return original(self, *args)

        monkeypatch.setattr(engine.Step, "__call__", call)

    return at


# --- exact ----------------------------------------------------------------------------------------------------------

RICH = {
    "transform": pvae.datasets.fresh_bits,
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7),
    "kl_weight": lambda epoch: min(1.0, epoch / 3),
    "clip_norm": 20.0,
}


@pytest.mark.parametrize(
    ("step", "options"),
    [
        *((step, options) for step in (1, 8, 15, 20) for options in ({}, RICH)),
        (8, {"compile": True, **RICH}),
        *(pytest.param(step, {"compile": True}, marks=pytest.mark.slow) for step in (1, 8, 15, 20)),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(step, options, bits, tmp_path, interrupt, caller_state):
    """At the first step, within an epoch, at an epoch's end, and at the last step."""
    grey = 0.8 * bits + 0.1 if "transform" in options else bits
    whole = pvae.VAE.mlp(6, 2, [8])
    stopped = copy.deepcopy(whole)
    options = {**options, "validation": bits[:100]}
    reference = fit(whole, grey, **options)
    interrupt(step)
    first = fit(stopped, grey, checkpoint=tmp_path / "run", **options)
    assert (first.stopped, first.signal) == ("signal", signal.SIGTERM)
    assert len(first.history["elbo" if "elbo" in first.history else "objective"]) == (step - 1) // 5
    taken = f"epoch-{(step - 1) // 5:06d}-step-{(step - 1) % 5 + 1:07d}"
    # A first step that would have to be compiled before it is taken after resuming.
    assert first.checkpoint.name == ("epoch-000000" if step == 1 and "compile" in options else taken)
    other = pvae.VAE.mlp(6, 2, [8])  # as a new process would begin
    before = caller_state()
    result = fit(other, grey, checkpoint=tmp_path / "run", resume="auto", **options)
    before.assert_unchanged()
    assert_same((other, result), (whole, reference))
    assert result.checkpoint == tmp_path / "run" / "epoch-000004"


@pytest.mark.parametrize("name", PAIRS)
def test_every_kind_of_pair_goes_on_bit_for_bit(name, bits, tmp_path, interrupt):
    torch.manual_seed(3)
    whole = PAIRS[name]()
    torch.manual_seed(3)
    stopped, options = PAIRS[name](), {"validation": None} if name == "auto" else {}
    options |= {"batch_size": 300 if name == "auto" else 64}
    reference = fit(whole, bits, **options)
    interrupt(2 if name == "auto" else 8)
    assert fit(stopped, bits, checkpoint=tmp_path, **options).stopped == "signal"
    other = PAIRS[name]()
    assert_same((other, fit(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))
    loaded = PAIRS[name]()
    assert_same((loaded, load_checkpoint(tmp_path, loaded.model, loaded.guide, bits)), (whole, reference))


def test_shapes_are_compiled_when_they_would_have_been(bits, tmp_path, monkeypatch):
    """A ragged last batch is compiled once it has come often enough, here 100 times, and the bits change then."""
    monkeypatch.setitem(graphs._COMPILE_SECONDS, "cpu", 0.25)
    options = {"compile": True, "validation": bits[:70], "epochs": 104}
    whole = pvae.VAE.mlp(6, 2, [8])
    stopped = copy.deepcopy(whole)
    reference = fit(whole, bits[:150], **options)
    stop_at = {"callback": lambda record: record["epoch"] == 60 and os.kill(os.getpid(), signal.SIGTERM)}
    assert fit(stopped, bits[:150], checkpoint=tmp_path, **options, **stop_at).stopped == "signal"
    other = pvae.VAE.mlp(6, 2, [8])
    assert_same((other, fit(other, bits[:150], checkpoint=tmp_path, resume="auto", **options)), (whole, reference))


def test_a_signal_ends_compiling_at_once_and_nothing_is_lost(bits, tmp_path, monkeypatch):
    options = {"compile": True, "validation": bits[:70], "epochs": 2}
    whole = ModulePair()
    stopped = copy.deepcopy(whole)
    reference = fit(whole, bits, **options)

    def slow(self, inputs):
        torch.rand(3)  # noise of its own, which must not count
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(Graph, "compile", slow)
        start = time.perf_counter()
        result = fit(stopped, bits, checkpoint=tmp_path, **options)
    assert time.perf_counter() - start < 30
    assert (result.stopped, len(result.history["seconds"])) == ("signal", 0)
    other = ModulePair()
    assert_same((other, fit(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))


def test_more_epochs_go_on_from_a_run_that_ended(bits, tmp_path):
    whole = ModulePair()
    short = copy.deepcopy(whole)
    reference = fit(whole, bits, epochs=6)
    fit(short, bits, epochs=2, checkpoint=tmp_path)
    other = ModulePair()
    assert_same((other, fit(other, bits, epochs=6, checkpoint=tmp_path, resume="auto")), (whole, reference))
    again = ModulePair()  # a run that is done is only loaded
    assert_same((again, fit(again, bits, epochs=6, checkpoint=tmp_path, resume="auto")), (whole, reference))
    with pytest.raises(pvae.ArgumentError, match=r"epochs=3, and the checkpoint in .*epoch-000006 already has 6"):
        fit(again, bits, epochs=3, checkpoint=tmp_path, resume="auto")


def test_random_numbers_of_python_and_numpy_go_on_too(bits, tmp_path, interrupt):
    def noisy(x):
        return x * float(np.random.rand() < 2) * float(random.random() < 0.9)  # noqa: NPY002

    def seed():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002

    whole = ModulePair()
    stopped = copy.deepcopy(whole)
    seed()
    reference = fit(whole, bits, transform=noisy)
    seed()
    interrupt(8)
    fit(stopped, bits, transform=noisy, checkpoint=tmp_path)
    random.seed(99)
    outside = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    other = ModulePair()
    result = fit(other, bits, transform=noisy, checkpoint=tmp_path, resume="auto")
    assert_same((other, result), (whole, reference))
    assert outside == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=7),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.05, step_size_up=2),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    "sequence": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.MultiStepLR(o, [1, 2])], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_of_schedule_goes_on_bit_for_bit(name, bits, tmp_path, interrupt):
    whole = ModulePair()
    stopped, options = copy.deepcopy(whole), {"scheduler": SCHEDULES[name], "epochs": 6}
    reference = fit(whole, bits, **options)
    interrupt(13)
    fit(stopped, bits, checkpoint=tmp_path, **options)
    other = ModulePair()
    assert_same((other, fit(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))


@pytest.mark.slow
def test_a_value_that_changes_each_epoch_goes_on_bit_for_bit(bits, tmp_path):
    """After eight changes a run is no longer captured; one that goes on must know."""

    class Tempered(ModulePair):
        beta = 1.0

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("latent", dist.Normal(loc, raw.exp() * self.beta).to_event(1))

    def train(pair, stop=None, **options):
        def change(record):
            pair.beta = 1.0 + record["epoch"] / 100
            if record["epoch"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit(pair, bits, epochs=12, compile=True, callback=change, validation=None, **options)

    whole = Tempered()
    stopped, other = copy.deepcopy(whole), Tempered()
    reference = train(whole)
    assert train(stopped, 10, checkpoint=tmp_path).stopped == "signal"
    other.beta = stopped.beta
    assert_same((other, train(other, checkpoint=tmp_path, resume="auto")), (whole, reference))


def test_a_signal_before_the_first_step_leaves_a_run_that_goes_on(bits, tmp_path):
    def early(x):
        if not list(tmp_path.glob("epoch-*")):
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    whole = ModulePair()
    stopped, options = copy.deepcopy(whole), {"kl_weight": lambda epoch: min(1.0, epoch / 3), "transform": early}
    first = fit(stopped, bits, checkpoint=tmp_path, **options)
    assert (first.stopped, first.checkpoint.name) == ("signal", "epoch-000000")
    reference = fit(whole, bits, **options)
    other = ModulePair()
    assert_same((other, fit(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))


def test_a_run_within_an_epoch_is_not_one_without_it(bits, tmp_path, interrupt):
    interrupt(13)
    fit(ModulePair(), bits, checkpoint=tmp_path)
    with pytest.raises(
        pvae.ArgumentError, match=r"epochs=2, and the checkpoint in .* already has 2, and is within epoch 3"
    ):
        fit(ModulePair(), bits, epochs=2, checkpoint=tmp_path, resume="auto")


def test_what_a_callback_draws_does_not_change_training(bits):
    alone, watched = ModulePair(), ModulePair()
    watched.load_state_dict(alone.state_dict())

    def draws(record):
        nn.Linear(2, 2)
        random.random()
        np.random.rand()  # noqa: NPY002

    assert_same((alone, fit(alone, bits)), (watched, fit(watched, bits, callback=draws)))


def test_an_epoch_is_not_lost_for_its_callback(bits, tmp_path):
    def callback(record):
        if record["epoch"] == 3:
            raise ConnectionError("the server is gone")

    whole, pair, other = ModulePair(), ModulePair(), ModulePair()
    pair.load_state_dict(whole.state_dict())
    with pytest.raises(ConnectionError):
        fit(pair, bits, checkpoint=tmp_path, callback=callback)
    assert Folder(tmp_path).newest().epoch == 3
    assert_same((other, fit(other, bits, checkpoint=tmp_path, resume="auto")), (whole, fit(whole, bits)))


def test_a_fresh_seed_is_gone_on_with(bits, tmp_path):
    pair = ModulePair()
    first = fit(pair, bits, seed=None, epochs=1, checkpoint=tmp_path)
    assert fit(ModulePair(), bits, seed=None, epochs=2, checkpoint=tmp_path, resume="auto").seed == first.seed


def test_checkpoints_do_not_disturb_training(bits, tmp_path):
    alone, watched = (pvae.VAE.mlp(6, 2, [8]) for _ in range(2))
    watched.load_state_dict(alone.state_dict())
    assert_same((alone, fit(alone, bits)), (watched, fit(watched, bits, checkpoint=tmp_path)))


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_step_and_handlers_are_put_back(number, bits, interrupt):
    def own(*_):
        raise AssertionError

    outside = signal.signal(signal.SIGTERM, own)
    try:
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        interrupt(3, number)
        result = fit(ModulePair(), bits)
        assert (result.stopped, result.signal) == ("signal", number)
        assert "stopped by signal" in repr(result)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        assert fit(ModulePair(), bits).stopped == "epochs"
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGTERM, outside)


def test_the_second_ctrl_c_is_immediate(bits, interrupt):
    interrupt(3, signal.SIGINT, times=2)
    pair = ModulePair()
    with pytest.raises(KeyboardInterrupt):
        fit(pair, bits)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert all(p.grad is None for p in pair.parameters())


def test_a_signal_in_validation_or_a_callback_is_heeded_at_the_epochs_end(bits, tmp_path):
    def callback(record):
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    result = fit(ModulePair(), bits, callback=callback, checkpoint=tmp_path)
    assert (result.stopped, len(result.history["elbo"])) == ("signal", 2)
    assert result.checkpoint == tmp_path / "epoch-000002"


def test_a_signal_in_a_nested_fit_is_for_both(bits):
    inner = []

    def callback(record):
        taken = {"callback": lambda record: os.kill(os.getpid(), signal.SIGTERM)}
        inner.append(fit(ModulePair(), bits, **taken))

    outer = fit(ModulePair(), bits, callback=callback)
    assert [inner[0].stopped, outer.stopped] == ["signal", "signal"]
    assert len(outer.history["elbo"]) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_during_validation_leaves_it(bits, tmp_path, monkeypatch):
    """The steps of the epoch are saved, and what follows them is done when the run goes on."""
    whole = ModulePair()
    stopped, other = copy.deepcopy(whole), ModulePair()
    reference = fit(whole, bits, validation=bits)
    seen, original = [], Validation._isolated

    def isolated(self):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_isolated", isolated)
        first = fit(stopped, bits, validation=bits, checkpoint=tmp_path)
    assert first.checkpoint.name == "epoch-000001-step-0000005"
    result = fit(other, bits, validation=bits, checkpoint=tmp_path, resume="auto")
    assert_same((other, result), (whole, reference))


def test_other_threads_train_without_handlers(bits):
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(ModulePair(), bits, epochs=1)))
    thread.start()
    thread.join()
    assert results[0].stopped == "epochs"


def test_signals_that_the_process_ignores_stay_ignored(bits, interrupt):
    outside = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        interrupt(3, signal.SIGINT)
        assert fit(ModulePair(), bits).stopped == "epochs"
    finally:
        signal.signal(signal.SIGINT, outside)


KILLED = """
import os, random, signal, sys, time, warnings
import torch, pvae
from pvae.svi.checkpoints import Folder
from pvae.svi.validation import Validation

torch.set_num_threads(1)
warnings.simplefilter("error")
path, x, rng = sys.argv[1], (torch.rand(32, 6) < 0.5).float(), random.Random(0)
before = -1
for kill in range(20):
    child = os.fork()
    if not child:
        vae = pvae.VAE.mlp(6, 2, [64])
        pvae.fit(vae.model, vae.guide, x, epochs=10**6, checkpoint=path, resume="auto", compile=False,
                 progress=False)
    while Folder(path).newest() is None or Folder(path).newest().epoch <= before:
        time.sleep(0.01)
    time.sleep(rng.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = Folder(path).newest()
    assert newest.epoch > before, (newest.epoch, before)
    assert len(newest.history["elbo"]) == newest.epoch
    before = newest.epoch
print(before)
"""


def test_killed_at_20_random_moments_a_whole_checkpoint_is_always_there(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_the_last_two_and_the_best_are_kept(bits, tmp_path):
    curve = iter([1.0, 3.0, 2.0, 1.5, 1.0, 0.5])

    def objective(model, guide, x):
        return -next(curve) * len(x) + 0 * pyro.param("p", torch.tensor(0.0))

    pair = ModulePair()
    result = fit(pair, bits, epochs=6, batch_size=300, objective=objective, validation=None, checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == ["epoch-000002", "epoch-000005", "epoch-000006"]
    best = load_checkpoint(tmp_path, pair.model, pair.guide, bits, which="best")
    assert best.history["objective"].tolist() == [1.0, 3.0]
    assert best.stopped == "loaded"
    assert result.checkpoint == tmp_path / "epoch-000006"


def test_a_checkpoint_is_plain_files(bits, tmp_path):
    vae = pvae.VAE.mlp(6, 2, [8])
    result = fit(vae, bits, checkpoint=tmp_path)
    folder = result.checkpoint
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == dict(vae.named_parameters()).keys()
    assert torch.equal(weights["encoder.network.0.weight"], vae.encoder.network[0].weight)
    training = torch.load(folder / "training.pt", weights_only=True)
    assert training["epoch"] == 4
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["lr"] == 0.01
    assert config["environment"]["torch"] == torch.__version__.split("+")[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {"weights.safetensors", "training.pt", "history.json", "config.json"}
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["elbo"] for line in lines] == result.history["elbo"].tolist()


def test_history_on_disk_follows_a_run_that_went_back(bits, tmp_path):
    fit(ModulePair(), bits, checkpoint=tmp_path)
    damage(tmp_path / "epoch-000004" / "weights.safetensors", "flipped")
    with pytest.warns(UserWarning, match="Going back"):
        fit(ModulePair(), bits, epochs=5, checkpoint=tmp_path, resume="auto")
    lines = [json.loads(line)["epoch"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5]


# --- damage ---------------------------------------------------------------------------------------------------------

FILES = ["weights.safetensors", "training.pt", "history.json", "config.json", "manifest.json"]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def damage(path, how, marker=None):
    content = path.read_bytes()
    changed = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "flipped": content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :],
        "pickle": pickle.dumps(Evil(marker)),
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "pickle"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, file, bits, tmp_path):
    run, marker = tmp_path / "run", tmp_path / "executed"
    whole, pair = ModulePair(), ModulePair()
    pair.load_state_dict(whole.state_dict())
    fit(pair, bits, checkpoint=run)
    reference = fit(whole, bits, epochs=5)
    damage(run / "epoch-000004" / file, how, marker)
    other = ModulePair()
    with pytest.warns(UserWarning, match=r"epoch-000004.*Going back to the checkpoint before, .*epoch-000003"):
        result = fit(other, bits, epochs=5, checkpoint=run, resume="auto")
    assert not marker.exists()
    assert_same((other, result), (whole, reference))
    assert sorted(p.name for p in run.glob("epoch-*"))[-2:] == ["epoch-000004", "epoch-000005"]
    assert Folder(run).newest().epoch == 5


def test_pickles_are_refused_even_with_a_manifest_that_vouches_for_them(bits, tmp_path):
    run, marker = tmp_path / "run", tmp_path / "executed"
    pair = ModulePair()
    for file in FILES[:-1]:
        fit(ModulePair(), bits, epochs=2, checkpoint=run)
        for folder in run.glob("epoch-*"):
            contents = storage.read(folder)
            evil = pickle.dumps(Evil(marker))
            if file == "training.pt":  # as torch.save would write it
                torch.save({"epoch": Evil(marker)}, tmp_path / "evil.pt")
                evil = (tmp_path / "evil.pt").read_bytes()
            storage.write(folder, {**contents, file: evil})
        with pytest.raises(pvae.CheckpointError, match=r"no checkpoint in .* is whole"):
            load_checkpoint(run, pair.model, pair.guide, bits)
        assert not marker.exists()
        for path in sorted(run.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [s.update(exp_avg=torch.zeros(1)) for s in t["optimizer"].values()],  # a kernel would write beyond it
        lambda t: t.update(order=["zz"]),
        lambda t: t.update(steps=99),
        lambda t: t.pop("epoch"),
        lambda t: t.update(epoch=7),
        lambda t: t.update(noise=[{}]),
        lambda t: t["noise"][0].update(torch=torch.zeros(3, dtype=torch.uint8)),
        lambda t: t.update(memory=[{}, None]),
        lambda t: t.clear(),
    ],
)
def test_states_that_make_no_sense_are_refused_whoever_vouches_for_them(change, bits, tmp_path):
    run, pair = tmp_path / "run", ModulePair()
    fit(pair, bits, epochs=2, checkpoint=run)
    folder = run / "epoch-000002"
    training = torch.load(folder / "training.pt", weights_only=True)
    change(training)
    torch.save(training, tmp_path / "changed.pt")
    contents = storage.read(folder)
    storage.write(folder, {**contents, "training.pt": (tmp_path / "changed.pt").read_bytes()})
    with pytest.warns(UserWarning, match="was not written by pvae.fit.*Going back"):
        result = fit(ModulePair(), bits, epochs=3, checkpoint=run, resume="auto")
    assert len(result.history["elbo"]) == 3


def test_when_all_are_damaged_it_is_an_error_and_nothing_moves(bits, tmp_path):
    pair = ModulePair()
    fit(pair, bits, checkpoint=tmp_path)
    for folder in tmp_path.glob("epoch-*"):
        damage(folder / "weights.safetensors", "flipped")
    other = ModulePair()
    before = copy.deepcopy(other.state_dict())
    for call in (
        lambda: fit(other, bits, epochs=5, checkpoint=tmp_path, resume="auto"),
        lambda: load_checkpoint(tmp_path, other.model, other.guide, bits),
    ):
        with pytest.raises(pvae.CheckpointError, match=r"no checkpoint in .* is whole.*SHA-256"):
            call()
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


# --- of something else ----------------------------------------------------------------------------------------------


def test_another_architecture_is_refused_with_the_differences(bits, tmp_path):
    fit(pvae.VAE.mlp(6, 2, [8]), bits, checkpoint=tmp_path)
    other = pvae.VAE.mlp(6, 3, [8, 4])
    before = copy.deepcopy(other.state_dict())
    pattern = (
        r"(?s)is of another model or run: not in the checkpoint: decoder.network.4.bias float32\[6\].*"
        r"decoder.network.0.weight is float32\[8, 2\] in the checkpoint and float32\[4, 3\] here"
    )
    with pytest.raises(pvae.CheckpointError, match=pattern):
        fit(other, bits, epochs=5, checkpoint=tmp_path, resume="auto")
    with pytest.raises(pvae.CheckpointError, match=pattern):
        load_checkpoint(tmp_path, other.model, other.guide, bits)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": 0.02}, "lr was 0.01 and is 0.02 now"),
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"batch_size": 32}, "batch_size was 64"),
        ({"clip_norm": 1.0}, "clip_norm was None and is 1.0 now"),
        ({"precision": "bfloat16"}, "precision was 'float32'"),
        ({"objective": pyro.infer.TraceMeanField_ELBO()}, r"objective was '.*Trace_ELBO\(.*TraceMeanField_ELBO"),
        ({"objective": pyro.infer.Trace_ELBO(num_particles=2)}, "num_particles=1.*num_particles=2"),
        ({"transform": lambda x: x}, "transform was None"),
        ({"kl_weight": 0.5}, r"kl_weight was 1.0 in its epochs, and is \[0.5"),
        ({"scheduler": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)}, "is 'ExponentialLR .*gamma.: 0.9"),
        ({"data": torch.ones(300, 6)}, "data was '300 data, [0-9a-f]+' and is '300 data, "),
        ({"transform": partial(torch.clamp, max=2.0)}, r"is '.*clamp\(max=2.0\)' now"),
        ({"validation": torch.ones(9, 6)}, "validation was '100 data, [0-9a-f]+' and is '9 data, "),
        ({"validation": None}, "validation was '100 data, [0-9a-f]+' and is None now"),
        ({"data": torch.ones(20, 6)}, "data was '300 data, [0-9a-f]+' and is '20 data, "),
    ],
)
def test_another_run_is_refused_with_the_differences(change, match, bits, tmp_path):
    pair = ModulePair()
    fit(pair, bits, checkpoint=tmp_path)
    before = copy.deepcopy(pair.state_dict())
    options = {"validation": bits[:100], "epochs": 5, "checkpoint": tmp_path, "resume": "auto", **change}
    with pytest.raises(pvae.CheckpointError, match=match):
        fit(pair, options.pop("data", bits), **options)
    assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


def test_a_newer_schema_is_refused_with_the_versions(bits, tmp_path, monkeypatch):
    pair = ModulePair()
    monkeypatch.setattr(storage, "SCHEMA", storage.SCHEMA + 1)
    monkeypatch.setattr(storage, "versions", lambda: {"pvae": "9.0", "torch": "3.0"})
    fit(pair, bits, epochs=1, checkpoint=tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        pvae.CheckpointError, match=r"schema 2, .* reads up to 1.* pvae 9.0 \(here .*torch 3.0 \(here 2"
    ):
        fit(pair, bits, epochs=2, checkpoint=tmp_path, resume="auto")


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(bits, tmp_path):
    """Tensors are saved from where they are; what only the GPU had, its random numbers, is left out with a warning."""
    pair = ModulePair()
    fit(pair, bits, epochs=2, checkpoint=tmp_path)
    folder = tmp_path / "epoch-000002"
    contents = storage.read(folder)
    config = json.loads(contents["config.json"])
    config["environment"]["device"] = "cuda:0"
    training = torch.load(folder / "training.pt", weights_only=True)
    training["noise"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(training, tmp_path / "training.pt")
    changed = {"config.json": json.dumps(config).encode(), "training.pt": (tmp_path / "training.pt").read_bytes()}
    storage.write(folder, {**contents, **changed})
    other = ModulePair()
    with pytest.warns(UserWarning, match="device was 'cuda:0' and is 'cpu' now"):
        result = fit(other, bits, epochs=3, checkpoint=tmp_path, resume="auto", device="cpu")
    assert len(result.history["elbo"]) == 3


def test_another_constraint_is_refused(bits, tmp_path):
    class Other(Bare):
        def model(self, x):
            pyro.param("noise", torch.tensor(1.0), constraint=constraints.interval(0.0, 50.0))
            super().model(x)

    fit(Bare(), bits, checkpoint=tmp_path)
    with pytest.raises(pvae.CheckpointError, match=r"the constraint of noise was GreaterThan.* and is Interval"):
        fit(Other(), bits, epochs=5, checkpoint=tmp_path, resume="auto")


# --- what modules may hold ------------------------------------------------------------------------------------------


class Holding(ModulePair):
    """Buffers that are infinite, views of each other, expanded, and empty."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer("grid", torch.arange(10.0))
        self.register_buffer("part", self.grid[:5])
        self.register_buffer("wide", torch.ones(1).expand(5))
        self.register_buffer("none", torch.zeros(0))


def test_buffers_of_all_kinds_go_on(bits, tmp_path, interrupt):
    whole = Holding()
    stopped, other = copy.deepcopy(whole), Holding()
    interrupt(28)
    reference = fit(whole, bits)
    assert fit(stopped, bits, checkpoint=tmp_path).stopped == "signal"
    assert_same((other, fit(other, bits, checkpoint=tmp_path, resume="auto")), (whole, reference))


def unusual(kind):
    pair = ModulePair()
    if kind == "sparse":
        pair.register_buffer("graph", torch.eye(3).to_sparse())
    elif kind == "complex":
        pair.register_buffer("wave", torch.zeros(3, dtype=torch.complex128))
    else:
        pair.__class__ = type("Extra", (ModulePair,), {"get_extra_state": lambda self: {"some": "thing"}})
    return pair


@pytest.mark.parametrize("kind", ["sparse", "complex", "extra"])
def test_what_a_checkpoint_cannot_hold_is_said_before_training_and_is_no_hindrance_without_one(kind, bits, tmp_path):
    pair = unusual(kind)
    fit(pair, bits, epochs=1)
    before = [p.detach().clone() for p in pair.parameters()]
    with pytest.raises(pvae.CheckpointError, match=r"(graph|wave|_extra_state)' (is|cannot)"):
        fit(pair, bits, epochs=1, checkpoint=tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(before, pair.parameters(), strict=True))


def test_a_module_of_the_objective_is_found(bits, tmp_path):
    extra = nn.Linear(6, 1)

    def objective(model, guide, x):
        pyro.module("extra", extra)
        return pyro.infer.Trace_ELBO().differentiable_loss(model, guide, x) + extra(x).square().sum()

    before = extra.weight.clone()
    fit(ModulePair(), bits, objective=objective, checkpoint=tmp_path)
    assert not torch.equal(before, extra.weight)
    assert "1.weight" in Folder(tmp_path).newest().weights or "2.weight" in Folder(tmp_path).newest().weights


def test_a_bare_nn_parameter_is_a_result(bits, tmp_path):
    given = nn.Parameter(torch.tensor(0.1))

    class Given(Bare):
        def guide(self, x):
            slope = pyro.param("slope", given)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * x.sum(-1), 1.0))

    result = fit(Given(), bits, checkpoint=tmp_path)
    assert result.params.keys() == {"noise", "slope"}
    assert result.params["slope"] != 0.1


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_with_checkpoints_is_not_overwritten(bits, tmp_path):
    fit(ModulePair(), bits, checkpoint=tmp_path)
    pair = ModulePair()
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(pvae.CheckpointError, match=r"holds checkpoints of 4 epoch\(s\)\. Pass resume='auto'"):
        fit(pair, bits, checkpoint=tmp_path)
    assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


@pytest.mark.parametrize("path", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_an_error_before_anything_moves(path, bits):
    pair = ModulePair()
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(pvae.CheckpointError, match=f"{path} cannot be used"):
        fit(pair, bits, checkpoint=path)
    assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


def test_a_relative_folder_stays_where_it_was(bits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    fit(ModulePair(), bits, checkpoint="run", callback=lambda record: os.chdir(tmp_path / "elsewhere"))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert Folder(tmp_path / "run").newest().epoch == 4


def test_what_else_is_in_a_folder_stays(bits, tmp_path):
    (tmp_path / "epoch-000050").mkdir()
    (tmp_path / "epoch-000050" / "notes.txt").write_text("mine")

    def picture(record):
        (tmp_path / f"epoch-{record['epoch'] - 1:06d}" / "samples.png").touch()

    fit(ModulePair(), bits, checkpoint=tmp_path, callback=lambda r: picture(r) if r["epoch"] > 1 else None)
    assert (tmp_path / "epoch-000050" / "notes.txt").exists()
    assert all((tmp_path / f"epoch-{n:06d}" / "samples.png").exists() for n in (1, 2, 3))
    assert Folder(tmp_path).newest().epoch == 4
    (tmp_path / "epoch-000051").touch()
    with pytest.raises(pvae.CheckpointError, match="epoch-000051 is in the way"):
        fit(ModulePair(), bits, epochs=5, checkpoint=tmp_path, resume="auto")


def test_a_folder_that_is_taken_away_is_a_clear_error(bits, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(pvae.CheckpointError, match="run cannot be used"):
        fit(ModulePair(), bits, checkpoint=run, transform=lambda x: (shutil.rmtree(run, ignore_errors=True), x)[1])


def test_a_checkpoints_own_folder_can_be_loaded(bits, tmp_path):
    pair, other = ModulePair(), ModulePair()
    result = fit(pair, bits, checkpoint=tmp_path)
    assert_same((other, load_checkpoint(result.checkpoint, other.model, other.guide, bits)), (pair, result))


@pytest.mark.parametrize("path", [3, True, ["a"], b"abc", "", "~nosuchuser/x"])
def test_a_path_that_is_none_is_refused(path, bits):
    with pytest.raises(pvae.ArgumentError, match="checkpoint"):
        fit(ModulePair(), bits, checkpoint=path)


def test_arguments_of_checkpoints_are_checked(bits, tmp_path):
    pair = ModulePair()
    with pytest.raises(pvae.ArgumentError, match="resume must be one of 'auto', 'never'"):
        fit(pair, bits, checkpoint=tmp_path, resume="always")
    with pytest.raises(pvae.ArgumentError, match="needs a folder"):
        fit(pair, bits, resume="auto")
    with pytest.raises(pvae.ArgumentError, match="which must be one of 'last', 'best'"):
        load_checkpoint(tmp_path, pair.model, pair.guide, bits, which="newest")
    with pytest.raises(pvae.CheckpointError, match="has no checkpoint"):
        load_checkpoint(tmp_path / "nowhere", pair.model, pair.guide, bits)
    assert not (tmp_path / "nowhere").exists()


FULL = """
import resource, sys
import torch, pvae
torch.set_num_threads(1)
path, x = sys.argv[1], (torch.rand(64, 6) < 0.5).float()
vae = pvae.VAE.mlp(6, 2, [64])
def full(record):
    if record["epoch"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    pvae.fit(vae.model, vae.guide, x, epochs=5, checkpoint=path, callback=full, progress=False)
except pvae.CheckpointError as error:
    print(error)
other = pvae.VAE.mlp(6, 2, [64])
print(len(pvae.svi.load_checkpoint(path, other.model, other.guide, x).history["elbo"]))
"""


def test_a_full_disk_is_an_error_and_the_checkpoints_before_are_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    error, epochs = done.stdout.splitlines()
    assert "epoch-000003 cannot be used: [Errno 27] File too large" in error
    assert epochs == "2"
    assert not list(tmp_path.rglob("*.part"))


TWICE = """
import sys, time, torch, pvae
torch.set_num_threads(1)
x, vae = (torch.rand(64, 6) < 0.5).float(), pvae.VAE.mlp(6, 2, [8])
def wait(record):
    print("training", flush=True)
    sys.stdin.read()
try:
    pvae.fit(vae.model, vae.guide, x, epochs=1, checkpoint=sys.argv[1], callback=wait, progress=False)
except pvae.CheckpointError as error:
    print(error)
"""


def test_two_processes_cannot_train_in_one_folder(bits, tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", TWICE, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "training\n"
    with pytest.raises(pvae.CheckpointError, match="is in use by another process"):
        fit(ModulePair(), bits, checkpoint=tmp_path, resume="auto")
    assert first.communicate("go on")[0] == ""
    assert Path(tmp_path / "epoch-000001" / "manifest.json").exists()


def test_a_trained_module_that_cannot_be_found_is_named(bits, tmp_path):
    class Hidden:
        """Its module is where nobody would look."""

        def __init__(self):
            self.nets = {"inner": {"encoder": nn.Linear(6, 4)}}

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = pyro.param("bias", torch.zeros(6)) + z.sum(-1, keepdim=True)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def guide(self, x):
            net = self.nets["inner"]["encoder"]
            pyro.module("encoder", net)
            with pyro.plate("data", len(x)):
                loc, raw = net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    pair = Hidden()
    fit(pair, bits, epochs=1)
    before = pair.nets["inner"]["encoder"].weight.clone()
    with pytest.raises(pvae.CheckpointError, match=r"parameter of shape \(4, 6\) .*attribute"):
        fit(pair, bits, epochs=1, checkpoint=tmp_path)
    assert torch.equal(before, pair.nets["inner"]["encoder"].weight)
