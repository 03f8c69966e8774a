"""Somebody's programs: the modules they are made of, and the device and the dtype that these are on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

from pvae.errors import ArgumentError, DataError, DeviceError
from pvae.runtime.reach import reachable

__all__ = ["Pair", "Program", "cast", "dtype_of", "modules_of", "place_pair", "resolve_device"]


Program = Callable[..., Any]
"""A Pyro model or guide: called with one batch, it makes ``pyro.sample`` statements."""


def modules_of(*programs: Program) -> list[nn.Module]:
    """The modules that programs are made of: themselves, what they are methods of, close over, call, name or hold."""
    return [thing for thing in reachable(*programs, modules_alone=True) if isinstance(thing, nn.Module)]


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


@dataclass(frozen=True)
class Pair:
    """A model and a guide on a device.

    Attributes:
        model: The generative program.
        guide: The recognition program.
        modules: Those found in the two.
        device: Where they were put.
    """

    model: Program
    guide: Program
    modules: Sequence[nn.Module]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype | None:
        """That of the modules' floating-point parameters; ``None`` if there are none."""
        return dtype_of(self.modules)

    def cast(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gives floating-point data the modules' dtype (float64 data become float32).

        Integers and booleans keep theirs, as they may be labels or masks.

        Raises:
            DataError: Data are too large for that dtype.
        """
        dtype = self.dtype
        return tuple(cast(t, dtype) if dtype and t.is_floating_point() else t for t in tensors)

    def named_tensors(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What training changes, by names that are the same in every process: modules' states, and bare parameters.

        Args:
            params: Unconstrained, as the store holds them. Where there are several modules, names begin with the
                modules' numbers.
        """
        tensors: dict[str, Tensor] = {}
        seen: set[Any] = set()
        for number, module in enumerate(self.modules):
            for key, value in module.state_dict(keep_vars=True).items():
                if not isinstance(value, Tensor) or value.layout is not torch.strided:
                    continue  # `nameless_state` tells of them
                place_in_memory = (value.data_ptr(), value.shape, value.stride())
                if place_in_memory not in seen or not value.numel():  # else it is in there under another name
                    seen.add(place_in_memory)
                    tensors[key if len(self.modules) == 1 else f"{number}.{key}"] = value
        return tensors | {f"param/{name}": params[name] for name in self.bare_params(params)}

    def bare_params(self, params: Mapping[str, Tensor]) -> list[str]:
        """The names of parameters that live in no module that was found."""
        own = {id(p) for module in self.modules for p in module.parameters()}
        # Pyro's own mark of a module's parameter; such a module may mean another one of that name elsewhere.
        return [name for name, value in params.items() if id(value) not in own and "$$$" not in name]

    def bare_state(self, store: ParamStoreDict) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The values of `bare_params`, and the store's state of them."""
        state: Any = store.get_state()
        names = self.bare_params(state["params"])
        state = {key: {name: state[key][name] for name in names} for key in ("params", "constraints")}
        return {name: store[name].detach().clone() for name in names}, state

    def nameless_state(self) -> list[str]:
        """What modules hold that `named_tensors` leaves out, in words."""
        states = [(key, value) for module in self.modules for key, value in module.state_dict().items()]
        return [
            f"'{key}' is {f'of layout {value.layout}' if isinstance(value, Tensor) else f'a {type(value).__name__}'}"
            for key, value in states
            if not isinstance(value, Tensor) or value.layout is not torch.strided
        ]


def place_pair(model: Program, guide: Program, *others: Any, device: str | torch.device, data: Any = ()) -> Pair:
    """Moves a pair's modules to a device; ``"auto"`` without modules to move is where the data are.

    Where those that are read will be is not known yet; tensors that programs make are on torch's default device.

    Args:
        model: The generative program.
        guide: The recognition program.
        others: What else may hold modules, such as an objective.
        device: As for `pvae.fit`.
        data: Tensors, or what is to be read. They stay where they are: batches are moved as they are used.

    Raises:
        DeviceError: There is no such device, or parameters are on one without numbers.
    """
    modules = modules_of(model, guide, *others)
    if device == "auto" and not modules:
        in_memory = isinstance(data, tuple) and data
        own = data[0].device if in_memory else resolve_device(torch.get_default_device())
        return Pair(model, guide, modules, own)
    chosen = resolve_device(device)
    if any(t.is_meta for module in modules for t in chain(module.parameters(), module.buffers())):
        raise DeviceError(
            "a module's parameters are on the meta device, which holds no numbers. Make it outside of "
            "torch.device('meta')."
        )
    for module in modules:
        module.to(chosen)
    return Pair(model, guide, modules, chosen)


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
