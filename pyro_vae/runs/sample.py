"""Samples from the prior of a run's model, written to a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pyro_vae._checks import SettingError, whole_number
from pyro_vae._files import CheckpointError, atomic_write
from pyro_vae._options import described, option
from pyro_vae.data.dataset import DataError
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.runs.folder import read_settings
from pyro_vae.runs.load import load_run

__all__ = ["SampleOptions", "sample_run"]

_CHUNK = 1000  # draws decoded at once
_SIDE = 64  # images in a grid are enlarged by the largest integer factor up to this width


@described
@dataclass(frozen=True)
class SampleOptions:
    """How many draws, and where to."""

    num: int = option(help="number of draws")
    out: Path = option(help="file, .npz or .png", metavar="FILE")
    overwrite: bool = option(False, help="replace the file if it is there", default_text="refuse")
    seed: int = option(0, help="of the draws")

    def __post_init__(self) -> None:
        whole_number("num", self.num)
        whole_number("seed", self.seed, minimum=0)
        if self.out.suffix not in (".npz", ".png"):
            raise SettingError("out", f"expected a name that ends in .npz or .png, found {self.out.name!r}.")


def sample_run(folder: Path, options: SampleOptions) -> Path:
    """Draw z from the prior, and x given z; torch's global random state is restored.

    Returns:
        The file: ``.npz`` with ``z``, ``(num, latent_dim)``, ``mean`` and ``x``, ``(num, *event_shape)``; or ``.png``, a
        grid of the means.

    Raises:
        CheckpointError: the folder is not that of a run, or the run is damaged; the file exists, or cannot be written.
        DataError: the model is a plain autoencoder, which has no prior; or a .png of observations that are no images.
    """
    if options.out.exists() and not options.overwrite:
        raise CheckpointError(f"{options.out}: already there. Name another file, or pass --overwrite to replace it.")
    read_settings(folder, remedy=f"Draw from it in Python, from what load_run({str(folder)!r}, model=...) returns.")
    model: Any = load_run(folder)
    if isinstance(model, Autoencoder):
        raise DataError(f"{folder}: a plain autoencoder, which has no prior to draw from.")
    shape = tuple(model.event_shape)
    if options.out.suffix == ".png" and not (len(shape) == 3 and shape[0] in (1, 3)):
        raise DataError(f"{folder}: its observations, of shape {shape}, are no images. Name a .npz file.")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        z = model.prior().sample((options.num,))
        given_z = [model.decode(part) for part in z.split(_CHUNK)]
        mean, x = (torch.cat(parts) for parts in ([p.mean for p in given_z], [p.sample() for p in given_z]))
    with atomic_write(options.out) as stream:
        if options.out.suffix == ".npz":
            np.savez(stream, z=z.numpy(), mean=mean.numpy(), x=x.numpy())
        else:
            _save_grid(mean, stream)
    return options.out


def _save_grid(images: Tensor, stream: Any) -> None:
    """A PNG of a square grid; values outside [0, 1] are scaled by their range."""
    from torchvision.utils import save_image  # heavy, and only needed here

    if images.min() < 0 or images.max() > 1:
        images = (images - images.min()) / (images.max() - images.min())
    enlarged = interpolate(images, scale_factor=max(1, _SIDE // images.shape[-1]), mode="nearest")
    save_image(enlarged, stream, format="png", nrow=int(np.ceil(len(images) ** 0.5)))
