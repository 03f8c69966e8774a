"""Modules as data: what comes back is the same module, and what is no such data builds nothing."""

from __future__ import annotations

import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from pvae import likelihoods, networks, posteriors, priors
from pvae.composite import _PARTS
from pvae.errors import CheckpointError, ProgramError
from pvae.persistence.description import build, describe

VECTOR, SEQUENCE, IMAGE = (2, 4), (2, 4, 6), (2, 4, 6, 6)

LAYERS = [
    (lambda: nn.Linear(4, 3), VECTOR),
    (lambda: nn.Linear(4, 3, bias=False), VECTOR),
    (lambda: nn.Linear(np.prod((2, 2)), 3), VECTOR),
    (lambda: nn.Identity(), VECTOR),
    (lambda: nn.Identity(3, unused=True), VECTOR),
    (lambda: nn.Conv1d(4, 3, 3), SEQUENCE),
    (lambda: nn.Conv2d(4, 3, 3, 2, 1, bias=False), IMAGE),
    (lambda: nn.Conv2d(4, 6, (3, 1), padding="same", dilation=2, groups=2, padding_mode="circular"), IMAGE),
    (lambda: nn.Conv3d(1, 2, 3, padding=(0, 1, 1)), (2, 1, 4, 6, 6)),
    (lambda: nn.ConvTranspose1d(4, 2, 3), SEQUENCE),
    (lambda: nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, bias=False), IMAGE),
    (lambda: nn.BatchNorm1d(4), VECTOR),
    (lambda: nn.BatchNorm1d(4, momentum=None, affine=False), VECTOR),
    (lambda: nn.BatchNorm2d(4, eps=1e-3, track_running_stats=False), IMAGE),
    (lambda: nn.LayerNorm(4), VECTOR),
    (lambda: nn.LayerNorm((6, 6), elementwise_affine=False), IMAGE),
    (lambda: nn.LayerNorm([6, 6], bias=False), IMAGE),
    (lambda: nn.GroupNorm(2, 4), IMAGE),
    (lambda: nn.GroupNorm(2, 4, affine=False), IMAGE),
    (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    (lambda: nn.InstanceNorm1d(4), SEQUENCE),
    (lambda: nn.RMSNorm(4), VECTOR),
    (lambda: nn.RMSNorm((6, 6), eps=1e-3, elementwise_affine=False), IMAGE),
    (lambda: nn.LocalResponseNorm(2), IMAGE),
    (lambda: nn.Dropout(0.3), VECTOR),
    (lambda: nn.Dropout2d(0.3), IMAGE),
    (lambda: nn.ReLU(), VECTOR),
    (lambda: nn.ReLU(inplace=True), VECTOR),
    (lambda: nn.ReLU6(), VECTOR),
    (lambda: nn.Softplus(0.5, 10), VECTOR),
    (lambda: nn.Softplus(threshold=math.inf), VECTOR),
    (lambda: nn.Tanh(), VECTOR),
    (lambda: nn.Sigmoid(), VECTOR),
    (lambda: nn.GELU("tanh"), VECTOR),
    (lambda: nn.SiLU(), VECTOR),
    (lambda: nn.Mish(), VECTOR),
    (lambda: nn.ELU(0.3), VECTOR),
    (lambda: nn.CELU(0.3), VECTOR),
    (lambda: nn.SELU(), VECTOR),
    (lambda: nn.LeakyReLU(0.2), VECTOR),
    (lambda: nn.PReLU(), VECTOR),
    (lambda: nn.PReLU(4, init=0.1), VECTOR),
    (lambda: nn.Hardtanh(-2.0, 3.0), VECTOR),
    (lambda: nn.Threshold(0.1, 2.0), VECTOR),
    (lambda: nn.GLU(-1), VECTOR),
    (lambda: nn.Softmax(-1), VECTOR),
    (lambda: nn.LogSoftmax(-1), VECTOR),
    (lambda: nn.Flatten(-3), IMAGE),
    (lambda: nn.Unflatten(-1, (2, 2)), VECTOR),
    (lambda: nn.Unflatten(-1, [2, 2]), VECTOR),
    (lambda: nn.Unflatten(-1, torch.Size((2, 2))), VECTOR),
    (lambda: nn.MaxPool2d(2), IMAGE),
    (lambda: nn.MaxPool2d((2, 3), (1, 2), padding=1, ceil_mode=True), IMAGE),
    (lambda: nn.AvgPool2d(2, count_include_pad=False, divisor_override=3), IMAGE),
    (lambda: nn.AdaptiveAvgPool2d((None, 2)), IMAGE),
    (lambda: nn.AdaptiveMaxPool1d(2), SEQUENCE),
    (lambda: nn.LPPool1d(math.inf, 2), SEQUENCE),
    (lambda: nn.Upsample(scale_factor=2), IMAGE),
    (lambda: nn.Upsample((7, 8), mode="bilinear", align_corners=True), IMAGE),
    (lambda: nn.UpsamplingNearest2d(scale_factor=2), IMAGE),
    (lambda: nn.PixelShuffle(2), IMAGE),
    (lambda: nn.PixelUnshuffle(2), IMAGE),
    (lambda: nn.ZeroPad2d((1, 2, 0, 1)), IMAGE),
    (lambda: nn.ConstantPad1d(1, 0.5), SEQUENCE),
    (lambda: nn.ReflectionPad2d(1), IMAGE),
    (lambda: nn.Sequential(), VECTOR),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2))), VECTOR),
    (lambda: nn.Sequential(OrderedDict(into=nn.Linear(4, 3), act=nn.ReLU())), VECTOR),
]


def again(module, own=()):
    """A module by way of JSON, with the weights of the first."""
    built = build(json.loads(json.dumps(describe(module), allow_nan=False)), own, tensors=module.state_dict())
    built.load_state_dict(module.state_dict())
    return built


@pytest.mark.parametrize("layer, shape", LAYERS, ids=[repr(make()).replace("\n", "") for make, _ in LAYERS])
def test_layers_of_torch_come_back(layer, shape):
    module = layer()
    built = again(module)
    assert repr(built) == repr(module)
    assert describe(built) == describe(module)
    x = torch.rand(shape)
    assert torch.equal(built.eval()(x.clone()), module.eval()(x.clone()))


@pytest.mark.parametrize("embedding", [nn.Embedding(5, 3), nn.Embedding(5, 3, padding_idx=0, max_norm=2.0)], ids=str)
def test_embeddings_come_back(embedding):
    x = torch.tensor([[0, 4], [2, 2]])
    assert torch.equal(again(embedding)(x), embedding(x))


@pytest.mark.parametrize(
    "container",
    [
        nn.ModuleList([nn.Linear(2, 2), nn.Tanh()]),
        nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Tanh()}),
        nn.ModuleList(),
    ],
    ids=["list", "dict", "empty"],
)
def test_containers_come_back_in_order(container):
    assert repr(again(container)) == repr(container)


PARTS = {
    networks.Batched: lambda: networks.conv_encoder((1, 4, 4), 3),
    networks.GaussianNoise: lambda: networks.GaussianNoise(0.3),
    networks.Log1p: lambda: networks.Log1p(),
    networks.OneHot: lambda: networks.OneHot(3),
    networks.Residual: lambda: networks.Residual(nn.Linear(3, 3), nn.Tanh()),
    networks.Units: lambda: networks.Units([2, 0.5]),
    priors.StandardNormal: lambda: priors.StandardNormal(3),
    likelihoods.Bernoulli: lambda: likelihoods.Bernoulli(networks.mlp(3, [4], 6), event_shape=(2, 3)),
    likelihoods.Gaussian: lambda: likelihoods.Gaussian(networks.mlp(3, [4], 6), scale=0.3, event_shape=[2, 3]),
    likelihoods.Categorical: lambda: likelihoods.Categorical(networks.mlp(3, [4], 6), num_classes=3),
    likelihoods.ContinuousBernoulli: lambda: likelihoods.ContinuousBernoulli(networks.mlp(3, [4], 6)),
    likelihoods.DiscretizedLogistic: lambda: likelihoods.DiscretizedLogistic(
        networks.mlp(3, [4], 6), num_levels=17, scale="network", units=networks.Units((0.5, 0.2))
    ),
    likelihoods.Laplace: lambda: likelihoods.Laplace(networks.mlp(3, [4], 6), scale="network"),
    likelihoods.NegativeBinomial: lambda: likelihoods.NegativeBinomial(networks.mlp(3, [4], 6), total_count=2.5),
    likelihoods.Poisson: lambda: likelihoods.Poisson(networks.mlp(3, [4], 6), event_shape=(2, 3)),
    likelihoods.StudentT: lambda: likelihoods.StudentT(networks.mlp(3, [4], 6), df=3),
    priors.GaussianMixture: lambda: priors.GaussianMixture(3, 4),
    priors.VampPrior: lambda: priors.VampPrior(
        posteriors.DiagonalNormal(networks.mlp(6, [4], 6)), torch.rand(2, 6), bounds=(0, 1), starts_from_data=True
    ),
    priors.Flow: lambda: priors.Flow(3, 1, hidden=[4]),
    posteriors.LowRankNormal: lambda: posteriors.LowRankNormal(networks.mlp(6, [4], 9), 1, max_log_scale=3.0),
    posteriors.FullNormal: lambda: posteriors.FullNormal(networks.mlp(6, [4], 9), max_log_scale=3.0),
    posteriors.InverseAutoregressive: lambda: posteriors.InverseAutoregressive(
        networks.mlp(6, [4], 8), 3, context_dim=2, num_steps=1, hidden=(4,)
    ),
    posteriors.DiagonalNormal: lambda: posteriors.DiagonalNormal(networks.mlp(6, [4], 6), max_log_scale=3.0),
}


def test_all_parts_are_here():
    assert set(PARTS) == set(_PARTS)


@pytest.mark.parametrize("part", PARTS.values(), ids=[cls.__name__ for cls in PARTS])
def test_parts_come_back(part):
    module = part()
    built = again(module, _PARTS)
    assert repr(built) == repr(module)
    assert describe(built) == describe(module)


def test_a_module_in_two_places_is_one_again():
    shared = nn.Linear(3, 3)
    module = nn.Sequential(shared, nn.Sequential(nn.Tanh(), shared), shared)
    built = again(module)
    assert built[0] is built[1][1] is built[2]
    assert len(list(built.parameters())) == 2


@pytest.mark.parametrize("first", ["", "0", "1.0", "2", "nowhere", None, 3, ["0"]])
def test_a_module_is_only_the_same_as_one_that_was_built_before(first):
    """Such as none inside of itself."""
    inner = {"class": "torch.nn.Sequential", "children": {"0": {"same": first}}}
    with pytest.raises(CheckpointError, match="none was built there"):
        build({"class": "torch.nn.Sequential", "children": {"0": inner}})


def test_repetitions_that_double_are_refused():
    """Each level is the last one twice: 2^40 names in a few lines."""
    relu = {"class": "torch.nn.ReLU", "arguments": {}}
    children = {"0": relu}
    for level in range(1, 40):
        twice = {str(i): {"same": str(level - 1)} for i in range(2)}
        children[str(level)] = {"class": "torch.nn.Sequential", "children": twice}
    with pytest.raises(CheckpointError, match="same as others"):
        build({"class": "torch.nn.Sequential", "children": children})


class Own(nn.Module):
    """A module that keeps its arguments; its values come back with their types."""

    def __init__(self, width, *, options=None, activation=nn.ReLU, dtype=torch.float32, device=None):
        super().__init__()
        self.width, self.options, self.activation, self.dtype = width, options, activation, dtype
        self.layers = nn.Sequential(nn.Linear(2, 2), activation())


VALUES = [
    3,
    -0.0,
    0.1,
    math.pi,
    math.inf,
    -math.inf,
    2**70,
    True,
    None,
    "é\n",
    (1, (2, [3.5, ()])),
    [1, (2,)],
    torch.Size((2, 3)),
    {"a": (1,), "class": [2], "tuple": {}},
    torch.float64,
    [nn.ReLU],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_with_their_types(value):
    built = again(Own(value), [Own])
    assert repr(built.width) == repr(value)
    assert type(built.width) is type(value)


def test_a_nan_comes_back():
    assert math.isnan(again(Own(math.nan), [Own]).width)


@pytest.mark.parametrize("value, plain", [(np.int64(3), 3), (np.float32(0.5), 0.5), (np.bool_(True), True)], ids=repr)
def test_numbers_of_numpy_become_pythons(value, plain):
    built = again(Own(value), [Own])
    assert built.width == plain
    assert type(built.width) is type(plain)


class Positive(Own):
    """Passes on what it does not know."""

    def __init__(self, *args, floor=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.floor = floor


class Residual(nn.Sequential):
    """A container with a forward of its own."""

    def forward(self, x):
        return x + super().forward(x)


class Wrap(nn.Module):
    """Has a module for an argument."""

    def __init__(self, inner, bias: bool = True):
        super().__init__()
        self.inner = inner
        self.bias = nn.Parameter(torch.zeros(3)) if bias else None


def test_own_modules_come_back_with_what_their_bases_take():
    built = again(Positive(4, options={"a": 1}, activation=nn.Tanh, floor=0.5), [Positive])
    assert (built.width, built.options, built.activation, built.floor) == (4, {"a": 1}, nn.Tanh, 0.5)


def test_own_containers_are_made_from_their_children():
    module = Residual(nn.Linear(4, 4), nn.ReLU())
    built = again(module, [Residual])
    assert type(built) is Residual
    assert torch.equal(built(torch.ones(4)), module(torch.ones(4)))


@pytest.mark.parametrize("bias", [True, False])
def test_a_yes_or_no_that_is_kept_as_a_parameter_comes_back(bias):
    assert (again(Wrap(nn.ReLU(), bias), [Wrap]).bias is not None) == bias


def test_classes_are_found_by_their_last_name_where_the_script_is_another():
    description = describe(Own(3))
    description["class"] = "__main__.Own"
    assert build(description, [Own]).width == 3
    with pytest.raises(CheckpointError, match="several"):
        build(description, [Own, type("Own", (Own,), {"__module__": "elsewhere"})])


def test_a_part_of_pvae_does_not_stand_in_for_a_class_of_its_name():
    with pytest.raises(CheckpointError, match="pass that class"):
        build({"class": "__main__.StandardNormal", "arguments": {"latent_dim": 2}}, _PARTS)


class Forgets(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.size = width


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


NOT_PLAIN = [
    torch.relu,
    lambda x: x,
    object(),
    {1: 2},
    {1, 2},
    torch.zeros(2),
    np.zeros(2),
    b"x",
    1j,
    [torch.relu],
]


@pytest.mark.parametrize("value", NOT_PLAIN, ids=lambda v: type(v).__name__)
def test_arguments_that_are_no_data_are_named(value):
    with pytest.raises(
        ProgramError, match=r"inner\.1 is a Own, whose argument 'width' cannot be written down.*holds a"
    ):
        describe(Wrap(nn.Sequential(nn.ReLU(), Own(value))))


@pytest.mark.parametrize(
    "module, match",
    [
        (Forgets(3), "the model is a Forgets, whose constructor argument 'width' is not kept.*self.width = width"),
        (nn.Sequential(nn.Tanh(), Wrap(Forgets(3))), "1.inner is a Forgets, whose constructor argument 'width'"),
        (Stack(nn.ReLU()), r"constructor takes '\*layers'"),
        (
            nn.MultiheadAttention(4, 2),
            "the model is a MultiheadAttention, .*argument 'bias' is not kept.*one of your own",
        ),
        (nn.ParameterList([torch.zeros(2)]), "'values'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_that_do_not_keep_their_arguments_are_named(module, match):
    with pytest.raises(ProgramError, match=match):
        describe(module)


REFUSED = [
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.nn.functional.relu",
    "torch.nn.init.normal_",
    "torch.nn.Parameter",
    "torch.nn.DataParallel",
    "torch.nn.modules.linear.Linear",
    "torch.nn.Module.__subclasses__",
    "torch.nn.__loader__",
    "torch.nn.utils.parametrize.ParametrizationList",
    "torch.nn..Linear",
    "torch.nn.",
    "Linear",
    "",
    "pvae.vae._infer_shapes",
    "tests.test_description.Own",
]


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_but_known_classes_is_built(name):
    for description in (
        {"class": name, "arguments": {}},
        {"class": "torch.nn.Sequential", "children": {"0": {"class": name, "arguments": {"command": "true"}}}},
    ):
        with pytest.raises(CheckpointError, match="pass that class"):
            build(description, _PARTS)
    with pytest.raises(CheckpointError, match="pass that class"):
        build({"class": "torch.nn.Softplus", "arguments": {"beta": {"type": name}}}, _PARTS)


@pytest.mark.parametrize(
    "description",
    [
        None,
        3,
        [],
        {},
        "torch.nn.ReLU",
        {"class": 3},
        {"class": ["torch.nn.ReLU"], "arguments": {}},
        {"class": "torch.nn.ReLU"},
        {"class": "torch.nn.ReLU", "arguments": []},
        {"class": "torch.nn.ReLU", "children": {}},
        {"class": "torch.nn.ReLU", "arguments": {}, "more": 1},
        {"class": "torch.nn.ReLU", "arguments": {"nonsense": 1}},
        {"class": "torch.nn.Sequential", "arguments": {}},
        {"class": "torch.nn.Sequential", "children": {"0": 3}},
        {"class": "torch.nn.Sequential", "children": {"a.b": {"class": "torch.nn.ReLU", "arguments": {}}}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": -1, "out_features": 2}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": 10**15, "out_features": 10**6}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": {"tuple": 3}, "out_features": 2}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": {"eval": "3"}, "out_features": 2}},
        {"class": "torch.nn.Linear", "arguments": {"in_features": 2, "out_features": 2, "dtype": {"dtype": "load"}}},
        {"class": "torch.nn.Softplus", "arguments": {"beta": {"float": "1.0"}}},
        {"class": "torch.nn.Softplus", "arguments": {"beta": {"tensor": "nowhere"}}},
        {"class": "torch.nn.Softplus", "arguments": {"beta": {"type": ["torch.nn.ReLU"]}}},
    ],
    ids=str,
)
def test_what_is_no_description_is_refused(description):
    with pytest.raises(CheckpointError):
        build(description)


def test_endless_nesting_is_refused():
    description = {"class": "torch.nn.ReLU", "arguments": {}}
    for _ in range(3000):
        description = {"class": "torch.nn.Sequential", "children": {"0": description}}
    with pytest.raises(CheckpointError, match="nested"):
        build(description)
