"""Run folders -> one self-contained HTML page: settings, metrics, cautions, figures and an interactive decoder.

The page makes no network requests: images, style sheet, script and the decoder's parameters are embedded, and its content
security policy forbids anything else. All text from a run folder is escaped.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pyro_vae._files import CheckpointError, atomic_write
from pyro_vae.data.builtin import DATASETS
from pyro_vae.report.cautions import cautions_of
from pyro_vae.report.comparison import Metric, compare, conditions
from pyro_vae.report.explorer import LIMIT, NoExplorerError, decoder_record
from pyro_vae.report.svg import Panel, panels
from pyro_vae.report.texts import FIGURES, MEASURES, title_and_reading
from pyro_vae.runs.folder import read_config, read_records
from pyro_vae.runs.load import load_run
from pyro_vae.runs.presets import PRESETS, Settings
from pyro_vae.training.records import TrainingRecord

__all__ = ["RunRecord", "read_run", "render", "write_report"]

_LIMIT = 7_500_000  # bytes of figures and decoders in a page, in base64, so that it stays below 8 MB
_POINTS = 500


@dataclass(frozen=True)
class Figure:
    """A PNG of the run, with its title and an explanation of how to read it."""

    name: str
    title: str
    reading: str
    width: int
    height: int
    base64: str


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder, prepared for the page.

    Args:
        name: of the run.
        facts: a description of the run, by headline.
        settings: all entries of its config: name, value, and the value of its preset if that differs (else empty).
        conditions: conditions that runs must share for their metrics to be comparable.
        metrics: the final ones on the test set, by name.
        train: the last training metrics, by name.
        warnings: cautions: headline and explanation.
        curves: training curves.
        figures: the files in ``figures/``, without the training curves, which are redrawn.
        left_out: names of figures that exceed the size of the page.
        explorer: the input of ``explorer.js``; None if the run has no explorer.
        no_explorer: the reason why it has none.
    """

    name: str
    facts: dict[str, str]
    settings: tuple[tuple[str, str, str], ...]
    conditions: dict[str, str]
    metrics: dict[str, Metric]
    train: dict[str, float]
    warnings: tuple[tuple[str, str], ...]
    curves: tuple[Panel, ...]
    figures: tuple[Figure, ...]
    left_out: tuple[str, ...]
    explorer: dict[str, Any] | None
    no_explorer: str

    @property
    def size(self) -> int:
        """The size of its decoder and figures in the page, in bytes."""
        return _size(self.explorer) + sum(len(figure.base64) for figure in self.figures)


def _size(explorer: Mapping[str, Any] | None) -> int:
    return len(json.dumps(explorer)) if explorer else 0


def read_run(folder: str | Path, *, name: str | None = None, limit: int = _LIMIT) -> RunRecord:
    """Read a run folder; nothing is trained, no data are loaded, and no code in its files is run.

    Args:
        folder: of a run, complete or stopped.
        name: to show; default: that of the folder.
        limit: maximum size of its decoder and figures in the page, in bytes.

    Raises:
        CheckpointError: the folder is not that of a run, or a file of the run is damaged.
    """
    folder = Path(folder)
    settings, event_shape, config = read_config(folder)
    name = folder.resolve().name if name is None else name
    metrics = _json(folder / "metrics.json")
    history = read_records(folder / "metrics.jsonl")
    latents = _latents(folder / "latents.json", None if settings is None else settings.latent_dim)
    if not isinstance(metrics, dict | None):
        raise CheckpointError(f"{folder}: metrics.json has no metrics of a run. Train again.")
    test = _test_metrics(metrics or {})
    train = (metrics or {}).get("train", {})
    train = {key: float(value) for key, value in train.items() if _is_number(value)} if isinstance(train, dict) else {}
    explorer, no_explorer = _explorer(folder, settings, latents, limit)
    figures, left_out = _figures(folder / "figures", config, limit - _size(explorer))
    images = (metrics or {}).get("images")
    common = conditions(config, event_shape, images=images if isinstance(images, int) else None)
    if isinstance(identity := config.get("test_identity"), str):
        common["data set"] += f", test data {identity}"
    elif config.get("dataset") not in DATASETS or config.get("data") is not None:
        common["data set"] += f", as read by {name}: it is not recorded whether other runs read the same data"
    return RunRecord(
        name,
        _facts(settings, config, common, metrics),
        _settings(settings, config),
        common,
        test,
        train,
        tuple(
            cautions_of(
                config,
                test,
                finished=metrics is not None,
                train=train,
                kl=(latents or {}).get("kl"),
                falling=_still_falls(history),
            )
        ),
        tuple(panels(history)),
        figures,
        left_out,
        explorer,
        no_explorer,
    )


def _still_falls(history: Sequence[TrainingRecord]) -> bool:
    """Whether the last test -ELBO is the lowest."""
    tests = [record.test.get("neg_elbo") for record in history if record.test is not None]
    numbers = [value for value in tests if value is not None and _is_number(value)]
    return len(numbers) > 1 and numbers[-1] == min(numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1e100)  # larger ints may overflow a float


def _json(path: Path) -> Any:
    """The content of a JSON file; None if it does not exist."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not JSON ({error}). Restore it, or train again.") from error


def _latents(path: Path, latent_dim: int | None) -> dict[str, Any] | None:
    """``latents.json``: posterior means of some test observations, their labels, and the KL per dimension of the test set.

    For a run without settings, the number of dimensions is that of the means, and there may be no KL per dimension.
    """
    found = _json(path)
    if found is None:
        return None
    try:
        points = torch.tensor(found["means"], dtype=torch.float64)[:_POINTS]
        latent_dim = points.shape[1] if latent_dim is None else latent_dim
        kl = found["kl_per_dimension"]
        kl = None if kl is None else torch.tensor(kl, dtype=torch.float64)
        labels, names = found.get("labels"), found.get("classes")
        kinds = None if labels is None else sorted(set(labels[: len(points)]))
        if kinds is not None and (len(labels) != len(found["means"]) or not all(type(kind) is int for kind in kinds)):
            raise ValueError("labels: expected a whole number for each of the means")
        fits = points.shape == (len(points), latent_dim) and (kl is None or kl.shape == (latent_dim,))
        if not fits or not points.isfinite().all():
            raise ValueError(f"expected finite means and kl_per_dimension of {latent_dim} dimensions")
        return {
            "points": [[round(value, 3) for value in point] for point in points.tolist()],
            "labels": None if kinds is None else [kinds.index(label) for label in labels[: len(points)]],
            "classes": None if kinds is None else [str(names[kind] if names else kind) for kind in kinds],
            "kl": None if kl is None else kl.tolist(),
        }
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not the latents of this run ({error}). Remove it, or evaluate the run again."
        ) from error


def _test_metrics(metrics: Mapping[str, Any]) -> dict[str, Metric]:
    test = metrics.get("test")
    records = {**metrics, **(test if isinstance(test, dict) else {})}
    found = {}
    for name, record in records.items():
        if isinstance(record, dict) and _is_number(record.get("value")):
            names = ("standard_error", "num_samples", "median_ess", "unreliable")
            kept: dict[str, Any] = {key: record[key] for key in names if _is_number(record.get(key))}
            kept = {key: value for key, value in kept.items() if math.isfinite(value) and value >= 0}
            found[name] = Metric(name, float(record["value"]), **kept)
    return found


def _facts(
    settings: Settings | None, config: Mapping[str, Any], common: Mapping[str, str], metrics: Mapping[str, Any] | None
) -> dict[str, str]:
    model, training = _model_and_training(settings) if settings is not None else _of_ones_own(config)
    facts = {
        "Model": model,
        "Likelihood": common["likelihood"],
        "Data": f"{common['data set']}, {common['size']}",
        "Binarisation": common["binarisation"],
        "Training": f"{training}, seed {config.get('seed', 'not recorded')}",
    }
    if metrics and _is_number(metrics.get("seconds")):
        facts["Time"] = f"{metrics['seconds']:,.0f} s of training on {config.get('device', 'a device not recorded')}"
    if isinstance(versions := config.get("versions"), dict):
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return facts


def _of_ones_own(config: Mapping[str, Any]) -> tuple[str, str]:
    """Model and training of a run without settings, from its config."""
    training = config.get("training")
    options = [f"{name} {_text(value)}" for name, value in training.items()] if isinstance(training, dict) else []
    return str(config.get("model")), ", ".join([str(config.get("objective", "an objective not recorded")), *options])


def _model_and_training(settings: Settings) -> tuple[str, str]:
    widths = "-".join(map(str, settings.hidden))
    kind = "autoencoder" if settings.likelihood == "none" else "variational autoencoder"
    nets = {"conv": "convolutions, channels", "mlp-tanh": "tanh layers", "mlp-linear": "ReLU layers"}.get(
        settings.net, "ReLU layers"
    )
    length = f"{settings.epochs} epochs" if settings.epochs is not None else f"{settings.steps:,} steps"
    objective = {"iwae": f"IWAE bound of {settings.particles} draws"}.get(settings.objective, f"ELBO ({settings.objective})")
    falling = " and falling in stages" if settings.schedule == "stages" else ""
    weight = "" if settings.beta == 1 else f", KL weight {settings.beta:g}"
    return (
        f"{kind}, {nets} {widths}, {settings.latent_dim} latent dimensions (preset {settings.preset})",
        f"{objective}{weight}; {length}, batch {settings.batch_size}, learning rate {settings.lr:g}{falling}",
    )


def _settings(settings: Settings | None, config: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    preset = None if settings is None else PRESETS.get(settings.preset)
    shown = []
    for name, value in config.items():
        if name in ("format", "versions", "parts"):  # parts: for comparison when weights are loaded
            continue
        of_preset = getattr(preset, name, None) if preset and name in {field.name for field in fields(Settings)} else value
        same = list(value) == list(of_preset) if isinstance(of_preset, tuple) else value == of_preset
        shown.append((name, _text(value), "" if same else _text(of_preset)))
    return tuple(shown)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(part)}" for name, part in value.items()) or "none"
    return "not set" if value is None else str(value)


def _explorer(
    folder: Path, settings: Settings | None, latents: Mapping[str, Any] | None, limit: int
) -> tuple[dict[str, Any] | None, str]:
    if settings is None:
        return None, "its model is not described by settings, so its decoder cannot be built for the page"
    weights = folder / "checkpoints" / "weights.pt"
    if not weights.exists():
        return None, "the run has no saved parameters: it was stopped before the end of its first epoch"
    try:
        record = decoder_record(load_run(folder), limit=min(LIMIT, limit * 3 // 4))
    except NoExplorerError as error:
        return None, str(error)
    axes = list(range(min(2, settings.latent_dim)))
    if latents is not None and latents["kl"] is not None:
        usage = torch.tensor(latents["kl"]).nan_to_num()
        axes = sorted(usage.argsort(descending=True, stable=True)[:2].tolist())
    return {**record, "axes": axes, **{key: (latents or {}).get(key) for key in ("points", "labels", "classes")}}, ""


def _figures(folder: Path, config: Mapping[str, Any], room: int) -> tuple[tuple[Figure, ...], tuple[str, ...]]:
    """The figures that there is room for, the most telling first, and the names of the others."""
    order = list(FIGURES)
    paths = sorted(folder.glob("*.png"), key=lambda p: (order.index(p.stem) if p.stem in order else len(order), p.stem))
    shown, left_out = [], []
    for path in paths:
        if path.stem == "training_curves":  # redrawn from metrics.jsonl
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error.strerror}). Correct its permissions, or remove it."
            ) from error
        if not content.startswith(b"\x89PNG\r\n\x1a\n") or len(content) < 24:
            raise CheckpointError(f"{path}: damaged, not a PNG. Remove it, or draw the figures again with --resume.")
        encoded = base64.b64encode(content).decode()
        if len(encoded) > room:
            left_out.append(path.stem)
            continue
        room -= len(encoded)
        title, reading = title_and_reading(path.stem, config)
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))  # of the PNG's header
        shown.append(Figure(path.stem, title, reading, width, height, encoded))
    return tuple(shown), tuple(left_out)


def render(runs: Sequence[RunRecord], *, title: str | None = None) -> str:
    """The page of one run, or of several with their comparison, as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here, so that `import pyro_vae` stays light
    from markupsafe import Markup

    def data(content: Any) -> Markup:
        """JSON that cannot end the script element that contains it."""
        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
        return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))

    script = files("pyro_vae.report").joinpath("explorer.js").read_text("utf-8")
    environment = Environment(
        loader=PackageLoader("pyro_vae.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data"] = data
    return environment.get_template("report.html.j2").render(
        title=title or (f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"),
        runs=runs,
        groups=compare([(run.name, run.conditions, run.metrics) for run in runs]) if len(runs) > 1 else [],
        measures=MEASURES,
        style=Markup(files("pyro_vae.report").joinpath("report.css").read_text("utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_report(folders: Sequence[str | Path], out: str | Path | None = None, *, title: str | None = None) -> Path:
    """Write the page of one or more runs, atomically; an existing file is replaced.

    Args:
        folders: of the runs.
        out: file; default: ``report.html`` in the run's folder, or for several runs in the working directory.
        title: of the page.

    Returns:
        The file.

    Raises:
        CheckpointError: a folder is not that of a run, a run is damaged, or the file cannot be written.

    Example:
        >>> write_report(["runs/demo"])  # doctest: +SKIP
        PosixPath('runs/demo/report.html')
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    if not paths or len(set(resolved)) < len(paths):
        raise CheckpointError("report: expected one or more different run folders. Pass each once.")
    clash = len({path.name for path in resolved}) < len(paths)
    names = [str(path) if clash else None for path in paths]
    runs = [read_run(path, name=name) for path, name in zip(paths, names, strict=True)]
    if sum(run.size for run in runs) > _LIMIT:  # then each gets an equal part
        runs = [read_run(path, name=name, limit=_LIMIT // len(paths)) for path, name in zip(paths, names, strict=True)]
    if out is None:
        out = paths[0] / "report.html" if len(paths) == 1 else Path("report.html")
    page = render(runs, title=title)
    with atomic_write(Path(out)) as stream:
        stream.write(page.encode(errors="replace"))  # a config may have lone surrogates
    return Path(out)
