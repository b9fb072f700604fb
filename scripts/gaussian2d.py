#!/usr/bin/env python
"""A toy problem with known truth: a VAE, a direct maximum-likelihood fit and the true 2-D Gaussian in one table.

The data are 2-D normal with correlation; in the models x1 and x2 are independent given z, so the latent must explain the
correlation. Prints log p on held-out points and KL(true || model) for each, with standard errors, and draws figures.
"""

import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae import (
    VAE,
    LearnedNormalLikelihood,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    TrainingRecord,
    cli,
    direct_log_marginal,
    evaluate,
    fit,
    log_marginal,
)
from pyro_vae._checks import number, whole_number
from pyro_vae._options import option
from pyro_vae.analysis import charts
from pyro_vae.estimates.records import UnreliableEstimateWarning
from pyro_vae.models.linear_gaussian import ENTROPY, LinearGaussian, sample, truth
from pyro_vae.runs.folder import append_jsonl, new_run, save_weights, write_json
from pyro_vae.runs.settings import FolderOptions
from pyro_vae.runs.signals import Signals

LIMITS = (-2.5, 4.5, -3.0, 4.0)


@dataclass(frozen=True)
class Options(FolderOptions):
    latent_dim: int = option(2, help="latent dimensions")
    hidden: int = option(32, help="width of the hidden tanh layer of encoder and decoder")
    num_mc: int = option(4, help="latent draws per point in the ELBO")
    num_particles: int = option(256, help="draws from the prior in the direct fit")
    epochs: int = option(20, help="passes over the 10,000 points, each fit")
    batch_size: int = option(128, help="points per step")
    lr: float = option(1e-3, help="Adam's learning rate")
    seed: int = option(0, help="of data, weights and noise")

    def __post_init__(self) -> None:
        for name in ("latent_dim", "hidden", "num_mc", "num_particles", "epochs", "batch_size"):
            whole_number(name, getattr(self, name))
        number("lr", self.lr)
        whole_number("seed", self.seed, minimum=0)


def build_vae(options: Options) -> VAE:
    shape: dict[str, Any] = {"event_shape": (2,), "latent_dim": options.latent_dim}
    encoder = MLPEncoder(hidden=(options.hidden,), activation=nn.Tanh, **shape)
    decoder = MLPDecoder(hidden=(options.hidden,), activation=nn.Tanh, outputs=2, **shape)  # mean and log-variance
    return VAE(encoder, decoder, likelihood=LearnedNormalLikelihood(), **shape)


@torch.no_grad()
def draw(vae: VAE, n: int, *, noise: bool = True) -> Tensor:
    """Samples of the model, or its decoder's means, ``(n, 2)``."""
    p = vae.decode(vae.prior().sample((n,)))
    return p.sample() if noise else p.mean


def row(log_p: Tensor, exact: Tensor, sampling_error: float, **more: Any) -> dict[str, Any]:
    """log p on the held-out points, and KL(true || model) as the mean of the paired difference log p_true - log p_model.

    Errors: of the mean over the held-out points; for the KL also that of the Monte-Carlo estimate of log p_model.
    """
    gap = exact - log_p
    n = math.sqrt(len(gap))
    kl_error = math.hypot(gap.std().item() / n, sampling_error)
    return {
        "log_p": log_p.mean().item(),
        "log_p_error": log_p.std().item() / n,
        "kl": gap.mean().item(),
        "kl_error": kl_error,
        **more,
    }


def figures_of(options: Options, train: Tensor, vae: VAE, direct: VAE, panels: dict[str, Any]) -> dict[str, Any]:
    """Samples of the models beside the truth."""

    def beside_truth(samples: dict[str, Any], columns: int, title: str) -> Any:
        return charts.density_panels(samples, log_density, columns=columns, limits=LIMITS, title=title)

    def log_density(points: Any) -> Any:
        return truth().log_prob(torch.as_tensor(points)).numpy()

    torch.manual_seed(options.seed)
    rows = {"truth": train, "VAE": draw(vae, 10_000), "direct fit, redrawn": draw(direct, 10_000)}
    noise = {"samples of the VAE": rows["VAE"], "its decoder's means, without noise": draw(vae, 10_000, noise=False)}
    return {
        "densities": beside_truth(rows, 3, "Samples (blue) under the true density's contours (red)"),
        "training": beside_truth(panels, 4, "Samples of the VAE during training"),
        "noise": beside_truth(noise, 2, "What the decoder's noise adds"),
    }


def losses_figure(history: list[TrainingRecord], direct: dict[str, list[TrainingRecord]]) -> Any:
    steps = [record.step for record in history]
    lines = {
        "VAE: train -ELBO": (steps, [record.train["neg_elbo"] for record in history]),
        "VAE: validation -ELBO": (steps, [record.test["neg_elbo"] for record in history if record.test is not None]),
        **{f"direct fit, {name}: train -log p": (steps, [r.train["loss"] for r in each]) for name, each in direct.items()},
    }
    title, level = "Losses: means over each epoch, against the step", ("entropy of the truth", ENTROPY)
    return charts.curves(lines, xlabel="step", ylabel="nats per point", title=title, level=level)


def run(options: Options, signals: Signals) -> None:
    torch.set_num_threads(1)  # the matrices are too small to benefit from more threads
    out = new_run(options.out, name="gaussian2d", overwrite=options.overwrite)
    write_json(out / "config.json", options.to_json())
    start = time.perf_counter()
    train, test = sample(10_000, seed=options.seed), sample(10_000, seed=options.seed + 1)
    exact = truth().log_prob(test.double())
    torch.manual_seed(options.seed)

    vae = build_vae(options)
    shown = np.geomspace(1, options.epochs, 15).round()  # dense at first, where the model changes fast
    panels = {"truth": train.numpy()}

    def on_record(record: TrainingRecord) -> None:
        append_jsonl(out / "metrics.jsonl", record.to_json())
        if record.epoch in shown:
            torch.manual_seed(options.seed)
            panels[f"epoch {record.epoch}"] = draw(vae, 10_000).numpy()

    training = {name: getattr(options, name) for name in ("epochs", "batch_size", "lr", "seed")}
    objective = NegativeELBO(vae, num_particles=options.num_mc)
    history = fit(objective, train, test=test, on_record=on_record, verbose=False, **training)
    save_weights(out, vae)
    print(f"VAE fitted in {time.perf_counter() - start:.0f} s", flush=True)

    direct: dict[str, VAE] = {}
    losses = {}
    for name, redraw in (("fixed draws", False), ("redrawn", True)):
        direct[name] = build_vae(options)
        direct_objective = NegativeDirectLogLikelihood(direct[name], num_particles=options.num_particles, redraw=redraw)
        losses[name] = fit(direct_objective, train, verbose=False, **training)
        print(f"direct fit, {options.num_particles} {name}: {time.perf_counter() - start:.0f} s", flush=True)

    torch.manual_seed(options.seed)
    table = {"truth": row(exact, exact, 0.0)}
    table["normal, full covariance (ML)"] = row(
        LinearGaussian.fit(train.double(), latent_dim=1).marginal().log_prob(test.double()), exact, 0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # reported below the table
        estimate = log_marginal(vae.model, vae.guide, test, num_samples=300)
    elbo = evaluate(vae, test, num_samples=20, seed=options.seed)["neg_elbo"]
    table["VAE"] = row(estimate.value, exact, estimate.mean.standard_error, elbo=-elbo.value, elbo_error=elbo.standard_error)
    for name, model in direct.items():
        by_prior = direct_log_marginal(model, test, num_samples=10_000)
        table[f"direct fit, {options.num_particles} {name}"] = row(by_prior.value, exact, by_prior.mean_error)

    seconds = time.perf_counter() - start
    write_json(out / "metrics.json", {"entropy": ENTROPY, "seconds": seconds, "seed": options.seed, "table": table})
    print(f"\nexpected log p under the truth: {-ENTROPY:.6f} nats; below, on 10,000 held-out points")
    print(f"{'':34s} {'log p':>18s} {'ELBO':>18s} {'KL(true || model)':>19s}")
    for name, r in table.items():
        elbo_text = f"{r['elbo']:9.4f} ± {r['elbo_error']:.4f}" if "elbo" in r else ""
        kl_text = f"{r['kl']:9.5f} ± {r['kl_error']:.5f}" if name != "truth" else "0"
        print(f"{name:34s} {r['log_p']:9.4f} ± {r['log_p_error']:.4f} {elbo_text:>18s} {kl_text:>19s}")

    print("Errors: of log p and KL, over the points and the draws; of the ELBO, over the draws alone.")
    if unreliable := estimate.mean.unreliable:
        print(f"The VAE's log p: by Pareto k, the standard error of {unreliable:,} points is too small.")

    if options.figures:
        figures = figures_of(options, train, vae, direct["redrawn"], panels)
        for name, figure in {**figures, "losses": losses_figure(history, losses)}.items():
            figure.savefig(out / "figures" / f"{name}.png")
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything is in {out}")


if __name__ == "__main__":
    sys.exit(cli.experiment(Options, run, __doc__))
