"""How far an estimate of log p(x) can be trusted, in words: why an interval is withheld, and one screen of it all."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor

from pvae.evidence.pareto import MIN_SAMPLES_FOR_KHAT

if TYPE_CHECKING:
    from pvae.evidence.estimates import EvidenceEstimate

__all__ = [
    "ERROR_MARGIN",
    "KHAT_LIMIT",
    "MAX_ROUNDING",
    "MIN_ESS",
    "MIN_REACH",
    "STAGES",
    "count_of",
    "explain_khat",
    "explain_reach",
    "explain_rounding",
    "summarize",
]

KHAT_LIMIT = 0.7
"""Above this k-hat neither an estimate nor its standard error can be trusted (Vehtari et al., 2024)."""

MAX_ROUNDING = 0.1
"""In nats."""

MIN_REACH = 0.5

MIN_ESS = 20
"""With fewer effective samples a datum's error is a guess, and its k-hat may be low by luck."""

ERROR_MARGIN = 0.8
"""Of a wanted standard error, what trials must show: that of the draws that count scatters around theirs."""

STAGES = (
    "guide",
    "defensive",
    "refined",
    "heavy-tailed",
    "half from the prior",
    "annealed from the prior",
    "annealed",
)
"""What may answer for a datum by ``proposal="auto"``, in the order in which they are tried.

A mixture of the guide with the prior, ``"defensive"``, stands in the guide's place where draws of the prior are of use.
"""

_OF_STAGES = ("stage", "accepted", "khat")  # of the diagnostics
_NAMED = 5  # indices of data, where there are many


def count_of(count: int, total: int) -> str:
    """Some of the data, in words."""
    return f"{count} of {total} data"


def explain_reach(reach: float) -> str:
    """Why chains that came no further than this are no draws of the posterior; empty if they may be."""
    if reach >= MIN_REACH:
        return ""
    return f"the chains' ends are not spread as the posterior is: their reach, {reach:.1g}, is below {MIN_REACH}"


def explain_rounding(rounding: float, product_precision: str = "float32") -> str:
    """Why log-weights rounded to so many nats tell nothing; empty if they do."""
    if rounding <= MAX_ROUNDING or rounding == float("inf"):  # no weight at all, which k-hat tells
        return ""
    if product_precision != "float32":
        return f"products in {product_precision} move log-weights by {rounding:.1g} nats; use precision='float32'"
    return f"log-weights of this size are rounded to {rounding:.1g} nats; convert model and data to float64"


def explain_khat(khat: float, num_samples: int, limit: float, what: str = "k-hat") -> str:
    """Why a k-hat from so many samples is too high; empty if it is not."""
    if khat <= limit:
        return ""
    if num_samples < MIN_SAMPLES_FOR_KHAT:
        return f"k-hat needs at least {MIN_SAMPLES_FOR_KHAT} samples, there are {num_samples}"
    return f"{what} {khat:.2f}{',' * what.endswith(',')} is above {limit:.2f}"


def summarize(estimate: EvidenceEstimate) -> str:
    """An estimate on one screen."""
    fewest = int(estimate.samples.min())
    draws = f"{estimate.num_samples}" if fewest == estimate.num_samples else f"{fewest} to {estimate.num_samples}"
    count = f"{estimate.num_data} data, {draws} samples each" if estimate.num_data > 1 else f"1 datum, {draws} samples"
    what, mean, unit = "log p(x)", "mean", "nats per datum"
    if estimate.is_joint:
        what, mean, unit = "log p(data)", "log p(data)", "nats, of all data"
        count = f"{estimate.num_together} data together, {draws} samples"
    median = ", median over the data" if estimate.num_data > 1 else ""
    return "\n".join(
        [
            f"{what} of {count} from {estimate.words or estimate.proposal}",
            f"  {mean:<12} {estimate.mean:10.3f} {unit}{_impossible(estimate)}",
            f"  std error    {_errors(estimate)}",
            f"  95% interval {_interval(estimate)}",
            f"  ELBO         {estimate.elbo.mean().item():10.3f}",
            f"  ESS          {estimate.ess.median().item():10.1f} of {estimate.samples.median()} samples{median}",
            f"  k-hat        {estimate.khat.median().item():10.2f}{median}",
            *(
                f"  {name:<13}{value.nanmedian().item():10.2f}{median}"
                for name, value in estimate.diagnostics.items()
                if name not in _OF_STAGES
            ),
            *_stages(estimate),
            *_products(estimate),
            f"  {_verdict(estimate)}",
        ]
    )


def _stages(estimate: EvidenceEstimate) -> list[str]:
    """How many data each stage answered for."""
    if "stage" not in estimate.diagnostics:
        return []
    counts = Counter(estimate.stage)
    return ["  answers from " + ", ".join(f"{name} {counts[name]}" for name in STAGES if counts[name])]


def _products(estimate: EvidenceEstimate) -> list[str]:
    """What the programs' products were done in, if not in float32."""
    if estimate.product_precision == "float32":
        return []
    size = estimate.product_rounding
    return [f"  products     in {estimate.product_precision}, which moves log-weights by {size:.2g} nats or so"]


def _names(rows: Tensor) -> str:
    """The first few data of a mask."""
    which = rows.nonzero()[:, 0].tolist()
    return ", ".join(map(str, which[:_NAMED])) + (", ..." if len(which) > _NAMED else "")


def _impossible(estimate: EvidenceEstimate) -> str:
    """Which data no draw explains, and the mean of the others."""
    rows = estimate.log_px.isneginf()
    if not rows.any():
        return ""
    others = f"; the others' mean is {estimate.log_px[~rows].mean().item():.3f}" if not rows.all() else ""
    of = count_of(int(rows.sum()), estimate.num_data)
    return f": -inf for {of}, number {_names(rows)}, which no sample explains{others}"


def _errors(estimate: EvidenceEstimate) -> str:
    draws = f"{estimate.mean_std_error:10.3f} from the samples"
    return f"{draws}, {estimate.data_std_error:.3f} from the choice of data" if estimate.num_data > 1 else draws


def _interval(estimate: EvidenceEstimate) -> str:
    if not estimate.mean_withheld:
        lower, upper = estimate.mean_interval()
        return f"{lower:10.3f} to {upper:.3f}{' for the mean' if estimate.num_data > 1 else ''}"
    return f"withheld: {estimate.mean_withheld}"


def _verdict(estimate: EvidenceEstimate) -> str:
    total = estimate.num_data
    bad, unresolved = int(estimate.unreliable.sum()), int(estimate.unresolved.sum())
    if estimate.num_samples < MIN_SAMPLES_FOR_KHAT:
        return f"k-hat needs at least {MIN_SAMPLES_FOR_KHAT} samples: how far to trust this is not known"
    if coarse := explain_rounding(estimate.rounding.max().item(), estimate.product_precision):
        return f"{count_of(int((estimate.rounding > MAX_ROUNDING).sum()), total)} are unreliable: {coarse}"
    if "stage" in estimate.diagnostics:
        if not unresolved:
            return "all data are resolved" if total > 1 else "it is resolved"
        return f"{count_of(unresolved, total)} are unresolved, number {_names(estimate.unresolved)}: see `withheld`"
    if short := explain_reach(estimate.reach.min().item()):
        return f"{count_of(int((estimate.reach < MIN_REACH).sum()), total)} are unreliable: {short}"
    if estimate.target_std_error is not None and unresolved:
        missed = f"a standard error above {estimate.target_std_error:g}"
        why = [f"{bad} with a k-hat above {KHAT_LIMIT}"] if bad else []
        why += [f"{unresolved - bad} with {missed}"] if unresolved > bad else []
        return f"{count_of(unresolved, total)} are unresolved: {' and '.join(why)}"
    if bad:
        return f"{count_of(bad, total)} are unreliable (k-hat > {KHAT_LIMIT}): take theirs as lower bounds"
    alone = sum(map(bool, estimate.withheld))
    said = f"; {count_of(alone, total)} have no interval of their own" if alone and total > 1 else ""
    return f"no k-hat is above {KHAT_LIMIT}{said}"
