#!/usr/bin/env python
"""The one-layer setting of the IWAE paper (Burda, Grosse, Salakhutdinov 2016, arXiv:1509.00519), beside its table 1.

Nets 784-200-200-(50, 50) and 50-200-200-784, tanh, Glorot uniform weights, output bias logit(train mean); pixels drawn anew
as Bernoulli(grey) each time an image is seen; batch 20; 8 stages of 3^(i-1) epochs, 3,280 in all, at learning rate
1e-3 * 10^(-(i-1)/7); Adam with eps 1e-4. VAE and IWAE with k draws per image; then log p(test) by importance sampling with
5,000 draws and the number of active latent units.

--stages cuts the schedule short. A run that was stopped or killed goes on where it was: give the same command again.
"""

import argparse
import json
import shutil
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
from pyro_vae.run import (
    append_jsonl,
    load_weights,
    lock_run,
    new_run,
    save_weights,
    write_config,
    write_json,
    write_jsonl,
)
from pyro_vae.signals import Signals
from pyro_vae.train import PRECISIONS, format_epoch

SETTINGS = load_preset("bernoulli-z50")
STAGES = 8
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
    vae = SETTINGS.build_vae(train.event_shape)
    layers = [module for module in vae.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        two_heads = layer.out_features == 2 * vae.latent_dim  # each is a layer of its own in the paper
        for weight in layer.weight.data.chunk(2) if two_heads else (layer.weight.data,):
            nn.init.xavier_uniform_(weight)
        nn.init.zeros_(layer.bias)
    (grey,) = Data(train.x).batch(torch.arange(len(train)))
    layers[-1].bias.data.copy_(grey.mean(0).flatten().clamp(0.001, 0.999).logit())
    return vae


def stage_path(run: Path, stage: int) -> Path:
    return run / "checkpoints" / f"stage-{stage}.pt"


def train_stages(args: argparse.Namespace, name: str, train: Data, signals: Signals) -> tuple[VAE, Path, float]:
    """All stages that are asked for and not done yet; the model after the last one, its folder, seconds in all stages."""
    model, k = name.split("-")
    torch.manual_seed(args.seed)
    vae = build(train)
    run = args.out / name
    objective = "iwae" if model == "iwae" and k != "1" else "trace"  # with one draw, the bound is the ELBO
    settings = load_preset("bernoulli-z50", objective=objective, particles=int(k))
    asked = {"script": "iwae_mnist", "dataset": train.name, "seed": args.seed, "precision": args.precision}
    if (run / "config.json").is_file():
        lock_run(run)
        try:
            kept = json.loads((run / "config.json").read_text())
        except ValueError as error:
            raise CheckpointError(f"{run / 'config.json'}: not the config of a run: {error}. Name another --out.") from error
        if changed := [f"{key}: {kept.get(key)} -> {value}" for key, value in asked.items() if kept.get(key) != value]:
            raise CheckpointError(f"{run}: begun with other settings ({', '.join(changed)}). Name another --out.")
    else:
        new_run(run, name=name)
        write_config(
            run,
            settings,
            event_shape=tuple(train.event_shape),
            threads=torch.get_num_threads(),
            versions={"pyro_vae": pyro_vae.__version__, "torch": torch.__version__},
            **asked,
        )
    done = max((stage for stage in range(1, args.stages + 1) if stage_path(run, stage).is_file()), default=0)
    log = run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        records = [record for record in records if record["stage"] <= done]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{log}: not the records of this run ({error}). Put it back, or name another --out."
        ) from error
    if done:
        load_weights(vae, stage_path(run, done), remedy="Remove it to train this stage again.")
        print(f"{name}: stages 1 to {done} of {args.stages} are in {run}", flush=True)
    for stage in range(1, done + 1):  # of a process that was killed just after it
        shutil.rmtree(stage_path(run, stage).with_suffix(""), ignore_errors=True)
    for stage in range(done + 1, args.stages + 1):
        epochs = 3 ** (stage - 1)
        checkpoints = Checkpoints(stage_path(run, stage).with_suffix(""))
        if state := checkpoints.load():
            records.extend({"stage": stage, **record} for record in state["progress"]["history"])
            print(f"{name} stage {stage}: going on after step {state['progress']['step']:,}", flush=True)
        write_jsonl(log, records)  # without what a killed process has added after its last checkpoint

        def on_record(record: dict[str, Any], stage: int = stage, epochs: int = epochs) -> None:
            records.append({"stage": stage, **record})
            append_jsonl(log, records[-1])
            if record["epoch"] % max(1, epochs // 9) == 0:
                print(f"{name} stage {stage}  {format_epoch(record)}  {record['seconds']:.1f} s", flush=True)

        with signals.awaited():
            fit(
                settings.build_objective(vae),
                train,
                epochs=epochs,
                batch_size=SETTINGS.batch_size,
                lr=1e-3 * 10 ** (-(stage - 1) / 7),
                eps=1e-4,
                seed=STAGES * args.seed + stage,  # another order and other noise than in the stages before
                compile=True,
                precision=args.precision,
                on_record=on_record,
                checkpoints=checkpoints,
                resume=state,
                stop=signals.came,
                verbose=False,
            )
        save_weights(run, vae, name=f"stage-{stage}")
        save_weights(run, vae)
        shutil.rmtree(checkpoints.folder)  # the stage is kept
    return vae.eval(), run, sum(record["seconds"] + record.get("compile_seconds", 0) for record in records)


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
        "epochs": (3**args.stages - 1) // 2,
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
