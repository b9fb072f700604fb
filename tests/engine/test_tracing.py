"""A function as a graph: what it does again, what is guarded, what it leaves as found."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vae.engine.compiling import MOST_NODES, Interpreted, compiled
from pyro_vae.engine.modes import UntraceableError
from pyro_vae.engine.tracing import trace


def traced_call(function, inputs=()):
    traced = trace(function, inputs)
    return traced, Interpreted(traced.graph, traced.outside)


def test_outside_tensors_stay_live():
    level, net = torch.tensor(2.0), nn.Linear(1, 1)
    x = torch.ones(3, 1)

    def function(noted):
        return [(net(x) * level).sum()], [x + level]

    traced, call = traced_call(function, [x])
    assert traced.inputs == 1
    for y in (x, x + 1):
        level.add_(1.0)
        with torch.no_grad():
            net.weight.add_(0.5)
        made, row, (other,) = call([y])
        assert (made, row[0]) == (1, 1.0)
        assert row[1] == pytest.approx((net(y) * level).sum().item())
        torch.testing.assert_close(other, y + level)


def test_what_tracing_changes_is_restored_and_done_by_the_graph():
    count, norm = torch.zeros(3), nn.BatchNorm1d(2)
    before = [b.clone() for b in norm.buffers()]
    x = torch.randn(5, 2)

    def function(noted):
        count[1:].add_(torch.rand(2))  # by a view
        return [norm(x).sum()], []

    torch.manual_seed(0)
    noise = torch.get_rng_state()
    traced, call = traced_call(function, [x])
    assert torch.equal(torch.get_rng_state(), noise)
    assert torch.equal(count, torch.zeros(3))
    assert all(map(torch.equal, norm.buffers(), before))
    written = [traced.outside[place - 1] for place in traced.written]
    assert {id(t) for t in written} >= {id(count), id(norm.running_mean), id(norm.num_batches_tracked)}
    call([x], 4)
    assert (count > 0).tolist() == [False, True, True]
    assert norm.num_batches_tracked == 4


def test_a_guard_that_does_not_hold_changes_nothing():
    limit, total = torch.tensor(2.5), torch.zeros(())

    def function(noted):
        total.add_(1)
        return [total * (2 if total < limit else 1)], []

    traced, call = traced_call(function)
    assert len(traced.guards) == 1
    assert "test_tracing.py" in traced.guards[0]
    made, rows, _ = call([], 5)  # 1, 2, and no third
    assert made == 3
    assert rows == [1.0, 2.0, 1.0, 4.0, 0.0, 6.0]
    assert total == 2
    limit.fill_(10)
    assert call([])[1][0] == 1.0
    assert total == 3


@pytest.mark.parametrize(
    ("take", "same", "other"),
    [
        (lambda t: float(t[0]), [1.0, 5.0], [2.0, 5.0]),
        (lambda t: float("nan") if t[0].isnan() else 1.0, [float("nan"), 1.0], [1.0, 1.0]),
        (lambda t: len(t[t > 2]), [1.0, 7.0], [7.0, 7.0]),
        (lambda t: len(t.nonzero()), [1.0, 0.0], [1.0, 1.0]),
        (lambda t: t.masked_select(t > 2).sum(), [1.0, 3.0], [4.0, 3.0]),
        (lambda t: torch.equal(t, torch.tensor([1.0, 5.0])), [1.0, 5.0], [1.0, 6.0]),
    ],
)
def test_values_that_python_takes_are_guarded(take, same, other):
    x = torch.tensor(same)
    _, call = traced_call(lambda noted: ([x.sum() + take(x)], []), [x])
    assert call([torch.tensor(same)])[1][0] == 1.0
    assert call([torch.tensor(other)])[1][0] == 0.0


def test_writes_by_a_mask_are_guarded():
    x = torch.tensor([1.0, -1.0, 2.0])

    def function(noted):
        y = x.clone()
        y[y < 0] = 0.0
        return [y.sum()], []

    _, call = traced_call(function, [x])
    assert call([torch.tensor([5.0, -2.0, 1.0])])[1] == [1.0, 6.0]
    assert call([torch.tensor([-5.0, -2.0, 1.0])])[1][0] == 0.0


def test_backward_is_noted_and_the_loss_stays_a_tensor():
    from pyro.infer import ELBO

    class Own(ELBO):
        def _get_trace(self, *args):
            raise NotImplementedError

        def loss(self, w):
            (3 * w).backward()
            return 1.0 + (w * 2).item()

    w = torch.tensor(2.0, requires_grad=True)

    def function(noted):
        loss = Own().loss(w)
        (gradient,) = torch.autograd.grad(sum(noted), w)
        return [loss], [gradient]

    _, call = traced_call(function)
    assert w.grad is None
    with torch.no_grad():
        w.fill_(5.0)
    _, row, (gradient,) = call([])
    assert row == [1.0, 11.0]
    assert gradient == 3.0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.tolist()[0], r"tolist\(\)"),
        (lambda x: x.numpy()[0], r"numpy\(\)"),
        (lambda x: float(np.asarray(x)[0]), "NumPy"),
        (lambda x: x.unique().sum(), "_unique2"),
        (lambda x: x.sum() + random.random(), "Python's or NumPy's random numbers"),
        (lambda x: x.sum() + np.random.rand(), "Python's or NumPy's random numbers"),  # noqa: NPY002
    ],
)
def test_what_cannot_be_traced(function, reason):
    x = torch.ones(3)
    with pytest.raises(UntraceableError, match=reason):
        trace(lambda noted: ([x.sum() * function(x)], []), [x])


def test_too_large_a_graph_is_not_compiled():
    x = torch.ones(())

    def function(noted):
        y = x
        for _ in range(MOST_NODES):
            y = y + 1
        return [y], []

    with pytest.raises(UntraceableError, match="has 3,0.. operations, which would take 1 minutes to compile"):
        compiled(trace(function, [x]), [x])


def test_compiled_code_is_called_once_or_many_times_and_ends_where_a_guard_fails():
    """By Inductor: noise, constants that are no single number, inputs whose storage changes, other results, errors."""
    total, table = torch.zeros(2), [1.0, 2.0]
    x = torch.tensor([1.0, 1.0])

    def function(noted):
        total.add_(x * torch.tensor(table) + 0 * torch.randn(2))
        if total[0] > 5:
            total.fill_(-1)
        return [total.sum()], [total + x]

    traced = trace(function, [x])
    call, interpreted = compiled(traced, [x]), Interpreted(traced.graph, traced.outside)
    for each in (interpreted, call):
        total.zero_()
        torch.manual_seed(1)
        assert each([x])[:2] == (1, [1.0, 3.0])
        made, rows, (other,) = each([x + 1])
        assert rows == [1.0, 9.0]
        assert other.tolist() == [5.0, 8.0]
        total.data = torch.zeros(2)
        made, rows, _ = each([x], 20)
        assert made == 6
        assert rows[::2] == [1.0] * 5 + [0.0]
        assert total.tolist() == [5.0, 10.0]
    with pytest.raises(RuntimeError):  # of the compiled code: an input of another shape
        call([torch.ones(3)])
