#!/usr/bin/env python
"""One decoder, fitted in two ways: by the ELBO, and by direct Monte-Carlo maximum likelihood without an encoder.

Then both are measured alike: log p(test) by importance sampling under an encoder (for the direct decoder, one that is
fitted to the frozen decoder), with standard errors, effective sample sizes and Pareto k; and the pictures that tell why the
direct method struggles.
"""

import argparse
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import torch
from torch import Tensor

from pyro_vae import (
    VAE,
    CheckpointError,
    Data,
    DataError,
    NegativeDirectLogLikelihood,
    NonFiniteError,
    direct_log_marginal,
    evaluate,
    fit,
    latent,
    load_data,
    load_preset,
    load_run,
    log_marginal,
    plots,
    prior_search,
)
from pyro_vae.estimate import UnreliableEstimateWarning
from pyro_vae.log_weights import log_weights
from pyro_vae.programs import ProgramPair
from pyro_vae.records import TrainingRecord
from pyro_vae.run import append_jsonl, new_run, save_weights, write_config, write_json

SETTINGS = load_preset("bernoulli-z20")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--dataset",
        default="mnist",
        choices=("mnist", "fashion-mnist", "kmnist", "digits"),
        help="data (default: %(default)s)",
    )
    add("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    add("--elbo-run", type=Path, help="run folder of svi_mnist.py whose bernoulli-z20 is used (default: fit one here)")
    add("--epochs", type=int, default=40, help="of the ELBO fit and of the direct fit (default: %(default)s)")
    add("--encoder-epochs", type=int, default=40, help="of the encoder fitted to the frozen decoder (default: %(default)s)")
    add("--num-draws", type=int, default=64, help="M, draws from the prior in the direct fit (default: %(default)s)")
    add("--redraw", action="store_true", help="draw anew at each step (default: once, and keep them)")
    add("--importance-samples", type=int, default=5000, help="K, draws per image for log p(test) (default: %(default)s)")
    add("--images", type=int, default=1000, help="test images for log p(test), the first ones (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, data order and noise (default: %(default)s)")
    add("--out", type=Path, help="run folder (default: a new one, runs/direct-DATASET-DATE-TIME)")
    add("--overwrite", action="store_true", help="replace the earlier run that --out holds (default: refuse)")
    add("--no-figures", action="store_true", help="skip the pictures (default: make them)")
    args = parser.parse_args()
    for name in ("epochs", "encoder_epochs", "num_draws", "images"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a whole number >= 1, found {getattr(args, name)}")
    if args.importance_samples < 25:
        parser.error(f"--importance-samples: expected at least 25, which show a tail, found {args.importance_samples}")
    return args


def fit_elbo(args: argparse.Namespace, train: Data) -> VAE:
    """System A by its ELBO: from an earlier run, or fitted here."""
    if args.elbo_run is not None:
        vae = load_run(args.elbo_run)
        if not isinstance(vae, VAE):
            raise DataError(f"{args.elbo_run}: a plain autoencoder, which has no p(x). Name a run of {SETTINGS.preset}.")
        if vae.event_shape != train.event_shape:
            raise DataError(
                f"{args.elbo_run}: a model of {tuple(vae.event_shape)}, the data are {tuple(train.event_shape)}."
            )
        return vae
    torch.manual_seed(args.seed)
    vae = SETTINGS.build_vae(train.event_shape)
    print("ELBO fit")
    fit(SETTINGS.build_objective(vae), train, epochs=args.epochs, batch_size=128, lr=1e-3, seed=args.seed)
    return vae


def fit_direct(args: argparse.Namespace, train: Data, out: Path) -> tuple[VAE, list[TrainingRecord], Tensor]:
    """The same decoder and prior by direct maximum likelihood, then an encoder for that decoder, frozen."""
    torch.manual_seed(args.seed)
    vae = SETTINGS.build_vae(train.event_shape)
    objective = NegativeDirectLogLikelihood(vae, num_draws=args.num_draws, redraw=args.redraw)
    how = "redrawn" if args.redraw else "fixed"
    print(f"direct fit, {args.num_draws} {how} draws")

    def on_record(record: TrainingRecord) -> None:
        append_jsonl(out / "metrics.jsonl", record.to_json())

    history = fit(objective, train, epochs=args.epochs, batch_size=256, lr=1e-3, seed=args.seed, on_record=on_record)
    vae.decoder.requires_grad_(False)
    print("encoder for the frozen decoder")
    fit(SETTINGS.build_objective(vae), train, epochs=args.encoder_epochs, batch_size=128, lr=1e-3, seed=args.seed)
    return vae.eval(), history, objective.z


def measure(args: argparse.Namespace, vae: VAE, x: Tensor) -> dict[str, Any]:
    """One row of the table: the ELBO, log p by importance sampling with K draws, and by as many draws from the prior."""
    torch.manual_seed(args.seed)
    elbo = evaluate(vae, x, seed=args.seed)["neg_elbo"]
    estimate = log_marginal(vae.model, vae.guide, x, num_samples=args.importance_samples)
    by_prior = direct_log_marginal(vae, x, num_samples=100_000)
    return {
        "elbo": {"value": -elbo.value, "standard_error": elbo.standard_error, "num_samples": elbo.num_samples},
        "log_marginal": asdict(estimate.mean),
        "median_pareto_k": estimate.pareto_k.median().item(),
        "log_marginal_by_prior": asdict(by_prior.mean),
    }


@torch.no_grad()
def against_draws(vae: VAE, x: Tensor, *, repeats: int = 4, most: int = 10_000) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Mean over images of the estimate of log p(x) against K, by draws from the prior and from the encoder.

    Returns:
        name -> (K, mean, standard deviation over the repeats).
    """
    counts = torch.tensor(sorted({round(most ** (i / 24)) for i in range(25)}))
    result = {}
    for name, guide in (("draws from the prior", lambda x: None), ("draws from the encoder", vae.guide)):
        pair, runs = ProgramPair(vae.model, guide), []
        for _ in range(repeats):
            weights = torch.cat([log_weights(pair, (image,), most) for image in x.split(1)], dim=1).double()
            running = weights.logcumsumexp(0)[counts - 1] - counts.log().unsqueeze(-1)  # (len(counts), images)
            runs.append(running.mean(1))
        stack = torch.stack(runs)
        result[name] = (counts, stack.mean(0), stack.std(0))
    return result


@torch.no_grad()
def make_figures(args: argparse.Namespace, elbo: VAE, direct: VAE, test: Data) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    z = elbo.prior().sample((8,))
    rows = {"ELBO fit": elbo.decode(z).mean, "direct fit": direct.decode(z).mean}
    (some,) = test.batch(torch.randperm(len(test))[:8])
    binary, noisy, by_encoder = latent.denoise(elbo, some, flip_rate=0.02)
    best, average = prior_search(direct, noisy)
    denoised = {
        "thresholded": binary,
        "2 % flipped": noisy,
        "ELBO fit, encoder": by_encoder,
        "direct fit, best draw": best,
        "direct fit, average": average,
    }
    estimates = against_draws(elbo, *test.batch(torch.arange(min(50, len(test)))))
    return {
        "samples": plots.image_rows(rows, title="The two decoders for the same 8 draws from the prior"),
        "denoising": plots.image_rows(denoised, title="Encoder against search among 20,000 draws from the prior"),
        "estimate_against_draws": plots.curves(
            {name: (k, mean) for name, (k, mean, _) in estimates.items()},
            bands={name: spread for name, (_, _, spread) in estimates.items()},
            xlabel="draws per image",
            ylabel="estimate of log p(x), nats per image",
            title=f"log p(x) of {min(50, len(test))} test images under the ELBO fit's decoder (bands: repeats)",
            log_x=True,
        ),
    }


def run(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    train, test = load_data(args.dataset, data_dir=args.data_dir)
    out = new_run(args.out, name=f"direct-{train.name}", overwrite=args.overwrite)
    config = {"script": "direct_mnist", **{key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}}
    write_config(out, SETTINGS, event_shape=tuple(train.event_shape), **config)
    elbo = fit_elbo(args, train)
    direct, history, z = fit_direct(args, train, out)
    save_weights(out, direct)

    (images,) = test.batch(torch.arange(min(args.images, len(test))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)  # the table has a column for it
        table = {"ELBO fit": measure(args, elbo, images), "direct fit": measure(args, direct, images)}
    with torch.no_grad():
        fixed = NegativeDirectLogLikelihood(direct, num_draws=args.num_draws)
        fixed.z.copy_(z)
        own = -fixed(images)["loss"].item()
    table["direct fit"]["own_estimate"] = own
    metrics = {
        "train_loss": history[-1].train["loss"],
        "images": len(images),
        "seconds": time.perf_counter() - start,
        "table": table,
    }
    write_json(
        out / "metrics.json", {"dataset": train.name, "binarization": test.binarization, "seed": args.seed, **metrics}
    )

    print(f"\nthe direct fit's last training loss: {history[-1].train['loss']:.2f}")
    k = args.importance_samples
    print(f"log p of {len(images):,} test images, nats per image; importance sampling with {k:,} draws:\n")
    print("| decoder | the fit's own estimate | ELBO | importance sampling | median ESS | Pareto k | draws from the prior |")
    print("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        own_text = f"{own:.2f} ({args.num_draws} draws)" if "own_estimate" in row else f"{row['elbo']['value']:.2f} (ELBO)"
        cells = [
            own_text,
            *(f"{row[key]['value']:.2f} ± {row[key]['standard_error']:.2g}" for key in ("elbo", "log_marginal")),
        ]
        health = row["log_marginal"]
        cells += [f"{health['median_ess']:.0f} of {k:,}"]
        cells += [f"median {row['median_pareto_k']:.2f}, {health['unreliable'] / len(images):.0%} too high"]
        prior = row["log_marginal_by_prior"]
        cells += [f"{prior['value']:.2f} ± {prior['standard_error']:.2g} ({prior['num_samples']:,})"]
        print(f"| {name} | {' | '.join(cells)} |")
    figures = {} if args.no_figures else make_figures(args, elbo, direct, test)
    for name, figure in figures.items():
        figure.savefig(out / "figures" / f"{name}.png")
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
