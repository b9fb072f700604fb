"""Compiled predictive draws against those of Pyro, for the same noise."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal

from pyro_vae import CompiledPredictive
from pyro_vae.engine.tracing import NotCompiledWarning

X = torch.linspace(-1, 1, 6)


@pytest.fixture(autouse=True)
def _graphs(traced):
    pass


def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    mean = pyro.deterministic("mean", slope * x)
    with pyro.plate("data", len(x)):
        pyro.sample("count", dist.Poisson(mean.exp()))
        return pyro.sample("y", dist.Normal(mean, scale), obs=y)


def same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.shape == second[name].shape
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5)


def both(*args, call=(X,), **options):
    found = []
    for kind in (Predictive, CompiledPredictive):
        predictive = kind(*args, **options)
        pyro.set_rng_seed(5)
        found.append((predictive(*call), torch.randn(())))
    (expected, noise), (ours, same_noise) = found
    same(expected, ours)
    assert noise == same_noise
    assert predictive.reason == ""
    return predictive, ours


POSTERIOR = {"slope": torch.linspace(-2, 2, 20), "scale": torch.linspace(0.1, 2, 20)}


@pytest.mark.parametrize("sites", [(), ("y", "slope"), ("_RETURN", "mean"), None])
def test_posterior_samples(sites):
    predictive, _ = both(model, POSTERIOR, return_sites=sites)
    assert "20 calls, of which 0" in predictive.explain()


def test_prior_draws_and_observed_sites():
    both(model, num_samples=12)
    _, draws = both(model, num_samples=12, call=(X, X))
    assert (draws["y"] == X).all()


def test_a_guide_and_later_calls():
    guide = AutoNormal(pyro.poutine.block(model, hide=["y", "count"]))
    guide(X)
    predictive, _ = both(model, guide=guide, num_samples=15)
    stock = Predictive(model, guide=guide, num_samples=15)
    for size in (6, 9, 6):
        pyro.set_rng_seed(size)
        expected = stock(torch.linspace(-1, 1, size))
        pyro.set_rng_seed(size)
        same(expected, predictive(torch.linspace(-1, 1, size)))
    assert len(pickle.loads(pickle.dumps(CompiledPredictive(model, POSTERIOR)))._draws) == 0
    assert sum(graph.made for draws in predictive._draws.values() for graph in draws.calls.graphs.values()) > 50
    pyro.param("AutoNormal.locs.slope").data.fill_(3.0)  # parameters are live
    assert predictive(X)["slope"].mean() == pytest.approx(3, abs=0.5)


def test_parallel_draws_are_those_of_pyro():
    both(model, POSTERIOR, parallel=True)


def test_what_cannot_be_compiled_is_drawn_by_pyro():
    def odd(x):
        global COUNT
        COUNT += 1
        return pyro.sample("y", dist.Normal(float(COUNT), 0.01))

    predictive = CompiledPredictive(odd, num_samples=5)
    with pytest.warns(NotCompiledWarning, match="draws are Pyro's own, not compiled: it changes the global COUNT"):
        draws = predictive(X)["y"]
    assert draws.round().tolist() == [COUNT - 4, COUNT - 3, COUNT - 2, COUNT - 1, COUNT]
    assert "the global COUNT" in predictive.reason
    with pytest.raises(ValueError, match="_RETURN: expected a model that returns a tensor, found NoneType"):
        CompiledPredictive(lambda: None, num_samples=2, return_sites=("_RETURN",))()


COUNT = 0
