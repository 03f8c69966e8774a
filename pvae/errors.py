"""What pvae raises, and the argument checks that raise it.

Every error names the argument, file or site, what was expected, what came, and what to do next.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "DatasetError",
    "DeviceError",
    "NumericalError",
    "PVAEError",
    "ProgramError",
    "RankError",
    "first_line",
    "folder_path",
    "one_of",
    "positive_int",
    "positive_ints",
    "real_number",
    "warn",
    "yes_no_or_auto",
]

_OURS = ("pvae", "torch", "pyro", "contextlib", "functools")


class PVAEError(Exception):
    """Base class of every error that pvae raises on purpose."""


class ArgumentError(PVAEError, ValueError):
    """An argument has a value that makes no sense, such as ``num_samples=0``."""


class DataError(PVAEError, ValueError):
    """The data do not fit: not finite, empty, of another shape, or outside a likelihood's support."""


class ProgramError(PVAEError, ValueError):
    """A model and a guide do not fit each other, or lack what an estimate per datum needs."""


class DeviceError(PVAEError, RuntimeError):
    """A device was asked for that this machine does not have."""


class NumericalError(PVAEError, ArithmeticError):
    """A loss, a gradient or a log-weight became nan or infinite."""


class CheckpointError(PVAEError, OSError):
    """Saved files cannot be written, are damaged, or belong to another model or run."""


class RankError(PVAEError, RuntimeError):
    """The processes that train together were called differently, or lost contact."""


class DatasetError(PVAEError, OSError):
    """A dataset's files are missing, damaged, or cannot be downloaded."""


def warn(message: str) -> None:
    """Issues a ``UserWarning`` that points at the line from which pvae was called, however deep the cause lies."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
    space = frame.f_globals
    # The registry of that module: a second caller of the same function is warned, too.
    registry = space.setdefault("__warningregistry__", {})
    name = space.get("__name__", "<unknown>")
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, name, registry)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or its class where it says nothing; some go on with pages."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def folder_path(name: str, path: Any) -> Path:
    """A path that stays where it is when the process goes to another folder, or raises `ArgumentError`."""
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ArgumentError(f"{name} must be the path of a folder, got {path!r}.")
    if "\0" in str(path):
        raise ArgumentError(f"{name} must be the path of a folder, got {path!r}: no path has a NUL character.")
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ArgumentError(f"{name}={path!r}: {error}") from None
    except FileNotFoundError:  # of the working directory
        raise ArgumentError(
            f"{name}={path!r} is a path from the working directory, which has been deleted. Pass a path that begins "
            "at the root, or go to another folder first, by os.chdir."
        ) from None


def positive_int(name: str, value: object) -> int:
    """Returns ``value`` as an int, or raises `ArgumentError` naming the argument ``name``."""
    number = 0
    with suppress(TypeError):  # of tensors of more than one entry
        number = 0 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    if number < 1:
        raise ArgumentError(f"{name} must be a whole number of at least 1, got {_in_short(value)}.")
    return number


def positive_ints(name: str, values: object) -> list[int]:
    """Returns ``values`` as a list of ints, or raises `ArgumentError` naming the argument ``name``."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        example = f", such as [{values}]" if isinstance(values, int) else ""
        raise ArgumentError(f"{name} must be a sequence of whole numbers{example}; got {_in_short(values)}.")
    return [positive_int(name, value) for value in values]


def _in_short(value: object) -> str:
    """What a value looks like, in a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]} ... ({type(value).__name__})"


def real_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> float:
    """Returns ``value`` as a float within these bounds, or raises `ArgumentError` naming the argument ``name``.

    Neither nan, nor infinities, nor truth values are numbers here.
    """
    bounds = (
        ("above", above, operator.gt),
        ("at least", least, operator.ge),
        ("below", below, operator.lt),
        ("at most", most, operator.le),
    )
    asked = [(words, bound, holds) for words, bound, holds in bounds if bound is not None]
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and all(holds(number, bound) for _, bound, holds in asked):
            return number
    phrase = " and ".join(f"{words} {bound:g}" for words, bound, _ in asked)
    of = "of " if phrase.startswith("at") else ""
    what = "a positive number" if phrase == "above 0" else f"a number {of}{phrase}".rstrip()
    raise ArgumentError(f"{name} must be {what}, got {value!r}.")


def one_of(name: str, value: str, choices: Iterable[str]) -> str:
    """Returns ``value`` if it is among ``choices``, or raises `ArgumentError` that lists them."""
    choices = list(choices)
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
    return value


def yes_no_or_auto(name: str, value: object) -> bool | str:
    """Returns ``value`` if it is ``True``, ``False`` or ``"auto"``, or raises `ArgumentError`."""
    if not isinstance(value, bool) and value != "auto":
        raise ArgumentError(f"{name} must be True, False or 'auto', got {value!r}.")
    return value  # type: ignore[return-value]
