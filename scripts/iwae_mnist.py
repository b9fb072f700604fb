#!/usr/bin/env python
"""The one-layer setting of the IWAE paper (Burda, Grosse, Salakhutdinov 2016, arXiv:1509.00519), compared with its table 1.

Nets 784-200-200-(50, 50) and 50-200-200-784, tanh, Glorot uniform weights, output bias logit(train mean); dynamic
binarisation, Bernoulli(grey) in each batch; batch 20; 8 stages of 3^(i-1) epochs, 3,280 in total, at learning rate
1e-3 * 10^(-(i-1)/7); Adam with eps 1e-4. VAE and IWAE with k draws per image; then log p(test) by importance sampling with
5,000 draws and the number of active latent units.

All stages are one run, in which Adam's moments and step counts persist. --stages limits the schedule; a later call with
more stages resumes the run. A run that was stopped or killed is resumed by the same command.
"""

import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import torch
from iwae_table import PAPER, write_table

from pyro_vae import VAE, CheckpointError, Data, TrainingRecord, cli, evaluate, load_data, load_preset, train_run
from pyro_vae._checks import SettingError, whole_number
from pyro_vae._files import check_writable, read_json
from pyro_vae._options import check_choices, option
from pyro_vae.analysis import latent
from pyro_vae.data.builtin import DATASETS
from pyro_vae.estimates.records import UnreliableEstimateWarning
from pyro_vae.runs.folder import read_records, write_json
from pyro_vae.runs.settings import DataOptions
from pyro_vae.runs.signals import Signals
from pyro_vae.training.fit import PRECISIONS
from pyro_vae.training.records import format_record
from pyro_vae.training.schedules import STAGES

PRESET = "bernoulli-z50"
MODELS = tuple(PAPER)


@dataclass(frozen=True)
class Options(DataOptions):
    models: tuple[str, ...] = option(
        MODELS, help=f"of {', '.join(MODELS)}", choices=MODELS, flag="MODEL", default_text="all; iwae-1 is vae-1, run once"
    )
    dataset: str = option("mnist", help="data", choices=DATASETS[1:])
    stages: int = option(STAGES, help=f"stages of the schedule, 1 to {STAGES}")
    out: Path = option(Path("runs/iwae"), help="folder of a run per model and the table")
    importance_samples: int = option(5000, help="draws per image for log p(test), at least 25")
    images: int = option(10_000, help="test images for it, the first ones")
    precision: str = option("highest", help="of matrix products in training", choices=PRECISIONS)
    seed: int = option(0, help="of weights, data order and noise")

    def __post_init__(self) -> None:
        check_choices(self)
        for name, least in (("stages", 1), ("importance_samples", 25), ("images", 1), ("seed", 0)):
            whole_number(name, getattr(self, name), minimum=least)
        if self.stages > STAGES:
            raise SettingError("stages", f"expected 1 to {STAGES}, found {self.stages}.")


def epochs_of(stages: int) -> int:
    """The number of epochs of the first stages."""
    return (3**stages - 1) // 2


def train_stages(options: Options, name: str, train: Data, signals: Signals) -> VAE:
    """Train all requested stages in one run, or resume it; returns the model after the last one."""
    model, k = name.split("-")
    objective = "iwae" if model == "iwae" and k != "1" else "trace"  # with one draw, the bound is the ELBO
    settings = load_preset(PRESET, objective=objective, particles=int(k), epochs=epochs_of(options.stages))
    run = options.out / name
    made = [record.epoch for record in read_records(run / "metrics.jsonl")]
    if made and made[-1] > epochs_of(options.stages):
        raise CheckpointError(
            f"{run}: {made[-1]:,} epochs were made, and the stages asked for have only {epochs_of(options.stages):,}. Ask "
            "for more --stages, or name another --out."
        )

    def on_record(record: TrainingRecord) -> None:
        stage = next(stage for stage in range(1, STAGES + 1) if record.epoch <= epochs_of(stage))
        if (record.epoch - epochs_of(stage - 1)) % max(1, 3 ** (stage - 1) // 9) == 0:
            print(f"{name} stage {stage}  {format_record(record)}  {record.timing['seconds']:.1f} s", flush=True)

    torch.manual_seed(options.seed)
    vae = settings.build_vae(train.event_shape, moments=train.moments())
    train_run(
        run,
        settings.build_objective(vae),
        train,
        settings=settings,
        importance_samples=0,  # see measure
        figures=False,
        resume=True,
        about={"script": "iwae_mnist"},
        signals=signals,
        seed=options.seed,
        compile=True,
        precision=options.precision,
        on_record=on_record,
        verbose=False,
    )
    return vae.eval()


def measure(options: Options, vae: VAE, run: Path, train: Data, test: Data) -> None:
    """Write -log p(test) with its error, the ELBO and active units to the run's estimates.json, unless they exist."""
    images = min(options.images, len(test))
    asked: dict[str, Any] = {"dataset": train.name, "stages": options.stages}
    asked |= {"importance_samples": options.importance_samples, "images": images}
    path = run / "estimates.json"
    if path.is_file():
        kept = read_json(path)
        if all(kept.get(key) == value for key, value in asked.items()):
            return
    start = time.perf_counter()
    part = test.subset(slice(images))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the record says how many
        figures = evaluate(vae, part, importance_samples=options.importance_samples, seed=options.seed)
    record = {
        **asked,
        "paper": PAPER[run.name] if train.name == "mnist" else None,
        "epochs": epochs_of(options.stages),
        "binarization": "dynamic",
        "seed": options.seed,
        "training_seconds": read_json(run / "metrics.json")["seconds"],
        "evaluation_seconds": time.perf_counter() - start,
        "active_units": int(latent.active_units(vae, train).sum()),
        **{name: asdict(estimate) for name, estimate in figures.items()},
    }
    write_json(path, record)


def run(options: Options, signals: Signals) -> None:
    train, test = load_data(options.dataset, data_dir=options.data_dir, binarization="dynamic")
    check_writable(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in PAPER:
        if name in options.models and not (name == "iwae-1" and "vae-1" in options.models):
            vae = train_stages(options, name, train, signals)
            measure(options, vae, options.out / name, train, test)
            table = write_table(options.out)
    print(f"\n{table}\nin {options.out / 'table.md'} and {options.out / 'table.json'}")


if __name__ == "__main__":
    sys.exit(cli.experiment(Options, run, __doc__, lost="stopped; repeat the command to resume it"))
