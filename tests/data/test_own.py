"""Arrays, data sets of torch, files and folders become the same data, and what cannot be read is named."""

import math
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from conftest import make_vae
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pyro_vae import Data, DataError, NegativeELBO, evaluate, fit, log_marginal
from pyro_vae.data import own
from pyro_vae.data.own import LargeDataWarning, as_data, read_data, read_splits

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def save(folder, pixels=PIXELS, kind="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:02d}.{kind}")
    return folder


class OfImages(Dataset):
    """As torchvision's: PIL images and labels."""

    classes = ("even", "odd")

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return Image.fromarray(PIXELS[index]), index % 2


def test_all_ways_to_the_same_data(tmp_path):
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    np.save(tmp_path / "a.npy", PIXELS)
    np.savez(tmp_path / "b.npz", images=PIXELS, labels=np.arange(12) % 2)
    np.savez(tmp_path / "c.npz", x=PIXELS, y=np.array(["even", "odd"] * 6))
    for label, name in enumerate(("even", "odd")):
        save(tmp_path / "folders" / name, PIXELS[label::2])
    dataset = TensorDataset(expected, torch.arange(12) % 2)
    flat = [tmp_path / "a.npy", str(tmp_path / "b.npz"), tmp_path / "c.npz", save(tmp_path / "flat"), dataset, OfImages()]
    for way in (*flat, tmp_path / "folders"):
        data = as_data(way)
        x = data.x if way != tmp_path / "folders" else torch.stack([data.x[:6], data.x[6:]], 1).flatten(0, 1)
        assert torch.equal(x, expected), way
    for way in flat[1:3] + flat[4:]:
        assert as_data(way).labels.tolist() == [0, 1] * 6
    assert as_data(tmp_path / "folders").labels.tolist() == [0] * 6 + [1] * 6
    for way in (tmp_path / "c.npz", tmp_path / "folders", OfImages()):
        assert as_data(way).classes == ("even", "odd")
    assert as_data(tmp_path / "flat").labels is None
    assert as_data(tmp_path / "flat").note == "12 colour images of 8 x 8 pixels"


def test_fit_evaluate_and_log_marginal_take_them(tmp_path):
    grey = PIXELS[..., 0]
    np.save(tmp_path / "x.npy", grey)
    x = torch.from_numpy(grey).unsqueeze(1)
    results = []
    for data in (x, TensorDataset(x, torch.zeros(12, dtype=torch.long)), tmp_path / "x.npy", Data(x)):
        torch.manual_seed(0)
        vae = make_vae((1, 8, 8))
        (record,) = fit(NegativeELBO(vae), data, test=data, epochs=1, verbose=False)
        estimate = evaluate(vae, data)["neg_elbo"].value
        torch.manual_seed(1)
        tensor = x / 255 if data is x else data
        log_p = log_marginal(vae.model, vae.guide, tensor, num_samples=5)
        results.append((record.train["loss"], record.test["loss"], estimate, log_p.mean.value))
    assert all(result == results[0] for result in results)


def test_pictures_of_any_size_kind_and_colour(tmp_path):
    grey = np.repeat(np.repeat(PIXELS[0, :, :, 0], 20, 0), 30, 1)  # (160, 240)
    folder = save(tmp_path / "grey", [grey, grey[:150]])
    Image.fromarray(grey).convert("RGB").save(folder / "as-colour.png")  # and still grey
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen-bits.png")
    seen_through = np.dstack([grey, grey, grey, np.full_like(grey, 255)])
    Image.fromarray(seen_through, "RGBA").save(folder / "alpha.png")
    (folder / "notes.txt").write_text("no picture")
    data = read_data(folder)
    assert data.note == "5 grey images of 150 x 240 to 160 x 240 pixels, made 32 x 32; 1 other file left out"
    assert data.x.shape == (5, 1, 32, 32)
    for other in (2, 3, 4):  # 01.png is another crop
        assert (data.x[0].int() - data.x[other].int()).abs().max() <= 1
    assert read_data(folder, image_size=16).x.shape == (5, 1, 16, 16)
    nothing = np.zeros((9, 9, 4), dtype=np.uint8)  # black, which nobody sees
    assert read_data(save(tmp_path / "clear", [nothing])).x.unique().tolist() == [255]


def test_the_middle_is_kept_and_orientation_is_heeded(tmp_path):
    wide = np.zeros((10, 30), dtype=np.uint8)
    wide[:, 10:20] = 255
    assert (read_data(save(tmp_path / "wide", [wide]), image_size=10).x == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    (tmp_path / "turned").mkdir()
    Image.fromarray(wide).save(tmp_path / "turned" / "a.png", exif=exif)
    assert read_data(tmp_path / "turned").x.shape == (1, 1, 30, 10)


def test_a_tenth_is_held_out_always_the_same(tmp_path):
    x = torch.arange(40.0).reshape(20, 2)
    np.savez(tmp_path / "x.npz", x=x.numpy(), y=np.arange(20))
    train, test = read_splits(tmp_path / "x.npz")
    assert (len(train), len(test)) == (18, 2)
    assert torch.equal(torch.cat([train.labels, test.labels]).sort().values, torch.arange(20))
    assert torch.equal(train.x[:, 0], 2.0 * train.labels)
    torch.manual_seed(5)
    assert torch.equal(read_splits(tmp_path / "x.npz")[1].x, test.x)
    assert "2 held out as test set" in train.note


def test_test_sets_of_their_own(tmp_path):
    np.savez(tmp_path / "both.npz", x_train=PIXELS, y_train=np.arange(12), x_test=PIXELS[:5], y_test=np.arange(5))
    train, test = read_splits(tmp_path / "both.npz")
    assert (train.x.shape, test.x.shape, test.labels.tolist()) == ((12, 3, 8, 8), (5, 3, 8, 8), [0, 1, 2, 3, 4])
    save(tmp_path / "parted" / "Train", PIXELS)
    save(tmp_path / "parted" / "test", PIXELS[:3, :6])
    train, test = read_splits(tmp_path / "parted")
    assert (train.x.shape, test.x.shape) == ((12, 3, 8, 8), (3, 3, 8, 8))  # made as large as those for training
    assert (train.name, test.name) == ("parted", "parted")
    train, test = read_splits(tmp_path / "parted" / "Train", tmp_path / "parted" / "test", image_size=4)
    assert (train.x.shape, test.x.shape) == ((12, 3, 4, 4), (3, 3, 4, 4))


class Streaming(IterableDataset):
    def __iter__(self):
        return iter(())


def both(folder):
    save(folder)
    return save(folder / "one").parent


def broken(folder):
    (save(folder) / "13.png").write_bytes(b"\x89PNG no more")
    return folder


def cut(folder):
    whole = (save(folder) / "00.png").read_bytes()
    (folder / "00.png").write_bytes(whole[: len(whole) // 2])
    return folder


def arrays(**named):
    def make(folder):
        np.savez(folder.with_suffix(".npz"), **named)
        return folder.with_suffix(".npz")

    return make


def junk(folder):
    folder.with_suffix(".npy").write_bytes(b"no array")
    return folder.with_suffix(".npy")


BAD = {
    "missing": (lambda folder: folder, "missing. Name a folder"),
    "text": (lambda folder: folder.with_suffix(".txt"), "missing"),
    "empty": (lambda folder: folder.mkdir() or folder, "expected images .* found none"),
    "both": (both, "found both"),
    "broken picture": (broken, r"13.png: cannot be read as an image"),
    "cut picture": (cut, r"00.png: cannot be read as an image"),
    "no array": (junk, "cannot be read"),
    "pickled": (arrays(x=np.array([{}, []], dtype=object)), "cannot be read .*allow_pickle"),
    "other names": (arrays(pixels=PIXELS), "expected an array called x, X, .* found pixels"),
    "labels of another length": (arrays(x=PIXELS, y=np.arange(3)), "expected 12 labels"),
    "labels in a table": (arrays(x=PIXELS, y=np.zeros((12, 2))), r"labels of shape \(N,\)"),
    "too many labels": (arrays(x=np.zeros((1001, 2)), y=np.arange(1001) / 2), "at most 1,000 kinds"),
    "numbers that are none": (arrays(x=np.full((3, 2), np.nan)), "NaN"),
    "words": (arrays(x=np.full((3, 2), "a")), "array of numbers"),
}


@pytest.mark.parametrize(("make", "match"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_named(tmp_path, make, match):
    path = make(tmp_path / "place")
    with pytest.raises(DataError, match=match) as error:
        read_splits(path)
    assert "place" in str(error.value)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (Streaming(), "with a length"),
        (TensorDataset(torch.zeros(0, 3)), "at least one observation"),
        ([1, 2], "found list"),
    ],
)
def test_data_sets_that_cannot_be_read(data, match):
    with pytest.raises(DataError, match=match):
        as_data(data)


class Uneven(OfImages):
    def __getitem__(self, index):
        return torch.zeros(index + 1)


class Words(OfImages):
    def __getitem__(self, index):
        return "word"


@pytest.mark.parametrize(("data", "match"), [(Uneven(), "of one shape, found .1,., .2,., ..."), (Words(), "found str")])
def test_items_that_do_not_fit(data, match):
    with pytest.raises(DataError, match=match):
        as_data(data)


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 2, 5)])
def test_uint8_tables_in_files_must_be_told(tmp_path, shape):
    counts = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.savez(tmp_path / "x.npz", x=counts, y=np.arange(6))
    for read in (read_data, read_splits):
        with pytest.raises(DataError, match="x.npz: .*may be pixels or counts. Pass pixels=True .*--pixels yes or no"):
            read(tmp_path / "x.npz")
    index = torch.arange(6)
    (whole,), (grey,) = (read_data(tmp_path / "x.npz", pixels=answer).batch(index) for answer in (False, True))
    assert torch.equal(whole, torch.from_numpy(counts).float())
    assert torch.equal(grey, whole / 255)
    train, test = read_splits(tmp_path / "x.npz", pixels=False)
    assert (train.pixels, test.pixels) == (False, False)
    assert "whole numbers (uint8)" in train.note
    binary = counts % 2  # black and white, whatever the shape
    np.save(tmp_path / "x.npy", binary)
    for answer in (None, True, False):
        assert torch.equal(read_data(tmp_path / "x.npy", pixels=answer).batch(index)[0], torch.from_numpy(binary).float())


def test_counts_in_images_stay_whole(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS)
    (x,) = read_data(tmp_path / "x.npy", pixels=False).batch(torch.arange(12))
    assert torch.equal(x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float())
    (x,) = read_data(save(tmp_path / "folder"), pixels=False).batch(torch.arange(12))
    assert torch.equal(x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (PIXELS, PIXELS.astype(np.int64)),
        (PIXELS, PIXELS.astype(np.float32)),
        (PIXELS.astype(np.int16), PIXELS),
        (PIXELS, PIXELS % 2),
    ],
)
def test_training_and_test_data_of_different_scale_are_refused(tmp_path, train, test):
    np.savez(tmp_path / "x.npz", x_train=train, x_test=test)
    with pytest.raises(DataError, match="x.npz: expected training and test data of one scale"):
        read_splits(tmp_path / "x.npz")
    first, held = read_splits(tmp_path / "x.npz", pixels=False)
    assert torch.equal(held.batch(torch.arange(12))[0], torch.from_numpy(test).permute(0, 3, 1, 2).float())
    np.savez(tmp_path / "x.npz", x_train=PIXELS, x_test=PIXELS / 255)
    first, held = read_splits(tmp_path / "x.npz")
    torch.testing.assert_close(first.to("cpu", torch.float64).batch(torch.arange(12)), held.batch(torch.arange(12)))


class OfOne(Dataset):
    """A PIL image."""

    def __init__(self, image):
        self.image = image

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.image


def test_a_pil_image_is_the_same_from_a_data_set_and_from_a_folder(tmp_path):
    grey = PIXELS[0, :, :, 0]
    turned = Image.fromarray(PIXELS[0, :6])
    turned.getexif()[0x0112] = 6
    palette = Image.fromarray(PIXELS[0]).quantize(8)
    palette.info["transparency"] = 0
    cases = {
        "grey": Image.fromarray(grey),
        "colour": Image.fromarray(PIXELS[0]),
        "seen through": Image.fromarray(np.dstack([PIXELS[0], grey]), "RGBA"),
        "grey, seen through": Image.fromarray(np.dstack([grey, PIXELS[1, :, :, 0]]), "LA"),
        "palette": palette,
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
        "16 bits, dark": Image.fromarray(grey.astype(np.uint16)),
        "black and white": Image.fromarray(grey > 100),
        "turned": turned,
    }
    for name, image in cases.items():
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png", exif=image.getexif())
        of_folder, of_dataset = read_data(tmp_path / name).x, as_data(OfOne(image)).x
        assert torch.equal(of_dataset.expand(-1, 3, -1, -1), of_folder.expand(-1, 3, -1, -1)), name
    assert torch.equal(as_data(OfOne(cases["16 bits"])).x[0, 0], torch.from_numpy(grey))
    assert as_data(OfOne(cases["16 bits, dark"])).x.max() == 1
    assert as_data(OfOne(cases["turned"])).event_shape == (3, 8, 6)
    unit = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert as_data(OfOne(Image.fromarray(unit))).x.max() == 255
    with pytest.raises(DataError, match="grey levels from 0 to at most 65535, found -1 to"):
        as_data(OfOne(Image.fromarray(unit - 1)))


def test_splits_that_do_not_fit(tmp_path):
    for name, shape in (("a", (5, 3)), ("b", (5, 4)), ("one", (1, 3))):
        np.save(tmp_path / f"{name}.npy", np.zeros(shape))
    with pytest.raises(DataError, match="of one shape, found .* Make them equal"):
        read_splits(tmp_path / "a.npy", tmp_path / "b.npy")
    with pytest.raises(DataError, match="at least two"):
        read_splits(tmp_path / "one.npy")
    save(tmp_path / "parted" / "train" / "cat")
    save(tmp_path / "parted" / "test" / "dog")
    with pytest.raises(DataError, match="the same labels in training and test data, found cat and dog"):
        read_splits(tmp_path / "parted")


def test_arrays_of_images_have_their_channels_first(tmp_path):
    for x, shape in (
        (PIXELS, (3, 8, 8)),
        (2 * PIXELS / 255 - 1, (3, 8, 8)),
        (PIXELS[..., 0], (1, 8, 8)),
        (PIXELS[..., :1], (1, 8, 8)),
        (np.moveaxis(PIXELS, 3, 1), (3, 8, 8)),
        ((PIXELS[..., 0] > 100).astype(np.uint8), (1, 8, 8)),
        (PIXELS[..., 0] - 300.0, (8, 8)),
    ):
        np.save(tmp_path / "x.npy", x)
        assert read_data(tmp_path / "x.npy").event_shape == shape
    np.save(tmp_path / "x.npy", (PIXELS > 100).astype(np.uint8))
    (x,) = read_data(tmp_path / "x.npy").batch(torch.arange(12))
    assert x.unique().tolist() == [0, 1]
    np.save(tmp_path / "x.npy", np.arange(12).reshape(6, 2))
    data = read_data(tmp_path / "x.npy")
    assert (data.x.dtype, data.note) == (torch.int64, "array x of shape (6, 2), whole numbers (int64)")


def test_links_give_each_file_once(tmp_path):
    flat, nested = save(tmp_path / "flat", PIXELS[:5]), tmp_path / "nested"
    for label in ("a", "b"):
        save(nested / label / "deep", PIXELS[:3])
    (flat / "self").symlink_to(".")
    (flat / "again.png").symlink_to("00.png")
    (nested / "self").symlink_to(".")
    (nested / "c").symlink_to("a")
    (nested / "a" / "up").symlink_to("..")
    (nested / "a" / "other").symlink_to("../b")
    (nested / "b" / "one").symlink_to("two")
    (nested / "b" / "two").symlink_to("one")
    (nested / "notes.txt").write_text("no picture")
    assert (len(read_data(flat)), read_data(flat).note) == (5, "5 colour images of 8 x 8 pixels")
    data = read_data(nested)
    assert data.note == "6 colour images of 8 x 8 pixels; 2 labels: a, b; 1 other file left out"
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    outside = save(tmp_path / "outside", PIXELS[:2])
    (nested / "d").symlink_to(outside)  # a link to images elsewhere is as good as a folder
    assert read_data(nested).classes == ("a", "b", "d")


@pytest.mark.parametrize("way", ["path", "mapped", "a part", "copy on write"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64])
def test_arrays_on_the_disk_stay_there(tmp_path, way, dtype):
    values = np.random.default_rng(0).integers(0, 100, (1000, 30, 40)).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    tracemalloc.start()  # NumPy's memory, to which a mapped file does not belong
    if way == "path":
        data = read_data(tmp_path / "x.npy")
    else:
        mapped = np.load(tmp_path / "x.npy", mmap_mode="c" if way == "copy on write" else "r")
        data = as_data(mapped[7:] if way == "a part" else mapped)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values.nbytes / 5
    part = values[7:] if way == "a part" else values
    assert np.array_equal(data.x.numpy().reshape(part.shape), part)
    data.to("cpu", torch.float32).x.zero_()  # a copy of the page, which the file never sees
    assert np.array_equal(np.load(tmp_path / "x.npy"), values)


def test_what_is_held_in_memory_is_said_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(own, "_LARGE", 10_000)
    x = np.random.default_rng(0).normal(size=(100, 20)).astype(np.float32)
    np.save(tmp_path / "small.npy", x[:10])
    np.save(tmp_path / "x.npy", x.repeat(2, 0))
    np.save(tmp_path / "other.npy", x.repeat(2, 0).astype(">f4"))
    read_splits(tmp_path / "x.npy", tmp_path / "small.npy")  # both as they lie on the disk
    with pytest.warns(LargeDataWarning, match=r"0.0 GB of memory are used for copies of the training .*x.npy.*--test-data"):
        read_splits(tmp_path / "x.npy")
    with pytest.warns(LargeDataWarning, match="a copy of .*other.npy as float32 in C order"):
        read_data(tmp_path / "other.npy")
    np.savez(tmp_path / "x.npz", x=x.repeat(2, 0))
    with pytest.warns(LargeDataWarning, match=r"the arrays of .*x.npz. A .npy file is memory-mapped"):
        read_data(tmp_path / "x.npz")
    np.save(tmp_path / "images.npy", PIXELS.repeat(9, 0))
    with pytest.warns(LargeDataWarning, match=r"a channels-first copy of .*. Save it in that form: np.moveaxis\(x, -1, 1\)"):
        read_data(tmp_path / "images.npy")


def test_four_channels_last_are_asked_for(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 4), dtype=np.uint8)
    for values in (x, x / 255, x.astype(int)):
        np.save(tmp_path / "x.npy", values)
        for pixels in (None, True, False) if values is x else (None,):
            with pytest.raises(
                DataError, match=r"found 4 channels in the last dimension of \(100, 16, 16, 4\). Drop an alpha channel"
            ):
                read_data(tmp_path / "x.npy", pixels=pixels)
    np.save(tmp_path / "x.npy", np.moveaxis(x, -1, 1))
    assert read_data(tmp_path / "x.npy", pixels=True).event_shape == (4, 16, 16)
    with pytest.raises(DataError, match=r"Pass pixels=True .* channels first: x.permute\(0, 3, 1, 2\)"):
        as_data(x)


def test_what_is_scaled_is_said(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS[..., 0])
    assert read_data(tmp_path / "x.npy").note == "array x of shape (12, 8, 8), pixels of 0 to 255, scaled by 1/255"
    assert "scaled" not in read_data(tmp_path / "x.npy", pixels=False).note


@pytest.mark.parametrize("counts", [(500, 300, 200), (997, 2, 1), (1,) * 40, (13, 29)])
def test_each_label_has_its_share_of_the_held_out_tenth(tmp_path, counts):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    x = np.arange(len(y), dtype=np.float32)[:, None]
    np.savez(tmp_path / "x.npz", x=x, y=y)
    train, test = read_splits(tmp_path / "x.npz")
    assert len(test) == max(1, round(0.1 * len(y)))
    held = torch.bincount(test.labels, minlength=len(counts))
    assert (held - len(test) / len(y) * torch.tensor(counts)).abs().max() < 1
    assert torch.equal(torch.cat([train.x, test.x]).sort(0).values, torch.from_numpy(x))
    assert all(np.array_equal(part.labels, y[part.x[:, 0].long()]) for part in (train, test))
    assert "the same share of each label" in test.note


def test_unlabelled_data_are_parted_as_before(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20.0)[:, None])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert read_splits(tmp_path / "x.npy")[1].x[:, 0].tolist() == sorted(order[:2].tolist())


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.csv"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for read in (read_data, read_splits):
        with pytest.raises(DataError, match=f"{name}: expected a file, found a pipe or device"):
            read(tmp_path / name)


def test_members_that_are_no_arrays_are_not_there(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", "no array")
    with pytest.raises(DataError, match="x.npz: expected an array called x, .* found none"):
        read_data(tmp_path / "x.npz")


def test_upper_case_suffixes(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((6, 2)))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    (tmp_path / "B.CSV").write_text("a,b\n1.5,2\n3,4\n")
    assert read_data(tmp_path / "A.NPY").x.shape == (6, 2)
    assert read_data(tmp_path / "B.CSV").columns == ("a", "b")
    for fraction in (0.0, 1.0, math.nan):
        with pytest.raises(DataError, match="fraction: expected a number between 0 and 1"):
            read_splits(tmp_path / "A.NPY", fraction=fraction)
