"""Potential energies of Hamiltonian Monte Carlo, compiled with their gradients."""

import copy
import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from pyro.infer.mcmc import HMC, NUTS
from pyro.infer.mcmc.nuts import _TreeInfo
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_vae.engine.arguments import ArgumentReader, Arguments, explain
from pyro_vae.engine.calls import Calls
from pyro_vae.engine.function import FunctionProgram
from pyro_vae.engine.gradients import Gradient, ValueAndGradient, attach
from pyro_vae.engine.guards import PythonState

__all__ = ["CompiledHMC", "CompiledNUTS", "CompiledPotential", "compiled_potential"]

Potential = Callable[[Mapping[str, Tensor]], Tensor]


class CompiledPotential:
    """A potential energy, whose value and gradient are computed by one compiled call. Made by :func:`compiled_potential`.

    Attributes:
        potential: the function.
        reason: why it runs eagerly; empty if it is compiled.
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self._read = ArgumentReader()
        self._calls: Calls[Arguments, Gradient] = Calls(
            ValueAndGradient(potential, PythonState(potential)), what="the potential energy is computed eagerly", every=1000
        )

    def __reduce__(self) -> tuple[Any, ...]:  # compiled code stays in its process
        return CompiledPotential, (self.potential,)

    @property
    def reason(self) -> str:
        """Why the potential energy is computed eagerly; empty if it is compiled."""
        return self._calls.reason

    def __call__(self, z: Mapping[str, Tensor]) -> Tensor:
        """The potential energy at unconstrained z by site, a scalar, differentiable once."""
        if self.reason:
            return self.potential(z)
        leaves = {name: value.detach().requires_grad_() for name, value in z.items()}
        result = self._calls(self._read((leaves,), {}))
        if not torch.is_grad_enabled() or not any(value.requires_grad for value in z.values()):
            return result.value
        return attach(Gradient(result.value, [*z.values()], result.gradients))

    def explain(self) -> str:
        """A description of the graphs, their guards and calls, in lines; or the reason why there are none."""
        return explain(self._calls)


def compiled_potential(potential: Potential) -> CompiledPotential:
    """A potential energy for ``HMC(potential_fn=...)`` and ``NUTS(potential_fn=...)``, compiled with its gradient.

    .. math:: U(z) = -\\log p(x, z), \\qquad \\nabla_z U(z)

    Calls are verified as those of :class:`~pyro_vae.inference.svi.CompiledSVI` are; where one cannot be compiled, all are
    eager, with one :class:`~pyro_vae.engine.tracing.NotCompiledWarning` that gives the reason. For a model,
    :class:`CompiledHMC` and :class:`CompiledNUTS` are shorter.

    Args:
        potential: from unconstrained values by site to a scalar tensor, as ``pyro.infer.mcmc.util.initialize_model``
            returns it.
    """
    return CompiledPotential(potential)


class _WithCompiledPotential:
    """Of a kernel: the potential energy of its model is compiled."""

    def _initialize_model_properties(self, model_args: Any, model_kwargs: Any) -> None:
        super()._initialize_model_properties(model_args, model_kwargs)  # type: ignore[misc]
        self.potential_fn = compiled_potential(self.potential_fn)  # type: ignore[has-type]


class CompiledHMC(_WithCompiledPotential, HMC):
    """``pyro.infer.mcmc.HMC`` with a compiled potential energy, see :func:`compiled_potential`; the same arguments."""


class CompiledNUTS(_WithCompiledPotential, NUTS):
    """``pyro.infer.mcmc.NUTS`` whose leapfrog steps are compiled, potential energy included; the same arguments.

    Attributes:
        reason: why leapfrog steps are eager; empty if they are compiled.

    Example:
        >>> mcmc = pyro.infer.MCMC(CompiledNUTS(model), num_samples=1000)  # doctest: +SKIP
        >>> mcmc.run(x)  # doctest: +SKIP
    """

    _leapfrogs: "Calls[Arguments, Any] | None" = None

    @property
    def reason(self) -> str:
        """Why leapfrog steps are eager; empty if they are compiled."""
        return "" if self._leapfrogs is None else self._leapfrogs.reason

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        potential = self.potential_fn.potential if isinstance(self.potential_fn, CompiledPotential) else self.potential_fn
        program = FunctionProgram(self._leapfrog, PythonState(potential))
        self._leapfrogs, self._read = Calls(program, what="leapfrog steps are eager", every=1000), ArgumentReader()

    def __getstate__(self) -> dict[str, Any]:  # compiled code stays in its process
        return {name: value for name, value in vars(self).items() if name not in ("_leapfrogs", "_read")}

    def _leapfrog(self, *tensors: Tensor) -> list[Tensor]:
        """A leaf of the tree, by Pyro's own method with a step size that is a tensor, from and to flat lists of tensors."""
        kernel = copy.copy(self)
        step_size, log_slice, energy, *rest = tensors
        kernel._adapter = SimpleNamespace(step_size=step_size, mass_matrix_adapter=self.mass_matrix_adapter)
        if isinstance(self.potential_fn, CompiledPotential):
            kernel.potential_fn = self.potential_fn.potential  # type: ignore[assignment]
        z, r, z_grads = (dict(zip(names, rest[i * len(names) :], strict=False)) for i, names in enumerate([self._names] * 3))
        with torch.enable_grad():
            leaf = NUTS._build_basetree(kernel, z, r, z_grads, log_slice, 1, energy)
        values = [[part[name] for name in self._names] for part in (leaf.z_left, leaf.r_left, leaf.z_left_grads)]
        self._blocks = [*leaf.r_left_unscaled]
        numbers = leaf.z_proposal_pe, leaf.weight, leaf.diverging, leaf.sum_accept_probs
        return [*numbers, *itertools.chain(*values), *leaf.r_left_unscaled.values()]

    def _build_basetree(self, z: Any, r: Any, z_grads: Any, log_slice: Any, direction: int, energy_current: Any) -> Any:
        if self._leapfrogs is None or self._leapfrogs.reason:
            return super()._build_basetree(z, r, z_grads, log_slice, direction, energy_current)
        names = self._names = [*z]
        signed = self.step_size if direction == 1 else -self.step_size  # direction is 0 or 1
        step_size = torch.tensor(signed, dtype=z[names[0]].dtype)
        tensors = [part[name] for part in (z, r, z_grads) for name in names]
        arguments = self._read((step_size, log_slice, energy_current, *tensors, *_tensors_of(self.mass_matrix_adapter)), {})
        energy, weight, diverging, accept, *rest = self._leapfrogs(arguments)
        n = len(names)
        z, r, z_grads = (dict(zip(names, rest[i * n : (i + 1) * n], strict=True)) for i in range(3))
        unscaled = dict(zip(self._blocks, rest[3 * n :], strict=True))
        state = z, r, unscaled, z_grads
        return _TreeInfo(*state, *state, z, energy, z_grads, unscaled, weight, False, diverging, accept, 1)


def _tensors_of(adapter: Any) -> list[Tensor]:
    """The tensors of a mass-matrix adapter, which adaptation replaces."""
    values = itertools.chain(*(part.values() for part in vars(adapter).values() if isinstance(part, dict)))
    parts = ([value] if isinstance(value, Tensor) else tree_leaves(value) for value in values)
    return [t for t in itertools.chain(*parts) if isinstance(t, Tensor)]
