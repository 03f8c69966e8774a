"""VAEs on disk: what is loaded is what was saved, bit by bit, and what is damaged or foreign is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch
from torch import nn

import pvae
from pvae import likelihoods, networks, posteriors, priors
from pvae.errors import ArgumentError, CheckpointError, ProgramError
from pvae.persistence import storage
from pvae.runtime.isolation import isolated


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


def composed(decoder: nn.Module | None = None, encoder: nn.Module | None = None) -> pvae.VAE:
    return pvae.VAE(
        priors.StandardNormal(2),
        likelihoods.Bernoulli(decoder or networks.mlp(2, [5], 6)),
        posteriors.DiagonalNormal(encoder or networks.mlp(6, [5], 4)),
    )


def of_layers() -> pvae.VAE:
    """As one would with torch's layers, BatchNorm's buffers moved."""
    vae = composed(
        nn.Sequential(nn.Linear(2, 8, bias=False), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 6)),
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.PReLU(), nn.Linear(8, 4)),
    )
    vae.encode(torch.rand(20, 6))
    return vae


def frozen() -> pvae.VAE:
    vae = composed()
    vae.encoder.network[0].requires_grad_(False)
    return vae


def non_contiguous() -> pvae.VAE:
    vae = pvae.VAE.conv((1, 4, 6), 2, (4,), 8).to(memory_format=torch.channels_last)
    weight = vae.encoder.network.network[3].weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    return vae


def mixed() -> pvae.VAE:
    return composed(encoder=InDtype(networks.mlp(6, [5], 4).double(), torch.float64))


def own() -> pvae.VAE:
    return composed(
        nn.Sequential(WeightNormed(2, 6), Cosine(6, 0.5)),
        nn.Sequential(Scale(torch.rand(6) + 0.5), nn.Linear(6, 4), Tied(4)),
    )


OWN = [Scale, Cosine, WeightNormed, Tied, InDtype, MyVAE]
VAES = {
    "mlp": lambda: pvae.VAE.mlp((2, 3), 2, [8]),
    "mlp-linear": lambda: pvae.VAE.mlp(6, 2, []),
    "mlp-activation": lambda: pvae.VAE.mlp(6, 2, [8], activation=nn.SiLU),
    "mlp-gaussian": lambda: pvae.VAE.mlp((2, 3), 2, [8], "gaussian"),
    "mlp-per-pixel": lambda: pvae.VAE.mlp((2, 3), 2, [8], "gaussian-per-pixel"),
    "conv": lambda: pvae.VAE.conv((1, 4, 6), 2, (4,), 8),
    "conv-per-pixel": lambda: pvae.VAE.conv((3, 4, 6), 2, (4, 4), 8, "gaussian-per-pixel"),
    "layers": of_layers,
    "float64": lambda: of_layers().double(),
    "bfloat16": lambda: composed().bfloat16(),
    "mixed": mixed,
    "frozen": frozen,
    "non-contiguous": non_contiguous,
    "own": own,
    "own-float64": lambda: own().double(),
    "subclass": lambda: MyVAE(7),
    "subclass-float64": lambda: MyVAE(7).double(),
}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(t):
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same(vae: pvae.VAE, other: pvae.VAE) -> None:
    assert type(other) is type(vae)
    assert repr(other) == repr(vae)
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(vae, tensors)()), dict(getattr(other, tensors)())
        assert list(ours) == list(theirs)
        for name in ours:
            assert same_bits(ours[name], theirs[name]), name
            assert ours[name].requires_grad == theirs[name].requires_grad, name
    x = torch.rand(5, *vae.event_shape).round()
    with isolated([vae, other], seed=0):
        z = vae.encode(x).sample()
        for ours, theirs in (
            (vae.encode(x).mean, other.encode(x).mean),
            (vae.encode(x).stddev, other.encode(x).stddev),
            (vae.decode(z).mean, other.decode(z).mean),
            (vae.decode(z).log_prob(x.to(z)), other.decode(z).log_prob(x.to(z))),
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", VAES)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    vae = VAES[name]()
    vae.save(tmp_path / "vae")
    loaded = pvae.VAE.load(tmp_path / "vae", modules=OWN)
    assert_same(vae, loaded)
    assert all(module.training for module in loaded.modules())
    assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("name", ["mlp", "conv-per-pixel", "layers", "own"])
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
    assert_same(vae, loaded)


def test_weights_that_are_nan_can_be_saved(tmp_path):
    """Of a training that diverged: they are what there is to look at."""
    vae = composed()
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_vae_on_the_gpu_is_saved_and_comes_back_on_the_cpu(tmp_path):
    vae = own().to("cuda")
    vae.save(tmp_path)
    assert next(vae.parameters()).is_cuda
    loaded = pvae.VAE.load(tmp_path, modules=OWN)
    assert_same(vae.cpu(), loaded)


@pytest.mark.parametrize("path", [str, Path, lambda p: "~/vae"], ids=["str", "Path", "~"])
def test_paths(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = path(tmp_path / "vae")
    composed().save(folder)
    assert (tmp_path / "vae" / "weights.safetensors").is_file()
    pvae.VAE.load(folder)


# Classes


def test_own_classes_must_be_passed(tmp_path):
    composed(nn.Sequential(nn.Linear(2, 6), Cosine(6))).save(tmp_path)
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
    composed().save(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="holds a VAE, not a MyVAE"):
        MyVAE.load(tmp_path / "plain")


# What cannot be saved


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
    vae = composed()
    vae.encoder.network[0].weight = nn.Parameter(torch.zeros(5, 6))
    vae.decoder.network[2].weight = nn.Parameter(torch.zeros(6, 5))
    vae.decoder.network[2].weight.data = vae.encoder.network[0].weight.data.t()
    return vae


def changed(change) -> pvae.VAE:
    vae = composed(nn.Sequential(nn.Linear(2, 6), Cosine(6)), nn.Sequential(nn.Linear(6, 4), nn.Identity()))
    change(vae)
    return vae


def replace_method(vae):
    vae.encoder.forward = lambda x: posteriors.DiagonalNormal(nn.Linear(6, 4))(x)


def one_module_twice(vae):
    vae.encoder.network[0] = vae.decoder.more = nn.Linear(6, 4)


UNFIT = {
    "forgets": (lambda: composed(Forgets(6)), r"decoder\.network is a Forgets, .*'width' is not kept"),
    "nested": (lambda: composed(nn.Sequential(nn.ReLU(), Forgets(6))), r"decoder\.network\.1 is a Forgets"),
    "doubles": (lambda: composed(Doubles(3)), r"decoder\.network\.width is 6, and 12 when"),
    "function": (lambda: composed(nn.Sequential(nn.Linear(2, 6), Function(torch.relu))), r"network\.1 .*'function'"),
    "random": (lambda: composed(nn.Sequential(nn.Linear(2, 6), Random(6))), r"network\.1\.mask is not saved"),
    "extra": (lambda: composed(Extra(2, 6)), r"decoder\.network\._extra_state .* is no tensor"),
    "hidden": (lambda: composed(Hidden([nn.Linear(2, 6)])), "the decoder gives other densities"),
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
        lambda: composed(nn.utils.parametrizations.weight_norm(nn.Linear(2, 6))),
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
    vae = composed()
    vae.save(tmp_path)
    with pytest.raises(ProgramError):
        composed(Forgets(6)).save(tmp_path, overwrite=True)
    assert_same(vae, pvae.VAE.load(tmp_path))


# Folders


def test_overwriting_is_asked_for(tmp_path):
    first, second = composed(), composed()
    first.save(tmp_path)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        second.save(tmp_path)
    assert_same(first, pvae.VAE.load(tmp_path))
    for vae in (second, first, first):
        vae.save(tmp_path, overwrite=True)
        assert_same(vae, pvae.VAE.load(tmp_path))
        assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_not_mixed_with(overwrite, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        composed().save(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="no folder"):
        composed().save(tmp_path / "thesis.tex", overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_other_files_that_came_later_are_left(tmp_path):
    composed().save(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "film.part").write_text("x")
    composed().save(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "x"


def test_other_sets_are_not_replaced(tmp_path):
    contents = {"weights.safetensors": b"", "config.json": b"{}", "training.pt": b"x"}
    storage.write(tmp_path, contents)
    with pytest.raises(CheckpointError, match=r"holds no VAE but config\.json, training\.pt"):
        composed().save(tmp_path, overwrite=True)
    assert storage.read(tmp_path) == contents


def test_what_a_first_save_left_that_was_cut_off_is_no_hindrance(tmp_path):
    for name in ("config.json", "weights.safetensors.0a1b2c3d.part", ".lock"):
        (tmp_path / name).write_bytes(b"cut")
    vae = composed()
    vae.save(tmp_path)
    assert_same(vae, pvae.VAE.load(tmp_path))
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_one_can_be_replaced(tmp_path):
    composed().save(tmp_path)
    (tmp_path / "config.json").unlink()
    vae = composed()
    vae.save(tmp_path, overwrite=True)
    assert_same(vae, pvae.VAE.load(tmp_path))


# Damage


@pytest.fixture
def saved(tmp_path):
    composed().save(tmp_path / "vae")
    return tmp_path / "vae"


FILES = ["config.json", "weights.safetensors", storage.MANIFEST]
DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "one-short": lambda content: content[:-2],
    "empty": lambda content: b"",
    "first-bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "middle-bit": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
    ),
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused(file, damage, saved):
    (saved / file).write_bytes(DAMAGE[damage]((saved / file).read_bytes()))
    with pytest.raises(CheckpointError, match=file):
        pvae.VAE.load(saved)


@pytest.mark.parametrize("file", FILES)
def test_missing_files_are_named(file, saved):
    (saved / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        pvae.VAE.load(saved)


@pytest.mark.parametrize("path", ["nowhere", "nowhere/below", "empty", "file"])
def test_folders_without_a_vae_are_named(path, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=path):
        pvae.VAE.load(tmp_path / path)


@pytest.mark.parametrize("contents", [{}, {"config.json": b"{}"}, {"weights.safetensors": b""}, {"a": b""}], ids=str)
def test_sets_of_something_else_are_named(contents, tmp_path):
    storage.write(tmp_path, contents)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: it has no (config\.json|weights\.safetensors)"):
        pvae.VAE.load(tmp_path)


def test_a_newer_schema_is_named(saved, monkeypatch):
    monkeypatch.setattr(storage, "SCHEMA", storage.SCHEMA + 1)
    storage.write(saved, storage.read(saved))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has schema \d.*Update pvae"):
        pvae.VAE.load(saved)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def bombs(marker: Path) -> dict[str, bytes]:
    torch.save({"weight": Bomb(marker)}, marker.with_suffix(".pt"))
    return {"pickle": pickle.dumps(Bomb(marker)), "torch": marker.with_suffix(".pt").read_bytes()}


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("file", FILES)
def test_pickles_are_refused_and_not_run(file, kind, saved, tmp_path):
    marker = tmp_path / "was-run"
    content = bombs(marker)[kind]
    if file == storage.MANIFEST:
        (saved / file).write_bytes(content)
    else:  # with a manifest that says it belongs there
        storage.write(saved, {**storage.read(saved), file: content})
    with pytest.raises(CheckpointError):
        pvae.VAE.load(saved)
    assert not marker.exists()
    pickle.loads(content) if kind == "pickle" else None
    assert marker.exists() == (kind == "pickle")  # it would have run


CRAFTED = {
    "no-json": lambda config: b"\x80\x04K\x01.",
    "not-utf8": lambda config: b"\xff\xfe\xfd",
    "list": lambda config: [config],
    "string": lambda config: "x",
    "no-model": lambda config: {k: v for k, v in config.items() if k != "model"},
    "no-dtypes": lambda config: {k: v for k, v in config.items() if k != "dtypes"},
    "dtypes-list": lambda config: {**config, "dtypes": ["float32"]},
    "dtype-unknown": lambda config: {**config, "dtypes": {"decoder.network.0.weight": "load"}},
    "dtype-unhashable": lambda config: {**config, "dtypes": {"decoder.network.0.weight": []}},
    "dtype-bits": lambda config: {**config, "dtypes": {"decoder.network.0.weight": "bits8"}},
    "default-int": lambda config: {**config, "default_dtype": "int64"},
    "default-none": lambda config: {**config, "default_dtype": None},
    "frozen": lambda config: {**config, "frozen": None},
    "deep": lambda config: b"[" * 100_000,
    "not-a-vae": lambda config: {**config, "model": {"class": "torch.nn.ReLU", "arguments": {}}},
    "model-none": lambda config: {**config, "model": None},
    "function": lambda config: {**config, "model": {"class": "os.system", "arguments": {"command": "exit 1"}}},
    "parts-do-not-fit": lambda config: {
        **config,
        "model": {**config["model"], "arguments": {**config["model"]["arguments"], "prior": None}},
    },
}


@pytest.mark.parametrize("name", CRAFTED)
def test_configurations_that_are_none_are_refused(name, saved, caller_state):
    files = storage.read(saved)
    made = CRAFTED[name](json.loads(files["config.json"]))
    storage.write(saved, {**files, "config.json": made if isinstance(made, bytes) else json.dumps(made).encode()})
    before = caller_state()
    with pytest.raises(CheckpointError):
        pvae.VAE.load(saved)
    before.assert_unchanged()
    assert torch.get_default_dtype() == torch.float32


def test_weights_of_another_vae_are_refused_with_their_names(saved, tmp_path):
    other = pvae.VAE.mlp(6, 2, [9], "gaussian").double()
    other.save(tmp_path / "other")
    weights = storage.read(tmp_path / "other")["weights.safetensors"]
    storage.write(saved, {**storage.read(saved), "weights.safetensors": weights})
    with pytest.raises(CheckpointError) as caught:
        pvae.VAE.load(saved)
    for part in (
        "decoder.log_scale is float64[] in the file and not there when it is built",
        "encoder.network.0.weight is float64[9, 6] in the file and float32[5, 6] when it is built",
    ):
        assert part in str(caught.value)


# Several processes, and the disk

PROCESS = """
import os, random, resource, signal, sys, time, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
import pvae
folder = Path(sys.argv[1])

def make(seed):
    torch.manual_seed(seed)
    return pvae.VAE.mlp(6, 2, [16])

def state(vae):
    return [t.tolist() for t in vae.state_dict().values()]

A, B = make(0), make(1)
WHOLE = [state(A), state(B)]

def forked(run, *args):
    pid = os.fork()
    if pid:
        return pid
    try:
        run(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def save_forever():
    while True:
        A.save(folder, overwrite=True)
        B.save(folder, overwrite=True)
"""

KILLED = """
A.save(folder)
rng = random.Random(0)
seen = set()
for kill in range(200):
    if kill >= 20 and seen == {0, 1}:
        break
    pid = forked(save_forever)
    time.sleep(rng.uniform(0.01, 0.15) * (1 + kill / 10))  # longer on a machine that is busy
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    seen.add(WHOLE.index(state(pvae.VAE.load(folder))))
assert seen == {0, 1}, seen
A.save(folder, overwrite=True)
assert len([p for p in folder.iterdir() if not p.name.startswith(".")]) < 10, list(folder.iterdir())
print("done")
"""

FIRST_KILLED = """
rng = random.Random(0)
for i in range(10):
    own = folder / str(i)
    pid = forked(lambda: (own.mkdir(), A.save(own)))
    time.sleep(rng.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    A.save(own, overwrite=True)
    assert state(pvae.VAE.load(own)) == WHOLE[0]
print("done")
"""

FULL = """
A.save(folder)
limit = (folder / "weights.safetensors").stat().st_size // 2
for size in (0, 100, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        B.save(folder, overwrite=True)
    except pvae.CheckpointError as error:
        assert "space" in str(error), error
    else:
        raise AssertionError("it was written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert state(pvae.VAE.load(folder)) == WHOLE[0]
    assert not list(folder.glob("*.part"))
B.save(folder, overwrite=True)
assert state(pvae.VAE.load(folder)) == WHOLE[1]
print("done")
"""

AT_ONCE = """
def save_often(vae):
    done = 0
    while done < 40:
        try:
            vae.save(folder, overwrite=True)
            done += 1
        except pvae.CheckpointError as error:
            assert "in use by another process" in str(error), error

A.save(folder)
running = {forked(save_often, vae) for vae in (A, B)}
loads = 0
while running:
    assert state(pvae.VAE.load(folder)) in WHOLE
    loads += 1
    pid, status = os.waitpid(-1, os.WNOHANG)
    assert status == 0, status
    running.discard(pid)
assert loads > 10, loads
assert state(pvae.VAE.load(folder)) in WHOLE
assert len([p for p in folder.iterdir() if not p.name.startswith(".")]) == 3, list(folder.iterdir())
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("script", [KILLED, FIRST_KILLED, FULL, AT_ONCE], ids=["killed", "first", "full", "at-once"])
def test_whatever_happens_a_whole_vae_is_loaded(script, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROCESS + script, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.stdout == "done\n", run.stdout + run.stderr
