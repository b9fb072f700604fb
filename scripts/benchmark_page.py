"""The page of benchmark.py: rows of measurements -> text, Markdown, a figure."""

from typing import Any

from benchmark_ways import COMPILED, EAGER, STOCK
from matplotlib.figure import Figure

Row = dict[str, Any]
RATIOS = {"ratio_to_stock_pyro": "stock Pyro", "ratio_to_numpyro": "NumPyro", "ratio_to_products": "products"}


def show(rows: list[Row]) -> list[Row]:
    """Print rows of one case, and return them."""
    first = rows[0]
    at = f" = {first['at']:,}" if "at" in first else ""
    print(f"{first['case']}{at}, batch {first['batch_size']}, {first['precision']}", flush=True)
    for row in rows:
        ratios = [f"{row[key]:6.2f} x {name}" for key, name in RATIOS.items() if row[key] is not None]
        print(f"  {row['variant']:38s} {row['images_per_second']:10,.0f} images/s  {'  '.join(ratios)}", flush=True)
    return rows


def table(rows: list[Row]) -> list[str]:
    lines = [
        "| method | images per second | from ... to | relative to stock Pyro | to NumPyro | to the products |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, high = row["spread"]
        ratios = " | ".join("" if row[key] is None else f"{row[key]:.2f}" for key in RATIOS)
        lines.append(f"| {row['variant']} | {row['images_per_second']:,.0f} | {low:,.0f} ... {high:,.0f} | {ratios} |")
    return lines


def markdown(rows: list[Row], machine: dict[str, Any], repeats: int) -> str:
    lines = [
        "# Speed on a CPU",
        "",
        f"{machine['processor']}, {machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        + f". `python scripts/benchmark.py`, {repeats} repeats in which all methods are interleaved: medians, and the "
        "slowest and fastest repeat. Ratios are medians of the ratios within a repeat: higher is faster.",
    ]
    if "numpyro" not in machine["versions"]:
        lines += ["", "NumPyro was not installed: `pip install '.[bench]'`."]
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if not row["case"].startswith(("scaling", "start", "profile")):
            cases.setdefault((row["case"], row["batch_size"], row["precision"]), []).append(row)
    for (case, batch_size, precision), part in cases.items():
        lines += ["", f"## {case[0].upper()}{case[1:]}, batch {batch_size}, precision {precision}", "", *table(part)]
    if begins := [row for row in rows if row["case"].startswith("start")]:
        lines += ["", "## From the start of a process to the end of the first epoch, batch 128", ""]
        lines += ["| method | seconds | from ... to | peak memory, MB |", "|---|--:|--:|--:|"]
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
            axes.text(high, place, f"  {value:,.0f}", va="center", ha="left")
        axes.set_yticks(range(len(part)), [row["variant"] for row in part])
        axes.margins(x=0.3)  # room for the numbers
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
