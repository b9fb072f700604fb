#!/usr/bin/env python
"""A decoder fitted in two ways: by the ELBO, and by direct Monte-Carlo maximum likelihood without an encoder.

Both are then evaluated in the same way: log p(test) by importance sampling with an encoder (for the direct decoder, one that
is fitted to the frozen decoder), with standard errors, effective sample sizes and Pareto k; and figures that show why the
direct method is difficult.
"""

import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import torch
from torch import Tensor

from pyro_vae import (
    VAE,
    Data,
    DataError,
    NegativeDirectLogLikelihood,
    TrainingRecord,
    cli,
    direct_log_marginal,
    evaluate,
    fit,
    load_data,
    load_preset,
    load_run,
    log_marginal,
    prior_search,
)
from pyro_vae._checks import whole_number
from pyro_vae._options import option
from pyro_vae.analysis import charts, latent, plots
from pyro_vae.data.builtin import DATASETS
from pyro_vae.estimates.log_weights import log_weights
from pyro_vae.estimates.prior_sampling import direct_log_prob
from pyro_vae.estimates.records import UnreliableEstimateWarning
from pyro_vae.models.programs import ProgramPair
from pyro_vae.runs.folder import append_jsonl, new_run, save_weights, write_config, write_json
from pyro_vae.runs.settings import DataOptions, FolderOptions
from pyro_vae.runs.signals import Signals

SETTINGS = load_preset("bernoulli-z20")


@dataclass(frozen=True)
class Options(FolderOptions, DataOptions):
    dataset: str = option("mnist", help="data", choices=DATASETS[1:])
    elbo_run: Path | None = option(
        None, help="run folder of svi_mnist.py whose bernoulli-z20 is used", metavar="FOLDER", default_text="fit one here"
    )
    epochs: int = option(40, help="of the ELBO fit and of the direct fit")
    encoder_epochs: int = option(40, help="of the encoder fitted to the frozen decoder")
    num_particles: int = option(64, help="M, draws from the prior in the direct fit")
    redraw: bool = option(False, help="draw anew at each step", default_text="once, and keep them")
    importance_samples: int = option(5000, help="K, draws per image for log p(test)")
    images: int = option(1000, help="test images for log p(test), the first ones")
    seed: int = option(0, help="of weights, data order and noise")

    def __post_init__(self) -> None:
        least = {"importance_samples": 25, "seed": 0}  # fewer draws do not show a tail
        for name in ("epochs", "encoder_epochs", "num_particles", "images", *least):
            whole_number(name, getattr(self, name), minimum=least.get(name, 1))


def fit_elbo(options: Options, train: Data) -> VAE:
    """System A by its ELBO: from an earlier run, or fitted here."""
    if options.elbo_run is not None:
        vae = load_run(options.elbo_run)
        if not isinstance(vae, VAE) or vae.event_shape != train.event_shape:
            found = f"expected a VAE of {tuple(train.event_shape)}, found {type(vae).__name__} of {tuple(vae.event_shape)}."
            raise DataError(f"{options.elbo_run}: {found} Name a run of {SETTINGS.preset} on these data.")
        return vae
    torch.manual_seed(options.seed)
    vae = SETTINGS.build_vae(train.event_shape)
    print("ELBO fit")
    fit(SETTINGS.build_objective(vae), train, epochs=options.epochs, batch_size=128, lr=1e-3, seed=options.seed)
    return vae


def fit_direct(options: Options, train: Data, out: Path) -> tuple[VAE, list[TrainingRecord], Tensor]:
    """The same decoder and prior by direct maximum likelihood, then an encoder for that decoder, frozen."""
    torch.manual_seed(options.seed)
    vae = SETTINGS.build_vae(train.event_shape)
    objective = NegativeDirectLogLikelihood(vae, num_particles=options.num_particles, redraw=options.redraw)
    print(f"direct fit, {options.num_particles} {'redrawn' if options.redraw else 'fixed'} draws")
    length: dict[str, Any] = {"epochs": options.epochs, "batch_size": 256, "lr": 1e-3, "seed": options.seed}
    history = fit(objective, train, on_record=lambda r: append_jsonl(out / "metrics.jsonl", r.to_json()), **length)
    vae.decoder.requires_grad_(False)
    print("encoder for the frozen decoder")
    fit(SETTINGS.build_objective(vae), train, epochs=options.encoder_epochs, batch_size=128, lr=1e-3, seed=options.seed)
    return vae.eval(), history, objective.z


def measure(options: Options, vae: VAE, x: Tensor) -> dict[str, Any]:
    """One row of the table: the ELBO, log p by importance sampling with K draws, and by as many draws from the prior."""
    torch.manual_seed(options.seed)
    elbo = evaluate(vae, x, seed=options.seed)["neg_elbo"]
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=options.importance_samples)
    by_prior = direct_log_marginal(vae, x, num_samples=100_000)
    return {
        "elbo": {"value": -elbo.value, "standard_error": elbo.standard_error, "num_samples": elbo.num_samples},
        "log_marginal": asdict(estimate.mean),
        "median_pareto_k": estimate.pareto_k.median().item(),
        "log_marginal_by_prior": asdict(by_prior.mean),
    }


@torch.no_grad()
def against_draws(vae: VAE, x: Tensor, *, repeats: int = 4, most: int = 10_000) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Estimate of log p(x), mean over images, against K, for two ways to draw: its mean over repeats, standard deviation."""
    lines, bands = {}, {}
    counts = torch.tensor(sorted({round(most ** (i / 24)) for i in range(25)}))
    for name, guide in (("draws from the prior", lambda x: None), ("draws from the encoder", vae.guide)):
        pair, runs = ProgramPair(vae.model, guide), []
        for _ in range(repeats):
            weights = torch.cat([log_weights(pair, (image,), most) for image in x.split(1)], dim=1).double()
            running = weights.logcumsumexp(0)[counts - 1] - counts.log().unsqueeze(-1)  # (len(counts), images)
            runs.append(running.mean(1))
        lines[name], bands[name] = (counts, torch.stack(runs).mean(0)), torch.stack(runs).std(0)
    return lines, bands


@torch.no_grad()
def figures_of(options: Options, elbo: VAE, direct: VAE, test: Data) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    z = elbo.prior().sample((8,))
    rows = {"ELBO fit": elbo.decode(z).mean, "direct fit": direct.decode(z).mean}
    (some,) = test.batch(torch.randperm(len(test))[:8])
    binary, noisy, by_encoder = latent.denoise(elbo, some, flip_rate=0.02)
    denoised = {"thresholded": binary, "2 % flipped": noisy, "ELBO fit, encoder": by_encoder}
    denoised["direct fit, best draw"], denoised["direct fit, average"] = prior_search(direct, noisy)
    (first,) = test.batch(torch.arange(min(50, len(test))))
    lines, bands = against_draws(elbo, first)
    return {
        "samples": plots.image_rows(rows, title="The two decoders for the same 8 draws from the prior"),
        "denoising": plots.image_rows(denoised, title="Denoising: encoder against search among 20,000 draws"),
        "estimate_against_draws": charts.curves(
            lines,
            bands=bands,
            xlabel="draws per image",
            ylabel="estimate of log p(x), nats per image",
            title=f"log p(x) of {len(first)} test images under the ELBO fit's decoder (bands: one standard deviation)",
            log_x=True,
        ),
    }


def print_table(options: Options, table: dict[str, dict[str, Any]], images: int) -> None:
    k = options.importance_samples
    print(f"log p of {images:,} test images, nats per image; importance sampling with {k:,} draws:\n")
    own = f"the fit's own estimate (ELBO; {options.num_particles} draws)"
    print(f"| decoder | {own} | ELBO | importance sampling | median ESS | Pareto k | draws from the prior |")
    print("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        elbo, health, by_prior = row["elbo"], row["log_marginal"], row["log_marginal_by_prior"]
        texts = [f"{figure['value']:.2f} ± {figure['standard_error']:.2g}" for figure in (elbo, health, by_prior)]
        cells = [name, f"{row.get('own_estimate', elbo['value']):.2f}", *texts[:2], f"{health['median_ess']:.0f} of {k:,}"]
        cells += [f"median {row['median_pareto_k']:.2f}, {health['unreliable'] / images:.0%} too high"]
        print(f"| {' | '.join(cells)} | {texts[2]} ({by_prior['num_samples']:,}) |")


def run(options: Options, signals: Signals) -> None:
    start = time.perf_counter()
    train, test = load_data(options.dataset, data_dir=options.data_dir)
    out = new_run(options.out, name=f"direct-{train.name}", overwrite=options.overwrite)
    provenance = {"script": "direct_mnist", **options.to_json()}
    write_config(out, SETTINGS, event_shape=tuple(train.event_shape), **provenance)
    elbo = fit_elbo(options, train)
    direct, history, z = fit_direct(options, train, out)
    save_weights(out, direct)

    (images,) = test.batch(torch.arange(min(options.images, len(test))))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the table has a column for it
        table = {"ELBO fit": measure(options, elbo, images), "direct fit": measure(options, direct, images)}
        table["direct fit"]["own_estimate"] = direct_log_prob(direct, z, images).mean().item()
    metrics = {"dataset": train.name, "binarization": test.binarization, "seed": options.seed, "images": len(images)}
    metrics |= {"train_loss": history[-1].train["loss"], "seconds": time.perf_counter() - start, "table": table}
    write_json(out / "metrics.json", metrics)
    print(f"\nthe direct fit's last training loss: {history[-1].train['loss']:.2f}")
    print_table(options, table, len(images))
    for name, figure in (figures_of(options, elbo, direct, test) if options.figures else {}).items():
        figure.savefig(out / "figures" / f"{name}.png")
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything is in {out}")


if __name__ == "__main__":
    sys.exit(cli.experiment(Options, run, __doc__))
