"""Blocks with a state of their own, which leave the caller's as they found it."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import nn

from pvae.errors import ArgumentError
from pvae.runtime.isolation import isolate, outside_modules, resolve_seed


def test_a_block_has_a_state_of_its_own(caller_state):
    pyro.param("mine", torch.tensor(1.0))
    before = caller_state()
    with isolate(seed=3) as store:
        assert not store
        assert not torch.is_grad_enabled()
        assert not pyro.infer.util.is_validation_enabled()
        pyro.param("theirs", torch.tensor(2.0))
        first = torch.randn(3)
    before.assert_unchanged()
    with isolate(seed=3, training=True):
        assert torch.is_grad_enabled()
        assert torch.equal(torch.randn(3), first)
    before.assert_unchanged()


def test_state_is_restored_after_an_error(caller_state):
    module = nn.Sequential(nn.Dropout(), nn.Linear(1, 1))
    module[0].eval()
    before = caller_state()

    def fails():
        with isolate([module], seed=0):
            assert not module.training
            pyro.param("theirs", torch.tensor(2.0))
            torch.randn(1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    before.assert_unchanged()
    assert [m.training for m in module.modules()] == [True, False, True]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("validation", [True, False])
def test_modes_are_restored_whatever_they_were(grad, validation, caller_state):
    with torch.set_grad_enabled(grad), pyro.validation_enabled(validation):
        before = caller_state()
        with isolate(seed=0, training=not grad):
            pass
        before.assert_unchanged()


def test_outside_modules_leaves_out_what_lives_in_a_module():
    pyro.module("net", nn.Linear(1, 1))
    pyro.param("scale", torch.tensor(2.0), constraint=torch.distributions.constraints.positive)
    state = outside_modules(pyro.get_param_store())
    assert list(state["params"]) == list(state["constraints"]) == ["scale"]
    with isolate(seed=0, params=state) as store:
        assert store["scale"].item() == pytest.approx(2.0)


def test_seeds():
    assert resolve_seed(0) == 0
    assert resolve_seed(None) != resolve_seed(None)
    for bad in (-1, 2**63, 1.5, "0", True):
        with pytest.raises(ArgumentError, match="seed"):
            resolve_seed(bad)
