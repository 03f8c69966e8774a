"""Pyro's automatic guides, captured: the same steps as with `pyro.infer.SVI`, and changes that are noticed."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer import autoguide as auto
from pyro.infer.autoguide import initialization
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import nn

import pvae
from pvae.svi import CompiledSVI, compiled_svi
from pvae.svi import step as engine

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 3, generator=GENERATOR), torch.randn(40, generator=GENERATOR)


@pytest.fixture(autouse=True)
def _captured_at_once(never_compiled, monkeypatch):
    never_compiled(compiled_svi)
    never_compiled(engine)
    monkeypatch.setattr(compiled_svi, "_STEPS_FOR_A_CAPTURE", 0)
    monkeypatch.setattr(compiled_svi._Losses, "after", 1)


def regression(x, y):
    """Global latents: real and positive, a vector, and one for each of two groups."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", 2):
        b = pyro.sample("b", dist.Normal(0.0, s))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b.sum(), s), obs=y)


def mixed(x, y):
    """Two kinds of data, which are enumerated."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x @ w + k, 1.0), obs=y)


def local(x, y):
    """A latent for each datum, of which some are drawn."""
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=10) as rows:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m + x[rows].sum(-1), s), obs=y[rows])


class Bayesian(PyroModule):
    """Random weights as attributes."""

    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x, y):
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def of_parts(model):
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoDiagonalNormal(poutine.block(model, expose=["w"])))
    guide.append(auto.AutoDelta(poutine.block(model, expose=["s", "b"])))
    return guide


def discrete(model):
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoNormal(poutine.block(model, expose=["w"])))
    guide.append(auto.AutoDiscreteParallel(poutine.block(model, expose=["k"])))
    return guide


def subsampled(model):
    return auto.AutoNormal(model, create_plates=lambda x, y: pyro.plate("data", len(x), subsample_size=10))


def easy(model):
    @easy_guide(model)
    def guide(self, x, y):
        rest = self.group(match=".*")
        loc = pyro.param("loc", lambda: torch.zeros(rest.event_shape))
        rest.sample("all", dist.Normal(loc, 0.1).to_event(1))

    return guide


CASES = {
    "Normal": (regression, auto.AutoNormal),
    "DiagonalNormal": (regression, auto.AutoDiagonalNormal),
    "MultivariateNormal": (regression, auto.AutoMultivariateNormal),
    "LowRankMultivariateNormal": (regression, auto.AutoLowRankMultivariateNormal),
    "Delta": (regression, auto.AutoDelta),
    "LaplaceApproximation": (regression, auto.AutoLaplaceApproximation),
    "IAFNormal": (regression, lambda model: auto.AutoIAFNormal(model, hidden_dim=[8])),
    "NormalizingFlow": (regression, lambda model: auto.AutoNormalizingFlow(model, dist.transforms.planar)),
    "Structured": (regression, auto.AutoStructured),
    "Gaussian": (regression, auto.AutoGaussian),
    "GuideList": (regression, of_parts),
    "DiscreteParallel": (mixed, discrete),
    "subsampled": (local, subsampled),
    "random weights": (Bayesian, auto.AutoNormal),
    "initialised elsewhere": (regression, lambda m: auto.AutoNormal(m, init_loc_fn=initialization.init_to_sample)),
    "easy guide": (regression, easy),
}


def objective(model):
    return TraceEnum_ELBO(max_plate_nesting=1) if model is mixed else Trace_ELBO()


def run(cls, case, between=lambda guide: None):
    """Losses of six steps, of two without one, of six more after something has happened, and the parameters."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, make = CASES[case]
    program = model() if isinstance(model, type) else model
    guide = make(program)
    svi = cls(program, guide, Adam({"lr": 0.02}), objective(model))
    losses = [svi.step(X, Y) for _ in range(6)] + [svi.evaluate_loss(X, Y) for _ in range(4)]
    between(guide)
    losses += [svi.step(X, Y) for _ in range(6)]
    return losses, {name: p.detach().clone() for name, p in pyro.get_param_store().items()}, svi


@pytest.mark.parametrize("case", CASES)
def test_steps_are_pyros(case):
    ours, our_params, svi = run(CompiledSVI, case)
    theirs, their_params, _ = run(SVI, case)
    assert svi.captures == 2  # with gradients, and without
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, value in their_params.items():
        torch.testing.assert_close(our_params[name], value, rtol=1e-4, atol=1e-5)


CHANGES = {
    "a number": lambda guide: setattr(guide, "_init_scale", 0.5),
    "a new attribute": lambda guide: setattr(guide, "tempered", 0.5),
    "a parameter": lambda guide: setattr(guide.locs, "s", pyro.nn.PyroParam(torch.tensor(3.0))),
    "plates": lambda guide: setattr(guide, "create_plates", lambda x, y: pyro.plate("group", 2, dim=-1)),
    "begun anew": lambda guide: setattr(guide, "prototype_trace", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_guide_that_changes_is_captured_anew(change):
    ours, _, svi = run(CompiledSVI, "Normal", CHANGES[change])
    assert svi.captures == 3  # it was captured before, and its loss
    assert ours == pytest.approx(run(SVI, "Normal", CHANGES[change])[0], rel=1e-5)


GLOBAL = ["Normal", "DiagonalNormal", "MultivariateNormal", "Delta", "IAFNormal", "Structured", "GuideList"]


@pytest.mark.parametrize("case", GLOBAL)
def test_fit_captures_them(case):
    results = []
    for compile in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, make = CASES[case]
        result = pvae.fit(model, make(model), (X, Y), epochs=4, batch_size=20, seed=1, compile=compile, progress=False)
        results.append(result.history["elbo"])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
