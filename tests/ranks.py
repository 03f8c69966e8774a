"""Two processes under torch.distributed, started from a test; and what they train.

The file is also the program that torchrun runs: ``python ranks.py <module>:<function> <folder>`` calls a function of a
test file with the number of the process and a folder. It returns plain values, which the test looks at.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import pyro
import pytest
import torch
import torch.distributed as td
from pyro import distributions as dist
from torch import nn

import pvae
from pvae.runtime.signals import Stop

PATIENCE = 100  # seconds; a launch that takes longer hangs
LIMIT = 60.0  # seconds after which a process gives another one up


def launch(case: Callable[[int, Path], Any], folder: Path) -> list[Any]:
    """Runs a case on two processes, which end well; returns what each returned.

    Args:
        case: A function at the top of a test file, called with the number of the process and the folder.
        folder: For what they write.
    """
    started = [helpers.fork(main, name_of(case), folder, rank, output=folder / "output") for rank in range(2)]
    end = time.monotonic() + PATIENCE
    for process in started:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
        process.join()
    if codes != [0, 0]:  # None of one that hangs
        pytest.fail(f"{name_of(case)} ended with {codes}: {(folder / 'output.errors').read_text()[-3000:]}")
    return results_in(folder)


def launch_torchrun(
    case: Callable[[int, Path], Any], folder: Path, meanwhile: Callable[[Any], None] | None = None
) -> tuple[list[Any], int]:
    """Runs a case on two processes of torchrun; returns what each returned (`None` if nothing) and its exit code.

    Args:
        case: A function at the top of a test file, called with the number of the process and the folder.
        folder: For what they write.
        meanwhile: Called with torchrun's process.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "w+") as output:
        process = subprocess.Popen(
            [*command, name_of(case), str(folder)], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            if meanwhile is not None:
                meanwhile(process)
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{name_of(case)} hangs: {(folder / 'output').read_text()[-3000:]}")
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return results_in(folder), code


def name_of(case: Callable[[int, Path], Any]) -> str:
    return f"{case.__module__}:{case.__name__}"


def results_in(folder: Path) -> list[Any]:
    found = [folder / f"returned-{rank}" for rank in range(2)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in found]


def main(name: str, folder: Path, rank: int) -> None:
    """What each of the processes does."""
    module, _, function = name.partition(":")
    case = getattr(importlib.import_module(module), function)
    signal.alarm(2 * PATIENCE)  # whatever happens, none is left behind
    torch.set_num_threads(1)
    method = {} if "MASTER_PORT" in os.environ else {"init_method": f"file://{folder}/store"}
    td.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT), **method)
    try:
        torch.save(case(rank, folder), folder / f"returned-{rank}")
    finally:
        td.destroy_process_group()


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


def flip_some(x: torch.Tensor) -> torch.Tensor:
    """Another few bits flipped each time."""
    return torch.where(torch.rand_like(x) < 0.05, 1 - x, x)


def small(rank: int = 0, hidden: int = 8) -> pvae.VAE:
    torch.manual_seed(100 + rank)
    return pvae.VAE.mlp(6, latent_dim=2, hidden=[hidden])


def weights(module: nn.Module) -> torch.Tensor:
    """All parameters of a module in one row, a plain value."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


fit = partial(helpers.fit, batch_size=50)


def curves(result) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in result.history.items() if name != "seconds"}


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind of an error and what it says."""
    try:
        return "nothing", repr(call())
    except Exception as error:
        return type(error).__name__, str(error)


def at_call(number: int, act: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A transform that flips some bits, and in one of its calls, counted from 1, does something first or instead."""
    calls = 0

    def transform(x):
        nonlocal calls
        calls += torch.is_grad_enabled()  # not in the runs before and after
        changed = act(x) if torch.is_grad_enabled() and calls == number else None
        return flip_some(x) if changed is None else changed

    return transform


@contextmanager
def signal_at(call: int) -> Iterator[None]:
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


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"]))
