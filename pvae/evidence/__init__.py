"""log p(x) of any Pyro pair, with the error of each number."""

from pvae.evidence.importance import KHAT_LIMIT, EvidenceEstimate, log_evidence, log_weights

__all__ = ["KHAT_LIMIT", "EvidenceEstimate", "log_evidence", "log_weights"]
