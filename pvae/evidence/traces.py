"""A Pyro model and guide seen as densities for each datum: the only file that traces programs for evidence.

Pyro's own importance weights are joint over the data plate: one number for each particle and the whole batch. Here the
particles get a plate of their own, outside all of the pair's plates, and the log-densities are summed over everything
but particles and data, which leaves shape ``(K, N)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.nn.functional import softplus

from pvae.checks import base_distribution, check_observations, check_pair, density_sites
from pvae.errors import ProgramError
from pvae.isolation import Program

__all__ = ["Pair"]


@dataclass(frozen=True)
class Pair:
    """A model and a guide whose sites all lie in one plate over the data.

    Scales (``poutine.scale``, a subsampling plate) are no part of log p(x) and are left out; masks are applied.

    Attributes:
        model: The generative program.
        guide: The recognition program.
        data_dim: Dimension of the data plate in a site's batch shape, negative.
        particle_dim: Dimension of the particle plate, left of all others, negative.
        shares_prior: Whether draws from the prior can serve all data at once: p(x|z) is one Bernoulli site whose
            probabilities depend on the latents alone.
    """

    model: Program
    guide: Program
    data_dim: int
    particle_dim: int
    shares_prior: bool = False

    @classmethod
    def of(cls, model: Program, guide: Program, data: tuple[Tensor, ...], device: torch.device) -> Pair:
        """Looks at a pair and its data, and raises where log p(x) for each datum is not defined by them.

        The data plate is the one whose size follows the number of data: the pair is run on one datum and on two, on
        the device.

        Raises:
            ProgramError: No such plate, a site outside of it, latent sites that differ, or a guide with point masses.
            DataError: Data outside the support of their site.
        """
        traces = {}
        with pyro.validation_enabled(True):
            for rows in (1, 2):
                batch = tuple(t[[i % len(t) for i in range(rows)]].to(device) for t in data)
                guide_trace = poutine.trace(guide).get_trace(*batch)
                model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
                traces[rows] = {"model": density_sites(model_trace.nodes), "guide": density_sites(guide_trace.nodes)}
        check_pair(traces[2]["model"], traces[2]["guide"], strict=True)
        _check_density(traces[2]["guide"])
        check_observations(traces[2]["model"], batch, data)
        data_dim = _data_dim(traces[1], traces[2])
        nesting = max(-plate.dim for sites in traces[2].values() for s in sites.values() for plate in _plates(s))
        pair = cls(model, guide, data_dim, -nesting - 1)
        pair._check_particles(batch)
        return replace(pair, shares_prior=pair._can_share_prior(batch))

    def draw_guide(self, batch: tuple[Tensor, ...], num_samples: int) -> tuple[poutine.Trace, Tensor]:
        """Draws latents from the guide.

        Returns:
            Their trace, and log q(z|x), shape ``(K, N)``.
        """
        trace = self._trace(self.guide, batch, num_samples)
        return trace, self._log_density(trace, batch, num_samples)

    def log_pxz(self, batch: tuple[Tensor, ...], num_samples: int, latents: poutine.Trace) -> Tensor:
        """Returns log p(x, z) at the latents of a trace, shape ``(K, N)``."""
        trace = self._trace(poutine.replay(self.model, trace=latents), batch, num_samples)
        return self._log_density(trace, batch, num_samples)

    def draw_prior(self, batch: tuple[Tensor, ...], num_samples: int) -> Tensor:
        """Draws latents from the prior, afresh for each datum, and returns log p(x|z), shape ``(K, N)``."""
        trace = self._trace(self.model, batch, num_samples)
        return self._log_density(trace, batch, num_samples, observed_only=True)

    def draw_shared_prior(self, batch: tuple[Tensor, ...], num_samples: int) -> Tensor:
        """As `draw_prior`, but with the same K latents for all data of the batch: where `shares_prior`.

        ``log p(x_n|z_k) = sum_j x_nj l_kj - sum_j log(1 + exp(l_kj))`` for logits l: one decoding of K latents, and one
        product of the matrices of logits and of data.
        """
        trace = self._shared_trace(batch, num_samples)
        (site,) = (site for site in density_sites(trace.nodes).values() if site["is_observed"])
        return self._bernoulli_product(site)

    def _bernoulli_product(self, site: Any) -> Tensor:
        leaf = _leaf(site["fn"])
        name = "probs" if "probs" in leaf.__dict__ else "logits"
        logits = dist.Bernoulli(**{name: getattr(leaf, name).select(self._event_dim(site), 0)}).logits.flatten(1)
        x = site["value"].reshape(-1, logits.shape[1]).to(logits)
        return (logits @ x.T).double() - softplus(logits).sum(1, keepdim=True).double()

    def _shared_trace(self, batch: tuple[Tensor, ...], num_samples: int) -> poutine.Trace:
        """Runs the model on a batch with K latents that were drawn for its first datum."""
        # Without the plate's own sites, which would replay its size, 1, too.
        latents = prune_subsample_sites(self._trace(self.model, tuple(t[:1] for t in batch), num_samples))
        return self._trace(poutine.replay(self.model, trace=latents), batch, num_samples)

    def _can_share_prior(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether the model's distributions are the same for all data, and its likelihood is one plain Bernoulli."""
        try:
            trace = self._shared_trace(batch, 3)
        except (RuntimeError, ValueError, IndexError):  # the model wants one latent for each datum
            return False
        sites = list(density_sites(trace.nodes).values())
        observed = [site for site in sites if site["is_observed"]]
        if len(observed) != 1 or not all(self._is_shared(site) for site in sites):
            return False
        (site,) = observed
        plain = type(_leaf(site["fn"])) is dist.Bernoulli and site["mask"] is None
        if not plain or site["value"].shape != (len(batch[0]), *site["fn"].event_shape):
            return False
        return torch.allclose(
            self._bernoulli_product(site), self._log_density(trace, batch, 3, observed_only=True), rtol=1e-4, atol=1e-4
        )

    def _is_shared(self, site: Any) -> bool:
        """Whether a site's distribution is the same for all data.

        A plate expands what does not depend on its data without copying, so that the stride of every parameter along
        it is 0. Univariate families below ``to_event`` show all of their parameters in this way.
        """
        leaf = _leaf(site["fn"])
        if type(leaf) not in _UNIVARIATE or len(_plates(site)) != 2:  # the plates: particles and data
            return False
        return all(getattr(leaf, name).stride(self._event_dim(site)) == 0 for name in _UNIVARIATE[type(leaf)])

    def _event_dim(self, site: Any) -> int:
        """The data plate's dimension in the parameters of a site's distribution below ``to_event``."""
        return self.data_dim - len(site["fn"].event_shape)

    def _check_particles(self, batch: tuple[Tensor, ...]) -> None:
        """Runs three particles at once and one by one, and raises where the densities differ."""
        rule = (
            "The model and the guide must take latents with any dimensions left of their own, one for particles here: "
            "count dimensions from the right (dim=-1), and let networks take any leading dimensions, which "
            "pvae.networks.Batched does for a module."
        )
        try:
            latents, log_qz = self.draw_guide(batch, num_samples=3)
            together = {"model": self.log_pxz(batch, 3, latents), "guide": log_qz}
        except (RuntimeError, ValueError, IndexError) as error:
            raise ProgramError(f"the pair cannot run several particles at once. {rule} {error}") from error
        values = {name: site["value"] for name, site in density_sites(latents.nodes).items()}
        for k in range(3):
            one = {name: value[k] for name, value in values.items()}
            for name, program in (("model", self.model), ("guide", self.guide)):
                alone = poutine.trace(poutine.condition(program, data=one)).get_trace(*batch)
                density = self._log_density(alone, batch, 1)[0]
                if not torch.allclose(together[name][k], density, rtol=1e-4, atol=1e-4, equal_nan=True):
                    raise ProgramError(
                        f"the {name}'s log-density of a latent is {density.tolist()} for two data if it is run alone, "
                        f"and {together[name][k].tolist()} among three particles. {rule}"
                    )

    def _trace(self, program: Program, batch: tuple[Tensor, ...], num_samples: int) -> poutine.Trace:
        with pyro.plate("pvae_particles", num_samples, dim=self.particle_dim):
            return poutine.trace(program).get_trace(*batch)

    def _log_density(
        self, trace: poutine.Trace, batch: tuple[Tensor, ...], num_samples: int, *, observed_only: bool = False
    ) -> Tensor:
        """Sums the log-densities of a trace's sites over all but particles and data."""
        total = torch.zeros((), dtype=torch.float64, device=batch[0].device)
        for site in density_sites(trace.nodes).values():
            if observed_only and not site["is_observed"]:
                continue
            log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
            ones = (1,) * (-self.particle_dim - log_prob.dim())
            log_prob = log_prob.reshape(ones + log_prob.shape)
            inner = [d for d in range(self.particle_dim + 1, 0) if d != self.data_dim]
            total = total + (log_prob.sum(inner) if inner else log_prob).double()
        return total.expand(num_samples, len(batch[0]))


def _plates(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _check_density(guide: dict[str, Any]) -> None:
    points = sorted(name for name, site in guide.items() if isinstance(base_distribution(site["fn"]), dist.Delta))
    if points:
        raise ProgramError(
            f"the guide has a point mass at {points}: a Delta has no density to weigh draws by. Use a guide with a "
            "density, such as a Normal."
        )


# Families whose parameters, each with an entry for each datum, say all there is to say about them.
_UNIVARIATE = {
    dist.Bernoulli: ("_param",),  # logits or probs, whichever it was given
    dist.Laplace: ("loc", "scale"),
    dist.Normal: ("loc", "scale"),
    dist.StudentT: ("df", "loc", "scale"),
    dist.Uniform: ("low", "high"),
}


def _leaf(distribution: Any) -> Any:
    """The distribution below ``to_event``."""
    while isinstance(distribution, dist.Independent):
        distribution = distribution.base_dist
    return distribution


def _data_dim(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> int:
    """The dimension at which every site has a plate of size 1 for one datum, and of size 2 for two."""

    def dims(site: Any, size: int) -> set[int]:
        return {plate.dim for plate in _plates(site) if plate.size == size}

    sites = {f"{name} ({program})": (program, name, site) for program in two for name, site in two[program].items()}
    follows = [
        dims(site, 2) & dims(one[program][name], 1) if name in one[program] else set()
        for program, name, site in sites.values()
    ]
    common = set.intersection(*follows) if follows else set()
    if len(common) == 1:
        return common.pop()
    shown = "; ".join(
        f"'{label}' has plates {[(p.name, p.size) for p in _plates(site)]}, batch shape {tuple(site['fn'].batch_shape)}"
        for label, (_, _, site) in sites.items()
    )
    raise ProgramError(
        "log p(x) for each datum needs one plate over the data, of size len(x), around every sample site of the model "
        f"and the guide: with pyro.plate('data', len(x)): ... On two data, {shown or 'there are no sample sites'}."
    )
