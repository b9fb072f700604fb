"""The scripts as a user runs them: in a process of their own, from another folder."""

import errno
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import test_own
import torch
from conftest import call_script, equal, load_script, weights
from pyro.infer import Predictive
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pyro_vae
import pyro_vae.runs.train
from pyro_vae import Autoencoder, Checkpoints, cli, load_run
from pyro_vae.report.page import read_run
from pyro_vae.runs.folder import read_records

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nobody listens there
FIGURES = [
    "denoising",
    "interpolation",
    "latent_pairs",
    "prior_samples",
    "reconstructions",
    "reconstructions_train",
    "samples_by_label",
    "training_curves",
    "tsne",
]


def script(name, *arguments, cwd, **environment):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    env = os.environ | environment
    limit = 900  # seconds, should it hang: two tests of four threads each, on two busy cores, take minutes
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=limit, check=False)


def svi_mnist(*arguments, cwd, **environment):
    return script("svi_mnist.py", *arguments, cwd=cwd, **environment)


@pytest.fixture
def svi_mnist_here(tmp_path, monkeypatch, capsys):
    """svi_mnist.py in this process and a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (call_script("svi_mnist", *arguments), *capsys.readouterr())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on digits with all that it leaves behind."""
    cwd = tmp_path_factory.mktemp("svi")
    result = svi_mnist("--dataset", "digits", "--epochs", 2, "--out", "run", "--seed", 5, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "run", result


def test_lines_on_stdout(run):
    _, result = run
    lines = result.stdout.splitlines()
    assert lines[0].startswith("bernoulli-z20 on digits: 1,500 training and 297 test images of shape (1, 8, 8)")
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line.split()[1] for line in epochs] == ["1", "2"]
    assert all(name in epochs[0] for name in ("rec=", "kl=", "-ELBO=", "test -ELBO="))
    assert [line for line in result.stderr.splitlines() if not line.startswith("warning: log_marginal:")] == []


def test_run_folder(run):
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "figures",
        "latents.json",
        "metrics.json",
        "metrics.jsonl",
    ]
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == FIGURES
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (folder / "figures").iterdir())
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_metrics(run):
    folder, _ = run
    metrics = json.loads((folder / "metrics.json").read_text())
    expected = {"dataset": "digits", "binarization": "none", "preset": "bernoulli-z20", "seed": 5, "device": "cpu"}
    assert metrics | expected == metrics
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["threads"] >= 1
    assert metrics["processor"]
    assert metrics["seconds"] > 0
    assert metrics["images_per_second"] > 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("neg_elbo", "reconstruction", "kl"):
        assert metrics["train"][name] == last["train"][name]
        assert set(metrics["test"][name]) == {"value", "standard_error", "num_samples"}
    assert metrics["test"]["neg_elbo"]["value"] == pytest.approx(last["test"]["neg_elbo"], abs=1.0)
    assert metrics["test"]["neg_elbo"]["standard_error"] > 0
    log_marginal = metrics["test"]["log_marginal"]
    assert set(log_marginal) == {"value", "standard_error", "num_samples", "median_ess", "unreliable"}
    assert log_marginal["num_samples"] == 100
    assert log_marginal["value"] > -metrics["test"]["neg_elbo"]["value"]


def test_load_run_and_predict(run):
    folder, _ = run
    vae = load_run(folder)
    assert Predictive(vae.model, num_samples=3)(size=2)["x"].shape == (3, 2, 1, 8, 8)


def test_same_seed_same_weights(run, tmp_path, svi_mnist_here):
    folder, _ = run
    svi_mnist_here("--dataset", "digits", "--epochs", 2, "--out", "run", "--seed", 5, "--no-figures")
    a, b = load_run(folder), load_run(tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not list((tmp_path / "run" / "figures").iterdir())


def test_folder_in_use_is_refused_unless_told(run):
    folder, _ = run
    before = (folder / "metrics.json").read_text()
    arguments = ("--dataset", "digits", "--epochs", 1, "--out", folder, "--no-figures")
    refused = svi_mnist(*arguments, cwd=folder.parent)
    assert refused.returncode == 2
    assert "not empty" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (folder / "metrics.json").read_text() == before


def test_overwrite(tmp_path, svi_mnist_here):
    arguments = ("--dataset", "digits", "--epochs", 1, "--out", "run", "--no-figures")
    assert svi_mnist_here(*arguments)[0] == 0
    assert svi_mnist_here(*arguments, "--overwrite")[0] == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_without_mnist_and_network_auto_trains_on_digits_and_says_so(tmp_path):
    result = svi_mnist("--epochs", 1, "--no-figures", cwd=tmp_path, PYRO_VAE_DATA=str(tmp_path / "none"), **OFFLINE)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("NOT MNIST") == 2  # before and after the lines that would push it off the screen
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("bernoulli-z20-digits-")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["requested_dataset"]) == ("digits", "auto")


@pytest.mark.parametrize("preset", ["bernoulli-z20", "bernoulli-z10", "gaussian-z4", "gaussian-z2"])
def test_every_option(tmp_path, svi_mnist_here, preset):
    arguments = f"""--preset {preset} --dataset digits --epochs 1 --batch-size 100 --lr 0.002 --latent-dim 2 --hidden 20 10
        --record-every 10 --beta 2 --particles 2 --objective mean-field --binarize dynamic --seed 1 --device cpu --out run
        --importance-samples 0 --no-figures"""
    code, out, err = svi_mnist_here(*arguments.split())
    assert code == 0, err
    assert "loss=" in out  # beta is not 1, so the loss is not the bound
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {"hidden": [20, 10], "beta": 2.0, "particles": 2, "objective": "mean-field", "binarization": "dynamic"}
    assert config | expected == config
    assert "log_marginal" not in json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]


def test_convolutional_preset_by_steps(tmp_path):
    arguments = "--preset conv-gaussian --dataset digits --steps 25 --record-every 10 --importance-samples 0 --out run"
    result = svi_mnist(*arguments.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "test images of shape (1, 32, 32)" in result.stdout
    assert re.findall(r"^step +(\d+)", result.stdout, flags=re.MULTILINE) == ["10", "20", "25"]
    assert sorted(path.stem for path in (tmp_path / "run" / "figures").iterdir()) == FIGURES
    assert load_run(tmp_path / "run").latent_dim == 64


ERRORS = {
    "mnist without mnist": (["--dataset", "mnist"], "MNIST: missing in .*train-images-idx3-ubyte"),
    "unknown preset": (["--preset", "z20"], "invalid choice: 'z20'"),
    "latent": (["--latent-dim", "0"], "--latent-dim: expected a whole number >= 1, found 0"),
    "conv": (["--preset", "conv-gaussian", "--dataset", "digits", "--latent-dim", "2"], "--latent-dim: expected 64"),
    "both lengths": (["--epochs", "1", "--steps", "1"], "--epochs: expected either epochs or steps"),
    "an autoencoder": (["--preset", "autoencoder-z2"], "invalid choice: 'autoencoder-z2'"),
    "epochs": (["--epochs", "0"], "--epochs: expected a whole number >= 1"),
    "lr": (["--lr", "nan"], "--lr: expected a positive number"),
    "hidden": (["--hidden", "10", "0"], r"--hidden: expected whole numbers >= 1.*found \(10, 0\)"),
    "too large": (["--dataset", "digits", "--hidden", "10000000000"], "the model cannot be built.*smaller --hidden"),
    "seed": (["--seed", "-1"], "--seed: expected a whole number >= 0, found -1"),
    "one draw": (["--importance-samples", "1"], "--importance-samples: expected 0 or at least 2, found 1"),
    "overwrite": (["--overwrite"], "--overwrite needs --out"),
    "not a folder": (["--dataset", "digits", "--out", "/dev/null/run"], "cannot be written"),
    "explodes": (["--dataset", "digits", "--lr", "1e30", "--out", "boom"], r"the loss is not finite in .*step 2: largest"),
}


@pytest.mark.parametrize(("arguments", "match"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_clear_line_and_exit_code_2(tmp_path, svi_mnist_here, monkeypatch, arguments, match):
    for name, value in {"PYRO_VAE_DATA": str(tmp_path / "none"), **OFFLINE}.items():
        monkeypatch.setenv(name, value)
    code, _, err = svi_mnist_here(*arguments)
    assert code == 2
    assert re.search(match, err)
    if "boom" in arguments:  # nothing computed is lost
        vae = load_run(tmp_path / "boom")
        assert all(p.isfinite().all() for p in vae.parameters())


def started(*arguments, cwd):
    command = [sys.executable, str(ROOT / "scripts" / "svi_mnist.py"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def signalled(process, line_start, *signals):
    """The process's exit code and standard error, after these signals when it has printed a line that starts so."""
    for line in process.stdout:
        if line.startswith(line_start):
            break
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


LONG = ("--dataset", "digits", "--no-figures", "--importance-samples", 0, "--compile", "never")


def test_a_signal_stops_after_a_step_and_resume_goes_on_bit_for_bit(tmp_path, svi_mnist_here):
    with started(*LONG, "--epochs", 60, "--out", "run", cwd=tmp_path) as process:
        found, err = signalled(process, "epoch  3", signal.SIGINT)
    assert found == 130
    assert re.search(r"^SIGINT: stopped after step [\d,]+; resume with: .*svi_mnist.py --resume run$", err, re.M)
    assert "Traceback" not in err
    load_run(tmp_path / "run")
    assert svi_mnist_here("--resume", "run", "--no-figures", "--importance-samples", 0)[0] == 0
    assert svi_mnist_here(*LONG, "--epochs", 60, "--out", "straight")[0] == 0
    stopped, straight = (load_run(tmp_path / name) for name in ("run", "straight"))
    assert equal(weights(stopped), weights(straight))
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "straight")]
    losses = [[json.loads(line)["train"]["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 60


def test_a_second_signal_ends_at_once(tmp_path):
    with started(*LONG, "--epochs", 100_000, "--out", "run", cwd=tmp_path) as process:
        code, err = signalled(process, "epoch  3", signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT)
    assert code == 143  # of the second: stopped, it gets both at once
    assert "Traceback" not in err
    assert "stopped after step" not in err


def test_a_signal_outside_training_ends_at_once_and_resume_finishes(tmp_path, monkeypatch, capsys):
    module = load_script("svi_mnist")
    monkeypatch.chdir(tmp_path)

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(pyro_vae.runs.train, "evaluate", interrupted)
        assert module.main([*map(str, LONG), "--epochs", "2", "--out", "run"]) == 143
    assert "SIGTERM: " in capsys.readouterr().err
    assert module.main(["--resume", "run", "--no-figures"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["neg_elbo"]["value"] > 0


def test_two_processes_do_not_write_to_one_folder(tmp_path, svi_mnist_here):
    with started(*LONG, "--epochs", 100_000, "--out", "run", cwd=tmp_path) as process:
        for line in process.stdout:
            if line.startswith("epoch  1"):
                break
        for arguments in (["--resume", "run"], [*LONG, "--out", "run", "--overwrite"]):
            code, _, err = svi_mnist_here(*arguments)
            assert code == 2
            assert "run: another process is writing to it" in err
        process.kill()
    assert svi_mnist_here(*LONG, "--out", "run", "--overwrite", "--epochs", 1)[0] == 0  # the lock went with its process


def test_a_resumed_run_may_grow(tmp_path, svi_mnist_here):
    assert svi_mnist_here(*LONG, "--epochs", 1, "--out", "run")[0] == 0
    code, out, _ = svi_mnist_here("--resume", "run", "--epochs", 3, "--no-figures", "--dataset", "digits", "--seed", 0)
    assert code == 0
    assert "resumed after step 12" in out
    assert svi_mnist_here(*LONG, "--epochs", 3, "--out", "straight")[0] == 0
    assert equal(*(weights(load_run(tmp_path / name)) for name in ("run", "straight")))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 3


def test_a_folder_that_cannot_be_written_is_found_before_the_data_are_read(svi_mnist_here, monkeypatch):
    monkeypatch.setattr(pyro_vae.data.builtin, "_load_digits", None)
    code, _, err = svi_mnist_here(*LONG, "--out", "/proc/run")
    assert code == 2
    assert "/proc/run: cannot be written to" in err


def test_a_full_disk_keeps_the_checkpoints_before(tmp_path, svi_mnist_here, monkeypatch):
    write, count = os.fsync, itertools.count()

    def full(descriptor):
        if next(count) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = svi_mnist_here(*LONG, "--epochs", 3, "--checkpoint-every", 1, "--out", "run")
    assert code == 2
    assert re.search(r"step-\d+.pt: cannot be written \(No space left on device\)", err)
    assert svi_mnist_here("--resume", "run", "--no-figures")[0] == 0
    assert svi_mnist_here(*LONG, "--epochs", 3, "--out", "straight")[0] == 0
    assert equal(*(weights(load_run(tmp_path / name)) for name in ("run", "straight")))


def test_help_says_every_default(tmp_path):
    raw = svi_mnist("--help", cwd=tmp_path).stdout
    text = " ".join(raw.split())
    for default in (
        "40 for bernoulli-z20, 5 for bernoulli-z10, 50 for gaussian-z4",
        "default: bernoulli-z20",
        "default: auto",
    ):
        assert default in text
    options = re.split(r"\n  (?=--)", raw)[1:]
    assert len(options) >= 18
    assert all("default" in option for option in options)


# --- the other scripts ---


WRONG = {
    "gaussian2d": ["--lr", "nan", "--lr: expected a positive number, found nan."],
    "direct_mnist": ["--importance-samples", "3", "--importance-samples: expected a whole number >= 25, found 3."],
    "autoencoders_mnist": ["--steps", "0", "--steps: expected a whole number >= 1, found 0."],
    "iwae_mnist": ["vae-7", "MODEL: expected one of vae-1, vae-5, vae-50, iwae-1, iwae-5, iwae-50, found 'vae-7'."],
    "reproduce": ["--systems", "--systems: expected one or more of A, B, C, D, E, found none."],
    "benchmark_svi": ["--pyro", "none", "--pyro: expected a clone of Pyro, found no folder none/examples."],
    "benchmark": ["--repeats", "0", "--repeats: expected a whole number >= 1, found 0."],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_of_a_script_is_told_in_one_line(name, capsys):
    module, (*arguments, message) = load_script(name), WRONG[name]
    with pytest.raises(SystemExit) as exited:
        cli.experiment(module.Options, module.run, module.__doc__, arguments)
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"error: {message}")


def test_benchmark_of_svi(tmp_path):
    """One case with a model of its own, and one whose example is not in the clone; nothing is run twice."""
    (tmp_path / "pyro" / "examples").mkdir(parents=True)
    command = ("benchmark_svi.py", "minipyro", "eight_schools", "--steps", 12, "--pyro", "pyro", "--out", "out")
    result = script(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = json.loads((tmp_path / "out" / "compiled-svi.json").read_text())["rows"]
    assert (first["case"], first["reason"], first["stage"]) == ("minipyro", "", "done")
    assert first["compiled_steps"] > 5
    assert first["difference"] < 1e-5
    assert "FileNotFoundError" in second["failure"]
    page = (tmp_path / "out" / "compiled-svi.md").read_text()
    assert "- 1 of 2 static variants run compiled" in page
    assert "| minipyro |" in page
    assert (tmp_path / "out" / "compiled-svi.png").read_bytes().startswith(b"\x89PNG")
    again = script(*command, cwd=tmp_path)
    assert again.returncode == 0
    assert "minipyro" not in again.stdout


def test_gaussian2d_short(tmp_path):
    result = script("gaussian2d.py", "--epochs", 3, "--out", "toy", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "expected log p under the truth: -2.694036 nats" in result.stdout
    metrics = json.loads((tmp_path / "toy" / "metrics.json").read_text())
    table = metrics["table"]
    assert list(table) == [
        "truth",
        "normal, full covariance (ML)",
        "VAE",
        "direct fit, 256 fixed draws",
        "direct fit, 256 redrawn",
    ]
    assert table["truth"]["kl"] == table["truth"]["kl_error"] == 0
    assert abs(table["normal, full covariance (ML)"]["kl"]) < 0.003
    for name in list(table)[2:]:
        row = table[name]
        assert -4 * row["kl_error"] < row["kl"] < 0.3  # three epochs are enough to be near, and none beats the truth
    assert table["VAE"]["log_p"] > table["VAE"]["elbo"]
    figures = sorted(path.stem for path in (tmp_path / "toy" / "figures").iterdir())
    assert figures == ["densities", "losses", "noise", "training"]
    again = script("gaussian2d.py", "--out", "toy", cwd=tmp_path)
    assert again.returncode == 2
    assert "not empty" in again.stderr


@pytest.mark.slow
def test_gaussian2d_reaches_the_truth(tmp_path):
    result = script("gaussian2d.py", "--out", "toy", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    vae = json.loads((tmp_path / "toy" / "metrics.json").read_text())["table"]["VAE"]
    assert vae["kl"] < 0.01
    assert vae["kl_error"] < 0.003


def test_direct_mnist_on_digits(tmp_path):
    options = "--dataset digits --epochs 8 --encoder-epochs 8 --importance-samples 100 --images 50 --out direct"
    result = script("direct_mnist.py", *options.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "direct" / "metrics.json").read_text())
    assert set(metrics["table"]) == {"ELBO fit", "direct fit"}
    for row in metrics["table"].values():
        by_encoder, by_prior = row["log_marginal"], row["log_marginal_by_prior"]
        assert by_encoder["value"] > row["elbo"]["value"]
        error = (by_encoder["standard_error"] ** 2 + by_prior["standard_error"] ** 2) ** 0.5
        assert abs(by_encoder["value"] - by_prior["value"]) < 5 * error + 0.05  # two independent ways to one number
    figures = sorted(path.stem for path in (tmp_path / "direct" / "figures").iterdir())
    assert figures == ["denoising", "estimate_against_draws", "samples"]
    reused = script("direct_mnist.py", "--dataset", "digits", "--elbo-run", "nothing", "--out", "x", cwd=tmp_path)
    assert reused.returncode == 2
    assert "config.json: missing" in reused.stderr


PICTURES = [
    "latent_planes.gif",
    "latent_planes.png",
    "manifold_autoencoder-z2.png",
    "manifold_gaussian-z2.png",
    "manifold_gaussian-z2_probability.png",
    "reconstructions.png",
    "samples_autoencoder-z2.png",
    "samples_conv-autoencoder.png",
    "samples_conv-gaussian.png",
    "samples_gaussian-z2-beta100.png",
    "samples_gaussian-z2.png",
    "tsne_conv.png",
]


def test_autoencoders_mnist_on_digits(tmp_path):
    options = ["--dataset", "digits", "--steps", "30", "--record-every", "10", "--out", "both"]
    result = script("autoencoders_mnist.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "both" / "figures").iterdir()) == PICTURES
    codes = np.load(tmp_path / "both" / "gaussian-z2" / "latents.npz")
    assert codes["codes"].shape == (4, 297, 2)  # before training, and at each evaluation
    assert codes["labels"].shape == (297,)
    for name in ("autoencoder-z2", "gaussian-z2-beta100"):
        metrics = json.loads((tmp_path / "both" / name / "metrics.json").read_text())
        test = metrics["test"]
        if name == "autoencoder-z2":
            assert isinstance(load_run(tmp_path / "both" / name), Autoencoder)
            assert metrics["test_loss"] == pytest.approx(test["mean_squared_error"]["value"], rel=1e-5)
        else:
            error = test["squared_error"]["standard_error"]
            expected = test["squared_error"]["value"] + 100 * test["kl"]["value"]
            assert metrics["test_loss"] == pytest.approx(expected, abs=10 * error)  # another draw, one in place of ten
    again = script("autoencoders_mnist.py", *options, "--no-figures", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("not trained again") == 5
    other = script("autoencoders_mnist.py", *options, "--seed", 1, "--no-figures", cwd=tmp_path)
    assert other.returncode == 2
    assert "not empty" in other.stderr
    (tmp_path / "both" / "autoencoder-z2" / "config.json").write_text("[")
    damaged = script("autoencoders_mnist.py", *options, "--no-figures", cwd=tmp_path)
    assert damaged.returncode == 2
    assert re.search(r"^error: .*autoencoder-z2/config.json: not the config of a run", damaged.stderr, re.MULTILINE)
    assert "Traceback" not in damaged.stderr


def test_reproduce_quick_lands_on_the_published_early_epochs(mnist, tmp_path):
    arguments = ("--quick", "--systems", "B", "--out", "quick")
    result = script("reproduce.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "quick" / "scoreboard.json").read_text())["rows"]
    fields = {"system", "quantity", "published", "ours", "standard_error", "tolerance", "within", "seconds"}
    assert all(set(row) == fields for row in rows)
    assert [(row["quantity"], round(row["published"], 2)) for row in rows] == [
        ("train -ELBO, epoch 1", 147.48),
        ("train -ELBO, epoch 2", 122.67),
    ]
    path = tmp_path / "quick" / "B" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["ours"] for row in rows] == [record["train"]["neg_elbo"] for record in records]
    assert all(row["within"] is (abs(row["ours"] - row["published"]) <= row["tolerance"]) for row in rows)
    assert "| train -ELBO, epoch 1 | 147.48 |" in (tmp_path / "quick" / "scoreboard.md").read_text()

    # A system that is done is not run again; a figure that is out is told.
    records[1]["train"]["neg_elbo"] = 200.0
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    again = script("reproduce.py", *arguments, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stdout.count("done before") == 1
    assert re.search(r"train -ELBO, epoch 2 +200 .*OUTSIDE", again.stdout)


@pytest.mark.slow
def test_a_signal_ends_reproduce_and_its_script(mnist, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "--systems", "E", "--out", "all"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        code, err = signalled(process, "    VAE fitted", signal.SIGTERM)
    assert code == 143
    assert err == "SIGTERM: the systems that are done will not be run again\n"
    assert (tmp_path / "all" / "E-toy.log").read_text().splitlines()[-1].startswith("SIGTERM: ")  # the signal ended it too
    assert not (tmp_path / "all" / "E-toy.json").exists()


def test_pages_in_the_documentation_are_made_of_the_figures_beside_them():
    pages = {"scoreboard": load_script("reproduce").markdown}
    pages["benchmark-cpu"] = lambda found: load_script("benchmark_page").markdown(found["rows"], found, found["repeats"])
    for name, markdown in pages.items():
        figures = json.loads((ROOT / "docs" / f"{name}.json").read_text())
        assert (ROOT / "docs" / f"{name}.md").read_text() == markdown(figures)


def test_reproduce_without_mnist(tmp_path):
    result = script("reproduce.py", cwd=tmp_path, PYRO_VAE_DATA=str(tmp_path / "none"), **OFFLINE)
    assert result.returncode == 2
    assert "MNIST: missing" in result.stderr


def test_benchmark_on_digits(tmp_path):
    result = script("benchmark.py", "importance", "--dataset", "digits", "--repeats", 1, "--out", "b", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "b" / "benchmark-cpu.json").read_text())["rows"]
    fields = {"case", "variant", "precision", "batch_size", "images_per_second", "ratio_to_stock_pyro", "spread"}
    assert all(fields <= row.keys() for row in rows)
    assert [row["variant"] for row in rows] == ["matrix products alone", "log_marginal", "log_marginal, compiled"]
    assert "| log_marginal |" in (tmp_path / "b" / "benchmark-cpu.md").read_text()
    assert script("benchmark.py", "epoc", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("draws", [1, 3])
def test_benchmark_of_all_ways_to_train(draws, digits, traced):
    """Each way in the benchmark makes its steps, on the same data."""
    benchmark, measured = load_script("benchmark"), load_script("benchmark_ways")
    ways = measured.ways_to_train(measured.Case(digits[0], batch_size=16, draws=draws, hidden=8, steps=2))
    rows = benchmark.rows_of(benchmark.measure(ways, 1), 32, case="training", precision="highest", batch_size=16)
    assert len(rows) >= 7  # NumPyro may be there or not
    assert all(row["images_per_second"] > 0 for row in rows)
    stock = next(row for row in rows if row["variant"] == benchmark.STOCK)
    assert stock["ratio_to_stock_pyro"] == 1


def test_iwae_in_stages(digits, tmp_path, traced, capsys):
    """A stage, then a second after it: the same as both at once; and errors where it cannot be resumed."""
    iwae = load_script("iwae_mnist")
    few = ["--dataset", "digits", "--images", "20", "--importance-samples", "25"]

    def run(out, *arguments):
        return cli.experiment(iwae.Options, iwae.run, "", [*arguments, *few, "--out", str(tmp_path / out)])

    assert run("a", "vae-1", "--stages", "1") == 0
    assert run("a", "vae-1", "--stages", "2") == 0
    assert run("b", "vae-1", "--stages", "2") == 0
    first, second = (json.loads((tmp_path / out / "table.json").read_text())["vae-1"] for out in "ab")
    for name in ("neg_elbo", "log_marginal", "active_units", "epochs"):
        assert first[name] == second[name]
    assert first["epochs"] == 4
    assert first["paper"] is None  # it is for MNIST
    assert [record.epoch for record in read_records(tmp_path / "a" / "vae-1" / "metrics.jsonl")] == [1, 2, 3, 4]
    for a, b in zip(*(weights(load_run(tmp_path / out / "vae-1")) for out in "ab"), strict=True):
        assert torch.equal(a, b)
    state = Checkpoints(tmp_path / "a" / "vae-1" / "checkpoints").load()
    (group,) = state["optimizer"]["param_groups"]
    assert group["eps"] == 1e-4
    assert group["lr"] == pytest.approx(1e-3 * 10 ** (-2 / 7))  # of the third stage, which comes next
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {state["progress"]["step"]}
    assert "IWAE with k = 1 is the VAE with k = 1." in (tmp_path / "a" / "table.md").read_text()
    assert isinstance(pyro_vae.load_run(tmp_path / "a" / "vae-1"), pyro_vae.VAE)
    assert run("c", "iwae-1", "--stages", "1") == 0  # alone, without the model that it equals
    capsys.readouterr()
    assert run("a", "vae-1", "--stages", "2", "--seed", "1") == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
    assert run("a", "vae-1", "--stages", "1") == 2
    assert "4 epochs were made, and the stages asked for have only 1. Ask for more --stages" in capsys.readouterr().err


@pytest.mark.slow
def test_direct_fit_of_real_mnist_lands_on_the_published_figure(mnist, tmp_path):
    """System A, direct fit: published last training average 142.09."""
    from pyro_vae import NegativeDirectLogLikelihood, fit, load_preset

    train, _ = mnist
    vae = load_preset("bernoulli-z20").build_vae(train.event_shape)
    history = fit(NegativeDirectLogLikelihood(vae), train, epochs=40, batch_size=256, lr=1e-3)
    assert history[-1].train["loss"] == pytest.approx(142.09, abs=0.6)


def test_own_pictures_with_all_figures_and_tensorboard(tmp_path, svi_mnist_here):
    for label in ("a", "b"):
        test_own.save(tmp_path / "mine" / label, np.repeat(test_own.PIXELS, 2, 0))
    options = ("--epochs", 2, "--hidden", 8, "--importance-samples", 0, "--tensorboard", "--out", "run")
    code, out, err = svi_mnist_here("--data", "mine", *options)
    assert code == 0, err
    assert (
        "48 colour images of 8 x 8 pixels; 2 labels: a, b; 5 held out as test set; likelihood normal (colours); 20 latent"
        in out
    )
    figures = {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert figures == {
        "training_curves",
        "reconstructions",
        "reconstructions_train",
        "prior_samples",
        "interpolation",
        "samples_by_label",
        "latent_pairs",
    }  # five test images are too few for t-SNE
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["preset"], config["dataset"], config["data"]) == ("normal-z20", "mine", str(tmp_path / "mine"))
    latents = json.loads((tmp_path / "run" / "latents.json").read_text())
    assert (len(latents["means"]), latents["classes"], len(latents["kl_per_dimension"])) == (5, ["a", "b"], 20)
    assert sum(latents["kl_per_dimension"]) == pytest.approx(
        json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["kl"]["value"], rel=1e-4
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("test/neg_elbo")] == [1, 2]
    assert set(events.Tags()["images"]) == figures
    assert (tmp_path / "run" / "tensorboard" / "projector_config.pbtxt").is_file()
    code, out, _ = svi_mnist_here("--data", "mine", "--preset", "gaussian-z4", *options[2:-3], "--epochs", 1, "--no-figures")
    assert code == 0
    assert "likelihood normal (as asked for); 4 latent dimensions; 1 epochs" in out


@pytest.mark.parametrize(("answer", "largest"), [("yes", 30 / 255), ("no", 30)])
def test_a_table_of_bytes_is_answered_for(tmp_path, svi_mnist_here, answer, largest):
    np.save(tmp_path / "bytes.npy", np.random.default_rng(0).integers(2, 31, (60, 4), dtype=np.uint8))
    options = ("--data", "bytes.npy", "--hidden", 4, "--importance-samples", 0, "--no-figures", "--out", "run")
    code, _, err = svi_mnist_here(*options, "--epochs", 1)
    assert (code, "--pixels yes or no" in err) == (2, True)
    code, _, err = svi_mnist_here(*options, "--pixels", answer, "--likelihood", "learned-normal", "--epochs", 1)
    assert code == 0, err
    assert load_run(tmp_path / "run").likelihood.loc.max() < largest < 5 * load_run(tmp_path / "run").likelihood.loc.max()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["pixels"] == answer
    code, _, err = svi_mnist_here("--resume", "run", "--epochs", 2, "--no-figures", "--importance-samples", 0)
    assert code == 0, err
    other = {"yes": "no", "no": "yes"}[answer]
    code, _, err = svi_mnist_here("--resume", "run", "--pixels", other)
    assert (code, f"pixels: {answer} -> {other}" in err) == (2, True)


def test_own_table_goes_on_where_it_was(tmp_path, svi_mnist_here):
    table = 1e5 * (np.random.default_rng(0).normal(size=(200, 5)) + 3)
    np.savez(tmp_path / "table.npz", x=table, y=np.arange(200) % 3)
    options = ("--data", "table.npz", "--hidden", 8, "--importance-samples", 0, "--batch-size", 64)
    code, out, err = svi_mnist_here(*options, "--epochs", 4, "--out", "whole")
    assert code == 0, err
    assert "likelihood learned-normal (numbers from " in out
    assert "180 training and 20 test rows of shape (5,)" in out
    assert {path.stem for path in (tmp_path / "whole" / "figures").glob("*")} == {"training_curves", "latent_pairs", "tsne"}
    assert svi_mnist_here(*options, "--epochs", 2, "--out", "part", "--no-figures")[0] == 0
    code, out, err = svi_mnist_here("--resume", "part", "--epochs", 4, "--no-figures", "--importance-samples", 0)
    assert code == 0, err
    assert equal(weights(load_run(tmp_path / "part")), weights(load_run(tmp_path / "whole")))
    np.savez(tmp_path / "table.npz", x=table + 1, y=np.arange(200) % 3)
    code, _, err = svi_mnist_here("--resume", "part", "--epochs", 5, "--no-figures")
    assert code == 2
    assert f"{tmp_path / 'table.npz'}: not the data of part: expected " in err


def test_a_column_of_seconds_since_1970(tmp_path, svi_mnist_here):
    """As float32 the column would be constant, and the rest of its deviation hundreds of standard ones."""
    r = np.random.default_rng(0)
    table = np.c_[1.7e9 + r.integers(0, 3600, 2000), r.normal(size=(2000, 3))]
    np.save(tmp_path / "t.npy", table)
    np.save(tmp_path / "other.npy", table[:50])
    code, _, err = svi_mnist_here("--data", "t.npy", "--epochs", 20, "--importance-samples", 20, "--out", "run")
    assert code == 0, err
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    entropy = 4 * 0.5 * np.log(2 * np.pi * np.e) + np.log(1039)  # of independent normals of these deviations
    assert test["neg_elbo"]["value"] == pytest.approx(entropy, abs=0.6)
    vae = load_run(tmp_path / "run")
    z, x = torch.zeros(50, 2), torch.tensor(table[:50])
    mean, log_variance = vae.decoder_output(z).double().unbind(-1)
    loc, scale = vae.likelihood.loc, vae.likelihood.scale
    u = (x - loc) / scale
    by_hand = -0.5 * ((u - mean) ** 2 / log_variance.exp() + log_variance + np.log(2 * np.pi)) - scale.log()
    torch.testing.assert_close(vae.decode(z).log_prob(x).double(), by_hand.sum(-1), rtol=0, atol=1e-3)
    assert (
        cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "other.npy"), "--importance-samples", "0"])
        == 0
    )
    (other,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluations"].values()
    assert other["neg_elbo"]["value"] == pytest.approx(entropy, abs=1.5)
    assert cli.main(["sample", str(tmp_path / "run"), "--num", "500", "--out", str(tmp_path / "draws.npz")]) == 0
    draws = np.load(tmp_path / "draws.npz")["x"][:, 0]
    assert len(np.unique(draws)) == 500  # in float32 they would be at most 60
    assert abs(draws.mean() - 1.7e9 - 1800) < 200


def test_columns_that_have_no_density_are_named(tmp_path, svi_mnist_here):
    r = np.random.default_rng(0)
    header = "price,red,green,fixed,rooms"
    red = r.integers(0, 2, 200)
    table = np.c_[r.normal(size=200), red, 1 - red, np.full(200, 7.5), r.integers(1, 6, 200)]
    np.savetxt(tmp_path / "flats.csv", table, delimiter=",", header=header, comments="")
    options = ("--hidden", 8, "--epochs", 1, "--importance-samples", 0, "--no-figures")
    code, out, err = svi_mnist_here("--data", "flats.csv", *options, "--out", "run")
    assert code == 0, err
    said = "columns constant: fixed; of two values (0 and 1, say, one-hot): red, green; of whole numbers: rooms."
    assert f"caution: {said}" in out
    assert said in dict(read_run(tmp_path / "run").warnings)["Columns without a density"]
    lines = (tmp_path / "flats.csv").read_text().splitlines()
    swapped = [",".join(line.split(",")[i] for i in (1, 0, 2, 3, 4)) for line in lines]
    (tmp_path / "swapped.csv").write_text("\n".join(swapped))
    code, _, err = svi_mnist_here("--data", "flats.csv", *options, "--likelihood", "bernoulli", "--out", "no")
    assert (code, "scores values in [0, 1]" in err) == (2, True)
    assert (
        cli.main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "swapped.csv"), "--importance-samples", "0"])
        == 2
    )


def test_values_of_0_and_1_are_the_same_on_the_console_and_in_the_report(tmp_path, svi_mnist_here):
    r = np.random.default_rng(0)
    options = ("--hidden", 8, "--epochs", 1, "--importance-samples", 0, "--no-figures")
    for name, x in {
        "table": r.integers(0, 2, (60, 5)).astype(float),
        "images": r.integers(0, 2, (60, 8, 8), np.uint8),
    }.items():
        np.save(tmp_path / f"{name}.npy", x)
        code, out, err = svi_mnist_here("--data", f"{name}.npy", *options, "--out", name)
        assert code == 0, err
        assert "likelihood bernoulli (values of 0 and 1)" in out
        found = read_run(tmp_path / name).conditions
        assert found["likelihood"] == "Bernoulli on values of 0 and 1: a probability"
        assert found["binarisation"] == "none (values of 0 and 1)"


def test_counts_are_offered_their_likelihood(tmp_path, svi_mnist_here):
    np.save(tmp_path / "c.npy", np.random.default_rng(0).poisson(3, (300, 6)))
    options = ("--data", "c.npy", "--hidden", 8, "--epochs", 5, "--importance-samples", 0, "--no-figures")
    code, out, err = svi_mnist_here(*options, "--out", "density")
    assert code == 0, err
    assert "whole numbers from 0 to" in out
    assert "if they are counts, --likelihood poisson" in out
    code, out, err = svi_mnist_here(*options, "--likelihood", "poisson", "--out", "run")
    assert code == 0, err
    assert "caution" not in out
    value = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["neg_elbo"]["value"]
    counts = np.arange(100)
    p = np.exp(counts * np.log(3) - 3 - [math.lgamma(k + 1) for k in counts])
    assert value == pytest.approx(6 * -(p * np.log(np.maximum(p, 1e-300))).sum(), abs=1.5)
    code, _, err = svi_mnist_here(
        "--data", "c.npy", "--likelihood", "poisson", "--net", "mlp-tanh", *options[2:], "--out", "b"
    )
    assert code == 0, err
    np.save(tmp_path / "c.npy", np.random.default_rng(0).normal(size=(300, 6)))
    code, _, err = svi_mnist_here(*options, "--likelihood", "poisson", "--out", "no")
    assert (code, "expected whole numbers >= 0" in err) == (2, True)
