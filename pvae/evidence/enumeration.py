"""Discrete latents summed out of a run that enumerated them, by message passing between their factors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from opt_einsum import shared_intermediates
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pvae.errors import ProgramError

__all__ = ["is_enumerated", "log_factors"]


def is_enumerated(site: Any) -> bool:
    """Whether a run gave a site all of its values at once."""
    return site["infer"].get("_enumerate_dim") is not None


def log_factors(trace: Any, names: Collection[str]) -> list[Tensor]:
    """``log sum_d prod_i f_i(d)`` of some sites' densities ``f_i``, over all values of the discrete latents d.

    Args:
        trace: Of a program that was run with its discrete latents enumerated.
        names: The sites.

    Returns:
        Terms whose sum it is, each with dimensions for the plates that its sites are in.

    Raises:
        ProgramError: Latents that a sum is wanted of lie in plates that cross.

    Source: Obermeyer et al., 2019, Tensor Variable Elimination for Plated Factor Graphs.
    """
    trace.symbolize_dims()
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name in names:
        site = trace.nodes[name]
        log_prob = site["fn"].log_prob(site["value"]).double()
        if not is_enumerated(site):  # a latent that is summed out has no density, masked or not
            log_prob = scale_and_mask(log_prob, mask=site["mask"])
        plates = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        # A site of size 1 in all plates has no dimension left, and a tensor of its own to carry that.
        factors.setdefault(plates, []).append(packed.pack(log_prob.clone(), site["infer"]["_dim_to_symbol"]))
    symbols = set().union(
        *(
            term._pyro_dims  # pyright: ignore[reportAttributeAccessIssue]
            for terms in factors.values()
            for term in terms
        )
    )
    try:
        with shared_intermediates() as cache:
            summed = contract_tensor_tree(factors, symbols - set(trace.plate_to_symbol.values()), cache=cache)
    except (ValueError, NotImplementedError) as error:
        raise ProgramError(
            f"the enumerated latents cannot be summed out: {error} Let the guide draw some of them, without the mark "
            "infer={'enumerate': ...}."
        ) from error
    return [packed.unpack(term, trace.symbol_to_dim) for terms in summed.values() for term in terms]
