"""Compiled steps of Pyro's SVI against Pyro's own, for the same noise."""

import gc
import math
import time
import warnings
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import compile_by
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_vae.engine.tracing import NotCompiledWarning
from pyro_vae.inference.svi import CompiledSVI

X = torch.tensor([0.3, -1.2, 0.8, 2.1, 0.4, -0.6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def adam(**options):
    return pyro.optim.Adam({"lr": 0.02, **options})


def steps(kind, make, calls, **options):
    """Losses, parameters, the optimisers' state, and a number drawn after it all."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model, guide, optim, loss = make()
    svi = kind(model, guide, optim, loss, **options)
    losses = [svi.step(*call) for call in calls]
    params = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    return svi, losses, params, optim.get_state() if hasattr(optim, "get_state") else {}, torch.randn(())


def assert_same(make, calls=((X,),) * 12, *, rtol=1e-10, compiled=True, **options):
    """A stock and a compiled run of the same program, which in the last steps is made by the compiled step alone."""
    _, expected, params, state, noise = steps(SVI, make, calls)
    svi, losses, same_params, same_state, same_noise = steps(CompiledSVI, make, calls, **options)
    if compiled:
        assert svi.reason == ""
        assert sum(graph.made for graph in svi._calls.graphs.values()) > 0
    assert type(losses[-1]) is type(expected[-1])
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=rtol, atol=rtol)
    assert params.keys() == same_params.keys()
    for name, value in params.items():
        torch.testing.assert_close(same_params[name], value, rtol=rtol, atol=rtol)
    assert state.keys() == same_state.keys()
    for name, each in state.items():
        close_state(same_state[name], each, rtol)
    assert noise == same_noise
    return svi


def close_state(found, expected, rtol):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            close_state(found[name], value, rtol)
    elif isinstance(expected, list | tuple) and expected and not isinstance(expected[0], str):
        for one, other in zip(found, expected, strict=True):
            close_state(one, other, rtol)
    elif isinstance(expected, torch.Tensor | float):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=rtol, atol=rtol)
    else:
        assert found == expected or callable(expected)


# --- the programs ---


def normal_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def normal_guide(x):
    loc = pyro.param("loc_loc", torch.tensor(0.1))
    scale = pyro.param("loc_scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(loc, scale))
    other = pyro.param("scale_scale", torch.tensor(0.3), constraint=constraints.interval(0.01, 2.0))
    pyro.sample("scale", dist.LogNormal(pyro.param("scale_loc", torch.tensor(0.0)), other))


def gamma_guide(x):
    """Beta, Gamma and Dirichlet draw by rejection, with implicit reparameterisation."""
    pyro.sample("loc", dist.Normal(pyro.param("a", torch.tensor(0.1)), 0.3))
    shape = pyro.param("shape", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("scale", dist.Gamma(shape, 2.0))


def discrete_model(x):
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)


def discrete_guide(x):
    probs = pyro.param("probs", torch.full((len(x), 2), 0.5), constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(probs))


def nothing(*args, **kwargs):
    pass


def subsampled(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), subsample_size=3) as index:
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])


def loc_guide(x):
    pyro.sample("loc", dist.Normal(pyro.param("a", torch.tensor(0.1)), pyro.param("b", torch.tensor(0.0)).exp()))


def with_handlers(x):
    with poutine.scale(scale=0.5):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=x > -1):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            pyro.sample("rest", dist.Normal(0.0, 1.0).mask(False), infer={"is_auxiliary": True}, obs=x)


PROGRAMS = {
    "constrained parameters": (normal_model, normal_guide, Trace_ELBO),
    "mean field": (normal_model, normal_guide, TraceMeanField_ELBO),
    "graph": (normal_model, normal_guide, TraceGraph_ELBO),
    "three particles": (normal_model, normal_guide, lambda: Trace_ELBO(num_particles=3)),
    "vectorised particles": (subsampled, loc_guide, lambda: Trace_ELBO(num_particles=4, vectorize_particles=True)),
    "Renyi": (normal_model, normal_guide, lambda: RenyiELBO(alpha=0.5, num_particles=4)),
    "rejection": (normal_model, gamma_guide, Trace_ELBO),
    "tail-adaptive": (subsampled, loc_guide, lambda: TraceTailAdaptive_ELBO(num_particles=4, vectorize_particles=True)),
    "wake-sleep": (normal_model, normal_guide, lambda: ReweightedWakeSleep(num_particles=3)),
    "score function": (discrete_model, discrete_guide, Trace_ELBO),
    "enumerated model": (config_enumerate(discrete_model), nothing, lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "enumerated guide": (discrete_model, config_enumerate(discrete_guide), lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "subsample": (subsampled, loc_guide, Trace_ELBO),
    "handlers": (with_handlers, loc_guide, Trace_ELBO),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_steps_are_those_of_pyro(program, traced):
    model, guide, loss = PROGRAMS[program]
    assert_same(lambda: (model, guide, adam(), loss()))


GUIDES = (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
    AutoDelta,
    AutoLaplaceApproximation,
)


@pytest.mark.parametrize("guide", GUIDES)
def test_autoguides(guide, traced):
    assert_same(lambda: (normal_model, guide(normal_model), adam(), Trace_ELBO()), rtol=1e-9)


OPTIMIZERS = {
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
    "Adam, decay": lambda: adam(weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6),
    "amsgrad": lambda: adam(amsgrad=True),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.01}),
    "centred": lambda: pyro.optim.ClippedAdam({"lr": 0.02, "centered_variance": True}),
    "by parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name.startswith("loc") else 0.01}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.02}, {"clip_norm": 0.1}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
    "DCTAdam": lambda: pyro.optim.DCTAdam({"lr": 0.01}),
}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimisers(optim, traced):
    assert_same(lambda: (normal_model, normal_guide, OPTIMIZERS[optim](), Trace_ELBO()))


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.SGD])
def test_a_schedule_between_steps(inner, traced):
    found = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        scheduler = pyro.optim.ExponentialLR({"optimizer": inner, "optim_args": {"lr": 0.01}, "gamma": 0.9})
        svi = kind(normal_model, normal_guide, scheduler, Trace_ELBO())
        losses = []
        for _ in range(12):
            losses.append(svi.step(X))
            scheduler.step()
        found.append(losses)
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-10, atol=0)


class Net(nn.Module):
    """Batch norm writes to its buffers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2))

    def model(self, x):
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc, scale = self.layers(z.unsqueeze(-1)).unbind(-1)
            pyro.sample("x", dist.Normal(loc, scale.exp()), obs=x)

    def guide(self, x):
        pyro.module("net", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))


def test_modules_with_buffers(traced):
    nets = []

    def make():
        net = Net()
        nets.append(net)
        return net.model, net.guide, adam(), Trace_ELBO()

    assert_same(make, rtol=1e-7)  # a bias before batch norm has a gradient of roundings alone
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class OwnELBO(Trace_ELBO):
    """Adds up losses as numbers, in a class of the user's."""

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return 2 * loss.item()


def own_loss(model, guide, *args):
    return 3 * Trace_ELBO().differentiable_loss(model, guide, *args)


@pytest.mark.parametrize("loss", [OwnELBO, lambda: own_loss])
def test_losses_of_ones_own(loss, traced):
    assert_same(lambda: (normal_model, normal_guide, adam(), loss()))


# --- arguments ---


def test_each_kind_of_arguments_has_a_graph(traced):
    calls = [(X[: 4 + (i % 2)],) for i in range(40)]
    svi = assert_same(lambda: (normal_model, normal_guide, adam(), Trace_ELBO()), calls)
    assert len(svi._calls.graphs) == 2
    assert "tensors of shape (5,)" in svi.explain()


def annealed(x, beta, word="mean", also=None):
    with poutine.scale(scale=beta):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc if word == "mean" else -loc, 1.0), obs=x)


def test_numbers_and_words_among_the_arguments(traced):
    guide = lambda x, beta, word="mean": loc_guide(x)  # noqa: E731
    calls = [(X, 0.1 + 0.05 * i) for i in range(30)]
    svi = assert_same(lambda: (annealed, guide, adam(), Trace_ELBO()), calls, rtol=1e-9)
    assert len(svi._calls.graphs) <= 2  # the number is an input from the second value on
    calls = [(X, 1.0, ("mean", "other")[i // 3 % 2]) for i in range(60)]
    svi = assert_same(lambda: (annealed, guide, adam(), Trace_ELBO()), calls)
    assert len(svi._calls.graphs) == 2


def test_the_same_tensor_twice_is_not_two_tensors(traced):
    def model(x, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            pyro.sample("y", dist.Normal(-loc, 1.0), obs=y)

    calls = [(X, X if i < 15 else X + 1) for i in range(30)]
    assert_same(lambda: (model, lambda x, y: loc_guide(x), adam(), Trace_ELBO()), calls)


def test_shapes_that_change_at_each_step_are_not_compiled(traced):
    calls = [(torch.randn(3 + i),) for i in range(20)]
    _, expected, *_ = steps(SVI, lambda: (normal_model, normal_guide, adam(), Trace_ELBO()), calls)
    svi, losses, *_ = steps(CompiledSVI, lambda: (normal_model, normal_guide, adam(), Trace_ELBO()), calls)
    assert losses == pytest.approx(expected, rel=1e-10)
    assert len(svi._calls.graphs) == 1


def test_the_least_recently_used_graph_goes(traced):
    calls = [(X[: 2 + i // 12],) for i in range(48)]
    svi = assert_same(lambda: (normal_model, normal_guide, adam(), Trace_ELBO()), calls, most_graphs=2)
    assert len(svi._calls.graphs) == 2
    assert [key[1][1][0] for key in svi._calls.graphs] == [(4,), (5,)]


# --- values that Python takes ---


def branching(x):
    """Goes the other way in about one of four steps."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = 1.0 if torch.rand(()) < 0.75 else 3.0
    rows = x[x > -1.0]  # a shape that depends on values
    with pyro.plate("data", len(rows)):
        pyro.sample("x", dist.Normal(loc, scale), obs=rows)


def test_a_branch_is_guarded(traced):
    svi = assert_same(lambda: (branching, loc_guide, adam(), Trace_ELBO()), ((X,),) * 40)
    (graph,) = svi._calls.graphs.values()
    assert 0 < graph.failed < graph.made
    assert "test_svi.py" in svi.explain()
    assert "in branching" in svi.explain()


def test_a_guard_that_fails_too_often_is_given_up(traced):
    def often(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        scale = 1.0 + float(torch.rand(()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    with pytest.warns(NotCompiledWarning, match="value that Python reads from a tensor changes too often .*in often"):
        assert_same(lambda: (often, loc_guide, adam(), Trace_ELBO()), ((X,),) * 30, compiled=False)


@pytest.mark.parametrize("uses_one", [False, True])
def test_a_loss_without_gradient(uses_one, traced):
    def model(x):
        if uses_one:
            pyro.param("unused", torch.tensor(0.5))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)

    assert_same(lambda: (model, nothing, adam(), Trace_ELBO()))


def test_an_argument_that_is_another_one_at_each_step_is_a_reason(traced):
    def model(x, prior):
        loc = pyro.sample("loc", dist.Normal(0.0, prior()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x, prior):
        loc_guide(x)

    class Prior:
        def __call__(self):
            return 2.0

    freed = []
    svi = CompiledSVI(model, guide, adam(), Trace_ELBO())

    def run():
        for _ in range(220):
            prior = Prior()
            weakref.finalize(prior, freed.append, None)
            svi.step(X, prior)

    with pytest.warns(NotCompiledWarning, match="an argument, or Python state on which it depends, changes too often"):
        run()
    gc.collect()
    assert len(freed) > 200  # no more than a few are kept


def test_a_flow_that_caches_its_last_value(traced):
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.flows = nn.ModuleList([affine_autoregressive(2, hidden_dims=[3])])

        def model(self, x):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc.sum(-1), 1.0), obs=x)

        def guide(self, x):
            pyro.module("flow", self)
            pyro.sample("loc", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0), [*self.flows]))

    def make():
        flow = Flow()
        return flow.model, flow.guide, adam(), Trace_ELBO()

    assert_same(make)


def test_an_autoguide_with_plates_that_was_called_before(traced):
    def model(x):
        with pyro.plate("data", len(x)):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def make():
        guide = AutoNormal(model)
        guide(X)
        return model, guide, adam(), Trace_ELBO()

    assert_same(make)


def test_the_reason_names_the_guard_that_fails(traced):
    def two(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        assert x.max() > 0
        scale = draw()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    def draw():
        return 1.0 + float(torch.rand(()))

    with pytest.warns(NotCompiledWarning, match="in draw"):
        assert_same(lambda: (two, loc_guide, adam(), Trace_ELBO()), ((X,),) * 40, compiled=False)


def test_a_step_that_was_traced_on_a_rare_branch_is_traced_again(traced):
    def rare(x, scale):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        spread = 2.0 if scale > 1.5 else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, spread), obs=x)

    def guide(x, scale):
        loc_guide(x)

    calls = [(X, torch.tensor(2.0 if i < 2 else 1.0)) for i in range(40)]  # traced at the second step
    svi = assert_same(lambda: (rare, guide, adam(), Trace_ELBO()), calls)
    (graph,) = svi._calls.graphs.values()
    assert graph.made > 10
    assert graph.failed == 0


def test_parameters_that_modules_hold_alone(traced):
    class Line(PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

        def forward(self, x):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc + self.slope, 1.0), obs=x)

    def run(kind):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model = Line()
        guide = AutoNormal(model)
        svi = kind(model, guide, adam(), Trace_ELBO())
        losses = [svi.step(X) for _ in range(12)]
        return svi, losses, [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]

    with pyro.settings.context(module_local_params=True):
        _, expected, weights = run(SVI)
        svi, losses, same_weights = run(CompiledSVI)
    assert svi.reason == ""
    assert len(svi._calls.graphs) == 1
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(same_weights, weights, rtol=1e-10, atol=1e-10)


def test_a_failed_guard_in_a_run_of_steps(traced):
    found = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = kind(branching, loc_guide, adam(), Trace_ELBO())
        if kind is SVI:
            found.append(torch.tensor([svi.step(X) for _ in range(60)]))
        else:
            found.append(svi.run(60, X, progress_bar=False))
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_a_loss_that_is_not_finite_is_as_pyro_has_it(traced):
    def late(x):
        a = pyro.param("a", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        falls = pyro.param("falls", torch.tensor(1.0))
        pyro.factor("cliff", 0 * (falls - 0.5).sqrt() - falls)  # nan from the 11th step on

    make = lambda: (late, nothing, pyro.optim.SGD({"lr": 0.05}), Trace_ELBO())  # noqa: E731
    found = []
    for kind in (SVI, CompiledSVI):
        with warnings.catch_warnings(record=True) as caught, pyro.validation_enabled(False):
            warnings.simplefilter("always")
            _, losses, params, *_ = steps(kind, make, [(X,)] * 20)
        found.append((losses, params, [str(w.message) for w in caught if "nan" in str(w.message).lower()]))
    (losses, params, told), (same, same_params, same_told) = found
    assert any(map(math.isnan, losses))
    torch.testing.assert_close(torch.tensor(same), torch.tensor(losses), rtol=1e-10, atol=0, equal_nan=True)
    torch.testing.assert_close(same_params, params, rtol=1e-10, atol=0, equal_nan=True)
    assert len(told) > 0
    assert same_told[0] == told[0]


# --- never a wrong number ---


class Counter:
    def __init__(self):
        self.count = 0


LEVEL = 1.0
CALLS: list[int] = []
COUNTER = Counter()


def count_in_a_list(x):
    CALLS.append(1)
    return 1.0 + 0.1 * len(CALLS)


def count_in_an_object(x):
    COUNTER.count += 1
    return 1.0 + 0.1 * COUNTER.count


def clock(x):
    return 1.0 + (time.perf_counter() % 1.0)


def numpy_noise(x):
    return 1.0 + np.random.rand()  # noqa: NPY002


NUMBERS = iter(np.linspace(1.0, 2.0, 10_000))


def an_iterator(x):
    return float(next(NUMBERS))


def values_by_numpy(x):
    return 1.0 + abs(float(x.numpy()[0]))


def puts_parameters_into_the_store(x):
    name = f"p{len(pyro.get_param_store())}"
    return pyro.param(name, torch.tensor(1.0)).exp()


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (count_in_a_list, "changes the global CALLS as it runs"),
        (count_in_an_object, "changes the global COUNTER as it runs"),
        (clock, "reads the clock"),
        (numpy_noise, "draws from Python's or NumPy's random numbers"),
        (an_iterator, "takes from an iterator"),
        (values_by_numpy, r"reads a tensor's values by numpy\(\)"),
        (puts_parameters_into_the_store, "puts parameters into Pyro's store"),
    ],
)
def test_what_cannot_be_compiled_is_run_by_pyro_and_the_reason_told(scale, reason, traced):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale(x)), obs=x)

    with pytest.warns(NotCompiledWarning, match=reason) as caught:
        svi, *_ = steps(CompiledSVI, lambda: (model, loc_guide, adam(), Trace_ELBO()), [(X,)] * 5)
    assert len(caught) == 1
    assert svi.reason
    assert svi.explain().startswith("SVI is run by Pyro's own steps: ")
    assert not svi._calls.graphs


def levelled(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, LEVEL), obs=x)


def test_what_a_model_reads_may_change_between_steps(traced):
    """A global, a variable of a closure, an attribute, a module's mode, a tensor's value, its storage."""
    level, net = torch.tensor(0.5), nn.Dropout(0.5)

    def make():
        factor, settings = 1.0, Counter()

        def model(x):
            loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
            scale = LEVEL * factor * (1 + settings.count) * net(torch.ones(3)).sum() * level + 0.1
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, scale), obs=x)

        def change(what):
            nonlocal factor
            match what:
                case 0:
                    globals()["LEVEL"] = 2.0
                case 1:
                    factor = 3.0
                case 2:
                    settings.count = 4
                case 3:
                    net.eval()
                case 4:
                    level.fill_(0.2)
                case 5:
                    level.data = torch.tensor(0.9)
                case 6:
                    pyro.get_param_store()._params["a"].data = torch.tensor(0.7)

        return model, change

    found = []
    for kind in (SVI, CompiledSVI):
        globals()["LEVEL"] = 1.0
        level.data = torch.tensor(0.5)
        net.train()
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model, change = make()
        svi = kind(model, loc_guide, adam(), Trace_ELBO())
        losses = []
        for step in range(8 * 12):
            losses.append(svi.step(X))
            if step % 12 == 11:
                change(step // 12)
        found.append(losses)
    globals()["LEVEL"] = 1.0
    assert svi.reason == ""
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.parametrize("what", ["clear", "load", "set"])
def test_the_store_may_change_between_steps(what, traced):
    found = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = kind(normal_model, normal_guide, adam(), Trace_ELBO())
        losses = [svi.step(X) for _ in range(10)]
        store = pyro.get_param_store()
        if what == "clear":
            pyro.clear_param_store()
        elif what == "load":
            state = {"params": {n: p.detach().clone().requires_grad_() for n, p in store._params.items()}}
            store.set_state({**state, "constraints": dict(store._constraints)})
        else:
            store["loc_scale"] = torch.tensor(0.9)
        losses += [svi.step(X) for _ in range(30)]
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-10)
    assert svi.reason == ""


def test_parameters_that_appear_late(traced):
    def model(x, late):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        shift = pyro.param("shift", torch.tensor(0.5)) if late > 0 else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + shift, 1.0), obs=x)

    calls = [(X, torch.tensor(float(i >= 10))) for i in range(40)]
    svi = assert_same(lambda: (model, lambda x, late: loc_guide(x), adam(), Trace_ELBO()), calls, compiled=False)
    assert "shift" in pyro.get_param_store()
    assert svi.reason == ""


def test_an_error_in_the_model_is_the_users(traced):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
        if x.sum() > 100:
            raise ZeroDivisionError("of the model")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi, *_ = steps(CompiledSVI, lambda: (model, loc_guide, adam(), Trace_ELBO()), [(X,)] * 6)
    before = pyro.param("a").item()
    with pytest.raises(ZeroDivisionError, match="of the model"):
        svi.step(X + 100)
    assert pyro.param("a").item() == before
    svi.step(X)
    assert svi.reason == ""


def test_a_compiler_that_errs_is_noticed_and_undone(monkeypatch):
    """Right at the first checks and wrong later: the steps since the last check are made again, by Pyro."""
    calls = []

    def compiler(graph, inputs):
        def call(*args):
            calls.append(1)
            values, *others = graph(*args)
            return torch.cat([values[:1], values[1:] * (1 + (len(calls) > 9))]), *others

        return call

    compile_by(monkeypatch, compiler)
    make = lambda: (normal_model, normal_guide, adam(), Trace_ELBO())  # noqa: E731
    _, _, params, *_ = steps(SVI, make, [(X,)] * 30)
    with pytest.warns(NotCompiledWarning, match="its loss is"):
        _, _, found, *_ = steps(CompiledSVI, make, [(X,)] * 30)
    torch.testing.assert_close(found, params, rtol=1e-10, atol=0)


def test_always_checked(traced):
    svi = assert_same(lambda: (normal_model, normal_guide, adam(), Trace_ELBO()), check="always")
    (graph,) = svi._calls.graphs.values()
    assert graph.made == 11
    with pytest.raises(ValueError, match="check: expected one of auto, always, found 'never'"):
        CompiledSVI(normal_model, normal_guide, adam(), Trace_ELBO(), check="never")


def test_handlers_around_a_step_are_pyros(traced):
    found = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = kind(normal_model, normal_guide, adam(), Trace_ELBO())
        losses = [svi.step(X) for _ in range(6)]
        with poutine.scale(scale=0.1):
            losses += [svi.step(X) for _ in range(3)]
        losses += [svi.step(X) for _ in range(3)]
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-10)


def test_both_classes_take_turns_on_one_store(traced):
    pyro.set_rng_seed(3)
    stock = SVI(normal_model, normal_guide, adam(), Trace_ELBO())
    expected = [stock.step(X) for _ in range(24)]
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    optim = adam()
    one, other = (kind(normal_model, normal_guide, optim, Trace_ELBO()) for kind in (SVI, CompiledSVI))
    found = [(one if i % 7 == 6 else other).step(X) for i in range(24)]
    assert found == pytest.approx(expected, rel=1e-10)


def test_evaluate_loss_is_pyros(traced):
    svi, *_ = steps(CompiledSVI, lambda: (normal_model, normal_guide, adam(), Trace_ELBO()), [(X,)] * 5)
    stock = SVI(normal_model, normal_guide, adam(), Trace_ELBO())
    values = []
    for each in (svi, stock):
        torch.manual_seed(1)
        values.append(each.evaluate_loss(X))
    assert values[0] == values[1]


def test_an_optimiser_that_pyro_does_not_take():
    with pytest.raises(ValueError, match="PyroOptim"):
        CompiledSVI(normal_model, normal_guide, torch.optim.Adam([torch.zeros(1, requires_grad=True)]), Trace_ELBO())


def test_the_whole_way_by_inductor():
    """Rejection sampling, constraints, guards, Adam; single steps and many at once."""

    def model(x):
        normal_model(x)
        if x.sum() > 100:
            pyro.factor("never", x.sum())

    pyro.set_rng_seed(3)
    stock = SVI(model, gamma_guide, adam(), Trace_ELBO())
    expected = [stock.step(X) for _ in range(300)]
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    svi = CompiledSVI(model, gamma_guide, adam(), Trace_ELBO())
    found = [svi.step(X) for _ in range(20)] + svi.run(280, X, progress_bar=False).tolist()
    assert svi.reason == ""
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("optim", [lambda: pyro.optim.SGD({"lr": 0.01}), lambda: pyro.optim.RMSprop({"lr": 0.01})])
def test_a_wrong_gradient_is_found_whatever_the_optimiser(monkeypatch, optim):
    """A graph in which one quotient, of the gradient, is three times as large."""

    def wrong(graph, inputs):
        divisions = [node for node in graph.graph.nodes if node.target is torch.ops.aten.div.Tensor]
        with graph.graph.inserting_after(divisions[-1]):
            other = graph.graph.call_function(torch.ops.aten.mul.Tensor, (divisions[-1], 3.0))
        divisions[-1].replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)
        graph.recompile()
        return graph

    compile_by(monkeypatch, wrong)

    def make():
        return normal_model, normal_guide, optim(), Trace_ELBO()

    _, expected, params, _, _ = steps(SVI, make, [(X,)] * 6)
    with pytest.warns(NotCompiledWarning, match="its gradient is not that of the eager step"):
        _, losses, found, _, _ = steps(CompiledSVI, make, [(X,)] * 6)
    assert losses == expected
    for name, value in params.items():
        assert torch.equal(found[name], value)


def test_an_attribute_that_the_first_step_makes(traced):
    """A counter that does not exist before the first step is Python state all the same."""

    class Counting:
        def __call__(self, x):
            self.steps = getattr(self, "steps", 0) + 1
            loc = pyro.sample("loc", dist.Normal(0.1 * self.steps, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.warns(NotCompiledWarning, match="it changes"):
        assert_same(lambda: (Counting(), loc_guide, adam(), Trace_ELBO()), compiled=False)


def test_a_loss_of_nan_warns_as_pyro_does(traced):
    def model(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.1)) * scale, 1.0), obs=x)

    svi = CompiledSVI(model, nothing, adam(), Trace_ELBO())
    with pyro.validation_enabled(False):
        for _ in range(3):
            svi.step(X, torch.tensor(1.0))
        with pytest.warns(UserWarning, match="Encountered NaN: loss"):
            assert math.isnan(svi.step(X, torch.tensor(math.nan)))
    assert svi.reason == ""
    assert not svi._calls.graphs[next(iter(svi._calls.graphs))].traced.guards


def test_evaluations_are_compiled_too(traced):
    losses = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = kind(normal_model, normal_guide, adam(), Trace_ELBO())
        losses.append([svi.step(X) if i % 2 else svi.evaluate_loss(X) for i in range(40)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-10, atol=1e-10)
    assert sum(graph.made for graph in svi._losses.graphs.values()) == 10
    wake = CompiledSVI(discrete_model, discrete_guide, adam(), ReweightedWakeSleep(num_particles=2))
    for _ in range(12):
        wake.step(X)
        assert isinstance(wake.evaluate_loss(X), tuple)


def test_a_tensor_that_gets_another_shape_in_place():
    """A closure's tensor is no argument, so that its shape is not part of the key; compiled code would read past its end."""
    weights = torch.ones(6)

    def model(x):
        with pyro.plate("data", len(weights)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.1)), weights), obs=x[: len(weights)])

    made = []
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        weights.data = torch.ones(6)
        svi = kind(model, nothing, adam(), Trace_ELBO())
        losses = [svi.step(X) for _ in range(4)]
        weights.data = torch.ones(3)
        made.append([*losses, svi.step(X), svi.step(X)])
    torch.testing.assert_close(torch.tensor(made[1]), torch.tensor(made[0]), rtol=1e-10, atol=1e-10)
