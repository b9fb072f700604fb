"""The interface between objectives and the training loop."""

from torch import Tensor, nn

from pyro_vae.models.programs import example_of

__all__ = ["Objective"]


class Objective(nn.Module):
    """Base class of all objectives: ``objective(*batch) -> {"loss": ..., ...}``, scalars, mean nats per observation.

    A batch is the result of :meth:`pyro_vae.Data.batch`: tensors with a common leading dimension, such as ``(x,)`` or
    ``(x, y)``.
    """

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(*batch) -> dict of scalar tensors with 'loss'."
        )

    def example(self) -> Tensor | None:
        """A tensor of the dtype and device that batches must have; None: those of the data."""
        return example_of(self)

    def prepare(self, *batch: Tensor) -> None:
        """Initialise lazy parameters, such as those in Pyro's param store; called once, before training."""

    def check(self, *batch: Tensor) -> None:
        """Raise a ``ValueError`` if the objective is not defined for these observations; called before training."""

    def identity(self) -> str:
        """What tells one objective from another: a run that is resumed must have the same.

        Beside it, a resumed run must have the same :func:`~pyro_vae.models.description.description`: the plain attributes of
        the objective and of its modules as they are before the first step.
        """
        return type(self).__name__

    def at_step(self, step: int, steps: int) -> None:
        """Set what changes in the course of training; called before each step, of which ``step`` of ``steps`` were made.

        Keep it in a buffer: checkpoints hold buffers, and a compiled step takes their values as they are.
        """

    def diagnose(self, *batch: Tensor) -> str:
        """A diagnosis of a batch whose loss or gradient is not finite, for the error message.

        Describe only what is reproducible on every processor, such as the data. The output of a net after an overflow, 10,
        -10 or NaN, depends on the order of sums.
        """
        return f"largest |x| {batch[0].abs().max().item():g}"
