"""Layouts and bijections, there and back."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import constraints as pyro_constraints
from torch.distributions import constraints

from pvae.errors import ProgramError
from pvae.evidence.latents import Latents, LatentSpace, Layout

K, N = 4, 3


@pytest.mark.parametrize("data_dim, plates", [(-1, (2,)), (-2, (2,)), (-1, ())])
@pytest.mark.parametrize("event", [(), (5,), (5, 6)])
@pytest.mark.parametrize("folded", [False, True])
def test_values_are_gathered_and_laid_out(data_dim, plates, event, folded):
    """A plate of size 2 to the left or to the right of the data's."""
    nesting = 1 + len(plates)
    layout = Layout(data_dim, -nesting - 1, folded)
    gathered = torch.randn(K, N, *plates, *event)
    value = layout.lay_out(gathered, len(event), nesting)
    batch = list(plates)
    batch.insert(len(plates) + 1 + data_dim, K * N if folded else N)
    assert value.shape == (*(() if folded else (K,)), *batch, *event)
    assert torch.equal(layout.gather(value, len(event), K), gathered)
    if not event:
        total = gathered.flatten(2).sum(-1) if plates else gathered
        torch.testing.assert_close(layout.sum_out(value, K).expand(K, N), total.double(), rtol=1e-6, atol=1e-6)


def test_copies_hold_all_data_of_one_particle_together():
    layout = Layout(-1, -2, folded=True)
    (copied,) = layout.arguments((torch.arange(N),), K)
    assert copied.tolist() == list(range(N)) * K
    assert torch.equal(layout.gather(copied, 0, K), torch.arange(N).expand(K, N))


SUPPORTS = {
    "real": (constraints.real, torch.randn(K, N, 1)),
    "vector": (constraints.independent(constraints.real, 1), torch.randn(K, N, 1, 5)),
    "positive": (constraints.positive, torch.rand(K, N, 2) + 0.1),
    "interval": (constraints.interval(torch.full((K, N), -2.0), torch.full((K, N), 3.0)), torch.rand(K, N)),
    "simplex": (constraints.simplex, torch.distributions.Dirichlet(torch.ones(4)).sample((K, N, 1))),
    "unit vectors": (constraints.independent(constraints.unit_interval, 2), 0.1 + 0.8 * torch.rand(K, N, 2, 2)),
    "ordered": (pyro_constraints.ordered_vector, torch.randn(K, N, 3).sort(-1).values),
}


def test_latents_become_vectors_and_come_back():
    sites = {name: (support, values.double()) for name, (support, values) in SUPPORTS.items()}
    space = LatentSpace.of(sites)
    latents = Latents({name: values for name, (_, values) in sites.items()}, K)
    u, log_det = space.flatten(latents)
    assert u.shape == (K, N, space.dim) == (K, N, 1 + 5 + 2 + 1 + 3 + 4 + 3)
    back, same = space.unflatten(u)
    for name, values in latents.values.items():
        torch.testing.assert_close(back.values[name], values)
    torch.testing.assert_close(same, log_det)


@pytest.mark.parametrize("name", ["positive", "interval", "simplex", "unit vectors", "ordered"])
def test_the_jacobian_is_that_of_the_bijection(name):
    """``log |dz/du|`` against autograd; a simplex without its last coordinate."""
    support, values = SUPPORTS[name]
    space = LatentSpace.of({"z": (support, values.double())})
    u, log_det = space.flatten(Latents({"z": values.double()}, K))

    def z(one):
        flat = space.unflatten(one[None, None])[0].values["z"].flatten()
        return flat[: space.dim]

    matrix = torch.autograd.functional.jacobian(z, u[1, 2])
    torch.testing.assert_close(log_det.expand(K, N)[1, 2], torch.linalg.slogdet(matrix).logabsdet)


def test_what_has_no_vector_is_named():
    with pytest.raises(ProgramError, match="site 'c' is discrete"):
        LatentSpace.of({"c": (constraints.boolean, torch.ones(K, N))}).flatten(Latents({"c": torch.ones(K, N)}, K))
    with pytest.raises(ProgramError, match="no latent sites"):
        _ = LatentSpace.of({}).dim
