"""Runs killed at any moment end as if they had never been."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parent / "kill_runs.py"


def kill_runs(*arguments):
    done = subprocess.run([sys.executable, KILL, *arguments], capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(number) for number in re.findall(r"\d+", done.stdout)]


def test_killed_runs_end_bit_identical():
    equal, runs, kills, _ = kill_runs("--runs", "5")
    assert equal == runs == 5
    assert kills >= 5


@pytest.mark.slow
@pytest.mark.parametrize(("how", "number"), [((), 50), (("--script",), 50), (("--torchrun",), 10)])
def test_many_killed_runs_end_bit_identical(how, number):
    equal, runs, kills, _ = kill_runs("--runs", str(number), *how)
    assert equal == runs == number
    assert kills >= number
