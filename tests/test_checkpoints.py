"""What a folder of checkpoints holds: what is kept in it, of which runs it is, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from helpers import FORKS, assert_same_run, fork, train
from pairs import Bare, ModulePair
from pyro import distributions as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributions import constraints

import pvae
from pvae.persistence import storage
from pvae.svi import load_checkpoint
from pvae.svi.checkpoints import Folder

# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_last_two_and_the_best_are_kept(bits, tmp_path):
    curve = iter([1.0, 3.0, 2.0, 1.5, 1.0, 0.5])

    def objective(model, guide, x):
        return -next(curve) * len(x) + 0 * pyro.param("p", torch.tensor(0.0))

    pair = ModulePair()
    result = train(pair, bits, epochs=6, batch_size=300, objective=objective, validation=None, checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == ["epoch-000002", "epoch-000005", "epoch-000006"]
    best = load_checkpoint(tmp_path, pair.model, pair.guide, bits, which="best")
    assert best.history["objective"].tolist() == [1.0, 3.0]
    assert best.stopped == "loaded"
    assert result.checkpoint == tmp_path / "epoch-000006"


def test_a_checkpoint_is_plain_files(bits, tmp_path):
    vae = pvae.VAE.mlp(6, 2, [8])
    result = train(vae, bits, checkpoint=tmp_path)
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


# --- of something else ------------------------------------------------------------------------------------------------


def test_another_architecture_is_refused_with_the_differences(bits, tmp_path):
    train(pvae.VAE.mlp(6, 2, [8]), bits, checkpoint=tmp_path)
    other = pvae.VAE.mlp(6, 3, [8, 4])
    before = copy.deepcopy(other.state_dict())
    pattern = (
        r"(?s)is of another model or run: not in the checkpoint: decoder.network.4.bias float32\[6\].*"
        r"decoder.network.0.weight is float32\[8, 2\] in the checkpoint and float32\[4, 3\] here"
    )
    with pytest.raises(pvae.CheckpointError, match=pattern):
        train(other, bits, epochs=5, checkpoint=tmp_path, resume="auto")
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
    train(pair, bits, checkpoint=tmp_path)
    before = copy.deepcopy(pair.state_dict())
    options = {"validation": bits[:100], "epochs": 5, "checkpoint": tmp_path, "resume": "auto", **change}
    with pytest.raises(pvae.CheckpointError, match=match):
        train(pair, options.pop("data", bits), **options)
    assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


def test_a_newer_schema_is_refused_with_the_versions(bits, tmp_path, monkeypatch):
    pair = ModulePair()
    monkeypatch.setattr(storage, "SCHEMA", storage.SCHEMA + 1)
    monkeypatch.setattr(storage, "versions", lambda: {"pvae": "9.0", "torch": "3.0"})
    train(pair, bits, epochs=1, checkpoint=tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        pvae.CheckpointError, match=r"schema 2, .* reads up to 1.* pvae 9.0 \(here .*torch 3.0 \(here 2"
    ):
        train(pair, bits, epochs=2, checkpoint=tmp_path, resume="auto")


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(bits, tmp_path):
    """Tensors are saved from where they are; what only the GPU had, its random numbers, is left out with a warning."""
    pair = ModulePair()
    train(pair, bits, epochs=2, checkpoint=tmp_path)
    folder = tmp_path / "epoch-000002"
    contents = storage.read_files(folder)
    config = json.loads(contents["config.json"])
    config["environment"]["device"] = "cuda:0"
    training = torch.load(folder / "training.pt", weights_only=True)
    training["noise"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(training, tmp_path / "training.pt")
    changed = {"config.json": json.dumps(config).encode(), "training.pt": (tmp_path / "training.pt").read_bytes()}
    storage.write_files(folder, {**contents, **changed})
    other = ModulePair()
    with pytest.warns(UserWarning, match="device was 'cuda:0' and is 'cpu' now"):
        result = train(other, bits, epochs=3, checkpoint=tmp_path, resume="auto", device="cpu")
    assert len(result.history["elbo"]) == 3


def test_another_constraint_is_refused(bits, tmp_path):
    class Other(Bare):
        def model(self, x):
            pyro.param("noise", torch.tensor(1.0), constraint=constraints.interval(0.0, 50.0))
            super().model(x)

    train(Bare(), bits, checkpoint=tmp_path)
    with pytest.raises(pvae.CheckpointError, match=r"the constraint of noise was GreaterThan.* and is Interval"):
        train(Other(), bits, epochs=5, checkpoint=tmp_path, resume="auto")


# --- what modules may hold --------------------------------------------------------------------------------------------


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
    reference = train(whole, bits)
    assert train(stopped, bits, checkpoint=tmp_path).stopped == "signal"
    assert_same_run((other, train(other, bits, checkpoint=tmp_path, resume="auto")), (whole, reference))


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
    train(pair, bits, epochs=1)
    before = [p.detach().clone() for p in pair.parameters()]
    with pytest.raises(pvae.CheckpointError, match=r"(graph|wave|_extra_state)' (is|cannot)"):
        train(pair, bits, epochs=1, checkpoint=tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(before, pair.parameters(), strict=True))


def test_a_module_of_the_objective_is_found(bits, tmp_path):
    extra = nn.Linear(6, 1)

    def objective(model, guide, x):
        pyro.module("extra", extra)
        return pyro.infer.Trace_ELBO().differentiable_loss(model, guide, x) + extra(x).square().sum()

    before = extra.weight.clone()
    train(ModulePair(), bits, objective=objective, checkpoint=tmp_path)
    assert not torch.equal(before, extra.weight)
    assert "1.weight" in Folder(tmp_path).newest().weights or "2.weight" in Folder(tmp_path).newest().weights


def test_a_bare_nn_parameter_is_a_result(bits, tmp_path):
    given = nn.Parameter(torch.tensor(0.1))

    class Given(Bare):
        def guide(self, x):
            slope = pyro.param("slope", given)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(slope * x.sum(-1), 1.0))

    result = train(Given(), bits, checkpoint=tmp_path)
    assert result.params.keys() == {"noise", "slope"}
    assert result.params["slope"] != 0.1


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_checkpoints_is_not_overwritten(bits, tmp_path):
    train(ModulePair(), bits, checkpoint=tmp_path)
    pair = ModulePair()
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(pvae.CheckpointError, match=r"holds checkpoints of 4 epoch\(s\)\. Pass resume='auto'"):
        train(pair, bits, checkpoint=tmp_path)
    assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


@pytest.mark.parametrize("path", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_an_error_before_anything_moves(path, bits):
    pair = ModulePair()
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(pvae.CheckpointError, match=f"{path} cannot be used"):
        train(pair, bits, checkpoint=path)
    assert all(torch.equal(before[k], v) for k, v in pair.state_dict().items())


def test_a_relative_folder_stays_where_it_was(bits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    train(ModulePair(), bits, checkpoint="run", callback=lambda record: os.chdir(tmp_path / "elsewhere"))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert Folder(tmp_path / "run").newest().epoch == 4


def test_what_else_is_in_a_folder_stays(bits, tmp_path):
    (tmp_path / "epoch-000050").mkdir()
    (tmp_path / "epoch-000050" / "notes.txt").write_text("mine")

    def picture(record):
        (tmp_path / f"epoch-{record['epoch'] - 1:06d}" / "samples.png").touch()

    train(ModulePair(), bits, checkpoint=tmp_path, callback=lambda r: picture(r) if r["epoch"] > 1 else None)
    assert (tmp_path / "epoch-000050" / "notes.txt").exists()
    assert all((tmp_path / f"epoch-{n:06d}" / "samples.png").exists() for n in (1, 2, 3))
    assert Folder(tmp_path).newest().epoch == 4
    (tmp_path / "epoch-000051").touch()
    with pytest.raises(pvae.CheckpointError, match="epoch-000051 is in the way"):
        train(ModulePair(), bits, epochs=5, checkpoint=tmp_path, resume="auto")


def test_a_folder_that_is_taken_away_is_a_clear_error(bits, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(pvae.CheckpointError, match="run cannot be used"):
        train(ModulePair(), bits, checkpoint=run, transform=lambda x: (shutil.rmtree(run, ignore_errors=True), x)[1])


def test_a_checkpoints_own_folder_can_be_loaded(bits, tmp_path):
    pair, other = ModulePair(), ModulePair()
    result = train(pair, bits, checkpoint=tmp_path)
    assert_same_run((other, load_checkpoint(result.checkpoint, other.model, other.guide, bits)), (pair, result))


@pytest.mark.parametrize("path", [3, True, ["a"], b"abc", "", "~nosuchuser/x"])
def test_a_path_that_is_none_is_refused(path, bits):
    with pytest.raises(pvae.ArgumentError, match="checkpoint"):
        train(ModulePair(), bits, checkpoint=path)


def test_arguments_of_checkpoints_are_checked(bits, tmp_path):
    pair = ModulePair()
    with pytest.raises(pvae.ArgumentError, match="resume must be one of 'auto', 'never'"):
        train(pair, bits, checkpoint=tmp_path, resume="always")
    with pytest.raises(pvae.ArgumentError, match="needs a folder"):
        train(pair, bits, resume="auto")
    with pytest.raises(pvae.ArgumentError, match="which must be one of 'last', 'best'"):
        load_checkpoint(tmp_path, pair.model, pair.guide, bits, which="newest")
    with pytest.raises(pvae.CheckpointError, match="has no checkpoint"):
        load_checkpoint(tmp_path / "nowhere", pair.model, pair.guide, bits)
    assert not (tmp_path / "nowhere").exists()


def train_and_wait(folder, training, go_on):
    """Trains in a folder, and in its callback waits for another process."""
    x = (torch.rand(64, 6) < 0.5).float()
    train(ModulePair(), x, epochs=1, checkpoint=folder, callback=lambda record: (training.set(), go_on.wait(60)))


def test_two_processes_cannot_train_in_one_folder(bits, tmp_path):
    training, go_on = FORKS.Event(), FORKS.Event()
    first = fork(train_and_wait, tmp_path / "run", training, go_on, output=tmp_path / "output")
    assert training.wait(60), (tmp_path / "output.errors").read_text()
    with pytest.raises(pvae.CheckpointError, match="is in use by another process"):
        train(ModulePair(), bits, checkpoint=tmp_path / "run", resume="auto")
    go_on.set()
    first.join(60)
    assert first.exitcode == 0, (tmp_path / "output.errors").read_text()
    assert Path(tmp_path / "run" / "epoch-000001" / "manifest.json").exists()


def test_a_trained_module_that_cannot_be_found_is_named(bits, tmp_path):
    class Hidden:
        """Its module is where nobody would look."""

        def __init__(self):
            self.nets = itertools.repeat(nn.Linear(6, 4))

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = pyro.param("bias", torch.zeros(6)) + z.sum(-1, keepdim=True)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

        def guide(self, x):
            net = next(self.nets)
            pyro.module("encoder", net)
            with pyro.plate("data", len(x)):
                loc, raw = net(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    pair = Hidden()
    train(pair, bits, epochs=1)
    before = next(pair.nets).weight.clone()
    with pytest.raises(pvae.CheckpointError, match=r"parameter of shape \(4, 6\) .*attribute"):
        train(pair, bits, epochs=1, checkpoint=tmp_path)
    assert torch.equal(before, next(pair.nets).weight)
