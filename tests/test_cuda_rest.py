"""What test_cuda.py leaves: every other public function once, with a model on the GPU. Skipped where there is none."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import arviz
import matplotlib
import numpy as np
import pytest
import torch

import pvae
from pvae import diagnostics, evidence, plots, priors
from pvae.estimator import VAEDensity
from pvae.evidence.proposals import Refined

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*k-hat above"),  # of models that were hardly trained
]
matplotlib.use("agg")
DEVICE = "cuda"
FIT = {"epochs": 1, "batch_size": 40, "device": DEVICE, "compile": False, "progress": False}
EVIDENCE = {"num_samples": 60, "device": DEVICE}

generator = torch.Generator().manual_seed(0)
GREY = torch.rand(80, 4, 4, generator=generator)
BITS = (torch.rand(80, 4, 4, generator=generator) < GREY).float()
NUMBERS = torch.randn(80, 4, 4, generator=generator)
COUNTS = (9 * GREY).floor()
LABELS = torch.randint(3, (80,), generator=generator)
PLACES = pytest.mark.parametrize("place", ["cpu", DEVICE])  # of data; the model is on the GPU

DATA = {
    "bernoulli": BITS,
    "continuous-bernoulli": GREY,
    "gaussian": NUMBERS,
    "gaussian-per-pixel": NUMBERS,
    "laplace": NUMBERS,
    "student-t": NUMBERS,
    "discretized-logistic": (255 * GREY).round() / 255,
    "discretized-logistic-per-pixel": (255 * GREY).round() / 255,
    "poisson": COUNTS,
    "negative-binomial": COUNTS,
}


def trained(model, *data):
    """A model that `pvae.fit` has moved to the GPU."""
    torch.manual_seed(0)
    pvae.fit(model.model, model.guide, data if len(data) > 1 else data[0], **FIT)
    assert all(t.device.type == DEVICE for t in [*model.parameters(), *model.buffers()])
    return model


@pytest.fixture
def vae():
    """Of bits, on the GPU."""
    torch.manual_seed(0)
    return trained(pvae.VAE.mlp((4, 4), 2, [8]), BITS)


def same(ours, theirs):
    """What the GPU and the CPU give, up to rounding."""
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


def finite(*tensors):
    for tensor in tensors:
        assert torch.as_tensor(tensor).isfinite().all()


def same_parts(model, *data):
    """That encoder, decoder and prior are the same on both devices; data are on the CPU."""
    on_cpu = copy.deepcopy(model).cpu()
    z = torch.randn(len(data[0]), model.latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same(model.encode(*data).mean, on_cpu.encode(*data).mean)
        same(model.reconstruct(*data), on_cpu.reconstruct(*data))
        log_qz = model.encode(*data).log_prob(z.to(DEVICE))
        same(log_qz, on_cpu.encode(*data).log_prob(z))
        return z, on_cpu


@pytest.mark.parametrize("likelihood", pvae.likelihoods.NAMED)
def test_every_likelihood(likelihood):
    x = DATA[likelihood]
    vae = trained(pvae.VAE.mlp((4, 4), 2, [8], likelihood), x)
    z, on_cpu = same_parts(vae, x)
    with torch.no_grad():
        same(vae.decode(z).mean, on_cpu.decode(z).mean)
        same(vae.decode(z).log_prob(x.to(DEVICE)), on_cpu.decode(z).log_prob(x))
    finite(vae.sample(5, seed=0), vae.sample(5, seed=0, mean=True))
    assert torch.equal(vae.sample(5, seed=0), vae.sample(5, seed=0))
    finite(pvae.log_evidence(vae.model, vae.guide, x, **EVIDENCE).log_px)
    if likelihood == "gaussian":
        vae.find_units(x)


@pytest.mark.parametrize("prior", priors.NAMED)
@pytest.mark.parametrize("posterior", pvae.posteriors.NAMED)
def test_every_prior_and_posterior(prior, posterior):
    if prior == "vamp" and posterior == "iaf":
        pytest.skip("takes D passes for each of 100 pseudo-inputs")
    vae = trained(pvae.VAE.mlp((4, 4), 3, [8], prior=prior, posterior=posterior), BITS)
    z, on_cpu = same_parts(vae, BITS)
    with torch.no_grad():
        same(vae.prior().log_prob(z.to(DEVICE)), on_cpu.prior().log_prob(z))
    finite(vae.sample(5, seed=0))
    for proposal in ("guide",) if prior == "vamp" else ("guide", "auto"):
        estimate = pvae.log_evidence(vae.model, vae.guide, BITS[:20], proposal=proposal, **EVIDENCE)
        assert estimate.log_px.device.type == "cpu"
        finite(estimate.log_px)


@PLACES
def test_a_vamp_prior_of_data(place):
    encoder = pvae.posteriors.DiagonalNormal(pvae.networks.mlp((4, 4), [8], 4)).to(DEVICE)
    decoder = pvae.likelihoods.Bernoulli(pvae.networks.mlp(2, [8], (4, 4))).to(DEVICE)
    prior = priors.VampPrior.from_data(encoder, BITS[:10].to(place), bounds=(0, 1))
    vae = pvae.VAE(prior, decoder, encoder)
    finite(vae.sample(3, seed=0), vae.prior.pseudo_inputs())


@pytest.mark.parametrize("network", ["plain", "residual"])
def test_convolutions(network):
    vae = trained(pvae.VAE.conv((1, 4, 4), 2, [4], 8, network=network), BITS[:, None])
    finite(vae.sample(2, seed=0), vae.reconstruct(BITS[:, None]))


def test_a_saved_model_is_read_on_the_cpu(vae, tmp_path):
    vae.save(tmp_path / "vae")
    loaded = pvae.VAE.load(tmp_path / "vae")
    assert next(loaded.parameters()).device.type == "cpu"
    same(vae.reconstruct(BITS), loaded.reconstruct(BITS))


@PLACES
@pytest.mark.parametrize("kind", ["labels", "covariates", "conditional prior"])
def test_conditional(kind, place):
    options = {"num_covariates": 3} if kind == "covariates" else {"num_classes": 3}
    y = torch.nn.functional.one_hot(LABELS, 3).float() if kind == "covariates" else LABELS
    x, y = BITS.to(place), y.to(place)
    vae = trained(
        pvae.ConditionalVAE.mlp((4, 4), 2, [8], has_conditional_prior=kind == "conditional prior", **options), x, y
    )
    same_parts(vae, x.cpu(), y.cpu())
    finite(vae.sample(y[:5], seed=0), vae.reconstruct(x, y, y.flip(0)), vae.decode(torch.zeros(80, 2), y).mean)
    finite(pvae.log_evidence(vae.model, vae.guide, (x, y), **EVIDENCE).log_px)
    finite(evidence.posterior_predictive(vae.model, vae.guide, (x, y), **EVIDENCE).draws["x"])


@PLACES
def test_semi_supervised(place):
    x, y = BITS.to(place), LABELS.where(torch.arange(80) % 2 == 0, -1).to(place)
    vae = trained(pvae.SemiSupervisedVAE.mlp((4, 4), 2, [8], num_classes=3, class_weights=[1, 2, 3]), x, y)
    pvae.fit(vae.model, vae.guide, (x, y), objective=vae.objective(0.1), **FIT)
    same(vae.predict(x), copy.deepcopy(vae).cpu().predict(x.cpu()))
    finite(vae.sample(LABELS[:5].to(place), seed=0))
    finite(pvae.log_evidence(vae.model, vae.guide, (x, y), **EVIDENCE).log_px)
    drawn = evidence.weighted_draws(vae.model, vae.guide, (x, y), **EVIDENCE)
    assert drawn.latents["y"].device.type == "cpu"
    finite(pvae.to_arviz(vae.model, vae.guide, (x, y), **EVIDENCE)["posterior"]["z"].to_numpy())


@PLACES
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "poisson"])
def test_masked(likelihood, place):
    holes = torch.rand(80, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.3
    x, mask = pvae.MaskedVAE.from_nan(DATA[likelihood].masked_fill(holes, torch.nan).to(place))
    vae = trained(pvae.MaskedVAE.mlp((4, 4), 2, [8], likelihood), x, mask)
    same_parts(vae, x.cpu(), mask.cpu())
    finite(vae.sample(3, seed=0), vae.impute(x, mask, 20), vae.impute(x, mask, 20, draws=2))
    finite(pvae.log_evidence(vae.model, vae.guide, (x, mask), **EVIDENCE).log_px)
    finite(evidence.posterior_predictive(vae.model, vae.guide, (x, mask), **EVIDENCE).latents["z"])


def test_hierarchical():
    vae = trained(pvae.HierarchicalVAE.mlp((4, 4), (3, 2), ((8,), (8,))), BITS)
    same(vae.reconstruct(BITS), copy.deepcopy(vae).cpu().reconstruct(BITS))
    finite(vae.sample(3, seed=0), pvae.log_evidence(vae.model, vae.guide, BITS, **EVIDENCE).log_px)
    finite(diagnostics.latent_usage(vae.model, vae.guide, BITS, num_samples=20, device=DEVICE).kl)


def test_autoencoder():
    coder = trained(pvae.Autoencoder.mlp((4, 4), 2, [8], "gaussian", noise=pvae.networks.GaussianNoise(0.3)), NUMBERS)
    on_cpu = copy.deepcopy(coder).cpu()
    with torch.no_grad():
        same(coder.eval().encode(NUMBERS), on_cpu.eval().encode(NUMBERS))
    same(coder.reconstruct(NUMBERS), on_cpu.reconstruct(NUMBERS))


@pytest.mark.filterwarnings("ignore:log p.x. of .* is unresolved")  # so few draws
@pytest.mark.parametrize("early_stopping", [False, True])
def test_density_estimator(early_stopping):
    x = NUMBERS.flatten(1).numpy()
    options = {"max_epochs": 2, "n_samples": 50, "device": DEVICE, "random_state": 0, "early_stopping": early_stopping}
    model = VAEDensity(2, hidden_layer_sizes=(8,), **options).fit(x)
    finite(model.score_samples(x), model.inverse_transform(model.transform(x)), model.sample(3, 0), model.score(x))
    again = pickle.loads(pickle.dumps(model))
    assert next(model.vae_.parameters()).device.type == DEVICE
    assert next(again.vae_.parameters()).device.type == "cpu"
    np.testing.assert_allclose(again.transform(x), model.transform(x), rtol=1e-4, atol=1e-4)
    finite(VAEDensity(2, proposal="guide", **options).fit(x).score(x))


# --- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)])
def test_reports_of_codes_wherever_they_are(first, second):
    codes, others = NUMBERS.flatten(1)[:, :2], GREY.flatten(1)[:, :2]
    ours, theirs = codes.to(first), others.to(second)
    found, expected = diagnostics.coverage(ours, theirs), diagnostics.coverage(codes, others)
    close = {"abs": 0.02}  # distances that differ by rounding alone may come in another order
    assert (found.precision, found.recall) == pytest.approx((expected.precision, expected.recall), **close)
    assert diagnostics.retrieval(ours, LABELS.to(second)) == pytest.approx(
        diagnostics.retrieval(codes, LABELS), **close
    )
    expected = diagnostics.classification(codes, LABELS, others, LABELS)
    for a, b in ((first, second), (second, first)):
        assert diagnostics.classification(ours, LABELS.to(a), theirs, LABELS.to(b)) == pytest.approx(expected, **close)
    same(diagnostics.interpolate(ours, theirs, 3), diagnostics.interpolate(codes, others, 3))


@PLACES
def test_models_side_by_side(vae, place):
    coder = trained(pvae.Autoencoder.mlp((4, 4), 2, [8]), BITS)
    data = (BITS.to(place), LABELS.to(place)), (BITS[:40].to(place), LABELS[:40].to(place))
    state = torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
    found = diagnostics.side_by_side({"vae": vae, "coder": coder}, *data)
    assert found.rows == diagnostics.side_by_side({"vae": vae, "coder": coder}, *data).rows
    assert torch.equal(state, torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state())
    finite([list(row.values()) for row in found.rows.values()])


@PLACES
def test_reports_of_a_pair(vae, place, figures_closed):
    pair, x = (vae.model, vae.guide), BITS.to(place)
    found = diagnostics.simulation_based_calibration(
        *pair, x, num_simulations=40, num_draws=15, num_samples=40, device=DEVICE
    )
    finite(found.p_value)
    assert found.ranks.device.type == "cpu"
    parts = diagnostics.gaps(*pair, x[:20], num_samples=50, refined=Refined(full=False, steps=5), device=DEVICE)
    finite(parts.approximation, parts.amortization)
    rates = diagnostics.rate_distortion(*pair, x, num_samples=50, device=DEVICE)
    estimate = pvae.log_evidence(*pair, x, **EVIDENCE)
    finite(rates.rate, rates.distortion, *rates.posterior_kl(estimate))
    usage = diagnostics.latent_usage(*pair, x, num_samples=20, device=DEVICE)
    finite(usage.kl, usage.mutual_information, usage.mutual_information_upper)
    other = pvae.log_evidence(*pair, x, **EVIDENCE, proposal="guide", seed=1)
    table = diagnostics.compare_models({"a": estimate, "b": other})
    finite(table.difference, pvae.compare(estimate, other).difference)
    ood = diagnostics.out_of_distribution(pvae.log_evidence(*pair, 1 - x, **EVIDENCE, seed=2), estimate)
    finite(ood.auroc, ood.percentile, ood.percentile_std_error)
    assert all(map(repr, (found, parts, rates, usage, table, ood)))
    plots.ranks(found)
    plots.gap_decomposition(parts)
    plots.comparison(table)
    plots.kl_per_dimension(usage)
    plots.reliability(estimate)


@pytest.mark.parametrize("prior, posterior", [("mixture", "diagonal"), ("flow", "full"), ("standard-normal", "iaf")])
def test_usage_of_latents_whose_divergences_are_not_in_closed_form(prior, posterior):
    vae = trained(pvae.VAE.mlp((4, 4), 2, [8], prior=prior, posterior=posterior), BITS)
    finite(diagnostics.latent_usage(vae.model, vae.guide, BITS[:20], num_samples=30, device=DEVICE).kl)


@PLACES
def test_draws_predictions_and_bounds(vae, place):
    pair, x = (vae.model, vae.guide), BITS[:20].to(place)
    weighted = evidence.weighted_draws(*pair, x, **EVIDENCE, proposal="refined")
    finite(weighted.latents["z"], weighted.ess)
    log_weights = pvae.log_weights(*pair, x, **EVIDENCE)
    finite(*evidence.iwae_bounds(log_weights, [1, 10]), *evidence.iwae_bounds(log_weights.to(DEVICE), [1, 10]))
    for predictive in (
        evidence.posterior_predictive(*pair, x, **EVIDENCE),
        evidence.prior_predictive(*pair, x, **EVIDENCE),
    ):
        assert predictive.draws["x"].device.type == "cpu"
        assert set(predictive.draws["x"].unique().tolist()) <= {0.0, 1.0}
        same(predictive.data["x"], x.cpu())
    on_cpu = copy.deepcopy(vae).cpu()
    exact = evidence.gauss_hermite(*pair, x, device=DEVICE)
    same(exact.log_px, evidence.gauss_hermite(on_cpu.model, on_cpu.guide, x.cpu(), device="cpu").log_px)
    bracket = evidence.bidirectional_monte_carlo(
        *pair, x, num_samples=4, proposal=evidence.proposals.Annealed(temperatures=5), device=DEVICE
    )
    finite(bracket.lower, bracket.upper, *bracket.data)
    found = evidence.reference(
        *pair, x[:4], target_std_error=0.5, num_chains=25, temperatures=5, num_simulated=2, device=DEVICE
    )
    finite(found.log_px)
    assert repr(found)


@PLACES
def test_to_arviz(place):
    vae = pvae.VAE.mlp((4, 4), 2, [8])
    x = BITS[:20].to(place)
    result = pvae.fit(vae.model, vae.guide, x, **FIT)
    data = pvae.to_arviz(vae.model, vae.guide, x, result=result, proposal=Refined(), **EVIDENCE)
    np.testing.assert_array_equal(data["observed_data"]["x"].to_numpy(), x.cpu().numpy())
    finite(data["posterior"]["z"].to_numpy(), data["log_likelihood"]["x"].to_numpy())
    assert arviz.summary(data, var_names=["z"], kind="stats").shape[0] == 40


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_plots(vae, figures_closed):
    x = BITS.to(DEVICE)
    codes = vae.encode(x).mean  # with gradients, on the GPU
    log_weights = pvae.log_weights(vae.model, vae.guide, x[:1], **EVIDENCE)[:, 0].to(DEVICE)
    result = pvae.fit(vae.model, vae.guide, x, validation=x, **FIT)
    density = torch.distributions.Normal(torch.zeros((), device=DEVICE), 1.0)

    def log_density(z, *given):
        return density.log_prob(z.to(DEVICE))

    plots.images(x[:8])
    plots.samples(vae.sample(8, seed=0))
    plots.reconstructions(x[:4], vae.reconstruct(x[:4]))
    plots.reconstructions(BITS[:4], vae.reconstruct(x[:4]))
    labels = {"labels": LABELS[:2].to(DEVICE), "found_labels": torch.zeros(2, 3, dtype=torch.int64)}
    plots.neighbors(x[:2], BITS[:6].unflatten(0, (2, 3)), **labels)
    plots.manifold(vae.decode, size=3)
    plots.interpolation(vae.decode, codes[0], codes[1].cpu(), num_steps=3)
    plots.traversals(vae.decode, codes[0], values=(-1, 1))
    plots.latent_map(codes, LABELS.to(DEVICE))
    plots.latent_plane({"guide": codes, "prior": torch.zeros(3, 2)})
    plots.kl_per_dimension(codes.square())
    plots.weight_histogram({"guide": log_weights, "prior": log_weights.cpu()})
    plots.running_estimate({"guide": log_weights})
    plots.learning_curve(result)
    draws = torch.tensor([-1.0, 1.0], device=DEVICE)
    shown = {"prior_draws": draws, "guide_draws": draws, "x_range": (-2, 2)}
    plots.prior_against_guide(log_density, log_density, log_density, 0.5, **shown)


@PLACES
@pytest.mark.parametrize("make", [pvae.VAE.mlp, pvae.VAE.conv], ids=["mlp", "conv"])
def test_explorer(make, place, tmp_path):
    shape, hidden = ((4, 4), [8]) if make == pvae.VAE.mlp else ((1, 4, 4), [4])
    x = BITS[:12].reshape(12, *shape)
    vae = trained(make(shape, 3, hidden, likelihood="gaussian"), x)
    draws = {"num_samples": 20, "num_prior_samples": 60, "budget_seconds": 1.0, "device": DEVICE}
    for plane in ("active", "principal"):
        labels = LABELS[:12].to(place)
        path = pvae.explorer.write_explorer(vae, x.to(place), labels, tmp_path / "page.html", plane=plane, **draws)
        assert path.stat().st_size > 10_000


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_bits_are_drawn_where_the_data_are():
    x = GREY.to(DEVICE)
    assert pvae.datasets.fresh_bits(x).device == x.device
    bits = [pvae.datasets.binarize(x, "static", seed=1) for _ in range(2)]
    assert torch.equal(*bits)
    vae = pvae.VAE.mlp((4, 4), 2, [8])
    pvae.fit(vae.model, vae.guide, GREY, transform=pvae.datasets.fresh_bits, **FIT)


def test_pairs_in_closed_form():
    pair = pvae.testing.linear_gaussian(2, 5, guide_scale=1.2)
    there = replace(pair, weight=pair.weight.to(DEVICE), bias=pair.bias.to(DEVICE))
    x = there.sample(20, seed=0)
    same(x, pair.sample(20, seed=0))
    same(there.log_px(x), pair.log_px(x.cpu()))
    same(there.elbo(x), pair.elbo(x.cpu()))
    estimate = pvae.log_evidence(there.model, there.guide, x)  # without modules, where the data are
    assert ((estimate.log_px - pair.log_px(x.cpu())).abs() < 6 * estimate.std_error).all()
    read = torch.utils.data.TensorDataset(x.cpu()), torch.utils.data.StackDataset(x.cpu())
    for data in read:  # without a device of its own
        found = evidence.gauss_hermite(pair.model, pair.guide, data, num_nodes=8)
        same(found.log_px, pair.log_px(x.cpu()))
    two = pvae.testing.TwoModes(there)
    finite(two.posterior(x).log_prob(torch.zeros(2, dtype=x.dtype, device=DEVICE)), two.log_px(x))
    finite(pvae.log_evidence(two.model, two.guide, x, num_samples=50).log_px)
