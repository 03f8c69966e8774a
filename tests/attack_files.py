"""Attacks saved VAEs and checkpoints: ``python tests/attack_files.py --trials 10000``.

Each trial changes one file at random, most with a manifest that vouches for the change, and loads it in a child process
that is watched: it must neither crash, hang, run code, take more than twice the honest memory (and a little
for the allocator), nor raise an error that is not pvae's. What loads is used: the VAE is run, training goes on.
"""

from __future__ import annotations

import argparse
import collections
import copy
import io
import json
import os
import pickle
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from pathlib import Path

import torch
from torch import nn

import pvae
from pvae.persistence import storage
from pvae.svi.checkpoints import Folder

SLACK = 64 << 20
SECONDS = 120
EXPECTED = {"refused", "went back", "used", "refused in use"}

# --- honest files -------------------------------------------------------------------------------------------------

X = (torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < 0.4).float()
OPTIONS = {
    "batch_size": 16,
    "progress": False,
    "compile": False,
    "kl_weight": 0.5,
    "validation": X[:9],
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 5]),
}


def new_vae():
    encoder = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LeakyReLU(0.2), nn.Unflatten(-1, (2, 2)), nn.Flatten()
    )
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.LayerNorm(4), nn.ModuleDict({"a": nn.Dropout()})["a"])
    prior, likelihood = pvae.priors.StandardNormal(2), pvae.likelihoods.Bernoulli(decoder, event_shape=(4,))
    return pvae.VAE(prior, likelihood, pvae.posteriors.DiagonalNormal(encoder))


def fit(vae, path, **options):
    return pvae.fit(vae.model, vae.guide, X, checkpoint=path, resume="auto", **{**OPTIONS, **options})


def make_honest(path):
    new_vae().save(path / "vae")
    fit(new_vae(), path / "run", epochs=2)


# --- changes ------------------------------------------------------------------------------------------------------

BIG = [2**31, 2**63, 10**9, 10**15, 10**30, -1, -(2**63), 65_536, 1_000_000, 0, 1, 2, 3, 7]
ODD = [None, True, False, "", "x", "nan", "../x", "cpu", "cuda", [], {}, [[]], 0.5, -0.5, 1e308, float("nan")]
ODD += [
    float("inf"),
    {"float": "nan"},
    {"dtype": "complex128"},
    {"dtype": "int8"},
    {"tuple": [9] * 9},
    "a" * 5000,
    [0.1] * 999,
]
LAYERS = sorted(
    name for name in dir(nn) if isinstance(getattr(nn, name), type) and issubclass(getattr(nn, name), nn.Module)
)


def flipped(rng, content):
    made = bytearray(content or b"\0")
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        made[rng.randrange(len(made))] = rng.choice([rng.randrange(256), 0, 255, 0x7F, made[0] ^ 1])
    return bytes(made)


def any_bytes(rng, content):
    """Another content of a file, of any kind."""
    cut = rng.randrange(len(content) + 1)
    return rng.choice(
        [
            lambda: flipped(rng, content),
            lambda: content[:cut],
            lambda: content[:cut] + content[rng.randrange(len(content) + 1) :],
            lambda: content + rng.randbytes(rng.choice([1, 8, 100])),
            lambda: content[:cut] + bytes(64) + content[cut + 64 :],
            lambda: rng.randbytes(rng.choice([0, 8, 200])),
            lambda: struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**63])) + content[8:],
            lambda: b"[" * rng.choice([10, 1000, 10**6]),
            lambda: pickle.dumps(Evil()),
        ]
    )()


class Evil:
    """Would leave a mark if it were unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK_MARK"],)


def places(value, at=()):
    """Where there is something in nested values."""
    yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value[:20]):
            yield from places(entry, (*at, number))


def replaced(value, at, by):
    """Nested values with another one at some place."""
    if not at:
        return by
    made = copy.copy(value) if isinstance(value, dict) else list(value)
    if by is replaced and len(at) == 1:
        del made[at[0]]
    else:
        made[at[0]] = replaced(value[at[0]], at[1:], by)
    return tuple(made) if isinstance(value, tuple) else made


def looked_up(value, at):
    for key in at:
        value = value[key]
    return value


def odd_value(rng, before):
    """A value in the place of another: of another type, or far out."""
    if isinstance(before, torch.Tensor) and rng.random() < 0.8:
        return odd_tensor(rng, before)
    if isinstance(before, str) and "torch.nn" in before:
        return f"torch.nn.{rng.choice(LAYERS)}"
    if isinstance(before, int | float) and not isinstance(before, bool) and rng.random() < 0.6:
        return rng.choice([*BIG, before + 1, before - 1, float(before), -before, str(before), before * 1000])
    if isinstance(before, dict) and before.get("class") and rng.random() < 0.7:
        arguments = {"num_layers": 10**6, "d_model": 2, "nhead": 1, "num_encoder_layers": 10**6, "out_features": 10**9}
        kept = dict(rng.sample(sorted(arguments.items()), rng.randrange(1, 4)))
        return {"class": f"torch.nn.{rng.choice(LAYERS)}", "arguments": {**before.get("arguments", {}), **kept}}
    if isinstance(before, list | tuple) and before and rng.random() < 0.5:
        return type(before)(list(before) * rng.choice([2, 1000]) if rng.random() < 0.5 else list(before)[:-1])
    return rng.choice(BIG + ODD)


def odd_tensor(rng, tensor):
    made = [
        lambda: torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape or (1,)),
        lambda: torch.zeros(1, dtype=tensor.dtype).expand(10**6, 10**6),
        lambda: tensor.to_sparse() if tensor.dim() else tensor,
        lambda: tensor.to("meta"),
        lambda: tensor.double(),
        lambda: tensor.to(torch.complex64),
        lambda: tensor * -1 if tensor.dtype != torch.uint8 else tensor.flip(0),
        lambda: tensor.float() * float("nan"),
        lambda: tensor.float() * float("inf"),
        lambda: tensor.new_zeros(0),
        lambda: tensor[None],
        lambda: torch.empty_strided(tensor.shape, [2] * tensor.dim(), dtype=tensor.dtype).zero_(),
        lambda: tensor.t() if tensor.dim() == 2 else tensor.reshape(-1),
        lambda: nn.Parameter(tensor.float()),
        lambda: torch.randint(256, tensor.shape, dtype=torch.uint8).to(tensor.dtype),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: tensor.reshape(-1)[: tensor.numel() // 2],
    ]
    return rng.choice(made)()


def odd_json(rng, content):
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.choice(list(places(value)))
        by = replaced if at and rng.random() < 0.15 else odd_value(rng, looked_up(value, at))
        value = replaced(value, at, by)
    return json.dumps(value).encode()


def odd_state(rng, content):
    value = torch.load(io.BytesIO(content), weights_only=True)
    at = rng.choice(list(places(value)))
    by = replaced if at and rng.random() < 0.15 else odd_value(rng, looked_up(value, at))
    if rng.random() < 0.05:
        by = [0.5]
        for _ in range(80):
            by = [by, by]
    buffer = io.BytesIO()
    torch.save(replaced(value, at, Evil() if rng.random() < 0.03 else by), buffer)
    return buffer.getvalue()


BOMB = b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R."
CODE = b"\x80\x02cos\nmkdir\nX%s%s\x85R."


def odd_archive(rng, content):
    """Another structure of the archive that torch.save writes, with right checksums."""
    how, buffer = rng.choice([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED]), io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as before,
        zipfile.ZipFile(buffer, "w", how) as after,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        names = before.namelist()
        chosen = rng.choice([name for name in names if name.endswith("data.pkl")] * 6 + names)
        for name in names:
            member = before.read(name)
            if name == chosen:
                mark = os.environ["ATTACK_MARK"].encode()
                program = name.endswith("data.pkl")
                changes = [flipped(rng, member)] * 4 + [member[: len(member) // 2], member + member, b""]
                changes += [bytes(1 << 28)] if how == zipfile.ZIP_DEFLATED else []
                changes += [BOMB, CODE % (struct.pack("<I", len(mark)), mark)] if program else []
                member, name = rng.choice(changes), rng.choice([name] * 6 + ["archive/../x", name + "x"])
            for _ in range(rng.choice([1] * 20 + [0, 2])):
                after.writestr(name, member)
    return buffer.getvalue()


def odd_header(rng, content):
    length = int.from_bytes(content[:8], "little")
    header = odd_json(rng, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def odd_manifest(rng, folder):
    manifest = json.loads((folder / storage.MANIFEST).read_text())
    manifest.pop("sha256")
    at = rng.choice([place for place in places(manifest) if place])
    manifest = replaced(manifest, at, replaced if rng.random() < 0.15 else odd_value(rng, looked_up(manifest, at)))
    if isinstance(manifest, dict) and rng.random() < 0.9:
        manifest["sha256"] = storage._digest_of(manifest)
    (folder / storage.MANIFEST).write_text(json.dumps(manifest))


def special(rng, folder):
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.choice(["pipe", "folder", "/dev/zero", "/dev/stdin", "/nowhere", "holes", "gone", "link", "itself"])
    if kind == "holes":
        os.truncate(path, rng.choice([1 << 20, 1 << 33]))
        return
    content = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        (folder.parent / "target").write_bytes(content)
        path.symlink_to(folder.parent / "target")
    elif kind != "gone":
        path.symlink_to(path.name if kind == "itself" else kind)


STRUCTURED = {".json": odd_json, ".pt": lambda r, c: rng_choice(r)(r, c), ".safetensors": odd_header}


def rng_choice(rng):
    return rng.choice([odd_state, odd_state, odd_archive])


def attack(rng, folder):
    """Changes a folder; returns in a word how."""
    how = rng.choice(["fields"] * 12 + ["bytes", "bytes", "unvouched", "manifest", "special"])
    if how == "special":
        special(rng, folder)
    elif how == "manifest":
        odd_manifest(rng, folder)
    elif how == "unvouched":
        path = rng.choice(sorted(folder.iterdir()))
        path.write_bytes(any_bytes(rng, path.read_bytes()))
    else:
        contents = storage.read_files(folder)
        name = rng.choice(sorted(contents))
        change = any_bytes if how == "bytes" else STRUCTURED[Path(name).suffix]
        storage.write_files(folder, {**contents, name: change(rng, contents[name])})
        how = f"{how} of {name}"
    return how


# --- trials -------------------------------------------------------------------------------------------------------


def use_vae(folder):
    try:
        vae = pvae.VAE.load(folder / "vae")
    except pvae.PVAEError:
        return "refused"
    try:
        pvae.log_evidence(vae.model, vae.guide, torch.zeros(3, *vae.event_shape), num_samples=3, progress=False)
    except pvae.PVAEError:
        return "refused in use"
    return "used"


def use_checkpoint(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            newest = Folder(folder / "run").newest()
        except pvae.PVAEError:
            return "refused"
        if newest is None or newest.folder.name != "epoch-000002":
            return "went back"
        try:
            result = fit(new_vae(), folder / "run", epochs=3)
        except pvae.PVAEError:
            return "refused in use"
    assert len(result.history["seconds"]) == 3
    return "used"


def peak():
    """The largest memory since `forget_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def trial(number, seed, honest, scratch):
    """How it was attacked, what came of it, and the memory that it took."""
    rng, which = random.Random(f"{seed} {number}"), number % 2
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(honest, scratch)
    how = "nothing"
    if number >= 0:
        try:
            how = attack(rng, scratch / "run" / "epoch-000002" if which else scratch / "vae")
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError, OverflowError):
            how = "none: the change could not be made"
    before = forget_peak()
    try:
        came = use_checkpoint(scratch) if which else use_vae(scratch)
    except BaseException:
        came = "raw error: " + " ".join(traceback.format_exc().splitlines()[-1:])[:300]
        with open(os.environ["ATTACK_LOG"], "a") as log:
            log.write(f"trial {number} ({how})\n{traceback.format_exc()}\n")
    if os.path.exists(os.environ["ATTACK_MARK"]):
        came = "code was run"
        os.rmdir(os.environ["ATTACK_MARK"])
    return {"number": number, "how": how, "came": came, "memory": peak() - before}


def child(numbers, seed, honest, scratch, pipe):
    torch.set_num_threads(1)
    for number in numbers:
        os.write(pipe, (json.dumps({"begins": number}) + "\n").encode())
        os.write(pipe, (json.dumps(trial(number, seed, honest, scratch)) + "\n").encode())


def run(trials, seed=0, only=None, told=print):
    """Attacks, and returns the counts of what came of it and all that must not have come."""
    folder = Path(tempfile.mkdtemp())
    os.environ["ATTACK_MARK"], os.environ["ATTACK_LOG"] = str(folder / "mark"), str(folder / "log")
    try:
        make_honest(folder / "honest")
        queue = collections.deque([-2, -1, -2, -1, *(range(trials) if only is None else only)])
        honest, counts, bad = {0: 0, 1: 0}, collections.Counter(), []
        ways = collections.Counter()
        while queue:
            for found in _watched(queue, seed, folder):
                number = found["number"]
                if number < 0:
                    honest[number % 2] = max(honest[number % 2], found["memory"])
                    assert found["came"] == "used", found
                    continue
                counts[found["came"] if found["came"] in EXPECTED else found["came"].partition(":")[0]] += 1
                ways[found["how"]] += 1
                if found["memory"] > 2 * honest[number % 2] + SLACK:
                    bad.append({**found, "came": f"memory: {found['came']}"})
                elif found["came"] not in EXPECTED:
                    bad.append(found)
                counts["most memory, MiB"] = max(counts["most memory, MiB"], found["memory"] >> 20)
                if sum(ways.values()) % 500 == 0:
                    told(f"{sum(ways.values())} trials: {dict(counts)}, bad: {len(bad)}", flush=True)
        told(f"honest memory, MiB: {[value >> 20 for value in honest.values()]}; ways: {dict(ways)}")
        if (folder / "log").exists() and bad:
            told((folder / "log").read_text()[-6000:])
        return counts, bad
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(queue, seed, folder):
    """Runs trials in a child process, and yields what they found, until it has done 200, dies, or says nothing."""
    receives, sends = os.pipe()
    numbers = list(queue)[:200]
    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(receives)
            child(numbers, seed, folder / "honest", folder / "scratch", sends)
            status = 0
        finally:
            os._exit(status)
    os.close(sends)
    begun, text = numbers[0], b""
    while True:
        silent = not select.select([receives], [], [], SECONDS)[0]
        if silent:
            os.kill(process, signal.SIGKILL)
        got = b"" if silent else os.read(receives, 1 << 16)
        text += got
        *lines, text = text.split(b"\n")
        for line in map(json.loads, lines):
            if "begins" in line:
                begun = line["begins"]
            else:
                queue.popleft()
                yield line
        if not got:
            break
    os.close(receives)
    status = os.waitpid(process, 0)[1]
    if silent or status:
        queue.popleft()
        what = "hang" if silent else f"crash: status {status}"
        yield {"number": begun, "how": "?", "came": what, "memory": 0}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of trials to repeat")
    arguments = parser.parse_args()
    counts, bad = run(arguments.trials, arguments.seed, arguments.only)
    print(f"{arguments.trials} trials: {dict(counts)}")
    for found in bad:
        print("BAD", found)
    sys.exit(bool(bad))
