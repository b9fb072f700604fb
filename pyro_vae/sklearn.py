"""A variational autoencoder as a scikit-learn transformer and density model, for tables ``(n_samples, n_features)``."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from pyro_vae._checks import whole_number
from pyro_vae.data.dataset import Data
from pyro_vae.data.tables import is_frame, of_frame
from pyro_vae.estimates.psis import Accumulator
from pyro_vae.estimates.records import LogMarginal
from pyro_vae.models.programs import evaluating
from pyro_vae.models.vae import VAE
from pyro_vae.runs.presets import LIKELIHOODS, Settings, fitting_likelihood
from pyro_vae.training.fit import fit
from pyro_vae.training.objectives import NegativeELBO
from pyro_vae.training.records import TrainingRecord

__all__ = ["VAETransformer"]

_AT_ONCE = 2**22  # numbers of the decoder's layers held at once by score_samples


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""A VAE with the methods of scikit-learn: features, reconstructions, log-likelihoods and samples of a table.

    Encoder and decoder are fully connected, and trained on the ELBO. By default the likelihood is chosen by the data:
    Bernoulli if all values are 0 or 1, else a normal with learned mean and variance per feature,
    :class:`~pyro_vae.models.likelihoods.StandardizedNormalLikelihood`, which standardises the features internally; densities
    are those of the features in their original units. Computes in the dtype of X, float32 or float64.

    Args:
        n_components: number of latent dimensions.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        likelihood: ``"auto"``, or one of :data:`~pyro_vae.runs.presets.LIKELIHOODS`.
        epochs: passes over the data in :meth:`fit`.
        batch_size: rows per step.
        lr: Adam's learning rate.
        beta: weight of the KL in the loss.
        num_samples: draws per row in :meth:`score_samples`.
        random_state: of initialisation, shuffling and noise: a seed, a ``numpy.random.RandomState``, or None.
        device: for training and inference.
        verbose: print a line per epoch.

    Attributes:
        vae_: the fitted :class:`~pyro_vae.VAE`, in evaluation mode.
        likelihood_: name of the likelihood.
        history_: one :class:`~pyro_vae.training.records.TrainingRecord` per epoch.
        n_features_in_: number of features.
        feature_names_in_: names of the features, if X has any.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(200, 5))
        >>> model = VAETransformer(n_components=2, epochs=5, random_state=0).fit(X)
        >>> model.transform(X).shape, model.log_marginal(X[:5]).value.shape
        ((200, 2), torch.Size([5]))
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        hidden: tuple[int, ...] = (64,),
        likelihood: str = "auto",
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        beta: float = 1.0,
        num_samples: int = 100,
        random_state: Any = None,
        device: str = "cpu",
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.hidden = hidden
        self.likelihood = likelihood
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.beta = beta
        self.num_samples = num_samples
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: Any = None) -> "VAETransformer":  # noqa: N803, the name in scikit-learn
        """Train on X ``(n_samples, n_features)``, from newly initialised parameters; y is ignored.

        Raises:
            ValueError: an argument is invalid, or the likelihood is not defined for a value of X.
            NonFiniteError: loss or gradient became NaN or infinite.
        """
        self._start(self._table(X, reset=True))
        return self._train(self._table(X), self.epochs)

    def partial_fit(self, X: ArrayLike, y: Any = None) -> "VAETransformer":  # noqa: N803
        """One more pass over X, from the current parameters; y is ignored.

        The first call determines the likelihood and the mean and scale of the features, as :meth:`fit` does.
        Adam's moments persist from call to call, and from :meth:`fit`.
        """
        fresh = not hasattr(self, "vae_")
        x = self._table(X, reset=fresh)
        if fresh:
            self._start(x)
        return self._train(x, 1)

    def _table(self, values: ArrayLike, *, reset: bool = False) -> NDArray[Any]:
        if is_frame(values):  # scikit-learn's own errors do not name the column
            of_frame(values)
        result: NDArray[Any] = validate_data(self, values, dtype=[np.float64, np.float32], reset=reset)
        return result

    def _start(self, x: NDArray[Any]) -> None:
        """Initialise the model for data like x."""
        data = Data(torch.tensor(x))
        if self.likelihood not in ("auto", *LIKELIHOODS):
            raise ValueError(f"likelihood: expected one of auto, {', '.join(LIKELIHOODS)}, found {self.likelihood!r}.")
        self.likelihood_ = fitting_likelihood(data)[0] if self.likelihood == "auto" else self.likelihood
        whole_number("n_components", self.n_components)
        settings = Settings(
            "sklearn",
            self.likelihood_,
            self.hidden,
            latent_dim=self.n_components,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            beta=self.beta,
        )
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            moments = data.moments() if settings.uses_moments else None
            self.vae_ = settings.build_vae((x.shape[1],), moments=moments).to(data.x.dtype).eval()
        self.history_: list[TrainingRecord] = []
        self._moments: dict[str, Any] | None = None  # of Adam, after the last pass

    def _train(self, x: NDArray[Any], epochs: int) -> "VAETransformer":
        seed = self._seed + len(self.history_)  # in partial_fit, another order and noise in each pass
        objective = NegativeELBO(self.vae_, beta=self.beta)
        options: dict[str, Any] = {"batch_size": self.batch_size, "lr": self.lr, "seed": seed, "verbose": self.verbose}
        made: list[torch.optim.Optimizer] = []

        def adam(parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
            optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
            if self._moments is not None:
                optimizer.load_state_dict(self._moments)
                optimizer.param_groups[0]["lr"] = lr  # may have changed
            made.append(optimizer)
            return optimizer

        self.history_ += fit(objective, torch.tensor(x), epochs=epochs, device=self.device, optimizer=adam, **options)
        self._moments = made[0].state_dict()
        return self

    @property
    def _n_features_out(self) -> int:
        return self.vae_.latent_dim

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _tensor(self, values: ArrayLike) -> Tensor:
        check_is_fitted(self)
        return torch.tensor(self._table(values)).to(self.vae_.example())

    @torch.no_grad()
    def transform(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """Posterior means, ``(n_samples, n_components)``."""
        x = self._tensor(X)
        return _like(X, self.vae_.encode(x).mean)

    @torch.no_grad()
    def inverse_transform(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """The decoder's mean at latents ``(n_samples, n_components)``: ``(n_samples, n_features)``."""
        check_is_fitted(self)
        z = torch.tensor(check_array(X, dtype=[np.float64, np.float32], input_name="X")).to(self.vae_.like)
        if z.shape[1] != self.vae_.latent_dim:
            raise ValueError(f"X: expected {self.vae_.latent_dim} components, as transform returns, found {z.shape[1]}.")
        return _like(X, self.vae_.decode(z).mean)

    def score_samples(self, X: ArrayLike) -> NDArray[Any]:  # noqa: N803
        """log p(x) of each row, ``(n_samples,)``, nats, by importance sampling; see :meth:`log_marginal` for its error.

        Warns:
            UnreliableEstimateWarning: the estimates of some rows are not reliable; they are biased low.
        """
        result = self._log_marginal(X, self.num_samples)
        result.warn("score_samples")
        return _like(X, result.value)

    def log_marginal(self, X: ArrayLike, *, num_samples: int | None = None) -> LogMarginal:  # noqa: N803
        r"""log p(x) of each row by importance sampling with q(z | x) as proposal, with its error.

        .. math:: \log \hat p(x_i) = \log \frac1K \sum_{k=1}^K \frac{p(x_i \mid z_{ik}) \, p(z_{ik})}{q(z_{ik} \mid x_i)},
            \qquad z_{ik} = \mu(x_i) + \sigma(x_i) \, \epsilon_k

        All rows share the :math:`\epsilon_k`, so that the value of a row does not depend on the other rows. The errors of
        the rows are therefore not independent, and the standard error of the result's ``mean`` is too small.
        :func:`pyro_vae.log_marginal` has independent draws for every row.

        Args:
            X: rows, ``(n_samples, n_features)``.
            num_samples: K, draws per row; default: the estimator's.

        Returns:
            :class:`~pyro_vae.estimates.records.LogMarginal`, each field ``(n_samples,)``.

        Warns:
            UnreliableEstimateWarning: as by :meth:`score_samples`.
        """
        result = self._log_marginal(X, self.num_samples if num_samples is None else num_samples)
        result.warn("log_marginal")
        return result

    @torch.no_grad()
    def _log_marginal(self, X: ArrayLike, num_samples: int) -> LogMarginal:  # noqa: N803
        x = self._tensor(X)
        vae: VAE = self.vae_
        vae.check(x)
        k = whole_number("num_samples", num_samples, minimum=2)
        noise = torch.randn(k, 1, vae.latent_dim, dtype=vae.like.dtype, generator=torch.Generator().manual_seed(self._seed))
        noise = noise.to(x.device)
        width = max(x.shape[1], vae.latent_dim, *self.hidden, 1)
        results = []
        with evaluating(vae):
            for rows in x.split(max(1, _AT_ONCE // (k * width))):
                q = vae.encode(rows)
                z = q.mean + q.stddev * noise  # (K, rows, n_components)
                log_weights = vae.decode(z).log_prob(rows) + vae.prior().log_prob(z) - q.log_prob(z)
                weights = Accumulator(k)
                weights.add(log_weights)
                results.append(weights.results())
        value, error, ess, pareto_k = (torch.cat(parts) for parts in zip(*results, strict=True))
        return LogMarginal(value, error, ess, pareto_k.double(), k)

    def score(self, X: ArrayLike, y: Any = None) -> float:  # noqa: N803
        """Mean of :meth:`score_samples`, nats per row; higher is better. y is ignored."""
        return float(self.score_samples(X).mean())

    @torch.no_grad()
    def sample(self, n_samples: int = 1, random_state: Any = None) -> NDArray[Any]:
        """Samples from the model, ``(n_samples, n_features)``, reproducible for a given seed as random_state."""
        check_is_fitted(self)
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        prior = self.vae_.like
        with torch.random.fork_rng(devices=[prior.device] if prior.is_cuda else []):
            torch.manual_seed(seed)
            z = self.vae_.prior().sample((whole_number("n_samples", n_samples),))
            return _like(None, self.vae_.decode(z).sample().to(prior.dtype))


def _like(values: Any, result: Tensor) -> NDArray[Any]:
    """The result as an array, in float32 if the given values are float32."""
    array = result.cpu().numpy()
    return array.astype(np.float32, copy=False) if getattr(values, "dtype", None) == np.float32 else array
