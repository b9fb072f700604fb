"""Your own data -> ``Data``: arrays, tensors, tables, torch data sets, .npy, .npz and .csv files, folders of images."""

import mmap
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pyro_vae.data.columns import column_names
from pyro_vae.data.dataset import Data, DataError
from pyro_vae.data.held_out import held_out
from pyro_vae.data.images import as_seen, channels_first, read_folder
from pyro_vae.data.tables import is_frame, of_frame, read_csv

__all__ = ["DataLike", "LargeDataWarning", "as_batch", "as_data", "read_data", "read_splits"]

Array = Tensor | np.ndarray[Any, Any]
DataLike = Data | Array | Sequence[Array] | Mapping[str, Array] | Dataset[Any] | str | Path
"""The types of data that ``fit``, ``evaluate`` and ``log_marginal`` accept; a sequence is a tuple or a list."""

_FILES = (".npy", ".npz", ".csv")
_X, _Y = ("x", "X", "images", "data", "arr_0"), ("y", "labels", "label", "targets", "target")


def as_data(x: DataLike) -> Data:
    """Convert data to :class:`~pyro_vae.data.dataset.Data`, sharing memory where possible.

    Args:
        x: :class:`~pyro_vae.data.dataset.Data`; a tensor or NumPy array ``(N, *event_shape)``, which stays on the disk if it
            is memory-mapped (``np.load(..., mmap_mode="r")``); a data frame of numbers, of pandas, say; a tuple or list of
            tensors and arrays of one length, ``(x, y)`` or ``(x, y1, y2, ...)``, in the order of a batch; a mapping from
            name to array, the first of which is x; a map-style :class:`torch.utils.data.Dataset` that yields ``x`` or
            ``(x, label)``, which is read once, as a whole; or a path, see :func:`read_data`.

    Raises:
        DataError: x is of another type, has an array that cannot become a tensor, a cell of a data frame is not a number,
            the arrays differ in length, or the observations differ in shape.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = as_data(TensorDataset(torch.rand(5, 1, 8, 8), torch.tensor([3, 1, 4, 1, 5])))
        >>> data.x.shape, data.labels
        (torch.Size([5, 1, 8, 8]), tensor([3, 1, 4, 1, 5]))
        >>> as_data((torch.rand(5, 8), torch.arange(5))).inputs
        ('x', 'y')
    """
    if isinstance(x, Data):
        return x
    if isinstance(x, str | Path):
        return read_data(x)
    if isinstance(x, Dataset):
        return _of_dataset(x)
    if is_frame(x):
        values, names = of_frame(x)
        return Data(_tensor(values), name="table", columns=names)
    if isinstance(x, Mapping):
        return _of_parts(list(x), list(x.values()))
    if isinstance(x, tuple | list) and x and all(isinstance(part, Tensor | np.ndarray) for part in x):
        return _of_tuple(x)
    if isinstance(x, tuple):
        raise DataError(f"expected one data set, found a tuple. {_SEPARATELY}")
    return Data(_tensor(x))


_SEPARATELY = "Pass training and test data separately: train, test = load_data(...)."


def _of_tuple(parts: Sequence[Any]) -> Data:
    lengths = [len(part) if part.ndim else 0 for part in parts]
    if len(set(lengths)) > 1:
        raise DataError(
            f"expected one data set, or tensors of one length, (x, y); found a {type(parts).__name__} of lengths "
            f"{', '.join(map(str, lengths))}. {_SEPARATELY}"
        )
    if len(parts) > 2 and len({tuple(part.shape) for part in parts}) == 1:  # a list of images is not (x, y1, y2, ...)
        raise DataError(
            f"expected (x, y, ...), found a {type(parts).__name__} of {len(parts):,} tensors of one shape. Stack "
            "observations: torch.stack(...); or give the tensors names: {'x': ..., 'y': ...}."
        )
    names = ["y"] if len(parts) == 2 else [f"y{number}" for number in range(1, len(parts))]
    return _of_parts(["x", *names], parts)


def _of_parts(names: Sequence[str], parts: Sequence[Any]) -> Data:
    """``Data`` of named tensors and arrays; the first is x, whatever its name."""
    if not parts:
        raise DataError("expected at least x, found an empty mapping.")
    tensors = dict(zip(names[1:], map(_tensor, parts[1:]), strict=True))
    labels = tensors.pop("labels", None)
    return Data(_tensor(parts[0]), labels, tensors=tensors, inputs=("x", *names[1:]))


def _tensor(x: Any) -> Tensor:
    """A dense tensor unchanged; an array as a tensor that shares its memory where possible."""
    if isinstance(x, np.ma.MaskedArray):
        raise DataError("expected an array without a mask, found a masked array. Fill the masked values: x.filled(...).")
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "fiub" or x.dtype.itemsize > 8:
            raise DataError(f"expected an array of numbers, found {x.dtype}. Convert: x.astype('float32').")
        x = _private(x) if isinstance(x, np.memmap) else x
        native = x.astype(x.dtype.newbyteorder("="), copy=not x.flags.writeable)  # torch warns of read-only memory
        result = np.ascontiguousarray(_signed(native))
        if isinstance(x, np.memmap) and not np.may_share_memory(x, result):
            _warn_of_size(result.nbytes, f"a copy of {x.filename} as {result.dtype} in C order", "Save it in that form")
        x = torch.from_numpy(result)
    if not isinstance(x, Tensor):
        raise DataError(f"expected Data, a tensor or a NumPy array, found {type(x).__name__}. Stack it: torch.stack(...).")
    if x.layout != torch.strided or x.is_meta:
        raise DataError(f"expected a dense tensor with values, found {x.layout} on {x.device}: x.to_dense().")
    return x


def _private(x: Any) -> np.ndarray[Any, Any]:
    """The array mapped copy-on-write, since a tensor is writable; the file never changes."""
    if x.flags.writeable or x.filename is None or not x.flags.c_contiguous or x.size == 0:
        return x
    start = x.ctypes.data - np.frombuffer(x._mmap, np.uint8).ctypes.data  # x may be a slice of the mapped array
    place = x.offset - x.offset % mmap.ALLOCATIONGRANULARITY + start
    return np.memmap(x.filename, x.dtype, "c", place, x.shape)


class LargeDataWarning(UserWarning):
    """Large data are copied into memory; the message says why, and how to avoid it."""


_LARGE = 2**28  # bytes


def _warn_of_size(size: int, what: str, remedy: str) -> None:
    if size >= _LARGE:
        warnings.warn(f"{size / 1e9:.1f} GB of memory are used for {what}. {remedy}.", LargeDataWarning, stacklevel=2)


def _signed(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Unsigned integers wider than uint8, with which torch cannot compute, as signed ones; others unchanged."""
    if x.dtype.kind != "u" or x.dtype.itemsize == 1:
        return x
    if x.dtype.itemsize == 8 and x.size and x.max() > np.iinfo(np.int64).max:
        raise DataError(f"expected whole numbers below 2^63, found {x.max()}. Convert: x.astype('float64').")
    return x.astype(np.int32 if x.dtype.itemsize == 2 else np.int64)


def as_batch(data: Any) -> tuple[Tensor, ...]:
    """Data as one batch: a tensor ``x`` as ``(x,)``; a tuple of tensors unchanged; all else by :func:`as_data`.

    Raises:
        DataError: see :func:`as_data`; or the tensors differ in length.
    """
    if torch.is_tensor(data):
        return (data,)
    if isinstance(data, tuple) and data and all(map(torch.is_tensor, data)):
        if len({t.shape[:1] for t in data}) > 1 or data[0].dim() == 0:
            found = ", ".join(str(tuple(t.shape)) for t in data)
            raise DataError(f"expected tensors of one length, found shapes {found}.")
        return data
    held = as_data(data)
    return held.batch(torch.arange(len(held), device=held.x.device))


def _of_dataset(dataset: Any) -> Data:
    name = type(dataset).__name__
    try:
        size = len(dataset)
    except TypeError as error:
        raise DataError(
            f"{name}: expected a map-style data set with a length, found an iterable one. Read it into a tensor first."
        ) from error
    images: list[Tensor] = []
    labels: list[int] = []
    for index in range(size):
        item = dataset[index]
        x, *rest = item if isinstance(item, tuple | list) else (item,)
        images.append(_observation(x, f"{name}[{index}]"))
        if rest and isinstance(rest[0], int | np.integer | Tensor):
            label = torch.as_tensor(rest[0])
            if label.dim() == 0 and not label.is_floating_point():
                labels.append(int(label))
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        found = f"{shapes[0]}, {shapes[1]}" + (", ..." if len(shapes) > 2 else "")
        raise DataError(f"{name}: expected observations of one shape, found {found}. Resize them in its transform.")
    if not images:
        raise DataError(f"{name}: expected at least one observation, found none.")
    classes = getattr(dataset, "classes", ())
    return Data(
        torch.stack(images),
        torch.tensor(labels) if len(labels) == size else None,
        name,
        classes=tuple(map(str, classes)) if isinstance(classes, list | tuple) else (),
    )


def _observation(x: Any, name: str) -> Tensor:
    """A tensor unchanged; an array, sharing its memory; a PIL image as ``(channels, height, width)``, uint8."""
    if torch.is_tensor(x):
        return x
    if isinstance(x, np.ndarray | np.generic | float | int):
        return torch.as_tensor(x)
    from PIL import Image  # torchvision brings it along

    if isinstance(x, Image.Image):
        return channels_first(as_seen(x))
    raise DataError(f"{name}: expected x or (x, label), x a tensor, an array or an image; found {type(x).__name__}.")


def read_data(path: str | Path, *, image_size: int | None = None, pixels: bool | None = None) -> Data:
    """Observations from a file or folder; ``note`` of the result says how they were read.

    Args:
        path: a ``.npy`` file with an array ``(N, *event_shape)``, memory-mapped; a ``.npz`` file with such an array,
            called x, images or data, and optionally labels, called y, labels or targets; a ``.csv`` file with a table of
            numbers, with or without a header; or a folder of images, or of subfolders of images, one for each label (as for
            torchvision's ``ImageFolder``); links are followed, and no file is read twice. Arrays of images ``(N, H, W)``
            and ``(N, H, W, channels)`` become ``(N, channels, H, W)``; image files with equal channels become grey.
        image_size: height and width of the images: the shorter side is resized to it, and the centre cropped. None: arrays
            are not resized, nor are image files if all have one size of at most 128 x 128; other files to 32 x 32.
        pixels: whether uint8 is pixels, scaled by 1/255, or whole numbers; see :class:`~pyro_vae.data.dataset.Data`. uint8
            with values 0 and 1 alone is black and white, unless pixels is False.

    Raises:
        DataError: the path does not exist or cannot be read, there are no observations, or uint8 may be pixels or counts;
            the message names the file.
    """
    return _read(Path(path).expanduser(), image_size, pixels)


def _read(path: Path, image_size: int | None, pixels: bool | None, like: Sequence[int] | None = None) -> Data:
    """As :func:`read_data`; ``like`` is the height and width of images if image_size is None."""
    if path.is_dir():
        return read_folder(path, like if image_size is None else (image_size, image_size), pixels)
    if path.suffix.lower() == ".csv" and path.is_file():
        return _read_table(path, pixels)
    arrays = _read_arrays(path)
    return _of_arrays(path, arrays, _called(_X, arrays), _called(_Y, arrays), image_size, pixels)


def _read_table(path: Path, pixels: bool | None) -> Data:
    try:
        values, columns = read_csv(path)
        x, pixels, whole = _as_numbers(values, pixels)
        names = column_names(range(len(columns)), columns) or "without names"
        note = f"table of shape {values.shape}, columns {names}{whole}"
        return Data(x, name=path.stem, note=note, columns=columns, pixels=pixels)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_splits(
    path: str | Path,
    test: str | Path | None = None,
    *,
    image_size: int | None = None,
    fraction: float = 0.1,
    pixels: bool | None = None,
) -> tuple[Data, Data]:
    """Training and test data from files or folders; ``note`` of each says how they were read and split.

    Args:
        path: as for :func:`read_data`; or a folder with subfolders ``train`` and ``test``, or a ``.npz`` file with
            ``x_train`` and ``x_test``.
        test: separate test data, as for :func:`read_data`.
        image_size: as for :func:`read_data`; the test images are resized to the size of the training images.
        fraction: of the observations that is held out as test set, if there is none: a random subset, always the same one,
            stratified by label where there are labels.
        pixels: as for :func:`read_data`.

    Raises:
        DataError: see :func:`read_data`; or there is a single observation, which cannot be split; or training and test
            data differ in shape, scale, columns or labels.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".npz" and test is None and {"x_train", "x_test"} <= (arrays := _read_arrays(path)).keys():
        names = [(f"x_{part}", f"y_{part}" if f"y_{part}" in arrays else None) for part in ("train", "test")]
        first, held = (_of_arrays(path, arrays, x_name, y_name, image_size, pixels) for x_name, y_name in names)
    else:
        folders = {part.name.lower(): part for part in path.iterdir() if part.is_dir()} if path.is_dir() else {}
        parted = test is None and {"train", "test"} <= folders.keys()
        first = _read(folders["train"] if parted else path, image_size, pixels)
        if test is None and not parted:
            copies = f"copies of the training and test rows of {path}"
            _warn_of_size(first.x.nbytes, copies, "With a separate test file (--test-data), a .npy file is memory-mapped")
            return held_out(path, first, fraction)
        place = folders["test"] if test is None else Path(test).expanduser()
        held = _read(place, image_size, pixels, first.event_shape[-2:])
    first, held = (replace(data, name=path.stem or str(path)) for data in (first, held))
    if held.event_shape != first.event_shape:
        found = f"{tuple(first.event_shape)} and {tuple(held.event_shape)}"
        raise DataError(f"{path}: expected training and test data of one shape, found {found}. Make them equal.")
    both = first.scaled and held.scaled
    if (first.scaled or held.scaled) and (first.are_pixels != held.are_pixels or (both and first.pixels != held.pixels)):
        found = f"{first.note}, {first.x.dtype}; and {held.note}, {held.x.dtype}"
        raise DataError(
            f"{path}: expected training and test data of one scale, 0 to 255 in uint8, 0 and 1, or any other; found "
            f"{found}. Save both in the same scale, or pass pixels=False (--pixels no) to leave whole numbers unscaled."
        )
    if held.columns != first.columns:
        found = f"{', '.join(first.columns[:5]) or 'none'} and {', '.join(held.columns[:5]) or 'none'}"
        raise DataError(f"{path}: expected the same columns in training and test data, in the same order, found {found}.")
    if held.classes != first.classes:
        found = f"{', '.join(first.classes) or 'none'} and {', '.join(held.classes) or 'none'}"
        raise DataError(f"{path}: expected the same labels in training and test data, found {found}.")
    return first, held


def _called(names: Sequence[str], arrays: dict[str, Any]) -> str | None:
    return next((name for name in names if name in arrays), None)


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a .npy file, as ``x``, or of a .npz file."""
    if path.suffix.lower() in _FILES and path.exists() and not path.is_file():  # reading a named pipe would block
        raise DataError(f"{path}: expected a file, found a pipe or device. Save the data as a file first.")
    if path.suffix.lower() not in (".npy", ".npz"):
        kind = "missing" if not path.exists() else "neither a folder of images nor a .npy, .npz or .csv file"
        raise DataError(f"{path}: {kind}. Name a folder of images, an array saved by numpy.save or numpy.savez, or a table.")
    try:
        # Mapped copy-on-write ("c"); allow_pickle=False: code in a file is not run.
        content = np.load(path, mmap_mode="c" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"x": content}
        with content:
            size = sum(info.file_size for info in content.zip.infolist())
            _warn_of_size(size, f"the arrays of {path}", "A .npy file is memory-mapped")
            return {name: value for name, value in content.items() if isinstance(value, np.ndarray)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read ({reason}). Save a plain array of numbers by numpy.save.") from error


def _of_arrays(
    path: Path, arrays: dict[str, Any], x_name: str | None, y_name: str | None, size: int | None, pixels: bool | None
) -> Data:
    if x_name is None:
        raise DataError(f"{path}: expected an array called {', '.join(_X)}, found {', '.join(arrays) or 'none'}.")
    try:
        _check_channels(np.shape(arrays[x_name]))
        x, pixels, note = _as_numbers(arrays[x_name], pixels)
        classes: tuple[str, ...] = ()
        labels, note = None, f"array {x_name} of shape {tuple(x.shape)}{note}"
        if y_name is not None:
            labels, classes = _as_labels(arrays[y_name])
        if x.dim() == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
            _warn_of_size(x.nbytes, f"a channels-first copy of {path}", "Save it in that form: np.moveaxis(x, -1, 1)")
            x, note = x.permute(0, 3, 1, 2).contiguous(), f"{note}, channels last"
        data = Data(x, labels, path.stem, classes=classes, note=note, pixels=pixels)
        if x.dim() == 3 and data.are_pixels:
            data = replace(data, x=x.unsqueeze(1))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return data if size is None else replace(data.resize(size), note=f"{note}, made {size} x {size}")


def _check_channels(shape: Sequence[int]) -> None:
    if len(shape) == 4 and shape[-1] in (2, 4) and shape[1] > 4:
        raise DataError(
            f"expected images of 1 or 3 channels, or channels first, found {shape[-1]} channels in the last dimension of "
            f"{tuple(shape)}. Drop an alpha channel, x[..., :-1], or put channels first, np.moveaxis(x, -1, 1)."
        )


def _as_numbers(values: np.ndarray[Any, Any], pixels: bool | None) -> tuple[Tensor, bool | None, str]:
    """A tensor for ``Data``, its ``pixels``, and a note about both."""
    if values.dtype == np.uint8 and pixels is not False and values.size and values.max() == 1:  # else 1 would become 1/255
        return torch.from_numpy(values * np.uint8(255)), True, ", 0 and 1"
    x = _tensor(values)
    if x.is_floating_point():
        return x, pixels, ""
    if x.dtype == torch.uint8 and pixels is not False:
        return x, pixels, ", pixels of 0 to 255, scaled by 1/255"
    return x, pixels, f", whole numbers ({values.dtype})"


def _as_labels(y: np.ndarray[Any, Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Whole numbers unchanged; other values as indices into their sorted unique values, which are the classes."""
    y = y.reshape(len(y), -1)[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        raise DataError(f"expected labels of shape (N,), found {y.shape}.")
    if y.dtype.kind in "iub":
        return torch.from_numpy(y.astype(np.int64)), ()
    values, index = np.unique(y, return_inverse=True)
    if len(values) > 1000:
        raise DataError(f"expected labels of at most 1,000 kinds, found {len(values):,}. Leave them out.")
    return torch.from_numpy(index.astype(np.int64)), tuple(map(str, values))
