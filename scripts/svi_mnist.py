#!/usr/bin/env python
"""Train a VAE by stochastic variational inference, on MNIST or on your own data, evaluate it, and leave a run folder.

The folder holds config.json, metrics.jsonl (a line per epoch), metrics.json (final figures and where they come from),
latents.json, checkpoints/ and figures/. Load the model again with pyro_vae.load_run(FOLDER).

A run that was stopped (SIGINT, SIGTERM) or killed goes on with --resume FOLDER, as if nothing had happened. Several
processes share the work under torchrun --standalone --nproc-per-node N scripts/svi_mnist.py ...
"""

import argparse
import importlib.util
import os
import platform
import sys
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import pyro
import torch

import pyro_vae
from pyro_vae import (
    PRESETS,
    CheckpointError,
    Checkpoints,
    Data,
    DataError,
    NonFiniteError,
    TrainingStoppedError,
    evaluate,
    fit,
    latent,
    load_data,
    load_preset,
    processes,
)
from pyro_vae.checks import number, whole_number
from pyro_vae.data import BINARIZATIONS, DATASETS, DatasetFallbackWarning
from pyro_vae.figures import run_figures
from pyro_vae.own_data import read_splits
from pyro_vae.presets import LIKELIHOODS, OBJECTIVES, Settings, fitting_likelihood
from pyro_vae.progress import identity
from pyro_vae.run import (
    append_jsonl,
    check_new_run,
    new_run,
    processor,
    read_config,
    reopen_run,
    save_weights,
    write_config,
    write_json,
    write_jsonl,
)
from pyro_vae.signals import Signals
from pyro_vae.step import NOT_TERMS
from pyro_vae.tracking import TensorBoard
from pyro_vae.train import PRECISIONS

PIXELS = {None: None, "yes": True, "no": False}
COMPILE = {"auto": None, "always": True, "never": False}
VAES = {name: settings for name, settings in PRESETS.items() if settings.likelihood != "none"}
FEWEST_STEPS = 2000  # on your own data, by default: fewer leave the pictures blurred
# Options that are no settings of the preset and define the run nevertheless: a resumed run keeps them.
KEPT: dict[str, Any] = {
    "dataset": "auto",
    "data": None,
    "test_data": None,
    "pixels": None,
    "compile": "auto",
    "precision": "highest",
    "seed": 0,
    "clip_grad_norm": None,
}


def absolute(path: str) -> str:
    """As config.json keeps it, for a run that goes on from another place."""
    return str(Path(path).expanduser().resolve())


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """The command line, and the preset's settings with what the command line changes."""

    def of_preset(name: str) -> str:
        presets: dict[Any, list[str]] = {}  # by value
        for preset, settings in VAES.items():
            if (value := getattr(settings, name)) is not None:
                value = " ".join(map(str, value)) if name == "hidden" else value  # as it is typed
                presets.setdefault(value, []).append(preset)
        ((first, names), *others) = presets.items()
        if not others and len(names) == len(VAES):
            return f"default: {first}"
        return "default: " + ", ".join(f"{value} for {' and '.join(names)}" for value, names in presets.items())

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=list(VAES), help="reference system (default: bernoulli-z20)")
    add("--dataset", choices=DATASETS, help="auto: mnist if it can be had, else digits (default: auto)")
    own = "your own data, in place of --dataset: a folder of images, or of such folders for each label; a .npy or .npz file"
    add("--data", type=absolute, metavar="PATH", help=f"{own} (default: --dataset)")
    apart = "your own test data (default: train/ and test/ in --data, x_test in a .npz file, else a tenth is held out)"
    add("--test-data", type=absolute, metavar="PATH", help=apart)
    whole = "of uint8 in --data that is no image: yes: pixels, scaled by 1/255; no: whole numbers, kept"
    add("--pixels", choices=("yes", "no"), help=f"{whole} (default: refuse to guess)")
    add("--image-size", type=int, help=f"height and width that images are made ({of_preset('image_size')})")
    learned = "normal: sigmoid mean, variance 1/2; learned-normal: mean and variance learned, of numbers of any range"
    add("--likelihood", choices=LIKELIHOODS, help=f"{learned} (default: with --data, what fits the data, which is said)")
    add("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    add("--epochs", type=int, help=f"passes over the training set ({of_preset('epochs')})")
    add("--steps", type=int, help=f"steps of the optimiser, in place of epochs ({of_preset('steps')})")
    every = of_preset("record_every").replace("default: ", "default: an epoch; ")
    add("--record-every", type=int, help=f"steps between lines, each with an evaluation on the whole test set ({every})")
    add("--batch-size", type=int, help=f"images per step ({of_preset('batch_size')})")
    add("--lr", type=float, help=f"Adam's learning rate ({of_preset('lr')})")
    add("--latent-dim", type=int, help=f"number of latent dimensions ({of_preset('latent_dim')})")
    add(
        "--hidden",
        type=int,
        nargs="*",
        help=f"widths from the data to the latent, mirrored in the decoder; of convolutional nets, channels "
        f"({of_preset('hidden')})",
    )
    add("--beta", type=float, help=f"weight of the KL in the loss ({of_preset('beta')})")
    add("--particles", type=int, help=f"latent draws per image in the loss ({of_preset('particles')})")
    objectives = (
        "ELBO, its KL estimated at the draws (trace) or closed form (mean-field); iwae: the importance-weighted bound"
    )
    add("--objective", choices=OBJECTIVES, help=f"{objectives} ({of_preset('objective')})")
    binarize = "none: grey pixels; threshold: 1 above 0.5; dynamic: drawn as Bernoulli(grey) each time an image is seen"
    add("--binarize", dest="binarization", choices=BINARIZATIONS, help=f"{binarize} ({of_preset('binarization')})")
    compiled = "the step traced and compiled; auto: where the run is long enough to pay for it"
    add("--compile", choices=list(COMPILE), help=f"{compiled} (default: auto)")
    add("--precision", choices=PRECISIONS, help="of matrix products in training (default: highest)")
    clip = "scale the gradient down to this norm, over all parameters together, where it is longer"
    add("--clip-grad-norm", type=float, help=f"{clip} (default: never)")
    add("--seed", type=int, help="of weights, data order and noise (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one (default: auto)")
    add("--out", type=Path, help="run folder (default: a new one, runs/PRESET-DATASET-DATE-TIME)")
    add("--overwrite", action="store_true", help="replace the earlier run that --out holds (default: refuse)")
    resume = "go on with this run, with its settings, of which --epochs or --steps may grow (default: a new run)"
    add("--resume", type=Path, metavar="FOLDER", help=resume)
    every = "steps from checkpoint to checkpoint (default: about every 10 seconds, for no more than 2 %% of the time)"
    add("--checkpoint-every", type=int, metavar="STEPS", help=every)
    add(
        "--importance-samples",
        type=int,
        default=100,
        help="draws per test image for log p(x) by importance sampling; 0: leave it out (default: %(default)s)",
    )
    board = "write scalars, pictures and the latent embedding to RUN/tensorboard; needs pip install '.[tensorboard]'"
    add("--tensorboard", action="store_true", help=f"{board} (default: do not)")
    add("--no-figures", action="store_true", help="skip the pictures (default: make them)")
    args = parser.parse_args(argv)
    if args.importance_samples < 0 or args.importance_samples == 1:
        parser.error(f"--importance-samples: expected 0 or at least 2, found {args.importance_samples}")
    if args.data is not None and args.dataset is not None:
        parser.error("--data takes the place of --dataset: leave one of them away")
    if args.test_data is not None and args.data is None and args.resume is None:
        parser.error("--test-data needs --data")
    if args.pixels is not None and args.data is None and args.resume is None:
        parser.error("--pixels needs --data")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard: the package is not installed; pip install '.[tensorboard]'")
    if args.overwrite and args.out is None:
        parser.error("--overwrite needs --out: a default folder is always new")
    if args.resume is not None and args.out is not None:
        parser.error("--resume names the folder of the run: leave --out away")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        parser.error(f"--seed: expected a whole number from 0 to 2^63 - 1, found {args.seed}")
    for name in ("clip_grad_norm", "checkpoint_every"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')}: expected a number above 0, found {value}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use --device cpu, or install torch with CUDA")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # of torchrun
    if restarts and args.resume is None:
        if args.out is None:
            parser.error("torchrun --max-restarts needs --out or --resume: the folder to go on in")
        if (args.out / "config.json").is_file():
            args.resume, args.out, args.overwrite = args.out, None, False
    names = [field.name for field in fields(Settings) if field.name in vars(args)]
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "hidden" in changes:
        changes["hidden"] = tuple(changes["hidden"])
    try:
        if args.resume is not None:
            return args, resumed(args, changes)
        for name, default in KEPT.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        args.requested_dataset = args.dataset if args.data is None else None
        return args, load_preset(changes.pop("preset", "bernoulli-z20"), **changes)
    except CheckpointError as error:
        parser.exit(2, f"error: {error}\n")
    except ValueError as error:
        name, _, message = str(error).partition(":")
        parser.error(f"--{name.replace('binarization', 'binarize').replace('_', '-')}:{message}")


def resumed(args: argparse.Namespace, changes: dict[str, Any]) -> Settings:
    """The settings of the run to go on with, and into args what else defines it; only its length may have changed."""
    settings, _, config = read_config(args.resume)
    differ = []
    for name in (*changes, *KEPT):
        asked = changes[name] if name in changes else getattr(args, name)
        saved = getattr(settings, name) if name in changes else config.get(name)
        if asked is None or asked == saved or (name == "dataset" and asked == config.get("requested_dataset")):
            continue
        if name in ("epochs", "steps") and saved is not None and asked > saved:
            continue
        differ.append(f"{name}: {saved} -> {asked}")
    if differ:
        raise CheckpointError(
            f"{args.resume}: this run has other settings (saved -> asked): {'; '.join(differ)}. Leave these options away "
            "(--epochs or --steps may grow), or start a new run in another folder."
        )
    try:
        for name, choices in (("dataset", DATASETS), ("compile", tuple(COMPILE)), ("precision", PRECISIONS)):
            if config.get(name) not in choices and not (name == "dataset" and config.get("data") is not None):
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {config.get(name)!r}.")
        whole_number("seed", config.get("seed"), minimum=0)
        if config.get("clip_grad_norm") is not None:
            number("clip_grad_norm", config["clip_grad_norm"])
        for name in ("data", "test_data"):
            if not isinstance(config.get(name), str | None):
                raise ValueError(f"{name}: expected a path, found {config[name]!r}.")
        if config.get("pixels") not in PIXELS:
            raise ValueError(f"pixels: expected yes, no or null, found {config['pixels']!r}.")
    except ValueError as error:
        raise CheckpointError(f"{args.resume / 'config.json'}: not the config of a run: {error}") from error
    for name in KEPT:
        setattr(args, name, config.get(name))
    args.requested_dataset = config.get("requested_dataset")
    return replace(settings, **{name: changes[name] for name in ("epochs", "steps") if name in changes})


def load(args: argparse.Namespace, settings: Settings) -> tuple[Data, Data, str]:
    """Training and test data, and what to tell if they are not MNIST as they should be (empty if they are)."""
    if args.data is not None:
        train, test = (
            replace(part, binarization=settings.binarization).to("cpu", torch.get_default_dtype())
            for part in read_splits(args.data, args.test_data, image_size=settings.image_size, pixels=PIXELS[args.pixels])
        )
        return train, test, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetFallbackWarning)
        train, test = load_data(args.dataset, data_dir=args.data_dir, binarization=settings.binarization)
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, DatasetFallbackWarning)]
    if settings.image_size is not None:
        train, test = train.resize(settings.image_size), test.resize(settings.image_size)
    return train, test, "\n".join(messages)


def fitted(args: argparse.Namespace, settings: Settings, train: Data) -> tuple[Settings, str]:
    """Settings that suit your own data where nothing else was asked for, and what they are."""
    changes: dict[str, Any] = {}
    reason = "as asked for"
    if args.likelihood is None and args.preset is None:
        changes["likelihood"], reason = fitting_likelihood(train)
    if args.latent_dim is None and settings.net != "conv":
        changes["latent_dim"] = min(settings.latent_dim, max(2, train.event_shape.numel() // 2))
    if settings.epochs is not None and args.epochs is None:
        changes["epochs"] = max(settings.epochs, FEWEST_STEPS * settings.batch_size // len(train))
    settings = replace(settings, **changes)
    if args.preset is None:
        settings = replace(settings, preset=f"{settings.likelihood}-z{settings.latent_dim}")
    length = f"{settings.steps:,} steps" if settings.epochs is None else f"{settings.epochs:,} epochs"
    latents = f"{settings.latent_dim} latent dimensions"
    return settings, f"{train.note}; likelihood {settings.likelihood} ({reason}); {latents}; {length}"


def warn_loudly(message: str) -> None:
    if message:
        line = "!" * 100
        print(f"{line}\n{message}\n{line}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace, settings: Settings, signals: Signals) -> None:
    if args.compile == "always" and (args.device != "cpu" or processes.count() > 1):
        raise DataError("--compile always: only for one process on the CPU. Use --compile auto.")
    if args.resume is None:
        processes.first(lambda: check_new_run(args.out, overwrite=args.overwrite))
    else:
        processes.first(lambda: reopen_run(args.resume))
    train, test, warning = load(args, settings)
    main_process = processes.rank() == 0
    if main_process:
        warn_loudly(warning)
    if train.event_shape.numel() <= 64:
        torch.set_num_threads(1)  # the matrices are too small for more: threads would only wait for one another
    torch.manual_seed(args.seed)
    try:
        if args.data is not None and args.resume is None:
            settings, choice = fitted(args, settings, train)
            if main_process:
                print(f"{args.data}: {choice}", flush=True)
        moments = train.moments() if settings.likelihood == "learned-normal" else None
        vae = settings.build_vae(train.event_shape, moments=moments).to(args.device)
    except RuntimeError as error:  # torch's answer to a model larger than the memory
        raise DataError(
            f"the model cannot be built ({str(error).strip()}). Choose smaller --hidden or --latent-dim."
        ) from error
    except ValueError as error:
        raise DataError(f"the model cannot be built: {error}") from error
    for part in (train, test):
        try:
            part.check(vae.check)
        except ValueError as error:
            raise DataError(f"{args.data or train.name}: {error}") from error
    name = f"{settings.preset}-{train.name}"
    out = args.resume or processes.first(lambda: new_run(args.out, name=name, overwrite=args.overwrite))
    checkpoints = Checkpoints(out / "checkpoints")
    state = checkpoints.load() if args.resume else None
    if args.resume and state is None and main_process and (out / "metrics.jsonl").is_file():
        warnings.warn(f"{out}: there is no checkpoint, so the run begins anew, with the same settings.", stacklevel=1)
    provenance = {
        "dataset": train.name,
        "requested_dataset": args.requested_dataset,
        "data": args.data,
        "test_data": args.test_data,
        "pixels": args.pixels,
        "data_note": train.note,
        "test_identity": None if args.data is None else identity(test),
        "seed": args.seed,
        "device": args.device,
        "compile": args.compile,
        "precision": args.precision,
        "clip_grad_norm": args.clip_grad_norm,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "versions": {
            "pyro_vae": pyro_vae.__version__,
            "pyro-ppl": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    if main_process:
        write_config(out, settings, event_shape=tuple(train.event_shape), **provenance)
        write_jsonl(out / "metrics.jsonl", state["progress"]["history"] if state else [])
        size = sum(p.numel() for p in vae.parameters())
        print(f"{settings.preset} on {train.name}: {len(train):,} training and {len(test):,} test {train.kind}", end=" ")
        print(f"of shape {tuple(train.event_shape)}, binarization {settings.binarization}", end="; ")
        print(f"{size:,} parameters; {args.device}, {torch.get_num_threads()} threads", end="")
        print(f" in each of {processes.count()} processes" if processes.count() > 1 else "")
        if isinstance(vae.likelihood, pyro_vae.NormalLikelihood):
            constant = vae.likelihood.constant(train.event_shape)
            print(f"rec and -ELBO include the normal density's constant {constant:.2f}; squared error + kl leaves it out")
        print(f"run folder: {out}", end="")
        if args.resume:
            print(f", going on after step {state['progress']['step']:,}" if state else ", without a checkpoint yet", end="")
        print(flush=True)

    board = TensorBoard(out / "tensorboard") if args.tensorboard and main_process else None

    def on_record(record: dict[str, Any]) -> None:
        if board is not None:
            board.record(record)
        if main_process:
            append_jsonl(out / "metrics.jsonl", record)
            save_weights(out, vae, durable=False)

    try:
        with signals.awaited():
            history = fit(
                settings.build_objective(vae),
                train,
                seed=args.seed,
                test=test,
                on_record=on_record,
                compile=COMPILE[args.compile],
                precision=args.precision,
                clip_grad_norm=args.clip_grad_norm,
                checkpoints=checkpoints,
                checkpoint_every=args.checkpoint_every,
                resume=state,
                stop=signals.came,
                **settings.training(),
            )
    except NonFiniteError:
        if main_process:
            save_weights(out, vae)
        raise
    except TrainingStoppedError as stopped:
        raise KeyboardInterrupt(f"{stopped}; go on with: {Path(sys.argv[0])} --resume {out}") from None
    if signals.came():
        raise KeyboardInterrupt(f"stopped after the last step; go on with: {Path(sys.argv[0])} --resume {out}")
    seconds = sum(record["seconds"] + record.get("compile_seconds", 0) for record in history)
    vae.eval()
    figures = evaluate(vae, test, importance_samples=args.importance_samples, seed=args.seed)
    if not main_process:
        return
    save_weights(out, vae)
    metrics = {
        "preset": settings.preset,
        "binarization": settings.binarization,
        **provenance,
        "seconds": seconds,
        "images_per_second": sum(r["images_per_second"] for r in history) / len(history),
        "train": {name: history[-1][name] for name in history[-1] if name not in NOT_TERMS},
        "test": {name: asdict(estimate) for name, estimate in figures.items()},
    }
    write_json(out / "metrics.json", metrics)
    train, test = train.to(args.device), test.to(args.device)
    write_json(out / "latents.json", latent.latent_record(vae, test))
    for name, estimate in figures.items():
        print(f"test {name:15s} {estimate.value:9.3f} ± {estimate.standard_error:.3f} nats")
    if not args.no_figures:
        torch.manual_seed(args.seed)
        for name, figure in run_figures(vae, train, test, history, settings):
            figure.savefig(out / "figures" / f"{name}.png")
            if board is not None:
                board.figure(name, figure)
    if board is not None:
        board.embedding(vae, test)
        board.close()
    warn_loudly(warning)
    print(f"trained in {seconds:.0f} s; everything is in {out}")


def main(argv: list[str] | None = None) -> int:
    args, settings = parse_arguments(argv)
    with Signals() as signals, warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # as all of ours are
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            with processes.group(args.device) as args.device:
                run(args, settings, signals)
        except (DataError, CheckpointError, NonFiniteError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stopped:
            reason = str(stopped) or "what was computed before is in the run folder; go on with --resume"
            if os.environ.get("RANK", "0") == "0":
                print(f"{signals.name}: {reason}", file=sys.stderr)
            return 128 + (signals.number or 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
