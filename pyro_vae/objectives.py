"""What is minimised: modules that map a batch to a dict of scalar tensors, mean nats per image.

``"loss"`` is what is minimised (lower is better); the other entries are its parts, logged under their own names. The
training loop knows nothing else of an objective.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae.autoencoder import Autoencoder
from pyro_vae.checks import number, whole_number
from pyro_vae.direct import direct_log_prob
from pyro_vae.vae import VAE

__all__ = [
    "ESTIMATORS",
    "NegativeDirectLogLikelihood",
    "NegativeELBO",
    "NegativeIWAE",
    "Objective",
    "ReconstructionError",
    "scale_latents",
]

ESTIMATORS = ("trace", "mean-field")


class Objective(nn.Module):
    """Base of all objectives: ``objective(x) -> {"loss": ..., ...}``, scalars, mean nats per image."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define forward(x) -> dict of scalar tensors with 'loss'.")

    def check(self, x: Tensor) -> None:
        """Raise a ``ValueError`` if the objective is not defined for these observations; called once, before training."""

    def diagnose(self, x: Tensor) -> str:
        """What to tell of a batch whose loss or gradient is not finite.

        It says what holds on every processor: of the data, say. What a net makes of them after an overflow, 10, -10 or NaN,
        depends on the order of sums.
        """
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


LEAST_BETA = 1e-30  # a KL times less is 0 in float32, and would be recorded as nan


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
        self.vae = _require_vae(vae)
        self.estimator = estimator
        self.num_particles = whole_number("num_particles", num_particles)
        self.beta = number("beta", beta, least=LEAST_BETA)

    def per_image(self, x: Tensor, num_particles: int | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction and beta-weighted kl per draw and image, each ``(num_particles, batch)``, nats."""
        self.vae.check_batch(x)
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


class NegativeIWAE(NegativeELBO):
    r"""Negative importance-weighted bound with K draws per image (Burda et al. 2016, arXiv:1509.00519), nats per image.

    .. math:: \mathcal L_K(x) = E_{z_1 \dots z_K \sim q(z|x)} \Big[ \log \frac1K \sum_k
        \frac{p(x, z_k)}{q(z_k \mid x)} \Big], \qquad \mathrm{ELBO} = \mathcal L_1 \le \mathcal L_K \le \log p(x)

    The weights are normalised per image. (:class:`pyro.infer.RenyiELBO` with alpha = 0 is the same on a batch of one; on a
    larger one it weighs the batch as a whole, which is looser.)

    Args:
        vae: the model and guide.
        num_particles: draws per image, K.

    A call returns ``loss``, the negative bound, and ``neg_elbo``, ``reconstruction``, ``kl`` of the same draws.
    """

    def __init__(self, vae: VAE, *, num_particles: int = 5) -> None:
        super().__init__(vae, num_particles=num_particles)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        reconstruction, kl = self.per_image(x)  # (num_particles, batch)
        log_weights = -(reconstruction + kl)
        bound = log_weights.logsumexp(0) - math.log(self.num_particles)
        terms = {"neg_elbo": -log_weights.mean(), "reconstruction": reconstruction.mean(), "kl": kl.mean()}
        return {"loss": -bound.mean()} | terms | self.vae.likelihood.terms(terms["reconstruction"], self.vae.event_shape)


class NegativeDirectLogLikelihood(Objective):
    r"""Direct Monte-Carlo maximum likelihood: decoder and prior alone, no encoder. Nats per image.

    .. math:: \text{loss} = -\frac1B \sum_i \log \frac1M \sum_m p(x_i \mid z_m), \qquad z_m \sim N(0, I)

    The draws are shared by all images, so that all pairs are one matrix product. Two ways to draw, both biased for log p(x)
    from below by Jensen's inequality, by about Var(p-hat) / (2 p^2):

    - fixed once (the default): the loss is then the exact negative log-likelihood of another model, the mixture of M
      components p(x | z_m), and can be minimised without noise. It fits these M points and need not be good between them:
      the same decoder under fresh draws scores worse.
    - redrawn at each step: the gradient is noisy, with a few draws dominating each image, but no fixed set of points can be
      fitted, and the decoder must be good all over the prior.

    Args:
        vae: its decoder, likelihood and prior are used; the encoder's parameters get no gradient.
        num_draws: number of draws, M.
        redraw: draw anew at each call, instead of once, here, from torch's global random state.
    """

    z: Tensor

    def __init__(self, vae: VAE, *, num_draws: int = 64, redraw: bool = False) -> None:
        super().__init__()
        self.vae = _require_vae(vae)
        self.redraw = redraw
        self.register_buffer("z", vae.prior().sample((whole_number("num_draws", num_draws),)))  # (num_draws, latent_dim)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.vae.check_batch(x)
        z = torch.randn_like(self.z) if self.redraw else self.z
        return {"loss": -direct_log_prob(self.vae, z, x).mean()}

    def check(self, x: Tensor) -> None:
        self.vae.likelihood.check(x)


class ReconstructionError(Objective):
    r"""Mean squared error of a plain autoencoder, per element: :math:`\frac{1}{D} \lVert x - \hat x \rVert^2`, no nats.

    Args:
        autoencoder: what is trained.

    A call returns ``loss`` and ``squared_error``, D times as much: the sum over elements, as for a VAE of normal likelihood.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(f"ReconstructionError: expected an Autoencoder, found {type(autoencoder).__name__}.")
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        loss = F.mse_loss(self.autoencoder(x), x)
        return {"loss": loss, "squared_error": loss * x[0].numel()}


def _require_vae(vae: VAE) -> VAE:
    if not isinstance(vae, VAE):
        raise ValueError(f"expected a VAE, found {type(vae).__name__}. Put encoder and decoder into a pyro_vae.VAE first.")
    return vae


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
