"""The description of a run in ``config.json``: the names of its parts, and the provenance of its metrics."""

import functools
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import pyro_vae
from pyro_vae import _processes as processes
from pyro_vae.data.dataset import Data
from pyro_vae.estimates.log_weights import base_distribution, weigh
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.description import description
from pyro_vae.models.programs import ProgramPair, evaluating, is_program_pair
from pyro_vae.models.vae import VAE
from pyro_vae.runs.presets import Settings
from pyro_vae.training.objective import Objective
from pyro_vae.training.state import identity, processor

__all__ = ["described", "further", "model_of", "name_of", "parts_of", "prepared", "provenance", "versions"]


def model_of(objective: Objective) -> Any:
    """The model of an objective: a module or a pair with model and guide, or an autoencoder; None if it has none."""
    found: list[nn.Module] = []
    for module in objective.modules():
        if isinstance(module, ProgramPair | VAE | Autoencoder) and not any(module in set(m.modules()) for m in found):
            found.append(module)
    models = {id(owner): owner for owner in (_whole(module) for module in found)}
    if len(models) > 1:
        names = ", ".join(name_of(model) for model in models.values())
        raise ValueError(f"train_run: the objective has several models, {names}. Pass the one to be measured: model=...")
    return next(iter(models.values()), None)


def _whole(module: nn.Module) -> Any:
    return module.module if isinstance(module, ProgramPair) and module.module is not None else module


def provenance(train: Data, test: Data | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of the metrics: seed, data, hardware, versions."""
    return {
        "seed": options.get("seed", 0),
        "dataset": train.name,
        "data_note": train.note,
        "test_identity": None if test is None else identity(test),
        "device": train.x.device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processes": processes.world_size(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that determine the results."""
    return {
        "pyro_vae": pyro_vae.__version__,
        "pyro-ppl": pyro.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def prepared(objective: Objective, model: Any, train: Data, batch_size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module with all parameters, after these were initialised; and a batch."""
    rows = min(batch_size, len(train))
    # fit checks all data; without this check an invalid batch would fail somewhere in the model.
    train.subset(slice(rows)).check(objective.check, objective.forward)
    with torch.random.fork_rng(devices=[train.x.device] if train.x.is_cuda else []):
        batch = train.batch(torch.arange(rows, device=train.x.device))
    with pyro.validation_enabled(False):
        objective.prepare(*batch)
        if not is_program_pair(model):
            return (objective if model is None else model), batch
        pair = ProgramPair(model)
        pair.prepare(*batch)
    return pair.holder, batch


def described(
    objective: Objective, model: Any, train: Data, batch: Sequence[Tensor], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The description of a run without settings: model, objective, training options, and the shapes of a batch."""
    return {
        "model": "none" if model is None else _model_name(model),
        "objective": objective.identity(),
        "likelihood": _likelihood(model, batch),
        "binarization": train.binarization,
        "batch": {name: [list(t.shape), str(t.dtype)] for name, t in zip(train.inputs, batch, strict=True)},
        "training": {name: _plain(value) for name, value in options.items() if name not in _SAID},
    }


_SAID = ("seed", "verbose", "on_record", "stop", "checkpoint_every", "device")  # elsewhere, or no part of what the run is


def _likelihood(model: Any, batch: Sequence[Tensor]) -> str:
    """The distributions of the observed sites."""
    if not is_program_pair(model):
        return "none" if isinstance(model, Autoencoder) else "of no model of random variables"
    pair = ProgramPair(model)
    devices = [t.device for t in batch if t.is_cuda][:1]
    with torch.no_grad(), torch.random.fork_rng(devices=devices), evaluating(*pair.programs):
        observed = [site for site in weigh(pair, batch).sites if site.observed]
    return ", ".join(dict.fromkeys(type(base_distribution(site.p)).__name__ for site in observed))


def further(about: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of config.json that say nothing else than it does."""
    own = {"format", "event_shape", "model", "objective", "likelihood", "batch", "training", "parts"}
    if clash := sorted(about.keys() & (own | {each.name for each in fields(Settings)})):
        raise ValueError(f"about: {', '.join(clash)}: entries that config.json has itself. Give others these names.")
    try:
        json.dumps(dict(about))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about: expected plain values, as JSON has them: {error}.") from error
    return dict(about)


def parts_of(model: Any) -> dict[str, str]:
    """What a model is, by the path of each part, however its programs were passed."""
    return description(ProgramPair(model) if is_program_pair(model) else model)


def _model_name(model: Any) -> str:
    """The names of the model's class and of its parts."""
    if isinstance(model, VAE):
        parts = ("encoder", "decoder", "prior", "posterior", "likelihood")
        return f"{name_of(model)}({', '.join(f'{part} {name_of(getattr(model, part))}' for part in parts)})"
    if isinstance(model, ProgramPair | tuple):
        model, guide = ProgramPair(model).programs
        return f"model {name_of(model)}, guide {name_of(guide)}"
    return name_of(model)


def name_of(part: Any) -> str:
    """The name of a function, or of the class of an object."""
    if isinstance(part, ProgramPair | tuple):
        part = ProgramPair(part).programs[0]
    if isinstance(part, functools.partial):
        return name_of(part.func)
    return str(getattr(part, "__name__", type(part).__name__))


def _plain(value: Any) -> Any:
    """The value if JSON can represent it, else a description."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if hasattr(value, "item"):  # a number of NumPy
        return value.item()
    if isinstance(value, functools.partial):
        return f"{name_of(value)}({', '.join(f'{name}={_plain(v)}' for name, v in value.keywords.items())})"
    return name_of(value)
