"""One loss of a batch, with its gradients: by one of Pyro's ELBO objects, or by a callable.

An objective is either one of Pyro's ELBO objects (`pyro.infer.Trace_ELBO`, `pyro.infer.RenyiELBO`, ...) or a plain
callable ``objective(model, guide, *batch)`` that returns a scalar loss to differentiate, as those of
`pvae.svi.objectives` are. Either way the loss is in nats, summed over the batch, as Pyro's are: so every datum weighs
the same in a ragged last batch as in a full one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceTailAdaptive_ELBO
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pvae.errors import ArgumentError
from pvae.runtime import Program
from pvae.svi.traces import WeightedLatents, params_met

__all__ = ["ItemsStayTensors", "Objective", "loss_and_grads", "loss_of"]

Objective = ELBO | Callable[..., Tensor]


def loss_and_grads(
    objective: Objective, model: Program, guide: Program, batch: tuple[Tensor, ...], kl_weight: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Runs forward and backward on one batch; gradients are left in the parameters' ``grad``.

    Args:
        objective: What to minimise.
        model: The generative program.
        guide: The recognition program.
        batch: What they are called with.
        kl_weight: A number to multiply the log-densities of latents by, in the model and in the guide; 1 if left out.

    Returns:
        The loss, in nats summed over the batch, and the unconstrained parameters that the programs met.
    """
    with params_met() as params, WeightedLatents(kl_weight):
        if isinstance(objective, TraceTailAdaptive_ELBO):
            loss = _tail_adaptive(objective, model, guide, batch)
            (loss / objective.num_particles).backward()  # as it does itself
        elif isinstance(objective, ELBO):
            pyro_elbo: Any = objective  # its subclasses have loss_and_grads, the base class does not
            loss = _sum_of(pyro_elbo.loss_and_grads(model, guide, *batch))
        else:
            loss = objective(model, guide, *batch)
            _check_single(loss, objective)
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
    _check_single(loss, objective)
    return torch.as_tensor(loss, dtype=torch.float64, device=batch[0].device).detach(), params


def _check_single(loss: Any, objective: Objective) -> None:
    if not isinstance(loss, int | float | Tensor) or (isinstance(loss, Tensor) and loss.dim()):
        name = getattr(objective, "__name__", type(objective).__name__)
        raise ArgumentError(f"objective must give one loss, got {loss!r} from {name}.")


def loss_of(elbo: Any, model: Program, guide: Program, batch: tuple[Tensor, ...]) -> Tensor:
    """An objective's loss of one batch, in nats summed over it."""
    if isinstance(elbo, TraceTailAdaptive_ELBO):
        loss = _tail_adaptive(elbo, model, guide, batch)
    else:
        loss = _sum_of(getattr(elbo, "loss", elbo)(model, guide, *batch))  # of one of Pyro's, and of a callable
    return torch.as_tensor(loss, dtype=torch.float64, device=batch[0].device)


def _tail_adaptive(elbo: TraceTailAdaptive_ELBO, model: Program, guide: Program, batch: tuple[Tensor, ...]) -> Tensor:
    """What is differentiated: minus the mean of ``log p(x, z) - log q(z|x)``, weighted by ranks. Its loss is inf."""
    (traces,) = elbo._get_traces(model, guide, batch, {})
    return elbo._differentiable_loss_particle(*traces)[1]


def _sum_of(loss: Any) -> Any:
    """One loss of two, as those of the model and of the guide, whose gradients are taken together."""
    return sum(loss) if isinstance(loss, tuple) and loss else loss


class ItemsStayTensors(TorchFunctionMode):
    """Lets Pyro's objectives be captured: numbers that they only report or test for nan stay tensors.

    Pyro takes ``.item()`` of every loss, asks whether any is nan, and looks for probabilities of zero to leave out;
    each would tie a capture to the numbers of one batch. Reads by anybody else remain, and stop the capture.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers Pyro's own questions without looking at the numbers."""
        if func in (Tensor.item, Tensor.__bool__, Tensor.register_hook):
            frame = sys._getframe(1)
            if func is Tensor.__bool__ and frame.f_code.co_filename == _VALIDATES:
                return True  # a distribution that was made while validation was on
            while frame.f_back and frame.f_code.co_filename.startswith(_TORCH):
                frame = frame.f_back
            caller = Path(frame.f_code.co_filename)
            if func is Tensor.item and _PYRO in caller.parents:
                return args[0].detach()
            if caller == _PYRO / "util.py":
                return False  # nothing is nan, and gradients need not be asked; both are looked at later
            if caller == _PYRO / "infer" / "util.py":
                return True  # all probabilities are positive
        return func(*args, **(kwargs or {}))


_PYRO = Path(pyro.__file__).parent
_TORCH = str(Path(torch.__file__).parent)
_VALIDATES = torch.distributions.distribution.__file__
