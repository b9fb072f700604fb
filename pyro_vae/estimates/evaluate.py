"""Estimates over a whole data set -> plain records."""

from typing import Any

import torch
from torch import Tensor

from pyro_vae import _processes as processes
from pyro_vae._checks import whole_number
from pyro_vae.data.own import DataLike, as_data
from pyro_vae.estimates.importance import log_marginal
from pyro_vae.estimates.log_weights import require_densities, weigh
from pyro_vae.estimates.records import Estimate
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.programs import ProgramPair, evaluating, programs_and_data

__all__ = ["evaluate"]


def evaluate(
    model: Any,
    guide: Any,
    data: Any = None,
    *,
    num_samples: int = 10,
    importance_samples: int = 0,
    batch_size: int = 500,
    seed: int = 0,
) -> dict[str, Estimate]:
    r"""The negative ELBO of a whole data set and its two terms, in nats per observation, each with its standard error.

    .. math:: -\mathrm{ELBO} = \frac1N \sum_i \Big( \frac1K \sum_k -\log p(x_i \mid z_{ik})
        + \mathrm{KL}(q(z \mid x_i) \,\|\, p(z)) \Big), \qquad z_{ik} \sim q(z \mid x_i)

    The KL is in closed form if every latent site has one; its error is then 0 (with several sites, that of the draws on
    which later sites depend). Otherwise it is log q - log p at the draws, with its error. A term's standard error is
    :math:`\sqrt{\sum_i s_i^2 / K} / N`, with :math:`s_i^2` the variance of the term over k. It does not include the
    variation over other data sets.

    Args:
        model: Pyro program, called as ``model(*batch)``; or a module with methods ``model`` and ``guide``, followed by the
            data: ``evaluate(vae, data)``. Runs in evaluation mode, without gradients, on the device of the parameters; the
            previous mode is restored. For a plain autoencoder only the squared error is defined.
        guide: Pyro program, called as ``guide(*batch)``.
        data: observations; dynamic binarisation is drawn once per call, the same for the same seed.
        num_samples: latent draws per observation, at least 2, because one draw gives no standard error.
        importance_samples: draws per observation for log p(x) by
            :func:`~pyro_vae.estimates.importance.log_marginal`, at least 2; 0: log p(x) is not estimated.
        batch_size: observations per batch; each has num_samples draws.
        seed: seed of the draws; torch's global random state is restored.

    Returns:
        :class:`~pyro_vae.estimates.records.Estimate` by name: ``neg_elbo``, ``reconstruction``, ``kl``, terms of the
        likelihood (``squared_error``, say), and ``log_marginal`` (higher is better; at least -neg_elbo up to its error). For
        an autoencoder: ``squared_error``, summed over elements, and ``mean_squared_error``, per element.

    Raises:
        ValueError: fewer than 2 samples, programs that are no pair with one data plate, a guide without a density where the
            model has one (a point mass, say), or data that do not suit them.
    """
    if isinstance(model, Autoencoder):
        return _squared_error(model, guide, whole_number("batch_size", batch_size), seed)
    num_samples = whole_number("num_samples", num_samples, minimum=2)  # one draw gives no standard error
    importance_samples = whole_number("importance_samples", importance_samples, minimum=0)
    if importance_samples == 1:
        raise ValueError("importance_samples: expected 0 or a whole number >= 2, found 1.")
    batch_size, seed = whole_number("batch_size", batch_size), whole_number("seed", seed, minimum=0)
    pair, given = programs_and_data(model, guide, data)
    held = as_data(given)
    if (like := pair.example()) is not None:
        held = held.to(like.device, like.dtype)
    held.check(pair.check)
    device = held.x.device
    columns, batches = [], []
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.no_grad(), random_state, evaluating(*pair.programs):
        torch.manual_seed(seed + processes.rank())
        for index in processes.shard(torch.arange(len(held), device=device)).split(batch_size):
            batch = held.batch(index)
            columns.append(_terms(pair, batch, num_samples))
            if importance_samples:
                batches.append(batch)
        if importance_samples:  # in one call, whose draws are independent from observation to observation
            everything = tuple(processes.gather(torch.cat(parts)) for parts in zip(*batches, strict=True))
            log_p = log_marginal(*pair.programs, everything, num_samples=importance_samples)
    metrics = {}
    for name in _TERMS:
        # Averaged in float64: a float32 sum over a data set loses precision.
        mean, variance = (processes.gather(torch.cat([c[name][part] for c in columns]).double()) for part in (0, 1))
        error = (variance.sum() / num_samples).sqrt().item() / len(held)
        metrics[name] = Estimate(mean.mean().item(), error, num_samples if error else 0)
    reconstruction = metrics["reconstruction"]
    value, moved = (
        pair.terms(torch.tensor(r, dtype=torch.float64))
        for r in (reconstruction.value, reconstruction.value + reconstruction.standard_error)
    )
    for name in value:  # the terms are affine, so this scales the error
        metrics[name] = Estimate(value[name].item(), abs((moved[name] - value[name]).item()), num_samples)
    if importance_samples:
        metrics["log_marginal"] = log_p.mean
    return metrics


_TERMS = ("neg_elbo", "reconstruction", "kl")


def _terms(pair: ProgramPair, batch: tuple[Tensor, ...], num_samples: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance over the draws of each term, ``(B,)``."""
    weights = weigh(pair, batch, num_samples)
    require_densities(weights.sites)
    closed = all(site.closed_kl is not None for site in weights.latents)
    reconstruction, kl = weights.reconstruction(), weights.kl(analytic=closed)
    terms = (reconstruction + kl, reconstruction, kl)
    return {name: (term.mean(0), _variance(term)) for name, term in zip(_TERMS, terms, strict=True)}


def _variance(term: Tensor) -> Tensor:
    """The variance over the draws; exactly 0 if they are all equal."""
    return torch.where((term == term[0]).all(0), 0.0, term.var(0))


def _squared_error(model: Autoencoder, data: DataLike, batch_size: int, seed: int) -> dict[str, Estimate]:
    """The errors of a plain autoencoder, which draws nothing, so that they are exact."""
    like = next(model.parameters())
    data = as_data(data).to(like.device, like.dtype)
    total = 0.0
    with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []), evaluating(model):
        torch.manual_seed(seed + processes.rank())  # for dynamic binarisation
        for index in processes.shard(torch.arange(len(data), device=like.device)).split(batch_size):
            (x,) = data.batch(index)
            total += (model(x) - x).square().sum(dtype=torch.float64).item()
    per_observation = sum(processes.gather_objects(total)) / len(data)
    return {
        "squared_error": Estimate(per_observation, 0.0, 0),
        "mean_squared_error": Estimate(per_observation / data.event_shape.numel(), 0.0, 0),
    }
