"""Runs side by side: which may be compared at all, and which is better beyond the error of its figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_vae.report.texts import MEASURES

__all__ = ["FigureOfRun", "Group", "compare", "conditions"]

RANKED = {"neg_elbo": 1, "log_marginal": -1, "mean_squared_error": 1}  # 1: lower is better; -1: higher is better
_ERRORS = 2.0  # combined standard errors that a difference must pass to be told from noise

_DENSITIES = {
    ("bernoulli", True): "Bernoulli formula on grey values: a relaxed score, no probability",
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
class FigureOfRun:
    """A final figure of a run.

    Args:
        name: ``neg_elbo``, ``kl``, ...
        value: nats per image; of squared errors, squared units.
        standard_error: of the value; 0 where it is exact; None where the run recorded none, or no finite one.
        num_samples: latent draws per image; 0 where none was needed.
        median_ess: of importance weights; None of other figures.
        unreliable: number of images whose importance weights are not to be trusted; None where that is not known.

    Example:
        >>> str(FigureOfRun("neg_elbo", 102.4567, standard_error=0.0123))
        '102.457 ± 0.012'
        >>> str(FigureOfRun("kl", 25.25, standard_error=0.0)), str(FigureOfRun("kl", 25.25))
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
        digits = min(6, max(1, 1 - math.floor(math.log10(self.standard_error))))  # two of the error
        return f"{self.value:.{digits}f} ± {self.standard_error:.{digits}f}"


def conditions(config: Mapping[str, Any], event_shape: Sequence[int], *, images: int | None = None) -> dict[str, str]:
    """What two runs must have in common for their figures to be compared, in words.

    Args:
        config: of the run; its ``dataset``, ``binarization``, ``likelihood`` and ``binary`` (whether the data are 0 and 1 as
            they are) are looked at.
        event_shape: shape of one observation.
        images: number of test observations, where the run took a part of them.

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
    """Runs whose figures may be compared with one another, and with those of no other group.

    Args:
        conditions: what they have in common, see :func:`conditions`.
        apart: those of the conditions in which it differs from other groups: why it stands apart.
        rows: per run its name and, per figure, the text and the verdict: ``"best"``, ``"not distinguishable from the
            best"``, or empty.
        notes: why a figure is not ranked, and what to beware of.
    """

    conditions: dict[str, str]
    apart: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, tuple[str, str]]], ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[tuple[str, Mapping[str, str], Mapping[str, FigureOfRun]]]) -> list[Group]:
    """Groups of comparable runs, each figure ranked within its group where that can be done.

    A figure is the best, or not distinguishable from it: within 2 standard errors of the difference, the square root of
    both errors' squared sum. The error is that of the latent draws on the same test data; another seed of the training
    moves a figure too, and is not in it.

    Args:
        runs: of each the name, the :func:`conditions`, and the figures by name.
    """
    keys = list(dict.fromkeys(tuple(of.items()) for _, of, _ in runs))
    differing = [name for name in dict(keys[0]) if len({dict(key)[name] for key in keys}) > 1] if keys else []
    groups = []
    for key in keys:
        members = [(name, figures) for name, of, figures in runs if tuple(of.items()) == key]
        verdicts: dict[str, dict[str, str]] = {}
        notes = []
        for figure in RANKED:
            found = {name: figures[figure] for name, figures in members if figure in figures}
            if len(found) > 1:
                verdicts[figure], note = _rank(figure, found)
                notes += [note] if note else []
        rows = [
            (name, {n: (str(figure), verdicts.get(n, {}).get(name, "")) for n, figure in figures.items()})
            for name, figures in members
        ]
        groups.append(Group(dict(key), tuple(f"{name}: {dict(key)[name]}" for name in differing), tuple(rows), tuple(notes)))
    return groups


def _rank(name: str, figures: Mapping[str, FigureOfRun]) -> tuple[dict[str, str], str]:
    """The verdict on each run, and a note; no verdict where there can be none."""
    title = MEASURES[name][0]
    draws = sorted({figure.num_samples or 0 for figure in figures.values()})
    if name == "log_marginal" and len(draws) > 1:
        counts = " and ".join(f"{count:,}" for count in draws)
        return {}, f"{title} is not ranked: the runs made {counts} draws, and more draws raise it by themselves."
    if lacking := [
        run for run, figure in figures.items() if figure.standard_error is None or not math.isfinite(figure.value)
    ]:
        return {}, f"{title} is not ranked: no finite figure with an error of {', '.join(lacking)}."
    best = min(figures, key=lambda run: RANKED[name] * figures[run].value)
    verdicts = {best: "best"}
    for run, figure in figures.items():
        error = math.hypot(figure.standard_error or 0, figures[best].standard_error or 0)
        if run != best and abs(figure.value - figures[best].value) <= _ERRORS * error:
            verdicts[run] = "not distinguishable from the best"
    unreliable = [run for run, figure in figures.items() if figure.unreliable]
    if not unreliable:
        return verdicts, ""
    which = ", ".join(unreliable)
    return (
        verdicts,
        f"Beware of the order by {title}: importance weights of {which} are unreliable, so the error is too small.",
    )
