"""Priors and posteriors by name in the models whose encoders see more than x."""

from __future__ import annotations

import pytest
import torch
from helpers import evidence, fit, same, weights

import pvae

X = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)).round()
LABELS = torch.arange(40) % 3
MASK = torch.rand(40, 4, generator=torch.Generator().manual_seed(1)) < 0.8
MODELS = {
    "conditional": (lambda **names: pvae.ConditionalVAE.mlp(4, 2, [8], num_classes=3, **names), (X, LABELS)),
    "semi-supervised": (
        lambda **names: pvae.SemiSupervisedVAE.mlp(4, 2, [8], num_classes=3, **names),
        (X, LABELS.where(LABELS > 0, -1)),
    ),
    "masked": (lambda **names: pvae.MaskedVAE.mlp(4, 2, [8], **names), (X, MASK)),
}


@pytest.mark.parametrize(
    ("prior", "posterior"), [("mixture", "full"), ("flow", "iaf"), ("standard-normal", "low-rank")]
)
@pytest.mark.parametrize("model", MODELS)
def test_models_take_priors_and_posteriors_by_name(model, prior, posterior, tmp_path):
    make, data = MODELS[model]
    vae = make(prior=prior, posterior=posterior)
    before = weights(vae)
    fit(vae, data, epochs=1)
    assert not same(before, weights(vae))
    assert evidence(vae, tuple(t[:4] for t in data), proposal="auto").log_px.isfinite().all()
    vae.save(tmp_path / "vae")
    assert same(weights(vae), weights(type(vae).load(tmp_path / "vae")))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("names", [{"prior": "vamp"}, {"posterior": "gaussian"}], ids=str)
def test_names_that_do_not_fit_are_refused(model, names):
    (argument,) = names
    with pytest.raises(pvae.ArgumentError, match=rf"{argument} must be one of"):
        MODELS[model][0](**names)


def test_two_priors_are_one_too_many():
    with pytest.raises(pvae.ArgumentError, match="either says what"):
        pvae.ConditionalVAE.mlp(4, 2, [8], num_classes=3, prior="flow", has_conditional_prior=True)
