import copy
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pyro
import pytest
import torch
from conftest import LIKELIHOODS, compile_by, equal, make_vae, weights
from torch import nn

import pyro_vae.training.step
from pyro_vae import (
    VAE,
    Autoencoder,
    ConvDecoder,
    ConvEncoder,
    Data,
    LearnedNormalLikelihood,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NegativeIWAE,
    NonFiniteError,
    Objective,
    ReconstructionError,
    fit,
)
from pyro_vae.engine.tracing import NotCompiledWarning
from pyro_vae.training.compiled_step import CompiledStep
from pyro_vae.training.fit import _worth_compiling
from pyro_vae.training.step import EagerStep

EVENT = (1, 16, 16)
DATA = Data(torch.randint(0, 256, (23, *EVENT), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))
DATA64 = DATA.to("cpu", torch.float64)
LIKELIHOODS = {**LIKELIHOODS, "learned-normal": LearnedNormalLikelihood()}
OBJECTIVES = {
    "elbo": NegativeELBO,
    "elbo-3-draws": lambda vae: NegativeELBO(vae, num_particles=3),
    "mean-field": lambda vae: NegativeELBO(vae, estimator="mean-field"),
    "beta": lambda vae: NegativeELBO(vae, beta=4.0),
    "iwae": lambda vae: NegativeIWAE(vae, num_particles=3),
    "direct": lambda vae: NegativeDirectLogLikelihood(vae, num_particles=5),
    "direct-redrawn": lambda vae: NegativeDirectLogLikelihood(vae, num_particles=5, redraw=True),
}
NETS = ("mlp", "dropout-batchnorm", "conv")


class SideBySide(nn.Module):
    """Several outputs per element, in a last dimension."""

    def __init__(self, decoders):
        super().__init__()
        self.decoders = nn.ModuleList(decoders)

    def forward(self, z):
        return torch.stack([decoder(z) for decoder in self.decoders], -1)


def make_nets(net, *, heads=2, outputs=1):
    if net == "conv":
        encoder = ConvEncoder(EVENT, channels=(2, 3, 2), heads=heads)
        decoders = [ConvDecoder(EVENT, code_shape=encoder.code_shape, channels=(3, 2)) for _ in range(outputs)]
        return encoder, decoders[0] if outputs == 1 else SideBySide(decoders), encoder.latent_dim
    shape = {"event_shape": EVENT, "hidden": (6,), "latent_dim": 2}
    encoder, decoder = MLPEncoder(heads=heads, **shape), MLPDecoder(outputs=outputs, **shape)
    if net == "dropout-batchnorm":
        encoder = nn.Sequential(nn.Dropout(0.3), encoder)
        decoder = nn.Sequential(nn.BatchNorm1d(2), decoder)
    return encoder, decoder, 2


def make_objective(objective, likelihood, net):
    encoder, decoder, latent_dim = make_nets(net, outputs=2 if likelihood == "learned-normal" else 1)
    vae = VAE(encoder, decoder, latent_dim=latent_dim, event_shape=EVENT, likelihood=LIKELIHOODS[likelihood])
    return OBJECTIVES[objective](vae)


def steps(kind, objective, data, batches, **arguments):
    """The terms of some steps of training, the optimiser, and numbers drawn after them."""
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2, fused=True)
    step = kind(objective.train(), data, optimizer, **arguments)
    torch.manual_seed(5)
    with pyro.validation_enabled(False):
        step.begin()
        terms = [step(torch.randperm(len(data.x))[:size]) for size in batches]
        step.end()
    return terms, optimizer, torch.randn(30)


def assert_same_training(objective, data, tolerance, *, batches=(10, 10, 10), **arguments):
    """A compiled and an eager training of the same objective: terms, parameters, buffers, moments, noise.

    Of each batch size, the compiled training checks steps 1, 2, 4 ... by eager ones; 3, 5, 6 ... it makes alone.
    """
    twin = copy.deepcopy(objective)
    clip = {"clip_grad_norm": arguments.get("clip_grad_norm")}
    expected, eager, noise = steps(EagerStep, objective, data, batches, **clip)
    found, compiled, same_noise = steps(CompiledStep, twin, data, batches, **arguments)
    assert torch.equal(noise, same_noise)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    close = {"rtol": tolerance, "atol": tolerance}
    for a, b in zip(twin.state_dict().values(), objective.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, **close)
    for p, q in zip(twin.parameters(), objective.parameters(), strict=True):
        assert compiled.state[p].keys() == eager.state[q].keys()
        for name, value in compiled.state[p].items():
            torch.testing.assert_close(value, eager.state[q][name], **close)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_traced_training_is_the_eager_one(objective, likelihood, net, traced):
    # In float64, so that nothing but rounding of 1e-16 can differ.
    assert_same_training(make_objective(objective, likelihood, net).double(), DATA64, 1e-9)


@pytest.mark.parametrize("net", NETS)
def test_traced_training_of_autoencoders(net, traced):
    encoder, decoder, latent_dim = make_nets(net, heads=1)
    autoencoder = Autoencoder(encoder, decoder, latent_dim=latent_dim, event_shape=EVENT)
    assert_same_training(ReconstructionError(autoencoder).double(), DATA64, 1e-9)


@pytest.mark.parametrize("objective", ["elbo", "direct"])  # in the latter, the encoder has no gradient
@pytest.mark.parametrize("clip_grad_norm", [0.1, 1e6])
def test_clipping_in_the_graph(objective, clip_grad_norm, traced):
    objective = make_objective(objective, "bernoulli", "mlp").double()
    assert_same_training(objective, DATA64, 1e-9, clip_grad_norm=clip_grad_norm)


@pytest.mark.parametrize("clip_grad_norm", [0.5, 1e6, None])
def test_clipping_scales_the_whole_gradient_down_to_the_norm(clip_grad_norm):
    objective = make_objective("elbo", "bernoulli", "mlp")
    free = steps(EagerStep, copy.deepcopy(objective), DATA, (10,))[1]
    clipped = steps(EagerStep, objective, DATA, (10,), clip_grad_norm=clip_grad_norm)[1]
    before, after = ([0.1**-1 * state["exp_avg"] for state in adam.state.values()] for adam in (free, clipped))
    norm = torch.stack([g.norm() for g in before]).norm()
    assert norm > 0.5
    for g, h in zip(before, after, strict=True):
        torch.testing.assert_close(h, g * min(1, (clip_grad_norm or 1e6) / norm.item()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("binarization", ["threshold", "dynamic"])
def test_binarization_is_drawn_in_the_graph(binarization, traced):
    data = Data(DATA.x, binarization=binarization).to("cpu", torch.float64)
    assert_same_training(make_objective("elbo", "bernoulli", "mlp").double(), data, 1e-9)


@pytest.mark.parametrize("sizes", [None, {10}, {3}])
def test_batch_sizes_take_turns_compiled_or_not(sizes, traced):
    objective = make_objective("elbo", "bernoulli", "dropout-batchnorm").double()
    batches = (10, 10, 3, 10, 10, 3, 10, 10, 3, 10, 10, 3, 3)
    assert_same_training(objective, DATA64, 1e-9, batches=batches, sizes=sizes)


def test_inductor_gives_the_eager_training():
    """The whole way once, with all that draws noise: dropout, binarisation, latents."""
    said = []
    data = Data(DATA.x, binarization="dynamic")
    assert_same_training(make_objective("iwae", "bernoulli", "dropout-batchnorm"), data, 1e-4, say=said.append)
    assert [line.split(" in ")[0] for line in said] == ["compiled for batches of 10"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "likelihood", "net"),
    [(o, "bernoulli", n) for o in OBJECTIVES for n in NETS] + [("elbo", k, n) for k in list(LIKELIHOODS)[1:] for n in NETS],
)
def test_inductor_for_everything(objective, likelihood, net):
    assert_same_training(make_objective(objective, likelihood, net).double(), DATA64, 1e-7)


class Branching(NegativeELBO):
    """Decides by the value of a tensor; the other way in a few steps."""

    def forward(self, x):
        terms = super().forward(x)
        return terms if torch.rand(()) > 0.2 else terms | {"loss": terms["loss"] * 2}


def test_the_way_that_a_tensor_decides_is_guarded(traced):
    """A step that goes another way than the graph is made eagerly, with the same noise."""
    vae = make_vae(EVENT).double()
    eager, compiled = Branching(copy.deepcopy(vae)), Branching(vae)
    found = [
        fit(objective, DATA64, epochs=10, batch_size=6, compile=compile, verbose=False)
        for objective, compile in ((eager, False), (compiled, True))
    ]
    for a, b in zip(*found, strict=True):
        assert a.train == pytest.approx(b.train, rel=1e-9)
    for a, b in zip(weights(compiled), weights(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class Reading(NegativeELBO):
    def forward(self, x):
        terms = super().forward(x)
        return terms if terms["loss"].tolist() > -1e9 else {}


class Counting(NegativeELBO):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


@pytest.mark.parametrize(("kind", "reason"), [(Reading, "values by tolist"), (Counting, "it changes")])
def test_what_cannot_be_traced_is_said_once_and_trained_eagerly(kind, reason, traced):
    vae = make_vae(EVENT)
    eager, compiled = kind(copy.deepcopy(vae)), kind(vae)
    fit(eager, DATA, epochs=3, batch_size=10, compile=False, verbose=False)
    with pytest.warns(NotCompiledWarning, match=reason) as caught:
        fit(compiled, DATA, epochs=3, batch_size=10, compile=True, verbose=False)
    assert len(caught) == 1
    assert equal(weights(compiled), weights(eager))


def twice_the_step(graph, args, times=2):
    before = [a.clone() for a in args]
    values = graph(*args)
    for a, b in zip(args, before, strict=True):
        if a.is_floating_point():
            a.add_((times - 1) * (a - b))
    return values


def test_a_compiler_that_fails_or_errs_is_noticed(monkeypatch):
    """No wrong number: the compiled step is compared with the eager one, whose result is kept where they differ."""

    def missing(graph, inputs):
        raise RuntimeError("no C++ compiler\nsecond line")

    def wrong_loss(graph, inputs):
        return lambda *args: (graph(*args)[0] * 1.01, *graph(*args)[1:])

    def wrong_gradient(graph, inputs):
        return lambda *args: twice_the_step(graph, args)

    vae = make_vae(EVENT)
    eager = NegativeELBO(copy.deepcopy(vae))
    fit(eager, DATA, epochs=2, batch_size=10, compile=False, verbose=False)
    for compiler, reason in ((missing, "no C"), (wrong_loss, "compiled, its loss is"), (wrong_gradient, "its gradient")):
        compile_by(monkeypatch, compiler)
        objective = NegativeELBO(copy.deepcopy(vae))
        with pytest.warns(NotCompiledWarning, match=reason):
            fit(objective, DATA, epochs=2, batch_size=10, compile=True, verbose=False)
        assert equal(weights(objective), weights(eager))


class Kink(Objective):
    """A ReLU whose input is 0 up to rounding for one observation, whose gradient is all there or not at all."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.3]))

    def forward(self, x):
        return {"loss": ((x @ self.weight).relu() * x.abs().sum(-1)).mean() + 1e-3 * self.weight.square().sum()}


def test_a_relu_at_its_kink_is_no_wrong_graph(monkeypatch):
    """Rounded to the other side the gradient differs by far more than rounding does, and the graph is right all the same."""

    def other_rounding(graph, inputs):
        def call(*args):
            weight = next(a for a in args if torch.equal(a, first.weight))
            before = weight.clone()
            weight.mul_(1 + torch.tensor([1.0, -1.0]) * torch.finfo(torch.float32).eps)
            moved = weight - before
            values = graph(*args)
            weight.sub_(moved)
            return values

        return call

    x = torch.tensor([[1.0, 1.0], [2.0, -1.0]])  # the first gives 0
    first, second = Kink(), Kink()
    loss = first(x)["loss"]
    with torch.no_grad():
        second.weight.mul_(1 + torch.tensor([1.0, -1.0]) * torch.finfo(torch.float32).eps)
    (g,), (h,) = (torch.autograd.grad(o(x)["loss"], o.weight) for o in (first, second))
    assert (g - h).norm() > 0.1 * g.norm()  # so the check would call it wrong
    assert second(x)["loss"].item() == pytest.approx(loss.item(), rel=1e-5)

    compile_by(monkeypatch, other_rounding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(first, x, steps=1, batch_size=2, lr=1e-3, compile=True, verbose=False)
    # A graph that is wrong by more than that is found there, too.
    compile_by(monkeypatch, lambda graph, inputs: lambda *args: twice_the_step(graph, args, times=20))
    with pytest.warns(NotCompiledWarning, match="its gradient is not that of the eager step"):
        fit(Kink(), x, steps=1, batch_size=2, lr=1e-3, compile=True, verbose=False)


def test_a_number_that_changes_between_records_is_traced_anew(traced):
    """A weight of the KL that rises from epoch to epoch."""
    vae = make_vae(EVENT).double()
    histories = []
    for compiled in (False, True):
        objective = NegativeELBO(copy.deepcopy(vae), beta=0.5)

        def warm_up(record, objective=objective):
            objective.beta.add_(0.5)

        histories.append(
            fit(objective, DATA, epochs=4, batch_size=6, compile=compiled, on_record=warm_up, verbose=False, lr=1e-2)
        )
    for a, b in zip(*histories, strict=True):
        assert a.train["loss"] == pytest.approx(b.train["loss"], rel=1e-9)
        assert a.train["loss"] != pytest.approx(a.train["neg_elbo"]) or a.epoch == 2  # where beta is 1


def test_frozen_parameters_stay_and_thaw(traced):
    vae = make_vae(EVENT)
    objective = NegativeELBO(vae)
    first = vae.encoder
    kept = weights(first)
    first.requires_grad_(False)
    fit(objective, DATA, epochs=4, batch_size=6, compile=True, verbose=False)
    assert equal(weights(first), kept)
    first.requires_grad_(True)
    fit(objective, DATA, epochs=4, batch_size=6, compile=True, verbose=False)
    assert not equal(weights(first), kept)


class Conditional(Objective):
    """Squared distance of x from a mean for each label, weighted."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3, *EVENT))

    def forward(self, x, y, weight):
        return {"loss": ((x - self.mean[y]).square().mean((1, 2, 3)) * weight).mean()}


def test_a_batch_of_several_tensors_is_compiled():
    tensors = {"weight": torch.rand(len(DATA), dtype=torch.float32)}
    data = Data(DATA.x, torch.arange(len(DATA)) % 3, tensors=tensors, inputs=("x", "labels", "weight"))
    assert_same_training(Conditional().double(), data.to("cpu", torch.float64), 1e-9)


class Changing(Objective):
    """A KL weight that changes in many ways."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(2)
        self.how, self.inner = how, NegativeELBO(make_vae(EVENT))
        self.register_buffer("weight", torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(EVENT))
        self.settings, self.words = Settings(), {"kl": 1.0}
        self.scale = torch.ones(())
        self.extra = False

    def forward(self, x):
        weight = self.weight * self.settings.beta * self.words["kl"] * self.scale
        if self.how == "rebound":
            self.weight = (self.weight + 0.05).clamp(max=3.0)
        elif self.how in OTHER_NOISE and OTHER_NOISE[self.how]() < 0.2:
            weight = weight * 3
        elif self.how == "counts-outside":
            CALLS.append(1)
            weight = weight * (1 + len(CALLS))
        terms = self.inner(x)
        loss = terms["reconstruction"] + weight * terms["kl"]
        if self.extra:
            loss = loss + ((self.bias - x) ** 2).sum((1, 2, 3)).mean()
        return terms | {"loss": loss}

    def after(self, record):
        if record.epoch == 3:
            match self.how:
                case "object":
                    self.settings.beta = 20.0
                case "new-object":
                    self.settings = None  # so that the new one may be put in its place in memory
                    self.settings = Settings(5.0)
                case "dict":
                    self.words["kl"] = 20.0
                case "tensor":
                    self.scale.fill_(20.0)
                case "late-parameter":
                    self.extra = True


@dataclass
class Settings:
    beta: float = 1.0


CALLS: list[int] = []
OTHER_NOISE = {"python-random": random.random, "numpy-random": np.random.rand}


@pytest.mark.parametrize(
    ("how", "warned"),
    [
        *((how, False) for how in ("rebound", "object", "new-object", "dict", "tensor", "late-parameter")),
        *((how, True) for how in ("python-random", "numpy-random", "counts-outside")),
    ],
)
def test_what_changes_is_never_a_wrong_number(how, warned, traced):
    found = []
    for compile in (False, True):
        CALLS.clear()
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        objective = Changing(how).double()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NotCompiledWarning)
            history = fit(
                objective, DATA64, epochs=9, batch_size=6, lr=1e-2, compile=compile, verbose=False, on_record=objective.after
            )
        assert len(caught) == (compile and warned)
        found.append((history, objective.state_dict()))
    if warned:  # tracing draws and counts, too
        return
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert a.train["loss"] == pytest.approx(b.train["loss"], rel=1e-9)
    for a, b in zip(found[0][1].values(), found[1][1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_step_that_turns_wrong_is_undone_back_to_the_last_copy(monkeypatch):
    """Right at the first checks, wrong later: no wrong step is left when a check has failed."""
    calls = []

    def compiler(graph, inputs):
        def call(*args):
            calls.append(1)
            return twice_the_step(graph, args) if len(calls) > 9 else graph(*args)

        return call

    compile_by(monkeypatch, compiler)
    vae = make_vae(EVENT)
    eager, objective = NegativeELBO(copy.deepcopy(vae)), NegativeELBO(vae)
    fit(eager, DATA, epochs=18, batch_size=23, compile=False, verbose=False, record_every=18)
    with pytest.warns(NotCompiledWarning, match="compiled, its"):
        fit(objective, DATA, epochs=18, batch_size=23, compile=True, verbose=False, record_every=18)
    assert len(calls) == 17  # the 17th is checked
    for a, b in zip(weights(objective), weights(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # the first nine steps are those of the graph


class Scaled(NegativeELBO):
    """A number that Python holds, and that a trace takes as it is."""

    factor = 1.0

    def forward(self, *batch):
        terms = super().forward(*batch)
        return terms | {"loss": self.factor * terms["loss"]}


def test_a_number_that_changes_at_every_record_is_not_compiled_every_time(traced):
    said = []
    objective = Scaled(make_vae(EVENT))
    objective.factor = 0.0

    def warm_up(record):
        objective.factor = min(2.0, record.epoch / 2)
        said.append(record.timing["compile_seconds"] > 0)

    fit(objective, DATA, epochs=8, batch_size=23, compile=True, verbose=False, on_record=warm_up)
    assert said == [True, *4 * [False], True, False, False]  # the first value, and the last once it has stayed


class Failing(Objective):
    """Finite until the weight, which falls by lr at each step, is below -0.45; then loss or gradient is not.

    The gradient that is infinite spoils a parameter without a trace in any later loss.
    """

    def __init__(self, how):
        super().__init__()
        self.how, self.weight, self.spoilt = how, nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        broken = (self.weight.detach().sum() < -1.35).to(self.weight.dtype)
        if self.how == "loss":
            return {"loss": self.weight.sum() + 0 / (1 - broken)}
        zero = (self.spoilt - self.spoilt.detach()).nan_to_num()
        return {"loss": self.weight.sum() + (zero + 1 - broken).sqrt().sum()}  # at 0 the gradient of a root is infinite


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("every", [None, 4, 11])
def test_no_step_is_made_where_loss_or_gradient_is_not_finite(how, every, traced):
    """The compiled steps after it, in later epochs too, are rolled_back."""
    found = {}
    for compile in (False, True):
        objective = Failing(how)
        with pytest.raises(NonFiniteError, match=f"the {how} is not finite in epoch 2, step 6"):
            fit(
                objective,
                torch.rand(8, 1),
                epochs=5,
                batch_size=2,
                lr=0.1,
                compile=compile,
                record_every=every,
                verbose=False,
            )
        found[compile] = objective.state_dict()
        assert found[compile]["weight"] == pytest.approx(torch.full((3,), -0.5), rel=1e-4)
        assert found[compile]["seen"] == 6
    for a, b in zip(found[False].values(), found[True].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_look_before_each_copy_finds_what_no_loss_tells(traced, monkeypatch):
    made = []
    monkeypatch.setattr(pyro_vae.training.compiled_step, "_CHECK_EVERY", 4)
    call = CompiledStep.__call__
    monkeypatch.setattr(CompiledStep, "__call__", lambda self, index: made.append(1) or call(self, index))
    with pytest.raises(NonFiniteError, match="the gradient is not finite in epoch 1, step 18"):
        fit(Failing("gradient"), torch.rand(80, 1), epochs=1, batch_size=2, lr=0.027, compile=True, verbose=False)
    assert len(made) < 25  # the check after the 16th is at the 21st


def test_same_seed_same_compiled_run(traced):
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        objective = NegativeELBO(make_vae(EVENT))
        fit(objective, DATA, epochs=3, batch_size=10, compile=True, verbose=False)
        results.append(weights(objective))
    assert equal(*results)


def test_compile_time_is_shown_and_not_part_of_the_training_time(traced, capsys):
    history = fit(NegativeELBO(make_vae(EVENT)), DATA, epochs=2, batch_size=10, compile=True)
    assert history[0].timing["compile_seconds"] > 0
    assert history[1].timing["compile_seconds"] == 0
    assert "compiled for batches of 10 in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("observations", "batch_size", "steps", "sizes"),
    [
        (60_000, 128, 40 * 469, {128}),  # 40 batches of 96 are not worth it
        (60_000, 128, 469, set()),
        (60_000, 20, 2 * 3000, {20}),
        (130, 128, 2 * 4000, {128, 2}),
        (100, 128, 4000, {100}),
        (100, 128, 3999, set()),
    ],
)
def test_by_default_it_is_compiled_where_it_pays(observations, batch_size, steps, sizes):
    assert _worth_compiling(observations, batch_size, steps) == sizes


def test_short_runs_are_eager_by_default(monkeypatch):
    compile_by(monkeypatch, None)  # calling it would fail, with a warning, which is an error here
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(NegativeELBO(make_vae(EVENT)), DATA, epochs=1, verbose=False)


class Still(Objective):
    """A gradient in the first step alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return {"loss": (self.weight * x[0, 0]).sum()}


@pytest.mark.parametrize("compiled", [False, True])
def test_moments_do_not_become_denormal(compiled, traced):
    optimizers = []
    original = torch.optim.Adam.__init__

    def remember(self, *args, **kwargs):
        original(self, *args, **kwargs)
        optimizers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "__init__", remember)
        objective = Still()
        x = torch.zeros(2000, 1)
        first = torch.randperm(2000, generator=torch.Generator().manual_seed(pyro_vae.training.batches.streams(0, 1)[0]))[0]
        x[first] = 1
        fit(objective, x, epochs=1, batch_size=1, compile=compiled, verbose=False)
    (state,) = optimizers[0].state.values()
    assert torch.equal(state["exp_avg"], torch.zeros(4))  # 0.9^2000 is below the smallest number there is
    assert (state["exp_avg_sq"] > 1e-5).all()  # 0.999^2000 is not
    assert state["step"].item() == 2000
    # Adam itself, whose moments are denormal from step 830 on, ends up at the same weights: the eager step's, bit for bit,
    # since it is the same code. The graph may round another way in each of the 148 steps that move a weight of float32.
    weight = nn.Parameter(torch.zeros(4))
    adam = torch.optim.Adam([weight], lr=1e-3, fused=True)
    for step in range(2000):
        weight.grad = torch.full((4,), float(step == 0))
        adam.step()
    if compiled:
        torch.testing.assert_close(objective.weight, weight, rtol=148 * torch.finfo(torch.float32).eps / 2, atol=0)
    else:
        assert torch.equal(objective.weight, weight)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_is_set_for_the_time_of_training(precision):
    seen = []

    class Looking(NegativeELBO):
        def forward(self, x):
            seen.append(torch.get_float32_matmul_precision())
            return super().forward(x)

    before = torch.get_float32_matmul_precision()
    fit(Looking(make_vae(EVENT)), DATA, epochs=1, precision=precision, verbose=False)
    assert set(seen) == {precision}
    assert torch.get_float32_matmul_precision() == before


def test_precision_is_restored_after_an_error():
    with pytest.raises(NonFiniteError):
        fit(Failing("loss"), torch.rand(40, 1), epochs=1, batch_size=2, lr=0.1, precision="medium", verbose=False)
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(ValueError, match="precision: expected one of highest, high, medium, found 'low'"):
        fit(NegativeELBO(make_vae(EVENT)), DATA, epochs=1, precision="low")
