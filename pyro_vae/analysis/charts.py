"""Curves and densities -> matplotlib Figure."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_vae.analysis.plots import Array, new_figure
from pyro_vae.training.records import TrainingRecord, drawn_terms, horizontal_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves", "density_panels", "training_curves"]


def training_curves(history: Sequence[TrainingRecord], *, title: str = "") -> "Figure":
    """-ELBO, reconstruction and KL of training (line) and test (dashed), in nats per observation.

    Beside them the loss, where it is another figure, and an objective's own terms; against the epoch or the step.

    Args:
        history: the records returned by :func:`pyro_vae.fit`.
        title: of the figure.
    """
    labels = {"neg_elbo": "-ELBO", "kl": "KL"}
    names = drawn_terms(history)
    figure = new_figure(max(10, 3.4 * len(names)), 3.4)
    figure.suptitle(title, fontsize=13)
    when, places = horizontal_axis(history)
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, key, color in zip(axes, names, itertools.cycle(("#832db6", "#3f90da", "#e76300")), strict=False):
        few = {"marker": "o"} if len(places) == 1 else {}  # a line through one point is invisible
        ax.plot(places, [record.train.get(key, np.nan) for record in history], color=color, label="train", **few)
        test = [record.test.get(key, np.nan) for record in history if record.test is not None]
        if len(test) == len(places):
            ax.plot(places, test, "--", color="black", label="test", **few)
        unit = "nats per image" if key in ("neg_elbo", "reconstruction", "kl") else ""
        ax.set(xlabel=when, ylabel=unit, title=labels.get(key, key))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False)
    return figure


def density_panels(
    samples: Mapping[str, Array],
    log_density: Callable[[Array], Array],
    *,
    columns: int,
    limits: tuple[float, float, float, float],
    bins: int = 60,
    title: str = "",
) -> "Figure":
    """Two-dimensional histograms of samples, each with the contours of the same density.

    Args:
        samples: name of a panel -> points ``(n, 2)``.
        log_density: maps points ``(m, 2)`` to the log-density, ``(m,)``. Contours are at 1, 2 and 3 standard deviations if
            it is normal.
        columns: panels per row.
        limits: ``(x_min, x_max, y_min, y_max)``, the same in all panels.
        bins: of the histograms, per axis.
        title: of the figure.
    """
    x_min, x_max, y_min, y_max = limits
    x, y = np.meshgrid(np.linspace(x_min, x_max, 120), np.linspace(y_min, y_max, 120))
    level = np.asarray(log_density(np.stack([x.ravel(), y.ravel()], axis=-1))).reshape(x.shape)
    rings = level.max() - 0.5 * np.array([3.0, 2.0, 1.0]) ** 2
    rows = -(-len(samples) // columns)
    side = 4.2 if rows == 1 else 2.3
    figure = new_figure(columns * side, rows * side + 0.7)
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, (name, points) in zip(grid, samples.items(), strict=False):
        points = np.asarray(points)
        extent = [[x_min, x_max], [y_min, y_max]]
        ax.hist2d(points[:, 0], points[:, 1], bins=bins, range=extent, cmap="Blues", density=True, vmax=0.2)
        ax.contour(x, y, level, levels=rings, colors="#bd1f01", linewidths=1.2, linestyles="solid")
        ax.set_title(name, fontsize=11)
        ax.set_aspect("equal")
    for ax in grid[len(samples) :]:
        ax.set_axis_off()
    for ax in grid[max(0, len(samples) - columns) : len(samples)]:
        ax.tick_params(labelbottom=True)  # also above an empty cell
    return figure


def curves(
    lines: Mapping[str, tuple[Array, Array]],
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    bands: Mapping[str, Array] | None = None,
    level: tuple[str, float] | None = None,
    log_x: bool = False,
) -> "Figure":
    """Several lines in one plot, with a legend.

    Args:
        lines: name -> (x, y).
        xlabel: name of the horizontal axis.
        ylabel: name of the vertical axis.
        title: of the figure.
        bands: name of a line -> half-width of the band around it, ``(n,)``.
        level: name and height of a horizontal line.
        log_x: logarithmic horizontal axis.
    """
    figure = new_figure(7.5, 4.5)
    figure.suptitle(title, fontsize=13)
    ax = figure.add_subplot()
    for (name, (x, y)), color, style in zip(
        lines.items(),
        itertools.cycle(("#3f90da", "#e76300", "#832db6", "#717581")),
        itertools.cycle(("-", "--", ":")),
        strict=False,
    ):
        y = np.asarray(y)
        ax.plot(x, y, color=color, label=name, linestyle=style, linewidth=2)
        if bands is not None and name in bands:
            ax.fill_between(x, y - np.asarray(bands[name]), y + np.asarray(bands[name]), color=color, alpha=0.2, linewidth=0)
    if level is not None:
        ax.axhline(level[1], color="black", linewidth=1)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, level[1] - 0.1 * (high - low)), high)  # room for its label below the line
        ax.annotate(
            level[0],
            (0.99, level[1]),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=11,
        )
    if log_x:
        ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=11)
    return figure
