"""Running somebody's programs: placed, looked at, isolated; in turn, by several processes, until a signal."""

from pvae.runtime.isolation import isolated, noise, outside_modules, resolve_seed, set_noise
from pvae.runtime.processes import ALONE, Processes, resolve_processes
from pvae.runtime.programs import Program, cast, dtype_of, modules_of, place, reached
from pvae.runtime.signals import Interrupted, Stop, heeded
from pvae.runtime.sites import (
    base_distribution,
    check_pair,
    check_real,
    check_signature,
    check_support,
    check_supports,
    density_sites,
    observed,
    simple_support,
    tensors_of,
)
from pvae.runtime.surroundings import check_surroundings
from pvae.runtime.turns import in_turn, turn

__all__ = [
    "ALONE",
    "Interrupted",
    "Processes",
    "Program",
    "Stop",
    "base_distribution",
    "cast",
    "check_pair",
    "check_real",
    "check_signature",
    "check_support",
    "check_supports",
    "check_surroundings",
    "density_sites",
    "dtype_of",
    "heeded",
    "in_turn",
    "isolated",
    "modules_of",
    "noise",
    "observed",
    "outside_modules",
    "place",
    "reached",
    "resolve_processes",
    "resolve_seed",
    "set_noise",
    "simple_support",
    "tensors_of",
    "turn",
]
