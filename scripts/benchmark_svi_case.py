"""One case of benchmark_svi.py, in this process: python benchmark_svi_case.py CASE EXAMPLES STEPS DTYPE.

Prints a line of JSON, all that is known so far, before each of its stages and at the end, so that nothing is lost of a case
that crashes, or that is ended at its time limit.
"""

import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import matplotlib

matplotlib.use("agg")  # before the examples, which import pyplot

import pyro
import torch
from benchmark_svi_examples import Case, Examples, Program
from pyro.infer import SVI

from pyro_vae import CompiledSVI

REPEATS, SECONDS = 5, 0.3  # of interleaved blocks of steps; of each


def made(case: Case, load: Examples, dtype: torch.dtype) -> Program:
    """The example, from the same seed, in an empty store of parameters."""
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    pyro.settings.set(module_local_params=False)
    pyro.set_rng_seed(0)
    program = case.build(load)
    pyro.set_rng_seed(1)
    return program


def losses(svi: Any, program: Program, steps: int) -> torch.Tensor:
    return torch.tensor([float(program.step(svi, number)) for number in range(steps)], dtype=torch.float64)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative difference; NaN in both is none."""
    both = found.isnan() & expected.isnan() | (found == expected)
    return float(((found - expected).abs() / expected.abs()).masked_fill(both, 0.0).max())


def rates(ways: dict[str, Callable[[int], Any]]) -> dict[str, list[float]]:
    """Steps per second of each way in each repeat; a way makes as many steps as it is told."""
    counts, kept = {}, [(p, p.detach().clone()) for p in pyro.get_param_store()._params.values()]
    for name, way in ways.items():
        few, start = 3, time.perf_counter()
        way(few)
        counts[name] = max(2, min(1000, int(SECONDS * few / (time.perf_counter() - start))))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            with torch.no_grad():  # thousands of steps on few data would end where distributions are degenerate
                for parameter, value in kept:
                    parameter.copy_(value)
            start = time.perf_counter()
            way(counts[name])
            found[name].append(counts[name] / (time.perf_counter() - start))
    return found


def timing(svi: CompiledSVI, program: Program, steps: int) -> dict[str, Any]:
    """Medians of both, interleaved, on the same parameters and optimiser; ratios within the repeats."""
    stock, numbers = SVI(program.model, program.guide, program.optim, program.loss), itertools.count(steps)

    def stepping(one: Any) -> Callable[[int], Any]:
        return lambda count: [program.step(one, next(numbers)) for _ in range(count)]

    ways = {"stock": stepping(stock), "compiled": stepping(svi)}
    if program.constant:
        arguments: Any = program.arguments
        keywords: Any = program.keywords or {}
        ways["run"] = lambda count: svi.run(count, *arguments, progress_bar=False, **keywords)
    found = rates(ways)
    row = {name: statistics.median(values) for name, values in found.items()}
    for name in found.keys() - {"stock"}:
        row[f"ratio_{name}"] = statistics.median(a / b for a, b in zip(found[name], found["stock"], strict=True))
    return row


def measure(case: Case, load: Examples, steps: int, dtype: torch.dtype, say: Callable[..., None]) -> None:
    """Say all that is measured."""
    say(stage="stock SVI")
    program = made(case, load, dtype)
    say(dtype=str(torch.get_default_dtype()).removeprefix("torch."))
    expected = losses(SVI(program.model, program.guide, program.optim, program.loss), program, steps)
    say(stage="compiling, and compiled steps")
    program = made(case, load, dtype)
    svi = CompiledSVI(program.model, program.guide, program.optim, program.loss)
    found = losses(svi, program, steps)
    graphs = svi._calls.graphs.values()
    say(
        difference=difference(found, expected),
        reason=svi.reason.replace(f"{load.folder}/", ""),
        compile_seconds=svi._calls.seconds,
        compiled_steps=sum(graph.made - graph.failed for graph in graphs),
        operations=[len(graph.traced.graph.graph.nodes) for graph in graphs],
    )
    if dtype == torch.float32:
        say(stage="timing")
        say(**timing(svi, program, steps))
    say(stage="done", reason=svi.reason.replace(f"{load.folder}/", ""))


def main(cases: dict[str, Case], name: str, folder: str, steps: str, dtype: str) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")  # of the examples; why steps are not compiled is asked for
    known: dict[str, Any] = {}

    def say(**more: Any) -> None:
        known.update(more)
        print(json.dumps(known), flush=True)

    try:
        measure(cases[name], Examples(Path(folder)), int(steps), getattr(torch, dtype), say)
    except ModuleNotFoundError as error:
        say(stage="not run", reason=f"the package {error.name} is not installed")


if __name__ == "__main__":
    from benchmark_svi_nets import CASES

    main(CASES, *sys.argv[1:])
