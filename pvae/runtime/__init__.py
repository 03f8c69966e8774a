"""Running somebody's programs: placed, looked at, isolated; in turn, by several processes, until a signal."""

from pvae.runtime.isolation import (
    get_rng_state,
    isolate,
    kept_buffers,
    outside_modules,
    resolve_seed,
    set_rng_state,
    spare_noise,
)
from pvae.runtime.namespaces import MISSING, PLAIN, Look, Space, added_to, put_back, spaces_of, variables_of
from pvae.runtime.processes import ALONE, Processes, resolve_processes
from pvae.runtime.products import in_precision
from pvae.runtime.programs import Pair, Program, modules_of, place_pair
from pvae.runtime.reach import MODULES_OWN, is_leaf, reachable
from pvae.runtime.signals import Interrupted, NeverStop, Stop, graceful_stop
from pvae.runtime.sites import (
    base_distribution,
    check_pair,
    check_real,
    check_signature,
    check_support,
    check_supports,
    check_whole,
    density_sites,
    enumerated_sites,
    observed_data,
    simple_support,
    tensors_of,
    warn_of_repeated,
)
from pvae.runtime.surroundings import check_surroundings
from pvae.runtime.turns import in_turn, turn

__all__ = [
    "ALONE",
    "MISSING",
    "MODULES_OWN",
    "PLAIN",
    "Interrupted",
    "Look",
    "NeverStop",
    "Pair",
    "Processes",
    "Program",
    "Space",
    "Stop",
    "added_to",
    "base_distribution",
    "check_pair",
    "check_real",
    "check_signature",
    "check_support",
    "check_supports",
    "check_surroundings",
    "check_whole",
    "density_sites",
    "enumerated_sites",
    "get_rng_state",
    "graceful_stop",
    "in_precision",
    "in_turn",
    "is_leaf",
    "isolate",
    "kept_buffers",
    "modules_of",
    "observed_data",
    "outside_modules",
    "place_pair",
    "put_back",
    "reachable",
    "resolve_processes",
    "resolve_seed",
    "set_rng_state",
    "simple_support",
    "spaces_of",
    "spare_noise",
    "tensors_of",
    "turn",
    "variables_of",
    "warn_of_repeated",
]
