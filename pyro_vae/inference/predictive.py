"""Draws from the posterior predictive distribution, compiled."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.infer.predictive import _guess_max_plate_nesting
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vae.engine.arguments import ArgumentReader, Arguments, explain
from pyro_vae.engine.calls import Calls
from pyro_vae.engine.function import FunctionProgram
from pyro_vae.engine.guards import PythonState
from pyro_vae.engine.store import Store

__all__ = ["CompiledPredictive"]

Samples = dict[str, Tensor]


class CompiledPredictive(Predictive):
    """``pyro.infer.Predictive`` whose draws are compiled: the same arguments, and the same draws from the same noise.

    A draw is one compiled call instead of a run of the model, which pays for some thousands of draws; compilation takes some
    seconds, once for each shape of the arguments. Draws are verified as steps of
    :class:`~pyro_vae.inference.svi.CompiledSVI` are; where they cannot be compiled, they are Pyro's own, with one
    :class:`~pyro_vae.engine.tracing.NotCompiledWarning` that gives the reason. With ``parallel=True`` nothing is compiled:
    all draws are one run of the model.

    Attributes:
        reason: why draws are Pyro's own; empty if they are compiled.

    Example:
        >>> predictive = CompiledPredictive(model, guide=guide, num_samples=10_000)  # doctest: +SKIP
        >>> predictive(x)["obs"].shape  # doctest: +SKIP
        torch.Size([10000, 100])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draws: dict[Any, _Draws] = {}

    def __getstate__(self) -> dict[str, Any]:  # compiled code stays in its process
        return {**self.__dict__, "_draws": {}}

    @property
    def reason(self) -> str:
        """Why draws are Pyro's own; empty if they are compiled."""
        return next((draws.calls.reason for draws in self._draws.values() if draws.calls.reason), "")

    def explain(self) -> str:
        """A description of the graphs, their guards and calls, in lines; or the reason why there are none."""
        return "\n".join(explain(draws.calls) for draws in self._draws.values()) or "nothing is compiled yet"

    def forward(self, *args: Any, **kwargs: Any) -> Samples:
        """Draws by site, ``(num_samples, ...)`` each; see ``pyro.infer.Predictive.forward``."""
        if self.parallel:
            samples: Samples = super().forward(*args, **kwargs)
            return samples
        samples, sites = self.posterior_samples, self.return_sites
        if self.guide is not None:
            samples, sites = self._draw(self.guide, {}, None, args, kwargs), sites or None
        return self._draw(self.model, samples, sites, args, kwargs)

    def _draw(
        self, program: Any, samples: Samples, sites: Collection[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Samples:
        unscored = torch.no_grad()(poutine.mask(program, mask=False))
        shapes = self._shapes(unscored, samples, sites, args, kwargs)
        key = id(program), tuple(shapes)
        if key not in self._draws:
            self._draws[key] = _Draws(unscored, tuple(shapes))  # which keeps the program alive
        draws = self._draws[key]
        rows = [draws({name: v[i] for name, v in samples.items()}, args, kwargs) for i in range(self.num_samples)]
        return {
            name: torch.stack(values).reshape(shape)
            for (name, shape), values in zip(shapes.items(), zip(*rows, strict=True), strict=True)
        }

    def _shapes(
        self, program: Any, samples: Samples, sites: Collection[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, tuple[int, ...]]:
        """The sites to return and the shapes of their draws, from runs that draw as much as those of Pyro do."""
        start = InitMessenger(init_to_sample)(program)
        dims = _guess_max_plate_nesting(start, args, kwargs)
        trace = prune_subsample_sites(poutine.trace(start).get_trace(*args, **kwargs))
        shapes = {}
        for name in trace.stochastic_nodes + trace.observation_nodes:
            if (name in sites) if sites else (sites is None or name not in samples):
                node = trace.nodes[name]
                ones = (1,) * (dims - len(node["fn"].batch_shape))
                shapes[name] = (self.num_samples, *ones, *node["value"].shape)
        if sites and "_RETURN" in sites:
            value = trace.nodes["_RETURN"]["value"]
            if not isinstance(value, Tensor):
                raise ValueError(f"_RETURN: expected a model that returns a tensor, found {type(value).__name__}.")
            shapes["_RETURN"] = (self.num_samples, *value.shape)
        return shapes


class _Draws:
    """Single draws of the sites of a program."""

    def __init__(self, program: Any, sites: tuple[str, ...]) -> None:
        self._program, self._sites = program, sites
        self._read, python = ArgumentReader(), PythonState(program)
        python.watch_mapping(Store(), "the parameter")
        self.calls: Calls[Arguments, list[Tensor]] = Calls(
            FunctionProgram(self._draw, python), what="draws are Pyro's own", every=1000
        )

    def _draw(self, sample: Samples, *args: Any, **kwargs: Any) -> list[Tensor]:
        trace = poutine.trace(poutine.condition(self._program, sample)).get_trace(*args, **kwargs)
        return [trace.nodes[name]["value"] for name in self._sites]

    def __call__(self, sample: Samples, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        return self.calls(self._read((sample, *args), kwargs))
