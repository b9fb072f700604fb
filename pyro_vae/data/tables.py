"""CSV files and data frames -> arrays and column names; errors give the row and column of a cell that is not a number."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyro_vae.data.dataset import DataError

__all__ = ["is_frame", "of_frame", "read_csv"]

Array = np.ndarray[Any, Any]

_MISSING = {"", "na", "n/a", "nan", "null", "none", "<na>", "nat", "?"}
_DELIMITERS = ",;\t"


def read_csv(path: Path) -> tuple[Array, tuple[str, ...]]:
    """The numbers of a CSV file, ``(N, D)``, and the names of its columns, if it has a header.

    The delimiter is a comma, semicolon or tab. The array is int64 if all numbers are whole (counts), else float64.

    Raises:
        DataError: the file cannot be read, a cell is missing or not a number, or rows differ in length. The message gives
            row and column; rows are counted from 1, without the header.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            first = next((line for line in stream if line.strip()), "")
            delimiter = max(_DELIMITERS, key=first.count)
            cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
            names = () if all(_is_number(cell) or cell.lower() in _MISSING for cell in cells) else tuple(cells)
            rows = stream if names else itertools.chain([first], stream)
            first = next((line for line in rows if line.strip()), "")
            if not first:
                raise DataError("expected a table of numbers, found none. Save it as comma-separated values.")
            try:
                lines = (line for line in itertools.chain([first], rows) if line.strip())
                x = np.loadtxt(lines, delimiter=delimiter, comments=None, quotechar='"', ndmin=2)
            except ValueError as error:  # NumPy's message does not name the column
                stream.seek(0)
                _explain(csv.reader(stream, delimiter=delimiter), names)
                raise DataError(f"cannot be read ({error}). Save it as comma-separated values.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read ({error}). Save it as comma-separated values in UTF-8.") from error
    if names and len(names) != x.shape[1]:
        raise DataError(f"expected {x.shape[1]} names of columns, like the numbers of a row, found {len(names)}.")
    _check_finite(x, names)
    return _whole(x), names


def _explain(rows: Iterator[list[str]], names: Sequence[str]) -> None:
    """Raises a :class:`DataError` for the first cell that is not a number."""
    number, width = -1 if names else 0, 0
    for cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        number += 1
        width = width or len(cells)
        if number == 0 and names:
            continue
        if len(cells) != width:
            raise DataError(f"row {number:,}: expected {width} numbers, like the first line, found {len(cells)}.")
        for place, cell in enumerate(map(str.strip, cells)):
            if not _is_number(cell):
                raise _no_number(cell, number, names[place] if names else place)


def _no_number(value: Any, row: int, column: Any) -> DataError:
    if str(value).strip().lower() in _MISSING:
        return DataError(f"row {row:,}, column {column}: missing value. Drop such rows, or impute the values.")
    return DataError(
        f"row {row:,}, column {column}: expected a number, found {str(value)[:40]!r}. Drop the column, or encode it, "
        "categories as one-hot columns."
    )


def _check_finite(x: Array, names: Sequence[str]) -> None:
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        row, place = (int(index) for index in np.argwhere(~np.isfinite(x))[0])
        column = names[place] if names else place
        if np.isnan(x[row, place]):
            raise _no_number("nan", row + 1, column)
        raise DataError(f"row {row + 1:,}, column {column}: expected a finite number, found {x[row, place]}.")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.lower() not in _MISSING and "_" not in text


def _whole(x: Array) -> Array:
    return x.astype(np.int64) if (np.abs(x) < 2**53).all() and (x == np.rint(x)).all() else x


def is_frame(x: Any) -> bool:
    """Whether x is a data frame (pandas, polars, ...): an object with ``columns`` and ``to_numpy``."""
    return hasattr(x, "columns") and hasattr(x, "to_numpy") and hasattr(x, "__getitem__") and not isinstance(x, np.ndarray)


def of_frame(frame: Any) -> tuple[Array, tuple[str, ...]]:
    """The numbers of a data frame, ``(N, D)``, and the names of its columns. No data frame package is imported.

    Raises:
        DataError: a value is missing or a column is not numeric; the message names it.
    """
    names = tuple(map(str, frame.columns))
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"expected unique column names, found {twice} twice.")
    parts = [_column(frame[column], name) for column, name in zip(frame.columns, names, strict=True)]
    if not parts or len(parts[0]) == 0:
        raise DataError("expected a table of at least one row and column, found none.")
    x = np.column_stack(parts)
    _check_finite(x, names)
    return x, names


def _column(values: Any, name: str) -> Array:
    column: Array = np.asarray(values.to_numpy())
    if column.dtype.kind in "fiub":
        return column
    if column.dtype.kind == "O":  # numbers with missing ones among them, or text
        for row, value in enumerate(column, start=1):
            if isinstance(value, str) or not isinstance(value, int | float | np.number | np.bool_):
                raise _no_number(value, row, name)
        return column.astype(np.float64)
    raise DataError(
        f"column {name}: expected numbers, found {column.dtype}. Drop it, or convert it: times to seconds, categories to "
        "one-hot columns."
    )
