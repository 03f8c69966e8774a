"""Tensors and plain values as bytes, and back: what is read runs no code, and takes the memory that its bytes allow.

Tensors under names are safetensors, plain values JSON, and both together what ``torch.save`` writes. For a stranger's
file ``torch.load(weights_only=True)`` alone would not do: it inflates what is deflated, makes a ``bytearray`` of any
length it is told, and gives tensors of which many entries are one place in memory.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from pvae.errors import CheckpointError, first_line

__all__ = ["json_from_bytes", "state_from_bytes", "state_to_bytes", "tensors_from_bytes", "tensors_to_bytes"]

_MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 16 << 20
_MAX_PARTS = 200_000
_MAX_DEPTH = 300

# What torch.save writes of tensors and plain values; all else that a pickle can do is not needed.
_OPCODES = re.compile(
    "PROTO|STOP|MARK|(LONG_)?BIN(PUT|GET)|NONE|NEW(TRUE|FALSE)|BININT[12]?|LONG[14]|BINFLOAT|BINUNICODE|BINPERSID|GLOBAL"
    "|REDUCE|EMPTY_(LIST|TUPLE|DICT)|APPENDS?|TUPLE[123]?|SETITEMS?"
)
_GLOBALS = {
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter"),
    *(
        "collections OrderedDict",
        "collections Counter",
        "__builtin__ set",
        "builtins set",
        "torch Size",
        "torch device",
    ),
    *(f"torch {name}" for name in vars(torch) if name.endswith("Storage")),
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *("torch.storage UntypedStorage", "torch.storage TypedStorage"),
}


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a file of safetensors. They are copied: of some that share memory it would write none."""
    return save({n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in tensors.items()})


def tensors_from_bytes(content: bytes) -> dict[str, Tensor]:
    """Reads what `tensors_to_bytes` wrote.

    Raises:
        SafetensorError, ValueError: They are no such bytes.
    """
    if int.from_bytes(content[:8], "little") > _MAX_HEADER_BYTES:
        raise ValueError("its header is too long to be one")
    return load(content)


def json_from_bytes(content: bytes) -> Any:
    """Reads JSON that is neither huge nor nested without end: each bracket would take memory and stack.

    Raises:
        ValueError: It is, or it is no JSON.
    """
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError(f"it has {len(content)} bytes, and may have {_MAX_JSON_BYTES}")
    brackets = re.sub(rb'"(?:[^"\\]|\\.)*+"|[^\[\]{}"]++', b"", content, flags=re.DOTALL)
    depths = accumulate(1 if bracket in b"[{" else -1 for bracket in brackets)
    if len(brackets) > 2 * _MAX_PARTS or max(depths, default=0) > _MAX_DEPTH:
        raise ValueError("it has too many parts, or is nested too deeply")
    return json.loads(content)


def state_to_bytes(state: Any) -> bytes:
    """Tensors and plain values, such as the state of an optimizer, as ``torch.save`` writes them.

    Raises:
        CheckpointError: It holds more than that, which `state_from_bytes` would not read.
    """
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        content = buffer.getvalue()
        _check_program(_members(content))
    except Exception as error:
        raise CheckpointError(first_line(error)) from None
    return content


def state_from_bytes(content: bytes) -> Any:
    """Reads what `state_to_bytes` wrote: each tensor on the CPU, contiguous, in memory of its own.

    Raises:
        CheckpointError: They are no such bytes.
    """
    try:
        members, again = _members(content), io.BytesIO()
        _check_program(members)
        with zipfile.ZipFile(again, "w") as archive:  # what was looked at, and not what torch finds in there
            for name, member in members.items():
                archive.writestr(name, member)
        again.seek(0)
        state = torch.load(again, map_location="cpu", weights_only=True)
        return _Copier(len(content)).copy(state)
    except Exception as error:  # of a file that may be anything
        raise CheckpointError(first_line(error)) from None


def _members(content: bytes) -> dict[str, memoryview]:
    """Members of an archive of ``torch.save``, which deflates nothing, by name."""
    members, view, size = {}, memoryview(content), 0
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise ValueError("it is deflated, and nothing that was saved is")
            begin = info.header_offset + 30 + sum(struct.unpack_from("<HH", content, info.header_offset + 26))
            member = view[begin : begin + info.file_size]
            size += info.file_size
            if len(member) < info.file_size or size > len(content) or info.filename in members:
                raise ValueError("its members are not what they seem")
            members[info.filename] = member
    return members


def _check_program(members: Mapping[str, memoryview]) -> None:
    """Raises where an archive's pickle does more than to put tensors and plain values together."""
    programs = [bytes(member) for name, member in members.items() if name.endswith("data.pkl")]
    if len(programs) != 1:
        raise ValueError("it holds no state")
    for opcode, argument, _ in pickletools.genops(programs[0]):
        if not _OPCODES.fullmatch(opcode.name) or (opcode.name == "GLOBAL" and argument not in _GLOBALS):
            raise ValueError(f"it holds more than tensors and plain values ({opcode.name} {str(argument)[:80]})")


class _Copier:
    """Copies what a file held.

    Args:
        size: Bytes of the file. All copies together cannot have more, unless some entries are one place in memory.
    """

    def __init__(self, size: int) -> None:
        self.whole = self.left = size
        self.parts = 5 * _MAX_PARTS

    def copy(self, value: Any) -> Any:
        """A copy; what is in there twice is copied twice."""
        self.parts -= 1
        if self.parts < 0:
            raise ValueError("it has too many parts")
        match value:
            case Tensor():
                return self.tensor(value)
            case dict():
                made = type(value)()
                made.update({self.key(key): self.copy(entry) for key, entry in value.items()})
                return made
            case list() | tuple() | set():
                return type(value)([self.copy(entry) for entry in value])
        return self.key(value)

    def key(self, key: Any) -> Any:
        """A value that has no parts."""
        if isinstance(key, tuple | Tensor) or (isinstance(key, int) and not -(2**64) < key < 2**64):
            raise ValueError("it has a key or a number that nobody would have saved")
        return key

    def tensor(self, tensor: Tensor) -> Tensor:
        """A tensor that is what it seems: kernels trust that many entries are as many places in memory."""
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError("it holds a tensor that is not dense, or not on the CPU")
        size, places = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        self.left -= size
        if self.left < 0 or not size <= places <= self.whole:
            raise ValueError("it holds a tensor with more entries than places in memory")
        return tensor.detach().clone(memory_format=torch.contiguous_format)
