"""Gaps against the oracle's exact ones."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae.diagnostics import Coverage, classification, coverage, gaps, interpolate, retrieval, side_by_side
from pvae.evidence.proposals import Refined
from pvae.testing import linear_gaussian


def mean_field(oracle):
    """The best diagonal Gaussian for each datum: the posterior's mean, and the precision's diagonal."""

    def guide(x, shift=0.0):
        exact = oracle.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.loc + shift * scale, scale).to_event(1))

    precision = torch.linalg.inv(oracle.posterior(oracle.sample(1)).covariance_matrix)[0]
    return guide, (precision.diagonal().log().sum() - precision.logdet()).item() / 2


def test_a_perfect_amortization_leaves_the_approximation_gap():
    """The gaps of a mean-field guide in closed form, to 5 standard errors and what Adam leaves (0.01 nats)."""
    oracle = linear_gaussian(4, 6)
    guide, approximation = mean_field(oracle)
    assert approximation > 0.1
    found = gaps(oracle.model, guide, oracle.sample(50))
    assert (found.approximation - approximation).abs().max() < 5 * found.approximation_std_error.max() + 0.01
    assert (found.amortization.abs() < 5 * found.amortization_std_error + 0.01).all()


def test_a_shifted_guide_has_an_amortization_gap():
    """Off by d, the ELBO loses ``d' P d / 2`` for the posterior's precision P."""
    oracle = linear_gaussian(4, 6)
    guide, approximation = mean_field(oracle)
    x = oracle.sample(50)
    found = gaps(oracle.model, lambda x: guide(x, 0.5), x, refined=Refined(full=False, steps=400))
    assert found.approximation.mean().item() == pytest.approx(approximation, abs=0.02)
    precision = torch.linalg.inv(oracle.posterior(x[:1]).covariance_matrix)[0]
    off = 0.5 * precision.diagonal().rsqrt()
    assert found.amortization.mean().item() == pytest.approx((off @ precision @ off / 2).item(), abs=0.03)
    total = found.evidence.corrected - found.guide.elbo
    torch.testing.assert_close(found.approximation + found.amortization, total)


def test_a_richer_family_closes_the_approximation_gap():
    oracle = linear_gaussian(4, 6)
    guide, approximation = mean_field(oracle)
    found = gaps(oracle.model, guide, oracle.sample(20), refined=Refined(steps=300))
    assert found.approximation.abs().max() < 0.02
    assert found.amortization.mean().item() == pytest.approx(approximation, abs=0.03)


def test_gaps_describe_themselves(small_vae, bits):
    found = gaps(small_vae.model, small_vae.guide, bits[:20], num_samples=100)
    assert found.approximation.shape == (20,)
    lines = str(found).splitlines()
    assert lines[0] == "log p(x) - ELBO of 20 data, nats per datum"
    assert [line.split()[0] for line in lines[1:5]] == ["log", "approximation", "amortization", "ELBO"]
    with pytest.raises(pvae.ArgumentError, match="num_samples"):
        gaps(small_vae.model, small_vae.guide, bits, num_samples=0)


def test_gaps_of_data_together_say_so():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(x.mean(), 0.5))

    found = gaps(model, guide, torch.arange(4.0), num_samples=100, refined=Refined(full=False, steps=5))
    assert str(found).startswith("log p(x) - ELBO of 4 data together, nats\n")


def test_gaps_of_a_loader_that_shuffles_are_refused(small_vae, bits):
    """Three estimates would be of different data in each row."""
    loader = DataLoader(TensorDataset(bits), shuffle=True)
    with pytest.raises(pvae.DataError, match="the loader shuffles"):
        gaps(small_vae.model, small_vae.guide, loader)


def test_interpolations_are_straight():
    start, end = torch.zeros(3, 2), torch.arange(6.0).reshape(3, 2)
    steps = interpolate(start, end, 5)
    assert steps.shape == (5, 3, 2)
    torch.testing.assert_close(steps, torch.linspace(0, 1, 5)[:, None, None] * end)
    with pytest.raises(pvae.ArgumentError, match="num_steps must be at least 2"):
        interpolate(start, end, 1)
    with pytest.raises(pvae.DataError, match="same shape"):
        interpolate(start, end[:2])


def test_coverage_tells_precision_from_recall():
    torch.manual_seed(0)
    data = torch.cat([torch.randn(200, 2), torch.randn(200, 2) + 20])
    assert coverage(data, data) == Coverage(1.0, 1.0)
    one_mode = coverage(torch.randn(200, 2), data)  # like data, but of half of them
    assert one_mode.precision > 0.9
    assert 0.4 < one_mode.recall <= 0.5
    assert coverage(data + 100, data) == Coverage(0.0, 0.0)


def test_neighbours_with_a_label_are_counted():
    codes = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    # Two neighbours each: of the first three 1, 1 and 0 are right, of the others all.
    assert retrieval(codes, labels, num_neighbors=2) == pytest.approx((1 + 1 + 0 + 6) / 12)
    assert retrieval(torch.zeros(4, 2), torch.zeros(4), num_neighbors=2) == 1.0
    tests = torch.tensor([[0.05], [5.05], [5.0]])
    right = classification(codes, labels, tests, torch.tensor([0, 1, 0]), num_neighbors=3)
    assert right == pytest.approx(2 / 3)
    with pytest.raises(pvae.DataError, match="7 neighbours"):
        retrieval(codes, labels, num_neighbors=6)


def test_an_autoencoder_and_a_vae_side_by_side(caller_state):
    digits = pvae.datasets.digits()
    torch.manual_seed(0)
    models = {"autoencoder": pvae.Autoencoder.mlp((8, 8), 4, [32]), "vae": pvae.VAE.mlp((8, 8), 4, [32])}
    for model in models.values():
        pvae.fit(model.model, model.guide, digits.train_x, epochs=6, lr=5e-3, compile=False, progress=False)
    before = caller_state()
    found = side_by_side(models, (digits.train_x, digits.train_y), (digits.test_x, digits.test_y))
    before.assert_unchanged()
    assert found.rows["autoencoder"]["error"] < found.rows["vae"]["error"]  # it spends nothing on the prior
    for row in found.rows.values():
        assert all(0 <= value <= 1 for value in row.values())
        assert row["classification"] > 0.3  # 10 classes
    assert repr(found).count("\n") == 2
