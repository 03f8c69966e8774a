"""What a guide tells of the data by each latent number, and whether it has collapsed onto the prior."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.data import Data
from pvae.errors import ArgumentError, DataError, positive_int
from pvae.evidence import Batch, Densities, draw_entries, draw_rates, flatten_entries, map_batches, name_entries
from pvae.evidence.proposals import Latents
from pvae.runtime import Program, in_turn, resolve_seed

__all__ = ["ACTIVE_VARIANCE", "LatentUsage", "latent_usage"]

ACTIVE_VARIANCE = 0.01
"""Above this variance over data of E_q[z|x] a unit is active (Burda, Grosse and Salakhutdinov, 2015)."""

_PRIOR_DRAWS = 4000
_IDLE_COST = 0.1  # nats, for a unit that says nothing
_NAMED = 5


@dataclass(frozen=True, eq=False, repr=False)
class LatentUsage:
    """How N data use D latent numbers. Tensors are float64, on the CPU, of shape ``(D,)``; in nats per datum.

    Attributes:
        names: Of the latent numbers, such as ``"z[3]"``.
        kl: Mean over data of ``KL(q(z_d|x) || p(z_d))``; their sum is the rate where guide and prior have no
            correlations, and less where the guide has. nan where it is not known.
        kl_std_error: Its standard error, over the choice of data and the draws.
        variance_of_means: Variance over data of ``E_q[z_d|x]``.
        rate: Mean over data of ``KL(q(z|x) || p(z))``.
        rate_std_error: Its standard error, over the choice of data and the draws.
        mutual_information: ``I_q(x; z)`` of the N data and their codes: ``E log q(z|x) - log q(z)`` with the aggregate
            posterior ``q(z) = (1/N) sum_n q(z|x_n)``. Never above log N; low in the mean as that of the population. nan
            where the guide masks latents, of which some data then have others than the rest.
        mutual_information_std_error: Its standard error, over the choice of data and the draws.
        mutual_information_upper: The same with each datum left out of the q(z) that it is held against: high in the
            mean. The population's lies between the two.
        num_data: ``N``.
        num_samples: ``K``, draws for each datum.
    """

    names: tuple[str, ...]
    kl: Tensor
    kl_std_error: Tensor
    variance_of_means: Tensor
    rate: float
    rate_std_error: float
    mutual_information: float
    mutual_information_std_error: float
    mutual_information_upper: float
    num_data: int
    num_samples: int

    @property
    def active(self) -> Tensor:
        """Which latent numbers are active: `variance_of_means` above 0.01; bool."""
        return self.variance_of_means > ACTIVE_VARIANCE

    @property
    def aggregate_kl(self) -> float:
        """``KL(q(z) || p(z)) = rate - mutual_information``: how far the codes of all data together are from the prior.

        As the mutual information is low by a bias, or stops at log N, this is high by as much.
        """
        return self.rate - self.mutual_information

    @property
    def is_saturated(self) -> bool:
        """Whether the mutual information is so near log N that it says little of the population's."""
        return self.mutual_information > math.log(self.num_data) - 1

    @property
    def is_collapsed(self) -> bool:
        """Whether no unit is active: codes say nothing of data."""
        return not self.active.any()

    @property
    def verdict(self) -> str:
        """Whether the posterior has collapsed onto the prior, in which units, and what to do."""
        total, active = len(self.names), self.active
        idle = (~active).nonzero()[:, 0].tolist()
        if not idle:
            return f"no collapse: all {total} units are active"
        listed = ", ".join(self.names[i] for i in idle[:_NAMED]) + (", ..." if len(idle) > _NAMED else "")
        costly = [i for i in idle if self.kl[i] > _IDLE_COST]
        waste = (
            f" Of these {len(costly)} cost more than {_IDLE_COST} nats and say nothing: q(z|x) is the same for all "
            "data there, and not the prior. Train for longer, or look at the prior."
            if costly
            else ""
        )
        if len(idle) < total:
            return (
                f"inactive: {len(idle)} of {total} units ({listed}); the others are in use. "
                f"A model wider than its data need leaves some out, at no cost; fewer latents would do.{waste}"
            )
        return (
            f"posterior collapse: all {total} units are inactive ({listed}), and codes say nothing of data. Raise the "
            "KL divergence's weight from 0 during training (pvae.schedules), leave each unit some nats "
            f"(pvae.objectives.MeanFieldELBO(free_bits=...)), or give the decoder less to do without codes.{waste}"
        )

    def __repr__(self) -> str:
        error = self.mutual_information_std_error
        bound = f"up to {self.mutual_information_upper:.3f} in the population"
        if self.is_saturated:
            bound = f"near log N = {math.log(self.num_data):.3f}, above which {self.num_data} data cannot tell"
        lines = [
            f"use of {len(self.names)} latent numbers by {self.num_data} data, {self.num_samples} draws each, in nats",
            f"  rate               {self.rate:10.3f} +- {self.rate_std_error:.3f}",
            f"  mutual information {self.mutual_information:10.3f} +- {error:.3f}, {bound}",
            f"  KL(q(z) || p(z))   {self.aggregate_kl:10.3f}",
            f"  active units       {int(self.active.sum()):10d} of {len(self.names)}",
        ]
        order = self.kl.nan_to_num(-1.0).argsort(descending=True).tolist()
        top = ", ".join(f"{self.names[i]} {self.kl[i].item():.2f}" for i in order[:_NAMED])
        lines.append(f"  largest KL              {top}{', ...' if len(order) > _NAMED else ''}")
        return "\n".join([*lines, textwrap.fill(self.verdict, 88, initial_indent="  ", subsequent_indent="    ")])


@in_turn
def latent_usage(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    device: str | torch.device = "auto",
) -> LatentUsage:
    """Measures what each latent number costs and tells, and what all of them tell together.

    ``mean rate = I_q(x; z) + KL(q(z) || p(z))``. Divergences of single numbers are in closed form where torch has one,
    of a multivariate normal those of its marginals; otherwise by K draws. Where guide or prior have no density for each
    number (flows, mixtures), those of the marginals are estimated from spacings between draws, to about 0.05 nats with
    100 draws; not with priors that depend on the data. The mutual information takes ``N^2`` evaluations of the guide's
    density, by one code of each datum: pass some thousand data.

    Args:
        model: The generative program.
        guide: The recognition program, whose density can be evaluated at any latents.
        data: As for `pvae.log_evidence`, at least two; in memory or read again from its start.
        num_samples: ``K``, draws for each datum, at least 2.
        seed: As for `pvae.log_evidence`.
        device: As for `pvae.log_evidence`.

    Returns:
        `LatentUsage`.

    Raises:
        ArgumentError: ``num_samples`` is below 2.
        DataError: There is only one datum.
        ProgramError: There are no latents, or those of all data have one posterior together; the guide knows only of
            its own draws; or as by `pvae.log_evidence`.

    Source: Burda, Grosse and Salakhutdinov, 2015, Importance Weighted Autoencoders, for active units; Hoffman and
    Johnson, 2016, ELBO Surgery, for the identity; Poole, Ozair, van den Oord, Alemi and Tucker, 2019, On Variational
    Bounds of Mutual Information, for both bounds.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> found = pvae.diagnostics.latent_usage(pair.model, pair.guide, x)
        >>> found.active.tolist()
        [True, True]
    """
    k, seed = positive_int("num_samples", num_samples), resolve_seed(seed)
    if k < 2:
        raise ArgumentError("num_samples must be at least 2, to tell codes' scatter from that of their means; got 1.")
    found = map_batches(_measure_batch, model, guide, data, num_samples=k, seed=seed, device=device)
    names = found[0][0]
    kl, means, spread, rate = (torch.cat([part[1][i] for part in found]) for i in range(4))
    codes = {name: torch.cat([part[2][name] for part in found], 1) for name in found[0][2]}
    n = len(kl)
    if n < 2:
        raise DataError("data must be at least two, to tell how codes differ between them; got 1.")
    if any(part[3] for part in found):
        lower = upper = torch.full((n,), torch.nan, dtype=torch.float64)
    else:
        lower, upper = _inform(model, guide, data, codes, seed, device)  # by which a loader shuffles as before
    return LatentUsage(
        names=names,
        kl=kl.mean(0),
        kl_std_error=kl.std(0) / n**0.5,
        # The variance of estimated means has their own scatter in it.
        variance_of_means=(means.var(0) - spread.mean(0) / k).clamp(min=0.0),
        rate=rate.mean().item(),
        rate_std_error=rate.std().item() / n**0.5,
        mutual_information=lower.mean().item(),
        mutual_information_std_error=lower.std().item() / n**0.5,
        mutual_information_upper=upper.mean().item(),
        num_data=n,
        num_samples=k,
    )


def _measure_batch(
    densities: Densities, batch: Batch, spans: list[int]
) -> tuple[tuple[str, ...], tuple[Tensor, ...], dict[str, Tensor], bool]:
    """Names of the entries; their divergences, means and the means' scatter, ``(N, U)``, and rates ``(N,)``; a code;
    and whether entries are masked.
    """
    parts = [draw_entries(densities, batch, span) for span in spans]
    latents = parts[0].latents.values
    kl, means, values = (torch.cat([getattr(part, key) for part in parts]) for key in ("kl", "means", "values"))
    kl = kl.mean(0)
    unknown = kl.isnan().all(0)
    if unknown.any() and _has_one_prior(densities, batch):
        prior = densities.draw_prior(tuple(t[:1] for t in batch), _PRIOR_DRAWS)
        kl[:, unknown] = _marginal_divergence(values[..., unknown], flatten_entries(prior.values)[:, 0, unknown])
    rate = torch.cat([draw_rates(densities, batch, span)[1] for span in spans]).mean(0)
    numbers = tuple(t.cpu() for t in (kl, means.mean(0), means.var(0), rate))
    codes = {name: value[:1].cpu() for name, value in latents.items()}
    return name_entries(latents), numbers, codes, any(part.is_masked for part in parts)


def _has_one_prior(densities: Densities, batch: Batch) -> bool:
    """Whether the density of a code under the prior is the same for all data."""
    latents, _ = densities.draw_guide(tuple(t[:1] for t in batch), 1)
    rows = len(batch[0])
    same = {name: value.expand(1, rows, *value.shape[2:]) for name, value in latents.values.items()}
    log_pz, _ = densities.densities(batch, Latents(same, 1))
    return torch.allclose(log_pz, log_pz[:, :1].expand_as(log_pz), rtol=1e-4, atol=1e-4, equal_nan=True)


def _marginal_divergence(z: Tensor, prior: Tensor) -> Tensor:
    """``KL(q(z_u) || p(z_u))`` from draws ``(K, N, U)`` of q and ``(S, U)`` of p: minus the entropy of ``F_p(z)``.

    Source: Vasicek, 1976, A Test for Normality Based on Sample Entropy.
    """
    from scipy.stats import differential_entropy  # slow to import, and few need it

    columns = []
    for u in range(z.shape[-1]):
        points, values = prior[:, u].sort().values, z[..., u].contiguous()
        ranks = torch.searchsorted(points, values)
        low, high = (points[(ranks - back).clamp(0, len(points) - 1)] for back in (1, 0))
        # Where the prior has no draw on one side, how far out is not known: anywhere in the last of its cells.
        inside = torch.where(high > low, (values - low) / (high - low), torch.rand_like(values))
        places = (ranks + inside) / (len(points) + 1)
        entropy = differential_entropy(places.cpu().numpy(), axis=0, method="ebrahimi")
        columns.append(torch.as_tensor(-entropy).clamp(0.0, math.log(len(points))))
    return torch.stack(columns, -1).to(z)


def _inform(
    model: Program, guide: Program, data: Data, codes: dict[str, Tensor], seed: int, device: str | torch.device
) -> tuple[Tensor, Tensor]:
    """``log q(z_n|x_n) - log q(z_n)`` of each datum's code, q(z) being of all data, and of all but that one."""
    n = next(iter(codes.values())).shape[1]

    def measure(densities: Densities, batch: Batch, spans: list[int]) -> Tensor:
        rows, start, parts = len(batch[0]), 0, []
        for span in spans:
            some = {name: value[0, start : start + span].to(batch[0].device) for name, value in codes.items()}
            every = {name: value[:, None].expand(span, rows, *value.shape[1:]) for name, value in some.items()}
            parts.append(densities.log_qz(batch, Latents(every, span)).double().cpu())
            start += span
        return torch.cat(parts)

    log_q = torch.cat(map_batches(measure, model, guide, data, num_samples=n, seed=seed, device=device), 1)
    own = log_q.diagonal()
    lower = own - (log_q.logsumexp(1) - math.log(n))
    others = log_q.clone().fill_diagonal_(-torch.inf)
    return lower, own - (others.logsumexp(1) - math.log(n - 1))
