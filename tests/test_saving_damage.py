"""Folders of saved VAEs: what is damaged or foreign is refused, and whatever happens a whole VAE is loaded."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import assert_same_vae, fork_lines
from pairs import compose_vae

import pvae
from pvae.errors import CheckpointError
from pvae.persistence import storage

# --- Folders ----------------------------------------------------------------------------------------------------------


def test_overwriting_is_asked_for(tmp_path):
    first, second = compose_vae(), compose_vae()
    first.save(tmp_path)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        second.save(tmp_path)
    assert_same_vae(first, pvae.VAE.load(tmp_path))
    for vae in (second, first, first):
        vae.save(tmp_path, overwrite=True)
        assert_same_vae(vae, pvae.VAE.load(tmp_path))
        assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_not_mixed_with(overwrite, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        compose_vae().save(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="no folder"):
        compose_vae().save(tmp_path / "thesis.tex", overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_other_files_that_came_later_are_left(tmp_path):
    compose_vae().save(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "film.part").write_text("x")
    compose_vae().save(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "x"


def test_other_sets_are_not_replaced(tmp_path):
    contents = {"weights.safetensors": b"", "config.json": b"{}", "training.pt": b"x"}
    storage.write_files(tmp_path, contents)
    with pytest.raises(CheckpointError, match=r"holds no VAE but config\.json, training\.pt"):
        compose_vae().save(tmp_path, overwrite=True)
    assert storage.read_files(tmp_path) == contents


def test_what_a_first_save_left_that_was_cut_off_is_no_hindrance(tmp_path):
    for name in ("config.json", "weights.safetensors.0a1b2c3d.part", ".lock"):
        (tmp_path / name).write_bytes(b"cut")
    vae = compose_vae()
    vae.save(tmp_path)
    assert_same_vae(vae, pvae.VAE.load(tmp_path))
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_one_can_be_replaced(tmp_path):
    compose_vae().save(tmp_path)
    (tmp_path / "config.json").unlink()
    vae = compose_vae()
    vae.save(tmp_path, overwrite=True)
    assert_same_vae(vae, pvae.VAE.load(tmp_path))


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    compose_vae().save(tmp_path / "vae")
    return tmp_path / "vae"


FILES = ["config.json", "weights.safetensors", storage.MANIFEST]

DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "one-short": lambda content: content[:-2],
    "empty": lambda content: b"",
    "first-bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "middle-bit": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(file, damage, saved):
    (saved / file).write_bytes(DAMAGE[damage]((saved / file).read_bytes()))
    with pytest.raises(CheckpointError, match=file):
        pvae.VAE.load(saved)


@pytest.mark.parametrize("file", FILES)
def test_missing_files_are_named(file, saved):
    (saved / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        pvae.VAE.load(saved)


@pytest.mark.parametrize("path", ["nowhere", "nowhere/below", "empty", "file"])
def test_folders_without_a_vae_are_named(path, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=path):
        pvae.VAE.load(tmp_path / path)


@pytest.mark.parametrize("contents", [{}, {"config.json": b"{}"}, {"weights.safetensors": b""}, {"a": b""}], ids=str)
def test_sets_of_something_else_are_named(contents, tmp_path):
    storage.write_files(tmp_path, contents)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: it has no (config\.json|weights\.safetensors)"):
        pvae.VAE.load(tmp_path)


def test_a_newer_schema_is_named(saved, monkeypatch):
    monkeypatch.setattr(storage, "SCHEMA", storage.SCHEMA + 1)
    storage.write_files(saved, storage.read_files(saved))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has schema \d.*Update pvae"):
        pvae.VAE.load(saved)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def bombs(marker: Path) -> dict[str, bytes]:
    torch.save({"weight": Bomb(marker)}, marker.with_suffix(".pt"))
    return {"pickle": pickle.dumps(Bomb(marker)), "torch": marker.with_suffix(".pt").read_bytes()}


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("file", FILES)
def test_pickles_are_refused_and_not_run(file, kind, saved, tmp_path):
    marker = tmp_path / "was-run"
    content = bombs(marker)[kind]
    if file == storage.MANIFEST:
        (saved / file).write_bytes(content)
    else:  # with a manifest that says it belongs there
        storage.write_files(saved, {**storage.read_files(saved), file: content})
    with pytest.raises(CheckpointError):
        pvae.VAE.load(saved)
    assert not marker.exists()
    pickle.loads(content) if kind == "pickle" else None
    assert marker.exists() == (kind == "pickle")  # it would have run


CRAFTED = {
    "no-json": lambda config: b"\x80\x04K\x01.",
    "not-utf8": lambda config: b"\xff\xfe\xfd",
    "list": lambda config: [config],
    "string": lambda config: "x",
    "no-model": lambda config: {k: v for k, v in config.items() if k != "model"},
    "no-dtypes": lambda config: {k: v for k, v in config.items() if k != "dtypes"},
    "dtypes-list": lambda config: {**config, "dtypes": ["float32"]},
    "dtype-unknown": lambda config: {**config, "dtypes": {"decoder.network.0.weight": "load"}},
    "dtype-unhashable": lambda config: {**config, "dtypes": {"decoder.network.0.weight": []}},
    "dtype-bits": lambda config: {**config, "dtypes": {"decoder.network.0.weight": "bits8"}},
    "default-int": lambda config: {**config, "default_dtype": "int64"},
    "default-none": lambda config: {**config, "default_dtype": None},
    "frozen": lambda config: {**config, "frozen": None},
    "deep": lambda config: b"[" * 100_000,
    "not-a-vae": lambda config: {**config, "model": {"class": "torch.nn.ReLU", "arguments": {}}},
    "model-none": lambda config: {**config, "model": None},
    "function": lambda config: {**config, "model": {"class": "os.system", "arguments": {"command": "exit 1"}}},
    "parts-do-not-fit": lambda config: {
        **config,
        "model": {**config["model"], "arguments": {**config["model"]["arguments"], "prior": None}},
    },
}


@pytest.mark.parametrize("name", CRAFTED)
def test_configurations_that_are_none_are_refused(name, saved, caller_state):
    files = storage.read_files(saved)
    made = CRAFTED[name](json.loads(files["config.json"]))
    storage.write_files(saved, {**files, "config.json": made if isinstance(made, bytes) else json.dumps(made).encode()})
    before = caller_state()
    with pytest.raises(CheckpointError):
        pvae.VAE.load(saved)
    before.assert_unchanged()
    assert torch.get_default_dtype() == torch.float32


def test_weights_of_another_vae_are_refused_with_their_names(saved, tmp_path):
    other = pvae.VAE.mlp(6, 2, [9], "gaussian").double()
    other.save(tmp_path / "other")
    weights = storage.read_files(tmp_path / "other")["weights.safetensors"]
    storage.write_files(saved, {**storage.read_files(saved), "weights.safetensors": weights})
    with pytest.raises(CheckpointError) as caught:
        pvae.VAE.load(saved)
    for part in (
        "decoder.log_scale is float64[] in the file and not there when it is built",
        "encoder.network.0.weight is float64[9, 6] in the file and float32[5, 6] when it is built",
    ):
        assert part in str(caught.value)


# --- Several processes, and the disk ----------------------------------------------------------------------------------


PROCESS = """
import os, random, resource, signal, sys, time, traceback
from pathlib import Path
import torch
import pvae
folder = Path(sys.argv[1])

def make(seed):
    torch.manual_seed(seed)
    return pvae.VAE.mlp(6, 2, [16])

def state(vae):
    return [t.tolist() for t in vae.state_dict().values()]

A, B = make(0), make(1)
WHOLE = [state(A), state(B)]

def forked(run, *args):
    pid = os.fork()
    if pid:
        return pid
    try:
        run(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def save_forever():
    while True:
        A.save(folder, overwrite=True)
        B.save(folder, overwrite=True)
"""

KILLED = """
A.save(folder)
rng = random.Random(0)
seen = set()
for kill in range(200):
    if kill >= 20 and seen == {0, 1}:
        break
    pid = forked(save_forever)
    time.sleep(rng.uniform(0.01, 0.15) * (1 + kill / 10))  # longer on a machine that is busy
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    seen.add(WHOLE.index(state(pvae.VAE.load(folder))))
assert seen == {0, 1}, seen
A.save(folder, overwrite=True)
assert len([p for p in folder.iterdir() if not p.name.startswith(".")]) < 10, list(folder.iterdir())
print("done")
"""

FIRST_KILLED = """
rng = random.Random(0)
for i in range(10):
    own = folder / str(i)
    pid = forked(lambda: (own.mkdir(), A.save(own)))
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    A.save(own, overwrite=True)
    assert state(pvae.VAE.load(own)) == WHOLE[0]
print("done")
"""

FULL = """
A.save(folder)
limit = (folder / "weights.safetensors").stat().st_size // 2
for size in (0, 100, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        B.save(folder, overwrite=True)
    except pvae.CheckpointError as error:
        assert "space" in str(error), error
    else:
        raise AssertionError("it was written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert state(pvae.VAE.load(folder)) == WHOLE[0]
    assert not list(folder.glob("*.part"))
B.save(folder, overwrite=True)
assert state(pvae.VAE.load(folder)) == WHOLE[1]
print("done")
"""

AT_ONCE = """
def save_often(vae):
    done = 0
    while done < 40:
        try:
            vae.save(folder, overwrite=True)
            done += 1
        except pvae.CheckpointError as error:
            assert "in use by another process" in str(error), error

A.save(folder)
running = {forked(save_often, vae) for vae in (A, B)}
loads = 0
while running:
    assert state(pvae.VAE.load(folder)) in WHOLE
    loads += 1
    pid, status = os.waitpid(-1, os.WNOHANG)
    assert status == 0, status
    running.discard(pid)
assert loads > 10, loads
assert state(pvae.VAE.load(folder)) in WHOLE
assert len([p for p in folder.iterdir() if not p.name.startswith(".")]) == 3, list(folder.iterdir())
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "script",
    [
        pytest.param(KILLED, id="killed", marks=pytest.mark.slow),
        pytest.param(FIRST_KILLED, id="first"),
        pytest.param(FULL, id="full"),
        pytest.param(AT_ONCE, id="at-once", marks=pytest.mark.slow),
    ],
)
def test_whatever_happens_a_whole_vae_is_loaded(script, tmp_path):
    (tmp_path / "vae").mkdir()
    assert fork_lines(PROCESS + script, tmp_path / "vae", folder=tmp_path) == ["done"]
