"""The methods that benchmark.py measures: functions without arguments, each of which does the same work.

Each training method runs a number of steps on random batches; another call continues the training.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.optim
import torch
import torch.nn.functional as F
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae import VAE, Data, NegativeDirectLogLikelihood, NegativeELBO, Objective, load_preset, log_marginal
from pyro_vae.engine.calls import Calls
from pyro_vae.estimates.importance import ChunkWeights
from pyro_vae.estimates.psis import Accumulator
from pyro_vae.models.programs import ProgramPair
from pyro_vae.training.compiled_step import CompiledStep
from pyro_vae.training.step import EagerStep

SETTINGS = load_preset("bernoulli-z20")
STOCK, PRODUCTS, EAGER, COMPILED = "stock Pyro", "matrix products alone", "pyro_vae eager", "pyro_vae compiled"
NUMPYRO = "NumPyro, jitted loop"
Way = Callable[[], object]


def build(train: Data, hidden: int = 400) -> VAE:
    return load_preset("bernoulli-z20", hidden=(hidden,)).build_vae(train.event_shape)


@dataclass(frozen=True)
class Case:
    """A number of training steps of system A, optionally of another width, on random batches of images."""

    train: Data
    batch_size: int
    draws: int
    hidden: int
    steps: int

    def build(self) -> VAE:
        return build(self.train, self.hidden)

    @cached_property
    def images(self) -> Tensor:
        return self.train.batch(torch.arange(len(self.train)))[0]

    def batches(self) -> Iterator[Tensor]:
        """Indices of images, without end."""
        whole = len(self.train) // self.batch_size * self.batch_size
        while True:
            yield from torch.randperm(len(self.train))[:whole].split(self.batch_size)

    def loaded(self) -> Iterator[Tensor]:
        """Images by a DataLoader, without end."""
        loader = DataLoader(TensorDataset(self.images), batch_size=self.batch_size, shuffle=True, drop_last=True)
        while True:
            for (x,) in loader:
                yield x

    def repeated(self, step: Callable[[], object]) -> Way:
        return lambda: [step() for _ in range(self.steps)]


def plain_pytorch(case: Case, source: Iterator[Tensor], *, fused: bool) -> Way:
    vae = case.build()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=fused)

    def step() -> None:
        x = next(source)
        loc, log_variance = vae.encoder(x)
        z = loc + torch.randn(case.draws, *loc.shape) * (0.5 * log_variance).exp()
        logits = vae.decoder(z.flatten(0, 1)).unflatten(0, (case.draws, -1))
        reconstruction = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="sum") / case.draws
        kl = -0.5 * (1 + log_variance - loc**2 - log_variance.exp()).sum()
        loss = (reconstruction + kl) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return case.repeated(step)


def pyro_svi(case: Case, elbo: type[Trace_ELBO], **options: Any) -> Way:
    vae, source = case.build(), case.loaded()
    many = {"num_particles": case.draws, "vectorize_particles": case.draws > 1, "max_plate_nesting": 1}
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo(**many, **options))
    return case.repeated(lambda: svi.step(next(source)))


def steps_of_fit(kind: type[EagerStep], objective: Objective, train: Data, batches: Iterator[Tensor], steps: int) -> Way:
    """So many of fit's steps on the next batches, begun once per epoch's worth of images, as fit begins its epochs."""
    step = kind(objective, train, torch.optim.Adam(objective.parameters(), lr=1e-3, fused=True))
    left = 0  # images, of the epoch

    def run() -> None:
        nonlocal left
        with pyro.validation_enabled(False):
            for index in itertools.islice(batches, steps):
                if left < len(index):
                    step.begin()
                    left = len(train)
                step(index)
                left -= len(index)
            step.end()

    return run


def our_fit(case: Case, kind: type[EagerStep]) -> Way:
    objective = NegativeELBO(case.build(), num_particles=case.draws)
    return steps_of_fit(kind, objective, case.train, case.batches(), case.steps)


def products_of_a_step(case: Case) -> Way:
    """The five large ones: of the encoder's first layer and the decoder's last, forwards and backwards."""
    pixels = case.train.event_shape.numel()
    first, last = torch.randn(case.hidden, pixels), torch.randn(pixels, case.hidden)
    flat, code, source = case.images.flatten(1), torch.randn(case.batch_size * case.draws, case.hidden), case.batches()

    def step() -> None:
        x = flat[: len(next(source))]
        h = x @ first.T
        h.T @ x
        y = code @ last.T
        y.T @ code
        y @ last

    return case.repeated(step)


def numpyro_version() -> str | None:
    try:
        import numpyro
    except ImportError:
        return None
    return str(numpyro.__version__)


def numpyro_loop(case: Case) -> Way:
    """The same model and guide in NumPyro, its whole loop one jitted scan; images on its device as uint8."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    hidden, pixels, latent_dim = case.hidden, case.train.event_shape.numel(), SETTINGS.latent_dim
    data = jnp.asarray(case.train.x.flatten(1).numpy())

    def dense(name: str, x: Any, inputs: int, outputs: int) -> Any:
        def init(key: Any, *size: int) -> Any:
            return jax.random.uniform(key, size, minval=-(inputs**-0.5), maxval=inputs**-0.5)

        weight = numpyro.param(f"{name}.weight", lambda key: init(key, inputs, outputs))
        return x @ weight + numpyro.param(f"{name}.bias", lambda key: init(key, outputs))

    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent_dim), 1.0).to_event(1))
            h = jax.nn.relu(dense("decoder.0", z, latent_dim, hidden))
            logits = dense("decoder.1", h, hidden, pixels)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        h = jax.nn.relu(dense("encoder.0", x, pixels, hidden))
        loc, log_variance = jnp.split(dense("encoder.1", h, hidden, 2 * latent_dim), 2, -1)
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_variance)).to_event(1))

    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(1e-3), numpyro.infer.Trace_ELBO(num_particles=case.draws))

    def loop(state: Any, key: Any) -> Any:
        index = jax.random.randint(key, (case.steps, case.batch_size), 0, len(data))
        return jax.lax.scan(lambda state, i: svi.update(state, data[i].astype(jnp.float32) / 255), state, index)

    run = jax.jit(loop)
    now = {"state": svi.init(jax.random.PRNGKey(0), jnp.zeros((case.batch_size, pixels))), "key": jax.random.PRNGKey(1)}

    def way() -> None:
        now["key"], key = jax.random.split(now["key"])
        now["state"], losses = run(now["state"], key)
        losses.block_until_ready()

    return way


MAKERS: dict[str, Callable[[Case], Way]] = {
    "plain PyTorch, DataLoader": lambda case: plain_pytorch(case, case.loaded(), fused=False),
    "plain PyTorch, in memory, fused Adam": lambda case: plain_pytorch(case, in_memory(case), fused=True),
    STOCK: lambda case: pyro_svi(case, Trace_ELBO),
    "Pyro, JitTrace_ELBO": lambda case: pyro_svi(case, JitTrace_ELBO, ignore_jit_warnings=True),
    EAGER: lambda case: our_fit(case, EagerStep),
    COMPILED: lambda case: our_fit(case, CompiledStep),
    NUMPYRO: numpyro_loop,
    PRODUCTS: products_of_a_step,
}


def in_memory(case: Case) -> Iterator[Tensor]:
    return (case.images[index] for index in case.batches())


def ways_to_train(case: Case, only: tuple[str, ...] = tuple(MAKERS)) -> dict[str, Way]:
    """All that are there: NumPyro may not be."""
    pyro.clear_param_store()
    there = [name for name in only if name != NUMPYRO or numpyro_version() is not None]
    return {name: MAKERS[name](case) for name in there}


def ways_to_fit_directly(train: Data) -> dict[str, Way]:
    """Five steps of the direct fit, 256 images and 64 draws each."""
    source = torch.randperm(len(train))[:1280].split(256)
    objective = NegativeDirectLogLikelihood(build(train))
    optimizer = torch.optim.Adam(objective.vae.decoder.parameters(), fused=True)

    def large_tensor() -> None:
        for index in source:
            (x,) = train.batch(index)
            log_p = objective.vae.decode(objective.z).log_prob(x.unsqueeze(1))  # (batch, draws), by (batch, draws, pixels)
            loss = -(log_p.logsumexp(1) - math.log(len(objective.z))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def ours(kind: type[EagerStep]) -> Way:
        objective = NegativeDirectLogLikelihood(build(train))
        return steps_of_fit(kind, objective, train, itertools.cycle(source), len(source))

    return {"(batch, draws, pixels) tensor": large_tensor, EAGER: ours(EagerStep), COMPILED: ours(CompiledStep)}


def ways_to_weigh(train: Data) -> dict[str, Way]:
    """log p of 500 images with 500 draws, and the decoder's matrix products for as many draws alone."""
    vae = build(train).eval()
    (x,) = train.batch(torch.arange(500))
    first, first_bias, second, second_bias = vae.decoder.parameters()
    weigh = Calls(ChunkWeights(ProgramPair(vae), (500, 20)), what="log_marginal, run eagerly")

    def products() -> None:
        with torch.no_grad():
            for _ in range(50):  # 50 x 5,000 = 500 images x 500 draws
                h = F.linear(torch.randn(5000, vae.latent_dim), first, first_bias)
                F.linear(h, second, second_bias)

    def compiled() -> None:  # as log_marginal does it, but compiled once for all repeats
        with torch.no_grad():
            for images in x.split(20):
                accumulator = Accumulator(500)
                accumulator.add(weigh(((images,), 500)))
                accumulator.results()

    def marginal() -> None:
        log_marginal(vae.model, vae.guide, x, num_samples=500)

    return {PRODUCTS: products, "log_marginal": marginal, "log_marginal, compiled": compiled}


# Programs: a process from its start to the end of its first epoch, and the peak of its memory on stdout.
_PROCESS = """
import sys
import pyro, pyro.optim, torch
from pyro.infer import SVI, Trace_ELBO
from torch.utils.data import DataLoader, TensorDataset
from pyro_vae import NegativeELBO, fit, load_data, load_preset
train, _ = load_data(sys.argv[1], data_dir=sys.argv[2] or None)
vae = load_preset("bernoulli-z20").build_vae(train.event_shape)
{way}
with open("/proc/self/status") as status:  # not getrusage, which counts the memory of the parent before exec
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""
_STOCK_EPOCH = """
loader = DataLoader(TensorDataset(*train.batch(torch.arange(len(train)))), batch_size=128, shuffle=True)
svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
for (x,) in loader:
    svi.step(x)
"""
FIRST_EPOCHS = {
    STOCK: _PROCESS.format(way=_STOCK_EPOCH),
    EAGER: _PROCESS.format(way="fit(NegativeELBO(vae), train, epochs=1, compile=False, verbose=False)"),
    COMPILED: _PROCESS.format(way="fit(NegativeELBO(vae), train, epochs=1, compile=True, verbose=False)"),
}
