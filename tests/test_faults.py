"""What goes wrong around a call: damaged data, a bare machine, a caller in some other mode. Either the numbers are the
same, or an error says what is the matter, before anything has moved.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import re
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pairs import ModulePair
from pyro import distributions as dist
from torch import nn
from torch.utils.data import TensorDataset

import pvae

collapses = pytest.mark.filterwarnings("ignore:the posterior has collapsed")  # there is nothing to encode
nans = pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own, beside our error


def fit(pair, x, **options):
    options = {"epochs": 2, "batch_size": 64, "progress": False, **options}
    return pvae.fit(pair.model, pair.guide, x, **options)


def evidence(pair, x, **options):
    return pvae.log_evidence(pair.model, pair.guide, x, **{"num_samples": 30, "progress": False, **options})


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def finite(module):
    return all(p.isfinite().all() for p in module.parameters())


class Untouched(ModulePair):
    """A pair that must not run."""

    def model(self, *batch):
        pytest.fail("the model ran")

    def guide(self, *batch):
        pytest.fail("the guide ran")


def python(code, *arguments, options=(), **environment):
    """Starts Python on some code; `said` waits for what it says. `None` for a variable unsets it."""
    known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pvae.__file__).parents[1])}
    settings = {**os.environ, **known, **environment}
    return subprocess.Popen(
        [sys.executable, *options, "-c", code, *map(str, arguments)],
        env={name: str(value) for name, value in settings.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    return out.splitlines()


# --- data that cannot be used -------------------------------------------------------------------------------------

CALLS = {
    "fit": pvae.fit,
    "log_evidence": pvae.log_evidence,
    "log_weights": pvae.log_weights,
    "gauss_hermite": pvae.evidence.gauss_hermite,
    "bidirectional_monte_carlo": pvae.evidence.bidirectional_monte_carlo,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["tensor", "numpy", "tuple"])
def test_bad_entries_are_counted_before_any_program_runs(call, bad, kind):
    x = torch.zeros(300, 6)
    x[7, 1] = x[299, 5] = bad
    data = {"tensor": x, "numpy": x.numpy(), "tuple": (torch.zeros(300), x)}[kind]
    name = r"data\[1\]" if kind == "tuple" else "data"
    pair = Untouched()
    with pytest.raises(pvae.DataError, match=rf"^{name} holds 2 nan or infinite entries, the first at index \(7, 1\)"):
        call(pair.model, pair.guide, data)


@pytest.mark.parametrize("call", [pvae.fit, pvae.log_evidence])
@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.ma.masked_equal(np.arange(60).reshape(10, 6), 13), r"1 masked entries, the first at index \(2, 1\)"),
        (torch.eye(6).to_sparse(), "dense.*torch.sparse_coo"),
        (np.zeros((10, 6), np.longdouble), f"dtype {np.dtype(np.longdouble)}"),
        (np.zeros((10, 6), "datetime64[s]"), "dtype datetime64"),
        (np.full((10, 6), 1e300), r"reach 1e\+300, too large for the parameters' torch\.float32"),
        (torch.full((10, 6), -1e39, dtype=torch.float64), r"reach 1e\+39, too large"),
    ],
    ids=["masked", "sparse", "long double", "dates", "1e300", "-1e39"],
)
def test_data_that_torch_or_the_parameters_cannot_hold(call, x, match):
    pair = Untouched()
    with pytest.raises(pvae.DataError, match=match):
        call(pair.model, pair.guide, x)


def test_a_masked_array_without_a_masked_entry_is_an_array(bits):
    ours, theirs = ModulePair(), ModulePair()
    theirs.load_state_dict(ours.state_dict())
    fit(ours, bits)
    fit(theirs, np.ma.masked_array(bits.numpy(), np.zeros(bits.shape, bool)))
    assert same(weights(ours), weights(theirs))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_stand_last_are_said(channels):
    vae = pvae.VAE.conv((channels, 8, 6), 2, (4,), 8)
    last = torch.bernoulli(torch.full((20, 8, 6, channels), 0.5))
    before = weights(vae)
    for call in (fit, evidence, lambda vae, x: vae.reconstruct(x)):
        with pytest.raises(pvae.DataError, match=r"\(N, \d, 8, 6\).*channels stand last: x\.permute\(0, 3, 1, 2\)"):
            call(vae, last)
    for other in (last[..., 0], last.transpose(1, 2), last.reshape(20, -1)):
        with pytest.raises(pvae.DataError, match=r"\(N, \d, 8, 6\).*Reshape the data"):
            fit(vae, other)
    assert same(before, weights(vae))


def test_permuted_channels_are_the_channels():
    vaes = [pvae.VAE.conv((3, 8, 6), 2, (4,), 8) for _ in range(2)]
    vaes[1].load_state_dict(vaes[0].state_dict())
    last = torch.bernoulli(torch.full((50, 8, 6, 3), 0.5))
    permuted, plain = last.permute(0, 3, 1, 2), last.permute(0, 3, 1, 2).contiguous()
    assert not permuted.is_contiguous()
    for vae, x in zip(vaes, (permuted, plain), strict=True):
        fit(vae, x)
    assert same(weights(vaes[0]), weights(vaes[1]))
    assert torch.equal(evidence(vaes[0], permuted).log_px, evidence(vaes[1], plain).log_px)


# --- data that are odd, and right ---------------------------------------------------------------------------------


def strided(x):
    wide = torch.full((len(x), 2 * x.shape[1]), torch.nan)
    wide[:, ::2] = x
    return wide[:, ::2]


ODD = {
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "uint8": lambda x: x.to(torch.uint8),
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": strided,
    "in a list": lambda x: [x],
    "a dataset of tensors": TensorDataset,
    "wants gradients": lambda x: x.clone().requires_grad_(),
    "a parameter": lambda x: nn.Parameter(x.clone()),
    "numpy": lambda x: x.numpy(),
    "numpy of uint16": lambda x: x.numpy().astype(np.uint16),
    "numpy in a tuple": lambda x: (x.numpy(),),
    "numpy upwards": lambda x: np.ascontiguousarray(x.numpy()[::-1])[::-1],
    "numpy leftwards": lambda x: np.ascontiguousarray(x.numpy()[:, ::-1])[:, ::-1],
    "numpy in Fortran's order": lambda x: np.asfortranarray(x.numpy()),
    "numpy, read-only": lambda x: np.frombuffer(x.numpy().tobytes(), np.float32).reshape(x.shape),
    "numpy, big-endian": lambda x: x.numpy().astype(">f4"),
    "numpy, big-endian float64": lambda x: x.numpy().astype(">f8"),
    "numpy, big-endian int16": lambda x: x.numpy().astype(">i2"),
}


@pytest.fixture(scope="module")
def plainly():
    """A VAE, what training on plain data makes of it, and what log p(x) it then gives them."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((300, 6), 0.3))
    vae = pvae.VAE.mlp(6, 2, [8])
    begin = {name: value.clone() for name, value in vae.state_dict().items()}
    fit(vae, x, validation=x[:50])
    return x, begin, weights(vae), evidence(vae, x).log_px


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_arrays_are_the_plain_tensor(odd, plainly):
    x, begin, trained, log_px = plainly
    data = odd(x)
    vae = pvae.VAE.mlp(6, 2, [8])
    vae.load_state_dict(begin)
    fit(vae, data, validation=odd(x[:50]))
    assert same(weights(vae), trained)
    assert torch.equal(evidence(vae, data).log_px, log_px)
    assert torch.equal(evidence(vae, data, proposal="refined").log_px, evidence(vae, x, proposal="refined").log_px)
    assert getattr(data, "grad", None) is None


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined", "laplace", "student-t", "defensive", "ais"])
def test_one_datum_has_its_log_px(proposal):
    """Errors are normal: 6 of them fail once in 5e8. Laplace's Gaussian is the posterior, and leaves only rounding."""
    oracle = pvae.testing.linear_gaussian(2, 3, noise=1.0, guide_shift=0.5)
    x = oracle.bias[None] + 0.5
    estimate = evidence(oracle, x, proposal=proposal, num_samples=2000)
    assert estimate.log_px.shape == (1,)
    tolerance = 6 * estimate.std_error.item() + 1e-6
    assert tolerance < 0.2
    assert estimate.log_px.item() == pytest.approx(oracle.log_px(x).item(), abs=tolerance)


@collapses
@pytest.mark.parametrize(
    ("likelihood", "level"), [("bernoulli", 0.0), ("bernoulli", 1.0), ("gaussian", 0.0), ("gaussian-per-pixel", 1.0)]
)
def test_data_that_are_all_the_same(likelihood, level):
    """They carry nothing, so a VAE has only to name them: log p(x) nears 0 for bits, and rises for real numbers."""
    x = torch.full((300, 6), level)
    vae = pvae.VAE.mlp(6, 2, [8], likelihood)
    first = evidence(vae, x[:5], num_samples=1000, proposal="prior")
    result = fit(vae, x, epochs=30, lr=0.05)
    last = evidence(vae, x[:5], num_samples=1000, proposal="prior")
    assert np.isfinite(result.history["elbo"]).all()
    assert finite(vae)
    assert last.log_px.isfinite().all()
    assert last.mean > first.mean + 3
    if likelihood == "bernoulli":
        assert -0.3 < last.mean < 0  # a probability of bits
        assert -0.3 < result.history["elbo"][-1] < 0.1
    assert (vae.reconstruct(x[:5]) - level).abs().max() < 0.2
    assert evidence(vae, x[:5]).log_px.isfinite().all()


@collapses
def test_features_that_are_constant_beside_others_that_are_not():
    x = torch.randn(300, 3)
    x = torch.cat([x, torch.full((300, 1), 5.0), torch.zeros(300, 2)], 1)
    vae = pvae.VAE.mlp(6, 2, [8], "gaussian-per-pixel")
    result = fit(vae, x, epochs=20, lr=0.05)
    assert np.isfinite(result.history["elbo"]).all()
    assert result.history["elbo"][-1] > result.history["elbo"][0] + 3  # it begins near, in units of the data
    assert evidence(vae, x[:20]).log_px.isfinite().all()


# --- numbers at the end of the scale ------------------------------------------------------------------------------


@nans
@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian-per-pixel"])
@pytest.mark.parametrize("value", [1e30, -3e38])
def test_training_on_a_value_whose_square_overflows_stops(likelihood, value):
    x = torch.randn(300, 6)
    x[100, 2] = value
    vae = pvae.VAE.mlp(6, 2, [8], likelihood)
    with pytest.raises(pvae.PVAEError, match=r"not finite|inf|nan"):
        fit(vae, x)
    assert finite(vae)


@pytest.mark.parametrize("proposal", ["guide", "laplace", "defensive"])
def test_a_value_whose_square_overflows_has_no_log_px_and_harms_no_other(proposal):
    vae = pvae.VAE.mlp(6, 2, [8], "gaussian")
    x = torch.randn(4, 6)
    x[0] = 0
    clean = evidence(vae, x, proposal=proposal)
    x[0, 2] = 1e30
    estimate = evidence(vae, x, proposal=proposal)
    assert estimate.log_px[0] == -math.inf
    assert estimate.unreliable.tolist() == [True, *clean.unreliable[1:].tolist()]
    assert estimate.interval()[0][0].isnan()
    assert math.isnan(estimate.mean_interval()[0])
    assert "of 4 data are unreliable" in repr(estimate)
    assert torch.equal(estimate.log_px[1:], clean.log_px[1:])


@pytest.mark.parametrize("value", [1e30, 1e100])
def test_huge_values_have_the_right_log_px_in_float64(value):
    """The exact guide leaves only rounding: some 50 operations of relative error 1.1e-16."""
    oracle = pvae.testing.linear_gaussian(2, 3)
    x = oracle.sample(3)
    x[1, 0] = value
    estimate = evidence(oracle, x)
    np.testing.assert_allclose(estimate.log_px, oracle.log_px(x), rtol=1e-13, atol=1e-9)
    assert estimate.log_px[1] < -(value**2) / 100


class Overflowing(ModulePair):
    """A guide whose scale is exp(raw), where ``raw`` is large for data of ones only."""

    def __init__(self, raw: float) -> None:
        super().__init__()
        self.raw = raw

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, _ = self.encoder(x).chunk(2, -1)
            raw = torch.where(x.all(-1, keepdim=True), self.raw, 0.0)
            pyro.sample("latent", dist.Normal(loc, raw.exp().expand_as(loc)).to_event(1))


@nans
@pytest.mark.parametrize("raw", [200.0, -200.0, 80.0, -80.0])
@pytest.mark.parametrize("ones", [slice(None), slice(250, 251)], ids=["all", "one in 300"])
def test_a_guide_whose_scale_over_or_underflows_is_an_error(raw, ones, bits):
    """exp(200) is infinite and exp(-200) is 0 in float32; the squares of exp(80) and exp(-80) are."""
    bits[bits.all(-1)] = 0
    bits[ones] = 1
    pair = Overflowing(raw)
    before = weights(pair)
    with pytest.raises(pvae.PVAEError):
        fit(pair, bits)
    assert finite(pair)
    if ones == slice(None):
        assert same(before, weights(pair))
    with pytest.raises(pvae.PVAEError):
        evidence(pair, bits)


# --- other models, other processes --------------------------------------------------------------------------------

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


def test_models_in_one_process_are_those_of_processes_of_their_own():
    """Two hand-written VAEs of one shape, with the same names for everything, and two of pvae's."""
    code = f"{TRAINS}\nprint(digest(int(sys.argv[1])))"
    with python(code, 1) as first, python(code, 2) as second:
        here = {}
        exec(TRAINS, here)
        there = [here["digest"](seed) for seed in (1, 2)]
        back = [here["digest"](seed) for seed in (2, 1)]
        apart = said(first) + said(second)
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


# --- the caller's modes and state ---------------------------------------------------------------------------------


def restless_vae():
    """A VAE in which train and eval mode differ, and which autocast would round."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6))
    return pvae.VAE(
        pvae.priors.StandardNormal(2), pvae.likelihoods.Bernoulli(decoder), pvae.posteriors.DiagonalNormal(encoder)
    )


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


def process_state():
    """What a call could leave otherwise than it found it."""
    import os
    import random
    import signal
    import socket
    import warnings

    import numpy as np
    import pyro
    import torch
    from torch.nn.modules import module

    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
    return {
        "torch's random numbers": torch.get_rng_state().tolist(),
        "NumPy's random numbers": repr(np.random.get_state()),  # noqa: NPY002
        "Python's random numbers": random.getstate(),
        "param store": {name: value.tolist() for name, value in pyro.get_param_store().items()},
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "settings": pyro.settings.get(),
        "validation": (torch.distributions.Distribution._validate_args, pyro.infer.util.is_validation_enabled()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": autocast,
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "products": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "hooks": (len(module._global_forward_pre_hooks), len(module._global_forward_hooks)),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "warnings": list(warnings.filters),
        "environment": (dict(os.environ), os.getcwd(), socket.getdefaulttimeout()),
    }


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


@pytest.mark.usefixtures("plainly")  # trains, after which torch has loaded all that it loads
@pytest.mark.parametrize("other", [False, True], ids=["usual", "other settings"])
@pytest.mark.parametrize(("fails", "call"), STATE)
def test_the_process_is_left_as_found(fails, call, other):
    x = torch.bernoulli(torch.full((200, 6), 0.3))
    layer = Restless()
    decoder = nn.Sequential(nn.Linear(2, 6), layer)
    encoder = pvae.posteriors.DiagonalNormal(nn.Linear(6, 4))
    vae = pvae.VAE(pvae.priors.StandardNormal(2), pvae.likelihoods.Bernoulli(decoder), encoder)
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


# --- bare machines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "cuda:3", torch.device("cuda")])
@pytest.mark.parametrize("call", [fit, evidence])
def test_a_gpu_that_is_not_there_is_said_before_anything_moves(device, call, bits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pair = Untouched()
    places, before = [p.data_ptr() for p in pair.parameters()], weights(pair)
    with pytest.raises(pvae.DeviceError, match=r"device='cuda.*no CUDA device was found.*'auto' or 'cpu'"):
        call(pair, bits, device=device)
    assert [p.data_ptr() for p in pair.parameters()] == places
    assert same(before, weights(pair))


OPTIMIZED = """
import pvae, pyro, torch
from pyro import distributions as dist

if __debug__:
    raise SystemExit("not optimized")
x = torch.bernoulli(torch.full((100, 6), 0.3))
vae = pvae.VAE.mlp(6, 2, [8])
before = [p.detach().clone() for p in vae.parameters()]

def other(x):
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))

def narrow(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor(-200.0).exp()).to_event(1))

nan, grey = x.clone(), x.clone()
nan[70, 3], grey[70, 3] = torch.nan, 0.5
for call in (pvae.fit, pvae.log_evidence):
    for guide, data in ((vae.guide, nan), (vae.guide, grey), (vae.guide, 255 * x), (other, x), (narrow, x)):
        try:
            call(vae.model, guide, data, progress=False)
            print("not refused")
        except Exception as error:
            print(type(error).__name__)
print(all(torch.equal(p, q) for p, q in zip(before, vae.parameters())))
print(pyro.infer.util.is_validation_enabled())
"""


def test_checks_do_not_rest_on_asserts():
    """``python -O`` turns off asserts, and with them Pyro's validation."""
    lines = said(python(OPTIMIZED, options=["-O"]))
    for begin in (0, 5):
        assert lines[begin : begin + 4] == ["DataError"] * 3 + ["ProgramError"]
        assert lines[begin + 4] in ("ProgramError", "NumericalError", "DataError")
    assert lines[10:] == ["True", "False"]


def test_a_home_that_cannot_be_written(tmp_path):
    """And no screen: training is compiled, log p(x) is estimated, figures are drawn, and MNIST says what it lacks."""
    code = f"""
import sys
import pvae, torch
{inspect.getsource(process_state)}
x = torch.bernoulli(torch.full((128, 6), 0.3))
vae = pvae.VAE.mlp(6, 2, [8])
before = process_state()
result = pvae.fit(vae.model, vae.guide, x, epochs=4, batch_size=64, compile=True, validation=x)
estimate = pvae.log_evidence(vae.model, vae.guide, x, num_samples=50)
now = process_state() | {{name: before[name] for name in ("warnings", "environment")}}  # torch's compiler adds to them
print(result.compile_seconds > 0, bool(estimate.log_px.isfinite().all()), len(repr(estimate)) > 100)
print([name for name in before if now[name] != before[name]])
try:
    pvae.datasets.mnist()
except pvae.DatasetError as error:
    print(error)
log_weights = dict(guide=torch.randn(99), prior=torch.tensor([-torch.inf, -3.0]))
figures = dict(
    learning_curve=[result.history],
    images=[torch.rand(5, 8, 8)],
    reconstructions=[torch.rand(5, 8, 8), torch.rand(5, 1, 8, 8)],
    latent_plane=[dict(guide=torch.randn(9, 2))],
    weight_histogram=[log_weights],
    running_estimate=[log_weights],
)
for name, arguments in figures.items():
    getattr(pvae.plots, name)(*arguments).figure.savefig(f"{{sys.argv[1]}}/{{name}}.png")
"""
    nowhere = "/dev/null/nowhere"
    folders = {"HOME": nowhere, "XDG_CACHE_HOME": nowhere, "XDG_CONFIG_HOME": nowhere, "MPLCONFIGDIR": nowhere}
    unset = dict.fromkeys(["PVAE_DATA", "DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"])
    lines = said(python(code, tmp_path, **folders, **unset))
    assert lines[:2] == ["True True True", "[]"]
    assert lines[2].startswith("MNIST is not in /dev/null/nowhere/pvae, and downloading it failed: ")
    assert "Not a directory" in lines[2]
    assert "set PVAE_DATA to a folder that has them, or use pvae.datasets.digits()" in lines[2]
    assert len(lines) == 3
    drawn = {path.stem: path.read_bytes()[:4] for path in tmp_path.iterdir()}
    assert drawn == dict.fromkeys(pvae.plots.__all__, b"\x89PNG")


BROKEN = {
    "arviz": "ImportError('cannot import name InferenceData')",
    "xarray": "ImportError('no such thing')",
    "torchvision": "RuntimeError('operator torchvision::nms does not exist')",
    "matplotlib": "OSError('libfreetype.so: cannot open shared object file')",
    "sklearn": "ValueError('numpy.dtype size changed')",
}


def test_packages_that_are_broken_cost_only_what_needs_them(tmp_path):
    for name, error in BROKEN.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise {error}")
    code = """
import pvae, torch
x = torch.bernoulli(torch.full((128, 6), 0.3))
vae = pvae.VAE.mlp(6, 2, [8])
result = pvae.fit(vae.model, vae.guide, x, epochs=1, validation=x)
estimate = pvae.log_evidence(vae.model, vae.guide, x, num_samples=50)
print(len(repr(result)) > 20, len(repr(estimate)) > 100, vae.sample(2).shape == (2, 6))
calls = pvae.datasets.mnist, pvae.datasets.digits, lambda: pvae.plots.learning_curve(result.history)
for call in calls:
    try:
        call()
    except pvae.PVAEError as error:
        print(type(error).__name__, error)
"""
    path = os.pathsep.join([str(tmp_path), str(Path(pvae.__file__).parents[1])])
    lines = said(python(code, PYTHONPATH=path, PVAE_DATA=tmp_path / "cache"))
    assert lines[0] == "True True True"
    for line, words in zip(
        lines[1:],
        [
            "DatasetError MNIST is not in .*torchvision cannot be imported.*nms does not exist.*digits()",
            "DatasetError the digits come with scikit-learn, which cannot be imported: numpy.dtype size changed",
            "PVAEError to draw takes matplotlib, which cannot be imported: libfreetype.so",
        ],
        strict=True,
    ):
        assert re.match(words, line)


# --- pictures of what went wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fine", [0, 30])
def test_draws_that_cannot_explain_a_datum_can_be_drawn(fine, tmp_path):
    """Log-weights of minus infinity: some of the prior's, or all."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    w = torch.full((40,), -math.inf)
    w[:fine] = torch.randn(fine)
    ax = pvae.plots.weight_histogram({"prior": w})
    heights = [bar.get_height() for bar in ax.containers[0]]
    assert sum(heights) == pytest.approx(fine / 40)
    ax.figure.savefig(tmp_path / "weights.png")
    ax = pvae.plots.running_estimate({"prior": w}, elbo=-math.inf)
    last = ax.lines[0].get_ydata()[-1]
    assert last == pytest.approx(w.double().exp().mean().log().item())
    ax.figure.savefig(tmp_path / "estimate.png")
    pyplot.close("all")


def test_reconstructions_of_other_images_are_refused():
    for other in (torch.zeros(2, 4, 4), torch.zeros(3, 5, 5)):
        with pytest.raises(pvae.DataError, match=r"in pairs, got \(3, 4, 4\)"):
            pvae.plots.reconstructions(torch.zeros(3, 4, 4), other)


def test_without_matplotlib_a_figure_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(pvae.PVAEError, match="to draw takes matplotlib, which cannot be imported"):
        pvae.plots.learning_curve({"elbo": [-1.0]})
