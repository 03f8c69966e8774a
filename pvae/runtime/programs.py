"""Somebody's programs: the modules they are made of, and the device and the dtype that these are on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pvae.errors import ArgumentError, DataError, DeviceError

__all__ = ["Program", "cast", "dtype_of", "modules_of", "place", "reached", "resolve_device"]


Program = Callable[..., Any]
"""A Pyro model or guide: called with one batch, it makes ``pyro.sample`` statements."""


def modules_of(*programs: Program) -> list[nn.Module]:
    """The modules that programs are made of: themselves, what they are methods of, close over, call or hold."""
    return [thing for thing in reached(*programs) if _is_module(thing)]


def reached(*programs: Any) -> list[Any]:
    """All that programs are made of, close over, call or hold; modules are not looked into."""
    seen: dict[int, Any] = {}
    queue: list[Any] = list(programs)
    while queue:
        thing = queue.pop(0)
        if id(thing) in seen or (type(thing).__module__.split(".")[0] in ("numpy", "torch") and not _is_module(thing)):
            continue
        seen[id(thing)] = thing
        if _is_module(thing) or isinstance(thing, type | ModuleType):
            continue
        if isinstance(thing, partial):  # Pyro's handlers wrap programs in partials
            queue += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, list | tuple | dict):
            queue += filter(_is_module, thing.values() if isinstance(thing, dict) else thing)
        elif inspect.ismethod(thing):
            queue += [thing.__self__, thing.__func__]
        elif inspect.isfunction(thing):
            if (thing.__module__ or "").split(".")[0] not in ("torch", "pyro"):
                with suppress(ValueError):  # a variable that is not assigned yet
                    variables = inspect.getclosurevars(thing)
                    queue += [*variables.nonlocals.values(), *variables.globals.values()]
        else:
            queue += getattr(thing, "__dict__", {}).values()
    return list(seen.values())


def _is_module(thing: object) -> bool:
    return isinstance(thing, nn.Module)


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is the GPU where there is one, else the CPU; anything else must be there.

    Raises:
        DeviceError: A CUDA device was asked for and this machine has none, or one that computes nothing.
        ArgumentError: Not the name of a device.
    """
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device must be 'auto', 'cpu', 'cuda' or a torch.device; got {device!r}.") from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device={str(device)!r}: no CUDA device was found. Use device='auto' or 'cpu'.")
        count = torch.cuda.device_count()
        if chosen.index is not None and chosen.index >= count:
            raise DeviceError(f"device={str(device)!r}: this machine has {count} CUDA device(s), numbered from 0.")
        return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    if chosen.type == "meta":
        raise DeviceError(f"device={str(device)!r} holds no numbers to compute with. Use device='auto' or 'cpu'.")
    return chosen


def place(
    modules: Iterable[nn.Module], tensors: tuple[Tensor, ...], device: str | torch.device
) -> tuple[torch.device, tuple[Tensor, ...]]:
    """Moves modules to the device, and gives floating-point data the modules' dtype (float64 data become float32).

    Integers and booleans keep their dtype, as they may be labels or masks; data stay where they are, and each batch
    is moved when it is used. With ``device="auto"`` a pair without modules to move stays on the data's device.

    Raises:
        DataError: Data are too large for the modules' dtype.
        DeviceError: There is no such device, or parameters are on one without numbers.
    """
    modules = list(modules)
    if device == "auto" and not modules and tensors:
        return tensors[0].device, tensors
    chosen = resolve_device(device)
    if any(t.is_meta for module in modules for t in chain(module.parameters(), module.buffers())):
        raise DeviceError(
            "a module's parameters are on the meta device, which holds no numbers. Make it outside of "
            "torch.device('meta')."
        )
    for module in modules:
        module.to(chosen)
    if dtype := dtype_of(modules):
        tensors = tuple(cast(t, dtype) if t.is_floating_point() else t for t in tensors)
    return chosen, tensors


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Gives finite floating-point data another dtype, and raises where they would overflow."""
    converted = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not converted.sum(dtype=torch.float64).isfinite():  # cheaper than a mask
        raise DataError(
            f"the data reach {tensor.abs().max().item():g}, too large for the parameters' {dtype}. Rescale the data, "
            f"or give the parameters their {tensor.dtype}."
        )
    return converted


def dtype_of(modules: Iterable[nn.Module]) -> torch.dtype | None:
    """Of the modules' floating-point parameters; ``None`` if there are none."""
    return next((p.dtype for m in modules for p in m.parameters() if p.is_floating_point()), None)
