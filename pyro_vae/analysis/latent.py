"""Looking into the latent space: what a fitted model has learned, as arrays; pictures of them are in ``plots``.

Models are VAEs or plain autoencoders, whose code stands where a VAE has its posterior mean, and are looked at in evaluation
mode. Functions that draw use torch's global random state: seed it for a reproducible picture.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from pyro_vae._checks import whole_number
from pyro_vae.data.dataset import Data
from pyro_vae.data.own import DataLike, as_data
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.programs import evaluating
from pyro_vae.models.vae import VAE

__all__ = [
    "active_units",
    "decoder_mean",
    "denoise",
    "interpolate",
    "kl_per_dimension",
    "latent_means",
    "latent_record",
    "manifold_grid",
    "sample_like",
    "tsne",
]

Model = VAE | Autoencoder


def _encode(model: Model, *batch: Tensor) -> Tensor:
    """Posterior mean, or code."""
    return model.encode(*batch).mean if isinstance(model, VAE) else model.encode(*batch)


@torch.no_grad()
def decoder_mean(model: Model, z: Tensor, *context: Tensor) -> Tensor:
    """The image that the decoder draws at z ``(n, latent_dim)``, its mean: ``(n, *event_shape)``."""
    with evaluating(model):
        return model.decode(z, *context).mean if isinstance(model, VAE) else model.decode(z, *context)


@torch.no_grad()
def latent_means(model: Model, data: DataLike, *, batch_size: int = 1000) -> Tensor:
    """Posterior mean, or code, of every observation, ``(N, latent_dim)``, in the order of the data."""
    like = model.example() if isinstance(model, VAE) else next(model.parameters())
    data = as_data(data).to(like.device, like.dtype)
    batches = torch.arange(len(data), device=data.x.device).split(batch_size)
    with evaluating(model):
        return torch.cat([_encode(model, *data.batch(index)) for index in batches])


def _require_posterior(name: str, vae: Model) -> None:
    if not isinstance(vae, VAE):
        raise ValueError(f"{name}: expected a VAE, found {type(vae).__name__}, which has no posterior.")


@torch.no_grad()
def kl_per_dimension(vae: VAE, data: DataLike, *, batch_size: int = 1000) -> Tensor:
    r"""KL of every latent dimension, averaged over the data: ``(latent_dim,)``, nats per observation.

    .. math:: \frac1N \sum_i \tfrac12 \big( \mu_{ij}^2 + \sigma_{ij}^2 - \log \sigma_{ij}^2 - 1 \big)

    Their sum is the KL term of the ELBO. A dimension near 0 carries nothing: its posterior is the prior whatever x.
    """
    _require_posterior("kl_per_dimension", vae)
    data = as_data(data).to(vae.like.device, vae.example().dtype)
    total = torch.zeros(vae.latent_dim, dtype=torch.float64, device=vae.like.device)
    with evaluating(vae):
        for index in torch.arange(len(data), device=data.x.device).split(batch_size):
            x, *context = data.batch(index)
            q, p = vae.encode(x, *context), vae.prior_of(*context)
            if not all(isinstance(d, Independent) and isinstance(d.base_dist, Normal) for d in (q, p)):
                raise ValueError(
                    f"kl_per_dimension: expected posterior and prior of independent normals, found {q} and {p}. Only of "
                    "those is the KL a sum over dimensions; NegativeELBO and log_marginal take others."
                )
            total += kl_divergence(q.base_dist, p.base_dist).sum(0, dtype=torch.float64)
    return (total / len(data)).to(vae.like.dtype)


def active_units(vae: VAE, data: DataLike, *, threshold: float = 0.01) -> Tensor:
    """Which latent dimensions the model uses: ``(latent_dim,)`` of bool; ``.sum()`` is the number of active units.

    A unit is active where the variance of its posterior mean over the data is above the threshold (Burda et al. 2016,
    arXiv:1509.00519, section 5.2).
    """
    _require_posterior("active_units", vae)
    return latent_means(vae, data).var(0, correction=0) > threshold


@torch.no_grad()
def interpolate(model: Model, start: Tensor, end: Tensor, *, steps: int = 10, path: str = "linear") -> tuple[Tensor, Tensor]:
    r"""The way from one observation to another, in latent space and in pixel space.

    Args:
        model: a VAE or an autoencoder.
        start: observation, ``event_shape``.
        end: observation, ``event_shape``.
        steps: points on the way, both ends included.
        path: of the latent: ``"linear"``, or ``"spherical"`` (White 2016, arXiv:1609.04468):
            :math:`\frac{\sin (1-t) \omega}{\sin \omega} z_0 + \frac{\sin t \omega}{\sin \omega} z_1`,
            :math:`\omega` the angle between both, which keeps to the distance from 0 at which a prior of many dimensions has
            its mass.

    Returns:
        (latent, pixel), each ``(steps, *event_shape)``: the decoder's mean on the way between the two posterior means,
        and the straight line between the two observations themselves.

    Raises:
        ValueError: fewer than 2 steps, or no such path.
    """
    if steps < 2:
        raise ValueError(f"interpolate: steps must be at least 2 to hold both ends, found {steps}.")
    if path not in ("linear", "spherical"):
        raise ValueError(f"interpolate: path must be 'linear' or 'spherical', found {path!r}.")
    t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype).unsqueeze(-1)  # (steps, 1)
    with evaluating(model):
        a, b = _encode(model, torch.stack([start, end])).split(1)  # each (1, latent_dim)
        s = t.to(a.dtype)  # which may not be that of the observations
        cosine = torch.cosine_similarity(a, b).clamp(-1, 1)
        angle = torch.arccos(cosine)
        if path == "spherical" and angle.sin() > 1e-4:  # along one line through 0 there is no arc but the line
            z = (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)
        else:
            z = torch.lerp(a, b, s)
        latent = decoder_mean(model, z)
    return latent, torch.lerp(start, end, t.reshape(-1, *(1 for _ in model.event_shape)))


@torch.no_grad()
def manifold_grid(
    model: Model,
    *,
    size: int = 25,
    spacing: str = "equal",
    limits: tuple[float, float, float, float] = (-3.0, 3.0, -3.0, 3.0),
    axes: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Tensor, Tensor]:
    """What the decoder draws over a plane of the latent space, all other dimensions 0.

    Args:
        model: a VAE or an autoencoder.
        size: points per axis.
        spacing: ``"equal"`` steps within limits; ``"probability"``: equal steps of probability under N(0, 1), through its
            quantiles at (i + 1/2) / size, so that images take the room that the prior gives them.
        limits: ``(first low, first high, second low, second high)`` for equal steps.
        axes: the two latent dimensions that span the plane.

    Returns:
        (images, first, second): ``(size * size, *event_shape)``, row by row as read on a page, the second axis falling from
        row to row; and the values on the two axes, ``(size,)`` each, ascending.

    Raises:
        ValueError: no such spacing or axes, or limits that are no intervals.
    """
    size = whole_number("size", size)
    if len(set(axes)) != 2 or not all(0 <= axis < model.latent_dim for axis in axes):
        raise ValueError(f"manifold_grid: expected two of the {model.latent_dim} latent dimensions, found axes {axes}.")
    like = next(model.parameters())
    if spacing == "equal":
        low, high, bottom, top = limits
        if not (-math.inf < low < high < math.inf and -math.inf < bottom < top < math.inf):
            raise ValueError(f"manifold_grid: expected limits (low, high, low, high), found {limits}.")
        first, second = (
            torch.linspace(*ends, size, device=like.device, dtype=like.dtype) for ends in (limits[:2], limits[2:])
        )
    elif spacing == "probability":
        p = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size
        first = second = torch.special.ndtri(p)
    else:
        raise ValueError(f"manifold_grid: spacing must be 'equal' or 'probability', found {spacing!r}.")
    z = torch.zeros(size, size, model.latent_dim, device=like.device, dtype=like.dtype)  # (row, column, latent_dim)
    z[..., axes[0]] = first
    z[..., axes[1]] = second.flip(0).unsqueeze(-1)
    return decoder_mean(model, z.flatten(0, 1)), first, second


@torch.no_grad()
def denoise(model: Model, x: Tensor, *context: Tensor, flip_rate: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold at 0.5, flip each pixel with probability ``flip_rate``, and reconstruct by way of the posterior mean.

    Args:
        model: a VAE or an autoencoder.
        x: observations in [0, 1], ``(batch, *event_shape)``.
        context: what else a batch has, of a conditional model.
        flip_rate: probability that a pixel is flipped.

    Returns:
        (binary, noisy, reconstruction), each the shape of x.

    Raises:
        ValueError: flip_rate is no probability.
    """
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"denoise: flip_rate must be a probability, found {flip_rate}.")
    binary = (x > 0.5).to(x.dtype)
    flip = (torch.rand_like(x) < flip_rate).to(x.dtype)
    noisy = (binary - flip).abs()
    with evaluating(model):
        return binary, noisy, decoder_mean(model, _encode(model, noisy, *context), *context)


@torch.no_grad()
def sample_like(vae: VAE, data: Data, label: int, *, num_samples: int) -> Tensor:
    """Images "with a given label": encode random observations of that label, draw z from their posteriors, decode.

    Returns:
        Decoder means, ``(num_samples, *event_shape)``.

    Raises:
        ValueError: the data have no labels, or not this one; or the model has no posterior.
    """
    _require_posterior("sample_like", vae)
    if data.labels is None:
        raise ValueError(f"sample_like: expected labelled data, found none in {data.name!r}.")
    candidates = (data.labels == label).nonzero().squeeze(-1)
    if len(candidates) == 0:
        found = ", ".join(map(str, data.labels.unique().tolist()))
        raise ValueError(f"sample_like: no observation of {data.name!r} has label {label}; found labels {found}.")
    index = candidates[torch.randint(len(candidates), (num_samples,), device=candidates.device)]
    with evaluating(vae):
        x, *context = data.batch(index)
        return vae.decode(vae.encode(x, *context).sample(), *context).mean


def latent_record(vae: VAE, data: DataLike, *, limit: int = 500) -> dict[str, Any]:
    """Where the first observations lie in latent space, as plain numbers: ``latents.json`` of a run folder.

    Returns:
        ``means``: posterior means, a list of ``limit`` lists of latent_dim numbers; ``labels`` and ``classes`` of these
        observations, or None; ``kl_per_dimension``: of all the data, see :func:`kl_per_dimension`.
    """
    data = as_data(data)
    some = data.subset(slice(limit))
    return {
        "means": [[round(value, 4) for value in row] for row in latent_means(vae, some).tolist()],
        "labels": None if some.labels is None else some.labels.tolist(),
        "classes": list(data.classes) or None,
        "kl_per_dimension": kl_per_dimension(vae, data).tolist(),
    }


def tsne(latents: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> "np.ndarray[Any, Any]":
    """Two-dimensional t-SNE of latent means (van der Maaten and Hinton 2008), PCA init: ``(N, 2)``.

    Distances between far clusters and sizes of clusters mean nothing in such a picture; neighbourhoods do.
    """
    from sklearn.manifold import TSNE  # heavy, and only needed here

    if len(latents) <= perplexity:
        raise ValueError(f"tsne: needs more observations than the perplexity {perplexity:g}, found {len(latents)}.")
    init = "pca" if latents.shape[1] > 1 else "random"  # PCA to two dimensions needs two
    embedding = TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(latents.cpu().numpy())
    return np.asarray(embedding)
