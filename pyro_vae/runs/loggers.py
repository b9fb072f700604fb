"""Logging to TensorBoard; any other tracker is a function passed to ``fit(on_record=...)``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_vae._files import CheckpointError
from pyro_vae.analysis.latent import latent_means
from pyro_vae.data.dataset import Data, DataError
from pyro_vae.models.vae import VAE
from pyro_vae.training.records import TrainingRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes event files, to be viewed with ``tensorboard --logdir FOLDER``.

    Args:
        folder: created if it does not exist.

    Raises:
        DataError: the package tensorboard cannot be imported.
        CheckpointError: here and in each method: a file cannot be written.

    Example:
        >>> board = TensorBoard("runs/mine/tensorboard")  # doctest: +SKIP
        >>> fit(objective, data, epochs=3, on_record=board.record)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and only needed here
        except ImportError as error:
            raise DataError(f"TensorBoard cannot be imported ({error}). Install it: pip install tensorboard") from error
        self._folder = folder
        with self._writing():
            self._writer = SummaryWriter(str(folder))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._folder}: cannot be written ({error.strerror}). Make room, or leave TensorBoard out."
            ) from error

    def record(self, record: TrainingRecord) -> None:
        """The numbers of a record of :func:`~pyro_vae.fit`, as ``train/...``, ``test/...`` and ``timing/...``, by step."""
        with self._writing():
            for part, numbers in (("train", record.train), ("test", record.test or {}), ("timing", record.timing)):
                for name, value in numbers.items():
                    self._writer.add_scalar(f"{part}/{name}", value, record.step)
            self._writer.flush()

    def figure(self, name: str, figure: "Figure") -> None:
        """Add a figure."""
        with self._writing():
            self._writer.add_figure(name, figure)

    def embedding(self, vae: VAE, data: Data, *, means: Tensor | None = None, limit: int = 1000) -> None:
        """Posterior means of the first observations, with their labels and pictures, for TensorBoard's projector."""
        batch = data.batch(torch.arange(min(limit, len(data)), device=data.x.device))
        x = batch[0]
        labels = None if data.labels is None else [data.label_name(label) for label in data.labels[: len(x)].tolist()]
        images = x if x.dim() == 4 and data.is_image and data.are_pixels else None
        means = (latent_means(vae, batch) if means is None else means[: len(x)]).cpu()
        with self._writing():
            self._writer.add_embedding(means, metadata=labels, label_img=images)

    def close(self) -> None:
        """Write what is left."""
        with self._writing():
            self._writer.close()
