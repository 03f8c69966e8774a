"""Data that may not be of the training data's kind: where their log p(x) lies among that of a reference."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pvae.errors import ArgumentError
from pvae.evidence import EvidenceEstimate, check_estimate

__all__ = ["OutOfDistribution", "out_of_distribution"]

_REPLICATES = 200
_SURE = 2  # standard errors


@dataclass(frozen=True, eq=False, repr=False)
class OutOfDistribution:
    """log p(x) of M data among that of N reference data. Tensors are float64, on the CPU.

    Monte Carlo errors are how numbers scatter if all log p(x) are moved by normal errors of their standard errors.

    Attributes:
        estimate: Of the data in question.
        reference: Of data as they should be, such as held-out ones.
    """

    estimate: EvidenceEstimate
    reference: EvidenceEstimate

    @property
    def log_px(self) -> Tensor:
        """Nats per datum, shape ``(M,)``, its bias taken out."""
        return self.estimate.corrected

    @property
    def reference_log_px(self) -> Tensor:
        """The same of the reference, shape ``(N,)``."""
        return self.reference.corrected

    @cached_property
    def percentile(self) -> Tensor:
        """The share of the reference with a lower log p(x), from 0 to 1, shape ``(M,)``."""
        return _share_below(self.reference_log_px, self.log_px)

    @cached_property
    def percentile_std_error(self) -> Tensor:
        """Its standard error, over the choice of the reference and the draws, shape ``(M,)``."""
        p, n = self.percentile, len(self.reference_log_px)
        moved = torch.stack([_share_below(reference, x) for x, reference in self._replicates])
        # At the ends as if one more datum lay beyond: no share is known better than 1 / N.
        return torch.hypot((p * (1 - p) / n).sqrt().clamp(min=1 / (n + 1)), moved.std(0))

    @cached_property
    def typicality(self) -> Tensor:
        """``|log p(x) - mean over the reference|``, nats, shape ``(M,)``: large also where log p(x) is too high.

        The mean is that of the finite ones.
        """
        return (self.log_px - self._centre).abs()

    @cached_property
    def auroc(self) -> float:
        """The chance that one of the data has a lower log p(x) than one of the reference; 0.5 says nothing."""
        return _auroc(-self.log_px, -self.reference_log_px)[0]

    @cached_property
    def auroc_data_std_error(self) -> float:
        """Its standard error over the choice of data and reference; of one datum, of the reference alone.

        Source: DeLong, DeLong and Clarke-Pearson, 1988, Comparing the Areas Under Two or More Correlated Receiver
        Operating Characteristic Curves.
        """
        return _auroc(-self.log_px, -self.reference_log_px)[1]

    @cached_property
    def auroc_mc_std_error(self) -> float:
        """Its Monte Carlo standard error, which more draws would make smaller."""
        return torch.tensor([_auroc(-x, -reference)[0] for x, reference in self._replicates]).std().item()

    @property
    def auroc_std_error(self) -> float:
        """Both errors together."""
        return float(torch.hypot(*torch.tensor([self.auroc_data_std_error, self.auroc_mc_std_error])))

    @cached_property
    def typicality_auroc(self) -> float:
        """The chance that one of the data is further from the reference's mean log p(x) than one of the reference."""
        return _auroc(self.typicality, (self.reference_log_px - self._centre).abs())[0]

    @property
    def _centre(self) -> Tensor:
        finite = self.reference_log_px.isfinite()
        return self.reference_log_px[finite].mean()

    @cached_property
    def _replicates(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.estimate.seed)
        errors = [one.std_error.nan_to_num(0.0, posinf=0.0) for one in (self.estimate, self.reference)]
        values = self.log_px, self.reference_log_px

        def move() -> tuple[Tensor, Tensor]:
            noise = [torch.randn(len(v), generator=generator, dtype=v.dtype) for v in values]
            return values[0] + errors[0] * noise[0], values[1] + errors[1] * noise[1]

        return [move() for _ in range(_REPLICATES)]

    @property
    def verdict(self) -> str:
        """What log p(x) tells of these data, in words."""
        sure = _SURE * self.auroc_std_error
        if self.auroc < 0.5 - sure:
            return (
                "these data have higher log p(x) than the reference, which does not make them of its kind: densities "
                "are often higher on simpler data (Nalisnick et al., 2019). Do not tell them apart by log p(x)"
            )
        if self.auroc > 0.5 + sure:
            return (
                "these data have lower log p(x) than the reference. That holds for them alone: others that are not of "
                "its kind may have higher log p(x) (Nalisnick et al., 2019)"
            )
        return "log p(x) does not tell these data from the reference, which does not make them of its kind"

    def __repr__(self) -> str:
        m, n = self.estimate.num_data, self.reference.num_data
        data, draws = self.auroc_data_std_error, self.auroc_mc_std_error
        low = int((self.percentile < 0.05).sum())
        surely = int((self.percentile + _SURE * self.percentile_std_error < 0.05).sum())
        means = [one.mean().item() for one in (self.log_px, self.reference_log_px)]
        lines = [
            f"log p(x) of {m} data among that of {n} of the reference",
            f"  means        {means[0]:10.3f} and {means[1]:.3f} nats per datum",
            f"  AUROC        {self.auroc:10.3f} +- {data:.3f} from the choice of data, {draws:.3f} from the samples",
            f"  by typicality{self.typicality_auroc:10.3f}",
            f"  below 5% of the reference: {low} of {m} data, {surely} of them by {_SURE:g} standard errors",
        ]
        for name, one in (("data", self.estimate), ("reference data", self.reference)):
            if bad := int(one.unresolved.sum()):
                lines.append(f"  {bad} of {one.num_data} {name} are unresolved: their log p(x) may be too low")
        return "\n".join([*lines, textwrap.fill(self.verdict, 88, initial_indent="  ", subsequent_indent="    ")])


def out_of_distribution(estimate: EvidenceEstimate, reference: EvidenceEstimate) -> OutOfDistribution:
    """Scores data by where their log p(x) lies among that of a reference.

    A low percentile says that a datum is unlike the reference as the model sees it. A high one says nothing: data of
    another kind may have higher log p(x) than any that the model was trained on, as plain images have under a model of
    photographs. So `OutOfDistribution.typicality` is there, too, which counts both sides; it fails where log p(x) is
    by chance the same.

    Args:
        estimate: Of the data in question, from `pvae.log_evidence`.
        reference: Of data as they should be, with the same model; held-out ones, since log p(x) is higher of data that
            were trained on.

    Returns:
        `OutOfDistribution`.

    Raises:
        ArgumentError: One is no estimate, or of all data together; or the reference is of one datum.

    Source: Nalisnick, Matsukawa, Teh, Gorur and Lakshminarayanan, 2019, Do Deep Generative Models Know What They Don't
    Know?; Nalisnick, Matsukawa, Teh and Lakshminarayanan, 2019, Detecting Out-of-Distribution Inputs to Deep Generative
    Models Using Typicality.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> estimate = pvae.log_evidence(pair.model, pair.guide, x)
        >>> strange = pvae.log_evidence(pair.model, pair.guide, x + 10)
        >>> pvae.diagnostics.out_of_distribution(strange, estimate).auroc
        1.0
    """
    for name, one in (("estimate", estimate), ("reference", reference)):
        check_estimate(name, one)
        if one.is_joint:
            raise ArgumentError(
                f"{name} is one log p of {one.num_together} data together, and single data have no score by it: use a "
                "model with one plate over the data around all sites."
            )
    if reference.num_data < 2:
        raise ArgumentError("reference must be of at least two data, to compare with; got 1.")
    return OutOfDistribution(estimate, reference)


def _share_below(reference: Tensor, x: Tensor) -> Tensor:
    """The share of the reference below each x, half of equal ones counted."""
    ordered = reference.sort().values
    below, upto = (torch.searchsorted(ordered, x.contiguous(), right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(ordered))


def _auroc(scores: Tensor, reference: Tensor) -> tuple[float, float]:
    """The chance that a score is above one of the reference, and its standard error over the choice of both."""
    each, other = _share_below(reference, scores), 1 - _share_below(scores, reference)
    variance = sum(v.var().item() / len(v) for v in (each, other) if len(v) > 1)
    return each.mean().item(), variance**0.5
