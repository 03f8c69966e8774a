"""Data that cannot be used are refused before any program runs, and odd ones are read as what they are."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from helpers import evidence, fit, same, weights
from pairs import ModulePair, Untouched
from pyro import distributions as dist
from torch import nn
from torch.utils.data import TensorDataset

import pvae
from pvae.evidence.proposals import Refined

collapses = pytest.mark.filterwarnings("ignore:the posterior has collapsed")  # there is nothing to encode
nans = pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own, beside our error


def finite(module):
    return all(p.isfinite().all() for p in module.parameters())


# --- data that cannot be used -----------------------------------------------------------------------------------------


CALLS = {
    "fit": pvae.fit,
    "log_evidence": pvae.log_evidence,
    "log_weights": pvae.log_weights,
    "gauss_hermite": pvae.evidence.gauss_hermite,
    "bidirectional_monte_carlo": pvae.evidence.bidirectional_monte_carlo,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["tensor", "numpy", "tuple"])
def test_bad_entries_are_counted_before_any_program_runs(call, bad, kind):
    x = torch.zeros(300, 6)
    x[7, 1] = x[299, 5] = bad
    data = {"tensor": x, "numpy": x.numpy(), "tuple": (torch.zeros(300), x)}[kind]
    name = r"data\[1\]" if kind == "tuple" else "data"
    pair = Untouched()
    with pytest.raises(pvae.DataError, match=rf"^{name} holds 2 nan or infinite entries, the first at index \(7, 1\)"):
        call(pair.model, pair.guide, data)


@pytest.mark.parametrize("call", [pvae.fit, pvae.log_evidence])
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.ma.masked_equal(np.arange(60).reshape(10, 6), 13), r"1 masked entries, the first at index \(2, 1\)"),
        (torch.eye(6).to_sparse(), "dense.*torch.sparse_coo"),
        (np.zeros((10, 6), np.longdouble), f"dtype {np.dtype(np.longdouble)}"),
        (np.zeros((10, 6), "datetime64[s]"), "dtype datetime64"),
        (np.full((10, 6), 1e300), r"reach 1e\+300, too large for the parameters' torch\.float32"),
        (torch.full((10, 6), -1e39, dtype=torch.float64), r"reach 1e\+39, too large"),
    ],
    ids=["masked", "sparse", "long double", "dates", "1e300", "-1e39"],
)
def test_data_that_torch_or_the_parameters_cannot_hold(call, x, match):
    pair = Untouched()
    with pytest.raises(pvae.DataError, match=match):
        call(pair.model, pair.guide, x)


def test_a_masked_array_without_a_masked_entry_is_an_array(bits):
    ours, theirs = ModulePair(), ModulePair()
    theirs.load_state_dict(ours.state_dict())
    fit(ours, bits)
    fit(theirs, np.ma.masked_array(bits.numpy(), np.zeros(bits.shape, bool)))
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_stand_last_are_said(channels):
    vae = pvae.VAE.conv((channels, 8, 6), 2, (4,), 8)
    last = torch.bernoulli(torch.full((20, 8, 6, channels), 0.5))
    before = weights(vae)
    for call in (fit, evidence, lambda vae, x: vae.reconstruct(x)):
        with pytest.raises(pvae.DataError, match=r"\(N, \d, 8, 6\).*channels stand last: x\.permute\(0, 3, 1, 2\)"):
            call(vae, last)
    for other in (last[..., 0], last.transpose(1, 2), last.reshape(20, -1)):
        with pytest.raises(pvae.DataError, match=r"\(N, \d, 8, 6\).*Reshape the data"):
            fit(vae, other)
    assert same(before, weights(vae))


def test_permuted_channels_are_the_channels():
    vaes = [pvae.VAE.conv((3, 8, 6), 2, (4,), 8) for _ in range(2)]
    vaes[1].load_state_dict(vaes[0].state_dict())
    last = torch.bernoulli(torch.full((50, 8, 6, 3), 0.5))
    permuted, plain = last.permute(0, 3, 1, 2), last.permute(0, 3, 1, 2).contiguous()
    assert not permuted.is_contiguous()
    for vae, x in zip(vaes, (permuted, plain), strict=True):
        fit(vae, x)
    assert same(weights(vaes[0]), weights(vaes[1]))
    assert torch.equal(evidence(vaes[0], permuted).log_px, evidence(vaes[1], plain).log_px)


# --- data that are odd, and right -------------------------------------------------------------------------------------


def strided(x):
    wide = torch.full((len(x), 2 * x.shape[1]), torch.nan)
    wide[:, ::2] = x
    return wide[:, ::2]


ODD = {
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "uint8": lambda x: x.to(torch.uint8),
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": strided,
    "in a list": lambda x: [x],
    "a dataset of tensors": TensorDataset,
    "wants gradients": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: nn.Parameter(x.clone()),
    "numpy": lambda x: x.numpy(),
    "numpy of uint16": lambda x: x.numpy().astype(np.uint16),
    "numpy in a tuple": lambda x: (x.numpy(),),
    "numpy upwards": lambda x: np.ascontiguousarray(x.numpy()[::-1])[::-1],
    "numpy leftwards": lambda x: np.ascontiguousarray(x.numpy()[:, ::-1])[:, ::-1],
    "numpy in Fortran's order": lambda x: np.asfortranarray(x.numpy()),
    "numpy, read-only": lambda x: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(x.shape),
    "numpy, big-endian": lambda x: x.numpy().astype(">f4"),
    "numpy, big-endian float64": lambda x: x.numpy().astype(">f8"),
    "numpy, big-endian int16": lambda x: x.numpy().astype(">i2"),
}


@pytest.fixture(scope="module")
def plainly():
    """A VAE, what training on plain data makes of it, and what log p(x) it then gives them."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((300, 6), 0.3))
    vae = pvae.VAE.mlp(6, 2, [8])
    begin = {name: value.clone() for name, value in vae.state_dict().items()}
    fit(vae, x, validation=x[:50])
    return x, begin, weights(vae), evidence(vae, x).log_px, evidence(vae, x, proposal=Refined(steps=5)).log_px


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_arrays_are_the_plain_tensor(odd, plainly):
    x, begin, trained, log_px, refined = plainly
    data = odd(x)
    vae = pvae.VAE.mlp(6, 2, [8])
    vae.load_state_dict(begin)
    fit(vae, data, validation=odd(x[:50]))
    assert same(weights(vae), trained)
    assert torch.equal(evidence(vae, data).log_px, log_px)
    assert torch.equal(evidence(vae, data, proposal=Refined(steps=5)).log_px, refined)
    assert getattr(data, "grad", None) is None


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined", "laplace", "student-t", "defensive", "ais"])
def test_one_datum_has_its_log_px(proposal):
    """Errors are normal: 6 of them fail once in 5e8. Laplace's Gaussian is the posterior, and leaves only rounding."""
    oracle = pvae.testing.linear_gaussian(2, 3, noise=1.0, guide_shift=0.5)
    x = oracle.bias[None] + 0.5
    estimate = evidence(oracle, x, proposal=proposal, num_samples=2000)
    assert estimate.log_px.shape == (1,)
    tolerance = 6 * estimate.std_error.item() + 1e-6
    assert tolerance < 0.2
    assert estimate.log_px.item() == pytest.approx(oracle.log_px(x).item(), abs=tolerance)


@collapses
@pytest.mark.parametrize(
    ("likelihood", "level"), [("bernoulli", 0.0), ("bernoulli", 1.0), ("gaussian", 0.0), ("gaussian-per-pixel", 1.0)]
)
def test_data_that_are_all_the_same(likelihood, level):
    """They carry nothing, so a VAE has only to name them: log p(x) nears 0 for bits, and rises for real numbers."""
    x = torch.full((300, 6), level)
    vae = pvae.VAE.mlp(6, 2, [8], likelihood)
    first = evidence(vae, x[:5], num_samples=1000, proposal="prior")
    result = fit(vae, x, epochs=30, lr=0.05)
    last = evidence(vae, x[:5], num_samples=1000, proposal="prior")
    assert np.isfinite(result.history["elbo"]).all()
    assert finite(vae)
    assert last.log_px.isfinite().all()
    assert last.mean > first.mean + 3
    if likelihood == "bernoulli":
        assert -0.3 < last.mean < 0  # a probability of bits
        assert -0.3 < result.history["elbo"][-1] < 0.1
    assert (vae.reconstruct(x[:5]) - level).abs().max() < 0.2
    assert evidence(vae, x[:5]).log_px.isfinite().all()


@collapses
def test_features_that_are_constant_beside_others_that_are_not():
    x = torch.randn(300, 3)
    x = torch.cat([x, torch.full((300, 1), 5.0), torch.zeros(300, 2)], 1)
    vae = pvae.VAE.mlp(6, 2, [8], "gaussian-per-pixel")
    result = fit(vae, x, epochs=20, lr=0.05)
    assert np.isfinite(result.history["elbo"]).all()
    assert result.history["elbo"][-1] > result.history["elbo"][0] + 3  # it begins near, in units of the data
    assert evidence(vae, x[:20]).log_px.isfinite().all()


# --- numbers at the end of the scale ----------------------------------------------------------------------------------


@nans
@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian-per-pixel"])
@pytest.mark.parametrize("value", [1e30, -3e38])
def test_training_on_a_value_whose_square_overflows_stops(likelihood, value):
    x = torch.randn(300, 6)
    x[100, 2] = value
    vae = pvae.VAE.mlp(6, 2, [8], likelihood)
    with pytest.raises(pvae.PVAEError, match=r"not finite|inf|nan"):
        fit(vae, x)
    assert finite(vae)


@pytest.mark.parametrize("proposal", ["guide", "laplace", "defensive"])
def test_a_value_whose_square_overflows_has_no_log_px_and_harms_no_other(proposal):
    vae = pvae.VAE.mlp(6, 2, [8], "gaussian")
    x = torch.randn(4, 6)
    x[0] = 0
    clean = evidence(vae, x, proposal=proposal)
    x[0, 2] = 1e30
    estimate = evidence(vae, x, proposal=proposal)
    assert estimate.log_px[0] == -math.inf
    assert estimate.unreliable.tolist() == [True, *clean.unreliable[1:].tolist()]
    assert estimate.interval()[0][0].isnan()
    assert math.isnan(estimate.mean_interval()[0])
    assert "of 4 data are unreliable" in repr(estimate)
    assert torch.equal(estimate.log_px[1:], clean.log_px[1:])


@pytest.mark.parametrize("value", [1e30, 1e100])
def test_huge_values_have_the_right_log_px_in_float64(value):
    """The exact guide leaves only rounding: some 50 operations of relative error 1.1e-16."""
    oracle = pvae.testing.linear_gaussian(2, 3)
    x = oracle.sample(3)
    x[1, 0] = value
    estimate = evidence(oracle, x)
    np.testing.assert_allclose(estimate.log_px, oracle.log_px(x), rtol=1e-13, atol=1e-9)
    assert estimate.log_px[1] < -(value**2) / 100


class Overflowing(ModulePair):
    """A guide whose scale is exp(raw), where ``raw`` is large for data of ones only."""

    def __init__(self, raw: float) -> None:
        super().__init__()
        self.raw = raw

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, _ = self.encoder(x).chunk(2, -1)
            raw = torch.where(x.all(-1, keepdim=True), self.raw, 0.0)
            pyro.sample("latent", dist.Normal(loc, raw.exp().expand_as(loc)).to_event(1))


@nans
@pytest.mark.parametrize("raw", [200.0, -200.0, 80.0, -80.0])
@pytest.mark.parametrize("ones", [slice(None), slice(250, 251)], ids=["all", "one in 300"])
def test_a_guide_whose_scale_over_or_underflows_is_an_error(raw, ones, bits):
    """exp(200) is infinite and exp(-200) is 0 in float32; the squares of exp(80) and exp(-80) are."""
    bits[bits.all(-1)] = 0
    bits[ones] = 1
    pair = Overflowing(raw)
    before = weights(pair)
    with pytest.raises(pvae.PVAEError):
        fit(pair, bits)
    assert finite(pair)
    if ones == slice(None):
        assert same(before, weights(pair))
    with pytest.raises(pvae.PVAEError):
        evidence(pair, bits)
