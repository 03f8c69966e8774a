"""Parts by their names: what ``mlp`` and ``conv`` of each model put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pvae import likelihoods, networks, posteriors, priors
from pvae.errors import ArgumentError, one_of
from pvae.networks import Units

__all__ = ["PartNames", "make_decoder", "make_encoder", "make_likelihood", "make_prior", "make_shape", "make_view"]


def make_shape(event_shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one datum, of which an int is a vector's."""
    return (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)


def make_decoder(
    in_features: int,
    hidden: Sequence[int],
    event_shape: tuple[int, ...],
    likelihood: str,
    *,
    activation: Callable[[], nn.Module],
    units: tuple[float, float] | None,
) -> tuple[nn.Module, nn.Module | None]:
    """A likelihood by its name, of a multilayer perceptron.

    Args:
        in_features: Numbers that the network takes.
        hidden: Widths of the hidden layers.
        event_shape: Shape of one datum.
        likelihood: The name.
        activation: Makes the module put after each hidden layer.
        units: ``(mean, scale)`` where a user gave them.

    Returns:
        The likelihood, and the view that an encoder sees such data through, if any.
    """
    outputs = likelihoods.NAMED[one_of("likelihood", likelihood, likelihoods.NAMED)].outputs
    network = networks.mlp(in_features, hidden, (outputs, *event_shape), activation=activation)
    return make_likelihood(network, event_shape, likelihood, units), make_view(likelihood, units)


def make_likelihood(
    network: nn.Module, event_shape: Sequence[int], likelihood: str, units: tuple[float, float] | None
) -> nn.Module:
    """A likelihood by its name, of a network."""
    named = likelihoods.NAMED[likelihood]
    return named.make(network, event_shape=event_shape, **_units_argument(named, likelihood, units))


def make_view(likelihood: str, units: tuple[float, float] | None) -> nn.Module | None:
    """The view that an encoder sees data through, of a likelihood by its name: units of its own, or another map."""
    named = likelihoods.NAMED[likelihood]
    return _units_argument(named, likelihood, units).get("units") or (named.view() if named.view else None)


def _units_argument(named: likelihoods.Named, likelihood: str, given: tuple[float, float] | None) -> dict[str, Any]:
    """Keyword of a part that has units: units of its own.

    Args:
        named: The likelihood.
        likelihood: Its name.
        given: ``(mean, scale)`` where a user gave them.
    """
    if not named.has_units and given is not None:
        raise ArgumentError(f"units={given!r}: likelihood={likelihood!r} has none. They are for data of real numbers.")
    return {"units": Units(given)} if named.has_units and given != (0, 1) else {}


def make_encoder(
    in_features: int, hidden: Sequence[int], latent_dim: int, posterior: str, *, activation: Callable[[], nn.Module]
) -> nn.Module:
    """A posterior by its name, of a multilayer perceptron.

    Args:
        in_features: Numbers that the network takes.
        hidden: Widths of the hidden layers.
        latent_dim: ``D``.
        posterior: The name.
        activation: Makes the module put after each hidden layer.
    """
    named = posteriors.NAMED[one_of("posterior", posterior, posteriors.NAMED)]
    network = networks.mlp(in_features, hidden, named.count_outputs(latent_dim), activation=activation)
    return named.make(network, latent_dim)


def make_prior(latent_dim: int, prior: str, decoder: nn.Module, encoder: nn.Module) -> nn.Module:
    """A prior by its name, for a model whose encoder sees more than x.

    Raises:
        ArgumentError: There is no such name, or it is ``"vamp"``, whose pseudo-inputs are data alone.
    """
    names = [name for name in priors.NAMED if name != "vamp"]
    return priors.NAMED[one_of("prior", prior, names)](latent_dim, decoder, encoder, ())


class PartNames:
    """The parts of a VAE by their names, and what their networks are to give.

    Raises:
        ArgumentError: A name that there is not.
    """

    def __init__(self, latent_dim: int, likelihood: str, prior: str, posterior: str) -> None:
        self.latent_dim = latent_dim
        self.likelihood = one_of("likelihood", likelihood, likelihoods.NAMED)
        self.prior = one_of("prior", prior, priors.NAMED)
        self.posterior = one_of("posterior", posterior, posteriors.NAMED)
        self.likelihood_outputs = likelihoods.NAMED[likelihood].outputs
        self.encoder_outputs = posteriors.NAMED[posterior].count_outputs(latent_dim)

    def make(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        event_shape: tuple[int, ...],
        units: tuple[float, float] | None,
    ) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Prior, likelihood and posterior, of two networks."""
        named = likelihoods.NAMED[self.likelihood]
        px = make_likelihood(decoder, event_shape, self.likelihood, units)
        own_units = _units_argument(named, self.likelihood, units)
        qz = posteriors.NAMED[self.posterior].make(named.show(encoder), self.latent_dim, **own_units)
        return priors.NAMED[self.prior](self.latent_dim, px, qz, event_shape), px, qz
