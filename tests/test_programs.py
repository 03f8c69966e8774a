"""Somebody's programs: the modules in their reach, and the device on which they run."""

from __future__ import annotations

import functools

import pyro
import pytest
import torch
from torch import nn

from pvae.errors import ArgumentError, DeviceError
from pvae.runtime.programs import modules_of, place_pair, resolve_device

GLOBAL_MODULE = nn.Linear(1, 1)


def uses_a_global(x):
    return GLOBAL_MODULE(x)


class PlainClass:
    def __init__(self):
        self.decoder = nn.Linear(2, 2)

    def model(self, x):
        return self.decoder(x)


def test_modules_are_found_where_programs_keep_them(module_pair):
    local = nn.Linear(1, 1)

    def closure(x):
        return local(x)

    plain = PlainClass()
    assert modules_of(module_pair) == [module_pair]
    assert modules_of(module_pair.model, module_pair.guide) == [module_pair]
    assert modules_of(plain.model) == [plain.decoder]
    assert modules_of(closure) == [local]
    assert modules_of(functools.partial(closure, 1)) == [local]
    assert modules_of(pyro.poutine.scale(closure, 2.0)) == [local]
    assert modules_of(uses_a_global) == [GLOBAL_MODULE]
    assert modules_of(lambda x: x) == []

    def helper(z):
        return closure(z)

    class Callable:
        def __init__(self):
            self.nets = [local]

        def __call__(self, x):
            return self.nets[0](x)

    assert modules_of(lambda x: helper(x)) == [local]
    assert modules_of(Callable()) == [local]
    assert modules_of(functools.partial(max, key=local)) == [local]


def test_a_placed_pair_gives_floats_its_modules_dtype_and_leaves_labels():
    x, y = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)

    def place(net):
        return place_pair(lambda x: net, lambda x: None, device="auto", data=(x, y))

    assert [t.dtype for t in place(nn.Linear(2, 2)).cast((x, y))] == [torch.float32, torch.int64]
    assert place(nn.Linear(2, 2).double()).cast((x, y))[0] is x
    bare = place(None)
    assert bare.device == x.device
    assert bare.cast((x, y))[0] is x


def test_a_pair_without_modules_reads_data_where_its_tensors_are(monkeypatch):
    """On a machine with a GPU, too: what it makes is on the default device, as the data are that are in memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = torch.utils.data.StackDataset(torch.zeros(3, 2))
    assert place_pair(lambda x: None, lambda x: None, device="auto", data=data).device == torch.device("cpu")


def test_device_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match="no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(ArgumentError, match="'auto'"):
        resolve_device("gpu")
    with pytest.raises(ArgumentError, match="'auto'"):
        resolve_device(None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="2 CUDA device"):
        resolve_device("cuda:2")


NETWORKS = {"first": [nn.Linear(1, 1)]}
UNUSED = nn.Linear(1, 1)


class Networks:
    shared = NETWORKS["first"][0]


def held_as_attribute(x):
    return held_as_attribute.network(x)


held_as_attribute.network = NETWORKS["first"][0]


class Calls:
    def __call__(self, x):
        return self.helper()(x)

    def helper(self):
        return NETWORKS["first"][0]

    def evaluate(self):  # which no program calls
        return UNUSED


class InModule(nn.Module):
    def forward(self, x):
        return NETWORKS["first"][0](x)


def inside(x):
    def inner():
        return NETWORKS["first"][0](x)

    return inner()


WAYS = {
    "default": lambda x, network=NETWORKS["first"][0]: network(x),
    "nested function": inside,
    "dict of lists": lambda x: NETWORKS["first"][0](x),
    "attribute of a function": held_as_attribute,
    "attribute of a class": lambda x: Networks.shared(x),
    "object that is called": Calls(),
    "method": Calls().helper,
    "set": lambda x, networks=frozenset(NETWORKS["first"]): networks,
}


@pytest.mark.parametrize("way", WAYS)
def test_modules_are_found_wherever_a_program_may_hold_them(way):
    assert modules_of(WAYS[way]) == NETWORKS["first"]


def test_modules_are_not_looked_into_but_for_their_code():
    net = InModule()
    net.teacher = [UNUSED]  # in a list, so as to be none of its parts
    assert modules_of(net) == [net, NETWORKS["first"][0]]
