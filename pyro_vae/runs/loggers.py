"""Logging to TensorBoard; any other tracker is a function passed to ``fit(on_record=...)``."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

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

    Example:
        >>> board = TensorBoard("runs/mine/tensorboard")  # doctest: +SKIP
        >>> fit(objective, data, epochs=3, on_record=board.record)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and only needed here
        except ImportError as error:
            raise DataError(f"TensorBoard cannot be imported ({error}). Install it: pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder))

    def record(self, record: TrainingRecord) -> None:
        """Log a record of :func:`~pyro_vae.fit`, as ``train/...``, ``test/...`` and ``timing/...``, by step."""
        for part, numbers in (("train", record.train), ("test", record.test or {}), ("timing", record.timing)):
            for name, value in numbers.items():
                self._writer.add_scalar(f"{part}/{name}", value, record.step)
        self._writer.flush()

    def figure(self, name: str, figure: "Figure") -> None:
        """Log a figure."""
        self._writer.add_figure(name, figure)

    def embedding(self, vae: VAE, data: Data, *, limit: int = 1000) -> None:
        """Log posterior means of the first observations, with labels and thumbnails, for TensorBoard's projector."""
        batch = data.batch(torch.arange(min(limit, len(data)), device=data.x.device))
        x = batch[0]
        labels = None if data.labels is None else [data.label_name(label) for label in data.labels[: len(x)].tolist()]
        images = x if x.dim() == 4 and data.is_image and data.are_pixels else None
        self._writer.add_embedding(latent_means(vae, batch).cpu(), metadata=labels, label_img=images)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
