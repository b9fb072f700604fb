"""Comparison of runs: which are comparable, and which is better by more than the standard error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_vae.report.texts import MEASURES

__all__ = ["Group", "Metric", "compare", "conditions"]

RANKED = {"neg_elbo": 1, "log_marginal": -1, "mean_squared_error": 1}  # 1: lower is better; -1: higher is better
_ERRORS = 2.0  # a significant difference, in combined standard errors

_DENSITIES = {
    ("bernoulli", True): "Bernoulli formula on grey values: a relaxed score, not a probability",
    ("bernoulli", False): "Bernoulli on black and white pixels: a probability",
    ("normal", True): "normal with variance 1/2: a density",
    ("normal", False): "normal with variance 1/2: a density, of black and white pixels",
    ("learned-normal", True): "normal with learned variances: a density",
    ("learned-normal", False): "normal with learned variances: a density, of black and white pixels",
    ("poisson", True): "Poisson: a probability of counts",
    ("poisson", False): "Poisson: a probability of counts, of black and white pixels",
    ("none", True): "none: a plain autoencoder, its squared error",
    ("none", False): "none: a plain autoencoder, its squared error",
}


@dataclass(frozen=True)
class Metric:
    """A final metric of a run.

    Args:
        name: ``neg_elbo``, ``kl``, ...
        value: nats per observation; for squared errors, squared units.
        standard_error: of the value; 0 if it is exact; None if the run recorded no finite one.
        num_samples: latent draws per observation; 0 if it needs none.
        median_ess: median effective sample size of importance weights; None for other metrics.
        unreliable: number of observations with unreliable importance weights; None if not known.

    Example:
        >>> str(Metric("neg_elbo", 102.4567, standard_error=0.0123))
        '102.457 ± 0.012'
        >>> str(Metric("kl", 25.25, standard_error=0.0)), str(Metric("kl", 25.25))
        ('25.25', '25.25 (no error given)')
    """

    name: str
    value: float
    standard_error: float | None = None
    num_samples: int | None = None
    median_ess: float | None = None
    unreliable: int | None = None

    def __str__(self) -> str:
        if not self.standard_error:
            digits = 2 if abs(self.value) >= 1 else 4
            return f"{self.value:.{digits}f}" + (" (no error given)" if self.standard_error is None else "")
        digits = min(6, max(1, 1 - math.floor(math.log10(self.standard_error))))  # two significant digits of the error
        return f"{self.value:.{digits}f} ± {self.standard_error:.{digits}f}"


def conditions(config: Mapping[str, Any], event_shape: Sequence[int], *, images: int | None = None) -> dict[str, str]:
    """The conditions that two runs must share for their metrics to be comparable, in words.

    Args:
        config: of the run; ``dataset``, ``binarization``, ``likelihood`` and ``binary`` (whether the data are all 0 or 1
            without binarisation) are used.
        event_shape: shape of one observation.
        images: number of test observations, if the run used a part of them.

    Example:
        >>> conditions({"dataset": "mnist", "binarization": "none", "likelihood": "bernoulli"}, (1, 28, 28))["size"]
        '1 x 28 x 28 (channels x height x width)'
    """
    binarization, likelihood = config.get("binarization"), config.get("likelihood")
    unit = {1: " values", 3: " (channels x height x width)"}.get(len(event_shape), "")
    grey = len(event_shape) == 3 and event_shape[0] == 1
    kept = f"none ({'grey pixels' if grey else 'values as they are'})"
    binary = binarization == "none" and config.get("binary") is True
    kept = "none (values of 0 and 1)" if binary else kept
    density = _DENSITIES.get((str(likelihood), binarization == "none" and not binary), str(likelihood))
    density = density.replace("black and white pixels", "values of 0 and 1") if binary else density
    return {
        "data set": str(config.get("dataset", "not recorded")) + ("" if images is None else f", {images:,} test images"),
        "size": " x ".join(map(str, event_shape)) + unit,
        "binarisation": kept if binarization == "none" else str(binarization),
        "likelihood": density,
    }


@dataclass(frozen=True)
class Group:
    """A group of comparable runs.

    Args:
        conditions: the conditions that they share, see :func:`conditions`.
        apart: the conditions in which the group differs from other groups.
        rows: for each run its name and, for each metric, the text and the verdict: ``"best"``, ``"not distinguishable from
            the best"``, or empty.
        notes: why a metric is not ranked, and cautions.
    """

    conditions: dict[str, str]
    apart: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, tuple[str, str]]], ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[tuple[str, Mapping[str, str], Mapping[str, Metric]]]) -> list[Group]:
    """Groups of comparable runs, with each metric ranked within its group where possible.

    A run is not distinguishable from the best if they differ by at most 2 standard errors of the difference, the root of the
    sum of both squared errors. The errors are those of the latent draws on the same test data; they do not include the
    variation between training seeds.

    Args:
        runs: for each run its name, its :func:`conditions`, and its metrics by name.
    """
    keys = list(dict.fromkeys(tuple(of.items()) for _, of, _ in runs))
    differing = [name for name in dict(keys[0]) if len({dict(key)[name] for key in keys}) > 1] if keys else []
    groups = []
    for key in keys:
        members = [(name, metrics) for name, of, metrics in runs if tuple(of.items()) == key]
        verdicts: dict[str, dict[str, str]] = {}
        notes = []
        for metric in RANKED:
            found = {name: metrics[metric] for name, metrics in members if metric in metrics}
            if len(found) > 1:
                verdicts[metric], note = _rank(metric, found)
                notes += [note] if note else []
        rows = [
            (name, {n: (str(metric), verdicts.get(n, {}).get(name, "")) for n, metric in metrics.items()})
            for name, metrics in members
        ]
        groups.append(Group(dict(key), tuple(f"{name}: {dict(key)[name]}" for name in differing), tuple(rows), tuple(notes)))
    return groups


def _rank(name: str, metrics: Mapping[str, Metric]) -> tuple[dict[str, str], str]:
    """The verdict on each run, if the metric can be ranked, and a note."""
    title = MEASURES[name][0]
    draws = sorted({metric.num_samples or 0 for metric in metrics.values()})
    if name == "log_marginal" and len(draws) > 1:
        counts = " and ".join(f"{count:,}" for count in draws)
        return {}, f"{title} is not ranked: the runs made {counts} draws, and more draws alone raise it."
    if lacking := [
        run for run, metric in metrics.items() if metric.standard_error is None or not math.isfinite(metric.value)
    ]:
        return {}, f"{title} is not ranked: no finite value with a standard error for {', '.join(lacking)}."
    best = min(metrics, key=lambda run: RANKED[name] * metrics[run].value)
    verdicts = {best: "best"}
    for run, metric in metrics.items():
        error = math.hypot(metric.standard_error or 0, metrics[best].standard_error or 0)
        if run != best and abs(metric.value - metrics[best].value) <= _ERRORS * error:
            verdicts[run] = "not distinguishable from the best"
    unreliable = [run for run, metric in metrics.items() if metric.unreliable]
    if not unreliable:
        return verdicts, ""
    which = ", ".join(unreliable)
    return (
        verdicts,
        f"The order by {title} is uncertain: importance weights of {which} are unreliable, so the error is too small.",
    )
