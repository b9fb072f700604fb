"""Bad input ends in one clear line, no traceback, no wrong number; docs/bad-input.md is the table of these tests.

``python tests/test_bad_input.py`` writes that table anew.
"""

import contextlib
import fcntl
import functools
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import rooms  # noqa: F401, for the tests that it takes from
import test_dataset
import test_own
import test_tables
import torch
from conftest import THREADS, Malicious, call_script, equal, make_vae, weights

import pyro_vae
from pyro_vae import (
    Checkpoints,
    Data,
    FullCovarianceNormal,
    LinearWarmup,
    MLPDecoder,
    MLPEncoder,
    NegativeELBO,
    NonFiniteError,
    NormalLikelihood,
    Objective,
    PoissonLikelihood,
    evaluate,
    fit,
    load_data,
    load_preset,
    load_run,
    log_marginal,
    scale_latents,
    train_run,
)
from pyro_vae.analysis.latent import kl_per_dimension, latent_means, manifold_grid, tsne
from pyro_vae.runs.folder import _LOCKS
from pyro_vae.training.checkpoint import FORMAT

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "bad-input.md"
FEW = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def train(data=FEW, vae=None, **options):
    """A step on these data, by a VAE of their shape: the loss, or the message of a ValueError."""
    if vae is None:
        vae = make_vae(tuple(np.shape(data.x if isinstance(data, Data) else data))[1:] or (1,))
    try:
        (record,) = fit(NegativeELBO(vae), data, **{"steps": 1, "verbose": False} | options)
    except ValueError as error:
        return str(error)
    assert np.isfinite(record.train["loss"])
    return f"trains: loss {record.train['loss']:.1f}"


def refused(function, *arguments, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011, the message is what is tested
        function(*arguments, **options)
    return str(error.value)


def cauchy(output):
    return dist.Cauchy(output[0], output[1].exp()).to_event(1)


def full_covariance():
    shape = {"event_shape": (1, 4, 4), "hidden": (4,), "latent_dim": 2}
    posterior = FullCovarianceNormal(2)
    nets = MLPEncoder(**shape, heads=posterior.heads), MLPDecoder(**shape)
    return pyro_vae.VAE(*nets, latent_dim=2, event_shape=(1, 4, 4), posterior=posterior)


def mine(folder, **options):
    """A run of a model that no settings describe."""
    plain = {"steps": 1, "verbose": False, "figures": False}
    return train_run(folder, NegativeELBO(make_vae()), FEW, **{**plain, **options})


def own_run(action):
    with tempfile.TemporaryDirectory() as place:
        return refused(action, Path(place) / "run").replace(place + "/", "")


VAE = make_vae()
LIBRARY = {
    "one image without a leading dimension": lambda: refused(Data, FEW[0, 0, 0]),
    "whole numbers, kept": lambda: train(torch.ones(6, 1, 4, 4, dtype=torch.int64)),
    "uint8 that may be pixels or counts": lambda: train(torch.zeros(6, 4, dtype=torch.uint8)),
    "pixels of int64": lambda: refused(Data, torch.ones(6, 1, 4, 4, dtype=torch.int64), pixels=True),
    "uint8 counts above 1, Bernoulli": lambda: train(Data((FEW * 9).byte(), pixels=False)),
    "uint8 of four channels, in the last place": lambda: train(np.zeros((6, 16, 16, 4), np.uint8), vae=make_vae()),
    "seconds since 1970, in a model of float32": lambda: train(
        1.7e9 + 3600 * FEW.double(), vae=make_vae((1, 4, 4), likelihood=NormalLikelihood(mean="identity"))
    ),
    "fractions, Poisson": lambda: train(vae=make_vae((1, 4, 4), likelihood=PoissonLikelihood())),
    "fractions, for a likelihood of counts that checks nothing": lambda: train(
        vae=make_vae((1, 4, 4), likelihood=lambda output: dist.Binomial(16, logits=output))
    ),
    "a data frame with a column of text": lambda: train(
        test_tables.Frame(a=np.ones(2), b=np.array(["x", "y"], object)), VAE
    ),
    "a data frame with a missing value": lambda: train(test_tables.Frame(a=np.array([1.0, np.nan])), VAE),
    "names for fewer columns": lambda: refused(Data, FEW.flatten(1), columns=("a", "b")),
    "complex numbers": lambda: train(np.ones((6, 1, 4, 4), complex), vae=make_vae()),
    "words": lambda: train(np.full((6, 16), "a"), vae=make_vae()),
    "a list": lambda: train([[0.0, 1.0]], vae=make_vae()),
    "values above 1, Bernoulli": lambda: train(FEW * 255),
    "values below 0, Bernoulli": lambda: train(FEW - 1),
    "NaN": lambda: train(FEW.where(FEW < 0.9, torch.nan)),
    "an infinite value": lambda: train(FEW.where(FEW < 0.9, torch.inf)),
    "no images": lambda: train(FEW[:0], vae=make_vae()),
    "images of no pixels": lambda: train(FEW[..., :0], vae=make_vae()),
    "one image": lambda: train(FEW[:1]),
    "one pixel": lambda: train(FEW[..., :1, :1]),
    "constant images": lambda: train(torch.ones(6, 1, 4, 4)),
    "images of 1,000 channels": lambda: train(torch.full((6, 1000, 2, 2), 0.5)),
    "images of another shape than the VAE's": lambda: train(FEW.reshape(6, 1, 2, 8), vae=make_vae()),
    "test images of another shape": lambda: train(test=FEW.reshape(6, 1, 2, 8)),
    "labels of another length": lambda: refused(Data, FEW, torch.zeros(5, dtype=torch.int64)),
    "a tensor of another length": lambda: refused(Data, FEW, tensors={"y": torch.zeros(5)}),
    "NaN in another tensor": lambda: refused(Data, FEW, tensors={"y": torch.full((6,), torch.nan)}),
    "inputs that are not there": lambda: refused(Data, FEW, inputs=("x", "labels")),
    "labels for an objective of x alone": lambda: train(Data(FEW, torch.zeros(6).long(), inputs=("x", "labels"))),
    "test data of other inputs": lambda: refused(
        fit, Free(), (FEW, FEW), test=Data(FEW, tensors={"y": FEW}), steps=1, verbose=False
    ),
    "a list of images": lambda: train([FEW[0]] * 6, vae=make_vae()),
    "training and test data as one": lambda: train((FEW, FEW[:5]), vae=make_vae()),
    "a batch larger than the data": lambda: train(batch_size=1000),
    "batch_size 0": lambda: train(batch_size=0),
    "batch_size 2.5": lambda: train(batch_size=2.5),
    "epochs 0": lambda: train(steps=None, epochs=0),
    "epochs and steps": lambda: train(epochs=1),
    "neither epochs nor steps": lambda: train(steps=None),
    "lr -1": lambda: train(lr=-1),
    "lr NaN": lambda: train(lr=float("nan")),
    "lr 1e30, later a loss that is not finite": lambda: _explodes(),
    "patience without test data": lambda: train(patience=3),
    "an optimiser in place of its class": lambda: train(optimizer=torch.optim.SGD([torch.zeros(1)], lr=0.1)),
    "an optimiser of Pyro's": lambda: train(optimizer=pyro.optim.Adam({"lr": 0.1})),
    "a learning rate in the optimiser and beside it": lambda: train(
        optimizer=functools.partial(torch.optim.SGD, lr=0.1), lr=0.2
    ),
    "a loss without a gradient": lambda: refused(fit, Constant(), FEW, steps=1, verbose=False),
    "a prior that is a distribution": lambda: refused(make_vae, prior=dist.Normal(torch.zeros(3), 1.0).to_event(1)),
    "a prior that returns a tensor": lambda: train(vae=make_vae(prior=lambda: torch.zeros(3))),
    "a likelihood with event dimensions": lambda: train(
        vae=make_vae(likelihood=lambda output: dist.Laplace(output, 0.1).to_event(3))
    ),
    "a prior of positive latents, a normal posterior": lambda: train(
        vae=make_vae(prior=lambda: dist.HalfNormal(torch.ones(3)).to_event(1), posterior=far_below)
    ),
    "a posterior that is a point mass": lambda: train(
        vae=make_vae(posterior=lambda output: dist.Delta(output[0], event_dim=1))
    ),
    "a posterior with a scale below 0": lambda: train(
        vae=make_vae(posterior=lambda output: dist.Laplace(output[0], torch.full_like(output[0], -1.0)).to_event(1))
    ),
    "a net for one-hot labels, given whole numbers": lambda: train(
        Data(FEW, torch.zeros(6).long(), inputs=("x", "labels")),
        vae=pyro_vae.VAE(
            MLPEncoder((1, 4, 4), hidden=(8,), latent_dim=3, context_dim=3),
            MLPDecoder((1, 4, 4), hidden=(8,), latent_dim=3),
            latent_dim=3,
            event_shape=(1, 4, 4),
        ),
    ),
    "an optimiser that needs a closure": lambda: train(optimizer=torch.optim.LBFGS),
    "a schedule that is none": lambda: train(schedule=lambda optimizer: 0.1),
    "a schedule by the hour": lambda: train(schedule_by="hour"),
    "free bits under poutine.scale": lambda: refused(
        NegativeELBO(scale_latents(VAE.model, 2.0), scale_latents(VAE.guide, 2.0), free_bits=0.1), FEW
    ),
    "a warm-up of 0 steps": lambda: refused(LinearWarmup, 0),
    "seed -1": lambda: train(seed=-1),
    "clip_grad_norm 0": lambda: train(clip_grad_norm=0),
    "checkpoint_every 0": lambda: train(checkpoint_every=0),
    "precision double": lambda: train(precision="double"),
    "compile yes": lambda: train(compile="yes"),
    "the VAE in place of its objective": lambda: refused(fit, make_vae(), FEW, epochs=1),
    "latent_dim 0": lambda: refused(load_preset, "bernoulli-z20", latent_dim=0),
    "hidden of -5": lambda: refused(load_preset, "bernoulli-z20", hidden=(400, -5)),
    "beta infinite": lambda: refused(load_preset, "bernoulli-z20", beta=float("inf")),
    "a preset that is none": lambda: refused(load_preset, "vae"),
    "one draw, which carries no error": lambda: refused(evaluate, make_vae(), FEW, num_samples=1),
    "log_marginal of NaN": lambda: refused(log_marginal, VAE.model, VAE.guide, FEW.where(FEW < 0.9, torch.nan)),
    "t-SNE of latents that are all the same": lambda: refused(tsne, torch.zeros(50, 2)),
    "t-SNE of NaN": lambda: refused(tsne, torch.full((50, 2), torch.nan)),
    "log_marginal of the VAE itself": lambda: refused(log_marginal, VAE, VAE, FEW),
    "batch_size 2^63": lambda: train(batch_size=2**63),
    "lr 10^400": lambda: train(lr=10**400),
    "beta 1e-320": lambda: refused(NegativeELBO, VAE, beta=1e-320),
    "checkpoints as text": lambda: train(checkpoints="runs/mine"),
    "stop True": lambda: train(stop=True),
    "a sparse tensor": lambda: train(FEW.to_sparse()),
    "a data set that streams": lambda: train(test_own.Streaming(), vae=VAE),
    "a file of data that is not there": lambda: train("x.npy", vae=VAE),
    "latent means of a posterior that has none": lambda: refused(latent_means, make_vae(posterior=cauchy), FEW),
    "a plane of one latent dimension": lambda: refused(manifold_grid, make_vae(latent_dim=1)),
    "a plane of a model that does not say its shape": lambda: refused(manifold_grid, (VAE.model, lambda x: VAE.guide(x))),
    "KL per dimension of a full covariance": lambda: refused(kl_per_dimension, full_covariance(), FEW),
    "the VAE in place of its objective, train_run": lambda: own_run(lambda folder: train_run(folder, VAE, FEW)),
    "an argument that fit does not have, train_run": lambda: own_run(lambda folder: mine(folder, learning_rate=0.1)),
    "load_run of a model of your own, without it": lambda: own_run(lambda folder: load_run(mine(folder))),
    "load_run of a model of your own, given another": lambda: own_run(
        lambda folder: load_run(mine(folder), model=make_vae(latent_dim=2))
    ),
    "load_run of a model of your own, given one of another likelihood": lambda: own_run(
        lambda folder: load_run(mine(folder), model=make_vae(likelihood=NormalLikelihood()))
    ),
    "a run of your own resumed with another likelihood": lambda: own_run(
        lambda folder: train_run(
            mine(folder), NegativeELBO(make_vae(likelihood=NormalLikelihood())), FEW, steps=2, verbose=False, resume=True
        )
    ),
    "one draw for log p(x), train_run": lambda: own_run(lambda folder: mine(folder, importance_samples=1)),
    "neither epochs nor steps, train_run": lambda: own_run(lambda folder: mine(folder, steps=None, epochs=None)),
    "a guide with an auxiliary site that is no transform": lambda: refused(log_marginal, VAE.model, with_auxiliary, FEW),
    "parameters made in inference mode": lambda: made_in_inference_mode(),
    "batches of whole numbers": lambda: refused(Data, FEW, dtype=torch.int32),
    "load_run, given a number": lambda: own_run(lambda folder: load_run(mine(folder), model=3)),
}


def with_auxiliary(x):
    VAE.guide(x)
    with pyro.plate("rows", len(x)):
        pyro.sample("a", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


def made_in_inference_mode():
    with torch.inference_mode():
        vae = make_vae()
    return train(vae=vae)


class Constant(Objective):
    """Its loss does not depend on what is trained."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"loss": x.mean()}


def far_below(output):
    loc, _ = output
    return dist.Normal(torch.full_like(loc, -9.0), 1e-6).to_event(1)  # the same draws in the message on every processor


class Free(Objective):
    """It takes batches of any number of tensors."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, *batch):
        return {"loss": self.weight * batch[0].mean()}


def _explodes():
    with pytest.raises(NonFiniteError) as error:
        fit(NegativeELBO(make_vae()), FEW, steps=5, lr=1e30, verbose=False)
    return str(error.value)


def data_file(harm):
    def case():
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
            raw, _ = test_dataset.small.__wrapped__(Path(folder), monkeypatch)
            harm(raw)
            return refused(load_data, "mnist", data_dir=folder).replace(folder, "DATA")

    return case


FILES = {
    "a truncated file": data_file(test_dataset.truncate),
    "a file with bytes after its end": data_file(test_dataset.lengthen),
    "a flipped bit": data_file(test_dataset.flip),
    "a file still compressed": data_file(test_dataset.compress),
    "two files that changed names": data_file(test_dataset.swap),
    "an empty file": data_file(test_dataset.empty),
    "a file that is not there, and no network": data_file(test_dataset.remove),
}


def main(*arguments):
    """svi_mnist.py in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call_script("svi_mnist", *arguments)
    return code, out.getvalue(), err.getvalue()


TINY = ("--dataset", "digits", "--hidden", 8, "--latent-dim", 2, "--importance-samples", 0, "--no-figures", "--steps", 3)


TABLES = {"TEXT": "a,b\n1,2\n3,red\n", "MISSING": "a,b\n1,2\n,4\n", "RAGGED": "a,b\n1,2\n3,4,5\n", "NAMES": "a,b\n"}


def script(*arguments, harm=None, new=()):
    """What svi_mnist.py says, given a folder RUN that holds a run which harm() has been done to."""

    def case():
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            if harm is not None:
                code, _, err = main(*TINY, "--checkpoint-every", 1, "--out", run)
                assert code == 0, err
                whole = weights(load_run(run))
                harm(run)
            places = {"RUN": run, "NEW": Path(folder) / "new", "NUMBERS": Path(folder) / "x.npy"}
            places["PIPE.npy"] = Path(folder) / "pipe.npy"
            os.mkfifo(places["PIPE.npy"])
            places["BYTES"] = Path(folder) / "bytes.npy"
            np.save(places["BYTES"], np.arange(40, dtype=np.uint8).reshape(10, 4))
            np.save(places["NUMBERS"], np.linspace(-1, 1, 40).reshape(10, 4))
            for name, text in TABLES.items():
                places[name] = Path(folder) / "x.csv"
                if name in arguments:
                    places[name].write_text(text)
            places["RGBA"] = Path(folder) / "rgba.npy"
            np.save(places["RGBA"], np.zeros((10, 16, 16, 4), dtype=np.uint8))
            code, _, err = main(*(places.get(argument, argument) for argument in arguments))
            assert "Traceback" not in err
            if not code and "--steps" not in arguments:
                assert equal(weights(load_run(run)), whole)
            lines = err.replace(folder + "/", "").splitlines()
            said = lines[-1] if code else lines[0] if lines else "without a word"
            said = re.sub(r"^\S+: error: ", "svi_mnist.py: error: ", said)
            return f"exit code {code}: {said}" if code else f"resumed, bit for bit: {said}"

    return case


def newest(run):
    return Checkpoints(run / "checkpoints").paths()[0]


def truncated(share):
    return lambda run: newest(run).write_bytes(newest(run).read_bytes()[: int(newest(run).stat().st_size * share)])


def flipped(run):
    content = bytearray(newest(run).read_bytes())
    weights = next(iter(torch.load(newest(run), weights_only=True)["tensors"].values()))
    content[content.find(weights.numpy().tobytes()) + 2] ^= 16
    newest(run).write_bytes(content)


def malicious(run):
    torch.save({"format": FORMAT, "x": Malicious()}, newest(run))


def without(**parts):
    """Checkpoints without these parts, or with other ones in their place."""

    def harm(run):
        for path in (run / "checkpoints").glob("step-*.pt"):
            content = torch.load(path, weights_only=True)
            for name, part in parts.items():
                content[name] = part
                if part is None:
                    del content[name]
            torch.save(content, path)

    return harm


def all_damaged(run):
    for path in (run / "checkpoints").glob("step-*.pt"):
        path.write_bytes(pickle.dumps("no zip"))


def newer(run):
    torch.save(torch.load(newest(run), weights_only=True) | {"format": FORMAT + 1}, newest(run))


def edited(**changes):
    def harm(run):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))

    return harm


def locked(run):
    """As another process does it: by an open file of its own."""
    _LOCKS.pop(run.resolve()).release()
    locked.stream = (run / ".lock").open("w")
    fcntl.flock(locked.stream, fcntl.LOCK_EX)


def in_their_place(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()


def of_ones_own(run):
    config = {"format": 1, "model": "Mine", "event_shape": [1, 8, 8]}
    (run / "config.json").write_text(json.dumps(config))


RESUME = ("--resume", "RUN", "--no-figures", "--importance-samples", 0)
RUNS = {
    "a folder that is not there": script(*RESUME),
    "a folder that another process writes to": script(*RESUME, harm=locked),
    "a folder that is not empty": script(*TINY, "--out", "RUN", harm=lambda run: None),
    "a folder that cannot be made": script(*TINY, "--out", "/dev/null/run"),
    "other settings than those of the run": script(*RESUME, "--lr", 0.1, "--hidden", 9, harm=lambda run: None),
    "fewer steps than asked for before": script(*RESUME, "--steps", 2, harm=lambda run: None),
    "a config that is no JSON": script(*RESUME, harm=lambda run: (run / "config.json").write_text("{latent_dim: 2")),
    "a config edited to latent_dim 0": script(*RESUME, harm=edited(latent_dim=0)),
    "a config edited to another batch size": script(*RESUME, harm=edited(batch_size=64)),
    "a config edited to another model": script(*RESUME, harm=edited(latent_dim=3)),
    "a config edited to an unknown data set": script(*RESUME, harm=edited(dataset="my-digits")),
    "a config edited to the seed abc": script(*RESUME, harm=edited(seed="abc")),
    "a run of a model of your own": script(*RESUME, harm=of_ones_own),
    "a metrics.jsonl edited by hand, which is written anew": script(
        *RESUME, "--steps", 4, harm=lambda run: (run / "metrics.jsonl").write_text("garbage")
    ),
    **{f"a checkpoint cut at {share:.1%}": script(*RESUME, harm=truncated(share)) for share in (0, 0.001, 0.1, 0.5, 0.999)},
    "a checkpoint with a flipped bit": script(*RESUME, harm=flipped),
    "a checkpoint with code in it, which does not run": script(*RESUME, harm=malicious),
    "no checkpoint that is whole": script(*RESUME, harm=all_damaged),
    "checkpoints that do not say how far the run had come": script(*RESUME, harm=without(progress=None)),
    "checkpoints with an empty optimiser": script(*RESUME, harm=without(optimizer={})),
    "a checkpoint of a newer version": script(*RESUME, harm=newer),
    "no checkpoints any more": script(*RESUME, harm=lambda run: shutil.rmtree(run / "checkpoints")),
    "a file in place of the checkpoints": script(*RESUME, harm=in_their_place),
}
OPTIONS = {
    "--out and --resume": script("--out", "NEW", "--resume", "RUN"),
    "--clip-grad-norm -1": script("--clip-grad-norm", -1),
    "--checkpoint-every 0": script("--checkpoint-every", 0),
    "--data PATH --dataset mnist": script("--data", "x.npy", "--dataset", "mnist"),
    "--data of no data": script("--data", "/dev/null"),
    "--data of numbers below 0 --likelihood bernoulli": script(
        "--data", "NUMBERS", "--likelihood", "bernoulli", "--out", "NEW"
    ),
    "--data of uint8 that is no image": script("--data", "BYTES", "--out", "NEW"),
    "--data of four channels in the last place": script("--data", "RGBA", "--pixels", "yes", "--out", "NEW"),
    "--data of numbers below 0 --likelihood poisson": script("--data", "NUMBERS", "--likelihood", "poisson", "--out", "NEW"),
    "--data of a CSV file with a word in it": script("--data", "TEXT", "--out", "NEW"),
    "--data of a CSV file with a missing value": script("--data", "MISSING", "--out", "NEW"),
    "--data of a CSV file with a row too long": script("--data", "RAGGED", "--out", "NEW"),
    "--data of a CSV file of names alone": script("--data", "NAMES", "--out", "NEW"),
    "--data of an empty name": script("--data", ""),
    "--data of a named pipe": script("--data", "PIPE.npy", "--out", "NEW"),
    "--image-size 100000": script("--dataset", "digits", "--image-size", 100_000, "--out", "NEW"),
    "--pixels yes --dataset digits": script("--pixels", "yes", "--dataset", "digits"),
    "--latent-dim 0": script("--latent-dim", 0),
    "--batch-size many": script("--batch-size", "many"),
    "--hidden 10000000000": script("--dataset", "digits", "--hidden", 10_000_000_000),
    "--lr 1e30": script(*TINY, "--lr", 1e30, "--steps", 9, "--out", "NEW"),
}
CASES = {"In Python": LIBRARY, "MNIST's files": FILES, "A run folder": RUNS, "Options of svi_mnist.py": OPTIONS}


def said(case):
    torch.manual_seed(0)
    text = " ".join(case().split())
    text = re.sub(r"\(\[enforce .*?\)\)|\(Error downloading .*?\)", "(...)", text)  # other people's words
    return re.sub(r"\b[0-9a-f]{64}\b", "...", text).replace("|", "\\|")


LOSS = re.compile(r"(?<=trains: loss )\d+\.\d")


def assert_says(text, written):
    """Word for word. But a loss is arithmetic: where two are a rounding error apart, their tenths may differ by one."""
    assert LOSS.sub("...", text) == LOSS.sub("...", written)
    assert np.allclose(*([float(loss) for loss in LOSS.findall(t)] for t in (text, written)), rtol=0, atol=0.101)


def rows():
    """The lines of the table in docs/, by group and case."""
    written = {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("## "):
            group = line[3:]
        elif match := re.fullmatch(r"\| (.*?) \| (.*) \|", line):
            written[group, match[1]] = match[2]
    return written


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, cases in CASES.items() for name in cases])
def test_what_the_user_sees_is_what_the_table_says(group, name):
    text = said(CASES[group][name])
    assert_says(text, rows()[group, name])
    if group in ("A run folder", "Options of svi_mnist.py"):
        assert text.startswith(("exit code 2: ", "resumed, bit for bit"))
    assert not Path("pwned").exists()


def test_the_table_has_no_other_rows():
    assert len([key for key in rows() if key[1] not in ("given", "---")]) == sum(map(len, CASES.values()))


def test_python_o_says_the_same():
    command = [sys.executable, "-O", __file__, "--of", "In Python"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE)))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    written = rows()
    assert_says(done.stdout, "".join(f"| {name} | {written['In Python', name]} |\n" for name in LIBRARY))


def table(cases):
    return [f"| {name} | {said(case)} |" for name, case in cases.items()]


def write_table():
    lines = [
        "# Bad input",
        "",
        "What is given, and what the user sees: written by `python tests/test_bad_input.py`, and checked by the same tests. "
        "A script ends with one such line and exit code 2, never with a traceback.",
    ]
    for group, cases in CASES.items():
        lines += ["", f"## {group}", "", "| given | seen |", "|---|---|", *table(cases)]
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if "--of" in sys.argv:
        print("\n".join(table(CASES[sys.argv[-1]])))
    else:
        write_table()
