import math

import numpy as np
import pyro
import pytest
import torch
from conftest import equal, make_vae, weights
from torch import nn

from pyro_vae import Data, NegativeELBO, NonFiniteError, NormalLikelihood, Objective, evaluate, fit, load_preset
from pyro_vae.records import TrainingRecord
from pyro_vae.train import format_record


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
    message = rf"the {what} is not finite in epoch 1, step 3: {value}largest \|x\| \S+\. The weights"
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
        ValueError, match=r"\(\*batch, 1, 4, 4\) and type torch.float32, found torch.float32 of shape \(53, 16\)"
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
