"""What runs say of each site: its values with their plates by name, its part of the likelihood, and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pvae.errors import ProgramError
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.pair_checks import latent_of, observed_of, plates_of
from pvae.evidence.proposals import Density
from pvae.evidence.traces import Run
from pvae.runtime import spare_noise

__all__ = ["SiteValues"]

_PARTICLES = "pvae_particles"

Plates = tuple[tuple[int, str], ...]  # dimension and name of each, from left to right


@dataclass(frozen=True, eq=False)
class SiteValues:
    """Draws, likelihoods and predictions of a pair, by site.

    Values are laid out as ``(K, N, *plates, *event)``, with all of the pair's plates until `trim` takes away those that
    a site is not in. Where all data are one datum, N is 1 for latents; for what is observed it is their number M, if
    there is a plate of that size around it.
    """

    densities: Densities

    @cached_property
    def _sites(self) -> Mapping[str, Any]:
        densities = self.densities
        with spare_noise(densities.placed.device):
            return densities.run_pair(densities.trial)[0].sites

    @cached_property
    def observed(self) -> tuple[str, ...]:
        """The sites that observe data; without ``pyro.factor``, which observes nothing."""
        return tuple(name for name, site in observed_of(self._sites).items() if site["value"].numel())

    @property
    def summed(self) -> tuple[str, ...]:
        """The discrete latents that are summed out of densities."""
        return tuple(sorted(self.densities.runner.summed))

    @cached_property
    def data_plate(self) -> tuple[int, str] | None:
        """The plate over data, where all are one datum and all that is observed lies in it."""
        size = self.densities.num_together
        if not size or not self.observed:
            return None
        plates = [{f.dim: f.name for f in plates_of(self._sites[name]) if f.size == size} for name in self.observed]
        shared = [dim for dim, name in plates[0].items() if name != _PARTICLES and all(dim in p for p in plates)]
        return (min(shared), plates[0][min(shared)]) if shared else None

    @cached_property
    def plates(self) -> dict[str, tuple[str, ...]]:
        """Names of the plates behind ``(K, N)``, by site."""
        return {name: tuple(plate for _, plate in self._plates(name)) for name in self._sites if self._is_kept(name)}

    def draw(self, sampler: Density, num_samples: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Draws all latents of some data, with their weights.

        Those that are summed out are drawn given the others, ``d ~ p(d | z, x)``: the others' weights are theirs, too.

        Returns:
            ``log p(x, z) - log q(z)``, shape ``(K, N)``; latents by site; and log p(x|z) by observed site, ``(K, N)``
            or ``(K, M)``. Where latents are summed out, that is of all observed sites together.
        """
        latents, log_q = sampler.draw(num_samples)
        run = sampler.pair.run_model(sampler.batch, latents, sums=True)
        log_pz, log_px = latents.densities or sampler.pair.densities_of(run)
        values = dict(latents.values)
        if self.summed:
            values |= self.densities.runner.draw_summed(self.densities.model, sampler.batch, num_samples, values)
        shape = num_samples, len(sampler.batch[0])
        likelihoods = {name: term.expand(num_samples, -1) for name, term in self._log_likelihoods(run).items()}
        return (log_pz + log_px - log_q).expand(shape), values, likelihoods

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """What the sites observe, each ``(N, *plates, *event)``."""
        run = self._along_data(self.densities.run_pair(batch)[0])
        values = {}
        for name in self.observed:
            fn, value = run.sites[name]["fn"], run.sites[name]["value"]  # as given, without a dimension for particles
            value = value.expand(torch.broadcast_shapes(value.shape, fn.shape()))
            values[name] = run.layout.gather(value, len(fn.event_shape), 1)
        return {name: value[0] for name, value in self.trim(values).items()}

    def predict(
        self, batch: Batch, num_samples: int, latents: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws what was observed, ``x ~ p(x|z)``.

        Args:
            batch: The data.
            num_samples: ``K``.
            latents: As by `draw`; left out, they are drawn, too, ``z ~ p(z)``.

        Returns:
            By site, what was drawn in the place of data; and the latents.
        """
        if latents is None:
            self.densities.check_prior()
        run = self.densities.runner.run(self.densities.model, batch, num_samples, latents, observes=False)
        hidden = [name for name in latent_of(run.sites) if name not in self.observed and self._is_kept(name)]
        return self._along_data(run).values(self.observed), run.values(hidden)

    def check_prediction(self, drawn: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> None:
        """Raises `ProgramError` where what is drawn has another shape than the data, which broadcast."""
        for name, value in data.items():
            if drawn[name].shape[1:] != value.shape:
                raise ProgramError(
                    f"cannot predict site '{name}': its draws are {tuple(drawn[name].shape[1:])}, and the data "
                    f"that it observes are {tuple(value.shape)}, which broadcast. Give its distribution the data's "
                    "shape, such as by expanding a parameter to it."
                )

    def trim(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values with no dimensions for plates that their sites are not in."""
        dims = range(self.densities.layout.particle_dim + 1, 0)
        trimmed = {}
        for name, value in values.items():
            own, data_dim = {dim for dim, _ in self._plates(name)}, self._data_dim(name)
            places = [slice(None) if dim in own else 0 for dim in dims if dim != data_dim]
            trimmed[name] = value[(slice(None), slice(None), *places)]
        return trimmed

    def _is_kept(self, name: str) -> bool:
        return name in self.observed or not self._sites[name]["is_observed"]

    def _data_dim(self, name: str) -> int | None:
        """The dimension that stands second, as N or M."""
        if name in self.observed and self.data_plate:
            return self.data_plate[0]
        return self.densities.layout.data_dim

    def _plates(self, name: str) -> Plates:
        """A site's plates but those that stand first, for particles and data."""
        frames = plates_of(self._sites[name])
        return tuple(sorted((f.dim, f.name) for f in frames if f.name != _PARTICLES and f.dim != self._data_dim(name)))

    def _along_data(self, run: Run) -> Run:
        """The run with a row for each of the data, where all of them are one datum but have a plate."""
        return run if self.data_plate is None else run.along(self.data_plate[0], self.densities.num_together)

    def _log_likelihoods(self, run: Run) -> dict[str, Tensor]:
        along, latent = self._along_data(run), latent_of(run.sites)
        if not self.summed:
            return {name: along.log_prob([name]) for name in self.observed}
        each = total = run.log_prob(run.sites) - run.log_prob(latent)
        inside = [n for n, s in run.sites.items() if self.data_plate in [(f.dim, f.name) for f in plates_of(s)]]
        if inside and set(self.summed) <= {*inside}:  # others may be at the same dimension
            each = along.log_prob(inside) - along.log_prob([name for name in inside if name in latent])
            if not torch.allclose(each.sum(1), total[:, 0], rtol=1e-4, atol=1e-3):
                each = total  # what is summed out is of all data together: no datum has a part of its own
        return {"_and_".join(self.observed): each.nan_to_num(nan=-torch.inf, neginf=-torch.inf)}
