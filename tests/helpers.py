"""What several test files do: train and evaluate a pair, compare what came of it, start processes, and read data."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import subprocess
import sys
import uuid
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pvae
from pvae.runtime import isolate

# --- training and evaluating ----------------------------------------------------------------------------------------


def fit(pair, data, **options):
    """A short training in small batches."""
    return pvae.fit(pair.model, pair.guide, data, **{"epochs": 2, "batch_size": 64, "progress": False, **options})


def train(pair, x, **options):
    """Four epochs of five steps for 300 data, each with a validation."""
    return fit(pair, x, **{"epochs": 4, "lr": 0.01, "validation": x[:100], **options})


def evidence(pair, data, **options):
    """log p(x) with 30 draws of the guide a datum."""
    defaults = {"num_samples": 30, "proposal": "guide", "progress": False}
    return pvae.log_evidence(pair.model, pair.guide, data, **{**defaults, **options})


def weights(module):
    """Copies of a module's parameters."""
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    """Whether two lists of tensors are equal to the bit."""
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _state(pair, result):
    modules = [m for m in (pair, getattr(pair, "guide", None)) if isinstance(m, nn.Module)]
    tensors = {f"{n}.{k}": v for n, m in enumerate(modules) for k, v in m.state_dict().items()}
    return {**tensors, **result.params}


def assert_same_run(ours, theirs):
    """Weights, parameters and curves of two pairs with their results, to the bit."""
    (pair, result), (other, reference) = ours, theirs
    a, b = _state(pair, result), _state(other, reference)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert result.history.keys() == reference.history.keys()
    for name in result.history.keys() - {"seconds"}:
        assert result.history[name].tolist() == reference.history[name].tolist(), name


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit, those of nan too."""

    def bits(t):
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same_vae(vae: pvae.VAE, other: pvae.VAE) -> None:
    """Parts and tensors to the bit, and densities."""
    assert type(other) is type(vae)
    assert repr(other) == repr(vae)
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(vae, tensors)()), dict(getattr(other, tensors)())
        assert list(ours) == list(theirs)
        for name in ours:
            assert same_bits(ours[name], theirs[name]), name
            assert ours[name].requires_grad == theirs[name].requires_grad, name
    x = torch.rand(5, *vae.event_shape).round()
    with isolate([vae, other], seed=0):
        z = vae.encode(x).sample()
        for ours, theirs in (
            (vae.encode(x).mean, other.encode(x).mean),
            (vae.encode(x).log_prob(z), other.encode(x).log_prob(z)),
            (vae.prior().log_prob(z), other.prior().log_prob(z)),
            (vae.decode(z).mean, other.decode(z).mean),
            (vae.decode(z).log_prob(x.to(z)), other.decode(z).log_prob(x.to(z))),
        ):
            torch.testing.assert_close(ours, theirs)


# --- processes ------------------------------------------------------------------------------------------------------


def python(code, *arguments, options=(), **environment):
    """Starts Python on some code; `lines_of` waits for it. `None` for a variable unsets it."""
    known = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(Path(pvae.__file__).parents[1])}
    settings = {**os.environ, **known, **environment}
    return subprocess.Popen(
        [sys.executable, *options, "-c", code, *map(str, arguments)],
        env={name: str(value) for name, value in settings.items() if value is not None},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python_path(*first):
    """For PYTHONPATH: some folders, and those that it names already, where packages may be that are not installed."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


def lines_of(process, timeout=None):
    """What a process prints, once it has ended well, within so many seconds."""
    with process:
        try:
            out, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()  # where it has not ended
    assert process.returncode == 0, errors
    return out.splitlines()


FORKS = multiprocessing.get_context("forkserver")


def _start_server():
    """Starts, once for each worker of pytest, the process that is forked; it needs to find what it preloads."""
    paths = python_path(Path(__file__).parent, Path(pvae.__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("OMP_NUM_THREADS", "1")
        FORKS.set_forkserver_preload(["preload"])
        forkserver.ensure_running()


def _redirected(output, function, arguments):
    """Calls a function in another process; what it prints goes to a file, and errors to one beside it."""
    for number, path in ((1, output), (2, output.with_suffix(".errors"))):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    function(*arguments)


def fork(function, *arguments, output):
    """Starts a function at the top of a module in a process of its own, which has pvae loaded as it begins."""
    _start_server()
    process = FORKS.Process(target=_redirected, args=(output, function, arguments))
    process.start()
    return process


def fork_lines(code, *arguments, folder, timeout=120):
    """What a program prints in a process of its own, which ends well, and has pvae loaded as it begins."""
    output = folder / f"output-{uuid.uuid4()}"
    return end_lines(fork(execute, code, *arguments, output=output), output, timeout)


def end_lines(process, output, timeout=120):
    """What a process that was forked prints, once it has ended well, within so many seconds."""
    process.join(timeout)
    ended = process.exitcode is not None
    process.kill()
    process.join()
    assert ended, f"it hangs: {output.with_suffix('.errors').read_text()}"
    assert process.exitcode == 0, output.read_text()[-3000:] + output.with_suffix(".errors").read_text()[-3000:]
    return output.read_text().splitlines()


def execute(code, *arguments):
    """Runs a program in this process, as if it had been started with some arguments."""
    sys.argv[1:] = map(str, arguments)
    exec(code, {"__name__": "__main__"})


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


# --- data that are read ---------------------------------------------------------------------------------------------


class Items(Dataset):
    """Any sequence, item by item."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Flipped(Items):
    """Bits that are flipped at random, by one of the generators that a dataset may use."""

    def __init__(self, items, by="torch"):
        super().__init__(items)
        self.by = by

    def __getitem__(self, index):
        draw = {"torch": lambda: torch.rand(()).item(), "numpy": np.random.rand, "python": random.random}[self.by]
        return self.items[index] if draw() < 0.8 else 1 - self.items[index]


class Drawing(Items):
    """Draws random numbers, and makes nothing of them."""

    def __getitem__(self, index):
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return self.items[index]


class Raising(Items):
    """Fails at one of its items."""

    def __init__(self, items, at, fail):
        super().__init__(items)
        self.at, self.fail = at, fail

    def __getitem__(self, index):
        if index == self.at:
            self.fail()
        return self.items[index]


def tear():
    """What a `Raising` dataset may fail with."""
    raise KeyError("frame 77 is torn")


class Iterated(IterableDataset):
    """Any sequence, from its beginning to its end; workers divide it."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(self.items[first::step])


class Counted(Iterated):
    """One that knows its length."""

    def __len__(self):
        return len(self.items)


# A loader that is left in the middle of a pass hears once more of a worker's end, as it is cleared away.
kills_workers = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_loader(data, **options):
    """A loader over a dataset of items; a batch sampler brings its own size."""
    if "batch_sampler" not in options:
        options = {"batch_size": 64, **options}
    if options.get("num_workers"):
        options["multiprocessing_context"] = "fork"  # whatever Python's default: datasets here are not all pickled
    return DataLoader(data if isinstance(data, Dataset) else Items(data), **options)


def fit_fresh(data, *, pair=None, **options):
    """A pair, a small VAE unless a function makes another, and the result of training it from the same weights."""
    torch.manual_seed(1)
    pair = pvae.VAE.mlp(6, 2, [8]) if pair is None else pair()
    return pair, fit(pair, data, **{"lr": 0.01, "compile": False, **options})


def batches_of(data, **options):
    """The rows of each batch that is trained on, by the first of their numbers."""
    batches = []

    def transform(x):
        batches.append([int(value) for value in x[:, 0]])
        return x

    pair = pvae.VAE.mlp(1, 1, [4], "gaussian", units=(0, 1))
    fit_fresh(data, pair=lambda: pair, transform=transform, **{"epochs": 1, **options})
    return batches[1:]  # the first is a look at the pair


# --- pairs made of parts --------------------------------------------------------------------------------------------


def assert_fit_is_svi(pair, data, elbo=None, **options):
    """``pyro.infer.SVI``, fed the batches and the noise of a short `fit`, ends at the same parameters."""
    theirs = copy.deepcopy(pair)
    result = fit(pair, data, **{"lr": 0.01, "seed": 5, "compile": False, **options})
    loss = elbo or pyro.infer.Trace_ELBO()
    svi = pyro.infer.SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), loss)
    tensors = data if isinstance(data, tuple) else (data,)
    losses = []
    with isolate([theirs], seed=5, training=True):
        for epoch in (1, 2):
            order = torch.from_numpy(np.random.default_rng((5, epoch)).permutation(len(tensors[0])))
            losses.append(sum(svi.step(*(t[rows] for t in tensors)) for rows in order.split(64)) / len(order))
    np.testing.assert_allclose(result.history["elbo"], -np.array(losses), rtol=1e-4)
    for p, q in zip(pair.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)  # Adam divides small gradients by their size


def assert_comes_back(pair, folder):
    """What `load` gives has the type, the parts and the bits of what was saved."""
    pair.save(folder)
    other = type(pair).load(folder)
    assert repr(other) == repr(pair)
    ours, theirs = pair.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(same_bits(ours[name], theirs[name]) for name in ours)
    return other


def assert_captured(pair, data, monkeypatch, objective=lambda pair: None):
    """A training that is captured, without a warning that it could not be, ends where plain Pyro's does."""
    monkeypatch.setattr("pvae.capture.captured._no_compiler", [True])  # which would take seconds
    theirs = copy.deepcopy(pair)
    for one, compile in ((pair, True), (theirs, False)):
        fit(one, data, compile=compile, lr=0.01, objective=objective(one))
    for p, q in zip(pair.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def words(ax):
    """What is written on matplotlib's Axes, as texts."""
    return [text.get_text() for text in ax.texts]
