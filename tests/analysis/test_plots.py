import io
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_vae import TrainingRecord
from pyro_vae.analysis import charts, plots


def pixels(figure):
    stream = io.BytesIO()
    figure.savefig(stream, format="png")  # draws everything: a broken artist fails here
    return stream.getbuffer().nbytes


def shown(ax):
    (image,) = ax.get_images()
    return np.asarray(image.get_array())


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5)])
def test_image_rows_shows_every_image_in_its_place(shape):
    a, b = torch.rand(3, *shape), torch.rand(3, *shape) + 0.5
    figure = plots.image_rows({"original": a, "reconstruction": b}, title="T", columns=["x", "y", "z"])
    assert pixels(figure) > 1000
    axes = np.array(figure.axes).reshape(2, 3)
    expected = b[2].clamp(0, 1).numpy()
    expected = expected.transpose(1, 2, 0).squeeze(-1) if len(shape) == 3 and shape[0] == 1 else expected
    expected = expected.transpose(1, 2, 0) if shape[0] == 3 else expected
    assert np.array_equal(shown(axes[1, 2]), expected.astype(float))
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["original", "reconstruction"]
    assert [ax.get_title() for ax in axes[0]] == ["x", "y", "z"]


def test_image_rows_of_unequal_length():
    with pytest.raises(ValueError, match=r"'a': 2, 'b': 3"):
        plots.image_rows({"a": torch.rand(2, 4, 4), "b": torch.rand(3, 4, 4)})


def test_image_grid_reads_row_by_row_and_leaves_the_rest_empty():
    images = torch.rand(5, 1, 4, 4)
    figure = plots.image_grid(images, columns=3)
    assert pixels(figure) > 1000
    assert len(figure.axes) == 6
    assert np.array_equal(shown(figure.axes[4]), images[4, 0].numpy().astype(float))
    assert not figure.axes[5].axison


def test_scatter_has_every_point_and_every_digit_in_the_legend():
    points, labels = np.random.default_rng(0).normal(size=(200, 2)), np.arange(200) % 10
    figure = plots.latent_scatter(points, labels, title="T")
    assert pixels(figure) > 1000
    offsets = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    assert np.allclose(np.sort(offsets, 0), np.sort(points, 0))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(d) for d in range(10)]
    colors = {tuple(c.get_facecolor()[0][:3]) for c in figure.axes[0].collections}
    assert len(colors) == 10


def test_a_digit_keeps_its_color_when_others_are_missing():
    points = np.zeros((4, 2))
    all_digits = plots.latent_scatter(np.zeros((10, 2)), np.arange(10)).axes[0].collections[7]
    some = plots.latent_scatter(points, np.array([7, 7, 9, 9])).axes[0].collections[0]
    assert np.array_equal(all_digits.get_facecolor(), some.get_facecolor())


def test_pairs_show_each_pair_once():
    points = np.random.default_rng(0).normal(size=(50, 4))
    figure = plots.latent_pairs(points, np.arange(50) % 10)
    assert pixels(figure) > 1000
    drawn = [ax for ax in figure.axes if ax.collections]
    assert len(drawn) == 6
    corner = np.concatenate([c.get_offsets() for c in figure.axes[0].collections])
    assert np.allclose(np.sort(corner, 0), np.sort(points[:, :2], 0))
    chosen = plots.latent_pairs(points, np.arange(50) % 10, axes=[1, 3])
    assert chosen.axes[0].get_xlabel() == "$z_{2}$"
    assert chosen.axes[0].get_ylabel() == "$z_{4}$"
    with pytest.raises(ValueError, match="at least 2"):
        plots.latent_pairs(points[:, :1], np.arange(50))


@pytest.mark.parametrize("epochs", [1, 5])
@pytest.mark.parametrize("test", [False, True])
def test_training_curves(epochs, test):
    terms = {"neg_elbo": 3.0, "reconstruction": 2.0, "kl": 1.0}
    history = [TrainingRecord(e, 5 * e, terms, terms if test else None) for e in range(1, epochs + 1)]
    figure = charts.training_curves(history)
    assert pixels(figure) > 1000
    assert [ax.get_title() for ax in figure.axes] == ["-ELBO", "reconstruction", "KL"]
    for ax in figure.axes:
        assert [line.get_label() for line in ax.lines] == ["train", "test"][: 1 + test]
        assert list(ax.lines[0].get_xdata()) == list(range(1, epochs + 1))
        assert ax.get_xlabel() == "epoch"


def test_training_curves_of_an_objective_of_ones_own():
    history = [TrainingRecord(e, 5 * e, {"loss": 7.0 / e, "reconstruction": 5.0, "mmd": 0.2, "gap": 0.1}) for e in (1, 2)]
    axes = charts.training_curves(history).axes
    assert [ax.get_title() for ax in axes] == ["reconstruction", "loss", "mmd", "gap"]
    assert list(axes[1].lines[0].get_ydata()) == [7.0, 3.5]
    assert [ax.get_ylabel() for ax in axes] == ["nats per image", "", "", ""]


def test_training_curves_by_steps_where_records_do_not_end_epochs():
    history = [
        TrainingRecord(math.ceil(step / 6), step, {"neg_elbo": 3.0, "reconstruction": 2.0, "kl": 1.0}) for step in (4, 8, 9)
    ]
    for ax in charts.training_curves(history).axes:
        assert (ax.get_xlabel(), list(ax.lines[0].get_xdata())) == ("step", [4, 8, 9])


def test_density_panels_have_the_histograms_and_the_rings():
    samples = {"a": np.random.default_rng(0).normal(size=(500, 2)), "b": np.zeros((10, 2)), "c": np.ones((10, 2))}
    figure = charts.density_panels(samples, lambda p: -0.5 * (p**2).sum(-1), columns=2, limits=(-4, 4, -4, 4), bins=8)
    assert pixels(figure) > 1000
    assert [ax.get_title() for ax in figure.axes[:3]] == ["a", "b", "c"]
    assert not figure.axes[3].axison
    (rings,) = [c for c in figure.axes[0].collections if len(getattr(c, "levels", ())) == 3]
    for path, radius in zip(rings.get_paths(), (3.0, 2.0, 1.0), strict=True):
        assert np.allclose(np.linalg.norm(path.vertices, axis=1), radius, atol=0.02)


def test_curves_have_lines_bands_and_level():
    lines = {"a": ([1, 10, 100], [1.0, 2.0, 3.0]), "b": ([1, 10, 100], [3.0, 2.0, 1.0])}
    bands = {"a": np.array([0.1, 0.2, 0.3])}
    figure = charts.curves(lines, xlabel="x", ylabel="y", bands=bands, level=("truth", 2.5), log_x=True)
    assert pixels(figure) > 1000
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    assert list(ax.lines[1].get_ydata()) == [3.0, 2.0, 1.0]
    assert len(ax.collections) == 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_matplotlibs_global_state_is_untouched():
    code = (
        "import io, sys, matplotlib, numpy as np; before = matplotlib.rcParams.copy();"
        "from pyro_vae.analysis import plots; plots.image_grid(np.zeros((4, 2, 2)), columns=2).savefig(io.BytesIO());"
        "assert 'matplotlib.pyplot' not in sys.modules;"  # so no backend was chosen; reading the setting would choose one
        "assert all(before[key] == matplotlib.rcParams[key] for key in before if key != 'backend')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5)])
def test_plane_of_images_is_one_sheet_in_reading_order(shape):
    images = torch.rand(9, *shape)
    figure = plots.image_plane(images, torch.linspace(-1, 1, 3), torch.linspace(-2, 2, 3), title="T")
    assert pixels(figure) > 1000
    (ax,) = figure.axes
    sheet = shown(ax)
    expected = images[5].numpy().astype(float)  # second row, last column
    expected = expected.transpose(1, 2, 0) if shape[0] == 3 else expected.reshape(4, 5)
    assert np.array_equal(sheet[4:8, 10:15], expected)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["-1.0", "0.0", "1.0"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["-2.0", "0.0", "2.0"]
    low, high = ax.get_yticks()[0], ax.get_yticks()[-1]
    assert low > high  # on an image, the first rows are at the top: so is the highest value


def test_latent_planes_show_all_points_of_each():
    rng = np.random.default_rng(0)
    panels = {name: (rng.normal(size=(50, 2)), np.arange(50) % 3) for name in ("a", "b")}
    figure = plots.latent_planes(panels, title="T")
    assert pixels(figure) > 1000
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    for ax, (points, _) in zip(figure.axes, panels.values(), strict=True):
        offsets = np.concatenate([c.get_offsets() for c in ax.collections])
        assert np.allclose(np.sort(offsets, 0), np.sort(points, 0))
    assert plots.latent_planes(panels, ticks=False).axes[0].get_xticks().size == 0


def test_animation_moves_every_point_and_can_be_saved(tmp_path):
    from PIL import Image, ImageSequence

    codes, labels = np.random.default_rng(0).normal(size=(4, 30, 2)), np.arange(30) % 3
    animation = plots.latent_animation({"a": codes, "b": 2 * codes}, labels, captions=list("wxyz"), hold=2)
    animation.save(tmp_path / "a.gif", writer="pillow")
    with Image.open(tmp_path / "a.gif") as image:
        frames = [np.asarray(frame.convert("RGB"), dtype=int) for frame in ImageSequence.Iterator(image)]
    assert len(frames) >= 4
    assert all(np.abs(a - b).sum() > 0 for a, b in itertools.pairwise(frames[:4]))
    last = animation._fig.axes[1].collections[2].get_offsets()
    assert np.allclose(last, 2 * codes[-1][labels == 2])
    with pytest.raises(ValueError, match=r"expected latents of shape \(3, 30, 2\)"):
        plots.latent_animation({"a": codes}, labels, captions=list("xyz"))
