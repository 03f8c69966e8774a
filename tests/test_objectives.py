from __future__ import annotations

import copy
import warnings

import numpy as np
import pyro
import pytest
import torch
from helpers import assert_same_run, fit
from pairs import ModulePair
from pyro import distributions as dist
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)

import pvae
from pvae import objectives
from pvae.runtime import isolate
from pvae.svi import elbos as bounds
from pvae.svi import losses, step, verification
from pvae.svi.traces import nested_plates


def test_which_objectives_are_the_elbo():
    elbos = (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO(), TraceEnum_ELBO())
    assert all(bounds.is_elbo(elbo) for elbo in elbos)
    assert not bounds.is_elbo(RenyiELBO(num_particles=2))
    assert not bounds.is_elbo(TraceTailAdaptive_ELBO(num_particles=2))
    assert not bounds.is_elbo(lambda model, guide, x: x)


def test_default_objective():
    assert type(bounds.resolve(None)) is Trace_ELBO
    elbo = Trace_ELBO()
    assert bounds.resolve(elbo) is elbo


def test_verify_finds_the_parameters_of_both_programs(module_pair, bits):
    verified = verification.verify(module_pair.model, module_pair.guide, (bits,), (bits,))
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

    assert len(verification.verify(model, guide, (bits,), (bits,)).params) == 1
    result = pvae.fit(
        model, lambda x: None, bits, objective=TraceEnum_ELBO(max_plate_nesting=1), epochs=1, progress=False
    )
    assert result.params["p"] != 0.5


def test_loss_and_gradients_are_pyros(module_pair, bits):
    torch.manual_seed(1)
    loss, params = losses.loss_and_grads(Trace_ELBO(), module_pair.model, module_pair.guide, (bits,))
    ours = {id(p): p.grad.clone() for p in params}
    for p in params:
        p.grad = None
    torch.manual_seed(1)
    assert loss == Trace_ELBO().loss_and_grads(module_pair.model, module_pair.guide, bits)
    assert all(torch.equal(p.grad, ours[id(p)]) for p in params)
    with pytest.raises(pvae.ArgumentError, match="objective"):
        bounds.resolve(3)


# --- pvae's own -----------------------------------------------------------------------------------------------------

PYROS = {
    "ELBO": (objectives.ELBO(), Trace_ELBO()),
    "ELBO, particles": (objectives.ELBO(3), Trace_ELBO(3, max_plate_nesting=1, vectorize_particles=True)),
    "mean field": (objectives.MeanFieldELBO(), TraceMeanField_ELBO()),
    "mean field, particles": (objectives.MeanFieldELBO(2, vectorize_particles=False), TraceMeanField_ELBO(2)),
    "IWAE": (objectives.IWAE(4), RenyiELBO(0, 4, max_plate_nesting=1, vectorize_particles=True)),
    "IWAE, one by one": (objectives.IWAE(4, vectorize_particles=False), RenyiELBO(0, 4)),
    "Renyi": (objectives.Renyi(0.5, 3), RenyiELBO(0.5, 3, max_plate_nesting=1, vectorize_particles=True)),
}
REPARAMETERIZED = [
    objectives.MeanFieldELBO(),
    objectives.IWAE(2),
    objectives.Renyi(0.5, 2),
    objectives.StickingTheLanding(),
    objectives.DReG(2),
]


@pytest.mark.parametrize("name", PYROS)
def test_losses_and_gradients_are_those_of_pyros_own(name, small_vae, bits):
    found = []
    for objective in PYROS[name]:
        torch.manual_seed(1)
        small_vae.zero_grad()
        with nested_plates(1):  # so that no noise is drawn to find it out
            loss, params = losses.loss_and_grads(objective, small_vae.model, small_vae.guide, (bits,))
        found.append((loss, [p.grad.clone() for p in params]))
    (ours, our_grads), (theirs, their_grads) = found
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_free_bits_are_a_floor_below_each_kl(small_vae, bits):
    q, p = small_vae.encode(bits), torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(q.base_dist, p).mean(0)
    free = kl.mean().item()  # above one dimension's and below the other's
    for objective, expected in (
        (objectives.MeanFieldELBO(1, free), (kl.clamp(min=free) - kl).sum().item()),
        (objectives.MeanFieldELBO(3, free, vectorize_particles=False), (kl.clamp(min=free) - kl).sum().item()),
        (objectives.MeanFieldELBO(1, 3 * free, "site"), free),
    ):
        found = []
        for one in (objective, objective.measure):
            torch.manual_seed(1)
            found.append(one(small_vae.model, small_vae.guide, bits).item())
        assert found[0] - found[1] == pytest.approx(len(bits) * expected, rel=1e-3)
    small_vae.zero_grad()
    objectives.MeanFieldELBO(1, 100.0)(small_vae.model, small_vae.guide, bits).backward()
    scale_only = [p.grad.abs().max() for p in small_vae.encoder.parameters()]
    assert all(torch.isfinite(g) for g in scale_only)


def test_free_bits_where_a_kl_has_no_parts(bits):
    class Full(ModulePair):
        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("latent", dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(raw.exp())))

    with pytest.raises(pvae.ProgramError, match=r"'latent'.*MultivariateNormal.*free_bits_per='site'"):
        fit(Full(), bits, objective=objectives.MeanFieldELBO(free_bits=0.1))
    assert len(fit(Full(), bits, objective=objectives.MeanFieldELBO(1, 0.1, "site")).history["objective"]) == 2


def test_what_measures_held_out_data():
    iwae, elbo = objectives.IWAE(3), objectives.ELBO(3)
    for objective, measure in (
        (elbo, elbo),
        (iwae, iwae),
        (objectives.DReG(3), iwae),
        (objectives.StickingTheLanding(3), elbo),
        (objectives.ScoreFunction(3), elbo),
        (objectives.MeanFieldELBO(3, 0.5), objectives.MeanFieldELBO(3)),
        (objectives.Renyi(0.5, 3), objectives.Renyi(0.5, 3)),
    ):
        assert bounds.bound(objective, None) == measure
        assert bounds.is_elbo(objective) == (objective not in (iwae, objectives.DReG(3), objectives.Renyi(0.5, 3))) - (
            objective == objectives.MeanFieldELBO(3, 0.5)
        )


def test_training_by_a_tighter_bound_is_measured_by_it(bits, small_vae):
    history = fit(small_vae, bits, objective=objectives.DReG(8), validation=bits, kl_weight=0.5).history
    with torch.no_grad():
        iwae, elbo = (
            -objective(small_vae.model, small_vae.guide, bits).item() / len(bits)
            for objective in (objectives.IWAE(8), objectives.ELBO(8))
        )
    assert history["validation_elbo"][-1] == pytest.approx(iwae, abs=0.1)
    assert elbo < iwae


@pytest.mark.parametrize("objective", REPARAMETERIZED, ids=lambda objective: type(objective).__name__)
def test_draws_without_a_gradient_are_refused_before_anything_moves(objective, bits, module_pair):
    def model(x):
        module_pair.model(x)
        with pyro.plate("more", len(x)):
            pyro.sample("k", dist.Poisson(1.0))

    def guide(x):
        module_pair.guide(x)
        with pyro.plate("more", len(x)):
            pyro.sample("k", dist.Poisson(2.0))

    before = [p.clone() for p in module_pair.parameters()]
    with pytest.raises(pvae.ProgramError, match=rf"{type(objective).__name__}.*'k', Poisson.*ScoreFunction"):
        pvae.fit(model, guide, bits, objective=objective, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(module_pair.parameters(), before, strict=True))
    pvae.fit(model, guide, bits, objective=objectives.ScoreFunction(2, has_baseline=True), epochs=1, progress=False)


def test_a_discrete_latent_is_learned_by_the_score_function():
    x = torch.tensor([[-2.0], [2.0]]).repeat(100, 1)

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(4 * k - 2, 1.0).to_event(0), obs=x[:, 0])

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=slope * x[:, 0]))

    objective = objectives.ScoreFunction(4, has_baseline=True)
    result = pvae.fit(model, guide, x, objective=objective, lr=0.1, epochs=60, batch_size=100, progress=False)
    # The exact posterior's is 4. Its gradient there is all but flat: 6 standard deviations of Adam's noise.
    assert result.params["slope"].item() == pytest.approx(4.0, abs=1.5)


class Global:
    """A latent of all data beside those of each."""

    def model(self, x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x[:, 0])

    def guide(self, x):
        loc = pyro.param("loc", torch.tensor(0.3))
        shift = pyro.sample("shift", dist.Normal(loc, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] - shift * loc, 1.0))


@pytest.mark.parametrize("objective", [objectives.IWAE(2), objectives.Renyi(0.5, 2), objectives.DReG(2)])
def test_bounds_for_each_datum_refuse_what_belongs_to_all(objective, bits):
    with pytest.raises(pvae.ProgramError, match=r"each datum, and site 'shift' lies outside of plate 'data'"):
        fit(Global(), bits, objective=objective)


@pytest.mark.parametrize("objective", [objectives.StickingTheLanding(2), objectives.ScoreFunction(2)])
def test_latents_of_all_data_have_the_elbos_gradient(objective, bits):
    """A global latent that others depend on: 150 gradients each; a right program fails in 2e-6 of cases."""
    pair, x = Global(), bits[:3]

    def draws(one):
        found = []
        for _ in range(150):
            loss, params = losses.loss_and_grads(one, pair.model, pair.guide, (x,))
            found.append(torch.stack([loss, params[0].grad.clone().double()]))
            params[0].grad = None
        return torch.stack(found)

    ours, theirs = draws(objective), draws(objectives.ELBO(4))
    error = ((ours.var(0) + theirs.var(0)) / 150).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error).all()


def test_a_bound_for_each_datum_asks_for_a_plate(bits):
    class Bare(ModulePair):
        def model(self, x):
            pyro.module("decoder", self.decoder)
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(2))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(2), obs=x)

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            pyro.sample("latent", dist.Normal(self.encoder(x)[..., :2], 1.0).to_event(2))

    with pytest.raises(pvae.ProgramError, match=r"'latent' is in no plate\. Put pyro\.plate\('data'"):
        fit(Bare(), bits, objective=objectives.IWAE(2))
    fit(Bare(), bits, objective=objectives.ELBO(2), epochs=1)


def test_plates_that_subsample_scale_bounds_and_not_weights(module_pair, bits):
    class Sub(ModulePair):
        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", 900, subsample=x):
                z = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", 900, subsample=x):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))

    sub = Sub()
    sub.load_state_dict(module_pair.state_dict())
    for objective in (objectives.IWAE(3), objectives.DReG(3), objectives.Renyi(0.5, 3)):
        found = []
        for pair in (module_pair, sub):
            torch.manual_seed(0)
            pyro.clear_param_store()
            pair.zero_grad()
            loss, _ = losses.loss_and_grads(objective, pair.model, pair.guide, (bits,))
            found.append((loss, [p.grad.clone() for p in pair.parameters()]))
        assert found[1][0].item() == pytest.approx(3 * found[0][0].item(), rel=1e-5)
        for a, b in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(3 * a, b, rtol=1e-4, atol=1e-3)


def test_plates_inside_of_the_plate_over_the_data(bits):
    """Parts of a datum are summed before the mean over particles: as one event."""

    class Parts(ModulePair):
        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("latent", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                logits = self.decoder(z.squeeze(-3) if z.dim() > 2 else z)
                with pyro.plate("parts", 6, dim=-2):
                    pyro.sample("obs", dist.Bernoulli(logits=logits.mT), obs=x.mT)

    parts, whole = Parts(), ModulePair()
    whole.load_state_dict(parts.state_dict())
    for objective in (objectives.IWAE(3), objectives.DReG(3), objectives.ELBO(3)):
        found = []
        for pair in (parts, whole):
            torch.manual_seed(0)
            pyro.clear_param_store()
            found.append(objective(pair.model, pair.guide, bits).item())
        assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_programs_that_do_not_broadcast_run_particle_by_particle(bits):
    class Stubborn(ModulePair):
        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                logits = self.decoder(torch.cat([z, 0 * x], -1)[..., :2])
                pyro.sample("obs", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    with pytest.raises(pvae.ProgramError, match=r"IWAE does not run on this pair.*vectorize_particles=False"):
        fit(Stubborn(), bits, objective=objectives.IWAE(2))
    fit(Stubborn(), bits, objective=objectives.IWAE(2, vectorize_particles=False), epochs=1)


def test_no_objective_runs_the_pair_more_often_than_it_must(bits):
    class Counted(ModulePair):
        runs = 0

        def guide(self, x):
            self.runs += 1
            super().guide(x)

    for objective in (objectives.IWAE(2), objectives.DReG(2), objectives.StickingTheLanding(2), objectives.ELBO(2)):
        pair = Counted()
        for _ in range(3):
            objective(pair.model, pair.guide, bits)
        assert pair.runs == 3 + 1  # the first, to see how deep plates are nested


@pytest.mark.parametrize(
    "objective",
    [objectives.DReG(3), objectives.MeanFieldELBO(1, 0.1), objectives.ScoreFunction(2, has_baseline=True)],
    ids=lambda objective: type(objective).__name__,
)
def test_a_run_goes_on_bit_for_bit(objective, bits, tmp_path):
    options = {"objective": objective, "validation": bits[:50]}
    torch.manual_seed(0)
    straight, first, second = ModulePair(), ModulePair(), ModulePair()
    for pair in (first, second):
        pair.load_state_dict(straight.state_dict())
    whole = fit(straight, bits, epochs=3, **options)
    fit(first, bits, epochs=2, checkpoint=tmp_path, **options)
    result = fit(second, bits, epochs=3, checkpoint=tmp_path, resume="auto", **options)
    assert_same_run((second, result), (straight, whole))
    with pytest.raises(pvae.CheckpointError, match=r"objective was .*num_particles=\d.*num_particles=7"):
        fit(first, bits, epochs=3, checkpoint=tmp_path, resume="auto", objective=objectives.IWAE(7))


def test_compiled_svi_takes_them(bits):
    found = []
    for kind in (pyro.infer.SVI, pvae.svi.CompiledSVI):
        torch.manual_seed(0)
        pyro.clear_param_store()
        pair = ModulePair()
        svi = kind(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), objectives.DReG(3))
        torch.manual_seed(1)
        found.append([svi.step(bits) for _ in range(6)] + [svi.evaluate_loss(bits)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert svi.captures == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: objectives.IWAE(0), "num_particles"),
        (lambda: objectives.ELBO(1, vectorize_particles=3), "vectorize_particles"),
        (lambda: objectives.Renyi(1, 2), "alpha"),
        (lambda: objectives.Renyi(float("nan"), 2), "alpha"),
        (lambda: objectives.MeanFieldELBO(1, -0.1), "free_bits"),
        (lambda: objectives.MeanFieldELBO(1, 0.1, "nat"), "free_bits_per"),
        (lambda: objectives.ScoreFunction(1, has_baseline=True), "has_baseline"),
        (lambda: bounds.resolve(objectives.IWAE), r"class IWAE: make one"),
        (lambda: bounds.resolve(Trace_ELBO), r"class Trace_ELBO: make one"),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(pvae.ArgumentError, match=said):
        make()


def test_objectives_are_plain_values():
    assert objectives.IWAE(5) == objectives.IWAE(5) != objectives.DReG(5)
    assert repr(objectives.Renyi(0.5, 3)) == "Renyi(num_particles=3, vectorize_particles=True, alpha=0.5)"


def test_nothing_warns(bits, small_vae):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for objective in (objectives.MeanFieldELBO(2, 0.1), objectives.DReG(2), objectives.ScoreFunction(2)):
            fit(small_vae, bits, objective=objective, epochs=1, validation=bits[:50])


def test_a_latent_that_the_guide_lacks_is_not_drawn_from_the_prior(bits, module_pair):
    for objective in (objectives.IWAE(2), objectives.ScoreFunction()):
        with pytest.raises(pvae.ProgramError, match=r"\['latent'\] of the model are not in the guide"):
            objective(module_pair.model, lambda x: None, bits)


# --- those of Pyro's whose loss is not one number --------------------------------------------------------------------


class Sleeps(ModulePair):
    """Its guide takes observations as reweighted wake-sleep passes them."""

    def guide(self, x, observations=None):
        x = observations["obs"] if observations else x
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[-2]):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))


GRADIENTS_ALONE = {
    "tail-adaptive": (ModulePair, lambda: TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True)),
    "wake-wake": (ModulePair, lambda: ReweightedWakeSleep(num_particles=4)),
    "in turn": (ModulePair, lambda: ReweightedWakeSleep(num_particles=3, vectorize_particles=False)),
    "wake-sleep": (Sleeps, lambda: ReweightedWakeSleep(num_particles=4, insomnia=0.5)),
}


@pytest.mark.parametrize("name", GRADIENTS_ALONE)
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "captured"])
def test_objectives_that_give_gradients_train_as_by_svi(name, compile, bits, never_compiled):
    make, objective = GRADIENTS_ALONE[name]
    never_compiled(step)
    ours = make()
    theirs = copy.deepcopy(ours)
    options = {"epochs": 2, "batch_size": 60, "lr": 0.01, "seed": 5, "progress": False, "compile": compile}
    result = pvae.fit(ours.model, ours.guide, bits, objective=objective(), validation=bits[:50], **options)
    loss = objective()
    loss.max_plate_nesting = 1 + loss.vectorize_particles  # else it is guessed, with noise of its own
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), loss)
    losses = []
    with isolate([theirs], seed=5, training=True):
        for epoch in (1, 2):
            rows = torch.from_numpy(np.random.default_rng((5, epoch)).permutation(300)).split(60)
            losses.append(sum(np.sum(svi.step(bits[part])) for part in rows) / 300)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    values = result.history["objective"]
    assert np.isfinite(values).all()
    if name != "tail-adaptive":  # there Pyro's are infinite
        np.testing.assert_allclose(values, -np.array(losses), rtol=1e-4)
    plain = Trace_ELBO()
    with isolate([ours], seed=5):
        elbo = -plain.loss(ours.model, ours.guide, bits[:50]) / 50
    assert result.history["validation_elbo"][-1] == pytest.approx(elbo, abs=1e-5)


@pytest.mark.parametrize(
    "objective, match",
    [
        (lambda: TraceTailAdaptive_ELBO(num_particles=4), r"TraceTailAdaptive_ELBO\(vectorize_particles=True"),
        (lambda: ReweightedWakeSleep(num_particles=2, insomnia=0.5), r"does not run on this pair.*observations"),
    ],
)
def test_what_they_need_is_said_before_anything_moves(objective, match, bits, module_pair):
    before = [p.detach().clone() for p in module_pair.parameters()]
    with pytest.raises(pvae.PVAEError, match=match):
        pvae.fit(module_pair.model, module_pair.guide, bits, objective=objective(), epochs=1, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(before, module_pair.parameters(), strict=True))


def test_ranks_of_draws_without_a_gradient_are_refused(bits):
    def program(x):
        p = pyro.param("p", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(pyro.param("q", torch.tensor(0.5))))

    objective = TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True)
    with pytest.raises(pvae.ProgramError, match=r"fully reparameterized\. .*pyro.infer.Trace_ELBO takes"):
        pvae.fit(program, guide, bits, objective=objective, epochs=1, progress=False)
    pvae.fit(program, guide, bits, objective=ReweightedWakeSleep(num_particles=4), epochs=1, progress=False)
