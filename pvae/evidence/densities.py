"""A Pyro model and guide seen as densities: of each datum, or of all data as one datum."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pvae.errors import DataError, ProgramError
from pvae.evidence.latents import Latents, LatentSpace, Layout
from pvae.evidence.pair_checks import (
    check_masks,
    check_names,
    latent_of,
    normal_moments,
    observed_of,
    other_support,
    refusal,
    support_of,
)
from pvae.evidence.programs import Programs
from pvae.evidence.shared_prior import check_refusal, draw_shared, find_refusal, shares_draws
from pvae.evidence.traces import Batch, Run, Runner
from pvae.evidence.trials import Trial, try_pair
from pvae.runtime import Pair, Program, base_distribution, spare_noise, tensors_of

__all__ = ["MAX_JOINT_DIM", "Batch", "Densities"]

MAX_JOINT_DIM = 2000  # of latents whose covariance is a matrix


@dataclass(frozen=True, eq=False)
class Densities:
    """A pair's densities.

    Of each datum, where all sites of the model and the guide lie in one plate over the data. Otherwise all data are
    one datum: a batch is then a tuple of tensors of shape ``(1, M, ...)``, and N is 1 in every ``(K, N)``.

    Scales, of a handler or of a subsampling plate, are no part of log p(x) and are left out, of which `log_evidence`
    warns where they are a handler's; masks are applied.
    Discrete latents that are marked for enumeration are summed out, and are no latents here.

    Attributes:
        placed: The pair, on its device.
        tried: What its first runs told.
        programs: What is run many times.
        product_rounding: What products in fewer digits were found to change log-weights by, nats.
    """

    placed: Pair
    tried: Trial
    programs: Programs = field(default_factory=lambda: Programs(()), repr=False)
    product_rounding: float = 0.0
    _with_guides: dict[Program, Densities] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        placed: Pair,
        data: Batch,
        *,
        nesting: int = 0,
        is_joint: bool | None = None,
        in_memory: bool = True,
    ) -> Densities:
        """Looks at a pair and its data, and raises where log p(x) is not defined by them.

        The data plate is the one whose size follows the number of data: the pair is run on one datum and on two, on
        its device. Where there is none around all sites, log p is of all data together.

        Args:
            placed: The pair.
            data: The data; the first ones where they are read as a stream.
            nesting: The least number of plates' dimensions to leave room for.
            is_joint: Whether log p is of all data together; ``None`` to find out.
            in_memory: Whether these are all data.

        Raises:
            ProgramError: Latent sites that differ, a guide with point masses, dimensions that are no plate's, or data
                that depend on each other inside of a plate.
            DataError: Data outside the support of their site.
        """
        with spare_noise(placed.device):
            tried = try_pair(placed, data, nesting=nesting, is_joint=is_joint, in_memory=in_memory)
        programs = Programs((placed.model, placed.guide))
        return cls(placed, tried, programs)

    def with_guide(self, guide: Program) -> Densities:
        """The same model with another guide."""
        if guide not in self._with_guides:
            nesting = -self.layout.particle_dim - 1
            data = tuple(t[0] for t in self.trial) if self.is_joint else self.trial
            placed = replace(self.placed, guide=guide)
            other = Densities.of(placed, data, nesting=nesting, is_joint=self.is_joint)
            if other.layout.particle_dim != self.layout.particle_dim:
                raise ProgramError("another guide for the pair has plates further to the left than the pair itself.")
            if set(other.tried.names) != set(self.tried.names):
                raise ProgramError(
                    f"another guide for the pair draws {sorted(other.tried.names)}, and the pair itself "
                    f"{sorted(self.tried.names)}: mark the same discrete latents for enumeration in both."
                )
            self._with_guides[guide] = other.with_products(self.runner.precision, self.product_rounding)
        return self._with_guides[guide]

    def with_products(self, precision: str, product_rounding: float = 0.0) -> Densities:
        """The same with the programs' products in some precision, which was found to change log-weights so much."""
        tried = replace(self.tried, runner=replace(self.runner, precision=precision))
        programs = replace(self.programs, precision=precision)
        return replace(self, tried=tried, programs=programs, product_rounding=product_rounding, _with_guides={})

    @property
    def model(self) -> Program:
        """The generative program."""
        return self.placed.model

    @property
    def guide(self) -> Program:
        """The recognition program."""
        return self.placed.guide

    @property
    def runner(self) -> Runner:
        """How the programs are run."""
        return self.tried.runner

    @property
    def layout(self) -> Layout:
        """Where particles and data stand in the programs' tensors."""
        return self.runner.layout

    @property
    def trial(self) -> Batch:
        """What the pair is tried on: two data, or all as one datum."""
        return self.tried.batch

    @property
    def observed(self) -> tuple[Any, ...]:
        """What observes the data, as `pvae.runtime.sites.observed_data` finds it."""
        return self.tried.observed

    @property
    def is_joint(self) -> bool:
        """Whether log p is of all data together."""
        return self.layout.is_joint

    @property
    def num_together(self) -> int:
        """How many data have one log p together; 0 where each has its own."""
        return self.trial[0].shape[1] if self.is_joint else 0

    @property
    def has_latents(self) -> bool:
        """Whether there is anything to draw; otherwise log p(x) is known."""
        return bool(self.tried.names)

    @property
    def entries(self) -> int:
        """Numbers in the largest tensor of one datum."""
        return max(t[0].numel() for t in self.trial)

    @property
    def precision(self) -> float:
        """Machine epsilon of the numbers that densities are computed in."""
        return torch.finfo(self.dtype).eps

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that densities are computed in."""
        floating = (t.dtype for t in self.trial if t.is_floating_point())
        return self.placed.dtype or next(floating, torch.get_default_dtype())

    def run_pair(self, batch: Batch, num_samples: int = 1) -> tuple[Run, Run]:
        """Runs the guide, and the model on its draws, as a model may not be run on its own; both runs."""
        proposed = self.runner.run(self.guide, batch, num_samples)
        return self.run_model(batch, Latents(proposed.values(self.tried.names), num_samples), sums=False), proposed

    @cached_property
    def has_data_to_check(self) -> bool:
        """Whether supports are such as a single entry does not show, a Binomial's or one-hots', or latents masked."""
        observed = observed_of(self.run_pair(self.trial)[0].sites)
        return self.tried.has_masks or any(other_support(site) is not None for site in observed.values())

    def check_data(self, batch: Batch) -> None:
        """Looks at data where `has_data_to_check`.

        Raises:
            DataError: Observed data lie outside of their support.
            ProgramError: The model and the guide mask other latents.
        """
        model, guide = (run.sites for run in self.run_pair(batch))
        check_masks(model, guide, self.tried.names)
        for name, site in observed_of(model).items():
            support = other_support(site)
            bad = torch.zeros(1) if support is None else ~support.check(site["value"])
            if bad.any():
                family = type(base_distribution(site["fn"])).__name__
                share = f"{bad.double().mean().item():.3%}"
                raise DataError(f"site '{name}' is {family} with support {support}; {share} of a batch are outside.")

    @cached_property
    def space(self) -> LatentSpace:
        """The latents as vectors of real numbers."""
        run, _ = self.run_pair(self.trial, 3)
        values = run.values(self.tried.names)
        sites = {name: run.sites[name] for name in self.tried.names}
        supports = {name: (support_of(site), values[name]) for name, site in sites.items()}
        space = LatentSpace.of(supports, {name: refusal(site) for name, site in sites.items()})
        if not space.refusal:
            return space
        named = {"prior": not self.prior_refusal, "defensive": self.scores_guide and not self.prior_refusal}
        return replace(space, takes_any=("guide", *(name for name, can in named.items() if can)))

    def draw_guide(self, batch: Batch, num_samples: int) -> tuple[Latents, Tensor]:
        """Draws latents from the guide, and returns them with log q(z|x), shape ``(K, N)``."""
        if not self.has_latents:
            nothing = torch.zeros(num_samples, len(batch[0]), dtype=torch.float64, device=batch[0].device)
            return Latents({}, num_samples), nothing
        values, log_qz = self.runner.draw(self.guide, batch, num_samples)
        check_names(values.keys(), {*self.tried.names, *self.tried.auxiliary})
        return Latents({name: values[name] for name in self.tried.names}, num_samples), log_qz

    @cached_property
    def prior_refusal(self) -> str:
        """Why the model cannot be run on latents of its own, though it can on the guide's; empty where it can."""
        with spare_noise(self.placed.device):
            return find_refusal(self.runner, self.model, self.trial)

    def check_prior(self) -> None:
        """Raises `ProgramError` where there are no draws from the prior."""
        check_refusal(self.prior_refusal)

    def draw_prior(self, batch: Batch, num_samples: int) -> Latents:
        """Draws latents from the prior, afresh for each datum; their densities come with them.

        Raises:
            ProgramError: The model cannot draw them.
        """
        if not self.has_latents:
            return Latents({}, num_samples)
        self.check_prior()
        run = self.runner.run(self.model, batch, num_samples)
        latents = self._latents(run, num_samples)
        latents.densities = None if self.runner.summed else self.densities_of(run)
        return latents

    @property
    def scores_guide(self) -> bool:
        """Whether the guide is one that may give its density at latents that it did not draw."""
        return not self.runner.made

    def log_qz(self, batch: Batch, latents: Latents) -> Tensor:
        """Returns the guide's log q(z|x) at some latents, shape ``(K, N)``.

        Raises:
            ProgramError: The guide makes latents of other variables, or by a transform without an inverse, and knows
                only of its own draws.
        """
        return self.runner.score(self.guide, batch, self._known(latents))

    def densities(self, batch: Batch, latents: Latents) -> tuple[Tensor, Tensor]:
        """Returns log p(z) and log p(x|z) at some latents, each of shape ``(K, N)``; they are kept with the latents."""
        if latents.densities is None:
            parts = self.densities_of(self.run_model(batch, latents, sums=True))
            latents.densities = parts[0].expand(latents.num_samples, -1), parts[1].expand(latents.num_samples, -1)
        return latents.densities

    def log_pxz(self, batch: Batch, latents: Latents) -> Tensor:
        """Returns log p(x, z) at some latents, shape ``(K, N)``."""
        log_pz, log_px_given_z = self.densities(batch, latents)
        return log_pz + log_px_given_z

    @cached_property
    def shares_prior(self) -> bool:
        """Whether draws from the prior serve all data: p(x|z) is of a known exponential family, given latents alone."""
        return self.has_latents and shares_draws(self.runner, self.model, self.trial)

    def draw_shared_prior(self, batch: Batch, num_samples: int, *, exact: bool = True) -> Tensor:
        """Draws K latents from the prior and decodes them once; returns log p(x|z) of all data, shape ``(K, N)``."""
        return draw_shared(self.runner, self.model, batch, num_samples, exact=exact)

    def guide_moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean of q(z|x) in `space`, ``(N, D)``, and the Cholesky factor of its covariance, ``(N, D, D)``.

        Exact where all sites are normal and do not depend on each other, or latents are in `space` what such a guide
        draws; else from ``max(400, 10 D)`` draws.

        Raises:
            ProgramError: All data together have too many latents for a covariance.
        """
        dim = self.space.dim
        if self.is_joint and dim > MAX_JOINT_DIM:
            raise ProgramError(
                f"all data together have {dim} latent numbers, whose covariance is a matrix of {dim}^2; this proposal "
                f"goes up to {MAX_JOINT_DIM}. Use proposal='guide' or 'prior', or a model with one plate over the "
                "data around all sites, which has fewer latents for each datum."
            )
        normal = self._normal_moments(batch)
        if normal:
            locs, factors = zip(*normal, strict=True)
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
            ProgramError: An observed site's data are no tensor of the batch as it is, or the prior cannot be drawn.
        """
        self.check_prior()
        observed = observed_of(self.runner.run(self.model, batch, 1).sites)
        run = self.runner.run(self.model, batch, 1, observes=False)
        drawn = run.values(run.sites)
        simulated = list(batch)
        for name, site in observed.items():
            if not site["value"].numel():
                raise ProgramError(
                    f"cannot simulate data: site '{name}' is a pyro.factor, a number that is added to the density, of "
                    "which nothing can be drawn. Use sites with distributions instead."
                )
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
        data = tuple(simulated)
        again = self.runner.run(self.model, data, 1, drawn).log_prob(observed)  # with discrete latents as drawn
        if not torch.allclose(again, run.log_prob(observed), rtol=1e-4, atol=1e-4):
            raise ProgramError(
                "cannot simulate data: given them, the model's log p(x|z) is not what it was when it drew them. It may "
                "use data beyond observing them, or round them to whole numbers."
            )
        return data, Latents({name: drawn[name] for name in self.tried.names}, 1)

    def run_model(self, batch: Batch, latents: Latents, *, sums: bool) -> Run:
        """Runs the model with given latents; once, where there are none."""
        run = self.runner.run(
            self.model, batch, latents.num_samples if latents.values else 1, self._known(latents), sums=sums
        )
        self._check_names(run)
        return run

    def densities_of(self, run: Run) -> tuple[Tensor, Tensor]:
        """Log p(z) and log p(x|z) of a run of the model."""
        latent, observed = latent_of(run.sites), observed_of(run.sites)
        log_pz = run.log_prob(latent)
        if not self.runner.summed:
            return log_pz, run.log_prob(observed)
        together = run.log_prob(run.sites)
        if not self.has_latents:
            log_pz = torch.zeros_like(together)
        return log_pz, torch.where(log_pz.isneginf(), log_pz, together - log_pz)

    def _latents(self, run: Run, num_samples: int) -> Latents:
        """Those that a run drew."""
        self._check_names(run)
        return Latents(run.values(self.tried.names), num_samples)

    def _known(self, latents: Latents) -> dict[str, Tensor]:
        check_names(latents.values.keys(), self.tried.names)
        return latents.values

    def _check_names(self, run: Run) -> None:
        others = {*self.runner.summed, *self.tried.auxiliary}
        check_names(latent_of(run.sites).keys() - others, set(self.tried.names) - others)

    def _normal_moments(self, batch: Batch) -> list[tuple[Tensor, Tensor]] | None:
        """Mean and Cholesky factor of each part of the latents' vector; none where they are not known."""
        run = self.runner.run(self.guide, batch, 3)
        if self.layout.one_by_one or not run.sites.keys().isdisjoint(self.runner.summed):
            return None
        names = self.tried.auxiliary if self.runner.made else tuple(self.space.sites)
        if self.runner.made:
            if self.runner.made != set(self.tried.names):
                return None
            drawn = torch.cat([v.flatten(2) if v.dim() > 2 else v[..., None] for v in run.values(names).values()], -1)
            u = self.space.flatten(Latents(run.values(self.tried.names), 3))[0]
            if u.shape != drawn.shape or not torch.allclose(u, drawn.to(u), rtol=1e-3, atol=1e-4):
                return None
        parts = [normal_moments(run.sites[name], self.layout) for name in names]
        return None if None in parts else parts  # type: ignore[return-value]
