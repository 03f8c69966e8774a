"""Datasets whose files are verified and whose binarization has a name.

A Bernoulli likelihood needs bits, and numbers for different ways to make bits are not comparable, so each way is named
and reported beside every result:

- ``"none"``: grey levels in [0, 1], as they are.
- ``"threshold"``: 1 where the grey level is above 0.5.
- ``"static"``: each bit drawn once with the grey level as its probability, by seed, for training and test alike.
- ``"dynamic"``: training bits drawn afresh for each batch, by ``transform``; test bits drawn once, by seed.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import socket
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pvae.errors import ArgumentError, DataError, DatasetError, folder_path, one_of

__all__ = ["BINARIZATIONS", "Dataset", "binarize", "digits", "fresh_bits", "mnist"]

BINARIZATIONS = ("none", "threshold", "static", "dynamic")
"""What `mnist` and `digits` can make of grey pixels."""


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images with labels, split for training and test.

    Attributes:
        name: ``"mnist"`` or ``"digits"``.
        binarization: One of `BINARIZATIONS`.
        train_x: Shape ``(N, H, W)``, float32 in [0, 1]; grey where binarization is ``"none"`` or ``"dynamic"``.
        train_y: Labels, shape ``(N,)``, int64.
        test_x: Shape ``(M, H, W)``, float32; grey where binarization is ``"none"``, else bits.
        test_y: Labels, shape ``(M,)``, int64.
        transform: For ``"dynamic"``, draws fresh bits from a batch, on its device; else None. Pass it on to `pvae.fit`.
    """

    name: str
    binarization: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    transform: Callable[[Tensor], Tensor] | None

    def __repr__(self) -> str:
        train, test = tuple(self.train_x.shape), tuple(self.test_x.shape)
        return f"Dataset({self.name}, {self.binarization} binarization, training {train}, test {test})"


def binarize(x: Tensor, how: str, *, seed: int = 0) -> Tensor:
    """Makes bits of grey levels.

    Args:
        x: Grey levels in [0, 1], any shape; integers and booleans become float32.
        how: ``"threshold"``: 1 where ``x > 0.5``. ``"static"``: 1 with probability ``x``.
        seed: For ``"static"``: same seed, same bits.

    Returns:
        Zeros and ones, of the shape of ``x`` and its floating dtype.

    Raises:
        DataError: ``x`` is no tensor, is empty, or has values outside [0, 1].
    """
    one_of("how", how, ("threshold", "static"))
    if not isinstance(x, Tensor) or not x.numel():
        raise DataError(f"x must be a tensor with at least one entry, got {x!r}.")
    x = x if x.is_floating_point() else x.float()
    low, high = x.min().item(), x.max().item()
    if not 0 <= low <= high <= 1:
        raise DataError(f"x must be grey levels in [0, 1] to be binarized, got {low:g} to {high:g}. Rescale x first.")
    if how == "threshold":
        return (x > 0.5).to(x.dtype)
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.bernoulli(x, generator=generator)


def fresh_bits(x: Tensor) -> Tensor:
    """Bits that are 1 with probability ``x``, drawn anew in each call: dynamic binarization, as a transform.

    The same as ``torch.bernoulli``, whose kernel takes four times as long on a CPU.

    Args:
        x: Grey levels in [0, 1], floating point, any shape.
    """
    return (torch.rand_like(x) < x).to(x.dtype)


def mnist(root: str | os.PathLike[str] | None = None, binarization: str = "dynamic", *, seed: int = 0) -> Dataset:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28.

    Reads the four IDX files (or their ``.gz``) in ``root/MNIST/raw``, where torchvision puts them, or in ``root``
    itself; downloads them through torchvision if they are not there. Every file's header and MD5 are checked.

    Args:
        root: The folder; by default ``$PVAE_DATA``, else ``pvae`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        binarization: One of `BINARIZATIONS`.
        seed: Of the bits that are drawn once.

    Raises:
        DatasetError: A file is damaged, or missing and cannot be downloaded. Says which, and what to do.

    Source: LeCun, Cortes and Burges, 1998; dynamic binarization: Salakhutdinov and Murray, 2008.
    """
    one_of("binarization", binarization, BINARIZATIONS)
    root = _root(root)
    folder = _find_folder(root) or _download(root)
    train_x, train_y, test_x, test_y = (_read(folder, file) for file in _MNIST)
    return _make_dataset("mnist", binarization, (train_x / 255, train_y.long()), (test_x / 255, test_y.long()), seed)


def digits(binarization: str = "threshold", *, seed: int = 0) -> Dataset:
    """scikit-learn's handwritten digits: 1,437 training and 360 test images, 8 x 8. Comes with scikit-learn.

    Args:
        binarization: One of `BINARIZATIONS`.
        seed: Of the bits that are drawn once. The split is always the same.

    Raises:
        DatasetError: scikit-learn cannot be imported.

    Source: Alpaydin and Kaynak, 1998, Optical Recognition of Handwritten Digits.

    Example:
        >>> import pvae
        >>> data = pvae.datasets.digits()
        >>> data.test_x.shape[1:]
        torch.Size([8, 8])
        >>> data.train_x.unique().tolist()
        [0.0, 1.0]
    """
    one_of("binarization", binarization, BINARIZATIONS)
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except Exception as error:  # a broken installation fails in many ways
        raise DatasetError(f"the digits come with scikit-learn, which cannot be imported: {error}.") from error
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8).astype(np.float32)  # 17 grey levels, 0 to 16
    split = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return _make_dataset("digits", binarization, (train_x, train_y), (test_x, test_y), seed)


def _make_dataset(
    name: str, binarization: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int
) -> Dataset:
    """Binarizes images of training and test, each with labels."""
    (train_x, train_y), (test_x, test_y) = train, test
    if binarization in ("threshold", "static"):
        train_x = binarize(train_x, binarization, seed=seed)
    if binarization != "none":
        test_x = binarize(test_x, "threshold" if binarization == "threshold" else "static", seed=seed + 1)
    transform = fresh_bits if binarization == "dynamic" else None
    return Dataset(name, binarization, train_x, train_y, test_x, test_y, transform)


# --- MNIST's files ------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    name: str
    md5: str
    shape: tuple[int, ...]


_MNIST = (
    _File("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)),
    _File("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624", (60_000,)),
    _File("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)),
    _File("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637", (10_000,)),
)


def _root(chosen: str | os.PathLike[str] | None) -> Path:
    if chosen is None:
        chosen = os.environ.get("PVAE_DATA") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pvae")
    try:
        return folder_path("root", chosen)
    except ArgumentError as error:
        if not str(chosen).startswith("~"):
            raise
        # As in a container whose user has no name.
        raise DatasetError(f"{chosen} is in nobody's home: set PVAE_DATA to a folder, or pass root=.") from error


def _path(folder: Path, name: str) -> Path | None:
    # Not `Path.is_file`, which raises where a folder may not be looked into.
    return next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)


def _find_folder(root: Path) -> Path | None:
    """The folder below ``root`` with all four files, if there is one."""
    folders = (root / "MNIST" / "raw", root)
    return next((f for f in folders if all(_path(f, file.name) for file in _MNIST)), None)


def _read(folder: Path, file: _File) -> Tensor:
    """Reads and verifies one IDX file: two zero bytes, the type (8: unsigned bytes), the rank, the sizes, the data."""
    path = _path(folder, file.name)
    if path is None:
        raise DatasetError(f"{folder / file.name} is missing.")
    mend = "Delete it, and it is downloaded again; or put the original file there."
    header = 4 + 4 * len(file.shape)
    size = header + math.prod(file.shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            content = stream.read(size + 1)  # no more: what is packed may be a thousand times as large
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}. {mend}") from error
    magic = bytes([0, 0, 8, len(file.shape)])
    if content[:4] != magic:
        raise DatasetError(f"{path} is not an IDX file: it begins with {content[:16]!r}, expected {magic!r}. {mend}")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    if shape != file.shape or len(content) != size:
        held = f"{'at least ' if len(content) > size else ''}{len(content) - header}"
        raise DatasetError(
            f"{path} declares the shape {shape} and holds {held} bytes of data, expected "
            f"{file.shape} and {math.prod(file.shape)} bytes. {mend}"
        )
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != file.md5:
        raise DatasetError(f"{path} has the MD5 {md5}, expected {file.md5}: its data are damaged. {mend}")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def _download(root: Path) -> Path:
    """Downloads MNIST through torchvision, verifies it, and only then moves it to ``root/MNIST/raw``."""
    missing = f"MNIST is not in {root}"
    manual = (
        f"Put the four IDX files into {root / 'MNIST' / 'raw'}, set PVAE_DATA to a folder that has them, or use "
        "pvae.datasets.digits(), which needs no files."
    )
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # a torchvision built for another torch fails in many ways
        raise DatasetError(
            f"{missing}, and torchvision cannot be imported to download it: {error}. {manual}"
        ) from error
    folder = root / "MNIST" / "raw"
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            socket.setdefaulttimeout(20)  # torchvision sets none, and a silent network would hang for minutes
            MNIST(scratch, download=True)
            for file in _MNIST:
                _read(Path(scratch) / "MNIST" / "raw", file)
                os.replace(Path(scratch) / "MNIST" / "raw" / file.name, folder / file.name)
    except Exception as error:  # so do networks, and torchvision's look at what came
        reason = " ".join(str(error).split()) or type(error).__name__  # torchvision's runs over many lines
        raise DatasetError(f"{missing}, and downloading it failed: {reason}. {manual}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return folder
