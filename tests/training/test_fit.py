import copy
import functools
import json
import math
import warnings

import numpy as np
import pyro
import pytest
import torch
from conftest import compile_by, equal, make_vae, weights
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.optim import lr_scheduler

from pyro_vae import (
    VAE,
    CyclicWarmup,
    Data,
    FullCovarianceNormal,
    LinearWarmup,
    MLPDecoder,
    MLPEncoder,
    NegativeELBO,
    NonFiniteError,
    NormalLikelihood,
    Objective,
    TrainingRecord,
    evaluate,
    fit,
    load_preset,
    scale_latents,
)
from pyro_vae.engine.tracing import NotCompiledWarning
from pyro_vae.training.records import format_record


class Mean(Objective):
    """Loss = mean of the batch, whatever the weight: what an average over an epoch must reproduce."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.modes, self.seen = [], []

    def forward(self, x):
        self.modes.append(self.training)
        self.seen.append(x.clone())
        return {"loss": x.mean() + 0 * self.weight, "noise": torch.randn(())}


X = torch.rand(53, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 10, 52, 53, 100])
def test_epoch_average_weighs_a_short_last_batch_by_what_it_holds(batch_size):
    x = torch.arange(53.0).unsqueeze(1)
    (record,) = fit(Mean(), x, epochs=1, batch_size=batch_size, test=x[:7], verbose=False)
    assert record.train["loss"] == pytest.approx(26.0, rel=1e-6)
    assert record.test["loss"] == pytest.approx(3.0, rel=1e-6)


def test_each_epoch_sees_every_observation_once_in_a_new_order():
    objective = Mean()
    fit(objective, torch.arange(53.0).unsqueeze(1), epochs=2, batch_size=10, verbose=False)
    first, second = (torch.cat(objective.seen[i : i + 6]).flatten().tolist() for i in (0, 6))
    assert sorted(first) == sorted(second) == list(range(53))
    assert first != second
    assert first != sorted(first)


def test_same_seed_same_run_and_other_seeds_differ():
    start = make_vae()
    results = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        vae = make_vae()
        vae.load_state_dict(start.state_dict())
        torch.manual_seed(hash(name) % 1000)  # the caller's state must not matter
        history = fit(NegativeELBO(vae), X, epochs=2, batch_size=10, seed=seed, verbose=False)
        results[name] = weights(vae), [record.train["loss"] for record in history]
    assert equal(results["a"][0], results["b"][0])
    assert results["a"][1] == results["b"][1]
    assert not equal(results["a"][0], results["c"][0])


def test_data_order_does_not_depend_on_the_noise_drawn():
    quiet, noisy = Mean(), Mean()
    forward = noisy.forward
    noisy.forward = lambda x: (torch.rand(1000), forward(x))[1]
    for objective in (quiet, noisy):
        fit(objective, X, epochs=2, batch_size=10, verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(quiet.seen, noisy.seen, strict=True))


def test_testing_is_without_a_step_in_evaluation_mode_with_the_same_noise():
    start = make_vae()
    trained = []
    for test in (None, X[:20]):
        vae = make_vae()
        vae.load_state_dict(start.state_dict())
        fit(NegativeELBO(vae), X, epochs=2, batch_size=10, test=test, verbose=False)
        trained.append(weights(vae))
    assert equal(*trained)
    objective = Mean()
    history = fit(objective, X, epochs=3, batch_size=53, test=X, verbose=False)
    assert objective.modes == [True, False] * 3
    assert len({record.test["noise"] for record in history}) == 1
    assert len({record.train["noise"] for record in history}) == 3


def test_callers_state_is_left_as_found(vae):
    vae.eval()
    state = torch.random.get_rng_state()
    with pyro.validation_enabled(True):
        fit(NegativeELBO(vae).eval(), X, epochs=1, verbose=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        with pytest.raises(ValueError, match="Expected"):
            pyro.distributions.Normal(0.0, -1.0)  # validation is on again
    assert not vae.training
    assert not pyro.get_param_store().keys()


def test_frozen_parameters_stay(vae):
    for p in vae.decoder.parameters():
        p.requires_grad_(False)
    decoder, encoder = weights(vae.decoder), weights(vae.encoder)
    fit(NegativeELBO(vae), X, epochs=1, verbose=False)
    assert equal(decoder, weights(vae.decoder))
    assert not equal(encoder, weights(vae.encoder))
    vae.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        fit(NegativeELBO(vae), X, epochs=1, verbose=False)


@pytest.mark.parametrize("kind", ["tensor", "numpy", "uint8", "Data"])
def test_kinds_of_data(vae, kind):
    x = {"tensor": X, "numpy": X.numpy().astype(np.float64), "uint8": (X * 255).byte(), "Data": Data(X)}[kind]
    (record,) = fit(NegativeELBO(vae), x, epochs=1, verbose=False)
    assert math.isfinite(record.train["loss"])


def test_records_and_line_per_epoch(vae, capsys):
    seen = []
    history = fit(NegativeELBO(vae), X, epochs=2, test=X[:5], on_record=seen.append)
    assert seen == history
    assert [record.epoch for record in history] == [1, 2]
    for record in history:
        assert record.train["neg_elbo"] == pytest.approx(record.train["reconstruction"] + record.train["kl"], rel=1e-5)
        assert set(record.test) == {"loss", "neg_elbo", "reconstruction", "kl"}
        assert record.timing["observations_per_second"] == pytest.approx(53 / record.timing["seconds"])
    out, err = capsys.readouterr()
    assert out.splitlines() == [format_record(record) for record in history]
    assert err == ""  # no progress bar where stderr is no terminal


def test_format_of_a_line():
    terms = {"loss": 165.64, "neg_elbo": 165.64, "reconstruction": 150.72, "kl": 14.92}
    record = TrainingRecord(1, 469, terms)
    assert format_record(record) == "epoch  1  rec=150.72  kl=14.92  -ELBO=165.64"
    record = TrainingRecord(1, 469, terms | {"loss": 210.4}, {"neg_elbo": 130.0})
    assert format_record(record) == "epoch  1  rec=150.72  kl=14.92  -ELBO=165.64  loss=210.40  test -ELBO=130.00"
    record = TrainingRecord(12, 50, {"loss": 0.5}, {"loss": 0.25})
    assert format_record(record) == "epoch 12  loss=0.50  test loss=0.25"
    record = TrainingRecord(2, 250, {"loss": 0.05, "squared_error": 51.2})
    assert format_record(record, by_steps=True) == "step   250  squared error=51.20  loss=0.05000"


@pytest.mark.parametrize("record_every", [None, 1, 4, 7, 100])
def test_steps_are_those_of_the_epochs_whenever_records_are_made(record_every):
    """Six batches an epoch, the last one short; 15 steps end in the middle of the third."""
    whole, cut = Mean(), Mean()
    fit(whole, X, epochs=3, batch_size=10, verbose=False)
    history = fit(cut, X, steps=15, record_every=record_every, batch_size=10, test=X[:3], verbose=False)
    seen = [x for x, training in zip(cut.seen, cut.modes, strict=True) if training]
    assert all(torch.equal(a, b) for a, b in zip(whole.seen[:15], seen, strict=True))
    every = record_every or 6
    assert [record.step for record in history] == [*range(every, 15, every), 15]
    assert [record.epoch for record in history] == [math.ceil(record.step / 6) for record in history]
    for record, first in zip(history, range(0, 15, every), strict=True):
        expected = torch.cat(seen[first : record.step]).mean().item()
        assert record.train["loss"] == pytest.approx(expected, rel=1e-6)
        assert record.test["loss"] == pytest.approx(X[:3].mean().item(), rel=1e-6)


def test_noise_of_training_does_not_depend_on_when_records_are_made():
    trained = []
    for record_every in (None, 4):
        torch.manual_seed(0)
        vae = make_vae()
        settings = {"steps": 9, "record_every": record_every, "batch_size": 10, "verbose": False}
        fit(NegativeELBO(vae), X, test=X, on_record=lambda record: torch.randn(3), **settings)
        trained.append(weights(vae))
    assert equal(*trained)


@pytest.mark.parametrize("how", [{}, {"epochs": 1, "steps": 1}, {"steps": 0}, {"steps": 1, "record_every": 0}])
def test_length_of_a_training_is_given_once(vae, how):
    with pytest.raises(ValueError, match="either epochs or steps|steps: expected|record_every: expected"):
        fit(NegativeELBO(vae), X, verbose=False, **how)


class Breaks(Objective):
    """A quadratic that at its third step yields a loss or a gradient that is not finite."""

    def __init__(self, how):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.how, self.step, self.good = how, 0, None

    def forward(self, x):
        self.step += 1
        loss = (self.weight**2).sum()
        if self.step == 3:
            self.good = self.weight.detach().clone()
            if self.how == "gradient":
                loss = loss + (self.weight - self.weight.detach()).abs().sqrt().sum()  # 0, with an infinite slope
            else:
                loss = loss * float(self.how)
        return {"loss": loss}


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_not_finite_stops_before_the_step(how):
    objective = Breaks(how)
    what, value = ("gradient", r"loss \d\.\d+, ") if how == "gradient" else ("loss", "")
    message = rf"the {what} is not finite in epoch 1, step 3: {value}largest \|x\| \S+\. The parameters"
    with pytest.raises(NonFiniteError, match=message):
        fit(objective, X, epochs=1, batch_size=10, verbose=False)
    assert torch.equal(objective.weight, objective.good)


def test_exploding_learning_rate_says_what_any_processor_finds(vae):
    seen = []
    with pytest.raises(NonFiniteError, match=r"the loss is not finite in epoch 1, step 2: largest \|x\| .*learning rate"):
        fit(NegativeELBO(vae), X, epochs=200, batch_size=10, lr=1e30, verbose=False, on_record=seen.append)
    assert all(p.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"epochs": 0}, "epochs: expected a whole number >= 1, found 0"),
        ({"epochs": 1, "batch_size": 0}, "batch_size: expected a whole number >= 1, found 0"),
        ({"epochs": 1, "lr": -1.0}, "lr: expected a positive number, found -1"),
        ({"epochs": True}, "epochs: expected a whole number >= 1, found True"),
        ({"epochs": 1, "batch_size": 2.5}, "batch_size: expected a whole number >= 1, found 2.5"),
        ({"epochs": 1, "lr": "1e-3"}, "lr: expected a positive number, found '1e-3'"),
        ({"epochs": 1, "seed": -1}, "seed: expected a whole number >= 0, found -1"),
        ({"epochs": 1, "device": "abacus"}, "device: expected one that torch can use here.*found 'abacus'"),
        ({"epochs": 1, "lr": math.nan}, "lr: expected a positive number, found nan"),
    ],
)
def test_bad_settings(vae, arguments, match):
    with pytest.raises(ValueError, match=match):
        fit(NegativeELBO(vae), X, verbose=False, **arguments)


def test_data_that_do_not_suit_the_likelihood(vae):
    with pytest.raises(ValueError, match="BernoulliLikelihood scores values in"):
        fit(NegativeELBO(vae), X * 255, epochs=1, verbose=False)
    with pytest.raises(ValueError, match="BernoulliLikelihood scores values in"):
        fit(NegativeELBO(vae), X, test=X - 1, epochs=1, verbose=False)
    vae.likelihood = NormalLikelihood(mean="identity")
    fit(NegativeELBO(vae), X * 255 - 100, epochs=1, verbose=False)


def test_data_of_another_shape(vae):
    with pytest.raises(
        ValueError, match=r"\(\*batch, 1, 4, 4\) and dtype torch.float32, found torch.float32 of shape \(53, 16\)"
    ) as error:
        fit(NegativeELBO(vae), X.flatten(1), epochs=1, verbose=False)
    assert "Trace Shapes" not in str(error.value)  # found before Pyro traces anything
    for x in (X[None], X[0]):
        with pytest.raises(ValueError, match=r"expected x of shape \(batch, 1, 4, 4\), found shape"):
            NegativeELBO(vae)(x)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_batches_take_the_type_of_the_model(double, dtype):
    vae = make_vae().double() if double else make_vae()
    x = (X * 255).byte() if dtype == torch.uint8 else X.to(dtype)
    fit(NegativeELBO(vae), x, test=x, epochs=1, verbose=False)
    assert math.isfinite(evaluate(vae, x.numpy())["neg_elbo"].value)


@pytest.mark.parametrize("objective", [make_vae(), nn.Linear(2, 2), "elbo"], ids=["VAE", "module", "str"])
def test_what_is_no_objective(objective):
    with pytest.raises(ValueError, match=r"expected an objective, found (VAE\. Use NegativeELBO\(vae\)|Linear|str)"):
        fit(objective, X, epochs=1)


@pytest.mark.parametrize(
    ("terms", "match"),
    [
        (torch.zeros(()), "found Tensor"),
        ({"total": torch.zeros(())}, "with 'loss', found"),
        ({"loss": torch.zeros(3)}, r"found {'loss': torch.Size\(\[3\]\)}"),
        ({"loss": torch.zeros(()), "kl": 1.0}, "found {'loss'"),
    ],
)
def test_objectives_that_break_the_contract(terms, match):
    class Wrong(Mean):
        def forward(self, x):
            return terms

    with pytest.raises(ValueError, match=match):
        fit(Wrong(), X, epochs=1, verbose=False)


def test_vae_finds_the_two_dimensions_of_its_data():
    """Data on a known two-dimensional manifold: after training, two latents carry information and the others none."""
    torch.manual_seed(0)
    z = torch.randn(2000, 2)
    x = (z @ torch.randn(2, 1 * 4 * 4) * 2).reshape(-1, 1, 4, 4)
    vae = make_vae(latent_dim=4, hidden=(32,), likelihood=NormalLikelihood(variance=0.5, mean="identity"))
    fit(NegativeELBO(vae), x, epochs=25, batch_size=100, lr=1e-2, verbose=False)
    used = vae.encode(x).mean.var(0) > 0.1
    assert used.sum() == 2


def test_real_mnist_first_epoch_lands_on_the_published_figure(mnist):
    """System A, epoch 1: published train average 165.64."""
    train, _ = mnist
    settings = load_preset("bernoulli-z20")
    vae = settings.build_vae(train.event_shape)
    (record,) = fit(settings.build_objective(vae), train, epochs=1, batch_size=128, lr=1e-3, verbose=False)
    assert record.train["neg_elbo"] == pytest.approx(165.64, abs=1.5)
    assert record.train["kl"] == pytest.approx(14.92, abs=1.0)


@pytest.mark.slow
def test_real_mnist_40_epochs_of_system_a(mnist):
    train, _ = mnist
    settings = load_preset("bernoulli-z20")
    vae = settings.build_vae(train.event_shape)
    record = fit(settings.build_objective(vae), train, epochs=40, batch_size=128, lr=1e-3)[-1]
    assert record.train["neg_elbo"] == pytest.approx(102.28, abs=0.35)
    assert record.train["reconstruction"] == pytest.approx(76.8, abs=0.5)
    assert record.train["kl"] == pytest.approx(25.5, abs=0.3)


@pytest.mark.slow
def test_real_mnist_5_epochs_of_system_b(mnist):
    train, _ = mnist
    settings = load_preset("bernoulli-z10")
    vae = settings.build_vae(train.event_shape)
    history = fit(settings.build_objective(vae), train, epochs=5, batch_size=128, lr=1e-2)
    assert history[-1].train["neg_elbo"] == pytest.approx(117.06, abs=0.5)


# --- optimisers, schedules, early stopping ---

OPTIMIZERS = {
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "Adam, eps": functools.partial(torch.optim.Adam, eps=1e-4),
    "Adam, amsgrad": functools.partial(torch.optim.Adam, amsgrad=True, weight_decay=0.01),
    "RMSprop": functools.partial(torch.optim.RMSprop, momentum=0.5, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
}
STEPS_PER_EPOCH = 6  # of X, at batches of 10
SCHEDULES = {
    "StepLR": (functools.partial(lr_scheduler.StepLR, step_size=2, gamma=0.3), "epoch"),
    "ExponentialLR": (functools.partial(lr_scheduler.ExponentialLR, gamma=0.9), "step"),
    "CosineAnnealingLR": (functools.partial(lr_scheduler.CosineAnnealingLR, T_max=4), "epoch"),
    "CosineAnnealingWarmRestarts": (functools.partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=5), "step"),
    "OneCycleLR": (functools.partial(lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=4 * STEPS_PER_EPOCH), "step"),
    "CyclicLR": (functools.partial(lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=2e-2, step_size_up=3), "step"),
    "LambdaLR": (functools.partial(lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (1 + n)), "epoch"),
    "warm-up, then cosine": (
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(optimizer, 20)],
            milestones=[4],
        ),
        "step",
    ),
    "ReduceLROnPlateau": (functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.5), "epoch"),
}


class Quadratic(Objective):
    """Without noise, so that a loop by hand can make the same steps."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.mean = nn.Parameter(torch.randn(1, 4, 4, generator=generator, dtype=dtype))
        self.scale = nn.Parameter(torch.randn(4, generator=generator, dtype=dtype))

    def forward(self, x):
        return {"loss": ((x - self.mean) * self.scale.exp()).square().mean() - self.scale.mean()}


def by_hand(optimizer, schedule=None, unit="epoch", *, epochs=4, lr=0.01):
    """The training of Quadratic as a loop of torch alone; the rates of each step."""
    objective, x = Quadratic(), X.double()
    made = optimizer(list(objective.parameters()), lr=lr)
    scheduler = None if schedule is None else schedule(made)
    rates = []
    for epoch in range(1, epochs + 1):
        seed, _ = np.random.SeedSequence((0, epoch)).generate_state(2, np.uint64)  # the order of fit's seed 0
        for index in torch.randperm(len(x), generator=torch.Generator().manual_seed(int(seed))).split(10):
            rates.append(made.param_groups[0]["lr"])
            made.zero_grad()
            objective(x[index])["loss"].backward()
            made.step()
            if scheduler is not None and unit == "step":
                scheduler.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            with torch.no_grad():
                scheduler.step(objective(x[:20])["loss"].item())
        elif scheduler is not None and unit == "epoch":
            scheduler.step()
    return weights(objective), rates


def scheduled(objective, optimizer, schedule=None, unit="epoch", **options):
    settings = {"epochs": 4, "lr": 0.01, "batch_size": 10, "compile": False, "verbose": False}
    data = Data(X.double())
    return fit(
        objective, data, test=X[:20].double(), optimizer=optimizer, schedule=schedule, schedule_by=unit, **settings | options
    )


class Rates:
    """An optimiser that notes the learning rate of each step."""

    def __init__(self, optimizer):
        self.optimizer, self.rates = optimizer, []

    def __call__(self, parameters, lr):
        made = self.optimizer(parameters, lr=lr)
        made.register_step_pre_hook(lambda optimizer, *_: self.rates.append(optimizer.param_groups[0]["lr"]))
        return made


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_is_a_loop_by_hand(optimizer):
    objective = Quadratic()
    before = weights(objective)
    scheduled(objective, optimizer)
    expected, _ = by_hand(optimizer)
    assert not equal(expected, before)
    for found, value in zip(weights(objective), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["Adam, eps", "SGD"])
def test_any_schedule_is_a_loop_by_hand(optimizer, schedule):
    schedule, unit = SCHEDULES[schedule]
    objective, noting = Quadratic(), Rates(OPTIMIZERS[optimizer])
    scheduled(objective, noting, schedule, unit)
    expected, rates = by_hand(OPTIMIZERS[optimizer], schedule, unit)
    assert noting.rates == rates
    assert len(set(rates)) > 1
    for found, value in zip(weights(objective), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_traced_is_the_eager_one(optimizer, traced):
    traced_as_eager(OPTIMIZERS[optimizer], None, "epoch")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["Adam, eps", "SGD"])
def test_any_schedule_traced_is_the_eager_one(optimizer, schedule, traced):
    traced_as_eager(OPTIMIZERS[optimizer], *SCHEDULES[schedule])


def traced_as_eager(optimizer, schedule, unit, **options):
    """Warnings are errors here: what falls back to eager steps does not pass."""
    found = []
    vae = make_vae().double()
    for compile in (False, True):
        objective = NegativeELBO(copy.deepcopy(vae), **options)
        history = scheduled(objective, optimizer, schedule, unit, compile=compile)
        found.append((weights(objective), [record.train["loss"] for record in history]))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-9)
    for a, b in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_steps_that_are_made_again_have_the_options_they_had(monkeypatch):
    """A compiled step that turns wrong: the steps since the copy are made again, at their own rates and betas."""
    calls = []

    def compiler(graph, inputs):
        def call(*args):
            calls.append(1)
            total, *gradients = graph(*args)
            return total * (1 + (len(calls) > 9)), *gradients

        return call

    compile_by(monkeypatch, compiler)
    schedule, unit = SCHEDULES["OneCycleLR"]
    for optimizer in (OPTIMIZERS["SGD"], OPTIMIZERS["Adam, eps"]):
        calls.clear()
        vae = make_vae().double()
        eager, objective = NegativeELBO(copy.deepcopy(vae)), NegativeELBO(vae)
        options = {"batch_size": 53, "epochs": 20, "record_every": 20}
        scheduled(eager, optimizer, schedule, unit, **options)
        with pytest.warns(NotCompiledWarning, match="compiled, its loss is"):
            scheduled(objective, optimizer, schedule, unit, compile=True, **options)
        for a, b in zip(weights(objective), weights(eager), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class StepsTwice(torch.optim.SGD):
    def step(self, closure):
        closure()


class OfMyOwn(torch.optim.Optimizer):
    """Its step takes no closure at all."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad)


def test_an_optimizer_of_ones_own_is_a_loop_by_hand():
    objective = Quadratic()
    scheduled(objective, OfMyOwn)
    expected, _ = by_hand(torch.optim.SGD)
    for found, value in zip(weights(objective), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"optimizer": torch.optim.LBFGS},
            "whose step needs no closure, found LBFGS, which evaluates the loss several",
        ),
        ({"optimizer": StepsTwice}, "found StepsTwice"),
        (
            {"optimizer": lambda parameters, lr: "adam"},
            "optimizer: expected a function that returns an optimizer, found str",
        ),
        ({"optimizer": "adam"}, "optimizer: expected a function, found 'adam'"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, r"found one that is made, of SGD\. Pass the class"),
        (
            {"optimizer": pyro.optim.Adam({"lr": 0.1})},
            r"found .* of pyro.optim, an optimiser for Pyro's SVI\. Pass the class",
        ),
        ({"optimizer": pyro.optim.Adam}, r"found Adam of pyro.optim, an optimiser for Pyro's SVI\. Pass the class"),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1), "lr": 0.2}, "lr: found 0.2, and 0.1 in optimizer"),
        (
            {"schedule": lambda optimizer: 0.1},
            "schedule: expected a function that returns a torch.optim.lr_scheduler, found float",
        ),
        ({"schedule_by": "hour"}, "schedule_by: expected one of epoch, step, found 'hour'"),
        ({"patience": 0}, "patience: expected a whole number >= 1, found 0"),
        ({"patience": 2}, "patience: expected test data, on whose loss early stopping depends, found none"),
    ],
)
def test_bad_optimizers_and_schedules(vae, arguments, match):
    before = weights(vae)
    with pytest.raises(ValueError, match=match):
        fit(NegativeELBO(vae), X, epochs=1, verbose=False, **arguments)
    assert equal(weights(vae), before)


def test_the_learning_rate_of_a_partial_holds(vae):
    other = copy.deepcopy(vae)
    fit(NegativeELBO(vae), X, steps=3, optimizer=functools.partial(torch.optim.SGD, lr=0.1), verbose=False)
    fit(NegativeELBO(other), X, steps=3, optimizer=torch.optim.SGD, lr=0.1, verbose=False)
    assert equal(weights(vae), weights(other))


@pytest.mark.filterwarnings("ignore::pyro_vae.engine.tracing.NotCompiledWarning")
@pytest.mark.parametrize("compile", [False, True])
def test_a_loss_without_a_gradient_is_refused(vae, compile):
    class Detached(NegativeELBO):
        def forward(self, *batch):
            return {"loss": super().forward(*batch)["loss"].detach()}

    with pytest.raises(ValueError, match="expected the loss of Detached to depend on parameters .* without a gradient"):
        fit(Detached(vae), X, steps=2, compile=compile, verbose=False)


def test_plateau_without_test_data_goes_by_the_training_loss(vae):
    plateau = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs")
    noting = Rates(torch.optim.Adam)
    fit(NegativeELBO(vae), X, epochs=3, batch_size=53, optimizer=noting, schedule=plateau, verbose=False)
    assert noting.rates == [1e-3, 1e-3, 5e-4]  # the first record is the best so far; the second is no better by 1e9


class Path(Objective):
    """A test loss as it is given, record by record."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.losses = nn.Parameter(torch.zeros(())), iter(losses)

    def forward(self, x):
        return {"loss": 0 * self.weight + (1.0 if self.training else next(self.losses))}


@pytest.mark.parametrize(
    ("losses", "patience", "records"),
    [
        ((5, 4, 3, 2, 1), 1, 5),
        ((5, 4, 4, 4, 1), 1, 3),  # as good is no better
        ((5, 4, 4, 4, 1), 2, 4),
        ((5, 6, 4, 6, 6), 2, 5),
        ((5, 6, 7, 4, 3), None, 5),
        ((math.nan, math.nan, 1, 1, 1), 2, 2),
    ],
)
def test_patience_stops_after_so_many_records_without_a_better_one(losses, patience, records):
    history = fit(Path(losses), X, epochs=5, test=X[:5], patience=patience, verbose=False)
    assert [record.test["loss"] for record in history] == pytest.approx(losses[:records], nan_ok=True)


def test_a_term_may_have_any_name():
    class Named(Mean):
        def forward(self, x):
            return super().forward(x) | {"epoch": torch.ones(()), "seconds": torch.tensor(2.0), "test": torch.tensor(3.0)}

    (record,) = fit(Named(), X, epochs=1, test=X, verbose=False)
    assert (record.epoch, record.train["epoch"], record.test["seconds"], record.train["test"]) == (1, 1.0, 2.0, 3.0)
    assert TrainingRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


# --- the weight of the KL, free bits ---


@pytest.mark.parametrize("schedule", [LinearWarmup(9), LinearWarmup(9, start=0.3, final=2.0), CyclicWarmup(6, cycles=2)])
def test_warm_up_traced_is_the_eager_one_in_one_graph(schedule, traced, capsys):
    traced_as_eager(torch.optim.SGD, None, "epoch", beta=schedule)
    vae = make_vae()
    history = fit(NegativeELBO(vae, beta=schedule), X[:50], epochs=4, batch_size=10, compile=True)
    assert capsys.readouterr().out.count("compiled for batches of 10") == 1
    assert [record.timing["compile_seconds"] > 0 for record in history] == [True, False, False, False]


@pytest.mark.parametrize("schedule", [LinearWarmup(4, start=0.25, final=2.0), CyclicWarmup(4, cycles=2), math.exp])
def test_the_loss_has_the_weight_of_its_step(vae, schedule):
    history = fit(NegativeELBO(vae, beta=schedule), X[:50], steps=12, record_every=1, batch_size=10, verbose=False)
    for step, record in enumerate(history):
        expected = record.train["reconstruction"] + schedule(step) * record.train["kl"]
        assert record.train["loss"] == pytest.approx(expected, rel=1e-5)
        assert record.train["neg_elbo"] == pytest.approx(record.train["reconstruction"] + record.train["kl"], rel=1e-5)


def test_schedules_of_the_weight_in_closed_form():
    linear = LinearWarmup(10, start=0.2, final=1.4)
    assert [linear(t) for t in (0, 1, 5, 10, 11, 10**9)] == pytest.approx([0.2, 0.32, 0.8, 1.4, 1.4, 1.4])
    cyclic = CyclicWarmup(10, rise=0.4, start=0.1, final=0.9, cycles=3)
    found = [cyclic(t) for t in range(31)]
    period = [0.1, 0.3, 0.5, 0.7, *6 * [0.9]]
    assert found == pytest.approx([*period, *period, *period, 0.9])
    for bad in (
        lambda: LinearWarmup(0),
        lambda: LinearWarmup(5, final=0.0),
        lambda: LinearWarmup(5, start=-1.0),
        lambda: CyclicWarmup(5, rise=1.5),
        lambda: CyclicWarmup(5, cycles=0),
    ):
        with pytest.raises(ValueError, match=r"(steps|final|start|rise|cycles): expected"):
            bad()


@pytest.mark.parametrize(
    ("beta", "steps", "warns"),
    [
        (LinearWarmup(12), 13, False),
        (LinearWarmup(12), 12, True),
        (LinearWarmup(12), 5, True),
        (lambda step: 1 - 0.5**step, 13, False),
    ],
)
def test_a_warm_up_longer_than_the_run_is_said(vae, beta, steps, warns):
    objective = NegativeELBO(vae, beta=beta)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(objective, X, steps=steps, batch_size=10, verbose=False)
    said = [str(warning.message) for warning in caught if "the schedule of beta is at" in str(warning.message)]
    assert len(said) == warns
    if warns:
        assert f"at {(steps - 1) / 12:g}, below 1, at the end of this run of {steps} steps" in said[0]


@pytest.mark.parametrize("estimator", ["trace", "mean-field"])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_free_bits_by_hand(estimator, num_particles):
    r"""reconstruction + beta sum_d max(kl_d, free bits), kl_d the mean over batch and draws."""
    x = X.double()
    vae = make_vae().double()
    objective = NegativeELBO(vae, estimator=estimator, num_particles=num_particles, beta=0.7, free_bits=0.1)
    torch.manual_seed(3)
    terms = objective(x)
    torch.manual_seed(3)
    q, p = vae.encode(x).base_dist, Normal(torch.zeros(3, dtype=x.dtype), 1.0)
    z = q.rsample((num_particles,) if num_particles > 1 else ())
    kl = kl_divergence(q, p) if estimator == "mean-field" else q.log_prob(z) - p.log_prob(z)
    kl = kl.reshape(-1, 3).mean(0)
    reconstruction = -vae.decode(z).log_prob(x).mean()
    assert (kl < 0.1).any()
    torch.testing.assert_close(terms["loss"], reconstruction + 0.7 * kl.clamp_min(0.1).sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["kl"], kl.sum(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(terms["neg_elbo"], reconstruction + kl.sum(), rtol=1e-12, atol=0)


class Heads(nn.Module):
    """A posterior that is the same for every x."""

    def __init__(self, loc, log_variance):
        super().__init__()
        self.loc, self.log_variance = (nn.Parameter(torch.tensor(t, dtype=torch.float64)) for t in (loc, log_variance))

    def forward(self, x):
        return self.loc.expand(len(x), -1), self.log_variance.expand(len(x), -1)


@pytest.mark.parametrize("estimator", ["trace", "mean-field"])
def test_free_bits_cost_nothing_below_the_threshold(estimator):
    """A decoder that looks away: the gradient is that of the KL alone, and 0 where a dimension is below the threshold."""
    decoder = MLPDecoder((1, 4, 4), hidden=(4,), latent_dim=3)
    for p in decoder.parameters():
        nn.init.zeros_(p)
    encoder = Heads([0.1, 2.0, -3.0], [0.0, 0.0, -1.0])
    vae = VAE(encoder, decoder, latent_dim=3, event_shape=(1, 4, 4)).double()
    NegativeELBO(vae, estimator=estimator, free_bits=0.5)(X.double())["loss"].backward()
    kl = [0.5 * (loc**2 + math.exp(v) - 1 - v) for loc, v in ((0.1, 0.0), (2.0, 0.0), (-3.0, -1.0))]
    assert kl[0] < 0.5 < min(kl[1:])
    below, *above = encoder.loc.grad.tolist()
    assert below == encoder.log_variance.grad[0] == 0
    if estimator == "mean-field":
        assert above == pytest.approx([2.0, -3.0])  # d kl / d loc
        assert encoder.log_variance.grad[1:].tolist() == pytest.approx([0.0, (math.exp(-1) - 1) / 2], abs=1e-12)
    else:
        assert min(map(abs, above)) > 0.5


def test_free_bits_traced_are_the_eager_ones(traced):
    traced_as_eager(torch.optim.Adam, None, "epoch", free_bits=0.05, estimator="mean-field")


def test_free_bits_are_refused_where_they_have_no_meaning():
    encoder = MLPEncoder((1, 4, 4), hidden=(4,), latent_dim=3, heads=4)
    decoder = MLPDecoder((1, 4, 4), hidden=(4,), latent_dim=3)
    vae = VAE(encoder, decoder, latent_dim=3, event_shape=(1, 4, 4), posterior=FullCovarianceNormal(3))
    with pytest.raises(ValueError, match=r"site 'z': the KL is a sum over dimensions, as free bits.*MultivariateNormal"):
        fit(NegativeELBO(vae, free_bits=0.1), X, epochs=1, verbose=False)
    vae = make_vae()
    scaled = NegativeELBO(scale_latents(vae.model, 2.0), scale_latents(vae.guide, 2.0), free_bits=0.1)
    with pytest.raises(ValueError, match=r"free_bits is not defined under poutine\.scale"):
        scaled(X)
    with pytest.raises(ValueError, match="free_bits: expected a positive number, found -1"):
        NegativeELBO(vae, free_bits=-1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_has_gradients_wherever_it_is_called(vae, mode):
    x, other = torch.rand(20, 1, 4, 4), copy.deepcopy(vae)
    fit(NegativeELBO(vae), x, epochs=2, batch_size=8, verbose=False)
    objective = NegativeELBO(other)
    with mode():
        fit(objective, x, epochs=2, batch_size=8, verbose=False)
    assert equal(weights(vae), weights(other))
