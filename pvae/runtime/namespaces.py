"""Where programs keep what they reach: attributes, items, variables, looked at and put back by name."""

from __future__ import annotations

import contextvars
import inspect
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter, itemgetter
from types import CodeType, GetSetDescriptorType, MappingProxyType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from pyro.infer.autoguide import AutoGuide
from torch import Tensor, jit, nn
from torch.distributions import ComposeTransform, Transform

__all__ = [
    "MISSING",
    "PLAIN",
    "Look",
    "Space",
    "added_to",
    "is_mutable",
    "names_in",
    "put_back",
    "spaces_of",
    "variables_of",
]

PLAIN = (bool, int, float, complex, str, bytes, type(None))
MISSING = object()
_CONTAINERS = (list, tuple, deque, dict, MappingProxyType)
_LARGE = 100  # entries of a container of objects, above which it is taken for data
_LARGE_PLAIN = 1000  # of one of numbers, strings and tensors
_KNOWN = frozenset({"torch", "pyro", "numpy", "pvae", *sys.stdlib_module_names})


class Space(NamedTuple):
    """Some entries of a namespace, as they were."""

    owner: str
    namespace: Any  # with `get`, and where a size is given a length and keys
    entries: dict[Any, Any]
    size: int | None  # of the whole namespace, where additions matter


def spaces_of(thing: Any) -> list[Space]:
    """The entries of a thing's namespaces; those of its class are the class's."""
    owner = getattr(thing, "__qualname__", None) or type(thing).__name__
    if isinstance(thing, type):
        return _members(thing)
    if isinstance(thing, ModuleType):
        return _constants(thing)
    if inspect.isfunction(thing):
        return variables_of(thing)
    if isinstance(thing, contextvars.ContextVar):
        context = _Context(thing)
        return [Space("ContextVar", context, {thing.name: context.get(thing.name, MISSING)}, None)]
    if inspect.ismethod(thing):
        return []
    spaces = _contents(owner, thing) if isinstance(thing, _CONTAINERS) else []
    if isinstance(thing, nn.Module):
        spaces += _of_a_module(owner, thing)
    namespace = getattr(thing, "__dict__", None)
    if isinstance(namespace, dict):
        entries = _attributes(thing)
        space = _Inputs(thing) if isinstance(thing, AutoGuide | Transform) else namespace
        spaces.append(Space(owner, space, entries, len(entries)))
    if names := _slots(thing):
        slots = _Attributes(thing)
        spaces.append(Space(owner, slots, {name: slots.get(name, MISSING) for name in names}, None))
    return spaces


class Look(NamedTuple):
    """A fast way to see that no entry of a namespace was set anew."""

    space: Space
    target: Any
    get: Callable[[Any], Iterable[Any]]  # the entries' values of now, out of the target; fails where one is gone
    values: tuple[Any, ...]

    @classmethod
    def at(cls, space: Space) -> Look:
        """Makes one."""
        namespace = space.namespace
        keys, values = tuple(space.entries), tuple(space.entries.values())
        if isinstance(namespace, _Items):
            return cls(space, namespace.values, iter, values)
        if any(value is MISSING for value in values) or isinstance(namespace, _Context):
            return cls(space, namespace, lambda inside: [inside.get(key, MISSING) for key in keys], values)
        if isinstance(namespace, _Cells):
            return cls(space, tuple(namespace.values()), partial(map, attrgetter("cell_contents")), values)
        if isinstance(namespace, _Attributes):
            return cls(space, namespace.thing, attrgetter(keys[0], *keys), (values[0], *values))
        target = vars(namespace.thing) if isinstance(namespace, _Inputs) else namespace
        return cls(space, target, itemgetter(keys[0], *keys), (values[0], *values))


def added_to(space: Space) -> list[Any]:
    """Names of what is in a namespace, and was not."""
    names = [name for name in space.namespace if name not in space.entries]
    if isinstance(space.namespace, MappingProxyType):  # a class's, of which not all was noted
        names = [name for name in names if _is_member(str(name), space.namespace[name])]
    return names


def put_back(thing: Any, space: Space) -> None:
    """Puts the entries of a thing's namespace back where they were; of those that were added, plain ones go."""
    namespace: Any = space.namespace
    if isinstance(namespace, _Items):
        namespace.put_back(list(space.entries.values()))
        return
    if isinstance(namespace, MappingProxyType):
        if not isinstance(thing, type):
            return
        namespace = _Attributes(thing)
    for key, value in space.entries.items():
        if value is not MISSING and space.namespace.get(key, MISSING) is not value:
            namespace[key] = value
    if space.size is not None:
        for key in added_to(space):
            if isinstance(space.namespace.get(key), PLAIN):
                del namespace[key]


def is_mutable(thing: Any) -> bool:
    """Whether somebody may set anew what a class, function or module holds: not of PyTorch, Pyro and Python's own."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return str(name or "builtins").split(".")[0] not in _KNOWN


def _members(cls: type) -> list[Space]:
    """Attributes and functions of a class alone, without those of its bases."""
    if not is_mutable(cls):
        return []
    space = vars(cls)
    entries = {name: value for name, value in space.items() if _is_member(name, value)}
    return [Space(cls.__qualname__, space, entries, len(space))]


def _is_member(name: str, value: Any) -> bool:
    if name.startswith("__"):  # what runs unseen, as `__getattr__`
        return inspect.isfunction(value)
    return name != "_abc_impl" and not isinstance(value, MemberDescriptorType | GetSetDescriptorType)


def _constants(module: ModuleType) -> list[Space]:
    """Values of a module that somebody holds, whose functions are not known by name."""
    if not is_mutable(module):
        return []
    space = vars(module)
    kinds = (*PLAIN, Tensor, list, dict)
    found = {name: v for name, v in space.items() if isinstance(v, kinds) and not name.startswith("__")}
    return [Space(module.__name__, space, found, None)]


def _contents(owner: str, thing: Any) -> list[Space]:
    """The entries of a container, if these are few or plain."""
    size = len(thing)
    if size > _LARGE_PLAIN:
        return []
    space = thing if isinstance(thing, dict | MappingProxyType) else _Items(thing)
    entries = dict(space.items())
    if size > _LARGE and not all(isinstance(value, (*PLAIN, Tensor)) for value in entries.values()):
        return []
    return [Space(owner, space, entries, size)]


def _of_a_module(owner: str, module: nn.Module) -> list[Space]:
    if isinstance(module, jit.ScriptModule):  # which keeps them in C++
        held = {"training": module.training, **dict(module.named_parameters(recurse=False))}
        held |= dict(module.named_buffers(recurse=False)) | dict(module.named_children())
        return [Space(owner, _Attributes(module), held, None)]
    spaces = [module._parameters, module._buffers, module._modules, module._forward_hooks, module._forward_pre_hooks]
    return [Space(owner, space, dict(space), len(space)) for space in spaces]


def variables_of(function: Any) -> list[Space]:
    """What a function and those inside of it read: variables, attributes of modules, and its own."""
    owner, space = function.__qualname__, function.__globals__
    cells = _Cells(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    closed = {name: cells.get(name, MISSING) for name in cells}
    own = vars(function)
    if (function.__module__ or "").split(".")[0] in ("torch", "pyro"):
        return []
    if not is_mutable(function):  # of which what they close over may be somebody's
        return [Space(owner, cells, closed, None)] if closed else []
    names = names_in(function)
    read = {name: space[name] for name in names if name in space}
    code = _Attributes(function)
    defaults = function.__kwdefaults__ or {}
    spaces = [
        Space(owner, cells, closed, None),
        Space(owner, space, read, None),
        *_of_modules(closed | read, names),
        Space(owner, defaults, dict(defaults), None),
        Space(owner, code, {name: code.get(name) for name in ("__defaults__", "__code__")}, None),
        Space(owner, own, dict(own), len(own)),
    ]
    return [s for s in spaces if s.entries or s.namespace is own]


def _of_modules(held: dict[str, Any], names: dict[str, None]) -> list[Space]:
    """What modules, and those inside of them, hold by some names."""
    imported = {name: sys.modules[name] for name in names if name in sys.modules}  # by the function itself
    spaces: list[Space] = []
    queue, seen = list((held | imported).items()), set()
    while queue:
        name, module = queue.pop(0)
        if not isinstance(module, ModuleType) or module in seen:
            continue
        seen.add(module)
        if module is os and ("environ" in names or "getenv" in names):
            spaces.append(Space(name, vars(os), {"environ": os.environ}, None))
        if is_mutable(module):
            entries = {inner: vars(module)[inner] for inner in names if inner in vars(module)}
            spaces.append(Space(name, vars(module), entries, None))
            queue += [(f"{name}.{key}", value) for key, value in entries.items()]
    return spaces


def names_in(function: Any) -> dict[str, None]:
    """Names of variables and attributes in a function and in those inside of it, in their order."""
    return {name: None for code in _codes(function.__code__) for name in code.co_names}


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Code objects of a function and of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _attributes(thing: Any) -> dict[str, Any]:
    """Attributes of an object, without those that a run makes anew before it reads them."""
    attributes = getattr(thing, "__dict__", {})
    if isinstance(thing, AutoGuide):  # plates, whose random indices differ, made of others of its attributes
        return {name: value for name, value in attributes.items() if name != "plates"}
    if isinstance(thing, Transform):  # what it last returned, used only where it is asked the very same again
        made = ("_cached_", "_inv") if type(thing).inv in (Transform.inv, ComposeTransform.inv) else "_cached_"
        return {name: value for name, value in attributes.items() if not name.startswith(made)}
    return dict(attributes)


def _slots(thing: Any) -> list[str]:
    slots = [vars(cls).get("__slots__", ()) for cls in type(thing).__mro__ if is_mutable(cls)]
    return [name for names in slots for name in ((names,) if isinstance(names, str) else names)]


class _Attributes:
    """Attributes of an object that are no entries of a dict, as slots."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.thing, name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.thing, name, value)

    def __delitem__(self, name: str) -> None:
        delattr(self.thing, name)


class _Inputs:
    """Attributes of an object by name, without those that a run makes anew."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __len__(self) -> int:
        return len(_attributes(self.thing))

    def __iter__(self) -> Iterator[str]:
        return iter(_attributes(self.thing))

    def get(self, name: str, default: Any = None) -> Any:
        return vars(self.thing).get(name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        vars(self.thing)[name] = value

    def __delitem__(self, name: str) -> None:
        del vars(self.thing)[name]


class _Cells(dict[str, Any]):
    """Closed-over variables of a function by name."""

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name].cell_contents
        except ValueError:  # not assigned yet
            return default

    def __setitem__(self, name: str, value: Any) -> None:
        self[name].cell_contents = value


class _Context:
    """What a context variable is here and now."""

    def __init__(self, variable: contextvars.ContextVar[Any]) -> None:
        self.variable = variable

    def get(self, _: str, default: Any = None) -> Any:
        try:
            return self.variable.get()
        except LookupError:
            return default

    def __setitem__(self, _: str, value: Any) -> None:
        self.variable.set(value)


class _Items:
    """A list by index."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.values)))

    def get(self, index: int, default: Any = None) -> Any:
        return self.values[index] if index < len(self.values) else default

    def items(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.values)

    def put_back(self, values: list[Any]) -> None:
        if isinstance(self.values, list):
            self.values[:] = values
        elif isinstance(self.values, deque):
            self.values.clear()
            self.values.extend(values)
