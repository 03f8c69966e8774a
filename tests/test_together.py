"""Optimizers of pyro.optim, stepped for all parameters at once: the same numbers, and the same state."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from pyro import optim

from pvae.svi.together import Together

SHAPES = [(5, 3), (5,), (2, 5), ()]
SGD = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1, "momentum": 0.9}}

AT_ONCE = {
    "Adam": lambda: optim.Adam({"lr": 0.05}),
    "Adam, decay": lambda: optim.Adam({"lr": 0.05, "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}),
    "Adam, amsgrad": lambda: optim.Adam({"lr": 0.05, "amsgrad": True}),
    "AdamW": lambda: optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "Adagrad": lambda: optim.Adagrad({"lr": 0.05}),
    "SGD": lambda: optim.SGD({"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "RMSprop": lambda: optim.RMSprop({"lr": 0.05}),
    "Adamax": lambda: optim.Adamax({"lr": 0.05}),
    "NAdam": lambda: optim.NAdam({"lr": 0.05}),
    "clipped": lambda: optim.Adam({"lr": 0.05}, {"clip_norm": 0.3}),
    "ClippedAdam": lambda: optim.ClippedAdam({"lr": 0.05, "lrd": 0.99, "clip_norm": 0.5, "weight_decay": 0.1}),
    "scheduled": lambda: optim.ExponentialLR({**copy.deepcopy(SGD), "gamma": 0.8}),
}
ONE_BY_ONE = {
    "rates of their own": lambda: optim.Adam(lambda name: {"lr": 0.05 if name == "p0" else 0.01}),
    "centered": lambda: optim.ClippedAdam({"lr": 0.05, "centered_variance": True}),
    "asked for": lambda: optim.Adam({"lr": 0.05, "foreach": False}),
    "another kind": lambda: optim.DCTAdam({"lr": 0.05}),
}


def params(dtype):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    pyro.clear_param_store()
    return [pyro.param(f"p{n}", value) for n, value in enumerate(made)]


def run(make, at_once, dtype, steps=12, without=None):
    """Parameters and the optimizer after some steps by random gradients; its state goes through a file's form once."""
    moved, optimizer = params(dtype), make()
    together = Together(optimizer)
    generator = torch.Generator().manual_seed(1)
    taken = 0
    for step in range(steps):
        for p in moved:
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        if without is not None and step % 3:
            moved[without].grad = None
        taken += bool(together._optimizers(moved))
        (together if at_once else optimizer)(moved)
        if isinstance(optimizer, optim.PyroLRScheduler):
            optimizer.step()
        if step == steps // 2:
            state, optimizer = copy.deepcopy(optimizer.get_state()), make()
            optimizer.set_state(state)
            together = Together(optimizer)
    return moved, optimizer, taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*AT_ONCE, *ONE_BY_ONE])
def test_the_same_numbers_and_state(name, dtype):
    """Rounding of fused kernels, which 12 steps of up to 0.05 in a parameter of about 1 keep below 1e-5."""
    make = (AT_ONCE | ONE_BY_ONE)[name]
    if name == "rates of their own":
        pyro.clear_param_store()
    ours, our_optim, taken = run(make, True, dtype)
    theirs, their_optim, _ = run(make, False, dtype)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        state, other = (
            getattr(o.optim_objs[t], "optimizer", o.optim_objs[t]).state[t]
            for o, t in ((our_optim, p), (their_optim, q))
        )
        assert state.keys() == other.keys()
        torch.testing.assert_close(dict(state), dict(other), rtol=tolerance, atol=tolerance)
    assert taken == (10 if name in AT_ONCE else 0)  # all but the first, and the first after loading


def test_a_parameter_without_a_gradient_is_left_to_pyro():
    ours, _, taken = run(AT_ONCE["Adam"], True, torch.float32, without=1)
    theirs, _, _ = run(AT_ONCE["Adam"], False, torch.float32, without=1)
    assert 0 < taken < 6
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_a_rate_that_the_caller_sets_is_taken():
    moved, optimizer = params(torch.float32), optim.SGD({"lr": 0.1, "momentum": 0.5})
    together = Together(optimizer)
    for rate in (0.1, 0.1, 0.0):
        before = [p.detach().clone() for p in moved]
        for p in moved:
            p.grad = torch.ones_like(p)
            if p in optimizer.optim_objs:
                optimizer.optim_objs[p].param_groups[0]["lr"] = rate
        together(moved)
    assert all(torch.equal(p, q) for p, q in zip(moved, before, strict=True))


def test_a_class_of_the_callers_own_is_left_alone():
    class Own(optim.PyroOptim):
        def __call__(self, params, *args, **kwargs):
            self.called = True

    own = Own(torch.optim.Adam, {"lr": 0.1})
    Together(own)(params(torch.float32))
    assert own.called
