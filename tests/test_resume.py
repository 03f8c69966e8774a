"""A run goes on exactly where it stopped, bit for bit, whatever it was made of."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
import warnings

import numpy as np
import pyro
import pytest
import torch
from helpers import assert_same_run, train
from pairs import Bare, ModulePair
from pyro import distributions as dist
from pyro.infer import autoguide
from torch import nn

import pvae
from pvae.capture import captured as graphs
from pvae.capture.graph import Graph
from pvae.svi import load_checkpoint
from pvae.svi.checkpoints import Folder


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
        pytest.param(8, {"compile": True, **RICH}, marks=pytest.mark.slow),
        *(pytest.param(step, {"compile": True}, marks=pytest.mark.slow) for step in (1, 8, 15, 20)),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(step, options, bits, tmp_path, interrupt, caller_state):
    """At the first step, within an epoch, at an epoch's end, and at the last step."""
    grey = 0.8 * bits + 0.1 if "transform" in options else bits
    whole = pvae.VAE.mlp(6, 2, [8])
    stopped = copy.deepcopy(whole)
    options = {**options, "validation": bits[:100]}
    reference = train(whole, grey, **options)
    interrupt(step)
    first = train(stopped, grey, checkpoint=tmp_path / "run", **options)
    assert (first.stopped, first.signal) == ("signal", signal.SIGTERM)
    assert len(first.history["elbo" if "elbo" in first.history else "objective"]) == (step - 1) // 5
    taken = f"epoch-{(step - 1) // 5:06d}-step-{(step - 1) % 5 + 1:07d}"
    # A first step that would have to be compiled before it is taken after resuming.
    assert first.checkpoint.name == ("epoch-000000" if step == 1 and "compile" in options else taken)
    other = pvae.VAE.mlp(6, 2, [8])  # as a new process would begin
    before = caller_state()
    result = train(other, grey, checkpoint=tmp_path / "run", resume="auto", **options)
    before.assert_unchanged()
    assert_same_run((other, result), (whole, reference))
    assert result.checkpoint == tmp_path / "run" / "epoch-000004"


@pytest.mark.parametrize("name", PAIRS)
def test_every_kind_of_pair_goes_on_bit_for_bit(name, bits, tmp_path, interrupt):
    torch.manual_seed(3)
    whole = PAIRS[name]()
    torch.manual_seed(3)
    stopped, options = PAIRS[name](), {"validation": None} if name == "auto" else {}
    options |= {"batch_size": 300 if name == "auto" else 64}
    reference = train(whole, bits, **options)
    interrupt(2 if name == "auto" else 8)
    assert train(stopped, bits, checkpoint=tmp_path, **options).stopped == "signal"
    other = PAIRS[name]()
    assert_same_run((other, train(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))
    loaded = PAIRS[name]()
    assert_same_run((loaded, load_checkpoint(tmp_path, loaded.model, loaded.guide, bits)), (whole, reference))


@pytest.mark.slow
def test_shapes_are_compiled_when_they_would_have_been(bits, tmp_path, monkeypatch):
    """A ragged last batch is compiled once it has come often enough, here 20 times, and the bits change then."""
    monkeypatch.setitem(graphs._COMPILE_SECONDS, "cpu", 0.05)
    options = {"compile": True, "validation": bits[:70], "epochs": 24}
    whole = pvae.VAE.mlp(6, 2, [8])
    stopped = copy.deepcopy(whole)
    reference = train(whole, bits[:150], **options)
    stop_at = {"callback": lambda record: record["epoch"] == 14 and os.kill(os.getpid(), signal.SIGTERM)}
    assert train(stopped, bits[:150], checkpoint=tmp_path, **options, **stop_at).stopped == "signal"
    other = pvae.VAE.mlp(6, 2, [8])
    assert_same_run(
        (other, train(other, bits[:150], checkpoint=tmp_path, resume="auto", **options)), (whole, reference)
    )


@pytest.mark.slow
def test_a_signal_ends_compiling_at_once_and_nothing_is_lost(bits, tmp_path, monkeypatch):
    options = {"compile": True, "validation": bits[:70], "epochs": 2}
    whole = ModulePair()
    stopped = copy.deepcopy(whole)
    reference = train(whole, bits, **options)

    def slow(self, inputs):
        torch.rand(3)  # noise of its own, which must not count
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patched:
        patched.setattr(Graph, "compile", slow)
        start = time.perf_counter()
        result = train(stopped, bits, checkpoint=tmp_path, **options)
    assert time.perf_counter() - start < 30
    assert (result.stopped, len(result.history["seconds"])) == ("signal", 0)
    other = ModulePair()
    assert_same_run((other, train(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))


def test_more_epochs_go_on_from_a_run_that_ended(bits, tmp_path):
    whole = ModulePair()
    short = copy.deepcopy(whole)
    reference = train(whole, bits, epochs=6)
    train(short, bits, epochs=2, checkpoint=tmp_path)
    other = ModulePair()
    assert_same_run((other, train(other, bits, epochs=6, checkpoint=tmp_path, resume="auto")), (whole, reference))
    again = ModulePair()  # a run that is done is only loaded
    assert_same_run((again, train(again, bits, epochs=6, checkpoint=tmp_path, resume="auto")), (whole, reference))
    with pytest.raises(pvae.ArgumentError, match=r"epochs=3, and the checkpoint in .*epoch-000006 already has 6"):
        train(again, bits, epochs=3, checkpoint=tmp_path, resume="auto")


def test_random_numbers_of_python_and_numpy_go_on_too(bits, tmp_path, interrupt):
    def noisy(x):
        return x * float(np.random.rand() < 2) * float(random.random() < 0.9)  # noqa: NPY002

    def seed():
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002

    whole = ModulePair()
    stopped = copy.deepcopy(whole)
    seed()
    reference = train(whole, bits, transform=noisy)
    seed()
    interrupt(8)
    train(stopped, bits, transform=noisy, checkpoint=tmp_path)
    random.seed(99)
    outside = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    other = ModulePair()
    result = train(other, bits, transform=noisy, checkpoint=tmp_path, resume="auto")
    assert_same_run((other, result), (whole, reference))
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
    reference = train(whole, bits, **options)
    interrupt(13)
    train(stopped, bits, checkpoint=tmp_path, **options)
    other = ModulePair()
    assert_same_run((other, train(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))


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

    def changing(pair, stop=None, **options):
        def change(record):
            pair.beta = 1.0 + record["epoch"] / 100
            if record["epoch"] == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return train(pair, bits, epochs=12, compile=True, callback=change, validation=None, **options)

    whole = Tempered()
    stopped, other = copy.deepcopy(whole), Tempered()
    reference = changing(whole)
    assert changing(stopped, 10, checkpoint=tmp_path).stopped == "signal"
    other.beta = stopped.beta
    assert_same_run((other, changing(other, checkpoint=tmp_path, resume="auto")), (whole, reference))


def test_a_signal_before_the_first_step_leaves_a_run_that_goes_on(bits, tmp_path):
    def early(x):
        if not list(tmp_path.glob("epoch-*")):
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    whole = ModulePair()
    stopped, options = copy.deepcopy(whole), {"kl_weight": lambda epoch: min(1.0, epoch / 3), "transform": early}
    first = train(stopped, bits, checkpoint=tmp_path, **options)
    assert (first.stopped, first.checkpoint.name) == ("signal", "epoch-000000")
    reference = train(whole, bits, **options)
    other = ModulePair()
    assert_same_run((other, train(other, bits, checkpoint=tmp_path, resume="auto", **options)), (whole, reference))


def test_a_run_within_an_epoch_is_not_one_without_it(bits, tmp_path, interrupt):
    interrupt(13)
    train(ModulePair(), bits, checkpoint=tmp_path)
    with pytest.raises(
        pvae.ArgumentError, match=r"epochs=2, and the checkpoint in .* already has 2, and is within epoch 3"
    ):
        train(ModulePair(), bits, epochs=2, checkpoint=tmp_path, resume="auto")


def test_what_a_callback_draws_does_not_change_training(bits):
    alone, watched = ModulePair(), ModulePair()
    watched.load_state_dict(alone.state_dict())

    def draws(record):
        nn.Linear(2, 2)
        random.random()
        np.random.rand()  # noqa: NPY002

    assert_same_run((alone, train(alone, bits)), (watched, train(watched, bits, callback=draws)))


def test_an_epoch_is_not_lost_for_its_callback(bits, tmp_path):
    def callback(record):
        if record["epoch"] == 3:
            raise ConnectionError("the server is gone")

    whole, pair, other = ModulePair(), ModulePair(), ModulePair()
    pair.load_state_dict(whole.state_dict())
    with pytest.raises(ConnectionError):
        train(pair, bits, checkpoint=tmp_path, callback=callback)
    assert Folder(tmp_path).newest().epoch == 3
    assert_same_run((other, train(other, bits, checkpoint=tmp_path, resume="auto")), (whole, train(whole, bits)))


def test_a_fresh_seed_is_gone_on_with(bits, tmp_path):
    pair = ModulePair()
    first = train(pair, bits, seed=None, epochs=1, checkpoint=tmp_path)
    assert train(ModulePair(), bits, seed=None, epochs=2, checkpoint=tmp_path, resume="auto").seed == first.seed


def test_checkpoints_do_not_disturb_training(bits, tmp_path):
    alone, watched = (pvae.VAE.mlp(6, 2, [8]) for _ in range(2))
    watched.load_state_dict(alone.state_dict())
    assert_same_run((alone, train(alone, bits)), (watched, train(watched, bits, checkpoint=tmp_path)))
