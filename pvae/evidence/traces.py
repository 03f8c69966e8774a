"""A Pyro model and guide seen as densities for each datum: the only file that traces programs for evidence.

Pyro's own importance weights are joint over the data plate: one number for each particle and the whole batch. Here the
particles get a plate of their own, outside all of the pair's plates, and the log-densities are summed over everything
but particles and data, which leaves shape ``(K, N)``. A program that does not broadcast over such a plate is run on K
copies of the data instead.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pvae.errors import DataError, ProgramError, PVAEError
from pvae.evidence.exponential_families import FAMILIES, is_constant_along, leaf_of, shared_log_prob
from pvae.evidence.latents import Latents, LatentSpace, Layout
from pvae.evidence.pair_checks import (
    check_densities,
    check_names,
    check_takes_batches,
    data_dim,
    first_other_row,
    latent_of,
    normal_moments,
    observed_of,
    other_support,
    plates_of,
    refusal,
    support_of,
)
from pvae.evidence.programs import Programs
from pvae.runtime import (
    Pair,
    Program,
    check_pair,
    check_signature,
    check_supports,
    density_sites,
    observed_data,
    tensors_of,
)

__all__ = ["Densities"]

logger = logging.getLogger("pvae")

Batch = tuple[Tensor, ...]
Sites = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Densities:
    """A pair's densities for each datum: of a model and a guide whose sites all lie in one plate over the data.

    Scales (``poutine.scale``, a subsampling plate) are no part of log p(x) and are left out; masks are applied.

    Attributes:
        placed: The pair, on its device.
        layout: Where particles and data stand in the programs' tensors.
        trial: Two data, on which programs are tried.
        observed: What observes the data, as `pvae.runtime.sites.observed_data` finds it.
        programs: What is run on them many times.
    """

    placed: Pair
    layout: Layout
    trial: Batch
    observed: tuple[Any, ...] = ()
    programs: Programs = field(default_factory=lambda: Programs(()), repr=False)
    _with_guides: dict[Program, Densities] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, placed: Pair, data: Batch, *, nesting: int = 0) -> Densities:
        """Looks at a pair and its data, and raises where log p(x) for each datum is not defined by them.

        The data plate is the one whose size follows the number of data: the pair is run on one datum and on two, on
        its device. ``nesting`` is the least number of plates' dimensions to leave room for.

        Raises:
            ProgramError: No such plate, a site outside of it, latent sites that differ, a guide with point masses, or
                data that depend on each other.
            DataError: Data outside the support of their site.
        """
        traces, model, guide = {}, placed.model, placed.guide
        check_takes_batches(guide)
        check_signature("model", model, data)
        check_signature("guide", guide, data)
        with pyro.validation_enabled(True):
            for rows in ([0], [0, first_other_row(data)]):
                batch = tuple(t[rows].to(placed.device) for t in data)
                traces[len(rows)] = _trace_once(model, guide, batch)
        check_names(traces[1]["model"], traces[2]["model"])
        check_pair(traces[2]["model"], traces[2]["guide"], strict=True)
        check_densities(**traces[2])
        found = tuple(observed_data(traces[2]["model"], batch))
        check_supports(found, data)
        dim = data_dim(traces[1], traces[2])
        depths = [-plate.dim for sites in traces[2].values() for s in sites.values() for plate in plates_of(s)]
        layout = Layout(dim, -max(nesting, *depths) - 1)
        return _lay_out_particles(cls(placed, layout, batch, found, Programs((model, guide))))

    def with_guide(self, guide: Program) -> Densities:
        """The same model with another guide."""
        if guide not in self._with_guides:
            nesting = -self.layout.particle_dim - 1
            other = Densities.of(replace(self.placed, guide=guide), self.trial, nesting=nesting)
            if other.layout.particle_dim != self.layout.particle_dim:
                raise ProgramError("another guide for the pair has plates further to the left than the pair itself.")
            self._with_guides[guide] = other
        return self._with_guides[guide]

    @property
    def model(self) -> Program:
        """The generative program."""
        return self.placed.model

    @property
    def guide(self) -> Program:
        """The recognition program."""
        return self.placed.guide

    @property
    def entries(self) -> int:
        """Numbers in the largest tensor of one datum."""
        return max(t[0].numel() for t in self.trial)

    @property
    def precision(self) -> float:
        """Machine epsilon of the numbers that densities are computed in."""
        floating = (t.dtype for t in self.trial if t.is_floating_point())
        return torch.finfo(self.placed.dtype or next(floating, torch.get_default_dtype())).eps

    @cached_property
    def has_other_supports(self) -> bool:
        """Whether data have supports that a single entry does not show, such as a Binomial's or one-hots'."""
        sites = observed_of(self._run(self.model, self.trial, 1))
        return any(other_support(site) is not None for site in sites.values())

    def check_data(self, batch: Batch) -> None:
        """Raises `DataError` where observed data lie outside of their support, where `has_other_supports`."""
        latents, _ = self.draw_guide(batch, 1)
        for name, site in observed_of(self._run(self.model, batch, 1, latents)).items():
            support = other_support(site)
            bad = torch.zeros(1) if support is None else ~support.check(site["value"])
            if bad.any():
                family = type(leaf_of(site["fn"])).__name__
                share = f"{bad.double().mean().item():.3%}"
                raise DataError(f"site '{name}' is {family} with support {support}; {share} of a batch are outside.")

    @cached_property
    def space(self) -> LatentSpace:
        """The latents as vectors of real numbers."""
        sites = latent_of(self._run(self.model, self.trial, 3))
        values = self._gather(sites, 3)
        supports = {name: (support_of(site), values[name]) for name, site in sites.items()}
        return LatentSpace.of(supports, {name: refusal(site) for name, site in sites.items()})

    def draw_guide(self, batch: Batch, num_samples: int) -> tuple[Latents, Tensor]:
        """Draws latents from the guide, and returns them with log q(z|x), shape ``(K, N)``."""
        sites = self._run(self.guide, batch, num_samples)
        return Latents(self._gather(sites, num_samples), num_samples), self._log_density(sites, batch, num_samples)

    def draw_prior(self, batch: Batch, num_samples: int) -> Latents:
        """Draws latents from the prior, afresh for each datum; their densities come with them."""
        sites = self._run(self.model, batch, num_samples)
        densities = self._densities(sites, batch, num_samples)
        return Latents(self._gather(latent_of(sites), num_samples), num_samples, densities)

    def log_qz(self, batch: Batch, latents: Latents) -> Tensor:
        """Returns the guide's log q(z|x) at some latents, shape ``(K, N)``.

        Raises:
            ProgramError: The guide has a transform without an inverse, and knows only of its own draws.
        """
        try:
            sites = self._run(self.guide, batch, latents.num_samples, latents)
            return self._log_density(sites, batch, latents.num_samples)
        except (KeyError, NotImplementedError) as error:
            raise _Unscored(f"the guide cannot give the density of latents that it did not draw: {error}") from error

    def densities(self, batch: Batch, latents: Latents) -> tuple[Tensor, Tensor]:
        """Returns log p(z) and log p(x|z) at some latents, each of shape ``(K, N)``; they are kept with the latents."""
        if latents.densities is None:
            sites = self._run(self.model, batch, latents.num_samples, latents)
            latents.densities = self._densities(sites, batch, latents.num_samples)
        return latents.densities

    def log_pxz(self, batch: Batch, latents: Latents) -> Tensor:
        """Returns log p(x, z) at some latents, shape ``(K, N)``."""
        log_pz, log_px_given_z = self.densities(batch, latents)
        return log_pz + log_px_given_z

    @cached_property
    def shares_prior(self) -> bool:
        """Whether draws from the prior serve all data: p(x|z) is of a known exponential family, given latents alone."""
        if self.layout.folded:
            return False
        try:
            sites = self._shared_run(self.trial, 3)
        except (RuntimeError, ValueError, IndexError):  # the model wants one latent for each datum
            return False
        observed, dim = list(observed_of(sites).values()), self.layout.data_dim
        in_two_plates = all(len(plates_of(site)) == 2 for site in sites.values())  # of particles and of data
        if len(observed) != 1 or not in_two_plates or not all(is_constant_along(s["fn"], dim) for s in sites.values()):
            return False
        (site,) = observed
        plain = type(leaf_of(site["fn"])) in FAMILIES and site["mask"] is None
        if not plain or site["value"].shape != (len(self.trial[0]), *site["fn"].event_shape):
            return False
        exact = self._log_density({"x": site}, self.trial, 3)
        return torch.allclose(shared_log_prob(site["fn"], dim, site["value"]).double(), exact, rtol=1e-4, atol=1e-4)

    def draw_shared_prior(self, batch: Batch, num_samples: int, *, exact: bool = True) -> Tensor:
        """Draws K latents from the prior and decodes them once; returns log p(x|z) of all data, shape ``(K, N)``."""
        (site,) = observed_of(self._shared_run(batch, num_samples)).values()
        return shared_log_prob(site["fn"], self.layout.data_dim, site["value"], exact=exact)

    def guide_moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean of q(z|x) in `space`, ``(N, D)``, and the Cholesky factor of its covariance, ``(N, D, D)``.

        Exact where all sites are normal and do not depend on each other; else from ``max(400, 10 D)`` draws.
        """
        dim = self.space.dim
        sites = self._run(self.guide, batch, 3)
        normal = [normal_moments(sites[name], self.layout) for name in self.space.sites]
        if all(normal):
            locs, factors = zip(*normal, strict=True)  # type: ignore[arg-type]
            return torch.cat(locs, -1), torch.vmap(torch.block_diag)(*factors)
        latents, _ = self.draw_guide(batch, max(400, 10 * dim))
        u = self.space.flatten(latents)[0]
        loc = u.mean(0)
        centred = (u - loc).transpose(0, 1)
        covariance = centred.mT @ centred / (len(u) - 1)
        jitter = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
        return loc, torch.linalg.cholesky(covariance + jitter[:, None, None] * torch.eye(u.shape[-1]).to(u))

    def simulate(self, batch: Batch) -> tuple[Batch, Latents]:
        """Draws ``z ~ p(z)`` and ``x ~ p(x|z)``, and returns the batch with x in the place of its data, and z.

        Raises:
            ProgramError: An observed site's data are no tensor of the batch as it is.
        """
        observed = observed_of(self._run(self.model, batch, 1))
        sites = self._run(poutine.uncondition(self.model), batch, 1)
        drawn = self._gather(sites, 1)
        simulated = list(batch)
        for name, site in observed.items():
            same = tensors_of(site["value"], batch)
            if len(same) != 1:
                raise ProgramError(
                    f"cannot simulate data: site '{name}', of shape {tuple(site['value'].shape)}, observes "
                    f"{'none' if not same else 'more than one'} of the data tensors as it is; their shapes are "
                    f"{[tuple(t.shape) for t in batch]}."
                )
            draw, like = drawn.pop(name)[0], batch[same[0]]
            if draw.numel() != like.numel():
                raise ProgramError(
                    f"cannot simulate data: a draw of site '{name}' has shape {tuple(draw.shape)}, and the data that "
                    f"it observes {tuple(like.shape)}, which broadcast. Give its distribution the data's shape, such "
                    "as by expanding a parameter to it."
                )
            simulated[same[0]] = draw.reshape(like.shape).to(like)
        latents, data = Latents(drawn, 1), tuple(simulated)
        again = self._log_density(observed_of(self._run(self.model, data, 1, latents)), data, 1)
        if not torch.allclose(
            again, self._log_density({name: sites[name] for name in observed}, batch, 1), rtol=1e-4, atol=1e-4
        ):
            raise ProgramError(
                "cannot simulate data: given them, the model's log p(x|z) is not what it was when it drew them. It may "
                "use data beyond observing them, or round them to whole numbers."
            )
        return data, latents

    def _run(self, program: Program, batch: Batch, num_samples: int, latents: Latents | None = None) -> Sites:
        """Runs a program for K particles, with latents of its own or given ones; returns its sites with densities."""
        if latents is not None:
            check_names(latents.values.keys(), self._dims.keys())
            values = {name: self.layout.lay_out(v, *self._dims[name]) for name, v in latents.values.items()}
            program = poutine.replay(program, trace=_as_trace(values))
        batch = self.layout.copies(batch, num_samples)
        plate = nullcontext()
        if not self.layout.folded:
            plate = pyro.plate("pvae_particles", num_samples, dim=self.layout.particle_dim)
        with plate:
            sites = density_sites(poutine.trace(program).get_trace(*batch).nodes)
        if latents is not None:
            check_names(latent_of(sites).keys(), latents.values.keys())
        return sites

    @cached_property
    def _dims(self) -> dict[str, tuple[int, int]]:
        """How many dimensions a latent's event has, and how many its plates."""
        sites = latent_of(density_sites(poutine.trace(self.model).get_trace(*self.trial).nodes))
        return {name: (len(site["fn"].event_shape), len(site["fn"].batch_shape)) for name, site in sites.items()}

    def _gather(self, sites: Sites, num_samples: int) -> dict[str, Tensor]:
        gather = self.layout.gather
        return {name: gather(s["value"], len(s["fn"].event_shape), num_samples) for name, s in sites.items()}

    def _densities(self, sites: Sites, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
        latent, observed = latent_of(sites), observed_of(sites)
        return self._log_density(latent, batch, num_samples), self._log_density(observed, batch, num_samples)

    def _log_density(self, sites: Sites, batch: Batch, num_samples: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=batch[0].device)
        for site in sites.values():
            log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            total = total + self.layout.sum_out(log_prob, num_samples)
        return total.expand(num_samples, len(batch[0]))

    def _shared_run(self, batch: Batch, num_samples: int) -> Sites:
        """Runs the model on a batch with K latents that were drawn for its first datum."""
        first = self._run(self.model, tuple(t[:1] for t in batch), num_samples)
        latents = self._gather(latent_of(first), num_samples)
        return self._run(self.model, batch, num_samples, Latents(latents, num_samples))


def _trace_once(model: Program, guide: Program, batch: Batch) -> dict[str, Sites]:
    """Runs a pair as it is, once."""
    try:
        guide_trace = poutine.trace(guide).get_trace(*batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
    except (RuntimeError, ValueError) as error:
        if isinstance(error.__cause__ or error, PVAEError) or "memory" in str(error):  # of which there may be more
            raise
        raise ProgramError(
            "log p(x) for each datum needs programs that can be run on any number of data; on "
            f"{len(batch[0])} this pair failed: {error}"
        ) from error
    return {"model": density_sites(model_trace.nodes), "guide": density_sites(guide_trace.nodes)}


def _lay_out_particles(densities: Densities) -> Densities:
    """The same, laid out so that particles have the densities together that each has alone.

    Raises:
        ProgramError: There is no such layout.
    """
    trials = [_draw_alone(densities) for _ in range(3)]  # not 2, which would look like the data
    values = {name: torch.cat([trial[0][name] for trial in trials]) for name in trials[0][0]}
    alone = {program: torch.cat([trial[1][program] for trial in trials]) for program in ("model", "guide")}
    problems = []
    for folded in (False, True):
        laid_out = replace(densities, layout=replace(densities.layout, folded=folded))
        try:
            latents = Latents(values, 3)
            together = {"model": laid_out.log_pxz(densities.trial, latents)}
            with suppress(_Unscored):  # a guide that only knows its own draws can still be drawn from
                together["guide"] = laid_out.log_qz(densities.trial, latents)
            laid_out.draw_guide(densities.trial, 3)
        except (RuntimeError, ValueError, IndexError) as error:
            problems.append(str(error))
            continue
        wrong = [p for p in together if not torch.allclose(together[p], alone[p], rtol=1e-4, atol=1e-4, equal_nan=True)]
        if not wrong:
            if folded:
                logger.info("the pair does not broadcast over particles (%s): they are run as copies", problems[0])
            return laid_out
        problems.append(
            f"the {wrong[0]}'s log-density is {together[wrong[0]].tolist()} among three particles of two data, and "
            f"{alone[wrong[0]].tolist()} if each is run alone"
        )
    raise ProgramError(
        "log p(x) for each datum needs programs that treat each datum, and each latent, by itself, however many are "
        f"run at once. With a plate over particles: {problems[0]}. With copies of the data: {problems[1]}. Count "
        "dimensions from the right (dim=-1), and let no datum look at the others of its batch."
    )


def _draw_alone(densities: Densities) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws latents for the two trial data, each run alone: their values ``(1, 2, ...)`` and densities ``(1, 2)``."""
    alone = replace(densities, layout=replace(densities.layout, folded=True))
    rows = []
    for row in range(2):
        batch = tuple(t[row : row + 1] for t in densities.trial)
        latents, log_qz = alone.draw_guide(batch, 1)
        rows.append((latents.values, {"model": alone.log_pxz(batch, latents), "guide": log_qz}))
    values, log_probs = ({n: torch.cat([row[part][n] for row in rows], 1) for n in rows[0][part]} for part in (0, 1))
    return values, log_probs


class _Unscored(ProgramError):
    """A guide that cannot give its density at latents of others."""


def _as_trace(values: dict[str, Tensor]) -> poutine.Trace:
    trace = poutine.Trace()
    for name, value in values.items():
        trace.add_node(name, name=name, type="sample", value=value, is_observed=False, infer={})
    return trace
