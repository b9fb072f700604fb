"""The reference systems as named settings, and the model that a set of settings describes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pyro_vae._checks import SettingError, number, shape, whole_number
from pyro_vae._options import check_choices, described, option
from pyro_vae.data.dataset import BINARIZATIONS, Data
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.likelihoods import (
    BernoulliLikelihood,
    Likelihood,
    NormalLikelihood,
    PoissonLikelihood,
    StandardizedNormalLikelihood,
)
from pyro_vae.models.nets import ConvDecoder, ConvEncoder, Log1p, MLPDecoder, MLPEncoder, initialize_glorot
from pyro_vae.models.vae import VAE
from pyro_vae.training.objective import Objective
from pyro_vae.training.objectives import ESTIMATORS, LEAST_BETA, NegativeELBO, NegativeIWAE, ReconstructionError
from pyro_vae.training.schedules import staged_decay

__all__ = ["LIKELIHOODS", "OBJECTIVES", "PRESETS", "Settings", "fitting_likelihood", "load_preset"]

NETS = ("mlp", "mlp-linear", "mlp-tanh", "conv")
OBJECTIVES = (*ESTIMATORS, "iwae")
SCHEDULES = ("constant", "stages")
INITS = ("default", "glorot")

LIKELIHOODS = ("bernoulli", "normal", "learned-normal", "poisson")

# The normal likelihood of variance 1/2 has the squared error summed over pixels as its reconstruction term.
_FIXED: dict[str, Likelihood] = {
    "bernoulli": BernoulliLikelihood(),
    "normal": NormalLikelihood(variance=0.5, mean="sigmoid"),
    "poisson": PoissonLikelihood(),
}


@described
@dataclass(frozen=True)
class Settings:
    """All settings of a model and its training, except the data.

    With the likelihood none the model is a plain autoencoder. An invalid value raises a
    :class:`~pyro_vae._checks.SettingError` that names it.
    """

    preset: str = option(help="reference system from which these settings start")
    likelihood: str = option(
        help="normal: sigmoid mean, variance 1/2; learned-normal: mean and variance learned, of numbers of any range; "
        "poisson: counts",
        choices=(*LIKELIHOODS, "none"),  # none: a plain autoencoder
        default_text="with --data: chosen by the data, and printed",
    )
    hidden: tuple[int, ...] = option(
        help="widths from the data to the latent, mirrored in the decoder; of convolutional nets, channels"
    )
    latent_dim: int = option(help="number of latent dimensions")
    batch_size: int = option(help="observations per step; the last of an epoch has what is left")
    lr: float = option(help="Adam's initial learning rate")
    epochs: int | None = option(None, help="passes over the training set")
    steps: int | None = option(None, help="steps of the optimiser, in place of epochs")
    record_every: int | None = option(
        None, help="steps between records, each with an evaluation on the whole test set", default_text="an epoch"
    )
    net: str = option(
        "mlp",
        help="mlp-linear: no activation after the encoder's last hidden layer; mlp-tanh: tanh in place of ReLU; "
        "conv: convolutions",
        choices=NETS,
    )
    image_size: int | None = option(None, help="height and width to which images are resized")
    beta: float = option(1.0, help="weight of the KL in the loss")
    particles: int = option(1, help="latent draws per observation in the loss")
    objective: str = option(
        "trace",
        help="ELBO, its KL estimated at the draws (trace) or closed form (mean-field); iwae: the importance-weighted bound",
        choices=OBJECTIVES,
    )
    binarization: str = option(
        "none",
        help="none: grey pixels; threshold: 1 above 0.5; dynamic: redrawn as Bernoulli(grey) in each batch",
        choices=BINARIZATIONS,
        flag="--binarize",
    )
    eps: float = option(1e-8, help="Adam's, added to the root of the second moment")
    schedule: str = option(
        "constant",
        help="of the learning rate; stages: lower from stage to stage, of 1, 3, 9, ... epochs (Burda et al. 2016)",
        choices=SCHEDULES,
    )
    init: str = option(
        "default",
        help="initial weights; default: those of torch for each layer; glorot: Glorot uniform and biases of 0, with "
        "bernoulli the output's at the training mean (Burda et al. 2016)",
        choices=INITS,
    )

    def __post_init__(self) -> None:
        for name in ("latent_dim", "batch_size", "particles", "epochs", "steps", "record_every", "image_size"):
            if (value := getattr(self, name)) is not None or name in ("latent_dim", "batch_size", "particles"):
                object.__setattr__(self, name, whole_number(name, value))  # the way of frozen dataclasses
        if (self.epochs is None) == (self.steps is None):
            raise SettingError("epochs", f"expected either epochs or steps, found epochs {self.epochs}, steps {self.steps}.")
        object.__setattr__(self, "hidden", shape("hidden", self.hidden, empty=self.net != "conv"))
        number("lr", self.lr)
        number("eps", self.eps)
        number("beta", self.beta, least=LEAST_BETA)
        check_choices(self)
        if self.likelihood == "learned-normal" and self.net == "conv":
            raise SettingError("likelihood", "expected bernoulli or normal with convolutional nets, found 'learned-normal'.")
        if self.init == "glorot" and self.net == "conv":
            raise SettingError("init", "expected default with convolutional nets, found 'glorot'.")
        if self.objective == "iwae" and self.particles < 2:
            few = f"expected at least 2 with objective iwae, which is the ELBO with {self.particles}."
            raise SettingError("particles", few)
        if self.objective == "iwae" and self.beta != 1:
            raise SettingError("beta", f"expected 1 with objective iwae, which has no KL to weigh, found {self.beta!r}.")

    def build_vae(self, event_shape: Sequence[int], *, moments: tuple[Tensor, Tensor] | None = None) -> VAE:
        """A new VAE with these settings for observations of this shape, initialised from torch's global random state.

        Args:
            event_shape: shape of one observation.
            moments: mean and standard deviation of the training data, :meth:`~pyro_vae.data.dataset.Data.moments`, where
                :attr:`uses_moments`: the likelihood learned-normal standardises by them (None: 0 and 1), the rates of
                poisson are initialised to the mean (None: to about 1), and so are the probabilities of bernoulli with init
                glorot (None: to about 1/2).

        Raises:
            ValueError: these are settings of an autoencoder, or the nets do not support event_shape.
        """
        if self.likelihood == "none":
            raise ValueError(f"{self.preset} is a plain autoencoder, which has no likelihood: use build_model.")
        likelihood: Any
        if self.likelihood == "learned-normal":
            ones = torch.ones(shape("event_shape", event_shape))
            likelihood = StandardizedNormalLikelihood(*(moments or (ones - 1, ones)))
            encoder, decoder = self._nets(event_shape, heads=2, outputs=2)
        else:
            encoder, decoder = self._nets(event_shape, heads=2)
            likelihood = _FIXED[self.likelihood]
        if moments is not None and isinstance(decoder, MLPDecoder):
            mean = moments[0].flatten()
            with torch.no_grad():
                if self.likelihood == "poisson":  # rates far from the counts would overflow, or need thousands of steps
                    decoder.output.bias.copy_(mean.clamp_min(1e-3).log())
                elif self.likelihood == "bernoulli" and self.init == "glorot":
                    decoder.output.bias.copy_(mean.clamp(0.001, 0.999).logit())
        if self.likelihood == "poisson":
            encoder = nn.Sequential(Log1p(), encoder)
        return VAE(encoder, decoder, latent_dim=self.latent_dim, event_shape=event_shape, likelihood=likelihood)

    @property
    def uses_moments(self) -> bool:
        """Whether :meth:`build_vae` uses the moments of the training data."""
        return self.likelihood in ("learned-normal", "poisson") or (self.likelihood, self.init) == ("bernoulli", "glorot")

    def build_model(self, event_shape: Sequence[int], *, moments: tuple[Tensor, Tensor] | None = None) -> VAE | Autoencoder:
        """:meth:`build_vae`, or the autoencoder if the likelihood is none."""
        if self.likelihood != "none":
            return self.build_vae(event_shape, moments=moments)
        return Autoencoder(*self._nets(event_shape, heads=1), latent_dim=self.latent_dim, event_shape=event_shape)

    def _nets(self, event_shape: Sequence[int], *, heads: int, outputs: int = 1) -> tuple[nn.Module, nn.Module]:
        if self.net == "conv":
            encoder = ConvEncoder(event_shape, channels=self.hidden, heads=heads)
            if encoder.latent_dim != self.latent_dim:
                raise SettingError(
                    "latent_dim",
                    f"expected {encoder.latent_dim}, the size of the code {tuple(encoder.code_shape)} that images of shape "
                    f"{tuple(event_shape)} have in these nets, found {self.latent_dim}.",
                )
            return encoder, ConvDecoder(event_shape, code_shape=encoder.code_shape, channels=self.hidden[-2::-1])
        layers: dict[str, Any] = {"activation": nn.Tanh} if self.net == "mlp-tanh" else {}
        last = self.net != "mlp-linear"
        sizes: dict[str, Any] = {"latent_dim": self.latent_dim, **layers}
        nets = (
            MLPEncoder(event_shape, hidden=self.hidden, last_activation=last, heads=heads, **sizes),
            MLPDecoder(event_shape, hidden=self.hidden[::-1], outputs=outputs, **sizes),
        )
        if self.init == "glorot":
            for net in nets:
                initialize_glorot(net)
        return nets

    def build_objective(self, model: VAE | Autoencoder) -> Objective:
        """The objective of these settings for a model."""
        if isinstance(model, Autoencoder):
            return ReconstructionError(model)
        if self.objective == "iwae":
            return NegativeIWAE(model, num_particles=self.particles)
        return NegativeELBO(model, estimator=self.objective, num_particles=self.particles, beta=self.beta)

    def training(self) -> dict[str, Any]:
        """The keyword arguments of :func:`~pyro_vae.training.fit.fit` that these settings define."""
        arguments = {name: getattr(self, name) for name in ("epochs", "steps", "record_every", "batch_size", "lr")}
        if self.eps != Settings.eps:
            arguments["optimizer"] = partial(torch.optim.Adam, eps=self.eps, fused=True)
        if self.schedule == "stages":
            arguments["schedule"] = partial(LambdaLR, lr_lambda=staged_decay)
        return arguments


# The one-layer model of Burda et al. 2016 and its training.
_IWAE: dict[str, Any] = {"hidden": (200, 200), "net": "mlp-tanh", "latent_dim": 50, "binarization": "dynamic"}
_IWAE |= {"epochs": 3280, "batch_size": 20, "lr": 1e-3, "eps": 1e-4, "schedule": "stages", "init": "glorot"}
_D: dict[str, Any] = {"batch_size": 64, "lr": 5e-4, "record_every": 250, "image_size": 32}  # what system D has in common
_D_MLP: dict[str, Any] = {"hidden": (128, 64, 32), "net": "mlp-linear", "latent_dim": 2, "steps": 25_000, **_D}
_D_CONV: dict[str, Any] = {"hidden": (8, 16, 4), "net": "conv", "latent_dim": 64, "steps": 30_000, **_D}

#: The reference systems, :class:`Settings` by name.
PRESETS = {
    settings.preset: settings
    for settings in (
        Settings("bernoulli-z20", "bernoulli", (400,), latent_dim=20, epochs=40, batch_size=128, lr=1e-3),
        Settings("bernoulli-z10", "bernoulli", (200,), latent_dim=10, epochs=5, batch_size=128, lr=1e-2),
        Settings("gaussian-z4", "normal", (64, 32), latent_dim=4, epochs=50, batch_size=200, lr=1e-3),
        Settings("gaussian-z2", "normal", **_D_MLP),
        Settings("autoencoder-z2", "none", **_D_MLP),
        Settings("conv-gaussian", "normal", beta=0.8, **_D_CONV),
        Settings("conv-autoencoder", "none", **_D_CONV),
        Settings("bernoulli-z50", "bernoulli", **_IWAE),
    )
}


def load_preset(name: str, **changes: Any) -> Settings:
    """Settings of a reference system, with the given fields changed.

    Raises:
        ValueError: the preset or a setting is unknown, or a value is invalid.

    Example:
        >>> settings = load_preset("bernoulli-z20", latent_dim=2)
        >>> settings.hidden, settings.latent_dim
        ((400,), 2)
        >>> vae = settings.build_vae(event_shape=(1, 28, 28))
    """
    if name not in PRESETS:
        raise SettingError("preset", f"expected one of {', '.join(PRESETS)}, found {name!r}.")
    known = [field.name for field in fields(Settings)]
    unknown = [change for change in changes if change not in known]
    if unknown:
        raise ValueError(f"load_preset: no setting {', '.join(unknown)}; the settings are {', '.join(known)}.")
    if "epochs" in changes and "steps" not in changes:  # either takes the other's place
        changes["steps"] = None
    elif "steps" in changes and "epochs" not in changes:
        changes["epochs"] = None
    return replace(PRESETS[name], **changes)


def fitting_likelihood(data: Data) -> tuple[str, str]:
    """The default likelihood for the data, of those in :data:`LIKELIHOODS`, and the reason.

    - Values 0 and 1, with or without binarisation: ``"bernoulli"``.
    - Grey pixels, uint8 or images in [0, 1]: ``"bernoulli"`` too, as in most published examples; a relaxed one, whose values
      are comparable only with each other.
    - Colours: ``"normal"``, a density over colours.
    - Everything else, tables and values outside [0, 1]: ``"learned-normal"``. Whether whole numbers are counts or categories
      cannot be determined; the reason suggests ``"poisson"`` for counts.
    """
    shape, x = data.event_shape, data.x
    pixels = data.are_pixels
    if data.is_binary:
        return "bernoulli", "values of 0 and 1"
    if pixels and len(shape) == 3 and shape[0] == 3:
        return "normal", "colours"
    if pixels and (data.scaled or len(shape) > 1):
        return "bernoulli", "grey pixels: a relaxed Bernoulli, to be compared only with figures of the kind"
    span = f"{'numbers' if len(shape) == 1 else 'values'} from {x.min().item():g} to {x.max().item():g}"
    if data.are_counts:
        return "learned-normal", f"whole {span}; if they are counts, --likelihood poisson has their probabilities"
    return "learned-normal", span
