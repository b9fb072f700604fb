"""log p(x) by importance sampling, for any Pyro model and guide with one data plate, with standard error and diagnostics.

:func:`log_marginal` computes the weights in chunks of bounded memory.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae import _processes as processes
from pyro_vae._checks import compile_choice, whole_number
from pyro_vae.data.own import as_batch
from pyro_vae.engine.calls import Calls
from pyro_vae.engine.program import Graph, Program
from pyro_vae.estimates.log_weights import log_weights, weigh, wrong_weights
from pyro_vae.estimates.psis import Accumulator
from pyro_vae.estimates.records import LogMarginal
from pyro_vae.models.programs import ProgramPair, evaluating, programs_and_data

__all__ = ["ChunkWeights", "log_marginal"]


def log_marginal(
    model: Any,
    guide: Any,
    x: Any = None,
    *,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    compile: bool | None = None,
) -> LogMarginal:
    r"""Importance-sampled marginal log-likelihood of every observation under a Pyro model, with the guide as proposal.

    .. math:: \log \hat p(x_i) = \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}, \quad z_{ik} \sim q(z \mid x_i)

    The estimate is a lower bound in expectation, by Jensen's inequality, that tightens as K grows (Burda et al. 2016,
    arXiv:1509.00519). Latent sites that the guide does not have are drawn from the model; with a guide that has none, the
    estimate is simple Monte Carlo from the prior. Scales of sites (``poutine.scale``, subsampling) are not applied, because
    they do not belong to the density. Modules run in evaluation mode, without gradients. torch's random state is restored:
    the same state and chunk_size give the same draws, so set a new seed between calls whose errors must be independent.

    The programs are called on parts of the batch. Whatever else they need per observation (labels, exposures) belongs to the
    batch: log p(x | y) of a conditional model is ``log_marginal(model, guide, (x, y))``. Draws are a leading dimension, z
    ``(num_samples, B, ...)``, over which a decoder must broadcast.

    Args:
        model: Pyro program, called as ``model(*batch)``; every site in one plate of dimension -1 over the observations. Or a
            module with methods ``model`` and ``guide``, followed by x: ``log_marginal(vae, x)``.
        guide: Pyro program, called as ``guide(*batch)``.
        x: observations, ``(B, ...)``: a tensor, a tuple of tensors with one leading dimension, ``(x, y)``, or any data that
            :func:`~pyro_vae.data.own.as_data` takes, as one batch.
        num_samples: draws per observation, K.
        chunk_size: pairs (draw, observation) per chunk; default: as many as have 2^23 numbers. Memory grows with it, and not
            with K or B.
        compile: trace model and guide once, and run each chunk as one compiled call: the same values for the same draws,
            1.3 times as fast, after some 15 seconds of compilation. None: on the CPU, if there are at least 2,000 chunks.
            Falls back to eager execution, with a :class:`~pyro_vae.engine.tracing.NotCompiledWarning`, if the programs
            cannot be compiled. Needs a C++ compiler.

    Returns:
        :class:`~pyro_vae.estimates.records.LogMarginal`, each field ``(B,)``, float64.

    Raises:
        ValueError: there are no draws or no data; a site is outside the data plate, or in the guide alone; or a log weight
            is nan or +inf (the message names the site).

    Warns:
        UnreliableEstimateWarning: once, if Pareto k indicates that the errors of some observations are not reliable. Their
            values are still lower bounds in expectation.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):  # z ~ N(0, 1), x | z ~ N(z, 1), hence x ~ N(0, 2)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 1.0, -3.0])
        >>> estimate = log_marginal(model, guide, x, num_samples=100)
        >>> torch.allclose(estimate.value.float(), dist.Normal(0.0, 2**0.5).log_prob(x))
        True
    """
    num_samples = whole_number("num_samples", num_samples)
    chunk_size = None if chunk_size is None else whole_number("chunk_size", chunk_size)
    pair, data = programs_and_data(model, guide, x)
    batch = as_batch(data)
    first = batch[0]
    if first.dim() == 0 or first.numel() == 0:
        raise ValueError(f"log_marginal: expected observations of shape (B, ...), found shape {tuple(first.shape)}.")
    pair.check(*batch)
    # 2^23 numbers, 32 MiB, is the largest tensor that glibc keeps for reuse instead of returning its pages to the system;
    # hidden layers are rarely narrower than 128.
    chunk_size = chunk_size or max(1, 2**23 // max(first[0].numel(), 128))
    draws = min(num_samples, chunk_size)  # all draws of few observations, not the reverse: the guide runs once for each
    chunks = [min(draws, num_samples - done) for done in range(0, num_samples, draws)]
    at_once = max(1, chunk_size // draws)
    compile = compile_choice(compile, first.device)
    mine = [processes.shard(t) for t in batch]
    pays = first.device.type == "cpu" and (len(mine[0]) // at_once) * (num_samples // draws) >= _PAYS
    weights = ChunkWeights(pair, (draws, min(at_once, len(mine[0]))))
    weighed: Callable[[tuple[Sequence[Tensor], int]], Tensor] = weights.eager
    if compile or (compile is None and pays):
        weighed = Calls(weights, what="log_marginal, run eagerly")
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices=[first.device] if first.is_cuda else []), evaluating(*pair.programs):
        if processes.world_size() > 1:  # other noise on each of them
            torch.manual_seed(int(torch.randint(2**62, ())) + processes.rank())
        for part in zip(*(t.split(at_once) for t in mine), strict=True):
            accumulator = Accumulator(num_samples)
            for k in chunks:
                accumulator.add(weighed((part, k)))
            parts.append(accumulator.results())
    value, error, ess, tail = (processes.gather(torch.cat(columns)) for columns in zip(*parts, strict=True))
    result = LogMarginal(value, error, ess, tail, num_samples)
    result.warn("log_marginal")
    return result


# The number of chunks from which compilation pays: a chunk takes about 90 ms, of which compiled code saves a quarter.
_PAYS = 2000


class ChunkWeights(Program[tuple[Sequence[Tensor], int], Tensor]):
    """The log weights of chunks of a fixed number of draws and observations, ``(num_samples, B)``.

    Chunks of another shape run eagerly; so do those with weights of nan or +inf, for an error that names the site.

    Args:
        pair: the programs.
        shape: (draws, observations).
    """

    stateless = True

    def __init__(self, pair: ProgramPair, shape: tuple[int, int]) -> None:
        self.pair, self.shape = pair, shape

    def key(self, call: tuple[Sequence[Tensor], int]) -> Hashable:
        batch, num_samples = call
        return self.shape if (num_samples, len(batch[0])) == self.shape else None

    def inputs(self, call: tuple[Sequence[Tensor], int]) -> Sequence[Tensor]:
        return call[0]

    def eager(self, call: tuple[Sequence[Tensor], int]) -> Tensor:
        return log_weights(self.pair, *call)

    def trace(self, call: tuple[Sequence[Tensor], int], noted: list[Tensor]) -> tuple[list[Tensor], list[Tensor], None]:
        with pyro.validation_enabled(False):  # validation depends on values, which a graph does not have
            return [], [weigh(self.pair, *call).log_weights.clone()], None

    def result(self, call: tuple[Sequence[Tensor], int], graph: Graph, numbers: list[float], others: list[Tensor]) -> Tensor:
        if bool(wrong_weights(others[0]).any()):
            raise ValueError("nan or +inf log weights")
        return others[0]

    def difference(self, found: Tensor, expected: Tensor) -> str:
        same = torch.allclose(found, expected, rtol=1e-4, atol=1e-3)
        return "" if same else "its log weights are not those of the eager call"
