#!/usr/bin/env python
"""Run every reference system and put what it lands on beside what was published: the scoreboard.

Each system runs as its own script would be run by hand, in a folder of its own under --out. One that is already done there,
by the same command, is not run again, so a run that was stopped goes on where it was. Exit code 0: all figures are within
their tolerance; 1: one is not, or a script failed; 2: bad arguments or data.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

Read = Callable[[Path], tuple[float, float | None]]  # of a run's folder: a figure, and its standard error if it has one
SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS.parent))  # the package this script belongs to, installed or not

import pyro
import torch

import pyro_vae
from pyro_vae import CheckpointError, DataError, load_data
from pyro_vae.runs.folder import processor, read_records, write_json


@dataclass(frozen=True)
class Row:
    """One figure: the fields of a row of the scoreboard. A tolerance is in the units of the figure."""

    system: str
    quantity: str
    published: float | None
    ours: float
    standard_error: float | None
    tolerance: float | None
    within: bool | None
    seconds: float


@dataclass(frozen=True)
class Figure:
    """A published figure (or none), how near ours must come, and where ours is found in the run's folder."""

    quantity: str
    published: float | None
    tolerance: float | None
    read: Read


@dataclass(frozen=True)
class System:
    """One command, the folder it is given by --out, and the run's folder, there or below."""

    name: str
    command: Sequence[str]
    out: str
    run: str
    figures: Sequence[Figure]

    @property
    def key(self) -> str:
        return self.name.replace(" ", "-")


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def epoch(number: int, key: str) -> Read:
    """A training average, which is what the references print; it has no error of its own."""

    def read(folder: Path) -> tuple[float, float | None]:
        records = read_records(folder / "metrics.jsonl")
        return next(record.train[key] for record in records if record.epoch == number), None

    return read


def entry(*keys: str, error: str | None = None) -> Read:
    """An entry of metrics.json, and its standard error where it has one beside it."""

    def read(folder: Path) -> tuple[float, float | None]:
        content = load(folder / "metrics.json")
        for key in keys[:-1]:
            content = content[key]
        return content[keys[-1]], None if error is None else content[error]

    return read


def below(name: str, read: Read) -> Read:
    """The same, of a run in a folder below."""
    return lambda folder: read(folder / name)


# The first epochs move fast and depend on the initial weights; a fit is judged by its last figure.
ELBO = {1: (165.64, 3.0), 2: (121.76, 1.0), 3: (114.68, 0.5), 5: (109.86, 0.5)}
ELBO |= {10: (106.19, 0.35), 20: (103.96, 0.35), 30: (102.94, 0.35), 40: (102.28, 0.35)}
RECONSTRUCTION = {1: (150.72, 3.0), 10: (81.07, 0.5), 20: (78.59, 0.5), 40: (76.82, 0.5)}
KL = {1: (14.92, 1.0), 10: (25.12, 0.5), 20: (25.36, 0.5), 40: (25.46, 0.5)}
DIRECT = {1: (186.81, 10.0), 2: (151.57, 3.0), 5: (144.54, 0.6), 10: (143.16, 0.6)}
DIRECT |= {20: (142.41, 0.6), 30: (142.17, 0.6), 40: (142.09, 0.6)}
Z10 = {1: (147.484892, 5.0), 2: (122.673746, 1.5), 3: (119.444152, 0.6), 4: (118.063614, 0.5), 5: (117.056634, 0.5)}
LOSSES = {  # of system D, train and test; the tolerance is a share of the figure
    "autoencoder-z2": (0.029244, 0.029576, 0.05),
    "gaussian-z2": (36.6588, 36.8696, 0.03),
    "gaussian-z2-beta100": (57.9027, 58.1640, 0.03),
    "conv-autoencoder": (0.0041889, 0.0040063, 0.15),
    "conv-gaussian": (44.0664, 43.6685, 0.03),
}
QUICK_EPOCHS = 2
QUICK_DIRECT = ["--encoder-epochs", "1", "--images", "100", "--importance-samples", "100", "--no-figures"]


def systems(out: Path, *, quick: bool) -> list[System]:
    """All of them, in their order; quick: short runs beside what was published for so many epochs, where anything was."""

    def epochs(name: str, key: str, table: dict[int, tuple[float, float]]) -> list[Figure]:
        return [
            Figure(f"train {name}, epoch {n}", published, tolerance, epoch(n, key))
            for n, (published, tolerance) in table.items()
            if n <= QUICK_EPOCHS or not quick
        ]

    def test(name: str, key: str) -> Figure:
        return Figure(f"test {name}", None, None, entry("test", key, "value", error="standard_error"))

    short = ["--epochs", str(QUICK_EPOCHS)] if quick else []
    bare = [*short, "--importance-samples", "0", "--no-figures"] if quick else []
    measured = [] if quick else [test("-ELBO", "neg_elbo"), test("log p, importance sampling", "log_marginal")]
    training = [
        *epochs("-ELBO", "neg_elbo", ELBO),
        *epochs("rec", "reconstruction", RECONSTRUCTION),
        *epochs("kl", "kl", KL),
    ]
    result = [
        System("A ELBO", ["svi_mnist.py", "--preset", "bernoulli-z20", *bare], "A", "A", [*training, *measured]),
        System(
            "A direct",
            ["direct_mnist.py", "--elbo-run", str(out / "A"), *short, *(QUICK_DIRECT if quick else [])],
            "A-direct",
            "A-direct",
            epochs("-log p, 64 draws", "loss", DIRECT),
        ),
        System(
            "B",
            ["svi_mnist.py", "--preset", "bernoulli-z10", *bare],
            "B",
            "B",
            [*epochs("-ELBO", "neg_elbo", Z10), *measured],
        ),
        System(
            "C",
            ["svi_mnist.py", "--preset", "gaussian-z4", *bare],
            "C",
            "C",
            [test("squared error", "squared_error"), test("kl", "kl"), *measured],
        ),
    ]
    for name, (train_loss, test_loss, share) in LOSSES.items():
        figures = [
            Figure("train loss", train_loss, share * train_loss, entry("train_loss")),
            Figure("test loss", test_loss, share * test_loss, entry("test_loss")),
        ]
        # The last one of them finds the others done and makes the pictures of all.
        runs = list(LOSSES) if name == "conv-gaussian" else [name, "--no-figures"]
        result.append(System(f"D {name}", ["autoencoders_mnist.py", "--runs", *runs], "D", f"D/{name}", figures))
    if quick:  # nothing was published for so short a run; in one process
        figures = [
            Figure(f"{system.run[2:]}: {figure.quantity}, step 250", None, None, below(system.run[2:], figure.read))
            for system in result
            if system.run.startswith("D/")
            for figure in system.figures
        ]
        result = [system for system in result if not system.run.startswith("D/")]
        result.append(System("D", ["autoencoders_mnist.py", "--steps", "250", "--no-figures"], "D", "D", figures))
    toy = [
        Figure("KL(true ‖ VAE)", 0.0, 0.01, entry("table", "VAE", "kl", error="kl_error")),
        Figure(
            "KL(true ‖ direct fit, redrawn)", None, None, entry("table", "direct fit, 256 redrawn", "kl", error="kl_error")
        ),
        Figure("VAE: log p, importance sampling", None, None, entry("table", "VAE", "log_p", error="log_p_error")),
        Figure("entropy of the truth", 2.694036, 1e-6, entry("entropy")),
    ]
    if quick:
        toy = [Figure("KL(true ‖ VAE), epoch 3", None, None, toy[0].read), toy[-1]]
    result.append(System("E toy", ["gaussian2d.py", *(["--epochs", "3", "--no-figures"] if quick else [])], "E", "E", toy))
    return result


def execute(system: System, out: Path, *, shared: Sequence[str], announce: str) -> float | None:
    """Run one system, unless its mark says that this very command is done: seconds it took, None where it failed."""
    command = [*system.command, *(shared if system.command[0] != "gaussian2d.py" else [])]
    mark = out / f"{system.key}.json"
    try:
        done = load(mark)
        if done["command"] == command and rows_of(system, out, done["seconds"]):
            print(f"{announce}: done before, in {done['seconds']:.0f} s", flush=True)
            return float(done["seconds"])
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, StopIteration):
        pass  # no mark, or a run that was damaged since: run it
    print(f"{announce}: {shlex.join(command)}", flush=True)
    folder = out / system.out
    again = ["--overwrite"] if folder.is_dir() and any(folder.iterdir()) else []  # left by a run that was stopped
    start = time.perf_counter()
    with (out / f"{system.key}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPTS / command[0]), *command[1:], "--out", str(folder), *again],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                print(f"    {line}", end="", flush=True)
        except KeyboardInterrupt:
            process.wait()
            raise
    seconds = time.perf_counter() - start
    if process.wait() != 0:
        print(f"{announce}: FAILED with exit code {process.returncode}; its output is in {log.name}", flush=True)
        return None
    write_json(mark, {"command": command, "seconds": seconds})
    return seconds


def rows_of(system: System, out: Path, seconds: float) -> list[Row]:
    rows = []
    for figure in system.figures:
        ours, error = figure.read(out / system.run)
        compared = figure.published is not None and figure.tolerance is not None
        within = abs(ours - figure.published) <= figure.tolerance if compared else None  # type: ignore[operator]
        rows.append(
            Row(system.name, figure.quantity, figure.published, ours, error, figure.tolerance, within, round(seconds, 1))
        )
    return rows


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
        f"of {len(compared)} figures are within their tolerance of what was published. {board['hardware']}; {versions}; "
        f"{board['seconds'] / 60:.0f} minutes in all.",
        "",
        "Nats per image, but for the autoencoders' losses, which are mean squared errors per pixel. Training figures are "
        "averages over an epoch, or over the 250 steps before the last evaluation, while the weights move. Errors are "
        "those of the latent draws; no figure has one for the seed.",
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="short runs of a minute or two in all (default: the whole schedules)")
    letters = tuple("ABCDE")
    add("--systems", nargs="+", choices=letters, default=letters, help="by their letters (default: all)")
    add("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    add("--out", type=Path, help="folder of the runs (default: runs/reproduce, or runs/reproduce-quick)")
    add("--scoreboard", type=Path, help="folder for scoreboard.md and scoreboard.json (default: that of --out)")
    return parser.parse_args()


def run(args: argparse.Namespace) -> int:
    out = (args.out or Path("runs", "reproduce-quick" if args.quick else "reproduce")).resolve()
    load_data("mnist", data_dir=args.data_dir)  # before anything runs
    board_folder = args.scoreboard or out
    for folder in (out, board_folder):
        folder.mkdir(parents=True, exist_ok=True)
    shared = ["--dataset", "mnist", *(["--data-dir", str(Path(args.data_dir).resolve())] if args.data_dir else [])]
    todo = [system for system in systems(out, quick=args.quick) if system.name[0] in args.systems]
    rows: list[Row] = []
    failed: list[str] = []
    total = 0.0
    for number, system in enumerate(todo, start=1):
        announce = f"[{number}/{len(todo)}, {total / 60:.1f} min] {system.name}"
        seconds = execute(system, out, shared=shared, announce=announce)
        if seconds is None:
            failed.append(system.name)
        else:
            total += seconds
            rows += rows_of(system, out, seconds)
        board = {
            "command": "python scripts/reproduce.py" + (" --quick" if args.quick else ""),
            "date": date.today().isoformat(),
            "hardware": f"{torch.get_num_threads()} threads on {os.cpu_count()} cores of {processor()}",
            "versions": {"pyro_vae": pyro_vae.__version__, "pyro-ppl": pyro.__version__, "torch": torch.__version__},
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
    print(
        f"\n{len(outside)} outside their tolerance, {len(failed)} failed {failed or ''}; {total / 60:.1f} minutes; ", end=""
    )
    print(f"the scoreboard is in {board_folder}")
    return 1 if outside or failed else 0


def main() -> int:
    args = parse_arguments()
    try:
        return run(args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the systems that are done will not be run again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
