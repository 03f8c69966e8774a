from __future__ import annotations

import math
import sys

import matplotlib
import numpy as np
import pytest
import torch

from pvae import plots
from pvae.errors import DataError, PVAEError

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_learning_curve_draws_what_the_history_has():
    history = {"elbo": np.array([-3.0, -2.0]), "validation_elbo": np.array([-2.5, -2.1]), "seconds": np.ones(2)}
    ax = plots.learning_curve(history)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[-3.0, -2.0], [-2.5, -2.1]]
    assert "nats per datum" in ax.get_ylabel()
    one = plots.learning_curve({"objective": np.array([-1.0])})
    assert len(one.lines) == 1


def test_learning_curve_of_several_runs_goes_on_given_axes():
    _, ax = plt.subplots()
    assert plots.learning_curve({"elbo": [-1.0], "seconds": [1.0]}, ax) is ax


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 1, 4, 3)])
def test_images_are_placed_row_by_row(shape):
    x = torch.rand(shape)
    canvas = plots.images(x, columns=2).images[0].get_array()
    assert canvas.shape == (3 * 5 - 1, 2 * 4 - 1)
    np.testing.assert_allclose(canvas[5:9, 4:7], 1 - x.reshape(5, 4, 3)[3])
    assert (canvas[10:, 4:] == 1).all()


def test_reconstructions_stand_below_their_images():
    x, y = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    canvas = plots.reconstructions(x, y).images[0].get_array()
    assert canvas.shape == (5, 8)
    assert canvas[0, 0] == 1
    assert canvas[3, 0] == 0


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 4), (0, 4, 4)])
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


def test_running_estimate_where_the_first_draws_explain_nothing():
    w = torch.tensor([[-torch.inf, -1.0], [-2.0, -torch.inf], [-1.0, -1.0]]).double()
    ax = plots.running_estimate({"prior": w, "guide": w[:, 1]})
    assert np.isfinite(ax.lines[0].get_ydata()[1:]).all()
    ax.figure.canvas.draw()  # without a warning, which would fail


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
