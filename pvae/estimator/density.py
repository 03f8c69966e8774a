"""`VAEDensity`: a VAE as scikit-learn's density estimator and transformer."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from pvae.errors import ArgumentError, DataError, positive_int, real_number, warn
from pvae.estimator.draws import estimate_by_datum
from pvae.evidence import EvidenceEstimate, log_evidence
from pvae.evidence.proposals import Proposal
from pvae.runtime import in_turn, isolate
from pvae.svi import FitResult, fit
from pvae.vae import VAE

__all__ = ["VAEDensity"]

_FLOATS: Any = (np.float64, np.float32)
_MANY = 0.05  # of the data, unresolved


class VAEDensity(ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin, BaseEstimator):
    """A VAE of two multilayer perceptrons for rows of numbers: their density p(x), and codes E[z|x] of them.

    The nearest relative in scikit-learn is ``FactorAnalysis``, whose decoder is linear. `score_samples` is log p(x)
    itself, by importance sampling, and not the ELBO, so that models of different ``n_components`` compare.

    Computes in the dtype of ``X``; float32 is faster. Columns that are in units of their own go through a
    ``StandardScaler`` first; log p(x) is then in nats with respect to standardized units.

    Args:
        n_components: Latent dimensions D.
        hidden_layer_sizes: Widths of the encoder's hidden layers; the decoder has them in reverse order.
        likelihood: p(x|z), by its name in `pvae.VAE.mlp`: ``"gaussian"`` for real numbers, ``"bernoulli"`` for bits,
            ``"poisson"`` for counts, and so on.
        prior: p(z), by its name there.
        posterior: q(z|x), by its name there.
        max_epochs: Passes over the data.
        batch_size: Data in a batch.
        learning_rate: Adam's.
        early_stopping: Whether to keep ``validation_fraction`` of the data out, to stop where their ELBO has not risen
            for ``n_epochs_no_change`` epochs, and to go back to where it was highest.
        validation_fraction: Of the data, between 0 and 1.
        n_epochs_no_change: How many epochs to wait.
        n_samples: Draws of z for each datum that is scored; "auto" takes more where they are needed.
        proposal: Where these are drawn from. ``"auto"``: from a Gaussian fitted to the datum, so that a score is a
            function of the datum, the fitted model and ``random_state``, whichever other rows are scored with it. Data
            for which its weights will not do get the default of `pvae.log_evidence`, whose draws depend on these rows.
            Anything else is passed on to `pvae.log_evidence`, such as ``"guide"``, which is faster and less exact.
        device: ``"auto"`` (the GPU where there is one), ``"cpu"`` or ``"cuda"``. A pickled model is on the CPU.
        random_state: Of weights, order, noise and scores. ``None``: other ones at each call of `fit`.
        verbose: Whether to show training on stderr, if that is a terminal.

    Attributes:
        vae_: The trained `pvae.VAE`, of which all of pvae can be asked.
        history_: What `pvae.fit` noted of each epoch, nats per datum.
        n_epochs_: How many there were.
        n_features_in_: Numbers in a datum.
        feature_names_in_: Their names, where ``X`` had some.

    Example::

        from sklearn.model_selection import GridSearchCV
        search = GridSearchCV(VAEDensity(random_state=0), {"n_components": [2, 5, 10]}).fit(x)
        search.best_params_, search.best_score_  # held-out log p(x), nats per datum

    Source: Kingma and Welling, 2014, Auto-Encoding Variational Bayes; for log p(x), Rezende, Mohamed and Wierstra,
    2014, Stochastic Backpropagation and Approximate Inference in Deep Generative Models, appendix E.
    """

    def __init__(
        self,
        n_components: int = 10,
        *,
        hidden_layer_sizes: Sequence[int] = (256,),
        likelihood: str = "gaussian",
        prior: str = "standard-normal",
        posterior: str = "diagonal",
        max_epochs: int = 200,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_epochs_no_change: int = 10,
        n_samples: int = 1000,
        proposal: str | Proposal = "auto",
        device: str | torch.device = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.hidden_layer_sizes = hidden_layer_sizes
        self.likelihood = likelihood
        self.prior = prior
        self.posterior = posterior
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_epochs_no_change = n_epochs_no_change
        self.n_samples = n_samples
        self.proposal = proposal
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Trains a new VAE on ``X``, shape ``(N, n_features)``, by maximizing the ELBO; ``y`` is ignored.

        Raises:
            ValueError: ``X`` or a parameter is not as it has to be; `pvae.DataError` and `pvae.ArgumentError` are such.
        """
        x = self._rows(X, ensure_min_samples=2)
        positive_int("n_components", self.n_components)
        positive_int("max_epochs", self.max_epochs)
        positive_int("n_samples", self.n_samples)
        if isinstance(self.hidden_layer_sizes, str) or not np.iterable(self.hidden_layer_sizes):
            raise ArgumentError(
                f"hidden_layer_sizes must be a sequence of widths, such as (256,); got {self.hidden_layer_sizes!r}."
            )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        vae, result = _train(self, x, seed)
        self.vae_, self.history_, self.n_epochs_ = vae, result.history, len(result.history["seconds"])
        self._seed, self._n_features_out = seed, self.n_components
        return self

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Returns the codes E[z|x], shape ``(N, n_components)``, in the dtype of ``X``."""
        x = self._check(X)
        return self._run(lambda: self.vae_.encode(x).mean).astype(x.dtype, copy=False)

    def inverse_transform(self, X: ArrayLike) -> np.ndarray:
        """Returns E[x|z], shape ``(N, n_features)``, for codes ``X`` of shape ``(N, n_components)``, in their dtype."""
        check_is_fitted(self)
        codes: Any = X
        z = check_array(codes, dtype=_FLOATS)
        if z.shape[1] != self._n_features_out:
            raise DataError(f"X has {z.shape[1]} columns, but codes of this model have {self._n_features_out}.")
        return self._run(lambda: self.vae_.decode(z).mean).astype(z.dtype, copy=False)

    def evidence(self, X: ArrayLike) -> EvidenceEstimate:
        """Returns log p(x) of each datum with its standard error, k-hat, and whether it is to be believed.

        The scores of `score_samples` are its ``log_px``.
        """
        x = self._check(X)
        options: dict[str, Any] = {"num_samples": self.n_samples, "seed": self._seed, "device": self.device}
        options |= {"distributed": False}
        if self.proposal == "auto":
            return estimate_by_datum(self.vae_.model, self.vae_.guide, x, **options)
        return log_evidence(self.vae_.model, self.vae_.guide, x, proposal=self.proposal, **options)

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """Returns log p(x), nats, shape ``(N,)``.

        Warns where it is not to be believed for more than 5% of the data. Such numbers are too low rather than too
        high; `evidence` says which they are.
        """
        estimate = self.evidence(X)
        bad = int(estimate.unresolved.sum())
        if bad > _MANY * estimate.num_data:
            warn(
                f"log p(x) of {bad} of {estimate.num_data} data is unresolved, and probably too low. Raise n_samples, "
                f"now {self.n_samples}, or see evidence(X).withheld for the reasons."
            )
        return estimate.log_px.numpy()

    def score(self, X: ArrayLike, y: Any = None) -> float:  # type: ignore[override]
        """Returns the mean of log p(x), nats per datum, higher is better; ``y`` is ignored."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> np.ndarray:
        """Draws ``z ~ p(z)``, ``x ~ p(x|z)``; returns shape ``(n_samples, n_features)``."""
        check_is_fitted(self)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return self.vae_.sample(positive_int("n_samples", n_samples), seed=seed).cpu().numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = [np.dtype(kind).name for kind in _FLOATS]
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        state = dict(state)  # what that gives may be this model's own
        if "vae_" in state and next(state["vae_"].parameters()).is_cuda:
            state["vae_"] = copy.deepcopy(state["vae_"]).cpu()  # to be read where there is no GPU
        return state

    def _check(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self)
        return self._rows(X, reset=False)

    def _rows(self, X: Any, **options: Any) -> np.ndarray:
        rows: Any = validate_data(self, X, dtype=_FLOATS, **options)
        return rows

    @in_turn
    def _run(self, function: Callable[[], torch.Tensor]) -> np.ndarray:
        """What the model gives in eval mode, without gradients."""
        with isolate([self.vae_], seed=0):
            return function().cpu().numpy()


@in_turn
def _train(of: VAEDensity, x: np.ndarray, seed: int) -> tuple[VAE, FitResult]:
    """A trained VAE, and what training gave."""
    with isolate(seed=seed):
        vae = VAE.mlp(
            x.shape[1], of.n_components, of.hidden_layer_sizes, of.likelihood, prior=of.prior, posterior=of.posterior
        ).to(torch.from_numpy(x[:0].copy()).dtype)
    options: dict[str, Any] = {"epochs": of.max_epochs, "batch_size": of.batch_size, "lr": of.learning_rate}
    options |= {"seed": seed, "device": of.device, "progress": bool(of.verbose), "distributed": False}
    best: dict[str, Any] = {"validation_elbo": -np.inf}
    if of.early_stopping:
        x, held_out = _split(x, of.validation_fraction, seed)

        def keep(entry: dict[str, float]) -> None:
            if entry["validation_elbo"] > best["validation_elbo"]:
                best.update(entry, weights={name: t.clone() for name, t in vae.state_dict().items()})

        options |= {"validation": held_out, "patience": of.n_epochs_no_change, "callback": keep}
    result = fit(vae.model, vae.guide, x, **options)
    if result.signal is not None:
        signal.raise_signal(result.signal)  # training has ended; so must what called it
    if "weights" in best:
        vae.load_state_dict(best["weights"])
    return vae, result


def _split(x: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Data to train on, and others held out."""
    fraction = real_number("validation_fraction", fraction, above=0, below=1)
    order = np.random.default_rng(seed).permutation(len(x))
    count = min(max(1, round(fraction * len(x))), len(x) - 1)
    return x[order[count:]], x[order[:count]]
