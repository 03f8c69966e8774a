"""log p(x) of any Pyro pair, with the error of each number."""

from pvae.evidence import proposals
from pvae.evidence.batchwise import map_batches
from pvae.evidence.bidirectional import Bracket, bidirectional_monte_carlo
from pvae.evidence.comparison import Comparison, check_estimate, compare
from pvae.evidence.densities import Batch, Densities
from pvae.evidence.entries import draw_entries, draw_rates, flatten_entries, name_entries
from pvae.evidence.estimates import KHAT_LIMIT, EvidenceEstimate
from pvae.evidence.importance import log_evidence, log_weights
from pvae.evidence.posterior import WeightedDraws
from pvae.evidence.predictive import Predictive, posterior_predictive, prior_predictive
from pvae.evidence.quadrature import QuadratureEstimate, gauss_hermite
from pvae.evidence.references import Reference, reference
from pvae.evidence.verdicts import MIN_ESS, STAGES
from pvae.evidence.weighted_draws import weighted_draws
from pvae.evidence.weights import WeightSums, iwae_bounds

__all__ = [
    "KHAT_LIMIT",
    "MIN_ESS",
    "STAGES",
    "Batch",
    "Bracket",
    "Comparison",
    "Densities",
    "EvidenceEstimate",
    "Predictive",
    "QuadratureEstimate",
    "Reference",
    "WeightSums",
    "WeightedDraws",
    "bidirectional_monte_carlo",
    "check_estimate",
    "compare",
    "draw_entries",
    "draw_rates",
    "flatten_entries",
    "gauss_hermite",
    "iwae_bounds",
    "log_evidence",
    "log_weights",
    "map_batches",
    "name_entries",
    "posterior_predictive",
    "prior_predictive",
    "proposals",
    "reference",
    "weighted_draws",
]
