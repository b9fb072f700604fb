import gzip
import hashlib
import math
import struct
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_vae

from pyro_vae import BernoulliLikelihood, Data, DataError, NegativeELBO, fit, load_data
from pyro_vae._checks import few_values
from pyro_vae.data import builtin
from pyro_vae.data.builtin import DatasetFallbackWarning, MissingDataError
from pyro_vae.data.own import as_data
from pyro_vae.training.state import identity

TRAIN, TRAIN_LABELS, TEST, TEST_LABELS = builtin._SIZES


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
    monkeypatch.setattr(builtin, "_SIZES", {name: (folder / name).stat().st_size for name in arrays})
    digests = tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in arrays)
    monkeypatch.setattr(builtin, "_PLAIN", {"MNIST": digests})

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
    swap: (TRAIN_LABELS, f"swapped: it has the content of {TEST_LABELS}. Rename the files, or delete"),
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
    monkeypatch.setattr(builtin, "_GZIP", {"FashionMNIST": tuple(digests)})
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


def of_all_kinds(n=6, **options):
    """x of pixels, labels, and tensors of whole numbers, floating point and one number each."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "counts": torch.arange(n * 2).reshape(n, 2),
        "weight": torch.rand(n, dtype=torch.float64, generator=g),
        "mask": torch.rand(n, 3, generator=g) < 0.5,
    }
    x = torch.randint(0, 256, (n, 1, 3, 3), dtype=torch.uint8, generator=g)
    return Data(x, torch.arange(n) % 2, "all", tensors=tensors, **options)


def test_a_batch_has_what_inputs_name_in_their_order():
    data = of_all_kinds(inputs=["x", "weight", "labels", "mask", "counts"])
    assert data.inputs == ("x", "weight", "labels", "mask", "counts")
    index = torch.tensor([5, 0, 5])
    x, weight, labels, mask, counts = data.batch(index)
    assert torch.equal(x, data.x[index].float() / 255)
    assert torch.equal(weight, data.tensors["weight"][index].float())  # of the batch's type
    assert torch.equal(labels, data.labels[index])
    assert (labels.dtype, mask.dtype, counts.dtype) == (torch.int64, torch.bool, torch.int64)
    assert torch.equal(counts, data.tensors["counts"][index])
    assert [value.dtype for value in data.to("cpu", torch.float64).batch(index)[:2]] == [torch.float64] * 2
    assert [len(of_all_kinds(inputs=inputs).batch(index)) for inputs in (("x",), ("x", "mask"))] == [1, 2]
    rows = (value.index_select(0, index) for value in data.held)
    assert all(map(torch.equal, data.convert(*rows), data.batch(index)))


def test_all_tensors_are_carried_along():
    data = of_all_kinds(inputs=("x", "labels", "weight"), classes=("even", "odd"), note="made")
    for index in (torch.tensor([4, 1]), slice(2), torch.tensor([True, False, False, True, False, True])):
        part = data.subset(index)
        assert torch.equal(part.x, data.x[index])
        assert torch.equal(part.labels, data.labels[index])
        assert all(torch.equal(part.tensors[name], value[index]) for name, value in data.tensors.items())
        assert (part.inputs, part.classes, part.note) == (data.inputs, data.classes, data.note)
    assert data.subset(slice(2)).x.data_ptr() == data.x.data_ptr()  # a view
    larger = data.resize(5)
    assert (larger.event_shape, larger.inputs) == ((1, 5, 5), data.inputs)
    assert torch.equal(larger.tensors["weight"], data.tensors["weight"])
    moved = data.to("cpu", torch.float32)
    assert moved.tensors["weight"].data_ptr() == data.tensors["weight"].data_ptr()  # held as it came
    assert [value.dtype for value in moved.batch(torch.tensor([0]))] == [torch.float32, torch.int64, torch.float32]
    with pytest.raises(DataError, match="expected indices from 0 to 5: .*out of"):
        data.subset(torch.tensor([6]))
    with pytest.raises(DataError, match="at least one observation"):
        data.subset(slice(0))


def test_repr_shows_no_values():
    assert repr(of_all_kinds(inputs=("x", "labels"))) == (
        "Data('all', 6 of shape (1, 3, 3) in torch.uint8, scaled by 1/255, inputs x, labels)"
    )
    assert repr(Data(torch.zeros(2, 3))) == "Data('array', 2 of shape (3,) in torch.float32, inputs x)"


def test_a_mapping_changed_later_changes_nothing():
    tensors = {"y": torch.zeros(2)}
    data = Data(torch.rand(2, 3), tensors=tensors, inputs=("x", "y"))
    tensors.clear()
    assert len(data.batch(torch.arange(2))) == 2


BYTES = torch.tensor([[0, 1, 3, 255]], dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 1, 2, 2), (1, 3, 2, 2)])
def test_images_of_uint8_are_pixels_unless_told(shape):
    x = torch.arange(12, dtype=torch.uint8)[: math.prod(shape)].reshape(shape)
    for pixels in (None, True):
        data = Data(x, pixels=pixels)
        assert data.scaled
        assert data.are_pixels
        assert torch.equal(data.batch(torch.tensor([0]))[0], x.float() / 255)
    counts = Data(x, pixels=False)
    assert not counts.scaled
    assert not counts.are_pixels
    assert torch.equal(counts.batch(torch.tensor([0]))[0], x.float())


@pytest.mark.parametrize("shape", [(1, 4), (1, 2, 1, 2), (1, 1, 1, 1, 4)])
def test_other_uint8_must_be_told(shape):
    x = BYTES.reshape(shape)
    with pytest.raises(DataError, match=r"pixels=True \(scaled by 1/255\) or pixels=False \(unscaled whole numbers\)"):
        Data(x)
    with pytest.raises(DataError, match="Pass pixels=True .* or pixels=False"):
        as_data(x.numpy())
    (pixels,), (counts,) = (Data(x, pixels=answer).batch(torch.tensor([0])) for answer in (True, False))
    assert torch.equal(pixels, x.float() / 255)
    assert torch.equal(counts, x.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_all_other_whole_numbers_are_kept(dtype):
    x = torch.tensor([[0, 1, 3, 100]]).to(dtype)
    for kept in (Data(x), Data(x, pixels=False), as_data(x.numpy())):
        (batch,) = kept.batch(torch.tensor([0]))
        assert batch.dtype == torch.float32
        assert torch.equal(batch, x.float())
    assert kept.to("cpu", torch.float64).batch(torch.tensor([0]))[0].dtype == torch.float64
    assert Data(x).are_pixels == (dtype == torch.bool)  # black and white
    with pytest.raises(DataError, match="pixels=True scales uint8 by 1/255, found torch.int8"):
        Data(x.to(torch.int8), pixels=True)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_whole_numbers_without_sign_become_ones_that_torch_computes_with(dtype):
    x = np.array([[0, 1, 60_000]], dtype=dtype)
    assert as_data(x).batch(torch.tensor([0]))[0].tolist() == [[0, 1, 60_000]]
    with pytest.raises(DataError, match=r"x as floating-point or whole numbers, found torch.uint.*: x.long\(\)"):
        Data(torch.from_numpy(x))
    with pytest.raises(DataError, match="below 2.63, found 18446744073709551615"):
        as_data(np.array([[2**64 - 1]], dtype=np.uint64))


def test_floating_point_is_taken_as_it_is_and_may_be_no_pixels():
    x = torch.rand(3, 1, 2, 2)
    assert Data(x).are_pixels
    assert not Data(x, pixels=False).are_pixels
    assert not Data(255 * x).are_pixels
    assert torch.equal(Data(x, pixels=False).batch(torch.arange(3))[0], x)


def test_counts_of_0_and_1_are_binarised_and_others_refused():
    x = torch.tensor([[0, 1, 1]])
    for binarization in ("threshold", "dynamic"):
        (batch,) = Data(x, binarization=binarization).batch(torch.tensor([0]))
        assert batch.tolist() == [[0, 1, 1]]
        with pytest.raises(DataError, match=r"values in \[0, 1\], found 0 to 2"):
            Data(2 * x, binarization=binarization)
        with pytest.raises(DataError, match=r"values in \[0, 1\], found 0 to 255"):
            Data(BYTES, binarization=binarization, pixels=False)


def test_resized_counts_are_whole_numbers():
    x = torch.randint(0, 300, (4, 1, 5, 5))
    data = Data(x).resize(7)
    assert (data.x.dtype, data.event_shape) == (torch.int64, (1, 7, 7))


def test_moments_are_those_of_a_batch():
    x = torch.randint(0, 256, (50, 1, 2, 2), dtype=torch.uint8)
    for answer, unit in ((True, 255), (False, 1)):
        loc, scale = Data(x, torch.zeros(50).long(), inputs=("x", "labels"), pixels=answer).moments()
        torch.testing.assert_close(loc, x.double().mean(0) / unit)
        torch.testing.assert_close(scale, x.double().std(0, correction=0) / unit)


# --- identity ---


def test_identity_of_x_alone_is_what_old_checkpoints_have():
    x = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    assert identity(Data(x)) == f"3 of shape (2, 2), binarization none, CRC-32 {zlib.crc32(bytes(range(12))):08x}"
    assert identity(Data(x, torch.arange(3), tensors={"y": torch.rand(3)})) == identity(Data(x))  # a batch has x alone
    assert identity(Data(x, pixels=True)) == identity(Data(x))


def test_identity_tells_all_that_a_batch_has():
    data = of_all_kinds(inputs=("x", "labels", "weight"))
    others = (
        replace(data, labels=1 - data.labels),
        replace(data, tensors=data.tensors | {"weight": data.tensors["weight"] + 1}),
        replace(data, inputs=("x", "weight", "labels")),
        replace(data, inputs=("x", "labels")),
        replace(data, pixels=False),
        replace(data, labels=data.labels.int()),
        replace(data, tensors={**data.tensors, "weight": data.tensors["weight"][:, None]}),
    )
    assert len({identity(data), *map(identity, others)}) == 1 + len(others)
    assert identity(replace(data, tensors=data.tensors | {"mask": torch.zeros(6)})) == identity(data)  # not in a batch


# --- what a batch holds is checked ---


def test_check_sees_all_that_batches_hold_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr("pyro_vae.data.dataset._ROWS", 4)
    data = of_all_kinds(inputs=("x", "labels"), binarization="dynamic")
    seen = []
    state = torch.get_rng_state()
    data.check(lambda x, y: seen.append((x, y)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(x) for x, _ in seen] == [4, 2]
    x, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(labels, data.labels)


def test_check_of_large_observations_takes_few_at_once():
    sizes = []
    Data(torch.zeros(3, 1, 1, 2**22 + 1)).check(lambda x: sizes.append(len(x)))
    assert sizes == [1, 1, 1]


def test_check_says_what_a_function_takes():
    data = of_all_kinds(inputs=("x", "labels"))
    with pytest.raises(DataError, match=r"all: a batch has x, labels, which does not match .*check\(x\): too many"):
        data.check(BernoulliLikelihood().check)
    with pytest.raises(DataError, match=r"does not match .*<lambda>\(x, y, z\): missing a required argument: 'z'"):
        data.check(lambda *batch: None, lambda x, y, z: None)
    as_data((torch.ones(2, 2), torch.ones(2, 2))).check(torch.add)  # which has no signature to look at


def test_errors_of_a_check_show_a_few_values():
    data = Data(torch.rand(100, 3))
    with pytest.raises(DataError) as error:
        data.check(torch.distributions.Poisson(1.0, validate_args=True).log_prob)
    assert "tensor(0." in str(error.value)
    assert len(str(error.value)) < 300
    text = "tensor([[1., 2., 3.],\n [4., 5., 6.]], dtype=torch.float64) of tensor(3.)"
    assert few_values(text) == "tensor(1., 2., 3., ...) of tensor(3.)"


BAD = {
    "scalar": (torch.tensor(1.0), {}, "shape \\(N"),
    "one image without its leading dimension": (torch.zeros(4), {}, r"x\[None\]"),
    "empty": (torch.zeros(0, 4), {}, "at least one observation"),
    "no pixels": (torch.zeros(4, 0), {}, "at least one observation"),
    "nan": (torch.tensor([[math.nan]]), {}, "NaN or infinite"),
    "infinite": (torch.tensor([[math.inf]]), {}, "NaN or infinite"),
    "complex": (torch.zeros(4, 2, dtype=torch.complex64), {}, r"numbers, found torch.complex64. Convert: x.float\(\)"),
    "sparse": (torch.zeros(4, 2).to_sparse(), {}, "expected x as a dense tensor with values, found torch.sparse_coo"),
    "a tensor of another length": (torch.zeros(4, 2), {"tensors": {"y": torch.zeros(3)}}, r"expected y of 4 .*\(3,\)"),
    "a tensor of one number": (
        torch.zeros(4, 2),
        {"tensors": {"y": torch.tensor(1)}},
        r"expected y of 4 .*found shape \(\)",
    ),
    "a tensor with nan": (torch.zeros(4, 2), {"tensors": {"y": torch.full((4,), math.nan)}}, "NaN or infinite values in y"),
    "a list as tensor": (torch.zeros(4, 2), {"tensors": {"y": [1, 2, 3, 4]}}, "expected y as a tensor, found list"),
    "tensors as a list": (torch.zeros(4, 2), {"tensors": [torch.zeros(4)]}, "as a mapping from name to tensor, found list"),
    "a tensor called x": (torch.zeros(4, 2), {"tensors": {"x": torch.zeros(4)}}, "not 'x' or 'labels'; found 'x'"),
    "a name that is no word": (torch.zeros(4, 2), {"tensors": {"a b": torch.zeros(4)}}, "found 'a b'"),
    "a name that is a number": (torch.zeros(4, 2), {"tensors": {1: torch.zeros(4)}}, "found 1"),
    "inputs without x": (torch.zeros(4, 2), {"inputs": ("labels",)}, r"'x' first and none twice, of x; found \('labels',\)"),
    "inputs that are not there": (torch.zeros(4, 2), {"inputs": ("x", "labels")}, "of x; found"),
    "inputs twice": (torch.zeros(4, 2), {"inputs": ("x", "x")}, "none twice"),
    "inputs as a word": (torch.zeros(4, 2), {"inputs": "x"}, "of x; found 'x'"),
    "pixels of another type": (torch.zeros(4, 2), {"pixels": True}, "scales uint8 by 1/255, found torch.float32"),
    "pixels as a word": (torch.zeros(4, 2), {"pixels": "yes"}, "expected True, False or None, found 'yes'"),
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


def test_tuples_and_mappings_of_tensors():
    x, y, z = torch.rand(4, 3), np.arange(4), torch.rand(4, 2)
    assert as_data((x,)).inputs == ("x",)
    for parts, names in (((x, y), ["y"]), ([x, y, z], ["y1", "y2"])):
        data = as_data(parts)
        assert (list(data.tensors), data.inputs) == (names, ("x", *names))
        assert data.batch(torch.tensor([2]))[1].tolist() == [2]
    data = as_data({"images": x, "labels": y, "pose": z})
    assert (data.inputs, list(data.tensors), data.labels.tolist()) == (("x", "labels", "pose"), ["pose"], [0, 1, 2, 3])
    assert data.x is x


REFUSED = {
    "of different lengths": ((torch.zeros(4, 2), torch.zeros(3, 2)), "lengths 4, 3. Pass training and test data separately"),
    "a pair of Data": ((Data(torch.zeros(4, 2)),) * 2, "found a tuple. Pass training and test data separately"),
    "a list of images": ([torch.zeros(2, 2)] * 3, r"a list of 3 tensors of one shape. Stack observations: torch.stack"),
    "an empty mapping": ({}, "expected at least x"),
    "a mapping of lists": ({"x": [1.0]}, "found list"),
    "a tuple of numbers and an array": ((torch.zeros(4, 2), 1), "found a tuple"),
    "an empty tuple": ((), "found a tuple"),
    "list": ([[1.0]], "found list"),
    "the pair of load_data": ((1, 2), "Pass training and test data separately: train, test"),
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
    assert torch.equal(loc, torch.tensor([2.0, 7e6 + 1, 0.1]).double())
    torch.testing.assert_close(scale, torch.tensor([math.sqrt(2), 1.0, 1.0], dtype=torch.float64))


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


def test_a_tensor_that_requires_a_gradient_gets_none():
    x = torch.rand(20, 1, 4, 4, requires_grad=True)
    context = (2 * x).sum((1, 2, 3))  # part of a graph, through which a second backward() would fail
    data = Data(x, tensors={"c": context})
    assert not any(tensor.requires_grad for tensor in (data.x, data.tensors["c"]))
    fit(NegativeELBO(make_vae()), data, epochs=2, batch_size=10, lr=1e-3, verbose=False)
    assert x.grad is None
