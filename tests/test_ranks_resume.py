"""A signal to one process stops all, and they go on bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from ranks import (
    PATIENCE,
    curves,
    error_of,
    fit,
    flip_some,
    launch,
    launch_torchrun,
    signal_at,
    small,
    some_bits,
    weights,
)


def interrupted(rank: int, folder: Path, compile: bool = False) -> dict[str, Any]:
    """A run in one go; and one that a signal to the second process stops, and that is gone on with."""
    options = {"epochs": 4, "batch_size": 21, "validation": some_bits(33), "transform": flip_some, "compile": compile}
    x, whole, stopped, resumed = some_bits(101), small(rank), small(rank), small(50 + rank)
    expected = fit(whole, x, **options)
    # Each asks once before an epoch, before each of its five steps, and once after them.
    with signal_at(7 + 1 + 3 if rank == 1 else 0):
        until = fit(stopped, x, checkpoint=folder / "run", **options)
    refused = error_of(lambda: fit(small(), x, checkpoint=folder / "run", **options))
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


@pytest.mark.parametrize("case", [interrupted, pytest.param(interrupted_compiled, marks=pytest.mark.slow)])
def test_a_signal_to_one_stops_both_and_they_go_on_bit_for_bit(case, tmp_path):
    first, second = launch(case, tmp_path)
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


# --- errors -----------------------------------------------------------------------------------------------------------


def preempted(rank: int, folder: Path) -> tuple[str, int | None, str]:
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    result = fit(small(), some_bits(101), epochs=100_000, checkpoint=folder / "run", compile=False, batch_size=20)
    return result.stopped, result.signal, str(result.checkpoint)


@pytest.mark.slow
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

    (first, second), code = launch_torchrun(preempted, tmp_path, preempt)
    assert code != 0
    assert first[:2] == second[:2] == ("signal", signal.SIGTERM)
    assert (Path(first[2]) / "manifest.json").exists()
