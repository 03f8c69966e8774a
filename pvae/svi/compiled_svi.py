"""`CompiledSVI`: Pyro's own SVI, with the loss and its gradients captured and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree

from pvae.errors import NumericalError
from pvae.graphs import Captured
from pvae.svi.objectives import ItemsStayTensors, params_met

__all__ = ["CompiledSVI"]

_PLAIN = (bool, int, str, bytes, type(None))


class CompiledSVI(SVI):
    """A drop-in for `pyro.infer.SVI` that takes the same arguments and steps two to three times as fast.

    The first step with a set of shapes is Pyro's own, with its checks and warnings; at the second, loss and gradients
    are captured as one tensor program, which is compiled where that set was the first. Parameters stay where Pyro keeps
    them, in modules and the global param store, and the optimizer is any of ``pyro.optim``; most of a step is then the
    optimizer's time. `pvae.fit` has a faster one.

    Tensors and floats among the arguments of `step` may change freely (a float becomes a tensor, so that a weight that
    is annealed needs no new capture); for every other value the program is captured anew. Layers that were replaced,
    parameters that were added, a module that was moved or put into another mode, and a param store that was cleared are
    noticed. Where a program cannot be captured, a warning says why, and steps go on as Pyro's.

    Args:
        model: As for `pyro.infer.SVI`, as is the rest.
        guide: The guide.
        optim: One of ``pyro.optim``.
        loss: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``RenyiELBO``, ``TraceEnum_ELBO``, another ELBO object, or a
            function.
        loss_and_grads: As for `pyro.infer.SVI`.
        kwargs: As for `pyro.infer.SVI`.

    Example::

        svi = pvae.svi.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
        for x in batches:
            loss = svi.step(x)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: Any,
        loss_and_grads: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, guide, optim, loss, loss_and_grads, **kwargs)
        self._sees = (model, guide, loss, loss_and_grads)
        self._seen: set[Any] = set()
        self._steps: dict[Any, _Gradients] = {}
        self._losses: dict[Any, Captured] = {}

    @property
    def captures(self) -> int:
        """How many tensor programs were captured; if this goes on growing, something changes from step to step."""
        programs = [gradients.captured for gradients in self._steps.values()] + list(self._losses.values())
        return sum(program.captures for program in programs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Takes one step and returns the loss, as `pyro.infer.SVI.step` does.

        Raises:
            NumericalError: The loss of a captured step, or a gradient, is nan or infinite; raised before the update.
        """
        given = _Arguments.of(args, kwargs)
        gradients = self._steps.get(given.structure)
        known = gradients is not None and ("step", given.structure, given.shapes) in self._seen
        if gradients is None or not known or gradients.captured.given_up or gradients.is_stale():
            with params_met() as params:
                loss = super().step(*args, **kwargs)
            if given.can_be_captured and not (known and gradients is not None and gradients.captured.given_up):
                if gradients is None or gradients.is_stale():
                    self._steps[given.structure] = _Gradients(self, given)
                self._steps[given.structure].add(params)
                self._seen.add(("step", given.structure, given.shapes))
            return loss
        loss, finite, grads = gradients.captured(*given.tensors)
        values = pytree.tree_map(Tensor.item, loss)
        if not finite:
            raise NumericalError(
                f"the loss is {values}, and it or a gradient is not finite; nothing was updated. Try a smaller "
                "learning rate, and look at the data: Pyro's validation sees only the first step with a set of shapes."
            )
        moved = {gradients.params[number]: grad for number, grad in grads.items()}
        for param, grad in moved.items():
            param.grad = grad
        self.optim(list(moved))
        for param in moved:
            param.grad = None
        return values

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss without a step, as `pyro.infer.SVI.evaluate_loss` does."""
        given = _Arguments.of(args, kwargs)
        key = ("loss", given.structure, given.shapes)
        program = self._losses.get(given.structure)
        if key not in self._seen or (program is not None and program.given_up):
            if given.can_be_captured:
                self._seen.add(key)
            return super().evaluate_loss(*args, **kwargs)
        if program is None:

            def loss(*tensors: Tensor) -> Any:
                args, kwargs = given.with_tensors(tensors)
                with torch.no_grad(), pyro.validation_enabled(False), ItemsStayTensors():
                    return pytree.tree_map(torch.as_tensor, self.loss(self.model, self.guide, *args, **kwargs))

            program = self._losses[given.structure] = Captured(loss, "CompiledSVI.evaluate_loss", self._sees)
        return pytree.tree_map(Tensor.item, program(*given.tensors))


class _Gradients:
    """Loss and gradients for one structure of arguments."""

    def __init__(self, svi: CompiledSVI, given: _Arguments) -> None:
        self.svi, self.given = svi, given
        self.params: list[Tensor] = []
        self.stored: dict[str, Tensor] = {}
        self.captured = Captured(self._loss_and_grads, "CompiledSVI.step", svi._sees, tolerances=(1e-5, 0.05))

    def add(self, params: list[Tensor]) -> None:
        """Takes note of parameters that the programs met, and of their place in the param store."""
        known = {id(p) for p in self.params}
        self.params += [p for p in params if id(p) not in known]
        known |= {id(p) for p in params}
        self.stored = {name: p for name, p in pyro.get_param_store().named_parameters() if id(p) in known}

    def is_stale(self) -> bool:
        """Whether the param store no longer holds these parameters."""
        now = dict(pyro.get_param_store().named_parameters())
        return any(now.get(name) is not param for name, param in self.stored.items())

    def _loss_and_grads(self, *tensors: Tensor) -> tuple[Any, Tensor, dict[int, Tensor]]:
        args, kwargs = self.given.with_tensors(tensors)
        for param in self.params:
            param.grad = None
        try:
            with params_met() as params, pyro.validation_enabled(False), ItemsStayTensors():
                loss = self.svi.loss_and_grads(self.svi.model, self.svi.guide, *args, **kwargs)
            self.add(params)
            grads = {number: p.grad for number, p in enumerate(self.params) if p.grad is not None}
        finally:
            for param in self.params:
                param.grad = None
        loss = pytree.tree_map(lambda part: torch.as_tensor(part).detach(), loss)
        sums = [part.double().sum() for part in (*pytree.tree_leaves(loss), *grads.values())]
        return loss, torch.stack(sums).isfinite().all(), grads


class _Arguments(NamedTuple):
    """The arguments of a step, taken apart into tensors and the rest."""

    tensors: tuple[Tensor, ...]
    structure: Any  # the places of the tensors, and all values that are not tensors
    shapes: Any
    can_be_captured: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = tuple(
            torch.tensor(leaf) if isinstance(leaf, float) else leaf
            for leaf in leaves
            if isinstance(leaf, Tensor | float)
        )
        rest = tuple(_TENSOR if isinstance(leaf, Tensor | float) else leaf for leaf in leaves)
        plain = all(leaf is _TENSOR or isinstance(leaf, _PLAIN) for leaf in rest)
        # True and 1 are equal, but not the same to a program.
        structure = (spec, rest, tuple(map(type, rest))) if plain else None
        return cls(tensors, structure, tuple((t.shape, t.dtype, t.device) for t in tensors), plain)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Any:
        """The arguments, with other tensors in the place of these."""
        spec, rest, _ = self.structure
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if leaf is _TENSOR else leaf for leaf in rest], spec)


_TENSOR = object()
