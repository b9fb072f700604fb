"""CSV files and data frames become data, and a cell that is no number is named by its row and column."""

import numpy as np
import pytest
import torch

from pyro_vae import DataError
from pyro_vae.data.own import as_data, read_data, read_splits


def write(folder, text):
    path = folder / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        ('a,b,"c, d"\n1,2,3.5\n4,5,6\n', ("a", "b", "c, d"), [[1, 2, 3.5], [4, 5, 6]]),
        ("a;b\n1;2.5\n3;4\n", ("a", "b"), [[1, 2.5], [3, 4]]),
        ("a\tb\n1\t2.5\n", ("a", "b"), [[1, 2.5]]),
        ("1,2.5\n3,4\n", (), [[1, 2.5], [3, 4]]),
        ("\n1,2.5\n\n3,4", (), [[1, 2.5], [3, 4]]),
        ('a,b\n1,"2.5"\n"3",4e5\n', ("a", "b"), [[1, 2.5], [3, 4e5]]),
        (b"\xef\xbb\xbfa,b\r\n1,2.5\r\n", ("a", "b"), [[1, 2.5]]),  # as spreadsheets write it
        ("x\n0.5\n0.25\n", ("x",), [[0.5], [0.25]]),
    ],
)
def test_csv_files(tmp_path, text, columns, rows):
    data = read_data(write(tmp_path, text))
    assert (data.columns, data.x.dtype, data.x.tolist()) == (columns, torch.float64, rows)


def test_whole_numbers_of_a_csv_file_stay_whole(tmp_path):
    data = read_data(write(tmp_path, "a,b\n1,2\n3,4\n"))
    assert (data.x.dtype, data.note) == (torch.int64, "table of shape (2, 2), columns a, b, whole numbers (int64)")
    assert read_data(write(tmp_path, "1,2\n3,4\n")).note.startswith("table of shape (2, 2), columns without names")


BAD = {
    "missing": ("a,b\n1,2\n3,\n", "row 2, column b: missing"),
    "nan": ("a,b\n1,NaN\n3,4\n", "row 1, column b: missing"),
    "NA without names": ("1,2\n3,NA\n", "row 2, column 1: missing"),
    "text": ("a,b\n1,2\n3,red\n", "row 2, column b: expected a number, found 'red'. Drop the column, or encode it"),
    "a column of text": ("name,b\nann,2\nbob,4\n", "row 1, column name: expected a number, found 'ann'"),
    "python's own numbers": ("a,b\n1_000,2\n", "row 1, column a: expected a number"),
    "infinite": ("a,b\n1,inf\n", "row 1, column b: expected a finite number, found inf"),
    "a row too long": ("a,b\n1,2\n3,4,5\n", "row 2: expected 2 numbers, like the first line, found 3"),
    "names too few": ("a\n1,2\n", "row 1: expected 1 numbers, like the first line, found 2|expected 2 names"),
    "names alone": ("a,b\n", "expected a table of numbers, found none"),
    "nothing": ("", "expected a table of numbers, found none"),
    "no text": (b"\x93NUMPY\xff", "cannot be read"),
}


@pytest.mark.parametrize(("text", "match"), BAD.values(), ids=BAD)
def test_cells_that_are_no_numbers_are_named(tmp_path, text, match):
    with pytest.raises(DataError, match=rf"table.csv: ({match})"):
        read_data(write(tmp_path, text))


def test_a_csv_file_is_split_as_an_array_is(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 2))
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header="a,b", comments="", fmt="%.17g")
    np.save(tmp_path / "x.npy", x)
    for of_csv, of_array in zip(read_splits(tmp_path / "x.csv"), read_splits(tmp_path / "x.npy"), strict=True):
        assert torch.equal(of_csv.x, of_array.x)
        assert of_csv.columns == ("a", "b")
    np.savetxt(tmp_path / "y.csv", x, delimiter=",", header="b,a", comments="")
    with pytest.raises(DataError, match="expected the same columns in training and test data.* a, b and b, a"):
        read_splits(tmp_path / "x.csv", tmp_path / "y.csv")


class Column:
    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return self.values


class Frame(dict):
    """What frames of pandas and of polars have in common."""

    columns = property(lambda self: list(self))

    def __getitem__(self, name):
        return Column(super().__getitem__(name))

    def to_numpy(self):
        raise AssertionError("of mixed columns, this may be a copy as text")


def test_frames():
    frame = Frame(t=np.array([1.5, 2.5]), n=np.array([1, 2]), b=np.array([True, False]), o=np.array([1, 2.5], dtype=object))
    data = as_data(frame)
    assert (data.columns, data.x.tolist()) == (("t", "n", "b", "o"), [[1.5, 1, 1, 1], [2.5, 2, 0, 2.5]])
    assert as_data(Frame(n=np.array([1, 2]))).x.dtype == torch.int64
    assert as_data(Frame(a=np.ones(2, np.float32))).x.dtype == torch.float32


@pytest.mark.parametrize(
    ("column", "match"),
    [
        (np.array([1, np.nan]), "row 2, column c: missing"),
        (np.array([1, None], dtype=object), "row 2, column c: missing"),
        (np.array([1, "x"], dtype=object), "row 2, column c: expected a number, found 'x'"),
        (np.array(["2020-01-01"] * 2, dtype="datetime64[s]"), "column c: expected numbers, found datetime64"),
        (np.array([]), "at least one row and column"),
    ],
)
def test_cells_of_frames_that_are_no_numbers(column, match):
    with pytest.raises(DataError, match=match):
        as_data(Frame(c=column))


def test_frames_of_pandas():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"t": 1.7e9 + np.arange(4), "k": [1, 2, 3, 4], "b": [True, False, True, False]})
    data = as_data(frame.astype({"k": "Int64"}))
    assert (data.columns, data.x.tolist()) == (("t", "k", "b"), frame.astype(float).to_numpy().tolist())
    for change, match in (
        ({"k": pandas.array([1, None, 3, 4], dtype="Int64")}, "row 2, column k: missing"),
        ({"c": pandas.Categorical(list("abab"))}, "row 1, column c: expected a number, found 'a'"),
        ({"c": pandas.Timestamp("2020-01-01")}, "column c: expected numbers"),
    ):
        with pytest.raises(DataError, match=match):
            as_data(frame.assign(**change))
    with pytest.raises(DataError, match="unique column names, found t twice"):
        as_data(pandas.concat([frame, frame], axis=1))
