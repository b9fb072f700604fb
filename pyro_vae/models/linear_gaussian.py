r"""Toy problems with known truth: a correlated Gaussian in the plane, and latent-variable models in closed form.

The Gaussian: x ~ N(mu, Sigma), mu = (1, 0.5), Sigma = [[1, 0.5], [0.5, 1]]. Its entropy is a lower bound of the expected
-log p(x) of every model, and of the -ELBO of every VAE:

.. math:: H(x) = \tfrac12 \log \big( (2 \pi e)^2 \det \Sigma \big) = 2.694036 \text{ nats}.
"""

import math
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae._checks import whole_number

__all__ = ["ENTROPY", "MEAN", "LinearGaussian", "covariance", "sample", "truth"]

MEAN = (1.0, 0.5)
_COVARIANCE = ((1.0, 0.5), (0.5, 1.0))
ENTROPY = math.log(2 * math.pi * math.e) + 0.5 * math.log(1.0 * 1.0 - 0.5 * 0.5)


def covariance(dtype: torch.dtype = torch.float64) -> Tensor:
    """Sigma, ``(2, 2)``."""
    return torch.tensor(_COVARIANCE, dtype=dtype)


def truth(dtype: torch.dtype = torch.float64) -> dist.MultivariateNormal:
    """The distribution of the data."""
    return dist.MultivariateNormal(torch.tensor(MEAN, dtype=dtype), covariance(dtype))


def sample(n: int, *, seed: int = 0) -> Tensor:
    """n points of the plane, ``(n, 2)``, float32; does not change torch's global random state."""
    n = whole_number("n", n)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points = torch.tensor(MEAN, dtype=torch.float64) + noise @ torch.linalg.cholesky(covariance()).T
    return points.float()


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    r"""z ~ N(0, I), x | z ~ N(W z + b, s^2 I): probabilistic PCA (Tipping and Bishop 1999), in closed form.

    Args:
        weight: W, ``(D, latent_dim)``.
        bias: b, ``(D,)``.
        variance: s^2.

    Raises:
        ValueError: the shapes of weight and bias do not match, or the variance is not positive.
    """

    weight: Tensor
    bias: Tensor
    variance: float

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ValueError(f"LinearGaussian: expected a positive variance, found {self.variance}.")
        if self.weight.dim() != 2 or self.bias.shape != self.weight.shape[:1]:
            found = f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            raise ValueError(
                f"LinearGaussian: expected weight of shape (D, latent_dim) and bias of shape (D,), found {found}."
            )

    def marginal(self) -> dist.MultivariateNormal:
        """p(x) = N(b, W W' + s^2 I)."""
        eye = torch.eye(len(self.bias), dtype=self.bias.dtype, device=self.bias.device)
        return dist.MultivariateNormal(self.bias, self.weight @ self.weight.T + self.variance * eye)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """p(z | x) = N(S W' (x - b) / s^2, S), S = (I + W' W / s^2)^-1, for x ``(*batch, D)``."""
        if x.shape[-1:] != self.bias.shape:
            raise ValueError(
                f"LinearGaussian.posterior: expected x of shape (*batch, {len(self.bias)}), found {tuple(x.shape)}."
            )
        eye = torch.eye(self.weight.shape[1], dtype=x.dtype, device=x.device)
        precision = eye + self.weight.T @ self.weight / self.variance
        loc = (x - self.bias) @ self.weight / self.variance @ torch.linalg.inv(precision)
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    @staticmethod
    def fit(x: Tensor, *, latent_dim: int) -> "LinearGaussian":
        r"""The maximum-likelihood fit to data ``(N, D)``, latent_dim < D.

        .. math:: s^2 = \frac{1}{D - L} \sum_{j > L} \lambda_j, \qquad W = U_L (\Lambda_L - s^2 I)^{1/2}

        with eigenvalues lambda (descending) and eigenvectors U of the sample covariance (divided by N).

        Raises:
            ValueError: x is no finite floating-point matrix, latent_dim is not below D, or the data do not vary outside the
                first latent_dim principal directions, so that the likelihood has no maximum.
        """
        if not torch.is_tensor(x) or x.dim() != 2 or len(x) < 2 or not x.is_floating_point() or not x.isfinite().all():
            found = f"{x.dtype} of shape {tuple(x.shape)}" if torch.is_tensor(x) else type(x).__name__
            raise ValueError(f"LinearGaussian.fit: expected finite floating point x of shape (N, D), N > 1, found {found}.")
        dim, latent_dim = x.shape[1], whole_number("latent_dim", latent_dim, minimum=0)
        if not 1 <= latent_dim < dim:
            raise ValueError(
                f"LinearGaussian.fit: latent_dim must be from 1 to {dim - 1} for {dim} columns, found {latent_dim}."
            )
        bias = x.mean(0)
        values, vectors = torch.linalg.eigh((x - bias).T @ (x - bias) / len(x))  # ascending
        variance = values[: dim - latent_dim].mean()
        if not variance > torch.finfo(x.dtype).eps * values[-1]:
            raise ValueError(
                f"LinearGaussian.fit: these {len(x)} rows do not vary outside {latent_dim} directions, so the likelihood "
                "has no maximum. Pass more rows, or fewer latent dimensions."
            )
        weight = vectors[:, dim - latent_dim :] * (values[dim - latent_dim :] - variance).sqrt()
        return LinearGaussian(weight, bias, variance.item())
