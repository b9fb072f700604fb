"""What is minimised: modules that map a batch to a dict of scalar tensors, mean nats per image.

``"loss"`` is what is minimised (lower is better); the other entries are its parts, logged under their own names. The
training loop knows nothing else of an objective.
"""

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.vae import VAE

__all__ = ["ESTIMATORS", "NegativeELBO", "Objective", "scale_latents"]

ESTIMATORS = ("trace", "mean-field")


class Objective(nn.Module):
    """Base of all objectives: ``objective(x) -> {"loss": ..., ...}``, scalars, mean nats per image."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x) -> dict of scalar tensors with 'loss'.")

    def check(self, x: Tensor) -> None:
        """Raise a ``ValueError`` if the objective is not defined for these observations; called once, before training."""

    def diagnose(self, x: Tensor) -> str:
        """What to tell of a batch whose loss or gradient is not finite."""
        return f"largest |x| {x.abs().max().item():g}"


class _ScaleLatents(ScaleMessenger):
    """Pyro's scale handler, on the latent sites alone."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            super()._process_message(msg)


def scale_latents(fn: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """Scale the log-probability of every latent site of a Pyro program; observed sites keep theirs.

    Applied to model and guide alike it gives the KL term that weight (beta-VAE: Higgins et al. 2017), also under Pyro's
    own SVI: ``SVI(scale_latents(vae.model, 4.0), scale_latents(vae.guide, 4.0), optimizer, Trace_ELBO())``.
    """
    return _ScaleLatents(scale)(fn)


class NegativeELBO(Objective):
    r"""Negative evidence lower bound, in nats per image.

    .. math:: -\mathrm{ELBO} = \underbrace{E_{q(z|x)}[-\log p(x \mid z)]}_{\text{reconstruction}}
        + \underbrace{\mathrm{KL}(q(z \mid x) \,\|\, p(z))}_{\text{kl}}, \qquad
        \text{loss} = \text{reconstruction} + \beta \, \text{kl}

    Traces model and guide by Pyro's own ELBO classes; the value and gradient of ``loss`` are those of the chosen class's
    ``differentiable_loss`` divided by the batch size, for the same noise. Differently from them it keeps the terms apart
    and per image, and reads nothing back from the device.

    Args:
        vae: the model and guide. Its likelihood's normalising constant is part of ``reconstruction``.
        estimator: ``"trace"`` estimates kl by log q(z | x) - log p(z) at the drawn z (:class:`pyro.infer.Trace_ELBO`);
            ``"mean-field"`` uses the closed form (:class:`pyro.infer.TraceMeanField_ELBO`).
        num_particles: latent draws per image, evaluated in one vectorised pass.
        beta: weight of kl in the loss. ``neg_elbo`` is always the unweighted bound.

    A call on a batch ``(batch, *event_shape)`` returns the scalars ``loss``, ``neg_elbo``, ``reconstruction``, ``kl``, and
    what the likelihood adds (``squared_error`` for :class:`~pyro_vae.likelihoods.NormalLikelihood`).

    Raises:
        ValueError: unknown estimator, fewer than one particle, beta not positive.
    """

    def __init__(self, vae: VAE, *, estimator: str = "trace", num_particles: int = 1, beta: float = 1.0) -> None:
        super().__init__()
        if estimator not in ESTIMATORS:
            raise ValueError(f"NegativeELBO: estimator must be one of {', '.join(ESTIMATORS)}, found {estimator!r}.")
        if num_particles < 1:
            raise ValueError(f"NegativeELBO: num_particles must be at least 1, found {num_particles}.")
        if not 0 < beta < float("inf"):
            raise ValueError(f"NegativeELBO: beta must be a positive number, found {beta}.")
        self.vae = vae
        self.estimator = estimator
        self.num_particles = num_particles
        self.beta = beta

    def per_image(self, x: Tensor, num_particles: int | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction and beta-weighted kl per draw and image, each ``(num_particles, batch)``, nats."""
        num_particles = self.num_particles if num_particles is None else num_particles
        analytic = self.estimator == "mean-field"
        elbo = (TraceMeanField_ELBO if analytic else Trace_ELBO)(
            num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1
        )
        model, guide = self.vae.generate, self.vae.infer
        if self.beta != 1:
            model, guide = scale_latents(model, self.beta), scale_latents(guide, self.beta)
        (traces,) = elbo._get_traces(model, guide, (x,), {})
        return _terms(*traces, analytic=analytic, shape=(num_particles, len(x)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        reconstruction, weighted_kl = (term.mean() for term in self.per_image(x))
        loss = reconstruction + weighted_kl
        kl = weighted_kl / self.beta
        terms = {"loss": loss, "neg_elbo": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}
        return terms | self.vae.likelihood.terms(reconstruction, self.vae.event_shape)

    def check(self, x: Tensor) -> None:
        self.vae.likelihood.check(x)

    def diagnose(self, x: Tensor) -> str:
        with torch.no_grad():
            log_scale = self.vae.encode(x).base_dist.scale.log().max().item()
        return f"largest log-scale of the encoder {log_scale:g}, {super().diagnose(x)}"


def _terms(model_trace: Trace, guide_trace: Trace, *, analytic: bool, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sums a pair of traces into -log p(x | z) of the observed sites and the kl of the latent ones, each of ``shape``."""
    reconstruction, kl = torch.zeros(()), torch.zeros(())
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            reconstruction = reconstruction - site["log_prob"]
            continue
        guide_site = guide_trace.nodes[name]
        if not guide_site["fn"].has_rsample:
            raise ValueError(
                f"NegativeELBO: expected a reparameterised guide, found {guide_site['fn']} at site {name!r}, whose draws "
                "carry no gradient. Use a distribution with rsample, or train by pyro.infer.SVI with Trace_ELBO."
            )
        if analytic:
            kl_site = kl_divergence(guide_site["fn"], site["fn"])
            kl = kl + scale_and_mask(kl_site, scale=guide_site["scale"], mask=guide_site["mask"])
        else:
            kl = kl + guide_site["log_prob"] - site["log_prob"]
    return reconstruction.expand(shape), kl.expand(shape)
