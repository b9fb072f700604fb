import gzip
import hashlib
import math
import struct
import sys

import numpy as np
import pytest
import torch

from pyro_vae import Data, DataError, data, load_data
from pyro_vae.data import DatasetFallbackWarning, MissingDataError
from pyro_vae.own_data import as_data

TRAIN, TRAIN_LABELS, TEST, TEST_LABELS = data._SIZES


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small data set in MNIST's format and folder, its digests in place of the real ones; downloads fail."""
    rng = np.random.default_rng(0)
    arrays = {
        TRAIN: rng.integers(0, 256, (6, 4, 4)),
        TRAIN_LABELS: rng.integers(0, 10, 6),
        TEST: rng.integers(0, 256, (3, 4, 4)),
        TEST_LABELS: rng.integers(0, 10, 3),
    }
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        (folder / name).write_bytes(idx_bytes(array))
    monkeypatch.setattr(data, "_SIZES", {name: (folder / name).stat().st_size for name in arrays})
    digests = tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in arrays)
    monkeypatch.setattr(data, "_PLAIN", {"MNIST": digests})

    def no_network(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", no_network)
    return folder, arrays


def test_loads_what_the_files_hold(small):
    folder, arrays = small
    train, test = load_data("mnist", data_dir=folder.parents[1])
    assert train.x.dtype == torch.uint8
    assert (train.x.shape, test.x.shape) == ((6, 1, 4, 4), (3, 1, 4, 4))
    assert np.array_equal(train.x.squeeze(1).numpy(), arrays[TRAIN])
    assert np.array_equal(test.labels.numpy(), arrays[TEST_LABELS])
    torch.testing.assert_close(*train.batch(torch.tensor([4])), torch.tensor(arrays[TRAIN][4:5, None] / 255).float())


def truncate(folder):
    path = folder / TRAIN
    path.write_bytes(path.read_bytes()[:-5])


def lengthen(folder):
    path = folder / TEST
    path.write_bytes(path.read_bytes() + b"00")


def flip(folder):
    path = folder / TEST
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)


def compress(folder):
    path = folder / TRAIN_LABELS
    path.write_bytes(gzip.compress(path.read_bytes()))


def swap(folder):
    a, b = folder / TRAIN_LABELS, folder / TEST_LABELS
    a_content, b_content = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_content)
    b.write_bytes(a_content)


def remove(folder):
    (folder / TEST_LABELS).unlink()


def empty(folder):
    (folder / TRAIN).write_bytes(b"")


def directory(folder):
    (folder / TRAIN).unlink()
    (folder / TRAIN).mkdir()


DAMAGE = {
    truncate: (TRAIN, "truncated: expected 112 bytes, found 107"),
    lengthen: (TEST, "too long: expected 64 bytes, found 66"),
    flip: (TEST, "damaged: expected SHA-256"),
    compress: (TRAIN_LABELS, "still compressed by gzip. Rename it to .*gz and run gunzip"),
    swap: (TRAIN_LABELS, f"swapped: it holds the content of {TEST_LABELS}. Give each file its own name, or delete"),
    remove: (TEST_LABELS, "download failed.*no network.*PYRO_VAE_DATA"),
    empty: (TRAIN, "truncated: expected 112 bytes, found 0"),
    directory: (TRAIN, "cannot be read"),
}


@pytest.mark.parametrize(("harm", "expected"), DAMAGE.items(), ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_each_kind_of_damage_has_its_own_error(small, harm, expected, name):
    folder, _ = small
    harm(folder)
    file, message = expected
    if name == "auto" and harm is remove:  # only what is missing is replaced, and loudly
        with pytest.warns(DatasetFallbackWarning, match="NOT MNIST.*" + TEST_LABELS):
            train, _ = load_data(name, data_dir=folder.parents[1])
        assert train.name == "digits"
        return
    with pytest.raises(DataError, match=message) as error:
        load_data(name, data_dir=folder.parents[1])
    assert file in str(error.value)


def test_real_mnist_matches_its_digests_and_counts(mnist):
    train, test = mnist
    assert (train.x.shape, test.x.shape) == ((60_000, 1, 28, 28), (10_000, 1, 28, 28))
    assert train.x.dtype == torch.uint8
    assert torch.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_processed_folder_does_not_bypass_the_check(small):
    """torchvision's class would read MNIST/processed/*.pt unchecked where it exists."""
    folder, arrays = small
    processed = folder.parent / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)), processed / name)
    train, _ = load_data("mnist", data_dir=folder.parents[1])
    assert np.array_equal(train.x.squeeze(1).numpy(), arrays[TRAIN])


@pytest.fixture
def small_fashion(small, monkeypatch):
    """The same files as Fashion-MNIST, which is verified through the .gz files that torchvision keeps."""
    folder, arrays = small
    target = folder.parents[1] / "FashionMNIST" / "raw"
    target.mkdir(parents=True)
    digests = []
    for name in arrays:
        content = (folder / name).read_bytes()
        (target / name).write_bytes(content)
        (target / f"{name}.gz").write_bytes(gzip.compress(content))
        digests.append(hashlib.sha256((target / f"{name}.gz").read_bytes()).hexdigest())
    monkeypatch.setattr(data, "_GZIP", {"FashionMNIST": tuple(digests)})
    return target, arrays


def test_fashion_mnist_is_verified_through_its_archives(small_fashion):
    folder, arrays = small_fashion
    train, _ = load_data("fashion-mnist", data_dir=folder.parents[1])
    assert train.name == "fashion-mnist"
    assert np.array_equal(train.x.squeeze(1).numpy(), arrays[TRAIN])
    flip(folder)
    with pytest.raises(DataError, match=f"{TEST}: damaged"):
        load_data("fashion-mnist", data_dir=folder.parents[1])


def test_fashion_mnist_archive_damaged_or_missing(small_fashion):
    folder, _ = small_fashion
    archive = folder / f"{TRAIN}.gz"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"gz: damaged: expected SHA-256"):
        load_data("fashion-mnist", data_dir=folder.parents[1])
    archive.unlink()
    with pytest.raises(DataError, match="missing, and .* cannot be verified without it"):
        load_data("fashion-mnist", data_dir=folder.parents[1])


def test_missing_everything_names_all_files(tmp_path, monkeypatch, small):
    with pytest.raises(MissingDataError, match=f"{TRAIN}, {TRAIN_LABELS}, {TEST}, {TEST_LABELS}"):
        load_data("mnist", data_dir=tmp_path / "nothing")


def test_data_dir_comes_from_the_environment(small, monkeypatch):
    folder, _ = small
    monkeypatch.setenv("PYRO_VAE_DATA", str(folder.parents[1]))
    assert len(load_data("mnist")[0]) == 6


def test_broken_torchvision_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match="pip install --upgrade torch torchvision"):
        load_data("mnist", data_dir=small[0].parents[1])


def test_unknown_name():
    with pytest.raises(DataError, match="auto, mnist, fashion-mnist, kmnist, digits; found 'cifar'"):
        load_data("cifar")


def test_digits(digits):
    train, test = digits
    assert (train.x.shape, test.x.shape) == ((1500, 1, 8, 8), (297, 1, 8, 8))
    assert (train.x.min(), train.x.max()) == (0, 1)
    assert train.name == "digits"
    assert set(test.labels.tolist()) == set(range(10))


# --- batches ---


def test_threshold():
    x = torch.tensor([[0, 127, 128, 255]], dtype=torch.uint8)
    (batch,) = Data(x, binarization="threshold", pixels=True).batch(torch.tensor([0]))
    assert batch.tolist() == [[0, 0, 1, 1]]


def test_dynamic_is_redrawn_each_time_with_the_grey_value_as_mean():
    x = torch.tensor([[0, 64, 128, 255]], dtype=torch.uint8)
    n = 20_000
    (draws,) = Data(x, binarization="dynamic", pixels=True).batch(torch.zeros(n, dtype=torch.long))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = x[0] / 255
    assert ((draws.mean(0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_batches_follow_the_index_and_the_default_dtype():
    x = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    torch.set_default_dtype(torch.float64)
    try:
        (batch,) = Data(x).batch(torch.tensor([2, 0, 2]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.dtype == torch.float64
    torch.testing.assert_close(batch * 255, x[[2, 0, 2]].double())


def test_data_are_held_once():
    x = torch.zeros(4, 2, 2, dtype=torch.uint8)
    assert as_data(x).to("cpu").x.data_ptr() == x.data_ptr()
    array = np.zeros((4, 2), dtype=np.float32)
    assert as_data(array).x.data_ptr() == array.ctypes.data


def test_batches_of_another_type():
    for x in (np.zeros((4, 2)), np.zeros((4, 2), dtype=int), np.zeros((4, 2, 2), dtype=np.uint8)):
        data = as_data(x).to("cpu", torch.float32)
        assert [tensor.dtype for tensor in data.batch(torch.tensor([0]))] == [torch.float32]
    assert data.x.dtype == torch.uint8  # held as it came


BAD = {
    "scalar": (torch.tensor(1.0), {}, "shape \\(N"),
    "one image without its leading dimension": (torch.zeros(4), {}, r"x\[None\]"),
    "empty": (torch.zeros(0, 4), {}, "at least one observation"),
    "no pixels": (torch.zeros(4, 0), {}, "at least one observation"),
    "nan": (torch.tensor([[math.nan]]), {}, "NaN or infinite"),
    "infinite": (torch.tensor([[math.inf]]), {}, "NaN or infinite"),
    "labels": (
        torch.zeros(4, 2),
        {"labels": torch.zeros(3)},
        "expected 4 labels, whole numbers, found torch.float32 of shape \\(3,\\)",
    ),
    "binarization": (torch.zeros(4, 2), {"binarization": "random"}, "none, threshold, dynamic; found 'random'"),
    "range": (torch.full((4, 2), 2.0), {"binarization": "dynamic"}, r"needs values in \[0, 1\], found 2 to 2"),
}


@pytest.mark.parametrize(("x", "arguments", "match"), BAD.values(), ids=BAD)
def test_bad_data(x, arguments, match):
    with pytest.raises(DataError, match=match):
        Data(x, **arguments)


REFUSED = {
    "list": ([[1.0]], "found list"),
    "the pair of load_data": ((1, 2), "Pass its parts apart: train, test"),
    "masked": (np.ma.masked_array([[1.0]]), "without a mask"),
    "objects": (np.array([[object()]]), "expected an array of numbers, found object"),
    "words": (np.array([["a"]]), "expected an array of numbers"),
}


@pytest.mark.parametrize(("x", "match"), REFUSED.values(), ids=REFUSED)
def test_as_data_refuses_other_types(x, match):
    with pytest.raises(DataError, match=match):
        as_data(x)


def test_data_takes_tensors():
    with pytest.raises(DataError, match="expected x as a tensor, found ndarray"):
        Data(np.zeros((2, 2)))
    with pytest.raises(DataError, match="expected labels as a tensor, found list"):
        Data(torch.zeros(2, 2), labels=[0, 1])


def test_arrays_that_are_read_only_or_of_other_byte_order():
    array = np.arange(4, dtype=">f4").reshape(2, 2)
    array.flags.writeable = False
    assert as_data(array).x.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_moments_are_those_of_each_element_and_constants_keep_theirs():
    x = torch.stack([torch.arange(5.0), torch.full((5,), 7e6 + 1), torch.full((5,), 0.1)], 1)
    loc, scale = Data(x).moments()
    assert torch.equal(loc, torch.tensor([2.0, 7e6 + 1, 0.1]))
    torch.testing.assert_close(scale, torch.tensor([math.sqrt(2), 1.0, 1.0]))


def test_resize_is_bilinear_and_keeps_the_type():
    x = torch.randint(0, 256, (2300, 1, 5, 5), dtype=torch.uint8)
    data = Data(x, torch.arange(2300), "some").resize(8)
    assert (data.x.shape, data.x.dtype, data.name) == ((2300, 1, 8, 8), torch.uint8, "some")
    # by hand, along one axis at a time: output i looks at (i + 1/2) 5 / 8 - 1/2
    at = ((torch.arange(8) + 0.5) * 5 / 8 - 0.5).clamp(0, 4)
    low = at.floor().long().clamp(max=3)
    weight = at - low
    rows = x[:, 0, low].float() * (1 - weight)[:, None] + x[:, 0, low + 1].float() * weight[:, None]
    both = rows[..., low] * (1 - weight) + rows[..., low + 1] * weight
    assert (data.x[:, 0].float() - both).abs().max() <= 0.5 + 1e-3  # rounded to the nearest grey level
    half = Data(torch.rand(3, 1, 8, 8, dtype=torch.float64)).resize(4)
    assert half.x.dtype == torch.float64
    constant = Data(torch.full((1, 3, 7, 9), 0.25)).resize(16)
    torch.testing.assert_close(constant.x, torch.full((1, 3, 16, 16), 0.25))
    with pytest.raises(DataError, match=r"expected images .*found \(4, 5\)"):
        Data(torch.rand(4, 5)).resize(3)
    with pytest.raises(DataError, match="image size: expected a whole number"):
        Data(torch.rand(4, 1, 5, 5)).resize(0)
