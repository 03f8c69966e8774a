"""Files of strangers: what lies about itself is refused before it costs anything, and nothing of others is removed."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import signal
import socket
import warnings
import zipfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import fork_lines
from pairs import ModulePair, compose_vae
from torch import nn

import pvae
from pvae import datasets
from pvae.errors import CheckpointError, DatasetError
from pvae.persistence import storage
from pvae.svi import checkpoints, load_checkpoint
from pvae.svi.checkpoints import Folder

fit = partial(helpers.fit, epochs=3, lr=0.01, compile=False)

MOST_MEMORY = 200 << 20  # that a refusal may take; each of these files asked for more


class LateError(BaseException):
    """What no file may cost; not one of those errors that stand for a file that was refused."""


@contextmanager
def cheaply(seconds=120):
    """A block that neither waits for ever nor takes much memory."""

    def late(*_):
        raise LateError

    before, peak = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_MEMORY


OPTIONS = {
    "kl_weight": 0.5,
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder and its data."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((300, 6), 0.3))
    path = tmp_path_factory.mktemp("trained") / "run"
    fit(ModulePair(), x, checkpoint=path, validation=x[:100], **OPTIONS)
    return path, x


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


def vouched(folder, **changes):
    """Changes what a checkpoint or a saved VAE holds, with a manifest that vouches for it."""
    contents = storage.read_files(folder)
    for name, change in changes.items():
        file = next(file for file in contents if file.partition(".")[0] == name)
        if isinstance(change, bytes):
            contents[file] = change
        elif file == "training.pt":
            training = torch.load(io.BytesIO(contents[file]), weights_only=True)
            change(training)
            buffer = io.BytesIO()
            torch.save(training, buffer)
            contents[file] = buffer.getvalue()
        else:
            value = json.loads(contents[file])
            change(value)
            contents[file] = json.dumps(value).encode()
    storage.write_files(folder, contents)


# --- what a checkpoint holds --------------------------------------------------------------------------------------


def one(training):
    return next(iter(training["optimizer"].values()))


def moment(name, of):
    return lambda t: one(t).update({name: of(one(t)[name])})


def group(**changes):
    return lambda t: t["group"].update(changes)


def place(**changes):
    return lambda t: t.update(changes)


def numpys(*places):
    return lambda t: t["noise"][0].update(numpy=[*t["noise"][0]["numpy"][:2], *places])


def torchs(left, after):
    def change(training):
        state = training["noise"][0]["torch"].numpy()
        state[8:12].view(np.int32)[:], state[16:24].view(np.uint64)[:] = left, after

    return change


def remembered(**changes):
    memory = {"first": "", "runs": {}, "changes": 0, "given_up": False, **changes}
    return lambda t: t.update(memory=[[memory, None]])


def schedule(**changes):
    return lambda t: t["scheduler"].update(changes)


NAN = float("nan")
LIES = {
    "expanded": moment("exp_avg", lambda m: torch.zeros(1, dtype=m.dtype).expand(m.shape)),
    "expanded-squares": moment("exp_avg_sq", lambda m: torch.zeros(1, dtype=m.dtype).expand(m.shape)),
    "overlapping": moment("exp_avg", lambda m: torch.zeros(m.numel() - 1).as_strided(m.shape, (0,) * m.dim())),
    "sparse": moment("exp_avg", lambda m: m.to_sparse()),
    "meta": moment("exp_avg", lambda m: m.to("meta")),
    "another-dtype": moment("exp_avg", lambda m: m.double()),
    "nan-moment": moment("exp_avg", lambda m: m * NAN),
    "negative-squares": moment("exp_avg_sq", lambda m: -m - 1),
    "steps-as-vector": moment("step", lambda s: s.expand(3).clone()),
    "negative-steps": moment("step", lambda s: -s),
    "nan-steps": moment("step", lambda s: s * NAN),
    "no-lr": group(lr=None),
    "lr-text": group(lr="0.1"),
    "lr-nan": group(lr=NAN),
    "one-beta": group(betas=(0.9,)),
    "beta-nan": group(betas=(NAN, 0.9)),
    "beta-one": group(betas=(0.9, 1.0)),
    "eps-negative": group(eps=-1.0),
    "eps-none": group(eps=None),
    "amsgrad": group(amsgrad=True),
    "fused": group(fused=True),
    "params": group(params=[]),
    "huge": group(foreign=2**70),
    "skips-an-epoch": place(steps=10**9, seen=10**9),
    "seen-otherwise": place(steps=2, seen=100),
    "epoch-true": place(epoch=True),
    "seen-float": place(steps=2, seen=128.0),
    "totals-text": place(totals=["x"]),
    "totals-nan": place(totals=[NAN]),
    "totals-none": place(totals=[None]),
    "totals-empty": place(totals=[]),
    "seconds-text": place(seconds="x"),
    "seconds-negative": place(seconds=-1.0),
    "constraints-elsewhere": place(constraints={"nowhere": "Real()"}),
    "constraints-numbers": place(constraints={3: 3}),
    "constraints-list": place(constraints=["x"]),
    "trained-twice": lambda t: t["order"].append(t["order"][0]),
    "memory-short": place(memory=[[None]]),
    "memory-runs": remembered(runs={"a": ["x", 1]}),
    "memory-one-run": remembered(runs={"a": [1]}),
    "memory-changes": remembered(changes=-1),
    "memory-given-up": remembered(given_up="yes"),
    "numpy-beyond": numpys(10**9, 0, 0.0),  # NumPy reads there: a crash
    "numpy-slightly-beyond": numpys(700, 0, 0.0),
    "numpy-text": numpys(624, 0, "x"),
    "torch-beyond": torchs(624, 624),
    "python-text": lambda t: t["noise"][0].update(python=(*t["noise"][0]["python"][:2], "x")),
    "cuda-short": lambda t: t["noise"][0].update(cuda=torch.zeros(3, dtype=torch.uint8)),
    "no-schedule": place(scheduler=None),
    "schedule-without-steps": schedule(step=3),
    "schedule-text": schedule(gamma="x"),
    "schedule-nowhere": schedule(last_epoch=None),
}
HISTORIES = {
    "text": lambda h: h["objective"].__setitem__(0, "x"),
    "nan": lambda h: h["objective"].__setitem__(0, NAN),
    "true": lambda h: h["seconds"].__setitem__(0, True),
    "none": lambda h: h["validation_elbo"].__setitem__(0, None),
    "lacks": lambda h: h.pop("seconds"),
    "more": lambda h: h.update(more=[0.0] * 3),
    "huge": lambda h: h["seconds"].__setitem__(0, 10**30),
    "short": lambda h: h["objective"].pop(),
}
CONFIGS = {
    "best-later": lambda c: c.update(best_epoch=99),
    "best-text": lambda c: c.update(best_epoch="1"),
    "no-weights": lambda c: c.update(kl_weights=None),
    "weights-text": lambda c: c.update(kl_weights=["x"] * 3),
    "seed-text": lambda c: c["arguments"].update(seed="x"),
    "arguments-none": lambda c: c.update(arguments=None),
    "environment-list": lambda c: c.update(environment=[]),
}
CASES = {
    **{f"training-{name}": {"training": change} for name, change in LIES.items()},
    **{f"history-{name}": {"history": change} for name, change in HISTORIES.items()},
    **{f"config-{name}": {"config": change} for name, change in CONFIGS.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_that_lies_is_damaged_and_the_one_before_is_taken(name, run, trained):
    vouched(run / "epoch-000003", **CASES[name])
    pair = ModulePair()
    with pytest.warns(UserWarning, match=r"epoch-000003.*Going back to the checkpoint before, .*epoch-000002"):
        result = fit(pair, trained[1], epochs=2, checkpoint=run, resume="auto", validation=trained[1][:100], **OPTIONS)
    assert result.checkpoint == run / "epoch-000002"


def test_moments_lie_in_memory_as_their_parameters_do(run, trained):
    """Adam's kernel goes through memory, whatever the shapes say."""
    straight, crossed = ModulePair(), ModulePair()
    layer = crossed.decoder[0]
    layer.weight = nn.Parameter(layer.weight.data.t().contiguous().t())
    try:
        fit(crossed, trained[1], epochs=1, validation=trained[1][:100], **OPTIONS)
    except pvae.PVAEError:
        pytest.skip("parameters that are not contiguous are not trained")
    options = {"epochs": 4, "resume": "auto", "validation": trained[1][:100], **OPTIONS}
    shutil.copytree(run, run.parent / "other")
    fit(straight, trained[1], checkpoint=run, **options)
    fit(crossed, trained[1], checkpoint=run.parent / "other", **options)
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(value, crossed.state_dict()[name])


# --- memory before trust ------------------------------------------------------------------------------------------


def small():
    return compose_vae(nn.Sequential(nn.Linear(2, 6)), nn.Sequential(nn.Linear(6, 4)))


def layer(name, **arguments):
    return {"class": f"torch.nn.{name}", "arguments": arguments}


def linear(**changes):
    return layer("Linear", in_features=2, out_features=6, bias=True, **changes)


def stack(*layers):
    return {"class": "torch.nn.Sequential", "children": {str(n): one for n, one in enumerate(layers)}}


ENCODER = layer("TransformerEncoderLayer", d_model=2, nhead=1)
BOMBS = {
    "wide": linear() | {"arguments": {"in_features": 2, "out_features": 10**9}},
    "deep": layer("LSTM", input_size=2, hidden_size=2, num_layers=10**6),
    "copies": layer("TransformerEncoder", encoder_layer=ENCODER, num_layers=10**6),
    "transformer": layer("Transformer", d_model=2, nhead=1, num_encoder_layers=10**6, num_decoder_layers=1),
    "on-a-device": layer("Linear", in_features=2, out_features=10**9, device="cpu"),
    "table": layer("Embedding", num_embeddings=10**9, embedding_dim=2),
    "output": stack(
        linear(), layer("Unflatten", dim=-1, unflattened_size=[6, 1]), layer("Upsample", scale_factor=10**8)
    ),
    "padded": stack(linear(), layer("ConstantPad1d", padding=10**9, value=0.0)),
    "lazy": layer("LazyLinear", out_features=10**9),
    "list": stack(linear(), *[{"class": "torch.nn.ModuleList", "children": {}}] * 150_000),
    "nested": None,
}


# Seconds these may take: torch's LSTM needs minutes for the layers that the bounds allow, other stacks ten seconds.
SLOW_BOMBS = {"deep": 600, "copies": 120, "transformer": 120}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_BOMBS else ()) for name in BOMBS]
)
def test_a_description_that_does_not_fit_the_weights_builds_nothing(name, tmp_path):
    small().save(tmp_path)
    bomb = BOMBS[name]
    if bomb is None:
        inside = json.dumps(linear())
        for _ in range(200):
            inside = '{"class": "torch.nn.Sequential", "children": {"0": ' + inside + "}}"
        config = json.loads(storage.read_files(tmp_path)["config.json"])
        config["model"]["arguments"]["decoder"]["arguments"]["network"] = "HERE"
        vouched(tmp_path, config=json.dumps(config).replace('"HERE"', inside).encode())
    else:
        vouched(tmp_path, config=lambda c: c["model"]["arguments"]["decoder"]["arguments"].update(network=bomb))
    with cheaply(SLOW_BOMBS.get(name, 120)), pytest.raises(CheckpointError):
        pvae.VAE.load(tmp_path)


def test_a_prior_of_any_size_is_not_built(tmp_path):
    small().save(tmp_path)
    vouched(tmp_path, config=lambda c: c["model"]["arguments"]["prior"]["arguments"].update(latent_dim=10**9))
    with cheaply(), pytest.raises(CheckpointError):
        pvae.VAE.load(tmp_path)


def test_parts_that_do_not_fit_each_other_are_refused_at_once(tmp_path):
    small().save(tmp_path)
    vouched(tmp_path, config=lambda c: c["model"]["arguments"]["decoder"]["arguments"].update(event_shape=[5]))
    with cheaply(), pytest.raises(CheckpointError, match="expected 1 number"):
        pvae.VAE.load(tmp_path)


class Grows(nn.Module):
    """Needs numbers in its constructor, which the meta device has none of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scales = [value.item() for value in torch.linspace(0, 1, 3)]
        self.register_buffer("table", torch.from_numpy(np.arange(6.0, dtype=np.float32)), persistent=False)
        self.linear = nn.Linear(2, width)

    def forward(self, z):
        return self.linear(z)[..., :6] + self.table * self.scales[1]


def test_modules_that_need_numbers_are_built_within_bounds(tmp_path):
    vae = small()
    vae.decoder.network = Grows(6)
    vae.save(tmp_path)
    loaded = pvae.VAE.load(tmp_path, modules=[Grows])
    assert torch.equal(loaded.decode(torch.ones(1, 2)).mean, vae.decode(torch.ones(1, 2)).mean)
    vouched(
        tmp_path,
        config=lambda c: c["model"]["arguments"]["decoder"]["arguments"]["network"]["arguments"].update(width=10**9),
    )
    with cheaply(), pytest.raises(CheckpointError, match="more memory"):
        pvae.VAE.load(tmp_path, modules=[Grows])


def zipped(content, how, **members):
    """An archive of torch.save with other members, or compressed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(buffer, "w", how) as after:
        for info in before.infolist():
            after.writestr(info.filename, members.get(Path(info.filename).stem, before.read(info)))
    return buffer.getvalue()


def training_file(run):
    return storage.read_files(run / "epoch-000003")["training.pt"]


STATES = {
    "deflated": lambda content: zipped(content, zipfile.ZIP_DEFLATED, data=bytes(1 << 29)),
    "bytearray": lambda content: zipped(
        content, zipfile.ZIP_STORED, data=b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x20\x85R."
    ),
    "built": lambda content: zipped(content, zipfile.ZIP_STORED, data=b"\x80\x02}}b."),
    "doubled": lambda content: zipped(
        content, zipfile.ZIP_STORED, data=b"\x80\x02]q\x00" + b"".join(b"(h%ch%cl" % (n, n) for n in range(1)) + b"."
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_more_than_it_seems_is_refused(name, run):
    vouched(run / "epoch-000003", training=STATES[name](training_file(run)))
    with cheaply(), pytest.warns(UserWarning, match="Going back"):
        assert Folder(run).newest().epoch == 2


def test_many_entries_that_are_one_value_are_refused(run):
    value = [0.5]
    for _ in range(60):
        value = [value, value]
    vouched(run / "epoch-000003", training=lambda t: t.update(more=value))
    with cheaply(), pytest.warns(UserWarning, match="too many parts"):
        assert Folder(run).newest().epoch == 2


@pytest.mark.parametrize("content", [b"[" * 10**6, b"[" + b"{}," * 10**6 + b"{}]", b'{"a": ' + b"9" * 10**4 + b"}"])
def test_json_without_end_is_refused(content, run):
    vouched(run / "epoch-000003", config=content)
    with cheaply(), pytest.warns(UserWarning, match="Going back"):
        assert Folder(run).newest().epoch == 2


def test_brackets_in_text_are_none():
    from pvae.persistence.serialization import json_from_bytes

    value = {"[" * 1000: ['"' + "{" * 1000, "\\", "]"]}
    assert json_from_bytes(json.dumps(value).encode()) == value


def test_files_that_are_holes_are_not_read(run):
    folder = run / "epoch-000003"
    size = 1 << 30
    os.truncate(folder / "weights.safetensors", size)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"]["bytes"] = size
    manifest.pop("sha256")
    manifest["sha256"] = storage._digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with cheaply(), pytest.warns(UserWarning, match="holes"):
        assert Folder(run).newest().epoch == 2


def test_a_file_that_has_grown_is_not_read(run):
    os.truncate(run / "epoch-000003" / "training.pt", 1 << 32)
    os.truncate(run / "epoch-000003" / "manifest.json", 1 << 32)
    with cheaply(), pytest.warns(UserWarning, match="epoch-000003"):
        assert Folder(run).newest().epoch == 2


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_data_that_are_larger_than_they_may_be_are_not_read(suffix, tmp_path):
    for file in datasets._MNIST:
        (tmp_path / f"{file.name}{suffix}").write_bytes(gzip.compress(b"") if suffix else b"")
    path = tmp_path / f"{datasets._MNIST[0].name}{suffix}"
    if suffix:
        with gzip.open(path, "wb", 1) as file:
            file.write(bytes([0, 0, 8, 3]))
            for _ in range(64):
                file.write(bytes(16 << 20))
    else:
        path.write_bytes(bytes([0, 0, 8, 3]))
        os.truncate(path, 1 << 34)
    with cheaply(), pytest.raises(DatasetError, match=r"47040000 bytes"):
        datasets.mnist(tmp_path)


# --- special files ------------------------------------------------------------------------------------------------


def special(path, kind):
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        (path.parent.parent / "elsewhere").write_bytes(content)
        path.symlink_to(path.parent.parent / "elsewhere")
    else:
        path.symlink_to(kind)


KINDS = ["pipe", "socket", "folder", "link", "/dev/zero", "/dev/stdin", "/nowhere"]


@pytest.mark.parametrize("file", ["weights.safetensors", storage.MANIFEST])
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_read(kind, file, tmp_path):
    folder = tmp_path / "v"
    small().save(folder)
    special(folder / file, kind)
    with cheaply(20), pytest.raises(CheckpointError, match=file):
        pvae.VAE.load(folder)


@pytest.mark.parametrize("file", ["training.pt", storage.MANIFEST])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_a_checkpoint_of_special_files_is_damaged(kind, file, run):
    special(run / "epoch-000003" / file, kind)
    with (
        cheaply(20),
        pytest.warns(UserWarning, match=f"epoch-000003/{file} is a link, a pipe, .*regular file.*Going back"),
    ):
        assert Folder(run).newest().epoch == 2


def test_a_history_or_a_lock_that_is_a_link_is_not_written_to(run, trained, tmp_path):
    (tmp_path / "diary").write_text("mine")
    (run / "history.jsonl").unlink()
    (run / "history.jsonl").symlink_to(tmp_path / "diary")
    options = {"checkpoint": run, "resume": "auto", "validation": trained[1][:100], **OPTIONS}
    fit(ModulePair(), trained[1], epochs=4, **options)
    assert (tmp_path / "diary").read_text() == "mine"
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "made")
    with pytest.raises(CheckpointError, match="regular file"):
        fit(ModulePair(), trained[1], epochs=5, **options)
    assert not (tmp_path / "made").exists()


def test_a_run_whose_folder_is_a_link_goes_on(run, trained, tmp_path):
    (tmp_path / "link").symlink_to(run)
    options = {"checkpoint": tmp_path / "link", "resume": "auto", "validation": trained[1][:100], **OPTIONS}
    assert fit(ModulePair(), trained[1], epochs=4, **options).checkpoint == tmp_path / "link" / "epoch-000004"
    pair = ModulePair()
    loaded = load_checkpoint(tmp_path / "link" / "epoch-000004", pair.model, pair.guide, trained[1])
    assert len(loaded.history["seconds"]) == 4
    small().save(tmp_path / "vae")
    (tmp_path / "vae-link").symlink_to(tmp_path / "vae")
    pvae.VAE.load(tmp_path / "vae-link")


# --- what is removed ----------------------------------------------------------------------------------------------

THEIRS = ["config.json", "weights.safetensors", "film.part", "config.json.part", "config-0123456789ab.json"]


def test_pruning_follows_no_link_and_removes_what_the_manifest_names(run, trained, tmp_path):
    theirs = [tmp_path / "theirs", run / "epoch-000000"]
    for folder in theirs:
        folder.mkdir()
        for name in THEIRS:
            (folder / name).write_text("mine")
    shutil.rmtree(run / "epoch-000001", ignore_errors=True)
    (run / "epoch-000001").symlink_to(tmp_path / "theirs")
    shutil.copytree(run / "epoch-000003", tmp_path / "moved")
    shutil.rmtree(run / "epoch-000002")
    (run / "epoch-000002").symlink_to(tmp_path / "moved")
    (run / "epoch-000003" / "film.part").write_text("mine")
    fit(ModulePair(), trained[1], epochs=6, checkpoint=run, resume="auto", validation=trained[1][:100], **OPTIONS)
    for folder in theirs:
        assert sorted(path.name for path in folder.iterdir()) == sorted(THEIRS)
    assert len(list((tmp_path / "moved").iterdir())) == 5
    if not storage.holds_files(run / "epoch-000003"):  # else it is the best
        assert [path.name for path in (run / "epoch-000003").iterdir()] == ["film.part"]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_what_a_killed_write_left_is_removed_and_nothing_else(stage, tmp_path, monkeypatch):
    """Killed after so many renames: of a new folder, and of one with a set in force."""

    class Killed(BaseException):
        pass

    contents = {"config.json": b"1", "weights.safetensors": b"2"}
    for before in (None, {"config.json": b"0", "weights.safetensors": b"0"}):
        folder = tmp_path / str(before is None)
        if before:
            storage.write_files(folder, before)
        renamed, rename = [], os.replace

        def until(*args, renamed=renamed, rename=rename):
            renamed.append(1)
            if len(renamed) >= stage:
                raise Killed
            rename(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until)
            patch.setattr(storage, "_tidy", lambda *_: None)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # the dead remove nothing
            if stage <= 3:
                with pytest.raises(Killed):
                    storage.write_files(folder, contents)
            else:
                storage.write_files(folder, contents)
        (folder / "film.part").write_text("mine")
        if stage <= 3 and before:
            assert storage.read_files(folder) == before
        storage.write_files(folder, contents)
        assert storage.read_files(folder) == contents
        assert len(list(folder.iterdir())) == 4
        storage.remove_files(folder, contents)
        assert [path.name for path in folder.iterdir()] == ["film.part"]


def test_a_manifest_cannot_name_what_is_not_of_the_set(tmp_path):
    """Neither in other folders, nor under other names; what is to be overwritten may be a stranger's."""
    (tmp_path / "thesis.tex").write_text("mine")
    folder = tmp_path / "vae"
    small().save(folder)
    (folder / "notes.txt").write_text("mine")
    for file in ("../thesis.tex", "..", "notes.txt", "config-x.json", "", 3, None):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["config.json"]["file"] = file
        manifest.pop("sha256")
        manifest["sha256"] = storage._digest_of(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="not as it was written"):
            pvae.VAE.load(folder)
        small().save(folder, overwrite=True)
        assert (folder / "notes.txt").exists()
        assert (tmp_path / "thesis.tex").exists()


def go_on_without(epoch, data):
    """What another process may do meanwhile: three more epochs, after which one of those before is gone."""
    options = {"checkpoint": epoch.parent, "resume": "auto", "validation": data[:100], **OPTIONS}
    fit(ModulePair(), data, epochs=6, **options)
    shutil.rmtree(epoch, ignore_errors=True)


def test_the_best_is_read_again_where_another_became_it_meanwhile(run, trained, monkeypatch):
    vouched(run / "epoch-000003", config=lambda c: c.update(best_epoch=2))
    read, trains = checkpoints._read, [True]

    def meanwhile(folder, *args):
        if folder.name == "epoch-000002" and trains:
            trains.clear()
            go_on_without(run / "epoch-000002", trained[1])
        return read(folder, *args)

    monkeypatch.setattr(checkpoints, "_read", meanwhile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = Folder(run).best()
    assert best.epoch == Folder(run).newest().config["best_epoch"]
    assert not trains


def test_the_newest_is_looked_for_again_where_it_was_removed_meanwhile(run, trained, monkeypatch):
    read, trains = checkpoints._read, [True]

    def meanwhile(folder, *args):
        if trains:
            trains.clear()
            go_on_without(run / "epoch-000003", trained[1])
        return read(folder, *args)

    monkeypatch.setattr(checkpoints, "_read", meanwhile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Folder(run).newest().epoch == 6


# --- at random ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is watched by way of Linux's /proc")
@pytest.mark.parametrize("trials", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_files_that_were_changed_at_random_do_no_harm(trials, tmp_path):
    script = str(Path(__file__).with_name("attack_files.py"))
    code = f"import runpy\nrunpy.run_path({script!r}, run_name='__main__')"
    fork_lines(code, "--trials", trials, "--seed", trials, folder=tmp_path, timeout=30 * trials)
