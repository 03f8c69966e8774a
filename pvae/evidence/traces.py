"""Programs run for many particles at once: the only file that traces programs for evidence.

Pyro's own importance weights are joint over the data plate: one number for each particle and the whole batch. Here the
particles get a plate of their own, outside all of the pair's plates, and the log-densities are summed over everything
but particles and data, which leaves shape ``(K, N)``. A program that does not broadcast over such a plate is run on K
copies of the data instead; where all data are one datum, K times. Discrete latents that are marked for enumeration are
summed out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import infer_discrete
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae.errors import ProgramError, PVAEError
from pvae.evidence.enumeration import is_enumerated, log_factors
from pvae.evidence.latents import Layout
from pvae.runtime import Program, density_sites, in_precision

__all__ = ["Batch", "Run", "Runner", "Sites", "UnscoredError", "trace_pair"]

Batch = tuple[Tensor, ...]
Sites = dict[str, Any]

# What enumeration leaves in the dictionary that a program gave as ``infer=``.
_OF_A_RUN = ("_enumerate_dim", "_enumerate_symbol", "_dim_to_id", "_dim_to_symbol", "_enumerate_total")


class UnscoredError(ProgramError):
    """A guide that cannot give its density at latents of others."""


@dataclass(frozen=True, eq=False)
class Run:
    """What came of a program for K particles.

    Attributes:
        layout: Where particles and data stand in it.
        traces: One; or one for each particle, where they are run one by one.
        shape: ``(K, N)``.
        device: Of the densities.
    """

    layout: Layout
    traces: tuple[Any, ...]
    shape: tuple[int, int]
    device: torch.device

    @property
    def sites(self) -> Sites:
        """Those with a density; of the first particle alone, where they are run one by one."""
        return density_sites(self.traces[0].nodes)

    def values(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some sites' values, each of shape ``(K, N, *plates, *event)``."""
        together = 1 if len(self.traces) > 1 else self.shape[0]
        parts = [
            {name: self.layout.gather(site["value"], len(site["fn"].event_shape), together) for name, site in found}
            for found in ([(name, trace.nodes[name]) for name in names] for trace in self.traces)
        ]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in names}

    def log_prob(self, names: Collection[str]) -> Tensor:
        """The log-density of some sites together, shape ``(K, N)``, summed over what is enumerated."""
        parts = [self._log_prob(trace, names) for trace in self.traces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).expand(self.shape)

    def along(self, dim: int, size: int) -> Run:
        """The same run where all data are one datum, with densities for each entry of a plate of so many instead."""
        return replace(self, layout=replace(self.layout, data_dim=dim), shape=(self.shape[0], size))

    def _log_prob(self, trace: Any, names: Collection[str]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sites = [trace.nodes[name] for name in names]
        if any(is_enumerated(site) for site in sites):
            terms = log_factors(trace, names)
        else:
            terms = [scale_and_mask(s["fn"].log_prob(s["value"]), mask=s["mask"]) for s in sites]
        for term in terms:
            total = total + self.layout.sum_out(term, 1 if len(self.traces) > 1 else self.shape[0])
        return total


@dataclass(frozen=True, eq=False)
class Runner:
    """How programs are run for K particles.

    Attributes:
        layout: Where particles and data stand in their tensors.
        dims: How many dimensions a latent's event has, and how many its plates, by name.
        summed: The discrete latents that are summed out.
        made: The latents that the guide makes of variables that the model does not have.
        precision: Of the programs' own products, as for `in_precision`; densities are summed in full.
    """

    layout: Layout
    dims: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    summed: frozenset[str] = frozenset()
    made: frozenset[str] = frozenset()
    precision: str = "float32"

    def run(
        self,
        program: Program,
        batch: Batch,
        num_samples: int,
        values: Mapping[str, Tensor] | None = None,
        *,
        sums: bool = False,
        observes: bool = True,
    ) -> Run:
        """Runs a program for K particles.

        Args:
            program: The model or the guide.
            batch: The data.
            num_samples: ``K``.
            values: Latents that it takes instead of drawing its own, ``(K, N, *plates, *event)`` each.
            sums: Whether discrete latents that are to be summed out are enumerated; otherwise they are drawn.
            observes: Whether observed sites have their data; otherwise they are drawn, too.
        """
        if not observes:
            program = poutine.uncondition(program)
        if self.summed:
            program = _Marks(self.summed if sums else ())(program)
        if self.layout.one_by_one and num_samples > 1:
            singly = ({n: v[k : k + 1] for n, v in values.items()} if values else values for k in range(num_samples))
            traces = tuple(self._trace(program, batch, 1, each, sums) for each in singly)
        else:
            traces = (self._trace(program, batch, num_samples, values, sums),)
        return Run(self.layout, traces, (num_samples, len(batch[0])), batch[0].device)

    def draw(self, guide: Program, batch: Batch, num_samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws the latents of a guide, and returns them with their log-density, shape ``(K, N)``.

        Those that are to be summed out are drawn, too, and then left out: the density is that of the others alone.
        """
        run = self.run(guide, batch, num_samples)
        values = run.values([n for n, s in run.sites.items() if not s["is_observed"] and n not in self.summed])
        if not self.summed.isdisjoint(run.sites):
            given = {name: value for name, value in values.items() if name not in self.made}
            run = self.run(guide, batch, num_samples, given, sums=True)
        return values, run.log_prob(run.sites)

    def score(self, guide: Program, batch: Batch, values: Mapping[str, Tensor]) -> Tensor:
        """Returns a guide's log-density at latents that it may not have drawn, shape ``(K, N)``.

        Raises:
            ProgramError: The guide makes latents of other variables, or by a transform without an inverse, and knows
                only of its own draws.
        """
        try:
            if self.made:
                raise NotImplementedError(
                    f"it makes {sorted(self.made)} of other variables. Draw from a Gaussian like it, such as "
                    "pvae.evidence.proposals.Inflated(scale=1.0) or Refined()"
                )
            run = self.run(guide, batch, len(next(iter(values.values()))), values, sums=True)
            return run.log_prob(run.sites)
        except (KeyError, NotImplementedError) as error:
            raise UnscoredError(
                f"the guide cannot give the density of latents that it did not draw: {error}"
            ) from error

    def draw_summed(
        self, model: Program, batch: Batch, num_samples: int, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Draws what is summed out, ``d ~ p(d | z, x)``, for each particle; ``(K, N, *plates, *event)`` each.

        Args:
            model: The model.
            batch: The data.
            num_samples: ``K``.
            values: All other latents.

        Raises:
            ProgramError: Pyro cannot draw them.
        """
        marked = _Marks(self.summed)(model)
        together = 1 if self.layout.one_by_one else num_samples
        traces = []
        for first in range(0, num_samples, together):
            # Observed, not replayed: sites that are done would not be told what they depend on.
            given = self._laid_out({name: value[first : first + together] for name, value in values.items()})
            program, plate = poutine.condition(marked, data=given), None
            if not self.layout.folded:
                plate = pyro.plate("pvae_particles", together, dim=self.layout.particle_dim)

            def run(*arguments: Tensor, program: Program = program, plate: Any = plate) -> None:
                with plate or nullcontext(), in_precision(self.precision, batch[0].device):
                    program(*arguments)

            draw = infer_discrete(run, first_available_dim=self.layout.particle_dim - 1, temperature=1)
            try:
                traces.append(poutine.trace(draw).get_trace(*self.layout.arguments(batch, together)))
            except (ValueError, NotImplementedError) as error:
                raise ProgramError(
                    f"the latents {sorted(self.summed)} are summed out, and cannot be drawn given the others: {error} "
                    "Let the guide draw them, without the mark infer={'enumerate': ...}."
                ) from error
        whole = Run(self.layout, tuple(traces), (num_samples, len(batch[0])), batch[0].device)
        return whole.values(sorted(self.summed))

    def _laid_out(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents as programs see them."""
        return {name: self.layout.lay_out(value, *self.dims[name]) for name, value in values.items()}

    def _trace(
        self, program: Program, batch: Batch, num_samples: int, values: Mapping[str, Tensor] | None, sums: bool
    ) -> Any:
        if sums and self.summed:  # before latents are given: these depend on what is enumerated, too
            program = poutine.enum(program, first_available_dim=self.layout.particle_dim - 1)
        if values:
            program = poutine.replay(program, trace=_as_trace(self._laid_out(values)))
        plate = nullcontext()
        if not self.layout.folded:
            plate = pyro.plate("pvae_particles", num_samples, dim=self.layout.particle_dim)
        with plate, in_precision(self.precision, batch[0].device):
            return poutine.trace(program).get_trace(*self.layout.arguments(batch, num_samples))


class _Marks(Messenger):
    """Has some latents enumerated, and no others; a program's own marks stay as they are, though it may share them."""

    def __init__(self, enumerated: Collection[str]) -> None:
        super().__init__()
        self.enumerated = enumerated

    def _pyro_sample(self, msg: Any) -> None:
        kept = {key: value for key, value in msg["infer"].items() if key not in _OF_A_RUN}
        mark = "parallel" if msg["name"] in self.enumerated else None
        msg["infer"] = kept | {"enumerate": mark, "num_samples": None}  # all values, not some


class _OwnMarks(Messenger):
    """Finds a model's own ``infer=``, in the place of which a replay puts the guide's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, Any]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.found[msg["name"]] = msg["infer"]


def trace_pair(model: Program, guide: Program, batch: Batch) -> dict[str, Sites]:
    """Runs a pair as it is, once, and returns the sites of the ``"model"`` and of the ``"guide"``.

    Raises:
        ProgramError: It cannot be run on these data.
    """
    try:
        guide_trace = poutine.trace(guide).get_trace(*batch)
        marks = _OwnMarks()
        model_trace = poutine.trace(poutine.replay(marks(model), trace=guide_trace)).get_trace(*batch)
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error.__cause__ or error, PVAEError) or "memory" in str(error):  # of which there may be more
            raise
        raise ProgramError(str(error)) from error
    for name, infer in marks.found.items():
        model_trace.nodes[name]["infer"] = infer  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
    return {"model": dict(model_trace.nodes), "guide": dict(guide_trace.nodes)}


def _as_trace(values: dict[str, Tensor]) -> poutine.Trace:
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    return trace
