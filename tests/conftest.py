"""Every test starts from the same seed and an empty Pyro param store; real MNIST comes from PYRO_VAE_DATA."""

import importlib.util
import os
import sys
from pathlib import Path

# One thread, since two tests run side by side; in the processes that tests start too. OMP_NUM_THREADS=4 pytest: four.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import rooms  # noqa: F401, the tests' folders
import torch

import pyro_vae.engine.compiling
from pyro_vae import VAE, BernoulliLikelihood, MLPDecoder, MLPEncoder, NormalLikelihood, load_data
from pyro_vae.engine.compiling import Interpreted

THREADS = int(os.environ["OMP_NUM_THREADS"])
LIKELIHOODS = {
    "bernoulli": BernoulliLikelihood(),
    "normal-sigmoid": NormalLikelihood(),
    "normal-identity": NormalLikelihood(variance=0.1, mean="identity"),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield


def make_vae(event_shape=(1, 4, 4), latent_dim=3, hidden=(16,), **parts) -> VAE:
    shape = {"event_shape": event_shape, "latent_dim": latent_dim}
    encoder, decoder = MLPEncoder(hidden=hidden, **shape), MLPDecoder(hidden=hidden[::-1], **shape)
    return VAE(encoder, decoder, **parts, **shape)


def weights(module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


class Malicious:
    """Unpickled, it runs code: it makes a folder "pwned" in the working folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def load_script(name):
    """A script as a module, in this process, which spares the imports."""
    folder = Path(__file__).parents[1] / "scripts"
    if str(folder) not in sys.path:  # where a script's own parts are found
        sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_script(name, *arguments):
    """The exit code of a script that runs in this process."""
    try:
        return load_script(name).main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        return exit.code


@pytest.fixture
def vae() -> VAE:
    return make_vae()


@pytest.fixture
def vae64() -> VAE:
    return make_vae().double()


def compile_by(monkeypatch, compiler):
    """Has graphs compiled by a function of the graph and its inputs, in place of Inductor."""

    def inductor(traced, inputs):
        return Interpreted(compiler(traced.graph, inputs), traced.outside)

    monkeypatch.setattr(pyro_vae.engine.compiling, "inductor", inductor)


@pytest.fixture
def traced(monkeypatch):
    """The traced graph itself, without the minutes that Inductor would take for all of these."""
    compile_by(monkeypatch, lambda graph, inputs: graph)


@pytest.fixture(scope="session")
def digits():
    return load_data("digits")


@pytest.fixture(scope="session")
def mnist():
    if not os.environ.get("PYRO_VAE_DATA"):
        pytest.skip("real MNIST: set PYRO_VAE_DATA to the folder that holds MNIST/raw")
    return load_data("mnist")


def pytest_terminal_summary(terminalreporter):
    """Says whether the tests on real MNIST ran, so that a green run without them cannot be mistaken for one with them."""
    reports = [r for r in terminalreporter.stats.get("passed", []) if r.when == "call"]
    ran = sum("mnist" in getattr(r, "user_fixtures", ()) for r in reports)
    terminalreporter.write_line(f"tests on real MNIST that passed: {ran}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    report.user_fixtures = list(getattr(item, "fixturenames", ()))
    return report
