"""Compiled potential energies and leapfrog steps against those of Pyro."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad

from pyro_vae import CompiledHMC, CompiledNUTS, compiled_potential
from pyro_vae.engine.arguments import explain
from pyro_vae.engine.tracing import NotCompiledWarning

X = torch.tensor([0.3, -1.2, 0.8, 2.1, 0.4, -0.6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def float64(traced):
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc + weights[0], scale), obs=x)


def mixture(x):
    """With a discrete site, which is summed out."""
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


@pytest.mark.parametrize("program", [model, mixture])
def test_potential_and_gradient(program):
    start, potential, _, _ = initialize_model(program, (X,))
    ours = compiled_potential(potential)
    for seed in range(12):
        torch.manual_seed(seed)
        z = {name: torch.randn_like(value) for name, value in start.items()}
        gradients, value = potential_grad(potential, dict(z))
        same_gradients, same = potential_grad(ours, dict(z))
        torch.testing.assert_close(same, value, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-10, atol=1e-10)
        assert not ours({name: t.detach() for name, t in z.items()}).requires_grad
    assert ours.reason == ""
    assert sum(graph.made for graph in ours._calls.graphs.values()) >= 12
    assert copy.deepcopy(ours)(z) == pytest.approx(value.item())


def chain(kernel, program=model, seed=1, samples=10, warmup=15, **options):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True, **options)
    mcmc.run(X)
    return mcmc


@pytest.mark.parametrize("program", [model, mixture])
@pytest.mark.parametrize(("stock", "ours"), [(HMC, CompiledHMC), (NUTS, CompiledNUTS)])
def test_a_chain_is_that_of_pyro_while_rounding_errors_are_small(stock, ours, program):
    options = {"num_steps": 3} if stock is HMC else {}
    expected = chain(stock(program, **options), program).get_samples()
    kernel = ours(program, **options)
    found = chain(kernel, program).get_samples()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    calls = kernel.potential_fn._calls if stock is HMC else kernel._leapfrogs
    assert calls.reason == kernel.potential_fn.reason == ""
    assert sum(graph.made for graph in calls.graphs.values()) > 50
    assert "operations" in explain(calls)


@pytest.mark.parametrize("options", [{"full_mass": True}, {"use_multinomial_sampling": False}, {"adapt_mass_matrix": False}])
def test_kinds_of_nuts(options):
    expected = chain(NUTS(model, **options)).get_samples()
    found = chain(CompiledNUTS(model, **options)).get_samples()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


def test_a_potential_that_cannot_be_compiled_is_stock():
    noise = []

    def counting(z):
        noise.append(1)
        return z["a"].square().sum()

    potential = compiled_potential(counting)
    with pytest.warns(NotCompiledWarning, match="potential energy is computed eagerly, not compiled: it changes"):
        _, value = potential_grad(potential, {"a": torch.tensor([1.0, 2.0])})
    assert value == 5
    gradients, _ = potential_grad(potential, {"a": torch.tensor([1.0, 2.0])})
    assert gradients["a"].tolist() == [2.0, 4.0]


@pytest.mark.slow
def test_posterior_of_eight_schools_is_that_of_stock_nuts():
    """Means and deviations agree within 3 Monte-Carlo errors of both chains."""
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def schools(effects, errors):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("effect", dist.Normal(mu + tau * eta, errors), obs=effects)

    chains = []
    for kernel in (NUTS, CompiledNUTS):
        pyro.set_rng_seed(4)
        mcmc = MCMC(kernel(schools), num_samples=1000, warmup_steps=500, disable_progbar=True)
        mcmc.run(effects, errors)
        chains.append((mcmc.get_samples(), mcmc.diagnostics()))
    (stock, diagnostics), (ours, others) = chains
    for name, value in stock.items():
        mcse = [
            samples[name].std(0) / found[name]["n_eff"].clamp(1, 1000).sqrt()
            for samples, found in ((stock, diagnostics), (ours, others))
        ]
        error = (mcse[0] ** 2 + mcse[1] ** 2).sqrt()
        assert ((value.mean(0) - ours[name].mean(0)).abs() < 3 * error).all(), name
