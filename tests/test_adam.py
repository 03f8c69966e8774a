"""Adam of all parameters at once, beside PyTorch's own, parameter by parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pvae.svi.adam import FLUSH_EVERY, Adam, clipping, move_where

SHAPES = [(4, 3), (4,), (2, 4), ()]


def made(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def gradients(step, dtype, numbers=(0, 1, 2, 3)):
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(SHAPES[n], generator=generator, dtype=dtype) for n in numbers}


def by_torch(params, optimizer, grads):
    for number, param in enumerate(params):
        param.grad = grads.get(number)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"betas": (0.0, 0.5), "eps": 1e-3}, {"weight_decay": 0.1}])
def test_steps_are_those_of_torch(settings, dtype):
    """Some parameters have no gradient in some steps; their counts and moments stay."""
    ours, theirs = made(dtype), made(dtype)
    adam, optimizer = Adam(ours, 0.05, None, False), torch.optim.Adam(theirs, lr=0.05, foreach=False, **settings)
    adam.optimizer.param_groups[0].update(settings)
    for step in range(10):
        grads = gradients(step, dtype, (0, 2) if step % 4 == 3 else range(4))
        adam.update(grads)
        by_torch(theirs, optimizer, grads)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(dict(adam.optimizer.state[p]), dict(optimizer.state[q]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_update_that_is_compiled_on_a_gpu_is_the_same(dtype, clip_norm):
    """And it moves, and counts, nothing where it is told to keep all."""
    ours, theirs = made(dtype), made(dtype)
    adam, other = Adam(ours, 0.05, clip_norm, False), Adam(theirs, 0.05, clip_norm, False)
    lr, settings = torch.tensor(0.05, dtype=torch.float64), {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    for step in range(10):
        numbers = (0, 2) if step % 4 == 3 else (0, 1, 2, 3)
        grads = gradients(step, dtype, numbers)
        group = adam.group(numbers)
        shrink = 1.0 if clip_norm is None else clipping(list(grads.values()), clip_norm)
        state = *(g * shrink for g in grads.values()), *group.params, *group.means, *group.squares
        with torch.no_grad():
            move_where(torch.tensor(True), lr, adam.steps, numbers, state, **settings)
            before = [t.clone() for t in (*state, adam.steps)]
            move_where(torch.tensor(False), lr, adam.steps, numbers, state, **settings)
            assert all(torch.equal(t, was) for t, was in zip((*state, adam.steps), before, strict=True))
        other.update(grads)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    assert adam.steps.tolist() == other.steps.tolist() == [10.0, 8.0, 10.0, 8.0]


def test_moments_do_not_become_denormal_and_parameters_move_as_without_that():
    """After some steps a gradient is zero for good: 0.9**n is below float32's least normal number from n = 830 on."""
    ours, theirs = made(), made()
    adam, optimizer = Adam(ours, 0.05, None, False), torch.optim.Adam(theirs, lr=0.05, fused=True)
    for step in range(15 * FLUSH_EVERY):
        grads = gradients(step, torch.float32)
        if step > 10:
            grads[0][1] = 0.0
            grads[1][:2] = 0.0
        adam.update(grads)
        by_torch(theirs, optimizer, grads)

    def denormal(state):
        values = torch.cat([t.flatten() for each in state.values() for t in (each["exp_avg"], each["exp_avg_sq"])])
        return ((values != 0) & (values.abs() < torch.finfo(torch.float32).tiny)).sum().item()

    assert denormal(optimizer.state) == 5
    assert denormal(adam.optimizer.state) == 0
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_a_step_without_gradients_moves_nothing():
    """As of a process whose shards of a batch have no data."""
    params = made()
    adam = Adam(params, 0.05, 1.0, False)
    adam.update({})
    assert all(torch.equal(p, q) for p, q in zip(params, made(), strict=True))
    assert adam.steps.sum() == 0


def test_moments_are_kept_where_eps_is_so_small_that_they_count():
    """Gradients of 1e-34: with eps = 1e-40 they move parameters as gradients of 1 do."""
    (param,) = [nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    adam = Adam([param], 0.05, None, False)
    adam.optimizer.param_groups[0]["eps"] = 1e-40
    for _ in range(FLUSH_EVERY):
        adam.update({0: torch.full((3,), 1e-34, dtype=torch.float64)})
    assert param.tolist() == pytest.approx([-0.05 * FLUSH_EVERY] * 3, rel=1e-3)
    assert (adam.optimizer.state[param]["exp_avg"] > 0).all()
