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


def fixed_plate(x):
    with pyro.plate("pixels", 6):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[0])


def global_latent(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


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


def global_guide(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    guide_of("z")(x)


def sequential(x):
    for i in pyro.plate("data", 2):
        pyro.sample(f"x_{i}", dist.Normal(pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0)), 1.0), obs=x[i % len(x), 0])


def sequential_guide(x):
    for i in pyro.plate("data", 2):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


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
        (fixed_plate, lambda x: [fixed_guide(x)], "one plate over the data.*pixels"),
        (global_latent, global_guide, "one plate over the data.*'w \\(model\\)' has plates \\[\\]"),
        (local, guide_of("w"), r"Only in the model: \['z'\]; only in the guide: \['w'\]"),
        (local, guide_of(), r"Model: \['z'\]; guide: \[\]"),
        (local, guide_of("z", "extra"), r"only in the guide: \['extra'\]"),
        (local, guide_of("z", fn=dist.Delta(torch.tensor(0.0))), r"point mass at \['z'\]"),
        (sequential, sequential_guide, r"one plate over the data.*'x_0 \(model\)' has plates \[\]"),
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


def test_an_enumerated_latent_is_refused_by_name_and_the_guide_may_draw_it(bits):
    """What the message says to do next works: 1,000 draws of two values, against the exact sum over both."""

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c, 1.0), obs=x[:, 0])

    with pytest.raises(pvae.ProgramError, match=r"enumerated \(\['c'\]\).* guide draw them.* sum them out"):
        pvae.log_evidence(model, lambda x: None, bits)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.4)))

    estimate = pvae.log_evidence(model, guide, bits)
    x = bits[:, 0].double()
    exact = torch.stack([dist.Normal(c, 1.0).log_prob(x) for c in (0.0, 1.0)]).logsumexp(0) - np.log(2)
    assert ((estimate.log_px - exact).abs() < 5 * estimate.std_error).all()


def test_a_pair_that_takes_another_number_of_tensors_is_told_so(small_vae, bits):
    with pytest.raises(pvae.ProgramError, match=r"the model cannot be called with a batch, which is 2 tensor\(s\)"):
        evidence(small_vae, (bits, bits[:, 0]))


def test_a_density_that_is_not_finite_is_an_error(bits):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(torch.arange(len(x)) == 2, torch.nan, 0.0), 1.0))

    with pytest.raises(pvae.NumericalError, match=r"begins with datum 0: 5 of 1500 log-weights .*datum 2 of its batch"):
        pvae.log_evidence(local, guide, bits, num_samples=5)
