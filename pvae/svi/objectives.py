"""Objectives: what `pvae.fit` minimises, as plain callables ``objective(model, guide, *batch) -> loss``.

Each returns minus a bound on log p(x), in nats summed over the batch, whose gradient is the estimator that it is named
for. They take any Pyro pair with local latents in a plate over the data, also in `pvae.svi.CompiledSVI` and
`pyro.infer.SVI`. log w is log p(x, z) - log q(z|x), and z_1, ..., z_K are draws of the guide.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from pyro.distributions import Independent
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pvae.errors import ArgumentError, ProgramError, one_of, positive_int, real_number
from pvae.runtime import Program
from pvae.svi.traces import Particles, num_nested, run_particles

__all__ = ["ELBO", "IWAE", "Bound", "DReG", "MeanFieldELBO", "Renyi", "ScoreFunction", "StickingTheLanding"]


@dataclass(frozen=True)
class Bound(ABC):
    """A bound on log p(x) of a number of particles, and a way to its gradient.

    Args:
        num_particles: ``K``, draws of the guide for each datum.
        vectorize_particles: Whether they run together, in a plate outside of all others. Else the pair is run K times,
            for programs that do not broadcast over one more dimension.
    """

    num_particles: int = 1
    _: KW_ONLY
    vectorize_particles: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_particles", positive_int("num_particles", self.num_particles))
        if not isinstance(self.vectorize_particles, bool):
            raise ArgumentError(f"vectorize_particles must be True or False, got {self.vectorize_particles!r}.")

    @abstractmethod
    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss, a scalar in nats summed over the batch.

        Args:
            model: The generative program.
            guide: The recognition program.
            args: What both are called with.
            kwargs: As ``args``.

        Raises:
            ProgramError: The pair has latents or plates that the objective is not for; the site is named.
        """

    @property
    def measure(self) -> Bound:
        """What held-out data are measured by: a bound without changes that are for training alone."""
        return self

    @property
    def is_elbo(self) -> bool:
        """Whether minus its value estimates the ELBO itself."""
        return isinstance(self.measure, ELBO)

    def _run(self, model: Program, guide: Program, args: Any, kwargs: Any, cut: str | None = None) -> Particles:
        together = self.vectorize_particles
        return run_particles(model, guide, args, kwargs, self.num_particles, together=together, cut=cut)

    @property
    def _name(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class ELBO(Bound):
    """The evidence lower bound, ``E_q[log w]``: the mean over particles, by Pyro's ``Trace_ELBO``.

    Gradients go through the guide's draws where these are reparameterized, and are score-function gradients elsewhere.

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes.
    """

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; see `Bound`."""
        options: dict[str, Any] = {"num_particles": self.num_particles}
        if self.num_particles > 1 and self.vectorize_particles:
            depth = num_nested(model, guide, args, kwargs)
            options |= {"vectorize_particles": True, "max_plate_nesting": depth}
        return torch.as_tensor(Trace_ELBO(**options).differentiable_loss(model, guide, *args, **kwargs))


@dataclass(frozen=True)
class MeanFieldELBO(Bound):
    """The ELBO as ``E_q[log p(x|z)] - KL(q(z|x) || p(z))``, with the KL divergence in closed form where there is one.

    Where there is none it is estimated from the draws. As with Pyro's ``TraceMeanField_ELBO``, latents of the model
    may depend on those alone that the guide's q of them depends on, too.

    With free bits, each KL is replaced by ``max(free_bits, KL)``: what is below has no gradient, so that the guide may
    use so many nats for nothing, and latents are not switched off early on. KL is averaged over the batch (and over
    plates inside of it, and particles) before; over each process's shard, where there are several.

    Args:
        num_particles: As for `Bound`, as is ``vectorize_particles``.
        free_bits: lambda, in nats per datum; 0 for the ELBO itself. Held-out data are measured by that.
        free_bits_per: ``"dimension"`` of a latent's event, each of which has so many; or ``"site"``.

    Source: Kingma et al., 2016, Improved Variational Inference with Inverse Autoregressive Flow (section C.8).
    """

    free_bits: float = 0.0
    free_bits_per: str = "dimension"

    def __post_init__(self) -> None:
        super().__post_init__()
        real_number("free_bits", self.free_bits, least=0)
        one_of("free_bits_per", self.free_bits_per, ("dimension", "site"))

    @property
    def measure(self) -> Bound:
        """The ELBO without free bits."""
        return MeanFieldELBO(self.num_particles, vectorize_particles=self.vectorize_particles)

    @property
    def is_elbo(self) -> bool:
        """Whether there are no free bits."""
        return not self.free_bits

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; see `Bound`."""
        particles = self._run(model, guide, args, kwargs)
        particles.demand_reparameterized(self._name)
        loss: Any = 0.0
        spent: dict[str, tuple[Any, Any]] = {}  # by a latent's name: KL, and how many it is the sum of
        for sites, proposed in zip(particles.models, particles.guides, strict=True):
            for name, site in sites.items():
                if site["is_observed"]:
                    loss = loss - site["log_prob"].sum()
                else:
                    kl, count = self._kl(name, proposed[name], site)
                    before = spent.get(name, (0.0, 0.0))
                    spent[name] = before[0] + kl, before[1] + count
            for name in proposed.keys() - sites.keys():  # auxiliary ones
                loss = loss + proposed[name]["log_prob"].sum()
        for kl, count in spent.values():
            loss = loss + (torch.maximum(kl, self.free_bits * count) if self.free_bits else kl).sum()
        return loss / self.num_particles

    def _kl(self, name: str, proposed: Any, site: Any) -> tuple[Tensor, Tensor]:
        """A latent's KL summed over all but the parts that have free bits of their own, and the sum of its weights."""
        q, p = proposed["fn"], site["fn"]
        by_dimension = self.free_bits > 0 and self.free_bits_per == "dimension"
        if by_dimension:
            while isinstance(q, Independent) and isinstance(p, Independent):
                q, p = q.base_dist, p.base_dist
            if q.event_shape or p.event_shape:
                raise ProgramError(
                    f"free bits for each dimension need q and p of site '{name}' to be products over them, such as "
                    f"Normal(...).to_event(1); they are {type(q).__name__} and {type(p).__name__}. Take "
                    "MeanFieldELBO(free_bits_per='site')."
                )
        weights = torch.ones(proposed["fn"].batch_shape, dtype=_dtype(proposed), device=proposed["value"].device)
        weights = scale_and_mask(weights, scale=proposed["scale"], mask=proposed["mask"])
        try:
            kl = kl_divergence(q, p)
        except NotImplementedError:
            if not by_dimension:
                return (proposed["log_prob"] - site["log_prob"]).sum(), weights.sum()
            kl = q.log_prob(proposed["value"]) - p.log_prob(proposed["value"])
        if not by_dimension:
            return scale_and_mask(kl, scale=proposed["scale"], mask=proposed["mask"]).sum(), weights.sum()
        events, batch = len(proposed["fn"].event_shape), tuple(range(weights.dim()))
        masked = scale_and_mask(
            kl, scale=_widen(proposed["scale"], events), mask=_widen(proposed["mask"], events)
        ).expand(weights.shape + proposed["fn"].event_shape)
        return masked.sum(batch) if batch else masked, weights.sum()


@dataclass(frozen=True)
class IWAE(Bound):
    """The importance-weighted bound, ``log (1/K) sum_k w_k``, of each datum.

    It rises with K from the ELBO to log p(x). Its gradient goes through the draws. With a ``kl_weight`` beta, weights
    are ``p(x|z) (p(z) / q(z|x))^beta``: no bound on log p(x), but what is trained stays continuous in beta.

    Source: Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders.

    Example:
        >>> import pvae
        >>> vae = pvae.VAE.mlp(event_shape=(8, 8), latent_dim=2, hidden=[16])
        >>> x = pvae.datasets.digits().train_x[:64]
        >>> bound = pvae.objectives.IWAE(num_particles=8)
        >>> result = pvae.fit(vae.model, vae.guide, x, objective=bound, epochs=1, progress=False)
    """

    num_particles: int = 5

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; see `Bound`."""
        particles = self._run(model, guide, args, kwargs)
        particles.demand_reparameterized(self._name)
        particles.demand_blocks(self._name)
        return -particles.scale * _log_mean_exp(particles.log_pxz - particles.log_qz).sum()


@dataclass(frozen=True)
class Renyi(Bound):
    """Renyi's bound of order alpha, ``1 / (1 - alpha) * log (1/K) sum_k w_k^(1 - alpha)``, of each datum.

    0 is the IWAE's, towards 1 it is the ELBO, and larger orders make the guide seek single modes. Below 0 it may lie
    above log p(x). With a ``kl_weight``, weights are as for `IWAE`.

    Args:
        alpha: The order, other than 1.
        num_particles: As for `Bound`, as is ``vectorize_particles``.

    Source: Li and Turner, 2016, Renyi Divergence Variational Inference.
    """

    alpha: float = 0.5
    num_particles: int = 2

    def __init__(self, alpha: float = 0.5, num_particles: int = 2, *, vectorize_particles: bool = True) -> None:
        if real_number("alpha", alpha) == 1:
            raise ArgumentError(f"alpha must be a number other than 1, where the bound is ELBO(); got {alpha!r}.")
        for name, value in (
            ("alpha", float(alpha)),
            ("num_particles", num_particles),
            ("vectorize_particles", vectorize_particles),
        ):
            object.__setattr__(self, name, value)
        self.__post_init__()

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; see `Bound`."""
        particles = self._run(model, guide, args, kwargs)
        particles.demand_reparameterized(self._name)
        particles.demand_blocks(self._name)
        power = 1 - self.alpha
        bound = _log_mean_exp(power * (particles.log_pxz - particles.log_qz)) / power
        return -particles.scale * bound.sum()


@dataclass(frozen=True)
class StickingTheLanding(Bound):
    """The ELBO, with the gradient by way of the draws alone: log q is differentiated in z, not in its parameters.

    What is left out, ``d log q(z; phi) / d phi`` at fixed z, has mean 0. Without it the gradient has no noise left once
    q(z|x) is the posterior. Latents that depend on others are treated exactly: q(z2|z1) is differentiated in z1.

    As in `DReG`, log q is taken at the draws as such, so a flow is run backwards, too: an inverse autoregressive one
    takes as many passes for that as z has entries.

    Source: Roeder, Wu and Duvenaud, 2017, Sticking the Landing.
    """

    @property
    def measure(self) -> Bound:
        """The ELBO."""
        return ELBO(self.num_particles, vectorize_particles=self.vectorize_particles)

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; see `Bound`."""
        particles = self._run(model, guide, args, kwargs, cut="differentiable")
        particles.demand_reparameterized(self._name)
        log_pxz = particles.log_pxz
        bound = (log_pxz - particles.log_qz).mean(0).sum()
        return -particles.scale * _with_gradient(bound, log_pxz.mean(0).sum() + particles.through_draws(bound))


@dataclass(frozen=True)
class DReG(Bound):
    """The importance-weighted bound of `IWAE`, with the doubly reparameterized gradient for the guide.

    With normalized weights v_k it is ``sum_k v_k^2 * d log w_k / dz_k * dz_k / dphi``; of the model's parameters
    ``sum_k v_k * d log p(x, z_k) / dtheta``, as of `IWAE`. The mean is the same; its signal does not drown in noise as
    K grows, which that of `IWAE` does. With a ``kl_weight`` beta, ``v^2`` becomes ``(1 - beta) v + beta v^2``, which is
    again the gradient of what `IWAE` trains.

    Source: Tucker, Lawson, Gu and Maddison, 2019, Doubly Reparameterized Gradient Estimators for Monte Carlo
    Objectives; for the noise, Rainforth et al., 2018, Tighter Variational Bounds are Not Necessarily Better.
    """

    num_particles: int = 5

    @property
    def measure(self) -> Bound:
        """The bound of `IWAE`."""
        return IWAE(self.num_particles, vectorize_particles=self.vectorize_particles)

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; see `Bound`."""
        particles = self._run(model, guide, args, kwargs, cut="differentiable")
        particles.demand_reparameterized(self._name)
        particles.demand_blocks(self._name)
        log_pxz = particles.log_pxz
        log_w = log_pxz - particles.log_qz
        shares, beta = log_w.detach().softmax(0), particles.latent_weight
        twice = (1 - beta) * shares + beta * shares**2
        surrogate = (shares * log_pxz).sum() + particles.through_draws((twice * log_w).sum())
        return -particles.scale * _with_gradient(_log_mean_exp(log_w).sum(), surrogate)


@dataclass(frozen=True)
class ScoreFunction(Bound):
    """The ELBO, with the score-function gradient (REINFORCE): ``E_q[(log w - b) * d log q(z|x) / dphi]`` for the guide.

    It asks nothing of the draws, which may be discrete, and it is very noisy: what reparameterization saves. Mass at
    a single point, as an automatic guide's ``Delta``, is a function and no draw; gradients go through it.

    Args:
        num_particles: As for `Bound`, as is ``vectorize_particles``.
        has_baseline: Whether b is the mean of the other particles' log w, which leaves the mean as it is and
            takes much of the noise; else b is 0. It needs two particles.

    Source: Ranganath, Gerrish and Blei, 2014, Black Box Variational Inference; for the baseline, Mnih and Rezende,
    2016, Variational Inference for Monte Carlo Objectives.
    """

    has_baseline: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.has_baseline, bool) or (self.has_baseline and self.num_particles < 2):
            raise ArgumentError(
                f"has_baseline={self.has_baseline!r} with {self.num_particles} particle(s): it must be True or False, "
                "and True needs num_particles of at least 2, as the baseline is the mean of the others."
            )

    @property
    def measure(self) -> Bound:
        """The ELBO."""
        return ELBO(self.num_particles, vectorize_particles=self.vectorize_particles)

    def __call__(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss; see `Bound`."""
        particles = self._run(model, guide, args, kwargs, cut="all")
        log_pxz, log_w = particles.log_pxz, (particles.log_pxz - particles.log_qz).detach()
        gain = log_w
        if self.has_baseline:
            gain = (log_w - log_w.mean(0)) * (self.num_particles / (self.num_particles - 1))
        surrogate = (log_pxz + gain * particles.log_qz_unweighted).mean(0).sum()
        return -particles.scale * _with_gradient(log_w.mean(0).sum(), surrogate)


def _log_mean_exp(terms: Tensor) -> Tensor:
    return terms.logsumexp(0) - math.log(len(terms))


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """A number with another one's gradient."""
    return value.detach() + (surrogate - surrogate.detach())


def _widen(weight: Any, dims: int) -> Any:
    """A scale or a mask of a batch, for numbers with so many dimensions of an event to the right of it."""
    return weight[(..., *[None] * dims)] if isinstance(weight, Tensor) and weight.dim() else weight


def _dtype(site: Any) -> torch.dtype:
    value = site["value"]
    return value.dtype if value.is_floating_point() else torch.get_default_dtype()
