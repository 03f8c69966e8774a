"""The streamed sums against the same formulas written out on the whole matrix, and against ArviZ."""

from __future__ import annotations

import math
import pickle
from functools import reduce

import numpy as np
import pytest
import torch

from pvae.errors import ArgumentError, NumericalError
from pvae.evidence.pareto import pareto_khat, tail_length
from pvae.evidence.weights import WeightSums, iwae_bounds

STATISTICS = ("log_px", "std_error", "ess", "khat", "elbo", "elbo_std_error")


def draws(num_samples, num_data=7, scale=1.0):
    generator = torch.Generator().manual_seed(num_samples)
    return -90 + scale * torch.randn(num_samples, num_data, generator=generator, dtype=torch.float64)


def streamed(log_weights, chunks):
    return reduce(WeightSums.merge, (WeightSums.of(c, len(log_weights)) for c in log_weights.split(chunks)))


@pytest.mark.parametrize("num_samples, chunks", [(1, [1]), (7, [3, 3, 1]), (7, [1] * 7), (250, [64, 64, 64, 58])])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_chunks_that_do_not_divide_give_the_same_estimate_as_one(num_samples, chunks, scale):
    log_weights = draws(num_samples, scale=scale)
    whole, parts = WeightSums.of(log_weights), streamed(log_weights, chunks)
    assert whole.num_samples.tolist() == parts.num_samples.tolist() == [num_samples] * 7
    for name in STATISTICS:
        # float64 sums in another order; the error of a variance is relative to K / ESS, so not to a tiny variance
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9, equal_nan=True)


def test_merging_is_the_same_in_any_order():
    a, b, c = (WeightSums.of(chunk, 60) for chunk in draws(60).split([10, 20, 30]))
    one, other = a.merge(b).merge(c), c.merge(a.merge(b))
    for name in STATISTICS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_samples", [2, 30, 500])
def test_statistics_are_their_formulas(num_samples):
    log_weights = draws(num_samples)
    sums = WeightSums.of(log_weights)
    w = (log_weights + 90).exp()
    torch.testing.assert_close(sums.log_px, w.mean(0).log() - 90)
    torch.testing.assert_close(sums.ess, w.sum(0).square() / w.square().sum(0))
    torch.testing.assert_close(sums.std_error, w.std(0) / w.mean(0) / math.sqrt(num_samples))
    torch.testing.assert_close(sums.elbo, log_weights.mean(0))
    torch.testing.assert_close(sums.elbo_std_error, log_weights.std(0) / math.sqrt(num_samples))


def test_weights_far_outside_the_floating_point_range_are_summed():
    sums = WeightSums.of(torch.tensor([[-5000.0, 5000.0], [-5000.0, 5000.0]]))
    torch.testing.assert_close(sums.log_px, torch.tensor([-5000.0, 5000.0], dtype=torch.float64))
    assert sums.ess.tolist() == [2, 2]


def test_float32_log_weights_are_summed_in_float64():
    """A million equal float32 weights: a float32 sum would be off by more than 1e-4."""
    sums = streamed(torch.full((1_000_000, 1), -90.1), 1000)
    assert sums.log_px.item() == pytest.approx(torch.tensor(-90.1).double().item(), abs=1e-9)


def test_weights_of_zero_are_weights():
    sums = WeightSums.of(torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]]))
    assert sums.log_px[0].item() == pytest.approx(-math.log(2))
    assert sums.log_px[1].item() == -torch.inf
    assert sums.elbo.tolist() == [-torch.inf, -torch.inf]
    merged = sums.merge(WeightSums.of(torch.zeros(2, 2)))
    assert merged.log_px.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 2)])
    assert merged.elbo.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_an_error_naming_the_datum(bad):
    log_weights = torch.zeros(5, 4)
    log_weights[3, 2] = bad
    with pytest.raises(NumericalError, match=r"1 of 20 log-weights.*datum 2"):
        WeightSums.of(log_weights)


def test_one_sample_has_no_error():
    sums = WeightSums.of(torch.zeros(1, 3))
    assert sums.log_px.tolist() == [0, 0, 0]
    assert sums.std_error.isnan().all()
    assert sums.elbo_std_error.isnan().all()
    assert sums.khat.isnan().all()


def test_equal_weights_have_no_variance_and_no_tail():
    sums = streamed(torch.full((1000, 3), -90.1), 64)
    assert (sums.std_error < 1e-7).all()
    assert sums.ess.tolist() == pytest.approx([1000] * 3)
    assert sums.khat.tolist() == [-torch.inf] * 3


def arviz_khat(log_weights, num_samples):
    import arviz

    by_datum = log_weights.T.numpy().copy()
    if hasattr(arviz, "psislw"):  # 0.x
        return arviz.psislw(by_datum)[1]
    if num_samples not in (40, 100, 225, 2500):
        pytest.skip("ArviZ 1.x rounds the tail's length down, so it agrees where that length is whole")
    from arviz_stats.base import array_stats

    return array_stats.psislw(-by_datum)[1]


@pytest.mark.parametrize("num_samples", [25, 26, 40, 99, 100, 225, 1000, 2500, 5000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 30.0])
def test_khat_agrees_with_arviz(num_samples, scale):
    log_weights = draws(num_samples, scale=scale)
    khat = streamed(log_weights, max(1, num_samples // 3)).khat
    np.testing.assert_allclose(khat.numpy(), arviz_khat(log_weights, num_samples), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("k", [-0.3, 0.1, 0.5, 0.9])
def test_khat_finds_the_shape_of_a_pareto_tail(k):
    """The tail of Pareto draws has shape k; the fit to M = 3 sqrt(K) of them has an sd of about (1 + k) / sqrt(M).

    Averaged over 400 data the sd is 0.004 at most; the prior's pull and the fit's bias are below 0.05.
    """
    u = torch.rand(10_000, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_weights = torch.expm1(-k * u.log()).div(k).add(1 / abs(k)).log()
    assert pareto_khat(WeightSums.of(log_weights).largest, 10_000).mean().item() == pytest.approx(k, abs=0.07)


def test_khat_is_finite_or_flagged_for_extreme_and_for_tied_weights():
    for scale in (100.0, 1000.0, 5000.0, 50_000.0):
        assert (WeightSums.of(draws(1000, scale=scale)).khat > 0.7).all()
    for heavy in (20.0, 2000.0):
        one = torch.zeros(1000, 2)
        one[0] = one[1, 1] = heavy
        assert WeightSums.of(one).khat.tolist() == [torch.inf] * 2
    mostly_nothing = torch.full((1000, 1), -torch.inf)
    mostly_nothing[:3] = torch.tensor([[0.0], [-1.0], [-2.0]])
    assert WeightSums.of(mostly_nothing).khat.item() == torch.inf
    rare = torch.zeros(1000, 1)
    rare[:20] = 1.0  # two values: bounded weights, whose tail ties with the threshold
    assert WeightSums.of(rare).khat.item() < 0.7


@pytest.mark.parametrize("num_samples, length", [(1, 1), (24, 5), (100, 20), (225, 45), (1000, 95), (100_000, 949)])
def test_tail_length(num_samples, length):
    assert tail_length(num_samples) == length


def test_memory_does_not_grow_with_the_number_of_chunks():
    sums = reduce(WeightSums.merge, (WeightSums.of(draws(100), 10_000) for _ in range(100)))
    assert sums.largest.shape == (301, 7)
    assert sums.num_samples.tolist() == [10_000] * 7
    assert sum(map(len, sums.candidates)) <= 2 * 301 + 100


@pytest.mark.parametrize("chunk, count", [(1, 600), (8, 4000), (100, 4000), (999, 4000)])
def test_going_on_chunk_by_chunk_finds_the_largest_weights(chunk, count):
    """However small the chunks, and though a chunk of descending weights has them all."""
    for log_weights in (
        draws(count),
        draws(count).sort(dim=0, descending=True).values,
        draws(count).sort(dim=0).values,
    ):
        chunks = log_weights.split(chunk)
        sums = reduce(WeightSums.add, chunks[1:], WeightSums.of(chunks[0], len(log_weights)))
        whole = WeightSums.of(log_weights)
        torch.testing.assert_close(sums.largest, whole.largest)
        for name in STATISTICS:
            torch.testing.assert_close(getattr(sums, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_sums_travel_between_processes():
    parts = [pickle.loads(pickle.dumps(WeightSums.of(chunk, 900))) for chunk in draws(900).split(300)]
    whole = WeightSums.of(draws(900))
    for name in STATISTICS:
        torch.testing.assert_close(getattr(reduce(WeightSums.merge, parts), name), getattr(whole, name))


def test_runs_of_different_lengths_know_the_largest_that_both_kept():
    """500 draws keep 69 of their largest weights and 300 keep 53: of all 800, the largest 53 are known."""
    short, long = draws(300), draws(500)
    for one in (WeightSums.of(short).merge(WeightSums.of(long)), WeightSums.of(long).merge(WeightSums.of(short))):
        known = torch.cat([short, long]).sort(dim=0, descending=True).values[:53]
        torch.testing.assert_close(one.largest, known)
        torch.testing.assert_close(one.khat, pareto_khat(known, 800))


def test_rows_are_taken_put_back_and_joined():
    log_weights = draws(200)
    whole, rows = WeightSums.of(log_weights), torch.tensor([1, 4])
    joined = WeightSums.cat([WeightSums.of(log_weights[:, :3]), WeightSums.of(log_weights[:, 3:])])
    other = WeightSums.of(draws(700)[:, rows])
    mixed = whole.put(rows, other)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
        torch.testing.assert_close(getattr(whole[rows], name), getattr(whole, name)[rows])
        torch.testing.assert_close(getattr(mixed, name)[rows], getattr(other, name))
        torch.testing.assert_close(getattr(mixed, name)[[0, 2, 3, 5, 6]], getattr(whole, name)[[0, 2, 3, 5, 6]])
    assert mixed.num_samples.tolist() == [200, 700, 200, 200, 700, 200, 200]


def test_replicates_give_the_error_of_their_means():
    chunks = draws(800).split(100)
    replicates = [WeightSums.of(chunk, 800) for chunk in chunks]
    sums = WeightSums.of_replicates(replicates)
    means = torch.stack([(chunk + 90).exp().mean(0) for chunk in chunks])
    torch.testing.assert_close(sums.log_px, means.mean(0).log() - 90)
    torch.testing.assert_close(sums.std_error, means.std(0) / 8**0.5 / means.mean(0))
    torch.testing.assert_close(sums.khat, WeightSums.of(draws(800)).khat)
    twice = sums.combine(sums)
    torch.testing.assert_close(twice.std_error, sums.std_error / 2**0.5)
    with pytest.raises(ArgumentError, match="at least 2 of them, got 1"):
        WeightSums.of_replicates(replicates[:1])


def test_bias_is_that_of_the_second_order():
    sums = WeightSums.of(draws(50))
    w = (draws(50) + 90).exp()
    torch.testing.assert_close(sums.bias, -w.var(0) / (2 * 50 * w.mean(0) ** 2))


@pytest.mark.parametrize("num_samples", [100, 225, 2500])
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0, 4.0])
def test_smoothed_weights_agree_with_arviz(num_samples, scale):
    import arviz

    log_weights = draws(num_samples, scale=scale)
    if hasattr(arviz, "psislw"):
        normalized, _ = arviz.psislw(log_weights.T.numpy().copy())
    else:
        from arviz_stats.base import array_stats

        normalized, _ = array_stats.psislw(-log_weights.T.numpy())
    normalized = torch.from_numpy(normalized).T
    # Weights outside of the tail are as they were but for the norm.
    smoothed = normalized + (log_weights.amin(0) - normalized.amin(0))
    exact = smoothed.logsumexp(0) - math.log(num_samples)
    torch.testing.assert_close(streamed(log_weights, 64).log_px_psis, exact, rtol=1e-9, atol=1e-9)


def test_smoothing_leaves_alone_what_has_no_fit():
    for log_weights in (
        torch.zeros(100, 2),
        draws(10),
        torch.full((100, 1), -torch.inf).index_fill(0, torch.tensor([0]), 0.0),
    ):
        sums = WeightSums.of(log_weights)
        assert torch.equal(sums.log_px_psis, sums.log_px)


def test_smoothing_lowers_the_error_of_heavy_weights():
    """Log-normal weights of sd 2, K = 300, 2,000 data: the spread of the smoothed p-hat is the smaller."""
    w = 2 * torch.randn(300, 2000, generator=torch.Generator().manual_seed(0)) - 2
    sums = WeightSums.of(w)
    plain, smooth = sums.log_px.exp(), sums.log_px_psis.exp()
    assert (smooth - 1).square().mean() < 0.9 * (plain - 1).square().mean()


# --- the curve of bounds ------------------------------------------------------------------------------------------


def test_iwae_bounds_are_group_means():
    log_weights = draws(12)
    bounds, errors = iwae_bounds(log_weights, [1, 3, 5, 12])
    torch.testing.assert_close(bounds[0], log_weights.mean(0))
    groups = log_weights.reshape(4, 3, -1).logsumexp(1) - math.log(3)
    torch.testing.assert_close(bounds[1], groups.mean(0))
    torch.testing.assert_close(errors[1], groups.std(0) / 2)
    torch.testing.assert_close(bounds[2], (log_weights[:10].reshape(2, 5, -1).logsumexp(1) - math.log(5)).mean(0))
    torch.testing.assert_close(bounds[3], WeightSums.of(log_weights).log_px)
    assert errors[3].isnan().all()


def test_iwae_bounds_rise_with_k():
    """Where each k divides the next, by Jensen's inequality on the very same weights."""
    bounds, _ = iwae_bounds(draws(1024, num_data=50, scale=3.0), [1, 2, 8, 64, 1024])
    assert (bounds.diff(dim=0) > 0).all()


@pytest.mark.parametrize("k, match", [(0, "num_samples must be a whole number"), (13, "at most K = 12.*got 13")])
def test_impossible_groups_are_named(k, match):
    with pytest.raises(ArgumentError, match=match):
        iwae_bounds(draws(12), [k])
