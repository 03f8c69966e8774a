"""A guide held against the prior: what a code costs, in all and entry by entry, in closed form where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import kl_divergence

from pvae.errors import ProgramError
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.exponential_families import leaf_of
from pvae.evidence.latents import Latents
from pvae.evidence.weights import WeightSums

__all__ = ["Entries", "draw_entries", "draw_rates", "flatten_entries", "name_entries"]

_JOINT_NORMALS = (dist.MultivariateNormal, dist.LowRankMultivariateNormal)  # whose marginals are known


@dataclass(frozen=True, eq=False)
class Entries:
    """K draws of a guide for N data, as U numbers each. Tensors are float64, shape ``(K, N, U)``.

    Attributes:
        latents: The draws.
        values: The same, entry by entry.
        means: Those of the guide, given earlier sites, where it is normal; the value otherwise, whose mean it is.
        kl: ``KL(q(z_u|x) || p(z_u))``, given earlier sites: in closed form where torch has one, else ``log q - log p``
            at the draw, whose mean it is. Of a multivariate normal its marginals'. nan where neither is known.
        is_masked: Whether the guide leaves some entries of some data out of its density.
    """

    latents: Latents
    values: Tensor
    means: Tensor
    kl: Tensor
    is_masked: bool = False


def name_entries(values: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the entries of latents ``(K, N, *plates, *event)``, such as ``"z[3]"``; without dimensions of size 1."""
    names = []
    for site, value in values.items():
        shape = [size for size in value.shape[2:] if size > 1]
        places = product(*map(range, shape))
        names += [f"{site}[{', '.join(map(str, place))}]" if place else site for place in places]
    return tuple(names)


def flatten_entries(values: Mapping[str, Tensor]) -> Tensor:
    """Latents ``(K, N, *plates, *event)`` as one tensor of numbers, ``(K, N, U)``, in the order of `name_entries`."""
    parts = [value.reshape(*value.shape[:2], -1).double() for value in values.values()]
    return torch.cat(parts, -1)


def draw_rates(densities: Densities, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
    """Draws from the guide; returns log-weights and, of each draw, a rate whose mean is ``KL(q(z|x) || p(z))``.

    A site's share of the rate is its divergence from the prior, given earlier sites, in closed form where torch has
    one; else ``log q - log p`` at the draw. Each is of shape ``(K, N)``, float64.

    Raises:
        NumericalError: A log-weight is nan or ``+inf``.
    """
    log_weights, rates = _draw_rates(densities, batch, num_samples)
    WeightSums.of(log_weights)  # raises where one is no number
    return log_weights, rates


def _draw_rates(densities: Densities, batch: Batch, num_samples: int) -> tuple[Tensor, Tensor]:
    runner, names = densities.runner, densities.tried.names
    if not names or runner.summed or runner.made or runner.layout.one_by_one:
        latents, log_qz = densities.draw_guide(batch, num_samples)
        log_pz, log_px_given_z = densities.densities(batch, latents)
        return log_pz + log_px_given_z - log_qz, (log_qz - log_pz).double().expand(num_samples, -1)
    run = runner.run(densities.guide, batch, num_samples)
    prior = runner.run(densities.model, batch, num_samples, run.values(names))
    log_weights = prior.log_prob(prior.sites) - run.log_prob(run.sites)
    rate = torch.zeros_like(log_weights)
    for name in names:
        q, p = run.sites[name], prior.sites[name]
        exact = None if q["mask"] is not None or p["mask"] is not None else _closed_form(q["fn"], p["fn"])
        if exact is None:
            rate = rate + run.log_prob([name]) - prior.log_prob([name])
        else:
            rate = rate + runner.layout.sum_out(exact, num_samples)
    return log_weights, rate.expand(log_weights.shape)


def draw_entries(densities: Densities, batch: Batch, num_samples: int) -> Entries:
    """Draws from the guide, entry by entry.

    Raises:
        ProgramError: There are no latents, or all data together have one log p.
    """
    if not densities.has_latents:
        raise ProgramError("the model has no latent sites: there is nothing to tell of its codes.")
    if densities.is_joint:
        raise ProgramError(
            "all data have one posterior together here, as latents or the guide are outside of a plate over the data: "
            "codes of single data are not defined."
        )
    runner, names = densities.runner, densities.tried.names
    run = runner.run(densities.guide, batch, num_samples)
    values = run.values(names)
    prior = runner.run(densities.model, batch, num_samples, values)
    means, divergences = {}, {}
    for name in names:
        q, p = run.sites[name], prior.sites[name]
        event_dim = len(q["fn"].event_shape)
        terms = {"means": _mean(q), "kl": None if runner.summed else _divergence(q, p)}
        laid_out = {
            key: torch.full_like(values[name], torch.nan)
            if term is None
            else runner.layout.gather(term.expand(q["value"].shape), event_dim, num_samples)
            for key, term in terms.items()
        }
        means[name], divergences[name] = laid_out["means"], laid_out["kl"]
    flat = [flatten_entries(each) for each in (values, means, divergences)]
    masks = (run.sites[name]["mask"] for name in names)
    is_masked = not all(mask is None or torch.as_tensor(mask).all() for mask in masks)
    return Entries(Latents(values, num_samples), *flat, is_masked=is_masked)


def _mean(site: Any) -> Tensor:
    """That of a normal distribution; others' may be none, or what somebody calls so."""
    leaf = leaf_of(site["fn"])
    return leaf.mean if isinstance(leaf, (dist.Normal, *_JOINT_NORMALS)) else site["value"]


def _divergence(q_site: Any, p_site: Any) -> Tensor | None:
    """Of each entry, shaped as the value; none where one of the two has no density for each entry."""
    q, p = (_marginals(leaf_of(site["fn"])) for site in (q_site, p_site))
    if q.event_shape or p.event_shape or q_site["mask"] is not None or p_site["mask"] is not None:
        return None
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        value = q_site["value"]
        return q.log_prob(value) - p.log_prob(value)


def _closed_form(q: Any, p: Any) -> Tensor | None:
    """The divergence of two sites, shaped as their batch; none where torch has no closed form."""
    if isinstance(leaf_of(q), _JOINT_NORMALS):
        p = _as_joint(p)
    if isinstance(leaf_of(p), _JOINT_NORMALS):
        q = _as_joint(q)
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _as_joint(fn: Any) -> Any:
    """Independent normals over one dimension as a multivariate one, with which torch can compare others."""
    leaf = leaf_of(fn)
    if isinstance(leaf, dist.Normal) and len(fn.event_shape) == 1:
        return dist.MultivariateNormal(leaf.loc, scale_tril=leaf.scale.diag_embed())
    return fn


def _marginals(leaf: Any) -> Any:
    """A multivariate normal's normal marginals; else what was given."""
    return dist.Normal(leaf.mean, leaf.variance.sqrt()) if isinstance(leaf, _JOINT_NORMALS) else leaf
