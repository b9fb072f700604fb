"""Training curves as SVG polylines, as plain numbers and strings; the page's style sheet colours them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_vae.training.records import TrainingRecord, drawn_terms, horizontal_axis

__all__ = ["Panel", "panels"]

WIDTH, HEIGHT = 300, 170
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 10, 30  # margins of the drawing
_LARGEST = 1e100  # larger numbers, and NaN, are not drawn


@dataclass(frozen=True)
class Panel:
    """The curves of one metric.

    Args:
        name: of the metric.
        unit: of the horizontal axis: ``epoch`` or ``step``.
        train: points ``x,y x,y ...`` in a view box of 300 by 170.
        test: the same; empty if the run recorded none.
        across: ticks of the horizontal axis, each a position and its text.
        up: ticks of the vertical axis.
        summary: first and last values, as the text alternative of the drawing.
    """

    name: str
    unit: str
    train: str
    test: str
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    summary: str


def panels(history: Sequence[TrainingRecord]) -> list[Panel]:
    """A panel each of -ELBO, reconstruction and KL, of the loss where it is another figure, and of an objective's own terms.

    Args:
        history: records of the training.

    Example:
        >>> panel, = panels([TrainingRecord(1, 5, {"loss": 3.0}), TrainingRecord(2, 10, {"loss": 2.0})])
        >>> panel.train
        '44.0,10.0 292.0,140.0'
    """
    unit, places = horizontal_axis(history)
    found = []
    for name in drawn_terms(history):
        train = _points(places, [record.train for record in history], name)
        test = _points(places, [record.test or {} for record in history], name)
        if train or test:
            found.append(_panel(name, unit, train, test))
    return found


def _points(places: Sequence[int], terms: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """The points that can be drawn; a file may have invalid values."""
    pairs = zip(places, [each.get(name) for each in terms], strict=True)
    return [
        (float(x), float(y))
        for x, y in pairs
        if isinstance(x, int | float) and isinstance(y, int | float) and abs(x) < _LARGEST and abs(y) < _LARGEST
    ]


def _panel(name: str, unit: str, train: list[tuple[float, float]], test: list[tuple[float, float]]) -> Panel:
    xs, ys = ([point[i] for point in (*train, *test)] for i in (0, 1))
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys), max(ys)

    def across(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / ((x_high - x_low) or 1), 1)

    def up(y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_low) / ((y_high - y_low) or 1), 1)

    def line(points: list[tuple[float, float]]) -> str:
        points = points * 2 if len(points) == 1 else points  # a single point is drawn as the round cap of a line
        return " ".join(f"{across(x)},{up(y)}" for x, y in points)

    said = [
        f"{who} from {points[0][1]:.2f} to {points[-1][1]:.2f}"
        for who, points in (("training", train), ("test", test))
        if points
    ]
    return Panel(
        name,
        unit,
        line(train),
        line(test),
        tuple((across(x), f"{x:g}") for x in _ticks(x_low, x_high, whole=True)),
        tuple((up(y), f"{y:g}") for y in _ticks(y_low, y_high)),
        "; ".join(said),
    )


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Up to five round numbers from low to high."""
    if high <= low:
        return [low]
    least = (high - low) / 4.5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    step = max(1.0, step) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * i, 10) for i in range(first, last + 1)]
