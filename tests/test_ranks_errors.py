"""Where one process fails all end, soon and with an error."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
import torch.distributed as td
from helpers import Items
from ranks import (
    PATIENCE,
    at_call,
    curves,
    error_of,
    fit,
    late_parameter,
    launch,
    launch_torchrun,
    small,
    some_bits,
    weights,
)

import pvae


class Torn(Items):
    """Rows of which those from one on cannot be read."""

    def __init__(self, rows: torch.Tensor, first: int) -> None:
        super().__init__(rows)
        self.first = first

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self.first:
            raise OSError("this item cannot be read")
        return super().__getitem__(index)


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
        "item": lambda: train(Torn(x, 40 if other else len(x))),
        "validation item": lambda: train(validation=Torn(x, 20 if other else len(x))),
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
    found: dict[str, Any] = {name: error_of(case) for name, case in cases.items()}
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
    found = error_of(lambda: fit(small(), some_bits(101), transform=transform, compile=False, batch_size=20))
    return found, time.monotonic() - began


@pytest.mark.slow
def test_an_error_on_one_ends_all_and_they_meet_again(tmp_path):
    first, second = launch(errors, tmp_path)
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


@pytest.mark.slow
def test_a_dead_process_ends_the_other_and_torchrun_says_so(tmp_path):
    (first, second), code = launch_torchrun(killed, tmp_path)
    kind, said, seconds = first
    assert (kind, second) == ("RankError", None)
    assert "rank 0 of 2 lost contact" in said
    assert seconds < PATIENCE / 2
    assert code != 0
    assert (tmp_path / "run" / "epoch-000001" / "manifest.json").exists()  # what there is to go on from
