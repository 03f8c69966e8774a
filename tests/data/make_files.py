"""Writes files as a version of pvae writes them, for the tests of versions after it, and numbers to compare with.

Run it with that version of pvae installed, or first on PYTHONPATH:

    python tests/data/make_files.py tests/data/version_0_1

The folder gets saved VAEs (``vae-NAME``), checkpoints of runs that a signal stopped (``run-NAME``), and
``numbers.json``: log-densities, and where the same runs came to that nothing stopped. Data and inputs are arithmetic on
integers, so that they have the same bits everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

import pvae

SAVED: dict[str, Callable[[], pvae.VAE]] = {
    "bernoulli": lambda: pvae.VAE.mlp(6, 2, [8]),
    "gaussian": lambda: pvae.VAE.mlp((2, 3), 3, [8], "gaussian", activation=nn.Softplus),
    "conv": lambda: pvae.VAE.conv((1, 4, 4), 2, channels=(2, 3), hidden=8),
}


class Bare:
    """Parameters made by ``pyro.param``, one of them constrained."""

    def model(self, x: Tensor) -> None:
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(-1, 6), noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.0)) * x.sum(-1), 1.0))


class Decay(torch.optim.lr_scheduler.ExponentialLR):
    """A scheduler whose state is the same in all versions of torch."""

    def state_dict(self) -> dict[str, Any]:
        names = ("gamma", "base_lrs", "last_epoch", "_step_count", "_last_lr")
        return {name: getattr(self, name) for name in names}


def inputs(num_data: int, *event: int) -> Tensor:
    """Numbers in [0, 1] that look like none in particular, of shape ``(num_data, *event)``."""
    count = torch.Size((num_data, *event)).numel()
    return ((torch.arange(count) * 7919 + 31) % 1009 % 17).reshape(num_data, *event) / 16


def bits(num_data: int) -> Tensor:
    """Data of 6 bits that mostly agree."""
    return (inputs(num_data, 6) < 0.8).float() * (inputs(num_data, 1) < 0.5)


def heights(num_data: int) -> Tensor:
    """Data that are far from a mean of 0 and a standard deviation of 1, of shape ``(num_data, 2, 3)``."""
    return 170 + 20 * inputs(num_data, 1, 1) + 5 * inputs(num_data, 2, 3)


# Each pair, its data, and how it is trained.
RUNS: dict[str, tuple[Callable[[], Any], Tensor, dict[str, Any]]] = {
    "bernoulli": (
        SAVED["bernoulli"],
        0.75 * bits(80) + 0.125,
        {
            "transform": pvae.datasets.fresh_bits,
            "validation": bits(30),
            "patience": 3,
            "scheduler": lambda optimizer: Decay(optimizer, 0.75),
            "kl_weight": lambda epoch: min(1.0, epoch / 2),
            "clip_norm": 20.0,
            "epochs": 8,
        },
    ),
    "gaussian": (SAVED["gaussian"], heights(80), {"validation": heights(30), "compile": True, "epochs": 4}),
    "bare": (Bare, heights(80).reshape(80, 6) / 40 - 4.5, {"epochs": 4}),
}


def train(name: str, pair: Any, **options: Any) -> pvae.FitResult:
    """Trains the pair of a run."""
    _, data, settings = RUNS[name]
    common = {"batch_size": 32, "lr": 0.01, "seed": 3, "device": "cpu", "progress": False}
    return pvae.fit(pair.model, pair.guide, data, **common, **settings, **options)


def densities(vae: pvae.VAE) -> dict[str, list[float]]:
    """log p(z), log p(x|z) and log q(z|x) at three inputs."""
    x = heights(3) if vae.event_shape == (2, 3) else inputs(3, *vae.event_shape).round()
    z = inputs(3, vae.latent_dim)
    with torch.no_grad():
        values = vae.prior().log_prob(z), vae.decode(z).log_prob(x), vae.encode(x).log_prob(z)
    return {name: v.tolist() for name, v in zip(("prior", "decoder", "encoder"), values, strict=True)}


def outcome(pair: Any, result: pvae.FitResult) -> dict[str, Any]:
    """Where a run came to."""
    history = {name: values.tolist() for name, values in result.history.items() if name != "seconds"}
    memories = torch.load(result.checkpoint / "training.pt", weights_only=True)["memory"][0]
    return {
        "stopped": result.stopped,
        "history": history,
        "params": {name: value.tolist() for name, value in result.params.items()},
        "densities": densities(pair) if isinstance(pair, pvae.VAE) else {},
        # How often each graph ran, which decides what is compiled, and so the last bits.
        "graph_runs": [{key: runs for key, (_, runs) in m["runs"].items()} for m in memories if m is not None],
    }


def stop(*_: Any) -> None:
    """Asks this process to stop."""
    os.kill(os.getpid(), signal.SIGTERM)


def write(folder: Path) -> None:
    """Writes all files into a folder, which must not exist."""
    folder.mkdir()
    numbers: dict[str, Any] = {"vaes": {}, "runs": {}, "checkpoints": {}, "torch": torch.__version__}
    for name, make in SAVED.items():
        torch.manual_seed(1)
        vae = make()
        if name == "gaussian":
            vae.find_units(heights(80))
        vae.save(folder / f"vae-{name}")
        numbers["vaes"][name] = densities(vae)
    for name, (make, _, _) in RUNS.items():
        torch.manual_seed(2)
        whole = make()
        with tempfile.TemporaryDirectory() as elsewhere:
            numbers["runs"][name] = outcome(whole, train(name, whole, checkpoint=elsewhere))
        torch.manual_seed(2)
        pair, path = make(), folder / f"run-{name}"
        options: dict[str, Any] = {"checkpoint": path}
        if name == "bernoulli":  # within the third epoch
            pair.encoder.register_forward_hook(_Once(12))
        else:
            options["callback"] = lambda record: record["epoch"] == 2 and stop()
        result = train(name, pair, **options)
        numbers["checkpoints"][name] = outcome(pair, result) | {"name": result.checkpoint.name}
        for old in path.glob("epoch-*"):  # the last is enough, and the best of one run
            if old != result.checkpoint and name != "bernoulli":
                shutil.rmtree(old)
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


class _Once:
    """A hook that asks this process to stop when it has run so often."""

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def __call__(self, *_: Any) -> None:
        self.runs -= 1
        if not self.runs:
            stop()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
