"""A module as a folder of files, its description and its weights, and the module that is made of them again.

Before anything is written, the module is rebuilt from the very files, and compared with the one that was packed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvae.errors import CheckpointError, ProgramError
from pvae.persistence import serialization, storage
from pvae.persistence.bounds import Bounded, needs_numbers, record_trials, replay_trials
from pvae.persistence.description import DTYPES, build, class_name, describe, dtype_name, tensors_of

__all__ = ["check_free", "pack_module", "unpack_module", "write_packed"]

_CONFIG = "config.json"
_WEIGHTS = "weights.safetensors"

# No seed that anybody takes: what is drawn anew and not saved must not look as if it had come back.
_SEED = 7_301_662_094_418_853_917
_DEFAULTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Files that a save which was cut off may have left.
_LEFTOVER = re.compile(
    r"\..*|((config|weights)(-[0-9a-f]{12})?\.(json|safetensors)|manifest\.json)(\.[0-9a-f]{8}\.part)?"
)


def pack_module(module: nn.Module) -> tuple[dict[str, bytes], nn.Module]:
    """Makes files of a module: its description and its weights.

    Returns:
        The contents of the files by name, and the module that `unpack_module` makes of them, on the CPU.

    Raises:
        ProgramError: It cannot be described, or what is built from its description is something else.
    """
    state = module.state_dict()
    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ProgramError(f"{odd[0]} in the state_dict is no tensor, and only tensors can be saved.")
    classes: set[type] = set()
    description = describe(module, classes)
    tensors = tensors_of(module)
    config = {
        "model": description,
        "default_dtype": dtype_name(torch.get_default_dtype()),
        "dtypes": {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()},
        "frozen": [name for name, parameter in module.named_parameters() if not parameter.requires_grad],
    }
    files = {
        _CONFIG: json.dumps(config, indent=1, allow_nan=False).encode() + b"\n",
        _WEIGHTS: _weights_as_bytes(state),
    }
    try:
        rebuilt = unpack_module(files, classes)
    except CheckpointError as error:
        raise ProgramError(f"it cannot be rebuilt from its constructors' arguments: {error}") from error
    if describe(rebuilt) != description:
        place, ours, theirs = next(_differences(description, describe(rebuilt), ""))
        raise ProgramError(
            f"{place or 'the model'} is {ours}, and {theirs} when it is rebuilt from the attributes that are named "
            "like its constructor's arguments. Keep the arguments there as they were given."
        )
    _check_same(module, rebuilt)
    return files, rebuilt


def unpack_module(files: Mapping[str, bytes], own: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """Builds the module that `pack_module` wrote, on the CPU, with its weights, dtypes and frozen parameters.

    Args:
        files: Contents by name.
        own: As for `build`.

    Raises:
        CheckpointError: The files are none of `pack_module`'s, or do not fit each other; what differs is listed.
    """
    config, weights = _parse(files)
    size, own = sum(tensor.nbytes for tensor in weights.values()), tuple(own)
    build_once = partial(build, config["model"], own, tensors=weights, dtypes=config["dtypes"])
    trusted = any(not cls.__module__.startswith("pvae.") for cls in own)
    with _as_in_a_new_process(config["default_dtype"]):
        # Only the shapes at first: a few bytes can describe what would fill any memory.
        trials: list[Any] = []
        try:
            with torch.device("meta"), record_trials(trials), Bounded(size, len(weights), trusted=trusted) as bounds:
                outline = build_once()
            _check_fits(outline, weights)
            bounds.take(sum(t.nbytes for name, t in tensors_of(outline).items() if name not in weights))
            del outline
            block: Any = replay_trials(trials)
        except CheckpointError as error:
            if not needs_numbers(error):
                raise
            block = Bounded(size, len(weights), trusted=trusted)
        torch.default_generator.manual_seed(_SEED)
        with block:
            module = build_once()
        _check_fits(module, weights)
        try:
            module.load_state_dict(weights)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name not in config["frozen"])
        except Exception as error:  # of a module's own hooks, too
            raise CheckpointError(f"the weights cannot be loaded: {type(error).__name__}: {error}") from error
    return module


def _check_fits(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where a module has other names, dtypes or shapes than weights that were read."""
    try:
        now = {name: _dtype_and_shape(value) for name, value in module.state_dict().items()}
    except Exception as error:  # of lazy layers, and of a module's own hooks
        raise CheckpointError(f"what is built has no weights: {type(error).__name__}: {error}") from error
    then = {name: _dtype_and_shape(value) for name, value in weights.items()}
    differences = [
        f"{name} is {then.get(name, 'not there')} in the file and {now.get(name, 'not there')} when it is built"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise CheckpointError(f"the weights do not fit the configuration: {'; '.join(differences[:20])}.")


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raises `CheckpointError` where files must not be written: pvae's are never mixed with others."""
    try:
        others = [path.name for path in folder.iterdir() if not _LEFTOVER.fullmatch(path.name)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{folder} is no folder to save in: {error}.") from error
    if not storage.holds_files(folder):
        if others:
            names = ", ".join(sorted(others)[:3])
            raise CheckpointError(f"{folder} holds other files ({names}) and no saved VAE. Save into a new folder.")
        return
    if not overwrite:
        raise CheckpointError(f"{folder} already holds something saved. Pass overwrite=True to replace a saved VAE.")
    try:
        names = storage.read_files(folder).keys()
    except storage.DamagedError:  # nothing that could be loaded is lost
        return
    if names != {_CONFIG, _WEIGHTS}:
        raise CheckpointError(f"{folder} holds no VAE but {', '.join(sorted(names))}. Save into a new folder.")


def write_packed(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Writes the files of `pack_module`, if `check_free` allows it still once no other process can write.

    Raises:
        CheckpointError: It forbids it, another process writes there, or the folder cannot be written.
    """
    with storage.lock_folder(folder, "saves there, too"):
        check_free(folder, overwrite=overwrite)
        storage.write_files(folder, files)


def _dtype_and_shape(tensor: Any) -> str:
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}" if isinstance(tensor, Tensor) else "no tensor"


def _weights_as_bytes(state: Mapping[str, Tensor]) -> bytes:
    from safetensors import SafetensorError

    try:
        return serialization.tensors_to_bytes(state)
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ProgramError(f"its weights cannot be saved: {type(error).__name__}: {error}") from error


def _parse(files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the configuration, with its dtypes as such, and the weights."""
    if missing := [name for name in (_CONFIG, _WEIGHTS) if name not in files]:
        raise CheckpointError(f"it has no {missing[0]}, but {', '.join(files) or 'nothing'}.")
    try:
        config = serialization.json_from_bytes(files[_CONFIG])
        kinds = {name: DTYPES[dtype] for name, dtype in config["dtypes"].items()}
        config = {**config, "dtypes": kinds, "default_dtype": DTYPES[config["default_dtype"]]}
        if not isinstance(config["frozen"], list) or config["default_dtype"] not in _DEFAULTS:
            raise ValueError
        config["model"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{_CONFIG} is not a configuration that pvae wrote.") from None
    try:
        return config, serialization.tensors_from_bytes(files[_WEIGHTS])
    except Exception as error:  # of a file that may be anything
        raise CheckpointError(f"{_WEIGHTS} is no file of safetensors: {error}.") from None


@contextmanager
def _as_in_a_new_process(dtype: torch.dtype) -> Iterator[None]:
    """A block with the random numbers and modes of a new process, on the CPU; the caller's stay as they are."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(dtype)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        torch.default_generator.manual_seed(_SEED)
        yield


def _differences(ours: Any, theirs: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields each place where two descriptions differ, and both values there."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key in ours:
            yield from _differences(ours[key], theirs[key], place if key in _FORMS else f"{place}.{key}".lstrip("."))
    elif ours != theirs:
        yield place, ours, theirs


_FORMS = {"class", "arguments", "children", "tuple", "size", "dict"}


def _check_same(module: nn.Module, rebuilt: nn.Module) -> None:
    """Raises `ProgramError` where a rebuilt module has other parts or tensors, or ties them otherwise."""
    ours, theirs = (
        {n: class_name(type(m)) for n, m in x.named_modules(remove_duplicate=False)} for x in (module, rebuilt)
    )
    for place in [*ours, *theirs]:
        if ours.get(place) != theirs.get(place):
            raise ProgramError(
                f"{place} is {ours.get(place, 'not there')}, and {theirs.get(place, 'not there')} when it is rebuilt "
                "from its constructor's arguments. Put it there in the constructor."
            )
    tied = {frozenset(names) for names in _find_tied(rebuilt)}
    for names in _find_tied(module):
        if frozenset(names) not in tied:
            raise ProgramError(
                f"{names[0]} and {names[1]} are one tensor, and would be two when they are loaded. Put both modules "
                "into one of your own, whose constructor makes them share it."
            )
    before, after = tensors_of(module), tensors_of(rebuilt)
    for name in [*before, *after]:
        if name not in before or name not in after or not _is_same(before[name], after[name]):
            raise ProgramError(
                f"{name} is not saved with the weights (a buffer with persistent=False?), and is another when it is "
                "rebuilt from its constructor's arguments. Register it with persistent=True."
            )


def _find_tied(module: nn.Module) -> list[list[str]]:
    """Finds the tensors that have several names; returns these."""
    groups: dict[tuple[Any, int], list[str]] = {}
    for tensors in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            if tensor.numel():
                groups.setdefault((tensor.device, tensor.data_ptr()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _is_same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same bits, nan among them."""
    plain = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return _dtype_and_shape(ours) == _dtype_and_shape(theirs) and torch.equal(*plain)
