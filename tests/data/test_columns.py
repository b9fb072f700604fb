"""Moments in float64, and columns that no density suits."""

import numpy as np
import pytest
import torch

from pyro_vae import Data
from pyro_vae.data.columns import caution_of_columns, column_names, discrete_columns

UNIX = 1.7e9 + np.random.default_rng(0).integers(0, 3600, 2000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_moments_of_seconds_since_1970(dtype):
    data = Data(torch.tensor(UNIX)[:, None].to(dtype)).to("cpu", torch.float32)
    loc, scale = data.moments()
    assert (loc.dtype, scale.dtype) == (torch.float64, torch.float64)
    assert loc.item() == pytest.approx(UNIX.mean(), abs=1e-5)
    assert scale.item() == pytest.approx(UNIX.std(), rel=1e-10)


@pytest.mark.parametrize("unit", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_moments_of_very_small_and_large_numbers(unit):
    """Whose squares float64 does not hold."""
    x = np.random.default_rng(0).normal([0, 5, 1e6], size=(500, 3))
    loc, scale = Data(torch.tensor(unit * x)).moments()
    np.testing.assert_allclose(loc / unit, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scale / unit, x.std(0), rtol=1e-9)


def test_moments_do_not_depend_on_the_parts(monkeypatch):
    x = torch.randn(1000, 2, 3)
    whole = Data(x).moments()
    monkeypatch.setattr("pyro_vae.data.columns._NUMBERS", 6 * 7)  # seven rows
    for found, expected in zip(Data(x).moments(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_moments_of_rounding_errors_are_not_those_of_a_constant():
    """Divided by 1, such a column would have standardised values of 4,000, and a log p of -10^7."""
    x = torch.tensor([1.7e18, 1.7e18 + 4096, 1.7e18 - 4096], dtype=torch.float64)[:, None]
    assert Data(x).moments()[1].item() == pytest.approx(4096 * (2 / 3) ** 0.5)


def test_kinds_of_columns():
    r = np.random.default_rng(0)
    n = 1000
    columns = {
        "normal": r.normal(size=n),
        "seconds": UNIX[:n],
        "constant": np.full(n, 0.1),
        "binary": r.integers(0, 2, n),
        "two": np.where(r.random(n) < 0.3, -4.5, 2.0),
        "rounding": 7 + 1e-9 * r.normal(size=n),
        "mostly": np.where(r.random(n) < 0.7, 0.0, r.normal(size=n)),
        "age": r.integers(18, 99, n),
        "dice": r.integers(1, 7, n),
        "rounded": np.round(r.normal(size=n), 1),
        "huge": 1e300 * r.normal(size=n),
        "large": r.integers(0, 10**6, n),
    }
    expected = {
        "constant": ["constant"],
        "binary": ["binary", "two"],
        "nearly constant": ["rounding", "mostly"],
        "whole": ["age", "dice"],
        "few": ["rounded"],
    }
    names = list(columns)
    x = torch.tensor(np.column_stack(list(columns.values())))
    found = discrete_columns(x)
    assert {kind: [names[place] for place in places] for kind, places in found.items()} == expected
    text = caution_of_columns(x, names)
    assert text.startswith("columns constant: constant; of two values (0 and 1, say, one-hot): binary, two; nearly constant")
    assert caution_of_columns(x[:, :2]) == ""
    assert "constant: 0." in caution_of_columns(torch.ones(5, 1, dtype=torch.uint8))


def test_one_other_value_in_a_large_column_is_seen():
    x = torch.zeros(50_001, 1)
    assert list(discrete_columns(x)) == ["constant"]
    x[-2] = 1
    assert list(discrete_columns(x)) == ["binary"]


def test_many_columns_are_counted():
    assert column_names(range(12), ()) == "0, 1, 2, 3, 4, 5, 6, 7, ... (12 in all)"
    assert column_names([1], ["a", "b"]) == "b"
