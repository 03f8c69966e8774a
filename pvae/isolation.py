"""Running somebody's Pyro programs and leaving the process as it was found.

While `pvae.fit` or `pvae.log_evidence` runs, the caller's random numbers, param store, gradient mode, validation
setting and train/eval modes are set aside; afterwards they are put back. Only the modules' device may change. Most of
that is the whole process's, so blocks in several threads take turns.
"""

from __future__ import annotations

import inspect
import random
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import torch
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.nn.modules.module import register_module_forward_pre_hook

from pvae.errors import ArgumentError, DataError, DeviceError, PVAEError
from pvae.turns import turn

__all__ = [
    "OwnParameters",
    "Program",
    "cast",
    "dtype_of",
    "isolated",
    "modules_of",
    "noise",
    "outside_modules",
    "place",
    "reached",
    "resolve_device",
    "resolve_seed",
    "set_noise",
]

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


def noise() -> Any:
    """The states of the process's random numbers on the CPU: torch's, Python's and NumPy's."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 (of those who use it)


def set_noise(states: Any) -> None:
    """Puts back what `noise` gave."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


def resolve_seed(seed: int | None) -> int:
    """The seed itself, or a fresh one from the operating system for ``None``."""
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed.__index__() < 2**63:
        raise ArgumentError(f"seed must be a whole number from 0 to 2**63 - 1, or None for a fresh one; got {seed!r}.")
    return seed.__index__()


@contextmanager
def isolated(
    modules: Iterable[nn.Module] = (),
    *,
    seed: int,
    device: torch.device | str = "cpu",
    training: bool = False,
    params: Mapping[str, Any] | None = None,
) -> Iterator[ParamStoreDict]:
    """Runs a block with its own random numbers, param store and modes, and puts the caller's back afterwards.

    Args:
        modules: Put into train or eval mode for the block; so is any other module as soon as it runs.
        seed: Seeds the CPU's and the device's global generators for the block, and those of Python and NumPy.
        device: Where the block computes.
        training: Train mode and gradients on, or eval mode and gradients off. Autocast is off either way.
        params: State of the param store to start from, as from ``get_state()``; left out, an empty one.

    Yields:
        The block's own param store.
    """
    device = torch.device(device)
    cuda = [device] if device.type == "cuda" else []
    modes: dict[nn.Module, bool] = {}
    store = pyro.get_param_store()
    thread = threading.get_ident()

    def set_mode(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() != thread:  # somebody else's, who is not in our block
            return
        modes.setdefault(module, module.training)
        if module.training != training:
            module.training = training

    state: Any = {key: dict((params or {}).get(key, {})) for key in ("params", "constraints")}
    with ExitStack() as stack:
        stack.enter_context(turn())
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.callback(set_noise, noise())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(training))
        if device.type != "meta":  # where a VAE can be made, to look at its shapes
            stack.enter_context(torch.autocast(device.type, enabled=False))
        # Data and programs are checked once, up front, so validation in each step would only cost time.
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(store.scope(state))
        stack.enter_context(OwnParameters())
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes.items()])
        # Programs may hold modules where nobody would look; what runs is what counts.
        stack.enter_context(register_module_forward_pre_hook(set_mode))
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        for root in modules:
            root.apply(set_mode)
        try:
            yield store
        except PVAEError as error:
            # Pyro's tracer raises a copy with a table of shapes below it; the original says all there is to say.
            raise (error.__cause__ if isinstance(error.__cause__, PVAEError) else error) from None


class OwnParameters(Messenger):
    """Lets the param store hold modules' parameters themselves, in whatever layout.

    Of one that is not contiguous it would keep a contiguous copy, and `pyro.infer.SVI` then moves neither: the program
    computes with the module's own, and the optimizer is given the copy, which has no gradient.
    """

    def _pyro_param(self, msg: Any) -> None:
        name, *offered = msg["args"]
        value = offered[0] if offered else None
        if not isinstance(value, nn.Parameter) or value.is_contiguous() or name in pyro.get_param_store():
            return
        if transform_to(msg["kwargs"]["constraint"]).inv(value) is value:  # else it is the start of another one
            state: Any = {"params": {name: value}, "constraints": {name: constraints.real}}
            pyro.get_param_store().set_state(state)


def outside_modules(store: ParamStoreDict) -> Any:
    """The state of the parameters that ``pyro.param`` made, without those that live in a module.

    A module keeps its own parameters; a store that lists them under its name may mean another module of that name.
    """
    state: Any = store.get_state()
    names = [name for name, value in state["params"].items() if not isinstance(value, nn.Parameter)]
    return {key: {name: state[key][name] for name in names} for key in ("params", "constraints")}
