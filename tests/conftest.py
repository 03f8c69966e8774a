"""Fixtures of several test files: seeds, small data and pairs, signals, and a look at the caller's state."""

from __future__ import annotations

import os
import signal

import pyro
import pytest
import torch
from pairs import ModulePair
from pyro import distributions as dist

import pvae
from pvae.capture.captured import Captured
from pvae.svi import step as engine

torch.set_num_threads(1)  # the tensors are small, and the workers share the cores


def pytest_collection_modifyitems(items):
    """Tests that need a CUDA device are left out where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hides the GPU from tests that are not marked ``cuda``, from their fixtures, and from processes that they start.

    They compare with tensors on the CPU, and `device="auto"` would be the GPU. No fixture, as fixtures of a module come
    before it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("cuda"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setattr(torch.accelerator, "is_available", lambda: False)  # asked by optimizers
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.fixture(autouse=True)
def _fresh_state():
    """Every test starts from the same random numbers and an empty param store."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def bits() -> torch.Tensor:
    """300 data of 6 bits with a strong common cause, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    cause = torch.randint(2, (300, 1), generator=generator)
    flips = torch.rand(300, 6, generator=generator) < 0.1
    return (cause.bool() ^ flips).float()


@pytest.fixture
def numbers() -> torch.Tensor:
    """20 data of one number, which is their place."""
    return torch.arange(20.0)[:, None]


@pytest.fixture
def small_vae() -> pvae.VAE:
    return pvae.VAE.mlp(6, latent_dim=2, hidden=[8])


@pytest.fixture
def module_pair() -> ModulePair:
    return ModulePair()


@pytest.fixture
def figures_closed():
    """Closes what a test opened in matplotlib, whose global style it may not change."""
    import matplotlib
    from matplotlib import pyplot

    style = matplotlib.rcParams.copy()
    yield
    pyplot.close("all")
    assert matplotlib.rcParams == style, "the global style is the caller's"


@pytest.fixture
def never_compiled(monkeypatch):
    """A function that makes a module of pvae capture and never compile: the graphs are the same, and take less time.

    It returns a list, to which all captured functions that are made are added.
    """

    def of(module):
        made = []

        def captured(*args, **options):
            made.append(Captured(*args, **{**options, "compile_after": None}))
            return made[-1]

        monkeypatch.setattr(module, "Captured", captured)
        return made

    return of


@pytest.fixture
def interrupt(monkeypatch):
    """A function that makes the process get a signal during the step of some number."""

    def at(step, number=signal.SIGTERM, times=1):
        taken, original = [], engine.Step.__call__

        def call(self, *args):
            taken.append(1)
            if len(taken) == step:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return original(self, *args)

        monkeypatch.setattr(engine.Step, "__call__", call)

    return at


class CallerState:
    """What a call must leave as it found it."""

    def __init__(self) -> None:
        self.rng = torch.get_rng_state()
        self.store = {name: value.clone() for name, value in pyro.get_param_store().items()}
        self.grad = torch.is_grad_enabled()
        self.validation = (dist.is_validation_enabled(), pyro.infer.util.is_validation_enabled())

    def assert_unchanged(self) -> None:
        now = CallerState()
        assert torch.equal(now.rng, self.rng), "global random numbers moved"
        assert now.store.keys() == self.store.keys(), "param store has other names"
        assert all(torch.equal(now.store[name], self.store[name]) for name in self.store), "param store moved"
        assert (now.grad, now.validation) == (self.grad, self.validation), "modes changed"


@pytest.fixture
def caller_state():
    """A function that records the caller's state."""
    return CallerState
