from __future__ import annotations

import pytest
import torch

from pvae import networks
from pvae.errors import ArgumentError


@pytest.mark.parametrize("leading", [(), (4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("in_shape, out_shape", [(6, 5), ((2, 3), 5), (6, (2, 4)), ((6,), (5,))])
def test_mlp_takes_any_leading_dimensions(leading, in_shape, out_shape):
    shape_in = (in_shape,) if isinstance(in_shape, int) else in_shape
    shape_out = (out_shape,) if isinstance(out_shape, int) else out_shape
    net = networks.mlp(in_shape, [7], out_shape)
    assert net(torch.randn(*leading, *shape_in)).shape == (*leading, *shape_out)


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (10, 10), (2, 2), (6, 12), (7, 9), (1, 1)])
@pytest.mark.parametrize("channels", [(4,), (4, 6), (4, 6, 8)])
@pytest.mark.parametrize("kind", ["conv", "residual"])
def test_conv_trunks_mirror_each_other_at_any_size(size, channels, kind):
    encoder = getattr(networks, f"{kind}_encoder")((3, *size), 5, channels=channels, hidden=8)
    decoder = getattr(networks, f"{kind}_decoder")(5, (3, *size), channels=channels, hidden=8)
    x = torch.randn(2, 4, 3, *size)
    assert encoder(x).shape == (2, 4, 5)
    assert decoder(encoder(x)).shape == x.shape


def test_conv_stages_halve_while_even():
    sizes = networks._stages(28, 10, 3)
    assert sizes == [(28, 10), (14, 5), (7, 5), (7, 5)]


@pytest.mark.parametrize("make", [lambda: networks.mlp((2, 3), [5], 4), lambda: networks.conv_encoder((1, 2, 3), 4)])
def test_folding_leading_dimensions_changes_nothing(make):
    net = make()
    event = (2, 3) if isinstance(net, torch.nn.Sequential) else (1, 2, 3)
    x = torch.randn(3, 4, *event)
    one_by_one = torch.stack([net(row) for row in x])
    torch.testing.assert_close(net(x), one_by_one, rtol=1e-5, atol=1e-6)  # other blocking of the same sums


def test_conv_decoder_without_stages_is_dense():
    assert networks.conv_decoder(3, (1, 4, 4), channels=(), hidden=5)(torch.randn(2, 3)).shape == (2, 1, 4, 4)


def test_residual_blocks_add_to_what_they_are_given():
    block = networks.Residual(torch.nn.Linear(2, 2), torch.nn.Tanh())
    x = torch.randn(3, 2)
    torch.testing.assert_close(block(x), x + block[0](x).tanh())


def test_soft_clip_is_the_identity_near_zero_and_bounded():
    x = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4])
    y = networks.soft_clip(x, 7.0)
    assert y.abs().max() <= 7
    torch.testing.assert_close(y[1:4], x[1:4], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: networks.mlp(0, [3], 2), "in_shape"),
        (lambda: networks.mlp(4, [-1], 2), "hidden"),
        (lambda: networks.mlp(4, [3], ()), "out_shape"),
        (lambda: networks.conv_encoder((28, 28), 3), "in_shape"),
        (lambda: networks.conv_decoder(3, (28, 28)), "out_shape"),
    ],
)
def test_impossible_shapes_name_the_argument(call, name):
    with pytest.raises(ArgumentError, match=name):
        call()
