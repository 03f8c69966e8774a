"""Pairs that have no log p(x) for each datum are refused, and told what to do."""

from __future__ import annotations

from functools import partial

import helpers
import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist

import pvae

evidence = partial(helpers.evidence, num_samples=1000)


def no_plate(x):
    pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[:, 0])


def no_plate_within(x):
    """A plate of the model's own, and data outside of any."""
    with pyro.plate("pixels", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=x[:, 0])


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def guide_of(*names, fn=None, plate=True):
    def guide(x):
        with pyro.plate("data", len(x)) if plate else pyro.poutine.block():
            for name in names:
                pyro.sample(name, fn or dist.Normal(0.0, 1.0))

    return guide


def couples(x):
    """A datum's mean depends on the others of its batch."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + x[:, 1].mean(), 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    "model, guide, match",
    [
        (
            no_plate,
            lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)),
            "one plate over the data.*'x \\(model\\)' has plates",
        ),
        (no_plate_within, lambda x: fixed_guide(x), r"one plate over the data.*pixels.* all of them together: .*'y'"),
        (local, guide_of("w"), r"Only in the model: \['z'\]; only in the guide: \['w'\]"),
        (local, guide_of(), r"Model: \['z'\]; guide: \[\]"),
        (local, guide_of("z", "extra"), r"only in the guide: \['extra'\]"),
        (local, guide_of("z", fn=dist.Delta(torch.tensor(0.0))), r"point mass at \['z'\]"),
        (couples, guide_of("z"), r"treat each datum.*the model's log-density is .* if each is run alone"),
    ],
)
def test_pairs_without_an_evidence_for_each_datum_are_refused(model, guide, match, bits):
    with pytest.raises(pvae.ProgramError, match=match):
        pvae.log_evidence(model, guide, bits)


def fixed_guide(x):
    with pyro.plate("pixels", 6):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_model_and_guide_that_changed_places_are_refused(small_vae, bits):
    with pytest.raises(pvae.ProgramError, match=r"the model observes nothing.*in the place of the guide"):
        pvae.log_evidence(small_vae.guide, small_vae.model, bits)
    with pytest.raises(pvae.ProgramError, match=r"the guide observes \['x'\]"):
        pvae.log_evidence(small_vae.model, small_vae.model, bits)


def test_a_discrete_latent_that_the_guide_does_not_draw_may_be_marked(bits):
    """What the message says to do next works, and is exact."""

    def model(x, mark):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"} if mark else {})
            pyro.sample("x", dist.Normal(c, 1.0), obs=x[:, 0])

    with pytest.raises(pvae.ProgramError, match=r"summed out: pyro.sample\('c', ..., infer=.* in the model"):
        pvae.log_evidence(partial(model, mark=False), lambda x: None, bits)
    estimate = pvae.log_evidence(partial(model, mark=True), lambda x: None, bits)
    x = bits[:, 0].double()
    exact = torch.stack([dist.Normal(c, 1.0).log_prob(x) for c in (0.0, 1.0)]).logsumexp(0) - np.log(2)
    assert torch.allclose(estimate.log_px, exact, atol=1e-5)


def test_a_pair_that_takes_another_number_of_tensors_is_told_so(small_vae, bits):
    with pytest.raises(pvae.ProgramError, match=r"the model cannot be called with a batch, which is 2 tensor\(s\)"):
        evidence(small_vae, (bits, bits[:, 0]))


def test_a_density_that_is_not_finite_is_an_error(bits):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(torch.arange(len(x)) == 2, torch.nan, 0.0), 1.0))

    with pytest.raises(pvae.NumericalError, match=r"begins with datum 0: 5 of 1500 log-weights .*datum 2 of its batch"):
        pvae.log_evidence(local, guide, bits, num_samples=5, proposal="guide")
