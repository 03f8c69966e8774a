"""A pair and its data as every estimate of log p(x) finds them: on their device, looked at, with state set aside."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.data import Batches, Data, InMemory, as_source, make_batches, named_shape
from pvae.errors import NumericalError, ProgramError, first_line, warn
from pvae.evidence.densities import Densities
from pvae.evidence.products import lower_products
from pvae.runtime import (
    ALONE,
    Pair,
    Processes,
    Program,
    check_surroundings,
    in_precision,
    isolate,
    outside_modules,
    place_pair,
)

__all__ = ["Evaluation", "name_batch", "open_evaluation", "place_evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """A pair's densities, and what they are wanted of.

    Attributes:
        densities: Of the pair.
        batches: The data, none of which has been looked at where they are read.
    """

    densities: Densities
    batches: Batches

    @property
    def expected_data(self) -> int:
        """About how many data this process will evaluate; many if a stream does not know."""
        known = self.batches.num_data
        return 2**20 if known is None else -(-known // self.batches.processes.world_size)

    def blocks(self) -> Iterator[tuple[int, InMemory]]:
        """This process's data, one part after another that fits in memory, each with its number among all.

        Raises:
            DataError: Data are outside of the support of the site that observes them.
        """
        for number, block in self.batches.blocks():
            with self.batches.name_errors(number):
                self._check(block)
            yield number, block

    def _check(self, block: InMemory) -> None:
        """Looks at what two data do not show: some supports, and which latents are masked."""
        if self.densities.has_data_to_check:
            for rows in torch.arange(block.num_data).split(max(1, 2**20 // self.densities.entries)):
                self.densities.check_data(block.take(rows))


def place_evaluation(
    model: Program,
    guide: Program,
    data: Data,
    *others: Any,
    seed: int,
    device: str | torch.device,
    processes: Processes = ALONE,
) -> tuple[Pair, Batches]:
    """Looks at data, once and for all, and puts a pair on a device.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`.
        others: What else may hold modules to place.
        seed: Of random numbers drawn in reading.
        device: As for `pvae.log_evidence`.
        processes: Those that share the data.

    Raises:
        DataError, DeviceError, ProgramError: See the message.
    """
    check_surroundings()
    source = as_source("data", data)
    pair = place_pair(model, guide, *others, device=device, data=source)
    batches = make_batches("data", source, pair, None, seed=seed, processes=processes, evaluated=True)
    if batches.drawn_by:
        warn(f"data: results are in the order in which the loader's {batches.drawn_by} draws the data.")
    return pair, batches


@contextmanager
def open_evaluation(pair: Pair, batches: Batches, seed: int, precision: str = "float32") -> Iterator[Evaluation]:
    """Checks a pair and its data, and runs a block in which they can be evaluated.

    Args:
        pair: On its device.
        batches: The data.
        seed: Of the block's random numbers; each process gets its own.
        precision: Of the programs' products.

    Raises:
        ArgumentError, DataError, ProgramError: As `Densities.of` and `lower_products` do.
    """
    trained = outside_modules(pyro.get_param_store())
    own_seed = batches.processes.rank_seed(seed)
    with (
        named_shape("data", batches.whole),
        _explain_half_precision(),
        isolate(pair.modules, seed=own_seed, device=pair.device, params=trained) as store,
    ):
        first = batches.peek()
        densities = lower_products(Densities.of(pair, first, in_memory=batches.whole is not None), first, precision)
        if densities.is_joint and isinstance(batches, InMemory):
            batches = batches.together()
        untrained = outside_modules(store)["params"].keys() - trained["params"].keys()
        _warn_of_initial_values(untrained)
        tried = densities.tried
        _warn_of_scales(tried.scaled)
        with (
            # A setting of the device, which graphs meet as they run.
            in_precision(precision, pair.device) if precision == "tf32" else nullcontext(),
            densities.programs.kept(lambda: (tried.runner, tried.names, tried.auxiliary, vars(densities).get("space"))),
        ):
            yield Evaluation(densities, batches.watch(densities.observed))
        # Another guide, which a proposal brought along, runs only inside of the block.
        _warn_of_initial_values(outside_modules(store)["params"].keys() - trained["params"].keys() - untrained)


@contextmanager
def name_batch(block: InMemory, rows: Tensor) -> Iterator[None]:
    """A block in which a `NumericalError` is about some rows of the data, and says so."""
    try:
        yield
    except NumericalError as error:
        begin = f"datum {int(rows[0])}{block.place}"
        raise NumericalError(f"in the batch that begins with {begin}: {error}") from None


@contextmanager
def _explain_half_precision() -> Iterator[None]:
    """Says what to do where torch lacks an operation for numbers of 16 bits."""
    try:
        yield
    except NotImplementedError as error:
        if not any(f"not implemented for '{kind}'" in str(error) for kind in ("Half", "BFloat16")):
            raise
        raise ProgramError(
            f"the pair computes in numbers of 16 bits, and torch says: {first_line(error)}. Convert the "
            "modules and the data with .float()."
        ) from error


def _warn_of_initial_values(names: Collection[str]) -> None:
    if names:
        warn(
            f"parameters {sorted(names)} have their initial values: the param store holds none of these names. "
            "After pvae.fit, evaluate inside `with result.trained():`."
        )


def _warn_of_scales(names: Collection[str]) -> None:
    if names:
        warn(
            f"the model scales the densities of {sorted(names)}, as by poutine.scale: log p(x) is of the densities as "
            "they are, without scales."
        )
