from __future__ import annotations

import gzip
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pvae import datasets
from pvae.errors import ArgumentError, DataError, DatasetError

SHAPES = ((60, 28, 28), (60,), (20, 28, 28), (20,))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def small_mnist(monkeypatch, tmp_path):
    """A folder with files like MNIST's, only shorter, whose shapes and MD5 are the expected ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    files = []
    for file, shape in zip(datasets._MNIST, SHAPES, strict=True):
        content = idx(rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8))
        (folder / file.name).write_bytes(content)
        files.append(datasets._File(file.name, hashlib.md5(content).hexdigest(), shape))
    monkeypatch.setattr(datasets, "_MNIST", tuple(files))
    monkeypatch.setattr(datasets, "_download", no_download)
    return tmp_path


def no_download(root):
    raise DatasetError(f"would download to {root}")


@pytest.fixture(params=["mnist", "digits"])
def load(request, small_mnist):
    def call(binarization, **options):
        if request.param == "mnist":
            return datasets.mnist(small_mnist, binarization, **options)
        return datasets.digits(binarization, **options)

    return call


def test_shapes_and_types(load):
    data = load("none")
    assert data.train_x.shape[1:] == data.test_x.shape[1:]
    assert len(data.train_x) == len(data.train_y) > len(data.test_x) == len(data.test_y)
    assert data.train_x.dtype == torch.float32
    assert data.train_y.dtype == torch.int64
    assert set(data.train_y.tolist()) == set(range(10))
    assert data.train_x.min() == 0
    assert data.train_x.max() == 1
    assert data.transform is None
    assert data.name in ("mnist", "digits")
    assert len(repr(data)) < 100


@pytest.mark.parametrize("how", ["threshold", "static"])
def test_final_bits(load, how):
    grey, data = load("none"), load(how)
    for bits in (data.train_x, data.test_x):
        assert set(bits.unique().tolist()) == {0.0, 1.0}
    assert data.transform is None
    assert data.binarization == how
    if how == "threshold":
        assert torch.equal(data.train_x, (grey.train_x > 0.5).float())


def test_static_bits_are_drawn_once_by_seed(load):
    first, again, other = load("static", seed=1), load("static", seed=1), load("static", seed=2)
    assert torch.equal(first.train_x, again.train_x)
    assert torch.equal(first.test_x, again.test_x)
    assert not torch.equal(first.train_x, other.train_x)
    assert not torch.equal(first.test_x, other.test_x)


def test_dynamic_bits_are_fresh_for_each_batch(load):
    grey, data = load("none"), load("dynamic")
    assert torch.equal(data.train_x, grey.train_x)
    batch = data.train_x[:50]
    first, second = data.transform(batch), data.transform(batch)
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first, second)
    assert set(data.test_x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(data.test_x, load("dynamic").test_x)


def test_bits_have_the_grey_level_as_probability():
    """sd of the mean of 40,000 bits is at most 0.0025; 6 sigma fails once in 5e8."""
    for level in (0.0, 0.2, 0.5, 1.0):
        bits = datasets.binarize(torch.full((40_000,), level), "static", seed=3)
        assert bits.mean().item() == pytest.approx(level, abs=6 * 0.0025 if 0 < level < 1 else 0)


def test_loading_leaves_the_callers_state(load, caller_state):
    before = caller_state()
    load("static")
    load("dynamic")
    before.assert_unchanged()


def test_the_digits_split_is_stratified_and_disjoint():
    data = datasets.digits("none")
    assert data.train_x.shape == (1437, 8, 8)
    assert data.test_x.shape == (360, 8, 8)
    assert (torch.bincount(data.test_y) >= 34).all()
    assert torch.equal(data.test_x, datasets.digits("none").test_x)


def test_unknown_names():
    for call in (datasets.digits, lambda name: datasets.mnist("/nowhere", name)):
        with pytest.raises(ArgumentError, match=r"binarization.*'dynamic'.*'binary'"):
            call("binary")
    with pytest.raises(ArgumentError, match="how"):
        datasets.binarize(torch.zeros(3), "dynamic")


def test_integer_and_boolean_levels_are_binarized():
    for x in (torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([False, True])):
        for how in ("threshold", "static"):
            assert datasets.binarize(x, how).tolist() == [0.0, 1.0]
    for x in (torch.zeros(0), np.zeros(3)):
        with pytest.raises(DataError, match="tensor with at least one entry"):
            datasets.binarize(x, "static")


@pytest.mark.parametrize("x", [torch.tensor([0.0, 255.0]), torch.tensor([-0.1, 1.0]), torch.tensor([0.0, torch.nan])])
def test_only_grey_levels_can_be_binarized(x):
    with pytest.raises(DataError, match="grey levels"):
        datasets.binarize(x, "static")


def test_files_are_found_in_the_folder_itself_and_compressed(small_mnist, tmp_path):
    plain = datasets.mnist(small_mnist, "none")
    for path in (small_mnist / "MNIST" / "raw").iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert torch.equal(datasets.mnist(tmp_path, "none").train_x, plain.train_x)


def test_default_folder(small_mnist, monkeypatch):
    monkeypatch.setenv("PVAE_DATA", str(small_mnist))
    assert len(datasets.mnist(binarization="none").train_x) == 60
    monkeypatch.delenv("PVAE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    with pytest.raises(DatasetError, match="/somewhere/pvae"):
        datasets.mnist()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(DatasetError, match=r"/home/me/\.cache/pvae"):
        datasets.mnist()


def flip_a_bit(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda c: c[:-1], "47039 bytes"),
        (lambda c: c[:7], "expected"),
        (lambda c: b"", "not an IDX file"),
        (lambda c: b"<!DOCTYPE html><html>not found</html>", "not an IDX file.*DOCTYPE"),
        (lambda c: idx(np.zeros((59, 28, 28), np.uint8)), r"\(59, 28, 28\)"),
        (flip_a_bit, "MD5"),
    ],
    ids=["truncated", "header-only", "empty", "html", "count", "bit"],
)
def test_damaged_files_are_named(small_mnist, damage, match):
    path = small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=f"train-images-idx3-ubyte.*{match}.*Delete it"):
        datasets.mnist(small_mnist)


def test_swapped_labels_are_noticed(small_mnist):
    raw = small_mnist / "MNIST" / "raw"
    swapped = (raw / "t10k-labels-idx1-ubyte").read_bytes()
    (raw / "t10k-labels-idx1-ubyte").write_bytes((raw / "train-labels-idx1-ubyte").read_bytes())
    (raw / "train-labels-idx1-ubyte").write_bytes(swapped)
    with pytest.raises(DatasetError, match="train-labels"):
        datasets.mnist(small_mnist)


@pytest.mark.parametrize("content", [b"<html>", gzip.compress(b"x" * 1000, mtime=0)[:20]], ids=["html", "half"])
def test_html_or_half_a_gz_is_named(small_mnist, content):
    path = small_mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.unlink()
    Path(f"{path}.gz").write_bytes(content)
    with pytest.raises(DatasetError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        datasets.mnist(small_mnist)


@pytest.fixture
def source(small_mnist, tmp_path_factory, monkeypatch):
    """torchvision's downloader, faked: it copies from the small MNIST."""
    import torchvision

    monkeypatch.undo()  # the real _download again
    raw = small_mnist / "MNIST" / "raw"
    files = tuple(
        datasets._File(f.name, hashlib.md5((raw / f.name).read_bytes()).hexdigest(), s)
        for f, s in zip(datasets._MNIST, SHAPES, strict=True)
    )
    monkeypatch.setattr(datasets, "_MNIST", files)

    class Fake:
        error: Exception | None = None

        def __init__(self, root, download):
            assert download
            folder = Path(root) / "MNIST" / "raw"
            folder.mkdir(parents=True)
            for path in raw.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            if self.error:
                raise self.error

    monkeypatch.setattr(torchvision.datasets, "MNIST", Fake)
    return Fake, raw


def test_downloads_once_and_verifies(source, tmp_path_factory):
    fake, _ = source
    root = tmp_path_factory.mktemp("cache") / "pvae"
    assert len(datasets.mnist(root, "none").train_x) == 60
    assert sorted(p.name for p in root.iterdir()) == ["MNIST"], "the scratch folder is gone"
    fake.error = RuntimeError("must not be asked again")
    assert len(datasets.mnist(root, "none").test_x) == 20


def test_a_download_that_lacks_a_file_is_named(source, tmp_path_factory):
    _, raw = source
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DatasetError, match="t10k-labels-idx1-ubyte is missing"):
        datasets.mnist(tmp_path_factory.mktemp("cache"))


def test_a_failed_download_says_what_to_do_and_leaves_nothing(source, tmp_path_factory):
    fake, _ = source
    fake.error = RuntimeError("Error downloading train-images-idx3-ubyte.gz")
    root = tmp_path_factory.mktemp("cache")
    with pytest.raises(DatasetError, match=r"not in .*Error downloading.*PVAE_DATA.*digits\(\)"):
        datasets.mnist(root)
    assert not list((root / "MNIST" / "raw").iterdir())


def test_a_damaged_download_is_never_installed(source, tmp_path_factory):
    _, raw = source
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(flip_a_bit(path.read_bytes()))
    root = tmp_path_factory.mktemp("cache")
    with pytest.raises(DatasetError, match="MD5"):
        datasets.mnist(root)
    assert not list((root / "MNIST" / "raw").iterdir())


def test_without_torchvision_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DatasetError, match="torchvision cannot be imported"):
        datasets.mnist(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file"):
        datasets.mnist(tmp_path / "file" / "below")


def test_fresh_bits_have_the_probabilities_asked_for():
    """Four million bits for each grey level, so the largest sd is 0.00025; 5 sigma. Zero and one are certain."""
    x = torch.tensor([0.0, 1 / 255, 0.3, 254 / 255, 1.0]).expand(4_000_000, 5)
    bits = datasets.fresh_bits(x)
    assert bits.dtype == x.dtype
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    sd = (x[0] * (1 - x[0]) / len(x)).sqrt()
    assert ((bits.mean(0) - x[0]).abs() <= 5 * sd).all()
    assert not torch.equal(datasets.fresh_bits(x[:9]), datasets.fresh_bits(x[:9]))
