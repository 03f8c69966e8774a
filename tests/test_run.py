"""What can be asked of a run: weights of the KL divergence, schedules, clipping, patience, callbacks, clear ends."""

from __future__ import annotations

import copy
import json
import math
from functools import partial

import helpers
import numpy as np
import pyro
import pytest
import torch
from helpers import same, weights
from pairs import ModulePair
from pyro import distributions as dist
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pvae
from pvae.svi import load_checkpoint, losses, verification

fit = partial(helpers.fit, epochs=3, lr=0.01)


# --- the weight of the KL divergence --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_a_kl_weight_is_the_beta_vae(objective, beta, bits):
    """E_q[log p(x|z)] - beta KL(q || p), in the same noise; with TraceMeanField the KL is the closed one."""
    vae = pvae.VAE.mlp(6, 2, [8])
    torch.manual_seed(1)
    loss, _ = losses.loss_and_grads(objective, vae.model, vae.guide, (bits,), torch.tensor(beta))
    torch.manual_seed(1)
    q = vae.encode(bits)
    z = q.rsample()
    kl = q.log_prob(z) - vae.prior().log_prob(z)
    if isinstance(objective, TraceMeanField_ELBO):
        kl = kl_divergence(q.base_dist, dist.Normal(0.0, 1.0).expand(q.base_dist.batch_shape)).sum(-1)
    expected = (-vae.decode(z).log_prob(bits) + beta * kl).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_a_warm_up_is_in_the_history_and_validation_has_no_weight(compile, bits):
    vae = pvae.VAE.mlp(6, 2, [8])
    history = fit(
        vae, bits, epochs=5, kl_weight=lambda e: min(1.0, e / 4), validation=bits, compile=compile, lr=1e-6
    ).history
    assert set(history) == {"objective", "validation_elbo", "kl_weight", "seconds"}
    assert history["kl_weight"].tolist() == [0.25, 0.5, 0.75, 1.0, 1.0]
    # Parameters hardly move, so the objective is linear in the weight: minus the error, minus the weight times the KL.
    # Its standard error is below 2 / sqrt(300) = 0.12 an epoch.
    kl = kl_divergence(vae.encode(bits).base_dist, dist.Normal(0.0, 1.0).expand((300, 2))).sum(-1).mean().item()
    assert history["objective"] + history["kl_weight"] * kl == pytest.approx(history["objective"][3] + kl, abs=0.5)
    assert np.ptp(history["validation_elbo"]) < 1e-3


def test_a_weight_of_one_is_plain_training(bits):
    ours, theirs = ModulePair(), ModulePair()
    theirs.load_state_dict(ours.state_dict())
    a, b = fit(ours, bits, kl_weight=lambda epoch: 1.0), fit(theirs, bits)
    assert a.history["objective"].tolist() == pytest.approx(b.history["elbo"].tolist(), rel=1e-6)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_compiled_steps_see_the_weight_change(bits):
    ours, theirs = ModulePair(), ModulePair()
    theirs.load_state_dict(ours.state_dict())
    options = {"kl_weight": lambda epoch: epoch / 3, "clip_norm": 30.0}
    a, b = fit(ours, bits, compile=True, **options), fit(theirs, bits, compile=False, **options)
    np.testing.assert_allclose(a.history["objective"], b.history["objective"], rtol=1e-4)


# --- clipping and schedules -----------------------------------------------------------------------------------------


def test_clipping_and_a_schedule_are_torchs(bits):
    """Against `pyro.infer.SVI`'s gradients, `clip_grad_norm_` and the scheduler, written out."""
    ours = ModulePair()
    theirs = copy.deepcopy(ours)
    norms = []
    fit(
        ours,
        bits,
        clip_norm=5.0,
        seed=5,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )
    params = [*theirs.encoder.parameters(), *theirs.decoder.parameters()]
    optimizer = torch.optim.Adam(params, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    torch.manual_seed(5)
    for epoch in (1, 2, 3):
        order = torch.from_numpy(np.random.default_rng((5, epoch)).permutation(len(bits)))
        for rows in order.split(64):
            optimizer.zero_grad()
            Trace_ELBO().differentiable_loss(theirs.model, theirs.guide, bits[rows]).backward()
            norms.append(nn.utils.clip_grad_norm_(params, 5.0).item())
            optimizer.step()
        scheduler.step()
    assert min(norms) > 5, "nothing was clipped"
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_short_gradients_are_not_clipped(bits):
    ours, theirs = ModulePair(), ModulePair()
    theirs.load_state_dict(ours.state_dict())
    fit(ours, bits, clip_norm=1e6)
    fit(theirs, bits)
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize(
    ("make", "rates"),
    [
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), [0.01, 0.005, 0.0025, 0.00125]),
        (
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
            [0.01, 0.005, 0.01 / 3, 0.0025],
        ),
        (
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
                [2],
            ),
            [0.001, 0.001, 0.01, 0.005],
        ),
        (
            lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=100.0),
            [0.01, 0.001, 1e-4, 1e-5],
        ),
    ],
)
def test_any_of_torchs_schedulers_is_stepped_after_each_epoch(make, rates, bits, tmp_path):
    result = fit(ModulePair(), bits, epochs=4, scheduler=make, checkpoint=tmp_path)
    assert result.history["lr"].tolist() == pytest.approx(rates)


def test_a_plateau_is_one_of_the_validation_elbo(bits):
    pair = ModulePair()
    schedule = {"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1)}
    better = fit(pair, bits, validation=bits, **schedule)  # improves in each epoch
    assert better.history["lr"].tolist() == [0.01] * 3


# --- patience -------------------------------------------------------------------------------------------------------


def curves(monkeypatch, values):
    values = iter(values)
    monkeypatch.setattr("pvae.svi.validation.Validation.__call__", lambda self, epoch: next(values))


def test_patience_ends_training(bits, monkeypatch, tmp_path):
    curves(monkeypatch, [1.0, 3.0, 2.0, 2.5, 2.9, 9.0])
    pair = ModulePair()
    result = fit(pair, bits, epochs=20, validation=bits, patience=3, checkpoint=tmp_path)
    assert result.history["validation_elbo"].tolist() == [1.0, 3.0, 2.0, 2.5, 2.9]
    assert result.stopped == "patience"
    assert repr(result).endswith("stopped by patience)")
    assert len(load_checkpoint(tmp_path, pair.model, pair.guide, bits, which="best").history["seconds"]) == 2
    again = fit(ModulePair(), bits, epochs=20, validation=bits, patience=3, checkpoint=tmp_path, resume="auto")
    assert again.stopped == "patience"
    assert len(again.history["seconds"]) == 5


def test_patience_waits_for_the_warm_up(bits, monkeypatch):
    curves(monkeypatch, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 4.5, 4.4, 4.3, 4.2])
    warm_up = {"kl_weight": lambda epoch: min(1.0, epoch / 5)}
    result = fit(ModulePair(), bits, epochs=20, validation=bits, patience=2, **warm_up)
    # The weight is 1 from epoch 5 on: 5.0 is then the best, 4.0 and 4.5 are no better.
    assert len(result.history["seconds"]) == 7


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_validation_elbo_that_is_nan_warns_and_is_never_the_best(bits, monkeypatch, tmp_path):
    pair = ModulePair()
    curves(monkeypatch, [1.0, 2.0, math.nan, 5.0, 6.0, 7.0])
    result = fit(pair, bits, epochs=6, validation=bits, patience=3, checkpoint=tmp_path)
    assert result.stopped == "epochs"
    assert len(load_checkpoint(tmp_path, pair.model, pair.guide, bits, which="best").history["seconds"]) == 6
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[2]["validation_elbo"] is None
    monkeypatch.undo()
    gaussian = pvae.VAE.mlp(6, 2, [8], "gaussian")
    held_out = torch.cat([bits, torch.full((1, 6), 1e30)])
    with pytest.warns(
        UserWarning, match="epoch 1: the loss of a batch of validation data is (inf|nan): .*'x' of the model"
    ):
        fit(gaussian, bits, epochs=1, validation=held_out)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"start": "x"}, "start must be what an earlier fit returned"),
        ({"kl_weight": np.ones(3)}, "kl_weight must be"),
        ({"patience": 3}, "pass validation="),
        ({"patience": 0, "validation": torch.zeros(3, 6)}, "patience must be a whole number of at least 1"),
        ({"clip_norm": 0}, "clip_norm must be a positive number, got 0"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"kl_weight": -1.0}, "kl_weight must be a number of at least 0, got -1.0"),
        (
            {"kl_weight": lambda epoch: math.nan if epoch == 3 else 1.0},
            r"kl_weight\(epoch=3\) must be a number of at least 0, got nan",
        ),
        ({"kl_weight": "linear"}, "or a function of the epoch such as .*got 'linear'"),
        ({"scheduler": torch.optim.lr_scheduler.ExponentialLR}, "missing 1 required positional argument: 'gamma'"),
        ({"scheduler": lambda optimizer: 3}, "scheduler must be a function that makes one of torch's.*got 3"),
        ({"scheduler": "cosine"}, "scheduler must be a function .* got 'cosine'"),
        ({"distributed": True}, "needs a process group"),
        ({"distributed": "yes"}, "distributed must be True, False or 'auto'"),
        ({"callback": 3}, "callback must be"),
    ],
)
def test_bad_options_are_named_before_any_parameter_moves(options, match, bits):
    pair = ModulePair()
    before = weights(pair)
    with pytest.raises((pvae.ArgumentError, TypeError), match=match):
        fit(pair, bits, **options)
    assert same(before, weights(pair))


# --- callbacks ------------------------------------------------------------------------------------------------------


def test_a_callback_gets_a_small_plain_record_each_epoch(bits, tmp_path):
    records = []
    result = fit(ModulePair(), bits, callback=records.append, validation=bits, checkpoint=tmp_path)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["elbo"] for record in records] == result.history["elbo"].tolist()
    assert records[0].keys() == {"epoch", "elbo", "validation_elbo", "seconds"}
    assert {type(value) for record in records for value in record.values()} == {int, float}
    assert [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()] == records


def test_what_a_callback_raises_is_seen(bits):
    def pruned(record):
        raise StopIteration("enough")

    pair = ModulePair()
    with pytest.raises(StopIteration, match="enough"):
        fit(pair, bits, callback=pruned)
    assert all(p.grad is None for p in pair.parameters())


# --- numbers that go bad --------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A guide whose scale under- or overflows for some data, as hand-written ones do."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 6), nn.Linear(6, 1)

    def model(self, x, raw):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("pixels", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x, raw):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(self.encoder(x), raw[:, None].exp()).to_event(1))


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own, beside our error
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("raw", [-200.0, 200.0])
def test_a_scale_that_under_or_overflows_is_named_by_its_site(raw, compile, bits):
    pair = Scaled()
    before = weights(pair)
    values = torch.zeros(300)
    first_batch = np.random.default_rng((0, 1)).permutation(300)[:64]
    values[int(first_batch[first_batch >= 64][0])] = raw  # not in the batch on which the pair is tried
    with pytest.raises(
        pvae.NumericalError, match=r"epoch 1, step 1, before its update: .*'latent' of the guide \(Normal"
    ):
        fit(pair, (bits, values), compile=compile, transform=lambda x, raw: (x, raw))
    assert same(before, weights(pair))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("compile", [False, True])
def test_a_learning_rate_too_big_stops_and_the_last_good_checkpoint_loads(compile, bits, tmp_path):
    class Exponential(ModulePair):
        """A rate that overflows once its logarithm passes 88."""

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), self.latent), 1.0).to_event(1))
                pyro.sample("obs", dist.Poisson(self.decoder(z).exp()).to_event(1), obs=x)

    pair = Exponential()
    rates = {"scheduler": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1.0 if epoch < 2 else 1e4)}
    with pytest.raises(pvae.NumericalError) as caught:
        fit(pair, bits, epochs=9, checkpoint=tmp_path, compile=compile, **rates)
    message = str(caught.value)
    assert "training stopped at epoch 3, step " in message
    assert "the log-density of " in message
    assert f"The last good checkpoint is {tmp_path / 'epoch-000002'}" in message
    assert "Try a smaller lr than 100" in message
    other = Exponential()
    result = load_checkpoint(tmp_path, other.model, other.guide, bits)
    assert len(result.history["elbo"]) == 2
    assert all(p.isfinite().all() for p in other.parameters())
    assert math.isfinite(pvae.log_evidence(other.model, other.guide, bits[:5], num_samples=10).mean)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_gradient_that_is_not_finite_is_named_by_its_parameter(bits):
    pair = ModulePair()

    def objective(model, guide, x):
        return Trace_ELBO().differentiable_loss(model, guide, x) + (pair.encoder[0].weight * 0).sqrt().sum()

    with pytest.raises(pvae.NumericalError, match=r"a gradient is not finite: that of encoder\.0\.weight"):
        fit(pair, bits, objective=objective)


class Roots(nn.Module):
    """Where an x begins with zero, the loss is finite and its gradient is not a number."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(200, 2), pvae.networks.mlp(2, [150], 200)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            roots = (self.decoder(z).square() * x[:, :1]).sqrt()
            pyro.sample("obs", dist.Normal(roots, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.Normal(self.encoder(x), 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_so_is_that_of_a_wide_layer_in_small_batches_when_compiled():
    """There a step looks at the factors of the product that the gradient is."""
    pair, x = Roots(), torch.ones(40, 200)
    x[-1, 0] = 0.0
    with pytest.raises(pvae.NumericalError, match=r"step \d+, before its update: a gradient is not finite: .*decoder"):
        fit(pair, x, batch_size=4, epochs=1, compile=True)
    assert all(p.isfinite().all() for p in pair.parameters())


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("raw", [-200.0, 200.0])
def test_such_a_scale_in_the_batch_that_is_tried_is_named_too(raw, bits):
    pair = Scaled()
    with pytest.raises(pvae.NumericalError, match=r"before .* the log-density of 'latent' of the guide"):
        fit(pair, (bits, torch.full((300,), raw)))


@pytest.mark.parametrize("transform", [lambda x: x[:3], lambda x: x.numpy(), lambda x: None, lambda x: x.sum()])
def test_a_transform_that_does_not_keep_the_data_is_refused(transform, bits):
    with pytest.raises(
        pvae.ArgumentError, match=r"transform must make a tensor, .* of the 64 data of a batch; it made"
    ):
        fit(ModulePair(), bits, transform=transform)


def test_losses_of_float64_models_are_float64(bits):
    """1e30 squared is more than float32 holds."""
    vae = pvae.VAE.mlp(6, 2, [8], "gaussian").double()
    assert math.isfinite(fit(vae, bits.double() * 1e25, epochs=1, validation=bits.double() * 1e25).history["elbo"][0])


def test_weights_that_overflow_in_an_update_are_not_saved(bits, tmp_path):
    pair = ModulePair()
    with pytest.raises(pvae.NumericalError, match=r"is not finite.*There is no checkpoint"):
        fit(pair, bits, lr=3e38, epochs=1, batch_size=300, checkpoint=tmp_path, objective=RenyiELBO(0.5, 2))
    assert not list(tmp_path.glob("epoch-*"))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_without_a_checkpoint_the_error_says_so(bits):
    with pytest.raises(pvae.NumericalError, match="There is no checkpoint"):
        fit(ModulePair(), bits, objective=lambda m, g, x: Trace_ELBO().differentiable_loss(m, g, x) * math.nan)


# --- posterior collapse ---------------------------------------------------------------------------------------------


def test_a_collapsed_posterior_warns(bits):
    with pytest.warns(UserWarning, match="the posterior has collapsed"):
        fit(pvae.VAE.mlp(6, 2, [8]), bits, epochs=60, kl_weight=50.0)


def test_an_active_posterior_and_a_short_run_do_not_warn(bits):
    fit(pvae.VAE.mlp(6, 2, [8]), bits, epochs=100)
    fit(pvae.VAE.mlp(6, 2, [8]), bits, epochs=2, kl_weight=50.0)


def test_activity_is_relative_to_the_prior_and_of_latents_of_each_datum():
    """Var_x(E_q[z]) / Var_p(z), by hand; a global latent has no datum to follow."""
    x = torch.randn(1000, 1)

    def pair(slope, prior):
        def model(x):
            pyro.sample("global", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), prior).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

        def guide(x):
            pyro.sample("global", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.cat([slope * x, 0 * x], -1), 1.0).to_event(1))

        return model, guide, (x,)

    assert not verification.inactive(*pair(0.2, 1.0))  # 0.04
    assert verification.inactive(*pair(0.05, 1.0))  # 0.0025
    assert verification.inactive(*pair(0.5, 10.0))  # 0.25 / 100
    assert not verification.inactive(*pair(0.05, 0.1))  # 0.0025 / 0.01


def test_pyros_own_loop_is_what_a_weight_of_one_and_no_options_give(bits):
    """Nothing of this file changes plain training."""
    ours = ModulePair()
    theirs = copy.deepcopy(ours)
    fit(ours, bits, epochs=1, seed=2)
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    torch.manual_seed(2)
    for rows in torch.from_numpy(np.random.default_rng((2, 1)).permutation(300)).split(64):
        svi.step(bits[rows])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
