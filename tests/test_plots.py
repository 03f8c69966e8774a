from __future__ import annotations

import math
import sys

import matplotlib
import numpy as np
import pytest
import torch
from helpers import words

import pvae
from pvae import plots
from pvae.errors import ArgumentError, DataError, PVAEError

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")
pytestmark = pytest.mark.usefixtures("figures_closed")


def test_learning_curve_draws_what_the_history_has():
    history = {"elbo": np.array([-3.0, -2.0]), "validation_elbo": np.array([-2.5, -2.1]), "seconds": np.ones(2)}
    ax = plots.learning_curve(history)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[-3.0, -2.0], [-2.5, -2.1]]
    assert "nats per datum" in ax.get_ylabel()
    assert words(ax) == ["validation", "training"], "the lower one first"
    one = plots.learning_curve({"objective": np.array([-1.0])})
    assert len(one.lines) == 1


def test_learning_curve_shows_the_rate_between_distortion_and_elbo():
    ax = plots.learning_curve({"rate": [1.0, 3.0], "distortion": [20.0, 15.0], "elbo": [-21.0, -18.0]})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [-20, -15])
    corners = ax.collections[0].get_paths()[0].vertices
    assert {-21.0, -20.0, -18.0, -15.0} == set(corners[:, 1])
    assert "rate" in words(ax)


def test_learning_curve_of_what_fit_returns():
    pair = pvae.VAE.mlp(3, 1, [4])
    result = pvae.fit(pair.model, pair.guide, torch.zeros(8, 3), epochs=2, progress=False, device="cpu", compile=False)
    np.testing.assert_array_equal(plots.learning_curve(result).lines[0].get_ydata(), result.history["elbo"])


def test_learning_curve_of_nothing_is_refused():
    for history in ({}, {"elbo": []}, {"seconds": [1.0]}, {"rate": [1.0]}):
        with pytest.raises(DataError, match="must have an epoch"):
            plots.learning_curve(history)


def test_learning_curve_of_several_runs_goes_on_given_axes():
    _, ax = plt.subplots()
    assert plots.learning_curve({"elbo": [-1.0], "seconds": [1.0]}, ax) is ax


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 1, 4, 3)])
def test_images_are_placed_row_by_row(shape):
    x = torch.rand(shape)
    canvas = plots.images(x, columns=2).images[0].get_array()
    assert canvas.shape == (3 * 5 - 1, 2 * 4 - 1)
    np.testing.assert_allclose(canvas[5:9, 4:7], 1 - x.reshape(5, 4, 3)[3])
    assert canvas.mask[10:, 4:].all(), "places without an image are transparent"
    assert canvas.mask[4].all(), "and so are lines between images"


def test_reconstructions_stand_below_their_images():
    x, y = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    canvas = plots.reconstructions(x, y).images[0].get_array()
    assert canvas.shape == (5, 8)
    assert canvas[0, 0] == 1
    assert canvas[3, 0] == 0


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 4, 4), (0, 4, 4), (4, 4, 3, 3, 3)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(DataError, match="images must have shape"):
        plots.images(torch.zeros(shape))


def test_running_estimate_is_the_log_mean_of_the_first_weights():
    w = torch.randn(50)
    ax = plots.running_estimate({"guide": w}, elbo=-1.0)
    curve = ax.lines[0].get_ydata()
    assert curve[0] == pytest.approx(w[0].item())
    assert curve[-1] == pytest.approx(w.double().exp().mean().log().item())
    assert ax.get_legend_handles_labels()[1] == [f"guide: {curve[-1]:.1f} at K = 50", "ELBO: -1.0"]
    assert words(ax)[1].replace("\N{MINUS SIGN}", "-") in ("ELBO\n-1.0", f"guide\n{curve[-1]:.1f}")
    assert not ax.collections, "one run has no band"


def test_running_estimate_of_repetitions_is_their_median_in_a_band():
    w = torch.randn(40, 21, dtype=torch.float64)
    ax = plots.running_estimate({"prior": w}, share=0.8)
    each = torch.stack([run.logcumsumexp(0) for run in w.T], 1) - torch.arange(1.0, 41).double().log()[:, None]
    ordered = each.sort(1).values.numpy()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), ordered[:, 10])  # 10 of 21 are above, 10 below
    corners = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([corners[:, 1].min(), corners[:, 1].max()], [ordered[:, 2].min(), ordered[:, 18].max()])
    assert ax.get_legend_handles_labels()[1] == [f"prior: {ordered[-1, 10]:.1f} at K = 40"]


def test_a_share_of_runs_is_a_number():
    for share in (0, "most"):
        with pytest.raises(ArgumentError, match=f"share must be a number above 0 and at most 1, got {share!r}"):
            plots.running_estimate({"prior": torch.zeros(5)}, share=share)


def test_running_estimate_where_the_first_draws_explain_nothing():
    w = torch.tensor([[-torch.inf, -1.0], [-2.0, -torch.inf], [-1.0, -1.0]]).double()
    ax = plots.running_estimate({"prior": w, "guide": w[:, 1]})
    assert np.isfinite(ax.lines[0].get_ydata()[1:]).all()
    ax.figure.canvas.draw()  # without a warning, which would fail


def test_running_estimate_beside_the_truth():
    ax = plots.running_estimate({"guide": torch.zeros(10), "prior": torch.zeros(10) - 4}, truth=0.5, elbo=-0.5)
    level = next(line for line in ax.lines if line.get_label() == "truth: 0.5")
    assert list(level.get_ydata()) == [0.5, 0.5]
    heights = [text.xy[1] for text in ax.texts]
    assert len(heights) == 4
    assert min(np.diff(sorted(heights))) > 0.12, "names are not written on one another"
    assert {text.get_color() for text in ax.texts[:2]} <= {ax.xaxis.label.get_color(), *plots.COLORS.values()}


def test_other_names_have_colours_of_their_own():
    w = {name: torch.zeros(5) for name in ("guide", "AIS", "prior", "Laplace")}
    colors = [line.get_color() for line in plots.running_estimate(w).lines]
    assert len(set(colors)) == 4
    assert colors[0] == plots.COLORS["guide"]
    assert colors[2] == plots.COLORS["prior"]


@pytest.mark.parametrize("draw", [plots.running_estimate, plots.weight_histogram])
@pytest.mark.parametrize("weights", [{}, {"guide": torch.empty(0)}])
def test_no_weights_are_refused(draw, weights):
    with pytest.raises(DataError, match="log_weights must name a proposal"):
        draw(weights)


def test_weight_histogram_counts_every_weight():
    weights = {"prior": torch.randn(1000) - 5, "guide": torch.randn(500)}
    ax = plots.weight_histogram(weights)
    assert [sum(bar.get_height() for bar in bars) for bars in ax.containers] == pytest.approx([1, 1])
    assert ax.get_legend_handles_labels()[1] == ["prior: 1,000 samples", "guide: 500 samples"]
    plots.weight_histogram({"guide": torch.zeros(10)})  # all equal: still a histogram


def test_latent_plane_draws_every_point():
    ax = plots.latent_plane({"prior": torch.randn(30, 2), "guide": torch.randn(20, 2, requires_grad=True)})
    assert [len(c.get_offsets()) for c in ax.collections] == [30, 20]
    assert ax.get_legend_handles_labels()[1] == ["prior: 30 samples", "guide: 20 samples"]


@pytest.mark.parametrize("fine", [0, 30])
def test_draws_that_cannot_explain_a_datum_can_be_drawn(fine, tmp_path):
    """Log-weights of minus infinity: some of the prior's, or all."""
    w = torch.full((40,), -math.inf)
    w[:fine] = torch.randn(fine)
    ax = plots.weight_histogram({"prior": w})
    heights = [bar.get_height() for bar in ax.containers[0]]
    assert sum(heights) == pytest.approx(fine / 40)
    ax.figure.savefig(tmp_path / "weights.png")
    ax = plots.running_estimate({"prior": w}, elbo=-math.inf)
    last = ax.lines[0].get_ydata()[-1]
    assert last == pytest.approx(w.double().exp().mean().log().item())
    ax.figure.savefig(tmp_path / "estimate.png")


def test_reconstructions_of_other_images_are_refused():
    for other in (torch.zeros(2, 4, 4), torch.zeros(3, 5, 5)):
        with pytest.raises(DataError, match=r"in pairs, got \(3, 4, 4\)"):
            plots.reconstructions(torch.zeros(3, 4, 4), other)


def test_without_matplotlib_a_figure_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(PVAEError, match="to draw takes matplotlib, which cannot be imported"):
        plots.learning_curve({"elbo": [-1.0]})


def test_figures_stand_on_light_and_on_dark_pages():
    ax = plots.images(torch.rand(3, 4, 4))
    assert ax.figure.get_facecolor()[3] == 0
    assert ax.get_facecolor()[3] == 0
    ink = plots.learning_curve({"elbo": [-1.0]}).xaxis.label.get_color()
    for page, least in (("#ffffff", 4.5), ("#131416", 4.0)):  # white, and the dark page of the documentation
        assert contrast(ink, page) > least
        assert all(contrast(color, page) > 3 for color in plots.COLORS.values())
    brighter = matplotlib.colors.to_hex([min(1, 1.35 * part) for part in matplotlib.colors.to_rgb(ink)])
    assert contrast(brighter, "#131416") > 4.5, "as docs/_static/site.css makes it there"


def contrast(one, other):
    """That of WCAG 2.1, from 1 to 21."""
    lights = []
    for color in (one, other):
        lights.append(np.dot([0.2126, 0.7152, 0.0722], linear(color)) + 0.05)
    return max(lights) / min(lights)


def test_given_axes_keep_their_looks():
    _, ax = plt.subplots()
    plots.running_estimate({"guide": torch.randn(9)}, ax, truth=0.0)
    assert ax.get_facecolor() == matplotlib.colors.to_rgba("white")
    assert ax.lines[-1].get_color() == ax.xaxis.label.get_color() == "black"


def test_subplots_are_an_array_of_axes_as_elsewhere():
    _, axes = plots.subplots(2, 3, sharex=True)
    assert axes.shape == (2, 3)
    assert all(ax.get_facecolor()[3] == 0 for ax in axes.flat)


def test_coloured_images_are_as_they_are():
    x = torch.rand(2, 3, 4, 5)
    canvas = plots.images(x).images[0].get_array()
    assert canvas.shape == (4, 11, 4)
    np.testing.assert_allclose(canvas[:, 6:, :3], x[1].permute(1, 2, 0))
    assert (canvas[:, 5, 3] == 0).all(), "transparent between images"


def test_found_images_stand_beside_their_query():
    queries, found = torch.rand(2, 3, 3), torch.rand(2, 4, 3, 3)
    ax = plots.neighbors(queries, found, labels=torch.tensor([7, 8]), found_labels=[[7, 7, 1, 7], [8, 8, 8, 8]])
    canvas = ax.images[0].get_array()
    np.testing.assert_allclose(canvas[4:7, :3], 1 - queries[1])
    assert canvas.mask[:, 3:8].all(), "a gap"
    np.testing.assert_allclose(canvas[:3, 16:19], 1 - found[0, 2])
    assert [list(line.get_xdata()) for line in ax.lines] == [[15.5, 18.5]], "what has another label is crossed out"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["7", "8"]


def test_neighbors_that_fit_no_query_are_refused():
    queries = torch.rand(2, 3, 3)
    for found in (torch.rand(2, 3, 3), torch.rand(3, 4, 3, 3), torch.rand(2, 0, 3, 3)):
        with pytest.raises(DataError, match=r"found must have shape \(Q, k"):
            plots.neighbors(queries, found)
    with pytest.raises(DataError, match="go together"):
        plots.neighbors(queries, torch.rand(2, 4, 3, 3), labels=[1, 2])
    with pytest.raises(DataError, match="labels must have shape"):
        plots.neighbors(queries, torch.rand(2, 4, 3, 3), labels=[1, 2], found_labels=[1, 2])
    plots.neighbors(queries[:1], torch.rand(1, 1, 3, 3))  # one neighbour of one


def test_samples_are_images_with_a_title():
    x = torch.rand(5, 1, 4, 3)
    ax = plots.samples(x, columns=2)
    np.testing.assert_array_equal(ax.images[0].get_array(), plots.images(x, columns=2).images[0].get_array())
    assert "prior" in ax.get_title()


# What a colour looks like to readers without one kind of cones, in linear RGB: Machado, Oliveira and Fernandes, 2009, A
# Physiologically-based Model for Simulation of Color Vision Deficiency.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("kind", BLIND)
def test_colours_stay_apart_for_colour_blind_readers(kind):
    """By their distance in CIE L*a*b*, in which 2.3 is what is just noticed."""
    ink = matplotlib.colors.to_hex(plots.learning_curve({"elbo": [-1.0]}).xaxis.label.get_color())
    seen = {name: lab(np.array(BLIND[kind]) @ linear(color)) for name, color in {**plots.COLORS, "ink": ink}.items()}
    assert np.linalg.norm(seen["guide"] - seen["prior"]) > 40
    names = list(seen)
    assert all(np.linalg.norm(seen[a] - seen[b]) > 10 for i, a in enumerate(names) for b in names[i + 1 :])


def linear(color):
    return np.array(
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(color)]
    )


def lab(rgb):
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1.0, 1.08883])  # none so dark that the cube root ends
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
