"""Variational autoencoders as Pyro model and guide functions, measured honestly. Estimates are in nats per observation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyro_vae._public import *

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "VAE",
    "Autoencoder",
    "BernoulliLikelihood",
    "CheckpointError",
    "Checkpoints",
    "CompiledHMC",
    "CompiledNUTS",
    "CompiledPredictive",
    "CompiledSVI",
    "ConvDecoder",
    "ConvEncoder",
    "CyclicWarmup",
    "Data",
    "DataError",
    "DiagonalNormal",
    "Estimate",
    "FullCovarianceNormal",
    "LearnedNormalLikelihood",
    "LinearWarmup",
    "MLPDecoder",
    "MLPEncoder",
    "NegativeDirectLogLikelihood",
    "NegativeELBO",
    "NegativeIWAE",
    "NonFiniteError",
    "NormalLikelihood",
    "NormalMixture",
    "NotCompiledWarning",
    "Objective",
    "PoissonLikelihood",
    "ReconstructionError",
    "Settings",
    "StandardNormal",
    "StandardizedNormalLikelihood",
    "TrainingRecord",
    "TrainingStoppedError",
    "UnreliableEstimateWarning",
    "as_data",
    "compiled",
    "compiled_potential",
    "direct_log_marginal",
    "evaluate",
    "fit",
    "load_data",
    "load_preset",
    "load_run",
    "log_marginal",
    "prior_search",
    "scale_latents",
    "train_run",
]


def __getattr__(name: str) -> Any:
    """Imports all public names at the first use of one, so that ``pyro-vae --help`` need not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = vars(import_module("pyro_vae._public"))
    globals().update({each: public[each] for each in __all__})
    return public[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
