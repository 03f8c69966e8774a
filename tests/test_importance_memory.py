"""Memory that does not suffice: log p(x) takes smaller chunks, and training an error."""

from __future__ import annotations

import logging
import weakref
from functools import partial

import helpers
import pytest
import torch
from helpers import Items, fit_fresh, make_loader, weights
from pairs import ModulePair

import pvae
from pvae.evidence import drawing

evidence = partial(helpers.evidence, compile=False)


def from_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def from_the_cpu():
    torch.empty(2**58, dtype=torch.uint8)  # what the allocator itself says


class Hungry(ModulePair):
    """Has memory for so many pairs of a draw and a datum."""

    def __init__(self, most, fail):
        super().__init__()
        self.most, self.fail, self.largest = most, fail, 0
        self.decoder.register_forward_hook(self.count)

    def count(self, module, inputs, output):
        pairs = inputs[0].numel() // self.latent
        if pairs > self.most:
            self.fail()
        self.largest = max(self.largest, pairs)


def sizes_said(caplog):
    return [int(r.message.split("=")[1]) for r in caplog.records if r.message.startswith("out of memory: beginning")]


@pytest.mark.parametrize("fail", [from_cuda, from_the_cpu])
@pytest.mark.parametrize("stream", [False, True])
def test_chunks_are_halved_until_there_is_memory(fail, stream, bits, caplog):
    data = make_loader(bits, batch_size=100) if stream else bits
    hungry = Hungry(300, fail)
    with caplog.at_level(logging.WARNING, "pvae"):
        estimate = evidence(hungry, data, num_samples=40, chunk_size=2000)
        log_w = pvae.log_weights(hungry.model, hungry.guide, data, num_samples=40, chunk_size=2000)
    assert sizes_said(caplog) == [1000, 500, 250] * 2
    assert hungry.largest <= 300
    hungry.most = 10**9
    reference = evidence(hungry, data, num_samples=40, chunk_size=250)
    assert torch.equal(estimate.log_px, reference.log_px)
    assert torch.equal(estimate.khat, reference.khat)
    options = {"num_samples": 40, "chunk_size": 250}
    assert torch.equal(log_w, pvae.log_weights(hungry.model, hungry.guide, data, **options))


def test_so_are_those_of_a_proposal_that_is_fitted(bits, caplog):
    hungry, options = Hungry(60, from_cuda), {"num_samples": 20, "proposal": "laplace"}
    with caplog.at_level(logging.WARNING, "pvae"):
        estimate = evidence(hungry, bits[:20], chunk_size=160, **options)
    assert sizes_said(caplog) == [80, 40]
    hungry.most = 10**9
    assert torch.equal(estimate.log_px, evidence(hungry, bits[:20], chunk_size=40, **options).log_px)


def test_the_chunk_that_is_chosen_is_halved_too(bits, caplog):
    hungry = Hungry(3000, from_cuda)
    with caplog.at_level(logging.WARNING, "pvae"):
        estimate = evidence(hungry, bits, num_samples=100)
    assert sizes_said(caplog) == [4096, 2048]
    hungry.most = 10**9
    assert torch.equal(estimate.log_px, evidence(hungry, bits, num_samples=100, chunk_size=2048).log_px)


def test_enough_memory_is_no_news(bits, caplog):
    with caplog.at_level(logging.WARNING, "pvae"):
        evidence(Hungry(10**9, from_cuda), bits, num_samples=10)
    assert not caplog.records


def test_other_errors_pass_unchanged(bits, caplog):
    def fail():
        raise RuntimeError("the disk caught fire")

    with pytest.raises(RuntimeError, match=r"^the disk caught fire"):
        evidence(Hungry(20, fail), bits, num_samples=10)
    assert not caplog.records


@pytest.mark.parametrize("fail", [from_cuda, from_the_cpu])
def test_no_memory_for_a_single_draw_is_an_error_with_its_cause(fail, bits, small_vae, caplog, monkeypatch):
    monkeypatch.setattr(drawing.Draws, "_draw_strata", lambda *_: fail())
    said = "there is no memory for even one draw of one datum at a time"
    with caplog.at_level(logging.WARNING, "pvae"), pytest.raises(MemoryError, match=said) as caught:
        evidence(small_vae, bits[:3], chunk_size=4)
    assert sizes_said(caplog) == [2, 1]
    assert "allocate" in str(caught.value.__cause__)


def test_what_is_out_of_memory_lets_go_of_it_before_the_next_attempt(bits, monkeypatch):
    held = []

    class Large:
        pass

    def chunk(*_):
        assert not any(reference() for reference in held)
        large = Large()
        held.append(weakref.ref(large))
        from_cuda()

    monkeypatch.setattr(drawing.Draws, "_draw_strata", chunk)
    pair = ModulePair()
    with pytest.raises(MemoryError):
        evidence(pair, bits[:3], chunk_size=4)
    assert len(held) == 3


@pytest.mark.parametrize("fail", [from_cuda, from_the_cpu])
def test_training_never_takes_smaller_batches_than_it_was_told_to(fail, bits):
    """The third step has no memory: parameters are those after the second."""
    hungry = Hungry(10**9, fail)
    steps = []

    def transform(x):
        steps.append(weights(hungry))
        if len(steps) == 4:  # the first is a look at the pair
            hungry.most = 63
        return x

    with pytest.raises(RuntimeError, match="allocate"):
        fit_fresh(Items(bits), pair=lambda: hungry, transform=transform)
    assert len(steps) == 4
    assert all(torch.equal(p, q) for p, q in zip(hungry.parameters(), steps[-1], strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(steps[-2], steps[-1], strict=True))
