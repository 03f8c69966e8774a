from __future__ import annotations

import random
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from helpers import lines_of, python
from pyro import distributions as dist
from torch import nn

from pvae.capture import captured as graphs
from pvae.capture.captured import Captured, worth_compiling
from pvae.capture.graph import Graph
from pvae.errors import DataError


class Net(nn.Module):
    """A little of all that a function may do: parameters, a buffer that it updates, noise, and a setting."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.beta = 2.0

    def forward(self, x):
        with pyro.plate("data", len(x)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        return {"sum": self.beta * self.norm(self.layer(x)).sum(-1), "rest": [x.mean() + noise]}


def captured(net, **options):
    options = {"compile_after": None, **options}
    return Captured(net.forward, "the net", (net,), **options)


def both(run, other, *inputs, seed=0):
    """Results of two ways to run one function, with the same noise."""
    results = []
    for one in (run, other):
        torch.manual_seed(seed)
        results.append(one(*inputs))
    return results


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for a, b in zip((ours["sum"], *ours["rest"]), (theirs["sum"], *theirs["rest"]), strict=True):
        torch.testing.assert_close(a, b.detach())


def test_a_graph_is_the_function_with_fresh_noise_and_parameters_of_now():
    net = Net().eval()
    run = captured(net)
    x = torch.randn(5, 4)
    assert_same(*both(run, net, x))
    assert_same(*both(run, net, torch.randn(5, 4), seed=1))
    with torch.no_grad():
        net.layer.weight.mul_(3)
        net.norm.running_mean.add_(1)
    assert_same(*both(run, net, x, seed=2))
    assert not torch.equal(run(x)["rest"][0], run(x)["rest"][0])
    assert run.captures == 1
    assert not run.is_compiled


def test_buffers_that_it_updates_are_updated_once_for_each_call():
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    run, x = captured(ours), torch.randn(5, 4)
    for _ in range(3):
        run(x)
        theirs(x)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_capturing_leaves_random_numbers_as_they_were():
    net, x = Net().eval(), torch.randn(5, 4)
    torch.manual_seed(0)
    captured(net)(x)
    ours = torch.get_rng_state()
    torch.manual_seed(0)
    net(x)
    assert torch.equal(torch.get_rng_state(), ours)


def test_one_capture_for_each_set_of_shapes():
    net = Net().eval()
    run = captured(net)
    for _ in range(3):
        for size in (5, 5, 2):
            x = torch.randn(size, 4)
            assert_same(*both(run, net, x))
    assert run.captures == 2
    assert_same(*both(run, net, torch.randn(4, 5).T))  # other strides
    assert run.captures == 3


def test_another_dtype_of_module_and_data():
    net = Net().eval()
    run = captured(net)
    run(torch.randn(5, 4))
    net.double()
    assert_same(*both(run, net, torch.randn(5, 4, dtype=torch.float64)))


def test_changes_make_a_new_capture():
    net, x = Net().eval(), torch.randn(5, 4)
    run = captured(net)
    run(x)
    for change in (
        lambda: setattr(net, "beta", 0.5),
        lambda: setattr(net.layer, "weight", nn.Parameter(torch.ones(3, 4))),
        lambda: setattr(net, "layer", nn.Sequential(nn.Linear(4, 3), nn.Tanh())),
        lambda: net.train(),
    ):
        change()
        assert_same(*both(run, net, x))
    assert run.captures == 5


def test_what_changes_too_often_is_not_captured_any_more():
    net, x = Net().eval(), torch.randn(5, 4)
    run = captured(net)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            net.beta = float(step)
            assert_same(*both(run, net, x, seed=step))
    (warning,) = caught
    assert "Net.beta changed" in str(warning.message)
    assert run.captures < 10
    assert run.given_up


COUNTER = iter(range(100))


def reads_a_number(x):
    return x.sum() * float(x.mean())


def branches(x):
    return x.sum() if x.mean() > 0 else x.mean()


def draws_by_numpy(x):
    return x.sum() + torch.tensor(np.random.default_rng(next(COUNTER)).normal())


def draws_by_python(x):
    return x.sum() + random.random()


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (reads_a_number, "reads a number out of a tensor.*line .*float"),
        (branches, "reads a number out of a tensor.*if x.mean"),
        (draws_by_numpy, "its results are not those"),
        (draws_by_python, "it draws random numbers by Python or NumPy"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_with_one_warning(function, cause):
    run = Captured(function, "the function", (function,), compile_after=None)
    x = torch.randn(5, 4)
    with pytest.warns(UserWarning, match=f"the function runs as plain Pyro, uncaptured: .*{cause}"):
        run(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = {run(x).item() for _ in range(3)}
        if function in (reads_a_number, branches):
            assert results == {function(x).item()}
        else:
            assert len(results) == 3


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.calls * x.sum()


def test_a_program_that_counts_its_runs():
    net = Counts()
    run = Captured(net.forward, "the count", (net,), compile_after=None)
    with pytest.warns(UserWarning, match=r"it changes Counts.calls as it runs"):
        run(torch.ones(2))


def test_errors_of_pvae_are_raised():
    def refuses(x):
        raise DataError("not these")

    with pytest.raises(DataError, match="not these"):
        Captured(refuses, "it", ())(torch.ones(2))


def test_captured_and_compiled_after_so_many_runs():
    net, x = Net().eval(), torch.randn(5, 4)
    run = captured(net, capture_after=2, compile_after=3)
    for expected in (0, 0, 1):
        run(x)
        assert run.captures == expected
    assert run.is_compiled  # the first set of shapes is compiled at once
    assert_same(*both(run, net, x))
    few = torch.randn(3, 4)
    for _ in range(2 + 3):
        run(few)
    assert run.captures == 2
    (first, other) = run._variants.values()
    assert first.compile_attempted
    assert not other.compile_attempted
    assert_same(*both(run, net, few, seed=3))
    assert other.compile_attempted
    assert run.seconds > 0


def test_the_compiler_finds_its_copy_on_disk():
    from torch._dynamo.utils import counters

    net = Net().eval()
    for _ in range(2):
        counters["inductor"].clear()
        assert captured(net, compile_after=0)(torch.randn(5, 4)) is not None
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert not counters["inductor"]["fxgraph_cache_bypass"]


def test_other_shapes_are_compiled_when_that_would_have_paid(monkeypatch):
    monkeypatch.setattr(Graph, "compile", lambda self, inputs: replace(self, run=partial(self.module)))
    monkeypatch.setitem(graphs._COMPILE_SECONDS, "cpu", 0.1)  # 40 runs of 2.5 ms
    net = Net().eval()
    run = captured(net, compile_after="auto")
    for shape, runs in ((5, 1), (3, 40)):
        for _ in range(runs):
            run(torch.randn(shape, 4))
    assert [one.compile_attempted for one in run._variants.values()] == [True, False]
    for _ in range(2):
        run(torch.randn(3, 4))
    assert [one.compile_attempted for one in run._variants.values()] == [True, True]


def test_operations_are_those_of_the_products():
    x, net = torch.randn(5, 4), nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3, padding=1))
    graph = Graph.capture(net, (x,))
    assert graph.operations == 2 * 5 * 4 * 3 + 2 * 5 * 2 * 3 * 3


def test_compiling_that_is_ended_from_outside_leaves_all_as_it_was():
    class Ended(BaseException):
        pass

    @contextmanager
    def ended():
        torch.rand(1)
        raise Ended
        yield

    net, x = Net().eval(), torch.randn(5, 4)
    run = captured(net, compile_after=0, compiling=ended)
    before = torch.get_rng_state()
    with pytest.raises(Ended):
        run(x)
    assert torch.equal(torch.get_rng_state(), before)
    run.compiling = nullcontext
    assert_same(*both(run, net, x))
    assert run.is_compiled


def test_graphs_of_many_shapes_are_not_all_kept():
    net = Net().eval()
    run = captured(net)
    for size in range(2, 40):
        run(torch.randn(size, 4))
    assert len(run._variants) <= 32


def test_no_compiler_means_uncompiled_with_one_warning(monkeypatch):
    import torch._inductor.compile_fx as module

    monkeypatch.setattr(graphs, "_no_compiler", [])

    def missing(*_, **__):
        raise RuntimeError("No working C++ compiler found in the list: ('/nonexistent',).\nmore")

    monkeypatch.setattr(module, "compile_fx", missing)
    net, x = Net().eval(), torch.randn(5, 4)
    run = captured(net, compile_after=0)
    with pytest.warns(UserWarning, match=r"the net runs captured but uncompiled: No working C\+\+ compiler"):
        run(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(*both(run, net, x))


@pytest.mark.slow
def test_a_machine_without_a_compiler(tmp_path):
    """The whole of `fit` where CXX names nothing: a warning, and the same ELBO as with plain Pyro."""
    code = (
        "import torch, pvae, warnings; torch.manual_seed(0); x = torch.bernoulli(torch.full((64, 6), 0.3))\n"
        "def elbo(c):\n"
        "    torch.manual_seed(0); v = pvae.VAE.mlp(6, 2, [8])\n"
        "    return pvae.fit(v.model, v.guide, x, epochs=2, compile=c, progress=False).history['elbo'][-1]\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); a = elbo(True)\n"
        "print([str(w.message) for w in caught if 'uncompiled' in str(w.message)])\n"
        "assert abs(a - elbo(False)) < 1e-3\n"
    )
    environment = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    assert "pvae.fit's step runs captured but uncompiled" in lines_of(python(code, **environment))[0]


def test_the_rule_that_decides_where_it_pays():
    cpu = torch.device("cpu")
    assert not worth_compiling(400, 1e9, cpu)  # a few hundred steps of a small network
    assert worth_compiling(4700, 5e12, cpu)  # twenty epochs of MNIST
    assert worth_compiling(500, 1e13, cpu)  # few steps of a large one


# --- what a review found ------------------------------------------------------------------------------------------

STATE = {"beta": torch.tensor(1.0)}


def reads_a_buffer(x):
    return float(STATE["beta"]) * x.sum()


def branches_on_a_parameter(x):
    return x.sum() if STATE["beta"] else x.mean()


def reads_as_an_array(x):
    return x.sum() * float(x.numpy().std())


def reads_a_list(x):
    return x.sum() * max(x.flatten().tolist())


def selects_by_a_mask(x):
    return x[x > 0].sum()


def branches_rarely(x):
    return x.sum() if random.random() < 0.999 else x.mean()


def draws_rarely_seen(x):
    np.random.rand()  # noqa: NPY002
    return x.sum()


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (reads_a_buffer, "reads a number out of a tensor"),
        (branches_on_a_parameter, "reads a number out of a tensor"),
        (reads_as_an_array, "reads a number out of a tensor"),
        (reads_a_list, "reads a number out of a tensor"),
        (selects_by_a_mask, "the shape of a result depends on the data"),
        (branches_rarely, "random numbers by Python or NumPy"),
        (draws_rarely_seen, "random numbers by Python or NumPy"),
    ],
)
def test_numbers_that_a_capture_would_freeze_stop_it(function, cause):
    run = Captured(function, "the function", (function,), compile_after=None)
    with pytest.warns(UserWarning, match=f"the function runs as plain Pyro, uncaptured: .*{cause}"):
        run(torch.randn(5, 4))


def test_inputs_that_are_one_tensor_are_not_taken_for_one():
    data = torch.randn(5, 4)

    def function(x, y):
        return (x - y).sum() + data.mean()

    run = Captured(function, "the function", (function,), compile_after=None)
    run(data, data)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(run(x, y), function(x, y))
    assert run.captures == 1


def test_autocast_of_the_caller_is_part_of_what_was_captured():
    net, x = Net().eval(), torch.randn(5, 4)
    run = captured(net)
    with torch.autocast("cpu", torch.bfloat16):
        low = both(run, net, x)
    assert_same(*low)
    assert_same(*both(run, net, x))
    assert run.captures == 2


def test_another_layout_of_parameters():
    net, x = Net().eval(), torch.randn(5, 4)
    run = captured(net)
    run(x)
    net.layer.weight.data = net.layer.weight.data.t().contiguous().t()
    assert_same(*both(run, net, x))
    assert run.captures == 2


def test_entries_of_the_param_store_that_a_program_replaces():
    def function(x):
        store = pyro.get_param_store()
        average = 0.9 * (store["average"] if "average" in store else torch.zeros(())) + 0.1 * x.mean()
        store["average"] = average.detach()
        return x.sum()

    x = torch.ones(5)
    function(x)
    before = pyro.param("average").clone()
    with pytest.warns(UserWarning, match=r"it replaces \['average'\] in the param store as it runs"):
        Captured(function, "the function", (function,), compile_after=None)(x)
    # The function has run once for the caller, and not once more.
    torch.testing.assert_close(pyro.param("average").detach(), 0.9 * before.detach() + 0.1)


def test_one_warning_for_a_missing_compiler(monkeypatch):
    import torch._inductor.compile_fx as module

    from pvae.capture import captured as graphs

    def missing(*_, **__):
        raise RuntimeError("No working C++ compiler found in the list: ('/nonexistent',).")

    monkeypatch.setattr(module, "compile_fx", missing)
    monkeypatch.setattr(graphs, "_no_compiler", [])
    with pytest.warns(UserWarning, match="uncompiled"):
        captured(Net().eval(), compile_after=0)(torch.randn(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured(Net().eval(), compile_after=0)(torch.randn(5, 4))


@dataclass
class Counter:
    """Counts its runs, in all the places where a run may leave something."""

    count: int = 0
    buffer: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    listed: list[int] = field(default_factory=lambda: [0])
    seen: set[int] = field(default_factory=set)
    numpy: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    torch: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def runs(self, x):
        self.count += 1
        self.buffer = self.buffer + 1
        self.listed[0] += 1
        self.listed.append(self.count)
        self.seen.add(self.count)
        return x.sum() + self.numpy.normal() + torch.randn((), generator=self.torch) + self.count


def test_a_capture_that_fails_puts_back_what_the_program_has_changed():
    ours, theirs, x = Counter(), Counter(), torch.ones(3)
    random.seed(0)
    python_state = random.getstate()
    run = Captured(ours.runs, "it", (ours.runs,), compile_after=None)
    with pytest.warns(UserWarning, match="it runs as plain Pyro, uncaptured"):
        first = run(x)
    assert torch.equal(first, theirs.runs(x))
    assert (ours.count, ours.buffer, ours.listed, ours.seen) == (1, torch.ones(()), [1, 1], {1})
    assert torch.equal(run(x), theirs.runs(x))
    assert random.getstate() == python_state


def test_torchscript_is_captured_as_other_modules_are():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and there are many of its files
        net = torch.jit.trace(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(2, 4))
    run = Captured(lambda x: net(x).sum(), "it", (net,), compile_after=None)
    for _ in range(3):
        x = torch.randn(5, 4)
        torch.testing.assert_close(run(x), net(x).sum().detach())
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    torch.testing.assert_close(run(x), net(x).sum().detach())
    assert run.captures == 1
    getattr(net, "0").weight = nn.Parameter(torch.ones(3, 4))
    torch.testing.assert_close(run(x), net(x).sum().detach())


def test_a_graph_is_compared_with_what_the_function_stands_for():
    run = Captured(lambda x: 2 * x, "it", (), original=lambda x: 2 * x if x.mean() > 1e9 else x, compile_after=None)
    with pytest.warns(UserWarning, match="a float among its arguments is not what a tensor is"):
        run(torch.ones(3))
