from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pytest
import torch
from helpers import Items, assert_fit_is_svi, fit, same, weights
from pairs import ModulePair, ParamPair
from pyro import distributions as dist
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.distributions import constraints
from torch.nn import functional as F
from torch.utils.data import DataLoader

import pvae


class PyroDecoder(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decode = PyroModule[nn.Linear](2, 6)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decode(z)).to_event(1), obs=x)


class PyroEncoder(PyroModule):
    def __init__(self, name: str = "encode") -> None:
        super().__init__()
        self.name = name
        setattr(self, name, PyroModule[nn.Linear](6, 4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = getattr(self, self.name)(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


# --- it is SVI ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: pvae.VAE.mlp(6, 2, [8]), ModulePair, ParamPair])
def test_fit_is_pyros_svi_on_the_same_batches_and_noise(make, bits):
    """The reference: ``pyro.infer.SVI`` fed the same batches ends at the same parameters, to rounding."""
    data = bits[:, 0] if make is ParamPair else bits
    ours = make()
    theirs = copy.deepcopy(ours)
    result = fit(ours, data, lr=0.01, seed=5)

    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    torch.manual_seed(5)
    losses = []
    for epoch in (1, 2):
        order = torch.from_numpy(np.random.default_rng((5, epoch)).permutation(len(data)))
        losses.append(sum(svi.step(data[rows]) for rows in order.split(64)) / len(data))

    np.testing.assert_allclose(result.history["elbo"], -np.array(losses), rtol=1e-5)
    if make is ParamPair:
        for name, value in result.params.items():
            torch.testing.assert_close(value, pyro.param(name).detach(), rtol=1e-4, atol=1e-6)
    else:
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)  # Adam divides small gradients by their size


@pytest.mark.parametrize("local", [False, True])
def test_pyro_modules_train(local, bits):
    with pyro.settings.context(module_local_params=local):
        decoder, encoder = PyroDecoder(), PyroEncoder()
        before = [weights(decoder), weights(encoder)]
        result = pvae.fit(decoder, encoder, bits, epochs=5, lr=0.01, batch_size=50, progress=False)
        pvae.log_evidence(decoder, encoder, bits, num_samples=3)
    assert result.history["elbo"][-1] > result.history["elbo"][0]
    assert not any(same(*pair) for pair in zip(before, (weights(decoder), weights(encoder)), strict=True))


def test_two_modules_under_one_name_are_refused(bits):
    """One of the two would silently not be trained."""
    decoder, encoder = PyroDecoder(), PyroEncoder("decode")
    with pytest.raises(pvae.ProgramError, match=r"two modules .* 'decode\.weight'"):
        pvae.fit(decoder, encoder, bits, progress=False)


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_modes_do_not_reach_training(caller, bits):
    plain, inside = ModulePair(), ModulePair()
    inside.load_state_dict(plain.state_dict())
    fit(plain, bits)
    with caller():
        fit(inside, bits)
    assert same(weights(plain), weights(inside))


def test_a_linear_vae_reaches_the_maximum_likelihood_of_probabilistic_pca():
    """Its best ELBO is the likelihood of PPCA at the maximum (Lucas et al., 2019, Don't Blame the ELBO!).

    With the noise fixed that is closed: the top eigenvalues of the covariance are kept, the others become noise^2.
    """
    oracle = pvae.testing.linear_gaussian(2, 5, noise=0.5)
    x = oracle.sample(2000).float()
    torch.manual_seed(1)
    vae = pvae.VAE(
        pvae.priors.StandardNormal(2),
        pvae.likelihoods.Gaussian(pvae.networks.mlp(2, [], 5), scale=0.5),
        pvae.posteriors.DiagonalNormal(pvae.networks.mlp(5, [], 4)),
    )
    fit(vae, x, epochs=60, batch_size=200, lr=0.02)
    result = fit(vae, x, epochs=20, batch_size=500, lr=0.001)

    values, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    kept = torch.cat([torch.full((3,), 0.25), values[-2:].clamp(min=0.25)])
    best = dist.MultivariateNormal(x.mean(0), vectors @ kept.diag() @ vectors.T).log_prob(x).mean().item()
    # Noise of the last epoch's ELBO: sd(log w - log p(x)) is below 2, so 2 / sqrt(2000) = 0.045; 5 sigma.
    assert result.history["elbo"][-1] == pytest.approx(best, abs=0.22)


def test_training_learns(bits, small_vae):
    result = fit(small_vae, bits, epochs=60, batch_size=32, lr=0.01)
    elbo = result.history["elbo"]
    independent = sum(dist.Bernoulli(p).entropy().item() for p in bits.mean(0))
    assert elbo.shape == (60,)
    assert repr(result) == f"FitResult(60 epochs, elbo {elbo[-1]:.2f}, on cpu, seed 0)"
    assert elbo[-1] > -independent + 0.5, "no better than six independent bits"


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 64, 299, 300, 5000])
def test_every_datum_is_seen_once_an_epoch_and_weighs_the_same(batch_size):
    vae = pvae.VAE.mlp(6, 2, [8], "gaussian")
    x = torch.arange(300.0)[:, None].expand(300, 6) / 300
    seen = []

    def objective(model, guide, batch):
        seen.append(batch[:, 0])
        return batch[:, 0].sum() + 0 * pyro.param("p", torch.tensor(1.0))

    result = fit(vae, x, objective=objective, batch_size=batch_size, epochs=1)
    assert torch.cat(seen).sort().values.tolist() == x[:, 0].tolist()
    assert [len(s) for s in seen[:-1]] == [batch_size] * (len(seen) - 1)
    assert result.history["objective"].tolist() == pytest.approx([-x[:, 0].mean().item()], rel=1e-5)


def test_epochs_are_shuffled_differently(small_vae, bits):
    seen = []

    def record(batch):
        seen.append(batch.clone())
        return batch

    fit(small_vae, bits, transform=record, batch_size=300)
    _, first, second = seen  # the first of all is the look at one batch before training
    assert not torch.equal(first, second)
    assert torch.equal(first.sum(0), second.sum(0))


def test_one_datum_is_enough(small_vae, bits):
    assert math.isfinite(fit(small_vae, bits[:1]).history["elbo"][-1])


def test_a_tuple_of_data_is_passed_on_row_by_row(bits):
    net = nn.Linear(1, 6)

    def model(x, y):
        assert y.dtype == torch.int64
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=net((z + y)[:, None])).to_event(1), obs=x)

    def guide(x, y):
        assert torch.equal(y, x.sum(-1).long())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    before = weights(net)
    result = pvae.fit(model, guide, (bits.double(), bits.sum(-1).long()), epochs=1, progress=False)
    assert not same(before, weights(net))
    assert set(result.params) == {"loc"}


def test_a_plate_that_subsamples_does_not_inflate_the_elbo(bits):
    pair = ModulePair()

    def subsampled(kind):
        def program(x):
            pyro.module("pair", pair)
            with pyro.plate("data", 3000, subsample=torch.arange(len(x))):
                if kind == "guide":
                    loc, raw = pair.encoder(x).chunk(2, -1)
                    pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))
                else:
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    pyro.sample("x", dist.Bernoulli(logits=pair.decoder(z)).to_event(1), obs=x)

        return program

    history = pvae.fit(
        subsampled("model"), subsampled("guide"), bits, validation=bits, epochs=1, lr=1e-9, progress=False
    ).history
    for name in ("elbo", "validation_elbo"):
        assert -8 < history[name][0] < -3  # six bits: -4.2 if each has probability 1/2


# --- nothing of the caller's changes ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:parameters .* begin at their initial values")  # and not at the caller's
@pytest.mark.parametrize("make", [lambda: pvae.VAE.mlp(6, 2, [8]), ModulePair, ParamPair])
def test_the_callers_state_is_left_as_found(make, bits, caller_state):
    pair = make()
    pyro.param("decoder$$$0.weight", torch.zeros(3))
    pyro.param("scale", torch.tensor(7.0))
    before = caller_state()
    fit(pair, bits[:, 0] if make is ParamPair else bits, validation=bits[:, 0] if make is ParamPair else bits)
    before.assert_unchanged()


def test_modes_and_gradients_are_left_as_found(bits):
    class WithDropout(ModulePair):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
            self.modes = []

        def guide(self, x):
            self.modes.append(self.encoder.training)
            super().guide(x)

    pair = WithDropout().eval()
    with torch.no_grad():
        fit(pair, bits, validation=bits, epochs=1, batch_size=300)
    assert not pair.training
    assert not pair.encoder[2].training
    assert pair.modes == [False, False, True, False]  # looked at twice, trained on, validated
    assert all(p.grad is None for p in pair.parameters())
    assert pair.encoder[1].num_batches_tracked == 1


def test_gradients_left_by_the_caller_do_not_count(bits):
    clean, dirty = (ModulePair() for _ in range(2))
    dirty.load_state_dict(clean.state_dict())
    for p in dirty.parameters():
        p.grad = torch.full_like(p, 1e6)
    for pair in (clean, dirty):
        fit(pair, bits)
    assert same(weights(clean), weights(dirty))


@pytest.mark.parametrize("make", [lambda: pvae.VAE.mlp(6, 2, [8]), ModulePair])
def test_two_models_in_one_process_do_not_meet(make, bits):
    first, alone = make(), make()
    beside = copy.deepcopy(alone)
    fit(alone, bits)
    fit(first, bits)
    pyro.module("decoder", first.decoder)  # the global store now has the first model under a common name
    fit(beside, bits)
    assert same(weights(alone), weights(beside))


def test_same_seed_same_bits(bits):
    pairs = [ModulePair() for _ in range(3)]
    for pair in pairs[1:]:
        pair.load_state_dict(pairs[0].state_dict())
    histories = [fit(p, bits, seed=s).history["elbo"].tolist() for p, s in zip(pairs, (1, 1, 2), strict=True)]
    assert histories[0] == histories[1] != histories[2]
    assert same(weights(pairs[0]), weights(pairs[1]))
    assert not same(weights(pairs[0]), weights(pairs[2]))


def test_a_fresh_seed_is_reported(bits, small_vae):
    assert fit(small_vae, bits, seed=None).seed != fit(small_vae, bits, seed=None).seed


def test_validation_does_not_disturb_training(bits):
    alone, watched = (ModulePair() for _ in range(2))
    watched.load_state_dict(alone.state_dict())
    fit(alone, bits)
    result = fit(watched, bits, validation=bits[:100])
    assert same(weights(alone), weights(watched))
    assert result.history["validation_elbo"].shape == result.history["seconds"].shape == (2,)


def test_validation_elbo_is_the_elbo_per_datum():
    oracle = pvae.testing.linear_gaussian(2, 3, guide_shift=0.5)

    def guide(x):
        oracle.guide(x + 0 * pyro.param("unused", torch.tensor(0.0)))

    x = oracle.sample(5000)
    history = pvae.fit(oracle.model, guide, x, validation=x, epochs=1, progress=False).history
    # sd of log w around log p(x): chi-square-like, below 1.5; 5 sigma.
    for name in ("elbo", "validation_elbo"):
        assert history[name][0] == pytest.approx(oracle.elbo(x).mean().item(), abs=5 * 1.5 / 5000**0.5)


# --- parameters outside modules -----------------------------------------------------------------------------------


def test_trained_values_of_pyro_params(bits, caller_state):
    pair = ParamPair()
    x = torch.randn(500) * 2**0.5
    pyro.param("other", torch.tensor(3.0))
    before = caller_state()
    result = fit(pair, x, epochs=100, lr=0.02)
    # x ~ N(0, 2) as 1 + noise^2; so the posterior is N(x / 2, 1 / 2)
    assert result.params["slope"].item() == pytest.approx(0.5, abs=0.1)
    assert result.params["scale"].item() == pytest.approx(0.5**0.5, abs=0.1)
    before.assert_unchanged()
    with result.trained():
        assert pyro.param("scale").item() == result.params["scale"].item()
        assert pyro.param("other").item() == 3
    before.assert_unchanged()


def test_parameters_that_appear_later_are_trained(bits):
    calls = []

    def guide(x):
        calls.append(1)
        loc = pyro.param("loc", torch.zeros(())) if len(calls) < 4 else pyro.param("late", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x + 3)

    result = pvae.fit(model, guide, bits[:, 0], epochs=3, batch_size=64, lr=0.1, progress=False)
    assert result.params["late"] > 0.1


def test_a_later_fit_goes_on_from_an_earlier_one():
    pair = ParamPair()
    x = torch.randn(500) * 2**0.5
    first = fit(pair, x, epochs=100, lr=0.02)
    afresh, onward = fit(pair, x, epochs=1, lr=1e-6), fit(pair, x, epochs=1, lr=1e-6, start=first)
    assert afresh.params["slope"].item() == pytest.approx(0, abs=1e-4)
    assert onward.params["slope"].item() == pytest.approx(first.params["slope"].item(), abs=1e-4)
    assert onward.params["slope"].item() != first.params["slope"].item()


def test_going_on_leaves_the_earlier_result_as_it_was():
    pair, x = ParamPair(), torch.randn(100) + 1
    first = fit(pair, x, epochs=20, lr=0.02)
    fit(pair, x, epochs=20, lr=0.02, start=first)
    with first.trained():
        assert all(torch.equal(pyro.param(name), value) for name, value in first.params.items())


def test_values_in_the_store_that_fit_does_not_start_from_are_named():
    pair, x = ParamPair(), torch.randn(100) + 1
    first = fit(pair, x, epochs=20, lr=0.02)
    match = r"parameters \['noise', 'scale', 'slope'\] begin at their initial values.*start=result"
    with first.trained():
        with pytest.warns(UserWarning, match=match):
            fit(pair, x, epochs=1)
        fit(pair, x, epochs=1, start=first)
    pyro.param("slope", torch.tensor(5.0))
    pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)  # the initial one
    with pytest.warns(UserWarning, match=r"parameters \['slope'\] begin"):
        fit(pair, x, epochs=1)


def test_a_run_that_goes_on_from_a_checkpoint_does_not_begin_anew(tmp_path):
    pair, x = ParamPair(), torch.randn(100) + 1
    first = fit(pair, x, epochs=2, checkpoint=tmp_path)
    with first.trained():
        fit(pair, x, epochs=3, checkpoint=tmp_path, resume="auto")


@pytest.mark.parametrize(
    "slope, other, match",
    [
        (lambda: pyro.param("slope", torch.zeros(1)), "scale", r"'slope' has the shape \(\) .* \(1,\)"),
        (
            lambda: pyro.param("slope", torch.tensor(0.5), constraint=constraints.positive),
            "scale",
            r"'slope' has the shape \(\) in Real\(\), and here it has \(\) in GreaterThan",
        ),
        (lambda: 0.5, "width", r"has parameters \['noise', 'slope'\].* and lacks \['width'\]"),
    ],
)
def test_a_result_of_another_pair_is_nothing_to_start_from(slope, other, match):
    x = torch.randn(100) + 1
    first = fit(ParamPair(), x)

    def model(x):
        noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive) if other == "scale" else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), noise), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
            wide = pyro.param("width", torch.tensor(0.0)) if other == "width" else 0.0
            pyro.sample("z", dist.Normal(slope() * x + wide, scale))

    with pytest.raises(pvae.ArgumentError, match=match):
        pvae.fit(model, guide, x, start=first, progress=False)


@pytest.mark.parametrize("late", [True, False])
def test_parameters_to_start_from_that_no_step_makes_are_left_out(late):
    steps, x = [], torch.randn(100) + 1

    def guide(x):
        steps.append(x)
        shift = pyro.param("late", torch.tensor(0.5)) if late and len(steps) > 5 else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * pyro.param("slope", torch.tensor(0.0)) + shift, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def first_guide(x):
        with pyro.plate("data", len(x)):
            shift = pyro.param("late", torch.tensor(3.0))
            pyro.sample("z", dist.Normal(x * pyro.param("slope", torch.tensor(0.0)) + shift, 1.0))

    first = pvae.fit(model, first_guide, x, epochs=1, lr=1e-6, progress=False)
    with pytest.warns(UserWarning, match=r"start has parameters \['late'\], .* kept only if a step makes them"):
        onward = pvae.fit(model, guide, x, epochs=5, batch_size=50, lr=1e-6, start=first, progress=False)
    assert onward.params.keys() == ({"slope", "late"} if late else {"slope"})
    if late:
        assert onward.params["late"].item() == pytest.approx(3, abs=1e-3)


# --- objectives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Trace_ELBO(num_particles=2), TraceMeanField_ELBO()])
def test_pyros_elbos(objective, bits, small_vae):
    assert set(fit(small_vae, bits, objective=objective).history) == {"elbo", "seconds"}


def test_an_objective_without_one_loss_is_refused(bits, small_vae):
    def two(model, guide, x):
        return Trace_ELBO().differentiable_loss(model, guide, x), 0.0

    before = weights(small_vae)
    with pytest.raises(pvae.ArgumentError, match=r"one loss.*from two"):
        fit(small_vae, bits, objective=two)
    with pytest.raises(pvae.ProgramError, match="a gradient for no parameter"):
        fit(small_vae, bits, objective=lambda model, guide, x: x.sum())
    assert same(before, weights(small_vae))


class Normed(ModulePair):
    """Its encoder has batch normalization, which needs two data in train mode."""

    def __init__(self):
        super().__init__()
        self.encoder.insert(1, nn.BatchNorm1d(8))


class OfSixtyFour(ModulePair):
    """Its model takes for granted how many data come."""

    def model(self, x):
        with pyro.plate("all", 64):
            z = pyro.sample("latent", dist.Normal(torch.zeros(64, 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


@pytest.mark.parametrize(
    "made", [lambda x: x, Items, lambda x: DataLoader(Items(x), batch_size=64)], ids=["tensor", "dataset", "loader"]
)
@pytest.mark.parametrize("kind, few", [(Normed, 1), (OfSixtyFour, 32)])
def test_a_last_batch_that_is_too_small_is_said_before_anything_moves(kind, few, made, bits):
    torch.manual_seed(0)
    pair = kind()
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(pvae.ProgramError, match=rf"do not run on {few} of the data.* of {192 + few}: .*batch_size"):
        fit(pair, made(bits[: 192 + few]), epochs=1)
    assert same(before.values(), pair.state_dict().values())
    fit(pair, made(bits[:192]), epochs=1)


def test_one_datum_is_too_small_for_batch_normalization(bits):
    with pytest.raises(pvae.ProgramError, match=r"do not run on 1 of the data.* leaves of 1: "):
        fit(Normed(), bits[:1])
    assert fit(Normed(), bits[:194]).history["elbo"].shape == (2,)


class Counting(ModulePair):
    """The weight of its likelihood is the number of steps so far."""

    def __init__(self, *, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("steps", torch.zeros(()))

    def model(self, x):
        if self.in_place:
            self.steps += 1
        else:
            self.steps = self.steps + 1
        with pyro.poutine.scale(scale=(self.steps / 10).clamp(max=1)):
            super().model(x)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "bound anew"])
def test_trial_runs_do_not_count(in_place, bits):
    pair = Counting(in_place=in_place)
    assert_fit_is_svi(pair, bits)
    assert pair.steps.item() == 10
    normed = Normed()
    fit(normed, bits)
    assert normed.encoder[1].num_batches_tracked.item() == 10


def test_sparse_gradients_are_refused_by_name(bits):
    rows = torch.randint(10, (300,), generator=torch.Generator().manual_seed(0))

    class Table(ModulePair):
        sparse = True

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 6, sparse=self.sparse)

        def model(self, x, rows):
            pyro.module("table", self.table)
            super().model(x)
            shift = self.table(rows) if self.sparse is not None else F.embedding(rows, self.table.weight, sparse=True)
            with pyro.plate("again", len(x)):
                pyro.sample("y", dist.Normal(shift, 1.0).to_event(1), obs=x)

        def guide(self, x, rows):
            super().guide(x)

    class Functional(Table):
        sparse = None

    class Dense(Table):
        sparse = False

    for kind, match in (
        (Table, r"module 'table' \(Embedding\) has sparse=True.*sparse=False"),
        (Functional, "'table.w"),
    ):
        pair = kind()
        before = weights(pair)
        with pytest.raises(pvae.ProgramError, match=match):
            fit(pair, (bits, rows))
        assert same(before, weights(pair))
    fit(Dense(), (bits, rows))


def test_other_bounds_are_not_called_elbo(bits, small_vae):
    objective = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    history = fit(small_vae, bits, objective=objective, epochs=3, lr=0.01).history
    assert set(history) == {"objective", "seconds"}
    assert history["objective"][-1] > history["objective"][0]


def test_a_callable_objective(bits):
    ours, theirs = (ModulePair() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    a = fit(ours, bits, objective=lambda model, guide, x: Trace_ELBO().differentiable_loss(model, guide, x))
    b = fit(theirs, bits)
    np.testing.assert_allclose(a.history["objective"], b.history["elbo"], rtol=1e-5)


# --- bad input ----------------------------------------------------------------------------------------------------


def mismatched(x):
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def only_z(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def observes_z(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(torch.full((6,), 0.5)).to_event(1), obs=x)


def nan_at(i):
    x = torch.zeros(300, 6)
    x[i, 3] = torch.nan
    return x


@pytest.mark.parametrize(
    "options, match",
    [
        ({"x": nan_at(299)}, r"data holds 1 nan .* \(299, 3\)"),
        ({"x": torch.full((300, 6), 0.5)}, "site 'x' is Bernoulli.*'dynamic'"),
        ({"x": torch.cat([torch.zeros(299, 6), torch.full((1, 6), 255)])}, "site 'x' is Bernoulli.*0.333%"),
        ({"x": torch.full((300, 6), 255, dtype=torch.uint8)}, "Bernoulli"),
        ({"x": torch.zeros(300, 7)}, r"\(N, 6\), got \(300, 7\)"),
        ({"x": torch.zeros(0, 6)}, "data is empty"),
        ({"x": "mnist"}, "data must be"),
        ({"validation": torch.zeros(0, 6)}, "validation is empty"),
        ({"validation": torch.full((10, 6), 0.5)}, "Bernoulli"),
        ({"validation": torch.zeros(10, 3)}, r"\(N, 6\), got \(10, 3\)"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"batch_size": -1}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"lr": True}, "lr"),
        ({"seed": -1}, "seed"),
        ({"device": "gpu"}, "device"),
        ({"objective": "elbo"}, "objective"),
        ({"guide": lambda x: None, "model": mismatched}, "Only in the model"),
        ({"guide": observes_z}, r"the guide observes \['x'\]"),
        ({"model": only_z, "guide": only_z}, "the model observes nothing"),
        ({"guide": mismatched}, r"Only in the model: \['z'\]; only in the guide: \['w'\]"),
    ],
)
def test_bad_input_is_named_before_any_parameter_moves(options, match, bits, small_vae):
    before = weights(small_vae)
    options = {"x": bits, "model": small_vae.model, "guide": small_vae.guide, "epochs": 1, "batch_size": 64, **options}
    with pytest.raises(pvae.PVAEError, match=match):
        pvae.fit(options.pop("model"), options.pop("guide"), options.pop("x"), progress=False, **options)
    assert same(before, weights(small_vae))


@pytest.mark.parametrize(
    "convert", [lambda x: x.double(), lambda x: x.to(torch.uint8), lambda x: x.bool(), torch.Tensor.numpy]
)
def test_data_of_other_types_train_the_same_model(convert, bits):
    ours, theirs = (pvae.VAE.mlp(6, 2, [8]) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fit(ours, bits)
    fit(theirs, convert(bits))
    assert same(weights(ours), weights(theirs))


def test_a_pair_without_parameters_is_refused():
    oracle = pvae.testing.linear_gaussian()
    with pytest.raises(pvae.ProgramError, match="parameters to train"):
        fit(oracle, oracle.sample(10))


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own, beside our error
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_its_update(where, bits, small_vae):
    calls = []

    def objective(model, guide, x):
        loss = Trace_ELBO().differentiable_loss(model, guide, x)
        calls.append(weights(small_vae))
        if len(calls) < 3:
            return loss
        return loss * math.nan if where == "loss" else loss + (small_vae.encoder.network[0].weight * 0).sqrt().sum()

    with pytest.raises(pvae.NumericalError, match=r"epoch 1, step 3.*" + where):
        fit(small_vae, bits, objective=objective)
    assert same(weights(small_vae), calls[-1])


def test_the_bar_is_only_for_terminals(bits, small_vae, capsys):
    fit(small_vae, bits, progress=True)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# --- compiled -----------------------------------------------------------------------------------------------------


def test_compiled_training_is_training(bits, caller_state):
    """The same batches and noise, so the same curves to rounding; a ragged last batch, validation and a transform."""
    grey = 0.9 * bits + 0.05
    ours = pvae.VAE.mlp(6, 2, [8])
    theirs = copy.deepcopy(ours)
    before = caller_state()
    options = {"transform": pvae.datasets.fresh_bits, "validation": bits[:100], "epochs": 4, "lr": 0.01}
    fast = fit(ours, grey, compile=True, **options)
    before.assert_unchanged()
    plain = fit(theirs, grey, compile=False, **options)
    for name in ("elbo", "validation_elbo"):
        np.testing.assert_allclose(fast.history[name], plain.history[name], rtol=1e-4)
    assert fast.compile_seconds > 0
    assert plain.compile_seconds == 0
    assert all(p.grad is None for p in ours.parameters())


def test_bare_params_are_trained_by_compiled_steps(bits):
    fast = fit(ParamPair(), bits[:, 0], compile=True, lr=0.05, epochs=3)
    plain = fit(ParamPair(), bits[:, 0], compile=False, lr=0.05, epochs=3)
    for name, value in plain.params.items():
        torch.testing.assert_close(fast.params[name], value, rtol=1e-3, atol=1e-4)


def test_a_short_run_is_not_compiled(bits):
    assert fit(pvae.VAE.mlp(6, 2, [8]), bits).compile_seconds == 0


def test_a_program_that_cannot_be_captured_is_trained_all_the_same(bits):
    class Branches(ModulePair):
        def model(self, x):
            if x.mean() > 2:
                raise AssertionError
            super().model(x)

    ours, theirs = Branches(), Branches()
    theirs.load_state_dict(ours.state_dict())
    with pytest.warns(UserWarning, match=r"pvae.fit's step runs as plain Pyro, uncaptured: .*x.mean\(\) > 2"):
        fast = fit(ours, bits, compile=True)
    np.testing.assert_allclose(fast.history["elbo"], fit(theirs, bits, compile=False).history["elbo"], rtol=1e-6)


def test_bfloat16_trains(bits):
    """The ELBO of an epoch has a standard error of some 0.09 nats here; products are rounded to 0.4%."""
    results = [fit(pvae.VAE.mlp(6, 2, [64]), bits, epochs=20, lr=0.01, precision=p) for p in ("float32", "bfloat16")]
    last = [result.history["elbo"][-1] for result in results]
    assert last[1] == pytest.approx(last[0], abs=0.5)
    assert last[1] > results[1].history["elbo"][0] + 0.5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"compile": "always"}, "compile must be True, False or 'auto', got 'always'"),
        ({"precision": "float16"}, "precision must be one of 'float32', 'bfloat16'; got 'float16'"),
    ],
)
def test_how_to_run_is_checked(option, message, bits, small_vae):
    with pytest.raises(pvae.ArgumentError, match=message):
        fit(small_vae, bits, **option)
