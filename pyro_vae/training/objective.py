"""What training knows of what is minimised."""

from torch import Tensor, nn

from pyro_vae.models.programs import example_of

__all__ = ["Objective"]


class Objective(nn.Module):
    """Base of all objectives: ``objective(*batch) -> {"loss": ..., ...}``, scalars, mean nats per observation.

    A batch is what :meth:`pyro_vae.Data.batch` gives: tensors with one leading dimension, ``(x,)`` or ``(x, y)``, say.
    """

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(*batch) -> dict of scalar tensors with 'loss'."
        )

    def example(self) -> Tensor | None:
        """A tensor of whose type and device batches are to be; None: of those of the data."""
        return example_of(self)

    def prepare(self, *batch: Tensor) -> None:
        """Make what is made at the first call, parameters in Pyro's store, say; called once, before training."""

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
        """What to tell of a batch whose loss or gradient is not finite.

        It says what holds on every processor: of the data, say. What a net makes of them after an overflow, 10, -10 or NaN,
        depends on the order of sums.
        """
        return f"largest |x| {batch[0].abs().max().item():g}"
