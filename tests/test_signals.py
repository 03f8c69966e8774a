"""The first signal ends a run in good order, the second one at once; and handlers are put back."""

from __future__ import annotations

import copy
import os
import signal
import threading

import pytest
from helpers import assert_same_run, train
from pairs import ModulePair

from pvae.svi.validation import Validation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_step_and_handlers_are_put_back(number, bits, interrupt):
    def own(*_):
        raise AssertionError

    outside = signal.signal(signal.SIGTERM, own)
    try:
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        interrupt(3, number)
        result = train(ModulePair(), bits)
        assert (result.stopped, result.signal) == ("signal", number)
        assert "stopped by signal" in repr(result)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        assert train(ModulePair(), bits).stopped == "epochs"
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGTERM, outside)


def test_the_second_ctrl_c_is_immediate(bits, interrupt):
    interrupt(3, signal.SIGINT, times=2)
    pair = ModulePair()
    with pytest.raises(KeyboardInterrupt):
        train(pair, bits)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert all(p.grad is None for p in pair.parameters())


def test_a_signal_in_validation_or_a_callback_is_heeded_at_the_epochs_end(bits, tmp_path):
    def callback(record):
        if record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    result = train(ModulePair(), bits, callback=callback, checkpoint=tmp_path)
    assert (result.stopped, len(result.history["elbo"])) == ("signal", 2)
    assert result.checkpoint == tmp_path / "epoch-000002"


def test_a_signal_in_a_nested_fit_is_for_both(bits):
    inner = []

    def callback(record):
        taken = {"callback": lambda record: os.kill(os.getpid(), signal.SIGTERM)}
        inner.append(train(ModulePair(), bits, **taken))

    outer = train(ModulePair(), bits, callback=callback)
    assert [inner[0].stopped, outer.stopped] == ["signal", "signal"]
    assert len(outer.history["elbo"]) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_during_validation_leaves_it(bits, tmp_path, monkeypatch):
    """The steps of the epoch are saved, and what follows them is done when the run goes on."""
    whole = ModulePair()
    stopped, other = copy.deepcopy(whole), ModulePair()
    reference = train(whole, bits, validation=bits)
    seen, original = [], Validation._isolate

    def isolate(self):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_isolate", isolate)
        first = train(stopped, bits, validation=bits, checkpoint=tmp_path)
    assert first.checkpoint.name == "epoch-000001-step-0000005"
    result = train(other, bits, validation=bits, checkpoint=tmp_path, resume="auto")
    assert_same_run((other, result), (whole, reference))


def test_other_threads_train_without_handlers(bits):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(ModulePair(), bits, epochs=1)))
    thread.start()
    thread.join()
    assert results[0].stopped == "epochs"


def test_signals_that_the_process_ignores_stay_ignored(bits, interrupt):
    outside = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        interrupt(3, signal.SIGINT)
        assert train(ModulePair(), bits).stopped == "epochs"
    finally:
        signal.signal(signal.SIGINT, outside)
