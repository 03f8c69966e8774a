"""The conditional VAE: log p(x|y) against quadrature, and one program for labels and covariates."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_captured, assert_comes_back, assert_fit_is_svi, evidence

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.conditional import ConditionalVAE

KINDS = {
    "labels": {"num_classes": 3},
    "class-priors": {"num_classes": 3, "has_conditional_prior": True},
    "covariates": {"num_covariates": 2},
}


def made(kind, likelihood="bernoulli", latent_dim=2):
    return ConditionalVAE.mlp((2, 3), latent_dim, [8], likelihood, **KINDS[kind])


def data(kind, n=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (n, 2, 3), generator=generator).float()
    labels = torch.randint(3, (n,), generator=generator)
    return x, labels if "num_classes" in KINDS[kind] else torch.randn(n, 2, generator=generator)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_shapes(kind):
    cvae, (x, y) = made(kind), data(kind)
    assert cvae.encode(x, y).batch_shape == (40,)
    assert cvae.decode(torch.zeros(7, 40, 2), y).batch_shape == (7, 40)
    assert cvae.sample(y, seed=0).shape == cvae.reconstruct(x, y).shape == x.shape
    assert torch.equal(cvae.sample(y, seed=0), cvae.sample(y, seed=0))
    assert torch.equal(cvae.reconstruct(x, y, y), cvae.reconstruct(x, y))
    assert not torch.equal(cvae.reconstruct(x, y, y.flip(0)), cvae.reconstruct(x, y))


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined", "ais"])
def test_log_evidence_is_the_integral_over_z(kind, proposal):
    """Against the trapezoidal rule on 4,001 points; 6 standard errors of each datum fail once in 1e8."""
    torch.manual_seed(0)
    cvae, (x, y) = made(kind, latent_dim=1).double(), data(kind, 4)
    x = x.double()
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None, None].expand(-1, 4, 1)
    with torch.no_grad():
        condition = y.double() if kind == "covariates" else torch.nn.functional.one_hot(y, 3).double()
        pz = cvae.prior(condition) if kind == "class-priors" else cvae.prior()
        joint = pz.log_prob(grid) + cvae.decode(grid, y).log_prob(x)
    exact = torch.trapezoid(joint.exp(), grid[:, 0, 0], dim=0).log()
    estimate = evidence(cvae, (x, y), num_samples=300, proposal=proposal)
    assert ((estimate.corrected - exact).abs() < 6 * estimate.std_error + 1e-6).all()


def test_pyros_svi_trains_it_to_the_same_place(kind):
    torch.manual_seed(0)
    assert_fit_is_svi(made(kind), data(kind, 130))


def test_training_is_captured(kind, monkeypatch):
    torch.manual_seed(0)
    assert_captured(made(kind), data(kind, 128), monkeypatch)


def test_it_comes_back_from_disk(kind, tmp_path):
    cvae, (x, y) = made(kind, "gaussian"), data(kind)
    other = assert_comes_back(cvae, tmp_path / "saved")
    assert torch.equal(other.reconstruct(x, y), cvae.reconstruct(x, y))
    with pytest.raises(pvae.CheckpointError, match="holds a ConditionalVAE, not a VAE"):
        pvae.VAE.load(tmp_path / "saved")


def test_real_data_are_seen_in_their_units():
    torch.manual_seed(0)
    cvae, (x, y) = made("labels", "gaussian"), data("labels")
    pvae.fit(cvae.model, cvae.guide, (1000 + 50 * x, y), epochs=1, progress=False)
    assert cvae.view.mean.item() == cvae.decoder.units.mean.item() == pytest.approx((1000 + 50 * x).mean().item())


def test_a_class_is_learned():
    """Data of class k are at 3 k, with sd 2; those of a sample of 500 draws too, within 6 of its standard errors."""
    torch.manual_seed(0)
    y = torch.arange(3).repeat(100)
    x = 3.0 * y[:, None] + 2 * torch.randn(300, 1) + torch.tensor([0.3, -0.3]) * torch.randn(300, 2)
    cvae = ConditionalVAE.mlp(2, 1, [16], "gaussian", num_classes=3)
    pvae.fit(cvae.model, cvae.guide, (x, y), epochs=100, batch_size=150, lr=0.01, progress=False, compile=False)
    for label in range(3):
        mean = cvae.sample(torch.full((500,), label), seed=1).mean().item()
        assert mean == pytest.approx(3 * label, abs=0.6)


@pytest.mark.parametrize(
    "y, match",
    [
        (torch.zeros(40), "labels, whole numbers"),
        (torch.full((40,), 3), "from 0 to 2"),
        (torch.full((40,), -1), "SemiSupervisedVAE"),
        (torch.zeros(39, dtype=torch.int64), "40 data"),
        (torch.zeros(40, 1, dtype=torch.int64), "40 data"),
    ],
)
def test_wrong_labels_are_named(y, match):
    cvae, (x, _) = made("labels"), data("labels")
    for call in (cvae.model, cvae.guide, cvae.encode, cvae.reconstruct):
        with pytest.raises(pvae.DataError, match=match):
            call(x, y)
    with pytest.raises(pvae.DataError):
        pvae.fit(cvae.model, cvae.guide, (x, y), progress=False)


def test_a_wrong_label_in_a_later_batch_stops_training():
    """Where nobody looks at labels any more, they are nan."""
    cvae, (x, y) = made("labels"), data("labels")
    y[-1] = 7
    with pytest.raises((pvae.NumericalError, pvae.DataError)):
        pvae.fit(cvae.model, cvae.guide, (x, y), batch_size=4, compile=False, progress=False)


def test_wrong_covariates_are_named():
    cvae, (x, y) = made("covariates"), data("covariates")
    with pytest.raises(pvae.DataError, match=r"y must have shape \(..., 2\)"):
        cvae.encode(x, y[:, :1])
    with pytest.raises(pvae.DataError, match="leading"):
        cvae.decode(torch.zeros(3, 2), y)
    with pytest.raises(pvae.DataError, match="target"):
        cvae.reconstruct(x, y, y[:5])


def test_wrong_arguments_are_named():
    parts = priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(2, [], 6))
    encoder = posteriors.DiagonalNormal(networks.mlp(9, [], 4))
    for options in ({}, {"num_classes": 3, "num_covariates": 2}):
        with pytest.raises(pvae.ArgumentError, match="num_classes"):
            ConditionalVAE(*parts, encoder, **options)
    with pytest.raises(pvae.ProgramError, match=r"decoder.*5"):
        ConditionalVAE(*parts, encoder, num_classes=3)
