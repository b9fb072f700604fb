"""Looking into the latent space: what a fitted VAE has learned, as arrays; pictures of them are in ``plots``.

Functions that draw use torch's global random state: seed it for a reproducible picture.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data import Data, as_data
from pyro_vae.vae import VAE

__all__ = ["denoise", "interpolate", "latent_means", "sample_like", "tsne"]


@torch.no_grad()
def latent_means(vae: VAE, data: "Data | Tensor | np.ndarray[Any, Any]", *, batch_size: int = 1000) -> Tensor:
    """Posterior mean of every observation, ``(N, latent_dim)``, in the order of the data."""
    data = as_data(data).to(vae.prior_loc.device, vae.prior_loc.dtype)
    batches = torch.arange(len(data), device=data.x.device).split(batch_size)
    return torch.cat([vae.encode(data.batch(index)).mean for index in batches])


@torch.no_grad()
def interpolate(vae: VAE, start: Tensor, end: Tensor, *, steps: int = 10) -> tuple[Tensor, Tensor]:
    """The straight way from one observation to another, in latent space and in pixel space.

    Args:
        start: observation, ``event_shape``.
        end: observation, ``event_shape``.
        steps: points on the way, both ends included.

    Returns:
        (latent, pixel), each ``(steps, *event_shape)``: the decoder's mean on the line between the two posterior means,
        and the line between the two observations themselves.
    """
    if steps < 2:
        raise ValueError(f"interpolate: steps must be at least 2 to hold both ends, found {steps}.")
    weight = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype).unsqueeze(-1)  # (steps, 1)
    ends = vae.encode(torch.stack([start, end])).mean  # (2, latent_dim)
    latent = vae.decode(torch.lerp(ends[:1], ends[1:], weight)).mean
    pixel = torch.lerp(start, end, weight.reshape(-1, *(1 for _ in vae.event_shape)))
    return latent, pixel


@torch.no_grad()
def denoise(vae: VAE, x: Tensor, *, flip_rate: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold at 0.5, flip each pixel with probability ``flip_rate``, and reconstruct by way of the posterior mean.

    Args:
        x: observations in [0, 1], ``(batch, *event_shape)``.
        flip_rate: probability that a pixel is flipped.

    Returns:
        (binary, noisy, reconstruction), each the shape of x.
    """
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"denoise: flip_rate must be a probability, found {flip_rate}.")
    binary = (x > 0.5).to(x.dtype)
    flip = (torch.rand_like(x) < flip_rate).to(x.dtype)
    noisy = (binary - flip).abs()
    return binary, noisy, vae.decode(vae.encode(noisy).mean).mean


@torch.no_grad()
def sample_like(vae: VAE, data: Data, label: int, *, num_samples: int) -> Tensor:
    """Images "with a given label": encode random observations of that label, draw z from their posteriors, decode.

    Returns:
        Decoder means, ``(num_samples, *event_shape)``.

    Raises:
        ValueError: the data have no labels, or not this one.
    """
    if data.labels is None:
        raise ValueError(f"sample_like: expected labelled data, found none in {data.name!r}.")
    candidates = (data.labels == label).nonzero().squeeze(-1)
    if len(candidates) == 0:
        found = ", ".join(map(str, data.labels.unique().tolist()))
        raise ValueError(f"sample_like: no observation of {data.name!r} has label {label}; found labels {found}.")
    index = candidates[torch.randint(len(candidates), (num_samples,), device=candidates.device)]
    return vae.decode(vae.encode(data.batch(index)).sample()).mean


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
