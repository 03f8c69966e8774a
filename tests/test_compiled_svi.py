from __future__ import annotations

import argparse
import copy
import functools
import math
import warnings

import numpy as np
import pyro
import pytest
import torch
from pairs import ModulePair, ParamPair
from pyro import distributions as dist
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import SGD, Adam, ClippedAdam, ExponentialLR
from torch import nn

import pvae
from pvae.capture import captured as captured_module
from pvae.errors import NumericalError
from pvae.svi import CompiledSVI, compiled_svi


@pytest.fixture
def patient():
    """Asks for what waits until it would have paid."""


@pytest.fixture(autouse=True)
def _captured_at_once(monkeypatch, never_compiled, request):
    """Captured programs are the same uncompiled, and take no seconds to make."""
    if request.node.name != "test_compiled":
        never_compiled(compiled_svi)
    if "patient" not in request.fixturenames:
        monkeypatch.setattr(compiled_svi, "_STEPS_FOR_A_CAPTURE", 0)
        monkeypatch.setattr(compiled_svi._Losses, "after", 1)


def run(cls, pair, batches, optim=None, loss=None, seed=1):
    """Losses of steps on some arguments each, and the parameters after them."""
    pyro.clear_param_store()
    svi = cls(pair.model, pair.guide, optim() if optim else Adam({"lr": 0.01}), loss() if loss else Trace_ELBO())
    torch.manual_seed(seed)
    losses = [svi.step(*args[0], **args[1]) for args in batches]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}, svi


def calls(*batches):
    return [((x,), {}) for x in batches]


def assert_like_pyro(make, batches, optim=None, loss=None):
    pair = make()
    theirs_pair = copy.deepcopy(pair)
    ours, our_params, svi = run(CompiledSVI, pair, batches, optim, loss)
    theirs, their_params, _ = run(SVI, theirs_pair, batches, optim, loss)
    assert ours == pytest.approx(theirs, rel=1e-5)
    # Names of a VAE's modules hold its number.
    for ours_value, theirs_value in zip(our_params.values(), their_params.values(), strict=True):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-3, atol=1e-5)
    return svi


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO,
        TraceMeanField_ELBO,
        lambda: RenyiELBO(alpha=0.5, num_particles=2),
        lambda: lambda model, guide, x: Trace_ELBO().differentiable_loss(model, guide, x),
    ],
    ids=["Trace", "MeanField", "Renyi", "function"],
)
@pytest.mark.parametrize("make", [ModulePair, lambda: pvae.VAE.mlp(6, 2, [8])], ids=["module", "VAE"])
def test_steps_are_pyros(make, loss, bits):
    svi = assert_like_pyro(make, calls(*bits.split(64)[:4], *bits.split(64)[:4]), loss=loss)
    assert svi.captures == 1


def test_a_ragged_batch_has_a_program_of_its_own(bits):
    svi = assert_like_pyro(ModulePair, calls(*bits.split(64), *bits.split(64), *bits.split(64)))
    assert svi.captures == 2


@pytest.mark.parametrize(
    "optim",
    [
        lambda: ClippedAdam({"lr": 0.02, "clip_norm": 0.1, "lrd": 0.9}),
        lambda: Adam({"lr": 0.02}, {"clip_norm": 0.5}),
        lambda: ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-4}, "gamma": 0.5}),
        lambda: Adam(lambda name: {"lr": 0.1 if "bias" in name else 0.001}),
    ],
    ids=["ClippedAdam", "clip_args", "schedule", "by name"],
)
def test_optimizers_of_pyro(optim, bits):
    assert_like_pyro(ModulePair, calls(*bits.split(64)[:4], *bits.split(64)[:4]), optim)


def test_bare_params_floats_and_keywords(bits):
    """A float that changes every step is an input; a keyword that takes two values has two programs."""
    x = bits[:64, 0]
    batches = [((x, 0.1 * step), {"wide": step % 2 == 0}) for step in range(1, 11)]
    svi = assert_like_pyro(ParamPair, batches)
    assert svi.captures == 2


def test_evaluate_loss_takes_no_step(bits):
    pair = ModulePair()
    _, _, svi = run(CompiledSVI, pair, calls(*[bits] * 3))
    before = copy.deepcopy(pair.state_dict())
    torch.manual_seed(5)
    ours = [svi.evaluate_loss(bits) for _ in range(3)]
    theirs = SVI(pair.model, pair.guide, Adam({}), Trace_ELBO())
    torch.manual_seed(5)
    assert ours == pytest.approx([theirs.evaluate_loss(bits) for _ in range(3)], rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    assert all(isinstance(loss, float) for loss in ours)


class Labelled(nn.Module):
    """Data of which some have a label, with a loss of its own, as in Pyro's semi-supervised VAE."""

    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = nn.Linear(6, 4), nn.Linear(6, 1)
        self.decoder, self.unregistered = nn.Linear(2, 6), nn.Linear(1, 1)

    def model(self, x, y=None):
        pyro.module("labelled", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            logits = self.decoder(z) + self.unregistered(self.classifier(x))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x, y=None):
        pyro.module("encoder", self.encoder)
        pyro.module("classifier", self.classifier)
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    def labels(self, x, y=None):
        for name in ("encoder", "classifier", "unregistered"):
            pyro.module(name, getattr(self, name))
        with pyro.plate("data", len(x)):
            if y is not None:
                pyro.sample("y", dist.Bernoulli(logits=self.classifier(x).squeeze(-1)), obs=y)

    def nothing(self, x, y=None):
        pass


def alternating(cls, bits, optim, between):
    """What two losses of one module come to, step by step, that share an optimizer: losses, gradients, parameters."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    pair, shared = Labelled(), optim()
    whole = cls(pair.model, pair.guide, shared, Trace_ELBO())
    labels = cls(pair.labels, pair.nothing, shared, Trace_ELBO())
    seen = []
    for step, x in enumerate((*bits.split(60), *bits.split(60), *bits.split(60))):
        y = x[:, 0] if step % 3 == 0 else None
        between(pair, x)
        for svi in (whole, labels):
            grads = [None if p.grad is None else p.grad.clone() for p in pair.parameters()]
            seen.append((svi.step(x, y), grads))
    return seen, [p.detach().clone() for p in pair.parameters()], (whole, labels)


def left_by_the_caller(pair, x):
    pair.classifier(x).mean().backward()


def forgotten(pair, x):
    pair.zero_grad()


@pytest.mark.parametrize("between", [lambda *_: None, left_by_the_caller, forgotten], ids=["", "left", "forgotten"])
@pytest.mark.parametrize(
    "optim",
    [
        lambda: Adam({"lr": 0.02, "betas": (0.95, 0.999)}),
        lambda: ClippedAdam({"lr": 0.02, "clip_norm": 0.1, "lrd": 0.9}),
        lambda: SGD({"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01}),
    ],
    ids=["Adam", "ClippedAdam", "momentum"],
)
def test_two_losses_with_one_optimizer_of_which_one_is_often_without_gradients(optim, between, bits):
    ours, our_params, svis = alternating(CompiledSVI, bits, optim, between)
    theirs, their_params, _ = alternating(SVI, bits, optim, between)
    assert [svi.captures for svi in svis] == [2, 2]
    for (our_loss, our_grads), (their_loss, their_grads) in zip(ours, theirs, strict=True):
        assert our_loss == pytest.approx(their_loss, rel=1e-5)
        for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
            assert (our_grad is None) == (their_grad is None)
            if our_grad is not None:
                torch.testing.assert_close(our_grad, their_grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(our_params, their_params, rtol=1e-4, atol=1e-5)


def test_parameters_that_a_step_meets_and_does_not_use(bits):
    """Their momentum moves them on, as with Pyro; and what no step used has no gradient."""

    class Halves(ParamPair):
        def model(self, x, *, use):
            halves = [pyro.param(name, torch.zeros(())) for name in ("first", "second", "never")]
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(halves[use], 1.0), obs=x)

        def guide(self, x, *, use):
            pass

    batches = [((bits[:, 0],), {"use": step % 2}) for step in range(12)]
    svi = assert_like_pyro(Halves, batches)
    assert svi.captures == 2
    assert pyro.param("never").unconstrained().grad is None
    assert pyro.param("first").unconstrained().grad == 0


def faults(bits):
    """What may happen between steps, each to be taken in without a stale result."""
    return {
        "a layer is replaced": lambda pair: setattr(pair, "decoder", nn.Linear(2, 6)),
        "a layer is added": lambda pair: pair.decoder.append(nn.Tanh()),
        "another dtype": lambda pair: pair.double(),
        "eval mode": lambda pair: pair.eval(),
        "the store is cleared": lambda _: pyro.clear_param_store(),
        "frozen": lambda pair: pair.encoder[0].requires_grad_(False),
        "data of another shape": lambda _: None,
    }


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad=False")
@pytest.mark.parametrize("fault", faults(None))
def test_faults_between_steps(fault, bits):
    results = []
    start = ModulePair()
    for cls in (CompiledSVI, SVI):
        pyro.clear_param_store()
        pair = copy.deepcopy(start)
        svi = cls(pair.model, pair.guide, SGD({"lr": 1e-4}), Trace_ELBO())  # Adam's moments have a dtype
        torch.manual_seed(1)
        losses = [svi.step(bits) for _ in range(3)]
        torch.manual_seed(2)
        faults(bits)[fault](pair)
        x = bits.double() if "dtype" in fault else bits[:50] if "shape" in fault else bits
        losses += [svi.step(x) for _ in range(3)]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_nan_in_the_loss_stops_before_the_update(bits):
    pair = ModulePair()
    _, _, svi = run(CompiledSVI, pair, calls(*[bits] * 3))
    before = copy.deepcopy(pair.state_dict())
    bad = bits.clone()
    bad[3, 2] = math.nan
    with pytest.raises(NumericalError, match=r"the loss is nan.*nothing was updated"):
        svi.step(bad)
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    assert math.isfinite(svi.step(bits))


def test_the_first_step_has_pyros_validation(bits):
    pair = ModulePair()
    svi = CompiledSVI(pair.model, pair.guide, Adam({}), Trace_ELBO())
    with pytest.raises(ValueError, match="support"):
        svi.step(bits * 255)


def test_what_cannot_be_captured_is_pyros(bits):
    class Branches(ModulePair):
        def model(self, x):
            self.seen = x.sum().item()
            super().model(x)

    pair = Branches()
    theirs = copy.deepcopy(pair)
    with pytest.warns(
        UserWarning, match="CompiledSVI.step runs as plain Pyro, uncaptured: it reads a number"
    ) as caught:
        ours, _, svi = run(CompiledSVI, pair, calls(*[bits] * 5))
    assert len([w for w in caught if "CompiledSVI" in str(w.message)]) == 1
    assert ours == pytest.approx(run(SVI, theirs, calls(*[bits] * 5))[0], rel=1e-6)
    assert svi.captures == 0


def test_losses_in_tuples(bits):
    pair = ModulePair()

    def loss():
        return ReweightedWakeSleep(num_particles=3, vectorize_particles=False, insomnia=1.0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, _, _ = run(CompiledSVI, pair, calls(*[bits] * 4), loss=loss)
    assert all(isinstance(one, tuple) and all(map(math.isfinite, one)) for one in ours)


def test_compiled(bits, monkeypatch):
    monkeypatch.setattr(captured_module, "worth_compiling", lambda runs, *_: runs >= 2)
    svi = assert_like_pyro(ModulePair, calls(*[bits] * 6))
    (gradients,) = svi._gradients
    assert gradients.captured.is_compiled


def count_compiles(monkeypatch):
    """Graphs that were to be compiled, which they are not."""
    compiled = []
    monkeypatch.setattr(compiled_svi, "Captured", captured_module.Captured)
    monkeypatch.setattr(
        captured_module.Captured, "_compile", lambda _, __, graph, *___: compiled.append(graph) or graph
    )
    return compiled


# --- what a review found ------------------------------------------------------------------------------------------


def test_inside_of_handlers_steps_are_pyros(bits):
    results = []
    start = ModulePair()
    for cls in (CompiledSVI, SVI):
        pyro.clear_param_store()
        pair = copy.deepcopy(start)
        svi = cls(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO())
        torch.manual_seed(1)
        losses = [svi.step(bits) for _ in range(3)]
        for scale in (0.5, 0.1):
            with pyro.poutine.scale(scale=scale):
                losses += [svi.step(bits), svi.evaluate_loss(bits)]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_evaluate_loss_sees_a_param_store_that_was_set_anew(bits):
    x, pair = bits[:, 0], ParamPair()
    svi = CompiledSVI(pair.model, pair.guide, Adam({}), Trace_ELBO())
    theirs = SVI(pair.model, pair.guide, Adam({}), Trace_ELBO())
    for value in (1.0, 3.0):
        pyro.get_param_store()["slope"] = torch.tensor(value)
        for _ in range(3):
            losses = []
            for one in (svi, theirs):
                torch.manual_seed(1)
                losses.append(one.evaluate_loss(x))
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_int_that_counts_is_not_captured_for_ever(bits):
    pair = ParamPair()
    svi = CompiledSVI(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match="8 kinds of arguments that differ in more than tensors") as caught:
        losses = [svi.step(bits[:, 0], beta) for beta in range(1, 21)]
    assert len(caught) == 1
    assert all(map(math.isfinite, losses))
    assert svi.captures == 0
    assert len(svi._gradients) <= 9


def test_data_selected_by_a_mask_stay_with_pyro(bits):
    class Selects(ModulePair):
        def model(self, x):
            super().model(x[x[:, 0] > 0])

        def guide(self, x):
            super().guide(x[x[:, 0] > 0])

    pair = Selects()
    svi = CompiledSVI(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match="the shape of a result depends on the data"):
        losses = [svi.step(batch) for batch in bits.split(100)]
    assert all(map(math.isfinite, losses))


def test_a_loss_that_is_nan_with_finite_gradients(bits):
    pair = ModulePair()

    def loss(model, guide, x, offset):
        return Trace_ELBO().differentiable_loss(model, guide, x) + offset

    svi = CompiledSVI(pair.model, pair.guide, Adam({"lr": 0.01}), loss)
    for _ in range(3):
        svi.step(bits, torch.zeros(()))
    with pytest.raises(NumericalError, match="the loss is nan"):
        svi.step(bits, torch.tensor(math.nan))


# --- arguments that are no tensors, and runs that are short -------------------------------------------------------


class Options:
    """Arguments beside the data, as Pyro's examples have them: a namespace, a number, lengths, a function."""

    def model(self, x, options=None, size=1, lengths=(), prior=None, **rest):
        scale = options.scale if options else 1.0
        with pyro.plate("data", len(x), subsample_size=min(size * 10, len(x))) as rows:
            z = pyro.sample("z", dist.Normal(prior(0.0) if prior else 0.0, scale))
            pyro.sample("x", dist.Normal(z * size + sum(lengths), scale), obs=x[rows])

    def guide(self, x, options=None, size=1, lengths=(), prior=None, **rest):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x), subsample_size=min(size * 10, len(x))):
            pyro.sample("z", dist.Normal(loc, 1.0))


def moved(amount, x):
    return x + amount


def test_plain_objects_are_arguments_like_others(bits):
    """A namespace that is made anew and equal is the same kind of arguments; one with another value is another."""
    batches = [
        ((bits[:, 0],), {"options": argparse.Namespace(scale=scale, name="a"), "prior": functools.partial(moved, 1.0)})
        for scale in (1.0, 1.0, 2.0, 1.0, 2.0, 2.0, 1.0)
    ]
    svi = assert_like_pyro(Options, batches)
    assert svi.captures == 2


def test_an_object_among_the_arguments_that_is_changed_in_place(bits):
    results = []
    for cls in (CompiledSVI, SVI):
        pyro.clear_param_store()
        pair, options = Options(), argparse.Namespace(scale=1.0)
        svi = cls(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO())
        torch.manual_seed(1)
        losses = [svi.step(bits[:, 0], options=options) for _ in range(3)]
        options.scale = 3.0
        results.append(losses + [svi.step(bits[:, 0], options=options) for _ in range(3)])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_numbers_and_lengths_select_a_program(bits):
    batches = [((bits[:, 0],), {"size": step % 3 + 1, "lengths": [step % 2, 1]}) for step in range(24)]
    svi = assert_like_pyro(Options, batches)
    assert svi.captures == 6


STOPPED = {
    "a number": (lambda step: {"size": step + 1}, "8 kinds of arguments that .* mostly in 'size'. Pass a tensor"),
    "lengths": (lambda step: {"lengths": [1] * step, "size": 2}, "mostly in 'lengths'"),
    "a function's": (lambda step: {"prior": functools.partial(moved, step)}, "mostly in 'prior'"),
    "an iterator": (lambda step: {"source": iter([1, 2])}, "'source' is or holds a list_iterator, of which nobody"),
    "an array": (lambda step: {"array": np.zeros(5000)}, "'array' is or holds a ndarray, of which nobody"),
    "an array inside": (lambda step: {"options": argparse.Namespace(scale=1.0, a=np.zeros(5000))}, "'options' is or"),
}


@pytest.mark.parametrize("what", STOPPED)
def test_what_stops_a_capture_is_named_once(what, bits):
    make, message = STOPPED[what]
    pair = Options()
    svi = CompiledSVI(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match=message) as caught:
        losses = [svi.step(bits[:, 0], **make(step)) for step in range(12)]
    assert len([w for w in caught if "CompiledSVI" in str(w.message)]) == 1
    assert all(map(math.isfinite, losses))
    assert svi.captures == 0


def test_shapes_that_never_come_again_are_named(bits):
    pair = Options()
    svi = CompiledSVI(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match="but for 32 sets of shapes, mostly of 'x'. Pad tensors") as caught:
        losses = [svi.step(bits[: 50 + step, 0], beta=torch.ones(())) for step in range(40)]
    assert len(caught) == 1
    assert all(map(math.isfinite, losses))
    (run,) = svi._gradients
    assert len(run.seen) == 32


def test_steps_inside_of_a_handler_say_why_they_are_plain(bits):
    pair = Options()
    svi = CompiledSVI(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO())
    step = pyro.poutine.scale(svi.step, scale=0.5)
    with pytest.warns(UserWarning, match="inside of one of Pyro's handlers") as caught:
        [step(bits[:10, 0]) for _ in range(110)]
    assert len(caught) == 1


def test_a_rare_call_is_neither_captured_nor_compiled(bits, patient, monkeypatch):
    compiled, pair = count_compiles(monkeypatch), ModulePair()
    svi = CompiledSVI(pair.model, pair.guide, Adam({}), Trace_ELBO())
    for _ in range(3):
        svi.evaluate_loss(bits)
    assert svi.captures == 0
    for _ in range(20):
        svi.evaluate_loss(bits)
    assert svi.captures == 1
    assert compiled == []


def test_a_short_run_captures_once_and_compiles_nothing(bits, patient, monkeypatch):
    """A capture costs as much as 20 to 90 steps of Pyro's; compiling as much as thousands."""
    compiled, pair = count_compiles(monkeypatch), ModulePair()
    svi = CompiledSVI(pair.model, pair.guide, Adam({}), Trace_ELBO())
    for batch in (*bits.split(64), *bits.split(64)) * 24:  # 240 steps
        svi.step(batch)
    assert svi.captures == 1
    for batch in (*bits.split(64), *bits.split(64)) * 2:
        svi.step(batch)
    assert svi.captures == 2
    assert compiled == []


def test_compiling_waits_until_it_would_have_paid(bits, monkeypatch):
    monkeypatch.setattr(captured_module, "_COMPILE_SECONDS", {"cpu": 0.1})
    compiled, pair = count_compiles(monkeypatch), ModulePair()
    svi = CompiledSVI(pair.model, pair.guide, Adam({}), Trace_ELBO())
    for step in range(50):
        svi.step(bits)
        assert len(compiled) == (step >= 41)  # after one step of Pyro's and 40 that saved 2.5 ms each


@pytest.mark.parametrize("compile, compiled", [(True, 1), ("auto", 0), (False, 0)])
def test_when_to_compile_can_be_said(compile, compiled, bits, monkeypatch):
    graphs = count_compiles(monkeypatch)
    monkeypatch.setattr(captured_module, "worth_compiling", lambda runs, *_: compile is False)  # never, or always
    pair = ModulePair()
    svi = CompiledSVI(pair.model, pair.guide, Adam({"lr": 0.01}), Trace_ELBO(), compile=compile)
    for _ in range(5):
        svi.step(bits)
    assert (svi.captures, len(graphs)) == (1, compiled)
    with pytest.raises(pvae.ArgumentError, match="compile must be True, False or 'auto', got 3"):
        CompiledSVI(pair.model, pair.guide, Adam({}), Trace_ELBO(), compile=3)


USES_OF_A_FLOAT = {
    "rounded": lambda beta: round(beta, 1),
    "by its class": lambda beta: beta if isinstance(beta, float) else 7.0,
    "found in a dict": lambda beta: {0.4: 0.9}.get(beta, 0.2),
    "as it is": lambda beta: beta,
}


@pytest.mark.parametrize("use", USES_OF_A_FLOAT)
@pytest.mark.parametrize("kind", [float, np.float64])
def test_floats_that_programs_do_not_take_for_tensors(use, kind, bits):
    """A captured step has a tensor in a float's place: it raised, or gave another loss without a word."""

    class Annealed(ModulePair):
        def model(self, x, beta):
            with pyro.poutine.scale(scale=USES_OF_A_FLOAT[use](beta)):
                super().model(x)

        def guide(self, x, beta):
            super().guide(x)

    batches = [((bits[:64], kind(beta)), {}) for beta in (0.2, 0.4, 0.4, 0.5, 0.7, 0.5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi = assert_like_pyro(Annealed, batches)
    said = [str(w.message) for w in caught if "as plain Pyro, uncaptured" in str(w.message)]
    assert len(said) == (use != "as it is") == 1 - svi.captures
