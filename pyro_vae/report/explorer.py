"""A decoder as plain numbers, for ``explorer.js`` to run in a page: no network, no server, no torch.

What the page computes from them is the mean of p(x | z), as ``vae.decode(z).mean``, in double precision.
"""

import base64
from typing import Any

import torch
from torch import nn

from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.likelihoods import BernoulliLikelihood, Likelihood, NormalLikelihood, StandardizedNormalLikelihood
from pyro_vae.models.nets import ConvDecoder, MLPDecoder
from pyro_vae.models.vae import VAE

__all__ = ["LIMIT", "NoExplorerError", "decoder_record"]

LIMIT = 5_000_000  # bytes of weights; the page carries a third more
_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh"}  # those that explorer.js knows


class NoExplorerError(ValueError):
    """A model whose decoder the page cannot run; the message says why."""


def decoder_record(model: VAE | Autoencoder, *, limit: int = LIMIT) -> dict[str, Any]:
    """What ``explorer.js`` needs to decode: layers, weights, and how the decoder's output becomes an image.

    Args:
        model: a VAE with an MLP decoder of ReLU or tanh layers.
        limit: bytes that its weights may take as float32.

    Returns:
        ``latent_dim``; ``shape``, (channels, height, width); ``layers``, each with its sizes ``in`` and ``out`` and its
        ``activation`` or None; ``weights``, base64 of little-endian float32: of each layer the matrix (out, in) row by row,
        then the bias; ``mean``, ``{"kind": "sigmoid"}`` or ``{"kind": "affine", "loc": a, "scale": b}``: a + b * output.

    Raises:
        NoExplorerError: it is no such model, its weights are too many or not finite, or its data are no images.

    Example:
        >>> settings = load_preset("bernoulli-z20", hidden=(8,), latent_dim=2)
        >>> record = decoder_record(settings.build_vae((1, 4, 4)))
        >>> record["layers"]
        [{'in': 2, 'out': 8, 'activation': 'relu'}, {'in': 8, 'out': 16, 'activation': None}]
    """
    if isinstance(model, Autoencoder):
        raise NoExplorerError("a plain autoencoder has no prior, so there is no telling which codes mean anything")
    decoder = model.decoder
    if isinstance(decoder, ConvDecoder):
        raise NoExplorerError("its decoder is convolutional, and a page computes fully connected ones only")
    if not isinstance(decoder, MLPDecoder):
        raise NoExplorerError(f"its decoder is a {type(decoder).__name__}, and a page computes an MLPDecoder only")
    if decoder.takes_context:
        raise NoExplorerError("its decoder takes context, which the page has no place for")
    shape = tuple(model.event_shape)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise NoExplorerError(f"observations of shape {tuple(model.event_shape)} are no images of 1 or 3 channels")
    layers, tensors = _layers(decoder)
    if isinstance(model.likelihood, StandardizedNormalLikelihood):
        _only_means(model.likelihood, layers, tensors)
    if (size := 4 * sum(tensor.numel() for tensor in tensors)) > limit:
        raise NoExplorerError(
            f"its decoder's weights take {size / 1e6:.1f} MB, and this page has room for {limit / 1e6:.1f} MB; "
            "smaller images or hidden layers would fit"
        )
    weights = torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors])
    if not weights.isfinite().all():
        raise NoExplorerError("its decoder's weights are not all finite numbers: the training has failed")
    return {
        "latent_dim": model.latent_dim,
        "shape": list(shape),
        "layers": layers,
        "weights": base64.b64encode(weights.numpy().astype("<f4").tobytes()).decode(),
        "mean": _mean(model.likelihood),
    }


def _layers(decoder: MLPDecoder) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    layers: list[dict[str, Any]] = []
    tensors: list[torch.Tensor] = []
    for module in (*decoder.body, decoder.output):
        if isinstance(module, nn.Linear):
            layers.append({"in": module.in_features, "out": module.out_features, "activation": None})
            tensors += [module.weight, module.bias]
        elif type(module) in _ACTIVATIONS and layers:
            layers[-1]["activation"] = _ACTIVATIONS[type(module)]
        else:
            raise NoExplorerError(
                f"its decoder has a layer {type(module).__name__}, and a page computes Linear, ReLU and Tanh"
            )
    return layers, tensors


def _only_means(likelihood: StandardizedNormalLikelihood, layers: list[dict[str, Any]], tensors: list[torch.Tensor]) -> None:
    """Of mean and log-variance by turns, leave the means, in the units of the data."""
    loc, scale = likelihood.loc.flatten(), likelihood.scale.flatten()
    if loc.min() < 0 or loc.max() > 1:
        raise NoExplorerError(f"its images have means from {loc.min():g} to {loc.max():g}, and a page shows 0 to 1")
    weight, bias = tensors[-2:]
    tensors[-2:] = [weight[::2] * scale.unsqueeze(1), bias[::2] * scale + loc]
    layers[-1]["out"] //= 2


def _mean(likelihood: Likelihood) -> dict[str, Any]:
    """How the mean of p(x | z) comes from the decoder's output."""
    if isinstance(likelihood, BernoulliLikelihood):
        return {"kind": "sigmoid"}
    if isinstance(likelihood, NormalLikelihood):
        return {"kind": "sigmoid"} if likelihood.mean == "sigmoid" else {"kind": "affine", "loc": 0.0, "scale": 1.0}
    if isinstance(likelihood, StandardizedNormalLikelihood):  # see _only_means
        return {"kind": "affine", "loc": 0.0, "scale": 1.0}
    raise NoExplorerError(f"its likelihood is a {type(likelihood).__name__}, whose mean the page does not compute")
