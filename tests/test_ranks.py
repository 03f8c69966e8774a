"""Several processes under torch.distributed: two train and evaluate as one does, each writes what it should, and where
one fails all end, soon and with an error.

The file is also the program that the processes run: ``python test_ranks.py <case> <folder>`` runs one of the functions
in `CASES`, which returns plain values. The tests start two such processes, and look at what they returned.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
import torch.distributed as td
from pyro import distributions as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

import pvae
from pvae.errors import ArgumentError
from pvae.runtime.processes import ALONE, Processes, resolve_processes
from pvae.runtime.signals import Stop

PATIENCE = 100  # seconds; a launch that takes longer hangs
LIMIT = 60.0  # seconds after which a process gives another one up


# --- starting two processes -----------------------------------------------------------------------------------------


def launched(case: str, folder: Path, *, torchrun: bool = False, meanwhile: Callable[[Any], None] | None = None) -> Any:
    """Runs a case on two processes; returns what each returned (``None`` if nothing), and the exit codes.

    Args:
        case: One of `CASES`.
        folder: For what they write.
        torchrun: Start them by torchrun, whose exit code is then the only one.
        meanwhile: Called with the launcher's process.
    """
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        commands, ranks = [[*command, case, str(folder)]], [{}]
    else:  # a process for each rank, which is sooner there
        commands = [[sys.executable, __file__, case, str(folder)]] * 2
        ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "w+") as output:
        started = [
            subprocess.Popen(command, env=environment | rank, stdout=output, stderr=subprocess.STDOUT)
            for command, rank in zip(commands, ranks, strict=True)
        ]
        end = time.monotonic() + PATIENCE
        try:
            if meanwhile is not None:
                meanwhile(started[0])
            codes = [process.wait(max(0.1, end - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired:
            pytest.fail(f"{case} hangs: {(folder / 'output').read_text()[-3000:]}")
        finally:
            for process in started:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    found = [folder / f"returned-{rank}" for rank in range(2)]
    returned = [torch.load(path, weights_only=True) if path.exists() else None for path in found]
    if not torchrun and None in returned:
        pytest.fail(f"{case} failed: {(folder / 'output').read_text()[-3000:]}")
    return returned, codes


def main(case: str, folder: Path) -> None:
    """What each of the processes does."""
    signal.alarm(2 * PATIENCE)  # whatever happens, none is left behind
    torch.set_num_threads(1)
    method = {} if "MASTER_PORT" in os.environ else {"init_method": f"file://{folder}/store"}
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    td.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=LIMIT), **method)
    try:
        torch.save(CASES[case](rank, folder), folder / f"returned-{rank}")
    finally:
        td.destroy_process_group()


# --- pairs ----------------------------------------------------------------------------------------------------------


class Given(dist.Normal):
    """A normal distribution whose noise is given."""

    def __init__(self, loc, scale, noise) -> None:
        super().__init__(loc, scale)
        self.noise = noise

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise

    def expand(self, batch_shape, _instance=None):
        assert self.batch_shape == torch.Size(batch_shape)
        return self


class WithNoise(nn.Module):
    """A pair whose noise comes with the data, so that it does not matter which process draws it.

    In float64: two sums of the same numbers in another order then agree to many digits after many steps, too.

    Args:
        rank: The process; another one than the first begins elsewhere.
        whole: The size of a plate that subsamples; none if left out.
    """

    def __init__(self, rank: int = 0, whole: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(7 + rank)
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 4)).double()
        self.decoder = nn.Linear(2, 6).double()
        self.whole = whole

    def plate(self, x):
        return pyro.plate("data", len(x)) if self.whole is None else pyro.plate("data", self.whole, subsample=x)

    def model(self, x, noise):
        pyro.module("decoder", self.decoder)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, noise):
        pyro.module("encoder", self.encoder)
        with self.plate(x):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", Given(loc, raw.exp(), noise).to_event(1))


def some_bits(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    cause = torch.randint(2, (count, 1), generator=generator).bool()
    return (cause ^ (torch.rand(count, 6, generator=generator) < 0.1)).float()


def with_noise(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return some_bits(count).double(), torch.randn(count, 2, generator=generator, dtype=torch.float64)


def flipped(x: torch.Tensor) -> torch.Tensor:
    """Another few bits flipped each time."""
    return torch.where(torch.rand_like(x) < 0.05, 1 - x, x)


def small(rank: int = 0, hidden: int = 8) -> pvae.VAE:
    torch.manual_seed(100 + rank)
    return pvae.VAE.mlp(6, latent_dim=2, hidden=[hidden])


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def fit(pair, data, **options):
    return pvae.fit(pair.model, pair.guide, data, **{"epochs": 2, "batch_size": 50, "progress": False, **options})


def curves(result) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in result.history.items() if name != "seconds"}


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind of an error and what it says."""
    try:
        return "nothing", repr(call())
    except Exception as error:
        return type(error).__name__, str(error)


class Items(Dataset):
    """Rows of a tensor, which cannot be read from one on."""

    def __init__(self, rows: torch.Tensor, broken: int | None = None) -> None:
        self.rows, self.broken = rows, broken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.broken is not None and index >= self.broken:
            raise OSError("this item cannot be read")
        return self.rows[index]


class Endless(IterableDataset):
    """Rows of a tensor, in a stream that does not tell its length; it may end early."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.rows)


def at_call(number: int, act: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A transform that flips some bits, and in one of its calls, counted from 1, does something first or instead."""
    calls = 0

    def transform(x):
        nonlocal calls
        calls += torch.is_grad_enabled()  # not in the runs before and after
        changed = act(x) if torch.is_grad_enabled() and calls == number else None
        return flipped(x) if changed is None else changed

    return transform


@contextmanager
def signalled_at(call: int) -> Iterator[None]:
    """A block in which the process gets a SIGTERM as it looks for one, in one of its looks, counted from 1."""
    asks, calls = Stop.__call__, 0

    def counted(self):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return asks(self)

    Stop.__call__ = counted
    try:
        yield
    finally:
        Stop.__call__ = asks


# --- training -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "epochs": 4,
    "lr": 0.02,
    "clip_norm": 20.0,  # of norms from 10 to 100
    "kl_weight": lambda epoch: min(1.0, epoch / 3),
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False},  # 301 data: the last batch has one, which is fewer than there are processes
    "compiled": {"compile": True},
    "ragged": {"compile": False, "batch_size": 51},  # parts of 26 and 25
    # A batch of all data, of which only the parts are scaled.
    "one batch": {"compile": False, "batch_size": 400, "whole": 301, "kl_weight": 1.0},
    # Without a kl_weight, which is in float32, and so then is the plate's scale.
    "subsampled": {"compile": False, "batch_size": 51, "whole": 301, "kl_weight": 1.0},
}


def with_given_noise(rank: int, setting: str, **options: Any) -> tuple[torch.Tensor, dict[str, list[float]], bool]:
    """Weights and curves of one of the settings, and whether it was compiled."""
    chosen = {**SETTINGS[setting], **options}
    pair, (x, noise) = WithNoise(rank, chosen.pop("whole", None)), with_noise(301)
    result = fit(pair, (x, noise), validation=(x[:77], noise[:77]), **OPTIONS | chosen)
    return weights(pair), curves(result), result.compile_seconds > 0


def noise_and_order(rank: int) -> dict[str, Any]:
    """What each process draws, and which data it sees."""
    vae, seen, drawn, latents = small(rank), [], [], []

    def transform(x, index):
        if torch.is_grad_enabled():  # else it is a run before or after
            seen.append(index.clone())
            drawn.append(torch.rand(3))
        return x

    def guide(x):
        pyro.module("encoder", vae.encoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.encoder(x))
        if torch.is_grad_enabled():
            latents.append(z.detach())

    data = some_bits(101), torch.arange(101)
    options = {"epochs": 1, "batch_size": 20, "compile": False, "progress": False}
    pvae.fit(vae.model, guide, data, transform=transform, **options)
    return {"seen": torch.cat(seen), "drawn": torch.stack(drawn), "latents": torch.cat(latents)}


def batch_norm(rank: int) -> dict[str, torch.Tensor]:
    """The buffers of a batch normalization after training."""
    torch.manual_seed(rank)
    norm = nn.BatchNorm1d(6)
    norm.register_buffer("flag", torch.tensor([rank == 0]))
    norm.register_buffer("small", torch.tensor(rank, dtype=torch.int16))
    vae = pvae.VAE(
        pvae.priors.StandardNormal(2),
        pvae.likelihoods.Bernoulli(pvae.networks.mlp(2, [8], 6)),
        pvae.posteriors.DiagonalNormal(nn.Sequential(norm, pvae.networks.mlp(6, [8], 4))),
    )
    # One process's data are others than the other's.
    fit(vae, some_bits(300), transform=lambda x: x + rank if torch.is_grad_enabled() else x, epochs=1)
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


def units(rank: int) -> list[list[float]]:
    """Mean and scale in which networks see real data: of a tensor, and of a loader that deals them out."""
    x, found = 5 + 3 * torch.randn(101, 6, generator=torch.Generator().manual_seed(2)), []
    dealt = DataLoader(
        Items(x[:100]), batch_size=20, sampler=DistributedSampler(Items(x[:100]), 2, rank, shuffle=False)
    )
    for data in (x, dealt) if td.is_initialized() else (x,):
        torch.manual_seed(rank)
        vae = pvae.VAE.mlp(6, 2, [8], "gaussian")
        fit(vae, data, epochs=1, compile=False)
        found.append([value.item() for name, value in vae.named_buffers() if "units" in name])
    return found


def files(rank: int, folder: Path) -> dict[str, Any]:
    """What each process writes, where each has a folder and a callback."""
    calls: list[dict[str, float]] = []
    own = folder / f"checkpoints-{rank}"
    result = fit(small(rank), some_bits(101), checkpoint=own, callback=calls.append, epochs=3)
    td.barrier()
    return {"checkpoint": str(result.checkpoint), "calls": calls, "folder": own.exists()}


def late_parameter(rank: int, makes_it: bool = True) -> dict[str, torch.Tensor]:
    """A parameter that a guide only makes in a later step, with other initial values on each process."""
    vae, calls = small(rank), 0

    def guide(x):
        nonlocal calls
        calls += 1
        shift = pyro.param("shift", torch.full((2,), float(rank))) if makes_it and calls > 4 else 0.0
        pyro.module("encoder", vae.encoder)
        with pyro.plate("data", len(x)):
            base = vae.encoder(x).base_dist
            pyro.sample("z", dist.Normal(base.loc + shift, base.scale).to_event(1))

    options = {"epochs": 3, "batch_size": 20, "compile": False, "progress": False}
    result = pvae.fit(vae.model, guide, some_bits(100), **options)
    return {"shift": result.params["shift"], "weights": weights(vae)}


def streams(rank: int) -> dict[str, Any]:
    """Data that are read: the same as those in memory, where they tell their number and where they do not."""
    x, found = some_bits(101), {}
    for name, data in (
        ("tensor", x),
        ("dataset", Items(x)),
        ("untold", DataLoader(Endless(x), batch_size=50)),
        # The other process has ended when this one takes its last two steps.
        ("uneven", DataLoader(Endless(x if rank == 0 else x[:50]), batch_size=25)),
    ):
        vae = small(rank)
        curve = curves(fit(vae, data))
        found[name] = weights(vae), curve
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(small(), DataLoader(Items(x), batch_size=20, sampler=DistributedSampler(Items(x))))
    return found | {"padded": [str(warning.message) for warning in caught]}


def training(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: with_given_noise(rank, name) for name in SETTINGS}
    alone = {"eager": with_given_noise(rank, "eager", distributed=False)}
    # Without the others, each process may have its own data, and its own number of steps.
    alone["own"] = weights_after_own_data(rank)
    return found | {
        "alone": alone,
        "noise": noise_and_order(rank),
        "batch_norm": batch_norm(rank),
        "units": units(rank),
        "files": files(rank, folder),
        "late": late_parameter(rank),
        "streams": streams(rank),
    }


def weights_after_own_data(rank: int) -> torch.Tensor:
    vae = small()
    fit(vae, some_bits(60 + 40 * rank), distributed=False)
    return weights(vae)


def test_two_processes_train_as_one_does(tmp_path):
    (first, second), codes = launched("training", tmp_path)
    assert codes == [0, 0]
    for name in SETTINGS:
        (ours, history, compiled), (theirs, other_history, _) = first[name], second[name]
        assert torch.equal(ours, theirs), f"{name}: the processes have come apart"
        assert history == other_history, name
        assert compiled == (name == "compiled")
        reference, curve, _ = with_given_noise(0, name, compile=False)
        # Sums in another order, through 28 steps; seen: 2e-16.
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        assert history.keys() == curve.keys()
        assert history["validation_elbo"][0] < history["validation_elbo"][-1], "nothing was learned"
        for label, values in curve.items():
            assert history[label] == pytest.approx(values, rel=1e-12), (name, label)

    # distributed=False: as if there were no others, from each process's own weights.
    reference, *_ = with_given_noise(0, "eager")
    assert torch.equal(first["alone"]["eager"][0], reference)
    assert not torch.equal(first["alone"]["eager"][0], second["alone"]["eager"][0])
    assert torch.equal(second["alone"]["own"], weights_after_own_data(1))

    # Every datum once, by one of them; and no two draw the same noise.
    noises = first["noise"], second["noise"]
    assert Counter(torch.cat([found["seen"] for found in noises]).tolist()) == Counter(range(101))
    for kind in ("drawn", "latents"):
        draws = torch.cat([found[kind] for found in noises])
        assert len(draws.unique(dim=0)) == len(draws), f"{kind}: noise came twice"

    # Batch statistics are the first one's, of whatever dtype.
    buffers = first["batch_norm"], second["batch_norm"]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert buffers[0]["num_batches_tracked"] == 6
    assert buffers[0]["running_mean"].max() < 1
    assert bool(buffers[1]["flag"])

    # Real data are seen in the same units, those of the tensor as on one process alone.
    assert first["units"] == second["units"]
    assert first["units"][0] == units(0)[0] != [0.0, 1.0, 0.0, 1.0]

    # The first one writes, and calls.
    assert first["files"]["checkpoint"] == str(tmp_path / "checkpoints-0" / "epoch-000003")
    assert second["files"] == {"checkpoint": "None", "calls": [], "folder": False}
    assert [record["epoch"] for record in first["files"]["calls"]] == [1, 2, 3]
    lines = (tmp_path / "checkpoints-0" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == first["files"]["calls"]
    assert {"epoch-000002", "epoch-000003"} <= {path.name for path in (tmp_path / "checkpoints-0").iterdir()}

    # A parameter that came later.
    assert all(torch.equal(first["late"][name], second["late"][name]) for name in first["late"])
    assert (first["late"]["shift"] != 0).all(), "it was not trained"
    assert first["late"]["shift"].abs().max() < 0.1, "it did not begin as on the first"

    # Data that are read.
    for name in ("tensor", "dataset", "untold", "uneven"):
        assert torch.equal(first["streams"][name][0], second["streams"][name][0]), name
        assert first["streams"][name][1] == second["streams"][name][1], name
    assert torch.equal(first["streams"]["dataset"][0], first["streams"]["tensor"][0])
    assert any("DistributedSampler" in said and "101 data to 102" in said for said in first["streams"]["padded"])


# --- log p(x) -------------------------------------------------------------------------------------------------------


def evidence(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exact = pvae.testing.linear_gaussian()
    shifted = pvae.testing.linear_gaussian(guide_shift=0.7, guide_scale=1.3)
    for count in (7, 1):
        x = exact.sample(count)
        loader = DataLoader(Items(x), batch_size=2)
        for name, data in (("tensor", x), ("dataset", Items(x)), ("loader", loader)):
            estimate = pvae.log_evidence(exact.model, exact.guide, data, num_samples=30)
            log_weights = pvae.log_weights(exact.model, exact.guide, data, num_samples=30)
            found[f"{name} {count}"] = estimate.log_px, log_weights
            options = {"num_samples": 2000, "proposal": "guide", "chunk_size": 3000}
            estimate = pvae.log_evidence(shifted.model, shifted.guide, data, **options)
            log_weights = pvae.log_weights(shifted.model, shifted.guide, data, **options)
            found[f"shifted {name} {count}"] = estimate.log_px, estimate.std_error, estimate.khat, log_weights
    x = exact.sample(7)
    for proposal in ("prior", "refined"):
        estimate = pvae.log_evidence(exact.model, exact.guide, x, num_samples=1000, proposal=proposal)
        found[proposal] = estimate.log_px, estimate.std_error
    target = pvae.log_evidence(shifted.model, shifted.guide, x, num_samples=100, target_std_error=0.02)
    found["target"] = target.log_px, target.std_error
    alone = pvae.log_evidence(exact.model, exact.guide, x[: rank + 1], num_samples=30, distributed=False)
    found["alone"] = alone.log_px
    padded = DataLoader(Items(x), batch_size=2, sampler=DistributedSampler(Items(x)))
    found["padded"] = raised(lambda: pvae.log_evidence(exact.model, exact.guide, padded, num_samples=30))
    # Equal data: equal noise on two processes would show.
    equal = exact.sample(1).expand(8, -1)
    found["equal"] = (pvae.log_weights(shifted.model, shifted.guide, equal, num_samples=30),)
    # A trained pair: all processes have the same one.
    vae = small(rank)
    fit(vae, some_bits(100))
    found["trained"] = pvae.log_evidence(vae.model, vae.guide, some_bits(9), num_samples=100).log_px
    return found


def test_two_processes_evaluate_every_datum_once(tmp_path):
    (first, second), codes = launched("evidence", tmp_path)
    assert codes == [0, 0]
    exact = pvae.testing.linear_gaussian()
    for name in first:
        if name not in ("padded", "alone"):
            pairs = zip(first[name], second[name], strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs), f"{name}: not the same bits"
    for count in (7, 1):
        truth = exact.log_px(exact.sample(count))
        for name in ("tensor", "dataset", "loader"):
            log_px, log_weights = first[f"{name} {count}"]
            torch.testing.assert_close(log_px, truth)
            torch.testing.assert_close(log_weights, truth.expand(30, count))
            log_px, std_error, khat, log_weights = first[f"shifted {name} {count}"]
            assert log_weights.shape == (2000, count)
            assert (std_error > 0).all()
            assert (khat < 0.7).all()
            assert ((log_px - truth).abs() < 5 * std_error).all()
            torch.testing.assert_close(log_px, log_weights.logsumexp(0) - torch.tensor(2000.0).log().double())
    assert len(first["equal"][0].unique()) == 30 * 8, "noise came twice"
    truth = exact.log_px(exact.sample(7))
    for name in ("prior", "refined", "target"):
        log_px, std_error = first[name]
        assert ((log_px - truth).abs() < 5 * std_error + 1e-6).all(), name
    assert (first["target"][1] < 0.03).all()
    torch.testing.assert_close(first["alone"], truth[:1])
    torch.testing.assert_close(second["alone"], truth[:2])
    for kind, said in (first["padded"], second["padded"]):
        assert kind == "DataError"
        assert "would count twice" in said


# --- checkpoints and signals ----------------------------------------------------------------------------------------


def interrupted(rank: int, folder: Path, compile: bool = False) -> dict[str, Any]:
    """A run in one go; and one that a signal to the second process stops, and that is gone on with."""
    options = {"epochs": 4, "batch_size": 21, "validation": some_bits(33), "transform": flipped, "compile": compile}
    x, whole, stopped, resumed = some_bits(101), small(rank), small(rank), small(50 + rank)
    expected = fit(whole, x, **options)
    # Each asks once before an epoch, before each of its five steps, and once after them.
    with signalled_at(7 + 1 + 3 if rank == 1 else 0):
        until = fit(stopped, x, checkpoint=folder / "run", **options)
    refused = raised(lambda: fit(small(), x, checkpoint=folder / "run", **options))
    if rank == 0:
        shutil.copytree(folder / "run", folder / "copy")
    td.barrier()
    then = fit(resumed, x, checkpoint=folder / "run", resume="auto", **options)
    found = {
        "stopped": (until.stopped, until.signal, len(until.history["seconds"]), str(until.checkpoint)),
        "halfway": weights(stopped),
        "refused": refused,
        "same": (torch.equal(weights(whole), weights(resumed)), curves(expected) == curves(then), then.stopped),
        "weights": weights(resumed),
    }
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            last = fit(small(80), x, checkpoint=folder / "copy", resume="auto", distributed=False, **options)
        found["alone"] = last.stopped, curves(last), [str(warning.message) for warning in caught]
    return found


def interrupted_compiled(rank: int, folder: Path) -> dict[str, Any]:
    """The same, where the parts of a batch have other shapes, and so other programs, on each process."""
    return interrupted(rank, folder, compile=True)


@pytest.mark.parametrize("case", ["interrupted", pytest.param("interrupted_compiled", marks=pytest.mark.slow)])
def test_a_signal_to_one_stops_both_and_they_go_on_bit_for_bit(case, tmp_path):
    (first, second), codes = launched(case, tmp_path)
    assert codes == [0, 0]
    # In the middle of the second epoch, at the same step.
    assert first["stopped"][0] == second["stopped"][0] == "signal"
    assert second["stopped"][1] == signal.SIGTERM
    assert first["stopped"][2] == second["stopped"][2] == 1
    assert first["stopped"][3] == str(tmp_path / "run" / "epoch-000001-step-0000003")
    assert torch.equal(first["halfway"], second["halfway"])
    assert not torch.equal(first["halfway"], first["weights"])
    for (kind, said), expected in ((first["refused"], "CheckpointError"), (second["refused"], "RankError")):
        assert kind == expected
        assert "resume='auto'" in said
    for found in (first, second):
        assert found["same"] == (True, True, "epochs")
    assert torch.equal(first["weights"], second["weights"])

    # One process can go on with what two began, and says that it is not the same.
    why, curve, said = first["alone"]
    assert (why, len(curve["elbo"])) == ("epochs", 4)
    assert any("ranks was 2 and is 1" in text for text in said)
    # The second epoch's average is of both: what two processes had seen of it, and the rest.
    assert curve["elbo"][0] < curve["elbo"][1] < curve["elbo"][3] < -2


# --- errors ---------------------------------------------------------------------------------------------------------


def errors(rank: int, folder: Path) -> dict[str, Any]:
    """One thing after another goes wrong, on one process or on both; each time the next calls meet again."""
    x, nan, other, vae = some_bits(101), torch.full((), torch.nan), rank == 1, small()

    def fail(_):
        raise LookupError("no more of this")

    def objective(model, guide, *batch):
        if other:
            fail(batch)
        return pyro.infer.Trace_ELBO().differentiable_loss(model, guide, *batch)

    def goes_away(_):
        shutil.rmtree(folder / "disk")
        (folder / "disk").write_text("no folder")

    def train(data=x, **options):
        return fit(small(), data, **{"batch_size": 20, "compile": False, **options})

    def evaluate(data=x, model=vae, **options):
        return pvae.log_evidence(model.model, model.guide, data, **{"num_samples": 30, **options})

    (folder / f"file-{rank}").write_text("no folder")
    third = 3 if other else 0
    cases: dict[str, Callable[[], Any]] = {
        "lr": lambda: train(lr=0.1 * (rank + 1)),
        "data": lambda: train(x[: 100 + rank]),
        "architecture": lambda: fit(small(hidden=8 + rank), x),
        "late parameter": lambda: late_parameter(rank, makes_it=other),
        "nan data": lambda: train(x * nan if other else x),
        "nan": lambda: train(transform=at_call(third, lambda x: x * nan)),
        "transform": lambda: train(transform=at_call(third, fail)),
        "objective": lambda: train(objective=objective),
        "captured": lambda: train(objective=objective, compile=True),
        "item": lambda: train(Items(x, 40 if other else None)),
        "validation item": lambda: train(validation=Items(x, 20 if other else None)),
        "callback": lambda: train(callback=fail),
        "folder": lambda: train(checkpoint=folder / f"file-{rank}"),
        "disk": lambda: train(checkpoint=folder / "disk", callback=goes_away),
        "evidence": lambda: evaluate(x * nan if other else x),
        "num_samples": lambda: evaluate(num_samples=30 + rank),
        "other data": lambda: evaluate(x[: 50 + rank]),
        "other weights": lambda: evaluate(model=small(rank)),
        "another call": train if other else evaluate,
        "call in a callback": lambda: train(callback=lambda _: evaluate()),
    }
    found: dict[str, Any] = {name: raised(case) for name, case in cases.items()}
    last = small(rank)
    result = fit(last, x, callback=lambda _: evaluate(distributed=False))
    return found | {"after all": (curves(result), weights(last)), "hanging": hanging(rank, folder)}


def hanging(rank: int, folder: Path) -> tuple[tuple[str, str], float]:
    """One process hangs in a step, longer than their group waits."""
    td.barrier()
    td.destroy_process_group()
    td.init_process_group(
        "gloo",
        init_method=f"file://{folder}/another",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=3),
    )
    transform = at_call(3, lambda _: time.sleep(6.0) if rank == 1 else None)
    began = time.monotonic()
    found = raised(lambda: fit(small(), some_bits(101), transform=transform, compile=False, batch_size=20))
    return found, time.monotonic() - began


def test_an_error_on_one_ends_all_and_they_meet_again(tmp_path):
    (first, second), codes = launched("errors", tmp_path)
    assert codes == [0, 0]
    alike = ("RankError", "all ranks must be called alike")
    apart = ("RankError", "the ranks are not at the same place")
    # What the first one raises, and the second.
    expected = {
        "lr": (alike, alike),
        "data": (alike, alike),
        "architecture": (alike, alike),
        "late parameter": (alike, alike),
        "nan data": (("RankError", "rank 1 stopped, and with it all others: DataError"), ("DataError", "nan")),
        "nan": (
            ("NumericalError", "epoch 1, step 3, before its update: .* on another rank"),
            ("NumericalError", "step 3"),
        ),
        "transform": (("RankError", "rank 1 stopped.*LookupError: no more"), ("LookupError", "no more")),
        "objective": (("RankError", "rank 1 stopped.*LookupError: no more"), ("LookupError", "no more")),
        "captured": (("RankError", "rank 1 stopped.*LookupError: no more"), ("LookupError", "no more")),
        "item": (("RankError", "rank 1 stopped.*this item"), ("OSError", "this item")),
        "validation item": (("RankError", "rank 1 stopped.*this item"), ("OSError", "this item")),
        "callback": (("LookupError", "no more"), ("RankError", "rank 0 stopped.*LookupError: no more")),
        "folder": (("CheckpointError", "file-0"), ("RankError", "rank 0 stopped.*CheckpointError.*file-0")),
        "disk": (("CheckpointError", "cannot be used"), ("RankError", "rank 0 stopped.*CheckpointError")),
        "evidence": (("RankError", "rank 1 stopped.*DataError"), ("DataError", "nan")),
        "num_samples": (alike, alike),
        "other data": (alike, alike),
        "other weights": (alike, alike),
        "another call": (apart, apart),
        "call in a callback": (apart, apart),
    }
    for name, patterns in expected.items():
        for found, (kind, pattern) in zip((first[name], second[name]), patterns, strict=True):
            assert found[0] == kind, (name, found)
            assert re.search(pattern, found[1]), (name, found)
    assert first["after all"][0] == second["after all"][0]
    assert torch.equal(first["after all"][1], second["after all"][1])
    for (kind, said), _ in (first["hanging"], second["hanging"]):
        assert kind == "RankError"
        assert "lost contact" in said
    assert 3.0 < first["hanging"][1] < 6.0  # it does not wait for the other


def killed(rank: int, folder: Path) -> None:
    """One process dies in a step, and leaves no word."""

    def die(_):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    vae, began = small(), time.monotonic()
    options = {"transform": at_call(7, die), "checkpoint": folder / "run", "compile": False, "batch_size": 20}
    try:
        fit(vae, some_bits(101), **options)
    except Exception as error:
        found = type(error).__name__, str(error), time.monotonic() - began
        torch.save(found, folder / f"returned-{rank}")
        raise


def test_a_dead_process_ends_the_other_and_torchrun_says_so(tmp_path):
    (first, second), codes = launched("killed", tmp_path, torchrun=True)
    kind, said, seconds = first
    assert (kind, second) == ("RankError", None)
    assert "rank 0 of 2 lost contact" in said
    assert seconds < PATIENCE / 2
    assert codes[0] != 0
    assert (tmp_path / "run" / "epoch-000001" / "manifest.json").exists()  # what there is to go on from


def preempted(rank: int, folder: Path) -> tuple[str, int | None, str]:
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    result = fit(small(), some_bits(101), epochs=100_000, checkpoint=folder / "run", compile=False, batch_size=20)
    return result.stopped, result.signal, str(result.checkpoint)


def test_torchrun_passes_a_signal_on_and_waits_for_the_checkpoint(tmp_path):
    def preempt(torchrun):
        history, end = tmp_path / "run" / "history.jsonl", time.monotonic() + PATIENCE / 2
        while not (history.exists() and history.read_text().count("\n") > 1) and torchrun.poll() is None:
            assert time.monotonic() < end, (tmp_path / "output").read_text()
            time.sleep(0.1)
        # As some schedulers do, which signal every process of a job.
        for pid in tmp_path.glob("pid-*"):
            os.kill(int(pid.read_text()), signal.SIGTERM)
        torchrun.terminate()

    (first, second), codes = launched("preempted", tmp_path, torchrun=True, meanwhile=preempt)
    assert codes[0] != 0
    assert first[:2] == second[:2] == ("signal", signal.SIGTERM)
    assert (Path(first[2]) / "manifest.json").exists()


# --- without others -------------------------------------------------------------------------------------------------


def test_a_group_has_to_be_there_where_it_is_asked_for(bits, small_vae):
    with pytest.raises(ArgumentError, match=r"torchrun.*init_process_group"):
        fit(small_vae, bits, distributed=True)
    with pytest.raises(ArgumentError, match=r"torchrun.*init_process_group"):
        pvae.log_evidence(small_vae.model, small_vae.guide, bits, distributed=True)
    with pytest.raises(ArgumentError, match="distributed must be True, False or 'auto'"):
        fit(small_vae, bits, distributed="yes")
    assert resolve_processes("auto") is resolve_processes(False) is ALONE


def test_a_group_of_one_is_one_process(bits, tmp_path):
    expected, vae = small(), small()
    fit(expected, bits)
    td.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert resolve_processes(True) == ALONE
        fit(vae, bits, distributed=True)
        pvae.log_evidence(vae.model, vae.guide, bits, num_samples=30, distributed=True)
    finally:
        td.destroy_process_group()
    assert torch.equal(weights(vae), weights(expected))


@pytest.mark.parametrize("rows", [0, 1, 5, 8, 23])
def test_rows_are_dealt_out_once_in_order_and_evenly(rows):
    parts = [Processes(number, 4).shard(torch.arange(rows)) for number in range(4)]
    assert torch.equal(torch.cat(parts), torch.arange(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_seeds_of_ranks_differ_and_fit_torch():
    seeds = [Processes(number, 1000).rank_seed(seed) for number in range(1000) for seed in (0, 1, 2**63 - 1)]
    assert len(set(seeds)) == 3000
    assert seeds[:3] == [0, 1, 2**63 - 1]  # the first one's is the caller's
    assert all(0 <= seed < 2**63 for seed in seeds)


CASES: dict[str, Callable[[int, Path], Any]] = {
    case.__name__: case for case in (training, evidence, interrupted, interrupted_compiled, errors, killed, preempted)
}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
