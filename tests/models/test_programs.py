"""Any pair of Pyro programs: trained, evaluated and compiled as our own VAE is."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import equal, make_vae, weights
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_vae import Checkpoints, Data, NegativeELBO, NegativeIWAE, TrainingStoppedError, evaluate, fit, log_marginal
from pyro_vae.estimates.log_weights import weigh
from pyro_vae.models.programs import ProgramPair

X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1.3 + 0.4


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


def functions():
    """z1 -> z2 -> x, with parameters in Pyro's store alone, of which two are constrained, and a module in a closure."""
    torch.manual_seed(1)
    net = nn.Linear(3, 2).double()

    def model(x):
        scale = pyro.param("scale", torch.tensor(0.7, dtype=torch.float64), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(zeros(2), 1.0).to_event(1))
            second = pyro.sample("second", dist.Normal(first.sum(-1), 1.0))
            loc = torch.stack([second, first[..., 0], first[..., 1]], -1)
            pyro.sample("data", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        width = pyro.param("width", 0.4 * torch.ones(2, dtype=torch.float64), constraint=constraints.interval(0.0, 2.0))
        slope = pyro.param("slope", lambda: zeros(3) + 0.1)
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(net(x), width).to_event(1))
            pyro.sample("second", dist.Normal(x @ slope + first.sum(-1), 0.8))

    return model, guide


class Model(PyroModule):
    """A PyroModule that is a program, with a parameter that is constrained and one that is not."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(zeros(3))
        self.scale = PyroParam(torch.tensor(0.7, dtype=torch.float64), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("latent", dist.Normal(zeros(2), 1.0).to_event(1))
            loc = torch.nn.functional.pad(z, (0, 1)) + self.bias
            pyro.sample("obs", dist.Normal(loc, self.scale).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = PyroModule[nn.Linear](3, 2).double()

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            pyro.sample("latent", dist.Normal(self.net(x), 0.5).to_event(1))


def pairs():
    return {"functions": functions(), "module": (Model(), Guide())}


def store():
    return {name: p.detach().clone() for name, p in pyro.get_param_store().items()}


@pytest.mark.parametrize("kind", ["functions", "module"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_that_of_pyros_svi(kind, compiled, traced):
    """Losses and parameters, constrained ones too, after some steps on the same batches with the same noise."""
    model, guide = pairs()[kind]
    history = fit(NegativeELBO(model, guide), X, epochs=12, batch_size=12, lr=0.02, compile=compiled, verbose=False)
    ours = store() if kind == "functions" else weights(model) + weights(guide)

    pyro.clear_param_store()
    model, guide = pairs()[kind]
    scaled = [poutine.scale(program, scale=1 / len(X)) for program in (model, guide)]  # SVI sums over the batch
    svi = SVI(*scaled, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    from pyro_vae.training.batches import batches_of  # the order of the data and the noise of each epoch

    batches = batches_of(12, 12, 0, torch.device("cpu"), 0, None)
    for record in history:
        assert svi.step(X[next(batches)]) == pytest.approx(record.train["loss"], rel=1e-9)
    theirs = store() if kind == "functions" else weights(model) + weights(guide)
    if kind == "functions":
        assert ours.keys() == theirs.keys()
        assert len(ours) == 5
        ours, theirs = [ours[name] for name in theirs], list(theirs.values())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["functions", "module"])
@pytest.mark.parametrize("particles", [1, 4])
def test_value_and_gradient_equal_pyros(kind, particles):
    model, guide = pairs()[kind]
    objective = NegativeELBO(model, guide, num_particles=particles)
    objective.prepare(X)
    torch.manual_seed(4)
    ours = objective(X)["loss"]
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    torch.manual_seed(4)
    theirs = elbo.differentiable_loss(model, guide, X) / len(X)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    parameters = list(objective.parameters())
    assert len(parameters) == {"functions": 5, "module": 4}[kind]
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_evaluate_and_log_marginal_of_functions_agree():
    model, guide = functions()
    fit(NegativeELBO(model, guide), X, epochs=60, batch_size=12, lr=0.02, verbose=False)
    figures = evaluate(model, guide, X, num_samples=2000, importance_samples=5000)
    # One site's closed form depends on the draws of the other, so the kl has an error too.
    assert 0 < figures["kl"].standard_error < 0.1
    iwae = NegativeIWAE(model, guide, num_particles=2000)(X)["loss"].item()
    log_p = figures["log_marginal"]
    exact = exact_log_marginal(pyro.param("scale").item())
    assert abs(log_p.value - exact) < 5 * log_p.standard_error
    assert -iwae == pytest.approx(exact, abs=0.05)
    assert -figures["neg_elbo"].value < exact
    draws = -torch.stack([NegativeELBO(model, guide, num_particles=500)(X)["neg_elbo"].detach() for _ in range(20)])
    error = math.hypot(draws.std().item() / 20**0.5, figures["neg_elbo"].standard_error)
    assert abs(draws.mean().item() + figures["neg_elbo"].value) < 5 * error


def exact_log_marginal(scale):
    """x = (second, first) + noise, second = first_1 + first_2 + e: all normal."""
    a = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    covariance = a @ a.T + scale**2 * torch.eye(3, dtype=torch.float64)
    return dist.MultivariateNormal(zeros(3), covariance).log_prob(X).mean().item()


def test_modules_under_one_name_are_both_trained_and_leave_nothing_in_the_store():
    trained = []
    for _ in range(2):
        module = nn.Linear(3, 3).double()

        def model(x, module=module):
            pyro.module("net", module)
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(module(z), 1.0).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

        before = weights(module)
        fit(NegativeELBO(model, guide), X, epochs=2, batch_size=6, verbose=False)
        trained.append(not equal(before, weights(module)))
    assert trained == [True, True]

    pyro.clear_param_store()
    vae = make_vae()
    x = torch.rand(6, 1, 4, 4)
    fit(NegativeELBO(vae), x, epochs=1, verbose=False)
    evaluate(vae, x, importance_samples=10)
    assert not list(pyro.get_param_store().keys())
    assert equal(weights(pickle.loads(pickle.dumps(vae))), weights(vae))


def test_autoguides_on_the_whole_batch():
    """Auxiliary sites of the guide alone, and point masses made of them, add up to the density of the guide."""

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.LogNormal(zeros(1)[0], 1.0))
            pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    x = X[:, 0]
    guide = AutoNormal(model, init_scale=0.5**0.5)
    objective = NegativeELBO(model, guide)
    objective.prepare(x)
    with torch.no_grad():
        next(p for name, p in objective.named_parameters() if "locs" in name).copy_(x / 2)  # the exact posterior
    exact = dist.Normal(zeros(1)[0], 2**0.5).log_prob(x)
    torch.testing.assert_close(weigh(objective.pair, (x,), 50).log_weights, exact.expand(50, -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_marginal(model, guide, x, num_samples=50).value, exact, rtol=1e-6, atol=1e-6)


def test_scales_count_in_the_loss_alone_and_subsampling_nowhere():
    model, guide = pairs()["module"]
    torch.manual_seed(3)
    plain = NegativeELBO(model, guide)(X)
    torch.manual_seed(3)
    scaled = NegativeELBO(poutine.scale(model, 3.0), poutine.scale(guide, 3.0))(X)
    torch.testing.assert_close(scaled["loss"], 3 * plain["loss"])
    for name in ("neg_elbo", "reconstruction", "kl"):
        torch.testing.assert_close(scaled[name], plain[name])

    def subsampled(program):
        def run(x):
            with pyro.plate("rows", 1000, subsample=torch.arange(len(x))):
                if program == "guide":
                    return pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.6))
                z = pyro.sample("z", dist.Normal(zeros(1)[0], 1.0))
                return pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

        return run

    pair = subsampled("model"), subsampled("guide")
    exact = dist.Normal(zeros(1)[0], 2**0.5).log_prob(X[:, 0])
    torch.testing.assert_close(log_marginal(*pair, X, num_samples=20_000).value, exact, rtol=0, atol=0.02)
    objective = NegativeELBO(*pair, num_particles=5000)
    terms = {name: value.item() for name, value in objective(X).items()}
    assert terms["loss"] == pytest.approx(terms["neg_elbo"])
    assert terms["neg_elbo"] > -exact.mean().item()


def conditional():
    """z ~ N(y, 1), x | z ~ N(z, 1), hence x | y ~ N(y, 2), with the exact posterior as guide."""

    def model(x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def guide(x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal((x[:, 0] + y) / 2, 0.5**0.5))

    return model, guide


def test_a_batch_of_two_tensors_gives_conditional_likelihoods():
    model, guide = conditional()
    x, y = X[:, :1], X[:, 1]
    exact = dist.Normal(y, 2**0.5).log_prob(x[:, 0])
    for chunk_size in (None, 7):
        torch.testing.assert_close(log_marginal(model, guide, (x, y), num_samples=20, chunk_size=chunk_size).value, exact)
    data = Data(x, tensors={"y": y}, inputs=("x", "y"))
    figures = evaluate(model, guide, data, importance_samples=50)
    assert figures["log_marginal"].value == pytest.approx(exact.mean().item(), abs=1e-9)
    assert figures["neg_elbo"].value == pytest.approx(-exact.mean().item(), abs=5 * figures["neg_elbo"].standard_error)


def test_a_pair_with_parameters_in_the_store_resumes_bit_for_bit(tmp_path):
    options = {"epochs": 6, "batch_size": 5, "lr": 0.02, "verbose": False}
    fit(NegativeELBO(*functions()), X, **options)
    straight = store()
    checkpoints = Checkpoints(tmp_path)
    pyro.clear_param_store()
    calls = iter(range(100))
    with pytest.raises(TrainingStoppedError):
        fit(NegativeELBO(*functions()), X, **options, checkpoints=checkpoints, stop=lambda: next(calls) >= 7)
    pyro.clear_param_store()
    fit(NegativeELBO(*functions()), X, **options, checkpoints=checkpoints, resume=checkpoints.load())
    resumed = store()
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_copies_are_independent():
    objective = NegativeELBO(make_vae())
    twin = copy.deepcopy(objective)
    x = torch.rand(6, 1, 4, 4)
    before = weights(objective)
    fit(twin, x, epochs=1, verbose=False)
    assert equal(before, weights(objective))
    assert not equal(before, weights(twin))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((nn.Linear(2, 2),), "a module that has methods model and guide; found one Linear"),
        ((Model,), "found the class Model"),
        ((lambda x: None, 3), "guide: expected a Pyro program"),
        ((make_vae(), make_vae()), "such as its method model"),
    ],
)
def test_what_is_no_pair_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        ProgramPair(*arguments)


def test_global_sites_are_refused():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, 0])

    def guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="site 'w' is outside the data plate"):
        NegativeELBO(model, guide)(X)


def test_outside_tensors_stay_live_in_a_compiled_step(traced):
    """A tensor that is neither parameter nor buffer: the graph reads what it holds at each step."""
    level = torch.tensor(1.0, dtype=torch.float64)
    slope = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(1)[0], 1.0))
            pyro.sample("x", dist.Normal(pyro.param("slope", slope) * z + level, 1.0), obs=x[:, 0])

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, 0.7))

    histories = []
    for compile in (False, True):
        pyro.clear_param_store()
        level.fill_(1.0)
        slope = nn.Parameter(torch.ones(1, dtype=torch.float64))
        record = lambda record: level.add_(0.5)  # noqa: E731
        histories.append(
            fit(NegativeELBO(model, guide), X, epochs=5, batch_size=3, compile=compile, verbose=False, on_record=record)
        )
    for a, b in zip(*histories, strict=True):
        assert a.train["loss"] == pytest.approx(b.train["loss"], rel=1e-9)
    assert histories[0][0].train["loss"] != pytest.approx(histories[0][4].train["loss"], rel=1e-3)


def test_a_tensor_that_a_program_writes_to_counts_on(traced):
    calls = torch.zeros((), dtype=torch.float64)
    model, guide = pairs()["module"]

    def counting(x):
        calls.add_(1)
        return model(x)

    fit(NegativeELBO(counting, guide), X, epochs=7, batch_size=6, compile=True, verbose=False)
    assert calls == 7 * -(-len(X) // 6) + 2  # once to find the parameters, once to look at its sites
