"""Encoder and decoder networks: tensors in, tensors out; no Pyro, no device, no fixed image size.

An encoder is any module that maps ``x`` of shape ``(batch, *event_shape)`` to the pair ``(loc, log_variance)``, each
``(batch, latent_dim)``. A decoder is any module that maps ``z`` of shape ``(*batch, latent_dim)`` to one raw number per
element of ``x``, ``(*batch, *event_shape)``; the likelihood says what that number means. Where it needs two numbers per
element, as a normal with learned variance does, they stand in a last dimension: ``(*batch, *event_shape, 2)``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_vae.checks import shape, whole_number

__all__ = ["MLPDecoder", "MLPEncoder"]

_relu = partial(nn.ReLU, inplace=True)  # same values and gradients, one pass and one copy of the hidden layer fewer


def _mlp(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers of the given sizes, an activation after each."""
    return nn.Sequential(*(layer for n, m in pairwise(sizes) for layer in (nn.Linear(n, m), activation())))


class MLPEncoder(nn.Module):
    """Fully connected encoder: ``x`` -> hidden layers -> ``(loc, log_variance)`` of a diagonal normal.

    Args:
        event_shape: shape of one observation, e.g. ``(1, 28, 28)``.
        hidden: widths of the hidden layers, from the data towards the latent.
        latent_dim: number of latent dimensions.
        activation: makes the activation that follows each hidden layer; default: ReLU.

    Example:
        >>> encoder = MLPEncoder((1, 28, 28), hidden=(400,), latent_dim=20)
        >>> loc, log_variance = encoder(torch.rand(5, 1, 28, 28))
        >>> loc.shape, log_variance.shape
        (torch.Size([5, 20]), torch.Size([5, 20]))
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        hidden: Sequence[int],
        latent_dim: int,
        activation: Callable[[], nn.Module] = _relu,
    ) -> None:
        super().__init__()
        event_shape, hidden = shape("event_shape", event_shape), shape("hidden", hidden, empty=True)
        latent_dim = whole_number("latent_dim", latent_dim)
        self.event_dim = len(event_shape)
        sizes = (torch.Size(event_shape).numel(), *hidden)
        self.body = _mlp(sizes, activation)
        # Both heads in one layer: the same model as two layers of latent_dim, in half the matrix products.
        self.heads = nn.Linear(sizes[-1], 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x.flatten(-self.event_dim))  # (*batch, hidden)
        loc, log_variance = self.heads(h).chunk(2, dim=-1)  # each (*batch, latent_dim)
        return loc, log_variance


class MLPDecoder(nn.Module):
    """Fully connected decoder: ``z`` -> hidden layers -> one raw number per element of ``x``.

    Args:
        event_shape: shape of one observation, e.g. ``(1, 28, 28)``.
        hidden: widths of the hidden layers, from the latent towards the data.
        latent_dim: number of latent dimensions.
        activation: makes the activation that follows each hidden layer; default: ReLU.
        outputs: raw numbers per element of ``x``; more than one stand in a last dimension.

    Example:
        >>> decoder = MLPDecoder((1, 28, 28), hidden=(400,), latent_dim=20)
        >>> decoder(torch.randn(7, 5, 20)).shape
        torch.Size([7, 5, 1, 28, 28])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        hidden: Sequence[int],
        latent_dim: int,
        activation: Callable[[], nn.Module] = _relu,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        event_shape, hidden = shape("event_shape", event_shape), shape("hidden", hidden, empty=True)
        latent_dim = whole_number("latent_dim", latent_dim)
        outputs = whole_number("outputs", outputs)
        self.output_shape = torch.Size(event_shape if outputs == 1 else (*event_shape, outputs))
        sizes = (latent_dim, *hidden)
        self.body = _mlp(sizes, activation)
        self.output = nn.Linear(sizes[-1], self.output_shape.numel())

    def forward(self, z: Tensor) -> Tensor:
        return self.output(self.body(z)).unflatten(-1, self.output_shape)  # (*batch, *output_shape)
