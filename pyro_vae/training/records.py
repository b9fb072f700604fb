"""Records of training, the lines of metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["TrainingRecord", "drawn_terms", "horizontal_axis"]


@dataclass(frozen=True)
class TrainingRecord:
    """Metrics of training since the last record.

    Args:
        epoch: the current epoch, from 1.
        step: number of optimiser steps so far.
        train: the objective's terms, averaged over the observations since the last record while the parameters change; nats
            per observation.
        test: the same terms on the held-out data, if there are any.
        timing: since the last record: ``seconds`` of training, ``observations_per_second``, and ``compile_seconds``, which
            ``seconds`` does not include.
    """

    epoch: int
    step: int
    train: dict[str, float]
    test: dict[str, float] | None = None
    timing: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The criterion of the best record, lower is better: ``neg_elbo``, or else ``loss``; on the test data, if any."""
        terms = self.train if self.test is None else self.test
        return terms["neg_elbo" if "neg_elbo" in terms else "loss"]

    def to_json(self) -> dict[str, Any]:
        """The content of a line of metrics.jsonl."""
        return asdict(self)

    @staticmethod
    def from_json(line: Any) -> "TrainingRecord":
        """The record of a line of metrics.jsonl, also in the flat format of earlier versions.

        Raises:
            ValueError: the line is no record.

        Example:
            >>> TrainingRecord.from_json({"epoch": 1, "loss": 3.5, "seconds": 2.0, "images_per_second": 30.0}).timing
            {'seconds': 2.0, 'observations_per_second': 30.0}
        """
        if not isinstance(line, dict) or type(line.get("epoch")) is not int:
            raise ValueError(f"expected a record of training, an object with an epoch, found {line!r:.80}.")
        if not isinstance(line.get("train"), dict):
            line = _nested(line)
        step, test, timing = line.get("step", 0), line.get("test"), line.get("timing", {})
        if type(step) is not int or not isinstance(test, dict | None) or not isinstance(timing, dict):
            raise ValueError(f"expected step, test and timing of a record of training, found {line!r:.80}.")
        return TrainingRecord(line["epoch"], step, line["train"], test, timing)


_TIMING = {"seconds": "seconds", "images_per_second": "observations_per_second", "compile_seconds": "compile_seconds"}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """A record of an earlier version in the current format."""
    whole: dict[str, Any] = {name: flat[name] for name in ("epoch", "step", "test") if name in flat}
    timing = {new: flat[old] for old, new in _TIMING.items() if old in flat}
    train = {name: value for name, value in flat.items() if name not in whole and name not in _TIMING}
    return {**whole, "train": train, "timing": timing}


def horizontal_axis(history: Sequence[TrainingRecord]) -> tuple[str, list[int]]:
    """The horizontal axis of training curves: ``"epoch"`` if each record ends one, else ``"step"``; and its values.

    Example:
        >>> horizontal_axis([TrainingRecord(1, 250, {}), TrainingRecord(1, 500, {})])
        ('step', [250, 500])
    """
    # True of records at the ends of epochs, and of those of earlier versions, which have no step.
    if all(record.step * history[0].epoch == history[0].step * record.epoch for record in history):
        return "epoch", [record.epoch for record in history]
    return "step", [record.step for record in history]


def drawn_terms(history: Sequence[TrainingRecord]) -> list[str]:
    """The terms whose curves tell of a training: the bound and its parts, the loss where it is another, terms of one's own.

    Example:
        >>> drawn_terms([TrainingRecord(1, 5, {"loss": 3.0, "neg_elbo": 2.0, "mmd": 1.0})])
        ['neg_elbo', 'loss', 'mmd']
    """
    found = {name: None for record in history for name in record.train}
    names: list[str] = [name for name in ("neg_elbo", "reconstruction", "kl") if name in found]
    if "loss" in found and any(_is_another(record.train.get("loss"), record.train.get("neg_elbo")) for record in history):
        names.append("loss")
    return [*names, *(name for name in found if name not in (*names, "loss", "squared_error"))]  # the last: affine in others


def _is_another(loss: Any, other: Any) -> bool:
    """Whether they differ by more than roundings; a file may hold anything."""
    if not (isinstance(loss, int | float) and isinstance(other, int | float)):
        return True
    return not abs(loss - other) <= 1e-6 * abs(loss)


_LABELS = {"reconstruction": "rec", "kl": "kl", "neg_elbo": "-ELBO", "squared_error": "squared error"}


def format_record(record: TrainingRecord, *, by_steps: bool = False) -> str:
    """A line to print: ``epoch  1  rec=150.72  kl=14.92  -ELBO=165.64  test -ELBO=...``; by steps, ``step   250  ...``.

    ``loss`` is included if it differs from the negative ELBO.
    """
    train = record.train
    names: list[str] = [name for name in ("reconstruction", "squared_error", "kl", "neg_elbo") if name in train]
    if _is_another(train["loss"], train.get("neg_elbo")):
        names.append("loss")
    when = f"step {record.step:5d}" if by_steps else f"epoch {record.epoch:2d}"
    parts = [when, *(f"{_LABELS.get(name, name)}={_figure(name, train[name])}" for name in names)]
    if record.test is not None:
        name = "neg_elbo" if "neg_elbo" in record.test else "loss"
        parts.append(f"test {_LABELS.get(name, name)}={_figure(name, record.test[name])}")
    return "  ".join(parts)


def _figure(name: str, value: float) -> str:
    return f"{value:.5f}" if name == "loss" and abs(value) < 0.1 else f"{value:.2f}"  # a mean per pixel is small
