"""Calls in several threads take turns: each gives what it gives alone, and the caller's state is as it was."""

from __future__ import annotations

import copy
import gc
import logging
import os
import queue
import random
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pyro
import pytest
import torch
from helpers import fork_lines
from pyro import distributions as dist
from torch import nn

import pvae
from pvae.runtime.turns import in_turn, turn
from pvae.svi import compiled_svi
from pvae.svi import step as engine

WAIT = 60  # seconds, after which a test that hangs fails


def shifted(x):
    """A model with a parameter that only the param store holds."""
    shift = pyro.param("shift", lambda: torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)


def shifted_guide(x):
    scale = pyro.param("scale", lambda: torch.tensor(0.8), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - 0.5) / 2, scale))


class Calls:
    """Calls of pvae that each return bytes, on programs and data of their own."""

    def __init__(self) -> None:
        self.bits = (torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) < 0.5).float()
        self.reals = torch.randn(6, generator=torch.Generator().manual_seed(2))
        torch.manual_seed(3)
        self.vae = pvae.VAE(
            pvae.priors.StandardNormal(2),
            pvae.likelihoods.Bernoulli(nn.Linear(2, 4)),
            pvae.posteriors.DiagonalNormal(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2))),
        )
        self.vae.encoder.eval()  # a mode of each part, to be left as it is
        self.untrained = copy.deepcopy(self.vae)  # which no thread runs
        self.options = {"epochs": 1, "batch_size": 4, "progress": False, "device": "cpu"}

    def __iter__(self):
        return iter((self.fitted, self.fitted_shift, self.evidence, self.evidence_shift, self.weights, self.sample))

    def fitted(self):
        vae = copy.deepcopy(self.untrained)
        result = pvae.fit(vae.model, vae.guide, self.bits, seed=4, **self.options)
        assert not vae.encoder.training
        assert vae.training
        return [result.history["elbo"], *(p.detach().numpy() for p in vae.parameters())]

    def fitted_shift(self):
        result = pvae.fit(shifted, shifted_guide, self.reals, seed=5, **self.options)
        with result.trained():
            again = pvae.log_evidence(shifted, shifted_guide, self.reals, num_samples=5, seed=6, device="cpu")
        return [again.log_px.numpy(), *(p.numpy() for p in result.params.values())]

    def evidence(self):
        return [pvae.log_evidence(self.vae.model, self.vae.guide, self.bits, num_samples=5, device="cpu").log_px]

    def evidence_shift(self):  # with the caller's shift and scale
        return [pvae.log_evidence(shifted, shifted_guide, self.reals, num_samples=5, seed=7, device="cpu").log_px]

    def weights(self):
        return [pvae.log_weights(self.vae.model, self.vae.guide, self.bits, num_samples=5, device="cpu").numpy()]

    def sample(self):
        return [self.vae.sample(3, seed=8)]


def as_bytes(results):
    return [np.asarray(result).tobytes() for result in results]


class State:
    """What a call leaves as it is: random numbers, the param store, validation, grad mode, modes of modules."""

    def __init__(self, module) -> None:
        self.noise = torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
        self.store = {name: value.detach().tolist() for name, value in pyro.get_param_store().items()}
        self.flags = dist.is_validation_enabled(), pyro.infer.util.is_validation_enabled(), torch.is_grad_enabled()
        self.flags += tuple(pyro.poutine.runtime._PYRO_STACK)
        self.hooks = len(nn.modules.module._global_forward_pre_hooks)
        self.modes = [m.training for m in module.modules()]


def in_two_threads(one, other):
    """What two lists of functions return, each list called in a thread of its own, both at once."""
    start = threading.Barrier(2)

    def called(functions):
        start.wait(WAIT)
        return [as_bytes(function()) for function in functions]

    with ThreadPoolExecutor(2) as pool:
        return [task.result(WAIT) for task in [pool.submit(called, functions) for functions in (one, other)]]


@pytest.mark.filterwarnings("ignore:parameters .* begin at their initial values")  # and not at the caller's
@pytest.mark.parametrize("trials", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_two_threads_give_what_one_gives(trials):
    calls = Calls()
    pyro.param("shift", torch.tensor(0.25))
    pyro.param("scale", torch.tensor(0.6), constraint=dist.constraints.positive)
    pyro.enable_validation(True)
    alone = {call: as_bytes(call()) for call in calls}
    before = State(calls.vae)
    chosen = random.Random(0)
    for trial in range(trials):
        one, other = (chosen.sample(list(calls), 2) for _ in range(2))
        results = in_two_threads(one, other)
        assert results == [[alone[call] for call in those] for those in (one, other)], trial
        assert vars(State(calls.vae)) == vars(before), trial


@contextmanager
def waiting():
    """A block with a queue of the names of threads that begin to wait for their turn, as the debug log tells."""
    names = queue.Queue()
    handler = logging.Handler()
    handler.emit = lambda record: names.put(record.threadName) if "waiting for a call" in record.getMessage() else None
    logger = logging.getLogger("pvae")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield names
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def started(function, name=None):
    thread = threading.Thread(target=function, name=name, daemon=True)
    thread.start()
    return thread


WHOLE_CALLS = {
    "fit": lambda vae: pvae.fit(),
    "load_checkpoint": lambda vae: pvae.svi.load_checkpoint(),
    "log_evidence": lambda vae: pvae.log_evidence(),
    "log_weights": lambda vae: pvae.evidence.log_weights(),
    "gauss_hermite": lambda vae: pvae.evidence.gauss_hermite(),
    "bidirectional_monte_carlo": lambda vae: pvae.evidence.bidirectional_monte_carlo(),
    "gaps": lambda vae: pvae.diagnostics.gaps(),
    "VAE": lambda vae: pvae.VAE.mlp(4, hidden=[2]),
    "sample": lambda vae: vae.sample(),
    "reconstruct": lambda vae: vae.reconstruct(torch.zeros(1, 6)),
    "save": lambda vae: vae.save(),
    "load": lambda vae: pvae.VAE.load(),
    "step": lambda vae: pvae.svi.CompiledSVI.step(),
    "evaluate_loss": lambda vae: pvae.svi.CompiledSVI.evaluate_loss(),
}


@pytest.mark.parametrize("name", WHOLE_CALLS)
def test_a_whole_call_waits_for_its_turn(name, small_vae):
    done = []

    def call():
        with suppress(TypeError):  # it lacks its arguments
            WHOLE_CALLS[name](small_vae)
        done.append(name)

    with waiting() as names, turn():
        thread = started(call, name)
        assert names.get(timeout=WAIT) == name
        assert not done
    thread.join(WAIT)
    assert done == [name]


def test_turns_go_by_who_came_first():
    seen = []
    with waiting() as names, turn():
        threads = []
        for number in range(4):
            threads.append(started(in_turn(lambda n=number: seen.append(n))))
            names.get(timeout=WAIT)
    for thread in threads:
        thread.join(WAIT)
    assert seen == [0, 1, 2, 3]


def test_calls_within_a_call_go_on(bits, small_vae, module_pair):
    options = {"epochs": 2, "batch_size": 100, "progress": False}
    alone = copy.deepcopy(small_vae), copy.deepcopy(module_pair)
    inner = []

    def callback(record):
        inner.append(pvae.fit(module_pair.model, module_pair.guide, bits, **options).history["elbo"])
        inner.append(pvae.log_evidence(module_pair.model, module_pair.guide, bits[:5], num_samples=5).log_px)

    outer = []
    outside = started(
        lambda: outer.append(pvae.fit(small_vae.model, small_vae.guide, bits, callback=callback, **options))
    )
    outside.join(WAIT)
    pvae.fit(alone[0].model, alone[0].guide, bits, **options)
    assert all(map(torch.equal, alone[0].state_dict().values(), small_vae.state_dict().values()))
    again = pvae.fit(alone[1].model, alone[1].guide, bits, **options)
    assert np.array_equal(inner[0], again.history["elbo"])
    assert len(inner) == 4


def test_an_error_leaves_the_next_in_line_its_turn(bits, small_vae):
    def fails(record):
        with waiting() as names:
            others.append(started(lambda: got.append(small_vae.sample(2))))
            names.get(timeout=WAIT)
        raise KeyboardInterrupt

    got, others = [], []
    with pytest.raises(KeyboardInterrupt):
        pvae.fit(small_vae.model, small_vae.guide, bits, epochs=2, callback=fails, progress=False)
    others[0].join(WAIT)
    assert len(got) == 1


@pytest.mark.parametrize("how", ["dropped", "closed in another thread", "its thread has ended"])
def test_a_generator_that_is_left_does_not_keep_the_turn(how):
    result = pvae.fit(shifted, shifted_guide, torch.randn(8), epochs=1, progress=False)

    def steps():
        with result.trained():
            yield 1
            yield 2

    held = [steps()]
    if how == "its thread has ended":
        started(lambda: next(held[0])).join(WAIT)
    else:
        next(held[0])
    got = []
    with waiting() as names:
        thread = started(in_turn(lambda: got.append(None)))
        names.get(timeout=WAIT)
    if how == "closed in another thread":
        started(held[0].close).join(WAIT)
    held.clear()
    gc.collect()
    thread.join(WAIT)
    assert got == [None]
    assert not pyro.get_param_store().keys()


def test_modules_that_run_in_other_threads_keep_their_modes(bits, small_vae):
    outside = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)).eval()
    modes = []

    def callback(record):
        def run():
            outside(bits)
            modes.append([m.training for m in outside.modules()])

        started(run).join(WAIT)

    pvae.fit(small_vae.model, small_vae.guide, bits, epochs=2, callback=callback, progress=False)
    assert modes == [[False] * 3] * 2


def test_compiled_svi_takes_turns_with_fit(bits, module_pair, small_vae, never_compiled):
    never_compiled(compiled_svi)
    never_compiled(engine)

    def steps(pair, meanwhile):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = pvae.svi.CompiledSVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
        thread = started(meanwhile)
        losses = [svi.step(bits[:50]) for _ in range(12)]
        while thread.is_alive():
            thread.join(0.01)
            losses.append(svi.step(bits[:50]))
        return losses

    def fits():
        for _ in range(2):
            vae = copy.deepcopy(small_vae)
            pvae.fit(vae.model, vae.guide, bits, epochs=2, progress=False, compile=True)
            weights.append([p.tolist() for p in vae.parameters()])

    weights = []
    among_others = steps(copy.deepcopy(module_pair), fits)
    alone = steps(module_pair, lambda: None)
    both = min(len(alone), len(among_others))
    assert among_others[:both] == alone[:both]
    assert len(weights) == 2
    assert weights[0] == weights[1]


def run_alone(program, folder):
    """Runs a program in a process of its own, after what all of them need."""
    shared = """
        import logging, os, queue, signal, sys, threading
        import torch
        import pvae

        bits = (torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()
        names = queue.Queue()  # of threads that begin to wait for their turn
        handler = logging.Handler()
        handler.emit = lambda r: names.put(r.threadName) if "waiting for a call" in r.getMessage() else None
        logging.getLogger("pvae").addHandler(handler)
        logging.getLogger("pvae").setLevel(logging.DEBUG)

        def fitted(epochs, callback=None):
            torch.manual_seed(1)
            vae = pvae.VAE.mlp(4, latent_dim=2, hidden=[4])
            options = {"batch_size": 20, "progress": False, "callback": callback}
            result = pvae.fit(vae.model, vae.guide, bits, epochs=epochs, **options)
            return result.stopped, [p.tolist() for p in vae.parameters()]

        def started(*args):
            thread = threading.Thread(target=lambda: done.append(fitted(*args)), name="other", daemon=True)
            thread.start()
            return thread

        done = []
        alone = fitted(3)
    """
    code = textwrap.dedent(shared) + textwrap.dedent(program) + '\nprint("reached the end")\n'
    assert fork_lines(code, folder=folder, timeout=4 * WAIT) == ["reached the end"]


def test_signals_among_two_threads(tmp_path):
    run_alone(
        """
        # The main thread waits for another one.
        inside, interrupted = threading.Event(), threading.Event()

        def interrupts(record):
            if record["epoch"] == 1:
                inside.set()
                assert names.get(timeout=30) == "MainThread"
                others.append(started(3))
                assert names.get(timeout=30) == "other"  # behind the main thread
                os.kill(os.getpid(), signal.SIGINT)
                assert interrupted.wait(30)  # while this call has the turn

        others = [started(3, interrupts)]
        assert inside.wait(30)
        try:
            fitted(3)
            sys.exit("it was not interrupted")
        except KeyboardInterrupt:
            interrupted.set()
        for other in others:
            other.join(30)
        assert done == [alone, alone], done
        assert fitted(3) == alone

        # Another one waits for the main thread.
        done.clear()
        def stops(record):
            if record["epoch"] == 2:
                others.append(started(3))
                assert names.get(timeout=30) == "other"
                os.kill(os.getpid(), signal.SIGINT)

        others = []
        why, _ = fitted(50, stops)
        assert why == "signal", why
        others[0].join(30)
        assert done == [alone], done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    """,
        tmp_path,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_a_call_has_the_turn(tmp_path):
    run_alone(
        """
        class Sampled(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, row):
                return vae.sample(1, seed=row)[0]

        def in_a_child():
            child = os.fork()
            if not child:
                signal.alarm(30)
                try:
                    os._exit(0 if fitted(3) == alone else 1)
                finally:
                    os._exit(2)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        def holds(record):
            if record["epoch"] == 1:
                inside.set()
                assert forked.wait(60)
                codes.append(in_a_child())  # of its own, too

        vae = pvae.VAE.mlp(4, latent_dim=2, hidden=[4])
        loader = torch.utils.data.DataLoader(Sampled(), batch_size=4, num_workers=1, multiprocessing_context="fork")
        expected = torch.cat([vae.sample(1, seed=row) for row in range(8)])
        inside, forked, codes = threading.Event(), threading.Event(), []
        thread = started(3, holds)
        assert inside.wait(30)
        codes.append(in_a_child())
        assert torch.equal(torch.cat(list(loader)), expected)
        forked.set()
        thread.join(60)
        assert done == [alone], done
        assert codes == [0, 0], codes
        pvae.fit(vae.model, vae.guide, loader, epochs=1, progress=False)  # whose workers call pvae
    """,
        tmp_path,
    )
