"""Running somebody's Pyro programs and leaving the process as it was found.

While `pvae.fit` or `pvae.log_evidence` runs, the caller's random numbers, param store, gradient mode, validation
setting and train/eval modes are set aside; afterwards they are put back. Only the modules' device may change. Most of
that is the whole process's, so blocks in several threads take turns.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from pvae.errors import ArgumentError, PVAEError
from pvae.runtime.turns import turn

__all__ = [
    "OwnParameters",
    "get_rng_state",
    "isolate",
    "kept_buffers",
    "outside_modules",
    "resolve_seed",
    "set_rng_state",
    "spare_noise",
]


def get_rng_state() -> Any:
    """The states of the process's random numbers on the CPU: torch's, Python's and NumPy's."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 (of those who use it)


def set_rng_state(states: Any) -> None:
    """Puts back what `get_rng_state` gave."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


def spare_noise(device: torch.device) -> AbstractContextManager[Any]:
    """A block after which torch's random numbers go on as if it had drawn none, so that a trial changes no results."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def resolve_seed(seed: int | None) -> int:
    """The seed itself, or a fresh one from the operating system for ``None``."""
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed.__index__() < 2**63:
        raise ArgumentError(f"seed must be a whole number from 0 to 2**63 - 1, or None for a fresh one; got {seed!r}.")
    return seed.__index__()


@contextmanager
def isolate(
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
        stack.callback(set_rng_state, get_rng_state())
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


@contextmanager
def kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A block after which modules have their buffers of before, with what was in them: trial runs count for nothing."""
    parts = {part: None for root in modules for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)}
    before = [
        (part, name, buffer, buffer.detach().clone())
        for part in parts
        for name, buffer in part._buffers.items()
        if isinstance(buffer, Tensor) and buffer.layout is torch.strided and not is_lazy(buffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, value in before:
                part._buffers[name] = buffer
                if buffer.shape != value.shape:
                    part._buffers[name] = value
                elif not torch.equal(buffer, value):
                    buffer.copy_(value)


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
