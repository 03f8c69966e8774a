from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import pvae
from pvae.guards import Guard

BETA = 1.0


def uses_a_global(x):
    return BETA * x


class Schedule:
    def __init__(self):
        self.beta = 1.0
        self.table = {"a": 1, "b": [1, 2]}
        self.weight = torch.ones(2)


class Program(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.schedule = Schedule()
        self.beta = 1.0

    def forward(self, x):
        return self.beta * self.net(x)

    def model(self, x):
        return self(x)


def change_parameter(p):
    p.net[0].weight = nn.Parameter(torch.ones(3, 2))


def add_a_layer(p):
    p.net.append(nn.ReLU())


def replace_a_layer(p):
    p.net[0] = nn.Linear(2, 3)


def add_a_parameter(p):
    p.net[0].scale = nn.Parameter(torch.ones(1))


def eval_mode(p):
    p.eval()


def freeze(p):
    p.net[0].weight.requires_grad_(False)


def set_beta(p):
    p.beta = 0.5


def set_a_bool(p):
    p.beta = True  # equal to 1.0, and not the same


def set_inside(p):
    p.schedule.beta = 0.5


def set_in_a_table(p):
    p.schedule.table["a"] = 2


def replace_a_tensor(p):
    p.schedule.weight = torch.ones(2)


def replace_an_object(p):
    p.schedule = Schedule()


CHANGES = [
    change_parameter,
    add_a_layer,
    replace_a_layer,
    add_a_parameter,
    eval_mode,
    freeze,
    set_beta,
    set_a_bool,
    set_inside,
    set_in_a_table,
    replace_a_tensor,
    replace_an_object,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_what_has_changed_is_named(change):
    program = Program()
    guard = Guard(program.model)
    assert guard.changed() == ""
    change(program)
    assert guard.changed()
    guard.renew()
    assert guard.changed() == ""


def test_values_inside_of_tensors_may_change():
    program = Program()
    guard = Guard(program.model)
    with torch.no_grad():
        for p in program.parameters():
            p.add_(1)
    program.net(torch.randn(4, 2))  # running statistics
    program.schedule.weight.mul_(2)
    assert guard.changed() == ""


def test_variables_of_functions(monkeypatch):
    beta, weight = 1.0, torch.ones(())

    def closure(x):
        return beta * weight * x

    guard = Guard(closure)
    weight.add_(1)
    assert guard.changed() == ""
    beta = 2.0
    assert guard.changed().endswith("closure.beta")

    guard = Guard(uses_a_global)
    monkeypatch.setitem(globals(), "BETA", 2.0)
    assert guard.changed() == "uses_a_global.BETA"

    settings = SimpleNamespace(beta=1.0)
    guard = Guard(functools.partial(lambda x, s: s.beta * x, s=settings))
    settings.beta = 2.0
    assert guard.changed() == "SimpleNamespace.beta"


def test_all_tensors_in_reach_are_known():
    program = Program()
    known = {id(t) for t in Guard(program.model).tensors}
    assert known == {id(t) for t in [*program.parameters(), *program.buffers(), program.schedule.weight]}


def test_looking_is_cheap():
    """A look compares each entry once: a few hundred at most for a VAE, where a step takes milliseconds."""
    vae = pvae.VAE.mlp()
    guard = Guard(vae.model, vae.guide)
    assert sum(len(watched.entries) for watched in guard._watched) < 500
