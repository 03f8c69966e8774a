"""The same work on the GPU. Skipped where there is none."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

import pvae
from pvae.evidence import bidirectional_monte_carlo, gauss_hermite
from pvae.evidence.proposals import Annealed, Sobol
from pvae.svi import passes

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_training_ends_at_the_same_elbo_as_on_the_cpu(place, bits):
    """Noise differs between devices. The sd of an epoch's ELBO is below 1.5 / sqrt(300) = 0.09; 6 sigma of two."""
    on_cpu = pvae.VAE.mlp(6, 2, [8])
    on_gpu = copy.deepcopy(on_cpu)
    options = {"epochs": 40, "batch_size": 32, "lr": 0.01, "progress": False}
    cpu = pvae.fit(on_cpu.model, on_cpu.guide, bits, device="cpu", **options)
    gpu = pvae.fit(on_gpu.model, on_gpu.guide, bits.to(place), device="cuda", validation=bits, **options)
    assert gpu.device.type == "cuda"
    assert all(p.is_cuda for p in on_gpu.parameters())
    assert gpu.history["elbo"][-1] == pytest.approx(cpu.history["elbo"][-1], abs=6 * 0.09 * 2**0.5)


@pytest.mark.parametrize(
    "proposal",
    ["guide", "prior", "refined", "laplace", "student-t", "defensive", Sobol(), Annealed(temperatures=10)],
    ids=str,
)
def test_log_px_is_the_same_as_on_the_cpu(proposal, bits):
    on_cpu = pvae.VAE.mlp(6, 2, [8])
    on_gpu = copy.deepcopy(on_cpu)
    options = {"num_samples": 2000, "proposal": proposal}
    cpu = pvae.log_evidence(on_cpu.model, on_cpu.guide, bits, device="cpu", **options)
    gpu = pvae.log_evidence(on_gpu.model, on_gpu.guide, bits, device="cuda", **options)
    error = (cpu.std_error.square() + gpu.std_error.square()).sqrt()
    assert ((cpu.log_px - gpu.log_px).abs() < 5 * error + 1e-5).all()
    assert gpu.log_px.device.type == "cpu"


def test_spending_quadrature_and_bounds_on_the_gpu(bits):
    vae = pvae.VAE.mlp(6, 2, [8])
    pair, options = (vae.model, vae.guide, bits[:50]), {"device": "cuda"}
    estimate = pvae.log_evidence(*pair, num_samples=100, target_std_error=0.01, max_samples=3200, **options)
    exact = gauss_hermite(*pair, **options)
    assert ((estimate.log_px - exact.log_px).abs() < 5 * estimate.std_error + 5e-3).all()
    bracket = bidirectional_monte_carlo(*pair, num_samples=8, **options)
    assert bracket.gap > -5 * bracket.gap_std_error


def test_seeds_and_the_callers_random_numbers_on_the_gpu(bits):
    vae = pvae.VAE.mlp(6, 2, [8]).cuda()
    before = torch.cuda.get_rng_state()
    first = pvae.log_evidence(vae.model, vae.guide, bits, num_samples=50, device="cuda")
    again = pvae.log_evidence(vae.model, vae.guide, bits, num_samples=50, device="cuda")
    assert torch.equal(first.log_px, again.log_px)
    assert torch.equal(vae.sample(4, seed=1), vae.sample(4, seed=1))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_auto_is_the_gpu(bits):
    vae = pvae.VAE.mlp(6, 2, [8])
    assert pvae.fit(vae.model, vae.guide, bits, epochs=1, progress=False).device.type == "cuda"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [300, 32 * 40 + 7])
def test_epochs_as_cuda_graphs_train_as_plain_steps_do(size, precision, bits):
    """Fewer data than one replay takes, and two replays with a ragged rest. Noise differs; errors as above."""
    x = bits[torch.arange(size) % len(bits)]
    fast = pvae.VAE.mlp(6, 2, [8])
    plain = copy.deepcopy(fast)
    options = {"epochs": 40, "batch_size": 32, "lr": 0.01, "progress": False, "device": "cuda", "validation": bits}
    compiled = pvae.fit(fast.model, fast.guide, x, compile=True, precision=precision, **options)
    eager = pvae.fit(plain.model, plain.guide, x, compile=False, **options)
    assert compiled.compile_seconds > 0
    for curve in ("elbo", "validation_elbo"):
        assert compiled.history[curve][-1] == pytest.approx(eager.history[curve][-1], abs=6 * 0.09 * 2**0.5)


def test_a_bad_datum_stops_the_epoch_on_the_gpu(bits):
    """The loss of a batch is nan from the second epoch on: an error at its end, and finite parameters."""
    vae = pvae.VAE.mlp(6, 2, [8])
    seen = torch.zeros((), device="cuda")

    def poison(x):
        seen.add_(1)
        return torch.where(seen > 45, torch.nan, x)

    with pytest.raises(pvae.NumericalError, match="epoch 2, step"):
        pvae.fit(
            vae.model, vae.guide, bits.repeat(4, 1), transform=poison, epochs=3, batch_size=32, compile=True,
            device="cuda", progress=False,
        )  # fmt: skip
    assert all(p.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("proposal", ["guide", "prior", "refined"])
def test_captured_chunks_on_the_gpu(proposal, bits):
    vae = pvae.VAE.mlp(6, 2, [8])
    options = {"num_samples": 400, "chunk_size": 10_000, "proposal": proposal, "device": "cuda"}
    fast, plain = (pvae.log_evidence(vae.model, vae.guide, bits, compile=c, **options) for c in (True, False))
    torch.testing.assert_close(fast.log_px, plain.log_px, rtol=1e-4, atol=1e-3)


def test_compiled_svi_on_the_gpu(bits):
    losses = []
    for cls in (pvae.svi.CompiledSVI, pyro.infer.SVI):
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = pvae.VAE.mlp(6, 2, [8]).cuda()
        svi = cls(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        losses.append([svi.step(bits.cuda()) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("compile, pays", [(False, 150_000), (True, 150_000), (True, 60)])
def test_a_run_on_the_gpu_goes_on_bit_for_bit_and_on_the_cpu_with_a_warning(compile, pays, bits, tmp_path, monkeypatch):
    """Stopped at an epoch's end and, where steps are single, within one; or before the update is compiled."""
    monkeypatch.setattr(passes, "_STEPS_THAT_PAY", pays)
    run, folder = tmp_path / "run", tmp_path / "copy"
    x = bits[torch.arange(32 * 40 + 7) % len(bits)]
    whole = pvae.VAE.mlp(6, 2, [8])
    stopped = copy.deepcopy(whole)
    options = {"epochs": 4, "batch_size": 32, "lr": 0.01, "progress": False, "compile": compile, "validation": bits}
    options |= {
        "transform": pvae.datasets.fresh_bits,
        "clip_norm": 50.0,
        "kl_weight": lambda epoch: min(1.0, epoch / 3),
    }
    options |= {"scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}
    reference = pvae.fit(whole.model, whole.guide, x, device="cuda", **options)

    def stop(record):
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    first = pvae.fit(stopped.model, stopped.guide, x, device="cuda", checkpoint=run, callback=stop, **options)
    assert first.stopped == "signal"
    shutil.copytree(run, folder)
    other = pvae.VAE.mlp(6, 2, [8])
    result = pvae.fit(other.model, other.guide, x, device="cuda", checkpoint=run, resume="auto", **options)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), other.parameters(), strict=True))
    assert result.history["validation_elbo"].tolist() == reference.history["validation_elbo"].tolist()
    cpu = pvae.VAE.mlp(6, 2, [8])
    with pytest.warns(UserWarning, match="device was 'cuda:0' and is 'cpu' now"):
        pvae.fit(cpu.model, cpu.guide, x, device="cpu", checkpoint=folder, resume="auto", **options)


def test_a_vae_saved_on_the_gpu_is_loaded_on_the_cpu(bits, tmp_path):
    vae = pvae.VAE.mlp(6, 2, [8]).cuda()
    vae.save(tmp_path / "model")
    loaded = pvae.VAE.load(tmp_path / "model")
    assert all(torch.equal(p.cpu(), q) for p, q in zip(vae.parameters(), loaded.parameters(), strict=True))


def test_out_of_memory_halves_the_chunk(bits, caplog):
    vae = pvae.VAE.mlp(6, 2, [8])
    options = {"num_samples": 2**22, "device": "cuda", "proposal": "guide"}
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + 2**28) / free))
    try:
        estimate = pvae.log_evidence(vae.model, vae.guide, bits[:4], chunk_size=2**24, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "beginning again with chunks" in caplog.text
    assert estimate.log_px.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_one_report(tmp_path):
    example = Path(__file__).parents[1] / "examples" / "mnist_svi.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(example),
        "--cuda",
    ]
    command += ["--dataset", "digits", "--epochs", "3", "--num-samples", "20", "--output-dir", str(tmp_path)]
    assert subprocess.run(command, timeout=300).returncode == 0
    assert (tmp_path / "report.json").exists()
