"""The variational autoencoder: ``encode`` and ``decode`` return distributions, ``model`` and ``guide`` are Pyro programs."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae._checks import shape, whole_number
from pyro_vae.models.likelihoods import BernoulliLikelihood, Likelihood, check_support
from pyro_vae.models.parts import checked_part, context_sizes, distribution_of
from pyro_vae.models.posteriors import DiagonalNormal, check_heads
from pyro_vae.models.priors import StandardNormal
from pyro_vae.models.programs import evaluating, example_of, is_held, store_parameter

__all__ = ["VAE"]


class VAE(nn.Module):
    r"""Variational autoencoder (Kingma and Welling 2014, arXiv:1312.6114), as a Pyro model and guide.

    .. math:: p(x, z) = p(z) \, p(x \mid z), \qquad q(z \mid x)

    Its parts are callables that return distributions: ``prior()`` is p(z), ``posterior(encoder(x))`` is q(z | x), and
    ``likelihood(decoder(z))`` is p(x | z). By default p(z) = N(0, I), q(z | x) is a normal of independent dimensions, and
    p(x | z) is Bernoulli.

    The sample sites are ``"z"`` (event shape ``(latent_dim,)``) and ``"x"`` (event shape ``event_shape``), in one plate
    ``"data"``. The VAE is a plain ``nn.Module``: it owns its parameters, and Pyro's global param store is not needed.

    **Context.** A model may be conditional: p(x, z | c) and q(z | x, c) (Sohn, Lee and Yan 2015, Learning structured output
    representation using deep conditional generative models). Context tensors c, one row per observation, follow x or z in
    every call. Encoder, prior, decoder and likelihood each take all of them or none. A part with an attribute
    ``takes_context`` takes context if that is true. Any other part takes context if its ``forward`` or ``__call__`` has
    positional parameters after its own input (the prior has no input) that have no default, or the default None. Rows of
    the context correspond to the last leading dimension of x or z, and are broadcast along the others.

    Args:
        encoder: maps x ``(batch, *event_shape)`` to the input of the posterior: a pair ``(loc, log_variance)``, each
            ``(batch, latent_dim)``, for the default one.
        decoder: maps z ``(batch, latent_dim)`` to the input of the likelihood, ``(batch, *event_shape)``. Encoder and
            decoder are called with a single batch dimension; :meth:`encode` and :meth:`decode` flatten any others into it.
        latent_dim: number of latent dimensions.
        event_shape: shape of one observation.
        prior: p(z), see :mod:`pyro_vae.models.priors`; None: :class:`~pyro_vae.models.priors.StandardNormal`.
        posterior: q(z | x) from the encoder's output, see :mod:`pyro_vae.models.posteriors`; None:
            :class:`~pyro_vae.models.posteriors.DiagonalNormal`.
        likelihood: p(x | z) from the decoder's output, see :mod:`pyro_vae.models.likelihoods`; None:
            :class:`~pyro_vae.models.likelihoods.BernoulliLikelihood`.

    Raises:
        ValueError: a part is not callable or is a class instead of an instance, or latent_dim or event_shape is invalid.

    Example:
        >>> from pyro_vae import MLPDecoder, MLPEncoder
        >>> shape = dict(event_shape=(1, 8, 8), hidden=(32,), latent_dim=4)
        >>> vae = VAE(MLPEncoder(**shape), MLPDecoder(**shape), latent_dim=4, event_shape=(1, 8, 8))
        >>> x = torch.rand(5, 1, 8, 8)
        >>> vae.encode(x).mean.shape, vae.decode(torch.randn(3, 5, 4)).mean.shape
        (torch.Size([5, 4]), torch.Size([3, 5, 1, 8, 8]))
        >>> from pyro.infer import Predictive
        >>> Predictive(vae.model, num_samples=3)(size=5)["x"].shape
        torch.Size([3, 5, 1, 8, 8])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        latent_dim: int,
        event_shape: Sequence[int],
        prior: Callable[..., dist.TorchDistribution] | None = None,
        posterior: Callable[..., dist.TorchDistribution] | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim = whole_number("latent_dim", latent_dim)
        self.event_shape = torch.Size(shape("event_shape", event_shape))
        self.likelihood = checked_part("likelihood", likelihood, BernoulliLikelihood())
        self.prior = checked_part("prior", prior, StandardNormal(latent_dim))
        self.posterior = checked_part("posterior", posterior, DiagonalNormal())

    @property
    def like(self) -> Tensor:
        """A tensor of the module's dtype and device: its first floating-point parameter, or else buffer."""
        example = example_of(self)
        return torch.empty(()) if example is None else example

    def example(self) -> Tensor:
        """A tensor of the dtype and device that observations must have: float64 if the likelihood standardises them."""
        return torch.empty((), dtype=torch.float64, device=self.like.device) if self._standardize else self.like

    @property
    def _standardize(self) -> Callable[[Tensor], Tensor] | None:
        return getattr(self.likelihood, "standardize", None)

    # --- distributions ---

    def encode(self, x: Tensor, *context: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape ``(*batch, *event_shape)``, any leading dimensions; event shape ``(latent_dim,)``.

        Raises:
            ValueError: x or the encoder's output has the wrong shape or dtype; context is missing, has the wrong length, or
                is given to a model none of whose parts takes it.
        """
        batch = self._batch_shape("x", x, self.event_shape)
        self._check_context(context, batch)
        if self._standardize is not None:  # before x is rounded to the type of the encoder
            x = self._standardize(x).to(self.like.dtype)
        output = self._call("encoder", x.reshape(-1, *self.event_shape), context=_flat(context, batch))
        n = batch.numel()
        if names := getattr(self.posterior, "names", None):
            check_heads(output, names, (n, self.latent_dim))
        tensors = output if isinstance(output, tuple | list) else (output,)
        if not all(torch.is_tensor(part) and part.shape[:1] == (n,) for part in tensors):
            found = ", ".join(str(tuple(p.shape)) if torch.is_tensor(p) else type(p).__name__ for p in tensors)
            raise ValueError(
                f"VAE: expected the encoder to return a tensor or a tuple of tensors, each of length {n}, found {found}."
            )
        parts = tuple(part.reshape(*batch, *part.shape[1:]) for part in tensors)
        q = distribution_of("posterior", self.posterior(parts if isinstance(output, tuple | list) else parts[0]))
        if (q.batch_shape, q.event_shape) != (batch, (self.latent_dim,)):
            raise ValueError(
                f"VAE: expected a posterior of batch shape {tuple(batch)} and event shape ({self.latent_dim},), found "
                f"{tuple(q.batch_shape)} and {tuple(q.event_shape)}. Make posterior, encoder and latent_dim agree; "
                "independent dimensions need .to_event(1)."
            )
        return q

    def decode(self, z: Tensor, *context: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape ``(*batch, latent_dim)``, any leading dimensions; event shape ``event_shape``.

        Raises:
            ValueError: z or the decoder's output has the wrong shape or dtype; context is missing, has the wrong length, or
                is given to a model none of whose parts takes it.
        """
        batch = self._batch_shape("z", z, (self.latent_dim,))
        self._check_context(context, batch)
        output = self._call("decoder", z.reshape(-1, self.latent_dim), context=_flat(context, batch))
        return self._likelihood_of(output, batch, context).to_event(len(self.event_shape))

    def prior_of(self, *context: Tensor) -> dist.TorchDistribution:
        """p(z), or p(z | context) if the prior takes context: batch shape ``()`` or ``(n,)``, event shape ``(latent_dim,)``.

        Raises:
            ValueError: the prior has the wrong shape; context is missing, or is given to a model none of whose parts takes
                it.
        """
        n = _length(context[0]) if context else 1
        self._check_context(context, torch.Size([n]))
        p = distribution_of("prior", self._call("prior", context=context))
        if p.event_shape != (self.latent_dim,) or p.batch_shape not in ((), (1,), (n,)):
            raise ValueError(
                f"VAE: expected a prior of event shape ({self.latent_dim},), and of batch shape () or one per observation, "
                f"found event shape {tuple(p.event_shape)}, batch shape {tuple(p.batch_shape)}. Make prior and latent_dim "
                "agree; independent dimensions need .to_event(1)."
            )
        return p

    def decoder_output(self, z: Tensor) -> Tensor:
        """The decoder's raw output, the input of the likelihood, for z ``(batch, latent_dim)``, without context.

        Raises:
            ValueError: the likelihood does not accept it for ``batch`` observations, or decoder or likelihood need context.
        """
        output: Tensor = self._call("decoder", z)
        self._likelihood_of(output, z.shape[:1])
        return output

    def _likelihood_of(self, output: Tensor, batch: torch.Size, context: Sequence[Tensor] = ()) -> dist.TorchDistribution:
        """p(x | z), batch shape ``(*batch, *event_shape)``, after a check of the decoder's output."""
        n, found = batch.numel(), tuple(output.shape)
        if found[:1] == (n,):
            rows = [c.expand(*batch, *c.shape[1:]) for c in context]
            p = distribution_of("likelihood", self._call("likelihood", output.reshape(*batch, *found[1:]), context=rows))
            if p.batch_shape == (*batch, *self.event_shape) and not p.event_shape:
                return p
            if found[1:] == self.event_shape or p.event_shape:
                raise ValueError(
                    f"VAE: expected a likelihood of batch shape {(*batch, *self.event_shape)} and no event dimensions, "
                    f"which the VAE adds, found batch shape {tuple(p.batch_shape)}, event shape {tuple(p.event_shape)}, for "
                    f"decoder output of shape {(*batch, *found[1:])}. Return one distribution per element, no .to_event."
                )
        raise ValueError(
            f"VAE: expected a decoder that maps ({n}, {self.latent_dim}) to what {self.likelihood} takes for "
            f"({n}, {_join(self.event_shape)}) elements, found {found}. Make decoder and event_shape agree."
        )

    # --- checks and terms of the likelihood ---

    def check_batch(self, x: Tensor) -> None:
        """Raise a ``ValueError`` unless x is a batch of observations: floating point, ``(batch, *event_shape)``."""
        if not torch.is_tensor(x) or self._batch_shape("x", x, self.event_shape) != tuple(x.shape[:1]) or len(x) == 0:
            found = f"shape {tuple(x.shape)}" if torch.is_tensor(x) else f"{type(x).__name__}"
            raise ValueError(
                f"VAE: expected x of shape (batch, {_join(self.event_shape)}), found {found}. A single observation needs "
                "a leading dimension, x[None]; a number of observations to draw is the keyword size=."
            )

    def check(self, x: Tensor, *context: Tensor) -> None:
        """Raise a ``ValueError`` unless x is a batch for which the likelihood is defined, given the context."""
        self.check_batch(x)
        self._check_context(context, x.shape[:1])
        check = getattr(self.likelihood, "check", None)
        if check is None:
            with torch.no_grad(), evaluating(self):
                p = self.decode(self.like.new_zeros(len(x), self.latent_dim), *context)
            check_support(p, x)
        else:
            takes = context and context_sizes(self.likelihood, 1)[1] and context_sizes(check, 1)[1] >= len(context)
            check(x, *(context if takes else ()))

    def terms(self, reconstruction: Tensor) -> dict[str, Tensor]:
        """Related quantities of the reconstruction term E[-log p(x | z)], in nats, that the literature reports, by name."""
        terms = getattr(self.likelihood, "terms", None)
        return terms(reconstruction, self.event_shape) if terms else {}

    def _batch_shape(self, name: str, value: Tensor, event_shape: Sequence[int]) -> torch.Size:
        """The leading dimensions of x or z, after a check of its dtype and event shape."""
        leading, dtype = value.dim() - len(event_shape), self.like.dtype
        any_float = name == "x" and self._standardize is not None and value.is_floating_point()
        if leading < 0 or value.shape[leading:] != tuple(event_shape) or not (value.dtype == dtype or any_float):
            raise ValueError(
                f"VAE: expected {name} of shape (*batch, {_join(event_shape)}) and dtype {dtype}, found "
                f"{value.dtype} of shape {tuple(value.shape)}. Reshape it, convert it, and scale uint8 images to [0, 1]."
            )
        return torch.Size(value.shape[:leading])

    def _check_context(self, context: Sequence[Tensor], batch: torch.Size) -> None:
        """Raise a ``ValueError`` unless each context tensor has a row per observation and some part takes them."""
        if not context:
            return
        lengths = {_length(c) for c in context}
        if lengths != {*batch[-1:]}:
            found = ", ".join(str(tuple(c.shape)) for c in context)
            expected = f"length {batch[-1]}, that of the observations" if batch else "x or z with a leading dimension"
            raise ValueError(
                f"VAE: expected, with context, {expected}, found context of shapes {found}. Context has one row per "
                "observation; a single observation needs a leading dimension, x[None]."
            )
        if not any(context_sizes(getattr(self, name), own)[1] for name, own in _TAKERS.items()):
            raise ValueError(
                f"VAE: found context, and none of {', '.join(_TAKERS)} takes any. Leave it out, or "
                "give the model a part that takes it, such as MLPDecoder(..., context_dim=...)."
            )

    def _call(self, name: str, *own: Tensor, context: Sequence[Tensor] = ()) -> Any:
        """Call a part, with all of the context if it takes any."""
        part = getattr(self, name)
        least, most = context_sizes(part, _TAKERS[name])
        if (least, most) == (0, 0):
            return part(*own)
        if not least <= len(context) <= most:
            expected = f"at least {least}" if most == math.inf else f"{least}" if least >= most else f"{least} to {most}"
            raise ValueError(
                f"VAE: context tensors for the {name}, which takes them: expected {expected}, found {len(context)}. Pass "
                "them after x or z, as model(x, *context) or decode(z, *context). If the part takes no context, set its "
                "takes_context to False."
            )
        try:
            return part(*own, *context)
        except (RuntimeError, ValueError) as error:
            if all(c.is_floating_point() for c in context):
                raise
            found = ", ".join(f"{c.dtype} of shape {tuple(c.shape)}" for c in context)
            raise ValueError(
                f"VAE: the {name} cannot use its context, {found}: {error} Labels are whole numbers: pass them one-hot, "
                "torch.nn.functional.one_hot(labels).float(), or let the net embed them by torch.nn.Embedding."
            ) from error

    # --- Pyro programs ---

    def model(self, x: Tensor | None = None, *context: Tensor, size: int = 1) -> Tensor:
        """Pyro model: draw z from the prior and x from the decoder, or score the given x, ``(batch, *event_shape)``.

        Args:
            x: observations, or None to draw new ones.
            context: what the model is conditional on, one row per observation.
            size: number of observations to draw if x is None and there is no context; with context, its length.

        Raises:
            ValueError: x is no batch of observations, size is no whole number >= 1, or the context is invalid.
        """
        self._register()
        if x is None:
            size = self._size(context, whole_number("size", size))
        else:
            self.check_batch(x)
            size = len(x)
        self._check_context(context, torch.Size([size]))
        with pyro.plate("data", size, dim=-1):
            z = pyro.sample("z", self.prior_of(*context))
            return pyro.sample("x", self.decode(z, *context), obs=x)

    def guide(self, x: Tensor | None = None, *context: Tensor, size: int = 1) -> Tensor:
        """Pyro guide, with the model's signature: draw z from q(z | x), ``(batch, latent_dim)``.

        Raises:
            ValueError: x is None, or the context is invalid.
        """
        self._register()
        if x is None:
            raise ValueError(
                "VAE.guide: expected x, found None: q(z | x) is conditioned on data. "
                "Call guide(x), or sample from the prior with Predictive(vae.model, num_samples=n)(size=...)."
            )
        self.check_batch(x)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.encode(x, *context))

    def _register(self) -> None:
        """Registers the parameters in Pyro's store, as ``pyro.module`` does, which would warn about frozen ones."""
        if is_held(self):
            return
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                store_parameter(f"{_param_prefix(self)}$$${name}", parameter)

    def _size(self, context: Sequence[Tensor], size: int) -> int:
        """The number of observations to draw."""
        if not context:
            return size
        if size not in (1, n := _length(context[0])):
            raise ValueError(
                f"VAE.model: expected context of length {size}, the given size, found {n}. Leave size out: it is the "
                "length of the context."
            )
        return n


# The parts that may take context, and the number of their own inputs.
_TAKERS = {"encoder": 1, "prior": 0, "decoder": 1, "likelihood": 1}


def _length(context: Any) -> int:
    """The length of a context tensor."""
    if not torch.is_tensor(context) or context.dim() == 0 or len(context) == 0:
        found = f"shape {tuple(context.shape)}" if torch.is_tensor(context) else type(context).__name__
        raise ValueError(
            f"VAE: expected context tensors of shape (n, ...), n >= 1, one row per observation, found {found}. A number of "
            "observations to draw is the keyword size=."
        )
    return len(context)


def _flat(context: Sequence[Tensor], batch: torch.Size) -> list[Tensor]:
    """Context expanded along the leading dimensions of x or z, which are then flattened into one."""
    return [c.expand(*batch, *c.shape[1:]).reshape(-1, *c.shape[1:]) for c in context]


def _join(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


_prefixes: WeakKeyDictionary[VAE, str] = WeakKeyDictionary()
_counter = itertools.count()


def _param_prefix(vae: VAE) -> str:
    """A prefix in Pyro's param store that is unique to this instance within the process; a copy has another one.

    If two modules shared a name, SVI would silently train the first instead of the second.
    """
    if vae not in _prefixes:
        _prefixes[vae] = f"vae{next(_counter)}"
    return _prefixes[vae]
