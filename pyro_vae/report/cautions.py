"""What a reader of a run's figures should beware of, found in the figures themselves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vae.report.comparison import FigureOfRun

__all__ = ["cautions_of"]

_COLLAPSED = 0.01  # nats of KL, below which a latent dimension says nothing
_GAP = 0.05  # of the training figure: a larger difference between training and test is told


def cautions_of(
    config: Mapping[str, Any],
    figures: Mapping[str, FigureOfRun],
    *,
    finished: bool,
    train: Mapping[str, float],
    kl: Sequence[float] | None,
    falling: bool = False,
) -> list[tuple[str, str]]:
    """Headlines, each with an explanation and what to do.

    Args:
        config: of the run; its ``dataset``, ``requested_dataset`` and ``discrete_columns`` are looked at, and whether
            ``train_run`` has made it.
        figures: of the test set.
        finished: whether the run was evaluated at its end.
        train: the training's last figures.
        kl: nats per latent dimension, averaged over the test set; None where they are not known.
        falling: whether the test figure was still falling at the end of the training.

    Example:
        >>> cautions_of({}, {}, finished=True, train={}, kl=[3.1, 0.001])[0][0]
        'Collapsed latents'
    """
    found = []
    of_ones_own = "model" in config or ("parts" in config and "compile" not in config)  # made by train_run
    if not finished:
        again = "Call train_run again, with resume=True," if of_ones_own else "Go on with --resume"
        text = f"It has no metrics.json: it was stopped before its evaluation. {again} to get its final figures."
        found.append(("This run is not finished", text))
    dataset, requested = config.get("dataset"), config.get("requested_dataset")
    if dataset == "digits" and requested in ("auto", "mnist"):
        text = f"MNIST was not to be had (asked for: {requested}), so this is scikit-learn's digits, 8 x 8 pixels. "
        found.append(("Digits in place of MNIST", text + "No figure here can be compared with one of MNIST."))
    if isinstance(columns := config.get("discrete_columns"), str) and columns:
        found.append(("A density of columns that have none", columns))
    broken = [name for name, figure in figures.items() if not math.isfinite(figure.value)]
    broken += [f"training {name}" for name, value in train.items() if not math.isfinite(value)]
    if broken:
        text = "NaN or infinite. The training or the evaluation has failed; try a lower learning rate."
        found.append(("Figures that are no numbers", f"{', '.join(broken)}: {text}"))
    if bare := [name for name, figure in figures.items() if figure.standard_error is None]:
        text = "no finite standard error is recorded, so nothing tells a difference from noise."
        found.append(("Error bars are missing", f"{', '.join(bare)}: {text}"))
    if (marginal := figures.get("log_marginal")) is not None:
        more = "train_run(..., resume=True, importance_samples=...)" if of_ones_own else "--importance-samples"
        found += _importance_weights(marginal, more)
    if kl is not None and (dead := [f"z{i + 1}" for i, nats in enumerate(kl) if nats < _COLLAPSED]):
        text = (
            f"{', '.join(dead)}: KL below {_COLLAPSED} nats. There the posterior is the prior whatever the data, and the "
            f"decoder has learned to look away. {len(kl) - len(dead)} of {len(kl)} dimensions are in use."
        )
        found.append(("Collapsed latents", text))
    if "neg_elbo" in figures and "neg_elbo" in train:
        # Of a normal likelihood, the scale is the squared error: the density's constant says nothing of the fit.
        scale = train["squared_error"] + train.get("kl", 0) if "squared_error" in train else train["neg_elbo"]
        gap = figures["neg_elbo"].value - train["neg_elbo"]
        if abs(gap) > _GAP * abs(scale):
            text = f"-ELBO is {train['neg_elbo']:.2f} in training and {figures['neg_elbo'].value:.2f} on the test set. "
            if gap > 0:
                text += "The model knows its training data better than new ones. "
                text += "Test figures still fell: train for longer." if falling else "Train for less long, or on more data."
            else:
                text += "Training figures are averages over an epoch in which the weights moved: train for longer."
            found.append(("Training and test differ", text))
    return found


def _importance_weights(marginal: FigureOfRun, more: str) -> list[tuple[str, str]]:
    if marginal.unreliable is None:
        text = "log p(x) was made without a check of its importance weights, which takes 25 draws or more."
        return [("Importance weights were not checked", text)]
    if marginal.unreliable == 0:
        return []
    ess = "" if marginal.median_ess is None else f" (median effective sample size: {marginal.median_ess:,.1f})"
    text = (
        f"For {marginal.unreliable:,} test observations a few of the {marginal.num_samples or 0:,} draws carry nearly all "
        f"the weight{ess}. log p(x) reads too low there, and its error bar is too small. More draws ({more}) "
        "mend it slowly. -ELBO is not affected."
    )
    return [("Importance weights are unreliable", text)]
