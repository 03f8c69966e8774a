"""Hyperparameters in the places where people keep them: a guard sees each change, and puts it back."""

from __future__ import annotations

import array
import collections
import contextvars
import enum
import os
import sys
from functools import cached_property
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae
from pvae.capture import kept
from pvae.capture.footprints import Untold, footprint
from pvae.capture.guards import Guard
from pvae.evidence import programs

STATE = {"beta": 1.0}


class Meta(type):
    scale = 1.0


class Base:
    beta = 1.0


class Config(Base, metaclass=Meta):
    inner = SimpleNamespace(beta=1.0)
    table: ClassVar = {"beta": 1.0}


class Kind(enum.Enum):
    FIRST = 1


class Descriptor:
    def __get__(self, holder, owner):
        return STATE["beta"]


class Unseen:
    described = Descriptor()

    def __getattr__(self, name):
        return STATE["beta"]

    @cached_property
    def cached(self):
        return STATE["beta"]


class Indexed:
    def __getitem__(self, key):
        return STATE["beta"]


class Number:
    def __float__(self):
        return STATE["beta"]


def with_attribute():
    return with_attribute.beta


with_attribute.beta = 1.0
words, turns, raw, numbers = set(), collections.deque([1.0]), bytearray(b"\x01"), array.array("d", [1.0])
many, tensors, names = [1.0] * 200, [torch.ones(()) for _ in range(200)], dict.fromkeys(range(200), 1.0)
context, view, thing = contextvars.ContextVar("context", default=1.0), MappingProxyType(STATE), Unseen()
indexed, number, arrays = Indexed(), Number(), [np.ones(3)]
package = ModuleType("package")
package.train = ModuleType("package.train")
package.train.beta = 1.0


def imports_inside():
    from package_of_mine import beta

    return beta


# What reads a value, and what sets it.
PLACES = {
    "class": (lambda: Config.beta, lambda v: setattr(Config, "beta", v)),
    "base class": (lambda: Config.beta, lambda v: setattr(Base, "beta", v)),
    "metaclass": (lambda: Config.scale, lambda v: setattr(Meta, "scale", v)),
    "namespace in a class": (lambda: Config.inner.beta, lambda v: setattr(Config.inner, "beta", v)),
    "dict in a class": (lambda: Config.table["beta"], lambda v: Config.table.update(beta=v)),
    "enum member": (lambda: Kind.FIRST.beta, lambda v: setattr(Kind.FIRST, "beta", v)),
    "function": (with_attribute, lambda v: setattr(with_attribute, "beta", v)),
    "submodule": (lambda: package.train.beta, lambda v: setattr(package.train, "beta", v)),
    "module imported inside": (imports_inside, lambda v: setattr(sys.modules["package_of_mine"], "beta", v)),
    "set": (lambda: "on" in words, lambda v: words.discard("on") if v == 1.0 else words.add("on")),
    "deque": (lambda: turns[0], lambda v: turns.__setitem__(0, v)),
    "bytearray": (lambda: raw[0], lambda v: raw.__setitem__(0, int(v))),
    "array": (lambda: numbers[0], lambda v: numbers.__setitem__(0, v)),
    "long list": (lambda: many[0], lambda v: many.__setitem__(0, v)),
    "long list of tensors": (lambda: tensors[0], lambda v: tensors.__setitem__(0, torch.tensor(v))),
    "large dict": (lambda: names[0], lambda v: names.__setitem__(0, v)),
    "environment": (lambda: os.environ["BETA"], lambda v: os.environ.__setitem__("BETA", str(v))),
    "context": (lambda: context.get(), lambda v: context.set(v)),
    "view of a dict": (lambda: view["beta"], lambda v: STATE.update(beta=v)),
    "descriptor": (lambda: thing.described, lambda v: STATE.update(beta=v)),
    "__getattr__": (lambda: thing.whatever, lambda v: STATE.update(beta=v)),
    "__getitem__": (lambda: indexed[0], lambda v: STATE.update(beta=v)),
    "__float__": (lambda: float(number), lambda v: STATE.update(beta=v)),
    "NumPy array": (lambda: arrays[0][0], lambda v: arrays[0].__setitem__(0, v)),
}


@pytest.fixture(autouse=True)
def _mine(monkeypatch):
    module = ModuleType("package_of_mine")
    module.beta = 1.0
    monkeypatch.setitem(sys.modules, "package_of_mine", module)
    monkeypatch.setenv("BETA", "1.0")
    Kind.FIRST.beta = 1.0


@pytest.mark.parametrize("place", PLACES)
def test_a_change_is_seen_and_put_back(place):
    read, put = PLACES[place]
    guard = Guard(read)
    assert guard.find_change() == ""
    before = read()
    try:
        put(5.0)
        assert guard.find_change()
        if place not in ("view of a dict", "__float__"):
            guard.put_back()
            assert guard.find_change() == ""
            assert read() == before
    finally:
        put(1.0)


@pytest.mark.parametrize("place", [place for place in PLACES if "NumPy" not in place])
def test_a_change_between_two_calls_of_log_evidence_is_seen(place):
    read, put = PLACES[place]
    try:
        marks = footprint(Guard(read))
        assert footprint(Guard(read)) == marks
        put(5.0)
        assert footprint(Guard(read)) != marks
    except Untold:  # then nothing is kept
        pass
    finally:
        put(1.0)


def test_log_evidence_answers_for_the_hyperparameters_of_now(never_compiled, monkeypatch):
    """Attributes of a class, over which notebooks sweep: it once answered for the first value of all."""
    made = never_compiled(programs)
    monkeypatch.setattr(kept, "_all", {})
    monkeypatch.setattr(Config, "beta", 1.0, raising=False)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, Config.beta))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.5))

    x = torch.linspace(-2, 2, 12)
    for scale in (1.0, 1.0, 5.0):
        Config.beta = scale
        estimates = [
            pvae.log_evidence(
                model, guide, x, num_samples=80, chunk_size=160, compile=compile, proposal="guide", seed=0
            ).log_px
            for compile in (True, False)
        ]
        torch.testing.assert_close(*estimates, rtol=1e-5, atol=1e-5)
    assert [one.captures for one in made] == [1, 0, 1]


def test_what_nobody_can_compare_is_not_kept():
    """An object of C, as those in which pandas keeps its numbers."""
    hidden = memoryview(bytearray(8))
    with pytest.raises(Untold, match="memoryview"):
        footprint(Guard(lambda: hidden[0]))


def test_code_that_was_changed_in_place():
    """As a notebook's autoreload does."""

    def scale():
        return 1.0

    def other():
        return 2.0

    guard = Guard(lambda: scale())
    marks = footprint(guard)
    scale.__code__ = other.__code__
    assert guard.find_change().endswith("scale.__code__")
    assert footprint(Guard(lambda: scale())) != marks


def test_what_libraries_call_is_not_looked_into():
    """A guard is looked at in each step: with all that pandas calls, it took 80 milliseconds."""
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"beta": [1.0]})
    assert len(Guard(lambda: frame.loc[0, "beta"]).watched) < 1000
