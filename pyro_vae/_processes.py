"""Data parallelism over processes: each rank takes its shard of every batch and of every data set.

``torchrun`` starts the processes and :func:`group` connects them. Within it ``fit``, ``evaluate`` and ``log_marginal``
divide their work among the ranks, and must be called by every rank with the same arguments. Without a process group, or
with a world size of 1, every function here is the identity.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pyro_vae._checks import SettingError

__all__ = [
    "any_rank",
    "environment_number",
    "gather",
    "gather_objects",
    "group",
    "on_rank_zero",
    "rank",
    "shard",
    "world_size",
]

Value = TypeVar("Value")


@contextmanager
def group(device: str = "cpu") -> Iterator[str]:
    """Initialises the process group of the processes that ``torchrun`` has started; does nothing for a single process.

    Args:
        device: cpu (gloo) or cuda (nccl), of all processes.

    Yields:
        The device of this process: ``cuda:N`` with N its local rank.

    Raises:
        SettingError: several processes, which the environment says too little of.
    """
    if (size := environment_number("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise SettingError(
            "WORLD_SIZE",
            f"expected 1, or {', '.join(missing)} in the environment too, found {size}. Start by torchrun, or unset it.",
        )
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store when it restarts workers, which would find the addresses of the dead ones there.
    store = PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield device
        dist.barrier()  # rank 0 may still be writing: another rank that left now would close its connections
    finally:
        gc.collect()  # a DistributedDataParallel that outlives its process group may abort the process
        dist.destroy_process_group()


def environment_number(name: str, default: int) -> int:
    """A whole number of the environment, as ``torchrun`` sets it.

    Raises:
        SettingError: it is none.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise SettingError(name, f"expected a whole number in the environment, found {text!r}. Unset it.")
    return int(text)


def world_size() -> int:
    """The world size: the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(rows: Tensor) -> Tensor:
    """This rank's shard of a tensor ``(n, ...)``: n / world size contiguous rows, one more on the first ranks if uneven.

    Raises:
        ValueError: fewer rows than processes.
    """
    if len(rows) < world_size():
        raise ValueError(f"expected an observation for each of {world_size()} processes, found {len(rows)}. Start fewer.")
    return rows.tensor_split(world_size())[rank()]


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable[[], Value]) -> Value:
    """Call the function on rank 0 alone, to write files, say; every rank returns its result or raises its exception."""
    if world_size() == 1:
        return function()
    outcome: tuple[Any, Exception | None] = (None, None)
    if rank() == 0:
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
    value, problem = gather_objects(outcome)[0]
    if problem is not None:
        raise problem
    return value


def gather(rows: Tensor) -> Tensor:
    """The shards ``(n_rank, ...)`` of all ranks, concatenated: ``(n, ...)``, on every rank."""
    return rows if world_size() == 1 else torch.cat([part.to(rows.device) for part in gather_objects(rows.cpu())])


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """The logical or of each flag over all ranks."""
    if world_size() == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]
