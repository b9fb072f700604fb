"""What training leaves behind at each record: a line of metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["TrainingRecord"]


@dataclass(frozen=True)
class TrainingRecord:
    """Figures of training since the last record.

    Args:
        epoch: in which it was made, from 1.
        step: steps of the optimiser made so far.
        train: the objective's terms, averaged over the observations since the last record, made while the parameters move;
            nats per observation.
        test: the same terms on the held-out data, where there are any.
        timing: ``seconds`` of training and ``observations_per_second`` since the last record, and ``compile_seconds``,
            which are no part of them.
    """

    epoch: int
    step: int
    train: dict[str, float]
    test: dict[str, float] | None = None
    timing: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What tells the best record, lower is better: ``neg_elbo`` where there is one, else ``loss``; on the test data."""
        terms = self.train if self.test is None else self.test
        return terms.get("neg_elbo", terms["loss"])

    def to_json(self) -> dict[str, Any]:
        """As a line of metrics.jsonl."""
        return asdict(self)

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> "TrainingRecord":
        """Of a line of metrics.jsonl; of those written before version 0.2 too, which had all numbers side by side."""
        if "train" in line:
            return TrainingRecord(**line)
        rest = dict(line)
        epoch, step, test = rest.pop("epoch"), rest.pop("step", 0), rest.pop("test", None)
        timing = {
            new: rest.pop(old)
            for old, new in (
                ("seconds", "seconds"),
                ("images_per_second", "observations_per_second"),
                ("compile_seconds", "compile_seconds"),
            )
            if old in rest
        }
        return TrainingRecord(epoch, step, rest, test, timing)
