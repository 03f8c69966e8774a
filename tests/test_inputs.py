"""What people pass first: arrays of other packages, one datum, data with labels. Errors say what to pass instead."""

from __future__ import annotations

import warnings
from functools import partial

import helpers
import numpy as np
import pyro
import pytest
import torch
from helpers import evidence
from pairs import ModulePair, RealPair
from pyro import distributions as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pvae
from pvae.data.arrays import as_tensors

fit = partial(helpers.fit, epochs=1, batch_size=256, compile=False)


def made(event_shape=6, likelihood="gaussian") -> pvae.VAE:
    torch.manual_seed(0)
    return pvae.VAE.mlp(event_shape, 2, [8], likelihood)


# --- NumPy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, bool])
def test_methods_take_numpy_as_fit_does(dtype):
    vae = made()
    x = (np.random.default_rng(0).random((5, 6)) > 0.5).astype(dtype)
    as_tensor = torch.as_tensor(x)
    assert torch.equal(vae.encode(x).mean, vae.encode(as_tensor).mean)
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(as_tensor))
    z = np.random.default_rng(1).normal(size=(3, 5, 2)).astype(dtype)
    assert torch.equal(vae.decode(z).mean, vae.decode(torch.as_tensor(z)).mean)
    assert torch.equal(vae.decode(z[0, 0]).mean, vae.decode(torch.as_tensor(z[0, 0])).mean)
    pyro.poutine.trace(vae.guide).get_trace(x)


def test_tensors_keep_their_gradients():
    vae = made()
    x, z = torch.zeros(2, 6, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    (vae.encode(x).mean.sum() + vae.decode(z).mean.sum()).backward()
    assert x.grad is not None
    assert z.grad is not None


def test_numpy_is_checked_as_fit_checks_it():
    with pytest.raises(pvae.DataError, match="x holds 1 nan"):
        made().encode(np.array([[0, 0, 0, np.nan, 0, 0]]))
    with pytest.raises(pvae.DataError, match=r"z must be .* got str"):
        made().decode("z")  # type: ignore[arg-type]
    with pytest.raises(pvae.DataError, match="x must be one array, got 2"):
        made().encode(TensorDataset(torch.zeros(3, 6), torch.zeros(3)))  # type: ignore[arg-type]


# --- other packages' arrays -----------------------------------------------------------------------------------------


def stand_in(module: str, name: str, *methods: str):
    """An object of a package that need not be installed."""
    return type(name, (), {"__module__": module} | {method: lambda self: np.zeros((3, 6)) for method in methods})()


@pytest.mark.parametrize(
    "thing, match",
    [
        (stand_in("pandas.core.frame", "DataFrame", "to_numpy"), r"got DataFrame. Pass data.to_numpy\(\)"),
        (stand_in("pandas.core.series", "Series", "to_numpy"), r"got Series. Pass data.to_numpy\(\)"),
        (stand_in("polars.dataframe.frame", "DataFrame", "to_numpy"), r"got DataFrame. Pass data.to_numpy\(\)"),
        (stand_in("xarray.core.dataarray", "DataArray", "to_numpy"), r"got DataArray. Pass data.to_numpy\(\)"),
        (stand_in("xarray.core.dataset", "Dataset", "to_array"), r"got Dataset. Pass data.to_array\(\).to_numpy\(\)"),
        (stand_in("scipy.sparse", "csr_matrix", "toarray"), r"got csr_matrix. Pass data.toarray\(\)"),
        (stand_in("jaxlib", "ArrayImpl", "__array__"), r"got ArrayImpl. Pass np.asarray\(data\)"),
        ((torch.zeros(3), stand_in("pandas", "Series", "to_numpy")), r"got Series. Pass data\[1\].to_numpy\(\)"),
        ([[0.0, 1.0], [1.0, 0.0]], r"got list. Pass torch.tensor\(data\)"),
        ([], "empty sequence. Pass some"),
        ((torch.zeros(3), 0.5), r"got float. Pass an array whose first dimension"),
        (0.5, r"got float. Pass an array whose first dimension"),
    ],
)
def test_arrays_of_other_packages_are_told_their_way_out(thing, match):
    with pytest.raises(pvae.DataError, match=match):
        as_tensors("data", thing)
    vae = made()
    for call in (fit, evidence):
        with pytest.raises(pvae.DataError, match=match):
            call(vae, thing)
    with pytest.raises(pvae.DataError, match=match.replace("data", "x")):
        vae.encode(thing)


# --- one datum ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [fit, evidence, lambda vae, x: vae.encode(x), lambda vae, x: vae.reconstruct(x)])
@pytest.mark.parametrize("shape", [(784,), (28, 28), (1, 4, 4)], ids=str)
def test_one_datum_is_named_by_its_shape(call, shape):
    vae = made(shape)
    x = torch.rand(10, *shape)
    expected = (
        rf"must have shape \(N, {', '.join(map(str, shape))}\), got \({', '.join(map(str, shape))},?\)\. .*X\[:1\]"
    )
    with pytest.raises(pvae.DataError, match=expected):
        call(vae, x[0])
    with pytest.raises(pvae.DataError, match=expected):
        call(vae, x[0].numpy())


def test_data_of_another_shape_are_named_as_they_were_passed():
    with pytest.raises(pvae.DataError, match=r"data must have shape \(N, 6\), got \(1000, 7\). Reshape"):
        fit(made(), torch.zeros(1000, 7))
    with pytest.raises(pvae.DataError, match=r"got \(1000, 2, 3\). Reshape the data, x.reshape\(len\(x\), \*\(6,\)\)"):
        fit(made(), torch.zeros(1000, 2, 3))
    with pytest.raises(pvae.DataError, match=r"validation must have shape \(N, 6\), got \(6,\). .*X\[:1\]"):
        fit(made(), torch.randn(50, 6), validation=torch.zeros(6))
    with pytest.raises(pvae.DataError, match=r"data must have shape \(N, 6\), got \(1000, 7\). Reshape"):
        evidence(made(), torch.zeros(1000, 7))


def test_one_datum_for_a_pair_by_hand():
    with pytest.raises(pvae.ProgramError, match=r"float32\[256\].*float32\[500\]: if that is one.*X\[:1\]"):
        fit(RealPair(500), torch.zeros(500))


# --- labels ---------------------------------------------------------------------------------------------------------

X, Y = torch.randn(40, 6), torch.arange(40)


@pytest.mark.parametrize(
    "labelled",
    [(X, Y), TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), batch_size=20), (X.numpy(), Y.numpy())],
    ids=["tuple", "dataset", "loader", "numpy"],
)
def test_labels_name_the_transform_that_leaves_them_out(labelled):
    vae = made()
    with pytest.raises(pvae.ProgramError, match=r"the model cannot .* pass transform=lambda x, y: x") as caught:
        fit(vae, labelled)
    assert "Or let it take one argument" in str(caught.value)
    fit(vae, labelled, transform=lambda x, y: x)  # as it says
    with pytest.raises(pvae.ProgramError, match=r"Pass only what it takes, x of \(x, y\), without labels"):
        evidence(vae, labelled)
    with pytest.raises(pvae.ProgramError, match=r"Pass only what it takes, x of \(x, y\), without labels"):
        fit(vae, X, validation=labelled)


def test_more_than_one_label():
    with pytest.raises(pvae.ProgramError, match="pass transform=lambda x, y, y2: x"):
        fit(made(), (X, Y, Y))


def test_a_list_of_rows_is_no_list_of_labels():
    with pytest.raises(pvae.ProgramError, match=r"40 tensor\(s\), (\(6,\), ){3}\(6,\) and 36 more: .*torch.stack"):
        fit(made(), list(X))


def test_a_share_is_no_held_out_data():
    with pytest.raises(pvae.DataError, match=r"validation must be .* got float. .* data=x\[n:\] and valid.*=x\[:n\]"):
        fit(made(), X, validation=0.1)


# --- numbers of other types, for programs by hand -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_whole_numbers_for_a_pair_by_hand_are_told_their_way_out(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(pvae.ProgramError, match=rf"{name}\[40, 6\]: [^.]*\. Integers .* are {name}: .*x.float\(\)"):
        fit(ModulePair(), (X > 0).to(dtype), batch_size=40)


def test_one_datum_that_runs_as_many_warns():
    """Each of its 6 entries would be taken for a datum, with all 6 observed for each."""
    vae = made(likelihood="bernoulli")

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", vae.decoder(z), obs=x)

    def guide(x):
        pyro.module("encoder", vae.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", vae.encoder(x))

    with pytest.warns(UserWarning, match=r"plate 'data' makes log p\(x\|z\) 6 times as large.*X\[:1\]"):
        pvae.fit(model, guide, torch.ones(6), epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pvae.fit(model, guide, torch.ones(1, 6), epochs=1, progress=False)


# --- what is no program ---------------------------------------------------------------------------------------------


class Called(ModulePair):
    """A module that is called without a forward."""

    def __call__(self, x):
        return self.model(x)


@pytest.mark.parametrize("call", [pvae.fit, pvae.log_evidence])
def test_what_is_no_program_is_named(call):
    vae, pair = made(), ModulePair()
    for model, guide, match in (
        (vae, vae, r"^model is a VAE, .* pass its methods, vae.model and vae.guide"),
        (vae.model, vae, r"^guide is a VAE, .* pass its methods, vae.model and vae.guide"),
        (None, vae.guide, r"^model must be a Pyro program.* got None\. Pass the program itself"),
        (vae.model, 3, r"^guide must be a Pyro program.* got a int\."),
        (pvae.VAE, vae.guide, r"^model is the class VAE"),
        (vae.model, nn.Module(), r"^guide must be a Pyro program.* got a Module"),
    ):
        with pytest.raises(pvae.ArgumentError, match=match):
            call(model, guide, X, progress=False)
    called = Called()
    called.load_state_dict(pair.state_dict())
    pvae.fit(called, called.guide, (X > 0).float(), epochs=1, progress=False)
