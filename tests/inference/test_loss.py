"""A compiled loss module against the module itself, for the same noise."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints

from pyro_vae import compiled
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
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def guide(x):
    pyro.sample("loc", dist.Normal(pyro.param("a", torch.tensor(0.1)), 0.3))
    shape = pyro.param("shape", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("scale", dist.Gamma(shape, 2.0))


def train(wrap, make, steps=30, optimizer=torch.optim.RMSprop, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = wrap(make(), **options)
    loss(X)
    parameters = [*loss.parameters()] or [p.unconstrained() for p in pyro.get_param_store().values()]
    stepper, losses = optimizer(parameters, lr=0.01), []
    for _ in range(steps):
        stepper.zero_grad()
        value = loss(X)
        value.backward()
        stepper.step()
        losses.append(value.item())
    return loss, losses, [p.detach().clone() for p in parameters], torch.randn(())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Trace_ELBO()(model, AutoNormal(model)),
        lambda: TraceMeanField_ELBO(2)(model, AutoNormal(model)),
        lambda: Trace_ELBO()(model, guide),
    ],
    ids=["autoguide", "mean-field", "param store"],
)
def test_same_losses_and_parameters(make):
    _, expected, parameters, noise = train(lambda module: module, make)
    loss, losses, same, same_noise = train(compiled, make)
    assert loss.reason == ""
    assert sum(graph.made for graph in loss._calls.graphs.values()) == 30
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-10, atol=1e-10)
    for one, other in zip(same, parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert noise == same_noise
    assert "30 calls, of which 0" in loss.explain()


class Net(nn.Module):
    """Any module whose call returns a scalar; batch norm changes buffers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, x, weight=1.0):
        return weight * (self.net(x[:, None]) - 1).square().mean()


def test_a_module_of_torch_with_buffers_and_a_weight_that_changes():
    made = []
    for wrap in (lambda module: module, compiled):
        torch.manual_seed(0)
        net = Net()
        loss = wrap(net)
        values = []
        for step in range(30):
            net.zero_grad()
            value = 3 * loss(X, weight=step / 10)
            value.backward()
            values.append((value.item(), *(p.grad.sum().item() for p in net.parameters())))
        made.append((torch.tensor(values), [b.clone().double() for b in net.buffers()]))
    torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-10, atol=1e-10)
    for one, other in zip(made[1][1], made[0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert loss.reason == ""
    assert sum(graph.made for graph in loss._calls.graphs.values()) > 10


def test_evaluation_and_frozen_parameters():
    net = Net()
    loss = compiled(net)
    for _ in range(4):
        loss(X).backward()
    with torch.no_grad():
        assert not loss(X).requires_grad
    net.net[0].weight.requires_grad_(False)
    net.zero_grad()
    for _ in range(12):
        loss(X).backward()
    assert net.net[0].weight.grad is None
    assert net.net[3].weight.grad is not None


def test_a_parameter_that_appears_later_has_its_gradient():
    def growing(x):
        pyro.sample("loc", dist.Normal(pyro.param("a", torch.tensor(0.1)), 1.0))
        if len(x) > 6:
            pyro.factor("f", -pyro.param("b", torch.tensor(2.0)).square(), has_rsample=True)

    loss = compiled(Trace_ELBO()(lambda x: pyro.sample("loc", dist.Normal(0.0, 1.0)), growing))
    pyro.set_rng_seed(0)
    for _ in range(5):
        loss(X)
    for _ in range(12):
        longer = loss(torch.cat([X, X]))
        (gradient,) = torch.autograd.grad(longer, pyro.param("b"))
        assert gradient == pytest.approx(-4.0)


def test_what_cannot_be_compiled_is_eager_with_the_reason():
    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    net = Counting()
    loss = compiled(net)
    loss(X)
    with pytest.warns(NotCompiledWarning, match="the loss runs eagerly, not compiled: it changes calls of Counting"):
        loss(X).backward()
    loss(X).backward()
    assert "calls of Counting" in loss.reason
    with pytest.raises(ValueError, match="expected a module, found function"):
        compiled(model)
    with pytest.raises(ValueError, match="check: expected one of auto, always"):
        compiled(net, check="never")


def test_a_copy_and_a_file_hold_the_module_alone(tmp_path):
    loss = compiled(Net())
    for _ in range(3):
        loss(X)
    again = copy.deepcopy(loss)
    torch.save(loss, tmp_path / "loss.pt")
    loaded = torch.load(tmp_path / "loss.pt", weights_only=False)
    for other in (again, loaded):
        assert not other._calls.graphs
        for _ in range(3):
            value = other(X)
        torch.testing.assert_close(value, other.loss(X))
