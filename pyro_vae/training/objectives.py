"""Objectives: modules that map a batch to a dict of scalar tensors, mean nats per observation.

``"loss"`` is minimised; the other entries, its terms, are recorded under their names. The training loop depends on nothing
else of an objective.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor

from pyro_vae._checks import number, whole_number
from pyro_vae.estimates.log_weights import Weights, check_sites, weigh
from pyro_vae.estimates.prior_sampling import direct_log_prob, pairwise_log_prob
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.programs import ProgramPair, evaluating, example_of
from pyro_vae.models.vae import VAE
from pyro_vae.training.objective import Objective
from pyro_vae.training.schedules import Schedule

__all__ = [
    "ESTIMATORS",
    "NegativeDirectLogLikelihood",
    "NegativeELBO",
    "NegativeIWAE",
    "ReconstructionError",
    "scale_latents",
]

ESTIMATORS = ("trace", "mean-field")


class _ScaleLatents(ScaleMessenger):
    """Pyro's scale handler, for the latent sites alone."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            super()._process_message(msg)


def scale_latents(fn: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """Scale the log-probability of every latent site of a Pyro program, but not of observed sites.

    Applied to both model and guide, it multiplies the KL term (beta-VAE: Higgins et al. 2017), also under Pyro's own SVI:
    ``SVI(scale_latents(vae.model, 4.0), scale_latents(vae.guide, 4.0), optimizer, Trace_ELBO())``.
    """
    return _ScaleLatents(scale)(fn)


LEAST_BETA = 1e-30  # a smaller factor of the KL would underflow in float32


class NegativeELBO(Objective):
    r"""Negative evidence lower bound, in nats per observation.

    .. math:: -\mathrm{ELBO} = \underbrace{E_{q(z|x)}[-\log p(x \mid z)]}_{\text{reconstruction}}
        + \underbrace{\mathrm{KL}(q(z \mid x) \,\|\, p(z))}_{\text{kl}}, \qquad
        \text{loss} = \text{reconstruction} + \beta \, \text{kl}

    For any Pyro model and guide with one data plate, see :class:`~pyro_vae.models.programs.ProgramPair`; with several latent
    sites, kl is the sum over them. The value and gradient of ``loss`` are those of Pyro's ``differentiable_loss`` divided
    by the batch size, for the same noise. In addition, the terms are returned separately, and nothing is copied from the
    device. Factors of ``poutine.scale`` around model or guide apply to ``loss`` alone, not to the other terms.

    Args:
        model: the model; or a module with methods ``model`` and ``guide``, such as a :class:`~pyro_vae.VAE`, without a
            second argument. ``reconstruction`` includes the normalising constants of the likelihood.
        guide: the guide. Its draws must be reparameterised (``rsample``).
        estimator: ``"trace"`` estimates kl by log q(z | x) - log p(z) at the drawn z (:class:`pyro.infer.Trace_ELBO`);
            ``"mean-field"`` uses the closed form (:class:`pyro.infer.TraceMeanField_ELBO`), which must exist.
        num_particles: latent draws per observation, vectorised in a leading dimension.
        beta: weight of kl in the loss (Higgins et al. 2017); or a schedule of it, such as
            :class:`~pyro_vae.training.schedules.LinearWarmup`. ``neg_elbo`` is always the unweighted bound.
        free_bits: nats of each latent dimension's kl, averaged over the batch, that cost nothing more when lowered: the
            loss has max(kl of the dimension, free_bits) (Kingma et al. 2016, arXiv:1606.04934). 0: none. Under ``torchrun``
            each process averages over its own share of the batch, so that the loss depends on their number: the mean of
            maxima is at least the maximum of the mean.

    A call on a batch returns the scalars ``loss``, ``neg_elbo``, ``reconstruction``, ``kl``, and terms of the likelihood
    (``squared_error`` for :class:`~pyro_vae.models.likelihoods.NormalLikelihood`).

    Raises:
        ValueError: no model and guide, unknown estimator, fewer than one particle, beta not positive. Before training: a
            guide that is a point mass at a site of the model, since log q is then no log density and the loss no ELBO; or
            that draws outside the support of the model's distribution.
    """

    beta: Tensor

    def __init__(
        self,
        model: Any,
        guide: Callable[..., Any] | None = None,
        *,
        estimator: str = "trace",
        num_particles: int = 1,
        beta: float | Schedule = 1.0,
        free_bits: float = 0.0,
    ) -> None:
        super().__init__()
        if estimator not in ESTIMATORS:
            raise ValueError(f"NegativeELBO: estimator must be one of {', '.join(ESTIMATORS)}, found {estimator!r}.")
        self.pair = ProgramPair(model, guide)
        self.estimator = estimator
        self.num_particles = whole_number("num_particles", num_particles)
        self.schedule = beta if callable(beta) else None
        first = beta(0) if callable(beta) else number("beta", beta, least=LEAST_BETA)
        # A buffer, so that a compiled step reads its current value.
        like = example_of(self.pair)
        kind: dict[str, Any] = {} if like is None else {"dtype": like.dtype, "device": like.device}
        self.register_buffer("beta", torch.tensor(float(first), **kind), persistent=False)
        self.free_bits = number("free_bits", free_bits) if free_bits else 0.0

    def per_observation(self, *batch: Tensor, num_particles: int | None = None) -> tuple[Tensor, Tensor]:
        """``reconstruction`` and ``kl`` of each draw and observation, ``(num_particles, batch)`` each, nats."""
        weights = self._weigh(batch, num_particles)
        return weights.reconstruction(), weights.kl(analytic=self.estimator == "mean-field")

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        weights = self._weigh(batch)
        analytic = self.estimator == "mean-field"
        reconstruction, kl = weights.reconstruction().mean(), weights.kl(analytic=analytic).mean()
        if weights.scaled:
            if self.free_bits:
                raise ValueError(
                    "NegativeELBO: free_bits is not defined under poutine.scale around model or guide. Use one of the two."
                )
            loss = weights.reconstruction(scaled=True).mean() + self.beta * weights.kl(analytic=analytic, scaled=True).mean()
        elif self.free_bits:
            loss = reconstruction + self.beta * weights.kl_per_dimension(analytic=analytic).clamp_min(self.free_bits).sum()
        else:
            loss = reconstruction + self.beta * kl
        terms = {"loss": loss, "neg_elbo": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}
        return terms | self.pair.terms(reconstruction)

    def _weigh(self, batch: Sequence[Tensor], num_particles: int | None = None) -> Weights:
        weights = weigh(self.pair, batch, self.num_particles if num_particles is None else num_particles)
        for site in weights.sites:
            if site.q is not None and not site.q.has_rsample:
                raise ValueError(
                    f"{type(self).__name__}: expected a reparameterised guide, found {site.q} at site {site.name!r}, whose "
                    "draws carry no gradient. Use a distribution with rsample, or train by pyro.infer.SVI with Trace_ELBO."
                )
        return weights

    def example(self) -> Tensor | None:
        return self.pair.example()

    def prepare(self, *batch: Tensor) -> None:
        self.pair.prepare(*batch)
        devices = [t.device for t in batch if t.is_cuda][:1]
        with torch.no_grad(), torch.random.fork_rng(devices=devices), evaluating(*self.pair.programs):
            check_sites(self._weigh(batch).sites)

    def check(self, *batch: Tensor) -> None:
        self.pair.check(*batch)

    def identity(self) -> str:
        beta = f"{self.beta.item():g}" if self.schedule is None else _name(self.schedule)
        return (
            f"{type(self).__name__}(estimator={self.estimator}, num_particles={self.num_particles}, beta={beta}, "
            f"free_bits={self.free_bits:g})"
        )

    def at_step(self, step: int, steps: int) -> None:
        if self.schedule is None:
            return
        if step == 0 and (final := self.schedule(steps - 1)) < 0.999:  # some schedules only approach 1
            warnings.warn(
                f"the schedule of beta is at {final:g}, below 1, at the end of this run of {steps:,} steps: the loss is not "
                "the negative ELBO. Train longer, or shorten the warm-up.",
                UserWarning,
                stacklevel=3,
            )
        self.beta.fill_(self.schedule(step))


def _name(schedule: Schedule) -> str:
    """A name that is the same in every process, unlike the repr of a function, which has its address."""
    return repr(schedule) if is_dataclass(schedule) else getattr(schedule, "__qualname__", type(schedule).__name__)


class NegativeIWAE(NegativeELBO):
    r"""Negative importance-weighted bound with K draws per observation (Burda et al. 2016, arXiv:1509.00519), nats.

    .. math:: \mathcal L_K(x) = E_{z_1 \dots z_K \sim q(z|x)} \Big[ \log \frac1K \sum_k
        \frac{p(x, z_k)}{q(z_k \mid x)} \Big], \qquad \mathrm{ELBO} = \mathcal L_1 \le \mathcal L_K \le \log p(x)

    Each observation has its own importance weights. (:class:`pyro.infer.RenyiELBO` with alpha = 0 is equal for a batch of
    one; for a larger batch it has one weight for the whole batch, which is a looser bound.)

    Args:
        model: the model, or a module with methods ``model`` and ``guide``; see :class:`NegativeELBO`.
        guide: the guide.
        num_particles: draws per observation, K.

    A call returns ``loss``, the negative bound, and ``neg_elbo``, ``reconstruction`` and ``kl`` for the same draws.
    """

    def __init__(self, model: Any, guide: Callable[..., Any] | None = None, *, num_particles: int = 5) -> None:
        super().__init__(model, guide, num_particles=num_particles)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        weights = self._weigh(batch)
        bound = weights.log_weights.logsumexp(0) - math.log(self.num_particles)
        reconstruction, kl = weights.reconstruction().mean(), weights.kl().mean()
        terms = {"neg_elbo": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}
        return {"loss": -bound.mean()} | terms | self.pair.terms(reconstruction)


class NegativeDirectLogLikelihood(Objective):
    r"""Direct Monte-Carlo maximum likelihood with decoder and prior, without the encoder. Nats per observation.

    .. math:: \text{loss} = -\frac1B \sum_i \log \frac1M \sum_m p(x_i \mid z_m), \qquad z_m \sim p(z)

    All observations share the draws, so that all pairs are one matrix product. There are two ways to draw; by Jensen's
    inequality both estimates of log p(x) are biased low, by about Var(p-hat) / (2 p^2):

    - fixed (the default): the loss is the exact negative log-likelihood of another model, the mixture of M components
      p(x | z_m), and is minimised without noise. The decoder overfits these M points: with new draws its likelihood is
      lower.
    - redrawn at each step: the gradient is noisy, because a few draws dominate each observation, but the decoder cannot
      overfit the draws and must fit under the whole prior.

    Args:
        vae: its decoder, likelihood and prior are used. The encoder's parameters get no gradient; neither do those of a
            prior without reparameterised draws, such as :class:`~pyro_vae.models.priors.NormalMixture`.
        num_particles: number of draws, M.
        redraw: draw at each call, instead of once in the constructor, from torch's global random state.

    Raises:
        ValueError: the likelihood has no ``pairwise_log_prob``.
    """

    z: Tensor

    def __init__(self, vae: VAE, *, num_particles: int = 64, redraw: bool = False) -> None:
        super().__init__()
        self.vae = _require_vae(vae)
        pairwise_log_prob(vae)
        self.redraw = redraw
        num_particles = whole_number("num_particles", num_particles)
        self.register_buffer("z", vae.prior_of().sample((num_particles,)))  # (num_particles, latent_dim)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        (x,) = batch
        self.vae.check_batch(x)
        z = self.z
        if self.redraw:
            prior = self.vae.prior_of()
            z = (prior.rsample if prior.has_rsample else prior.sample)(z.shape[:1])
        return {"loss": -direct_log_prob(self.vae, z, x).mean()}

    def example(self) -> Tensor:
        return self.vae.example()

    def check(self, *batch: Tensor) -> None:
        self.vae.check(*batch)


class ReconstructionError(Objective):
    r"""Mean squared error of a plain autoencoder, per element: :math:`\frac{1}{D} \lVert x - \hat x \rVert^2`, no nats.

    Args:
        autoencoder: to train.

    A call returns ``loss`` and ``squared_error``, D times the loss: the sum over elements, as for a VAE with a normal
    likelihood.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(f"ReconstructionError: expected an Autoencoder, found {type(autoencoder).__name__}.")
        self.autoencoder = autoencoder

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        (x,) = batch
        loss = F.mse_loss(self.autoencoder(x), x)
        return {"loss": loss, "squared_error": loss * x[0].numel()}


def _require_vae(vae: VAE) -> VAE:
    if not isinstance(vae, VAE):
        raise ValueError(f"expected a VAE, found {type(vae).__name__}. Put encoder and decoder into a pyro_vae.VAE first.")
    return vae
