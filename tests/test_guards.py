from __future__ import annotations

import collections
import dataclasses
import functools
from types import ModuleType, SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

import pvae
from pvae.capture.guards import Guard

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
    p.schedule.weight = torch.zeros(2)


def replace_an_object(p):
    p.schedule = Schedule()
    p.schedule.beta = 0.5


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
    assert guard.find_change() == ""
    change(program)
    assert guard.find_change()
    guard.renew()
    assert guard.find_change() == ""


def test_values_inside_of_tensors_may_change():
    program = Program()
    guard = Guard(program.model)
    with torch.no_grad():
        for p in program.parameters():
            p.add_(1)
    program.net(torch.randn(4, 2))  # running statistics
    program.schedule.weight.mul_(2)
    assert guard.find_change() == ""


def test_variables_of_functions(monkeypatch):
    beta, weight = 1.0, torch.ones(())

    def closure(x):
        return beta * weight * x

    guard = Guard(closure)
    weight.add_(1)
    assert guard.find_change() == ""
    beta = 2.0
    assert guard.find_change().endswith("closure.beta")

    guard = Guard(uses_a_global)
    monkeypatch.setitem(globals(), "BETA", 2.0)
    assert guard.find_change() == "uses_a_global.BETA"

    settings = SimpleNamespace(beta=1.0)
    guard = Guard(functools.partial(lambda x, s: s.beta * x, s=settings))
    settings.beta = 2.0
    assert guard.find_change() == "SimpleNamespace.beta"


def test_all_tensors_in_reach_are_known():
    program = Program()
    known = {id(t) for t in Guard(program.model).tensors}
    assert known == {id(t) for t in [*program.parameters(), *program.buffers(), program.schedule.weight]}


def test_looking_is_cheap():
    """A look compares each entry once: a few hundred at most for a VAE, where a step takes milliseconds."""
    vae = pvae.VAE.mlp()
    guard = Guard(vae.model, vae.guide)
    assert sum(len(watched.entries) for watched in guard.watched) < 500


def same_values(p):
    """Made anew, and equal in all that a program can tell."""
    p.schedule = Schedule()
    p.schedule.table = {"a": 1, "b": [1, 2]}
    p.schedule.weight = torch.ones(2)
    p.net[1].hook = functools.partial(uses_a_global, x=[1, 2])
    p.plate = pyro.plate("data", 5, dim=-1)
    p.device, p.names, p.law = torch.device("cpu"), {"a", "b"}, dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    p.scaled = (lambda beta: lambda x: beta * x)(p.beta)
    p.law.itself = p.law  # a cycle


DIFFERENCES = {
    "a partial's argument": lambda p: setattr(p.net[1], "hook", functools.partial(uses_a_global, x=[1, 3])),
    "a plate's size": lambda p: setattr(p, "plate", pyro.plate("data", 6, dim=-1)),
    "a plate's place": lambda p: setattr(p, "plate", pyro.plate("data", 5, dim=-2)),
    "a tensor in place": lambda p: p.schedule.weight.add_(1),
    "deep inside": lambda p: p.schedule.table["b"].append(3),
    "a variable closed over": lambda p: setattr(p, "scaled", (lambda beta: lambda x: beta * x)(2.0)),
    "a distribution": lambda p: setattr(p, "law", dist.Normal(0.0, 2.0).expand([2]).to_event(1)),
    "another order": lambda p: setattr(p.schedule, "table", {"b": [1, 2], "a": 1}),
    "another class": lambda p: setattr(p.schedule, "table", collections.OrderedDict(a=1, b=[1, 2])),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_what_is_made_anew_and_equal_has_not_changed(difference):
    program = Program()
    same_values(program)
    guard = Guard(program.model)
    for _ in range(3):
        same_values(program)
        assert guard.find_change() == ""
    DIFFERENCES[difference](program)
    assert guard.find_change()


def test_tensors_that_programs_change_are_equal_to_none_but_themselves():
    """What a captured program does to the one it holds would not be done to the new one."""
    program = Program()
    program.schedule.weight.mul_(1)
    guard = Guard(program.model)
    program.schedule.weight = program.schedule.weight.clone()
    assert guard.find_change() == "Schedule.weight"
    guard.renew()
    program.net[0].weight = nn.Parameter(program.net[0].weight.detach().clone())
    assert guard.find_change()


def test_what_transforms_remember_is_no_change():
    program = Program()
    transform = program.transform = dist.transforms.planar(2)
    guard = Guard(program.model)
    transform.log_abs_det_jacobian(x := torch.randn(4, 2), transform(x))
    assert isinstance(transform.inv, dist.transforms.Transform)
    assert guard.find_change() == ""
    program.transform.beta = 2.0
    assert guard.find_change() == "Planar.beta"


# --- what a review found ------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class Settings:
    beta: float = 1.0


class Base:
    beta = 1.0

    def helper(self, x):
        return BETA * x


class Holder(Base):
    def __init__(self):
        self.nothing = None
        self.empty = []
        self.nested = {"a": {"b": [1.0, 2.0]}}
        self.objects = [SimpleNamespace(beta=1.0)]
        self.settings = Settings()
        self.array = np.ones(3)
        self.tool = functools.partial(max, key=SimpleNamespace(beta=1.0))
        self.net = nn.Linear(2, 2)
        self.net._private = SimpleNamespace(beta=1.0)

    def model(self, x, scale=SimpleNamespace(beta=1.0)):  # noqa: B008
        return [BETA for _ in x]


HOLDER_CHANGES = {
    "none to a value": lambda h: setattr(h, "nothing", 1.0),
    "shadowing a class's attribute": lambda h: setattr(h, "beta", 2.0),
    "a class's attribute": lambda h: setattr(Base, "beta", 2.0),
    "an empty list": lambda h: h.empty.append(1.0),
    "a dict replaced": lambda h: setattr(h, "nested", {"a": {"b": [1.0, 3.0]}}),
    "deep in a dict": lambda h: h.nested["a"]["b"].__setitem__(0, 2.0),
    "an object in a list": lambda h: setattr(h.objects[0], "beta", 2.0),
    "slots": lambda h: setattr(h.settings, "beta", 2.0),
    "an array": lambda h: h.array.__setitem__(0, 2.0),
    "a partial's keyword": lambda h: setattr(h.tool.keywords["key"], "beta", 2.0),
    "a module's private object": lambda h: setattr(h.net._private, "beta", 2.0),
    "a default": lambda h: setattr(h.model.__func__.__defaults__[0], "beta", 2.0),
    "a hook": lambda h: h.net.register_forward_hook(lambda *_: None),
    "a hook of a parameter": lambda h: h.net.weight.register_hook(lambda g: g),
    "another forward": lambda h: setattr(h.net, "forward", lambda x: x),
    "a global of a helper": lambda h: globals().__setitem__("BETA", 2.0),
}


@pytest.mark.parametrize("change", HOLDER_CHANGES)
def test_changes_in_ordinary_places_are_seen(change, monkeypatch):
    monkeypatch.setitem(globals(), "BETA", 1.0)
    monkeypatch.setattr(Base, "beta", 1.0)
    holder = Holder()
    guard = Guard(holder.model)
    assert guard.find_change() == ""
    HOLDER_CHANGES[change](holder)
    assert guard.find_change()
    Holder.model.__defaults__[0].beta = 1.0


def test_a_value_in_an_imported_module(monkeypatch):
    settings = ModuleType("settings")
    settings.BETA = 1.0
    space = {"settings": settings, "__name__": "somebodys"}
    exec("def program(x):\n    return [settings.BETA * y for y in x]", space)
    guard = Guard(space["program"])
    settings.BETA = 2.0
    assert guard.find_change() == "settings.BETA"
