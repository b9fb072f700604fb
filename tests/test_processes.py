"""Several processes: the gradient, the figures and the weights are those of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae import _processes as processes

HERE = Path(__file__).parent


def torchrun(*arguments, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    done = torchrun(HERE / "on_two_processes.py", folder)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "found.json").read_text())
    assert results["processes"] == 2
    return results


def test_gradients_are_those_of_one_process_on_the_whole_batch(found):
    assert len(found["gradients"]) == 5 * 2 * 3
    # A sum over 8 images, of chains of 8 products (4 layers, forward and backward) that sum 16 terms or fewer, so some 136
    # roundings of half a unit in the last place, which add up like a random walk: their square root.
    in_single = 136**0.5 * torch.finfo(torch.float32).eps / 2  # 7e-7
    for name, difference in found["gradients"].items():
        assert difference < (in_single if "float32" in name else 1e-12), name


def test_all_processes_end_with_the_same_weights_resumed_or_not(found):
    training = found["training"]
    assert training["equal"]
    assert training["losses"][0] == training["losses"][1]
    assert training["noises differ"]


def test_processes_stop_at_the_same_step(found):
    assert found["training"]["stopped"] == [7, 7]


def test_whole_set_figures_count_every_image_once(found):
    sets = found["sets"]
    for name in ("log_marginal", "test loss", "kl"):  # exact on any number of processes
        assert sets[name][0] == pytest.approx(sets[name][1], rel=1e-12), name
    assert sets["evaluate"][0] == sets["evaluate"][1]


def test_an_error_of_the_first_process_is_everybodys(found):
    assert found["errors"] == ["only the first process knows"] * 2


def test_one_process_is_no_group():
    assert (processes.world_size(), processes.rank()) == (1, 0)
    rows = torch.arange(3)
    assert processes.shard(rows) is not None
    assert torch.equal(processes.gather(processes.shard(rows)), rows)
    assert processes.any_rank([True, False], torch.device("cpu")) == [True, False]
    assert processes.on_rank_zero(lambda: 3) == 3
    with processes.group("cpu") as device:
        assert device == "cpu"
