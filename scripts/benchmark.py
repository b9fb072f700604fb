#!/usr/bin/env python
"""The speed of a training step, compared with other implementations, all interleaved in one run.

- training: system A's nets (784-400-20) on the same images by plain PyTorch (DataLoader; data in memory and fused Adam), the
  stock Pyro idiom (DataLoader, SVI, Trace_ELBO, pyro.optim.Adam), Pyro's JitTrace_ELBO, fit's eager and compiled step,
  NumPyro's jitted loop (pip install '.[bench]'), and the step's five large matrix products alone; batches of 128 and 1024,
  1 and 16 latent draws, float32 matrix products at the precisions highest and medium.
- direct: steps of the direct fit (batch 256, 64 draws) written with a (batch, draws, pixels) tensor, and by fit's objective.
- importance: log p of 500 images with K = 500, compared with the decoder's matrix products for as many draws alone.
- start: seconds and peak memory of a process from its start to the end of the first epoch.
- profile: the microseconds of a step by kind, in the stock idiom, the eager and the compiled step.
- scaling: time per image against batch size, hidden width, latent draws and number of images.

The speed of a machine drifts, so compare ratios: each repeat runs all methods in turn, and ratios are computed within a
repeat. Writes benchmark-cpu.md, benchmark-cpu.json and benchmark-cpu.png; parts in --out from an earlier run with the same
settings are not measured again.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import torch
from benchmark_page import Row, markdown, plot, show
from benchmark_ways import (
    COMPILED,
    EAGER,
    FIRST_EPOCHS,
    NUMPYRO,
    PRODUCTS,
    STOCK,
    Case,
    Way,
    numpyro_version,
    ways_to_fit_directly,
    ways_to_train,
    ways_to_weigh,
)

from pyro_vae import CheckpointError, Data, cli, load_data
from pyro_vae._checks import whole_number
from pyro_vae._files import check_writable, read_json
from pyro_vae._options import check_choices, option
from pyro_vae.data.builtin import DATASETS
from pyro_vae.runs.describe import versions
from pyro_vae.runs.folder import processor
from pyro_vae.runs.settings import DataOptions
from pyro_vae.runs.signals import Signals

PARTS = ("training", "direct", "importance", "start", "profile", "scaling")


@dataclass(frozen=True)
class Options(DataOptions):
    parts: tuple[str, ...] = option(PARTS, help=f"of {', '.join(PARTS)}", choices=PARTS, flag="PART", default_text="all")
    dataset: str = option("mnist", help="data", choices=DATASETS[1:])
    repeats: int = option(11, help="of each way")
    out: Path = option(Path("runs/benchmark"), help="folder of the results")

    def __post_init__(self) -> None:
        check_choices(self)
        whole_number("repeats", self.repeats)


def measure(ways: dict[str, Way], repeats: int, precision: str = "highest") -> dict[str, list[float]]:
    """Seconds of each method in each repeat, after two warm-up repeats; the methods are interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    torch.set_float32_matmul_precision(precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JitTrace_ELBO's tracer is deprecated; few draws in log_marginal
        for repeat in range(repeats + 2):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if repeat > 1:
                    seconds[name].append(time.perf_counter() - start)
    torch.set_float32_matmul_precision("highest")
    return seconds


def rows_of(seconds: dict[str, list[float]], images: int, **fields: Any) -> list[Row]:
    """A row for each method: images per second, median and range, and ratios within the repeats."""

    def ratio(name: str, other: str) -> float | None:
        if other not in seconds:
            return None
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    return [
        {
            **fields,
            "variant": name,
            "images_per_second": images / statistics.median(times),
            "spread": [images / max(times), images / min(times)],
            "ratio_to_stock_pyro": ratio(name, STOCK),
            "ratio_to_numpyro": ratio(name, NUMPYRO),
            "ratio_to_products": ratio(name, PRODUCTS),
        }
        for name, times in seconds.items()
    ]


def training(train: Data, repeats: int) -> list[Row]:
    rows = []
    for draws, batch_size in itertools.product((1, 16), (128, 1024)):
        case = Case(train, batch_size, draws, hidden=400, steps=max(4, 12_800 // (batch_size * draws)))
        ways = ways_to_train(case)
        for precision in ("highest", "medium"):
            fields = {"case": f"training, {draws} draw{'s' * (draws > 1)}", "precision": precision, "batch_size": batch_size}
            rows += show(rows_of(measure(ways, repeats, precision), case.steps * batch_size, **fields))
    return rows


def direct(train: Data, repeats: int) -> list[Row]:
    fields = {"case": "direct fit, 64 draws", "precision": "highest", "batch_size": 256}
    return show(rows_of(measure(ways_to_fit_directly(train), repeats), 1280, **fields))


def importance(train: Data, repeats: int) -> list[Row]:
    fields = {"case": "log p(x) with 500 draws", "precision": "highest", "batch_size": 500}
    return show(rows_of(measure(ways_to_weigh(train), repeats), 500, **fields))


def start(dataset: str, data_dir: str | None, repeats: int) -> list[Row]:
    """A new process each: imports, data, one epoch; the compiled one with an empty and with a warm cache."""
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(max(1, repeats // 3)):
        with tempfile.TemporaryDirectory() as cache:
            names = [STOCK, EAGER, COMPILED, COMPILED]
            for name, title in zip(names, [*names[:2], f"{COMPILED}, first time", f"{COMPILED}, again"], strict=True):
                begin = time.perf_counter()
                process = subprocess.run(
                    [sys.executable, "-c", FIRST_EPOCHS[name], dataset, data_dir or ""],
                    env=os.environ
                    | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                memory = int(process.stdout.split()[-1]) / 1024
                results.setdefault(title, []).append((time.perf_counter() - begin, memory))
    rows = []
    for title, pairs in results.items():
        seconds, megabytes = zip(*pairs, strict=True)
        rows.append(
            {
                "case": "start to end of first epoch",
                "variant": title,
                "precision": "highest",
                "batch_size": 128,
                "seconds": statistics.median(seconds),
                "spread": [min(seconds), max(seconds)],
                "peak_memory_mb": statistics.median(megabytes),
            }
        )
        print(
            f"start to end of first epoch  {title:34s} {rows[-1]['seconds']:6.1f} s {rows[-1]['peak_memory_mb']:6.0f} MB",
            flush=True,
        )
    return rows


# The kinds of the profiler's events, in order of matching; the remaining time is that of Python and the dispatcher.
_KINDS = {
    "Adam": ("_fused_adam_", "addcdiv_", "addcmul_", "lerp_", "sqrt"),
    "matrix products": ("mm", "addmm"),
    "noise": ("normal", "bernoulli", "uniform", "rand"),
    "gather, uint8 to float": ("index_select", "aten::stack", "aten::cat"),
    "elementwise and sums": ("aten::", "cpp_fused"),
}


def profile(train: Data, repeats: int) -> list[Row]:
    """Microseconds of a step by kind: kernels by torch's profiler, the remainder by difference to an unprofiled run."""
    import torch._inductor.config
    from torch.profiler import ProfilerActivity

    steps, rows = 100, []
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        ways = ways_to_train(Case(train, 128, draws=1, hidden=400, steps=steps), only=(STOCK, EAGER, COMPILED))
        measure(ways, 1)  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    looks: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(max(3, repeats // 3)), ways.items()):  # side by side, for machines drift
        seconds[name] += measure({name: way}, 1)[name]
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as watched:
            way()
        kinds = dict.fromkeys(_KINDS, 0.0)
        for event in watched.key_averages():
            plain = event.key.removeprefix("aten::").removeprefix("aoti_torch_cpu_").removesuffix("_out")
            for kind, parts in _KINDS.items():
                exact = kind == "matrix products"
                whole = event.key.startswith(("aten::", "aoti_torch", "graph_"))
                if whole and (plain in parts if exact else any(part in event.key for part in parts)):
                    kinds[kind] += event.self_cpu_time_total / steps
                    break
        looks[name].append(kinds)
    for name in ways:
        step = statistics.median(seconds[name]) / steps * 1e6
        kinds = {kind: statistics.median(look[kind] for look in looks[name]) for kind in _KINDS}
        kinds["Python, Pyro, autograd, dispatch"] = step - sum(kinds.values())
        fields = {"case": "profile", "variant": name, "precision": "highest", "batch_size": 128, "microseconds": step}
        rows.append({**fields, "parts": {kind: round(value, 1) for kind, value in kinds.items()}})
        print(f"profile  {name:20s} {step:8.0f} us/step  {rows[-1]['parts']}", flush=True)
    return rows


def scaling(train: Data, repeats: int) -> list[Row]:
    """One of the four varies at a time: batch size, hidden width, latent draws, number of images."""
    rows = []
    usual = {"batch size": 128, "hidden units": 400, "latent draws": 1, "images": len(train)}
    values = {
        "batch size": (16, 32, 64, 128, 256, 512, 1024, 2048),
        "hidden units": (100, 200, 400, 800, 1600),
        "latent draws": (1, 4, 16, 64),
        "images": (1_000, 10_000, len(train)),
    }
    for what, points in values.items():
        for point in points:
            at = usual | {what: point}
            part = train.subset(slice(at["images"]))
            batch_size, draws, hidden = at["batch size"], at["latent draws"], at["hidden units"]
            steps = max(10, 5_000_000 // (batch_size * draws * hidden))  # enough that a check of the compiled one is rare
            ways = ways_to_train(Case(part, batch_size, draws, hidden, steps), only=(STOCK, EAGER, COMPILED))
            fields = {"case": f"scaling, {what}", "at": point, "precision": "highest", "batch_size": batch_size}
            rows += show(rows_of(measure(ways, max(3, repeats // 2)), steps * batch_size, **fields))
    return rows


def machine() -> dict[str, Any]:
    found = versions()
    if (version := numpyro_version()) is not None:
        import jax

        found |= {"numpyro": version, "jax": jax.__version__}
    return {"processor": processor(), "threads": torch.get_num_threads(), "versions": found}


def earlier(path: Path, setting: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run on the same machine with the same settings, if there is one."""
    try:
        found = read_json(path)
        rows = found.pop("rows")
    except (CheckpointError, AttributeError, KeyError):
        return []
    return rows if found == setting else []


def run(options: Options, signals: Signals) -> None:
    train, _ = load_data(options.dataset, data_dir=options.data_dir)
    check_writable(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    found = machine()
    print(f"{found['processor']}, {found['threads']} threads, {found['versions']}", flush=True)
    if "numpyro" not in found["versions"]:
        print("NumPyro is not installed, and is skipped: pip install '.[bench]'", flush=True)
    setting = {**found, "repeats": options.repeats, "dataset": train.name}
    rows = [row for row in earlier(options.out / "benchmark-cpu.json", setting) if row["part"] not in options.parts]
    measures: dict[str, Callable[[], list[Row]]] = {
        "training": lambda: training(train, options.repeats),
        "direct": lambda: direct(train, options.repeats),
        "importance": lambda: importance(train, options.repeats),
        "start": lambda: start(options.dataset, options.data_dir, options.repeats),
        "profile": lambda: profile(train, options.repeats),
        "scaling": lambda: scaling(train, options.repeats),
    }
    for part in options.parts:
        rows += [{"part": part, **row} for row in measures[part]()]
        rows.sort(key=lambda row: PARTS.index(row["part"]))
        # After each part, so that nothing measured is lost.
        (options.out / "benchmark-cpu.json").write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
        (options.out / "benchmark-cpu.md").write_text(markdown(rows, found, options.repeats))
    if {"training", "scaling"} <= {row["part"] for row in rows}:
        plot(rows).savefig(options.out / "benchmark-cpu.png", dpi=110)
    print(f"in {options.out}")


if __name__ == "__main__":
    sys.exit(cli.experiment(Options, run, __doc__, lost="the parts that are measured are kept"))
