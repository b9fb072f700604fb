"""Shuffling of the data and seeds of the noise, as functions of (seed, epoch)."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyro_vae import _processes as processes
from pyro_vae.training.state import set_noise

__all__ = ["batches_of", "streams"]


def batches_of(
    size: int, batch_size: int, seed: int, device: torch.device, done: int, noise: list[dict[str, Tensor]] | None
) -> Iterator[Tensor]:
    """Yields the indices of each batch after the first ``done``, without end. Seeds torch's random state at the start of an
    epoch; if training resumes within an epoch, the state of each rank is restored from ``noise``."""
    epochs_done, batches_done = divmod(done, math.ceil(size / batch_size))
    for epoch in itertools.count(epochs_done + 1):
        # Two streams, so that the shuffling does not depend on how many random numbers the objective draws.
        order_seed, noise_seed = streams(seed, epoch)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(order_seed)).to(device)
        torch.manual_seed(noise_seed)
        if batches_done and noise is not None and processes.rank() < len(noise):  # otherwise the world size has grown
            set_noise(noise[processes.rank()], device)
        yield from order.split(batch_size)[batches_done:]
        batches_done = 0


def streams(seed: int, epoch: int) -> tuple[int, int]:
    """Independent seeds of shuffling and noise for an epoch; epoch 0 is used for evaluations.

    The noise differs between ranks, the shuffling does not.
    """
    order, noise = np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)
    if rank := processes.rank():
        (noise,) = np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)
    return int(order), int(noise)
