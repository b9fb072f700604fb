#!/usr/bin/env python
"""Speed, each against a baseline in the same run: an epoch of training, the direct fit, log p by importance sampling.

- epoch: one epoch of preset bernoulli-z20 by the stock Pyro idiom (DataLoader over tensors in memory, pyro.infer.SVI with
  Trace_ELBO, pyro.optim.Adam) and by fit.
- direct: steps of the direct fit (batch 256, 64 draws) written with a (batch, draws, pixels) tensor, and by fit's objective.
- importance: log p of 500 test images with K = 500, and the decoder's matrix products for as many draws alone.

Machines drift, so read the ratios: each repeat runs both ways in turn, and the ratio is taken within the repeat.
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import pyro
import pyro.optim
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import VAE, Data, DataError, NegativeDirectLogLikelihood, fit, load_data, load_preset, log_marginal

SETTINGS = load_preset("bernoulli-z20")
Ways = dict[str, Callable[[], object]]


def epoch(train: Data) -> Ways:
    pyro.clear_param_store()
    theirs, ours = SETTINGS.build_vae(train.event_shape), SETTINGS.build_vae(train.event_shape)
    loader = DataLoader(TensorDataset(train.batch(torch.arange(len(train)))), batch_size=SETTINGS.batch_size, shuffle=True)
    svi = SVI(theirs.model, theirs.guide, pyro.optim.Adam({"lr": SETTINGS.lr}), Trace_ELBO())
    objective = SETTINGS.build_objective(ours)
    settings = {"epochs": 1, "batch_size": SETTINGS.batch_size, "lr": SETTINGS.lr, "verbose": False}
    return {
        "stock Pyro idiom": lambda: [svi.step(x) for (x,) in loader],
        "pyro_vae.fit": lambda: fit(objective, train, **settings),  # type: ignore[arg-type]
    }


def direct(train: Data) -> Ways:
    vae = SETTINGS.build_vae(train.event_shape)
    objective = NegativeDirectLogLikelihood(vae)
    parameters = list(vae.decoder.parameters())
    order = torch.randperm(len(train))
    batches = [train.batch(order[i * 256 : (i + 1) * 256]) for i in range(5)]

    def large_tensor(x: Tensor) -> Tensor:
        log_p = vae.decode(objective.z).log_prob(x.unsqueeze(1))  # (batch, draws), by (batch, draws, pixels)
        return -(log_p.logsumexp(1) - math.log(len(objective.z))).mean()

    def steps(loss: Callable[[Tensor], Tensor]) -> None:
        optimizer = torch.optim.Adam(parameters, fused=True)
        for x in batches:
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()

    return {
        "5 steps, (batch, draws, pixels)": lambda: steps(large_tensor),
        "5 steps, one matrix product": lambda: steps(lambda x: objective(x)["loss"]),
    }


def importance(train: Data) -> Ways:
    vae: VAE = SETTINGS.build_vae(train.event_shape).eval()
    x = train.batch(torch.arange(500))
    first, first_bias, second, second_bias = vae.decoder.parameters()

    def products() -> None:
        with torch.no_grad():
            for _ in range(50):  # 50 x 5,000 = 500 images x 500 draws
                h = F.linear(torch.randn(5000, vae.latent_dim), first, first_bias)
                F.linear(h, second, second_bias)

    def marginal() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            log_marginal(vae.generate, vae.infer, x, num_samples=500)

    return {"matrix products alone": products, "log_marginal": marginal}


def compare(title: str, ways: Ways, repeats: int) -> None:
    """Time the ways in turn; print medians, spread and the ratio of the second to the first, within each repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    print(f"{title:34s} {'median s':>9s} {'min':>8s} {'max':>8s}")
    for name, times in seconds.items():
        print(f"  {name:32s} {statistics.median(times):9.3f} {min(times):8.3f} {max(times):8.3f}")
    first, second = seconds.values()
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    middle = statistics.median(ratios)
    print(
        f"  second / first: {middle:.3f} ({1 / middle:.2f} times as fast), from {min(ratios):.3f} to {max(ratios):.3f}\n",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[Data], Ways]] = {"epoch": epoch, "direct": direct, "importance": importance}
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion-mnist", "kmnist", "digits"))
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    parser.add_argument("--repeats", type=int, default=5, help="of each way (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f"PART: expected {', '.join(parts)}, found {', '.join(sorted(unknown))}")
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, found {args.repeats}")
    try:
        train, _ = load_data(args.dataset, data_dir=args.data_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    print(f"{SETTINGS.preset} on {train.name}; {torch.get_num_threads()} threads, torch {torch.__version__}\n", flush=True)
    for name in args.parts or parts:
        compare(name, parts[name](train), args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
