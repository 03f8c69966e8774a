"""Two processes under torch.distributed train as one does, and each writes what it should."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
import torch.distributed as td
from helpers import Items, Iterated
from pairs import compose_vae
from ranks import WithNoise, curves, fit, late_parameter, launch, small, some_bits, weights, with_noise
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import pvae

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
    "importance weighted": {
        "compile": False,
        "batch_size": 51,
        "whole": 301,
        "kl_weight": 1.0,
        "objective": pvae.objectives.DReG(2, vectorize_particles=False),
    },
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
    vae = compose_vae(pvae.networks.mlp(2, [8], 6), nn.Sequential(norm, pvae.networks.mlp(6, [8], 4)))
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


def streams(rank: int) -> dict[str, Any]:
    """Data that are read: the same as those in memory, where they tell their number and where they do not."""
    x, found = some_bits(101), {}
    for name, data in (
        ("tensor", x),
        ("dataset", Items(x)),
        ("untold", DataLoader(Iterated(x), batch_size=50)),
        # The other process has ended when this one takes its last two steps.
        ("uneven", DataLoader(Iterated(x if rank == 0 else x[:50]), batch_size=25)),
    ):
        vae = small(rank)
        curve = curves(fit(vae, data))
        found[name] = weights(vae), curve
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(small(), DataLoader(Items(x), batch_size=20, sampler=DistributedSampler(Items(x))))
    return found | {"padded": [str(warning.message) for warning in caught]}


def training(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: with_given_noise(rank, name) for name in SETTINGS if name != "compiled"}
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


def assert_as_one_process(first: dict[str, Any], second: dict[str, Any], setting: str) -> None:
    """Both have the same weights and curves, and those of one process."""
    (ours, history, compiled), (theirs, other_history, _) = first[setting], second[setting]
    assert torch.equal(ours, theirs), f"{setting}: the processes have come apart"
    assert history == other_history, setting
    assert compiled == (setting == "compiled")
    reference, curve, _ = with_given_noise(0, setting, compile=False)
    # Sums in another order, through 28 steps; seen: 2e-16.
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert history.keys() == curve.keys()
    assert history["validation_elbo"][0] < history["validation_elbo"][-1], "nothing was learned"
    for label, values in curve.items():
        assert history[label] == pytest.approx(values, rel=1e-12), (setting, label)


def training_compiled(rank: int, folder: Path) -> dict[str, Any]:
    return {"compiled": with_given_noise(rank, "compiled")}


@pytest.mark.slow
def test_two_processes_train_compiled_as_one_does(tmp_path):
    assert_as_one_process(*launch(training_compiled, tmp_path), "compiled")


def test_two_processes_train_as_one_does(tmp_path):
    first, second = launch(training, tmp_path)
    for name in SETTINGS.keys() - {"compiled"}:
        assert_as_one_process(first, second, name)

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
