"""Several estimates held against each other: models of the same data, and data of another kind."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pytest
import torch
from pyro import distributions as dist
from scipy.stats import mannwhitneyu

import pvae
from pvae.diagnostics import compare_models, out_of_distribution
from pvae.testing import linear_gaussian


def estimate(oracle, x, seed=0, num_samples=200):
    return pvae.log_evidence(oracle.model, oracle.guide, x, num_samples=num_samples, proposal="guide", seed=seed)


@pytest.fixture(scope="module")
def right():
    return linear_gaussian(3, 5, guide_scale=1.2)


@pytest.fixture(scope="module")
def table(right):
    x = right.sample(200)
    models = {"wide": replace(right, noise=0.7), "right": right, "twin": right, "far": linear_gaussian(2, 5, seed=3)}
    return models, x, compare_models({name: estimate(m, x, i) for i, (name, m) in enumerate(models.items())})


def test_models_are_ordered_with_exact_differences(table):
    """Means and differences within 5 Monte Carlo errors of the exact ones."""
    models, x, found = table
    assert found.names[2:] == ["wide", "far"]
    assert set(found.names[:2]) == {"right", "twin"}
    exact = {name: model.log_px(x) for name, model in models.items()}
    best = exact[found.names[0]]
    means, differences = (found.mean, found.mean_std_error), (found.difference, found.difference_std_error)
    numbers = zip(found.names, *means, *differences, strict=True)
    for name, mean, error, difference, difference_error in numbers:
        assert abs(mean - exact[name].mean().item()) < 5 * error + 1e-9
        assert abs(difference - (exact[name] - best).mean().item()) < 5 * difference_error + 1e-9
    paired = (exact["wide"] - best).std().item() / 200**0.5
    assert found.difference_data_std_error[2] == pytest.approx(paired, rel=0.1)
    assert found.difference_data_std_error[2] < 0.5 * found.data_std_error[2]  # the same data are in both
    assert (found.difference[0], found.difference_std_error[0], found.difference_data_std_error[0]) == (0, 0, 0)
    assert found.close == found.names[:2]
    assert found.unresolved == [0] * 4


def test_the_best_mixture_is_found(table):
    found = table[2]
    assert sum(found.weights) == pytest.approx(1.0)
    assert found.weights[3] < 1e-6
    mixed = compare_models({name: found.estimates[name] for name in ("wide", "right")})
    log_p = torch.stack([mixed.estimates[name].corrected for name in mixed.names])

    def score(weight):
        return (torch.tensor([weight, 1 - weight]).log()[:, None] + log_p).logsumexp(0).mean().item()

    assert all(score(mixed.weights[0]) >= score(w) - 1e-6 for w in torch.linspace(0.01, 0.99, 50).tolist())


def test_the_table_prints_and_is_a_dataframe(table):
    found = table[2]
    lines = repr(found).splitlines()
    assert lines[0].startswith("log p(x), mean over 200 data, nats per datum")
    assert [line.split()[0] for line in lines[2:6]] == found.names
    assert f"{found.names[0]} is not surely better than {found.names[1]}" in lines[-1]
    assert max(map(len, lines)) <= 120
    frame = found.to_dataframe()
    assert list(frame.index) == found.names
    assert frame["elpd"].tolist() == pytest.approx([200 * mean for mean in found.mean])
    assert (frame["elpd_diff"] <= 0).all()
    assert frame["dse"].iloc[2] == pytest.approx(200 * found.difference_data_std_error[2])


@pytest.mark.filterwarnings("ignore")  # ArviZ's own
def test_arviz_draws_the_table(table):
    import arviz
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("agg")
    frame = table[2].to_dataframe()
    if arviz.__version__.startswith("0."):
        axes = arviz.plot_compare(frame, plot_ic_diff=True)
        assert [label.get_text() for label in axes.get_yticklabels()][::2] == list(frame.index)
    else:
        arviz.plot_compare(frame, backend="matplotlib")
        arviz.plot_compare(frame, relative_scale=False, backend="matplotlib")
    plt.close("all")


def global_mean(prior_scale):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0).double(), prior_scale))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        precision = prior_scale**-2 + len(x)
        pyro.sample("loc", dist.Normal(x.sum() / precision, precision**-0.5))

    def log_p(x):
        cov = torch.eye(len(x)).to(x) + prior_scale**2
        return dist.MultivariateNormal(torch.zeros_like(x), cov).log_prob(x).item()

    return model, guide, log_p


def test_log_bayes_factors():
    """Of two priors, exactly: the guide is the posterior."""
    x = torch.randn(10, dtype=torch.float64)
    pairs = {"tight": global_mean(1.0), "loose": global_mean(100.0)}
    found = compare_models(
        {n: pvae.log_evidence(m, g, x, num_samples=50, proposal="guide") for n, (m, g, _) in pairs.items()}
    )
    exact = pairs["loose"][2](x) - pairs["tight"][2](x)
    assert (found.is_joint, found.num_data, found.names) == (True, 10, ["tight", "loose"])
    assert found.difference[1] == pytest.approx(exact, abs=1e-6)
    assert found.weights[1] == pytest.approx(1 / (1 + math.exp(-exact)))
    assert "10 data together" in repr(found)
    frame = found.to_dataframe()
    assert frame["elpd"].iloc[0] == pytest.approx(pairs["tight"][2](x))
    assert frame["se"].notna().all()


def test_what_cannot_be_compared_is_named(table, right):
    _, x, found = table
    one = found.estimates["right"]
    with pytest.raises(pvae.ArgumentError, match=r"estimates\['b'\] .* 50 and of 200 data"):
        compare_models({"a": one, "b": estimate(right, x[:50])})
    with pytest.raises(pvae.ArgumentError, match=r"estimates\['b'\] must be what"):
        compare_models({"a": one, "b": 3})
    for wrong in ({}, [one]):
        with pytest.raises(pvae.ArgumentError, match="estimates must be a dictionary"):
            compare_models(wrong)
    alone = compare_models({"only": one})
    assert (alone.weights, alone.close) == ([1.0], ["only"])
    assert "better" not in repr(alone)


def test_far_data_have_low_scores(right):
    reference, far = estimate(right, right.sample(200)), estimate(right, right.sample(60, seed=4) + 1, 1)
    found = out_of_distribution(far, reference)
    test = mannwhitneyu(reference.corrected, far.corrected)
    assert found.auroc == pytest.approx(test.statistic / (200 * 60))
    assert found.auroc > 0.8
    assert 0 < found.auroc_mc_std_error < found.auroc_data_std_error < 0.05
    assert found.auroc_std_error == pytest.approx(math.hypot(found.auroc_mc_std_error, found.auroc_data_std_error))
    below = (reference.corrected < far.corrected[:, None]).double().mean(1)
    torch.testing.assert_close(found.percentile, below)
    assert (found.percentile_std_error > 0).all()
    assert (found.percentile_std_error < 0.06).all()
    surely = int((found.percentile + 2 * found.percentile_std_error < 0.05).sum())
    assert 0 < surely < int((found.percentile < 0.05).sum())
    assert f"of 60 data, {surely} of them by 2 standard errors" in repr(found)
    assert found.verdict.startswith("these data have lower log p(x)")
    assert "Nalisnick" in found.verdict


def test_plain_data_have_high_scores_and_a_warning(right):
    """The trap: data in the middle of the model's are of no kind that it knows, and have the highest log p(x)."""
    plain = right.bias + 0.1 * torch.randn(50, 5, dtype=torch.float64)
    found = out_of_distribution(estimate(right, plain, 1), estimate(right, right.sample(200)))
    assert found.auroc < 0.1
    assert found.typicality_auroc > 0.8
    assert "higher log p(x) than the reference, which does not make them of its kind" in found.verdict
    assert max(map(len, repr(found).splitlines())) <= 88


def test_data_of_the_same_kind_are_not_told_apart(right):
    """The AUROC within 4 of its errors of 0.5; the error over data is that of ranks, Mann and Whitney, 1947."""
    found = out_of_distribution(estimate(right, right.sample(100, seed=9), 1), estimate(right, right.sample(200)))
    assert abs(found.auroc - 0.5) < 4 * found.auroc_std_error
    assert found.auroc_data_std_error == pytest.approx((301 / (12 * 100 * 200)) ** 0.5, rel=0.1)
    assert found.typicality.shape == (100,)


def test_one_datum_and_bad_input(right):
    x = right.sample(100)
    reference = estimate(right, x)
    alone = out_of_distribution(estimate(right, x[:1] + 5), reference)
    assert (alone.auroc, alone.percentile.tolist()) == (1.0, [0.0])
    assert alone.percentile_std_error.item() == pytest.approx(1 / 101)
    assert "lower" in alone.verdict
    with pytest.raises(pvae.ArgumentError, match="reference must be of at least two"):
        out_of_distribution(reference, estimate(right, x[:1]))
    with pytest.raises(pvae.ArgumentError, match="estimate must be what"):
        out_of_distribution(reference.log_px, reference)
    model, guide, _ = global_mean(1.0)
    joint = pvae.log_evidence(model, guide, x[:, 0], num_samples=30, proposal="guide")
    with pytest.raises(pvae.ArgumentError, match="reference is one log p of 100 data together"):
        out_of_distribution(reference, joint)


def uniform(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Uniform(z, z + 1, validate_args=False), obs=x)


def guide_of_uniform(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(0.0, 1.0))


def test_data_that_nothing_explains_are_the_worst():
    """A log p(x) of -inf has no error: it is below all others, and no model with one is the best."""
    usual, odd = torch.linspace(0.2, 1.8, 30), torch.tensor([5.0, 1.0, 7.0])
    options = {"num_samples": 100, "proposal": "guide"}
    reference, other = (pvae.log_evidence(uniform, guide_of_uniform, x, **options) for x in (usual, odd))
    found = out_of_distribution(other, reference)
    assert found.percentile[[0, 2]].tolist() == [0.0, 0.0]
    assert found.typicality.isinf().tolist() == [True, False, True]
    assert found.auroc > 0.6
    x = torch.cat([odd[:1], usual[1:]])
    impossible = pvae.log_evidence(uniform, guide_of_uniform, x, seed=1, **options)
    table = compare_models({"impossible": impossible, "usual": reference})
    assert table.names == ["usual", "impossible"]
    assert table.difference == [0.0, -math.inf]


def test_errors_that_are_not_known_decide_nothing(right):
    """Of one draw."""
    x = right.sample(20)
    found = compare_models({name: estimate(right, x, seed, 1) for seed, name in enumerate("ab")})
    assert len(found.close) == 2
    assert repr(found).endswith("within 2 errors, or these are not known")


def test_errors_of_the_draws_are_apart(right):
    """Fewer draws make the Monte Carlo part larger."""
    poor = replace(right, guide_scale=2.0)
    x = right.sample(60)
    few, many = (out_of_distribution(estimate(poor, x[:20], 1, k), estimate(poor, x[20:], 0, k)) for k in (10, 1000))
    assert few.auroc_mc_std_error > 3 * many.auroc_mc_std_error
    assert "are unresolved" in repr(few)
