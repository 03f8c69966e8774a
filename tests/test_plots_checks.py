from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from helpers import words
from torch.distributions import Normal

import pvae
from pvae import plots
from pvae.errors import ArgumentError, DataError

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")
pytestmark = pytest.mark.usefixtures("figures_closed")


def estimate(num_data=20, proposal="guide", num_samples=100, **options):
    pair = pvae.testing.linear_gaussian(**options)
    x = pair.sample(num_data)
    return pvae.log_evidence(pair.model, pair.guide, x, proposal=proposal, num_samples=num_samples, device="cpu")


def marks(ax):
    """Points by their label."""
    return {c.get_label(): np.asarray(c.get_offsets()) for c in ax.collections}


def test_reliability_has_a_point_for_each_datum():
    found = estimate(guide_scale=1.3)
    ax = plots.reliability(found)
    points = np.concatenate(list(marks(ax).values()))
    np.testing.assert_allclose(sorted(points[:, 0]), sorted(found.khat), rtol=1e-6)
    np.testing.assert_allclose(sorted(points[:, 1]), sorted(found.ess), rtol=1e-6)
    assert ax.get_ylabel() == "effective samples of 100"
    assert "k-hat" in ax.get_xlabel()


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ({"proposal": "prior", "event_dim": 30, "noise": 0.05}, 20),  # all k-hats bad
        ({}, 0),  # the exact posterior: equal weights, k-hats of -inf
        ({"num_data": 1, "num_samples": 1}, 1),  # one datum, one draw: none
    ],
)
def test_reliability_where_all_are_bad_or_without_a_khat(options, bad, tmp_path):
    found = estimate(**options)
    ax = plots.reliability(found)
    points = marks(ax)
    assert len(points["not to be believed"]) == bad
    assert len(points["to be believed"]) == found.num_data - bad
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    drawn = np.concatenate(list(points.values()))
    assert ((drawn > [left, bottom]) & (drawn < [right, top])).all(), "all are seen"
    assert f"{bad} of {found.num_data} data" in ax.get_title()
    ax.figure.savefig(tmp_path / "reliability.png")


def test_data_that_no_draw_explains_are_at_the_margin():
    """They have 0 effective samples, and axes of logarithms have no 0."""
    sums = pvae.evidence.WeightSums.of(torch.tensor([[-torch.inf, 0.0, -1.0]] * 30))
    ax = plots.reliability(replace(estimate(num_data=3), sums=sums))
    at = marks(ax)["not to be believed"]
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert len(at) == 1
    assert ((at > [left, bottom]) & (at < [right, top])).all()
    assert at[0, 1] < 1


@pytest.fixture(scope="module")
def gaps():
    pair = pvae.testing.linear_gaussian(guide_shift=0.5)
    refined = pvae.evidence.proposals.Refined(full=False, steps=50)
    x = pair.sample(10)
    return pvae.diagnostics.gaps(pair.model, pair.guide, x, num_samples=200, refined=refined, device="cpu")


def test_gaps_reach_from_elbo_to_log_px(gaps):
    ax = plots.gap_decomposition(gaps)
    first, second = ax.patches
    assert first.get_x() == pytest.approx(gaps.guide.elbo.mean().item())
    assert first.get_x() + first.get_width() == pytest.approx(second.get_x())
    assert second.get_x() + second.get_width() == pytest.approx(gaps.evidence.corrected.mean().item())
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["ELBO", "amortization gap", "approximation gap", "log p(x)"]
    assert "nats" in ax.get_xlabel()
    assert f"{gaps.amortization.mean().item():.2f} \N{PLUS-MINUS SIGN} " in words(ax)[0]


def test_gaps_of_several_models_stand_below_one_another(gaps):
    ax = plots.gap_decomposition({"small": gaps, "large": gaps})
    assert len(ax.patches) == 4
    assert ax.get_yticklabels()[4].get_text() == "large ELBO"
    with pytest.raises(DataError, match="a model at least"):
        plots.gap_decomposition({})


def calibration(ranks, num_draws, weighted=None):
    names = tuple(f"z[{i}]" for i in range(ranks.shape[1]))
    return SimpleNamespace(ranks=ranks, num_draws=num_draws, names=names, weighted=weighted)


def test_ranks_are_drawn_as_deviations_from_uniform_ones():
    ranks = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]])
    ax = plots.ranks(calibration(ranks, 3))
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), 0, atol=1e-12)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0, -0.25, -0.5, -0.75, 0])
    half = ax.collections[0].get_paths()[0].vertices[:, 1].max()
    assert half == pytest.approx(math.sqrt(math.log(2 / 0.05) / 8))
    assert words(ax) == ["z[1]", "guide: 1 of 2 outside"]


def test_ranks_among_weighted_draws_are_drawn_too():
    generator = torch.Generator().manual_seed(0)
    # Uniform ranks leave a band of 95% with a probability of at most 5%, and none of these with seed 0; the others lie
    # in half of the range, which is 0.25 off in the distribution function, against a band of 0.096.
    uniform, narrow = (torch.randint(*ends, (200, 3), generator=generator) for ends in ((0, 64), (16, 48)))
    ax = plots.ranks(calibration(narrow, 63, calibration(uniform, 63)))
    assert words(ax)[-2:] == ["guide: 3 of 3 outside", "re-weighted: 0 of 3 outside"]
    assert len(ax.lines) == 6
    assert ax.get_ylim()[0] < -0.25


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(torch.tensor([[4]]), "0 to num_draws = 3, got 4 to 4"), (torch.zeros(0, 1), "none of them 0")],
)
def test_ranks_that_cannot_be_are_refused(ranks, message):
    with pytest.raises(DataError, match=message):
        plots.ranks(calibration(ranks, 3))


def test_a_band_of_no_level_is_refused():
    for level in (1, "wide"):
        with pytest.raises(ArgumentError, match=f"level must be a number above 0 and below 1, got {level!r}"):
            plots.ranks(calibration(torch.zeros(2, 1), 3), level=level)


def lecture(**changes):
    pair = pvae.testing.linear_gaussian(1, 1, noise=0.3)
    x = pair.sample(1)
    q = pair.proposal(x)
    arguments = {
        "log_prior": Normal(0.0, 1.0).log_prob,
        "log_likelihood": lambda x, z: Normal(pair.weight[0, 0] * z + pair.bias[0], 0.3).log_prob(x),
        "log_guide": Normal(q.loc[0, 0], q.scale_tril[0, 0, 0]).log_prob,
        "x": x.item(),
        "prior_draws": torch.tensor([-1.0, 0.0, 1.5]),
        "guide_draws": q.sample((3,)).ravel(),
        "x_range": (x.item() - 3, x.item() + 2),
    } | changes
    return pair.log_px(x).item(), arguments


def test_the_guides_draws_say_what_the_priors_do_not():
    log_px, arguments = lecture()
    joint, beside, prior, guide = plots.prior_against_guide(**arguments, log_px=log_px)
    # The image's sum is p(x) over what is shown of x and z. Of z 5e-4 are not shown; the sum at 301 points for 300
    # cells adds half of an edge at each side, less than 0.002 of all.
    image = joint.images[0]
    left, right, bottom, top = image.get_extent()
    x = torch.linspace(left, right, 4001, dtype=torch.float64)[:, None]
    inside = pvae.testing.linear_gaussian(1, 1, noise=0.3).log_px(x).exp().mean().item() * (right - left)
    assert image.get_array().sum() * (right - left) * (top - bottom) / 300**2 == pytest.approx(inside, abs=0.01)
    # Weights of the exact posterior are equal, so three draws say all of log p(x).
    assert words(guide)[0].splitlines()[-1] == f"{log_px:.2f}".replace("-", "\N{MINUS SIGN}")
    heights = next(line.get_ydata() for line in prior.lines if line.get_marker() == "o")
    z = arguments["prior_draws"]
    np.testing.assert_allclose(heights, arguments["log_likelihood"](torch.tensor(arguments["x"]), z).exp(), rtol=1e-5)
    assert {line.get_color() for line in prior.lines[:3]} == {plots.COLORS["prior"]}
    assert {line.get_color() for line in guide.lines[:3]} == {plots.COLORS["guide"]}
    assert (guide.get_xlabel(), joint.get_ylabel()) == ("x", "z")
    assert words(beside) == ["p(z)", "q(z | x)"]
    assert f"{log_px:.2f}"[-4:] in joint.get_title()


def test_the_lecture_goes_on_given_axes():
    _, axes = plt.subplots(2, 2)
    assert list(plots.prior_against_guide(**lecture()[1], axes=axes)) == list(axes.ravel())
    with pytest.raises(ArgumentError, match="axes must be four, got 1"):
        plots.prior_against_guide(**lecture()[1], axes=axes[0, 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": 99.0}, "x must be within x_range"),
        ({"prior_draws": torch.zeros(3, 1)}, r"prior_draws must have shape \(K,\)"),
        ({"guide_draws": torch.zeros(0)}, r"guide_draws must have shape \(K,\)"),
        (
            {"log_prior": lambda z: z.sum()},
            "log_prior must give a number for each .* shape .301,.; it gave",
        ),
        ({"log_guide": lambda z: z * torch.nan}, "log_guide must .* gave nan"),
    ],
)
def test_a_lecture_of_something_else_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        plots.prior_against_guide(**lecture(**changes)[1])


def test_draws_that_cannot_be_are_drawn(tmp_path):
    """A likelihood of 0 at all draws of the prior."""

    def likelihood(x, z):
        return torch.where((x - z).abs() < 0.1, math.log(5.0), -math.inf)

    axes = plots.prior_against_guide(**lecture(log_likelihood=likelihood, x=5.0, x_range=(-6, 6))[1])
    assert words(axes[2])[0].endswith("\N{MINUS SIGN}inf")
    axes[0].figure.savefig(tmp_path / "lecture.png")


def table(**changes):
    """As `pvae.diagnostics.compare_models` gives."""
    numbers = {
        "names": ["good", "fair", "bad"],
        "is_joint": False,
        "num_data": 100,
        "mean": [-10.0, -10.5, -13.0],
        "mean_std_error": [0.01, 0.02, 0.3],
        "data_std_error": [0.5, 0.5, 0.6],
        "difference": [0.0, -0.5, -3.0],
        "difference_std_error": [0.0, 0.022, 0.3],
        "difference_data_std_error": [0.0, 0.1, 0.4],
    }
    return SimpleNamespace(**numbers | changes)


def bars(ax):
    """Half the lengths of error bars, by where they are in the middle and how thick."""
    segments = {}
    for lines in ax.collections:
        (left, up), (right, _) = lines.get_segments()[0]
        segments[round((left + right) / 2, 6), round(up, 2), lines.get_linewidth()[0]] = (right - left) / 2
    return segments


def test_models_stand_below_the_best_with_errors_of_differences():
    ax = plots.comparison(table())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["good", "fair", "bad"]
    found = bars(ax)
    assert found[-10.0, -0.13, 1] == pytest.approx(1.0)  # two standard errors
    assert found[-13.0, 1.87, 3.5] == pytest.approx(0.6)
    assert found[-10.5, 1.17, 1] == pytest.approx(0.2)
    assert found[-10.5, 1.17, 3.5] == pytest.approx(0.044)
    assert not any(up == 0.17 for _, up, _ in found), "the best one differs from itself by nothing"
    minus, both = "\N{MINUS SIGN}", "\N{PLUS-MINUS SIGN}"
    assert words(ax) == ["difference", f"{minus}0.50 {both} 0.20", f"{minus}3.00 {both} 0.80"]
    assert ax.get_xlabel() == "nats per datum, mean over data"


def test_one_model_or_data_together_can_be_drawn(tmp_path):
    one = {name: value[:1] if isinstance(value, list) else value for name, value in vars(table()).items()}
    ax = plots.comparison(SimpleNamespace(**one))
    assert not words(ax)
    nan = {name: [math.nan] * 3 for name in ("data_std_error", "difference_data_std_error")}
    ax = plots.comparison(table(is_joint=True, **nan))
    assert bars(ax)[-13.0, 2.17, 1] == pytest.approx(0.6), "the draws' error is all there is"
    assert ax.get_xlabel() == "nats, of all data"
    ax.figure.savefig(tmp_path / "comparison.png")


def test_results_of_diagnostics_are_drawn_by_what_they_have():
    pair = pvae.testing.linear_gaussian(2, 4)
    x = pair.sample(40)
    calibration = pvae.diagnostics.simulation_based_calibration(
        pair.model, pair.guide, x, num_simulations=40, num_draws=15, num_samples=20, device="cpu"
    )
    ax = plots.ranks(calibration)
    assert len(ax.lines) == 4, "two latents, by the guide and re-weighted"
    usage = pvae.diagnostics.latent_usage(pair.model, pair.guide, x, num_samples=10, device="cpu")
    ax = plots.kl_per_dimension(usage)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], usage.kl.sort(descending=True).values)
    estimates = {name: estimate(guide_scale=scale) for name, scale in (("exact", 1.0), ("wide", 1.5))}
    models = pvae.diagnostics.compare_models(estimates)
    ax = plots.comparison(models)
    assert [label.get_text() for label in ax.get_yticklabels()] == models.names


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (plots.reliability, "estimate must be what pvae.log_evidence returns, got dict, which has no khat"),
        (plots.gap_decomposition, "gaps must be what pvae.diagnostics.gaps returns, got str, which has no evidence"),
        (plots.ranks, "calibration must be what pvae.diagnostics.simulation_based_calibration returns, got dict"),
        (plots.comparison, "table must be what pvae.diagnostics.compare_models returns, got dict, which has no names"),
    ],
)
def test_results_of_another_function_are_refused(draw, message):
    with pytest.raises(ArgumentError, match=message):
        draw({"": "something else"})
    assert not plt.get_fignums(), "no figure is left open"
