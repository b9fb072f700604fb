#!/usr/bin/env python
"""Run every reference system and compare its results with the published ones: the scoreboard.

Each system runs by its own script, in a subfolder of --out. A system that is complete there, with the same command, is not
run again, so a run that was stopped can be resumed. Exit code 0: all results are within their tolerance; 1: one is not, or
a script failed; 2: invalid arguments or data.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS.parent))  # the package this script belongs to, installed or not

import torch
from reproduce_systems import System, systems

from pyro_vae import CheckpointError, cli, load_data
from pyro_vae._files import check_writable, read_json
from pyro_vae._options import check_choices, option
from pyro_vae.runs.describe import versions
from pyro_vae.runs.folder import processor, write_json
from pyro_vae.runs.settings import DataOptions
from pyro_vae.runs.signals import Signals

LETTERS = tuple("ABCDE")


@dataclass(frozen=True)
class Options(DataOptions):
    quick: bool = option(False, help="short runs of a minute or two in all", default_text="the whole schedules")
    systems: tuple[str, ...] = option(LETTERS, help="by their letters", choices=LETTERS, default_text="all")
    out: Path | None = option(None, help="folder of the runs", default_text="runs/reproduce, or runs/reproduce-quick")
    scoreboard: Path | None = option(None, help="folder for scoreboard.md and scoreboard.json", default_text="that of --out")

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class Row:
    """A quantity as the scoreboard has it. A tolerance is in the units of the quantity."""

    system: str
    quantity: str
    published: float | None
    ours: float
    standard_error: float | None
    tolerance: float | None
    within: bool | None
    seconds: float


def rows_of(system: System, out: Path, seconds: float) -> list[Row]:
    """The results of a system."""
    rows = []
    for each in system.quantities:
        ours, error = each.read(out)
        compared = each.published is not None and each.tolerance is not None
        within = abs(ours - each.published) <= each.tolerance if compared else None  # type: ignore[operator]
        rows.append(Row(system.name, each.name, each.published, ours, error, each.tolerance, within, round(seconds, 1)))
    return rows


def finished(system: System, out: Path) -> float | None:
    """The seconds that a system took, if its marker file has the same command; else None."""
    try:
        done = read_json(out / f"{system.key}.json")
        return float(done["seconds"]) if done["command"] == system.command and rows_of(system, out, 0.0) else None
    except (CheckpointError, ValueError, TypeError, KeyError, StopIteration):
        return None  # no marker, or a damaged run


def execute(system: System, out: Path, announce: str, signals: Signals) -> float | None:
    """Run one system, unless it is done; returns the seconds that it took, or None if it failed."""
    if (before := finished(system, out)) is not None:
        print(f"{announce}: done before, in {before:.0f} s", flush=True)
        return before
    print(f"{announce}: {shlex.join(system.command)}", flush=True)
    folder = out / system.out
    again = ["--overwrite"] if folder.is_dir() and any(folder.iterdir()) else []  # left by a run that was stopped
    command = [sys.executable, str(SCRIPTS / system.command[0]), *system.command[1:], "--out", str(folder), *again]
    start = time.perf_counter()
    with (out / f"{system.key}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                print(f"    {line}", end="", flush=True)
        except KeyboardInterrupt:
            if signals.number == signal.SIGTERM:  # a SIGINT of the keyboard comes to the script as well
                process.terminate()
            log.write(process.communicate()[0])  # what it says when its last step is saved
            raise
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        print(f"{announce}: FAILED with exit code {process.returncode}; its output is in {log.name}", flush=True)
        return None
    write_json(out / f"{system.key}.json", {"command": system.command, "seconds": seconds})
    return seconds


def markdown(board: dict[str, Any]) -> str:
    """The scoreboard as a page."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4g}"

    rows = board["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in board["versions"].items())
    compared = [row for row in rows if row["within"] is not None]
    lines = [
        "# Scoreboard",
        "",
        f"Every reference system, run by `{board['command']}` on {board['date']}: {sum(row['within'] for row in compared)} "
        f"of {len(compared)} results are within their tolerance of the published ones. {board['hardware']}; {versions}; "
        f"{board['seconds'] / 60:.0f} minutes in total.",
        "",
        "Nats per image, except for the autoencoders' losses, which are mean squared errors per pixel. Training metrics are "
        "averages over an epoch, or over the 250 steps before the last evaluation, while the parameters change. Standard "
        "errors are those of the latent draws; they do not include the variation between seeds.",
        "",
        "| system | quantity | published | ours | error | tolerance | within | seconds |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    last = ""
    for row in rows:
        within = {True: "yes", False: "**NO**", None: ""}[row["within"]]
        seconds = f"{row['seconds']:.0f}" if row["system"] != last else ""
        cells = [
            row["system"] if row["system"] != last else "",
            row["quantity"],
            number(row["published"]),
            number(row["ours"]),
        ]
        cells += [number(row["standard_error"]), number(row["tolerance"]), within, seconds]
        lines.append(f"| {' | '.join(cells)} |")
        last = row["system"]
    return "\n".join(lines) + "\n"


def run(options: Options, signals: Signals) -> None:
    out = (options.out or Path("runs", "reproduce-quick" if options.quick else "reproduce")).resolve()
    load_data("mnist", data_dir=options.data_dir)  # before anything runs
    board_folder = options.scoreboard or out
    for folder in (out, board_folder):
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    data = ["--dataset", "mnist", *(["--data-dir", str(Path(options.data_dir).resolve())] if options.data_dir else [])]
    todo = [system for system in systems(out, data, quick=options.quick) if system.name[0] in options.systems]
    rows: list[Row] = []
    failed: list[str] = []
    total = 0.0
    for number, system in enumerate(todo, start=1):
        announce = f"[{number}/{len(todo)}, {total / 60:.1f} min] {system.name}"
        seconds = execute(system, out, announce, signals)
        if seconds is None:
            failed.append(system.name)
        else:
            total += seconds
            rows += rows_of(system, out, seconds)
        board = {
            "command": "python scripts/reproduce.py" + (" --quick" if options.quick else ""),
            "date": date.today().isoformat(),
            "hardware": f"{torch.get_num_threads()} threads on {os.cpu_count()} cores of {processor()}",
            "versions": versions(),
            "seconds": round(total, 1),
            "failed": failed,
            "rows": [asdict(row) for row in rows],
        }
        write_json(board_folder / "scoreboard.json", board)  # after each system: nothing done is lost
        (board_folder / "scoreboard.md").write_text(markdown(board))
    outside = [row for row in rows if row.within is False]
    print()
    for row in rows:
        published = "" if row.published is None else f"{row.published:12.5g} ± {row.tolerance:.3g}"
        verdict = {True: "within", False: "OUTSIDE", None: ""}[row.within]
        print(f"{row.system:24s} {row.quantity:34s} {row.ours:12.5g} {published:>24s} {verdict}")
    print(f"\n{len(outside)} outside their tolerance, {len(failed)} failed {failed or ''}; {total / 60:.1f} minutes")
    print(f"the scoreboard is in {board_folder}")
    if outside or failed:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(cli.experiment(Options, run, __doc__, lost="the systems that are done will not be run again"))
