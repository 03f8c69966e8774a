"""VAEs as scikit-learn's: its own checks, its tools, and scores held against exact answers."""

from __future__ import annotations

import pickle
import signal

import numpy as np
import pytest
import torch
from helpers import lines_of, python
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import VarianceThreshold
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Binarizer, MinMaxScaler, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import pvae
from pvae.estimator import VAEDensity, density, draws

SMALL = {"hidden_layer_sizes": (8,), "max_epochs": 2, "n_samples": 100, "device": "cpu"}


@parametrize_with_checks([VAEDensity(**SMALL)])
def test_every_check_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def x():
    """120 data of five numbers, which are made of two, and noise."""
    return pvae.testing.linear_gaussian(latent_dim=2, event_dim=5, noise=0.2).sample(120, seed=1).numpy()


@pytest.fixture(scope="module")
def fitted(x):
    return VAEDensity(1, **{**SMALL, "max_epochs": 10, "n_samples": 200}, random_state=0).fit(x)


def test_scores_are_log_px(fitted, x):
    z = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        log_pxz = fitted.vae_.decode(z).log_prob(torch.tensor(x)[:, None]) - z[:, 0] ** 2 / 2 - np.log(2 * np.pi) / 2
    exact = log_pxz.logsumexp(1) + np.log(16 / 20_000)  # the sum over a grid
    estimate = fitted.evidence(x)
    score = (estimate.corrected - exact) / estimate.std_error
    # 120 normal numbers: one above 5 in size has a probability of 1e-4; so has a mean above 3.9 / 120^(1/2).
    assert score.abs().max() < 5
    assert score.mean().abs() < 0.36
    assert not estimate.unresolved.any()
    np.testing.assert_array_equal(fitted.score_samples(x), estimate.log_px.numpy())
    assert fitted.score(x) == pytest.approx(estimate.mean)


def test_a_score_is_a_function_of_the_datum(fitted, x):
    order = np.random.default_rng(0).permutation(len(x))
    scores = fitted.score_samples(x)
    np.testing.assert_allclose(fitted.score_samples(x[order])[:20], scores[order][:20], rtol=1e-9)
    np.testing.assert_allclose(fitted.score_samples(x[7:8]), scores[7:8], rtol=1e-9)
    np.testing.assert_array_equal(fitted.score_samples(x), scores)


def test_draws_by_datum_are_right_and_independent():
    """Of 300 data, by 6 seeds: errors have the size that they are said to have, and average out over data."""
    truth = pvae.testing.linear_gaussian(latent_dim=2, event_dim=4)
    x = truth.sample(300, seed=1)
    means, squares = [], []
    for seed in range(6):
        options = {"num_samples": 200, "proposal": draws.DrawsByDatum(200, seed), "seed": seed, "device": "cpu"}
        estimate = pvae.log_evidence(truth.model, truth.guide, x, **options)
        error = estimate.corrected - truth.log_px(x)
        means.append(error.mean().item() / estimate.mean_std_error)
        squares.append((error.square().sum() / estimate.std_error.square().sum()).item())
    # Chi-squared with 6 degrees of freedom: above 28 with a probability of 1e-4. Were noise shared by all data, the
    # means would be some 10 in size.
    assert np.square(means).sum() < 28
    # Ratios of 300 squares scatter by 0.1, as rare weights count for much; their mean by 0.04.
    assert 0.84 < np.mean(squares) < 1.16


def test_data_whose_weights_will_not_do_get_the_default(fitted, x):
    """Of 24 draws there is no k-hat, so that all of them are such data."""
    few = clone(fitted).set_params(n_samples=24).fit(x)
    estimate = few.evidence(x[:6])
    again = pvae.log_evidence(few.vae_.model, few.vae_.guide, x[:6], num_samples=24, seed=few._seed, device="cpu")
    assert torch.equal(estimate.log_px, again.log_px)
    assert estimate.stage == again.stage
    assert torch.equal(estimate.unresolved, again.unresolved)


def test_only_these_data_do(fitted, x, monkeypatch):
    """Where 2 of 6 data are said to need more, the others keep their numbers."""
    before = fitted.evidence(x[:6]).log_px
    monkeypatch.setattr(draws, "MIN_ESS", fitted.evidence(x[:6]).ess.sort().values[1:3].mean().item())
    after = fitted.evidence(x[:6])
    assert (after.log_px != before).sum() == 2
    assert set(after.stage) <= {"refined", "guide", "defensive"}
    assert (after.log_px - before).abs().max() < 5 * after.std_error.max()


def test_another_proposal_is_passed_on(fitted, x):
    estimate = clone(fitted).set_params(proposal="guide").fit(x).evidence(x[:5])
    assert estimate.proposal == "guide"


def test_many_unresolved_data_are_warned_of(fitted, x, monkeypatch):
    estimate = fitted.evidence(x[:20])
    monkeypatch.setattr(density, "estimate_by_datum", lambda *_, **__: estimate)
    fitted.score_samples(x[:20])
    monkeypatch.setattr(type(estimate), "unresolved", torch.arange(20) < 2)
    with pytest.warns(
        UserWarning, match=r"log p\(x\) of 2 of 20 data is unresolved, and probably too low. Raise n_samp"
    ):
        fitted.score_samples(x[:20])


def test_codes_and_their_decoding(fitted, x):
    codes = fitted.transform(x)
    with torch.no_grad():
        np.testing.assert_array_equal(codes, fitted.vae_.encode(x).mean.numpy())
    np.testing.assert_allclose(fitted.inverse_transform(codes), fitted.vae_.reconstruct(x).numpy())
    assert list(fitted.get_feature_names_out()) == ["vaedensity0"]
    with pytest.raises(ValueError, match="X has 2 columns, but codes of this model have 1"):
        fitted.inverse_transform(np.zeros((3, 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_is_computed_in_the_dtype_of_the_data(dtype, x):
    model = VAEDensity(2, **SMALL, random_state=0).fit(x.astype(dtype))
    assert next(model.vae_.parameters()).numpy(force=True).dtype == dtype
    codes = model.transform(x.astype(dtype))
    assert codes.dtype == model.inverse_transform(codes).dtype == model.sample(3, random_state=0).dtype == dtype
    assert model.transform(x.astype(np.float64)).dtype == np.float64


def test_samples(fitted):
    first, again, other = (fitted.sample(50, random_state=seed) for seed in (0, 0, 1))
    assert first.shape == (50, 5)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_data_frames_in_and_out(x):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(x, columns=list("abcde"), index=range(100, 220))
    model = VAEDensity(2, **SMALL, random_state=0).set_output(transform="pandas")
    codes = model.fit_transform(frame)
    assert list(codes.columns) == ["vaedensity0", "vaedensity1"]
    assert codes.index.equals(frame.index)
    assert list(model.feature_names_in_) == list("abcde")
    with pytest.raises(ValueError, match="feature names should match"):
        model.score(frame.rename(columns={"a": "z"}))


def test_the_same_random_state_gives_the_same_model_and_a_clone_is_not_fitted(fitted, x):
    copy = clone(fitted)
    with pytest.raises(NotFittedError):
        copy.score(x)
    np.testing.assert_array_equal(copy.fit(x).score_samples(x[:9]), fitted.score_samples(x[:9]))
    other = clone(fitted).set_params(random_state=1).fit(x)
    assert not np.array_equal(other.score_samples(x[:9]), fitted.score_samples(x[:9]))


def test_a_pickled_model_is_the_same(fitted, x):
    copy = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copy.score_samples(x[:9]), fitted.score_samples(x[:9]))


def test_pickling_leaves_a_model_on_the_gpu_where_it_is(x, monkeypatch):
    model = VAEDensity(2, **SMALL, random_state=0).fit(x)
    vae = model.vae_
    monkeypatch.setattr(torch.nn.Parameter, "is_cuda", True, raising=False)
    state = model.__getstate__()
    assert state["vae_"] is not vae
    assert model.vae_ is vae


@pytest.mark.cuda
def test_on_a_gpu(x):
    model = VAEDensity(2, **{**SMALL, "device": "cuda"}, random_state=0).fit(x)
    copy = pickle.loads(pickle.dumps(model))
    assert next(model.vae_.parameters()).is_cuda
    assert not next(copy.vae_.parameters()).is_cuda
    np.testing.assert_allclose(copy.set_params(device="cpu").score_samples(x), model.score_samples(x), rtol=1e-6)
    np.testing.assert_allclose(copy.transform(x), model.transform(x), rtol=1e-6)


def test_early_stopping_keeps_the_weights_of_the_best_epoch(x):
    options = {**SMALL, "learning_rate": 0.02, "early_stopping": True, "validation_fraction": 0.25, "random_state": 0}
    model = VAEDensity(2, **{**options, "max_epochs": 200}, n_epochs_no_change=3).fit(x)
    best = int(model.history_["validation_elbo"].argmax()) + 1
    assert best < model.n_epochs_ == best + 3 < 200
    until_then = VAEDensity(2, **{**options, "max_epochs": best}, n_epochs_no_change=3).fit(x)
    for ours, theirs in zip(model.vae_.parameters(), until_then.vae_.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_bits_by_name(x):
    bits = (x > 0).astype(float)
    model = VAEDensity(2, likelihood="bernoulli", **SMALL, random_state=0).fit(bits)
    assert model.score(bits) < 0
    assert set(np.unique(model.sample(20, random_state=0))) <= {0.0, 1.0}
    with pytest.raises(pvae.DataError, match="site 'x'"):
        model.score(x)


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"n_components": 0}, "n_components must be a whole number"),
        ({"max_epochs": 0.5}, "max_epochs must be a whole number"),
        ({"n_samples": 0}, "n_samples must be a whole number"),
        ({"hidden_layer_sizes": (8, 0)}, "hidden"),
        ({"hidden_layer_sizes": 8}, r"hidden_layer_sizes must be a sequence of widths, such as \(256,\); got 8"),
        ({"learning_rate": -1}, "lr must be a positive number"),
        ({"likelihood": "cauchy"}, "likelihood must be one of"),
        ({"likelihood": "bernoulli"}, "site 'x'"),
        (
            {"early_stopping": True, "validation_fraction": 1.0},
            "validation_fraction must be a number above",
        ),
        ({"early_stopping": True, "validation_fraction": "a"}, "validation_fraction must be a number"),
    ],
)
def test_wrong_parameters_are_value_errors(wrong, match, x):
    with pytest.raises(ValueError, match=match):
        VAEDensity(**{**SMALL, **wrong}).fit(x)


def test_a_signal_in_training_ends_what_called_it(x, interrupt):
    interrupt(2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        VAEDensity(2, **SMALL).fit(x)


def test_the_callers_state_is_left_alone(x, caller_state):
    before = caller_state()
    VAEDensity(2, **SMALL, random_state=0).fit(x).score(x[:20])
    before.assert_unchanged()


def test_it_is_imported_where_it_is_asked_for():
    said = lines_of(
        python("import sys, pvae; print('sklearn' in sys.modules); print(pvae.estimator.VAEDensity.__name__)")
    )
    assert said == ["False", "VAEDensity"]
    with pytest.raises(AttributeError, match="no attribute 'estimators'"):
        _ = pvae.estimators


# --- scikit-learn's tools ---------------------------------------------------------------------------------------------


def pipeline(**options):
    steps = [("scale", MinMaxScaler()), ("bits", Binarizer(threshold=0.5)), ("vae", VAEDensity(**options))]
    return Pipeline(steps)


def test_held_out_log_px_chooses_the_latent_dimension(x):
    """Data of two factors: with one, the other is noise to the model."""
    options = {**SMALL, "max_epochs": 40, "batch_size": 60, "learning_rate": 0.03}
    model = Pipeline(
        [("constant", VarianceThreshold()), ("scale", StandardScaler()), ("vae", VAEDensity(**options, random_state=0))]
    )
    search = GridSearchCV(model, {"vae__n_components": [1, 2]}, cv=2).fit(x)
    assert search.best_params_ == {"vae__n_components": 2}
    assert search.best_score_ == pytest.approx(search.cv_results_["mean_test_score"].max())
    assert search.best_estimator_.transform(x).shape == (120, 2)
    assert search.score(x) == pytest.approx(search.best_estimator_.score_samples(x).mean())


@pytest.mark.slow
def test_a_pipeline_of_three_steps_on_the_digits():
    x = load_digits().data.astype(np.float32)
    options = {"likelihood": "bernoulli", "hidden_layer_sizes": (128,), "max_epochs": 25, "learning_rate": 2e-3}
    model = pipeline(**options, batch_size=64, n_samples=100, random_state=0)
    search = GridSearchCV(model, {"vae__n_components": [2, 8]}, cv=2).fit(x)
    assert search.best_params_ == {"vae__n_components": 8}
    low, high = search.cv_results_["mean_test_score"]
    assert high > low + 1  # nats per datum; two folds scatter by 0.2


@pytest.mark.slow
def test_processes_of_joblib_find_the_same(x):
    model = VAEDensity(2, **SMALL, random_state=0)
    alone, shared = (cross_val_score(model, x, cv=2, n_jobs=jobs) for jobs in (1, 2))
    np.testing.assert_array_equal(alone, shared)


def test_threads_of_joblib_find_the_same(x):
    from joblib import parallel_backend

    model = VAEDensity(2, **SMALL, random_state=0)
    alone = cross_val_score(model, x, cv=2)
    with parallel_backend("threading"):
        np.testing.assert_array_equal(cross_val_score(model, x, cv=2, n_jobs=2), alone)
