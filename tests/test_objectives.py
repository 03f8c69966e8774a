from __future__ import annotations

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)

import pvae
from pvae.svi import elbos as bounds
from pvae.svi import objectives


def test_which_objectives_are_the_elbo():
    elbos = (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO(), TraceEnum_ELBO())
    assert all(objectives.is_elbo(elbo) for elbo in elbos)
    assert not objectives.is_elbo(RenyiELBO(num_particles=2))
    assert not objectives.is_elbo(TraceTailAdaptive_ELBO(num_particles=2))
    assert not objectives.is_elbo(lambda model, guide, x: x)


def test_default_objective():
    assert type(bounds.resolve(None)) is Trace_ELBO
    elbo = Trace_ELBO()
    assert bounds.resolve(elbo) is elbo


def test_verify_finds_the_parameters_of_both_programs(module_pair, bits):
    verified = objectives.verify(module_pair.model, module_pair.guide, (bits,), (bits,))
    assert {id(p) for p in verified.params} == {id(p) for p in module_pair.parameters()}
    assert verified.subsampled_from is None


def test_enumerated_and_auxiliary_sites_are_no_mismatch(bits):
    def model(x):
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        pyro.sample("helper", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    assert len(objectives.verify(model, guide, (bits,), (bits,)).params) == 1
    result = pvae.fit(
        model, lambda x: None, bits, objective=TraceEnum_ELBO(max_plate_nesting=1), epochs=1, progress=False
    )
    assert result.params["p"] != 0.5


def test_loss_and_gradients_are_pyros(module_pair, bits):
    torch.manual_seed(1)
    loss, params = objectives.loss_and_grads(Trace_ELBO(), module_pair.model, module_pair.guide, (bits,))
    ours = {id(p): p.grad.clone() for p in params}
    for p in params:
        p.grad = None
    torch.manual_seed(1)
    assert loss == Trace_ELBO().loss_and_grads(module_pair.model, module_pair.guide, bits)
    assert all(torch.equal(p.grad, ours[id(p)]) for p in params)
    with pytest.raises(pvae.ArgumentError, match="objective"):
        bounds.resolve(3)
