"""The page of benchmark_svi.py: rows of measurements -> text, Markdown, a figure."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
COLORS = {"continuous latents": "tab:blue", "discrete latents, enumerated": "tab:orange", "with neural nets": "tab:green"}
SMALL = 100  # steps per second of stock SVI


def is_compiled(row: Row) -> bool:
    return not row.get("reason") and row.get("compiled_steps", 0) > 0


def is_timed(row: Row) -> bool:
    return is_compiled(row) and "compiled" in row


def pays_after(row: Row) -> int:
    """Steps after which compilation has paid."""
    gain = 1 / row["stock"] - 1 / row["compiled"]
    return round(row["compile_seconds"] / gain) if gain > 0 else -1


def line(row: Row) -> str:
    """The row as a line of text."""
    if not is_timed(row):
        return f"{row['case']:30s} {row.get('failure') or row.get('reason') or 'no graph'}"
    return (
        f"{row['case']:30s} {row['stock']:10,.1f} {row['compiled']:10,.1f} steps/s, {row['ratio_compiled']:6.1f} x; "
        f"largest difference {row['difference']:.1e}"
    )


def summary(rows: Sequence[Row]) -> list[str]:
    static = [row for row in rows if not row["dynamic"] and row["stage"] != "not run"]
    dynamic = [row for row in rows if row["dynamic"] and row["stage"] != "not run"]
    timed = [row for row in rows if is_timed(row)]
    groups = {
        f"small models (stock above {SMALL} steps per second)": [row for row in timed if row["stock"] > SMALL],
        "enumerated discrete latents": [row for row in timed if row["group"].startswith("discrete")],
        "neural nets": [row for row in timed if row["group"].endswith("nets")],
    }
    ratios = [
        f"{name}: {statistics.median(row['ratio_compiled'] for row in part):.1f} ({len(part)} cases)"
        for name, part in groups.items()
        if part
    ]
    compared = [row for row in rows if "difference" in row]
    wrong = [row for row in compared if row["difference"] > 1e-5 and (row.get("difference_float64") or 0) > 1e-10]
    silent = ", ".join(f"{row['case']} {row['difference']:.1e}" for row in wrong) or "none"
    return [
        f"- {sum(map(is_compiled, static))} of {len(static)} static variants run compiled, and "
        f"{sum(map(is_compiled, dynamic))} of {len(dynamic)} dynamic ones; the others are Pyro's own steps, with the reason "
        "below.",
        f"- Median ratio of `step` to stock: {'; '.join(ratios)}.",
        f"- Losses of {len(compared)} cases compared; beyond 1e-5 relative in float32 and 1e-10 in float64: {silent}.",
    ]


def markdown(rows: Sequence[Row], setting: dict[str, Any], missing: Sequence[str]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    lines = [
        "# Pyro, compiled",
        "",
        "Pyro's own examples with `CompiledSVI` in place of `SVI`, on synthetic data of their shapes: "
        "`python scripts/benchmark_svi.py --pyro FOLDER`, with a clone of Pyro. "
        f"{setting['processor']}, one thread; {packages}. Steps per second are medians of interleaved repeats; "
        "`run` makes its steps in one call. The differences are the largest relative ones between the losses of "
        f"{setting['steps']} steps with the same noise; where float32 is chaotic, those in float64 are given too.",
        "",
        *summary(rows),
        "",
        "![times as fast against the speed of Pyro's own steps](images/compiled-svi.png)",
    ]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    for group in COLORS:
        part = [row for row in rows if row["group"] == group]
        if not part:
            continue
        lines += ["", f"## {group[0].upper()}{group[1:]}", ""]
        lines += [
            "| example | stock, steps/s | compiled | ratio | `run` | compile, s | pays after | largest difference |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in part:
            if not is_timed(row):
                continue
            run = f"{row['run']:,.0f} ({row['ratio_run']:.0f} x)" if "run" in row else ""
            double = row.get("difference_float64")
            found = f"{row['difference']:.0e}" + (f" (float64: {double:.0e})" if double is not None else "")
            lines.append(
                f"| {row['case']} | {row['stock']:,.0f} | {row['compiled']:,.0f} | {row['ratio_compiled']:.1f} | {run} | "
                f"{row['compile_seconds']:.0f} | {pays_after(row):,} steps | {found} |"
            )
        others = [row for row in part if not is_timed(row)]
        if others:
            lines += ["", "| example | why its steps are Pyro's own, or were not timed |", "|---|---|"]
            lines += [
                f"| {row['case']} | {(row.get('failure') or row.get('reason') or 'no graph').replace('|', '/')} |"
                for row in others
            ]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row]) -> Figure:
    """The ratio against the speed of stock SVI."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for group, color in COLORS.items():
        part = [row for row in rows if row["group"] == group and is_timed(row)]
        axes.loglog(
            [row["stock"] for row in part], [row["ratio_compiled"] for row in part], "o", color=color, label=f"{group}, step"
        )
        some = [row for row in part if "ratio_run" in row]
        axes.loglog(
            [row["stock"] for row in some],
            [row["ratio_run"] for row in some],
            "^",
            color=color,
            alpha=0.4,
            label=f"{group}, run",
        )
    axes.axhline(1, color="gray", linewidth=1)
    axes.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.minorticks_off()
    axes.set_xlabel("steps per second of Pyro's SVI")
    axes.set_ylabel("times as fast")
    axes.set_title("CompiledSVI on Pyro's own examples, one thread")
    axes.legend(loc="upper left", fontsize="small")
    return figure
