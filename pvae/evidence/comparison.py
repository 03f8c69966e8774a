"""Two models of the same data: the difference of their log p, and how well it is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pvae.errors import ArgumentError
from pvae.evidence.estimates import EvidenceEstimate

__all__ = ["Comparison", "check_estimate", "compare"]


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """``log p_a - log p_b`` of two estimates of the same data; positive where the first model explains them better.

    Attributes:
        a: The first estimate.
        b: The second.
    """

    a: EvidenceEstimate
    b: EvidenceEstimate

    @property
    def is_joint(self) -> bool:
        """Whether it is of all data together, a log Bayes factor; otherwise the mean over data."""
        return self.a.is_joint

    @property
    def difference(self) -> float:
        """In nats of all data together, or nats per datum; each estimate with its bias taken out."""
        return (self.a.corrected - self.b.corrected).mean().item()

    @property
    def std_error(self) -> float:
        """The Monte Carlo standard error of `difference`, which more draws would make smaller."""
        return math.hypot(self.a.mean_std_error, self.b.mean_std_error)

    @property
    def data_std_error(self) -> float:
        """Standard error of `difference` over the choice of data, from the differences of each; nan for one number."""
        if self.a.num_data == 1:
            return float("nan")
        return (self.a.corrected - self.b.corrected).std().item() / self.a.num_data**0.5

    @property
    def withheld(self) -> str:
        """Why `interval` gives none; empty if it does."""
        reasons = [one.mean_withheld and f"{name}: {one.mean_withheld}" for name, one in (("a", self.a), ("b", self.b))]
        return "; ".join(filter(None, reasons))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """A confidence interval for the difference: its Monte Carlo error, not that of the choice of data.

        Each side adds in squares how far `EvidenceEstimate.mean_interval` reaches to that side for the first estimate,
        and to the other side for the second. Withheld (nan) where one of these is: `withheld` says why.

        Args:
            level: Coverage aimed at, between 0 and 1.

        Returns:
            Lower and upper end, in nats as `difference`.

        Source: Newcombe, 1998, Interval Estimation for the Difference Between Independent Proportions.
        """
        (low_a, high_a), (low_b, high_b) = (one.mean_interval(level) for one in (self.a, self.b))
        a, b = (one.corrected.mean().item() for one in (self.a, self.b))
        return a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b)

    def __repr__(self) -> str:
        what, unit = f"mean of log p_a(x) - log p_b(x) over {self.a.num_data} data", "nats per datum"
        if self.is_joint:
            what, unit = f"log p_a(data) - log p_b(data) of {self.a.num_together} data together", "nats"
        errors = f"{self.std_error:10.3f} from the samples"
        if self.a.num_data > 1:
            errors += f", {self.data_std_error:.3f} from the choice of data"
        low, high = self.interval()
        interval = f"withheld: {self.withheld}" if self.withheld else f"{low:10.3f} to {high:.3f}"
        return "\n".join(
            [
                what,
                f"  difference   {self.difference:10.3f} {unit}",
                f"  std error    {errors}",
                f"  95% interval {interval}",
            ]
        )


def check_estimate(name: str, value: object) -> None:
    """Raises `ArgumentError` naming the argument ``name`` where a value is no estimate."""
    if not isinstance(value, EvidenceEstimate):
        raise ArgumentError(f"{name} must be what pvae.log_evidence returns, got {type(value).__name__}.")


def compare(a: EvidenceEstimate, b: EvidenceEstimate) -> Comparison:
    """Compares two models by their estimates of log p for the same data, in the same order.

    Where each estimate is one log p(data) of all data, the difference is the log Bayes factor of the first model
    against the second. Where each datum has its own log p(x), it is the mean of the differences, with the error of its
    draws and, apart, that of the choice of data: the same data are in both, so these partly cancel.

    Args:
        a: From `pvae.log_evidence` with the first model.
        b: With the second model, and draws of its own: another ``seed`` if both share a prior's draws.

    Returns:
        A `Comparison`.

    Raises:
        ArgumentError: They are of different numbers of data, or one of all data together and the other of each.

    Source: Kass and Raftery, 1995, Bayes Factors.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> estimate = pvae.log_evidence(pair.model, pair.guide, x)
        >>> other = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, seed=1)
        >>> found = pvae.compare(estimate, pvae.log_evidence(other.model, other.guide, x))
        >>> exact = (pair.log_px(x) - other.log_px(x)).mean().item()
        >>> abs(found.difference - exact) < 5 * found.std_error
        True
    """
    check_estimate("a", a)
    check_estimate("b", b)
    if a.is_joint != b.is_joint:
        joint, each = ("a", "b") if a.is_joint else ("b", "a")
        raise ArgumentError(
            f"'{joint}' is of all data together and '{each}' of each datum: they cannot be compared. The log p of "
            f"independent data adds up, so that {each}.log_px.sum() is comparable, if {each}'s model has nothing that "
            "data share."
        )
    if (a.num_data, a.num_together) != (b.num_data, b.num_together):
        counts = [one.num_together or one.num_data for one in (a, b)]
        raise ArgumentError(f"estimates of {counts[0]} and of {counts[1]} data cannot be compared: use the same data.")
    return Comparison(a, b)
