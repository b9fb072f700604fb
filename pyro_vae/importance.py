"""log p(x) by importance sampling, for any Pyro model and guide with one data plate, with its error and its health.

The driver, :func:`log_marginal`, traces guide and model vectorised over draws, in chunks of bounded memory; the array part
is in weights.py.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_vae import processes
from pyro_vae.checks import compile_choice, whole_number
from pyro_vae.compiling import NotCompiledWarning, UntraceableError, inductor, reason_of, trace
from pyro_vae.own_data import DataLike, as_data
from pyro_vae.vae import VAE
from pyro_vae.weights import Accumulator

__all__ = [
    "CompiledWeights",
    "Estimate",
    "ImportanceEstimate",
    "LogMarginal",
    "UnreliableEstimateWarning",
    "log_marginal",
    "log_weights",
]


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo figure.

    Args:
        value: mean over the data, nats per observation.
        standard_error: how far ``value`` would move if the latents were drawn anew, the data kept: 0 where it is exact.
        num_samples: latent draws made per observation; 0 where none was needed.
    """

    value: float
    standard_error: float
    num_samples: int


@dataclass(frozen=True)
class ImportanceEstimate(Estimate):
    """An :class:`Estimate` by importance sampling, with the health of its weights.

    Args:
        median_ess: median over the observations of the effective sample size.
        unreliable: number of observations whose Pareto k says that their error cannot be trusted; None where fewer than 25
            draws show no tail.
    """

    median_ess: float
    unreliable: int | None


class UnreliableEstimateWarning(UserWarning):
    """Importance weights whose tail is too heavy for the estimate's error to be trusted."""


@dataclass(frozen=True, eq=False)
class LogMarginal:
    """log p(x) per observation, in nats, estimated from below: E[value] <= log p(x), equal as the draws grow.

    Args:
        value: ``(B,)``, log of the mean importance weight.
        standard_error: ``(B,)``, of ``value``, by the delta method; nan for a single draw.
        ess: ``(B,)``, effective sample size, from 1 to ``num_samples``; 0 where every weight is 0.
        pareto_k: ``(B,)``, shape of the weights' tail; below 0.5 good, above 0.7 not to be trusted; nan for fewer than
            25 draws, which show no tail.
        num_samples: draws made per observation.
    """

    value: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    num_samples: int

    @property
    def unreliable(self) -> Tensor:
        """``(B,)`` of bool: Pareto k above min(1 - 1 / log10(K), 0.7) (Vehtari et al. 2024); False below 25 draws.

        Where the effective sample size is 0.9 K or more, the weights are too even for the shape of their tail to matter.
        """
        if self.num_samples < 25:
            return torch.zeros_like(self.pareto_k, dtype=torch.bool)
        return (self.pareto_k > min(1 - 1 / math.log10(self.num_samples), 0.7)) & (self.ess < 0.9 * self.num_samples)

    @property
    def mean(self) -> ImportanceEstimate:
        """The mean over all observations with its error, their draws being independent."""
        error = (self.standard_error**2).sum().sqrt() / len(self.value)
        return ImportanceEstimate(
            value=self.value.mean().item(),
            standard_error=error.item(),
            num_samples=self.num_samples,
            median_ess=self.ess.median().item(),
            unreliable=int(self.unreliable.sum()) if self.num_samples >= 25 else None,
        )


def log_marginal(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: DataLike,
    *,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    compile: bool | None = None,
) -> LogMarginal:
    r"""Importance-sampled marginal log-likelihood of every observation under a Pyro model, with the guide as proposal.

    .. math:: \log \hat p(x_i) = \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik} \mid x_i)}, \quad z_{ik} \sim q(z \mid x_i)

    A lower bound in expectation, by Jensen's inequality, that tightens as K grows (Burda et al. 2016, arXiv:1509.00519).
    Latent sites that the guide does not have are drawn from the model, so a guide that does nothing gives plain Monte Carlo
    from the prior. Scaling of sites (``poutine.scale``, subsampling) is left out: it is no part of the density. Works
    without gradients, in evaluation mode where model and guide are modules or methods of modules, and leaves torch's random
    state as found: the same state and chunk_size give the same draws, so seed anew between calls whose errors are to be
    independent. Both programs are called on parts of x, so what else they need per observation (labels, masks) must be found
    from x itself; and draws stand in a leading dimension, z ``(num_samples, B, ...)``, over which a decoder must broadcast.

    Args:
        model: Pyro program, called as ``model(x)``; every site in one plate of dimension -1 over the observations.
        guide: Pyro program, called as ``guide(x)``.
        x: observations, ``(B, ...)``: a tensor, as it is; or what :func:`~pyro_vae.own_data.as_data` takes, as one
            batch.
        num_samples: draws per observation, K.
        chunk_size: pairs (draw, observation) held at once; default: as many as hold 2^23 numbers. Memory
            grows with it and not with K or B.
        compile: trace model and guide once, and run each chunk as one compiled call: the same values for the same draws, at
            1.3 times the speed, after some 15 seconds of compiling. None: on the CPU, where there are 2,000 chunks or more
            and it pays. What cannot be compiled is run eagerly, with a
            :class:`~pyro_vae.compiling.NotCompiledWarning`. Needs a C++ compiler.

    Returns:
        :class:`LogMarginal`, each field ``(B,)``, float64.

    Raises:
        ValueError: no draws or data; a site outside the data plate, or in the guide alone; a log weight of nan or +inf, with
            its site.

    Warns:
        UnreliableEstimateWarning: once, if the Pareto k of some observations says that their errors cannot be trusted. The
            values there are still lower bounds in expectation.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):  # z ~ N(0, 1), x | z ~ N(z, 1), hence x ~ N(0, 2)
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> x = torch.tensor([0.0, 1.0, -3.0])
        >>> estimate = log_marginal(model, guide, x, num_samples=100)
        >>> torch.allclose(estimate.value.float(), dist.Normal(0.0, 2**0.5).log_prob(x))
        True
    """
    num_samples = whole_number("num_samples", num_samples)
    chunk_size = None if chunk_size is None else whole_number("chunk_size", chunk_size)
    if not torch.is_tensor(x):
        data = as_data(x)
        (x,) = data.batch(torch.arange(len(data), device=data.x.device))
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program) or isinstance(program, VAE):
            raise ValueError(f"{name}: expected a Pyro program, such as vae.{name}, found {type(program).__name__}.")
    if isinstance(vae := getattr(model, "__self__", None), VAE):  # here, in our words rather than in Pyro's
        vae.check_batch(x)
        vae.likelihood.check(x)
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"log_marginal: expected observations of shape (B, ...), found shape {tuple(x.shape)}.")
    # 2^23 numbers, 32 MiB, is the largest tensor that glibc keeps for reuse rather than asking for fresh pages each time;
    # hidden layers are rarely narrower than 128.
    chunk_size = chunk_size or max(1, 2**23 // max(x[0].numel(), 128))
    draws = min(num_samples, chunk_size)  # all draws of few images rather than the reverse: the guide runs once for each
    chunks = [min(draws, num_samples - done) for done in range(0, num_samples, draws)]
    images_at_once = max(1, chunk_size // draws)
    compile = compile_choice(compile, x.device)
    mine = processes.share(x)
    pays = x.device.type == "cpu" and (len(mine) // images_at_once) * (num_samples // draws) >= _PAYS
    weigh: Callable[[Tensor, int], Tensor] = functools.partial(log_weights, model, guide)
    if compile or (compile is None and pays):
        weigh = CompiledWeights(model, guide, (draws, min(images_at_once, len(mine))))
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), evaluating(model, guide):
        if processes.count() > 1:  # other noise on each of them
            torch.manual_seed(int(torch.randint(2**62, ())) + processes.rank())
        for images in mine.split(images_at_once):
            accumulator = Accumulator(num_samples)
            for k in chunks:
                accumulator.add(weigh(images, k))
            parts.append(accumulator.figures())
    value, error, ess, tail = (processes.gather(torch.cat(columns)) for columns in zip(*parts, strict=True))
    result = LogMarginal(value, error, ess, tail, num_samples)
    if bad := int(result.unreliable.sum()):
        warnings.warn(
            f"log_marginal: {bad:,} of {len(x):,} observations have importance weights of too heavy a tail (Pareto k): "
            f"there the value reads low and its error too small. Draw more than {num_samples:,}, or fit a better guide.",
            UnreliableEstimateWarning,
            stacklevel=2,
        )
    return result


# Chunks for which compiling pays by default: one takes about 90 ms, of which compiling saves a quarter.
_PAYS = 2000


class CompiledWeights:
    """:func:`log_weights` of one number of draws and images as one compiled call, traced when first called.

    The first chunk is weighed both ways with the same draws. Where they differ, or where a program cannot be traced, all
    are weighed eagerly, with one :class:`~pyro_vae.compiling.NotCompiledWarning`. So are chunks of another shape, and those
    whose weights are nan or +inf, for the error that names the site.

    Args:
        model, guide: as for :func:`log_marginal`; what they compute from parameters and modules stays as it is when traced.
        shape: (draws, images).
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], shape: tuple[int, int]) -> None:
        self.model, self.guide, self.shape = model, guide, shape
        self._call: Callable[..., Any] | None = None
        self._given_up = False

    def __call__(self, x: Tensor, num_samples: int) -> Tensor:
        """``(num_samples, B)``."""
        if self._given_up or (num_samples, len(x)) != self.shape:
            return log_weights(self.model, self.guide, x, num_samples)
        noise = torch.get_rng_state()
        if self._call is None:
            return self._compile(x, noise)
        (total,) = self._call(x)
        if bool(_wrong(total).any()):
            torch.set_rng_state(noise)
            return log_weights(self.model, self.guide, x, num_samples)
        return total

    def _compile(self, x: Tensor, noise: Tensor) -> Tensor:
        def function(x: Tensor) -> tuple[Tensor]:
            return (_log_weights(self.model, self.guide, x, self.shape[0])[0].clone(),)

        total = log_weights(self.model, self.guide, x, self.shape[0])
        after = torch.get_rng_state()
        try:
            with pyro.validation_enabled(False):  # it would look at values, which a graph cannot
                call = inductor(trace(function, [x]), [x])
            torch.set_rng_state(noise)
            (found,) = call(x)
            if not torch.allclose(found, total, rtol=1e-4, atol=1e-3):
                raise UntraceableError("compiled, its log weights are not those of the eager call")
            self._call = call
        except Exception as error:  # whatever Python, Pyro, the tracer and the compiler raise
            self._given_up = True
            warnings.warn(f"log_marginal, run eagerly, not compiled: {reason_of(error)}", NotCompiledWarning, stacklevel=4)
        finally:
            torch.set_rng_state(after)
        return total


@contextmanager
def evaluating(*programs: Callable[..., Any]) -> Iterator[None]:
    """Puts modules, and modules whose methods the programs are, into evaluation mode, and back as they were."""
    owners = []
    for program in programs:
        inner: Any = poutine.unwrap(program)  # under Pyro's handlers
        while isinstance(inner, functools.partial):
            inner = poutine.unwrap(inner.func)
        owners.append(getattr(inner, "__self__", inner))
    modules = {module: module.training for owner in owners if isinstance(owner, nn.Module) for module in owner.modules()}
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in modules.items():
            module.training = training


def log_weights(model: Callable[..., Any], guide: Callable[..., Any], x: Tensor, num_samples: int) -> Tensor:
    """log p(x, z) - log q(z | x) for fresh draws of z, all held at once: ``(num_samples, B)``; see :func:`log_marginal`."""
    total, terms = _log_weights(model, guide, x, num_samples)
    wrong = _wrong(total)
    if wrong.any():
        bad = [name for (_, name), term in terms.items() if _wrong(term).any()]
        names = dict.fromkeys(bad or [name for _, name in terms])  # each once, in their order
        raise ValueError(
            f"log_marginal: nan or +inf log weight, from site {', '.join(map(repr, names))}, for {int(wrong.any(0).sum())} "
            f"of the {len(x)} observations looked at together. Look at that distribution's parameters there."
        )
    return total


def _wrong(log_weights: Tensor) -> Tensor:
    return log_weights.isnan() | (log_weights == math.inf)


def _log_weights(
    model: Callable[..., Any], guide: Callable[..., Any], x: Tensor, num_samples: int
) -> tuple[Tensor, dict[tuple[int, str], Tensor]]:
    """Log weights ``(num_samples, B)``, and their terms by sign (model 1, guide -1) and site; values are not looked at."""
    shape = (num_samples, len(x))

    def vectorized(program: Callable[..., Any]) -> Callable[..., Any]:
        def run() -> Any:
            with pyro.plate("_importance_samples", num_samples, dim=-2):
                try:
                    return program(x)
                except ValueError as error:
                    if "_importance_samples" not in str(error):
                        raise
                    raise ValueError(
                        "log_marginal: a plate collides with that of the draws, dimension -2. The plate of the data "
                        "has dimension -1 and is the only one; declare the dimensions of an observation by .to_event."
                    ) from error

        return run

    guide_trace = prune_subsample_sites(poutine.trace(vectorized(guide)).get_trace())
    model_trace = prune_subsample_sites(poutine.trace(poutine.replay(vectorized(model), trace=guide_trace)).get_trace())
    terms = {}
    for sign, program, name in (
        *((1, model_trace, name) for name in model_trace.nodes),
        *((-1, guide_trace, name) for name in guide_trace.nodes),
    ):
        site = program.nodes[name]
        if site["type"] != "sample" or site["infer"].get("_deterministic"):
            continue
        if program is guide_trace and site["is_observed"]:
            raise ValueError(
                f"log_marginal: the guide observes site {name!r}, but a guide only draws. Leave obs= and pyro.factor to "
                "the model."
            )
        if program is guide_trace and name not in model_trace.nodes:
            raise ValueError(
                f"log_marginal: site {name!r} is in the guide but not in the model. Draw it in both "
                "(Pyro's autoguides add such sites of their own: write the guide by hand)."
            )
        plates = [frame.dim for frame in site["cond_indep_stack"]]
        if -1 not in plates:
            raise ValueError(
                f"log_marginal: site {name!r} is outside the data plate, so observations are not independent. Put it into "
                "with pyro.plate('data', len(x)), of dimension -1."
            )
        if program is guide_trace:
            _require_density(name, site["fn"], model_trace.nodes[name]["fn"])
        # Unit: pyro.factor, which has no value; Delta: computed from draws by a reparameterisation.
        is_data = site["is_observed"] and not isinstance(_base(site["fn"]), dist.Unit | dist.Delta)
        observed = site["value"].shape[: site["value"].dim() - site["fn"].event_dim] if is_data else ()
        if any(size != 1 for size in observed[:-1]):
            raise ValueError(
                f"log_marginal: site {name!r} observes values of batch shape {tuple(observed)}, expected {shape[1:]}. "
                "Declare the dimensions of one observation by .to_event, or squeeze them."
            )
        if program is model_trace and not site["is_observed"] and name not in guide_trace.nodes:
            continue  # drawn from the model itself, which cancels from the weight
        log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
        if log_prob.dim() > 2 or log_prob.shape[-1:] != shape[-1:]:
            raise ValueError(
                f"log_marginal: site {name!r} has log-probabilities of shape {tuple(log_prob.shape)}, expected {shape}: "
                "(draws, observations). Put it in the data plate, and declare all other dimensions by .to_event."
            )
        terms[sign, name] = sign * log_prob
    if not any(model_trace.nodes[name]["is_observed"] for sign, name in terms if sign > 0):
        raise ValueError("log_marginal: the model observes nothing. Pass x as obs= to a pyro.sample of the model.")
    total: Tensor = sum(terms.values(), torch.zeros(shape, device=x.device))
    return total.expand(shape), terms


def _base(fn: Any) -> Any:
    """The distribution under .to_event, .expand and .mask."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _require_density(name: str, guide: Any, model: Any) -> None:
    """A weight p(z) / q(z) needs both to be densities, or both to be probabilities."""
    kinds = []
    for fn in (guide, model):
        fn = _base(fn)
        if isinstance(fn, dist.Delta):
            kinds.append("a point mass")
        else:
            try:
                kinds.append("discrete" if fn.support.is_discrete else "continuous")
            except NotImplementedError:  # a distribution that does not say
                return
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"log_marginal: site {name!r} is {kinds[0]} in the guide ({type(guide).__name__}) and {kinds[1]} in the model "
            f"({type(model).__name__}): their ratio is no importance weight. Draw it from a distribution of the same kind."
        )
