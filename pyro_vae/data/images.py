"""Folders of images -> ``Data``; decoding of image files: orientation, transparency, bit depth."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.dataset import Data, DataError

__all__ = ["as_seen", "channels_first", "read_folder"]

_LARGEST = 128  # images up to this height and width, if all of one size, are not resized
_SIZE = 32  # height and width to which all others are resized
_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def read_folder(path: Path, size: Sequence[int] | None, pixels: bool | None) -> Data:
    files, labels, classes = _list_images(path)
    with ThreadPoolExecutor() as pool:
        kinds = sorted(set(pool.map(_size, files)))
        found = " to ".join(f"{height} x {width}" for height, width in sorted({kinds[0], kinds[-1]}))
        if size is None:
            size = kinds[0] if len(kinds) == 1 and max(kinds[0]) <= _LARGEST else (_SIZE, _SIZE)
        height, width = size
        x = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
        for place, image in zip(x, pool.map(lambda file: _read_image(file, (height, width)), files), strict=True):
            place.copy_(image)
    grey = torch.equal(x[:, 0], x[:, 1]) and torch.equal(x[:, 0], x[:, 2])
    made = "" if kinds == [(height, width)] else f", made {height} x {width}"
    note = f"{len(files):,} {'grey' if grey else 'colour'} images of {found} pixels{made}"
    if classes:
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        note += f"; {len(classes)} label{'s' if len(classes) > 1 else ''}: {some}"
    if others := sum(1 for _ in _files(path, {path.resolve()})) - len(files):
        note += f"; {others:,} other file{'s' if others > 1 else ''} left out"
    x = x[:, :1].clone() if grey else x
    return Data(x, labels, path.name or str(path), classes=classes, note=note, pixels=pixels)


def _list_images(path: Path) -> tuple[list[Path], Tensor | None, tuple[str, ...]]:
    def images(places: Iterator[Path]) -> list[Path]:
        return sorted(file for file in places if file.suffix.lower() in _SUFFIXES and not file.name.startswith("."))

    seen = {path.resolve()}  # so that no file is read twice through a symbolic link, nor a loop of links followed
    here = images(_files(path, seen, deep=False))
    of_class = {part.name: images(_files(part, seen)) for part in list(_folders(path, seen))}
    of_class = {name: files for name, files in of_class.items() if files}
    if here and of_class:
        raise DataError(
            f"{path}: expected images in the folder itself or in its subfolders, one for each label, found both. "
            "Move one kind away."
        )
    if here:
        return here, None, ()
    if not of_class:
        raise DataError(f"{path}: expected images ({', '.join(_SUFFIXES)}), in it or in its subfolders, found none.")
    files = [file for group in of_class.values() for file in group]
    labels = torch.tensor([label for label, group in enumerate(of_class.values()) for _ in group])
    return files, labels, tuple(of_class)


def _folders(path: Path, seen: set[Path]) -> Iterator[Path]:
    for part in sorted(path.iterdir()):
        if part.is_dir() and part.resolve() not in seen:
            seen.add(part.resolve())
            yield part


def _files(folder: Path, seen: set[Path], *, deep: bool = True) -> Iterator[Path]:
    """The files of a folder and, if ``deep``, of its subfolders, following links; each file once, and none of those seen."""
    for part in sorted(folder.iterdir()):
        try:
            place = part.resolve()
        except (OSError, RuntimeError):  # a loop of links
            continue
        if place not in seen and (part.is_file() or (deep and part.is_dir())):
            seen.add(place)
            yield from (part,) if part.is_file() else _files(part, seen)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Opens a PIL image; errors within are raised as a :class:`DataError`."""
    from PIL import Image  # torchvision brings it along

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as an image ({error}). Remove it or save it again.") from error


def _size(file: Path) -> tuple[int, int]:
    """(height, width) after the rotation that EXIF prescribes."""
    with _opened(file) as image:
        width, height = image.size
        rotated = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: by 90 degrees
        return (width, height) if rotated else (height, width)


def _read_image(file: Path, size: tuple[int, int]) -> Tensor:
    """``(3, height, width)``, uint8: resized, and cropped to the centre if its aspect ratio is another."""
    from PIL import Image, ImageOps

    with _opened(file) as opened:
        opened.draft("RGB", (2 * size[1], 2 * size[0]))  # decodes a JPEG at a lower resolution, which is faster
        image = as_seen(opened).convert("RGB")
        if image.size != size[::-1]:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
    return channels_first(image)


def as_seen(image: Any) -> Any:
    """A PIL image in 8 bits, grey (mode L) or colour (RGB), oriented by its EXIF tag and composited on white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_in_8_bits(np.asarray(image, dtype=np.float64), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB")


def _in_8_bits(values: np.ndarray[Any, Any], mode: str) -> np.ndarray[Any, Any]:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):
        raise DataError(f"expected an image of grey levels from 0 to at most 65535, found {low:g} to {high:g}")
    # Mode "I;16" has 16 bits; modes "I" and "F" do not fix the value of white.
    white = 65535 if mode.startswith("I;16") or high > 255 else 1 if mode == "F" and high <= 1 else 255
    return (values * (255 / white)).round().astype(np.uint8)


def channels_first(image: Any) -> Tensor:
    """An image of mode L or RGB as a tensor ``(channels, height, width)``, uint8."""
    pixels = np.asarray(image)
    return torch.from_numpy(pixels.copy()).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
