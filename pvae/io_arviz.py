"""`to_arviz`: a Pyro pair's posterior, likelihood, predictions and evidence, in the groups that ArviZ reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvae.data import Data
from pvae.errors import ArgumentError, ProgramError
from pvae.evidence import Predictive, WeightedDraws, posterior_predictive, prior_predictive
from pvae.evidence.proposals import Proposal
from pvae.runtime import Program, resolve_seed
from pvae.svi import FitResult

if TYPE_CHECKING:
    import xarray

Variables = dict[str, tuple[tuple[str, ...], np.ndarray]]

__all__ = ["to_arviz"]

_DRAWS = ("chain", "draw")
_RESERVED = {*_DRAWS, "datum"}


def to_arviz(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_samples: int = 1000,
    proposal: str | Proposal | Program = "guide",
    resample: bool = True,
    result: FitResult | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = 0,
    device: str | torch.device = "auto",
    chunk_size: int | None = None,
) -> Any:
    """What ArviZ needs of a pair and its data: `arviz.InferenceData` in ArviZ 0.x, `xarray.DataTree` in ArviZ 1.x.

    Groups: ``posterior``, ``log_likelihood`` and ``posterior_predictive`` (see `pvae.evidence.posterior_predictive`),
    of K draws of the proposal that were chosen by their importance weights where k-hat allows; ``sample_stats``;
    ``prior`` and ``prior_predictive``; ``observed_data``; and ``fit``, the history of a training, if one is given.
    The pair can be any Pyro programs. It is trained already: nothing is trained here.

    ``sample_stats`` says of each datum whether its draws were chosen (``is_resampled``; otherwise they are the
    proposal's as they come), ``khat``, ``ess`` and ``log_px`` of its weights, and has the draws that the proposal made:
    their ``log_weight``, in their own order, and ``chosen``, which of them each draw of the posterior is. The effective
    sample size of resampled draws is ``ess`` here; ArviZ's, which looks for autocorrelation, is too high for them.

    Dimensions are ``chain`` (of one) and ``draw``; ``datum`` over the data; plates by their names in the model; and the
    entries of a site, ``z_dim_0`` and so on unless `dims` names them. Where all data are one datum, as with latents
    outside of the data plate, the plate over data is ``datum``, and latents and weights that lie outside have none.
    A slash in a name, as ``pyro.contrib.autoname.scope`` makes them, becomes a dot: files and trees take it for a
    folder's.

    Args:
        model: The generative program.
        guide: The recognition program.
        data: As for `pvae.log_evidence`; all is kept in memory, ``K`` predictions of each datum among it.
        num_samples: ``K``, draws for each datum.
        proposal: As for `pvae.evidence.weighted_draws`.
        resample: Whether to choose draws by their weights, where k-hat allows.
        result: Of `pvae.fit`, for the group ``fit``; its parameters outside of modules are used, too.
        coords: Labels by dimension, as in ArviZ: ``{"datum": names, "factor": ["size", "slant"]}``.
        dims: Names for the dimensions of a site's entries, by site: ``{"z": ["factor"]}``.
        seed: As for `pvae.log_evidence`; prior draws use ``seed + 1``.
        device: As for `pvae.log_evidence`.
        chunk_size: As for `pvae.log_evidence`.

    Raises:
        ArgumentError: Names or labels do not fit; or as by `pvae.evidence.weighted_draws`.
        ProgramError: A site has the name of a dimension; or as by `pvae.evidence.posterior_predictive`.

    Source: Kumar, Carroll, Hartikainen and Martin, 2019, ArviZ, a Unified Library for Exploratory Analysis of Bayesian
    Models in Python.

    Example:
        >>> import pvae
        >>> pair = pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, guide_scale=1.2)
        >>> x = pair.sample(20, seed=0)
        >>> data = pvae.to_arviz(pair.model, pair.guide, x, num_samples=100)
        >>> data.posterior["z"].shape
        (1, 100, 20, 2)
    """
    options: dict[str, Any] = {"num_samples": num_samples, "device": device, "chunk_size": chunk_size}
    if result is not None and not isinstance(result, FitResult):
        raise ArgumentError(f"result must be what pvae.fit returned, got {type(result).__name__}.")
    seed = resolve_seed(seed)
    with nullcontext() if result is None else result.trained():
        posterior = posterior_predictive(model, guide, data, proposal=proposal, resample=resample, seed=seed, **options)
        prior = prior_predictive(model, guide, data, seed=seed + 1, **options)
    if posterior.weighted is None or posterior.chosen is None:
        raise RuntimeError("draws of the posterior come with their weights")
    groups = _Groups(posterior, posterior.weighted, posterior.chosen, dims or {}, coords or {})
    variables = {
        "posterior": groups.name_sites(posterior.latents),
        "log_likelihood": groups.name_likelihoods(),
        "posterior_predictive": groups.name_sites(posterior.draws),
        "sample_stats": groups.name_weights(),
        "prior": groups.name_sites(prior.latents),
        "prior_predictive": groups.name_sites(prior.draws),
        "observed_data": groups.name_data(),
    }
    if result is not None:
        variables["fit"] = {name: (("epoch",), values) for name, values in result.history.items()}
    return _join(groups.label(variables))


@dataclass(frozen=True, eq=False)
class _Groups:
    """Tensors as arrays with named dimensions.

    Attributes:
        posterior: Draws of the posterior and of predictions; their names are those of the prior's, too.
        weighted: Those that they were chosen from.
        chosen: Which of them.
        dims: Names for the dimensions of a site's entries.
        coords: Labels by dimension.
    """

    posterior: Predictive
    weighted: WeightedDraws
    chosen: Tensor
    dims: Mapping[str, Sequence[str]]
    coords: Mapping[str, Any]

    def __post_init__(self) -> None:
        known = [*self.posterior.latents, *self.posterior.draws]
        for name in self.dims:
            if name not in known:
                raise ArgumentError(f"dims: there is no site '{name}'; the sites are {sorted(known)}.")
        for name in sorted(_RESERVED & {*known}):
            raise ProgramError(
                f"site '{name}' has the name of a dimension, of which ArviZ has {sorted(_RESERVED)}: call it otherwise."
            )

    @property
    def _is_joint(self) -> bool:
        return self.weighted.num_together > 0

    def name_sites(self, values: Mapping[str, Tensor]) -> Variables:
        """Draws by site, ``(K, N, *plates, *event)``."""
        named = {}
        for name, value in values.items():
            is_joint = self._is_joint and not (name in self.posterior.draws and self.posterior.data_plate)
            named[_plain(name)] = _name_draws(value, self._behind(name, value.dim() - 2), is_joint=is_joint)
        return named

    def name_data(self) -> Variables:
        """What sites observe."""
        named = self.name_sites({name: value[None] for name, value in self.posterior.data.items()})
        return {name: (dims[2:], array[0, 0]) for name, (dims, array) in named.items()}

    def name_likelihoods(self) -> Variables:
        """Of the draws that were chosen."""
        named = {}
        for name, value in self.weighted.log_likelihood.items():
            rows = self.chosen.expand(-1, value.shape[1])  # where all data are one datum, they have its draws
            has_data = not self._is_joint or value.shape[1] == self.weighted.num_together
            named[_plain(name)] = _name_draws(value.gather(0, rows), [], is_joint=not has_data)
        return named

    def name_weights(self) -> Variables:
        """Of the proposal's draws: their weights; and of each datum, what is to be said of them."""
        draws = {"log_weight": self.weighted.log_weights, "chosen": self.chosen}
        named = {name: _name_draws(value, [], is_joint=self._is_joint) for name, value in draws.items()}
        data = {"khat": self.weighted.khat, "ess": self.weighted.ess, "log_px": self.weighted.log_px}
        for name, value in {**data, "is_resampled": self.posterior.is_resampled}.items():
            dims, array = _name_draws(torch.as_tensor(value)[None], [], is_joint=self._is_joint)
            named[name] = dims[2:], array[0, 0]
        return named

    def label(self, variables: Mapping[str, Variables]) -> dict[str, xarray.Dataset]:
        """The groups, with labels for all dimensions."""
        import xarray

        arrays = [named for group in variables.values() for named in group.values()]
        sizes = {dim: size for dims, array in arrays for dim, size in zip(dims, array.shape, strict=True)}
        for name, labels in self.coords.items():
            if name not in sizes:
                raise ArgumentError(f"coords: there is no dimension '{name}'; the dimensions are {sorted(sizes)}.")
            shape = np.shape(labels)
            if shape != (sizes[name],):
                count = f"{shape[0]} labels" if len(shape) == 1 else f"labels of shape {shape}"
                raise ArgumentError(f"coords: '{name}' has {sizes[name]} entries, and {count} were given.")
        labels = {name: np.asarray(self.coords.get(name, range(size))) for name, size in sizes.items()}
        attributes = {"inference_library": "pvae", "proposal": self.weighted.proposal, "seed": self.posterior.seed}
        groups = {}
        for group, values in variables.items():
            used = {dim for dims, _ in values.values() for dim in dims}
            groups[group] = xarray.Dataset(values, {dim: labels[dim] for dim in sorted(used)}, attributes)
        return groups

    def _behind(self, name: str, count: int) -> list[str]:
        """Names of the dimensions behind ``(K, N)``: plates, and a site's own."""
        plates = [
            "datum" if plate == self.posterior.data_plate else f"{plate}_plate" if plate in _RESERVED else _plain(plate)
            for plate in self.posterior.plates[name]
        ]
        own = list(self.dims.get(name, [f"{_plain(name)}_dim_{i}" for i in range(count - len(plates))]))
        taken = sorted({*_RESERVED, *plates, *map(_plain, [*self.posterior.latents, *self.posterior.draws])})
        if len(own) != count - len(plates) or len({*taken, *own}) < len(taken) + len(own):
            raise ArgumentError(
                f"dims: site '{name}' needs {count - len(plates)} different names for its entries, none of them among "
                f"{taken}; got {own}."
            )
        return plates + own


def _plain(name: str) -> str:
    """A name as netCDF and trees of groups can have it."""
    return name.replace("/", ".")


def _name_draws(value: Tensor, behind: Sequence[str], *, is_joint: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """Values ``(K, N, ...)`` as ``(1, K, N, ...)``; without N, which is 1, where all data are one datum."""
    array = value.numpy()[None]
    return ((*_DRAWS, *behind), array[:, :, 0]) if is_joint else ((*_DRAWS, "datum", *behind), array)


def _join(groups: dict[str, xarray.Dataset]) -> Any:
    """The groups as ArviZ has them: before 1.0 it had a class of its own for that."""
    import arviz
    import xarray

    # ArviZ 1.x still answers to this name, with a warning.
    own = vars(arviz).get("InferenceData")
    return xarray.DataTree.from_dict(groups) if own is None else own(**groups)
