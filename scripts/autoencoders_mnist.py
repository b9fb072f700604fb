#!/usr/bin/env python
"""Autoencoders and their variational twins side by side: what the KL term does to the latent space.

Trains, on MNIST at 32 x 32, a plain autoencoder and a VAE with two latent dimensions, that VAE again with a KL weight of
100, and a convolutional pair with a latent of 4 x 4 x 4. Each leaves a run folder; the pictures that compare them lie beside
these. A run that the folder already holds, finished and with the same settings, is not trained again.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import numpy as np
import torch

from pyro_vae import (
    VAE,
    Autoencoder,
    CheckpointError,
    Data,
    DataError,
    NonFiniteError,
    evaluate,
    fit,
    latent,
    load_data,
    load_preset,
    load_run,
    plots,
)
from pyro_vae.presets import Settings
from pyro_vae.records import TrainingRecord
from pyro_vae.run import append_jsonl, new_run, read_records, save_weights, write_config, write_json

# Folder of a run -> its preset, and what is changed in it. In the pictures: its name.
RUNS: dict[str, tuple[str, dict[str, Any], str]] = {
    "autoencoder-z2": ("autoencoder-z2", {}, "autoencoder"),
    "gaussian-z2": ("gaussian-z2", {}, "VAE"),
    "gaussian-z2-beta100": ("gaussian-z2", {"beta": 100.0}, "VAE, KL weight 100"),
    "conv-autoencoder": ("conv-autoencoder", {}, "convolutional autoencoder"),
    "conv-gaussian": ("conv-gaussian", {}, "convolutional VAE"),
}
PLANES = ("autoencoder-z2", "gaussian-z2", "gaussian-z2-beta100")
Models = dict[str, VAE | Autoencoder]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="mnist", choices=("mnist", "fashion-mnist", "kmnist", "digits"), help="(default: %(default)s)")
    add("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    add(
        "--runs",
        nargs="+",
        choices=list(RUNS),
        default=list(RUNS),
        metavar="RUN",
        help=f"of {', '.join(RUNS)} (default: all)",
    )
    add("--steps", type=int, help="of each run (default: 25,000; 30,000 for the convolutional ones)")
    add("--record-every", type=int, help="steps between evaluations on the whole test set (default: 250)")
    add("--seed", type=int, default=0, help="of weights, data order and noise (default: %(default)s)")
    add("--out", type=Path, help="folder (default: a new one, runs/autoencoders-DATASET-DATE-TIME)")
    add("--overwrite", action="store_true", help="train again what --out holds with other settings (default: refuse)")
    add("--no-figures", action="store_true", help="skip the pictures (default: make them)")
    args = parser.parse_args()
    for name in ("steps", "record_every"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a whole number >= 1, found {value}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed: expected a whole number from 0 to 2^63 - 1, found {args.seed}")
    return args


def train_run(
    args: argparse.Namespace, name: str, out: Path, train: Data, test: Data, labels: torch.Tensor
) -> VAE | Autoencoder:
    """One run in its folder: config, a line per evaluation, the latents of some test images at each, the last figures."""
    preset, changes, _ = RUNS[name]
    asked = {"steps": args.steps, "record_every": args.record_every}
    settings = load_preset(preset, **changes, **{key: value for key, value in asked.items() if value is not None})
    config = {"script": "autoencoders_mnist", "dataset": train.name, "seed": args.seed, **asdict(settings)}
    folder = out / name
    if (folder / "metrics.json").is_file():
        try:
            # A run of an earlier version lacks the newer settings, and had their defaults.
            defaults = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
            found = {**defaults, **json.loads((folder / "config.json").read_text())}
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: holds metrics.json, but no config.json that can be read. Remove it."
            ) from error
        if all(found.get(key) == (list(value) if isinstance(value, tuple) else value) for key, value in config.items()):
            print(f"{name}: found finished in {folder}, not trained again", flush=True)
            return load_run(folder)
    unfinished = (folder / "config.json").is_file() and not (folder / "metrics.json").is_file()
    new_run(folder, name=name, overwrite=args.overwrite or unfinished)
    torch.manual_seed(args.seed)
    model = settings.build_model(train.event_shape)
    write_config(
        folder, settings, event_shape=tuple(train.event_shape), **{k: config[k] for k in ("script", "dataset", "seed")}
    )
    print(f"{name}: {settings.steps:,} steps", flush=True)
    some = test.subset(slice(2000))
    codes = [latent.latent_means(model, some).numpy()] if model.latent_dim == 2 else []  # before any step

    def on_record(record: TrainingRecord) -> None:
        append_jsonl(folder / "metrics.jsonl", record.to_json())
        save_weights(folder, model)
        if codes:
            codes.append(latent.latent_means(model, some).numpy())
        if record.step % (4 * settings.record_every) == 0:
            figures = f"train {published(settings, record.train):.6g}  test {published(settings, record.test):.6g}"
            print(f"  step {record.step:6,d}  {figures}", flush=True)

    start = time.perf_counter()
    objective = settings.build_objective(model)
    history = fit(objective, train, test=test, seed=args.seed, on_record=on_record, verbose=False, **settings.training())
    seconds = time.perf_counter() - start
    model.eval()
    if codes:
        np.savez_compressed(folder / "latents.npz", codes=np.stack(codes), labels=labels[:2000].numpy())
    last = history[-1]
    metrics = {
        "train_loss": published(settings, last.train),
        "test_loss": published(settings, last.test),
        "seconds": seconds,
        "test": {key: asdict(value) for key, value in evaluate(model, test, seed=args.seed).items()},
    }
    write_json(folder / "metrics.json", metrics)
    print(f"{name}: train {metrics['train_loss']:.6g}, test {metrics['test_loss']:.6g}; {seconds:.0f} s", flush=True)
    return model


def published(settings: Settings, terms: dict[str, float] | None) -> float:
    """The loss as the reference prints it: of an autoencoder per pixel, of a VAE squared error + KL weight x KL."""
    terms = terms or {}  # of the test data, which are always there
    return terms["loss"] if settings.likelihood == "none" else terms["squared_error"] + settings.beta * terms["kl"]


@torch.no_grad()
def make_figures(models: Models, test: Data, labels: torch.Tensor, seed: int) -> Iterator[tuple[str, Any]]:
    """Yields (name, figure) for the runs that are there."""
    planes = {RUNS[name][2]: latent.latent_means(models[name], test) for name in PLANES if name in models}
    if planes:
        panels = {name: (means, labels) for name, means in planes.items()}
        yield "latent_planes", plots.latent_planes(panels, title=f"Latent means of {len(test):,} test images")
    for name in PLANES[:2]:
        if name not in models:
            continue
        # A VAE's codes fill the prior; an autoencoder's lie where they like, so the grid spans the bulk of them.
        bulk = planes[RUNS[name][2]].quantile(torch.tensor([0.02, 0.98]), dim=0).T.flatten().tolist()
        limits = (-3.0, 3.0, -3.0, 3.0) if name == "gaussian-z2" else tuple(bulk)
        grid = latent.manifold_grid(models[name], size=25, limits=limits)
        yield f"manifold_{name}", plots.image_plane(*grid, title=f"The {RUNS[name][2]}'s decoder over its latent plane")
    if "gaussian-z2" in models:
        grid = latent.manifold_grid(models["gaussian-z2"], size=25, spacing="probability")
        yield (
            "manifold_gaussian-z2_probability",
            plots.image_plane(*grid, title="The VAE's decoder over its latent plane, in steps of equal prior probability"),
        )
    for name, model in models.items():
        torch.manual_seed(seed)
        images = latent.decoder_mean(model, torch.randn(36, model.latent_dim))
        yield f"samples_{name}", plots.image_grid(images, columns=6, title=f"{RUNS[name][2]}: decoded N(0, 1) noise")
    conv = {name: model for name, model in models.items() if name.startswith("conv")}
    if conv:
        codes: dict[str, tuple[Any, Any]] = {}
        for name, model in conv.items():
            means = latent.latent_means(model, test.subset(slice(3000)))
            codes[RUNS[name][2]] = (latent.tsne(means, seed=seed), labels[: len(means)])
        yield "tsne_conv", plots.latent_planes(codes, title="t-SNE of the codes of 3,000 test images", ticks=False)
    four = [name for name in RUNS if name in models and name != "gaussian-z2-beta100"]
    torch.manual_seed(seed)
    (some,) = test.batch(torch.randperm(len(test))[:8])
    rows = {"test image": some}
    for name in four:
        rows[RUNS[name][2]] = latent.decoder_mean(models[name], latent.latent_means(models[name], some))
    yield "reconstructions", plots.image_rows(rows, title="Test images and their reconstructions")


def animate(out: Path, names: list[str]) -> None:
    """The latent planes as they form, from the latents kept at evaluations: the first dozen, and up to 60 evenly spread."""
    kept = {name: np.load(out / name / "latents.npz") for name in names}
    codes = {RUNS[name][2]: arrays["codes"] for name, arrays in kept.items()}
    frames = min(map(len, codes.values()))
    steps = [0, *(record.step for record in read_records(out / names[0] / "metrics.jsonl"))][:frames]
    keep = sorted({*range(min(frames, 12)), *np.linspace(0, frames - 1, min(frames, 60)).round().astype(int).tolist()})
    animation = plots.latent_animation(
        {name: array[keep] for name, array in codes.items()},
        kept[names[0]]["labels"],
        captions=[f"step {steps[i]:6,d}" for i in keep],
    )
    animation.save(out / "figures" / "latent_planes.gif", writer="pillow", dpi=72)


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    train, test = (part.resize(32) for part in load_data(args.dataset, data_dir=args.data_dir))
    if test.labels is None:
        raise DataError(f"{test.name}: the pictures need labels.")
    out = args.out or Path("runs", f"autoencoders-{train.name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: the folder cannot be made ({error.strerror}). Name another.") from error
    models = {name: train_run(args, name, out, train, test, test.labels) for name in RUNS if name in args.runs}
    rows = {name: json.loads((out / name / "metrics.json").read_text()) for name in models}
    print(f"\n{'':22s} {'train':>12s} {'test':>12s} {'seconds':>8s}")
    for name, row in rows.items():
        print(f"{name:22s} {row['train_loss']:12.6g} {row['test_loss']:12.6g} {row['seconds']:8.0f}")
    print(
        "Of autoencoders the mean squared error per pixel; of VAEs the squared error + KL weight x KL per image.", flush=True
    )
    if not args.no_figures:
        for name, figure in make_figures(models, test, test.labels, args.seed):
            figure.savefig(out / "figures" / f"{name}.png")
        if moving := [name for name in PLANES if name in models]:
            animate(out, moving)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything is in {out}")


def main() -> int:
    args = parse_arguments()
    try:
        run(args)
    except (CheckpointError, DataError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
