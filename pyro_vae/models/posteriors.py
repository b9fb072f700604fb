"""Posteriors q(z | x): modules from the encoder's output to a distribution of event shape ``(latent_dim,)``.

A posterior is to the encoder what the likelihood is to the decoder: any callable ``posterior(output) -> distribution``,
where output is the encoder's output, a tensor or a tuple of tensors, with any leading dimensions.

The posteriors defined here take a tuple of tensors ``(*batch, latent_dim)``, the encoder's heads. Their attribute ``heads``
is the number of heads, the argument of ``MLPEncoder(heads=...)``; ``names`` are the names of the heads in errors.
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, register_kl

from pyro_vae._checks import whole_number
from pyro_vae.models.scales import bounded_scale

__all__ = ["DiagonalNormal", "FullCovarianceNormal", "check_heads"]


class DiagonalNormal(nn.Module):
    r"""A normal with diagonal covariance: the default posterior.

    .. math:: q(z \mid x) = N\big(z \mid \mu(x), \mathrm{diag}\, \sigma^2(x)\big)

    Takes the encoder's ``(loc, log_variance)``, each ``(*batch, latent_dim)``; the scale is
    :func:`~pyro_vae.models.scales.bounded_scale` of the log-variance.

    Raises:
        ValueError: in a call, the encoder's output is not such a pair.

    Example:
        >>> q = DiagonalNormal()((torch.zeros(5, 2), torch.zeros(5, 2)))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))
    """

    heads = 2
    names = ("loc", "log_variance")

    def forward(self, output: Sequence[Tensor]) -> dist.TorchDistribution:
        loc, log_variance = check_heads(output, self.names)
        return dist.Normal(loc, bounded_scale(log_variance)).to_event(1)


class FullCovarianceNormal(nn.Module):
    r"""A normal with full covariance, parametrised by its Cholesky factor.

    .. math:: q(z \mid x) = N\big(z \mid \mu(x), L(x) L(x)^\top\big), \qquad L_{jj} = \sigma_j > 0, \quad L_{jk} = 0
        \text{ for } k > j

    Takes ``1 + latent_dim`` tensors ``(*batch, latent_dim)``: loc, and the rows of a matrix. The strictly lower triangle of
    the matrix is that of L; its diagonal is a log-variance, of which :func:`~pyro_vae.models.scales.bounded_scale` is the
    diagonal of L; the upper triangle is not used. If the lower triangle is 0, the distribution is that of
    :class:`DiagonalNormal`.

    The KL to a normal with diagonal covariance, such as the standard normal prior, has a closed form, which
    ``torch.distributions.kl_divergence`` and ``NegativeELBO(vae, estimator="mean-field")`` use:

    .. math:: \mathrm{KL}\big(N(\mu, L L^\top) \,\|\, N(m, \mathrm{diag}\, s^2)\big)
        = \sum_j \frac{(\mu_j - m_j)^2 + \sum_k L_{jk}^2}{2 s_j^2} - \frac12 + \log s_j - \log L_{jj}

    Args:
        latent_dim: number of latent dimensions.

    Raises:
        ValueError: in a call, the encoder's output has another form.

    Example:
        >>> from pyro_vae import MLPEncoder
        >>> posterior = FullCovarianceNormal(2)
        >>> encoder = MLPEncoder((1, 8, 8), hidden=(32,), latent_dim=2, heads=posterior.heads)
        >>> q = posterior(encoder(torch.rand(5, 1, 8, 8)))
        >>> q.batch_shape, q.event_shape, q.covariance_matrix.shape
        (torch.Size([5]), torch.Size([2]), torch.Size([5, 2, 2]))
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = whole_number("latent_dim", latent_dim)
        self.names = ("loc", *(f"row {row}" for row in range(1, self.latent_dim + 1)))
        self.heads = len(self.names)

    def forward(self, output: Sequence[Tensor]) -> dist.TorchDistribution:
        loc, *rows = check_heads(output, self.names)
        if loc.shape[-1:] != (self.latent_dim,):
            raise ValueError(
                f"FullCovarianceNormal: expected tensors of shape (*batch, {self.latent_dim}), found {tuple(loc.shape)}. "
                "Make the encoder's latent_dim and the posterior's agree."
            )
        matrix = torch.stack(rows, dim=-2)  # (*batch, latent_dim, latent_dim)
        diagonal = bounded_scale(matrix.diagonal(dim1=-2, dim2=-1))
        return dist.MultivariateNormal(loc, scale_tril=matrix.tril(-1) + diagonal.diag_embed())


def check_heads(output: Any, names: Sequence[str], shape: Sequence[int] | None = None) -> Sequence[Tensor]:
    """The encoder's output, if it is one tensor per name, each of the given shape (default: that of the first).

    Raises:
        ValueError: the output has another form.
    """
    is_heads = isinstance(output, tuple | list) and all(map(torch.is_tensor, output))
    if not is_heads or len(output) != len(names):
        expected = "a pair of tensors" if len(names) == 2 else f"{len(names)} tensors"
        found = f"{len(output)} tensors" if is_heads else type(output).__name__
        listed = ", ".join(names if len(names) <= 4 else (*names[:2], "...", names[-1]))
        raise ValueError(
            f"VAE: expected the encoder to return {expected} ({listed}), found {found}. Give the encoder "
            f"heads={len(names)}, or the VAE a posterior that matches the encoder."
        )
    expected_shape = tuple(output[0].shape if shape is None else shape)
    for name, part in zip(names, output, strict=True):
        if part.shape != expected_shape:
            raise ValueError(
                f"VAE: expected the encoder's {name} of shape {expected_shape}, (batch, latent_dim), found "
                f"{tuple(part.shape)}. Make the encoder and latent_dim agree."
            )
    return output


@register_kl(MultivariateNormal, Independent)  # type: ignore[untyped-decorator]
def _kl_full_diagonal(q: MultivariateNormal, p: "Independent[Any]") -> Tensor:  # no generic in older versions of torch
    """KL(N(mu, L L') || N(m, diag s^2)) in nats, see :class:`FullCovarianceNormal`; batch shapes are broadcast."""
    if not (isinstance(p.base_dist, Normal) and p.reinterpreted_batch_ndims == 1):
        raise NotImplementedError(f"KL of a multivariate normal has no closed form here to {p}.")
    m, s = p.base_dist.loc, p.base_dist.scale
    log_diagonal = q.scale_tril.diagonal(dim1=-2, dim2=-1).log()
    square = (q.loc - m) ** 2 + (q.scale_tril**2).sum(-1)
    kl: Tensor = (0.5 * (square / s**2 - 1) + s.log() - log_diagonal).sum(-1)
    return kl
