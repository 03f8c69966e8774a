"""Programs whose matrix products and convolutions are done in fewer digits; all else, parameters too, stays float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["in_precision"]


class _ProductsAlone(TorchFunctionMode):
    """Under autocast, lets no bfloat16 go on from the product it came from: sums and densities are in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        lowered = isinstance(result, Tensor) and result.dtype is torch.bfloat16
        return result.float() if lowered else result


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """A block whose matrix products and convolutions are done in some precision.

    Args:
        precision: ``"float32"``, which changes nothing, ``"bfloat16"``, or ``"tf32"`` of a GPU.
        device: Where.
    """
    stack = ExitStack()
    if precision == "bfloat16":
        # Autocast empties its cache of weights only where the outermost block ends, which may be after many steps.
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False))
        stack.enter_context(_ProductsAlone())
    if precision == "tf32":
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("high")
    return stack
