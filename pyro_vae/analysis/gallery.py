"""The figures of a run, from a fitted model, its data and its history."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_vae.analysis import charts, latent, plots
from pyro_vae.analysis.coder import Coder, UndefinedError
from pyro_vae.data.dataset import Data
from pyro_vae.models.programs import evaluating
from pyro_vae.training.records import TrainingRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Pictures = Iterator[tuple[str, Figure]]

__all__ = ["run_figures"]

SHOWN = 3000  # test observations in the figure of latents
_MOST_LABELS = 20  # more cannot be distinguished in one figure


@torch.no_grad()
def run_figures(
    model: Any,
    train: Data,
    test: Data,
    history: Sequence[TrainingRecord],
    *,
    title: str,
    test_means: Tensor | None = None,
    tsne_of_training: bool = False,
    left_out: Callable[[str], None] = lambda reason: None,
) -> "Pictures":
    """Yields name and figure of each figure that is defined for model and data: for images, labels, latent dimensions.

    Uses torch's global random state. Data must be on the device of the model.

    Args:
        model: see :mod:`pyro_vae.analysis.latent`; None: only the training curves.
        train: training data.
        test: test data.
        history: what ``fit`` returned.
        title: of model and data, above each figure.
        test_means: posterior means of the first test observations, 3,000 at most, if they are known.
        tsne_of_training: t-SNE of random training observations, not of the first test observations.
        left_out: called with the reason for each figure that is undefined for the model.
    """
    yield "training_curves", charts.training_curves(history, title=title)
    if model is None:
        return
    coder = Coder(model)
    parts: list[Pictures] = []
    if train.is_image:
        parts += [_reconstructions(coder, train, test, title)]
        parts += [_from_the_prior(coder, train, test, title)] if coder.pair is not None else []
        parts += [_on_the_way(model, train, test, title), _denoised(model, train, test, title)]
        parts += [_by_label(model, train, title)] if coder.pair is not None else []
    parts += [_of_latents(model, train, test, title, tsne_of_training, test_means)]
    reasons = []
    for part in parts:
        try:
            yield from part
        except UndefinedError as error:
            reasons.append(str(error))
    for reason in dict.fromkeys(reasons):
        left_out(reason)


def _reconstructions(coder: Coder, train: Data, test: Data, title: str) -> "Pictures":
    """Shapes: images (n, *event_shape)."""
    show, device = _scaled_by(train), test.x.device
    with evaluating(*coder.programs):
        batch = test.batch(torch.randperm(len(test))[:8].to(device))
        decoded = coder.decode(coder.means(*batch), *batch)
        rows = {"test image": batch[0], "reconstruction": decoded.mean}
        if decoded.is_bernoulli:  # samples of a normal likelihood would only add noise to each pixel
            rows["Bernoulli sample"] = decoded.sample()
    yield "reconstructions", plots.image_rows(show(rows), title=f"{title}: test images and their reconstructions")

    with evaluating(*coder.programs):
        batch = train.batch(torch.randperm(len(train))[:10].to(device))
        rows = {"train image": batch[0], "reconstruction": coder.decode(coder.means(*batch), *batch).mean}
    yield "reconstructions_train", plots.image_rows(show(rows), title=f"{title}: training images and reconstructions")


def _from_the_prior(coder: Coder, train: Data, test: Data, title: str) -> "Pictures":
    with evaluating(*coder.programs):
        x, *context = test.batch(torch.arange(36, device=test.x.device) % len(test))  # context: of a conditional model
        samples = coder.decode(None, x, *context).mean
    images = _scaled_by(train)({"": samples})[""]
    yield "prior_samples", plots.image_grid(images, columns=6, title=f"{title}: from the prior")


def _on_the_way(model: Any, train: Data, test: Data, title: str) -> "Pictures":
    ends, names = _two_images(test)
    (start_and_end, *context) = test.batch(ends)
    if len(ends) == 2 and not context:  # there is no interpolation between two contexts
        paths = latent.interpolate(model, *start_and_end, steps=10)
        rows = dict(zip(("latent space", "pixel space"), paths, strict=True))
        yield "interpolation", plots.image_rows(_scaled_by(train)(rows), title=f"{title}: from {names[0]} to {names[1]}")


def _denoised(model: Any, train: Data, test: Data, title: str) -> "Pictures":
    if _is_grey(test):
        some, *context = test.batch(torch.randperm(len(test))[:10].to(test.x.device))
        denoised = latent.denoise(model, some, *context, flip_rate=0.02)
        rows = dict(zip(("thresholded", "2 % flipped", "reconstruction"), denoised, strict=True))
        yield "denoising", plots.image_rows(_scaled_by(train)(rows), title=f"{title}: denoising")


def _by_label(model: Any, train: Data, title: str) -> "Pictures":
    if train.labels is not None and len(labels := train.labels.unique().tolist()) <= _MOST_LABELS:
        rows = {train.label_name(label): latent.sample_like(model, train, label, num_samples=20) for label in labels}
        caption = f"{title}: encode an image of the label, draw from its posterior, decode"
        yield "samples_by_label", plots.image_rows(_scaled_by(train)(rows), title=caption)


def _of_latents(
    model: Any, train: Data, test: Data, title: str, tsne_of_training: bool, test_means: Tensor | None
) -> "Pictures":
    labels = None if train.labels is None else train.labels.cpu()
    if labels is not None and len(labels.unique()) > _MOST_LABELS:
        labels = None
    means = latent.latent_means(model, train)
    latent_dim = means.shape[1]
    if latent_dim > 1:
        # All axes if there are at most four; otherwise the four with the largest variance of the posterior means.
        axes = sorted(means.var(0).argsort(descending=True)[:4].tolist())
        which = "all axes" if latent_dim <= 4 else f"the 4 of {latent_dim} axes that vary most"
        caption = f"{title}: latent means (training set), {which}"
        yield "latent_pairs", plots.latent_pairs(means.cpu(), labels, axes=axes, title=caption, classes=train.classes)

    if tsne_of_training:
        index, what = torch.randperm(len(train))[:1000], f"{min(1000, len(train)):,} random training {train.kind}"
        means, labels = means[index], labels if labels is None else labels[index]
    else:
        means = latent.latent_means(model, test.subset(slice(SHOWN))) if test_means is None else test_means
        labels = None if labels is None or test.labels is None else test.labels[:SHOWN].cpu()
        what = f"the {'first ' if len(means) < len(test) else ''}{len(means):,} test {test.kind}"
    if len(means) >= 10:
        points = latent.tsne(means, perplexity=min(30, (len(means) - 1) / 3))
        yield "tsne", plots.latent_scatter(points, labels, title=f"{title}: t-SNE of {what}", classes=train.classes)


def _two_images(data: Data) -> tuple[Tensor, list[str]]:
    """Indices and names of two images to interpolate between: a 6 and a 9 if there are any, else of the first two labels."""
    if data.labels is None:
        index = torch.arange(min(2, len(data)), device=data.x.device)
        return index, ["one test image", "another"]
    labels = data.labels.unique().tolist()
    pair = [6, 9] if {6, 9} <= set(labels) else labels[:2]
    first = [int((data.labels == label).nonzero()[0]) for label in pair]
    article = "" if data.classes else "a "
    return torch.tensor(first, device=data.x.device), [article + data.label_name(label) for label in pair]


def _is_grey(data: Data) -> bool:
    """Whether observations have one channel of grey levels in [0, 1], which can be thresholded."""
    return data.event_shape[:-2].numel() == 1 and data.are_pixels


def _scaled_by(data: Data) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A function that moves images to the CPU and scales them to [0, 1], by the range of data that are no pixels."""
    low, high = (0.0, 1.0) if data.are_pixels else (data.x.min().item(), data.x.max().item())
    return lambda rows: {name: (images.cpu() - low) / (high - low) for name, images in rows.items()}
