"""Encoders: draws follow their density, which is a density and has the gradients of one, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.errors import ArgumentError, ProgramError


def make(name, latent_dim=2, event=3):
    """An encoder in float64 whose network is a few times as steep as new ones are, so that families differ."""
    torch.manual_seed(0)
    named = posteriors.NAMED[name]
    encoder = named.make(networks.mlp(event, [5], named.count_outputs(latent_dim)), latent_dim).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter *= 1.5
    return encoder


every = pytest.mark.parametrize("name", posteriors.NAMED)


def grid(centre, reach, steps=401):
    """Points of a square around a centre, and the area that each stands for."""
    axes = [torch.linspace(c - reach, c + reach, steps, dtype=torch.float64) for c in centre.tolist()]
    return torch.cartesian_prod(*axes), (2 * reach / (steps - 1)) ** 2


@every
def test_density_integrates_to_one(name):
    """The rectangle rule on a square that reaches beyond 6 scales is exact to far below 1e-3 for smooth densities."""
    qz = make(name)(torch.ones(1, 3, dtype=torch.float64))
    draws = qz.sample((1000,))[:, 0]
    z, area = grid(draws.mean(0), 6 * draws.std(0).max().item())
    assert (qz.log_prob(z[:, None]).exp().sum() * area).item() == pytest.approx(1, abs=1e-3)


@every
def test_draws_follow_the_density(name):
    """Shares of 4,000 draws in the cells of a 6 x 6 grid are within 5 standard errors of the density's: 36 cells fail
    a right program once in 50,000 times.
    """
    torch.manual_seed(1)
    qz = make(name)(torch.ones(1, 3, dtype=torch.float64))
    draws = qz.sample((4000,))[:, 0]
    centre, reach = draws.mean(0), 3 * draws.std(0).max().item()
    z, area = grid(centre, reach, 401)
    cells = ((z - (centre - reach)) / (2 * reach) * 6).long().clamp(max=5)
    shares = torch.zeros(36, dtype=torch.float64).index_add(
        0, cells[:, 0] * 6 + cells[:, 1], qz.log_prob(z[:, None])[:, 0].exp() * area
    )
    inside = ((draws - centre).abs() < reach).all(1)
    found = ((draws[inside] - (centre - reach)) / (2 * reach) * 6).long()
    counts = torch.bincount(found[:, 0] * 6 + found[:, 1], minlength=36) / 4000
    # 1.5e-3 for cells' edges, where a row of the grid lies on either side
    assert ((counts - shares).abs() < 5 * (shares / 4000).sqrt() + 1.5e-3 + 5 / 4000).all()


@every
def test_gradients_of_draws_and_densities_are_those_of_finite_differences(name):
    encoder = make(name)
    other = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def bound(x):
        torch.manual_seed(2)
        qz = encoder(x)
        z = qz.rsample()
        return qz.log_prob(z), z, qz.log_prob(other)

    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bound, (x,))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_leading_dimensions_and_dtype(name, dtype):
    encoder = make(name, 3).to(dtype)
    qz = encoder(torch.randn(4, 3, dtype=dtype))
    assert (qz.batch_shape, qz.event_shape, qz.has_rsample) == ((4,), (3,), True)
    many = qz.expand((5, 4))
    z = many.rsample()
    assert z.dtype == many.log_prob(z).dtype == dtype
    torch.testing.assert_close(many.log_prob(z), qz.log_prob(z.clone()), rtol=1e-4, atol=1e-4)
    assert qz.mean.shape == (4, 3)


@every
def test_one_latent(name):
    qz = make(name, 1)(torch.ones(1, 3, dtype=torch.float64))
    z = torch.linspace(-60, 60, 60_001, dtype=torch.float64)[:, None, None]
    assert torch.trapezoid(qz.log_prob(z)[:, 0].exp(), z[:, 0, 0]).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "encoder, needed",
    [
        (posteriors.DiagonalNormal(nn.Linear(3, 5)), r"2 \* D outputs.*gives 5"),
        (posteriors.LowRankNormal(nn.Linear(3, 7), 2), r"4 \* D outputs.*gives 7"),
        (posteriors.FullNormal(nn.Linear(3, 6)), r"D \* \(D \+ 3\) / 2 outputs.*gives 6"),
        (posteriors.InverseAutoregressive(nn.Linear(3, 6), 2, context_dim=3), r"2 \* D \+ C = 7 outputs.*gives 6"),
    ],
)
def test_networks_of_the_wrong_size_are_named_when_the_vae_is_built(encoder, needed):
    with pytest.raises(ProgramError, match=needed):
        pvae.VAE(priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(2, [], 3)), encoder)


@every
def test_encoders_of_other_latents_are_named_when_the_vae_is_built(name):
    with pytest.raises(ProgramError, match=r"prior's event shape \(2,\)"):
        pvae.VAE(priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(2, [], 3)), make(name, 3).float())


@pytest.mark.parametrize("hidden", [[], [1], [4, 2]])
def test_too_narrow_networks_of_steps_are_refused(hidden):
    with pytest.raises(ArgumentError, match="hidden"):
        posteriors.InverseAutoregressive(nn.Linear(3, 9), 3, hidden=hidden)


def test_the_width_of_steps_is_that_of_files_saved_without_one_and_more_by_name():
    steps = [
        posteriors.InverseAutoregressive(nn.Linear(6, 60), 20).steps,
        posteriors.NAMED["iaf"].make(nn.Linear(6, 60), 20).steps,
    ]
    assert [[step.layers[0].out_features for step in both] for both in steps] == [[80, 80], [240, 240]]


def test_covariances_are_those_of_the_formulas():
    x = torch.randn(2, 3, dtype=torch.float64)
    for name in ("low-rank", "full"):
        encoder = make(name)
        qz, output = encoder(x), encoder.network(x)
        scale = networks.soft_clip(output[:, 2:4], 7.0).exp().diag_embed()
        if name == "full":
            factor = torch.eye(2).double() + torch.tensor([[0, 0], [1, 0]]).double() * output[:, 4, None, None]
            expected = scale @ factor @ factor.mT @ scale
        else:
            directions = output[:, 4:].reshape(2, 2, 2)
            expected = scale @ (torch.eye(2).double() + directions @ directions.mT) @ scale
        torch.testing.assert_close(qz.covariance_matrix, expected)
        torch.testing.assert_close(qz.mean, output[:, :2])


def test_inverse_autoregressive_density_is_a_change_of_variables():
    """log q of the normal minus log |dz/de|, with the Jacobian from autograd; steps as in the paper's Algorithm 1."""
    encoder = make("iaf", 3)
    x = torch.randn(1, 3, dtype=torch.float64)
    loc, raw, context = encoder.network(x)[0].split(3)

    def flow(z):
        for network in encoder.steps:
            m, s = network(z, context)
            gate = torch.sigmoid(networks.soft_clip(s, 7.0) + 2)
            z = gate * z + (1 - gate) * m
        return z

    base = torch.distributions.Normal(loc, networks.soft_clip(raw, 7.0).exp())
    z0 = base.sample()
    jacobian = torch.autograd.functional.jacobian(flow, z0)
    expected = base.log_prob(z0).sum() - torch.linalg.slogdet(jacobian).logabsdet
    qz = encoder(x)
    torch.testing.assert_close(qz.log_prob(flow(z0)[None]), expected[None])
    torch.testing.assert_close(qz.mean[0], flow(loc))


def test_a_draw_and_its_density_take_one_pass_and_other_densities_as_many_as_latents():
    encoder = make("iaf", 4)
    calls = []
    encoder.steps[0].register_forward_hook(lambda *_: calls.append(1))
    qz = encoder(torch.zeros(2, 3, dtype=torch.float64)).expand((5, 2))
    z = qz.rsample()
    own = qz.log_prob(z)
    assert len(calls) == 1
    torch.testing.assert_close(qz.log_prob(z.clone()), own)
    assert 4 <= len(calls) - 1 <= 5


@every
def test_log_evidence_agrees_with_quadrature(name):
    """A guide that was not trained, against quadrature: 6 standard errors of the mean of 4 data, and 1e-3 for the
    rule.
    """
    vae = pvae.VAE(
        priors.StandardNormal(2), likelihoods.Bernoulli(networks.mlp(2, [4], 3)), make(name).float()
    ).double()
    with torch.no_grad():
        vae.encoder.network[-1].bias[2:4] += 0.7  # wide guides, whose weights are bounded
    x = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=torch.float64)
    exact = pvae.evidence.gauss_hermite(vae.model, vae.guide, x)
    for proposal in ("guide", "refined"):
        estimate = pvae.log_evidence(
            vae.model, vae.guide, x, num_samples=2000, proposal=proposal, seed=0, compile=False, progress=False
        )
        assert abs(estimate.mean - exact.mean) < 6 * estimate.mean_std_error + 1e-3
