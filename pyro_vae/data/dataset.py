"""``Data``: named tensors with a common leading dimension, their batches, scaling and binarisation of pixels."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae._checks import few_values, whole_number
from pyro_vae.data.columns import column_names, moments, most_rounded, parts

__all__ = ["BINARIZATIONS", "Data", "DataError", "label_name"]

BINARIZATIONS = ("none", "threshold", "dynamic")


class DataError(ValueError):
    """Data that are missing, damaged or unsuitable; the message says which, and the remedy."""


_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
_COARSEST = 0.01  # the largest spacing of the batches' floating-point numbers, as a fraction of a standard deviation
_ROWS, _NUMBERS = 10_000, 2**23  # upper limits of a batch in check: glibc returns larger buffers to the system each time


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Tensors with a common leading dimension, stored once in their own dtype, and the names of those in a batch.

    Whole numbers are never rescaled silently. uint8 may be pixels or counts, and ``pixels`` decides: images, ``(N, H, W)``
    or ``(N, C, H, W)`` with C of 1 or 3, are pixels by default, which a batch scales by 1/255; for uint8 of any other shape
    ``pixels`` is required. All other whole numbers are counts or categories, and keep their values.

    Args:
        x: observations, ``(N, *event_shape)``, floating point or whole numbers. Batches of x are always floating point.
        labels: ``(N,)`` whole numbers, or None.
        name: of the data set, in results and errors.
        dtype: floating-point type of the batches; default: that of x, or torch's default type where x is whole numbers.
        binarization: of x: ``"none"``: values unchanged (grey); ``"threshold"``: 1 where a value is above 0.5, else 0;
            ``"dynamic"``: each value is redrawn as Bernoulli(value) in every batch (Salakhutdinov and Murray 2008).
        classes: names of the labels 0, 1, ..., if they have any.
        note: a description of how the data were read.
        tensors: further tensors by name, ``(N, ...)`` each, floating point or whole numbers. Whole numbers keep their type
            in a batch.
        inputs: names of the tensors of a batch, in order: ``"x"`` first, then any of ``"labels"`` and those in ``tensors``.
        pixels: whether x of uint8 is pixels, scaled by 1/255 (True), or whole numbers, unscaled (False); None: pixels, if x
            is images. For any other type False says that values in [0, 1] are no grey levels.
        columns: names of the columns of a table, if they have any.

    Raises:
        DataError: a tensor is empty or sparse, or of the wrong shape, length, type or device, or has NaN or infinite values;
            values to be binarised lie outside [0, 1]; uint8 may be pixels or counts, and ``pixels`` is None; or ``inputs``
            names a tensor that does not exist.

    Example:
        >>> images = torch.tensor([[[0, 255]], [[102, 51]]], dtype=torch.uint8)
        >>> data = Data(images, torch.tensor([3, 7]), inputs=("x", "labels"))
        >>> x, labels = data.batch(torch.tensor([1, 0]))
        >>> x.shape, labels
        (torch.Size([2, 1, 2]), tensor([7, 3]))
        >>> x[0]
        tensor([[0.4000, 0.2000]])
    """

    x: Tensor
    labels: Tensor | None = None
    name: str = "array"
    binarization: str = "none"
    dtype: torch.dtype | None = None
    classes: tuple[str, ...] = ()
    note: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("x",)
    pixels: bool | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_names()
        named = self._named()
        for name, value in named.items():
            if not torch.is_tensor(value):
                raise DataError(
                    f"{self.name}: expected {name} as a tensor, found {type(value).__name__}: torch.as_tensor(...)."
                )
            if value.layout != torch.strided or value.is_meta:
                raise DataError(
                    f"{self.name}: expected {name} as a dense tensor with values, found {value.layout} on {value.device}: "
                    f"{name}.to_dense()."
                )
        if any(value.requires_grad for value in named.values()):  # fit would add to their gradients
            object.__setattr__(self, "x", self.x.detach())
            object.__setattr__(self, "tensors", {name: value.detach() for name, value in self.tensors.items()})
            named = self._named()
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise DataError(f"{self.name}: dtype: expected a floating-point type, of the batches, found {self.dtype}.")
        if self.binarization not in BINARIZATIONS:
            raise DataError(f"binarization must be one of {', '.join(BINARIZATIONS)}; found {self.binarization!r}.")
        if self.x.dim() < 2 or self.x.numel() == 0:
            raise DataError(
                f"{self.name}: expected at least one observation, in an array of shape (N, *event_shape); "
                f"found shape {tuple(self.x.shape)}. A single observation needs a leading dimension: x[None]."
            )
        labels = self.labels
        if labels is not None and (labels.shape != self.x.shape[:1] or labels.dtype not in _WHOLE):
            found = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise DataError(f"{self.name}: expected {len(self)} labels, whole numbers, found {found}.")
        for name, value in named.items():
            self._check_values(name, value)
        self._check_pixels()
        names = self.columns if isinstance(self.columns, list | tuple) else (None,)
        if not all(isinstance(name, str) for name in names) or (names and (len(names),) != tuple(self.event_shape)):
            raise DataError(
                f"{self.name}: expected a name for each column of a table, found {self.columns!s:.80} for observations of "
                f"shape {tuple(self.event_shape)}."
            )
        object.__setattr__(self, "columns", tuple(names))
        if self.binarization != "none" and not self.scaled:
            low, high = self.x.min().item(), self.x.max().item()
            if not (low >= 0 and high <= 1):
                raise DataError(
                    f"{self.name}: binarization {self.binarization!r} needs values in [0, 1], found {low:g} to {high:g}. "
                    "Scale them first."
                )

    def _check_names(self) -> None:
        if not isinstance(self.tensors, Mapping):
            found = type(self.tensors).__name__
            raise DataError(f"{self.name}: expected tensors as a mapping from name to tensor, found {found}.")
        object.__setattr__(self, "tensors", dict(self.tensors))  # a copy: the caller may change the mapping later
        for name in self.tensors:
            if not isinstance(name, str) or not name.isidentifier() or name in ("x", "labels"):
                raise DataError(f"{self.name}: expected names of tensors like 'y', not 'x' or 'labels'; found {name!r}.")
        names = tuple(self._named())
        inputs = tuple(self.inputs) if isinstance(self.inputs, list | tuple) else ()
        if inputs[:1] != ("x",) or len(set(inputs)) < len(inputs) or not all(name in names for name in inputs):
            raise DataError(
                f"{self.name}: expected inputs to be names of tensors, 'x' first and none twice, of {', '.join(names)}; "
                f"found {self.inputs!r}."
            )
        object.__setattr__(self, "inputs", inputs)

    def _check_values(self, name: str, value: Tensor) -> None:
        if value.dim() == 0 or len(value) != len(self.x):
            raise DataError(
                f"{self.name}: expected {name} of {len(self.x):,} observations, like x, found shape {tuple(value.shape)}."
            )
        if value.device != self.x.device:
            raise DataError(
                f"{self.name}: expected {name} on {self.x.device}, like x, found it on {value.device}: {name}.to(...)."
            )
        if value.is_floating_point():
            # NaN propagates through min and max; isfinite() would allocate a mask as large as the data.
            if value.numel() and not (math.isfinite(value.min().item()) and math.isfinite(value.max().item())):
                raise DataError(f"{self.name}: found NaN or infinite values in {name}. Remove or replace them.")
        elif value.dtype not in _WHOLE:
            raise DataError(
                f"{self.name}: expected {name} as floating-point or whole numbers, found {value.dtype}. Convert: "
                f"{name}.{'long' if 'int' in str(value.dtype) else 'float'}()."
            )

    def _check_pixels(self) -> None:
        if not isinstance(self.pixels, bool | None):
            raise DataError(f"{self.name}: pixels: expected True, False or None, found {self.pixels!r}.")
        if self.pixels and self.x.dtype != torch.uint8:
            raise DataError(
                f"{self.name}: pixels=True scales uint8 by 1/255, found {self.x.dtype}, which is not scaled. Omit pixels, "
                "or convert: x.byte()."
            )
        if self.pixels is None and self.x.dtype == torch.uint8 and not self.is_image:
            last = len(self.event_shape) == 3 and self.event_shape[-1] <= 4
            raise DataError(
                f"{self.name}: found observations of uint8 and shape {tuple(self.event_shape)}, which is no image (H, W), "
                "(1, H, W) or (3, H, W): they may be pixels or counts. Pass pixels=True (scaled by 1/255) or pixels=False "
                "(unscaled whole numbers) to Data or read_data; on the command line --pixels yes or no."
                + (" Images have their channels first: x.permute(0, 3, 1, 2)." if last else "")
            )

    def _named(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        return {"x": self.x} | ({} if self.labels is None else {"labels": self.labels}) | dict(self.tensors)

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        size = f"{len(self):,} of shape {tuple(self.event_shape)} in {self.x.dtype}"
        size += ", scaled by 1/255" if self.scaled else ""
        return f"Data({self.name!r}, {size}, inputs {', '.join(self.inputs)})"

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one observation."""
        return self.x.shape[1:]

    @property
    def kind(self) -> str:
        """The plural noun for observations: "images", or "rows" of a table."""
        return "images" if len(self.event_shape) > 1 else "rows"

    @property
    def is_image(self) -> bool:
        """Whether an observation has shape ``(height, width)``, or ``(channels, height, width)`` with 1 or 3 channels."""
        return len(self.event_shape) == 2 or (len(self.event_shape) == 3 and self.event_shape[0] in (1, 3))

    @property
    def scaled(self) -> bool:
        """Whether x is pixels of uint8, which a batch scales by 1/255."""
        return self.x.dtype == torch.uint8 and self.pixels is not False

    @property
    def are_pixels(self) -> bool:
        """Whether x is grey levels or colours: scaled uint8, or values in [0, 1] unless ``pixels`` is False."""
        return self.scaled or (self.pixels is None and bool(self.x.min() >= 0 and self.x.max() <= 1))

    @property
    def is_binary(self) -> bool:
        """Whether all values of a batch are 0 or 1."""
        one = 255 if self.scaled else 1
        return self.binarization != "none" or all(bool(((x == 0) | (x == one)).all()) for x in parts(self.x))

    @property
    def are_counts(self) -> bool:
        """Whether x is unscaled whole numbers >= 0."""
        return not self.x.is_floating_point() and not self.scaled and bool(self.x.min() >= 0)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The stored tensors that batches are taken from, in the order of ``inputs``: neither scaled nor converted."""
        named = self._named()
        return tuple(named[name] for name in self.inputs)

    def label_name(self, label: int) -> str:
        """The class of a label, or the number itself."""
        return label_name(label, self.classes)

    def _each(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The function of each tensor, as keyword arguments of :func:`dataclasses.replace`."""
        labels = None if self.labels is None else function(self.labels)
        return {"x": function(self.x), "labels": labels, "tensors": {k: function(v) for k, v in self.tensors.items()}}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Data":
        """The same data on another device, with batches of another floating-point type.

        The stored tensors keep their dtype, and are copied only if the device changes.
        """
        return replace(self, **self._each(lambda value: value.to(device)), dtype=dtype or self.dtype)

    def subset(self, index: Tensor | slice) -> "Data":
        """The observations at the given indices, a tensor ``(n,)``, or of a slice (then a view), in all tensors.

        Raises:
            DataError: the selection is empty, or an index is out of range.

        Example:
            >>> data = Data(torch.rand(5, 2), torch.arange(5))
            >>> data.subset(torch.tensor([4, 1])).labels, len(data.subset(slice(3)))
            (tensor([4, 1]), 3)
        """
        try:
            return replace(self, **self._each(lambda value: value[index]))
        except IndexError as error:
            raise DataError(f"{self.name}: expected indices from 0 to {len(self) - 1:,}: {error}") from error

    def resize(self, size: int) -> "Data":
        """Images ``(N, channels, height, width)`` resized to ``size`` x ``size``, bilinear; whole numbers are rounded.

        Raises:
            DataError: the observations are no images, or size is no whole number >= 1.
        """
        try:
            size = whole_number("image size", size)
        except ValueError as error:
            raise DataError(str(error)) from error
        if self.x.dim() != 4:
            raise DataError(f"{self.name}: expected images (N, channels, height, width), found {tuple(self.x.shape)}.")
        x = torch.empty(*self.x.shape[:2], size, size, dtype=self.x.dtype, device=self.x.device)
        for part, images in zip(x.split(1000), self.x.split(1000), strict=True):  # bounds the memory of float copies
            grey = images if x.is_floating_point() else images.float()
            resized = F.interpolate(grey, size=(size, size), mode="bilinear", antialias=True)
            part.copy_(resized if x.is_floating_point() else resized.round())
        return replace(self, x=x)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each element of x, scaled as in a batch, ``event_shape`` each, in float64.

        1 replaces the standard deviation of a constant element. x is not rounded to the dtype of the batches before. With
        dynamic binarisation they are those of the Bernoulli draws, averaged over the observations; nothing is drawn.
        """
        if self.binarization != "dynamic":
            return moments(self.x, self._observations)
        mean, _ = replace(self, binarization="none").moments()
        return mean, (mean * (1 - mean)).sqrt().where((mean > 0) & (mean < 1), 1.0)

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """The batch of the observations at the given indices: ``(x,)``, or the tensors that ``inputs`` names, in order.

        x ``(len(index), *event_shape)`` is floating point, scaled and binarised; dynamic binarisation draws from torch's
        global random state. Other floating-point tensors are converted to the same type; whole numbers are not converted.
        """
        return self.convert(*(value.index_select(0, index) for value in self.held))

    def convert(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """The batch made of rows of the tensors ``held``: x scaled and binarised, all floating point of one type."""
        x, *others = rows
        dtype = self._float_type
        return self._observations(x, dtype), *(value.to(dtype) if value.is_floating_point() else value for value in others)

    @property
    def _float_type(self) -> torch.dtype:
        return self.dtype or (self.x.dtype if self.x.is_floating_point() else torch.get_default_dtype())

    def _observations(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.to(dtype)
        if self.scaled:
            x = x.div_(255)  # in place: the conversion from uint8 has made a copy
        if self.binarization == "threshold":
            x = (x > 0.5).to(x.dtype)
        elif self.binarization == "dynamic":
            x = (torch.rand_like(x) < x).to(x.dtype)
        return x

    def check(self, function: Callable[..., Any], *others: Callable[..., Any]) -> None:
        """Call ``function(*batch)``, which raises a ``ValueError`` for invalid data, on batches of all observations.

        The batches are those of training: scaled, binarised and converted. torch's random state is restored.

        Args:
            function: such as ``objective.check``.
            others: functions that are called with batches later, such as ``objective.forward``. They are not called; only
                the number of their arguments is checked.

        Raises:
            DataError: a function does not take as many tensors as a batch has, or the precision of the batches is too low
                for an element.
            ValueError: raised by the function.

        Example:
            >>> from pyro_vae import BernoulliLikelihood
            >>> Data(torch.rand(5, 3)).check(BernoulliLikelihood().check)
            >>> Data(torch.full((5, 3), 2.0)).check(BernoulliLikelihood().check)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: BernoulliLikelihood scores values in [0, 1]; found values from 2 to 2. ...
        """
        for each in (function, *others):
            self._check_number(each)
        for name, value in zip(self.inputs, self.held, strict=True):
            self._check_digits(name, value)
        rows = max(1, min(_ROWS, _NUMBERS // max(value[0].numel() for value in self.held)))
        with torch.random.fork_rng(devices=[self.x.device] if self.x.is_cuda else []):
            for index in torch.arange(len(self), device=self.x.device).split(rows):
                try:
                    function(*self.batch(index))
                except ValueError as error:
                    if (short := few_values(str(error))) == str(error):
                        raise
                    raise DataError(f"{self.name}: {short}") from error

    def _check_digits(self, name: str, value: Tensor) -> None:
        """Whether a batch resolves the variation of each element: a large offset may use up the 7 digits of float32."""
        dtype, wide = self._float_type, value.dtype in (torch.float64, torch.int64, torch.int32)
        if not wide or dtype == torch.float64 or (name != "x" and not value.is_floating_point()):
            return
        loc, scale = moments(value, Tensor.to)
        place, step = most_rounded(loc, scale, dtype)
        mean, deviation = loc.flatten()[place].item(), scale.flatten()[place].item()
        if step > _COARSEST * deviation:
            column = column_names([place], self.columns if name == "x" else ())
            raise DataError(
                f"{self.name}: {name} has in column {column} a standard deviation of {deviation:.4g} about a mean of "
                f"{mean:.4g}, where neighbouring numbers of {dtype}, the dtype of the model, differ by {step:.2g}. Use a "
                "model that standardises (likelihood learned-normal) or computes in float64, or subtract an offset."
            )

    def _check_number(self, function: Callable[..., Any]) -> None:
        try:
            signature = inspect.signature(function)
        except ValueError:  # some built-in functions have no signature
            return
        try:
            signature.bind(*self.held)
        except TypeError as error:
            name = getattr(function, "__qualname__", type(function).__name__)
            raise DataError(
                f"{self.name}: a batch has {', '.join(self.inputs)}, which does not match "
                f"{name}({', '.join(signature.parameters)}): {error}. Name the tensors that it takes, in order: "
                "Data(..., inputs=(...))."
            ) from error


def label_name(label: int, classes: Sequence[str]) -> str:
    """The class of a label, or the number itself."""
    return classes[label] if 0 <= label < len(classes) else str(label)
