"""Data sets by name: the MNIST family (through torchvision) and scikit-learn's digits.

Files of the MNIST family are verified by SHA-256 before they are parsed, because torchvision's parser silently accepts
flipped bits and swapped files.
"""

import gzip
import hashlib
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from pyro_vae.data.dataset import Data, DataError

__all__ = ["DATASETS", "DatasetFallbackWarning", "load_data"]

DATASETS = ("auto", "mnist", "fashion-mnist", "kmnist", "digits")


class MissingDataError(DataError):
    """Files that do not exist and could not be downloaded."""


class DatasetFallbackWarning(UserWarning):
    """MNIST is not available, and scikit-learn's digits replace it."""


def load_data(name: str = "auto", *, data_dir: str | Path | None = None, binarization: str = "none") -> tuple[Data, Data]:
    """Load a data set by name.

    Args:
        name: ``"mnist"``, ``"fashion-mnist"``, ``"kmnist"`` (60,000 + 10,000 images of 1 x 28 x 28, uint8); ``"digits"``
            (scikit-learn's 8 x 8 digits, the first 1,500 for training and the last 297 for test; needs no files);
            ``"auto"``: MNIST if its files exist or can be downloaded, else digits with a :class:`DatasetFallbackWarning`.
        data_dir: folder that contains ``MNIST/raw`` etc., torchvision's ``root``; default: the environment variable
            ``PYRO_VAE_DATA``, else ``~/.cache/pyro_vae``. Missing files are downloaded there.
        binarization: see :class:`Data`.

    Returns:
        (train, test).

    Raises:
        DataError: the name is unknown, or files are missing (and cannot be downloaded), truncated, compressed, swapped or
            damaged. ``"auto"`` falls back to digits only if MNIST is missing, never if it is damaged.
    """
    if name not in DATASETS:
        raise DataError(f"data set must be one of {', '.join(DATASETS)}; found {name!r}.")
    if name == "digits":
        return _load_digits(binarization)
    root = Path(data_dir or os.environ.get("PYRO_VAE_DATA") or Path.home() / ".cache" / "pyro_vae").expanduser()
    if name != "auto":
        return _load_mnist_family(name, root, binarization)
    try:
        return _load_mnist_family("mnist", root, binarization)
    except MissingDataError as error:
        warnings.warn(
            f"NOT MNIST: using scikit-learn's 1,797 digits of 8 x 8 pixels instead. {error}",
            DatasetFallbackWarning,
            stacklevel=2,
        )
        return _load_digits(binarization)


def _load_digits(binarization: str) -> tuple[Data, Data]:
    from sklearn.datasets import load_digits  # heavy, and only needed here

    digits = load_digits()
    x = torch.from_numpy(digits.images).unsqueeze(1).to(torch.get_default_dtype()) / 16  # (1797, 1, 8, 8), 17 grey levels
    labels = torch.from_numpy(digits.target).long()
    split = 1500
    return (
        Data(x[:split], labels[:split], "digits", binarization),
        Data(x[split:], labels[split:], "digits", binarization),
    )


_SIZES = {
    "train-images-idx3-ubyte": 47_040_016,
    "train-labels-idx1-ubyte": 60_008,
    "t10k-images-idx3-ubyte": 7_840_016,
    "t10k-labels-idx1-ubyte": 10_008,
}
# SHA-256 of the plain files, in the order of _SIZES.
_PLAIN = {
    "MNIST": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
# SHA-256 of the .gz files that the publishers distribute and torchvision keeps beside the plain ones.
_GZIP = {
    "FashionMNIST": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    "KMNIST": (
        "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
        "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
        "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
        "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
    ),
}
_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's name and folder


def _load_mnist_family(name: str, root: Path, binarization: str) -> tuple[Data, Data]:
    class_name = _CLASS[name]
    folder = root / class_name / "raw"
    missing = [file for file in _SIZES if not (folder / file).exists()]
    if missing:
        _download(class_name, root, missing)
    _verify(class_name, folder)
    mnist = _torchvision_mnist(folder)
    # Not torchvision's MNIST class, which would prefer a "processed" folder that is not verified.
    images = {split: mnist.read_image_file(str(folder / f"{split}-images-idx3-ubyte")) for split in ("train", "t10k")}
    labels = {split: mnist.read_label_file(str(folder / f"{split}-labels-idx1-ubyte")) for split in ("train", "t10k")}
    train, test = (Data(images[s].unsqueeze(1), labels[s], name, binarization) for s in ("train", "t10k"))
    return train, test


def _torchvision_mnist(folder: Path) -> Any:
    try:
        from torchvision.datasets import mnist  # heavy, and only needed here
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise DataError(
            f"torchvision, which reads {folder}, cannot be imported ({error}). "
            "Install a matching pair: pip install --upgrade torch torchvision."
        ) from error
    return mnist


def _download(class_name: str, root: Path, missing: list[str]) -> None:
    folder = root / class_name / "raw"
    mnist = _torchvision_mnist(folder)
    hints = [f"Run gunzip on {file}.gz in that folder." for file in missing if (folder / f"{file}.gz").exists()]
    if root.name in (class_name, "raw"):
        hints.append(f"--data-dir takes the parent folder of {class_name}.")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none, and would hang on a network that drops packets
    try:
        getattr(mnist, class_name)(str(root), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise MissingDataError(
            f"{class_name}: missing in {folder}: {', '.join(missing)}; and the download failed "
            f"({' '.join(str(error).split())}). Copy the files there, or pass the folder that contains {class_name}/raw "
            f"as --data-dir or in the environment variable PYRO_VAE_DATA. {' '.join(hints)}".rstrip()
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _verify(class_name: str, folder: Path) -> None:
    """Verify the SHA-256 of the four uncompressed files; the error distinguishes swapped, compressed, truncated, damaged."""
    digests = {file: _sha256(folder / file) for file in _SIZES}
    if class_name in _PLAIN:
        expected = dict(zip(_SIZES, _PLAIN[class_name], strict=True))
    else:
        expected = {file: _from_gzip(folder / f"{file}.gz", gz) for file, gz in zip(_SIZES, _GZIP[class_name], strict=True)}
    owner: Mapping[str, str] = {digest: file for file, digest in expected.items()}
    again = f"delete {folder} to download it again, or copy the original file there"
    for file, size in _SIZES.items():
        path, digest = folder / file, digests[file]
        if digest == expected[file]:
            continue
        found = path.stat().st_size
        with path.open("rb") as stream:
            compressed = stream.read(2) == b"\x1f\x8b"
        if digest in owner:
            what = f"swapped: it has the content of {owner[digest]}"
            raise DataError(f"{path}: {what}. Rename the files, or {again}.")
        if compressed:
            raise DataError(f"{path}: still compressed by gzip. Rename it to {file}.gz and run gunzip on it.")
        if found != size:
            kind = "truncated" if found < size else "too long"
            raise DataError(f"{path}: {kind}: expected {size:,} bytes, found {found:,}; {again}.")
        raise DataError(f"{path}: damaged: expected SHA-256 {expected[file]}, found {digest}; {again}.")


def _from_gzip(path: Path, expected: str) -> str:
    """SHA-256 of the decompressed content of a .gz file, which is itself verified by SHA-256."""
    if not path.exists():
        raise DataError(f"{path}: missing, and {path.stem} cannot be verified without it. Copy the original there.")
    found = _sha256(path)
    if found != expected:
        raise DataError(f"{path}: damaged: expected SHA-256 {expected}, found {found}. Delete {path.parent}.")
    return _sha256(path, gzip.open)


def _sha256(path: Path, opener: Callable[[Path, str], Any] = open) -> str:
    try:
        with opener(path, "rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
