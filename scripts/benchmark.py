#!/usr/bin/env python
"""How fast a step of training is, against the other ways to write it, all interleaved in one run.

- training: system A's nets (784-400-20) on the same images by plain PyTorch (DataLoader; data in memory and fused Adam), the
  stock Pyro idiom (DataLoader, SVI, Trace_ELBO, pyro.optim.Adam), Pyro's JitTrace_ELBO, fit's eager and compiled step,
  NumPyro's jitted loop (pip install '.[bench]'), and the step's five large matrix products alone; batches of 128 and 1024,
  1 and 16 latent draws, float32 matrix products at the precisions highest and medium.
- direct: steps of the direct fit (batch 256, 64 draws) written with a (batch, draws, pixels) tensor, and by fit's objective.
- importance: log p of 500 images with K = 500, against the decoder's matrix products for as many draws alone.
- start: seconds and peak memory of a process from its start to the end of the first epoch.
- profile: where the microseconds of a step go, in the stock idiom, the eager and the compiled step.
- scaling: time per image against batch size, hidden width, latent draws and number of images.

Machines drift, so read the ratios: each repeat runs all ways in turn, and ratios are taken within the repeat. Writes
benchmark-cpu.md, benchmark-cpu.json and benchmark-cpu.png; parts that --out holds from an earlier run with the same settings
are kept.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import pyro
import pyro.optim
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import (
    VAE,
    Data,
    DataError,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    Objective,
    load_data,
    load_preset,
    log_marginal,
)
from pyro_vae.estimates.importance import CompiledWeights
from pyro_vae.estimates.psis import Accumulator
from pyro_vae.models.programs import ProgramPair
from pyro_vae.runs.folder import processor
from pyro_vae.training.compiled_step import CompiledStep
from pyro_vae.training.step import EagerStep

SETTINGS = load_preset("bernoulli-z20")
STOCK, PRODUCTS, EAGER, COMPILED = "stock Pyro", "matrix products alone", "pyro_vae eager", "pyro_vae compiled"
NUMPYRO = "NumPyro, jitted loop"
Way = Callable[[], object]
Row = dict[str, Any]


def build(train: Data, hidden: int) -> VAE:
    return load_preset("bernoulli-z20", hidden=(hidden,)).build_vae(train.event_shape)


def our_steps(kind: type[EagerStep], objective: Objective, train: Data, batches: Iterator[Tensor], steps: int) -> Way:
    """So many of fit's steps on the next batches, begun once per epoch's worth of images, as fit begins its epochs."""
    step = kind(objective, train, torch.optim.Adam(objective.parameters(), lr=1e-3, fused=True))
    left = 0  # images, of the epoch

    def run() -> None:
        nonlocal left
        with pyro.validation_enabled(False):
            for index in itertools.islice(batches, steps):
                if left < len(index):
                    step.begin()
                    left = len(train)
                step(index)
                left -= len(index)
            step.end()

    return run


def ways_to_train(
    train: Data, *, batch_size: int, draws: int, hidden: int, steps: int, only: tuple[str, ...]
) -> dict[str, Way]:
    """Each way makes so many steps of training on random batches, and goes on where it was when called again."""
    (images,) = train.batch(torch.arange(len(train)))
    many = {"num_particles": draws, "vectorize_particles": draws > 1, "max_plate_nesting": 1}

    def batches() -> Any:
        while True:
            yield from torch.randperm(len(train))[: len(train) // batch_size * batch_size].split(batch_size)

    def loaded() -> Any:
        loader = DataLoader(TensorDataset(images), batch_size=batch_size, shuffle=True, drop_last=True)
        while True:
            for (x,) in loader:
                yield x

    def plain(source: Any, *, fused: bool) -> Way:
        vae = build(train, hidden)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=fused)

        def step() -> None:
            x = next(source)
            loc, log_variance = vae.encoder(x)
            z = loc + torch.randn(draws, *loc.shape) * (0.5 * log_variance).exp()
            logits = vae.decoder(z.flatten(0, 1)).unflatten(0, (draws, -1))
            reconstruction = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum") / draws
            kl = -0.5 * (1 + log_variance - loc**2 - log_variance.exp()).sum()
            loss = (reconstruction + kl) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def run() -> None:
            for _ in range(steps):
                step()

        return run

    def pyro_svi(elbo: type[Trace_ELBO], **options: Any) -> Way:
        vae = build(train, hidden)
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo(**many, **options))
        source = loaded()
        return lambda: [svi.step(next(source)) for _ in range(steps)]

    def ours(kind: type[EagerStep]) -> Way:
        return our_steps(kind, NegativeELBO(build(train, hidden), num_particles=draws), train, batches(), steps)

    def products() -> Way:
        pixels = train.event_shape.numel()
        first, last = torch.randn(hidden, pixels), torch.randn(pixels, hidden)
        flat, code, source = images.flatten(1), torch.randn(batch_size * draws, hidden), batches()

        def run() -> None:
            for _ in range(steps):
                x = flat[: len(next(source))]
                h = x @ first.T
                h.T @ x
                y = code @ last.T
                y.T @ code
                y @ last

        return run

    makers: dict[str, Callable[[], Way]] = {
        "plain PyTorch, DataLoader": lambda: plain(loaded(), fused=False),
        "plain PyTorch, in memory, fused Adam": lambda: plain((images[i] for i in batches()), fused=True),
        STOCK: lambda: pyro_svi(Trace_ELBO),
        "Pyro, JitTrace_ELBO": lambda: pyro_svi(JitTrace_ELBO, ignore_jit_warnings=True),
        EAGER: lambda: ours(EagerStep),
        COMPILED: lambda: ours(CompiledStep),
        NUMPYRO: lambda: numpyro_loop(train, batch_size=batch_size, draws=draws, hidden=hidden, steps=steps),
        PRODUCTS: products,
    }
    if numpyro_version() is None:
        del makers[NUMPYRO]
    return {name: make() for name, make in makers.items() if not only or name in only}


def numpyro_version() -> str | None:
    try:
        import numpyro
    except ImportError:
        return None
    return str(numpyro.__version__)


def numpyro_loop(train: Data, *, batch_size: int, draws: int, hidden: int, steps: int) -> Way:
    """The same model and guide in NumPyro, its whole loop one jitted scan; images on its device as uint8."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    pixels, latent_dim = train.event_shape.numel(), SETTINGS.latent_dim
    data = jnp.asarray(train.x.flatten(1).numpy())

    def dense(name: str, x: Any, inputs: int, outputs: int) -> Any:
        def init(key: Any, *size: int) -> Any:
            return jax.random.uniform(key, size, minval=-(inputs**-0.5), maxval=inputs**-0.5)

        weight = numpyro.param(f"{name}.weight", lambda key: init(key, inputs, outputs))
        return x @ weight + numpyro.param(f"{name}.bias", lambda key: init(key, outputs))

    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent_dim), 1.0).to_event(1))
            h = jax.nn.relu(dense("decoder.0", z, latent_dim, hidden))
            logits = dense("decoder.1", h, hidden, pixels)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        h = jax.nn.relu(dense("encoder.0", x, pixels, hidden))
        loc, log_variance = jnp.split(dense("encoder.1", h, hidden, 2 * latent_dim), 2, -1)
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_variance)).to_event(1))

    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO(num_particles=draws))

    def loop(state: Any, key: Any) -> Any:
        index = jax.random.randint(key, (steps, batch_size), 0, len(data))
        return jax.lax.scan(lambda state, i: svi.update(state, data[i].astype(jnp.float32) / 255), state, index)

    run = jax.jit(loop)
    now = {"state": svi.init(jax.random.PRNGKey(0), jnp.zeros((batch_size, pixels))), "key": jax.random.PRNGKey(1)}

    def way() -> None:
        now["key"], key = jax.random.split(now["key"])
        now["state"], losses = run(now["state"], key)
        losses.block_until_ready()

    return way


def direct(train: Data, repeats: int) -> list[Row]:
    vae = build(train, 400)
    source = torch.randperm(len(train))[:1280].split(256)

    def large_tensor(objective: NegativeDirectLogLikelihood, x: Tensor) -> Tensor:
        log_p = objective.vae.decode(objective.z).log_prob(x.unsqueeze(1))  # (batch, draws), by (batch, draws, pixels)
        return -(log_p.logsumexp(1) - math.log(len(objective.z))).mean()

    def large() -> None:
        for index in source:
            optimizer.zero_grad()
            large_tensor(objective, *train.batch(index)).backward()
            optimizer.step()

    def ours(kind: type[EagerStep]) -> Way:
        objective = NegativeDirectLogLikelihood(build(train, 400))
        return our_steps(kind, objective, train, itertools.cycle(source), len(source))

    objective = NegativeDirectLogLikelihood(vae)
    optimizer = torch.optim.Adam(vae.decoder.parameters(), fused=True)
    ways = {"(batch, draws, pixels) tensor": large, EAGER: ours(EagerStep), COMPILED: ours(CompiledStep)}
    fields = {"case": "direct fit, 64 draws", "precision": "highest", "batch_size": 256}
    return show(rows_of(measure(ways, repeats), 1280, **fields))


def importance(train: Data, repeats: int) -> list[Row]:
    vae = build(train, 400).eval()
    (x,) = train.batch(torch.arange(500))
    first, first_bias, second, second_bias = vae.decoder.parameters()

    def products() -> None:
        with torch.no_grad():
            for _ in range(50):  # 50 x 5,000 = 500 images x 500 draws
                h = F.linear(torch.randn(5000, vae.latent_dim), first, first_bias)
                F.linear(h, second, second_bias)

    def marginal() -> None:
        log_marginal(vae.model, vae.guide, x, num_samples=500)

    weigh = CompiledWeights(ProgramPair(vae), (500, 20))

    def compiled() -> None:  # as log_marginal does it, but compiled once for all repeats
        with torch.no_grad():
            for images in x.split(20):
                accumulator = Accumulator(500)
                accumulator.add(weigh((images,), 500))
                accumulator.figures()

    ways: dict[str, Way] = {PRODUCTS: products, "log_marginal": marginal, "log_marginal, compiled": compiled}
    fields = {"case": "log p(x) with 500 draws", "precision": "highest", "batch_size": 500}
    return show(rows_of(measure(ways, repeats), 500, **fields))


def measure(ways: dict[str, Way], repeats: int, precision: str = "highest") -> dict[str, list[float]]:
    """Seconds of each way in each repeat, after two to warm up; the ways take turns."""
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
    """A row for each way: images per second, median and spread, and ratios within the repeats."""

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
    for draws in (1, 16):
        for batch_size in (128, 1024):
            steps = max(4, 12_800 // (batch_size * draws))
            pyro.clear_param_store()
            ways = ways_to_train(train, batch_size=batch_size, draws=draws, hidden=400, steps=steps, only=())
            for precision in ("highest", "medium"):
                fields = {
                    "case": f"training, {draws} draw{'s' * (draws > 1)}",
                    "precision": precision,
                    "batch_size": batch_size,
                }
                rows += show(rows_of(measure(ways, repeats, precision), steps * batch_size, **fields))
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
            pyro.clear_param_store()
            ways = ways_to_train(
                part, batch_size=batch_size, draws=draws, hidden=hidden, steps=steps, only=(STOCK, EAGER, COMPILED)
            )
            fields = {"case": f"scaling, {what}", "at": point, "precision": "highest", "batch_size": batch_size}
            rows += show(rows_of(measure(ways, max(3, repeats // 2)), steps * batch_size, **fields))
    return rows


# What the profiler's events belong to, first match first; what it sees nothing of is Python's and the dispatcher's.
_KINDS = {
    "Adam": ("_fused_adam_", "addcdiv_", "addcmul_", "lerp_", "sqrt"),
    "matrix products": ("mm", "addmm"),
    "noise": ("normal", "bernoulli", "uniform", "rand"),
    "gather, uint8 to float": ("index_select", "aten::stack", "aten::cat"),
    "elementwise and sums": ("aten::", "cpp_fused"),
}


def profile(train: Data, repeats: int) -> list[Row]:
    """Microseconds of a step by kind: of kernels by torch's profiler, of all the rest by difference to an unwatched run."""
    import torch._inductor.config
    from torch.profiler import ProfilerActivity

    steps, rows = 100, []
    names = (STOCK, EAGER, COMPILED)
    pyro.clear_param_store()
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        ways = ways_to_train(train, batch_size=128, draws=1, hidden=400, steps=steps, only=names)
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


_STARTS = {
    STOCK: """
loader = DataLoader(TensorDataset(*train.batch(torch.arange(len(train)))), batch_size=128, shuffle=True)
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
for (x,) in loader:
    svi.step(x)
""",
    EAGER: "fit(NegativeELBO(vae), train, epochs=1, compile=False, verbose=False)",
    COMPILED: "fit(NegativeELBO(vae), train, epochs=1, compile=True, verbose=False)",
}
_PROCESS = """
import sys
import pyro, pyro.optim, torch
from pyro.infer import SVI, Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset
from pyro_vae import NegativeELBO, fit, load_data, load_preset
train, _ = load_data(sys.argv[1], data_dir=sys.argv[2] or None)
vae = load_preset("bernoulli-z20").build_vae(train.event_shape)
{way}
with open("/proc/self/status") as status:  # not getrusage, which counts the memory of the parent before exec
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def start(dataset: str, data_dir: str | None, repeats: int) -> list[Row]:
    """A fresh process each: imports, data, one epoch; the compiled one with an empty cache, and with the one it left."""
    results: dict[str, list[tuple[float, float]]] = {}
    for _ in range(max(1, repeats // 3)):
        with tempfile.TemporaryDirectory() as cache:
            names = [STOCK, EAGER, COMPILED, COMPILED]
            for name, title in zip(names, [*names[:2], f"{COMPILED}, first time", f"{COMPILED}, again"], strict=True):
                begin = time.perf_counter()
                process = subprocess.run(
                    [sys.executable, "-c", _PROCESS.format(way=_STARTS[name]), dataset, data_dir or ""],
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


def show(rows: list[Row]) -> list[Row]:
    """Print rows of one case, and return them."""
    first = rows[0]
    at = f" = {first['at']:,}" if "at" in first else ""
    print(f"{first['case']}{at}, batch {first['batch_size']}, {first['precision']}", flush=True)
    for row in rows:
        ratios = [f"{row[key]:6.2f} x {name}" for key, name in _RATIOS.items() if row[key] is not None]
        print(f"  {row['variant']:38s} {row['images_per_second']:10,.0f} images/s  {'  '.join(ratios)}", flush=True)
    return rows


_RATIOS = {"ratio_to_stock_pyro": "stock Pyro", "ratio_to_numpyro": "NumPyro", "ratio_to_products": "products"}


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| way | images per second | from ... to | of stock Pyro | of NumPyro | of the products |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, high = row["spread"]
        ratios = " | ".join("" if row[key] is None else f"{row[key]:.2f}" for key in _RATIOS)
        lines.append(f"| {row['variant']} | {row['images_per_second']:,.0f} | {low:,.0f} ... {high:,.0f} | {ratios} |")
    return lines


def markdown(rows: list[Row], machine: dict[str, Any], repeats: int) -> str:
    lines = [
        "# Speed on a CPU",
        "",
        f"{machine['processor']}, {machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f". `python scripts/benchmark.py`, {repeats} repeats in which all ways take turns: medians, and the slowest and "
        "fastest repeat. Ratios are medians of the ratios within a repeat: higher is faster.",
    ]
    if "numpyro" not in machine["versions"]:
        lines += ["", "NumPyro was not there: `pip install '.[bench]'`."]
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not row["case"].startswith(("scaling", "start", "profile")):
            cases.setdefault((row["case"], row["batch_size"], row["precision"]), []).append(row)
    for (case, batch_size, precision), part in cases.items():
        lines += ["", f"## {case[0].upper()}{case[1:]}, batch {batch_size}, precision {precision}", "", *table(part)]
    if begins := [row for row in rows if row["case"].startswith("start")]:
        lines += ["", "## From the start of a process to the end of the first epoch, batch 128", ""]
        lines += ["| way | seconds | from ... to | peak memory, MB |", "|---|--:|--:|--:|"]
        for row in begins:
            low, high = row["spread"]
            lines.append(
                f"| {row['variant']} | {row['seconds']:.1f} | {low:.1f} ... {high:.1f} | {row['peak_memory_mb']:,.0f} |"
            )
    if profiles := [row for row in rows if row["case"] == "profile"]:
        lines += ["", "## Where the microseconds of a step go, batch 128", ""]
        lines += [f"| | {' | '.join(row['variant'] for row in profiles)} |", "|---" + "|--:" * len(profiles) + "|"]
        for kind in profiles[0]["parts"]:
            lines.append(f"| {kind} | {' | '.join(format(row['parts'][kind], ',.0f') for row in profiles)} |")
        lines.append(f"| **a step** | {' | '.join(format(row['microseconds'], ',.0f') for row in profiles)} |")
    for what in dict.fromkeys(row["case"] for row in rows if row["case"].startswith("scaling")):
        part = [row for row in rows if row["case"] == what]
        names = list(dict.fromkeys(row["variant"] for row in part))
        lines += ["", f"## Time per image against {what.split(', ')[1]}, microseconds", ""]
        lines += [
            f"| {what.split(', ')[1]} | {' | '.join(names)} | compiled / stock Pyro |",
            "|--:" * (len(names) + 2) + "|",
        ]
        for point in dict.fromkeys(row["at"] for row in part):
            at = {row["variant"]: row for row in part if row["at"] == point}
            times = " | ".join(f"{1e6 / at[name]['images_per_second']:.1f}" for name in names)
            lines.append(f"| {point:,} | {times} | {at[COMPILED]['ratio_to_stock_pyro']:.1f} times as fast |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(12, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    colors = {STOCK: "tab:orange", EAGER: "tab:cyan", COMPILED: "tab:blue"}
    for axes, batch_size in zip(grid[0], (128, 1024), strict=True):
        part = [
            row
            for row in rows
            if (row["case"], row["batch_size"], row["precision"]) == ("training, 1 draw", batch_size, "highest")
        ][::-1]
        for place, row in enumerate(part):
            low, high = row["spread"]
            value = row["images_per_second"]
            error = [[value - low], [high - value]]
            axes.barh(place, value, xerr=error, color=colors.get(row["variant"], "lightgray"), ecolor="gray")
            axes.text(500, place, f"{value:,.0f}", va="center", ha="left")
        axes.set_yticks(range(len(part)), [row["variant"] for row in part])
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("images per second")
        axes.set_title(f"784-400-20, batches of {batch_size:,}")
    for axes, what in zip(grid[1], ("batch size", "latent draws"), strict=True):
        part = [row for row in rows if row["case"] == f"scaling, {what}"]
        for name in dict.fromkeys(row["variant"] for row in part):
            points = [(row["at"], 1e6 / row["images_per_second"]) for row in part if row["variant"] == name]
            axes.loglog(*zip(*points, strict=True), "o-", label=name, color=colors[name])
        at = sorted({row["at"] for row in part})
        axes.set_xticks(at, [str(value) for value in at])
        low, high = axes.get_ylim()
        ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5) if low <= digit * 10**power <= high]
        axes.set_yticks(ticks, [f"{value:,}" for value in ticks])
        axes.minorticks_off()
        axes.set_xlabel(what)
        axes.set_ylabel("microseconds per image")
        axes.legend()
    return figure


def machine() -> dict[str, Any]:
    versions = {"torch": torch.__version__, "pyro-ppl": pyro.__version__, "python": platform.python_version()}
    if (version := numpyro_version()) is not None:
        import jax

        versions |= {"numpyro": version, "jax": jax.__version__}
    return {"processor": processor(), "threads": torch.get_num_threads(), "versions": versions}


def earlier(path: Path, setting: dict[str, Any]) -> list[Row]:
    """Rows that an earlier run on the same machine, with the same settings, has left; none where there is no such run."""
    try:
        found = json.loads(path.read_text())
        rows = found.pop("rows")
    except (OSError, ValueError, AttributeError, KeyError):
        return []
    return rows if found == setting else []


PARTS = ("training", "direct", "importance", "start", "profile", "scaling")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion-mnist", "kmnist", "digits"))
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    parser.add_argument("--repeats", type=int, default=11, help="of each way (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark"), help="folder of the results (default: %(default)s)"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"PART: expected {', '.join(PARTS)}, found {', '.join(sorted(unknown))}")
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, found {args.repeats}")
    try:
        train, _ = load_data(args.dataset, data_dir=args.data_dir)
        args.out.mkdir(parents=True, exist_ok=True)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    found = machine()
    print(f"{found['processor']}, {found['threads']} threads, {found['versions']}", flush=True)
    if "numpyro" not in found["versions"]:
        print("NumPyro is not installed, so it is left out: pip install '.[bench]'", flush=True)
    asked = args.parts or PARTS
    setting = {**found, "repeats": args.repeats, "dataset": train.name}
    rows = [row for row in earlier(args.out / "benchmark-cpu.json", setting) if row["part"] not in asked]
    measures: dict[str, Callable[[], list[Row]]] = {
        "training": lambda: training(train, args.repeats),
        "direct": lambda: direct(train, args.repeats),
        "importance": lambda: importance(train, args.repeats),
        "start": lambda: start(args.dataset, args.data_dir, args.repeats),
        "profile": lambda: profile(train, args.repeats),
        "scaling": lambda: scaling(train, args.repeats),
    }
    for part in asked:
        rows += [{"part": part, **row} for row in measures[part]()]
        rows.sort(key=lambda row: PARTS.index(row["part"]))
        # After each part, so that nothing measured is lost.
        (args.out / "benchmark-cpu.json").write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
        (args.out / "benchmark-cpu.md").write_text(markdown(rows, found, args.repeats))
    if {"training", "scaling"} <= {row["part"] for row in rows}:
        plot(rows).savefig(args.out / "benchmark-cpu.png", dpi=110)
    print(f"in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
