"""Checkpoints: the last two and the best, each whole or not there, and never code that runs."""

import errno
import os
import pickle

import pytest
import torch
from conftest import Malicious

from pyro_vae import CheckpointError, Checkpoints
from pyro_vae.training.checkpoint import FORMAT, DamagedCheckpointWarning


def content(step=1):
    return {"step": step, "weights": torch.arange(1000.0) + step, "words": ["a", None, 0.1]}


def same(a, b):
    return a["step"] == b["step"] and torch.equal(a["weights"], b["weights"]) and a["words"] == b["words"]


@pytest.fixture
def three(tmp_path):
    """Checkpoints of which three were saved."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save(step, content(step))
    return checkpoints


def test_what_is_saved_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    assert checkpoints.load() is None
    checkpoints.save(7, content(7))
    assert same(checkpoints.load(), content(7))


def test_the_last_two_and_the_best_are_kept(three):
    three.save_best(content(10))
    three.save(1_000_000_000, content(40))  # longer than the padding of the name
    names = {path.name for path in three.folder.iterdir()}
    assert names == {"step-000000030.pt", "step-1000000000.pt", "best.pt"}
    assert same(three.load(), content(40))


def test_the_order_is_that_of_the_steps_however_long_their_names(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (999_999_998, 999_999_999, 1_000_000_000):
        checkpoints.save(step, content(step))
    assert [path.name for path in checkpoints.paths()] == ["step-1000000000.pt", "step-999999999.pt"]


def test_going_on_from_an_earlier_one_removes_the_later(three):
    three.save(25, content(25))
    assert [path.name for path in three.paths()] == ["step-000000025.pt", "step-000000020.pt"]


@pytest.mark.parametrize("when", ["write", "flush", "rename"])
def test_a_full_disk_leaves_what_was_there(three, monkeypatch, when):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = {path.name: path.read_bytes() for path in three.folder.iterdir()}
    large = content(40) | {"large": torch.zeros(100_000)}  # torch answers with words of its own
    if when == "write":
        (three.folder / ".step-000000040.pt.tmp").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(os, {"flush": "fsync", "rename": "replace"}[when], full)
    with pytest.raises(CheckpointError, match=r"step-000000040.pt: cannot be written \(No space left on device\)"):
        three.save(40, large)
    assert {path.name: path.read_bytes() for path in three.folder.iterdir()} == before


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_told(three, share):
    newest = three.paths()[0]
    newest.write_bytes(newest.read_bytes()[: int(newest.stat().st_size * share)])
    with pytest.warns(DamagedCheckpointWarning, match=rf"{newest.name}: damaged.* Resuming from .*step-000000020.pt"):
        assert same(three.load(), content(20))


def test_nothing_whole_is_an_error_that_names_all(three):
    for path in three.paths():
        path.write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"step-000000030.pt: damaged.*step-000000020.pt: damaged.*train again"):
        three.load()


def test_code_in_a_file_does_not_run(three, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = three.paths()[0]
    torch.save({"format": FORMAT, "weights": Malicious()}, newest)
    with pytest.warns(DamagedCheckpointWarning, match="code in a file is not run"):
        assert same(three.load(), content(20))
    newest.write_bytes(pickle.dumps(Malicious()))  # without the zip around it
    with pytest.warns(DamagedCheckpointWarning, match="damaged"):
        three.load()
    assert not (tmp_path / "pwned").exists()


def test_a_newer_format_is_told_and_no_reason_to_go_back(three):
    torch.save({**content(40), "format": FORMAT + 1}, three.folder / "step-000000040.pt")
    with pytest.raises(CheckpointError, match=f"newer pyro_vae .format {FORMAT + 1}; this one reads up to {FORMAT}"):
        three.load()


@pytest.mark.parametrize("other", [{"weights": torch.zeros(2)}, [1, 2], {"format": "1"}, {"format": True}])
def test_another_file_of_torch_save_is_no_checkpoint(tmp_path, other):
    torch.save(other, tmp_path / "step-000000001.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of pyro_vae"):
        Checkpoints(tmp_path).load()
