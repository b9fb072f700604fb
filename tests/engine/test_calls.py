"""Calls of a small program: compiled, checked, rolled_back."""

import pytest
import torch
from conftest import compile_by

from pyro_vae.engine.calls import Calls
from pyro_vae.engine.program import NotYetError, Program
from pyro_vae.engine.tracing import NotCompiledWarning


class Walk(Program):
    """A point that walks by noise towards what it is called with, and counts its steps in Python."""

    def __init__(self):
        self.place, self.count, self.eager_calls, self.ready = torch.zeros(2, dtype=torch.float64), 0, 0, True
        self.is_sound = True

    def key(self, call):
        return tuple(call.shape)

    def inputs(self, call):
        return [call]

    def move(self, call):
        self.place.add_(0.1 * (call.mean(0) - self.place) + 0.01 * torch.randn(2, dtype=torch.float64))
        return self.place.square().sum()

    def eager(self, call):
        self.eager_calls += 1
        self.count += 1
        return self.move(call).item()

    def trace(self, call, noted):
        if not self.ready:
            raise NotYetError
        return [self.move(call)], [], None

    def result(self, call, graph, numbers, others):
        return numbers[0]

    def after(self, graph, times, others):
        self.count += times

    def at_once(self, graph):
        return True

    def difference(self, found, expected):
        return "" if found == pytest.approx(expected, rel=1e-9) else f"it gives {found}, not {expected}"

    def state(self):
        return [self.place]

    def save(self):
        return self.count

    def load(self, saved):
        self.count = saved

    def is_finite(self):
        return self.is_sound


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


def walked(number, program=None, calls=None):
    torch.manual_seed(0)
    program = program or Walk()
    step = calls or program.eager
    return [step(X) for _ in range(number)], program, torch.randn(())


def test_calls_are_those_of_the_program_and_checked_at_powers_of_two(traced):
    expected, eager, noise = walked(40)
    program = Walk()
    found, _, same_noise = walked(40, program, Calls(program, what="walked eagerly"))
    assert found == pytest.approx(expected, rel=1e-12)
    assert noise == same_noise
    assert program.count == eager.count == 40
    assert program.eager_calls == 7  # at calls 1, 2, 3, 5, 9, 17, 33


@pytest.mark.parametrize("every", [0, 5])
def test_how_often_it_is_checked(every, traced):
    program = Walk()
    walked(40, program, Calls(program, what="walked eagerly", every=every))
    # 5: at 1, 2, 3, 5, 9, 17, 33, and after five that were not: 15, 23, 29, 39
    assert program.eager_calls == {0: 40, 5: 11}[every]


def test_many_calls_at_once(traced):
    expected, *_ = walked(100)
    program = Walk()
    calls = Calls(program, what="walked eagerly")
    torch.manual_seed(0)
    assert calls.run(X, 100) == pytest.approx(expected, rel=1e-12)
    assert (program.count, program.eager_calls) == (100, 8)


def test_after_begin_the_next_call_is_checked(traced):
    program = Walk()
    calls = Calls(program, what="walked eagerly")
    walked(20, program, calls)
    before = program.eager_calls
    calls.begin()
    calls(X)
    assert program.eager_calls == before + 1


def test_other_keys_wait_and_the_oldest_graph_goes(traced):
    program = Walk()
    calls = Calls(program, what="walked eagerly", patience=3, most=2)
    for rows in (1, 2, 3):
        for number in range(6):
            calls(torch.ones(rows, 2, dtype=torch.float64))
            assert ((rows, 2) in calls.graphs) == (rows == 1 or number >= 2)
    assert list(calls.graphs) == [(2, 2), (3, 2)]


def test_what_cannot_be_traced_yet_is_tried_again(traced):
    program = Walk()
    program.ready = False
    calls = Calls(program, what="walked eagerly")
    calls(X)
    assert not calls.graphs
    program.ready = True
    calls(X)
    assert len(calls.graphs) == 1


def wrong_after(calls_made):
    made = []

    def compiler(graph, inputs):
        def call(*args):
            made.append(1)
            values, *others = graph(*args)
            return values * torch.tensor([1.0, 1.0 + (len(made) > calls_made)], dtype=torch.float64), *others

        return call

    return compiler


@pytest.mark.parametrize("calls_made", [0, 5, 9])
def test_a_wrong_call_is_undone_back_to_the_last_check_that_held(calls_made, monkeypatch):
    compile_by(monkeypatch, wrong_after(calls_made))
    expected, eager, noise = walked(40)
    program = Walk()
    calls = Calls(program, what="walked eagerly")
    with pytest.warns(NotCompiledWarning, match="walked eagerly, not compiled: compiled, it gives") as caught:
        found, _, same_noise = walked(40, program, calls)
    assert len(caught) == 1
    assert calls.reason
    assert found[-1] == pytest.approx(expected[-1], rel=1e-12)
    torch.testing.assert_close(program.place, eager.place, rtol=1e-12, atol=0)
    assert (noise, program.count) == (same_noise, 40)


def test_inputs_that_were_changed_in_place_cannot_be_called_again(monkeypatch):
    compile_by(monkeypatch, wrong_after(9))
    program = Walk()
    calls = Calls(program, what="walked eagerly")
    x = X.clone()

    def walk():
        for _ in range(20):
            calls(x)
            x.add_(0.1)

    with pytest.warns(NotCompiledWarning, match="earlier calls are not re-run, since their inputs have changed"):
        walk()
    assert program.count == 20


def test_what_is_not_sound_is_made_again(traced):
    program = Walk()
    calls = Calls(program, what="walked eagerly")
    walked(20, program, calls)
    program.is_sound = False
    noise = torch.get_rng_state()
    eager_calls = program.eager_calls
    calls.begin()
    torch.set_rng_state(noise)
    calls(X)
    assert program.eager_calls == eager_calls + 2  # the check's, and once more
    assert program.count == 21


def test_an_input_that_is_written_to_is_refused(traced):
    class Writing(Walk):
        def move(self, call):
            call.add_(1)
            return super().move(call)

    program = Writing()
    with pytest.warns(NotCompiledWarning, match="writes to one of its arguments"):
        Calls(program, what="walked eagerly")(X.clone())


def test_a_call_that_draws_other_noise_is_noticed(monkeypatch):
    def compiler(graph, inputs):
        return lambda *args: (torch.rand(1), graph(*args))[1]

    compile_by(monkeypatch, compiler)

    class Still(Walk):
        def move(self, call):
            torch.randn(2)
            self.place.add_(1)
            return self.place.sum()

    program = Still()
    with pytest.warns(NotCompiledWarning, match="draws other random numbers"):
        Calls(program, what="walked eagerly")(X)
