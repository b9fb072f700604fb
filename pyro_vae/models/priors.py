"""Priors p(z): modules whose call returns a distribution of event shape ``(latent_dim,)``.

A prior is any callable ``prior(*context) -> distribution``. Without context its batch shape is ``()``; a prior that takes
context, one row per observation, returns one distribution per row.
"""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._checks import whole_number
from pyro_vae.models.scales import bounded_scale

__all__ = ["NormalMixture", "StandardNormal"]


class StandardNormal(nn.Module):
    r"""p(z) = N(z | 0, I): the default prior, without parameters.

    A call returns the distribution, batch shape ``()``, event shape ``(latent_dim,)``.

    Args:
        latent_dim: number of latent dimensions.

    Example:
        >>> StandardNormal(3)().log_prob(torch.zeros(3))  # -3/2 log(2 pi)
        tensor(-2.7568)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        latent_dim = whole_number("latent_dim", latent_dim)
        # Buffers, so that the prior follows the module's device and dtype; not saved, since they are constants.
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class NormalMixture(nn.Module):
    r"""Mixture of normals with diagonal covariance; its parameters are learned jointly with the decoder's.

    .. math:: p(z) = \sum_k \pi_k \, N(z \mid m_k, \mathrm{diag}\, s_k^2)

    It can fit clusters of the data. Its KL has no closed form: train with ``NegativeELBO(vae, estimator="trace")``. The
    mixing proportions are initialised equal, the scales to 1, and the means by draws from N(0, I) of torch's global random
    state. Scales are bounded by :func:`~pyro_vae.models.scales.bounded_scale`. (Dilokthanakul et al. 2016,
    arXiv:1611.02648, and Tomczak and Welling 2018, arXiv:1705.07120, use mixtures as priors.)

    A call returns the distribution, batch shape ``()``, event shape ``(latent_dim,)``.

    Args:
        latent_dim: number of latent dimensions.
        components: number of mixture components.

    Example:
        >>> prior = NormalMixture(2, components=5)
        >>> prior().sample((7,)).shape, prior().batch_shape
        (torch.Size([7, 2]), torch.Size([]))
    """

    def __init__(self, latent_dim: int, components: int = 10) -> None:
        super().__init__()
        latent_dim, components = whole_number("latent_dim", latent_dim), whole_number("components", components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.locs = nn.Parameter(torch.randn(components, latent_dim))
        self.log_variances = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self) -> dist.TorchDistribution:
        components = dist.Normal(self.locs, bounded_scale(self.log_variances)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)
