"""The autoencoder: fit minimises the error of reconstruction, and no more."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_captured, assert_comes_back, assert_fit_is_svi
from torch import nn

import pvae
from pvae import likelihoods, networks
from pvae.autoencoder import Autoencoder

AUTOENCODERS = {
    "mlp": lambda **o: Autoencoder.mlp((2, 3), 2, [8], **o),
    "gaussian": lambda **o: Autoencoder.mlp((2, 3), 2, [8], "gaussian", **o),
    "dropout": lambda **o: Autoencoder.mlp((2, 3), 2, [8], noise=nn.Dropout(0.3), **o),
    "noise": lambda **o: Autoencoder.mlp((2, 3), 2, [8], noise=networks.GaussianNoise(0.5), **o),
    "conv": lambda **o: Autoencoder.conv((1, 2, 4), 2, (4,), 8, **o),
}


@pytest.fixture(params=AUTOENCODERS)
def autoencoder(request):
    torch.manual_seed(0)
    return AUTOENCODERS[request.param]()


def data(autoencoder, n=130):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, (n, *autoencoder.event_shape), generator=generator).float()


def test_shapes(autoencoder):
    x = data(autoencoder)
    z = autoencoder.encode(x)
    assert z.shape == (130, 2)
    assert autoencoder.decode(z.expand(3, 130, 2)).batch_shape == (3, 130)
    assert autoencoder.reconstruct(x).shape == x.shape
    assert torch.equal(autoencoder.encode(x), z)  # without noise


def test_pyros_svi_trains_it_to_the_same_place(autoencoder):
    x = data(autoencoder)
    if autoencoder.wants_units(x):
        autoencoder.find_units(x)
    assert_fit_is_svi(autoencoder, x)


def test_training_is_captured(monkeypatch):
    autoencoder = AUTOENCODERS["noise"]()
    assert_captured(autoencoder, data(autoencoder, 128), monkeypatch)


def test_the_loss_is_the_squared_error():
    autoencoder = Autoencoder(likelihoods.Gaussian(nn.Linear(2, 6), scale=0.5), nn.Linear(6, 2), 2)
    x = data(autoencoder)
    error = (x - autoencoder.reconstruct(x)).square().sum(-1).mean().item()
    options = {"epochs": 1, "lr": 1e-12, "validation": x, "progress": False}
    history = pvae.fit(autoencoder.model, autoencoder.guide, x, **options).history
    expected = -error / (2 * 0.25) - 3 * math.log(2 * math.pi * 0.25)
    assert history["elbo"][-1] == pytest.approx(expected, rel=1e-5)
    assert history["validation_elbo"][-1] == pytest.approx(expected, rel=1e-5)


def test_a_linear_one_finds_the_principal_components():
    """Its squared error is at least that of the best plane, and within 2% of it after 400 steps."""
    torch.manual_seed(0)
    x = torch.randn(200, 2) @ torch.randn(2, 6) + 0.3 * torch.randn(200, 6)
    x = x - x.mean(0)
    autoencoder = Autoencoder(likelihoods.Gaussian(nn.Linear(2, 6), scale=1.0), nn.Linear(6, 2), 2)
    options = {"epochs": 400, "batch_size": 200, "lr": 0.02, "compile": False, "progress": False}
    pvae.fit(autoencoder.model, autoencoder.guide, x, **options)
    best = torch.linalg.svdvals(x)[2:].square().sum()
    error = (x - autoencoder.reconstruct(x)).square().sum()
    assert best * (1 - 1e-5) < error < 1.02 * best


def test_noise_is_for_training_alone():
    noise = networks.GaussianNoise(2.0)
    x = torch.zeros(20_000)
    assert noise(x).std().item() == pytest.approx(2, rel=0.03)  # 6 standard errors
    assert torch.equal(noise.eval()(x), x)
    for scale in (0, -1, math.inf, True, "a"):
        with pytest.raises(pvae.ArgumentError, match="scale"):
            networks.GaussianNoise(scale)


def test_it_comes_back_from_disk(autoencoder, tmp_path):
    other = assert_comes_back(autoencoder, tmp_path / "saved")
    x = data(autoencoder)
    assert torch.equal(other.reconstruct(x), autoencoder.reconstruct(x))


def test_wrong_parts_and_data_are_named():
    decoder = likelihoods.Bernoulli(networks.mlp(2, [], 6))
    with pytest.raises(pvae.ProgramError, match="decoder"):
        Autoencoder(decoder, nn.Linear(6, 2), 3)
    with pytest.raises(pvae.ProgramError, match="codes"):
        Autoencoder(decoder, nn.Linear(6, 4), 2)
    with pytest.raises(pvae.ProgramError, match="encoder"):
        Autoencoder(decoder, nn.Linear(5, 2), 2)
    autoencoder = Autoencoder(decoder, nn.Linear(6, 2), 2)
    for call in (autoencoder.model, autoencoder.guide, autoencoder.encode):
        with pytest.raises(pvae.DataError, match=r"\(N, 6\)"):
            call(torch.zeros(4, 5))
    with pytest.raises(pvae.DataError, match="support"):
        autoencoder.model(torch.full((4, 6), 0.5))
    with pytest.raises(pvae.DataError, match="z must have shape"):
        autoencoder.decode(torch.zeros(4, 3))
