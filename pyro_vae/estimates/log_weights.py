r"""The log weight log p(x, z) - log q(z | x) of each draw and observation, by sample site.

ELBO, importance-weighted bound and log p(x) are functions of it.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import constraints, kl_divergence
from torch.distributions.utils import lazy_property as lazy

from pyro_vae._checks import few_values
from pyro_vae.models.programs import ProgramPair

__all__ = ["NoDensityError", "Site", "Weights", "check_sites", "log_weights", "require_densities", "weigh"]

_DRAWS = "_draws"  # the plate of the draws


class NoDensityError(ValueError):
    """A site whose ratio p / q is no ratio of two densities, nor of two probabilities."""


@dataclass(frozen=True)
class Site:
    """A sample site of model or guide, with its log-probabilities, broadcastable to ``(draws, B)``.

    Args:
        name: of the site.
        observed: whether the model observes it.
        log_p: log-probability under the model; None if only the guide has the site.
        log_q: log-probability under the guide; None if only the model has the site: it is observed, or drawn from the model.
        scale_p: factor of ``poutine.scale`` around the model, without that of the plate's subsampling. Not applied to log_p.
        scale_q: the same around the guide.
        p: the model's distribution.
        q: the guide's distribution.
        value: the drawn or observed value.
        mask: of the guide's site.
    """

    name: str
    observed: bool
    log_p: Tensor | None
    log_q: Tensor | None
    scale_p: Any
    scale_q: Any
    p: Any
    q: Any
    value: Tensor
    mask: Any

    @property
    def terms(self) -> list[Tensor]:
        """The terms of the log weight from this site."""
        if self.log_q is None and not self.observed:
            return []  # drawn from the model: log p - log p cancels
        return [*([] if self.log_p is None else [self.log_p]), *([] if self.log_q is None else [-self.log_q])]

    @functools.cached_property
    def closed_kl(self) -> Tensor | None:
        """KL(q || p) of a latent site in closed form, ``(draws, B)``; None if there is no closed form."""
        try:
            kl = kl_divergence(self.q, self.p)
        except NotImplementedError:
            return None
        return scale_and_mask(kl, mask=self.mask)


@dataclass(frozen=True)
class Weights:
    """All sites of a model and guide, for draws of the latents.

    Args:
        sites: the sites, observed ones and latent ones.
        shape: ``(draws, B)``.
        device: of the tensors.
    """

    sites: Sequence[Site]
    shape: tuple[int, int]
    device: torch.device

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z | x), ``(draws, B)``, without the factors of ``poutine.scale``."""
        return self._total([term for site in self.sites for term in site.terms])

    @property
    def latents(self) -> list[Site]:
        """The sites that the guide draws."""
        return [site for site in self.sites if site.log_q is not None]

    def reconstruction(self, *, scaled: bool = False) -> Tensor:
        """-log p of the observed sites given the latents, ``(draws, B)``; with ``scaled``, times the scales of handlers."""
        observed = [site for site in self.sites if site.observed]
        return self._total([-scale_and_mask(s.log_p, scale=s.scale_p if scaled else 1.0) for s in observed])

    def kl(self, *, analytic: bool = False, scaled: bool = False) -> Tensor:
        """log q - log p of the latents at their draws, or KL(q || p) in closed form, ``(draws, B)``.

        Raises:
            ValueError: ``analytic`` is set, and the KL of a site has no closed form.
        """
        terms = []
        for site in self.latents:
            scale_p, scale_q = (site.scale_p, site.scale_q) if scaled else (1.0, 1.0)
            if analytic:
                kl = site.closed_kl
                if kl is None:
                    raise ValueError(
                        f"site {site.name!r}: there is no closed form of KL({_kind(site.q)} || {_kind(site.p)}). Estimate "
                        "it at the draws: estimator='trace'."
                    )
                terms.append(scale_and_mask(kl, scale=scale_q))
            else:
                terms.append(scale_and_mask(site.log_q, scale=scale_q))
                if site.log_p is not None:
                    terms.append(-scale_and_mask(site.log_p, scale=scale_p))
        return self._total(terms)

    def kl_per_dimension(self, *, analytic: bool = False) -> Tensor:
        """KL of each latent dimension, averaged over draws and observations; ``(dimensions,)``, all sites concatenated.

        Raises:
            ValueError: the dimensions of a latent site are not independent under model and guide.
        """
        parts = []
        for site in self.latents:
            q, p = _elements(site.q), _elements(site.p)
            if q is None or p is None or site.mask is not None:
                raise ValueError(
                    f"site {site.name!r}: the KL is a sum over dimensions, as free bits need it, only where these are "
                    f"independent under model and guide; found {type(site.p).__name__} and {type(site.q).__name__}. Use "
                    "distributions made by .to_event."
                )
            kl = kl_divergence(q, p) if analytic else q.log_prob(site.value) - p.log_prob(site.value)
            parts.append(kl.reshape(-1, site.q.event_shape.numel()).mean(0))
        return torch.cat(parts)

    @property
    def scaled(self) -> bool:
        """Whether a ``poutine.scale`` handler applies to any site."""
        return any(torch.is_tensor(s) or s != 1 for site in self.sites for s in (site.scale_p, site.scale_q))

    def _total(self, terms: Sequence[Tensor]) -> Tensor:
        total: Tensor = sum(terms[1:], terms[0]) if terms else torch.zeros((), device=self.device)
        return total.expand(self.shape)


def weigh(pair: ProgramPair, batch: Sequence[Tensor], num_samples: int = 1) -> Weights:
    """Draw latents from the guide, ``num_samples`` for each observation, and compute their log-probabilities.

    If there are several draws, z has a leading dimension, ``(num_samples, B, ...)``, over which a decoder must broadcast.
    Latent sites that the guide does not have are drawn from the model. The weights are not checked for nan or infinity.

    Raises:
        ValueError: a site is outside the data plate, in the guide alone, or has log-probabilities of a shape other than
            ``(draws, B)``; the guide observes a site, or the model observes none; or a distribution rejects its parameters
            or value (the message is that of the distribution, with a few of the values).
    """
    try:
        return _weigh(pair, batch, num_samples)
    except ValueError as error:
        if (short := few_values(str(error))) == str(error):
            raise
        raise ValueError(short) from error


def _weigh(pair: ProgramPair, batch: Sequence[Tensor], num_samples: int) -> Weights:
    size = len(batch[0])
    run_guide, run_model = (_vectorized(program, num_samples) for program in (pair.guide, pair.model))
    guide_trace = prune_subsample_sites(poutine.trace(run_guide).get_trace(*batch))
    model_trace = prune_subsample_sites(poutine.trace(poutine.replay(run_model, trace=guide_trace)).get_trace(*batch))
    p_sites, q_sites = (
        {name: s for name, s in t.nodes.items() if s["type"] == "sample" and not s["infer"].get("_deterministic")}
        for t in (model_trace, guide_trace)
    )
    _check_structure(p_sites, q_sites, size)
    sites = []
    for name in (*p_sites, *(name for name in q_sites if name not in p_sites)):
        p, q = p_sites.get(name), q_sites.get(name)
        log_p = None if p is None or (q is None and not p["is_observed"]) else _log_prob(p, num_samples, size)
        log_q = None if q is None else _log_prob(q, num_samples, size)
        sites.append(_site(name, p, q, log_p, log_q))
    if not any(site.observed for site in sites):
        raise ValueError("the model observes nothing. Pass x as obs= to a pyro.sample of the model.")
    return Weights(sites, (num_samples, size), batch[0].device)


def _site(name: str, p: Any, q: Any, log_p: Tensor | None, log_q: Tensor | None) -> Site:
    return Site(
        name,
        observed=p is not None and p["is_observed"],
        log_p=log_p,
        log_q=log_q,
        scale_p=1.0 if p is None else _scale(p),
        scale_q=1.0 if q is None else _scale(q),
        p=None if p is None else p["fn"],
        q=None if q is None else q["fn"],
        value=(q if p is None else p)["value"],
        mask=None if q is None else q["mask"],
    )


def log_weights(pair: ProgramPair, batch: Sequence[Tensor], num_samples: int) -> Tensor:
    """log p(x, z) - log q(z | x) for new draws of z, all in one tensor: ``(num_samples, B)``.

    Raises:
        ValueError: see :func:`weigh`; a site has a density under the model and none under the guide, or the reverse; or a
            log weight is nan or +inf (the message names the site).
    """
    weights = weigh(pair, batch, num_samples)
    require_densities(weights.sites)
    total = weights.log_weights
    if (wrong := wrong_weights(total)).any():
        bad = [site.name for site in weights.sites if any(bool(wrong_weights(term).any()) for term in site.terms)]
        names = bad or [site.name for site in weights.sites]
        raise ValueError(
            f"nan or +inf log weight, from site {', '.join(map(repr, names))}, for {int(wrong.any(0).sum())} of the "
            f"{weights.shape[1]} observations of this chunk. Check the parameters of that distribution."
        )
    return total


def wrong_weights(log_weights: Tensor) -> Tensor:
    """A mask of the invalid log weights: nan or +inf."""
    return log_weights.isnan() | (log_weights == math.inf)


def _vectorized(program: Callable[..., Any], num_samples: int) -> Callable[..., Any]:
    """The program within a plate of the draws, in a leading dimension, if there are several."""
    if num_samples == 1:
        return program

    @functools.wraps(program)
    def run(*batch: Any) -> Any:
        with pyro.plate(_DRAWS, num_samples, dim=-2):
            try:
                return program(*batch)
            except ValueError as error:
                if _DRAWS not in str(error):
                    raise
                raise ValueError(
                    "a plate collides with that of the draws, of dimension -2. Use no plate but that of the data, of "
                    "dimension -1, and declare the dimensions of an observation by .to_event."
                ) from error

    return run


def _check_structure(p_sites: dict[str, Any], q_sites: dict[str, Any], size: int) -> None:
    extra = [name for name in q_sites if name not in p_sites]  # whose transforms are Delta, as in Pyro's autoguides
    if extra and not any(isinstance(base_distribution(site["fn"]), dist.Delta) for site in q_sites.values()):
        raise ValueError(f"site {extra[0]!r} is in the guide but not in the model. Draw it in both.")
    for name, site in (*p_sites.items(), *q_sites.items()):
        in_guide = q_sites.get(name) is site
        if in_guide and site["is_observed"]:
            raise ValueError(
                f"the guide observes site {name!r}, but a guide must only draw. Use obs= and pyro.factor in the model alone."
            )
        if in_guide and name not in p_sites and not site["infer"].get("is_auxiliary"):
            raise ValueError(f"site {name!r} is in the guide but not in the model. Draw it in both.")
        if in_guide and name in p_sites and p_sites[name]["is_observed"]:
            raise ValueError(f"site {name!r} is drawn by the guide and observed by the model. Remove it from the guide.")
        if -1 not in [frame.dim for frame in site["cond_indep_stack"]]:
            raise ValueError(
                f"site {name!r} is outside the data plate, so observations are not independent. Put it into "
                "with pyro.plate('data', len(x)), of dimension -1."
            )
        # Unit: pyro.factor, which has no value; Delta: a value computed from draws, by pyro.poutine.reparam, say.
        is_data = site["is_observed"] and not isinstance(base_distribution(site["fn"]), dist.Unit | dist.Delta)
        observed = site["value"].shape[: site["value"].dim() - site["fn"].event_dim] if is_data else ()
        if any(length != 1 for length in observed[:-1]):
            raise ValueError(
                f"site {name!r} observes values of batch shape {tuple(observed)}, expected ({size},). "
                "Declare the dimensions of one observation by .to_event, or squeeze them."
            )


def _log_prob(site: Any, num_samples: int, size: int) -> Tensor:
    log_prob: Tensor = scale_and_mask(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), mask=site["mask"])
    if log_prob.dim() > 2 or log_prob.shape[-1:] != (size,):
        raise ValueError(
            f"site {site['name']!r} has log-probabilities of shape {tuple(log_prob.shape)}, expected "
            f"{(num_samples, size)}: (draws, observations). Put it in the data plate, and declare all other dimensions by "
            ".to_event."
        )
    return log_prob


def _scale(site: Any) -> Any:
    """The scale of a site, without the factor of subsampling: terms are per observation."""
    subsampled = math.prod(frame.full_size / frame.size for frame in site["cond_indep_stack"] if frame.full_size)
    return site["scale"] if subsampled == 1 else site["scale"] / subsampled


def base_distribution(fn: Any) -> Any:
    """The distribution under .to_event, .expand and .mask."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _elements(fn: Any) -> Any:
    """The distribution of the elements of an event if they are independent; else None."""
    if fn is None or fn.event_dim == 0:
        return fn
    independent = isinstance(fn, torch.distributions.Independent) and fn.base_dist.event_dim == 0
    return fn.base_dist if independent else None


def _kind(fn: Any) -> str:
    """The name of a distribution under .to_event, .expand and .mask; a HalfNormal is one, though a Normal is its base."""
    while hasattr(fn, "base_dist") and not isinstance(fn, torch.distributions.TransformedDistribution):
        fn = fn.base_dist
    return type(fn).__name__


def require_densities(sites: Sequence[Site]) -> None:
    """A weight p(z) / q(z) needs both to be densities, or both to be probabilities.

    Raises:
        NoDensityError: a site of which that is not so.
    """
    if any(site.p is None for site in sites):
        return  # auxiliary sites, as in Pyro's autoguides: the other sites are transforms of them
    for site in sites:
        if site.q is None:
            continue
        kinds = [_support(fn) for fn in (site.q, site.p)]
        if "" not in kinds and kinds[0] != kinds[1]:
            raise NoDensityError(
                f"site {site.name!r} is {kinds[0]} in the guide ({_kind(site.q)}) and {kinds[1]} in the model "
                f"({_kind(site.p)}): their ratio is no importance weight. Draw it from a distribution of the same kind"
                + ("; of a plain autoencoder there is ReconstructionError." if "a point mass" in kinds else ".")
            )


def check_sites(sites: Sequence[Site]) -> None:
    """Look at the sites of one batch, as validation by Pyro would at each call: once is enough, before training.

    Raises:
        ValueError: as by :func:`require_densities`; a parameter that its distribution does not take; or draws of the guide
            to which the model's distribution gives no density, since its support is another.
    """
    require_densities(sites)
    for site in sites:
        for program, fn in (("guide", site.q), ("model", site.p)):
            if fn is not None:
                _check_parameters(f"site {site.name!r}: {_kind(fn)} in the {program}", base_distribution(fn))
        if site.q is None or site.p is None or site.mask is not None:
            continue
        try:
            support = site.p.support
        except NotImplementedError:  # a distribution that does not say
            continue
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        inside = support.check(site.value)
        if not inside.all():
            some = ", ".join(f"{value:.3g}" for value in site.value[~inside].flatten()[:3].tolist())
            raise ValueError(
                f"site {site.name!r}: {_kind(site.q)} in the guide draws values outside the support of {_kind(site.p)} in "
                f"the model, {support}: {some}, ... Transform the guide's draws, by a TransformedDistribution, say, or "
                "take another prior."
            )


def _check_parameters(what: str, fn: Any) -> None:
    """As the distribution does it where it validates its arguments. NaN is left to what finds it in the loss."""
    for name, constraint in getattr(fn, "arg_constraints", {}).items():
        if constraints.is_dependent(constraint) or (name not in vars(fn) and isinstance(getattr(type(fn), name), lazy)):
            continue
        value = getattr(fn, name)
        good = constraint.check(value)
        if not good.all() and not value.isnan().any():
            some = ", ".join(f"{number:.3g}" for number in value[~good].flatten()[:3].tolist())
            raise ValueError(f"{what} has {name} of {some}, ..., expected {constraint}. Use exp or softplus, say.")


def _support(fn: Any) -> str:
    fn = base_distribution(fn)
    if isinstance(fn, dist.Delta):
        return "a point mass"
    try:
        return "discrete" if fn.support.is_discrete else "continuous"
    except NotImplementedError:  # the distribution defines no support
        return ""
