"""Arrays -> matplotlib Figure, without random numbers and without matplotlib's global state."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.data.dataset import label_name

if TYPE_CHECKING:
    from matplotlib.animation import FuncAnimation
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "image_grid",
    "image_plane",
    "image_rows",
    "latent_animation",
    "latent_pairs",
    "latent_planes",
    "latent_scatter",
]

# Ten colours that are distinct for every type of colour vision (Petroff 2021, arXiv:2107.02270); digits 0 to 9.
COLORS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)

Array = Any  # a NumPy array or anything that np.asarray accepts, such as a CPU tensor


def new_figure(width: float, height: float, *, tight: bool = False) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: no global figure, no backend chosen
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0) if tight else ConstrainedLayoutEngine()
    return Figure(figsize=(width, height), dpi=150, layout=engine)


def _show(ax: "Axes", image: Array) -> None:
    """One image ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``; values are clipped to [0, 1]."""
    image = np.clip(np.asarray(image, dtype=float), 0, 1)
    if image.ndim == 3:
        image = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def image_rows(rows: Mapping[str, Array], *, title: str = "", columns: Sequence[str] = ()) -> "Figure":
    """Rows of images, each with its name: originals above their reconstructions, for example.

    Args:
        rows: name of a row -> images ``(n, H, W)`` or ``(n, C, H, W)``, the same n in all rows.
        title: of the figure.
        columns: names of the columns, above the first row.
    """
    count = {name: len(images) for name, images in rows.items()}
    if len(set(count.values())) != 1:
        raise ValueError(f"image_rows: every row needs the same number of images, found {count}.")
    n = next(iter(count.values()))
    size = 0.8 if n <= 12 else 0.5
    names = max(map(len, rows)) * 0.12 + 0.1
    figure = new_figure(
        max(n * size + names + 0.2, 0.1 * len(title)),
        len(rows) * size + (0.5 if title else 0.1) + (0.25 if columns else 0),
        tight=True,
    )
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(len(rows), n, squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row, images, strict=True):
            _show(ax, image)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    for ax, column in zip(axes[0], columns, strict=False):
        ax.set_title(column, fontsize=10)
    return figure


def image_grid(images: Array, *, columns: int, title: str = "") -> "Figure":
    """Images ``(n, H, W)`` or ``(n, C, H, W)`` in a grid, in row-major order."""
    rows = -(-len(images) // columns)
    figure = new_figure(columns * 0.8, rows * 0.8 + (0.4 if title else 0), tight=True)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, image in zip(axes, images, strict=False):
        _show(ax, image)
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    return figure


def image_plane(images: Array, first: Array, second: Array, *, title: str = "") -> "Figure":
    """The result of :func:`pyro_vae.analysis.latent.manifold_grid` as one figure with the latent values on its axes.

    Args:
        images: ``(size * size, H, W)`` or ``(size * size, C, H, W)``, row-major, the second axis descending.
        first: values on the horizontal axis, ``(size,)``, ascending.
        second: values on the vertical axis, ``(size,)``, ascending.
        title: of the figure.
    """
    images, size = np.asarray(images, dtype=float), len(first)
    images = images[:, None] if images.ndim == 3 else images  # (size * size, C, H, W)
    channels, height, width = images.shape[1:]
    sheet = images.reshape(size, size, channels, height, width).transpose(0, 3, 1, 4, 2)
    sheet = np.clip(sheet.reshape(size * height, size * width, channels), 0, 1)
    figure = new_figure(7.5, 7.7)
    figure.suptitle(title, fontsize=13)
    ax = figure.add_subplot()
    ax.imshow(sheet[..., 0] if channels == 1 else sheet, cmap="gray", vmin=0, vmax=1, aspect="auto")
    shown = np.linspace(0, size - 1, min(7, size)).round().astype(int)  # not every value: they would overlap
    ax.set_xticks((shown + 0.5) * width, [f"{first[i]:.1f}" for i in shown])
    ax.set_yticks((size - shown - 0.5) * height, [f"{second[i]:.1f}" for i in shown])
    ax.set_xlabel("$z_1$", fontsize=13)
    ax.set_ylabel("$z_2$", fontsize=13)
    return figure


def _scatter(ax: "Axes", points: Array, labels: Array | None, size: float, classes: Sequence[str] = ()) -> list[Any]:
    """Points coloured by label; the colour of a label does not depend on the other labels. Returns legend handles."""
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.6}
    if labels is None:
        ax.scatter(points[:, 0], points[:, 1], color=COLORS[0], **style)
        return []
    handles = []
    for label in np.unique(labels):
        mine, color = points[labels == label], COLORS[int(label) % len(COLORS)]
        handles.append(ax.scatter(mine[:, 0], mine[:, 1], color=color, label=label_name(int(label), classes), **style))
    return handles


def _mark(ax: "Axes", points: Array, labels: Array | None, *, fontsize: int, classes: Sequence[str] = ()) -> None:
    """Writes each short label at the median of its points, so that the figure does not rely on colour alone."""
    from matplotlib.patheffects import withStroke

    found = () if labels is None else np.unique(labels)
    names = [label_name(int(label), classes) for label in found]
    if any(len(name) > 3 for name in names):  # words would overlap: they are in the legend
        return
    for label, name in zip(found, names, strict=True):
        x, y = np.median(points[labels == label], axis=0)
        outline = [withStroke(linewidth=fontsize / 5, foreground="white")]
        ax.text(x, y, name, fontsize=fontsize, weight="bold", ha="center", va="center", path_effects=outline)


def _legend(figure: "Figure", handles: Sequence[Any]) -> None:
    if not handles:
        return
    title = "digit" if all(handle.get_label().isdigit() for handle in handles) else "label"
    legend = figure.legend(handles=handles, loc="outside right center", title=title, fontsize=12)
    for handle in legend.legend_handles:
        handle.set(alpha=1, sizes=[50])  # type: ignore[union-attr]


def latent_scatter(
    points: Array,
    labels: Array | None,
    *,
    title: str = "",
    axes_names: tuple[str, str] | None = None,
    classes: Sequence[str] = (),
) -> "Figure":
    """Two-dimensional points ``(N, 2)``, coloured by label ``(N,)``.

    Args:
        points: positions.
        labels: whole numbers, or None.
        title: of the figure.
        axes_names: names of the axes; None if the axes have no meaning (t-SNE), then without ticks.
        classes: names of the labels 0, 1, ..., if they have any.
    """
    points, labels = np.asarray(points), None if labels is None else np.asarray(labels)
    figure = new_figure(7.5, 6.2)
    figure.suptitle(title, fontsize=13)
    ax = figure.add_subplot()
    handles = _scatter(ax, points, labels, max(2.0, 30000 / (len(points) + 500)), classes)
    _mark(ax, points, labels, fontsize=15, classes=classes)
    if axes_names is None:
        ax.set(xticks=[], yticks=[])
    else:
        ax.set(xlabel=axes_names[0], ylabel=axes_names[1])
    _legend(figure, handles)
    return figure


def latent_planes(panels: Mapping[str, tuple[Array, Array]], *, title: str = "", ticks: bool = True) -> "Figure":
    """Two-dimensional latent spaces side by side, coloured by label; each has its own limits, which include [-1, 1].

    Args:
        panels: name -> (points ``(N, 2)``, labels ``(N,)``).
        title: of the figure.
        ticks: False if the axes have no meaning (t-SNE).
    """
    figure = new_figure(4.6 * len(panels) + 0.8, 4.9)
    figure.suptitle(title, fontsize=13)
    handles: list[Any] = []
    for ax, (name, (points, labels)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        points, labels = np.asarray(points), np.asarray(labels)
        collapsed = points.std() < 0.05
        handles = _scatter(ax, points, labels, size=50.0 if collapsed else max(1.0, 12000 / (len(points) + 500)))
        if not collapsed:  # otherwise all labels would overlap
            _mark(ax, points, labels, fontsize=13)
        ax.set_title(name, fontsize=12)
        if ticks:
            ax.locator_params(nbins=7)
            ax.update_datalim([(-1, -1), (1, 1)])  # the scale of N(0, 1): a collapsed code looks like a point
            ax.set_xlabel("$z_1$", fontsize=12)
            ax.set_ylabel("$z_2$", fontsize=12)
            ax.set_aspect("equal", adjustable="datalim")
        else:
            ax.set(xticks=[], yticks=[])
    _legend(figure, handles)
    return figure


def latent_animation(
    panels: Mapping[str, Array], labels: Array, *, captions: Sequence[str], fps: float = 8, hold: int = 16
) -> "FuncAnimation":
    """An animation of two-dimensional latent spaces during training; save with ``.save("file.gif", writer="pillow")``.

    Args:
        panels: name -> latents ``(frames, N, 2)``, the same observations in every frame.
        labels: ``(N,)``.
        captions: above each frame.
        fps: frames per second.
        hold: number of times to repeat the last frame.
    """
    from matplotlib.animation import FuncAnimation
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    labels = np.asarray(labels)
    frames = len(captions)
    wrong = {name: np.shape(codes) for name, codes in panels.items() if np.shape(codes) != (frames, len(labels), 2)}
    if wrong:
        raise ValueError(f"latent_animation: expected latents of shape {(frames, len(labels), 2)}, found {wrong}.")
    figure = new_figure(4.2 * len(panels) + 0.8, 4.6)
    FigureCanvasAgg(figure)
    figure.set_dpi(72)  # for a file of a few MB
    heading = figure.suptitle(captions[0], fontsize=13, family="monospace")
    clouds: list[tuple[Any, Array]] = []
    handles: list[Any] = []
    for ax, (name, codes) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        handles = _scatter(ax, codes[0], labels, size=5.0)
        clouds += [(handle, codes[:, labels == label]) for handle, label in zip(handles, np.unique(labels), strict=True)]
        low, high = np.quantile(
            codes[frames // 4 :], [0.002, 0.998], axis=(0, 1)
        )  # outliers and the first frames may exceed the limits
        low, high = np.minimum(low, -1), np.maximum(high, 1)  # the scale of N(0, 1): a collapsed code looks like a point
        margin = 0.05 * (high - low)
        ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        ax.set_xlabel("$z_1$", fontsize=12)
        ax.set_ylabel("$z_2$", fontsize=12)
        ax.set_title(name, fontsize=12)
    _legend(figure, handles)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # fixed after the first layout, so that all frames have the same axes

    def draw(frame: int) -> list[Any]:
        frame = min(frame, frames - 1)
        heading.set_text(captions[frame])
        for handle, codes in clouds:
            handle.set_offsets(codes[frame])
        return [heading, *(handle for handle, _ in clouds)]

    return FuncAnimation(figure, draw, frames=frames + hold, interval=1000 / fps, blit=False)


def latent_pairs(
    points: Array,
    labels: Array | None,
    *,
    axes: Sequence[int] | None = None,
    title: str = "",
    classes: Sequence[str] = (),
) -> "Figure":
    """All pairs of latent axes as scatter plots in a triangle, coloured by label.

    Args:
        points: latent means ``(N, latent_dim)``.
        labels: whole numbers ``(N,)``, or None.
        axes: the latent axes shown; default: all.
        title: of the figure.
        classes: names of the labels 0, 1, ..., if they have any.
    """
    points, labels = np.asarray(points), None if labels is None else np.asarray(labels)
    axes = range(points.shape[1]) if axes is None else axes
    if len(axes) < 2:
        raise ValueError(f"latent_pairs: needs at least 2 latent axes to make a pair, found {len(axes)}.")
    n = len(axes) - 1
    side = max(2.4, 6.0 / n)
    figure = new_figure(n * side + 1.0, n * side + 0.4)
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(n, n, squeeze=False, sharex="col", sharey="row")
    handles: list[Any] = []
    for row in range(n):
        for column in range(n):
            ax, pair = grid[row, column], [axes[column], axes[row + 1]]
            if column > row:
                ax.set_axis_off()
                continue
            handles = _scatter(ax, points[:, pair], labels, max(0.5, 6000 / (len(points) + 500)), classes)
            _mark(ax, points[:, pair], labels, fontsize=10, classes=classes)
            if row == n - 1:
                ax.set_xlabel(f"$z_{{{pair[0] + 1}}}$", fontsize=13)
            if column == 0:
                ax.set_ylabel(f"$z_{{{pair[1] + 1}}}$", fontsize=13)
    _legend(figure, handles)
    return figure
