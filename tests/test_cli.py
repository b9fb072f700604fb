"""The command line as a user of the installed package has it: another folder, and no checkout on the path."""

import argparse
import configparser
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call_script, equal, weights

from pyro_vae import PRESETS, cli, load_run
from pyro_vae._checks import SettingError
from pyro_vae._options import add_options, check_choices, described, flag_of, option
from pyro_vae.cli import COMMANDS, main
from pyro_vae.runs.evaluate import EvaluateOptions
from pyro_vae.runs.folder import save_weights, write_config
from pyro_vae.runs.presets import Settings
from pyro_vae.runs.sample import SampleOptions
from pyro_vae.runs.settings import RunSettings, TrainOptions, make_job

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ["--dataset", "digits", "--epochs", "2", "--hidden", "16", "--seed", "4", "--no-figures"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """``python -m pyro_vae`` in a folder of its own, with nothing of the checkout but the package: (result, folder)."""
    site, cwd = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    (site / "pyro_vae").symlink_to(ROOT / "pyro_vae")

    def run(*arguments):
        command = [sys.executable, "-m", "pyro_vae", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
        ), cwd

    return run


@pytest.fixture(scope="module")
def trained(installed):
    """A run folder."""
    result, cwd = installed("train", *OPTIONS, "--out", "run")
    assert result.returncode == 0, result.stderr
    return cwd / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, which may be changed."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.json", "metrics.jsonl", "checkpoints/weights.pt"):
        (tmp_path / "run" / name).write_bytes((trained / name).read_bytes())
    return tmp_path / "run"


@pytest.fixture
def pyro_vae_command(capsys):
    """The command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as exit:  # argparse
            code = exit.code
        return code, *capsys.readouterr()

    return run


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


# --- each command, installed ---


def test_train_and_svi_mnist_are_the_same_code(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call_script("svi_mnist", *OPTIONS, "--out", "run") == 0
    assert equal(*(weights(load_run(folder)) for folder in (trained, tmp_path / "run")))
    for name in ("train", "test", "seed", "versions", "requested_dataset"):
        assert metrics(trained)[name] == metrics(tmp_path / "run")[name]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (trained, tmp_path / "run")]
    assert configs[0] == configs[1]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (trained, tmp_path / "run")]
    one, other = ([json.loads(line) | {"timing": None} for line in each] for each in lines)
    assert one == other
    assert len(one) == 2


def test_evaluate_says_and_writes_what_training_did(installed, trained):
    before = metrics(trained)
    result, _ = installed("evaluate", "run")
    assert result.returncode == 0, result.stderr
    assert metrics(trained) == before  # the same draws
    for name, figure in before["test"].items():
        assert f"test {name:15s} {figure['value']:9.3f} ± {figure['standard_error']:.3f} nats" in result.stdout
    assert {"neg_elbo", "reconstruction", "kl", "log_marginal"} <= before["test"].keys()


def test_report(installed, trained):
    result, cwd = installed("report", "run", "--out", "page.html", "--title", "Mine")
    assert result.returncode == 0, result.stderr
    assert "<title>Mine" in (cwd / "page.html").read_text()


def test_sample(installed, trained):
    result, cwd = installed("sample", "run", "--num", 1500, "--out", "draws.npz")
    assert result.returncode == 0, result.stderr
    draws, vae = np.load(cwd / "draws.npz"), load_run(trained)
    assert draws["z"].shape == (1500, 20)
    assert draws["mean"].shape == draws["x"].shape == (1500, 1, 8, 8)
    z = torch.tensor(draws["z"])
    assert z.mean(0).abs().max() < 5 / 1500**0.5
    with torch.no_grad():
        mean = vae.decode(z).mean
    assert np.allclose(draws["mean"], mean, atol=1e-6)
    error = (mean * (1 - mean)).mean(0).div(1500).sqrt()
    assert (np.abs(draws["x"].mean(0) - draws["mean"].mean(0)) < 5 * error.numpy() + 1e-6).all()


def test_help_answers_before_torch_is_there():
    code = "import sys; from pyro_vae.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


def test_console_script():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["console_scripts"].strip() == "pyro-vae = pyro_vae.cli:main"


# --- what they do beyond ---


def test_evaluate_loses_nothing(run, pyro_vae_command, tmp_path):
    before = metrics(run)
    code, _, _ = pyro_vae_command("evaluate", run, "--num-samples", 5, "--importance-samples", 0, "--seed", 9)
    assert code == 0
    after = metrics(run)
    assert after["test"]["neg_elbo"]["num_samples"] == 5
    difference = after["test"]["neg_elbo"]["value"] - before["test"]["neg_elbo"]["value"]
    error = sum(m["test"]["neg_elbo"]["standard_error"] ** 2 for m in (before, after)) ** 0.5
    assert 0 < abs(difference) < 5 * error
    assert after["test"]["log_marginal"] == before["test"]["log_marginal"]
    assert {**after, "test": 0} == {**before, "test": 0}

    np.save(tmp_path / "other.npy", np.random.default_rng(0).random((40, 1, 8, 8)))
    for arguments in (["--images", 50], ["--data", tmp_path / "other.npy"]):
        assert pyro_vae_command("evaluate", run, *arguments, "--importance-samples", 0)[0] == 0
    evaluations = metrics(run).pop("evaluations")
    assert {**metrics(run), "evaluations": 0} == {**after, "evaluations": 0}
    assert list(evaluations) == ["the first 50 of test", str(tmp_path / "other.npy")]
    assert evaluations[str(tmp_path / "other.npy")]["neg_elbo"]["value"] > after["test"]["neg_elbo"]["value"]  # noise


def test_evaluate_of_a_run_that_has_not_ended_says_so(run, pyro_vae_command):
    (run / "metrics.json").unlink()
    code, out, err = pyro_vae_command("evaluate", run, "--importance-samples", 0)
    assert code == 0
    assert "test neg_elbo" in out
    assert "this run is unfinished, so no metrics are written" in err
    assert not (run / "metrics.json").exists()


def test_evaluate_finds_own_data_that_changed(tmp_path, monkeypatch, pyro_vae_command):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 4))
    np.save("mine.npy", x)
    options = ["--data", "mine.npy", "--epochs", 1, "--hidden", 4, "--importance-samples", 0, "--no-figures"]
    assert pyro_vae_command("train", *options, "--out", "run")[0] == 0
    assert pyro_vae_command("evaluate", "run", "--importance-samples", 0)[0] == 0
    np.save("mine.npy", x + 1)
    code, _, err = pyro_vae_command("evaluate", "run")
    assert (code, "the test data are no longer those of run" in err) == (2, True)


def test_sample_draws_a_grid(run, tmp_path, pyro_vae_command):
    code, _, err = pyro_vae_command("sample", run, "--num", 7, "--out", tmp_path / "grid.png")
    assert code == 0, err
    content = (tmp_path / "grid.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (3 * 66 + 2, 3 * 66 + 2)  # 8 x 8 pixels become 64 x 64, two between them
    code, _, err = pyro_vae_command("sample", run, "--num", 7, "--out", tmp_path / "grid.png", "--seed", 1)
    assert (code, "already there" in err) == (2, True)
    assert (tmp_path / "grid.png").read_bytes() == content
    again = ("sample", run, "--num", 7, "--out", tmp_path / "grid.png", "--overwrite", "--seed")
    assert pyro_vae_command(*again, 0)[0] == 0
    assert (tmp_path / "grid.png").read_bytes() == content
    assert pyro_vae_command(*again, 1)[0] == 0
    assert (tmp_path / "grid.png").read_bytes() != content


# --- errors ---

ERRORS = {
    "no command": ([], "pyro-vae: error: .*COMMAND"),
    "another command": (["fit"], "pyro-vae: error: .*invalid choice: 'fit'"),
    "train, a setting": (
        ["train", "--latent-dim", "0"],
        "pyro-vae train: error: --latent-dim: expected a whole number >= 1",
    ),
    "train, called otherwise there": (["train", "--image-size", "-3"], "pyro-vae train: error: --image-size: expected"),
    "train, beside the settings": (["train", "--clip-grad-norm", "nan"], "--clip-grad-norm: expected a positive number"),
    "train, how": (["train", "--checkpoint-every", "0"], "--checkpoint-every: expected a whole number >= 1, found 0"),
    "train, no such option": (["train", "--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    "train, an empty name": (["train", "--data", ""], "--data: expected a path, found ''"),
    "train, a name that none has": (["train", "--data", "x\0.npy"], "--data: expected a path, found 'x.x00.npy'"),
    "train, nobody's home": (
        ["train", "--data", "~nobody-here/x.npy"],
        "--data: expected a path, found '~nobody-here/x.npy'",
    ),
    "train, no run to resume": (["train", "--resume", "none"], "none/config.json: missing"),
    "evaluate, no run named": (["evaluate"], "pyro-vae evaluate: error: .*RUN"),
    "evaluate, no run there": (["evaluate", "none"], "none/config.json: missing"),
    "evaluate, one draw": (
        ["evaluate", "RUN", "--num-samples", "1"],
        "--num-samples: expected a whole number >= 2, found 1",
    ),
    "evaluate, no images": (["evaluate", "RUN", "--images", "0"], "--images: expected a whole number >= 1, found 0"),
    "evaluate, no data": (["evaluate", "RUN", "--data", "none.npy"], "none.npy: "),
    "evaluate, other data": (["evaluate", "RUN", "--data", "wide.npy"], "wide.npy: .*8, 8.* found .*9, 9"),
    "report, no run there": (["report", "none"], "none/config.json: missing"),
    "sample, no number": (["sample", "RUN", "--out", "x.npz"], "pyro-vae sample: error: .*--num"),
    "sample, none": (["sample", "RUN", "--num", "0", "--out", "x.npz"], "--num: expected a whole number >= 1, found 0"),
    "sample, no such kind": (["sample", "RUN", "--num", "1", "--out", "x.txt"], "--out: expected a name that ends in"),
    "sample, no folder": (["sample", "RUN", "--num", "1", "--out", "none/x.npz"], "none/x.npz: cannot be written"),
    "sample, of no images": (["sample", "TABLE", "--num", "1", "--out", "x.png"], "of shape .4,., are no images"),
    "sample, an autoencoder": (["sample", "PLAIN", "--num", "1", "--out", "x.npz"], "which has no prior"),
}


@pytest.mark.parametrize(("arguments", "match"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line_and_exit_code_2(run, tmp_path, monkeypatch, pyro_vae_command, arguments, match):
    monkeypatch.chdir(tmp_path)
    np.save("wide.npy", np.zeros((3, 1, 9, 9), np.float32))
    places = {"RUN": run}
    for name, preset, event_shape in (("TABLE", "bernoulli-z10", (4,)), ("PLAIN", "autoencoder-z2", (1, 8, 8))):
        if name in arguments:
            places[name], settings = tmp_path / name.lower(), PRESETS[preset]
            (places[name] / "checkpoints").mkdir(parents=True)
            write_config(places[name], settings, event_shape=event_shape)
            save_weights(places[name], settings.build_model(event_shape))
    before = metrics(run)
    code, _, err = pyro_vae_command(*(places.get(argument, argument) for argument in arguments))
    assert code == 2
    assert re.search(match, err)
    assert err.count("\n") == 1
    assert metrics(run) == before


def test_a_setting_that_only_the_model_refuses_is_named_too(pyro_vae_command, tmp_path):
    options = ["--preset", "conv-gaussian", "--dataset", "digits", "--latent-dim", 2, "--out", tmp_path / "run"]
    code, _, err = pyro_vae_command("train", *options)
    assert (code, err.startswith("error: --latent-dim: expected 64")) == (2, True)


# --- where the environment stands in the way ---

QUICK = ["train", "--dataset", "digits", "--hidden", "4", "--latent-dim", "2", "--steps", "2", "--importance-samples", "0"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The command line in a process of its own: (exit code, stdout, stderr)."""

    def run(*arguments, files=None, space=None, closed=(), **environment):
        import resource

        def limits():
            if files is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (files, files))
            if space is not None:
                resource.setrlimit(resource.RLIMIT_AS, (space, space))
            for number in closed:
                os.close(number)

        command = [sys.executable, "-m", "pyro_vae", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), **environment}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        done = subprocess.run(command, preexec_fn=limits, env=environment, timeout=300, check=False, **streams)
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_full_disk_takes_pictures_and_nothing_else(hostile, tmp_path):
    code, out, err = hostile(*QUICK, "--out", tmp_path / "run", files=50_000)
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(r"figures/\w+.png: cannot be written \(File too large\)", err)
    assert "test neg_elbo" in out
    assert {"neg_elbo", "kl"} <= metrics(tmp_path / "run")["test"].keys()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix == ".tmp"]
    for picture in (tmp_path / "run" / "figures").iterdir():
        assert picture.read_bytes().endswith(b"IEND\xaeB\x60\x82")  # whole
    load_run(tmp_path / "run")


def test_figures_are_said_before_a_full_disk_takes_them(hostile, run):
    metrics_file = run / "metrics.json"
    before = metrics_file.read_bytes()
    code, out, err = hostile("evaluate", run, "--importance-samples", 0, files=100)
    assert (code, err.count("\n")) == (2, 1)
    assert "metrics.json: cannot be written (File too large)" in err
    assert out.count("nats") == 3
    assert metrics_file.read_bytes() == before


def test_output_that_cannot_be_written_is_one_line(tmp_path):
    command = [sys.executable, "-m", "pyro_vae", *QUICK, "--no-figures", "--out", tmp_path / "run"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr
    assert "resume it with --resume" in done.stderr


def test_streams_poor_in_characters_or_closed_and_no_window_system(hostile, tmp_path):
    code, out, err = hostile(*QUICK, "--out", tmp_path / "run", PYTHONIOENCODING="ascii", MPLBACKEND="bogus")
    assert (code, err) == (0, "")
    assert out.count(r"\N{PLUS-MINUS SIGN}") == 3
    assert (tmp_path / "run" / "figures" / "reconstructions.png").exists()
    assert hostile("evaluate", tmp_path / "run", "--importance-samples", 0, closed=(1, 2))[0] == 0


def test_too_little_memory_is_one_line(hostile, tmp_path, pyro_vae_command):
    code, _, err = hostile(*QUICK, "--out", tmp_path / "a", space=10**9)  # not even for torch
    assert (code, err.count("\n")) == (2, 1)
    assert "a package cannot be imported" in err
    for size in (100_000, 10**10):
        code, _, err = pyro_vae_command(*QUICK, "--out", tmp_path / "b", "--image-size", size)
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith("error: the memory is not enough (")
    assert not (tmp_path / "b").exists()
    code, _, err = pyro_vae_command("sample", tmp_path / "none", "--num", 2, "--out", tmp_path / "x.npz")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("WORLD_SIZE", "2", "WORLD_SIZE: expected 1, or RANK, MASTER_ADDR, MASTER_PORT in the environment too, found 2"),
        ("WORLD_SIZE", "two", "WORLD_SIZE: expected a whole number in the environment, found 'two'"),
        ("TORCHELASTIC_RESTART_COUNT", "", "TORCHELASTIC_RESTART_COUNT: expected a whole number"),
    ],
)
def test_the_environment_of_torchrun_by_halves(pyro_vae_command, tmp_path, monkeypatch, name, value, match):
    monkeypatch.setenv(name, value)
    code, _, err = pyro_vae_command(*QUICK, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert match in err


def test_a_report_takes_a_file_and_a_disk_that_can_be_written(run, tmp_path, pyro_vae_command, monkeypatch):
    code, _, err = pyro_vae_command("report", run, "--out", tmp_path)
    assert (code, err) == (2, f"error: {tmp_path}: a folder. Name a file.\n")

    def on_such_a_disk(function):  # even a file that is not there cannot be removed
        def call(path, *args, **options):
            if ".report" in path.name:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return function(path, *args, **options)

        return call

    for name in ("open", "unlink"):
        monkeypatch.setattr(Path, name, on_such_a_disk(getattr(Path, name)))
    code, _, err = pyro_vae_command("report", run)
    assert (code, "report.html: cannot be written (Read-only file system)" in err, err.count("\n")) == (2, True, 1)


def test_a_signal_before_the_command_begins_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vae.cli._Parser", interrupted)
    assert cli.report([]) == 130
    assert capsys.readouterr().err == "SIGINT: nothing was computed\n"


# --- a run whose data have moved ---


def test_a_run_goes_on_where_its_data_have_moved(tmp_path, monkeypatch, pyro_vae_command):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 4))
    np.save("mine.npy", x)
    options = ["--importance-samples", 0, "--no-figures"]
    start = ["train", "--data", "mine.npy", "--epochs", 1, "--hidden", 4, *options, "--out"]
    for name in ("run", "straight"):
        assert pyro_vae_command(*start, name)[0] == 0
    assert pyro_vae_command("train", "--resume", "straight", "--epochs", 2, *options)[0] == 0
    Path("mine.npy").rename("moved.npy")
    config = Path("run/config.json").read_text()
    np.save("other.npy", x + 1)
    np.save("other-training.npy", np.where(np.arange(60)[:, None] == 0, 9.0, x))  # the first row is not held out
    for other in ("other.npy", "other-training.npy"):
        code, _, err = pyro_vae_command("train", "--resume", "run", "--epochs", 2, "--data", other, *options)
        assert (code, "CRC-32" in err, err.count("\n")) == (2, True, 1)
        assert Path("run/config.json").read_text() == config
    code, _, err = pyro_vae_command("train", "--resume", "run", "--epochs", 2, "--data", "moved.npy", *options)
    assert code == 0, err
    assert equal(*(weights(load_run(folder)) for folder in ("run", "straight")))
    assert json.loads(Path("run/config.json").read_text())["data"] == str(Path("moved.npy").resolve())
    assert pyro_vae_command("evaluate", "run", "--importance-samples", 0)[0] == 0


def test_data_of_one_name_are_compared_where_there_is_no_checkpoint(tmp_path, monkeypatch, pyro_vae_command):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 4))
    np.save("mine.npy", x)
    options = ["--importance-samples", 0, "--no-figures"]
    assert pyro_vae_command("train", "--data", "mine.npy", "--epochs", 1, "--hidden", 4, *options, "--out", "run")[0] == 0
    shutil.rmtree("run/checkpoints")
    np.save("mine.npy", x + 1)
    code, _, err = pyro_vae_command("train", "--resume", "run", *options)
    assert (code, "mine.npy: not the data of run: expected test data of" in err) == (2, True)


# --- options ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_each_option_once_with_its_default(pyro_vae_command, command):
    code, out, _ = pyro_vae_command(command, "--help")
    assert code == 0
    blocks = re.split(r"\n  (?=--)", out.partition("\noptions:")[2])[1:]
    assert all("default: " in " ".join(block.split()) or "(required)" in block for block in blocks)
    classes = {"train": (Settings, RunSettings, TrainOptions), "evaluate": (EvaluateOptions,), "sample": (SampleOptions,)}
    if command in classes:
        declared = [flag_of(cls, field.name) for cls in classes[command] for field in fields(cls)]
        assert sorted(block.split()[0] for block in blocks) == sorted(declared)
        assert len(set(declared)) == len(declared)


def test_each_field_says_what_it_is():
    for cls in (Settings, RunSettings, TrainOptions, EvaluateOptions, SampleOptions):
        for field in fields(cls):
            assert field.metadata["option"].help
            assert f"    {field.name}: " in cls.__doc__


def test_options_of_every_type():
    @described
    @dataclass(frozen=True)
    class Few:
        """A few."""

        place: Path = option(help="where")
        sizes: tuple[int, ...] = option((1,), help="how large")
        rate: float | None = option(None, help="how fast, at most 2 %", default_text="never", flag="--speed")
        kind: str = option("a", help="which", choices=("a", "b"))
        parts: tuple[str, ...] = option((), help="what", flag="PART")
        loud: bool = option(False, help="say it")
        pictures: bool = option(True, help="skip them")

    parser = argparse.ArgumentParser(prog="few")
    add_options(parser, Few, choices={"kind": ("a",)}, defaults={"rate": "1 for some"})
    line = ["--place", "x", "--sizes", "2", "3", "--speed", "0.5", "--kind", "a", "--loud", "--no-pictures"]
    given = vars(parser.parse_args(["q", "r", *line]))
    assert given == {
        "place": Path("x"), "sizes": [2, 3], "rate": 0.5, "kind": "a", "parts": ["q", "r"], "loud": True, "pictures": False
    }  # fmt: skip
    assert vars(parser.parse_args(["--place", "x"])) == {"place": Path("x")}  # no more than was given
    text = " ".join(parser.format_help().split())
    assert "where (required)" in text
    assert "how fast, at most 2 % (default: never; 1 for some)" in text
    assert "    kind: which. One of a, b." in Few.__doc__
    with pytest.raises(SettingError, match="kind: expected one of a, b, found 'c'"):
        check_choices(Few(Path("x"), kind="c"))


def test_an_error_of_a_setting_carries_its_name():
    with pytest.raises(SettingError) as caught:
        make_job({"epochs": 0})
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert error.name == "epochs"
        assert str(error) == f"epochs: {error.message}" == "epochs: expected a whole number >= 1, found 0."


def test_jobs():
    job = make_job({"dataset": "digits", "lr": 0.5, "seed": 3, "data_dir": "x"})
    assert (job.settings.preset, job.settings.lr, job.run.seed, job.options.data_dir) == ("bernoulli-z20", 0.5, 3, "x")
    assert (job.asked, job.requested_dataset) == ({"lr"}, "digits")
    assert make_job({"data": "x.npy"}).run.data == str(Path("x.npy").resolve())
    assert make_job({"data": "x.npy"}).requested_dataset is None
