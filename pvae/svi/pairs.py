"""A pair that is to be trained: where its parameters are, what it is fed, and a look at it before anything moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.data import Batches, Data, InMemory, Stream, Streamed, Transform, as_tensors, is_stream, named_shape
from pvae.errors import warn
from pvae.runtime import ALONE, Processes, Program, base_distribution, dtype_of, isolated, modules_of, place
from pvae.svi import elbos as bounds
from pvae.svi import objectives

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
        tensors = () if is_stream(data) else as_tensors("data", data)
        return cls(model, guide, modules, place(modules, tensors, device)[0])

    def batches(
        self,
        name: str,
        data: Data,
        batch_size: int,
        *,
        seed: int = 0,
        transform: Transform | None = None,
        processes: Processes = ALONE,
        evaluated: bool = False,
        asked_to_stop: Callable[[], bool] = bool,
    ) -> Batches:
        """Checks data, and cuts them into batches on the pair's device."""
        if not is_stream(data):
            _, tensors = place(self.modules, as_tensors(name, data), self.device)
            return InMemory(tensors, batch_size, self.device, transform, seed, processes)
        stream = Stream(name, data, batch_size, seed, processes, evaluated=evaluated)
        # Where there are other processes, one that ended early would leave them waiting.
        asked = asked_to_stop if processes.world_size == 1 else bool
        return Streamed(stream, self.device, dtype_of(self.modules), transform, asked)

    def verified(
        self, batches: Batches, held_out: Batches | None, seed: int, params: Mapping[str, Any] | None
    ) -> tuple[objectives.Verified, Mapping[str, Any]]:
        """Runs the pair on a batch of each; returns what was found, and the state of the param store.

        Raises:
            ProgramError, DataError: As `objectives.verify` does.
        """
        found, state = [], params
        for name, those in (("data", batches), ("validation", held_out)):
            if those is None:
                continue
            whole = those.tensors if isinstance(those, InMemory) and those.transform is None else None
            with (
                named_shape(name, whole),
                isolated(self.modules, seed=seed, device=self.device, params=state) as store,
            ):
                transforms = those is batches
                found.append(objectives.verify(self.model, self.guide, those.first(), whole, transforms=transforms))
                state = store.get_state()
            if isinstance(those, Streamed):
                those.observed = found[-1].observed
        for param in found[0].params:
            if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
                param.data = param.data.contiguous()  # entries that share memory could not be moved one by one
        # A batch of all data does not show that a plate would scale up a smaller one.
        sizes = (one.subsampled_from for one in found if one.subsampled_from is not None)
        depth = max(one.nesting for one in found)
        return found[0]._replace(subsampled_from=next(sizes, None), nesting=depth), state

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

    def find_units(self, batches: Batches, verified: objectives.Verified, seed: int) -> None:
        """Lets modules that want it see the scale of their data, before anything is trained; warns of other scales.

        Such a module has ``wants_units(x)`` and ``find_units(x)``, as `pvae.VAE` does.
        """
        parts: list[Any] = [
            part for module in self.modules for part in module.modules() if hasattr(part, "wants_units")
        ]
        for name, distribution, indices in verified.observed:
            rows = verified.batch[indices[0]]
            wanting = [part for part in parts if part.wants_units(rows)]
            if wanting:
                with isolated(seed=seed, device=self.device):  # a transform may draw
                    rows = batches.any()[indices[0]]
                for part in wanting:
                    part.find_units(rows)
            elif found := _far_scale(name, distribution, rows):
                warn(found)

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


def _far_scale(site: str, distribution: Any, value: Tensor) -> str:
    """How far the scale of a site of real numbers is from that of its data before training, in words; empty if near.

    Noise ten times as wide as the data hides what varies in them. Data a hundred times as far from the site's mean as
    its noise is wide are out of reach: Adam moves a parameter by about its learning rate in a step. Noise that is
    narrower than the data by less may well be right.
    """
    support = distribution.support
    if getattr(support, "base_constraint", support) not in (constraints.real, constraints.real_vector):
        return ""
    try:
        mean, noise = distribution.mean, distribution.stddev.median().item()
    except (NotImplementedError, AttributeError):  # as of transformed distributions
        return ""
    if mean.numel() != value.numel():  # it broadcasts
        return ""
    value = value.to(mean).reshape(mean.shape)
    spread, distance = value.std(correction=0).item(), (value - mean).abs().median().item()
    said = f"site '{site}' is {type(base_distribution(distribution)).__name__} with a standard deviation of {noise:.2g}"
    advice = (
        "Rescale the data, such as to mean 0 and standard deviation 1, or let the scale begin at theirs: Adam moves "
        "its logarithm by about lr in a step."
    )
    if 0 < 10 * spread < noise < float("inf"):
        return f"{said}, and that of its data is {spread:.2g}: noise so wide hides what varies in them. {advice}"
    if 100 * noise < distance < float("inf"):
        return f"{said}, and its data are {distance:.2g} away from its mean (medians, before training). {advice}"
    return ""
