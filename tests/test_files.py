"""Files that are whole or not there, and verified when they are read."""

import zipfile
from contextlib import suppress

import pytest
import torch

from pyro_vae import CheckpointError
from pyro_vae._files import atomic_write, check_writable, read_tensors, write_tensors


def content(step=1):
    return {"step": step, "weights": torch.arange(1000.0) + step, "words": ["a", None, 0.1]}


def same(a, b):
    return a["step"] == b["step"] and torch.equal(a["weights"], b["weights"]) and a["words"] == b["words"]


def test_a_write_that_is_killed_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.pt"
    write_tensors(path, content(1))
    with suppress(KeyboardInterrupt), atomic_write(path) as stream:
        stream.write(b"half of it")
        raise KeyboardInterrupt
    assert same(read_tensors(path), content(1))
    (tmp_path / ".file.pt.tmp").write_bytes(b"left by a process that was killed")
    write_tensors(path, content(2))
    assert same(read_tensors(path), content(2))
    assert [p.name for p in tmp_path.iterdir()] == ["file.pt"]


def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    path = tmp_path / "file.pt"
    write_tensors(path, content())
    whole = path.read_bytes()
    found = 0
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            loaded = read_tensors(path)
        except CheckpointError:
            found += 1
        else:  # a bit that nobody reads, of a date or of padding
            assert same(loaded, content()), place
    assert found > len(whole) / 7 / 2


def test_a_member_that_torch_would_load_damaged(tmp_path):
    """The reason for the CRC: torch loads flipped bits of a tensor without a word."""
    path = tmp_path / "file.pt"
    write_tensors(path, {"weights": torch.ones(1000)})
    whole = bytearray(path.read_bytes())
    place = whole.find(torch.ones(8).numpy().tobytes())
    whole[place + 2] ^= 0x40
    path.write_bytes(whole)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], torch.ones(1000))
    with pytest.raises(CheckpointError, match="the CRC of .* is wrong"):
        read_tensors(path)


def test_a_zip_that_is_no_file_of_torch_save(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match="not a file of torch.save"):
        read_tensors(tmp_path / "file.pt")


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read \(No such file or directory\). Train again."):
        read_tensors(tmp_path / "none.pt", remedy="Train again.")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        read_tensors(tmp_path / "folder.pt")


def test_a_folder_is_tried_before_it_is_there(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/b: cannot be written to \(Not a directory\)"):
        check_writable(tmp_path / "file" / "b")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}: a folder. Name a file"), atomic_write(tmp_path):
        pass
