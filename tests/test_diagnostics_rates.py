"""Rates, codes' use and the split of the ELBO, against the closed forms of the linear-Gaussian pair."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pairs import ModulePair, RowGaussian, shared_mean, shared_mean_guide
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from torch.distributions import kl_divergence
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae.diagnostics import latent_usage, rate_distortion
from pvae.posteriors import InverseAutoregressive
from pvae.testing import linear_gaussian


def prior_like(oracle):
    loc = torch.zeros(oracle.weight.shape[1]).to(oracle.weight)
    return dist.MultivariateNormal(loc, torch.eye(len(loc)).to(loc))


def exact_distortion(oracle, x):
    """``-E_q log p(x|z)`` of the guide, in closed form."""
    q = oracle.proposal(x)
    error = x - oracle.bias - q.mean @ oracle.weight.T
    spread = (oracle.weight @ q.covariance_matrix @ oracle.weight.T).diagonal(dim1=-2, dim2=-1).sum(-1)
    at_mean = dist.Normal(0.0, oracle.noise).log_prob(error).sum(-1)
    return -at_mean + spread / (2 * oracle.noise**2)


def test_rate_and_distortion_have_their_closed_forms(caller_state):
    """Distortion and ELBO within 5 standard errors: by chance for one in 10,000 of runs with 100 data."""
    oracle = linear_gaussian(3, 5, guide_shift=0.5, guide_scale=0.8)
    x, before = oracle.sample(100), caller_state()
    found = rate_distortion(oracle.model, oracle.guide, x, num_samples=200)
    before.assert_unchanged()
    torch.testing.assert_close(found.rate, kl_divergence(oracle.proposal(x), prior_like(oracle)))
    assert not found.rate_std_error.any()
    assert ((found.distortion - exact_distortion(oracle, x)).abs() < 5 * found.distortion_std_error).all()
    assert ((found.elbo - oracle.elbo(x)).abs() < 5 * found.elbo_std_error).all()
    torch.testing.assert_close(found.elbo, -found.distortion - found.rate)


def test_elbo_and_divergence_from_the_posterior_make_log_px():
    """log p(x) = ELBO + KL(q || p(z|x)): to 1e-5 for the exact guide, else within 5 errors of both parts."""
    oracle = linear_gaussian(3, 5)
    x = oracle.sample(50)
    found = rate_distortion(oracle.model, oracle.guide, x)
    divergence = kl_divergence(oracle.proposal(x), oracle.posterior(x))
    torch.testing.assert_close(found.elbo + divergence, oracle.log_px(x), rtol=0, atol=1e-5)
    moved = linear_gaussian(3, 5, guide_shift=0.5, guide_scale=1.2)
    found = rate_distortion(moved.model, moved.guide, x, num_samples=500)
    evidence = pvae.log_evidence(moved.model, moved.guide, x, num_samples=2000, proposal="guide", seed=1)
    value, error = found.posterior_kl(evidence)
    exact = kl_divergence(moved.proposal(x), moved.posterior(x))
    assert ((value - exact).abs() < 5 * error).all()
    with pytest.raises(pvae.ArgumentError, match="evidence is of 50 data, and the ELBO of 20"):
        rate_distortion(moved.model, moved.guide, x[:20]).posterior_kl(evidence)


def test_the_identity_holds_for_any_guide_draw_by_draw():
    """As both parts are means over the same draws, log p(x) comes out to 1e-5 however far the guide is off."""
    oracle = linear_gaussian(3, 5, guide_shift=0.7, guide_scale=0.6)
    x = oracle.sample(20)

    def measure(densities, batch, spans):
        latents, log_qz = densities.draw_guide(batch, spans[0])
        log_posterior = oracle.posterior(batch[0]).log_prob(latents.values["z"])
        return (densities.log_pxz(batch, latents) - log_qz).mean(0), (log_qz - log_posterior).mean(0)

    ((elbo, divergence),) = pvae.evidence.map_batches(measure, oracle.model, oracle.guide, x, num_samples=100)
    assert divergence.mean() > 0.5
    torch.testing.assert_close(elbo + divergence, oracle.log_px(x), rtol=0, atol=1e-5)


def test_the_elbo_is_that_of_log_evidence(small_vae, bits):
    """The same draws, whether or not the rate is in closed form."""
    for vae in (small_vae, pvae.VAE(pvae.priors.GaussianMixture(2, 3), small_vae.decoder, small_vae.encoder)):
        found = rate_distortion(vae.model, vae.guide, bits[:40], num_samples=100)
        evidence = pvae.log_evidence(vae.model, vae.guide, bits[:40], num_samples=100, proposal="guide", compile=False)
        torch.testing.assert_close(found.elbo, evidence.elbo, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.elbo_std_error, evidence.elbo_std_error, rtol=1e-3, atol=1e-5)
    assert found.rate_std_error.any()


def test_several_sites_that_depend_on_each_other():
    """q(a|x) q(b|a, x): a's rate is known, b's is known given a, and scatters with it."""
    pair = RowGaussian(1)
    found = rate_distortion(pair.model, pair.guide, pair.row, num_samples=2000)
    exact = kl_divergence(pair.oracle.posterior(pair.row), prior_like(pair.oracle))
    assert 0 < found.rate_std_error < 0.1
    assert (found.rate - exact).abs() < 5 * found.rate_std_error
    torch.testing.assert_close(found.elbo, pair.oracle.log_px(pair.row), rtol=0, atol=1e-6)


def test_pairs_of_any_kind():
    """Data with latents together, and discrete latents that are summed out."""
    x = torch.arange(5.0)
    guide = AutoNormal(shared_mean)
    guide(x)
    found = rate_distortion(shared_mean, guide, x, num_samples=50)
    assert (found.num_together, found.elbo.shape) == (5, (1,))
    torch.testing.assert_close(found.elbo, -found.distortion - found.rate)
    assert "5 data together" in repr(found)

    def mixture(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(4.0 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide_of_z(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    found = rate_distortion(mixture, guide_of_z, x, num_samples=50)
    evidence = pvae.log_evidence(mixture, guide_of_z, x, num_samples=50, proposal="guide", compile=False)
    torch.testing.assert_close(found.elbo, evidence.elbo)
    usage = latent_usage(mixture, guide_of_z, x)
    assert usage.kl.isfinite().all()  # of the marginals: p(z) is a mixture
    assert usage.active.all()


class NotBroadcasting(ModulePair):
    """A pair whose decoder takes rows alone, so that particles are run as copies of the data."""

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z.reshape(len(x), 2))).to_event(1), obs=x)


def test_particles_that_run_as_copies(bits):
    """The same reports, whichever way particles are run."""
    pair, x = ModulePair(), bits[:30]
    copies = NotBroadcasting()
    copies.load_state_dict(pair.state_dict())
    ours, theirs = (rate_distortion(p.model, p.guide, x, num_samples=400) for p in (pair, copies))
    torch.testing.assert_close(ours.rate, theirs.rate)
    errors = torch.hypot(ours.elbo_std_error, theirs.elbo_std_error)
    assert ((ours.elbo - theirs.elbo).abs() < 5 * errors).all()
    ours, theirs = (latent_usage(p.model, p.guide, x) for p in (pair, copies))
    torch.testing.assert_close(ours.kl, theirs.kl)
    torch.testing.assert_close(ours.variance_of_means, theirs.variance_of_means)
    assert ours.names == theirs.names == ("latent[0]", "latent[1]")


def test_the_split_describes_itself(small_vae, bits):
    lines = repr(rate_distortion(small_vae.model, small_vae.guide, bits[:30], num_samples=10)).splitlines()
    assert lines[0] == "ELBO of 30 data, 10 draws each: means, nats per datum"
    assert [line.split()[0] for line in lines[1:]] == ["ELBO", "distortion", "rate"]
    alone = rate_distortion(small_vae.model, small_vae.guide, bits[:1], num_samples=1)
    assert alone.elbo_std_error.isnan().all()
    assert "choice of data" not in repr(alone)


def marginal_kl(oracle, x):
    q = oracle.proposal(x)
    return kl_divergence(dist.Normal(q.mean, q.variance.sqrt()), dist.Normal(0.0, 1.0))


def test_use_of_codes_has_its_closed_forms(caller_state):
    """The divergence of each number exactly, and the mutual information, ``log det(I + W'W / noise^2) / 2``, between
    both estimates with 4 errors to each side: by chance for one in 10,000.
    """
    oracle = linear_gaussian(3, 5)
    x, before = oracle.sample(600), caller_state()
    found = latent_usage(oracle.model, oracle.guide, x, num_samples=10)
    before.assert_unchanged()
    exact_kl = marginal_kl(oracle, x)
    torch.testing.assert_close(found.kl, exact_kl.mean(0))
    torch.testing.assert_close(found.kl_std_error, exact_kl.std(0) / 600**0.5)
    precision = torch.eye(3).double() + oracle.weight.T @ oracle.weight / oracle.noise**2
    exact, error = precision.logdet().item() / 2, found.mutual_information_std_error
    assert found.mutual_information - 4 * error < exact < found.mutual_information_upper + 4 * error
    assert found.mutual_information_upper - found.mutual_information < 0.2
    # Of normal numbers the density's ratio has a variance of the sum of squared canonical correlations.
    squares = 1 - 1 / torch.linalg.eigvalsh(precision)
    assert error == pytest.approx((squares.sum().item() / 600) ** 0.5, rel=0.2)
    assert found.rate == pytest.approx(exact, abs=4 * found.rate_std_error)  # the guide is exact, so q(z) is p(z)
    assert found.aggregate_kl == pytest.approx(0.0, abs=0.15)
    assert found.rate == pytest.approx(found.mutual_information + found.aggregate_kl)
    # Of p(x): the means' covariance is that of z less the posterior's.
    variance = 1 - torch.linalg.inv(precision).diagonal()
    torch.testing.assert_close(found.variance_of_means, variance, rtol=0.25, atol=0)  # sd of 600 data: 6%
    assert found.active.all()
    assert found.verdict == "no collapse: all 3 units are active"
    assert found.names == ("z[0]", "z[1]", "z[2]")
    assert not found.is_saturated


@pytest.mark.filterwarnings("ignore:data. results are in the order")
def test_codes_stay_with_their_data_where_a_loader_shuffles():
    """It is read twice; with other data's codes the mutual information would be far below 0."""
    oracle = linear_gaussian(2, 5)
    x = oracle.sample(60)
    loader = DataLoader(TensorDataset(x), batch_size=20, shuffle=True)
    ordered, shuffled = (latent_usage(oracle.model, oracle.guide, data, num_samples=4) for data in (x, loader))
    error = ordered.mutual_information_std_error + shuffled.mutual_information_std_error
    assert shuffled.mutual_information == pytest.approx(ordered.mutual_information, abs=4 * error)


def test_the_aggregate_posterior_of_a_guide_that_is_off():
    """Off by a constant c in each number: KL(q(z) || p(z)) = |c|^2 / 2, and the mutual information stays."""
    oracle = linear_gaussian(2, 5)
    off = torch.tensor([1.0, -0.5]).double()

    def guide(x):
        exact = oracle.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(exact.loc + off, scale_tril=exact.scale_tril))

    x = oracle.sample(600)
    found, right = (latent_usage(oracle.model, g, x, num_samples=4) for g in (guide, oracle.guide))
    assert found.mutual_information == pytest.approx(right.mutual_information)
    # The mean code of 600 data is off by 1 / sqrt(600) or so, times |c|: 0.05, of which 4; and a bias of 0.05.
    assert found.aggregate_kl == pytest.approx(off.square().sum().item() / 2, abs=0.25)


def test_too_few_data_say_so():
    oracle = linear_gaussian(8, 40, noise=0.05)
    found = latent_usage(oracle.model, oracle.guide, oracle.sample(20), num_samples=4)
    assert found.mutual_information == pytest.approx(math.log(20), abs=0.01)
    assert found.mutual_information_upper > math.log(20)
    assert found.is_saturated
    assert "above which 20 data cannot tell" in repr(found)


@pytest.mark.parametrize("idle", [1, 3])
def test_collapse_is_told_by_name(idle):
    """Units whose guide is the prior, whatever x."""
    oracle = linear_gaussian(3, 5)
    used = torch.arange(3) >= idle

    def guide(x):
        exact = oracle.posterior(x)
        with pyro.plate("data", len(x)):
            scale = torch.where(used, exact.variance.sqrt(), 1.0)
            pyro.sample("z", dist.Normal(torch.where(used, exact.loc, 0.0), scale).to_event(1))

    found = latent_usage(oracle.model, guide, oracle.sample(100), num_samples=4)
    assert found.active.tolist() == used.tolist()
    assert found.is_collapsed == (idle == 3)
    assert (found.kl[:idle] == 0).all()
    if idle == 1:
        assert found.verdict.startswith("inactive: 1 of 3 units (z[0]); the others are in use.")
    else:
        assert found.verdict.startswith("posterior collapse: all 3 units are inactive (z[0], z[1], z[2])")
        assert found.mutual_information == pytest.approx(0.0, abs=1e-12)
    assert "nats and say nothing" not in found.verdict


def test_a_unit_that_costs_and_says_nothing_is_told():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full_like(x, 2.0), 1.0))

    found = latent_usage(model, guide, torch.randn(30))
    assert found.names == ("z",)
    assert "Of these 1 cost more than 0.1 nats" in found.verdict
    assert found.kl.item() == pytest.approx(2.0)
    assert found.aggregate_kl == pytest.approx(2.0, abs=1e-5)


def test_scatter_of_estimated_means_is_no_activity():
    """Means of 4 draws of variance 2 scatter by 0.5, which is taken out: up to 4 times 0.05 for 400 data."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Laplace(torch.zeros_like(x), 1.0))

    assert latent_usage(model, guide, torch.zeros(400), num_samples=4).variance_of_means < 0.2


def test_marginals_of_what_has_no_density_for_each_number():
    """A mixture prior of equal components is a normal one: spacings are within 0.1 of the closed form."""
    oracle = linear_gaussian(2, 5)
    parts = dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2).double()), parts))
            pyro.sample("x", dist.Normal(z @ oracle.weight.T + oracle.bias, oracle.noise).to_event(1), obs=x)

    x = oracle.sample(60)
    found = latent_usage(model, oracle.guide, x, num_samples=200)
    torch.testing.assert_close(found.kl, marginal_kl(oracle, x).mean(0), rtol=0, atol=0.1)


def test_marginals_beyond_all_draws_of_the_prior():
    """They are known up to the logarithm of the number of draws, 8.3, and no further; without a warning."""
    oracle = linear_gaussian(2, 5)
    parts = dist.Normal(torch.zeros(2, 2).double(), 1.0).to_event(1)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2).double()), parts))
            pyro.sample("x", dist.Normal(z @ oracle.weight.T, oracle.noise).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor([9.0, 2.0]).double(), 0.5).to_event(1))

    found = latent_usage(model, guide, oracle.sample(5), num_samples=200)
    near = kl_divergence(dist.Normal(2.0, 0.5), dist.Normal(0.0, 1.0)).item()
    assert found.kl[0].item() == pytest.approx(math.log(4000), abs=0.2)
    assert found.kl[1].item() == pytest.approx(near, abs=0.15)


def test_flows_have_marginals():
    vae, x = pvae.VAE.mlp(6, 2, [8]), (torch.rand(30, 6) < 0.5).float()
    flow = pvae.VAE(vae.prior, vae.decoder, InverseAutoregressive(pvae.networks.mlp(6, [8], 6), 2))

    def measure(densities, batch, spans):
        return pvae.evidence.draw_entries(densities, batch, spans[0])

    (entries,) = pvae.evidence.map_batches(measure, flow.model, flow.guide, x, num_samples=5)
    assert torch.equal(entries.means, entries.values)  # its own ``mean`` is not E[z|x]
    found = latent_usage(flow.model, flow.guide, x)
    assert found.kl.isfinite().all()
    assert (found.kl >= 0).all()


def test_what_has_no_codes_is_refused(small_vae, bits):
    with pytest.raises(pvae.DataError, match="at least two"):
        latent_usage(small_vae.model, small_vae.guide, bits[:1])
    with pytest.raises(pvae.ArgumentError, match="num_samples"):
        latent_usage(small_vae.model, small_vae.guide, bits, num_samples=0)

    with pytest.raises(pvae.ProgramError, match="codes of single data are not defined"):
        latent_usage(shared_mean, shared_mean_guide, torch.zeros(4))


@pytest.mark.parametrize("report", [rate_distortion, latent_usage])
def test_densities_that_are_nan_are_an_error(report):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * torch.nan, 1.0, validate_args=False))

    with pytest.raises(pvae.NumericalError, match="log-weights are nan"):
        report(model, guide, torch.zeros(5))


def test_one_draw_tells_no_scatter():
    oracle = linear_gaussian(1, 2)
    with pytest.raises(pvae.ArgumentError, match="num_samples must be at least 2"):
        latent_usage(oracle.model, oracle.guide, oracle.sample(5), num_samples=1)


def test_masked_latents_have_a_rate_and_no_mutual_information():
    """Those of other data have no density under a masked one."""

    def model(x, is_there):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=is_there.bool()):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, is_there):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=is_there.bool()):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    x, is_there = torch.randn(40), torch.arange(40.0) % 4
    found = latent_usage(model, guide, (x, is_there.clamp(max=1)))
    exact = kl_divergence(dist.Normal(x / 2, 0.7), dist.Normal(0.0, 1.0)) * (is_there > 0)
    assert found.rate == pytest.approx(exact.mean().item(), abs=0.1)  # of 4000 draws, each by 0.5 or so: 0.01
    assert math.isnan(found.mutual_information)
    assert "nan" in repr(found)
    everything = latent_usage(model, guide, (x, torch.ones(40)))
    assert everything.mutual_information > 0.1
