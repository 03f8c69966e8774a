"""What a call is made inside of, or with, and cannot work: refused by name before anything has moved."""

from __future__ import annotations

import copy

import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import pvae

OPTIONS = {"epochs": 1, "progress": False}
CALLS = {
    "fit": lambda vae, x: pvae.fit(vae.model, vae.guide, x, **OPTIONS),
    "log_evidence": lambda vae, x: pvae.log_evidence(vae.model, vae.guide, x, num_samples=4),
    "log_weights": lambda vae, x: pvae.log_weights(vae.model, vae.guide, x, num_samples=4),
    "gauss_hermite": lambda vae, x: pvae.evidence.gauss_hermite(vae.model, vae.guide, x),
    "bidirectional": lambda vae, x: pvae.evidence.bidirectional_monte_carlo(vae.model, vae.guide, x, num_samples=2),
    "load_checkpoint": lambda vae, x: pvae.svi.load_checkpoint("nowhere", vae.model, vae.guide, x),
}
HANDLERS = {
    "condition": lambda x, z: poutine.condition(data={"x": x}),
    "do": lambda x, z: poutine.do(data={"z": z}),
    "replay": lambda x, z: poutine.replay(trace=poutine.Trace()),
    "trace": lambda x, z: poutine.trace(),
    "uncondition": lambda x, z: poutine.uncondition(),
    "lift": lambda x, z: poutine.lift(prior=dist.Normal(0.0, 1.0)),
    "mask": lambda x, z: poutine.mask(mask=torch.ones(len(x), dtype=torch.bool)),
    "scale": lambda x, z: poutine.scale(scale=torch.ones(len(x))),
}


@pytest.fixture
def nothing_moves(small_vae):
    before = copy.deepcopy(small_vae.state_dict())
    yield
    assert all(torch.equal(now, before[name]) for name, now in small_vae.state_dict().items())


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("call", CALLS)
def test_handlers_that_are_for_one_batch(call, handler, small_vae, bits, nothing_moves):
    said = rf"inside of poutine\.{handler}, which acts on the model and the guide"
    advice = r"data=\(x, " if handler in ("mask", "scale") else rf"poutine\.{handler}\(model, "
    with HANDLERS[handler](bits, torch.zeros(len(bits), 2)), pytest.raises(pvae.ProgramError, match=said) as error:
        CALLS[call](small_vae, bits)
    error.match(advice)


@pytest.mark.filterwarnings("ignore:the model scales the densities")
@pytest.mark.parametrize(
    "handler",
    [
        poutine.block,
        lambda: poutine.mask(mask=True),
        lambda: poutine.scale(scale=0.5),
        lambda: poutine.reparam(config={}),
    ],
    ids=["block", "mask", "scale", "reparam"],
)
def test_handlers_that_are_for_any_batch_are_felt(handler, small_vae, bits):
    with handler():
        CALLS["fit"](small_vae, bits)
        CALLS["log_evidence"](small_vae, bits)


def test_a_handler_around_the_program_is_for_any_batch(bits, small_vae):
    z = torch.zeros(2)
    conditioned = poutine.condition(small_vae.model, data={"z": z})
    estimate = pvae.log_evidence(conditioned, lambda x: None, bits, num_samples=3)
    with torch.no_grad():
        expected = small_vae.prior().log_prob(z) + small_vae.decode(z).log_prob(bits)
    assert torch.allclose(estimate.log_px.float(), expected, atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_blocks_whose_tensors_hold_no_numbers(call, mode, small_vae, bits, nothing_moves):
    with pytest.raises(pvae.DeviceError, match=r"tensors hold no numbers: inside of torch\.device\('meta'\)"), mode():
        CALLS[call](small_vae, bits)


def test_a_default_device_without_numbers(small_vae, bits):
    torch.set_default_device("meta")
    try:
        with pytest.raises(pvae.DeviceError, match="set_default_device"):
            CALLS["log_evidence"](small_vae, bits)
    finally:
        torch.set_default_device(None)


def test_function_modes_change_nothing(small_vae, bits):
    class Through(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    alone = CALLS["log_evidence"](small_vae, bits).log_px
    for mode in (Through(), torch.device("cpu")):
        with mode:
            assert torch.equal(CALLS["log_evidence"](small_vae, bits).log_px, alone)


@pytest.mark.parametrize("call", ["fit", "log_evidence", "gauss_hermite"])
def test_tensors_and_devices_without_numbers(call, small_vae, bits, nothing_moves):
    with pytest.raises(pvae.DataError, match="data must be numbers, got a tensor on the meta device"):
        CALLS[call](small_vae, bits.to("meta"))
    empty = copy.deepcopy(small_vae).to("meta")
    with pytest.raises(
        pvae.DeviceError, match=r"parameters are on the meta device.*outside of torch\.device\('meta'\)"
    ):
        CALLS[call](empty, bits)
    method = {"fit": pvae.fit, "log_evidence": pvae.log_evidence, "gauss_hermite": pvae.evidence.gauss_hermite}[call]
    with pytest.raises(pvae.DeviceError, match="device='meta' holds no numbers to compute with"):
        method(small_vae.model, small_vae.guide, bits, device="meta")
    loader = torch.utils.data.DataLoader(bits)
    if call != "gauss_hermite":
        with pytest.raises(pvae.DeviceError, match="parameters are on the meta device"):
            CALLS[call](empty, loader)


def test_a_vae_can_be_made_where_there_is_no_memory_for_it():
    with torch.device("meta"):
        vae = pvae.VAE.mlp(6, latent_dim=2, hidden=[8])
    assert vae.event_shape == (6,)
    assert {p.device.type for p in vae.parameters()} == {"meta"}


# --- paths ----------------------------------------------------------------------------------------------------------

PATHS = {
    "checkpoint": lambda vae, path, x: pvae.fit(vae.model, vae.guide, x, checkpoint=path, **OPTIONS),
    "path of load_checkpoint": lambda vae, path, x: pvae.svi.load_checkpoint(path, vae.model, vae.guide, x),
    "path of save": lambda vae, path, x: vae.save(path),
    "path of load": lambda vae, path, x: pvae.VAE.load(path),
    "root": lambda vae, path, x: pvae.datasets.mnist(path),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_with_nul(name, small_vae, bits, nothing_moves):
    argument = name.partition(" ")[0]
    with pytest.raises(pvae.ArgumentError, match=f"^{argument} must be the path of a folder.*: no path has a NUL"):
        PATHS[name](small_vae, "a\0b", bits)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_none(name, small_vae, bits, nothing_moves):
    argument = name.partition(" ")[0]
    with pytest.raises(pvae.ArgumentError, match=f"^{argument} must be the path of a folder, got 3"):
        PATHS[name](small_vae, 3, bits)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_from_a_working_directory_that_was_deleted(name, small_vae, bits, nothing_moves, monkeypatch, tmp_path):
    argument = name.partition(" ")[0]
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(pvae.ArgumentError, match=f"^{argument}='here' is a path from the working directory"):
        PATHS[name](small_vae, "here", bits)


def test_a_deleted_working_directory_is_not_needed(small_vae, bits, monkeypatch, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    pvae.fit(small_vae.model, small_vae.guide, bits, checkpoint=tmp_path / "run", **OPTIONS)
    pvae.svi.load_checkpoint(tmp_path / "run", small_vae.model, small_vae.guide, bits)
    small_vae.save(tmp_path / "saved")
    assert pvae.VAE.load(tmp_path / "saved").latent_dim == 2
