"""The semi-supervised VAE: p(x, y) where only some data have their label y, which is summed out of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pvae import networks
from pvae.composite import concatenate, observe, one_hot, run_part
from pvae.conditional import ConditionalVAE
from pvae.data import Array
from pvae.errors import ArgumentError, DataError, ProgramError, positive_int, positive_ints, real_number
from pvae.parts import make_decoder, make_encoder, make_prior, make_shape

__all__ = ["SemiSupervisedVAE"]

# Nats that a class is below the one that is known to be right: more than densities of x can differ by, and finite, so
# that times a probability of 0 it is 0. Its exponential is 0 in any dtype.
_EXCLUDED = -1e12


class SemiSupervisedVAE(ConditionalVAE):
    """The model M2: a class y, drawn like z and independent of it, and ``p(x|z,y)``.

    `model` and `guide` take ``(x, y)``, with the label -1 where it is unknown. The class is a site ``"y"`` that is
    summed out exactly, over all classes for such a datum, and for one with a label over that class alone. So log p is
    ``log p(x) = log sum_y p(y) p(x|y)`` of a datum without, and ``log p(x, y)`` of one with a label, in one program and
    one batch, for ``pvae.fit(vae.model, vae.guide, (x, y))``, which takes ``TraceEnum_ELBO`` by itself, and
    `pvae.log_evidence`. A step costs C decodings of each datum.

    The classifier q(y|x) gets no gradient from labels in this bound. Train with ``objective=vae.objective(alpha)``,
    which adds that.

    Args:
        prior: p(z), as for `ConditionalVAE`.
        decoder: ``decoder([z, y])`` is p(x|z,y), as for `ConditionalVAE`.
        encoder: ``encoder([x, y])`` is q(z|x,y), as for `ConditionalVAE`.
        classifier: ``(N, *event) -> (N, C)``, a network whose outputs are the logits of q(y|x).
        num_classes: C.
        class_weights: C positive numbers that p(y) is proportional to; left out, all classes are as likely.
        view: A module that encoder and classifier see x through, as for `ConditionalVAE`.

    Raises:
        ArgumentError: ``class_weights`` are no C positive numbers.
        ProgramError: The parts do not fit each other.

    Source: Kingma, Mohamed, Rezende and Welling, 2014, Semi-supervised Learning with Deep Generative Models.
    """

    weights: Tensor

    def __init__(
        self,
        prior: nn.Module,
        decoder: nn.Module,
        encoder: nn.Module,
        classifier: nn.Module,
        *,
        num_classes: int,
        class_weights: Sequence[float] | None = None,
        view: nn.Module | None = None,
    ) -> None:
        super().__init__(prior, decoder, encoder, num_classes=num_classes, view=view)
        self.classifier = classifier
        self.class_weights = None if class_weights is None else [float(weight) for weight in class_weights]
        weights = self.class_weights or [1.0] * num_classes
        if len(weights) != num_classes or not all(0 < weight < math.inf for weight in weights):
            raise ArgumentError(f"class_weights must be {num_classes} positive numbers, got {class_weights!r}.")
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        self._try(self._check_classifier)

    @classmethod
    def mlp(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        event_shape: int | Sequence[int] = (28, 28),
        latent_dim: int = 50,
        hidden: Sequence[int] = (400,),
        likelihood: str = "bernoulli",
        *,
        num_classes: int = 10,
        class_weights: Sequence[float] | None = None,
        classifier: nn.Module | None = None,
        prior: str = "standard-normal",
        posterior: str = "diagonal",
        activation: Callable[[], nn.Module] = nn.ReLU,
        units: tuple[float, float] | None = None,
    ) -> SemiSupervisedVAE:
        """One of three multilayer perceptrons, as `ConditionalVAE.mlp`.

        Args:
            event_shape: Shape of one datum.
            latent_dim: ``D``, the number of latent dimensions.
            hidden: Widths of the hidden layers of encoder and classifier; the decoder has them in reverse order.
            likelihood: As for `VAE.mlp`.
            num_classes: C.
            class_weights: As for the class.
            classifier: As for the class, in the place of a perceptron that has the encoder's layers.
            prior: As for `VAE.mlp`, but not ``"vamp"``.
            posterior: As for `VAE.mlp`.
            activation: Makes the module put after each hidden layer.
            units: As for `VAE.mlp`.
        """
        event_shape = make_shape(event_shape)
        latent_dim, hidden = positive_int("latent_dim", latent_dim), positive_ints("hidden", hidden)
        width, size = positive_int("num_classes", num_classes), math.prod(event_shape)
        decoder, view = make_decoder(
            latent_dim + width, hidden[::-1], event_shape, likelihood, activation=activation, units=units
        )
        encoder = make_encoder(size + width, hidden, latent_dim, posterior, activation=activation)
        if classifier is None:
            classifier = networks.mlp(event_shape, hidden, width, activation=activation)
        pz = make_prior(latent_dim, prior, decoder, encoder)
        return cls(pz, decoder, encoder, classifier, num_classes=width, class_weights=class_weights, view=view)

    def model(self, x: Tensor, y: Tensor) -> None:
        """The generative program: ``y ~ p(y)``, ``z ~ p(z)``, ``x ~ p(x|z,y)``, for each datum.

        A label that is known is an observation of y without error, the site ``"label"``.

        Args:
            x: Shape ``(N, *event)``; converted to the parameters' dtype and device.
            y: Labels ``(N,)``, whole numbers from 0 to C - 1, and -1 where unknown.

        Raises:
            DataError: Another shape, no such label, or (where Pyro's validation is on) values that p(x|z,y) cannot
                take.
        """
        x, labels = self._as_partly_labelled(x, y)
        known = one_hot(labels.where(labels != -1, 0), self._width, x)
        self._register("prior", "decoder")
        with pyro.plate("data", x.shape[0]):
            y = pyro.sample("y", dist.Categorical(logits=self.weights.log()), infer={"enumerate": "parallel"})
            condition = one_hot(y, self._width, x)
            # The sum is nan for a label of no class, which nobody has looked at.
            is_label = dist.OneHotCategorical(logits=_EXCLUDED * (1 - condition) + 0 * known)
            pyro.sample("label", is_label.mask(labels != -1), obs=known)
            z = pyro.sample("z", self._prior(condition))
            observe(self.decoder(concatenate(z, condition)), x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """The recognition program: y is the label or, if unknown, ``y ~ q(y|x)``; then ``z ~ q(z|x,y)``."""
        x, labels = self._as_partly_labelled(x, y)
        self._register("encoder", "classifier")
        # From nan nothing could be drawn; the model tells of it.
        known = one_hot(labels.where(labels != -1, 0), self._width, x).nan_to_num()
        with pyro.plate("data", x.shape[0]):
            logits = torch.where((labels != -1)[:, None], _EXCLUDED * (1 - known), self._classify(x))
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", self._encode(x, one_hot(y, self._width, x)))

    def objective(self, alpha: float = 1.0) -> Callable[..., Tensor]:
        """Minus the ELBO, plus ``alpha`` times ``-log q(y|x)`` of each datum with a label: ``fit(objective=...)``.

        Args:
            alpha: The weight. A large one trains a classifier, which the generative model regularizes; the source has
                0.1 times the number of all data over that of those with labels.

        Returns:
            A callable ``(model, guide, x, y)``, which gives the loss in nats, summed over the batch.
        """
        return partial(self._loss, real_number("alpha", alpha, least=0))

    def predict(self, x: Array) -> Tensor:
        """Returns q(y|x), the classes' probabilities, shape ``(N, C)``, for ``x`` of shape ``(N, *event)``."""
        x = self._as_events(x)
        with self._isolate(0):
            return self._classify(x).softmax(-1)

    def _loss(self, alpha: float, model: Callable[..., Any], guide: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
        bound: Any = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x, y)
        seen, labels = self._as_partly_labelled(x, y)
        errors = cross_entropy(self._classify(seen), labels, ignore_index=-1, reduction="sum")
        return bound + alpha * errors

    def _classify(self, x: Tensor) -> Tensor:
        return self.classifier(self._see(x))

    def _as_partly_labelled(self, x: Array, y: Array) -> tuple[Tensor, Tensor]:
        x, y = self._as_events(x), self._as_labels(y, self._width, unknown=True)
        if y.shape != x.shape[:1]:
            raise DataError(f"y must have one label for each of the {len(x)} data, got shape {tuple(y.shape)}.")
        return x, y

    def _check_classifier(self) -> None:
        x = next(self.parameters(), self.weights).new_zeros((2, *self.event_shape))
        logits: Any = run_part("classifier", self.classifier, x)
        if logits.shape != (2, self._width):
            raise ProgramError(
                f"classifier(x) must give {self._width} logits for each datum, got shape {tuple(logits.shape)} for x "
                f"of shape {tuple(x.shape)}."
            )

    def _log_densities(self, *example: Tensor) -> dict[str, Tensor]:
        return {**super()._log_densities(*example), "classifier": self._classify(example[2]).log_softmax(-1)}
