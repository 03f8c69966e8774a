"""Nothing is lost: damage is seen before it counts, and a whole checkpoint is there whatever happens."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from helpers import assert_same_run, fork_lines, train
from pairs import ModulePair

import pvae
from pvae.persistence import storage
from pvae.svi import load_checkpoint
from pvae.svi.checkpoints import Folder

# --- signals ----------------------------------------------------------------------------------------------------------


KILLED = """
import os, random, signal, sys, time, warnings
import torch, pvae
from pvae.svi.checkpoints import Folder

warnings.simplefilter("error")
path, x, rng = sys.argv[1], (torch.rand(32, 6) < 0.5).float(), random.Random(0)
before = -1

def train(**options):
    vae = pvae.VAE.mlp(6, 2, [64])
    pvae.fit(vae.model, vae.guide, x, compile=False, progress=False, **options)

for kill in range(20):
    child = os.fork()
    if not child:
        signal.alarm(100)  # whatever happens, none is left behind
        train(epochs=10**6, checkpoint=path, resume="auto")
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


@pytest.mark.slow
def test_killed_at_20_random_moments_a_whole_checkpoint_is_always_there(tmp_path):
    (epoch,) = fork_lines(KILLED, tmp_path / "run", folder=tmp_path, timeout=200)
    assert int(epoch) >= 20


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_history_on_disk_follows_a_run_that_went_back(bits, tmp_path):
    train(ModulePair(), bits, checkpoint=tmp_path)
    damage(tmp_path / "epoch-000004" / "weights.safetensors", "flipped")
    with pytest.warns(UserWarning, match="Going back"):
        train(ModulePair(), bits, epochs=5, checkpoint=tmp_path, resume="auto")
    lines = [json.loads(line)["epoch"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5]


# --- damage -----------------------------------------------------------------------------------------------------------


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
    train(pair, bits, checkpoint=run)
    reference = train(whole, bits, epochs=5)
    damage(run / "epoch-000004" / file, how, marker)
    other = ModulePair()
    with pytest.warns(UserWarning, match=r"epoch-000004.*Going back to the checkpoint before, .*epoch-000003"):
        result = train(other, bits, epochs=5, checkpoint=run, resume="auto")
    assert not marker.exists()
    assert_same_run((other, result), (whole, reference))
    assert sorted(p.name for p in run.glob("epoch-*"))[-2:] == ["epoch-000004", "epoch-000005"]
    assert Folder(run).newest().epoch == 5


def test_pickles_are_refused_even_with_a_manifest_that_vouches_for_them(bits, tmp_path):
    run, marker = tmp_path / "run", tmp_path / "executed"
    pair = ModulePair()
    for file in FILES[:-1]:
        train(ModulePair(), bits, epochs=2, checkpoint=run)
        for folder in run.glob("epoch-*"):
            contents = storage.read_files(folder)
            evil = pickle.dumps(Evil(marker))
            if file == "training.pt":  # as torch.save would write it
                torch.save({"epoch": Evil(marker)}, tmp_path / "evil.pt")
                evil = (tmp_path / "evil.pt").read_bytes()
            storage.write_files(folder, {**contents, file: evil})
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
    train(pair, bits, epochs=2, checkpoint=run)
    folder = run / "epoch-000002"
    training = torch.load(folder / "training.pt", weights_only=True)
    change(training)
    torch.save(training, tmp_path / "changed.pt")
    contents = storage.read_files(folder)
    storage.write_files(folder, {**contents, "training.pt": (tmp_path / "changed.pt").read_bytes()})
    with pytest.warns(UserWarning, match="was not written by pvae.fit.*Going back"):
        result = train(ModulePair(), bits, epochs=3, checkpoint=run, resume="auto")
    assert len(result.history["elbo"]) == 3


def test_when_all_are_damaged_it_is_an_error_and_nothing_moves(bits, tmp_path):
    pair = ModulePair()
    train(pair, bits, checkpoint=tmp_path)
    for folder in tmp_path.glob("epoch-*"):
        damage(folder / "weights.safetensors", "flipped")
    other = ModulePair()
    before = copy.deepcopy(other.state_dict())
    for call in (
        lambda: train(other, bits, epochs=5, checkpoint=tmp_path, resume="auto"),
        lambda: load_checkpoint(tmp_path, other.model, other.guide, bits),
    ):
        with pytest.raises(pvae.CheckpointError, match=r"no checkpoint in .* is whole.*SHA-256"):
            call()
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


# --- folders ----------------------------------------------------------------------------------------------------------


FULL = """
import resource, sys
import torch, pvae
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
    error, epochs = fork_lines(FULL, tmp_path / "run", folder=tmp_path)
    assert "epoch-000003 cannot be used: [Errno 27] File too large" in error
    assert epochs == "2"
    assert not list(tmp_path.rglob("*.part"))
