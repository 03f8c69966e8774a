"""`CompiledSVI`: Pyro's own SVI, with the loss and its gradients captured and compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.ops.provenance import detach_provenance
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils import _pytree as pytree

from pvae.capture import Captured
from pvae.errors import NumericalError, warn, yes_no_or_auto
from pvae.runtime import in_turn
from pvae.svi.arguments import Arguments, most_varied, name_of
from pvae.svi.losses import ItemsStayTensors
from pvae.svi.together import Together
from pvae.svi.traces import inside_handlers, params_met

__all__ = ["CompiledSVI"]

_MOST_KINDS = 8  # of arguments
_MOST_SHAPES = 32  # of their tensors
_STEPS_FOR_A_CAPTURE = 250  # which costs as much as 20 to 90 steps of Pyro's, and saves a third of each step or more
_PLAIN_STEPS = 100  # from the first, after which it is said why


class CompiledSVI(SVI):
    """A drop-in for `pyro.infer.SVI`: the same arguments and steps, in long runs two to three times as fast.

    The first step with a set of shapes is Pyro's own, with its checks and warnings; at the second, loss and gradients
    are captured as one tensor program. The program is compiled after some thousands of steps, fewer of a large network,
    when they would have paid for it: a short run is not made longer. For the same reason each further capture, as for a
    ragged last batch, waits until 250 steps were taken, and the one of `evaluate_loss` for 20 calls.

    Parameters stay where Pyro keeps them, in modules and the global param store, and the optimizer is any of
    ``pyro.optim``, with its state. Where parameters have the same settings of Adam, AdamW, SGD, ClippedAdam or another
    of the common kinds, all are moved at once, to the same numbers within rounding. Gradients are left as Pyro leaves
    them: a parameter that a step met goes to the optimizer also where that step has no gradient for it,
    and momentum may move it. (`pvae.fit` does not move it.)

    Tensors and floats among the arguments of `step` may change freely (a float becomes a tensor, so that a weight that
    is annealed needs no new capture); for other values the program is captured anew, up to eight kinds of them. Layers
    that were replaced, parameters that were added, a module that was moved or put into another mode, and a param store
    that was cleared are noticed. Where a program cannot be captured, a warning says why, and steps go on as Pyro's.

    Args:
        model: As for `pyro.infer.SVI`, as is the rest.
        guide: The guide.
        optim: One of ``pyro.optim``.
        loss: ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``RenyiELBO``, ``TraceEnum_ELBO``, another ELBO object, or a
            function.
        loss_and_grads: As for `pyro.infer.SVI`.
        compile: ``"auto"`` as above; ``True`` compiles the first set of shapes as soon as it is captured, which takes
            some seconds; ``False`` never compiles.
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
        *,
        compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, guide, optim, loss, loss_and_grads, **kwargs)
        self._sees = (model, guide, loss, loss_and_grads)
        self._compile = yes_no_or_auto("compile", compile)
        self._gradients: list[_Run] = []
        self._losses: list[_Run] = []
        self._optimize = Together(optim)
        self._taken = 0
        self._warned: set[str] = set()

    @property
    def captures(self) -> int:
        """How many tensor programs were captured; if this goes on growing, something changes from step to step."""
        return sum(run.captures + run.captured.captures for run in (*self._gradients, *self._losses))

    @in_turn
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Takes one step and returns the loss, as `pyro.infer.SVI.step` does.

        Raises:
            NumericalError: The loss of a captured step is nan, or a gradient nan or infinite; raised before the update.
        """
        given = Arguments.of(args, kwargs)
        run = self._run_for(self._gradients, given, _Gradients)
        if run is None or not run.is_ready(given):
            return self._by_pyro(super().step, run, given, args, kwargs)
        if (results := run.captured.run_graph(*given.tensors)) is None:
            return self._by_pyro(super().step, run, given, args, kwargs)
        loss, finite, grads, met = results
        values = pytree.tree_map(Tensor.item, loss)
        if not finite:
            raise NumericalError(
                f"the loss is {values}, and it or a gradient is not finite; nothing was updated. Try a smaller "
                "learning rate, and look at the data: Pyro's validation sees only the first step with a set of shapes."
            )
        # As of Pyro's: gradients are added to those that are there, and zeros are left of those that were used.
        for number, grad in grads.items():
            param = run.params[number]
            param.grad = grad if param.grad is None or run.zeros.left(param) else param.grad + grad
        params = [run.params[number] for number in met]
        self._optimize(params)
        run.zeros.leave(params)
        return values

    @in_turn
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss without a step, as `pyro.infer.SVI.evaluate_loss` does."""
        given = Arguments.of(args, kwargs)
        run = self._run_for(self._losses, given, _Losses)
        if run is None or not run.is_ready(given):
            return self._by_pyro(super().evaluate_loss, run, given, args, kwargs)
        if (loss := run.captured.run_graph(*given.tensors)) is None:
            return self._by_pyro(super().evaluate_loss, run, given, args, kwargs)
        return pytree.tree_map(Tensor.item, loss)

    def _run_for(self, runs: list[_Run], given: Arguments, kind: type[_Run]) -> _Run | None:
        """What is known of such arguments; none where they cannot be captured, or there are too many kinds of them."""
        self._taken += 1
        if inside_handlers():
            return None
        found = next((run for run in runs if run.given.same(given)), None)
        if found is not None:
            return found
        if foreign := given.foreign():
            self._warn(
                f"plain Pyro: {name_of(foreign[0], self.model)} is or holds a {foreign[1]}, of which nobody can say "
                "whether it has changed. Pass tensors, numbers, strings, or objects and small containers of them."
            )
            return None
        if len(runs) >= _MOST_KINDS:
            varied = name_of(most_varied([run.given for run in runs]), self.model)
            self._warn(
                f"plain Pyro, but for {_MOST_KINDS} kinds of arguments that differ in more than tensors and floats, "
                f"mostly in {varied}. Pass a tensor or a float, where it is something to compute with."
            )
            return None
        runs.append(kind(self, given))
        return runs[-1]

    def _by_pyro(self, method: Callable[..., Any], run: _Run | None, given: Arguments, args: Any, kwargs: Any) -> Any:
        """What Pyro's own method returns; the run takes note of it."""
        with params_met() as params:
            loss = method(*args, **kwargs)
        if run is not None:
            run.saw(given, params)
        said = self._warned or any(run.captured.given_up for run in (*self._gradients, *self._losses))
        if self._taken == _PLAIN_STEPS and not self.captures and not said:
            handlers = "they are taken inside of one of Pyro's handlers. Put it around the model and the guide instead"
            store = "the param store is set anew before each, or tensors never have the same shapes twice"
            self._warn(f"plain Pyro so far: {handlers if inside_handlers() else store}.")
        return loss

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(f"CompiledSVI takes steps as {message}")


class _Zeros:
    """Gradients of zero, which Pyro leaves after a step: one for each parameter, until somebody adds to it."""

    def __init__(self) -> None:
        self.zeros: dict[Tensor, tuple[Tensor, int]] = {}

    def left(self, param: Tensor) -> bool:
        """Whether a parameter's gradient is the one that was left, and still zero."""
        zero, version = self.zeros.get(param, (None, 0))
        return zero is not None and param.grad is zero and zero._version == version

    def leave(self, params: Iterable[Tensor]) -> None:
        """Makes the gradients zero, of those that have one."""
        for param in params:
            if param.grad is None:
                continue
            zero, version = self.zeros.get(param, (None, 0))
            if zero is None or zero._version != version or not _are_alike(zero, param):
                zero = torch.zeros_like(param.grad)
                self.zeros[param] = zero, zero._version
            param.grad = zero


def _are_alike(zero: Tensor, param: Tensor) -> bool:
    return (zero.shape, zero.dtype, zero.device) == (param.shape, param.dtype, param.device)


class _Run(ABC):
    """A function of the tensors among some arguments, and what the param store held when it ran."""

    name = ""
    after = 1  # so many runs of Pyro's, with the same shapes
    tolerances = (1e-5, 1e-4)

    def __init__(self, svi: CompiledSVI, given: Arguments) -> None:
        self.svi, self.given, self.captures = svi, given._replace(tensors=()), 0
        self._forget()

    def _forget(self) -> None:
        self.params: list[Tensor] = []
        self.stored: dict[str, Tensor] = {}
        self.seen: dict[Any, int] = {}  # runs of Pyro's by shapes
        self.allowed: set[Any] = set()  # shapes to capture
        self.zeros = _Zeros()
        compile = self.svi._compile
        options: Any = {
            "tolerances": self.tolerances,
            "check_each_run": False,
            "compile_after": "auto" if compile else None,
        }
        if self.given.has_floats:
            options["original"] = partial(self.evaluate, floats=True)
        options["compile_first"] = compile is True and isinstance(self, _Gradients)
        self.captured = Captured(self.evaluate, self.name, (*self.svi._sees, *self.given.objects), **options)

    def is_ready(self, given: Arguments) -> bool:
        """Whether to run what is captured: of such shapes, and of the parameters and all else that there is now."""
        now = dict(pyro.get_param_store().named_parameters())
        if any(now.get(name) is not param for name, param in self.stored.items()):
            self.captures += self.captured.captures
            self._forget()
        if self.captured.given_up or self.seen.get(given.shapes, 0) < self.after:
            return False
        if self.captured.drop_if_changed():  # a changed program's first run is Pyro's, too
            self.seen.clear()
            self.allowed.clear()
            return False
        if self.svi._taken >= self.svi.captures * _STEPS_FOR_A_CAPTURE:
            self.allowed.add(given.shapes)
        return given.shapes in self.allowed

    def saw(self, given: Arguments, params: list[Tensor]) -> None:
        """Takes note of a run of Pyro's: its shapes, its parameters, and their places in the param store."""
        if not self.seen:
            self.captured.guard.renew()  # what the first run has made
        if given.shapes in self.seen or len(self.seen) < _MOST_SHAPES:
            self.seen[given.shapes] = self.seen.get(given.shapes, 0) + 1
        else:
            varied = max(enumerate(given.parts), key=lambda part: len({shapes[part[0]] for shapes in self.seen}))
            self.svi._warn(
                f"plain Pyro, but for {_MOST_SHAPES} sets of shapes, mostly of {name_of(varied[1], self.svi.model)}. "
                "Pad tensors to a few sizes."
            )
        self._add(params)
        known = {id(p) for p in self.params}
        self.stored = {name: p for name, p in pyro.get_param_store().named_parameters() if id(p) in known}

    def _add(self, params: Iterable[Tensor]) -> None:
        known = {id(p) for p in self.params}
        self.params += [p for p in params if id(p) not in known]

    @abstractmethod
    def evaluate(self, *tensors: Tensor, floats: bool = False) -> Any:
        """What is captured, of floats as tensors, and what that is compared with, of floats as they are."""


class _Gradients(_Run):
    """Loss, whether all is finite, gradients by their parameters' number, and the numbers of those that it met."""

    name = "CompiledSVI.step"
    tolerances = (1e-5, 0.05)

    def evaluate(
        self, *tensors: Tensor, floats: bool = False
    ) -> tuple[Any, Tensor, dict[int, Tensor], dict[int, tuple[()]]]:
        args, kwargs = self.given.put_together(tensors, floats=floats)
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
        loss = _detach(loss)
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
    after = 20

    def evaluate(self, *tensors: Tensor, floats: bool = False) -> Any:
        args, kwargs = self.given.put_together(tensors, floats=floats)
        with torch.no_grad(), pyro.validation_enabled(False), ItemsStayTensors():
            return _detach(self.svi.loss(self.svi.model, self.svi.guide, *args, **kwargs))


def _detach(loss: Any) -> Any:
    return pytree.tree_map(lambda part: torch.as_tensor(detach_provenance(part)).detach(), loss)
