#!/usr/bin/env python
"""A toy whose truth is known: a VAE, a direct maximum-likelihood fit and the truth of a 2-D Gaussian in one table.

The data are 2-D normal with correlation; the models see x1 and x2 as independent given z, so the correlation must come
through the latent. Prints log p on held-out points and KL(true || model) for each, with errors, and makes the pictures.
"""

import argparse
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import torch
from torch import Tensor, nn

from pyro_vae import (
    VAE,
    CheckpointError,
    LearnedNormalLikelihood,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NonFiniteError,
    direct_log_marginal,
    evaluate,
    fit,
    log_marginal,
    plots,
)
from pyro_vae.estimate import UnreliableEstimateWarning
from pyro_vae.gaussian2d import ENTROPY, LinearGaussian, sample, truth
from pyro_vae.records import TrainingRecord
from pyro_vae.run import append_jsonl, new_run, save_weights, write_json

LIMITS = (-2.5, 4.5, -3.0, 4.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--latent-dim", type=int, default=2, help="latent dimensions (default: %(default)s)")
    add(
        "--hidden", type=int, default=32, help="width of the hidden tanh layer of encoder and decoder (default: %(default)s)"
    )
    add("--num-mc", type=int, default=4, help="latent draws per point in the ELBO (default: %(default)s)")
    add("--num-draws", type=int, default=256, help="draws from the prior in the direct fit (default: %(default)s)")
    add("--epochs", type=int, default=20, help="passes over the 10,000 points, each fit (default: %(default)s)")
    add("--batch-size", type=int, default=128, help="points per step (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="Adam's learning rate (default: %(default)s)")
    add("--seed", type=int, default=0, help="of data, weights and noise (default: %(default)s)")
    add("--out", type=Path, help="run folder (default: a new one, runs/gaussian2d-DATE-TIME)")
    add("--overwrite", action="store_true", help="replace the earlier run that --out holds (default: refuse)")
    add("--no-figures", action="store_true", help="skip the pictures (default: make them)")
    args = parser.parse_args()
    for name in ("latent_dim", "hidden", "num_mc", "num_draws", "epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(args, name)}")
    if not 0 < args.lr < math.inf:
        parser.error(f"--lr: expected a positive number, found {args.lr}")
    return args


def build_vae(args: argparse.Namespace) -> VAE:
    shape: dict[str, Any] = {"event_shape": (2,), "latent_dim": args.latent_dim}
    encoder = MLPEncoder(hidden=(args.hidden,), activation=nn.Tanh, **shape)
    decoder = MLPDecoder(hidden=(args.hidden,), activation=nn.Tanh, outputs=2, **shape)  # mean and log-variance
    return VAE(encoder, decoder, likelihood=LearnedNormalLikelihood(), **shape)


def snapshots(epochs: int, count: int = 15) -> list[int]:
    """Up to ``count`` epochs, dense at first, where the model changes fast; the last one among them."""
    for points in range(count, 100 * count):
        chosen = sorted({round(epochs ** (i / (points - 1))) for i in range(points)})
        if len(chosen) >= min(count, epochs):
            break
    return chosen[-count:] if len(chosen) > count else chosen


@torch.no_grad()
def draw(vae: VAE, n: int, *, noise: bool = True) -> Tensor:
    """Samples of the model, or its decoder's means, ``(n, 2)``."""
    p = vae.decode(vae.prior().sample((n,)))
    return p.sample() if noise else p.mean


def row(log_p: Tensor, exact: Tensor, sampling_error: float, **more: Any) -> dict[str, Any]:
    """log p on the held-out points, and KL(true || model) as the mean of log p_true - log p_model, point by point.

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


def make_figures(
    args: argparse.Namespace,
    out: Path,
    train: Tensor,
    vae: VAE,
    direct: VAE,
    panels: dict[str, Any],
    history: list[TrainingRecord],
    losses: dict[str, list[TrainingRecord]],
) -> None:
    """All pictures of the run, into its folder."""

    def log_density(points: Any) -> Any:
        return truth().log_prob(torch.as_tensor(points)).numpy()

    def density_panels(samples: dict[str, Any], columns: int, title: str) -> Any:
        return plots.density_panels(samples, log_density, columns=columns, limits=LIMITS, title=title)

    torch.manual_seed(args.seed)
    rows = {"truth": train, "VAE": draw(vae, 10_000), "direct fit, redrawn": draw(direct, 10_000)}
    with_noise = {"samples of the VAE": rows["VAE"], "its decoder's means, without noise": draw(vae, 10_000, noise=False)}
    steps = [record.step for record in history]
    lines = {"VAE: train -ELBO": (steps, [r.train["neg_elbo"] for r in history])}
    lines["VAE: validation -ELBO"] = (steps, [r.test["neg_elbo"] for r in history if r.test is not None])
    lines |= {f"direct fit, {name}: train -log p": (steps, [r.train["loss"] for r in h]) for name, h in losses.items()}
    caption = "Losses: means over each epoch, against the step"
    figures = {
        "densities": density_panels(rows, 3, "Samples (blue) under the true density's contours (red)"),
        "training": density_panels(panels, 4, "Samples of the VAE as training goes on"),
        "noise": density_panels(with_noise, 2, "What the decoder's noise adds"),
        "losses": plots.curves(
            lines, xlabel="step", ylabel="nats per point", title=caption, level=("entropy of the truth", ENTROPY)
        ),
    }
    for name, figure in figures.items():
        figure.savefig(out / "figures" / f"{name}.png")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the matrices are too small for more: threads would only wait for one another
    out = new_run(args.out, name="gaussian2d", overwrite=args.overwrite)
    write_json(out / "config.json", {key: str(value) if key == "out" else value for key, value in vars(args).items()})
    start = time.perf_counter()
    train, test = sample(10_000, seed=args.seed), sample(10_000, seed=args.seed + 1)
    exact = truth().log_prob(test.double())
    torch.manual_seed(args.seed)

    vae = build_vae(args)
    shown = snapshots(args.epochs)
    panels = {"truth": train.numpy()}

    def on_record(record: TrainingRecord) -> None:
        append_jsonl(out / "metrics.jsonl", record.to_json())
        if record.epoch in shown:
            torch.manual_seed(args.seed)
            panels[f"epoch {record.epoch}"] = draw(vae, 10_000).numpy()

    training: dict[str, Any] = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    objective = NegativeELBO(vae, num_particles=args.num_mc)
    history = fit(objective, train, test=test, on_record=on_record, verbose=False, **training)
    save_weights(out, vae)
    print(f"VAE fitted in {time.perf_counter() - start:.0f} s", flush=True)

    direct: dict[str, VAE] = {}
    losses = {}
    for name, redraw in (("fixed draws", False), ("redrawn", True)):
        direct[name] = build_vae(args)
        direct_objective = NegativeDirectLogLikelihood(direct[name], num_draws=args.num_draws, redraw=redraw)
        losses[name] = fit(direct_objective, train, verbose=False, **training)
        print(f"direct fit, {args.num_draws} {name}: {time.perf_counter() - start:.0f} s", flush=True)

    torch.manual_seed(args.seed)
    table = {"truth": row(exact, exact, 0.0)}
    table["normal, full covariance (ML)"] = row(
        LinearGaussian.fit(train.double(), latent_dim=1).marginal().log_prob(test.double()), exact, 0.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # told below the table
        estimate = log_marginal(vae.model, vae.guide, test, num_samples=300)
    elbo = evaluate(vae, test, num_samples=20, seed=args.seed)["neg_elbo"]
    table["VAE"] = row(estimate.value, exact, estimate.mean.standard_error, elbo=-elbo.value, elbo_error=elbo.standard_error)
    for name, model in direct.items():
        by_prior = direct_log_marginal(model, test, num_samples=10_000)
        table[f"direct fit, {args.num_draws} {name}"] = row(by_prior.value, exact, by_prior.mean_error)

    seconds = time.perf_counter() - start
    write_json(out / "metrics.json", {"entropy": ENTROPY, "seconds": seconds, "seed": args.seed, "table": table})
    print(f"\nexpected log p under the truth: {-ENTROPY:.6f} nats; below, on 10,000 held-out points")
    print(f"{'':34s} {'log p':>18s} {'ELBO':>18s} {'KL(true || model)':>19s}")
    for name, r in table.items():
        elbo_text = f"{r['elbo']:9.4f} ± {r['elbo_error']:.4f}" if "elbo" in r else ""
        kl_text = f"{r['kl']:9.5f} ± {r['kl_error']:.5f}" if name != "truth" else "0"
        print(f"{name:34s} {r['log_p']:9.4f} ± {r['log_p_error']:.4f} {elbo_text:>18s} {kl_text:>19s}")

    print("Errors: of log p and KL, over the points and the draws; of the ELBO, over the draws alone.")
    if unreliable := estimate.mean.unreliable:
        print(f"The VAE's log p: Pareto k says that the error of {unreliable:,} points is too small.")

    if not args.no_figures:
        make_figures(args, out, train, vae, direct["redrawn"], panels, history, losses)
    print(f"\ndone in {time.perf_counter() - start:.0f} s; everything is in {out}")


def main() -> int:
    args = parse_arguments()
    try:
        run(args)
    except (CheckpointError, NonFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
