"""Compilation of a traced graph to machine code by Inductor."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.engine.modes import UntraceableError
from pyro_vae.engine.runner import Call, Runner
from pyro_vae.engine.tracing import Traced

__all__ = ["MOST_NODES", "Interpreted", "compiled"]

MOST_NODES = 3000  # compilation takes about 20 ms per node


def compiled(traced: Traced, inputs: Sequence[Tensor]) -> Call:
    """Compile the graph for tensors of these shapes and dtypes; it draws noise from torch's own generator.

    Raises:
        UntraceableError: the graph is too large.
        Exception: raised by the compiler.
    """
    if (nodes := len(traced.graph.graph.nodes)) > MOST_NODES:
        raise UntraceableError(
            f"its graph has {nodes:,} operations, which would take {nodes / 50 / 60:.0f} minutes to compile; at most "
            f"{MOST_NODES:,} are compiled"
        )
    return inductor(traced, [t.detach() for t in (*inputs, *traced.outside)])


def inductor(traced: Traced, inputs: Sequence[Tensor]) -> Call:
    """Compile by Inductor and a C++ compiler."""
    import torch._inductor.config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    graph, mode = traced.graph, FakeTensorMode(allow_non_fake_inputs=True)
    for node in graph.graph.nodes:
        node.meta.pop("val", None)  # belongs to the fake mode of the tracer, not to this one
    # pattern_matcher: see _addmm. size_asserts take a third of the time of a small graph; the runner compares the shapes.
    options = {"fallback_random": True, "cpp_wrapper": True, "pattern_matcher": False, "size_asserts": False}
    with torch.no_grad(), torch._inductor.config.patch(options):
        examples = [mode.from_tensor(t) for t in inputs]
        functional = make_fx(
            torch.func.functionalize(graph, remove="mutations"),
            decomposition_table=select_decomp_table(),
            _allow_non_fake_inputs=True,
        )
        with mode:
            functional_graph = functional(*examples)
        constants = _lift_constants(functional_graph)
        examples += [mode.from_tensor(t) for t in constants]
        with tracing(TracingContext(mode)), V.set_fake_mode(mode):
            code: Any = compile_fx_inner(functional_graph, examples, cpp_wrapper=True, is_inference=True)
    if f"steal_from_raw_handles_to_raii_handles(input_handles, {len(examples)})" not in code.source_code:
        raise RuntimeError("the compiled code takes other inputs than the graph")
    entry = next(cell.cell_contents for cell in code.current_callable.__closure__ if callable(cell.cell_contents))
    return _Compiled([*traced.outside, *constants], Runner(entry, 1 + traced.others, traced.numbers))


def _lift_constants(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Lifts constants that are no scalars to inputs; the compiled code would load them in a way of its own."""
    constants: list[Tensor] = []
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        tensor = getattr(graph, node.target)
        if tensor.dim() > 0:
            placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
            place = graph.graph.inserting_after(placeholders[-1]) if placeholders else graph.graph.inserting_before(node)
            with place:
                node.replace_all_uses_with(graph.graph.placeholder(f"constant_{len(constants)}"))
            graph.graph.erase_node(node)
            constants.append(tensor)
    graph.recompile()
    return constants


class _Compiled:
    def __init__(self, others: list[Tensor], runner: Runner) -> None:
        self._others, self._runner = others, runner

    def __call__(self, inputs: Sequence[Tensor], times: int = 1) -> tuple[int, list[float], list[Tensor]]:
        self._runner.take([*inputs, *self._others])
        return self._runner(times)


class Interpreted:
    """A graph that is interpreted, operation by operation, instead of compiled.

    Args:
        graph: a function of the inputs followed by the outside tensors; its first result is the vector of numbers.
        outside: the outside tensors.
    """

    def __init__(self, graph: Callable[..., Sequence[Tensor]], outside: Sequence[Tensor]) -> None:
        self._graph, self._outside = graph, outside

    def __call__(self, inputs: Sequence[Tensor], times: int = 1) -> tuple[int, list[float], list[Tensor]]:
        rows: list[float] = []
        with torch.no_grad():
            for made in range(1, times + 1):
                row, *others = self._graph(*(t.detach() for t in (*inputs, *self._outside)))
                rows += row.tolist()
                if row[0] <= 0 or made == times:
                    return made, rows, others
        raise ValueError(f"times must be at least 1, found {times}.")
