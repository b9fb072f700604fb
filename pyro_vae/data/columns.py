"""Moments of each element of the observations, and columns of a table that have no density: constant, discrete."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["KINDS", "caution_of_columns", "column_names", "discrete_columns", "moments", "most_rounded", "parts"]

#: The kinds of columns that :func:`discrete_columns` distinguishes, and their descriptions.
KINDS = {
    "constant": "constant",
    "binary": "of two values (0 and 1, say, one-hot)",
    "nearly constant": "nearly constant, or of one value in half of the rows or more",
    "whole": "of whole numbers",
    "few": "of few values that repeat",
}
_NUMBERS = 2**20  # of the observations converted at a time
_ENOUGH = 20_000  # rows to classify a column by
_HARDLY = 1e-6  # a range below this fraction of the largest magnitude may be rounding errors


def parts(x: Tensor) -> tuple[Tensor, ...]:
    """x in parts along the leading dimension, views that bound the memory of what is computed from each."""
    return x.split(max(1, _NUMBERS // max(1, x[0].numel())))


def moments(x: Tensor, convert: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each element of observations ``(N, *event_shape)``, in float64.

    The standard deviation of a constant element is given as 1. There are two passes, the second over deviations divided by
    the largest one, so that neither an offset nor very large or small numbers lose precision; each takes a part of the rows
    at a time.

    Args:
        x: in any dtype.
        convert: from rows of x and a dtype to the observations in that dtype, called in both passes.
    """
    first = convert(x[:1], torch.float64)[0]
    total, low, high = torch.zeros_like(first), first, first
    for part in (convert(rows, torch.float64) for rows in parts(x)):
        total = total + (part - first).sum(0)
        low, high = torch.minimum(low, part.amin(0)), torch.maximum(high, part.amax(0))
    constant = low == high
    loc = torch.where(constant, low, first + total / len(x))
    largest = torch.where(constant, 1.0, torch.maximum(high - loc, loc - low))
    squares = torch.zeros_like(first)
    for part in (convert(rows, torch.float64) for rows in parts(x)):
        squares += ((part - loc) / largest).square().sum(0)
    return loc, torch.where(constant, 1.0, largest * (squares / len(x)).sqrt())


def most_rounded(loc: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[int, float]:
    """The element that a floating-point type resolves worst, and the spacing of the type's numbers at the element's mean."""
    steps = (loc.abs() * torch.finfo(dtype).eps).flatten()
    place = int((steps / scale.flatten()).argmax())
    return place, steps[place].item()


def discrete_columns(x: Tensor) -> dict[str, list[int]]:
    """Indices of the columns of a table ``(N, D)`` for which a normal density means little, by kind, see ``KINDS``.

    Where a value repeats, or all values are equal up to rounding errors, a density has no upper bound: the narrower it is
    there, the higher. A column of whole numbers counts if its standard deviation is below 10 or its values repeat.
    """
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    some = x[:: -(-len(x) // _ENOUGH)].T.contiguous()  # equally spaced rows of a large table
    for place, column in enumerate(some):
        kind = _kind(column)
        if kind in ("constant", "binary") and len(some[0]) < len(x):
            kind = _kind(x[:, place])
        if kind:
            found[kind].append(place)
    return {kind: places for kind, places in found.items() if places}


def _kind(column: Tensor) -> str:
    """The kind of a column ``(N,)``; empty if it may have a density."""
    values, counts = np.unique(column.cpu().numpy(), return_counts=True)
    values, size = values.astype(np.float64), len(column)
    few = 10 * len(values) <= size
    if len(values) <= 2:
        return "constant" if len(values) == 1 else "binary"
    if 2 * counts.max() >= size or values[-1] - values[0] <= _HARDLY * np.abs(values).max():
        return "nearly constant"
    if (values == np.rint(values)).all() and np.abs(values).max() < 2**53:  # from there on floats are all whole
        deviation = math.sqrt(np.average((values - np.average(values, weights=counts)) ** 2, weights=counts))
        return "whole" if few or deviation < 10 else ""
    return "few" if few else ""


def column_names(places: Sequence[int], names: Sequence[str], *, most: int = 8) -> str:
    """The names of columns, or their indices if they have none; only the first ``most`` of them."""
    said = ", ".join(names[place] if names else str(place) for place in places[:most])
    return said + (f", ... ({len(places):,} in all)" if len(places) > most else "")


def caution_of_columns(x: Tensor, names: Sequence[str] = ()) -> str:
    """A caution about the log-densities of a table ``(N, D)`` with columns that have no density; empty if there are none.

    Example:
        >>> caution_of_columns(torch.tensor([[0.1, 7.0], [0.4, 7.0], [0.2, 7.0]]), ["a", "b"])  # doctest: +ELLIPSIS
        'columns constant: b. A normal density has no upper bound there, so log p and the ELBO may rise by any number of ...'
    """
    found = discrete_columns(x)
    if not found:
        return ""
    parts = "; ".join(f"{KINDS[kind]}: {column_names(places, names)}" for kind, places in found.items())
    return (
        f"columns {parts}. A normal density has no upper bound there, so log p and the ELBO may rise by any number of nats "
        "without meaning: drop these columns, or give them a likelihood of their own, bernoulli or poisson, say."
    )
