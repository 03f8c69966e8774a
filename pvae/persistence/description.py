"""Modules as data: a class's name and its constructor's arguments, and the modules that are built from them again.

A module can be described whose constructor's arguments are kept as attributes of the same names. Those of torch.nn and
of pvae do so, and containers have their children in place of arguments. One that is met again is described by its first
place, and is one again. Building calls the constructors of torch.nn's
classes and of those that the caller hands over, and nothing else, so a file with a description can run no other code.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from pvae.errors import CheckpointError, ProgramError
from pvae.persistence.bounds import BoundsError

__all__ = ["DTYPES", "build", "class_name", "describe", "dtype_name", "tensors_of"]

DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
"""torch's dtypes by name."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SEQUENCES = {"tuple": tuple, "size": torch.Size}
_DEVICE = "device"
_MOST_REPEATED = 20_000  # modules in all that are described as the same as others
# Arguments that torch's layers take for older callers' sake, and do not keep.
_NO_ATTRIBUTES = {"min_value", "max_value", "_weight", "_freeze"}


def describe(module: nn.Module, seen: set[type] | None = None) -> dict[str, Any]:
    """What a module is made of, as plain data for JSON.

    Numbers, strings, ``None``, lists, tuples, dtypes, module classes and modules are written down. Of a tensor the name
    is, under which the module's ``state_dict`` has it, and of a module that was met before its first place. Where an
    argument is a yes or no and the attribute a parameter or ``None`` (``bias``), it is written as yes or no. Devices
    are left out.

    Args:
        module: What to describe.
        seen: Gets the classes that the description names.

    Raises:
        ProgramError: An argument is not kept as an attribute, or is something else.
    """
    return _Description(module.state_dict().keys(), set() if seen is None else seen).describe(module, "")


def build(
    description: Any,
    own: Iterable[type[nn.Module]] = (),
    *,
    tensors: Mapping[str, Tensor] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> nn.Module:
    """Builds a module from what `describe` gave.

    Args:
        description: What is to be built.
        own: Classes that may be built beside torch.nn's. They are found by their full name, or else by their last name
            alone, as a class of the script that saved it is somewhere else for the one that loads it.
        tensors: Values of described tensors.
        dtypes: Of parameters and buffers, by name; set as soon as the module with them is built.

    Raises:
        CheckpointError: A class is none of these, a constructor refuses its arguments, or it is no description.
    """
    try:
        return _Builder(own, tensors or {}, dtypes or {}).build(description, "")
    except RecursionError:
        raise CheckpointError("the description is nested too deeply to be one.") from None


class _Description:
    """Describes a module.

    Args:
        saved: Names of the tensors that are saved beside the description.
        seen: Gets the classes.
    """

    def __init__(self, saved: Collection[str], seen: set[type]) -> None:
        self.saved = saved
        self.seen = seen
        self.places: dict[nn.Module, str] = {}

    def describe(self, module: nn.Module, place: str) -> dict[str, Any]:
        """The module at a place, such as ``"decoder.network"``: its class, with its arguments or its children."""
        if module in self.places:
            return {"same": self.places[module]}
        description = self.describe_new(module, place)
        self.places[module] = place  # not before: a module inside of itself would have no end
        return description

    def describe_new(self, module: nn.Module, place: str) -> dict[str, Any]:
        """The same of a module that was not met before."""
        cls = type(module)
        self.seen.add(cls)
        if _is_container(cls):
            children = {n: self.describe_value(child, _join(place, n)) for n, child in module._modules.items()}
            return {"class": class_name(cls), "children": children}
        where = f"{place or 'the model'} is a {cls.__name__}"
        arguments = {}
        for name, default in _constructor_parameters(cls, where).items():
            if name == _DEVICE or (name in _NO_ATTRIBUTES and _is_of_torch(cls)):
                continue
            try:
                value = getattr(module, name)
            except AttributeError:
                if name == "dtype":
                    continue
                raise ProgramError(
                    f"{where}, whose constructor argument '{name}' is not kept as an attribute of that name. {_ADVICE}"
                ) from None
            if isinstance(default, bool) and (value is None or isinstance(value, Tensor)):
                value = value is not None
            try:
                arguments[name] = self.describe_value(value, _join(place, name))
            except _NotPlainError as error:
                raise ProgramError(
                    f"{where}, whose argument '{name}' cannot be written down: it holds {error}. Arguments can be "
                    "numbers, strings, lists, tuples, modules, module classes, and tensors kept as parameters or "
                    f"persistent buffers. {_ADVICE}"
                ) from None
        return {"class": class_name(cls), "arguments": arguments}

    def describe_value(self, value: Any, place: str) -> Any:
        """An argument, as plain data for JSON."""
        if isinstance(value, np.generic):  # np.prod gives such sizes
            value = value.item()
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if type(value) is list:
            return [self.describe_value(entry, _join(place, i)) for i, entry in enumerate(value)]
        for name, kind in _SEQUENCES.items():
            if type(value) is kind:
                return {name: [self.describe_value(entry, _join(place, i)) for i, entry in enumerate(value)]}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"dict": {key: self.describe_value(entry, _join(place, key)) for key, entry in value.items()}}
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, type) and issubclass(value, nn.Module):
            self.seen.add(value)
            return {"type": class_name(value)}
        if isinstance(value, nn.Module):
            return self.describe(value, place)
        if isinstance(value, Tensor) and place in self.saved:
            return {"tensor": place}
        raise _NotPlainError(f"a {type(value).__name__}")


class _NotPlainError(Exception):
    """A value that JSON has no form for."""


_ADVICE = (
    "Let its class keep each argument under the argument's name (self.width = width), or put the module inside one of "
    "your own that does and makes it in its constructor."
)


class _Builder:
    """Builds modules from descriptions; the arguments are those of `build`."""

    def __init__(
        self, own: Iterable[type[nn.Module]], tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self.own = set(own)
        self.tensors = tensors
        self.dtypes = dtypes
        self.built: dict[str, nn.Module] = {}
        self.repeated = 0

    def build(self, description: Any, place: str) -> nn.Module:
        """The module that a description is of, for a place such as ``"decoder.network"``."""
        where = place or "the model"
        if isinstance(description, dict) and list(description) == ["same"]:
            return self.repeat(description["same"], where)
        if not (isinstance(description, dict) and isinstance(description.get("class"), str)):
            raise CheckpointError(f"the description of {where} names no class.")
        cls = self.find_class(description["class"], where)
        parts = description.get("children" if _is_container(cls) else "arguments")
        if not isinstance(parts, dict) or len(description) != 2:
            raise CheckpointError(f"the description of {where} is none of a {cls.__name__}.")
        if _DEVICE in parts and not _is_container(cls):
            raise CheckpointError(f"the description of {where} names a device, and none that was saved does.")
        given = {name: self.build_value(part, _join(place, name)) for name, part in parts.items()}
        try:
            if issubclass(cls, nn.ModuleList) and _is_container(cls):
                module = cls(given.values())
            else:
                module = cls(OrderedDict(given)) if _is_container(cls) else cls(**given)
            self.set_dtypes(module, place)  # now, and not when all is built: what it is put into may run it
        except BoundsError:
            raise
        except Exception as error:  # whatever a constructor raises
            raise CheckpointError(
                f"{where} cannot be built: {cls.__name__}({', '.join(given)}) raises {type(error).__name__}: {error}"
            ) from error
        self.built[place] = module
        return module

    def repeat(self, first: Any, where: str) -> nn.Module:
        """The module that was built for a place before."""
        module = self.built.get(first) if isinstance(first, str) else None
        if module is None:
            raise CheckpointError(f"{where} is said to be the module at {str(first)[:80]!r}, and none was built there.")
        # Each time doubles what a walk through all names meets, so a few lines could describe one without an end.
        self.repeated += sum(1 for _ in islice(module.named_modules(remove_duplicate=False), _MOST_REPEATED + 1))
        if self.repeated > _MOST_REPEATED:
            raise BoundsError(f"it describes more than {_MOST_REPEATED} modules as the same as others.")
        return module

    def build_value(self, value: Any, place: str) -> Any:
        """An argument, of plain data."""
        if isinstance(value, list):
            return [self.build_value(entry, _join(place, i)) for i, entry in enumerate(value)]
        if not isinstance(value, dict):
            return value
        if "class" in value or "same" in value:
            return self.build(value, place)
        match list(value.items()):
            case [["tuple" | "size" as kind, list(entries)]]:
                return _SEQUENCES[kind](self.build_value(entries, place))
            case [["dict", dict(entries)]]:
                return {key: self.build_value(entry, _join(place, key)) for key, entry in entries.items()}
            case [["float", "inf" | "-inf" | "nan" as number]]:
                return float(number)
            case [["dtype", str(name)]] if name in DTYPES:
                return DTYPES[name]
            case [["type", str(name)]]:
                return self.find_class(name, place)
            case [["tensor", str(name)]] if name in self.tensors:
                return self.tensors[name].clone().to(torch.get_default_device())
        raise CheckpointError(f"the description of {place} is none: {str(value)[:80]}.")

    def find_class(self, name: str, where: str) -> type[nn.Module]:
        """The class of torch.nn, or of those that may be built, that a description names."""
        package, _, last = name.rpartition(".")
        if package == "torch.nn" and _is_of_torch(cls := vars(nn).get(last)):
            return cls
        found = {cls for cls in self.own if class_name(cls) == name}
        if not found:
            # pvae's own keep their names; one of them must not stand in for a user's class of the same last name.
            found = {cls for cls in self.own if cls.__name__ == last and not cls.__module__.startswith("pvae.")}
        if len(found) == 1:
            return found.pop()
        several = "of which several were passed" if found else "which is neither torch.nn's nor pvae's"
        raise CheckpointError(
            f"{where} is a {name}, {several}. If you know it and trust it, pass that class: modules=[{last}]."
        )

    def set_dtypes(self, module: nn.Module, place: str) -> None:
        """Gives parameters and buffers the dtypes that they were saved with."""
        for name, tensor in tensors_of(module).items():
            dtype = self.dtypes.get(_join(place, name), tensor.dtype)
            if dtype == tensor.dtype:
                continue
            if isinstance(tensor, nn.Parameter):
                tensor.data = tensor.data.to(dtype)
            else:
                owner, _, last = name.rpartition(".")
                module.get_submodule(owner)._buffers[last] = tensor.to(dtype)


def _is_container(cls: type) -> bool:
    """Whether a class is made from its children, as ``nn.Sequential`` and what only adds methods to it."""
    return any(issubclass(cls, kind) and cls.__init__ is kind.__init__ for kind in _CONTAINERS)


def _is_of_torch(cls: Any) -> TypeGuard[type[nn.Module]]:
    """Whether it is one of the module classes that torch.nn offers."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__.startswith("torch.nn.modules.")):
        return False
    return vars(nn).get(cls.__name__) is cls


def class_name(cls: type) -> str:
    """The name under which a class is in a description."""
    return f"torch.nn.{cls.__name__}" if _is_of_torch(cls) else f"{cls.__module__}.{cls.__qualname__}"


def _join(place: str, name: object) -> str:
    """The place of what has a name at a place."""
    return f"{place}.{name}" if place else str(name)


def _constructor_parameters(cls: type, where: str) -> dict[str, Any]:
    """Names and defaults of what a constructor takes, and of what its base classes' do where it has ``**kwargs``."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        taken = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {parameter.kind: parameter.name for parameter in taken}
        named = [p for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found = {p.name: p.default for p in named} | found
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            if several := kinds.get(inspect.Parameter.VAR_POSITIONAL):
                raise ProgramError(f"{where}, whose constructor takes '*{several}'. Let it take one list of them.")
            break
    return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those too that a ``state_dict`` leaves out."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a dtype is in `DTYPES`."""
    return str(dtype).removeprefix("torch.")
