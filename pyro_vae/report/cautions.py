"""Cautions about the metrics of a run, derived from the metrics and the config."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vae.report.comparison import Metric

__all__ = ["cautions_of"]

_COLLAPSED = 0.01  # nats: a latent dimension with a smaller KL has collapsed
_GAP = 0.05  # the largest difference between training and test without a caution, relative to the training metric


def cautions_of(
    config: Mapping[str, Any],
    metrics: Mapping[str, Metric],
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
        metrics: of the test set.
        finished: whether the run was evaluated at its end.
        train: the last training metrics.
        kl: nats per latent dimension, averaged over the test set; None if not known.
        falling: whether the test -ELBO was still falling at the end of training.

    Example:
        >>> cautions_of({}, {}, finished=True, train={}, kl=[3.1, 0.001])[0][0]
        'Collapsed latents'
    """
    found = []
    of_ones_own = "model" in config or ("parts" in config and "compile" not in config)  # made by train_run
    if not finished:
        again = "Call train_run again, with resume=True," if of_ones_own else "Resume it with --resume"
        text = f"It has no metrics.json: it was stopped before its evaluation. {again} to get its final metrics."
        found.append(("This run is not finished", text))
    dataset, requested = config.get("dataset"), config.get("requested_dataset")
    if dataset == "digits" and requested in ("auto", "mnist"):
        text = f"MNIST was not available (requested: {requested}); the data are scikit-learn's digits, 8 x 8 pixels. "
        found.append(("Digits instead of MNIST", text + "No metric here is comparable with one on MNIST."))
    if isinstance(columns := config.get("discrete_columns"), str) and columns:
        found.append(("Columns without a density", columns))
    broken = [name for name, metric in metrics.items() if not math.isfinite(metric.value)]
    broken += [f"training {name}" for name, value in train.items() if not math.isfinite(value)]
    if broken:
        text = "NaN or infinite. The training or the evaluation has failed; try a lower learning rate."
        found.append(("Metrics that are not finite", f"{', '.join(broken)}: {text}"))
    if bare := [name for name, metric in metrics.items() if metric.standard_error is None]:
        text = "no finite standard error is recorded, so a difference cannot be distinguished from noise."
        found.append(("Error bars are missing", f"{', '.join(bare)}: {text}"))
    if (marginal := metrics.get("log_marginal")) is not None:
        more = "train_run(..., resume=True, importance_samples=...)" if of_ones_own else "--importance-samples"
        found += _importance_weights(marginal, more)
    if kl is not None and (dead := [f"z{i + 1}" for i, nats in enumerate(kl) if nats < _COLLAPSED]):
        text = (
            f"{', '.join(dead)}: KL below {_COLLAPSED} nats. The posterior of these dimensions equals the prior for all "
            f"data, and the decoder ignores them. {len(kl) - len(dead)} of {len(kl)} dimensions are active."
        )
        found.append(("Collapsed latents", text))
    if "neg_elbo" in metrics and "neg_elbo" in train:
        # For a normal likelihood, relative to the squared error: the density's constant does not depend on the fit.
        scale = train["squared_error"] + train.get("kl", 0) if "squared_error" in train else train["neg_elbo"]
        gap = metrics["neg_elbo"].value - train["neg_elbo"]
        if abs(gap) > _GAP * abs(scale):
            text = f"-ELBO is {train['neg_elbo']:.2f} in training and {metrics['neg_elbo'].value:.2f} on the test set. "
            if gap > 0:
                text += "The model fits its training data better than new data. "
                text += "The test -ELBO was still falling: train longer." if falling else "Train less, or on more data."
            else:
                text += "Training metrics are averages over an epoch in which the parameters changed: train longer."
            found.append(("Training and test differ", text))
    return found


def _importance_weights(marginal: Metric, more: str) -> list[tuple[str, str]]:
    if marginal.unreliable is None:
        text = "log p(x) was estimated without a diagnostic of its importance weights, which needs at least 25 draws."
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
