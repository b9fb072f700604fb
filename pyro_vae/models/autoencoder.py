"""The plain autoencoder, on the same nets as the VAE: no distribution, no noise, no likelihood."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_vae._checks import shape, whole_number

__all__ = ["Autoencoder"]


class Autoencoder(nn.Module):
    r"""Autoencoder: code = encoder(x), reconstruction = sigmoid(decoder(code)).

    It has no p(x): the codes of the data follow no given distribution, so that random codes need not decode to anything
    like the data. The :class:`~pyro_vae.models.vae.VAE` is the corresponding generative model.

    Args:
        encoder: maps x ``(batch, *event_shape)`` to codes ``(batch, latent_dim)``: a net with ``heads=1``.
        decoder: maps codes ``(batch, latent_dim)`` to logits ``(batch, *event_shape)``.
        latent_dim: number of latent dimensions.
        event_shape: shape of one observation.

    Example:
        >>> from pyro_vae import MLPDecoder, MLPEncoder
        >>> shape = dict(event_shape=(1, 8, 8), hidden=(32,), latent_dim=2)
        >>> autoencoder = Autoencoder(MLPEncoder(**shape, heads=1), MLPDecoder(**shape), latent_dim=2, event_shape=(1, 8, 8))
        >>> x = torch.rand(5, 1, 8, 8)
        >>> autoencoder.encode(x).shape, autoencoder(x).shape
        (torch.Size([5, 2]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, latent_dim: int, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = whole_number("latent_dim", latent_dim)
        self.event_shape = torch.Size(shape("event_shape", event_shape))

    def encode(self, x: Tensor) -> Tensor:
        """Codes ``(batch, latent_dim)`` of observations ``(batch, *event_shape)``.

        Raises:
            ValueError: x or the encoder's output has the wrong shape.
        """
        return _checked("encoder", self.encoder, "x", x, self.event_shape, (self.latent_dim,))

    def decode(self, z: Tensor) -> Tensor:
        """Observations ``(batch, *event_shape)``, values in (0, 1), decoded from codes ``(batch, latent_dim)``.

        Raises:
            ValueError: z or the decoder's output has the wrong shape.
        """
        return _checked("decoder", self.decoder, "z", z, (self.latent_dim,), self.event_shape).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x, ``(batch, *event_shape)``."""
        return self.decode(self.encode(x))


def _checked(net_name: str, net: nn.Module, name: str, value: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    if value.dim() == 0 or tuple(value.shape[1:]) != tuple(before):
        raise ValueError(f"Autoencoder: expected {name} of shape {('batch', *before)}, found {tuple(value.shape)}.")
    output = net(value)
    if not torch.is_tensor(output) or output.shape != (len(value), *after):
        found = tuple(output.shape) if torch.is_tensor(output) else type(output).__name__
        raise ValueError(
            f"Autoencoder: expected an {net_name} that maps {tuple(value.shape)} to {(len(value), *after)}, found {found}. "
            "Make the nets, latent_dim and event_shape agree; the encoders here need heads=1."
        )
    return output
