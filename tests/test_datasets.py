from __future__ import annotations

import gzip
import hashlib
import http.client
import pwd
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import end_lines, execute, fork

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


def test_labels_in_another_order_are_noticed(small_mnist):
    path = small_mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes(sorted(content[8:])))
    with pytest.raises(DatasetError, match="train-labels-idx1-ubyte has the MD5"):
        datasets.mnist(small_mnist)


@pytest.mark.parametrize("file", range(4))
def test_one_bit_in_any_file_is_noticed(small_mnist, file):
    path = small_mnist / "MNIST" / "raw" / datasets._MNIST[file].name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"{path.name} has the MD5"):
        datasets.mnist(small_mnist)


def test_any_bit_of_a_gz_is_noticed_or_means_nothing(small_mnist):
    """Some bits of its header, such as the time of packing, say nothing of the data."""
    raw, file = small_mnist / "MNIST" / "raw", datasets._MNIST[3]
    labels = datasets._read(raw, file)
    packed = gzip.compress((raw / file.name).read_bytes(), mtime=0)
    (raw / file.name).unlink()
    noticed = 0
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        (raw / f"{file.name}.gz").write_bytes(damaged)
        try:
            assert torch.equal(datasets._read(raw, file), labels)
        except DatasetError:
            noticed += 1
    assert noticed > 8 * (len(packed) - 10)  # all but some of the ten bytes of the header


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


@pytest.mark.parametrize(
    "error, match",
    [
        (AssertionError(), "AssertionError"),  # torchvision's, of a page in place of a file
        (http.client.IncompleteRead(b"", 7), "IncompleteRead"),
        (zlib.error("invalid distance"), "invalid distance"),
        (EOFError("ended before the end-of-stream marker"), "ended before"),
    ],
)
def test_whatever_a_download_fails_of(source, error, match, tmp_path_factory):
    fake, _ = source
    fake.error = error
    with pytest.raises(DatasetError, match=rf"downloading it failed: .*{match}.*PVAE_DATA"):
        datasets.mnist(tmp_path_factory.mktemp("cache"))


SLOW_TORCHVISION = """
import os, time
from pathlib import Path

source, marks, fast = Path(os.environ["SOURCE"]), Path(os.environ["MARKS"]), os.environ["ROLE"] == "fast"

def wait_for(mark):
    end = time.monotonic() + 60
    while not (marks / mark).exists():
        if time.monotonic() > end:
            raise RuntimeError(f"waited in vain for {mark}")
        time.sleep(0.01)

class MNIST:
    def __init__(self, root, download):
        folder = Path(root) / "MNIST" / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        contents = {folder / path.name: path.read_bytes() for path in source.iterdir()}
        files = {path: path.open("wb") for path in contents}
        for path, file in files.items():
            file.write(contents[path] if fast else contents[path][:1000])
            file.flush()
        if fast:
            wait_for("half")
        else:
            (marks / "half").touch()
            wait_for("done")
        for path, file in files.items():
            file.write(b"" if fast else contents[path][1000:])
            file.close()
"""

PREPARES = """
import hashlib, os
from pathlib import Path
from pvae import datasets

source = Path(os.environ["SOURCE"])
shapes = ((60, 28, 28), (60,), (20, 28, 28), (20,))
md5 = lambda name: hashlib.md5((source / name).read_bytes()).hexdigest()
datasets._MNIST = tuple(datasets._File(f.name, md5(f.name), s) for f, s in zip(datasets._MNIST, shapes))
data = datasets.mnist(binarization="none")
tensors = (data.train_x, data.train_y, data.test_x, data.test_y)
print(*(hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors))
if os.environ["ROLE"] == "fast":
    (Path(os.environ["MARKS"]) / "done").touch()
"""


def test_two_processes_may_prepare_one_folder(small_mnist, tmp_path_factory):
    """One begins to download while the other is about to look at what it has, and ends when that one is done."""
    tmp = tmp_path_factory.mktemp("two")
    fake, marks, cache = tmp / "fake" / "torchvision", tmp / "marks", tmp / "cache"
    for folder in (fake, marks):
        folder.mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "datasets.py").write_text(SLOW_TORCHVISION)
    source = small_mnist / "MNIST" / "raw"
    runs = {}
    for role in ("fast", "slow"):
        settings = {"PVAE_DATA": str(cache), "SOURCE": str(source), "MARKS": str(marks), "ROLE": role}
        code = f"import os, sys\nsys.path.insert(0, {str(fake.parent)!r})\nos.environ.update({settings})\n{PREPARES}"
        runs[fork(execute, code, output=tmp / role)] = tmp / role
    printed = [end_lines(process, output)[0].split() for process, output in runs.items()]
    data = datasets.mnist(small_mnist, "none")
    tensors = (data.train_x, data.train_y, data.test_x, data.test_y)
    expected = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors]
    assert printed == [expected] * 2
    assert [output.with_suffix(".errors").read_text() for output in runs.values()] == [""] * 2
    assert [path.name for path in cache.iterdir()] == ["MNIST"]
    written = {path.name: path.read_bytes() for path in (cache / "MNIST" / "raw").iterdir()}
    assert written == {path.name: path.read_bytes() for path in source.iterdir()}


@pytest.mark.parametrize("name", ["sklearn.datasets", "sklearn.model_selection"])
def test_without_scikit_learn_the_digits_say_so(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DatasetError, match="digits come with scikit-learn, which cannot be imported"):
        datasets.digits()


def test_without_torchvision_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DatasetError, match="torchvision cannot be imported"):
        datasets.mnist(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file"):
        datasets.mnist(tmp_path / "file" / "below")


def test_a_folder_that_cannot_be_looked_into(small_mnist):
    with pytest.raises(DatasetError, match="would download to"):
        datasets.mnist(small_mnist / ("x" * 300))  # too long for a file system


def test_a_home_that_nobody_has(small_mnist, monkeypatch):
    """As in a container that runs under a number without a name."""

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for variable in ("HOME", "PVAE_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(DatasetError, match=r"~/\.cache/pvae is in nobody's home: set PVAE_DATA"):
        datasets.mnist()
    assert len(datasets.mnist(small_mnist, "none").train_x) == 60


def test_fresh_bits_have_the_probabilities_asked_for():
    """Four million bits for each grey level, so the largest sd is 0.00025; 5 sigma. Zero and one are certain."""
    x = torch.tensor([0.0, 1 / 255, 0.3, 254 / 255, 1.0]).expand(4_000_000, 5)
    bits = datasets.fresh_bits(x)
    assert bits.dtype == x.dtype
    assert set(bits.unique().tolist()) == {0.0, 1.0}
    sd = (x[0] * (1 - x[0]) / len(x)).sqrt()
    assert ((bits.mean(0) - x[0]).abs() <= 5 * sd).all()
    assert not torch.equal(datasets.fresh_bits(x[:9]), datasets.fresh_bits(x[:9]))
