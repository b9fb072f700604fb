"""Runs of one's own: any objective on any data into a run folder, and back."""

import functools
import json
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Malicious, equal, make_vae, weights
from torch import nn
from torch.distributions import constraints

from pyro_vae import (
    VAE,
    Autoencoder,
    CheckpointError,
    Data,
    MLPDecoder,
    MLPEncoder,
    NegativeELBO,
    NormalLikelihood,
    Objective,
    ReconstructionError,
    TrainingStoppedError,
    evaluate,
    load_data,
    load_preset,
    load_run,
    train_run,
)
from pyro_vae._files import read_tensors, write_tensors
from pyro_vae.analysis.latent import latent_means
from pyro_vae.cli import main
from pyro_vae.data.own import as_data
from pyro_vae.models.programs import ProgramPair
from pyro_vae.report.page import read_run, write_report
from pyro_vae.runs.folder import read_records
from pyro_vae.runs.presets import Settings

pytestmark = pytest.mark.filterwarnings("ignore:log_marginal.*heavy")  # of models that are hardly trained

SHAPE = {"event_shape": (1, 4, 4), "hidden": (6,), "latent_dim": 2}
X = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))
QUICK = {"epochs": 2, "batch_size": 10, "verbose": False, "figures": False, "importance_samples": 25}


def laplace(output):
    return dist.Laplace(output, 0.7)


def mine(**parts):
    parts = {"likelihood": laplace, **parts}
    return VAE(MLPEncoder(**SHAPE), MLPDecoder(**SHAPE), latent_dim=2, event_shape=(1, 4, 4), **parts)


def normal_prior(scale):
    return lambda: dist.Normal(torch.zeros(2), scale).to_event(1)


def diagonal(output):
    loc, log_scale = output
    return dist.Normal(loc, log_scale.exp()).to_event(1)


class Weighted(Objective):
    """An objective without a model, with a setting."""

    def __init__(self, weight):
        super().__init__()
        self.net, self.weight = nn.Linear(16, 16), weight

    def forward(self, x):
        return {"loss": self.weight * (self.net(x.flatten(1)) - x.flatten(1)).square().mean()}


def programs():
    """Functions: a module in a closure, a constrained parameter in Pyro's store alone."""
    net = nn.Linear(16, 2)

    def model(x):
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum(-1, keepdim=True) + torch.zeros(16)
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x.flatten(1))

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(net(x.flatten(1)), 0.5).to_event(1))

    return model, guide


class Store(nn.Module):
    """A module, and beside its own parameters one in Pyro's store."""

    def __init__(self):
        super().__init__()
        self.pair = programs()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, x):
        self.pair[0](x - self.shift)

    def guide(self, x):
        self.pair[1](x)


def state(model):
    pair = ProgramPair(model)
    pair.prepare(X[:10])
    return {name: value.clone() for name, value in pair.state_dict().items()}


@pytest.mark.parametrize("build", [mine, programs, Store])
def test_a_run_comes_back_with_its_figures(tmp_path, build):
    model = build()
    objective = NegativeELBO(*model) if isinstance(model, tuple) else NegativeELBO(model)
    test = Data(X[:9], name="some")
    folder = train_run(tmp_path / "run", objective, X, test=test, seed=3, **{**QUICK, "figures": build is mine})
    trained = state(model)
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = evaluate(model, test, importance_samples=25, seed=3)
    assert {name: figure["value"] for name, figure in metrics["test"].items()} == {n: f.value for n, f in figures.items()}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(json.loads((folder / "latents.json").read_text())["means"]) == 9
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    assert ({"reconstructions", "prior_samples", "interpolation", "denoising", "latent_pairs"} <= drawn) == (build is mine)

    pyro.clear_param_store()
    torch.manual_seed(7)
    fresh = build()
    loaded = load_run(folder, model=fresh)
    assert isinstance(loaded, ProgramPair) if build is programs else loaded is fresh
    assert not loaded.training
    found = state(fresh)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], value) for name, value in trained.items())
    if build is not mine:
        assert 0 < pyro.param("scale").item() != pytest.approx(0.7)
    again = evaluate(loaded, test, seed=3)
    assert again["neg_elbo"].value == figures["neg_elbo"].value
    page = write_report([folder]).read_text()
    assert "is not described by settings" in page
    assert ("Laplace" if build is mine else "Normal") in page
    assert "batch_size 10" in page


@pytest.mark.parametrize("build", [mine, programs])
def test_it_goes_on_where_it_was_stopped(tmp_path, build):
    def run(folder, **more):
        pyro.clear_param_store()
        torch.manual_seed(1)
        model = build()
        objective = NegativeELBO(*model) if isinstance(model, tuple) else NegativeELBO(model)
        train_run(folder, objective, X, **{**QUICK, "epochs": 4}, resume=True, **more)
        return state(model)

    straight = run(tmp_path / "straight")
    asked = iter(range(100))
    with pytest.raises(TrainingStoppedError):
        run(tmp_path / "run", stop=lambda: next(asked) >= 6)
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert "This run is not finished" in write_report([tmp_path / "run"]).read_text()
    resumed = run(tmp_path / "run")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    first, second = (read_records(tmp_path / name / "metrics.jsonl") for name in ("run", "straight"))
    assert [record.train for record in first] == [record.train for record in second]


def test_a_run_that_is_refused_leaves_the_folder_as_it_was(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="either epochs or steps"):
        train_run(folder, NegativeELBO(mine()), X, verbose=False)
    train_run(folder, NegativeELBO(mine()), X, **QUICK)  # it can be used
    with pytest.raises(CheckpointError, match="not empty.*overwrite=True"):
        train_run(folder, NegativeELBO(mine()), X, **QUICK)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="other settings.*lr"):
        train_run(folder, NegativeELBO(mine()), X, resume=True, lr=0.5, **QUICK)
    with pytest.raises(CheckpointError, match="shape of"):
        train_run(folder, NegativeELBO(Store()), X, resume=True, **QUICK)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_cannot_be_evaluated_keeps_its_training(tmp_path):
    net = nn.Linear(16, 2)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 16), 1.0).to_event(1), obs=x.flatten(1)
            )
            if z.dim() == 3 and len(z) == 25:  # the draws of log p(x)
                pyro.factor("broken", torch.full(z.shape[:-1], math.inf))

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(net(x.flatten(1)), 0.5).to_event(1))

    arguments = (tmp_path / "run", NegativeELBO(model, guide), X)
    with pytest.raises(ValueError, match=r"site 'broken'.*is trained: call again with resume=True.*samples=0"):
        train_run(*arguments, test=X[:9], **QUICK)
    trained = net.weight.clone()
    folder = train_run(*arguments, test=X[:9], resume=True, **{**QUICK, "importance_samples": 0})
    assert torch.equal(net.weight, trained)
    assert "neg_elbo" in json.loads((folder / "metrics.json").read_text())["test"]


class Deterministic(Objective):
    """An objective without a density of z: the code is a point."""

    def __init__(self):
        super().__init__()
        self.vae = mine(posterior=lambda output: dist.Delta(output[0], event_dim=1))

    def forward(self, x):
        return {"loss": -self.vae.decode(self.vae.encode(x).rsample()).log_prob(x).mean()}


def test_a_posterior_without_a_density_is_trained_and_not_measured(tmp_path, capsys):
    objective = Deterministic()
    folder = train_run(tmp_path / "run", objective, X, test=X[:9], **{**QUICK, "verbose": True})
    assert "no metrics on the test data: site 'z' is a point mass in the guide" in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"] == {}
    assert metrics["train"]["loss"] > 0
    with pytest.raises(ValueError, match="point mass in the guide"):
        evaluate(objective.vae, X)
    with pytest.raises(ValueError, match=r"point mass in the guide \(Delta\).*ReconstructionError"):
        train_run(tmp_path / "other", NegativeELBO(objective.vae), X, **QUICK)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"importance_samples": 1}, "importance_samples: expected 0 or a whole number >= 2, found 1"),
        ({"epochs": None}, "expected either epochs or steps"),
        ({"steps": 3}, "expected either epochs or steps"),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1), "lr": 0.2}, "lr: found 0.2, and 0.1 in optimizer"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        train_run(tmp_path / "run", NegativeELBO(mine()), X, test=X[:9], **{**QUICK, **options})
    assert not (tmp_path / "run").exists()


def test_a_run_with_settings_made_in_python_tells_the_command_line_where_to_go(tmp_path, capsys):
    settings = Settings("mine", "bernoulli", (6,), latent_dim=2, batch_size=10, lr=0.01, epochs=1)
    vae = settings.build_vae((1, 4, 4))
    quiet = {"verbose": False, "figures": False, "importance_samples": 0}
    folder = train_run(tmp_path / "run", settings.build_objective(vae), X, test=X[:9], settings=settings, **quiet)
    for command in (["evaluate", folder], ["train", "--resume", folder]):
        try:
            code = main([str(word) for word in command])
        except SystemExit as exit:  # argparse
            code = exit.code
        assert code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "this run was made from Python by train_run" in said
        assert f"evaluate(load_run({str(folder)!r}), data)" in said
    assert evaluate(load_run(folder), X[:9])["neg_elbo"].value == evaluate(vae, X[:9])["neg_elbo"].value


def test_without_model_the_reader_is_told_how(tmp_path, capsys):
    folder = train_run(tmp_path / "run", NegativeELBO(mine()), X, **QUICK)
    capsys.readouterr()
    with pytest.raises(
        CheckpointError, match=r"run: the model of this run \(VAE\(encoder MLPEncoder.*load_run\(folder, model="
    ):
        load_run(folder)
    for command, match in (
        (["evaluate", folder], "evaluate(load_run("),
        (["sample", folder, "--num", "3", "--out", tmp_path / "draws.npz"], "Draw from it in Python"),
        (["train", "--resume", folder], "objective, data, resume=True)"),
    ):
        try:
            code = main([str(argument) for argument in command])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        assert code == 2
        assert match in captured.err
        assert captured.err.count("\n") == 1
    assert main(["report", str(folder)]) == 0


def test_weights_of_another_model_are_refused(tmp_path):
    folder = train_run(tmp_path / "run", NegativeELBO(mine()), X, **QUICK)
    other = VAE(MLPEncoder(**{**SHAPE, "hidden": (5,)}), MLPDecoder(**SHAPE), latent_dim=2, event_shape=(1, 4, 4))
    with pytest.raises(CheckpointError, match=r"not the weights of the given model \(the run's is VAE.*size mismatch"):
        load_run(folder, model=other)
    with pytest.raises(CheckpointError, match="not the weights of the given model"):
        load_run(folder, model=programs())
    with pytest.raises(CheckpointError, match="expected a module or a pair"):
        load_run(folder, model=3)
    functions = train_run(tmp_path / "functions", NegativeELBO(*programs()), X, **QUICK)
    with pytest.raises(CheckpointError, match=r"shapes \(saved -> given\)"):
        load_run(functions, model=Store())


def test_no_file_of_a_run_can_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = train_run(tmp_path / "run", NegativeELBO(*programs()), X, **QUICK)
    config = json.loads((folder / "config.json").read_text())
    pyro.clear_param_store()
    for batch in (
        {"x": [[10, 1, 4, 4], "os.mkdir('pwned')"]},
        {"x": [[10**12, 10**6], "torch.float32"]},
        {"x": [["a"], "torch.float32"]},
        ["x"],
    ):
        (folder / "config.json").write_text(json.dumps({**config, "batch": batch}))
        with pytest.raises(CheckpointError, match="batch: expected shapes and types"):
            load_run(folder, model=programs())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoints" / "weights.pt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="not a file of torch.save"):
        load_run(folder, model=programs())
    assert not (tmp_path / "pwned").exists()


def test_an_autoencoder_and_an_objective_without_a_model(tmp_path):
    autoencoder = Autoencoder(MLPEncoder(**SHAPE, heads=1), MLPDecoder(**SHAPE), latent_dim=2, event_shape=(1, 4, 4))
    folder = train_run(tmp_path / "codes", ReconstructionError(autoencoder), X, test=X[:9], **QUICK)
    assert set(json.loads((folder / "metrics.json").read_text())["test"]) == {"squared_error", "mean_squared_error"}
    twin = Autoencoder(MLPEncoder(**SHAPE, heads=1), MLPDecoder(**SHAPE), latent_dim=2, event_shape=(1, 4, 4))
    assert equal(weights(load_run(folder, model=twin)), weights(autoencoder))
    assert "Squared error" in write_report([folder]).read_text()

    class Regression(Objective):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(16, 16)

        def forward(self, x):
            return {"loss": (self.net(x.flatten(1)) - x.flatten(1)).square().mean()}

    objective, other = Regression(), Regression()
    folder = train_run(tmp_path / "net", objective, X, test=X[:9], **{**QUICK, "figures": True})
    assert [path.name for path in (folder / "figures").iterdir()] == ["training_curves.png"]
    assert not (folder / "latents.json").exists()
    assert equal(weights(load_run(folder, model=other)), weights(objective))
    record = read_run(folder)
    assert (record.facts["Model"], record.metrics) == ("none", {})


def test_the_model_of_an_objective_with_two_has_to_be_named(tmp_path):
    class Both(Objective):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = NegativeELBO(first), NegativeELBO(second)

        def forward(self, x):
            return {"loss": self.first(x)["loss"] + self.second(x)["loss"]}

    first, second = mine(), mine()
    with pytest.raises(ValueError, match=r"has several models, VAE, VAE.*model="):
        train_run(tmp_path / "run", Both(first, second), X, **QUICK)
    folder = train_run(tmp_path / "run", Both(first, second), X, model=second, **QUICK)
    assert equal(weights(load_run(folder, model=mine())), weights(second))


def test_settings_of_ones_own_are_a_preset(tmp_path):
    settings = Settings("mine", "normal", (6,), latent_dim=2, batch_size=10, lr=0.01, epochs=2)
    vae = settings.build_vae((1, 4, 4))
    options = {"verbose": False, "figures": False, "importance_samples": 0}
    folder = train_run(tmp_path / "run", settings.build_objective(vae), X, test=X[:9], settings=settings, **options)
    assert equal(weights(load_run(folder)), weights(vae))
    record = read_run(folder)
    assert "preset mine" in record.facts["Model"]
    assert record.explorer is not None
    with pytest.raises(CheckpointError, match=r"not the weights of the given model \(the run's is preset mine\)"):
        load_run(folder, model=programs())
    with pytest.raises(ValueError, match="lr 0.01 in settings, 0.5 beside them"):
        train_run(tmp_path / "b", settings.build_objective(vae), X, settings=settings, lr=0.5, **options)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"learning_rate": 0.1}, "no argument learning_rate; beside its own it takes batch_size, "),
        ({"checkpoints": None}, "no argument checkpoints"),
        ({"stop": 3}, "stop: expected a function, found int"),
        ({"importance_samples": -1}, "importance_samples: expected a whole number"),
        ({"about": {"likelihood": "none"}}, "about: likelihood: entries that config.json has itself"),
        ({"about": {"when": object()}}, "about: expected plain values"),
    ],
)
def test_bad_arguments_leave_no_folder(tmp_path, wrong, match):
    with pytest.raises(ValueError, match=match):
        train_run(tmp_path / "run", NegativeELBO(mine()), X, **{**QUICK, **wrong})
    with pytest.raises(ValueError, match="expected an objective, found VAE"):
        train_run(tmp_path / "run", mine(), X, **QUICK)
    assert not (tmp_path / "run").exists()


def test_pictures_and_latents_that_the_model_does_not_allow_are_told(tmp_path, capsys):
    def cauchy(output):
        return dist.Cauchy(output[0], output[1].exp()).to_event(1)

    vae = mine(posterior=cauchy)
    folder = train_run(tmp_path / "run", NegativeELBO(vae), X, **{**QUICK, "figures": True, "verbose": True})
    said = capsys.readouterr().out
    assert "no latents.json: site 'z': expected a distribution with a mean; Cauchy" in said
    assert "some figures are left out: site 'z'" in said
    assert not (folder / "latents.json").exists()
    assert {path.stem for path in (folder / "figures").iterdir()} == {"training_curves", "prior_samples"}
    assert "Samples from the prior" in write_report([folder]).read_text()


def test_a_preset_makes_no_other_run_than_before(tmp_path):
    """The config of a run that settings describe has what it had: runs made earlier can still be read, and these by them."""
    settings = load_preset("bernoulli-z10", epochs=1, hidden=(6,))
    options = {"verbose": False, "figures": False, "importance_samples": 0}
    objective = settings.build_objective(settings.build_vae((1, 4, 4)))
    config = json.loads(
        (train_run(tmp_path / "run", objective, X, settings=settings, **options) / "config.json").read_text()
    )
    assert config["preset"] == "bernoulli-z10"
    assert not {"model", "batch", "training"} & config.keys()


def test_the_test_set_is_encoded_once_for_all_that_shows_it(tmp_path, monkeypatch):
    data, encoded = load_data("digits"), []

    def counted(model, some, **options):
        encoded.append(len(as_data(some)))
        return latent_means(model, some, **options)

    for module in ("pyro_vae.analysis.latent", "pyro_vae.runs.loggers"):
        monkeypatch.setattr(f"{module}.latent_means", counted)
    vae = make_vae((1, 8, 8))
    train_run(tmp_path / "run", NegativeELBO(vae), data[0], test=data[1], steps=2, tensorboard=True, importance_samples=0)
    assert sorted(encoded) == [len(data[1]), len(data[0])]
    found = torch.tensor(json.loads((tmp_path / "run" / "latents.json").read_text())["means"])
    torch.testing.assert_close(found, latent_means(vae, data[1].subset(slice(len(found)))), atol=1e-4, rtol=0)


def resumed_and_loaded(folder, build, other):
    """The error where a run is resumed, or loaded, as another model"""
    train_run(folder, NegativeELBO(build()), X, test=X[:9], **QUICK)
    with pytest.raises(CheckpointError) as going_on:
        train_run(folder, NegativeELBO(other()), X, test=X[:9], **{**QUICK, "epochs": 3}, resume=True)
    with pytest.raises(CheckpointError) as loading:
        load_run(folder, model=other())
    return str(going_on.value), str(loading.value)


@pytest.mark.parametrize(
    ("part", "one", "other", "named"),
    [
        ("likelihood", NormalLikelihood(0.5), NormalLikelihood(0.01), "module.likelihood.variance: 0.5 -> 0.01"),
        ("likelihood", laplace, NormalLikelihood(), "module.likelihood: laplace -> NormalLikelihood"),
        ("prior", normal_prior(1.0), normal_prior(9.0), "module.prior.scale: 1.0 -> 9.0"),
        ("posterior", None, diagonal, "module.posterior: DiagonalNormal -> diagonal"),
    ],
)
def test_a_run_of_another_model_is_neither_resumed_nor_loaded(tmp_path, part, one, other, named):
    going_on, loading = resumed_and_loaded(tmp_path / "run", lambda: mine(**{part: one}), lambda: mine(**{part: other}))
    assert f"pair.{named}" in going_on
    assert f"(saved -> given): {named}" in loading


def test_an_objective_of_ones_own_with_another_setting_is_not_resumed(tmp_path):
    train_run(tmp_path / "run", Weighted(10.0), X, **QUICK)
    with pytest.raises(CheckpointError, match="weight: 10.0 -> 1000.0"):
        train_run(tmp_path / "run", Weighted(1000.0), X, **{**QUICK, "epochs": 3}, resume=True)


def test_a_run_of_an_earlier_version_goes_on_and_is_loaded(tmp_path):
    """Its checkpoints and config do not say what its parts are."""
    folder = train_run(tmp_path / "run", NegativeELBO(mine()), X, test=X[:9], **QUICK)
    config = json.loads((folder / "config.json").read_text())
    del config["parts"]
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder / "checkpoints").glob("*.pt"):
        content = read_tensors(path)
        if "settings" in content:
            del content["settings"]["parts"]
            write_tensors(path, content)
    load_run(folder, model=mine())
    train_run(folder, NegativeELBO(mine()), X, test=X[:9], **{**QUICK, "epochs": 3}, resume=True)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
