from __future__ import annotations

from itertools import pairwise

import pytest
from helpers import fit

import pvae
from pvae import schedules


def values(schedule, epochs):
    return [round(schedule(epoch), 10) for epoch in range(1, epochs + 1)]


def test_a_warmup_rises_linearly_and_stays():
    assert values(schedules.linear_warmup(4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert values(schedules.linear_warmup(2, start=0.5), 3) == [0.75, 1.0, 1.0]
    assert values(schedules.linear_warmup(2, end=4.0), 3) == [2.0, 4.0, 4.0]


def test_cycles():
    assert values(schedules.cyclical(8, 2), 10) == [0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert values(schedules.cyclical(8, 2, rise=1.0, start=0.2), 4) == [0.4, 0.6, 0.8, 1.0]
    assert values(schedules.cyclical(3, 3), 4) == [1.0] * 4
    for epochs, cycles in ((10, 4), (7, 3), (100, 4)):
        weights = values(schedules.cyclical(epochs, cycles), epochs + 1)
        assert weights[-2:] == [1.0, 1.0]
        assert sum(b < a for a, b in pairwise(weights)) == cycles - 1


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: schedules.linear_warmup(0), "epochs"),
        (lambda: schedules.linear_warmup(3, start=-1.0), "start"),
        (lambda: schedules.linear_warmup(3, end=float("nan")), "end"),
        (lambda: schedules.cyclical(3, 4), "cycles"),
        (lambda: schedules.cyclical(8, rise=0.0), "rise"),
        (lambda: schedules.cyclical(8, rise=True), "rise"),
    ],
)
def test_what_makes_no_sense_is_refused(make, name):
    with pytest.raises(pvae.ArgumentError, match=name):
        make()


def test_fit_takes_them(bits, small_vae):
    history = fit(small_vae, bits, epochs=4, kl_weight=schedules.cyclical(4, 2, rise=1.0), validation=bits[:50]).history
    assert history["kl_weight"].tolist() == [0.5, 1.0, 0.5, 1.0]
