"""A pair that is to be trained: where its parameters are, what it is fed, and a look at it before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pvae.checks import Data, as_tensors
from pvae.errors import warn
from pvae.isolation import Program, dtype_of, isolated, modules_of, place, resolve_device
from pvae.ranks import ALONE, Ranks
from pvae.streams import Stream, is_stream
from pvae.svi import bounds, objectives
from pvae.svi.batches import Batches, InMemory, Streamed, Transform

__all__ = ["Pair"]


@dataclass(frozen=True)
class Pair:
    """A model and a guide on a device.

    Attributes:
        model: The generative program.
        guide: The recognition program.
        modules: Those found in the two.
        device: Where they were put.
    """

    model: Program
    guide: Program
    modules: Sequence[nn.Module]
    device: torch.device

    @classmethod
    def of(cls, model: Program, guide: Program, data: Data, device: str | torch.device, objective: Any = None) -> Pair:
        """Puts a pair, and what an objective holds, on a device; ``"auto"`` without modules is where the data are."""
        modules = modules_of(model, guide, *([] if objective is None else [objective]))
        if is_stream(data):
            for module in modules:
                module.to(resolve_device(device))
            return cls(model, guide, modules, resolve_device(device))
        return cls(model, guide, modules, place(modules, as_tensors("data", data), device)[0])

    def batches(
        self,
        name: str,
        data: Data,
        batch_size: int,
        *,
        seed: int = 0,
        transform: Transform | None = None,
        ranks: Ranks = ALONE,
        evaluated: bool = False,
        asked_to_stop: Callable[[], bool] = bool,
    ) -> Batches:
        """Checks data, and cuts them into batches on the pair's device."""
        if not is_stream(data):
            _, tensors = place(self.modules, as_tensors(name, data), self.device)
            return InMemory(tensors, batch_size, self.device, transform, seed, ranks)
        stream = Stream(name, data, batch_size, seed, ranks, evaluated=evaluated)
        # Where there are other processes, one that ended early would leave them waiting.
        asked = asked_to_stop if ranks.count == 1 else bool
        return Streamed(stream, self.device, dtype_of(self.modules), transform, asked)

    def verified(
        self, batches: Batches, held_out: Batches | None, seed: int, params: Mapping[str, Any] | None
    ) -> tuple[objectives.Verified, Mapping[str, Any]]:
        """Runs the pair on a batch of each; returns what was found, and the state of the param store.

        Raises:
            ProgramError, DataError: As `objectives.verify` does.
        """
        with isolated(self.modules, seed=seed, device=self.device, params=params) as store:
            found = []
            for those in filter(None, (batches, held_out)):
                whole = those.tensors if isinstance(those, InMemory) and those.transform is None else None
                found.append(objectives.verify(self.model, self.guide, those.first(), whole))
                if isinstance(those, Streamed):
                    those.observed = found[-1].observed
            for param in found[0].params:
                if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
                    param.data = param.data.contiguous()  # entries that share memory could not be moved one by one
            # A batch of all data does not show that a plate would scale up a smaller one.
            sizes = (one.subsampled_from for one in found if one.subsampled_from is not None)
            depth = max(one.nesting for one in found)
            return found[0]._replace(subsampled_from=next(sizes, None), nesting=depth), store.get_state()

    def objective(
        self,
        asked: objectives.Objective | None,
        verified: objectives.Verified,
        batches: Batches,
        params: Mapping[str, Any],
        *,
        weighted: bool,
    ) -> objectives.Objective:
        """What the pair is trained by: what was asked for, where it can, or the ELBO.

        Raises:
            ProgramError: As `bounds.resolve` and `bounds.try_out` do.
        """
        objective = bounds.resolve(asked, verified, weighted=weighted)
        if verified.marked:
            with isolated(self.modules, seed=0, device=self.device, params=params):
                bounds.try_out(objective, self.model, self.guide, batches.first(), verified)
        return objective

    def warn_if_collapsed(self, batches: Batches, params: Mapping[str, Any]) -> None:
        """Says so where no latent dimension follows the data."""
        with isolated(self.modules, seed=0, device=self.device, params=params):
            if objectives.inactive(self.model, self.guide, batches.first()):
                warn(
                    "the posterior has collapsed: no latent dimension follows x, since Var_x(E_q[z]) is below 0.01 of "
                    "the prior's variance for each, so that the model makes no use of its latents. Try a warm-up "
                    "(kl_weight=lambda epoch: min(1.0, epoch / 10)), a smaller lr, or a less powerful decoder.",
                )

    def named_tensors(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What training changes, by names that are the same in every process: modules' states, and bare parameters.

        Args:
            params: Unconstrained, as the store holds them. Where there are several modules, names begin with the
                modules' numbers.
        """
        tensors: dict[str, Tensor] = {}
        seen: set[Any] = set()
        for number, module in enumerate(self.modules):
            for key, value in module.state_dict(keep_vars=True).items():
                if not isinstance(value, Tensor) or value.layout is not torch.strided:
                    continue  # `unnamed` tells of them
                place_in_memory = (value.data_ptr(), value.shape, value.stride())
                if place_in_memory not in seen or not value.numel():  # else it is in there under another name
                    seen.add(place_in_memory)
                    tensors[key if len(self.modules) == 1 else f"{number}.{key}"] = value
        return tensors | {f"param/{name}": params[name] for name in self.bare(params)}

    def bare(self, params: Mapping[str, Tensor]) -> list[str]:
        """The names of parameters that live in no module that was found."""
        own = {id(p) for module in self.modules for p in module.parameters()}
        # Pyro's own mark of a module's parameter; such a module may mean another one of that name elsewhere.
        return [name for name, value in params.items() if id(value) not in own and "$$$" not in name]

    def unnamed(self) -> list[str]:
        """What modules hold that `named_tensors` leaves out, in words."""
        states = [(key, value) for module in self.modules for key, value in module.state_dict().items()]
        return [
            f"'{key}' is {f'of layout {value.layout}' if isinstance(value, Tensor) else f'a {type(value).__name__}'}"
            for key, value in states
            if not isinstance(value, Tensor) or value.layout is not torch.strided
        ]
