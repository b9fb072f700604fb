"""The reference systems as named settings, and the model that a set of settings describes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pyro_vae.checks import number, shape, whole_number
from pyro_vae.data import BINARIZATIONS
from pyro_vae.likelihoods import BernoulliLikelihood, Likelihood, NormalLikelihood
from pyro_vae.nets import MLPDecoder, MLPEncoder
from pyro_vae.objectives import ESTIMATORS, NegativeELBO, NegativeIWAE
from pyro_vae.vae import VAE

__all__ = ["OBJECTIVES", "PRESETS", "Settings", "load_preset"]

OBJECTIVES = (*ESTIMATORS, "iwae")

# The normal likelihood of variance 1/2 has the squared error summed over pixels as its reconstruction term.
_LIKELIHOODS: dict[str, Likelihood] = {
    "bernoulli": BernoulliLikelihood(),
    "normal": NormalLikelihood(variance=0.5, mean="sigmoid"),
}


@dataclass(frozen=True)
class Settings:
    """All that defines a model and its training, but the data.

    Args:
        preset: name of the preset these settings started from.
        likelihood: ``"bernoulli"`` (logits) or ``"normal"`` (sigmoid mean, variance 1/2).
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        latent_dim: number of latent dimensions.
        epochs: passes over the training data.
        batch_size: observations per step.
        lr: Adam's learning rate.
        beta: weight of the KL in the loss.
        particles: latent draws per observation in the loss.
        objective: estimator of the KL, ``"trace"`` or ``"mean-field"``, see :class:`~pyro_vae.objectives.NegativeELBO`; or
            ``"iwae"``, the importance-weighted bound of ``particles`` draws, which has no beta but 1.
        binarization: see :class:`~pyro_vae.data.Data`.

    Raises:
        ValueError: a value that no model can be built with, named.
    """

    preset: str
    likelihood: str
    hidden: tuple[int, ...]
    latent_dim: int
    epochs: int
    batch_size: int
    lr: float
    beta: float = 1.0
    particles: int = 1
    objective: str = "trace"
    binarization: str = "none"

    def __post_init__(self) -> None:
        for name in ("latent_dim", "epochs", "batch_size", "particles"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))  # the way of frozen dataclasses
        object.__setattr__(self, "hidden", shape("hidden", self.hidden, empty=True))
        for name in ("lr", "beta"):
            number(name, getattr(self, name))
        for name, choices in (
            ("likelihood", tuple(_LIKELIHOODS)),
            ("objective", OBJECTIVES),
            ("binarization", BINARIZATIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}.")
        if self.objective == "iwae" and self.beta != 1:
            raise ValueError(f"beta: expected 1 with objective iwae, which has no KL to weigh, found {self.beta!r}.")

    def build_vae(self, event_shape: Sequence[int]) -> VAE:
        """A new VAE of these settings for observations of this shape, weights drawn from torch's global random state."""
        return VAE(
            MLPEncoder(event_shape, hidden=self.hidden, latent_dim=self.latent_dim),
            MLPDecoder(event_shape, hidden=self.hidden[::-1], latent_dim=self.latent_dim),
            latent_dim=self.latent_dim,
            event_shape=event_shape,
            likelihood=_LIKELIHOODS[self.likelihood],
        )

    def build_objective(self, vae: VAE) -> NegativeELBO:
        """The objective of these settings for a VAE."""
        if self.objective == "iwae":
            return NegativeIWAE(vae, num_particles=self.particles)
        return NegativeELBO(vae, estimator=self.objective, num_particles=self.particles, beta=self.beta)


PRESETS = {
    settings.preset: settings
    for settings in (
        Settings("bernoulli-z20", "bernoulli", (400,), latent_dim=20, epochs=40, batch_size=128, lr=1e-3),
        Settings("bernoulli-z10", "bernoulli", (200,), latent_dim=10, epochs=5, batch_size=128, lr=1e-2),
        Settings("gaussian-z4", "normal", (64, 32), latent_dim=4, epochs=50, batch_size=200, lr=1e-3),
    )
}


def load_preset(name: str, **changes: Any) -> Settings:
    """Settings of a reference system, with the given fields changed.

    Raises:
        ValueError: no such preset, no such setting, or a value that does not fit.

    Example:
        >>> settings = load_preset("bernoulli-z20", latent_dim=2)
        >>> settings.hidden, settings.latent_dim
        ((400,), 2)
        >>> vae = settings.build_vae(event_shape=(1, 28, 28))
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, found {name!r}.")
    known = [field.name for field in fields(Settings)]
    unknown = [change for change in changes if change not in known]
    if unknown:
        raise ValueError(f"load_preset: no setting {', '.join(unknown)}; the settings are {', '.join(known)}.")
    return replace(PRESETS[name], **changes)
