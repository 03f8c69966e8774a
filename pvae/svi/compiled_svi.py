"""`CompiledSVI`: Pyro's own SVI, with the loss and its gradients captured and compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from pyro.infer.util import zero_grads
from pyro.ops.provenance import detach_provenance
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree

from pvae.errors import NumericalError, warn
from pvae.graphs import Captured
from pvae.svi.objectives import ItemsStayTensors, inside_handlers, params_met

__all__ = ["CompiledSVI"]

_PLAIN = (bool, int, str, bytes, type(None))
_MOST_STRUCTURES = 8


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
        self._gradients: dict[Any, _Gradients] = {}
        self._losses: dict[Any, _Losses] = {}
        self._warned = False

    @property
    def captures(self) -> int:
        """How many tensor programs were captured; if this goes on growing, something changes from step to step."""
        runs = (*self._gradients.values(), *self._losses.values())
        return sum(run.captures + run.captured.captures for run in runs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Takes one step and returns the loss, as `pyro.infer.SVI.step` does.

        Raises:
            NumericalError: The loss of a captured step is nan, or a gradient nan or infinite; raised before the update.
        """
        given = _Arguments.of(args, kwargs)
        run = self._known(self._gradients, given, _Gradients)
        if run is None or not run.is_ready(given):
            return _by_pyro(super().step, run, given, args, kwargs)
        assert isinstance(run, _Gradients)
        loss, finite, grads, met = run.captured(*given.tensors)
        values = pytree.tree_map(Tensor.item, loss)
        if not finite:
            raise NumericalError(
                f"the loss is {values}, and it or a gradient is not finite; nothing was updated. Try a smaller "
                "learning rate, and look at the data: Pyro's validation sees only the first step with a set of shapes."
            )
        # As of Pyro's: gradients are added to those that are there, and zeros are left of those that were used.
        for number, grad in grads.items():
            param = run.params[number]
            param.grad = grad if param.grad is None else param.grad + grad
        params = [run.params[number] for number in met]
        self.optim(params)
        zero_grads(params)
        return values

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss without a step, as `pyro.infer.SVI.evaluate_loss` does."""
        given = _Arguments.of(args, kwargs)
        run = self._known(self._losses, given, _Losses)
        if run is None or not run.is_ready(given):
            return _by_pyro(super().evaluate_loss, run, given, args, kwargs)
        return pytree.tree_map(Tensor.item, run.captured(*given.tensors))

    def _known(self, runs: dict[Any, Any], given: _Arguments, kind: Any) -> Any:
        """What is known of such arguments; none where they cannot be captured, or there are too many kinds of them."""
        if given.structure is None or inside_handlers():
            return None
        if given.structure not in runs:
            if len(runs) >= _MOST_STRUCTURES:
                self._warn_of_structures()
                return None
            runs[given.structure] = kind(self, given.structure, first=not runs)
        return runs[given.structure]

    def _warn_of_structures(self) -> None:
        if not self._warned:
            warn(
                f"CompiledSVI has seen {_MOST_STRUCTURES} kinds of arguments that differ in more than tensors and "
                "floats, such as an int that counts; further ones run as plain Pyro. Pass tensors or floats.",
            )
        self._warned = True


def _by_pyro(method: Callable[..., Any], run: _Run | None, given: _Arguments, args: Any, kwargs: Any) -> Any:
    """What Pyro's own method returns; the run takes note of it."""
    with params_met() as params:
        loss = method(*args, **kwargs)
    if run is not None:
        run.saw(given, params)
    return loss


class _Run(ABC):
    """A function of the tensors among some arguments, and what the param store held when it ran."""

    name = ""
    tolerances = (1e-5, 1e-4)

    def __init__(self, svi: CompiledSVI, structure: Any, *, first: bool) -> None:
        self.svi, self.structure, self.first, self.captures = svi, structure, first, 0
        self._forget()

    def _forget(self) -> None:
        self.params: list[Tensor] = []
        self.stored: dict[str, Tensor] = {}
        self.shapes: set[Any] = set()
        options: Any = {"compile_first": self.first, "tolerances": self.tolerances, "looks": False}
        self.captured = Captured(self.evaluate, self.name, self.svi._sees, **options)

    def is_ready(self, given: _Arguments) -> bool:
        """Whether Pyro has run once with such shapes, on the parameters and all else that there is now."""
        now = dict(pyro.get_param_store().named_parameters())
        if any(now.get(name) is not param for name, param in self.stored.items()):
            self.captures += self.captured.captures
            self._forget()
        if given.shapes not in self.shapes or self.captured.given_up:
            return False
        if self.captured.look():
            self.shapes.clear()
        return bool(self.shapes)

    def saw(self, given: _Arguments, params: list[Tensor]) -> None:
        """Takes note of a run of Pyro's: its shapes, its parameters, and their places in the param store."""
        if not self.shapes:
            self.captured.guard.renew()  # what the first run has made
        if len(self.shapes) < 1000:
            self.shapes.add(given.shapes)
        self._add(params)
        known = {id(p) for p in self.params}
        self.stored = {name: p for name, p in pyro.get_param_store().named_parameters() if id(p) in known}

    def _add(self, params: Iterable[Tensor]) -> None:
        known = {id(p) for p in self.params}
        self.params += [p for p in params if id(p) not in known]

    @abstractmethod
    def evaluate(self, *tensors: Tensor) -> Any:
        """What is captured."""


class _Gradients(_Run):
    """Loss, whether all is finite, gradients by their parameters' number, and the numbers of those that it met."""

    name = "CompiledSVI.step"
    tolerances = (1e-5, 0.05)

    def evaluate(self, *tensors: Tensor) -> tuple[Any, Tensor, dict[int, Tensor], dict[int, tuple[()]]]:
        args, kwargs = _put_together(self.structure, tensors)
        # Others than those that Pyro meets may get a gradient, too, which waits for whoever moves them.
        self._add(t for t in self.captured.guard.tensors if t.requires_grad and t.is_leaf)
        left = [(param, param.grad) for param in self.params]
        for param in self.params:
            param.grad = None
        try:
            with params_met() as params, pyro.validation_enabled(False), ItemsStayTensors():
                loss = self.svi.loss_and_grads(self.svi.model, self.svi.guide, *args, **kwargs)
            self._add(params)
            grads = {number: p.grad for number, p in enumerate(self.params) if p.grad is not None}
        finally:
            for param in self.params:
                param.grad = None
            for param, grad in left:
                param.grad = grad
        met = {id(param) for param in params}
        met = {number: () for number, param in enumerate(self.params) if id(param) in met}
        loss = _detached(loss)
        # An infinite loss with finite gradients is left to Pyro's objectives: one of them is infinite always.
        parts = pytree.tree_leaves(loss)
        sums = [grad.double().sum() for number, grad in grads.items() if number in met]
        finite = torch.stack([*sums, parts[0].new_zeros((), dtype=torch.float64)]).isfinite().all()
        for part in parts:
            finite = finite & ~part.isnan().any()
        return loss, finite, grads, met


class _Losses(_Run):
    """The loss alone."""

    name = "CompiledSVI.evaluate_loss"

    def evaluate(self, *tensors: Tensor) -> Any:
        args, kwargs = _put_together(self.structure, tensors)
        with torch.no_grad(), pyro.validation_enabled(False), ItemsStayTensors():
            return _detached(self.svi.loss(self.svi.model, self.svi.guide, *args, **kwargs))


def _detached(loss: Any) -> Any:
    return pytree.tree_map(lambda part: torch.as_tensor(detach_provenance(part)).detach(), loss)


class _Arguments(NamedTuple):
    """The arguments of a step, taken apart into tensors and the rest."""

    tensors: tuple[Tensor, ...]
    structure: Any  # the places of the tensors, and all values that are not tensors; none if those can be anything
    shapes: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        # A number in float64 leaves a program of float32 in float32.
        tensors = tuple(
            torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else leaf
            for leaf in leaves
            if isinstance(leaf, Tensor | float)
        )
        rest = tuple(_TENSOR if isinstance(leaf, Tensor | float) else leaf for leaf in leaves)
        plain = all(leaf is _TENSOR or isinstance(leaf, _PLAIN) for leaf in rest)
        # True and 1 are equal, but not the same to a program.
        structure = (spec, rest, tuple(map(type, rest))) if plain else None
        return cls(tensors, structure, tuple((t.shape, t.dtype, t.device) for t in tensors))


def _put_together(structure: Any, tensors: tuple[Tensor, ...]) -> Any:
    """Arguments of a structure, with some tensors."""
    spec, rest, _ = structure
    left = iter(tensors)
    return pytree.tree_unflatten([next(left) if leaf is _TENSOR else leaf for leaf in rest], spec)


_TENSOR = object()
