"""The public names of ``pyro_vae``, imported from the modules that define them."""

# ruff: noqa: F401
from pyro_vae._files import CheckpointError
from pyro_vae.data.builtin import load_data
from pyro_vae.data.dataset import Data, DataError
from pyro_vae.data.own import as_data
from pyro_vae.engine.tracing import NotCompiledWarning
from pyro_vae.estimates.evaluate import evaluate
from pyro_vae.estimates.importance import log_marginal
from pyro_vae.estimates.prior_sampling import direct_log_marginal, prior_search
from pyro_vae.estimates.records import Estimate, UnreliableEstimateWarning
from pyro_vae.inference.loss import compiled
from pyro_vae.inference.mcmc import CompiledHMC, CompiledNUTS, compiled_potential
from pyro_vae.inference.predictive import CompiledPredictive
from pyro_vae.inference.svi import CompiledSVI
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.likelihoods import (
    BernoulliLikelihood,
    LearnedNormalLikelihood,
    NormalLikelihood,
    PoissonLikelihood,
    StandardizedNormalLikelihood,
)
from pyro_vae.models.nets import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from pyro_vae.models.posteriors import DiagonalNormal, FullCovarianceNormal
from pyro_vae.models.priors import NormalMixture, StandardNormal
from pyro_vae.models.vae import VAE
from pyro_vae.runs.load import load_run
from pyro_vae.runs.presets import PRESETS, Settings, load_preset
from pyro_vae.runs.train import train_run
from pyro_vae.training.checkpoint import Checkpoints
from pyro_vae.training.fit import NonFiniteError, fit
from pyro_vae.training.objective import Objective
from pyro_vae.training.objectives import (
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NegativeIWAE,
    ReconstructionError,
    scale_latents,
)
from pyro_vae.training.records import TrainingRecord
from pyro_vae.training.schedules import CyclicWarmup, LinearWarmup
from pyro_vae.training.state import TrainingStoppedError
