#!/usr/bin/env python
"""Time one training epoch of preset bernoulli-z20 in two ways, interleaved in one run: the stock Pyro idiom and fit.

The stock idiom is DataLoader over tensors in memory, pyro.infer.SVI with Trace_ELBO, pyro.optim.Adam. Machines drift, so
read the ratio: each repeat runs both ways, and the ratio is taken within the repeat.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

import pyro
import pyro.optim
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import Data, DataError, fit, load_data, load_preset

SETTINGS = load_preset("bernoulli-z20")


def stock_epoch(train: Data) -> Callable[[], float]:
    """One epoch as a Pyro tutorial writes it; returns the mean loss."""
    pyro.clear_param_store()
    vae = SETTINGS.build_vae(train.event_shape)
    loader = DataLoader(TensorDataset(train.batch(torch.arange(len(train)))), batch_size=SETTINGS.batch_size, shuffle=True)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": SETTINGS.lr}), Trace_ELBO())

    def epoch() -> float:
        return sum(svi.step(x) for (x,) in loader) / len(train)

    return epoch


def our_epoch(train: Data) -> Callable[[], float]:
    """One epoch of fit; returns the mean loss."""
    vae = SETTINGS.build_vae(train.event_shape)
    objective = SETTINGS.build_objective(vae)

    def epoch() -> float:
        (record,) = fit(objective, train, epochs=1, batch_size=SETTINGS.batch_size, lr=SETTINGS.lr, verbose=False)
        return float(record["loss"])

    return epoch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "fashion-mnist", "kmnist", "digits"))
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw (default: $PYRO_VAE_DATA, else ~/.cache/pyro_vae)")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each (default: %(default)s)")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, found {args.repeats}")
    try:
        train, _ = load_data(args.dataset, data_dir=args.data_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    ways = {"stock Pyro": stock_epoch(train), "pyro_vae.fit": our_epoch(train)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for name, epoch in ways.items():  # a warm-up epoch of each, not counted
        losses[name] = epoch()
    for repeat in range(args.repeats):
        for name, epoch in ways.items():
            start = time.perf_counter()
            losses[name] = epoch()
            seconds[name].append(time.perf_counter() - start)
            print(f"repeat {repeat + 1}  {name:13s} {seconds[name][-1]:6.2f} s", flush=True)
    steps = -(-len(train) // SETTINGS.batch_size)
    print(f"\n{SETTINGS.preset} on {train.name}, batch {SETTINGS.batch_size}", end=", ")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':13s} {'median s':>9s} {'min':>7s} {'max':>7s} {'ms/step':>8s} {'-ELBO':>8s}")
    for name, times in seconds.items():
        median = statistics.median(times)
        row = f"{median:9.2f} {min(times):7.2f} {max(times):7.2f} {1000 * median / steps:8.2f} {losses[name]:8.2f}"
        print(f"{name:13s} {row}")
    ratios = [ours / stock for ours, stock in zip(seconds["pyro_vae.fit"], seconds["stock Pyro"], strict=True)]
    print(f"ratio ours / stock: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
