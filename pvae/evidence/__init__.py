"""log p(x) of any Pyro pair, with the error of each number."""

from pvae.evidence import proposals
from pvae.evidence.estimates import KHAT_LIMIT, EvidenceEstimate
from pvae.evidence.importance import log_evidence, log_weights
from pvae.evidence.weights import iwae_bounds

__all__ = ["KHAT_LIMIT", "EvidenceEstimate", "iwae_bounds", "log_evidence", "log_weights", "proposals"]
