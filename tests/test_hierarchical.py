"""Two and more layers of latents: log p(x) against a grid over both, and one program for any number of layers."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_captured, assert_comes_back, assert_fit_is_svi, evidence
from pyro import poutine

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.hierarchical import HierarchicalVAE

SIZES = {"two": ((3, 2), ([8], [4])), "three": ((3, 2, 1), ([8], [4], [4]))}


def made(size="two", likelihood="bernoulli", event_shape=(2, 3)):
    torch.manual_seed(0)
    return HierarchicalVAE.mlp(event_shape, *SIZES[size], likelihood)


def data(n=40):
    return torch.randint(2, (n, 2, 3), generator=torch.Generator().manual_seed(1)).float()


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


def test_shapes_and_sites(size):
    hvae, x = made(size), data()
    guide = poutine.trace(hvae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(hvae.model, trace=guide)).get_trace(x)
    names = [f"z{n}" for n in range(1, len(hvae.latent_dims) + 1)]
    assert [n for n, _ in guide.iter_stochastic_nodes() if n != "data"] == names
    assert [n for n, _ in model.iter_stochastic_nodes() if n != "data"] == names[::-1]
    assert [guide.nodes[n]["value"].shape[-1] for n in names] == list(hvae.latent_dims) == list(SIZES[size][0])
    assert hvae.reconstruct(x).shape == x.shape
    assert torch.equal(hvae.sample(5, seed=0), hvae.sample(5, seed=0))
    assert hvae.decode(torch.zeros(7, 40, 3)).batch_shape == (7, 40)
    assert hvae.encode(x).event_shape == (3,)


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined", "ais"])
def test_log_evidence_is_the_integral_over_both_layers(proposal):
    """Against the trapezoidal rule on 401 x 401 points; 6 standard errors of each datum fail once in 1e8."""
    torch.manual_seed(0)
    hvae, x = HierarchicalVAE.mlp(3, (1, 1), ([4], [4])).double(), data(4).reshape(4, 6)[:, :3].double()
    grid = torch.linspace(-9, 9, 401, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_p1 = hvae.layers[0](grid).log_prob(grid[:, None])  # (z1, z2)
        log_pz = torch.trapezoid((log_p1 + hvae.prior().log_prob(grid)).exp(), grid[:, 0], dim=1).log()
        joint = log_pz[:, None] + hvae.decode(grid[:, None].expand(-1, 4, 1)).log_prob(x)
    exact = torch.trapezoid(joint.exp(), grid[:, 0], dim=0).log()
    estimate = evidence(hvae, x, num_samples=300, proposal=proposal)
    assert ((estimate.corrected - exact).abs() < 6 * estimate.std_error + 1e-6).all()


def test_pyros_svi_trains_it_to_the_same_place(size):
    assert_fit_is_svi(made(size), data(130))


def test_training_is_captured(monkeypatch):
    assert_captured(made(), data(128), monkeypatch)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_it_comes_back_from_disk(size, likelihood, tmp_path):
    hvae, x = made(size, likelihood), data()
    other = assert_comes_back(hvae, tmp_path / "saved")
    assert torch.equal(other.reconstruct(x), hvae.reconstruct(x))


def test_real_data_are_seen_in_their_units():
    hvae, x = made(likelihood="gaussian"), 1000 + 50 * data()
    pvae.fit(hvae.model, hvae.guide, x, epochs=1, progress=False)
    assert hvae.decoder.units.mean.item() == pytest.approx(x.mean().item())
    assert hvae.encode(x).mean.isfinite().all()


def test_the_sizes_of_burda_et_al_are_the_defaults():
    hvae = HierarchicalVAE.mlp()
    widths = [[m.out_features for m in part.modules() if isinstance(m, torch.nn.Linear)] for part in hvae.encoders]
    assert widths == [[200, 200, 200], [100, 100, 100]]
    assert hvae.latent_dims == (100, 50)


def test_wrong_arguments_are_named():
    top, decoder = priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(3, [], 6))
    layer, first, second = (posteriors.DiagonalNormal(networks.mlp(a, [], 2 * b)) for a, b in ((2, 3), (6, 3), (3, 2)))
    HierarchicalVAE(top, [layer], decoder, [first, second])
    for layers, encoders in (([], [first]), ([layer], [first])):
        with pytest.raises(pvae.ArgumentError, match="one more"):
            HierarchicalVAE(top, layers, decoder, encoders)
    with pytest.raises(pvae.ProgramError, match=r"layers\[0\]"):
        HierarchicalVAE(top, [second], decoder, [first, second])
    with pytest.raises(pvae.ProgramError, match=r"encoders\[1\]"):
        HierarchicalVAE(top, [layer], decoder, [first, first])
    for sizes in (((3,), ([8],)), ((3, 2), ([8],))):
        with pytest.raises(pvae.ArgumentError, match="at least two"):
            HierarchicalVAE.mlp(6, *sizes)
    with pytest.raises(pvae.DataError, match=r"\(N, 2, 3\)"):
        made().model(torch.zeros(5, 6))
