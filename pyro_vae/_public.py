"""What ``import pyro_vae`` offers, from the modules that it stands in."""

# ruff: noqa: F401
from pyro_vae.autoencoder import Autoencoder
from pyro_vae.checkpoint import CheckpointError, Checkpoints
from pyro_vae.data import Data, DataError, load_data
from pyro_vae.direct import direct_log_marginal, prior_search
from pyro_vae.estimate import Estimate
from pyro_vae.evaluation import evaluate
from pyro_vae.importance import log_marginal
from pyro_vae.likelihoods import (
    BernoulliLikelihood,
    LearnedNormalLikelihood,
    NormalLikelihood,
    PoissonLikelihood,
    StandardizedNormalLikelihood,
)
from pyro_vae.nets import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from pyro_vae.objective import Objective
from pyro_vae.objectives import (
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NegativeIWAE,
    ReconstructionError,
    scale_latents,
)
from pyro_vae.posteriors import DiagonalNormal, FullCovarianceNormal
from pyro_vae.presets import PRESETS, load_preset
from pyro_vae.priors import NormalMixture, StandardNormal
from pyro_vae.progress import TrainingStoppedError
from pyro_vae.records import TrainingRecord
from pyro_vae.run import load_run
from pyro_vae.schedules import CyclicWarmup, LinearWarmup
from pyro_vae.train import NonFiniteError, fit
from pyro_vae.vae import VAE
