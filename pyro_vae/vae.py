"""The variational autoencoder: ``encode`` and ``decode`` return distributions, ``model`` and ``guide`` are Pyro programs."""

import itertools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.likelihoods import BernoulliLikelihood, Likelihood, bounded_scale

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""Variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114) as a Pyro model and guide.

    .. math:: p(x, z) = N(z \mid 0, I) \, p(x \mid z), \qquad q(z \mid x) = N(z \mid \mu(x), \mathrm{diag}\,\sigma^2(x))

    Sites ``"z"`` (event ``(latent_dim,)``) and ``"x"`` (event ``event_shape``) in one plate ``"data"``. A plain
    ``nn.Module``: parameters live here, not in Pyro's global store.

    Args:
        encoder: maps x ``(*batch, *event_shape)`` to ``(loc, log_variance)``, each ``(*batch, latent_dim)``.
        decoder: maps z ``(*batch, latent_dim)`` to the likelihood's raw input ``(*batch, *event_shape)``.
        latent_dim: number of latent dimensions.
        event_shape: shape of one observation.
        likelihood: p(x | z) from the decoder's output; see :mod:`pyro_vae.likelihoods`.

    Example:
        >>> from pyro_vae import MLPDecoder, MLPEncoder
        >>> shape = dict(event_shape=(1, 8, 8), hidden=(32,), latent_dim=4)
        >>> vae = VAE(MLPEncoder(**shape), MLPDecoder(**shape), latent_dim=4, event_shape=(1, 8, 8))
        >>> x = torch.rand(5, 1, 8, 8)
        >>> vae.encode(x).mean.shape, vae.decode(torch.randn(3, 5, 4)).mean.shape
        (torch.Size([5, 4]), torch.Size([3, 5, 1, 8, 8]))
        >>> from pyro.infer import Predictive
        >>> Predictive(vae.model, num_samples=3)(size=5)["x"].shape
        torch.Size([3, 5, 1, 8, 8])
    """

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent_dim: int,
        event_shape: Sequence[int],
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"VAE: latent_dim must be at least 1, found {latent_dim}.")
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = BernoulliLikelihood() if likelihood is None else likelihood
        self.latent_dim = latent_dim
        self.event_shape = torch.Size(event_shape)
        # Buffers, so that the prior follows the module's device and dtype; not saved, since they are constants.
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(latent_dim), persistent=False)

    def prior(self) -> dist.TorchDistribution:
        """p(z) = N(0, I), batch shape ``()``, event shape ``(latent_dim,)``."""
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x): batch shape that of x, event shape ``(latent_dim,)``.

        Raises:
            ValueError: x is not floating point or does not end in ``event_shape``.
        """
        if x.shape[x.dim() - len(self.event_shape) :] != self.event_shape or not x.is_floating_point():
            raise ValueError(
                f"VAE.encode: expected floating-point x of shape (*batch, {', '.join(map(str, self.event_shape))}), "
                f"found {x.dtype} of shape {tuple(x.shape)}. Reshape x, and scale uint8 images to [0, 1]."
            )
        loc, log_variance = self.encoder(x)
        return dist.Normal(loc, bounded_scale(log_variance)).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape ``(*batch, latent_dim)``, any leading dimensions; event shape ``event_shape``."""
        return self.likelihood(self.decoder(z)).to_event(len(self.event_shape))

    def model(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Pyro model: draw z from the prior and x from the decoder, or score the given x, ``(batch, *event_shape)``.

        Args:
            x: observations, or None to draw ``size`` new ones.
            size: number of observations in the plate where x is None.
        """
        pyro.module(_param_prefix(self), self)
        return self.generate(x, size=size)

    def guide(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Pyro guide, with the model's signature: draw z from q(z | x), ``(batch, latent_dim)``.

        Raises:
            ValueError: x is None, since q(z | x) needs it.
        """
        pyro.module(_param_prefix(self), self)
        return self.infer(x, size=size)

    def generate(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """:meth:`model` without registering parameters in Pyro's store: for optimisers that hold the module's own."""
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)

    def infer(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """:meth:`guide` without registering parameters in Pyro's store."""
        if x is None:
            raise ValueError(
                "VAE.guide: expected x, found None: q(z | x) is conditioned on data. "
                "Call guide(x), or sample from the prior with Predictive(vae.model, num_samples=n)(size=...)."
            )
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.encode(x))


_prefixes: WeakKeyDictionary[VAE, str] = WeakKeyDictionary()
_counter = itertools.count()


def _param_prefix(vae: VAE) -> str:
    """A name in Pyro's param store that no other VAE of this process has or had, copies included.

    Under a shared name, SVI silently trains the first module in place of the second.
    """
    if vae not in _prefixes:
        _prefixes[vae] = f"vae{next(_counter)}"
    return _prefixes[vae]
