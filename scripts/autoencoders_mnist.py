#!/usr/bin/env python
"""Autoencoders and VAEs with the same nets compared: the effect of the KL term on the latent space.

Trains, on MNIST at 32 x 32, a plain autoencoder and a VAE with two latent dimensions, that VAE again with a KL weight of
100, and a convolutional pair with a latent of 4 x 4 x 4. Each leaves a run folder; the pictures that compare them lie beside
these. A run that the folder already holds, finished and with the same settings, is not trained again.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import numpy as np
import torch
from torch import Tensor

from pyro_vae import VAE, Autoencoder, Data, TrainingRecord, cli, evaluate, fit, load_data, load_preset, load_run
from pyro_vae._checks import whole_number
from pyro_vae._files import check_writable, read_json
from pyro_vae._options import check_choices, option
from pyro_vae.analysis import latent, plots
from pyro_vae.data.builtin import DATASETS
from pyro_vae.runs.folder import append_jsonl, new_run, read_config, read_records, save_weights, write_config, write_json
from pyro_vae.runs.presets import Settings
from pyro_vae.runs.settings import DataOptions, FolderOptions
from pyro_vae.runs.signals import Signals

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


@dataclass(frozen=True)
class Options(FolderOptions, DataOptions):
    dataset: str = option("mnist", help="data", choices=DATASETS[1:])
    runs: tuple[str, ...] = option(
        tuple(RUNS), help=f"of {', '.join(RUNS)}", choices=tuple(RUNS), metavar="RUN", default_text="all"
    )
    steps: int | None = option(None, help="of each run", default_text="25,000; 30,000 for the convolutional ones")
    record_every: int | None = option(None, help="steps between evaluations on the whole test set", default_text="250")
    seed: int = option(0, help="of weights, data order and noise")
    overwrite: bool = option(False, help="train again what --out holds with other settings", default_text="refuse")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("steps", "record_every"):
            if (value := getattr(self, name)) is not None:
                whole_number(name, value)
        whole_number("seed", self.seed, minimum=0)


def train_run(options: Options, name: str, folder: Path, train: Data, test: Data) -> VAE | Autoencoder:
    """One run in its folder: config, a line per evaluation, the latents of some test images at each, the last figures."""
    preset, changes, _ = RUNS[name]
    asked = {"steps": options.steps, "record_every": options.record_every}
    settings = load_preset(preset, **changes, **{key: value for key, value in asked.items() if value is not None})
    provenance = {"script": "autoencoders_mnist", "dataset": train.name, "seed": options.seed}
    finished, begun = (folder / "metrics.json").is_file(), (folder / "config.json").is_file()
    if finished:
        found, _, config = read_config(folder)
        if found == settings and all(config.get(key) == value for key, value in provenance.items()):
            print(f"{name}: found finished in {folder}, not trained again", flush=True)
            return load_run(folder)
    new_run(folder, name=name, overwrite=options.overwrite or (begun and not finished))
    torch.manual_seed(options.seed)
    model = settings.build_model(train.event_shape)
    write_config(folder, settings, event_shape=tuple(train.event_shape), **provenance)
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
    history = fit(objective, train, test=test, seed=options.seed, on_record=on_record, verbose=False, **settings.training())
    seconds = time.perf_counter() - start
    if codes:
        np.savez_compressed(folder / "latents.npz", codes=np.stack(codes), labels=labels_of(some).numpy())
    losses = {part: published(settings, getattr(history[-1], part)) for part in ("train", "test")}
    print(f"{name}: train {losses['train']:.6g}, test {losses['test']:.6g}; {seconds:.0f} s", flush=True)
    metrics: dict[str, Any] = {f"{part}_loss": loss for part, loss in losses.items()} | {"seconds": seconds}
    metrics["test"] = {key: asdict(value) for key, value in evaluate(model.eval(), test, seed=options.seed).items()}
    write_json(folder / "metrics.json", metrics)
    return model


def labels_of(data: Data) -> Tensor:
    return cast(Tensor, data.labels)  # all of these data sets have them


def published(settings: Settings, terms: dict[str, float] | None) -> float:
    """The loss as the reference prints it: of an autoencoder per pixel, of a VAE squared error + KL weight x KL."""
    terms = terms or {}  # there are test data, so there are terms
    return terms["loss"] if settings.likelihood == "none" else terms["squared_error"] + settings.beta * terms["kl"]


@torch.no_grad()
def figures_of(models: Models, test: Data, seed: int) -> Iterator[tuple[str, Any]]:
    """Yields (name, figure) for the existing runs."""
    labels, titles = labels_of(test), {name: RUNS[name][2] for name in models}
    means = {name: latent.latent_means(model, test) for name, model in models.items()}
    if planes := {titles[name]: (means[name], labels) for name in PLANES if name in models}:
        yield "latent_planes", plots.latent_planes(planes, title=f"Latent means of {len(test):,} test images")
    for name in (name for name in PLANES[:2] if name in models):
        # A VAE's codes fill the prior; an autoencoder's lie where they like, so the grid spans the bulk of them.
        bulk = means[name].quantile(torch.tensor([0.02, 0.98]), dim=0).T.flatten().tolist()
        limits = (-3.0, 3.0, -3.0, 3.0) if name == "gaussian-z2" else tuple(bulk)
        grid = latent.manifold_grid(models[name], size=25, limits=limits)
        yield f"manifold_{name}", plots.image_plane(*grid, title=f"The {titles[name]}'s decoder over its latent plane")
    if "gaussian-z2" in models:
        grid = latent.manifold_grid(models["gaussian-z2"], size=25, spacing="probability")
        title = "The VAE's decoder over its latent plane, in steps of equal prior probability"
        yield "manifold_gaussian-z2_probability", plots.image_plane(*grid, title=title)
    for name, model in models.items():
        torch.manual_seed(seed)
        images = latent.decoder_mean(model, torch.randn(36, model.latent_dim))
        yield f"samples_{name}", plots.image_grid(images, columns=6, title=f"{titles[name]}: decoded N(0, 1) noise")
    points = {name: latent.tsne(means[name][:3000], seed=seed) for name in models if name.startswith("conv")}
    if codes := {titles[name]: (array, labels[:3000]) for name, array in points.items()}:
        title = f"t-SNE of the codes of {len(labels[:3000]):,} test images"
        yield "tsne_conv", plots.latent_planes(codes, title=title, ticks=False)
    torch.manual_seed(seed)
    some = torch.randperm(len(test))[:8]
    rows = {"test image": test.batch(some)[0]}
    for name in (name for name in models if name != "gaussian-z2-beta100"):
        rows[titles[name]] = latent.decoder_mean(models[name], means[name][some])
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


def run(options: Options, signals: Signals) -> None:
    start = time.perf_counter()
    train, test = (part.resize(32) for part in load_data(options.dataset, data_dir=options.data_dir))
    out = options.out or Path("runs", f"autoencoders-{train.name}-{datetime.now():%Y%m%d-%H%M%S}")
    check_writable(out / "figures")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    models = {name: train_run(options, name, out / name, train, test) for name in RUNS if name in options.runs}
    print(f"\n{'':22s} {'train':>12s} {'test':>12s} {'seconds':>8s}")
    for name in models:
        row = read_json(out / name / "metrics.json")
        print(f"{name:22s} {row['train_loss']:12.6g} {row['test_loss']:12.6g} {row['seconds']:8.0f}")
    print("Of autoencoders the mean squared error per pixel; of VAEs squared error + KL weight x KL per image.", flush=True)
    if options.figures:
        for name, figure in figures_of(models, test, options.seed):
            figure.savefig(out / "figures" / f"{name}.png")
        if moving := [name for name in PLANES if name in models]:
            animate(out, moving)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything is in {out}")


if __name__ == "__main__":
    sys.exit(cli.experiment(Options, run, __doc__))
