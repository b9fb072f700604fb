"""Observations that are held out to test on, where data have no test set of their own."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyro_vae.data.dataset import Data, DataError

__all__ = ["held_out"]

_MOST = 10_000


def held_out(path: Path, data: Data, fraction: float) -> tuple[Data, Data]:
    """Training and test data: parted at random, always alike; of labelled data, the same share of each label, to within one.

    Args:
        path: named in errors.
        data: all of them.
        fraction: to be held out, at least one and at most 10,000.

    Raises:
        DataError: a single observation, which cannot be parted; or the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction: expected a number between 0 and 1, found {fraction!r}.")
    if len(data) < 2:
        raise DataError(f"{path}: expected at least two observations, one of them to test on, found one.")
    count = min(max(1, round(fraction * len(data))), _MOST)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))  # the same for every seed of training
    how = "at random"
    if data.labels is not None:  # every so-many-th of all in the order of their labels
        order, how = order[data.labels[order].argsort(stable=True)], "at random, the same share of each label"
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[(2 * torch.arange(count) + 1) * len(order) // (2 * count)] = True
        order = torch.cat([order[chosen], order[~chosen]])

    def part(index: Tensor, note: str) -> Data:
        return replace(data.subset(index.sort().values), note=f"{data.note}; {note}")

    return part(order[count:], f"{count:,} held out as test set"), part(order[:count], f"held out {how}")
