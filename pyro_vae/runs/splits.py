"""Loading the data of a run from its settings."""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pyro_vae.data.builtin import DatasetFallbackWarning, load_data
from pyro_vae.data.dataset import Data
from pyro_vae.data.own import read_splits
from pyro_vae.runs.presets import Settings

if TYPE_CHECKING:
    from pyro_vae.runs.settings import RunSettings

__all__ = ["PIXELS", "load_splits", "set_threads"]

PIXELS = {None: None, "yes": True, "no": False}


def load_splits(run: "RunSettings", settings: Settings, data_dir: str | None) -> tuple[Data, Data, str]:
    """Training and test data, and a warning if MNIST was requested and is not available (else empty)."""
    if run.data is not None:
        train, test = (
            replace(part, binarization=settings.binarization)
            for part in read_splits(run.data, run.test_data, image_size=settings.image_size, pixels=PIXELS[run.pixels])
        )
        return train, test, ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DatasetFallbackWarning)
        train, test = load_data(run.dataset, data_dir=data_dir, binarization=settings.binarization)
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, DatasetFallbackWarning)]
    if settings.image_size is not None:
        train, test = train.resize(settings.image_size), test.resize(settings.image_size)
    return train, test, "\n".join(messages)


def set_threads(data: Data) -> None:
    """Use a single thread for small observations, whose matrices do not benefit from more."""
    if data.event_shape.numel() <= 64:
        torch.set_num_threads(1)
