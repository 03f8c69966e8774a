"""A call depends on nothing that was before it in the process, and leaves all as it found it."""

from __future__ import annotations

import random
import socket
from contextlib import contextmanager

import numpy as np
import pyro
import pytest
import torch
from helpers import evidence, fit, lines_of, process_state, python, same, weights
from pairs import ModulePair, compose_vae
from torch import nn

import pvae

# --- other models, other processes ------------------------------------------------------------------------------------


TRAINS = """
import hashlib, sys
import pyro, pvae, torch
from pyro import distributions as dist
from torch import nn

torch.set_num_threads(1)

def digest(seed):
    torch.manual_seed(seed)
    x = torch.bernoulli(torch.rand(6).expand(200, 6))
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(x):
        pyro.module("decoder", decoder)
        scale = pyro.param("scale", torch.tensor(1.0 + seed), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=scale * decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    result = pvae.fit(model, guide, x, epochs=3, batch_size=64, lr=0.01, progress=False)
    with result.trained():
        log_px = pvae.log_evidence(model, guide, x, num_samples=20, progress=False).log_px
    vae = pvae.VAE.mlp(6, 2, [8])
    pvae.fit(vae.model, vae.guide, x, epochs=3, batch_size=64, lr=0.01, progress=False)
    tensors = [*decoder.parameters(), *encoder.parameters(), result.params["scale"], log_px, *vae.parameters()]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()
"""


@pytest.mark.slow
def test_models_in_one_process_are_those_of_processes_of_their_own():
    """Two hand-written VAEs of one shape, with the same names for everything, and two of pvae's."""
    code = f"{TRAINS}\nprint(digest(int(sys.argv[1])))"
    with python(code, 1) as first, python(code, 2) as second:
        here = {}
        exec(TRAINS, here)
        there = [here["digest"](seed) for seed in (1, 2)]
        back = [here["digest"](seed) for seed in (2, 1)]
        apart = lines_of(first) + lines_of(second)
    assert there[0] != there[1]
    assert there == back[::-1] == apart


CELL = """
import pyro, pvae, torch
from pyro import distributions as dist

torch.manual_seed(0)
x = torch.bernoulli(torch.full((100, 6), 0.3))
vae = pvae.VAE.mlp(6, 2, [8])
decoder = torch.nn.Linear(2, 6)

def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

def guide(x):
    slope = pyro.param("slope", torch.zeros(6, 2))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ slope, scale).to_event(1))

numbers = []
for programs in ((model, guide), (vae.model, vae.guide)):
    result = pvae.fit(*programs, x, epochs=3, batch_size=32, lr=0.01, progress=False)
    with result.trained():
        estimate = pvae.log_evidence(*programs, x, num_samples=20, progress=False)
    numbers += [sorted(result.params), result.history["elbo"].tolist(), estimate.log_px.tolist()]
numbers += [vae.sample(2, seed=0).tolist(), vae.reconstruct(x).tolist()]
"""


@pytest.mark.filterwarnings("ignore:parameters .* begin at their initial values")  # and not at the caller's
def test_a_cell_that_is_run_again_gives_the_same_numbers(caller_state):
    pyro.module("decoder", nn.Linear(2, 6))  # somebody else's, under the names of the cell
    pyro.param("scale", torch.tensor(7.0))
    before = caller_state()
    namespace = {}  # without a __name__, so that functions made there belong to no module
    exec(CELL, namespace)
    first, module = namespace["numbers"], namespace["decoder"]
    trained = weights(module)
    exec(CELL, namespace)
    assert namespace["numbers"] == first
    assert first[0] == ["scale", "slope"]
    assert namespace["decoder"] is not module
    assert same(weights(module), trained)
    torch.set_rng_state(before.rng)  # the cell seeds them
    before.assert_unchanged()


# --- the caller's modes and state -------------------------------------------------------------------------------------


def restless_vae():
    """A VAE in which train and eval mode differ, and which autocast would round."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6))
    return compose_vae(decoder, encoder)


def results(vae, x):
    """What all of a VAE's calls give, as numbers."""
    history = fit(vae, x, validation=x[:50]).history
    return [
        history["elbo"].tolist(),
        history["validation_elbo"].tolist(),
        *(value.tolist() for value in vae.state_dict().values()),
        *(evidence(vae, x, proposal=p).log_px.tolist() for p in ("guide", "prior")),
        evidence(vae, x[:5], proposal="refined").log_px.tolist(),
        vae.sample(3, seed=0).tolist(),
        vae.sample(3, seed=0, mean=True).tolist(),
        vae.reconstruct(x).tolist(),
    ]


@pytest.fixture(scope="module")
def plain_results():
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((100, 6), 0.3))
    return x, results(restless_vae(), x)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_callers_mode_changes_no_bit(mode, plain_results):
    x, expected = plain_results
    vae = restless_vae()
    with mode():
        assert results(vae, x) == expected


def test_a_model_in_eval_mode_gives_the_same_bits(plain_results):
    x, expected = plain_results
    vae = restless_vae().eval()
    assert results(vae, x) == expected
    assert not any(m.training for m in vae.modules())


class Restless(nn.Module):
    """A layer that draws random numbers of Python and NumPy, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.trained, self.fails = 0, False, lambda layer: False

    def forward(self, x):
        random.random()
        np.random.rand()  # noqa: NPY002
        self.runs += 1
        self.trained |= self.training
        if self.fails(self):
            raise RuntimeError("no more")
        return x


@contextmanager
def settings(other):
    """A process with its settings as they come, or with other ones."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), socket.getdefaulttimeout()
    torch.set_default_dtype(torch.float64 if other else torch.float32)
    torch.use_deterministic_algorithms(other)
    torch.set_num_threads(2 if other else 1)
    torch.set_float32_matmul_precision("high" if other else "highest")
    socket.setdefaulttimeout(7 if other else None)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=other)
    try:
        with torch.set_grad_enabled(not other), autocast, pyro.validation_enabled(not other):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        socket.setdefaulttimeout(before[2])


def never(layer):
    return False


def at_once(layer):
    return True


def in_training(layer):
    return layer.training


def after_training(layer):
    return layer.trained and not layer.training


def in_the_end(layer):
    return layer.runs > 40


SAMPLES = {"chunk_size": 64}  # some hundred chunks

STATE = [
    (never, lambda vae, x: fit(vae, x, validation=x, transform=Restless())),
    (at_once, fit),
    (in_training, fit),
    (after_training, lambda vae, x: fit(vae, x, validation=x)),
    (never, lambda vae, x: evidence(vae, x, **SAMPLES)),
    (never, lambda vae, x: evidence(vae, x[:5], proposal="refined")),
    (at_once, evidence),
    (in_the_end, lambda vae, x: evidence(vae, x, **SAMPLES)),
    (never, lambda vae, x: vae.sample(3, seed=0)),
    (never, lambda vae, x: vae.sample(3)),
    (at_once, lambda vae, x: vae.sample(3)),
    (never, lambda vae, x: vae.reconstruct(x)),
]


@pytest.mark.usefixtures("plain_results")  # trains, after which torch has loaded all that it loads
@pytest.mark.parametrize("other", [False, True], ids=["usual", "other settings"])
@pytest.mark.parametrize(("fails", "call"), STATE)
def test_the_process_is_left_as_found(fails, call, other):
    x = torch.bernoulli(torch.full((200, 6), 0.3))
    layer = Restless()
    vae = compose_vae(nn.Sequential(nn.Linear(2, 6), layer), nn.Linear(6, 4))
    layer.fails, layer.runs, layer.trained = fails, 0, False
    pyro.param("scale", torch.tensor(7.0))
    with settings(other):
        before = process_state()
        if fails is never:
            call(vae, x)
        else:
            with pytest.raises((RuntimeError, pvae.ProgramError), match="no more"):
                call(vae, x)
        now = process_state()
    assert [name for name in before if now[name] != before[name]] == []
    assert all(module.training for module in vae.modules())
    assert layer.runs


def test_a_transform_with_numpys_noise_follows_the_seed(bits):
    """As those of image libraries, which know no other random numbers."""

    def noisy(x):
        flips = torch.from_numpy(np.random.rand(*x.shape) < random.random())  # noqa: NPY002
        return torch.where(flips, 1 - x, x)

    pairs = [ModulePair() for _ in range(3)]
    for pair in pairs[1:]:
        pair.load_state_dict(pairs[0].state_dict())
    for number, pair in enumerate(pairs):
        np.random.seed(number)  # noqa: NPY002
        random.seed(number)
        fit(pair, bits, transform=noisy, seed=number // 2)
    assert same(weights(pairs[0]), weights(pairs[1]))
    assert not same(weights(pairs[0]), weights(pairs[2]))
