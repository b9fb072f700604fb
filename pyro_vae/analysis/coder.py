"""Any Pyro model and guide as an encoder and decoder of latent vectors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.estimates.log_weights import base_distribution
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.programs import ProgramPair, example_of

__all__ = ["Coder", "Decoded", "UndefinedError"]


class UndefinedError(ValueError):
    """A quantity is not defined for this model: the mean of a distribution, or the KL of each dimension, say."""


@dataclass(frozen=True)
class Decoded:
    """p(x | z) for latents z of n observations.

    Args:
        site: name of the site that observes x.
        distribution: of the site.
        shape: ``(n, *event_shape)``, the shape of the observations; that of the site may be flattened.
    """

    site: str
    distribution: Any
    shape: torch.Size

    @property
    def mean(self) -> Tensor:
        """The mean of p(x | z), ``(n, *event_shape)``.

        Raises:
            UndefinedError: the distribution has no mean in closed form.
        """
        return _mean(self.site, self.distribution).reshape(self.shape)

    def sample(self) -> Tensor:
        """A draw of x for each z, ``(n, *event_shape)``."""
        draw: Tensor = self.distribution.sample()
        return draw.reshape(self.shape)

    @property
    def is_bernoulli(self) -> bool:
        """Whether the elements of x are Bernoulli."""
        return isinstance(base_distribution(self.distribution), torch.distributions.Bernoulli)


class Coder:
    """Encodes observations as latent vectors ``(n, latent_dim)``, and decodes latent vectors.

    A latent vector is the concatenation of the flattened values of all latent sites of the guide, in the order of execution,
    without auxiliary sites.

    Args:
        model: a module with methods ``model`` and ``guide``, a pair ``(model, guide)`` of Pyro programs, a
            :class:`~pyro_vae.models.programs.ProgramPair`; or an :class:`~pyro_vae.models.autoencoder.Autoencoder`, whose
            code replaces the posterior mean.

    Attributes:
        pair: the pair; None for an autoencoder.
        programs: the arguments of :func:`~pyro_vae.models.programs.evaluating`.

    Raises:
        ValueError: the model is none of these.
    """

    def __init__(self, model: Any) -> None:
        self._autoencoder = model if isinstance(model, Autoencoder) else None
        self.pair = None if self._autoencoder is not None else ProgramPair(model)
        self.programs: tuple[Any, ...] = (model,) if self.pair is None else self.pair.programs
        self._module: nn.Module = model if self.pair is None else self.pair

    def require_pair(self, name: str) -> ProgramPair:
        """The pair.

        Raises:
            ValueError: the model is an autoencoder, which has no posterior.
        """
        if self.pair is None:
            raise ValueError(f"{name}: expected a model and guide, found an Autoencoder, which has no posterior.")
        return self.pair

    def example(self) -> Tensor | None:
        """A tensor of the dtype and device that observations must have; None if the model has no floating-point tensor."""
        return example_of(self._module) if self.pair is None else self.pair.example()

    def observations(self, name: str, like: Tensor | None, size: int) -> Tensor:
        """Placeholder observations ``(size, *event_shape)`` to call the model with, whose values do not matter.

        Args:
            name: of the calling function, for errors.
            like: observations, of which the first is repeated; None: zeros of the module's ``event_shape``.
            size: number of observations.

        Raises:
            ValueError: ``like`` is None and the module has no ``event_shape``.
        """
        if like is not None:
            return like[:1].expand(size, *like.shape[1:])
        owner = self._module if self.pair is None else self.pair.module
        if (event_shape := getattr(owner, "event_shape", None)) is None:
            raise ValueError(
                f"{name}: the shape of an observation is not known, since the model has no attribute event_shape. Pass an "
                "observation: like=x[:1]."
            )
        example = self.example()
        kind: dict[str, Any] = {} if example is None else {"dtype": example.dtype, "device": example.device}
        return torch.zeros(size, *event_shape, **kind)

    def means(self, *batch: Tensor) -> Tensor:
        """The posterior mean, ``(n, latent_dim)``; for each site, the mean given the means of the previous sites.

        Raises:
            UndefinedError: the distribution of a site has no mean in closed form.
            ValueError: a site is outside the data plate.
        """
        if self._autoencoder is not None:
            return self._autoencoder.encode(*batch)
        return _flat(self._latents(batch, lambda site: _mean(site["name"], site["fn"])))

    def draws(self, *batch: Tensor) -> Tensor:
        """A draw from the posterior of each observation, ``(n, latent_dim)``."""
        return _flat(self._latents(batch, lambda site: None))

    def decode(self, z: Tensor | None, *batch: Tensor) -> Decoded:
        """p(x | z), the distribution of the site that observes x, the first tensor of the batch.

        Args:
            z: ``(n, latent_dim)``; None: drawn from the prior.
            batch: the model's arguments: n observations, and any context.

        Raises:
            UndefinedError: z lies outside the support of its site, or there is not exactly one site that observes x.
            ValueError: z has the wrong shape.
        """
        if self._autoencoder is not None:
            if z is None:
                raise UndefinedError("an Autoencoder has no prior to draw from.")
            image = self._autoencoder.decode(z)
            return Decoded("x", dist.Delta(image, event_dim=image.dim() - 1), image.shape)
        values = {} if z is None else self._values(z, batch)
        with _Values(lambda site: values.get(site["name"])) as run:
            self.require_pair("decode").model(*batch)
        for name, value in values.items():
            if name in run.sites:
                _check_support(run.sites[name], value)
        site = _site_of_x(run.sites.values(), batch[0])
        return Decoded(site["name"], site["fn"], batch[0].shape)

    def dimensions(self, *batch: Tensor) -> int:
        """The number of latent dimensions."""
        if self._autoencoder is not None:
            return self._autoencoder.latent_dim
        return sum(value[0].numel() for value in self._drawn_apart(batch).values())

    def _values(self, z: Tensor, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The values of the sites in a latent vector, by name."""
        like = self._drawn_apart(batch)
        sizes = [value[0].numel() for value in like.values()]
        if z.shape != (len(batch[0]), sum(sizes)):
            sites = ", ".join(f"{name} of {size}" for name, size in zip(like, sizes, strict=True))
            raise ValueError(
                f"expected latents of shape ({len(batch[0])}, {sum(sizes)}), (observations, latent_dim), of the sites "
                f"{sites}; found {tuple(z.shape)}."
            )
        parts = zip(like.items(), z.split(sizes, dim=1), strict=True)
        return {name: part.reshape(value.shape) for (name, value), part in parts}

    def _drawn_apart(self, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Draws of the latents of a batch; torch's random state is restored."""
        with torch.random.fork_rng(devices=[t.device for t in batch if t.is_cuda][:1]):
            return self._latents(batch, lambda site: None)

    def _latents(self, batch: tuple[Tensor, ...], choose: Callable[[Any], Tensor | None]) -> dict[str, Tensor]:
        with _Values(choose) as run:
            self.require_pair("encode").guide(*batch)
        found = {}
        for name, site in run.sites.items():
            if site["infer"].get("is_auxiliary"):
                continue
            if site["value"].shape != (len(batch[0]), *site["fn"].event_shape):
                raise ValueError(
                    f"site {name!r}: expected a value of shape {(len(batch[0]), *site['fn'].event_shape)}, (observations, "
                    f"*event_shape), found {tuple(site['value'].shape)}. Put it into the data plate, of dimension -1."
                )
            found[name] = site["value"]
        if not found:
            raise UndefinedError("the guide has no latent site, so that there is no latent space.")
        return found


class _Values(Messenger):
    """A handler that sets the value of each latent site by a function of the site, or draws it if that returns None.

    Records all sites by name. (Pyro's own trace would append shapes to error messages.)
    """

    def __init__(self, choose: Callable[[Any], Tensor | None]) -> None:
        super().__init__()
        self._choose = choose
        self.sites: dict[str, Any] = {}

    def __enter__(self) -> "_Values":
        super().__enter__()
        return self

    def _pyro_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg)) and (value := self._choose(msg)) is not None:
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.sites[msg["name"]] = msg


def _flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(len(value), -1) for value in values.values()], dim=1)


def _mean(name: str, fn: Any) -> Tensor:
    try:
        mean = fn.mean.expand(fn.shape())
    except (NotImplementedError, AttributeError):  # of a transformed distribution, say
        mean = None
    if mean is None or not mean.isfinite().all():
        found = "has none in closed form" if mean is None else "has none, or is not finite"
        kind = type(base_distribution(fn)).__name__
        raise UndefinedError(f"site {name!r}: expected a distribution with a mean; {kind} {found}.")
    return mean


def _check_support(site: Any, value: Tensor) -> None:
    try:
        inside = site["fn"].support.check(value)
    except NotImplementedError:  # the distribution defines no support
        return
    if not inside.all():
        kind = type(base_distribution(site["fn"])).__name__
        raise UndefinedError(
            f"site {site['name']!r}: expected latents in the support of its {kind}, found some outside, for which the model "
            "is not defined."
        )


def _site_of_x(sites: Iterable[Any], x: Tensor) -> Any:
    """The site that observes x: the only observed site with as many elements."""
    no_data = (dist.Unit, dist.Delta)  # of pyro.factor and pyro.deterministic
    observed = [site for site in sites if site["is_observed"] and not isinstance(base_distribution(site["fn"]), no_data)]
    found = [site for site in observed if site["value"].numel() == x.numel()]
    if len(found) != 1:
        names = ", ".join(f"{site['name']!r} of shape {tuple(site['value'].shape)}" for site in observed) or "none"
        raise UndefinedError(f"expected one site that observes x, of shape {tuple(x.shape)}; found {names}.")
    return found[0]
