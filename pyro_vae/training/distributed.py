"""A training step on several processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pyro_vae import _processes as processes
from pyro_vae.training.step import EagerStep

__all__ = ["DistributedStep"]


class DistributedStep(EagerStep):
    r"""A data-parallel step: each rank has its shard of the batch, and all ranks make the same update.

    With :math:`n_r` of the batch's :math:`n` observations, rank r minimises its mean loss times :math:`n_r R / n`. The mean
    of that over the R ranks, of which DistributedDataParallel computes the gradient, is the mean loss of the batch, also for
    shards of unequal size. If forward() depends on the whole batch, as batch norm does, it depends on the shard here.

    Args and attributes: as for :class:`~pyro_vae.training.step.EagerStep`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.module = DistributedDataParallel(self.objective, find_unused_parameters=self._some_unused())

    def _some_unused(self) -> bool:
        """Whether a parameter gets no gradient, as the encoder's in a direct fit: DistributedDataParallel must know."""
        training = self.objective.training
        first = torch.arange(1, device=self.data.x.device)
        with torch.random.fork_rng(devices=[first.device] if first.is_cuda else []):
            loss = self.objective.eval()(*self.data.batch(first))["loss"]
        self.objective.train(training)
        return any(g is None for g in torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def _backward(self, index: Tensor) -> dict[str, Tensor]:
        part = index.tensor_split(processes.world_size())[processes.rank()]
        weight = len(part) / len(index)
        # DistributedDataParallel waits for every rank, so one with an empty shard takes one observation at weight 0.
        terms: dict[str, Tensor] = self.module(*self.data.batch(part if len(part) else index[:1]))
        (terms["loss"] * (weight * processes.world_size())).backward()
        totals = torch.stack([value.detach() * weight for value in terms.values()])
        dist.all_reduce(totals)
        return dict(zip(terms, totals, strict=True))
