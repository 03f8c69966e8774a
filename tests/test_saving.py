"""VAEs on disk: what is loaded is what was saved, bit by bit, and what could not come back is refused."""

from __future__ import annotations

from pathlib import Path

import pyro
import pytest
import torch
from helpers import assert_same_vae, same_bits
from pairs import compose_vae
from torch import nn

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.errors import ArgumentError, CheckpointError, ProgramError


class Scale(nn.Module):
    """Divides by a tensor that it was given."""

    def __init__(self, by: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("by", by)

    def forward(self, x):
        return x / self.by


class Cosine(nn.Module):
    """An activation with a buffer that is not saved, and a number."""

    def __init__(self, width: int, frequency: float = 2.0) -> None:
        super().__init__()
        self.width = width
        self.frequency = frequency
        self.shift = 0.0
        self.register_buffer("phase", torch.linspace(0, 1, width), persistent=False)

    def forward(self, x):
        return torch.cos(self.frequency * x + self.phase) + self.shift


class WeightNormed(nn.Module):
    """Makes in its constructor what could not be described by itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(inputs, outputs))

    def forward(self, x):
        return self.linear(x)


class Tied(nn.Module):
    """Two layers with one weight, tied by the constructor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


class InDtype(nn.Module):
    """Runs a network in a dtype of its own, so that a VAE has two."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, x):
        return self.network(x.to(self.dtype)).to(x.dtype)


class MyVAE(pvae.VAE):
    """A subclass with arguments of its own."""

    def __init__(self, width: int) -> None:
        self_made = pvae.VAE.mlp(6, 2, [width])
        super().__init__(self_made.prior, self_made.decoder, self_made.encoder)
        self.width = width


def of_layers() -> pvae.VAE:
    """As one would with torch's layers, BatchNorm's buffers moved."""
    vae = compose_vae(
        nn.Sequential(nn.Linear(2, 8, bias=False), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 6)),
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.PReLU(), nn.Linear(8, 4)),
    )
    vae.encode(torch.rand(20, 6))
    return vae


def frozen() -> pvae.VAE:
    vae = compose_vae()
    vae.encoder.network[0].requires_grad_(False)
    return vae


def non_contiguous() -> pvae.VAE:
    vae = pvae.VAE.conv((1, 4, 6), 2, (4,), 8).to(memory_format=torch.channels_last)
    weight = vae.encoder.network.network[3].weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    return vae


def mixed() -> pvae.VAE:
    return compose_vae(encoder=InDtype(networks.mlp(6, [5], 4).double(), torch.float64))


def own() -> pvae.VAE:
    return compose_vae(
        nn.Sequential(WeightNormed(2, 6), Cosine(6, 0.5)),
        nn.Sequential(Scale(torch.rand(6) + 0.5), nn.Linear(6, 4), Tied(4)),
    )


def vamp(posterior: str = "diagonal") -> pvae.VAE:
    """Its encoder has two places."""
    named = posteriors.NAMED[posterior]
    encoder = named.make(networks.mlp(6, [5], named.count_outputs(2)), 2)
    prior = priors.VampPrior(encoder, torch.randn(3, 6), bounds=(0, 1))
    return pvae.VAE(prior, likelihoods.Bernoulli(networks.mlp(2, [5], 6)), encoder)


def mixture() -> pvae.VAE:
    vae = compose_vae()
    return pvae.VAE(priors.GaussianMixture(2, 3), vae.decoder, vae.encoder)


def flow(posterior: str) -> pvae.VAE:
    named = posteriors.NAMED[posterior]
    encoder = named.make(networks.mlp(6, [5], named.count_outputs(2)), 2)
    return pvae.VAE(priors.Flow(2, 2), likelihoods.Bernoulli(networks.mlp(2, [5], 6)), encoder)


OWN = [Scale, Cosine, WeightNormed, Tied, InDtype, MyVAE]

VAES = {
    "mlp": lambda: pvae.VAE.mlp((2, 3), 2, [8]),
    "mlp-linear": lambda: pvae.VAE.mlp(6, 2, []),
    "mlp-activation": lambda: pvae.VAE.mlp(6, 2, [8], activation=nn.SiLU),
    "mlp-gaussian": lambda: pvae.VAE.mlp((2, 3), 2, [8], "gaussian"),
    "mlp-per-pixel": lambda: pvae.VAE.mlp((2, 3), 2, [8], "gaussian-per-pixel"),
    "mlp-levels": lambda: pvae.VAE.mlp((2, 3), 2, [8], "discretized-logistic-per-pixel"),
    "mlp-counts": lambda: pvae.VAE.mlp((2, 3), 2, [8], "negative-binomial"),
    "mlp-heavy": lambda: pvae.VAE.mlp((2, 3), 2, [8], "student-t").double(),
    "mlp-grey": lambda: pvae.VAE.mlp((2, 3), 2, [8], "continuous-bernoulli"),
    "classes": lambda: pvae.VAE(
        priors.StandardNormal(2),
        likelihoods.Categorical(networks.mlp(2, [8], 18), num_classes=3, event_shape=(2, 3)),
        posteriors.DiagonalNormal(nn.Sequential(networks.OneHot(3), networks.mlp((2, 3, 3), [8], 4))),
    ),
    "conv": lambda: pvae.VAE.conv((1, 4, 6), 2, (4,), 8),
    "conv-per-pixel": lambda: pvae.VAE.conv((3, 4, 6), 2, (4, 4), 8, "gaussian-per-pixel"),
    "vamp": vamp,
    "named": lambda: pvae.VAE.mlp(6, 2, [8], "gaussian", prior="vamp", posterior="low-rank"),
    "residual": lambda: pvae.VAE.conv((1, 4, 6), 2, (4,), 8, prior="mixture", posterior="full", network="residual"),
    "vamp-float64": lambda: vamp("low-rank").double(),
    "flow-full": lambda: flow("full"),
    "flow-iaf": lambda: flow("iaf"),
    "flow-iaf-float64": lambda: flow("iaf").double(),
    "mixture": mixture,
    "layers": of_layers,
    "float64": lambda: of_layers().double(),
    "bfloat16": lambda: compose_vae().bfloat16(),
    "mixed": mixed,
    "frozen": frozen,
    "non-contiguous": non_contiguous,
    "own": own,
    "own-float64": lambda: own().double(),
    "subclass": lambda: MyVAE(7),
    "subclass-float64": lambda: MyVAE(7).double(),
}


@pytest.mark.parametrize("name", VAES)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    vae = VAES[name]()
    vae.save(tmp_path / "vae")
    loaded = pvae.VAE.load(tmp_path / "vae", modules=OWN)
    assert_same_vae(vae, loaded)
    assert all(module.training for module in loaded.modules())
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("name", ["mlp", "mlp-levels", "mlp-counts", "classes", "conv-per-pixel", "layers", "own"])
def test_densities_and_evidence_are_equal_bit_by_bit(name, tmp_path):
    vae = VAES[name]().eval()
    vae.save(tmp_path)
    loaded = pvae.VAE.load(tmp_path, modules=OWN).eval()
    x = torch.rand(5, *vae.event_shape).round()
    assert same_bits(vae.encode(x).mean, loaded.encode(x).mean)
    assert same_bits(vae.reconstruct(x), loaded.reconstruct(x))
    assert same_bits(vae.sample(3, seed=0), loaded.sample(3, seed=0))
    ours, theirs = (pvae.log_evidence(v.model, v.guide, x, num_samples=20, seed=0).log_px for v in (vae, loaded))
    assert same_bits(ours, theirs)


def test_a_loaded_vae_trains_on_as_the_saved_one_does(tmp_path, bits):
    vae = pvae.VAE.mlp(6, 2, [8])
    vae.save(tmp_path)
    loaded = pvae.VAE.load(tmp_path)
    for v in (vae, loaded):
        pvae.fit(v.model, v.guide, bits, epochs=1, seed=0, compile=False, progress=False)
    assert all(map(same_bits, vae.parameters(), loaded.parameters()))


def test_tensors_that_the_constructor_ties_stay_tied(tmp_path):
    own().save(tmp_path)
    tied = pvae.VAE.load(tmp_path, modules=OWN).encoder.network[2]
    assert tied.first.weight is tied.second.weight


def test_a_default_dtype_of_either_process_does_not_matter(tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        vae = own()
        vae.save(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    loaded = pvae.VAE.load(tmp_path, modules=OWN)
    assert torch.get_default_dtype() == torch.float32
    assert loaded.prior.loc.dtype == torch.float64
    assert_same_vae(vae, loaded)


def test_weights_that_are_nan_can_be_saved(tmp_path):
    """Of a training that diverged: they are what there is to look at."""
    vae = compose_vae()
    with torch.no_grad():
        vae.decoder.network[0].weight.fill_(torch.nan)
    vae.save(tmp_path)
    assert same_bits(pvae.VAE.load(tmp_path).decoder.network[0].weight, vae.decoder.network[0].weight)


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_of_the_callers_is_changed(mode, tmp_path, caller_state):
    vae = of_layers().train(mode)
    pyro.param("somebodys", torch.ones(2))
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    before = caller_state()
    with torch.inference_mode():
        vae.save(tmp_path)
        loaded = pvae.VAE.load(tmp_path)
    before.assert_unchanged()
    assert all(module.training == mode for module in vae.modules())
    assert all(torch.equal(weights[name], value) for name, value in vae.state_dict().items())
    assert not any(parameter.is_inference() for parameter in loaded.parameters())
    assert loaded.training
    with torch.device("meta"):
        assert pvae.VAE.load(tmp_path).prior.loc.device.type == "cpu"


@pytest.mark.cuda
def test_a_vae_on_the_gpu_is_saved_and_comes_back_on_the_cpu(tmp_path):
    vae = own().to("cuda")
    vae.save(tmp_path)
    assert next(vae.parameters()).is_cuda
    loaded = pvae.VAE.load(tmp_path, modules=OWN)
    assert_same_vae(vae.cpu(), loaded)


@pytest.mark.parametrize("path", [str, Path, lambda p: "~/vae"], ids=["str", "Path", "~"])
def test_paths(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = path(tmp_path / "vae")
    compose_vae().save(folder)
    assert (tmp_path / "vae" / "weights.safetensors").is_file()
    pvae.VAE.load(folder)


# --- Classes ----------------------------------------------------------------------------------------------------------


def test_own_classes_must_be_passed(tmp_path):
    compose_vae(nn.Sequential(nn.Linear(2, 6), Cosine(6))).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"decoder\.network\.1 is a .*Cosine.*pass that class"):
        pvae.VAE.load(tmp_path)
    pvae.VAE.load(tmp_path, modules=[Cosine])


@pytest.mark.parametrize("modules", [["Cosine"], [torch.relu], [dict]])
def test_modules_must_be_module_classes(modules, tmp_path):
    with pytest.raises(ArgumentError, match="modules must be classes"):
        pvae.VAE.load(tmp_path, modules=modules)


def test_subclasses_are_passed_or_load_themselves(tmp_path):
    MyVAE(5).save(tmp_path / "mine")
    assert MyVAE.load(tmp_path / "mine").width == 5
    assert type(pvae.VAE.load(tmp_path / "mine", modules=[MyVAE])) is MyVAE
    with pytest.raises(CheckpointError, match=r"MyVAE.*pass that class"):
        pvae.VAE.load(tmp_path / "mine")
    compose_vae().save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds a VAE, not a MyVAE"):
        MyVAE.load(tmp_path / "plain")


# --- What cannot be saved ---------------------------------------------------------------------------------------------


class Forgets(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, width)

    def forward(self, x):
        return self.linear(x)


class Doubles(nn.Module):
    """Keeps something else under its argument's name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = 2 * width
        self.linear = nn.Linear(2, 6)

    def forward(self, x):
        return self.linear(x)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Random(nn.Module):
    """Draws numbers that are not saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mask", torch.rand(width), persistent=False)

    def forward(self, x):
        return x * self.mask


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


class Hidden(nn.Module):
    """Keeps its layers where torch does not see them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers[0](x)


def tied_parts() -> pvae.VAE:
    vae = compose_vae()
    vae.encoder.network[0].weight = nn.Parameter(torch.zeros(5, 6))
    vae.decoder.network[2].weight = nn.Parameter(torch.zeros(6, 5))
    vae.decoder.network[2].weight.data = vae.encoder.network[0].weight.data.t()
    return vae


def changed(change) -> pvae.VAE:
    vae = compose_vae(nn.Sequential(nn.Linear(2, 6), Cosine(6)), nn.Sequential(nn.Linear(6, 4), nn.Identity()))
    change(vae)
    return vae


def replace_method(vae):
    vae.encoder.forward = lambda x: posteriors.DiagonalNormal(nn.Linear(6, 4))(x)


def one_module_twice(vae):
    vae.encoder.network[0] = vae.decoder.more = nn.Linear(6, 4)


UNFIT = {
    "forgets": (lambda: compose_vae(Forgets(6)), r"decoder\.network is a Forgets, .*'width' is not kept"),
    "nested": (lambda: compose_vae(nn.Sequential(nn.ReLU(), Forgets(6))), r"decoder\.network\.1 is a Forgets"),
    "doubles": (lambda: compose_vae(Doubles(3)), r"decoder\.network\.width is 6, and 12 when"),
    "function": (lambda: compose_vae(nn.Sequential(nn.Linear(2, 6), Function(torch.relu))), r"network\.1 .*'function'"),
    "random": (lambda: compose_vae(nn.Sequential(nn.Linear(2, 6), Random(6))), r"network\.1\.mask is not saved"),
    "extra": (lambda: compose_vae(Extra(2, 6)), r"decoder\.network\._extra_state .* is no tensor"),
    "hidden": (lambda: compose_vae(Hidden([nn.Linear(2, 6)])), "the decoder gives other densities"),
    "tied": (tied_parts, r"decoder\.network\.2\.weight and encoder\.network\.0\.weight are one tensor"),
    "module-twice": (lambda: changed(one_module_twice), r"decoder\.more"),
    "attribute": (
        lambda: changed(lambda v: setattr(v.decoder, "extra", nn.ReLU())),
        r"decoder\.extra is torch\.nn\.ReLU",
    ),
    "parameter": (
        lambda: changed(lambda v: v.decoder.register_parameter("extra", nn.Parameter(torch.zeros(2)))),
        r"decoder\.extra is float32\[2\] in the file and not there",
    ),
    "resized": (
        lambda: changed(lambda v: setattr(v.decoder.network[0], "in_features", 3)),
        "cannot be rebuilt.*the decoder cannot take an argument",
    ),
    "number": (lambda: changed(lambda v: setattr(v.decoder.network[1], "shift", 0.5)), "the decoder gives other"),
    "buffer": (lambda: changed(lambda v: v.decoder.network[1].phase.add_(1)), r"network\.1\.phase is not saved"),
    "method": (lambda: changed(replace_method), "the encoder gives other densities"),
    "parametrized": (
        lambda: compose_vae(nn.utils.parametrizations.weight_norm(nn.Linear(2, 6))),
        r"decoder\.network",
    ),
    "complex": (
        lambda: changed(lambda v: v.decoder.register_buffer("c", torch.zeros(2, dtype=torch.complex128))),
        "weights cannot be saved.*complex128",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_would_not_come_back_is_refused_by_name_before_anything_is_written(name, tmp_path, caller_state):
    make, match = UNFIT[name]
    vae = make()
    before = caller_state()
    with pytest.raises(ProgramError, match=match) as caught:
        vae.save(tmp_path / "vae")
    assert str(caught.value).startswith("this VAE cannot be saved")
    assert not (tmp_path / "vae").exists()
    before.assert_unchanged()


def test_a_refused_save_leaves_what_was_there(tmp_path):
    vae = compose_vae()
    vae.save(tmp_path)
    with pytest.raises(ProgramError):
        compose_vae(Forgets(6)).save(tmp_path, overwrite=True)
    assert_same_vae(vae, pvae.VAE.load(tmp_path))
