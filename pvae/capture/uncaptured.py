"""Cheaper arithmetic on the CPU for programs that run as they are: what needs no compiler.

A Bernoulli's density is the costly part of many decoders. As PyTorch does it, logits and losses of all entries are
written to memory, in several passes, with a logarithm of each. Here neither is computed before it is known what is
wanted of it; if that is the sum of a datum's losses, both are done piece by piece in the processor's cache, with one
logarithm for sixteen entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pvae.capture.matrix_products import is_worth_onednn, multiply_by_onednn

__all__ = ["ChangedInPlace", "CheaperArithmetic"]

aten: Any = torch.ops.aten

_SMALL = 2**16  # numbers, below which PyTorch's own way costs less than the calls
_PIECE = 2**18  # numbers
_HALVINGS = 4  # products of 2**4 numbers between 1 and 2 are far from overflow


class CheaperArithmetic(TorchFunctionMode):
    """A block in which large products and sums of binary losses are cheaper, with the same results to rounding.

    Only for what needs no gradients, on the CPU, outside of autocast and of captures.

    Raises:
        ChangedInPlace: The block changes a tensor in place that a product was not yet computed of.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            result = replacement(*args, **kwargs)
            if result is not None:
                return result
        if func not in _PUT_OFF and getattr(func, "__name__", "") != "__get__":
            args = [arg.computed() if isinstance(arg, _Later) else arg for arg in args]
        return func(*args, **kwargs)


class ChangedInPlace(Exception):
    """What was put off can no longer be computed."""


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    tensors = [t for t in (a, weight, bias) if t is not None]
    if not all(type(t) in _PLAIN and _is_usual(t) and t.dtype == a.dtype for t in tensors):
        return None
    if a.dim() < 2 or weight.dim() != 2 or a.shape[:-1].numel() * len(weight) < _SMALL:
        return None
    return _Product(a, weight, bias, (*a.shape[:-1], len(weight)))


def _binary_cross_entropy(logits: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    options = {name: value for name, value in kwargs.items() if value is not None}
    if args or options != {"reduction": "none"} or logits.shape != target.shape or logits.numel() < _SMALL:
        return None
    if type(logits) not in (*_PLAIN, _Product) or type(target) not in _PLAIN or logits.dtype != target.dtype:
        return None
    if not (_is_usual(logits) and _is_usual(target) and logits.is_contiguous()):
        return None
    bits = _unexpanded(target)
    if bits.numel() * 8 > target.numel() or not ((bits == 0) | (bits == 1)).all():
        return None
    return _Losses(logits, bits, target, 1)


_PLAIN = (Tensor, torch.nn.Parameter)
_REPLACEMENTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
}


# All other functions get tensors that are computed.
_PUT_OFF = {
    F.binary_cross_entropy_with_logits,
    torch.broadcast_tensors,
    *(
        Tensor.reshape,
        Tensor.view,
        Tensor.flatten,
        Tensor.expand,
        Tensor.unbind,
        Tensor.neg,
        Tensor.__neg__,
        Tensor.sum,
    ),
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.__len__),
}


def _is_usual(tensor: Tensor) -> bool:
    kind = tensor.device.type, tensor.layout, tensor.is_inference()
    return kind == ("cpu", torch.strided, False) and tensor.dtype in (torch.float32, torch.float64)


def _unexpanded(tensor: Tensor) -> Tensor:
    """The numbers that a broadcast tensor is made of: of size 1 where it repeats itself."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


class _Later(Tensor):
    """A tensor that is computed when something is done with it of which `then` knows no better."""

    _result: Tensor | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, shape: Sequence[int], like: Tensor) -> Any:
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return make(cls, shape, dtype=like.dtype, device=like.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(args[0], _Later) and not kwargs and args[0]._result is None:
            result = args[0].then(func, *args[1:])
            if result is not None:
                return result
        args, kwargs = pytree.tree_map_only(_Later, _Later.computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    def computed(self) -> Tensor:
        """The tensor."""
        if self._result is None:
            self._result = self.compute()
        return self._result

    @abstractmethod
    def compute(self) -> Tensor:
        """Computes it."""

    @abstractmethod
    def then(self, func: Any, *args: Any) -> Any:
        """What an operation makes of it, if that needs less than the whole tensor."""


class _Product(_Later):
    """``a @ weight.T + bias``, viewed in some shape that begins as that of a does."""

    parts: tuple[Tensor, Tensor, Tensor | None]
    versions: list[int]

    @staticmethod
    def __new__(cls, a: Tensor, weight: Tensor, bias: Tensor | None, shape: Sequence[int]) -> _Product:
        product = cls.of(shape, a)
        product.parts = a, weight, bias
        product.versions = product.versions_now()
        return product

    def versions_now(self) -> list[int]:
        return [t._version for t in self.parts if t is not None]

    def compute(self) -> Tensor:
        return self.rows(0, len(self))

    def rows(self, begin: int, end: int) -> Tensor:
        """Those along the first dimension."""
        if self.versions != self.versions_now():
            raise ChangedInPlace
        a, weight, bias = self.parts
        a = a[begin:end]
        if a.dtype == torch.float32 and is_worth_onednn(a.numel() * len(weight)):
            return multiply_by_onednn(bias, a, weight).view(-1, *self.shape[1:])
        return F.linear(a, weight, bias).view(-1, *self.shape[1:])

    def then(self, func: Any, *args: Any) -> Any:
        """Another view of it."""
        shape = None
        if func in (aten.view.default, aten._unsafe_view.default):
            shape = torch.empty(self.shape, device="meta").view(args[0]).shape
        elif func is aten.expand.default and tuple(args[0]) == tuple(self.shape):
            shape = self.shape
        elif func is aten.unbind.int and args and args[0] % self.dim() > 0 and self.shape[args[0]] == 1:
            shape = torch.empty(self.shape, device="meta").squeeze(args[0]).shape
        if shape is None or len(shape) < 2 or shape[0] != len(self):
            return None
        view = _Product(*self.parts, shape)
        view.versions = self.versions
        return [view] if func is aten.unbind.int else view


class _Losses(_Later):
    """Binary losses ``softplus((1 - 2 x) l)`` for logits l and bits x, times a sign."""

    logits: Tensor
    bits: Tensor
    target: Tensor
    times: int

    @staticmethod
    def __new__(cls, logits: Tensor, bits: Tensor, target: Tensor, times: int) -> _Losses:
        losses = cls.of(logits.shape, logits)
        losses.logits, losses.bits, losses.target, losses.times = logits, bits, target, times
        return losses

    def compute(self) -> Tensor:
        logits = self.logits.computed() if isinstance(self.logits, _Later) else self.logits
        losses = F.binary_cross_entropy_with_logits(logits, self.target, reduction="none")
        return losses if self.times == 1 else losses.neg_()

    def then(self, func: Any, *args: Any) -> Any:
        if func is aten.neg.default:
            return _Losses(self.logits, self.bits, self.target, -self.times)
        if func in (aten.view.default, aten._unsafe_view.default):
            return self.flattened(*args)
        if func is aten.sum.dim_IntList and len(args) == 1 and self.dim() > 1:
            first = self.dim() - len(args[0])
            dims = sorted(d % self.dim() for d in args[0])
            return self.summed(first) if first > 0 and dims == list(range(first, self.dim())) else None
        return None

    def flattened(self, shape: Sequence[int]) -> _Losses | None:
        """The same with the last dimensions made one, if that is what the shape says."""
        kept = len(shape) - 1
        if not 0 < kept < self.dim() or tuple(shape[:kept]) != tuple(self.shape[:kept]):
            return None
        logits, target = self.logits.view(*self.shape[:kept], -1), self.target.flatten(kept)
        return _Losses(logits, self._bits(kept), target, self.times)

    def summed(self, first: int) -> Tensor:
        """Their sums over all dimensions from some on, piece by piece."""
        signs, sums = 1 - 2 * self._bits(first), self.bits.new_empty(self.shape[:first])
        size = max(1, _PIECE * len(self) // max(1, self.numel()))
        for begin in range(0, len(self), size):
            end = min(begin + size, len(self))
            own = signs if len(signs) == 1 else signs[begin:end]
            if isinstance(self.logits, _Product) and self.logits._result is None:
                m = self.logits.rows(begin, end).flatten(first).mul_(own)
            else:
                m = self.logits[begin:end].flatten(first) * own
            torch.mul(_sum_softplus(m), self.times, out=sums[begin:end])
        return sums

    def _bits(self, first: int) -> Tensor:
        """The bits with all dimensions from some on made one."""
        return self.bits.expand(*self.bits.shape[:first], *self.shape[first:]).flatten(first)


def _sum_softplus(m: Tensor) -> Tensor:
    """``sum_j log(1 + exp(m_j))`` over the last dimension, which overwrites m.

    It is ``sum_j max(m_j, 0) + log prod_j (1 + exp(-|m_j|))``, with products of sixteen factors between 1 and 2.
    """
    above = m.clamp(min=0)
    total = above.sum(-1)
    factors = m.sub_(above, alpha=2).exp_().add_(1)
    for _ in range(_HALVINGS):
        width = factors.shape[-1]
        half = width // 2
        factors[..., :half].mul_(factors[..., width - half :])
        factors = factors[..., : width - half]
    return total.add_(factors.log().sum(-1))
