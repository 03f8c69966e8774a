"""Latents marked for enumeration: the objective that sums them out, and the bound of held-out data."""

from __future__ import annotations

import copy
import math
from functools import partial

import helpers
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    autoguide,
    config_enumerate,
)
from torch import nn

import pvae
from pvae import objectives
from pvae.runtime.isolation import isolate
from pvae.svi import elbos as bounds
from pvae.svi import step as engine
from pvae.svi import validation, verification

fit = partial(helpers.fit, epochs=5, batch_size=200, lr=0.05)

CENTRES = (-3.0, 0.0, 4.0)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(3, (600,), generator=generator)
    return torch.tensor(CENTRES)[k] + 0.5 * torch.randn(600, generator=generator)


class Clusters(nn.Module):
    """A mixture of three normals on the line; ``in_model`` and ``in_guide`` are the marks of the latent there.

    With no mark for the guide the latent is in the model alone.
    """

    def __init__(self, in_model="parallel", in_guide=None, drawn=False):
        super().__init__()
        self.marks = {"enumerate": in_model}, {"enumerate": in_guide}
        self.drawn = drawn or in_guide is not None
        self.centres = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))
        self.weights = nn.Parameter(torch.zeros(3))
        self.encoder = nn.Linear(1, 3)
        nn.init.zeros_(self.encoder.weight)
        nn.init.zeros_(self.encoder.bias)

    def model(self, x):
        pyro.module("clusters", self)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=self.weights), infer=self.marks[0])
            pyro.sample("x", dist.Normal(self.centres[k], 0.5), obs=x)

    def guide(self, x):
        if self.drawn:
            pyro.module("clusters", self)
            with pyro.plate("data", len(x)):
                pyro.sample("k", dist.Categorical(logits=self.encoder(x[:, None])), infer=self.marks[1])

    def joint(self, x):
        """``log p(x, k)`` for each datum and each k."""
        return self.weights.log_softmax(0) + dist.Normal(self.centres, 0.5).log_prob(x[:, None])

    @torch.no_grad()
    def elbo(self, x):
        """Exact, in nats per datum."""
        if not self.drawn:
            return self.joint(x).logsumexp(-1).mean().item()
        log_q = self.encoder(x[:, None]).log_softmax(-1)
        return (log_q.exp() * (self.joint(x) - log_q)).sum(-1).mean().item()


# --- which objective ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marks, chosen",
    [
        (("parallel", None), TraceEnum_ELBO),
        ((None, "parallel"), TraceEnum_ELBO),
        ((None, "sequential"), TraceEnum_ELBO),
        (("parallel", "parallel"), TraceEnum_ELBO),
        (("parallel", None, True), Trace_ELBO),  # the guide draws it
        ((None, None, True), Trace_ELBO),
    ],
)
def test_latents_marked_for_enumeration_are_enumerated_by_default(marks, chosen, x):
    pair = Clusters(*marks)
    with isolate(seed=0):
        verified = verification.verify(pair.model, pair.guide, (x,), (x,))
    assert type(bounds.resolve(None, verified)) is chosen


def test_without_an_objective_the_clusters_are_found(x):
    """600 data of scale 0.5 in three clusters: each centre within five standard errors, 5 * 0.5 / 200^0.5 = 0.18."""
    pair = Clusters()
    result = fit(pair, x, epochs=60, validation=x)
    assert sorted(pair.centres.tolist()) == pytest.approx(CENTRES, abs=0.18)
    assert result.history["validation_elbo"][-1] == pytest.approx(pair.elbo(x), abs=1e-5)


def test_the_default_is_trace_enum(x):
    ours, theirs = Clusters(), Clusters()
    fit(ours, x)
    fit(theirs, x, objective=TraceEnum_ELBO(max_plate_nesting=1))
    assert torch.equal(ours.centres, theirs.centres)


def test_a_mixture_of_global_parameters_with_an_autoguide(x):
    @config_enumerate
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("components", 3):
            centres = pyro.sample("centres", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(centres[k], 0.5), obs=x)

    start = torch.tensor([-1.0, 0.0, 1.0])
    guide = autoguide.AutoDelta(
        poutine.block(model, hide=["k"]),
        init_loc_fn=autoguide.initialization.init_to_value(values={"centres": start, "weights": torch.ones(3) / 3}),
    )
    result = pvae.fit(model, guide, x, epochs=80, batch_size=600, lr=0.1, progress=False)
    assert result.history["elbo"][-1] > -2.2
    assert sorted(guide.centres.tolist()) == pytest.approx(CENTRES, abs=0.18)


DRAWING = [
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    RenyiELBO(0.0, 2),
    objectives.ELBO(),
    objectives.IWAE(2),
]


@pytest.mark.parametrize("objective", DRAWING)
def test_an_objective_that_would_draw_from_the_prior_is_refused(objective, x):
    pair = Clusters()
    before = pair.centres.clone()
    with pytest.raises(pvae.ProgramError, match=rf"{type(objective).__name__} .*\['k'\].*TraceEnum_ELBO"):
        fit(pair, x, objective=objective)
    assert torch.equal(pair.centres, before)


def test_an_objective_that_draws_what_the_guide_would_enumerate_warns(x):
    with pytest.warns(UserWarning, match=r"Trace_ELBO draws \['k'\].*TraceEnum_ELBO"):
        fit(Clusters(None, "parallel"), x, objective=Trace_ELBO(), epochs=1)


def test_what_cannot_be_summed_out_is_refused_by_name(x):
    with pytest.raises(pvae.ProgramError, match=r"'k' .*only in the model.*'parallel'"):
        fit(Clusters("sequential"), x)

    def poisson(x):
        rate = pyro.param("rate", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Poisson(rate), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    with pytest.raises(pvae.ProgramError, match=r"\['n'\]"):
        pvae.fit(poisson, lambda x: None, x, progress=False)

    def branches(x):
        loc = pyro.param("loc", torch.tensor(1.0))
        with pyro.plate("data", 1):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc if k else -loc, 1.0).expand([1]), obs=x)

    with pytest.raises(pvae.ProgramError, match=r"\['k'\].*dimension"):
        pvae.fit(branches, lambda x: None, x[:1], progress=False)


def test_a_latent_in_the_model_alone_without_a_mark_is_refused(x):
    with pytest.raises(pvae.ProgramError, match=r"Only in the model: \['k'\]"):
        fit(Clusters(None), x)


def test_the_divergence_of_what_is_summed_out_has_no_weight(x):
    with pytest.raises(pvae.ProgramError, match=r"kl_weight.*\['k'\]"):
        fit(Clusters(), x, kl_weight=0.5)
    history = fit(Clusters(None, "parallel"), x, kl_weight=lambda epoch: min(1.0, epoch / 3), validation=x).history
    assert history["validation_elbo"][-1] > history["validation_elbo"][0]


# --- how deep plates are nested -----------------------------------------------------------------------------------


class Deep(nn.Module):
    """Two plates, an enumerated latent, and a continuous one whose noise shows every further run of the pair."""

    def __init__(self):
        super().__init__()
        self.loc, self.encoder = nn.Parameter(torch.randn(2)), nn.Linear(3, 2)

    def model(self, x):
        pyro.module("deep", self)
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("columns", 3, dim=-1):
                k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z + self.loc[k.long()], 1.0), obs=x)

    def guide(self, x):
        pyro.module("deep", self)
        with pyro.plate("data", len(x), dim=-2):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()))


def test_an_objective_is_lent_the_depth_of_the_plates(x):
    """Whatever it was told or remembers of another pair; afterwards it is as it was."""
    for given in (math.inf, 1, 3):
        shared = TraceEnum_ELBO(max_plate_nesting=given)
        fit(Clusters(), x, objective=shared, epochs=1)
        deep, alone = Deep(), Deep()
        alone.load_state_dict(deep.state_dict())
        fit(deep, x.view(-1, 3), objective=shared)
        fit(alone, x.view(-1, 3), objective=TraceEnum_ELBO(max_plate_nesting=2))
        torch.testing.assert_close(deep.loc, alone.loc)
        assert shared.max_plate_nesting == given
    vectorized = Trace_ELBO(num_particles=2, vectorize_particles=True)
    small = pvae.VAE.mlp(1, 2, [4], "gaussian")
    pvae.fit(small.model, small.guide, x[:, None], objective=vectorized, epochs=1, progress=False)
    assert vectorized.max_plate_nesting == math.inf


@pytest.mark.parametrize("objective", [None, TraceEnum_ELBO])
def test_a_run_with_enumeration_goes_on_bit_for_bit(objective, x, tmp_path):
    data = x.view(-1, 3)
    options = {"validation": data, "batch_size": 100}
    first = Deep()
    second, straight = copy.deepcopy(first), copy.deepcopy(first)
    made = objective or (lambda: None)
    whole = fit(straight, data, objective=made(), epochs=3, **options)
    fit(first, data, objective=made(), epochs=2, checkpoint=tmp_path, **options)
    result = fit(second, data, objective=made(), epochs=3, checkpoint=tmp_path, resume="auto", **options)
    assert torch.equal(second.loc, straight.loc)
    assert result.history["validation_elbo"].tolist() == whole.history["validation_elbo"].tolist()


# --- held-out data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "marks", [("parallel", None), (None, "parallel"), (None, "sequential"), ("parallel", "parallel")]
)
@pytest.mark.parametrize("capture", [False, True])
def test_validation_sums_out_what_training_does(capture, marks, x, never_compiled):
    never_compiled(engine)
    made = never_compiled(validation)
    pair = Clusters(*marks)
    result = fit(pair, x, validation=x, compile=capture)
    assert result.history["validation_elbo"][-1] == pytest.approx(pair.elbo(x), abs=1e-5)
    assert not any(captured.given_up for captured in made)


def test_patience_the_best_epoch_and_the_scheduler_follow_the_bound_of_training(x, tmp_path):
    pair = Clusters()
    result = fit(
        pair,
        x,
        epochs=8,
        validation=x,
        patience=2,
        objective=TraceEnum_ELBO(max_plate_nesting=1),
        checkpoint=tmp_path,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    )
    assert result.stopped == "epochs"
    assert (result.history["validation_elbo"][1:] > result.history["validation_elbo"][:-1]).all()
    assert set(result.history["lr"]) == {0.05}
    best = pvae.svi.load_checkpoint(tmp_path, pair.model, pair.guide, x, which="best")
    assert best.checkpoint == result.checkpoint


BOUNDS = {
    "Trace": lambda: Trace_ELBO(num_particles=3),
    "MeanField": TraceMeanField_ELBO,
    "Graph": TraceGraph_ELBO,
    "Renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3),
    "IWAE": lambda: RenyiELBO(0.0, 4, vectorize_particles=True),
}


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("name", BOUNDS)
def test_validation_is_the_objectives_own_loss_without_weights(name, capture, bits, small_vae, never_compiled):
    never_compiled(engine)
    made = never_compiled(validation)
    options = {"epochs": 3, "batch_size": 100, "seed": 3, "progress": False, "compile": capture, "kl_weight": 0.5}
    history = pvae.fit(
        small_vae.model, small_vae.guide, bits, validation=bits, objective=BOUNDS[name](), **options
    ).history
    own, total = BOUNDS[name](), 0.0
    own.max_plate_nesting = 1 + (name == "IWAE")
    with isolate([small_vae], seed=3):
        for rows in bits.split(100):
            total += own.loss(small_vae.model, small_vae.guide, rows)
    assert history["validation_elbo"][-1] == pytest.approx(-total / len(bits), rel=1e-5)
    assert not any(captured.given_up for captured in made)


def test_a_callable_may_be_no_bound_so_validation_is_the_elbo(bits, small_vae, x):
    options = {"epochs": 2, "progress": False, "seed": 3}

    def half(model, guide, x):
        return 0.5 * Trace_ELBO().differentiable_loss(model, guide, x)

    history = pvae.fit(small_vae.model, small_vae.guide, bits, validation=bits, objective=half, **options).history
    with isolate([small_vae], seed=3):
        total = sum(Trace_ELBO().loss(small_vae.model, small_vae.guide, rows) for rows in bits.split(256))
    assert history["validation_elbo"][-1] == pytest.approx(-total / len(bits), rel=1e-5)

    def enumerated(model, guide, x):
        return 0.5 * TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x)

    pair = Clusters()
    history = fit(pair, x, validation=x, objective=enumerated).history
    assert history["validation_elbo"][-1] == pytest.approx(pair.elbo(x), abs=1e-5)
