from __future__ import annotations

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from torch import nn

import pvae
from pvae import plots
from pvae.errors import ArgumentError, DataError

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")
pytestmark = pytest.mark.usefixtures("figures_closed")


def shades(z):
    """Images of 2 x 2 pixels that say what z they are of."""
    return torch.stack([z[:, 0], z[:, 1], z.sum(1), torch.zeros(len(z))], 1).reshape(-1, 2, 2)


def tiles(ax, height=2, width=2):
    canvas = 1 - ax.images[0].get_array().filled(np.nan)
    rows, columns = (canvas.shape[0] + 1) // (height + 1), (canvas.shape[1] + 1) // (width + 1)
    return np.array([[canvas[3 * i : 3 * i + 2, 3 * j : 3 * j + 2] for j in range(columns)] for i in range(rows)])


def test_a_manifold_has_equal_shares_of_the_prior():
    ax = plots.manifold(shades, size=4)
    places = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.125, 0.375, 0.625, 0.875])).numpy()
    seen = tiles(ax)
    np.testing.assert_allclose(seen[:, :, 0, 0], np.tile(places, (4, 1)), atol=1e-6)
    np.testing.assert_allclose(seen[:, :, 0, 1], np.tile(places[::-1, None], (1, 4)), atol=1e-6)  # upwards
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_0$", "$z_1$")
    assert ax.get_yticklabels()[0].get_text() == "1.2"


def test_two_latents_of_a_model_with_fifty_are_refused():
    vae = pvae.VAE.mlp((4, 4), 50, [8])
    with pytest.raises(ArgumentError, match=r"of two latents, and decode fails .* must have shape \(\.\.\., 50\)"):
        plots.manifold(vae.decode)
    linear = nn.Linear(50, 4)
    with pytest.raises(ArgumentError, match="Of a model with more latents draw traversals"):
        plots.manifold(linear)


def test_what_decodes_to_no_image_is_refused():
    with pytest.raises(DataError, match=r"has \(9, 5\). Vectors whose entries are pixels"):
        plots.manifold(pvae.VAE.mlp(5, 2, [4]).decode, size=3)


def test_interpolation_goes_straight_from_start_to_end():
    start, end = torch.tensor([[0.0, 1.0], [0.5, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.3]])
    seen = tiles(plots.interpolation(shades, start, end, num_steps=5))
    np.testing.assert_allclose(seen[0, :, 0, 0], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(seen[1, :, 0, 1], [0, 0.075, 0.15, 0.225, 0.3], atol=1e-6)
    assert tiles(plots.interpolation(shades, start[0], end[0])).shape[:2] == (1, 8)
    with pytest.raises(DataError, match=r"got \(2, 2\) and \(2,\)"):
        plots.interpolation(shades, start, end[0])
    with pytest.raises(ArgumentError, match="both ends"):
        plots.interpolation(shades, start, end, num_steps=1)


def test_traversals_change_one_entry():
    ax = plots.traversals(shades, torch.tensor([0.5, 0.25]), dims=[1, 0], values=[-1, 0, 1])
    seen = tiles(ax)
    np.testing.assert_allclose(seen[0, :, 0, 1], [-1, 0, 1])
    np.testing.assert_allclose(seen[0, :, 0, 0], 0.5)
    np.testing.assert_allclose(seen[1, :, 0, 0], [-1, 0, 1])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["$z_{1}$", "$z_{0}$"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["\N{MINUS SIGN}1", "0", "1"]


@pytest.mark.parametrize("options", [{"dims": [2]}, {"dims": []}, {"dims": [-1]}, {"values": []}])
def test_traversals_of_dimensions_that_are_not_there_are_refused(options):
    with pytest.raises(ArgumentError, match="dims must be from 0 to 1"):
        plots.traversals(shades, torch.zeros(2), **options)
    with pytest.raises(DataError, match="Of several take one"):
        plots.traversals(shades, torch.zeros(3, 2))


def test_decoding_leaves_all_as_it_was():
    network = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Unflatten(1, (2, 2)))

    def decode(z):
        return network(z) * pyro.param("scale") + torch.randn(())

    pyro.clear_param_store()
    pyro.param("scale", torch.tensor(2.0))
    state = torch.get_rng_state()
    first, second = (tiles(plots.manifold(decode, size=3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert network[1].training
    assert torch.is_grad_enabled()
    assert list(pyro.get_param_store()) == ["scale"]
    pyro.clear_param_store()


def test_a_decoder_in_double_and_a_prior_of_another_kind():
    vae = pvae.VAE.mlp((4, 4), 2, [8], likelihood="gaussian", prior="mixture", units=(0, 1)).double()
    assert plots.manifold(vae.decode, size=2).images[0].get_array().shape == (9, 9)


def test_each_class_stands_at_its_median():
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 3.0], [10.0, 10.0], [10.0, 12.0]])
    ax = plots.latent_map(codes, torch.tensor([3, 3, 3, 5, 5]))
    assert [len(c.get_offsets()) for c in ax.collections] == [3, 2]
    assert {t.get_text(): t.xy for t in ax.texts} == {
        "3": pytest.approx((1.0, 0.0), abs=1e-4), "5": pytest.approx((10.0, 11.0), abs=1e-4)
    }  # fmt: skip
    assert ax.get_xlabel() == "$z_0$"
    assert not ax.get_legend()


def test_names_of_classes_at_one_place_are_moved_apart():
    ax = plots.latent_map(torch.randn(100, 2).repeat(2, 1), torch.arange(2).repeat_interleave(100))
    one, other = (np.array(text.xy) for text in ax.texts)
    assert np.linalg.norm(one - other) > 0.2


def test_a_map_of_one_datum_or_without_labels():
    assert len(plots.latent_map(torch.zeros(1, 2), [4]).texts) == 1
    ax = plots.latent_map(torch.randn(7, 2, requires_grad=True), names=("first", "second"))
    assert not ax.texts
    assert ax.get_ylabel() == "second"


def test_labels_may_be_words():
    ax = plots.latent_map(torch.randn(4, 2), ["cat", "dog", "dog", "cat"])
    assert {text.get_text() for text in ax.texts} == {"cat", "dog"}


def test_a_map_of_fifty_latents_is_refused():
    with pytest.raises(DataError, match=r"shape \(N, 2\), got \(7, 50\). Of more latents choose two"):
        plots.latent_map(torch.randn(7, 50))
    with pytest.raises(DataError, match=r"labels must have shape \(7,\), one for each code; got \(6,\)"):
        plots.latent_map(torch.randn(7, 2), torch.zeros(6))
    with pytest.raises(DataError, match=r"got \(7, 10\). Of one-hot rows pass labels.argmax\(1\)"):
        plots.latent_map(torch.randn(7, 2), torch.eye(10)[:7])
    with pytest.raises(DataError, match=r"samples of guide must have shape \(K, 2\)"):
        plots.latent_plane({"guide": torch.randn(7, 50)})


def test_kl_of_each_dimension_from_the_largest():
    kl = torch.tensor([[0.1, 0.0, 2.0], [0.3, 0.0, 4.0]])
    ax = plots.kl_per_dimension(kl)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [3, 0.2, 0])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "0", "1"]
    assert ax.get_title() == "2 of 3 dimensions above 0.01 nats\n3.2 nats in all"
    assert "nats per datum" in ax.get_ylabel()
    assert len(plots.kl_per_dimension(torch.rand(50)).patches) == 50
    with pytest.raises(DataError, match=r"kl must have shape \(D,\)"):
        plots.kl_per_dimension(torch.rand(2, 3, 4))
    with pytest.raises(ArgumentError, match="threshold must be a number, got 'low'"):
        plots.kl_per_dimension(torch.rand(3), threshold="low")


def test_a_kl_that_is_not_known_hides_no_other():
    ax = plots.kl_per_dimension(torch.tensor([1.5, torch.nan, 0.5]))
    assert ax.get_title() == "2 of 3 dimensions above 0.01 nats\n2.0 nats in all, 1 unknown"


def test_a_result_that_has_a_kl_is_taken():
    class Usage:
        kl = torch.tensor([0.5, 1.5])

    assert [bar.get_height() for bar in plots.kl_per_dimension(Usage()).patches] == [1.5, 0.5]
