"""The scikit-learn estimator: scikit-learn's own checks, and its figures against the truth."""

import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from pyro_vae import log_marginal
from pyro_vae.estimates.records import UnreliableEstimateWarning
from pyro_vae.models.linear_gaussian import LinearGaussian
from pyro_vae.sklearn import VAETransformer

# Of estimates after so little training.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_vae.estimates.records.UnreliableEstimateWarning")

TABLE = np.random.default_rng(0).normal(size=(60, 3)) @ np.random.default_rng(1).normal(size=(3, 5)) + 3


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
@parametrize_with_checks([VAETransformer(epochs=5, hidden=(8,), num_samples=30, random_state=0)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def fitted():
    return VAETransformer(n_components=2, epochs=60, random_state=0).fit(TABLE)


def test_the_same_seed_gives_the_same_model(fitted):
    again = clone(fitted).fit(TABLE)
    assert np.array_equal(again.transform(TABLE), fitted.transform(TABLE))
    assert np.array_equal(again.score_samples(TABLE), fitted.score_samples(TABLE))
    other = clone(fitted).set_params(random_state=1).fit(TABLE)
    assert not np.allclose(other.transform(TABLE), fitted.transform(TABLE))


def test_pickled_and_still_the_same(fitted):
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.score_samples(TABLE), fitted.score_samples(TABLE))
    again.partial_fit(TABLE)


def test_score_is_that_of_log_marginal(fitted):
    """Common draws for all rows, against fresh ones: two estimates of the same log p(x)."""
    x = torch.tensor(TABLE)
    ours = fitted.log_marginal(TABLE, num_samples=20_000)
    torch.manual_seed(0)
    theirs = log_marginal(fitted.vae_.model, fitted.vae_.guide, x, num_samples=20_000)
    error = (ours.standard_error**2 + theirs.standard_error**2).sqrt()
    reliable = ~(ours.unreliable | theirs.unreliable)
    assert reliable.sum() > 50
    assert ((ours.value - theirs.value).abs() < 5 * error)[reliable].all()
    assert fitted.score(TABLE) == pytest.approx(fitted.score_samples(TABLE).mean())


def test_density_approaches_the_truth_of_a_linear_gaussian():
    torch.manual_seed(0)
    truth = LinearGaussian(torch.randn(4, 1).double(), torch.zeros(4).double(), 0.5)
    x = truth.marginal().sample((2000,))
    expected = truth.marginal().log_prob(x).mean().item()
    model = VAETransformer(n_components=1, epochs=40, lr=3e-3, random_state=0).fit(x.numpy())
    assert expected - 0.25 < model.score(x.numpy()) < expected + 0.05
    draws = model.sample(4000, random_state=0)
    covariance = np.cov(x.numpy().T)
    assert np.abs(np.cov(draws.T) - covariance).max() < 0.2 * np.abs(covariance).max()


def test_units_do_not_matter_but_to_the_density():
    small = VAETransformer(epochs=5, random_state=0).fit(TABLE)
    large = VAETransformer(epochs=5, random_state=0).fit(1e6 * TABLE)
    np.testing.assert_allclose(large.transform(1e6 * TABLE), small.transform(TABLE), rtol=1e-6)
    np.testing.assert_allclose(large.score_samples(1e6 * TABLE), small.score_samples(TABLE) - 5 * np.log(1e6), rtol=1e-6)
    np.testing.assert_allclose(large.inverse_transform(np.zeros((1, 2))), 1e6 * small.inverse_transform(np.zeros((1, 2))))


def test_partial_fit_goes_on_and_keeps_the_scale():
    model = VAETransformer(random_state=0)
    for _ in range(30):
        model.partial_fit(TABLE)
    assert len(model.history_) == 30
    assert model.history_[-1].train["loss"] < model.history_[0].train["loss"]
    first = model.vae_.likelihood.loc.clone()
    model.partial_fit(TABLE + 1)
    assert torch.equal(model.vae_.likelihood.loc, first)


def test_partial_fit_goes_on_with_adams_moments():
    model = VAETransformer(random_state=0, batch_size=1000)
    for _ in range(4):
        model.partial_fit(TABLE)
    again = pickle.loads(pickle.dumps(model))
    for each in (model, again):
        each.partial_fit(TABLE)
    state = model._moments["state"]
    assert {int(moments["step"]) for moments in state.values()} == {5}
    for one, other in zip(model.vae_.parameters(), again.vae_.parameters(), strict=True):
        assert torch.equal(one, other)
    model.set_params(lr=1e-30).partial_fit(TABLE)  # the learning rate is that of the call
    for one, other in zip(model.vae_.parameters(), again.vae_.parameters(), strict=True):
        assert torch.equal(one, other)
    assert model.fit(TABLE)._moments["state"][0]["step"] == 100  # anew


def test_binary_tables_get_a_bernoulli():
    model = VAETransformer(epochs=2, random_state=0).fit((TABLE > 3).astype(float))
    assert model.likelihood_ == "bernoulli"
    assert set(np.unique(model.sample(50, random_state=0))) <= {0.0, 1.0}
    assert (model.score_samples((TABLE > 3).astype(float)) <= 0).all()  # probabilities
    with pytest.raises(ValueError, match=r"scores values in \[0, 1\]"):
        model.score_samples(TABLE)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_components": 0}, "n_components: expected a whole number >= 1, found 0"),
        ({"likelihood": "gamma"}, "likelihood: expected one of auto, "),
        ({"epochs": 0}, "epochs"),
        ({"hidden": (0,)}, "hidden"),
        ({"lr": -1}, "lr"),
        ({"likelihood": "bernoulli"}, r"scores values in \[0, 1\]"),
        ({"likelihood": "poisson"}, "PoissonLikelihood: found x .* expected whole numbers >= 0"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        VAETransformer(**{"epochs": 1} | change).fit(TABLE)


def test_latents_of_another_size_are_refused(fitted):
    with pytest.raises(ValueError, match="expected 2 components, as transform returns, found 3"):
        fitted.inverse_transform(np.zeros((4, 3)))


def test_a_hopeless_proposal_is_said():
    model = VAETransformer(epochs=1, random_state=0, num_samples=30).fit(TABLE)
    far = np.full((1, 5), 1e3)
    with pytest.warns(UnreliableEstimateWarning, match="score_samples: 1 of 1 observations have") as record:
        model.score_samples(far)
    with pytest.warns(UnreliableEstimateWarning, match="log_marginal: 1 of 1 observations have") as other:
        model.log_marginal(far)
    said = [str(warnings[0].message).partition(":")[2] for warnings in (record, other)]
    assert said[0] == said[1]  # as pyro_vae.log_marginal says it
    assert record[0].filename == other[0].filename == __file__


def test_in_a_pipeline_and_a_grid_search():
    x, y = load_digits(return_X_y=True)
    x, y = x[:600] / 16, y[:600]
    features = VAETransformer(epochs=5, likelihood="bernoulli", random_state=0)
    pipeline = make_pipeline(features, LogisticRegression(max_iter=200))
    search = GridSearchCV(pipeline, {"vaetransformer__n_components": [1, 8]}, cv=2).fit(x, y)
    assert search.best_params_ == {"vaetransformer__n_components": 8}
    assert list(search.best_estimator_[0].get_feature_names_out())[:2] == ["vaetransformer0", "vaetransformer1"]
    assert make_pipeline(PCA(8), LogisticRegression(max_iter=200)).fit(x, y).score(x, y) > 0.5


SECONDS = np.c_[1.7e9 + np.random.default_rng(0).integers(0, 3600, 60), TABLE]  # since 1970


def test_seconds_since_1970_cost_no_digits():
    """The same rows, and their density, as of seconds since the first of them, which float32 holds."""
    since = SECONDS - [1.7e9, 0, 0, 0, 0, 0]
    of_time, of_span = (VAETransformer(epochs=20, random_state=0).fit(x) for x in (SECONDS, since))
    np.testing.assert_allclose(of_time.score_samples(SECONDS), of_span.score_samples(since), atol=1e-3)
    np.testing.assert_allclose(of_time.transform(SECONDS), of_span.transform(since), atol=1e-5)
    shift = of_time.inverse_transform(np.zeros((1, 2))) - of_span.inverse_transform(np.zeros((1, 2)))
    np.testing.assert_allclose(shift, [[1.7e9, 0, 0, 0, 0, 0]], atol=1e-3)
    narrow = VAETransformer(epochs=20, random_state=0).fit(since.astype(np.float32))
    assert narrow.score(since) == pytest.approx(of_span.score(since), abs=0.3)  # other draws of the noise
    assert narrow.sample(2).dtype == np.float32
    assert narrow.partial_fit(since).transform(since).shape == (60, 2)  # float64 in place of float32


def test_counts():
    x = np.random.default_rng(0).poisson([3, 1000, 50], (200, 3))
    model = VAETransformer(epochs=30, likelihood="poisson", random_state=0).fit(x)
    assert (model.score_samples(x) <= 0).all()  # probabilities
    truth = scipy.stats.poisson([3, 1000, 50]).logpmf(x).sum(1).mean()
    assert truth - 1.5 < model.score(x) < truth + 0.5


def test_data_frames_keep_their_names():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(SECONDS, columns=list("tabcde"))
    model = VAETransformer(epochs=2, random_state=0).set_output(transform="pandas")
    latents = model.fit_transform(frame)
    assert list(latents.columns) == ["vaetransformer0", "vaetransformer1"]
    assert list(model.feature_names_in_) == list("tabcde")
    np.testing.assert_allclose(latents, VAETransformer(epochs=2, random_state=0).fit_transform(SECONDS), rtol=1e-9)
    for change, match in (
        ({"a": "red"}, "row 1, column a: expected a number, found 'red'"),
        ({"b": np.nan}, "column b: missing"),
    ):
        with pytest.raises(ValueError, match=match):
            VAETransformer(epochs=1).fit(frame.assign(**change))
    with pytest.raises(ValueError, match="feature names"):
        model.transform(frame[list("edcbat")])
