"""A decoder as plain numbers, which ``explorer.js`` evaluates in the page: no network, no server, no torch.

The page computes the mean of p(x | z), ``vae.decode(z).mean``, in double precision.
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

LIMIT = 5_000_000  # bytes of parameters; a third more in base64
_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh"}  # those of explorer.js


class NoExplorerError(ValueError):
    """The decoder of a model cannot be evaluated in the page; the message says why."""


def decoder_record(model: VAE | Autoencoder, *, limit: int = LIMIT) -> dict[str, Any]:
    """The input of ``explorer.js``: layers, parameters, and the map from the decoder's output to the mean.

    Args:
        model: a VAE with an MLP decoder of ReLU or tanh layers.
        limit: maximum size of its parameters as float32, in bytes.

    Returns:
        ``latent_dim``; ``shape``, (channels, height, width); ``layers``, each with its sizes ``in`` and ``out`` and its
        ``activation`` or None; ``weights``, base64 of little-endian float32: of each layer the matrix (out, in), row-major,
        then the bias; ``mean``, ``{"kind": "sigmoid"}`` or ``{"kind": "affine", "loc": a, "scale": b}``: a + b * output.

    Raises:
        NoExplorerError: the model is of another kind, its parameters are too many or not finite, or its data are no images.

    Example:
        >>> settings = load_preset("bernoulli-z20", hidden=(8,), latent_dim=2)
        >>> record = decoder_record(settings.build_vae((1, 4, 4)))
        >>> record["layers"]
        [{'in': 2, 'out': 8, 'activation': 'relu'}, {'in': 8, 'out': 16, 'activation': None}]
    """
    if isinstance(model, Autoencoder):
        raise NoExplorerError("a plain autoencoder has no prior, so the range of meaningful codes is unknown")
    decoder = model.decoder
    if isinstance(decoder, ConvDecoder):
        raise NoExplorerError("its decoder is convolutional, and the page supports only fully connected ones")
    if not isinstance(decoder, MLPDecoder):
        raise NoExplorerError(f"its decoder is a {type(decoder).__name__}, and the page supports only MLPDecoder")
    if decoder.takes_context:
        raise NoExplorerError("its decoder takes context, which the page does not support")
    shape = tuple(model.event_shape)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise NoExplorerError(f"observations of shape {tuple(model.event_shape)} are no images of 1 or 3 channels")
    layers, tensors = _layers(decoder)
    if isinstance(model.likelihood, StandardizedNormalLikelihood):
        _only_means(model.likelihood, layers, tensors)
    if (size := 4 * sum(tensor.numel() for tensor in tensors)) > limit:
        raise NoExplorerError(
            f"its decoder's parameters take {size / 1e6:.1f} MB, and this page has room for {limit / 1e6:.1f} MB; "
            "smaller images or hidden layers would fit"
        )
    weights = torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors])
    if not weights.isfinite().all():
        raise NoExplorerError("its decoder's parameters are not all finite: the training has failed")
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
                f"its decoder has a layer {type(module).__name__}, and the page supports Linear, ReLU and Tanh"
            )
    return layers, tensors


def _only_means(likelihood: StandardizedNormalLikelihood, layers: list[dict[str, Any]], tensors: list[torch.Tensor]) -> None:
    """Keep the rows of the last layer for the means, drop those for the log-variances, and undo the standardisation."""
    loc, scale = likelihood.loc.flatten(), likelihood.scale.flatten()
    if loc.min() < 0 or loc.max() > 1:
        raise NoExplorerError(f"its images have means from {loc.min():g} to {loc.max():g}, and the page shows 0 to 1")
    weight, bias = tensors[-2:]
    tensors[-2:] = [weight[::2] * scale.unsqueeze(1), bias[::2] * scale + loc]
    layers[-1]["out"] //= 2


def _mean(likelihood: Likelihood) -> dict[str, Any]:
    """The map from the decoder's output to the mean of p(x | z)."""
    if isinstance(likelihood, BernoulliLikelihood):
        return {"kind": "sigmoid"}
    if isinstance(likelihood, NormalLikelihood):
        return {"kind": "sigmoid"} if likelihood.mean == "sigmoid" else {"kind": "affine", "loc": 0.0, "scale": 1.0}
    if isinstance(likelihood, StandardizedNormalLikelihood):  # see _only_means
        return {"kind": "affine", "loc": 0.0, "scale": 1.0}
    raise NoExplorerError(f"its likelihood is a {type(likelihood).__name__}, whose mean the page does not support")
