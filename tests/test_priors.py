"""Priors: draws follow their density, which is a density; the VampPrior shares its encoder, and trains it once."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from helpers import assert_same_run, same, weights
from torch import nn

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.errors import ArgumentError, DataError, ProgramError
from pvae.evidence.densities import Densities
from pvae.runtime import place_pair
from pvae.svi import step

MAKERS = {
    "standard-normal": lambda d, _: priors.StandardNormal(d),
    "mixture": lambda d, _: priors.GaussianMixture(d, 4),
    "vamp": lambda _, encoder: priors.VampPrior(encoder, torch.randn(4, 3), bounds=(0, 1)),
    "flow": lambda d, _: priors.Flow(d, 2, hidden=[8]),
}


def test_every_prior_is_here():
    assert MAKERS.keys() == priors.NAMED.keys()


def make(name, latent_dim=2):
    """A prior in float64, moved away from where it begins."""
    torch.manual_seed(0)
    encoder = posteriors.DiagonalNormal(networks.mlp(3, [5], 2 * latent_dim))
    prior = MAKERS[name](latent_dim, encoder).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return prior


def vae_of(name, posterior="diagonal", seed=0, *, draws=True):
    """A small VAE of 6 bits, a VampPrior among them with few inputs."""
    torch.manual_seed(seed)
    named = posteriors.NAMED[posterior]
    encoder = named.make(networks.mlp(6, [8], named.count_outputs(2)), 2)
    if name == "vamp":
        prior = priors.VampPrior(encoder, torch.randn(5, 6), bounds=(0, 1), starts_from_data=draws)
    else:
        prior = MAKERS[name](2, encoder)
    with torch.no_grad():
        encoder.network[-1].bias[2:4] += 0.7  # wide guides, whose weights are bounded
    return pvae.VAE(prior, likelihoods.Bernoulli(networks.mlp(2, [8], 6)), encoder)


every = pytest.mark.parametrize("name", priors.NAMED)


@pytest.fixture(scope="module")
def x():
    return torch.rand(200, 6, generator=torch.Generator().manual_seed(0)).round()


@every
def test_density_integrates_to_one(name):
    """The rectangle rule with several points a scale, on a square where all but 1e-6 of the mass is."""
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    log_p = make(name)().log_prob(torch.cartesian_prod(axis, axis))
    assert (log_p.exp().sum() * 0.06**2).item() == pytest.approx(1, abs=1e-3)


@every
def test_draws_follow_the_density(name):
    """Shares of 4,000 draws in 8 x 8 cells within 5 standard errors of the density's, and 1.5e-3 for cells' edges: 64
    cells fail a right program once in 25,000 times.
    """
    pz = make(name)()
    torch.manual_seed(1)
    draws = pz.sample((4000,))
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)[:-1] + 0.01
    z = torch.cartesian_prod(axis, axis)

    def cell(z):
        return (z[:, 0] + 4).long() * 8 + (z[:, 1] + 4).long()

    shares = torch.zeros(64, dtype=torch.float64).index_add(0, cell(z), pz.log_prob(z).exp() * 0.02**2)
    counts = torch.bincount(cell(draws[(draws.abs() < 4).all(1)]), minlength=64) / 4000
    assert ((counts - shares).abs() < 5 * (shares / 4000).sqrt() + 1.5e-3).all()


@every
def test_gradients_are_those_of_finite_differences(name):
    prior = make(name)
    z = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: prior().log_prob(z), (z,))
    parameters = [p for p in prior.parameters() if p.requires_grad and p.numel() < 200]
    if parameters:
        assert torch.autograd.gradcheck(lambda *_: prior().log_prob(z.detach()), parameters)


@every
@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_dtype(name, latent_dim, dtype):
    pz = make(name, latent_dim).to(dtype)()
    assert (pz.batch_shape, pz.event_shape) == ((), (latent_dim,))
    z = pz.expand((4, 2)).sample()
    assert z.shape == (4, 2, latent_dim)
    assert z.dtype == pz.log_prob(z).dtype == dtype
    torch.testing.assert_close(pz.expand((4, 2)).log_prob(z), pz.log_prob(z.clone()), rtol=1e-4, atol=1e-4)


def test_mixture_begins_spread_and_about_standard_normal():
    """The variance over 50 components and 200 latents, 1, has a standard error below 0.02."""
    torch.manual_seed(0)
    mixture = priors.GaussianMixture(200)()
    assert mixture.variance.mean().item() == pytest.approx(1, abs=0.1)
    assert torch.pdist(mixture.component_distribution.mean).min() > 5


def test_vamp_prior_is_the_mean_of_its_encoders_densities():
    prior = make("vamp")
    z = torch.randn(7, 2, dtype=torch.float64)
    by_hand = torch.stack([prior.encoder(u[None]).log_prob(z) for u in prior.pseudo_inputs()])
    torch.testing.assert_close(prior().log_prob(z), by_hand.logsumexp(0) - torch.tensor(len(by_hand)).double().log())


def test_flow_begins_as_the_standard_normal():
    z = torch.randn(5, 3)
    torch.testing.assert_close(priors.Flow(3)().log_prob(z), priors.StandardNormal(3)().log_prob(z))


def test_flow_scores_in_one_pass():
    flow = make("flow", 4)
    calls = []
    flow.steps[0].register_forward_hook(lambda *_: calls.append(1))
    flow().log_prob(torch.randn(3, 4, dtype=torch.float64))
    assert len(calls) == 1


def test_flow_density_is_a_change_of_variables():
    flow = make("flow", 3)

    def to_normal(z):
        for network in reversed(flow.steps):
            shift, raw = network(z, z[..., :0])
            z = shift + networks.soft_clip(raw, 3.0).exp() * z
        return z

    z = torch.randn(3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(to_normal, z)
    exact = torch.distributions.Normal(0, 1).log_prob(to_normal(z)).sum() + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow().log_prob(z), exact)


@pytest.mark.parametrize("bounds, inside", [((0, 1), True), ((-2, 3), True), ((0, math.inf), True), (None, False)])
def test_pseudo_inputs_begin_at_data_and_stay_inside_of_the_bounds(bounds, inside):
    encoder = posteriors.DiagonalNormal(networks.mlp(3, [], 4))
    x = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.3, 0.9]])
    prior = priors.VampPrior.from_data(encoder, x, bounds=bounds)
    low, high = bounds or (0, 0)
    assert (prior.pseudo_inputs() - x).abs().max() <= 0.05 * min(high - low, 1 + high) + 1e-6
    with torch.no_grad():
        prior.raw_inputs.fill_(30.0)
    assert (prior.pseudo_inputs().max() <= high) == inside
    with torch.no_grad():
        prior.raw_inputs.fill_(-30.0)
    assert (prior.pseudo_inputs().min() >= low) == inside


def test_pseudo_inputs_are_in_the_units_of_the_encoder():
    units = networks.Units((100.0, 20.0))
    encoder = posteriors.DiagonalNormal(networks.mlp(3, [], 4), units=units)
    x = 100 + 20 * torch.randn(4, 3)
    prior = priors.VampPrior.from_data(encoder, x, units=units)
    assert prior.raw_inputs.abs().max() < 6
    torch.testing.assert_close(prior.pseudo_inputs(), x)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda e: priors.VampPrior(e, torch.zeros(3)), ArgumentError, "raw_inputs"),
        (lambda e: priors.VampPrior(e, torch.zeros(0, 3)), ArgumentError, "raw_inputs"),
        (lambda e: priors.VampPrior(e, torch.zeros(2, 3), bounds=(1, 0)), ArgumentError, "bounds"),
        (
            lambda e: priors.VampPrior(e, torch.zeros(2, 3), bounds=(0, 1), units=networks.Units()),
            ArgumentError,
            "units",
        ),
        (lambda e: priors.VampPrior.from_data(e, torch.full((2, 3), 7.0), bounds=(0, 1)), DataError, "reach"),
        (lambda _: priors.Flow(3, hidden=[2]), ArgumentError, "hidden"),
        (lambda _: priors.GaussianMixture(3, 0), ArgumentError, "num_components"),
    ],
)
def test_impossible_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call(posteriors.DiagonalNormal(networks.mlp(3, [], 4)))


def test_pseudo_inputs_of_another_shape_are_named_when_the_vae_is_built():
    encoder = posteriors.DiagonalNormal(networks.mlp(6, [], 4))
    with pytest.raises(ProgramError, match="prior cannot be run"):
        pvae.VAE(priors.VampPrior(encoder, torch.zeros(4, 5)), likelihoods.Bernoulli(nn.Linear(2, 6)), encoder)


def test_fit_lets_pseudo_inputs_begin_at_data_once(x):
    vae = vae_of("vamp")
    pvae.fit(vae.model, vae.guide, x, epochs=1, batch_size=100, lr=1e-6, compile=False, progress=False)
    u = vae.prior.pseudo_inputs().detach()
    assert (torch.cdist(u, x).min(1).values < 0.13).all()  # 0.05 in each of 6 entries
    assert torch.pdist(u).min() > 0
    kept = u.clone()
    pvae.fit(vae.model, vae.guide, x, epochs=1, batch_size=100, lr=1e-6, compile=False, progress=False)
    torch.testing.assert_close(vae.prior.pseudo_inputs().detach(), kept, rtol=0, atol=1e-3)


def test_more_pseudo_inputs_than_data_begin_apart():
    prior = priors.VampPrior(posteriors.DiagonalNormal(networks.mlp(3, [], 4)), torch.randn(7, 3), bounds=(0, 1))
    prior.find_units(torch.rand(2, 3))
    assert torch.pdist(prior.raw_inputs.detach()).min() > 1e-3


@pytest.mark.parametrize("name", ["mixture", "vamp", "flow"])
def test_fit_follows_pyros_svi(name, x):
    """A parameter that has two names, as the encoder of a VampPrior, is stepped once; 1e-5 for 8 steps of rounding."""
    ours, theirs = vae_of(name, draws=False), vae_of(name, draws=False)
    options = {"epochs": 4, "batch_size": 200, "lr": 0.01, "seed": 0, "progress": False}
    pvae.fit(ours.model, ours.guide, x, compile=False, **options)
    with pvae.runtime.isolate([theirs], seed=0, training=True):
        pyro.clear_param_store()
        svi = pyro.infer.SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        for _ in range(4):
            svi.step(x)
    # Noise and order of data are not the same: Adam's steps are, in size, which doubled steps would not be.
    start = weights(vae_of(name, draws=False))
    moved = [[(a - b).abs().max().item() for a, b in zip(weights(v), start, strict=True)] for v in (ours, theirs)]
    assert all(0 < size < 4.1 * 0.01 for sizes in moved for size in sizes)


@pytest.mark.parametrize("name", ["mixture", "vamp", "flow"])
def test_captured_and_eager_training_give_the_same_numbers(name, x, never_compiled):
    """Rounding alone: 1e-5 after 8 steps."""
    never_compiled(step)
    pairs = [vae_of(name), vae_of(name)]
    for vae, compile in zip(pairs, (False, True), strict=True):
        pvae.fit(vae.model, vae.guide, x, epochs=4, batch_size=100, compile=compile, progress=False)
    for ours, theirs in zip(*map(weights, pairs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mixture", "vamp", "flow"])
def test_a_run_goes_on_bit_for_bit(name, x, tmp_path):
    options = {"batch_size": 100, "compile": False, "progress": False, "seed": 0}
    whole, cut, again = vae_of(name), vae_of(name), vae_of(name, seed=1)
    reference = pvae.fit(whole.model, whole.guide, x, epochs=4, **options)
    pvae.fit(cut.model, cut.guide, x, epochs=2, checkpoint=tmp_path, **options)
    result = pvae.fit(again.model, again.guide, x, epochs=4, checkpoint=tmp_path, resume="auto", **options)
    assert_same_run((again, result), (whole, reference))


def test_a_loaded_vae_shares_its_encoder_again(tmp_path, x):
    vae = vae_of("vamp")
    vae.save(tmp_path)
    loaded = pvae.VAE.load(tmp_path)
    assert loaded.prior.encoder is loaded.encoder
    for one in (vae, loaded):
        pvae.fit(one.model, one.guide, x, epochs=1, batch_size=100, seed=0, compile=False, progress=False)
    assert same(weights(vae), weights(loaded))


@pytest.mark.parametrize("name", ["mixture", "vamp", "flow"])
@pytest.mark.parametrize("posterior", ["diagonal", "iaf"])
def test_log_evidence_agrees_with_quadrature(name, posterior, x):
    """A grid on [-8, 8]^2 with 10 points to 1, against 6 standard errors, and 2e-3 for the grid and float32."""
    vae = vae_of(name, posterior)
    axis = torch.linspace(-8, 8, 161)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_px = torch.stack([vae.decode(z).log_prob(row) for row in x[:3]])
        exact = ((vae.prior().log_prob(z) + log_px).double().logsumexp(1) + 2 * torch.tensor(0.1).log()).mean()
    for proposal in ("guide", "prior", "auto"):
        estimate = pvae.log_evidence(
            vae.model, vae.guide, x[:3], num_samples=1000, proposal=proposal, seed=0, compile=False, progress=False
        )
        assert abs(estimate.mean - exact.item()) < 6 * estimate.mean_std_error + 2e-3, proposal


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_draws_from_a_mixture_serve_all_data(name, x):
    """They are decoded once for all, as those of a standard normal."""
    vae = vae_of(name)
    pair = place_pair(vae.model, vae.guide, device="cpu")
    with pvae.runtime.isolate([vae], seed=0):
        assert Densities.of(pair, (x[:5],)).shares_prior
