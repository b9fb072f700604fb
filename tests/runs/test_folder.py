import json
import pickle

import pytest
import torch
from conftest import Malicious
from pyro.infer import Predictive

from pyro_vae import CheckpointError, load_preset, load_run
from pyro_vae.runs.folder import append_jsonl, new_run, save_weights, write_config, write_json

SETTINGS = load_preset("gaussian-z4", hidden=(6, 5))


@pytest.fixture
def run(tmp_path):
    folder = new_run(tmp_path / "run", name="test")
    vae = SETTINGS.build_vae((1, 4, 4))
    write_config(folder, SETTINGS, event_shape=(1, 4, 4), dataset="digits", seed=0)
    save_weights(folder, vae)
    return folder, vae


def test_round_trip(run):
    folder, vae = run
    state = torch.random.get_rng_state()
    loaded = load_run(folder)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not loaded.training
    assert loaded.likelihood == vae.likelihood
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(loaded.encode(x).mean, vae.encode(x).mean)
    assert torch.equal(loaded.decode(torch.ones(4)).mean, vae.decode(torch.ones(4)).mean)
    assert Predictive(loaded.model, num_samples=2)(size=3)["x"].shape == (2, 3, 1, 4, 4)


@pytest.mark.parametrize("preset", ["autoencoder-z2", "conv-gaussian", "conv-autoencoder"])
def test_round_trip_of_other_models(tmp_path, preset):
    settings = load_preset(preset)
    model = settings.build_model((1, 32, 32))
    model(torch.rand(4, 1, 32, 32)) if preset != "conv-gaussian" else model.encode(
        torch.rand(4, 1, 32, 32)
    )  # moves batch norm
    folder = new_run(tmp_path / "run", name="test")
    write_config(folder, settings, event_shape=(1, 32, 32))
    save_weights(folder, model)
    loaded = load_run(folder)
    assert type(loaded) is type(model)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_config_of_an_earlier_version_without_the_newer_settings(run):
    folder, vae = run
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("steps", "record_every", "net", "image_size"):
        del config[name]
    path.write_text(json.dumps(config))
    assert torch.equal(load_run(folder).decode(torch.ones(4)).mean, vae.decode(torch.ones(4)).mean)


def test_weights_of_an_earlier_version_that_standardised_before_the_encoder(tmp_path):
    settings = load_preset("bernoulli-z20", likelihood="learned-normal", hidden=(4,), latent_dim=2)
    vae = settings.build_vae((3,), moments=(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])))
    run = new_run(tmp_path / "run", name="x")
    write_config(run, settings, event_shape=(3,))
    save_weights(run, vae)
    now = vae.state_dict()
    then = {name.replace("encoder.", "encoder.1.") if name.startswith("encoder.") else name: t for name, t in now.items()}
    moments = {f"encoder.0.{name}": now[f"likelihood.{name}"].float() for name in ("loc", "scale")}
    torch.save({**moments, **then}, run / "checkpoints" / "weights.pt")
    found = load_run(run).state_dict()
    assert found.keys() == now.keys()
    assert all(torch.equal(found[name], now[name]) for name in now)


def test_default_folders_are_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b, c = (new_run(None, name="vae-digits") for _ in range(3))
    assert len({a, b, c}) == 3
    assert all(path.name.startswith("vae-digits-") and path.parent.name == "runs" for path in (a, b, c))


def test_a_folder_that_is_not_empty_is_refused(run, tmp_path):
    folder, _ = run
    with pytest.raises(CheckpointError, match="not empty.*--overwrite"):
        new_run(folder, name="x")
    assert load_run(folder)
    (tmp_path / "empty").mkdir()
    assert new_run(tmp_path / "empty", name="x")


def test_overwrite_replaces_a_run_and_nothing_else(run, tmp_path):
    folder, _ = run
    append_jsonl(folder / "metrics.jsonl", {"epoch": 1})
    (folder / "figures" / "old.png").write_text("old")
    (folder / "notes.txt").write_text("mine")
    new_run(folder, name="x", overwrite=True)
    assert sorted(p.name for p in folder.rglob("*")) == [".lock", "checkpoints", "figures", "notes.txt"]
    mine = tmp_path / "thesis"
    (mine / "figures").mkdir(parents=True)
    (mine / "figures" / "important.png").write_text("mine")
    with pytest.raises(CheckpointError, match="no earlier run"):
        new_run(mine, name="x", overwrite=True)
    assert (mine / "figures" / "important.png").exists()


def test_a_start_that_was_killed_leaves_a_folder_that_can_be_used(tmp_path):
    new_run(tmp_path / "run", name="x")
    (tmp_path / "run" / ".config.json.tmp").write_text("{")
    new_run(tmp_path / "run", name="x")
    (tmp_path / "run" / "figures" / "mine.png").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        new_run(tmp_path / "run", name="x")


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        new_run(tmp_path / "file" / "run", name="x")


def edit(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def drop(name):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        del config[name]
        (folder / "config.json").write_text(json.dumps(config))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate_weights(folder):
    path = folder / "checkpoints" / "weights.pt"
    path.write_bytes(path.read_bytes()[:-200])


DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: missing"),
    "not json": (write("config.json", b"{"), "not the config of a run"),
    "binary config": (write("config.json", b"\xff\xfe\x00"), "not the config of a run"),
    "a list": (write("config.json", b"[1]"), "expected an object, found list"),
    "newer format": (edit(format=2), "expected format 1, found 2"),
    "missing entry": (drop("latent_dim"), "no entry latent_dim"),
    "edited value": (edit(latent_dim=-1), "latent_dim: expected a whole number"),
    "edited hidden": (edit(hidden="400"), "hidden: expected whole numbers"),
    "edited shape": (edit(event_shape=[1, "a"]), "event_shape: expected whole numbers"),
    "other model": (edit(latent_dim=5), "not the weights of the model"),
    "no weights": (lambda folder: (folder / "checkpoints" / "weights.pt").unlink(), "weights.pt: missing"),
    "truncated weights": (truncate_weights, "not a file of torch.save"),
    "empty weights": (write("checkpoints/weights.pt", b""), "not a file of torch.save"),
    "malicious weights": (write("checkpoints/weights.pt", pickle.dumps(Malicious())), "not a file of torch.save"),
}


@pytest.mark.parametrize(("harm", "match"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_runs(run, harm, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = run
    harm(folder)
    with pytest.raises(CheckpointError, match=match):
        load_run(folder)
    assert not (tmp_path / "pwned").exists()


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match="missing. A run folder is what"):
        load_run(tmp_path / "nothing")


def test_a_failed_write_leaves_the_old_file(run):
    folder, _ = run
    before = (folder / "config.json").read_text()
    with pytest.raises(TypeError):
        write_json(folder / "config.json", {"x": object()})
    assert (folder / "config.json").read_text() == before
