"""What ArviZ reads: the groups, their names, and its own numbers from them, in every version that is installed."""

from __future__ import annotations

import arviz
import numpy as np
import pyro
import pytest
import torch
import xarray
from helpers import process_state
from matplotlib import pyplot
from pyro import distributions as dist
from pyro.infer import autoguide as auto

import pvae
from pvae.evidence.pareto import smooth_tail
from pvae.testing import linear_gaussian

PARALLEL = {"enumerate": "parallel"}
GROUPS = {
    *("posterior", "log_likelihood", "posterior_predictive", "sample_stats", "prior", "prior_predictive"),
    "observed_data",
}
# So that 3 sqrt(K) is a whole number: versions of ArviZ round the length of the tail up or down.
DRAWS = 900
HAS_TREES = "InferenceData" not in vars(arviz)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def groups_of(data):
    return set(data.children) if HAS_TREES else set(data.groups())


def khats_by_arviz(log_weights):
    """PSIS, which is given log-weights by one version and their negatives by the other."""
    if not HAS_TREES:
        return arviz.psislw(log_weights.stack(__sample__=("chain", "draw")))[1]
    return (-log_weights).azstats.psislw(dim=["chain", "draw"])[1]


@pytest.fixture(scope="module")
def oracle():
    return linear_gaussian(2, 5, guide_shift=0.5, guide_scale=1.3)


@pytest.fixture(scope="module")
def x(oracle):
    return oracle.sample(8)


@pytest.fixture(scope="module")
def data(oracle, x):
    names = {"factor": ["size", "slant"], "datum": [f"datum {n}" for n in range(8)]}
    return pvae.to_arviz(oracle.model, oracle.guide, x, num_samples=DRAWS, dims={"z": ["factor"]}, coords=names)


def test_groups_have_named_dimensions(data):
    assert groups_of(data) == GROUPS
    assert data["posterior"]["z"].dims == data["prior"]["z"].dims == ("chain", "draw", "datum", "factor")
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "datum", "x_dim_0")
    assert data["observed_data"]["x"].dims == ("datum", "x_dim_0")
    assert data["log_likelihood"]["x"].dims == data["sample_stats"]["log_weight"].dims == ("chain", "draw", "datum")
    assert data["sample_stats"]["khat"].dims == ("datum",)
    assert data["posterior"]["z"].sel(datum="datum 3", factor="slant").shape == (1, DRAWS)
    assert data["posterior"].attrs == {"inference_library": "pvae", "proposal": "guide", "seed": 0}


def test_the_posterior_is_the_exact_one(data, oracle, x):
    summary = arviz.summary(data, var_names=["z"], round_to="none")
    exact = oracle.posterior(x)
    # 16 means of at least 300 effective draws.
    error = 4.5 * (exact.stddev.max() / 300**0.5).item()
    np.testing.assert_allclose(summary["mean"].to_numpy(float), exact.mean.flatten(), atol=error)
    np.testing.assert_allclose(summary["sd"].to_numpy(float), exact.stddev.flatten(), rtol=0.25)


def test_khats_by_arviz_are_ours(data):
    stats = data["sample_stats"]
    theirs = khats_by_arviz(stats["log_weight"]).to_numpy()
    np.testing.assert_allclose(theirs, stats["khat"].to_numpy(), atol=0.05)
    assert stats["is_resampled"].all()


def test_loo_by_arviz_is_ours(oracle, x):
    """Ours: ``log sum_k s_k p(x | z_k) / sum_k s_k``, s being ``1 / p(x | z_k)`` with a smooth tail.

    Draws that are resampled come several times: where they are at the threshold, ArviZ 0.x leaves all of them out.
    """
    data = pvae.to_arviz(oracle.model, oracle.guide, x, num_samples=DRAWS, resample=False)
    log_likelihood = torch.from_numpy(data["log_likelihood"]["x"].to_numpy()[0])
    smooth = smooth_tail(-log_likelihood)
    ours = (smooth + log_likelihood).logsumexp(0) - smooth.logsumexp(0)
    theirs = arviz.loo(data, pointwise=True)
    pointwise = theirs.elpd_i if HAS_TREES else theirs.loo_i
    np.testing.assert_allclose(np.asarray(pointwise), ours, rtol=0, atol=1e-6)


def test_netcdf_gives_everything_back(data, tmp_path):
    data.to_netcdf(tmp_path / "data.nc")
    read = arviz.from_netcdf(tmp_path / "data.nc")
    assert groups_of(read) == GROUPS
    for group in GROUPS:
        ours, theirs = (one[group].to_dataset() if HAS_TREES else one[group] for one in (data, read))
        xarray.testing.assert_equal(theirs.load(), ours)


def test_predictive_checks_can_be_drawn(data):
    before = dict(pyplot.rcParams)
    if HAS_TREES:
        plots = arviz.plot_ppc_dist(data, num_samples=20, backend="matplotlib")
        assert plots.viz["figure"].item() is not None
    else:
        axes = arviz.plot_ppc(data, num_pp_samples=20)
        assert np.atleast_1d(axes)[0].lines
    pyplot.close("all")
    assert dict(pyplot.rcParams) == before


def test_a_trained_vae_with_its_history():
    bits = draws(60, 6).sign().clamp(min=0)
    vae = pvae.VAE.mlp(6, 2, [8])
    result = pvae.fit(vae.model, vae.guide, bits, epochs=3, progress=False)
    before = process_state()
    data = pvae.to_arviz(vae.model, vae.guide, bits[:9], num_samples=200, resample=False, result=result)
    after = process_state()
    assert {name for name in before if before[name] != after[name]} <= {"warnings", "environment"}  # by ArviZ's import
    np.testing.assert_array_equal(data["fit"]["elbo"], result.history["elbo"])
    assert not data["sample_stats"]["is_resampled"].any()
    assert (data["sample_stats"]["chosen"] == data["sample_stats"]["draw"]).all()
    assert data["observed_data"]["x"].shape == (9, 6)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.Gamma(4.0, 8.0))
    with pyro.plate("observations", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), noise), obs=y)


def test_latents_of_all_data_and_loo_of_each():
    """Somebody's regression with an automatic guide: draws have no datum, and likelihoods have one."""
    x = draws(30, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 0.5 * draws(30, 3)[:, 2]
    guide = auto.AutoMultivariateNormal(regression)
    pvae.fit(regression, guide, (x, y), epochs=300, batch_size=30, lr=0.03, progress=False)
    data = pvae.to_arviz(regression, guide, (x, y), num_samples=500, dims={"w": ["slope"]})
    assert data["posterior"]["w"].dims == ("chain", "draw", "slope")
    assert data["posterior"]["noise"].dims == data["sample_stats"]["log_weight"].dims == ("chain", "draw")
    assert data["log_likelihood"]["y"].dims == data["posterior_predictive"]["y"].dims == ("chain", "draw", "datum")
    assert data["sample_stats"]["khat"].dims == ()
    posterior, stats = data["posterior"], data["sample_stats"]
    mean = torch.from_numpy(posterior["w"].to_numpy()[0]) @ x.T
    noise = torch.from_numpy(posterior["noise"].to_numpy()[0])[:, None]
    expected = dist.Normal(mean, noise).log_prob(y)
    np.testing.assert_allclose(data["log_likelihood"]["y"].to_numpy()[0], expected, rtol=1e-3, atol=1e-4)
    assert stats["is_resampled"]
    loo = arviz.loo(data)
    # Three parameters, of which data leave none to the prior.
    assert 1 < (loo.p if HAS_TREES else loo.p_loo) < 6


def test_discrete_latents_plates_and_names_that_are_taken():
    def model(x):
        with pyro.plate("draw", 3):
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("items", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3), infer=PARALLEL)
            pyro.sample("x", dist.Normal(pyro.ops.indexing.Vindex(mean)[..., k], 1.0), obs=x)

    def guide(x):
        with pyro.plate("draw", 3):
            pyro.sample("mean", dist.Normal(0.0, 3.0))

    data = pvae.to_arviz(model, guide, draws(5), num_samples=40, resample=False)
    assert data["posterior"]["mean"].dims == ("chain", "draw", "draw_plate")
    assert data["posterior"]["k"].dims == ("chain", "draw", "datum")
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "datum")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dims": {"y": ["a"]}}, r"there is no site 'y'; the sites are \['x', 'z'\]"),
        ({"dims": {"z": ["a", "b"]}}, r"site 'z' needs 1 different names.*got \['a', 'b'\]"),
        ({"dims": {"z": ["draw"]}}, r"site 'z' needs 1 different names"),
        ({"dims": {"z": ["x"]}}, r"site 'z' needs 1 different names.*'x'"),
        ({"coords": {"datum": 8}}, r"'datum' has 8 entries, and labels of shape \(\) were given"),
        ({"coords": {"factor": [1, 2]}}, r"there is no dimension 'factor'; the dimensions are"),
        ({"coords": {"datum": [1, 2]}}, r"'datum' has 8 entries, and 2 labels were given"),
        ({"result": 3}, r"result must be what pvae.fit returned, got int"),
        ({"proposal": "auto"}, r"proposal='auto' has no weights of one proposal"),
    ],
)
def test_names_that_do_not_fit(oracle, x, options, words):
    with pytest.raises(pvae.ArgumentError, match=words):
        pvae.to_arviz(oracle.model, oracle.guide, x, num_samples=30, resample=False, **options)


def pair_of(latent, observed):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(latent, dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample(observed, dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(latent, dist.Normal(x / 2, 0.7).to_event(1))

    return model, guide


def test_names_with_slashes_are_no_folders(tmp_path):
    """As of sites in a ``pyro.contrib.autoname.scope``."""
    data = pvae.to_arviz(*pair_of("top/z", "top/x"), draws(4, 2), num_samples=30, resample=False)
    assert data["posterior"]["top.z"].dims == ("chain", "draw", "datum", "top.z_dim_0")
    data.to_netcdf(tmp_path / "data.nc")
    read = arviz.from_netcdf(tmp_path / "data.nc")
    assert read["log_likelihood"]["top.x"].shape == (1, 30, 4)
    assert read["observed_data"]["top.x"].shape == (4, 2)


@pytest.mark.parametrize("names", [("datum", "x"), ("z", "draw")])
def test_sites_with_names_of_dimensions_are_refused(names):
    with pytest.raises(pvae.ProgramError, match="has the name of a dimension"):
        pvae.to_arviz(*pair_of(*names), draws(4, 2), num_samples=30, resample=False)
