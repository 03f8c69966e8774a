"""Arrays as data: what is taken, what is refused, and what the error says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pvae.data.arrays import as_tensors
from pvae.errors import DataError


def test_one_array_or_several():
    x, y = torch.zeros(3, 2), np.ones((3,), dtype=np.int64)
    assert [t.shape for t in as_tensors("data", x)] == [(3, 2)]
    assert [t.dtype for t in as_tensors("data", (x, y))] == [torch.float32, torch.int64]
    assert as_tensors("data", [x, y])[0] is x


def test_numpy_data_share_memory():
    x = np.zeros((3, 2), dtype=np.float32)
    assert as_tensors("data", x)[0].numpy().base is x or np.shares_memory(as_tensors("data", x)[0].numpy(), x)


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x[::-1][::-1],
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(x.dtype.newbyteorder(">")),
        lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),  # read-only
    ],
    ids=["strides", "fortran", "big-endian", "read-only"],
)
def test_odd_numpy_arrays_are_taken(odd):
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert as_tensors("data", odd(x)[::-1].copy()[::-1])[0].tolist() == x.tolist()
    assert as_tensors("data", odd(x))[0].tolist() == x.tolist()


@pytest.mark.parametrize(
    "data, match",
    [
        ("images", "str"),
        ([1.0, 2.0], "float"),
        (np.array(["a", "b"]), "dtype <U1"),
        (np.array([None, 1]), "dtype object"),
        ((), "empty sequence"),
        (torch.tensor(1.0), "leading dimension"),
        ((torch.zeros(3), torch.zeros(4)), r"\[\(3,\), \(4,\)\]"),
        (torch.zeros(0, 5), r"empty.*\(0, 5\)"),
        (torch.zeros(5, 0), "empty"),
    ],
)
def test_what_is_no_data_is_refused(data, match):
    with pytest.raises(DataError, match=f"x_train.*{match}"):
        as_tensors("x_train", data)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_entries_that_are_not_finite_are_counted_and_the_first_is_named(bad, dtype):
    x = torch.zeros(5, 3, dtype=dtype)
    x[2, 1] = x[4, 0] = bad
    with pytest.raises(DataError, match=r"data holds 2 nan or infinite entries, the first at index \(2, 1\)"):
        as_tensors("data", x)
    with pytest.raises(DataError, match=r"data\[1\] holds 2"):
        as_tensors("data", (torch.zeros(5), x))


def test_infinities_that_cancel_are_found():
    with pytest.raises(DataError, match="2 nan or infinite"):
        as_tensors("data", torch.tensor([torch.inf, -torch.inf]))


def test_large_but_finite_entries_are_fine():
    for x in (torch.full((1000,), 3e38), torch.full((1000,), 1e308, dtype=torch.float64)):
        assert as_tensors("data", x)[0] is x
