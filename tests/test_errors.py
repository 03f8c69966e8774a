"""A warning points at the line that called pvae, from wherever it comes."""

from __future__ import annotations

import inspect
import math
import re
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae.errors import real_number


def reads_a_number(x):
    loc = pyro.param("loc", lambda: torch.zeros(()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0 + 0.0 * x.sum().item()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    scale = pyro.param("scale", lambda: torch.ones(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, scale))


def fit_captures_nothing():
    pvae.fit(reads_a_number, guide, torch.randn(8), epochs=1, compile=True, progress=False)


def fit_drops_data():
    loader = DataLoader(TensorDataset(torch.randn(8, 1)), batch_size=3, drop_last=True)
    pair = pvae.VAE.mlp(1, 1, [2], "gaussian")
    pvae.fit(pair.model, pair.guide, loader, epochs=1, progress=False)


def evidence_of_initial_values():
    pvae.log_evidence(reads_a_number, guide, torch.randn(8), num_samples=30)


def compiled_svi_captures_nothing():
    svi = pvae.svi.CompiledSVI(reads_a_number, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    assert isinstance(svi, SVI)
    for _ in range(3):
        svi.step(torch.ones(8))


def fit_of_another_scale():
    pvae.fit(reads_a_number, guide, 1e-3 * torch.randn(8), epochs=1, compile=False, progress=False)


def evidence_in_another_order():
    loader = DataLoader(TensorDataset(torch.randn(8, 1)), batch_size=4, shuffle=True)
    pair = pvae.VAE.mlp(1, 1, [2], "gaussian")
    pvae.log_evidence(pair.model, pair.guide, loader, num_samples=30)


def resume_of_a_damaged_checkpoint():
    pair = pvae.VAE.mlp(1, 1, [2], "gaussian")
    with tempfile.TemporaryDirectory() as folder:
        options = {"checkpoint": folder, "compile": False, "progress": False}
        pvae.fit(pair.model, pair.guide, torch.randn(8, 1), epochs=2, **options)
        last = max(Path(folder).glob("epoch-*"))
        next(last.glob("*.safetensors")).write_bytes(b"")
        pvae.svi.load_checkpoint(folder, pair.model, pair.guide, torch.randn(8, 1))


CALLS = {
    fit_of_another_scale: "noise so wide",
    evidence_in_another_order: "in the order",
    resume_of_a_damaged_checkpoint: "Going back",
    fit_captures_nothing: "uncaptured",
    fit_drops_data: "drop_last",
    evidence_of_initial_values: "initial values",
    compiled_svi_captures_nothing: "uncaptured",
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_warning_points_at_the_line_that_called_pvae(call):
    with pytest.warns(UserWarning, match=CALLS[call]) as caught:
        call()
    lines, first = inspect.getsourcelines(call)
    for warning in caught:
        assert warning.filename == __file__, warning
        line = lines[warning.lineno - first]
        assert any(call in line for call in ("pvae.fit(", "log_evidence(", "load_checkpoint(", ".step(")), line


def test_a_second_caller_is_warned_too():
    def first():
        pvae.errors.warn("the same words")

    def second():
        pvae.errors.warn("the same words")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for call in (first, first, second, second):
            call()
    assert len(caught) == 2  # once for each line, as Python's filter has it


@pytest.mark.parametrize(
    "bounds, message",
    [
        ({}, "a number"),
        ({"above": 0}, "a positive number"),
        ({"least": 0}, "a number of at least 0"),
        ({"above": 0, "below": 1}, "a number above 0 and below 1"),
        ({"above": 0, "most": 1}, "a number above 0 and at most 1"),
    ],
    ids=str,
)
def test_what_is_no_number_within_its_bounds_is_named(bounds, message):
    for value in (math.nan, math.inf, True, "0.5", None, torch.ones(2), -1.0 if bounds else -math.inf):
        with pytest.raises(pvae.ArgumentError, match=f"^rate must be {message}, got {re.escape(repr(value))}.$"):
            real_number("rate", value, **bounds)
    for value in (0.5, np.float32(0.5), Fraction(1, 2)):
        assert real_number("rate", value, **bounds) == 0.5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: pvae.VAE.mlp(6, 2, hidden=8), r"hidden must be a sequence of whole numbers, such as \[8\]; got 8"),
        (lambda: pvae.VAE.mlp(6, 2, hidden=[8, 0]), "hidden must be a whole number of at least 1, got 0"),
        (lambda: pvae.VAE.mlp(6, 2, hidden="88"), "hidden must be a sequence"),
        (lambda: pvae.VAE.conv((1, 8, 8), channels=8), r"channels must be a sequence .*\[8\]"),
        (lambda: pvae.VAE.conv((1, 8, 8), hidden=[8]), r"hidden must be a whole number .* got \[8\]"),
        (lambda: pvae.ConditionalVAE.mlp(6, 2, hidden=8, num_classes=2), "hidden must be a sequence"),
        (lambda: pvae.SemiSupervisedVAE.mlp(6, 2, hidden=8, num_classes=2), "hidden must be a sequence"),
        (lambda: pvae.MaskedVAE.mlp(6, 2, hidden=8), "hidden must be a sequence"),
        (lambda: pvae.Autoencoder.mlp(6, 2, hidden=8), "hidden must be a sequence"),
        (lambda: pvae.Autoencoder.conv((1, 8, 8), channels=8), "channels must be a sequence"),
        (lambda: pvae.HierarchicalVAE.mlp(6, [2, 2], hidden=8), "hidden must be a sequence of widths for each layer"),
        (lambda: pvae.HierarchicalVAE.mlp(6, [2, 2], hidden=[8, 8]), r"hidden must be a sequence .*\[8\]"),
        (lambda: pvae.HierarchicalVAE.mlp(6, 2), r"latent_dims must be a sequence .*\[2\]"),
        (lambda: pvae.priors.Flow(2, hidden=8), "hidden must be a sequence"),
    ],
)
def test_one_width_is_no_sequence(make, message):
    with pytest.raises(pvae.ArgumentError, match=message):
        make()


def test_data_are_no_number_of_draws(small_vae, bits):
    with pytest.raises(pvae.ArgumentError, match=r"num_samples must be a whole .* got tensor.{1,80}\(Tensor\)\.$"):
        small_vae.sample(bits)
    assert small_vae.sample(torch.tensor(3)).shape == (3, 6)
