#!/usr/bin/env python
"""The one-layer setting of the IWAE paper (Burda, Grosse, Salakhutdinov 2016, arXiv:1509.00519), beside its table 1.

Nets 784-200-200-(50, 50) and 50-200-200-784, tanh, Glorot uniform weights, output bias logit(train mean); pixels drawn anew
as Bernoulli(grey) each time an image is seen; batch 20; 8 stages of 3^(i-1) epochs, 3,280 in all, at learning rate
1e-3 * 10^(-(i-1)/7); Adam with eps 1e-4. VAE and IWAE with k draws per image; then log p(test) by importance sampling with
5,000 draws and the number of active latent units.

All stages are one training, whose moments and counts of Adam go on from stage to stage. --stages cuts the schedule short; a
later call with more goes on. So does a run that was stopped or killed: give the same command again.
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import torch
from torch import nn

import pyro_vae
from pyro_vae import (
    VAE,
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
)
from pyro_vae.estimate import UnreliableEstimateWarning
from pyro_vae.presets import Settings
from pyro_vae.records import TrainingRecord
from pyro_vae.run import (
    append_jsonl,
    new_run,
    read_config,
    reopen_run,
    save_weights,
    write_config,
    write_json,
    write_jsonl,
)
from pyro_vae.schedules import STAGES
from pyro_vae.signals import Signals
from pyro_vae.train import PRECISIONS, format_record

PRESET = "bernoulli-z50"
# Table 1 of the paper, one stochastic layer, binarised MNIST: -log p(test) in nats.
PAPER = {"vae-1": 86.76, "vae-5": 86.47, "vae-50": 86.35, "iwae-1": 86.76, "iwae-5": 85.54, "iwae-50": 84.78}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    models = list(PAPER)
    add("models", nargs="*", metavar="MODEL", help=f"of {', '.join(models)} (default: all; iwae-1 is vae-1, run once)")
    add("--stages", type=int, default=STAGES, help="stages of the schedule, 1 to 8 (default: %(default)s)")
    add("--out", type=Path, default=Path("runs/iwae"), help="folder of a run per model and the table (default: %(default)s)")
    add(
        "--importance-samples",
        type=int,
        default=5000,
        help="draws per image for log p(test), at least 25 (default: %(default)s)",
    )
    add("--images", type=int, default=10_000, help="test images for it, the first ones (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="highest", help="of matrix products in training (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, data order and noise (default: %(default)s)")
    add("--dataset", default="mnist", choices=("mnist", "fashion-mnist", "kmnist", "digits"), help="(default: %(default)s)")
    add("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    args = parser.parse_args(argv)
    if unknown := set(args.models) - set(models):
        parser.error(f"MODEL: expected {', '.join(models)}, found {', '.join(sorted(unknown))}")
    args.models = [name for name in models if name in (args.models or models)]
    if not 1 <= args.stages <= STAGES:
        parser.error(f"--stages: expected 1 to {STAGES}, found {args.stages}")
    for name, least in (("importance_samples", 25), ("images", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(args, name)}")
    return args


def build(train: Data) -> VAE:
    """The model with the paper's initial weights."""
    vae = load_preset(PRESET).build_vae(train.event_shape)
    layers = [module for module in vae.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        two_heads = layer.out_features == 2 * vae.latent_dim  # each is a layer of its own in the paper
        for weight in layer.weight.data.chunk(2) if two_heads else (layer.weight.data,):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(layer.bias)
    (grey,) = Data(train.x).batch(torch.arange(len(train)))
    layers[-1].bias.data.copy_(grey.mean(0).flatten().clamp(0.001, 0.999).logit())
    return vae


def epochs_of(stages: int) -> int:
    """How long the first stages are, all together."""
    return (3**stages - 1) // 2


def stage_of(epoch: int) -> int:
    """The stage that an epoch, from 1 on, belongs to."""
    return next(stage for stage in range(1, STAGES + 1) if epoch <= epochs_of(stage))


def open_run(args: argparse.Namespace, name: str, train: Data, settings: Settings) -> Path:
    """The folder of a new run, or of one that goes on, where it is of the same kind and settings."""
    run = args.out / name
    asked = {"script": "iwae_mnist", "dataset": train.name, "seed": args.seed, "precision": args.precision}
    if (run / "config.json").is_file():
        reopen_run(run)
        kept = read_config(run)[2]
        if changed := [f"{key}: {kept.get(key)} -> {value}" for key, value in asked.items() if kept.get(key) != value]:
            raise CheckpointError(f"{run}: begun with other settings ({', '.join(changed)}). Name another --out.")
        if any((run / "checkpoints").glob("stage-*")):
            raise CheckpointError(
                f"{run}: a run of an earlier version, whose stages were trainings of their own. Expected one training of "
                "all stages, and it cannot go on as that. Name another --out."
            )
    else:
        new_run(run, name=name)
    versions = {"pyro_vae": pyro_vae.__version__, "torch": torch.__version__}
    provenance = {**asked, "threads": torch.get_num_threads(), "versions": versions}
    write_config(run, settings, event_shape=tuple(train.event_shape), **provenance)
    return run


def train_stages(args: argparse.Namespace, name: str, train: Data, signals: Signals) -> tuple[VAE, Path, float]:
    """All stages that are asked for, in one training; the model after the last one, its folder, seconds in all stages."""
    model, k = name.split("-")
    objective = "iwae" if model == "iwae" and k != "1" else "trace"  # with one draw, the bound is the ELBO
    settings = load_preset(PRESET, objective=objective, particles=int(k), epochs=epochs_of(args.stages))
    torch.manual_seed(args.seed)
    vae = build(train)
    run = open_run(args, name, train, settings)
    checkpoints = Checkpoints(run / "checkpoints")
    state = checkpoints.load()
    log = run / "metrics.jsonl"
    history = state["progress"]["history"] if state else []
    if history and history[-1]["epoch"] > epochs_of(args.stages):
        raise CheckpointError(
            f"{run}: {history[-1]['epoch']:,} epochs were made, and the stages asked for have only "
            f"{epochs_of(args.stages):,}. Ask for more --stages, or name another --out."
        )
    write_jsonl(log, history)  # without what a killed process has added after its last checkpoint
    if state:
        print(f"{name}: going on after step {state['progress']['step']:,}", flush=True)

    def on_record(record: TrainingRecord) -> None:
        append_jsonl(log, record.to_json())
        save_weights(run, vae, durable=False)
        stage = stage_of(record.epoch)
        if (record.epoch - epochs_of(stage - 1)) % max(1, 3 ** (stage - 1) // 9) == 0:
            print(f"{name} stage {stage}  {format_record(record)}  {record.timing['seconds']:.1f} s", flush=True)

    with signals.awaited():
        records = fit(
            settings.build_objective(vae),
            train,
            seed=args.seed,
            compile=True,
            precision=args.precision,
            on_record=on_record,
            checkpoints=checkpoints,
            resume=state,
            stop=signals.came,
            verbose=False,
            **settings.training(),
        )
    save_weights(run, vae)
    return vae.eval(), run, sum(record.timing["seconds"] + record.timing["compile_seconds"] for record in records)


def measure(args: argparse.Namespace, vae: VAE, run: Path, seconds: float, train: Data, test: Data) -> None:
    """-log p(test) with its error, the ELBO, and active units into the run's metrics.json, unless they are there already."""
    images = min(args.images, len(test))
    asked = {"dataset": train.name, "stages": args.stages, "importance_samples": args.importance_samples, "images": images}
    path = run / "metrics.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        if all(kept.get(key) == value for key, value in asked.items()):
            return
    start = time.perf_counter()
    part = test.subset(slice(images))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the record says how many
        figures = evaluate(vae, part, importance_samples=args.importance_samples, seed=args.seed)
    record = {
        **asked,
        "paper": PAPER[run.name] if train.name == "mnist" else None,
        "epochs": epochs_of(args.stages),
        "binarization": "dynamic",
        "seed": args.seed,
        "training_seconds": seconds,
        "evaluation_seconds": time.perf_counter() - start,
        "active_units": int(latent.active_units(vae, train).sum()),
        **{name: asdict(estimate) for name, estimate in figures.items()},
    }
    write_json(path, record)


def write_table(out: Path) -> str:
    """Markdown and JSON of all models measured in this folder, by this command or an earlier one; returns the Markdown."""
    rows = {name: json.loads(path.read_text()) for name in PAPER if (path := out / name / "metrics.json").is_file()}
    lines = [
        "-log p(test) in nats per image by importance sampling, ± its standard error, of models that ran so many stages; "
        "the paper ran all 8, 3,280 epochs, and had 5,000 draws per image.",
        "",
        "| model | k | stages | epochs | -ELBO | draws | -log p | paper's -log p | active units of 50 | training |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        model, k = name.split("-")
        nll, elbo = row["log_marginal"], row["neg_elbo"]
        cells = [
            f"{model.upper()} | {k} | {row['stages']} of {STAGES} | {row['epochs']:,}",
            f"{elbo['value']:.2f} ± {elbo['standard_error']:.3f}",
            f"{row['importance_samples']:,} | {-nll['value']:.2f} ± {nll['standard_error']:.3f} | {row['paper'] or ''}",
            f"{row['active_units']} | {row['training_seconds'] / 60:.0f} min",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "vae-1" in rows and "iwae-1" not in rows:
        lines += ["", "IWAE with k = 1 is the VAE with k = 1."]
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    write_json(out / "table.json", rows)
    return text


def run(args: argparse.Namespace, signals: Signals) -> None:
    train, test = load_data(args.dataset, data_dir=args.data_dir, binarization="dynamic")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{args.out}: cannot be made ({error.strerror}). Name another --out.") from error
    models = [name for name in args.models if name != "iwae-1" or "vae-1" not in args.models]
    for name in models:
        measure(args, *train_stages(args, name, train, signals), train, test)
        table = write_table(args.out)
    print(f"\n{table}\nin {args.out / 'table.md'} and {args.out / 'table.json'}")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    with Signals() as signals:
        try:
            run(args, signals)
        except (CheckpointError, DataError, NonFiniteError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, TrainingStoppedError) as stopped:
            print(f"{signals.name}: {stopped or 'stopped'}; the same command goes on there", file=sys.stderr)
            return 128 + (signals.number or 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
