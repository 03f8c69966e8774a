"""What several test files need: seeds, small pairs, and a look at the caller's state."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

import pvae
from pvae.capture.captured import Captured

torch.set_num_threads(1)  # the tensors are small, and the workers share the cores


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
def small_vae() -> pvae.VAE:
    return pvae.VAE.mlp(6, latent_dim=2, hidden=[8])


class ModulePair(nn.Module):
    """A VAE as people write it by hand: ``pyro.module`` and a reshape to a flat image."""

    def __init__(self, event: int = 6, latent: int = 2) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(event, 8), nn.Softplus(), nn.Linear(8, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 8), nn.Softplus(), nn.Linear(8, event))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], self.latent), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.reshape(len(x), -1))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, raw = self.encoder(x.reshape(len(x), -1)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))


@pytest.fixture
def module_pair() -> ModulePair:
    return ModulePair()


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
