"""The variational autoencoder: ``encode`` and ``decode`` return distributions, ``model`` and ``guide`` are Pyro programs."""

import itertools
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.checks import shape, whole_number
from pyro_vae.likelihoods import BernoulliLikelihood, Likelihood, bounded_scale

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""Variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114) as a Pyro model and guide.

    .. math:: p(x, z) = N(z \mid 0, I) \, p(x \mid z), \qquad q(z \mid x) = N(z \mid \mu(x), \mathrm{diag}\,\sigma^2(x))

    Sites ``"z"`` (event ``(latent_dim,)``) and ``"x"`` (event ``event_shape``) in one plate ``"data"``. A plain
    ``nn.Module``: parameters live here, not in Pyro's global store.

    Args:
        encoder: maps x ``(batch, *event_shape)`` to ``(loc, log_variance)``, each ``(batch, latent_dim)``.
        decoder: maps z ``(batch, latent_dim)`` to the likelihood's raw input ``(batch, *event_shape)``. Both see one batch
            dimension, whatever :meth:`encode` and :meth:`decode` are given.
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
        if likelihood is not None and not hasattr(likelihood, "pairwise_log_prob"):
            raise ValueError(f"VAE: expected a likelihood such as BernoulliLikelihood(), found {likelihood!r}.")
        if isinstance(likelihood, type):
            raise ValueError(f"VAE: expected an instance, {likelihood.__name__}(), found the class itself.")
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = BernoulliLikelihood() if likelihood is None else likelihood
        self.latent_dim = latent_dim = whole_number("latent_dim", latent_dim)
        self.event_shape = torch.Size(shape("event_shape", event_shape))
        # Buffers, so that the prior follows the module's device and dtype; not saved, since they are constants.
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(latent_dim), persistent=False)

    def prior(self) -> dist.TorchDistribution:
        """p(z) = N(0, I), batch shape ``()``, event shape ``(latent_dim,)``."""
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape ``(*batch, *event_shape)``, any leading dimensions; event shape ``(latent_dim,)``.

        Raises:
            ValueError: x is of another shape or type, or the encoder's output is.
        """
        batch = self._batch_shape("x", x, self.event_shape)
        output = self.encoder(x.reshape(-1, *self.event_shape))
        if not (isinstance(output, tuple | list) and [*map(torch.is_tensor, output)] == [True, True]):
            found = type(output).__name__
            raise ValueError(f"VAE: expected the encoder to return a pair of tensors (loc, log_variance), found {found}.")
        expected = (batch.numel(), self.latent_dim)
        for name, part in zip(("loc", "log_variance"), output, strict=True):
            if part.shape != expected:
                raise ValueError(
                    f"VAE: expected the encoder's {name} of shape {expected}, (batch, latent_dim), found "
                    f"{tuple(part.shape)}. Make the encoder and latent_dim agree."
                )
        loc, log_variance = (part.reshape(*batch, self.latent_dim) for part in output)
        return dist.Normal(loc, bounded_scale(log_variance)).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape ``(*batch, latent_dim)``, any leading dimensions; event shape ``event_shape``.

        Raises:
            ValueError: z is of another shape or type, or the decoder's output is.
        """
        batch = self._batch_shape("z", z, (self.latent_dim,))
        p = self._likelihood_of(self.decoder(z.reshape(-1, self.latent_dim)), batch)
        return p.to_event(len(self.event_shape))

    def decoder_output(self, z: Tensor) -> Tensor:
        """The decoder's raw output for z ``(batch, latent_dim)``: what the likelihood takes.

        Raises:
            ValueError: it is not what the likelihood takes for ``batch`` observations.
        """
        output: Tensor = self.decoder(z)
        self._likelihood_of(output, z.shape[:1])
        return output

    def _likelihood_of(self, output: Tensor, batch: torch.Size) -> dist.TorchDistribution:
        """p(x | z), batch shape ``(*batch, *event_shape)``, once the decoder's output is found to be what it takes."""
        n, found = batch.numel(), tuple(output.shape)
        if found[:1] == (n,):
            p = self.likelihood(output.reshape(*batch, *found[1:]))
            if p.batch_shape == (*batch, *self.event_shape):
                return p
        raise ValueError(
            f"VAE: expected a decoder that maps ({n}, {self.latent_dim}) to what {self.likelihood} takes for "
            f"({n}, {_join(self.event_shape)}) elements, found {found}. Make decoder and event_shape agree."
        )

    def check_batch(self, x: Tensor) -> None:
        """Raise a ``ValueError`` unless x is a batch of observations: floating point, ``(batch, *event_shape)``."""
        if not torch.is_tensor(x) or self._batch_shape("x", x, self.event_shape) != tuple(x.shape[:1]) or len(x) == 0:
            found = f"shape {tuple(x.shape)}" if torch.is_tensor(x) else f"{type(x).__name__}"
            raise ValueError(
                f"VAE: expected x of shape (batch, {_join(self.event_shape)}), found {found}. A single observation needs "
                "a leading dimension, x[None]; a number of observations to draw is the keyword size=."
            )

    def _batch_shape(self, name: str, value: Tensor, event_shape: Sequence[int]) -> torch.Size:
        """The leading dimensions of x or z, once its type and last dimensions are found to be right."""
        leading = value.dim() - len(event_shape)
        if leading < 0 or value.shape[leading:] != tuple(event_shape) or value.dtype != self.prior_loc.dtype:
            raise ValueError(
                f"VAE: expected {name} of shape (*batch, {_join(event_shape)}) and type {self.prior_loc.dtype}, found "
                f"{value.dtype} of shape {tuple(value.shape)}. Reshape it, convert it, and scale uint8 images to [0, 1]."
            )
        return torch.Size(value.shape[:leading])

    def model(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Pyro model: draw z from the prior and x from the decoder, or score the given x, ``(batch, *event_shape)``.

        Args:
            x: observations, or None to draw ``size`` new ones.
            size: number of observations in the plate where x is None.

        Raises:
            ValueError: x is no batch of observations, or size is no whole number >= 1.
        """
        self._register()
        return self.generate(x, size=size)

    def guide(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Pyro guide, with the model's signature: draw z from q(z | x), ``(batch, latent_dim)``.

        Raises:
            ValueError: x is None, since q(z | x) needs it.
        """
        self._register()
        return self.infer(x, size=size)

    def _register(self) -> None:
        """As pyro.module does it, which would warn of parameters that are frozen."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                pyro.param(f"{_param_prefix(self)}$$${name}", parameter)

    def generate(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """:meth:`model` without registering parameters in Pyro's store: for optimisers that hold the module's own."""
        if x is None:
            size = whole_number("size", size)
        else:
            self.check_batch(x)
            size = len(x)
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)

    def infer(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """:meth:`guide` without registering parameters in Pyro's store."""
        if x is None:
            raise ValueError(
                "VAE.guide: expected x, found None: q(z | x) is conditioned on data. "
                "Call guide(x), or sample from the prior with Predictive(vae.model, num_samples=n)(size=...)."
            )
        self.check_batch(x)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.encode(x))


def _join(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


_prefixes: WeakKeyDictionary[VAE, str] = WeakKeyDictionary()
_counter = itertools.count()


def _param_prefix(vae: VAE) -> str:
    """A name in Pyro's param store that no other VAE of this process has or had, copies included.

    Under a shared name, SVI silently trains the first module in place of the second.
    """
    if vae not in _prefixes:
        _prefixes[vae] = f"vae{next(_counter)}"
    return _prefixes[vae]
