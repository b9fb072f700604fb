"""The command line: ``pyro-vae train``, ``evaluate``, ``report`` and ``sample``.

What computes is imported when a command runs, so that ``pyro-vae --help`` answers at once.
"""

import argparse
import functools
import io
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["experiment", "main", "report", "train"]


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _in_one_line(command: Callable[..., int]) -> Callable[..., int]:
    """A command that ends with one line and exit code 2 where its user can mend what went wrong.

    Whatever the environment says, pictures are files; a character that the encoding of a stream does not have is written by
    its name; and what goes to a stream that is closed is lost.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> int:
        os.environ["MPLBACKEND"] = "agg"
        sys.stdout, sys.stderr = (stream or io.StringIO() for stream in (sys.stdout, sys.stderr))
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="namereplace")
        try:
            code = command(*args, **options)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:  # before the command's own handlers are there
            print("SIGINT: nothing was computed", file=sys.stderr)
            return 128 + signal.SIGINT
        except Exception as error:
            return _tell(error)

    return run


def _tell(error: Exception, lost: str = "") -> int:
    """Say in one line what went wrong, where the user can mend it, and return exit code 2; else raise it again.

    Args:
        error: what went wrong.
        lost: what became of the command's work where disk or memory were not enough.
    """
    if not (message := _message(error)):
        raise error
    _give_up_stdout()
    rest = f" {lost[0].upper()}{lost[1:]}." if lost and not isinstance(error, ValueError | ArithmeticError) else ""
    print(f"error: {message}{rest}", file=sys.stderr)
    return 2


def _give_up_stdout() -> None:
    """Where it cannot be written, so that Python does not try again at its end, with a traceback and exit code 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# How torch's errors of allocation, which have no type of their own, call it.
_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "size calculation overflowed")


def _message(error: Exception) -> str:
    """What a user is told of an error that they can mend; empty for all others, which keep their traceback."""
    text = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in _NO_MEMORY)):
        return (
            f"the memory is not enough ({text or 'no more is said'}). Ask for less at once: smaller images, a smaller net, "
            "fewer data or draws."
        )
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else f"a file or stream: {error.strerror or text}"
        return f"{what}. Make room, mend its rights, or name another place."
    if isinstance(error, ImportError):
        return f"a package cannot be imported ({text}). Install it, or allow more memory."

    from pyro_vae._checks import SettingError
    from pyro_vae._files import CheckpointError
    from pyro_vae.data.dataset import DataError
    from pyro_vae.training.fit import NonFiniteError

    return str(error) if isinstance(error, SettingError | DataError | CheckpointError | NonFiniteError) else ""


TRAIN = """\
Train a VAE by stochastic variational inference, on MNIST or on your own data, evaluate it, and write a run folder.

The folder holds config.json, metrics.jsonl (a line per epoch), metrics.json (final metrics and their provenance),
latents.json, checkpoints/ and figures/. Load the model again with pyro_vae.load_run(FOLDER).

A run that was stopped (SIGINT, SIGTERM) or killed is resumed by --resume FOLDER, and ends with the same result."""


@_in_one_line
def train(argv: Sequence[str], *, prog: str = "pyro-vae train", again: str = "") -> int:
    """The command ``train``; the exit code.

    Args:
        argv: its options.
        prog: what help and errors call it.
        again: how it is started, for what is said of a run that was stopped; default: prog.
    """
    from pyro_vae._options import add_options
    from pyro_vae.runs.presets import LIKELIHOODS, Settings
    from pyro_vae.runs.settings import VAES, RunSettings, TrainOptions

    parser = _Parser(prog, TRAIN)
    add_options(parser, Settings, choices={"preset": list(VAES), "likelihood": LIKELIHOODS}, defaults=_preset_defaults(VAES))
    add_options(parser, RunSettings)
    add_options(parser, TrainOptions)
    given = vars(parser.parse_args(argv))
    _check_together(parser, given)
    return _train(parser, given, again or prog)


def _train(parser: _Parser, given: dict[str, Any], again: str) -> int:
    from pyro_vae._checks import SettingError
    from pyro_vae._files import CheckpointError
    from pyro_vae.runs.job import train_job
    from pyro_vae.runs.presets import Settings
    from pyro_vae.runs.settings import RunSettings, TrainOptions, make_job
    from pyro_vae.runs.train import RunStoppedError

    classes = (Settings, RunSettings, TrainOptions)
    try:
        job = make_job(given)
    except CheckpointError as error:
        parser.exit(2, f"error: {error}\n")
    except SettingError as error:
        parser.error(_named(error, classes))

    def action(signals: Any) -> None:
        try:
            train_job(job, signals)
        except RunStoppedError as stopped:
            raise KeyboardInterrupt(f"{stopped}; resume with: {again} --resume {shlex.quote(str(stopped.folder))}") from None

    return _run(action, classes, "a run that has begun is in its folder; resume it with --resume")


def _preset_defaults(presets: Any) -> dict[str, str]:
    """By setting, what each preset has, in words."""
    from dataclasses import fields

    from pyro_vae.runs.presets import Settings

    texts = {"preset": "bernoulli-z20"}
    for name in (each.name for each in fields(Settings) if each.name != "preset"):
        by_value: dict[Any, list[str]] = {}
        for preset, settings in presets.items():
            if (value := getattr(settings, name)) is not None:
                value = " ".join(map(str, value)) if isinstance(value, tuple) else value  # as it is typed
                by_value.setdefault(value, []).append(preset)
        same = [len(names) == len(presets) for names in by_value.values()] == [True]
        parts = [f"{value}" if same else f"{value} for {' and '.join(names)}" for value, names in by_value.items()]
        texts[name] = ", ".join(parts)
    return texts


def _check_together(parser: _Parser, given: dict[str, Any]) -> None:
    """Options that exclude or need one another. Of a run that torchrun starts again, --out becomes --resume."""
    if "data" in given and "dataset" in given:
        parser.error("--data takes the place of --dataset: leave one of them away")
    for name in ("test_data", "pixels"):
        if name in given and not {"data", "resume"} & given.keys():
            parser.error(f"--{name.replace('_', '-')} needs --data")
    if "overwrite" in given and "out" not in given:
        parser.error("--overwrite needs --out: a default folder is always new")
    if "resume" in given and "out" in given:
        parser.error("--resume names the folder of the run: leave --out away")
    from pyro_vae._processes import environment_number

    restarts = environment_number("TORCHELASTIC_RESTART_COUNT", 0)  # of torchrun
    if restarts and "resume" not in given:
        if "out" not in given:
            parser.error("torchrun --max-restarts needs --out or --resume: the folder to resume in")
        if (given["out"] / "config.json").is_file():
            given["resume"] = given.pop("out")
            given.pop("overwrite", None)


EVALUATE = """\
Measure a run: -ELBO, its terms and log p(x), each with its standard error, on the run's own test set or on other data.

Metrics of the whole test set are written to RUN/metrics.json under "test", replacing earlier ones of the same name; those
of other data, or of the first --images alone, under "evaluations"."""


@_in_one_line
def evaluate(argv: Sequence[str], *, prog: str = "pyro-vae evaluate") -> int:
    """The command ``evaluate``; the exit code."""
    from pyro_vae._options import add_options
    from pyro_vae.runs.evaluate import EvaluateOptions, evaluate_run, keep_metrics

    parser = _Parser(prog, EVALUATE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    add_options(parser, EvaluateOptions)
    given = vars(parser.parse_args(argv))
    run = given.pop("run")

    def action(signals: Any) -> None:
        what, metrics = evaluate_run(run, EvaluateOptions(**given))
        for name, estimate in metrics.items():  # before they are written, where the disk may be full
            print(f"{what} {name:15s} {estimate.value:9.3f} ± {estimate.standard_error:.3f} nats", flush=True)
        if keep_metrics(run, what, metrics):
            print(f"written to {run / 'metrics.json'}")

    return _run(action, (EvaluateOptions,), "nothing was written")


SAMPLE = """\
Draw from the prior of a run's model. A .npz file gets z, mean (of the likelihood, given z) and x (drawn from it); a .png
file the means as a grid of images."""


@_in_one_line
def sample(argv: Sequence[str], *, prog: str = "pyro-vae sample") -> int:
    """The command ``sample``; the exit code."""
    from pyro_vae._options import add_options
    from pyro_vae.runs.sample import SampleOptions, sample_run

    parser = _Parser(prog, SAMPLE)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    add_options(parser, SampleOptions)
    given = vars(parser.parse_args(argv))
    run = given.pop("run")

    def action(signals: Any) -> None:
        path = sample_run(run, SampleOptions(**given))
        print(f"{path}: {given['num']:,} draws from the prior")

    return _run(action, (SampleOptions,), "nothing was written")


REPORT = """\
Make one self-contained HTML file of run folders: settings, metrics with their standard errors, figures, cautions, and an
interactive decoder; for several runs, a comparison that ranks only comparable metrics.

The file needs no network and no server. An existing file is replaced."""


@_in_one_line
def report(argv: Sequence[str], *, prog: str = "pyro-vae report") -> int:
    """The command ``report``; the exit code."""
    parser = _Parser(prog, REPORT)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, as the command train leaves it")
    where = "file to write (default: RUN/report.html for one run, report.html here for several)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    parser.add_argument("--title", help="of the page (default: the run's name, or the number of runs)")
    args = parser.parse_args(argv)

    def action(signals: Any) -> None:
        from pyro_vae.report.page import write_report

        path = write_report(args.runs, args.out, title=args.title)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")

    return _run(action, (), "nothing was written")


@_in_one_line
def experiment(
    options: type[Any],
    action: Callable[[Any, Any], None],
    description: str,
    argv: Sequence[str] | None = None,
    *,
    lost: str = "nothing is lost of what the run folder holds",
) -> int:
    """The command of a script that is one experiment; the exit code.

    Args:
        options: a dataclass of its options (see :func:`pyro_vae._options.option`).
        action: called with these options and with the signals that are handled.
        description: of the script, for its help.
        argv: its options; default: those of this process.
        lost: what to say of a signal that ends it at once.
    """
    from pyro_vae._checks import SettingError
    from pyro_vae._options import add_options

    parser = _Parser(Path(sys.argv[0]).name, description)
    add_options(parser, options)
    given = vars(parser.parse_args(argv))
    try:
        chosen = options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    except SettingError as error:
        parser.error(_named(error, (options,)))
    return _run(lambda signals: action(chosen, signals), (options,), lost)


def _named(error: Any, classes: Sequence[type]) -> str:
    """A SettingError, its setting called as on the command line."""
    from pyro_vae._options import flag_of

    flags = [flag for cls in classes if (flag := flag_of(cls, error.name))]
    return f"{flags[0]}: {error.message}" if flags else str(error)


def _run(action: Callable[[Any], None], classes: Sequence[type], lost: str) -> int:
    """The exit code of a command: 2 for an error that its user can mend, in one line; 128 + its number for a signal.

    Args:
        action: called with the signals that are handled.
        classes: whose options the command has.
        lost: what to say of its work where a signal ends it at once, or where disk or memory are not enough.
    """
    from pyro_vae._checks import SettingError
    from pyro_vae.runs.signals import Signals

    with Signals() as signals, warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # as all of ours are
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            action(signals)
        except SettingError as error:
            print(f"error: {_named(error, classes)}", file=sys.stderr)
            return 2
        except Exception as error:
            return _tell(error, lost)
        except KeyboardInterrupt as stopped:
            if os.environ.get("RANK", "0") == "0":
                print(f"{signals.name}: {str(stopped) or lost}", file=sys.stderr)
            return 128 + (signals.number or 2)
    return 0


COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "train": (train, "train a model, evaluate it, and write a run folder; or resume one"),
    "evaluate": (evaluate, "measure a run on its test set or on other data"),
    "report": (report, "make one HTML page of one or more runs"),
    "sample": (sample, "draw from a run's model, to a file"),
}


def main(argv: Sequence[str] | None = None, *, prog: str = "pyro-vae") -> int:
    """The command line: the first argument names the command, the others are its own; the exit code."""
    commands = "\n".join(f"  {name:10s}{text}" for name, (_, text) in COMMANDS.items())
    parser = _Parser(prog, f"Variational autoencoders in Pyro: train, measure, show.\n\ncommands:\n{commands}")
    parser.usage = "%(prog)s COMMAND ... (%(prog)s COMMAND --help tells its options)"
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of the above")
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(arguments[:1]).command
    return COMMANDS[name][0](arguments[1:], prog=f"{prog} {name}")
