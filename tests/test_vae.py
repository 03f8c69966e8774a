from __future__ import annotations

import copy

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

import pvae
from pvae import likelihoods, networks, posteriors, priors

VAES = {
    "mlp": lambda: pvae.VAE.mlp((2, 3), 2, [8]),
    "mlp-flat": lambda: pvae.VAE.mlp(6, 2, [8, 4]),
    "mlp-linear": lambda: pvae.VAE.mlp(6, 2, []),
    "mlp-gaussian": lambda: pvae.VAE.mlp((2, 3), 2, [8], "gaussian"),
    "mlp-per-pixel": lambda: pvae.VAE.mlp((2, 3), 2, [8], "gaussian-per-pixel"),
    "conv": lambda: pvae.VAE.conv((1, 4, 6), 2, (4,), 8),
    "conv-per-pixel": lambda: pvae.VAE.conv((3, 4, 6), 2, (4, 4), 8, "gaussian-per-pixel"),
}


@pytest.fixture(params=VAES)
def vae(request):
    return VAES[request.param]()


def data(vae, n=5):
    return torch.bernoulli(torch.full((n, *vae.event_shape), 0.5))


def test_shapes(vae):
    x = data(vae)
    assert vae.encode(x).batch_shape == (5,)
    assert vae.encode(x).event_shape == (2,)
    z = vae.encode(x).rsample((3,))
    assert vae.decode(z).batch_shape == (3, 5)
    assert vae.sample(4, seed=0).shape == (4, *vae.event_shape)
    assert vae.reconstruct(x).shape == x.shape


def test_programs_are_ordinary_pyro(vae):
    x = data(vae)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    model.compute_log_prob()
    guide.compute_log_prob()
    z = guide.nodes["z"]["value"]
    assert [n for n, s in model.iter_stochastic_nodes()] == ["data", "z"]
    torch.testing.assert_close(model.nodes["x"]["log_prob"], vae.decode(z).log_prob(x))
    torch.testing.assert_close(model.nodes["z"]["log_prob"], vae.prior().log_prob(z))
    torch.testing.assert_close(guide.nodes["z"]["log_prob"], vae.encode(x).log_prob(z))
    assert model.nodes["x"]["cond_indep_stack"][0].name == "data"


def test_sample_is_seeded_and_leaves_the_callers_state(vae, caller_state):
    vae.train()
    x = data(vae)
    before = caller_state()
    assert torch.equal(vae.sample(4, seed=1), vae.sample(4, seed=1))
    assert not torch.equal(vae.sample(40, seed=1), vae.sample(40, seed=2))
    assert not torch.equal(vae.sample(40), vae.sample(40))
    vae.reconstruct(x)
    before.assert_unchanged()
    assert vae.training
    assert not vae.sample(2, seed=0).requires_grad


def test_sample_mean_is_the_mean_of_what_is_drawn():
    """20,000 latents; the mean of bits and the mean of their probabilities differ by sd < 0.5 / sqrt(20,000)."""
    vae = VAES["mlp"]()
    gap = vae.sample(20_000, seed=0).mean(0) - vae.sample(20_000, seed=0, mean=True).mean(0)
    assert gap.abs().max() < 6 * 0.5 / 20_000**0.5


def test_the_long_way_and_the_short_way_are_the_same():
    torch.manual_seed(0)
    long = pvae.VAE(
        prior=priors.StandardNormal(5),
        decoder=likelihoods.Bernoulli(networks.mlp(5, [4], 7)),
        encoder=posteriors.DiagonalNormal(networks.mlp(7, [4], 10)),
    )
    torch.manual_seed(0)
    short = pvae.VAE.mlp(7, 5, [4])
    x = data(short)
    assert long.event_shape == short.event_shape == (7,)
    assert torch.equal(long.encode(x).mean, pvae.VAE(long.prior, long.decoder, long.encoder).encode(x).mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int64, torch.bool])
def test_other_dtypes_are_converted(dtype):
    vae = VAES["mlp-flat"]()
    x = data(vae)
    assert torch.equal(vae.reconstruct(x.to(dtype)), vae.reconstruct(x))


@pytest.mark.parametrize("shape", [(5, 7), (5,), (6,), (5, 2, 3), ()])
def test_data_of_another_shape_are_refused(shape):
    vae = VAES["mlp-flat"]()
    for call in (vae.model, vae.guide, vae.encode, vae.reconstruct):
        with pytest.raises(pvae.DataError, match=r"\(N, 6\)"):
            call(torch.zeros(shape))


@pytest.mark.parametrize("scale", [0.5, 255.0])
def test_grey_pixels_in_a_bernoulli_name_the_choices(scale):
    vae = VAES["mlp-flat"]()
    with pytest.raises(pvae.DataError, match=r"'threshold' \| 'static' \| 'dynamic'"):
        vae.model(data(vae) * scale)


class NoEvent(nn.Module):
    def forward(self, *args):
        return torch.distributions.Normal(torch.zeros(3), 1.0)


@pytest.mark.parametrize(
    "parts, match",
    [
        ((NoEvent(), VAES["mlp-flat"]().decoder, VAES["mlp-flat"]().encoder), "prior"),
        ((priors.StandardNormal(2), NoEvent(), VAES["mlp-flat"]().encoder), "decoder"),
        ((priors.StandardNormal(3), VAES["mlp-flat"]().decoder, VAES["mlp-flat"]().encoder), "decoder.*shape"),
        ((priors.StandardNormal(2), VAES["mlp-flat"]().decoder, NoEvent()), "encoder"),
        ((priors.StandardNormal(2), VAES["mlp-flat"]().decoder, VAES["mlp"]().encoder), "encoder.*\\(2, 6\\)"),
    ],
)
def test_parts_that_do_not_fit_are_named(parts, match):
    with pytest.raises(pvae.ProgramError, match=match):
        pvae.VAE(*parts)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: pvae.VAE.mlp(6, 0), "latent_dim"),
        (lambda: pvae.VAE.mlp(6, 2.5), "latent_dim"),
        (lambda: pvae.VAE.mlp(6, 2, likelihood="beta"), "likelihood.*bernoulli"),
        (lambda: pvae.VAE.conv((28, 28), 2), "channels"),
        (lambda: pvae.VAE.mlp(6, 2, [8]).sample(0), "num_samples"),
        (lambda: pvae.VAE.mlp(6, 2, [8]).sample(2, seed=-1), "seed"),
        (lambda: pvae.VAE.mlp(6, 2, [8]).decode(torch.zeros(4, 3)), "z must have shape"),
    ],
)
def test_impossible_arguments_are_named(call, match):
    with pytest.raises(pvae.PVAEError, match=match):
        call()


def test_building_moves_only_what_torch_layers_move(caller_state):
    parts = VAES["mlp-flat"]()
    before = caller_state()
    pvae.VAE(parts.prior, parts.decoder, parts.encoder)
    before.assert_unchanged()


@pytest.mark.parametrize("again", [lambda vae: VAES["mlp-flat"](), copy.deepcopy], ids=["second", "copy"])
def test_two_models_in_one_store_both_train(again):
    """Pyro's own modules of one name share an entry of the store, and the second silently does not train."""
    first = VAES["mlp-flat"]()
    x = data(first, 64)
    for vae in (first, again(first)):
        before = [p.clone() for p in vae.parameters()]
        svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        svi.step(x)
        assert all(not torch.equal(p, q) for p, q in zip(vae.parameters(), before, strict=True))


def test_state_dict_round_trip(vae):
    other = copy.deepcopy(vae)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    other.load_state_dict(vae.state_dict())
    x = data(vae)
    assert torch.equal(other.reconstruct(x), vae.reconstruct(x))


@pytest.mark.parametrize("make", [pvae.VAE.mlp, pvae.VAE.conv])
@pytest.mark.parametrize("argument", ["likelihood", "prior", "posterior"])
def test_unknown_names_are_answered_by_the_known_ones(make, argument):
    with pytest.raises(pvae.ArgumentError, match=f"{argument} must be one of '.*got 'nonsense'"):
        make((1, 4, 4), 2, **{argument: "nonsense"})


@pytest.mark.parametrize("likelihood", pvae.likelihoods.NAMED)
def test_vamp_prior_by_name_begins_at_data_of_any_likelihood(likelihood):
    """Draws of the model itself, which are in the likelihood's support."""
    vae = pvae.VAE.mlp(4, 2, [8], likelihood, prior="vamp")
    x = vae.sample(50, seed=0)
    pvae.fit(vae.model, vae.guide, x, epochs=1, batch_size=50, lr=1e-6, compile=False, progress=False)
    u = vae.prior.pseudo_inputs().detach()
    assert not vae.prior.wants_units(x)
    assert (torch.cdist(u[:50], x).min(1).values <= 0.1 * (x.max() - x.min()) + 0.1).all()
    assert vae.prior().log_prob(torch.zeros(2)).isfinite()
