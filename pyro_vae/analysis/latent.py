"""Analysis of the latent space of a fitted model, as arrays; ``plots`` makes figures of them.

``model`` is a module with methods ``model`` and ``guide``, such as a :class:`~pyro_vae.VAE`, a pair ``(model, guide)`` of
any Pyro programs, or a :class:`~pyro_vae.models.programs.ProgramPair`; or a plain autoencoder, whose code replaces the
posterior mean. All latent sites of the guide are concatenated to one latent vector, see
:class:`~pyro_vae.analysis.coder.Coder`. A function that is not defined for a model raises an
:class:`~pyro_vae.analysis.coder.UndefinedError`.

Models are evaluated in evaluation mode. Functions that draw use torch's global random state: seed it for reproducible
figures.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae._checks import number, whole_number
from pyro_vae.analysis.coder import Coder, UndefinedError
from pyro_vae.data.dataset import Data
from pyro_vae.data.own import DataLike, as_data
from pyro_vae.estimates.log_weights import weigh
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.programs import evaluating

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


@torch.no_grad()
def decoder_mean(model: Any, z: Tensor, *context: Tensor, like: Tensor | None = None) -> Tensor:
    """The mean of p(x | z): ``(n, *event_shape)``.

    Args:
        model: see above.
        z: latent vectors, ``(n, latent_dim)``.
        context: of a conditional model: the other tensors of a batch, n rows each.
        like: an observation, ``(1, *event_shape)``, of which only shape and dtype are used; required if the module has no
            ``event_shape``.

    Raises:
        UndefinedError: there is not exactly one site that observes x, it has no mean, or z lies outside the support of a
            latent site.
        ValueError: z has the wrong shape, or ``like`` is required.
    """
    coder = Coder(model)
    with evaluating(*coder.programs):
        return coder.decode(z, coder.observations("decoder_mean", like, len(z)), *context).mean


@torch.no_grad()
def latent_means(model: Any, data: DataLike, *, batch_size: int = 1000) -> Tensor:
    """Posterior mean, or code, of every observation, ``(N, latent_dim)``, in the order of the data.

    Raises:
        UndefinedError: the distribution of a latent site has no mean in closed form.
    """
    batch_size = whole_number("batch_size", batch_size)
    coder = Coder(model)
    held = _as_taken(coder, data)
    batches = torch.arange(len(held), device=held.x.device).split(batch_size)
    with evaluating(*coder.programs):
        return torch.cat([coder.means(*held.batch(index)) for index in batches])


def _as_taken(coder: Coder, data: DataLike) -> Data:
    """The data in the dtype and on the device of the model."""
    held, example = as_data(data), coder.example()
    return held if example is None else held.to(example.device, example.dtype)


@torch.no_grad()
def kl_per_dimension(model: Any, data: DataLike, *, batch_size: int = 1000, num_samples: int = 100) -> Tensor:
    r"""KL of every latent dimension, averaged over the data: ``(latent_dim,)``, nats per observation.

    .. math:: \frac1N \sum_i \mathrm{KL}\big( q(z_j \mid x_i) \,\|\, p(z_j) \big)

    In closed form if every latent site has one; a site that depends on other sites is then evaluated at one draw of these.
    Otherwise log q - log p, averaged over ``num_samples`` draws. The sum over dimensions is the KL term of the ELBO. A
    dimension with a KL near 0 has collapsed: its posterior equals the prior for every x.

    Raises:
        UndefinedError: the dimensions are not independent under guide and model, so that the KL is no sum over them.
    """
    coder = Coder(model)
    pair, held = coder.require_pair("kl_per_dimension"), _as_taken(coder, data)
    num_samples = whole_number("num_samples", num_samples)
    total: Any = 0.0
    with evaluating(*coder.programs):
        for index in torch.arange(len(held), device=held.x.device).split(batch_size):
            batch = held.batch(index)
            with torch.random.fork_rng(devices=[held.x.device] if held.x.is_cuda else []):  # a closed form draws nothing
                weights = weigh(pair, batch)
            closed = all(site.closed_kl is not None for site in weights.latents)
            try:
                kl = (weights if closed else weigh(pair, batch, num_samples)).kl_per_dimension(analytic=closed)
            except ValueError as error:
                raise UndefinedError(f"kl_per_dimension: {error}") from error
            total += len(index) * kl.double()
    example = coder.example()
    return (total / len(held)).to(held.x.dtype if example is None else example.dtype)


def active_units(model: Any, data: DataLike, *, threshold: float = 0.01) -> Tensor:
    """Which latent dimensions are active: ``(latent_dim,)`` of bool; ``.sum()`` is the number of active units.

    A unit is active if the variance of its posterior mean over the data is above the threshold (Burda et al. 2016,
    arXiv:1509.00519, section 5.2).
    """
    Coder(model).require_pair("active_units")
    return latent_means(model, data).var(0, correction=0) > threshold


@torch.no_grad()
def interpolate(model: Any, start: Tensor, end: Tensor, *, steps: int = 10, path: str = "linear") -> tuple[Tensor, Tensor]:
    r"""Interpolation between two observations, in latent space and in pixel space.

    Args:
        model: see above.
        start: observation, ``event_shape``.
        end: observation, ``event_shape``.
        steps: number of points, both ends included.
        path: in latent space: ``"linear"``, or ``"spherical"`` (White 2016, arXiv:1609.04468):
            :math:`\frac{\sin (1-t) \omega}{\sin \omega} z_0 + \frac{\sin t \omega}{\sin \omega} z_1` with
            :math:`\omega` the angle between both, which stays at the distance from 0 where a high-dimensional prior has its
            mass.

    Returns:
        (latent, pixel), each ``(steps, *event_shape)``: the decoder's mean along the path between the two posterior means,
        and the linear interpolation of the two observations.

    Raises:
        ValueError: steps is below 2, or path is unknown.
    """
    steps = whole_number("steps", steps, minimum=2)  # both ends
    if start.shape != end.shape:
        raise ValueError(
            f"interpolate: expected two observations, found shapes {tuple(start.shape)} and {tuple(end.shape)}."
        )
    if path not in ("linear", "spherical"):
        raise ValueError(f"interpolate: path must be 'linear' or 'spherical', found {path!r}.")
    t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype).unsqueeze(-1)  # (steps, 1)
    coder = Coder(model)
    with evaluating(*coder.programs):
        a, b = coder.means(torch.stack([start, end])).split(1)  # each (1, latent_dim)
        s = t.to(a.dtype)  # the dtype of the latents may differ from that of the observations
        cosine = torch.cosine_similarity(a, b).clamp(-1, 1)
        angle = torch.arccos(cosine)
        if path == "spherical" and angle.sin() > 1e-4:  # for collinear vectors the arc is not defined: linear
            z = (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)
        else:
            z = torch.lerp(a, b, s)
        latent = coder.decode(z, coder.observations("interpolate", start[None], steps)).mean
    return latent, torch.lerp(start, end, t.reshape(-1, *(1 for _ in start.shape)))


@torch.no_grad()
def manifold_grid(
    model: Any,
    *context: Tensor,
    size: int = 25,
    spacing: str = "equal",
    limits: tuple[float, float, float, float] = (-3.0, 3.0, -3.0, 3.0),
    axes: tuple[int, int] = (0, 1),
    like: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The decoder's mean on a grid over a plane of the latent space; all other dimensions are 0.

    Args:
        model: see above.
        context: of a conditional model: the other tensors of a batch, one row each, the same for all points.
        size: points per axis.
        spacing: ``"equal"`` steps within limits; ``"probability"``: equal steps of probability under N(0, 1), at its
            quantiles (i + 1/2) / size, so that the area of a region is its prior probability.
        limits: ``(first low, first high, second low, second high)`` for equal steps.
        axes: the two latent dimensions that span the plane.
        like: see :func:`decoder_mean`.

    Returns:
        (images, first, second): ``(size * size, *event_shape)`` in row-major order, the second axis descending from row to
        row; and the values on the two axes, ``(size,)`` each, ascending.

    Raises:
        UndefinedError: a point lies outside the support of a latent site.
        ValueError: spacing, axes or limits are invalid.
    """
    size, coder = whole_number("size", size), Coder(model)
    x = coder.observations("manifold_grid", like, size * size)
    context = tuple(part.expand(size * size, *part.shape[1:]) for part in context)
    with evaluating(*coder.programs):
        latent_dim = coder.dimensions(x[:1], *(part[:1] for part in context))
    if len(set(axes)) != 2 or not all(0 <= axis < latent_dim for axis in axes):
        raise ValueError(f"manifold_grid: expected two of the {latent_dim} latent dimensions, found axes {axes}.")
    if spacing == "equal":
        low, high, bottom, top = limits
        if not (-math.inf < low < high < math.inf and -math.inf < bottom < top < math.inf):
            raise ValueError(f"manifold_grid: expected limits (low, high, low, high), found {limits}.")
        first, second = (torch.linspace(*ends, size, device=x.device, dtype=x.dtype) for ends in (limits[:2], limits[2:]))
    elif spacing == "probability":
        p = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) / size
        first = second = torch.special.ndtri(p)
    else:
        raise ValueError(f"manifold_grid: spacing must be 'equal' or 'probability', found {spacing!r}.")
    z = torch.zeros(size, size, latent_dim, device=x.device, dtype=x.dtype)  # (row, column, latent_dim)
    z[..., axes[0]] = first
    z[..., axes[1]] = second.flip(0).unsqueeze(-1)
    with evaluating(*coder.programs):
        return coder.decode(z.flatten(0, 1), x, *context).mean, first, second


@torch.no_grad()
def denoise(model: Any, x: Tensor, *context: Tensor, flip_rate: float = 0.02) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold at 0.5, flip each pixel with probability ``flip_rate``, and reconstruct from the posterior mean.

    Args:
        model: see above.
        x: observations in [0, 1], ``(batch, *event_shape)``.
        context: of a conditional model: the other tensors of a batch.
        flip_rate: probability that a pixel is flipped.

    Returns:
        (binary, noisy, reconstruction), each of the shape of x.

    Raises:
        ValueError: flip_rate is not in [0, 1].
    """
    if not 0 <= flip_rate <= 1:
        raise ValueError(f"denoise: flip_rate must be a probability, found {flip_rate}.")
    binary = (x > 0.5).to(x.dtype)
    flip = (torch.rand_like(x) < flip_rate).to(x.dtype)
    noisy = (binary - flip).abs()
    coder = Coder(model)
    with evaluating(*coder.programs):
        return binary, noisy, coder.decode(coder.means(noisy, *context), noisy, *context).mean


@torch.no_grad()
def sample_like(model: Any, data: Data, label: int, *, num_samples: int) -> Tensor:
    """Observations like those of a label: encode random observations of that label, draw z from their posteriors, decode.

    Returns:
        Decoder means, ``(num_samples, *event_shape)``.

    Raises:
        ValueError: the data have no labels or none that equals ``label``, or the model has no posterior.
    """
    coder = Coder(model)
    coder.require_pair("sample_like")
    if data.labels is None:
        raise ValueError(f"sample_like: expected labelled data, found none in {data.name!r}.")
    candidates = (data.labels == label).nonzero().squeeze(-1)
    if len(candidates) == 0:
        found = ", ".join(map(str, data.labels.unique().tolist()))
        raise ValueError(f"sample_like: no observation of {data.name!r} has label {label}; found labels {found}.")
    index = candidates[torch.randint(len(candidates), (num_samples,), device=candidates.device)]
    with evaluating(*coder.programs):
        batch = data.batch(index)
        return coder.decode(coder.draws(*batch), *batch).mean


def latent_record(model: Any, data: DataLike, *, means: Tensor | None = None, limit: int = 500) -> dict[str, Any]:
    """Where the first observations lie in latent space, as plain numbers: ``latents.json`` of a run folder.

    Args:
        model: see :func:`latent_means`.
        data: observations.
        means: those of :func:`latent_means`, of the first observations, if they are known.
        limit: number of observations.

    Returns:
        ``means``: posterior means, a list of ``limit`` lists of latent_dim numbers; ``labels`` and ``classes`` of these
        observations, or None; ``kl_per_dimension`` of all data, see :func:`kl_per_dimension`, or None if it is not defined.

    Raises:
        UndefinedError: see :func:`latent_means`.
    """
    data = as_data(data)
    some = data.subset(slice(limit))
    means = latent_means(model, some) if means is None else means
    try:
        kl = None if isinstance(model, Autoencoder) else kl_per_dimension(model, data).tolist()
    except UndefinedError:
        kl = None
    return {
        "means": [[round(value, 4) for value in row] for row in means[:limit].tolist()],
        "labels": None if some.labels is None else some.labels.tolist(),
        "classes": list(data.classes) or None,
        "kl_per_dimension": kl,
    }


def tsne(latents: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> "np.ndarray[Any, Any]":
    """Two-dimensional t-SNE of latent means (van der Maaten and Hinton 2008), PCA init: ``(N, 2)``.

    Distances between far clusters and sizes of clusters mean nothing in such a picture; neighbourhoods do.

    Raises:
        ValueError: no more observations than the perplexity.
        UndefinedError: latents that are not finite, or all the same.
    """
    from sklearn.manifold import TSNE  # heavy, and only needed here

    latents = torch.as_tensor(latents)
    if latents.dim() != 2 or latents.numel() == 0:
        raise ValueError(f"tsne: expected latents of shape (N, latent_dim), found {tuple(latents.shape)}.")
    latents = latents if latents.is_floating_point() else latents.double()
    perplexity = number("perplexity", perplexity)
    if len(latents) <= perplexity:
        raise ValueError(f"tsne: needs more observations than the perplexity {perplexity:g}, found {len(latents)}.")
    z = latents.detach().cpu().double()
    if not z.isfinite().all():
        raise UndefinedError(
            "tsne: expected finite latents, found NaN or infinity. Look at the encoder: training has failed."
        )
    size = z.abs().amax()
    z = z / size if size > 0 else z  # t-SNE does not depend on it, and no square overflows
    z = z - z.mean(0)
    spread = z.std(0, correction=0).amax()
    if spread <= 4 * torch.finfo(latents.dtype).eps:  # scikit-learn would divide by it, and crash
        raise UndefinedError(
            f"tsne: expected latents that differ, found {len(z):,} all the same: the posterior does not depend on x."
        )
    init = "pca" if z.shape[1] > 1 else "random"  # PCA to two dimensions needs two
    embedding = TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform((z / spread).float().numpy())
    return np.asarray(embedding)
