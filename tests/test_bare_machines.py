"""A machine without a GPU, a home, a screen or whole packages: an error says what is the matter, and the rest works."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers import evidence, fit, lines_of, process_state, python, python_path, same, weights
from pairs import Untouched

import pvae


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda")])
@pytest.mark.parametrize("call", [fit, evidence])
def test_a_gpu_that_is_not_there_is_said_before_anything_moves(device, call, bits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pair = Untouched()
    places, before = [p.data_ptr() for p in pair.parameters()], weights(pair)
    with pytest.raises(pvae.DeviceError, match=r"device='cuda.*no CUDA device was found.*'auto' or 'cpu'"):
        call(pair, bits, device=device)
    assert [p.data_ptr() for p in pair.parameters()] == places
    assert same(before, weights(pair))


def test_tests_do_not_see_a_gpu():
    """Nor do processes that they start, unless they are marked ``cuda``."""
    assert not torch.cuda.is_available()
    assert lines_of(python("import torch; print(torch.cuda.is_available(), torch.cuda.device_count())")) == ["False 0"]


OPTIMIZED = """
import pvae, pyro, torch
from pyro import distributions as dist

if __debug__:
    raise SystemExit("not optimized")
x = torch.bernoulli(torch.full((100, 6), 0.3))
vae = pvae.VAE.mlp(6, 2, [8])
before = [p.detach().clone() for p in vae.parameters()]

def other(x):
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

def narrow(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor(-200.0).exp()).to_event(1))

nan, grey = x.clone(), x.clone()
nan[70, 3], grey[70, 3] = torch.nan, 0.5
for call in (pvae.fit, pvae.log_evidence):
    for guide, data in ((vae.guide, nan), (vae.guide, grey), (vae.guide, 255 * x), (other, x), (narrow, x)):
        try:
            call(vae.model, guide, data, progress=False)
            print("not refused")
        except Exception as error:
            print(type(error).__name__)
print(all(torch.equal(p, q) for p, q in zip(before, vae.parameters())))
print(pyro.infer.util.is_validation_enabled())
"""


@pytest.mark.slow
def test_checks_do_not_rest_on_asserts():
    """``python -O`` turns off asserts, and with them Pyro's validation."""
    lines = lines_of(python(OPTIMIZED, options=["-O"]))
    for begin in (0, 5):
        assert lines[begin : begin + 4] == ["DataError"] * 3 + ["ProgramError"]
        assert lines[begin + 4] in ("ProgramError", "NumericalError", "DataError")
    assert lines[10:] == ["True", "False"]


@pytest.mark.slow
def test_a_home_that_cannot_be_written(tmp_path):
    """And no screen: training is compiled, log p(x) is estimated, figures are drawn, and MNIST says what it lacks."""
    code = f"""
import sys
import pvae, torch
{inspect.getsource(process_state)}
x = torch.bernoulli(torch.full((128, 6), 0.3))
vae = pvae.VAE.mlp(6, 2, [8])
before = process_state()
result = pvae.fit(vae.model, vae.guide, x, epochs=4, batch_size=64, compile=True, validation=x)
estimate = pvae.log_evidence(vae.model, vae.guide, x, num_samples=50)
now = process_state() | {{name: before[name] for name in ("warnings", "environment")}}  # torch's compiler adds to them
print(result.compile_seconds > 0, bool(estimate.log_px.isfinite().all()), len(repr(estimate)) > 100)
print([name for name in before if now[name] != before[name]])
try:
    pvae.datasets.mnist()
except pvae.DatasetError as error:
    print(error)
log_weights = dict(guide=torch.randn(99), prior=torch.tensor([-torch.inf, -3.0]))
figures = dict(
    learning_curve=[result.history],
    images=[torch.rand(5, 8, 8)],
    reconstructions=[torch.rand(5, 8, 8), torch.rand(5, 1, 8, 8)],
    latent_plane=[dict(guide=torch.randn(9, 2))],
    weight_histogram=[log_weights],
    running_estimate=[log_weights],
)
for name, arguments in figures.items():
    getattr(pvae.plots, name)(*arguments).figure.savefig(f"{{sys.argv[1]}}/{{name}}.png")
"""
    nowhere = "/dev/null/nowhere"
    folders = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "XDG_CONFIG_HOME": nowhere, "MPLCONFIGDIR": nowhere}
    unset = dict.fromkeys(["PVAE_DATA", "DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"])
    lines = lines_of(python(code, tmp_path, **folders, **unset))
    assert lines[:2] == ["True True True", "[]"]
    assert lines[2].startswith("MNIST is not in /dev/null/nowhere/pvae, and downloading it failed: ")
    assert "Not a directory" in lines[2]
    assert "set PVAE_DATA to a folder that has them, or use pvae.datasets.digits()" in lines[2]
    assert len(lines) == 3
    drawn = {path.stem: path.read_bytes()[:4] for path in tmp_path.iterdir()}
    names = ("learning_curve", "images", "reconstructions", "latent_plane", "weight_histogram", "running_estimate")
    assert drawn == dict.fromkeys(names, b"\x89PNG")


BROKEN = {
    "arviz": "ImportError('cannot import name InferenceData')",
    "xarray": "ImportError('no such thing')",
    "torchvision": "RuntimeError('operator torchvision::nms does not exist')",
    "matplotlib": "OSError('libfreetype.so: cannot open shared object file')",
    "sklearn": "ValueError('numpy.dtype size changed')",
}


def test_packages_that_are_broken_cost_only_what_needs_them(tmp_path):
    for name, error in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {error}")
    code = """
import pvae, torch
x = torch.bernoulli(torch.full((128, 6), 0.3))
vae = pvae.VAE.mlp(6, 2, [8])
result = pvae.fit(vae.model, vae.guide, x, epochs=1, validation=x)
estimate = pvae.log_evidence(vae.model, vae.guide, x, num_samples=50)
print(len(repr(result)) > 20, len(repr(estimate)) > 100, vae.sample(2).shape == (2, 6))
calls = pvae.datasets.mnist, pvae.datasets.digits, lambda: pvae.plots.learning_curve(result.history)
for call in calls:
    try:
        call()
    except pvae.PVAEError as error:
        print(type(error).__name__, error)
"""
    path = python_path(tmp_path, Path(pvae.__file__).parents[1])
    lines = lines_of(python(code, PYTHONPATH=path, PVAE_DATA=tmp_path / "cache"))
    assert lines[0] == "True True True"
    for line, words in zip(
        lines[1:],
        [
            "DatasetError MNIST is not in .*torchvision cannot be imported.*nms does not exist.*digits()",
            "DatasetError the digits come with scikit-learn, which cannot be imported: numpy.dtype size changed",
            "PVAEError to draw takes matplotlib, which cannot be imported: libfreetype.so",
        ],
        strict=True,
    ):
        assert re.match(words, line)
