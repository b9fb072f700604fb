"""Whole-dataset measures -> plain records."""

import torch
from torch.distributions import kl_divergence

from pyro_vae import processes
from pyro_vae.autoencoder import Autoencoder
from pyro_vae.checks import whole_number
from pyro_vae.importance import Estimate, evaluating, log_marginal
from pyro_vae.own_data import DataLike, as_data
from pyro_vae.vae import VAE

__all__ = ["evaluate"]


def evaluate(
    vae: VAE | Autoencoder,
    data: DataLike,
    *,
    num_samples: int = 10,
    importance_samples: int = 0,
    batch_size: int = 500,
    seed: int = 0,
) -> dict[str, Estimate]:
    r"""The negative ELBO of a whole data set and its two terms, in nats per observation, each with its standard error.

    .. math:: -\mathrm{ELBO} = \frac1N \sum_i \Big( \frac1K \sum_k -\log p(x_i \mid z_{ik})
        + \mathrm{KL}(q(z \mid x_i) \,\|\, p(z)) \Big), \qquad z_{ik} \sim q(z \mid x_i)

    The KL is the closed form, so the error is that of the reconstruction term alone: with :math:`s_i^2` the variance of
    :math:`\log p(x_i \mid z_{ik})` over k, :math:`\sqrt{\sum_i s_i^2 / K} / N`. It says nothing of how the figure would
    vary over other data sets.

    Args:
        vae: evaluated in evaluation mode, without gradients, where its parameters are; left in the mode it was in. Of
            a plain autoencoder the squared error is all there is.
        data: observations; dynamic binarisation is drawn once per call, the same for the same seed.
        num_samples: latent draws per observation, at least 2 (one draw carries no error).
        importance_samples: draws per observation for log p(x) by :func:`~pyro_vae.importance.log_marginal`, at least 2; 0:
            leave it out.
        batch_size: observations held at once, times num_samples.
        seed: seed of the draws; torch's global random state is left as found.

    Returns:
        :class:`~pyro_vae.importance.Estimate` by name: ``neg_elbo``, ``reconstruction``, ``kl``, what the likelihood adds,
        and ``log_marginal`` (higher is better, at least -neg_elbo up to its error). Of an autoencoder: ``squared_error``,
        summed over elements, and ``mean_squared_error`` per element.

    Raises:
        ValueError: fewer than 2 samples, or data that do not suit the likelihood.
    """
    if isinstance(vae, Autoencoder):
        return _squared_error(vae, data, whole_number("batch_size", batch_size), seed)
    if not isinstance(vae, VAE):
        raise ValueError(f"evaluate: expected a VAE, found {type(vae).__name__}.")
    num_samples = whole_number("num_samples", num_samples, minimum=2)  # one draw carries no error
    importance_samples = whole_number("importance_samples", importance_samples, minimum=0)
    if importance_samples == 1:
        raise ValueError("importance_samples: expected 0 or a whole number >= 2, found 1.")
    batch_size, seed = whole_number("batch_size", batch_size), whole_number("seed", seed, minimum=0)
    device = vae.prior_loc.device
    data = as_data(data).to(device, vae.prior_loc.dtype)
    data.check(lambda x, *context: vae.likelihood.check(x), vae.encode)
    means, variances, kls, observations = [], [], [], []
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.no_grad(), random_state, evaluating(vae):
        torch.manual_seed(seed + processes.rank())
        for index in processes.share(torch.arange(len(data), device=device)).split(batch_size):
            x, *context = data.batch(index)
            vae.check_batch(x)
            q = vae.encode(x, *context)
            draws = -vae.decode(q.sample((num_samples,)), *context).log_prob(x)  # (num_samples, batch)
            means.append(draws.mean(0))
            variances.append(draws.var(0))
            kls.append(kl_divergence(q, vae.prior().expand(q.batch_shape)))
            if importance_samples:
                observations.append(x)
        if importance_samples:  # in one call, whose draws are independent from image to image
            everything = processes.gather(torch.cat(observations))
            log_p = log_marginal(vae.generate, vae.infer, everything, num_samples=importance_samples)
    # Averaged in float64: one float32 sum over a data set would cost digits.
    mean, variance, kl_of_each = (processes.gather(torch.cat(c).double()) for c in (means, variances, kls))
    reconstruction = mean.mean().cpu()
    kl = kl_of_each.mean().item()
    error = (variance.sum() / num_samples).sqrt().item() / len(data)
    figures = {
        "neg_elbo": Estimate(reconstruction.item() + kl, error, num_samples),
        "reconstruction": Estimate(reconstruction.item(), error, num_samples),
        "kl": Estimate(kl, 0.0, 0),
    }
    extra = vae.likelihood.terms(reconstruction, vae.event_shape)
    moved = vae.likelihood.terms(reconstruction + error, vae.event_shape)  # the terms are affine, so this scales the error
    for name, value in extra.items():
        figures[name] = Estimate(value.item(), abs((moved[name] - value).item()), num_samples)
    if importance_samples:
        figures["log_marginal"] = log_p.mean
    return figures


def _squared_error(model: Autoencoder, data: DataLike, batch_size: int, seed: int) -> dict[str, Estimate]:
    """An autoencoder draws nothing, so its figures are exact."""
    like = next(model.parameters())
    data = as_data(data).to(like.device, like.dtype)
    total = 0.0
    with torch.no_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []), evaluating(model):
        torch.manual_seed(seed + processes.rank())  # for dynamic binarisation
        for index in processes.share(torch.arange(len(data), device=like.device)).split(batch_size):
            (x,) = data.batch(index)
            total += (model(x) - x).square().sum(dtype=torch.float64).item()
    per_observation = sum(processes.gather_objects(total)) / len(data)
    return {
        "squared_error": Estimate(per_observation, 0.0, 0),
        "mean_squared_error": Estimate(per_observation / data.event_shape.numel(), 0.0, 0),
    }
