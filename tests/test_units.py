"""Data of real numbers in any units: what networks see of them, where scales begin, and what is left alone."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial

import helpers
import numpy as np
import pyro
import pytest
import torch
from helpers import Items
from pairs import RealPair
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.data import DataLoader

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.persistence import saving

fit = partial(helpers.fit, compile=False)

GAUSSIANS = ["gaussian", "gaussian-per-pixel"]


def made(likelihood: str = "gaussian", **options) -> pvae.VAE:
    torch.manual_seed(0)
    return pvae.VAE.mlp(6, 2, [16], likelihood, **options)


def units(vae: pvae.VAE) -> tuple[float, float]:
    (mean, scale), other = (
        (part.mean.item(), part.scale.item()) for part in vae.modules() if isinstance(part, networks.Units)
    )
    assert (mean, scale) == other, "the encoder and the decoder have the same"
    return mean, scale


@pytest.fixture
def x() -> torch.Tensor:
    """Six numbers that follow one latent, with mean 0 and standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(320, 1, generator=generator), torch.randn(320, 6, generator=generator)
    x = z * torch.linspace(-1, 1, 6) + 0.2 * noise
    return (x - x.mean()) / x.std(correction=0)


@pytest.mark.parametrize("likelihood", GAUSSIANS)
@pytest.mark.parametrize("shift, scale", [(0.5, 0.25), (3000.0, 800.0), (-1.0, 1e-4)])
def test_training_does_not_depend_on_the_units_of_the_data(likelihood, shift, scale, x):
    """ELBOs differ by D log(scale), as densities do, and reconstructions map onto each other.

    Tolerances are for float32: x near 3,000 has steps of 2.4e-4 of 800, and rounding grows through 60 steps.
    """
    one, other = made(likelihood), made(likelihood)
    reference, result = fit(one, x, epochs=12), fit(other, shift + scale * x, epochs=12)
    difference = reference.history["elbo"] - result.history["elbo"] - 6 * np.log(scale)
    np.testing.assert_allclose(difference, 0, atol=0.02)
    back = (other.reconstruct(shift + scale * x) - shift) / scale
    torch.testing.assert_close(back, one.reconstruct(x), atol=0.05, rtol=0)


def test_a_learned_scale_begins_at_that_of_the_data(x):
    vae = made()
    fit(vae, 5 + 0.01 * x, lr=1e-9, epochs=1)
    assert units(vae) == pytest.approx((5, 0.01), rel=0.2)  # of the first batch
    assert vae.decode(torch.zeros(2)).base_dist.scale.tolist() == pytest.approx([0.01] * 6, rel=0.2)


def test_densities_are_those_of_the_data_as_they_came(x):
    vae = made(units=(5.0, 0.01))
    z = torch.zeros(1, 2)
    loc = 5 + 0.01 * vae.decoder.network(z)[:, 0]
    exact = dist.Normal(loc, 0.01).log_prob(5 + 0.01 * x[:1]).sum(-1)
    torch.testing.assert_close(vae.decode(z).log_prob(5 + 0.01 * x[:1]), exact)
    torch.testing.assert_close(vae.encode(5 + 0.01 * x).mean, vae.encoder.network(x)[:, :2], atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:log_scale was not registered")  # Pyro's, of what is frozen
@pytest.mark.parametrize("prepare", ["units", "scale set", "scale frozen", "trained by SVI", "a second fit", "loaded"])
def test_what_was_set_or_trained_is_left_alone(prepare, x, tmp_path):
    vae = made(units=(1.0, 2.0)) if prepare == "units" else made()
    if prepare == "scale set":
        vae.decoder.log_scale.data.fill_(-0.5)
    if prepare == "scale frozen":
        vae.decoder.log_scale.requires_grad_(False)
    if prepare == "trained by SVI":
        SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    if prepare in ("a second fit", "loaded"):
        fit(vae, x)
    if prepare == "loaded":
        vae.save(tmp_path / "vae")
        vae = pvae.VAE.load(tmp_path / "vae")
    before = units(vae)
    fit(vae, 0.5 + 0.4 * x)
    assert units(vae) == before


def test_a_copy_that_was_not_trained_is_new(x):
    vae = copy.deepcopy(made())
    fit(vae, 7 + x)
    assert units(vae)[0] == pytest.approx(7, abs=0.3)


def test_plain_svi_begins_there_after_find_units(x):
    x = 5 + 0.01 * x
    vae, by_fit = made(), made()
    vae.find_units(x.numpy())
    assert units(vae) == pytest.approx((5, 0.01), rel=1e-4)
    fit(by_fit, x, batch_size=320, epochs=1)
    assert units(by_fit) == pytest.approx(units(vae), rel=1e-6)
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    assert units(vae) == pytest.approx((5, 0.01), rel=1e-4)


@pytest.mark.parametrize("likelihood", GAUSSIANS)
def test_the_old_parts_are_there_without_units(likelihood):
    """Weights of a VAE without units load into one that has them, and mean the same."""
    old, new = made(likelihood, units=(0, 1)), made(likelihood)
    assert not any(isinstance(part, networks.Units) for part in old.modules())
    if likelihood == "gaussian":
        new.load_state_dict(old.state_dict())
    z = torch.randn(3, 2)
    torch.testing.assert_close(new.decode(z).base_dist.scale, old.decode(z).base_dist.scale)
    torch.testing.assert_close(new.decode(z).mean, old.decode(z).mean)


@pytest.mark.parametrize("likelihood", GAUSSIANS)
def test_a_vae_that_was_saved_before_there_were_units_loads(likelihood, x):
    old = made(likelihood, units=(0, 1))
    files, _ = saving.pack_module(old)
    config = json.loads(files["config.json"])
    for part in ("decoder", "encoder"):
        assert config["model"]["arguments"][part]["arguments"].pop("units") is None
    parts = (pvae.VAE, priors.StandardNormal, likelihoods.Gaussian, posteriors.DiagonalNormal)
    loaded = saving.unpack_module(files | {"config.json": json.dumps(config).encode()}, parts)
    assert isinstance(loaded, pvae.VAE)
    assert torch.equal(loaded.reconstruct(x), old.reconstruct(x))
    assert loaded.state_dict().keys() == old.state_dict().keys()


def test_sorted_data_are_seen_from_all_their_rows(x):
    x = torch.arange(320.0)[:, None] + 0.01 * x
    tensor, dataset, loader = made(), made(), made()
    fit(tensor, x)
    fit(dataset, Items(x))
    fit(loader, DataLoader(Items(x), batch_size=64, shuffle=True))
    assert units(tensor) == units(dataset)
    for vae in (tensor, loader):
        assert units(vae)[0] == pytest.approx(160, abs=5 * 92 / 64**0.5)  # 5 standard errors
        assert units(vae)[1] == pytest.approx(92, rel=0.4)


def test_transformed_data_and_labels(x):
    vae = made()
    fit(vae, (x, torch.arange(320)), transform=lambda x, y: 100 * x)
    assert units(vae)[1] == pytest.approx(100, rel=0.2)
    vae = made()
    pvae.fit(lambda x, y: vae.model(x), lambda x, y: vae.guide(x), (7 + x, x[:, 0]), epochs=1, progress=False)
    assert units(vae)[0] == pytest.approx(7, abs=0.3)


def test_data_that_are_all_alike_have_no_scale():
    vae = made()
    fit(vae, torch.full((64, 6), 3.0))
    assert units(vae) == (0.0, 1.0)


def test_one_entry_out_of_all_bounds_does_not_set_the_scale(x):
    x[:, 2][::64] = 1e6  # in each batch; of 320 data five
    vae = made()
    vae.find_units(x[:60])
    assert units(vae) == (0.0, 1.0)
    vae.find_units(x[1:60])
    assert units(vae) == pytest.approx((0, 1), abs=0.3)
    assert units(vae) != (0.0, 1.0)


def test_resume_goes_on_in_the_same_units(x, tmp_path):
    x = 5 + 0.01 * x
    whole, parts = made(), made()
    fit(whole, x, epochs=4)
    fit(parts, x, epochs=2, checkpoint=tmp_path / "run")
    again = made()
    fit(again, x, epochs=4, checkpoint=tmp_path / "run", resume="auto")
    assert all(torch.equal(p, q) for p, q in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
    loaded = made()
    pvae.svi.load_checkpoint(tmp_path / "run", loaded.model, loaded.guide, x[:2])
    assert units(loaded) == units(whole)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: pvae.VAE.mlp(6, 2, [8], units=(0, 2)), "units=.*'bernoulli' has none"),
        (lambda: made(units=(0, -1)), "units must be"),
        (lambda: made(units=(float("nan"), 1)), "units must be"),
        (lambda: made(units=(1, 2, 3)), "units must be"),
        (lambda: pvae.VAE.mlp(6, 2, [8]).find_units(torch.zeros(2, 6)), "no units to find"),
        (lambda: made().find_units(torch.zeros(2, 5)), r"\(N, 6\)"),
    ],
)
def test_impossible_units_are_named(call, match):
    with pytest.raises(pvae.PVAEError, match=match):
        call()


def test_an_own_objective_and_another_programs_part(x):
    """A VAE inside of another module sees the data that its shape fits."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = made()

        def model(self, y, x):
            self.vae.model(x)

        def guide(self, y, x):
            self.vae.guide(x)

    outer = Outer()
    pvae.fit(outer.model, outer.guide, (x[:, :1], 9 + x), epochs=1, compile=False, progress=False)
    assert units(outer.vae)[0] == pytest.approx(9, abs=0.3)


@pytest.mark.parametrize("family", [dist.Cauchy, lambda loc, scale: dist.StudentT(1.5, loc, scale), dist.LogNormal])
def test_densities_without_a_standard_deviation_are_not_judged(family):
    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", family(loc, 1.0), obs=x)

    x = 1e-4 * torch.rand(50) + 1e-4
    pvae.fit(model, lambda x: None, x, epochs=1, compile=False, progress=False)


# --- scales that cannot be begun --------------------------------------------------------------------------------------


def pair(likelihood):
    vae = made("bernoulli")
    return pvae.VAE(vae.prior, likelihood, vae.encoder)


@pytest.mark.parametrize(
    "make",
    [lambda scale: pair(likelihoods.Gaussian(networks.mlp(2, [16], 6), scale=scale)), lambda scale: RealPair(6, scale)],
    ids=["a fixed scale", "by hand"],
)
@pytest.mark.parametrize(
    "factor, scale, match",
    [
        (1e-2, 1.0, r"'x' is Normal with a standard deviation of 1, and that of its data is 0.0+[0-9]+: noise so wide"),
        (1.0, 30.0, "noise so wide"),
        (1000.0, 1.0, "away from its mean"),
        (1.0, 1.0, None),
        (1.0, 0.1, None),
        (0.2, 1.0, None),
    ],
)
def test_a_scale_far_from_that_of_the_data_is_warned_of(make, factor, scale, match, x):
    vae = make(scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(vae, factor * x)
        assert bool(caught) == (match is not None), [str(w.message) for w in caught]
    if match:
        with pytest.warns(UserWarning, match=match):
            fit(vae, factor * x, epochs=1)
