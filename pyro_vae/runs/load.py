"""Loading the model of a run: rebuilt from its settings, or passed by the caller."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import pyro
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_vae._checks import usable_device
from pyro_vae._files import CheckpointError, read_tensors
from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.description import description, differences
from pyro_vae.models.programs import ProgramPair, is_program_pair
from pyro_vae.models.vae import VAE
from pyro_vae.runs.folder import CONFIG, WEIGHTS, read_config, read_settings

__all__ = ["load_run"]


@overload
def load_run(folder: str | Path, *, model: None = None, device: torch.device | str | None = None) -> VAE | Autoencoder: ...
@overload
def load_run(folder: str | Path, *, model: Any, device: torch.device | str | None = None) -> Any: ...
def load_run(folder: str | Path, *, model: Any = None, device: torch.device | str | None = None) -> Any:
    """Load the model of a run folder, with the parameters of its last record, in evaluation mode.

    Args:
        folder: of the run.
        model: for a run without settings: a model that is built in the same way, a module, a pair ``(model, guide)``, or the
            objective if it has no model. Its parameters are set to those of the run, including those in Pyro's param store.
        device: of the result; default: the CPU, or the device of the given model.

    Returns:
        The VAE or autoencoder that the run's settings describe; or the given model, a pair as a
        :class:`~pyro_vae.models.programs.ProgramPair`.

    Raises:
        CheckpointError: the folder is not that of a run; a file is damaged, or does not match the others or the given model;
            or the run has no settings, and no model is given.

    Example:
        >>> from pyro.infer import Predictive
        >>> vae = load_run("runs/demo")  # doctest: +SKIP
        >>> images = Predictive(vae.model, num_samples=16)(size=1)["x"]  # doctest: +SKIP
    """
    folder = Path(folder)
    place = None if device is None else usable_device(device)
    if model is None:
        built = _built(folder)
        _fill(built, _as_now(_weights(folder)), folder / WEIGHTS, f"the model in {CONFIG}")
        return built.to(place or "cpu").eval()
    config = read_config(folder)[2]
    its = config.get("model", f"preset {config.get('preset')}")
    given = ProgramPair(model) if is_program_pair(model) else model
    if not isinstance(given, nn.Module):
        raise CheckpointError(
            f"{folder}: model: expected a module or a pair (model, guide), found {type(model).__name__}. Pass one that is "
            f"built like that of the run ({its})."
        )
    weights = _weights(folder)
    held = _prepared(given, weights, config) if isinstance(given, ProgramPair) else given
    _fill(held, weights, folder / WEIGHTS, f"the given model (the run's is {its})")
    _check_parts(given, config, folder / CONFIG)
    if place is not None:
        given.to(place)
    return (model if isinstance(model, nn.Module) else given).eval()


def _check_parts(model: nn.Module, config: Mapping[str, Any], path: Path) -> None:
    """Refuse a model of other parts than the run's: weights that fit it too would give other figures without a word."""
    saved = config.get("parts", {})  # of an earlier version's run none are known
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path}: parts: expected texts by name, found {saved!r:.80}. Train again.")
    if changed := differences(saved, description(model)):
        raise CheckpointError(
            f"{path}: the given model is not built like that of the run (saved -> given): {'; '.join(changed)}. Build the "
            "same."
        )


def _built(folder: Path) -> VAE | Autoencoder:
    """The model that the settings describe."""
    remedy = "Pass one that is built like it: load_run(folder, model=...)."
    settings, event_shape, _ = read_settings(folder, remedy=remedy)
    with torch.random.fork_rng(devices=[]):  # the initial parameters are overwritten: restore the caller's random state
        try:
            return settings.build_model(event_shape)
        except (RuntimeError, ValueError) as error:  # RuntimeError: torch's answer to a model larger than the memory
            raise CheckpointError(f"{folder / CONFIG}: the model cannot be built ({error}).") from error


def _weights(folder: Path) -> dict[str, Any]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{path}: missing: this run was stopped in its first epoch. Resume it with --resume.")
    weights = read_tensors(path, remedy="Train again.")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: no weights of a model, a {type(weights).__name__}. Train again.")
    return weights


def _as_now(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights that an earlier version has written, with a module before the encoder that standardised the data."""
    if "encoder.0.loc" not in weights:
        return weights
    left_out = "encoder.0.loc", "encoder.0.scale"  # the likelihood has them, too
    return {name.replace("encoder.1.", "encoder.", 1): value for name, value in weights.items() if name not in left_out}


def _prepared(pair: ProgramPair, weights: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """The module with all parameters of a pair, after those in Pyro's store were initialised as in the run."""
    own = pair.holder.state_dict()
    if "batch" not in config or (own.keys() == weights.keys() and not any(map(is_lazy, own.values()))):
        return pair.holder
    like = pair.example()
    kind: dict[str, Any] = {} if like is None else {"device": like.device}
    try:
        batch = [torch.zeros(sizes, dtype=_TYPES[dtype], **kind) for sizes, dtype in config["batch"].values()]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{CONFIG}: batch: expected shapes and types of tensors, found {config.get('batch')!r:.80}."
        ) from error
    with pyro.validation_enabled(False):  # zeros may be no data of this model
        pair.prepare(*batch)
    return pair.holder


_TYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}


def _fill(model: nn.Module, weights: Any, path: Path, what: str) -> None:
    try:
        if isinstance(model, ProgramPair):  # its parameters of Pyro's store have names that load_state_dict cannot have
            _copy(weights, model.state_dict())
        else:
            model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not the weights of {what}: {reason}") from error


def _copy(weights: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    """Copy each tensor to the one with the same name."""
    saved, given = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (weights, into))
    names = {**saved, **given}
    wrong = [f"{name} {saved.get(name)} -> {given.get(name)}" for name in names if saved.get(name) != given.get(name)]
    if wrong:
        raise RuntimeError(
            f"shapes (saved -> given) {', '.join(wrong)}. Build the same; what an earlier model has left in "
            "Pyro's store is gone after pyro.clear_param_store()."
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(weights[name])
