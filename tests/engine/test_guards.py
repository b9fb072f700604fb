"""The Python state that a function depends on."""

import cProfile
import types

import pytest
import torch
from torch import nn

from pyro_vae.engine.guards import PythonState, constant
from pyro_vae.engine.modes import UntraceableError

LEVEL = 1.0
TABLE = {"a": [1, 2], "b": 3.0}
SETTINGS = types.SimpleNamespace(beta=1.0, words=["a"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.flag = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), True
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return helper(self.net(x)) * self.count


def helper(x):
    return x * LEVEL * TABLE["b"] * SETTINGS.beta


def recorded(*roots, call):
    state = PythonState(*roots)
    with state.recorded():
        call()
    return state


@pytest.fixture
def restored():
    yield
    globals().update(LEVEL=1.0, TABLE={"a": [1, 2], "b": 3.0}, SETTINGS=types.SimpleNamespace(beta=1.0, words=["a"]))


CHANGES = {
    "global": lambda model: globals().update(LEVEL=2.0),
    "dict": lambda model: TABLE.update(b=4.0),
    "nested": lambda model: TABLE.update(a=[1, 2, 3]),
    "object": lambda model: setattr(SETTINGS, "beta", 2.0),
    "list": lambda model: SETTINGS.words.append("b"),
    "new attribute": lambda model: setattr(SETTINGS, "other", 2.0),
    "flag": lambda model: setattr(model, "flag", False),
    "mode": lambda model: model.net[1].eval(),
    "rate": lambda model: setattr(model.net[1], "p", 0.1),
    "parameter": lambda model: setattr(model.net[0], "weight", nn.Parameter(torch.ones(2, 2))),
    "late parameter": lambda model: model.register_parameter("bias", nn.Parameter(torch.ones(2))),
    "module": lambda model: setattr(model, "net", nn.Identity()),
    "function": lambda model: globals().update(helper=lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_module_has_met_is_compared(change, restored):
    original, model = helper, Model()
    state = recorded(model, call=lambda: model(torch.ones(1, 2)))
    first = state.token()
    assert state.token() == first
    with torch.no_grad():
        model.net[0].weight.add_(1.0)  # tensors are live
    assert state.token() == first
    CHANGES[change](model)
    assert state.token() != first
    globals().update(helper=original)


def test_a_state_that_comes_back_is_known_again():
    model = Model()
    state = recorded(model, call=lambda: model(torch.ones(1, 2)))
    first = state.token()
    model.eval()
    second = state.token()
    model.train()
    assert (state.token(), second != first) == (first, True)
    model.eval()
    assert state.token() == second


def test_closures_and_methods_and_partials():
    import functools

    factor = 1.0

    class Plain:
        def __init__(self):
            self.scale = 2.0

        def run(self, x):
            return x * self.scale * factor

    plain = Plain()
    for root in (plain.run, functools.partial(plain.run), lambda x: plain.run(x)):
        factor, plain.scale = 1.0, 2.0
        state = recorded(root, call=lambda root=root: root(torch.ones(1)))
        first = state.token()
        factor = 3.0
        second = state.token()
        plain.scale = 5.0
        assert len({first, second, state.token()}) == 3


def test_what_changes_as_it_goes_is_named():
    calls = []

    def function(x):
        calls.append(1)
        return x

    state = PythonState(function)
    before = state.snapshot()
    with state.recorded():
        function(torch.ones(1))
    assert state.changes(before) == ["the variable calls"]


def test_a_profiler_that_runs_goes_on():
    profiler = cProfile.Profile()
    profiler.enable()
    recorded(helper, call=lambda: helper(torch.ones(1)))
    for _ in range(7):
        helper(torch.ones(1))
    profiler.disable()
    assert max(each.callcount for each in profiler.getstats() if getattr(each.code, "co_name", "") == "helper") >= 7


def test_objects_that_a_call_makes_are_no_state():
    class Made:
        def __init__(self):
            self.count = 0

        def add(self):
            self.count += 1
            self.other = 2
            return self.count

    def function(x):
        made = Made()
        return x * made.add() * made.add()

    state = PythonState(function)
    before = state.snapshot()
    with state.recorded():
        function(torch.ones(1))
    assert state.changes(before) == []


def test_buffers_that_are_bound_anew_go_back_with_the_new_value():
    model = Model()
    old = model.count
    state = recorded(model, call=lambda: model(torch.ones(1, 2)))
    model.count = torch.tensor(3.0)
    state.rebind()
    assert model.count is old
    assert old == 3.0
    model.count = torch.zeros(2)
    with pytest.raises(UntraceableError, match="buffer count changes its shape"):
        state.rebind()


def test_numbers_are_compared_by_value_and_type():
    assert constant(1) != constant(1.0)
    assert constant(True) != constant(1)
    assert constant(float("nan")) == constant(float("nan"))
    assert constant([1, (2.0, "a")]) == constant([1, (2.0, "a")])
    assert constant([1, (2.0, "a")]) != constant([1, (2.5, "a")])
    assert constant(torch.ones(1)) != constant(torch.ones(1))
