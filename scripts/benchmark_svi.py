#!/usr/bin/env python
"""CompiledSVI on Pyro's own examples, against Pyro's SVI: speed, compile time, and equality of the losses.

The examples are read at run time from a clone of Pyro, --pyro. Each case, a variant of an example, runs in a process of its
own: 100 steps of both from the same seed, whose losses are compared (in float64 too, if they differ by more than 1e-5 in
float32, since some are chaotic), then interleaved blocks of steps of both, in one process. Writes compiled-svi.md,
compiled-svi.json and compiled-svi.png; cases in --out from an earlier run with the same settings are not run again.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import torch
from benchmark_svi_nets import CASES
from benchmark_svi_page import line, markdown, plot

from pyro_vae import CheckpointError, cli
from pyro_vae._checks import SettingError, whole_number
from pyro_vae._files import atomic_write, check_writable, read_json
from pyro_vae._options import check_choices, option
from pyro_vae.runs.describe import versions
from pyro_vae.runs.folder import processor, write_json
from pyro_vae.runs.signals import Signals

CHAOTIC = 1e-5  # a difference of float32 losses above which the case is repeated in float64


@dataclass(frozen=True)
class Options:
    cases: tuple[str, ...] = option(tuple(CASES), help="see --list", choices=tuple(CASES), flag="CASE", default_text="all")
    pyro: Path = option(Path("pyro"), help="clone of Pyro, the folder that has examples/", metavar="FOLDER")
    out: Path = option(Path("runs/benchmark_svi"), help="folder of the results")
    steps: int = option(100, help="steps whose losses are compared")
    limit: int = option(300, help="seconds for a case")
    jobs: int = option(1, help="cases at a time, with one thread each")
    list: bool = option(False, help="print the names of the cases", default_text="run them")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "limit", "jobs"):
            whole_number(name, getattr(self, name))
        if not self.list and not (self.pyro / "examples").is_dir():
            raise SettingError("pyro", f"expected a clone of Pyro, found no folder {self.pyro / 'examples'}.")


def run_case(name: str, options: Options, dtype: str) -> dict[str, Any]:
    """What the process of a case has measured until its end, or until it was ended."""
    script = str(Path(__file__).with_name("benchmark_svi_case.py"))
    command = [sys.executable, script, name, str(options.pyro.resolve() / "examples"), str(options.steps), dtype]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=options.limit, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
        output, end = done.stdout, f"exit code {done.returncode}: {(done.stderr.decode().strip().splitlines() or ['?'])[-1]}"
    except subprocess.TimeoutExpired as expired:
        output, end = expired.stdout or b"", f"not done after {options.limit} s"
    lines = [text for text in output.decode().splitlines() if text.startswith("{")]
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {"stage": "start"}
    if found["stage"] not in ("done", "not run"):
        found["failure"] = f"{end}, in the stage: {found['stage']}"
    return found


def measure(name: str, options: Options) -> dict[str, Any]:
    """The row of a case."""
    case = CASES[name]
    found = run_case(name, options, "float32")
    row = {"case": name, "group": case.group, "dynamic": case.dynamic, **found}
    if found.get("dtype") == "float32" and found.get("difference", 0) > CHAOTIC:
        row["difference_float64"] = run_case(name, options, "float64").get("difference")
    return row


def earlier(path: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same settings."""
    if not path.is_file():
        return []
    board = read_json(path)
    if changed := [name for name, value in setting.items() if board.get(name) != value]:
        raise CheckpointError(f"{path}: its {', '.join(changed)} are others. Name another --out, or remove it.")
    rows: list[dict[str, Any]] = board["rows"]
    return rows


def run(options: Options, signals: Signals) -> None:
    if options.list:
        print("\n".join(CASES))
        return
    check_writable(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "compiled-svi.json"
    setting = {"processor": processor(), "versions": versions(), "steps": options.steps}
    rows = {row["case"]: row for row in earlier(path, setting)}
    todo = [name for name in options.cases if name not in rows]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda name: measure(name, options), todo):
            rows[row["case"]] = row
            print(line(row), flush=True)
            write_json(path, {**setting, "rows": [rows[name] for name in CASES if name in rows]})
    known = [rows[name] for name in CASES if name in rows]
    missing = [name for name in CASES if name not in rows]
    (options.out / "compiled-svi.md").write_text(markdown(known, setting, missing))
    with atomic_write(options.out / "compiled-svi.png", durable=False) as stream:
        plot(known).savefig(stream, format="png")
    print(f"in {options.out / 'compiled-svi.md'}; torch {torch.__version__}")


if __name__ == "__main__":
    sys.exit(cli.experiment(Options, run, __doc__))
