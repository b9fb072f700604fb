"""A run that is stopped and resumed ends as if it had never stopped."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import THREADS, equal, make_vae, weights
from test_fit import OPTIMIZERS, SCHEDULES
from torch import nn
from torch.optim import lr_scheduler

from pyro_vae import (
    VAE,
    Autoencoder,
    CheckpointError,
    Checkpoints,
    CyclicWarmup,
    Data,
    LinearWarmup,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NegativeIWAE,
    Objective,
    ReconstructionError,
    TrainingStoppedError,
    fit,
)
from pyro_vae.training.state import ReproducibilityWarning

SHAPE = (1, 4, 4)


class Noisy(nn.Module):
    """An encoder with dropout, batch norm, and a buffer that is not part of its state_dict."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.heads = nn.Linear(8, 6)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.heads(self.layers(x) * (1 + 1e-3 * self.seen)).chunk(2, -1)


def autoencoder():
    encoder = MLPEncoder(SHAPE, hidden=(8,), latent_dim=3, heads=1)
    return Autoencoder(encoder, MLPDecoder(SHAPE, hidden=(8,), latent_dim=3), latent_dim=3, event_shape=SHAPE)


def noisy():
    return VAE(Noisy(), MLPDecoder(SHAPE, hidden=(8,), latent_dim=3), latent_dim=3, event_shape=SHAPE)


OBJECTIVES = {
    "elbo": lambda: NegativeELBO(make_vae()),
    "mean-field": lambda: NegativeELBO(make_vae(), estimator="mean-field", num_particles=3, beta=2.0),
    "iwae": lambda: NegativeIWAE(make_vae(), num_particles=4),
    "direct": lambda: NegativeDirectLogLikelihood(make_vae(), num_particles=8),
    "direct, redrawn": lambda: NegativeDirectLogLikelihood(make_vae(), num_particles=8, redraw=True),
    "autoencoder": lambda: ReconstructionError(autoencoder()),
    "dropout and batch norm": lambda: NegativeELBO(noisy()),
}


def build(name):
    torch.manual_seed(5)
    return OBJECTIVES[name]()


def images(n=70):
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def run(objective, *, data=None, **options):
    settings = {"epochs": 3, "batch_size": 16, "lr": 0.01, "seed": 3, "verbose": False, "compile": False}
    data = Data(images(), binarization="dynamic") if data is None else data
    if "steps" in options:
        del settings["epochs"]
    return fit(objective, data, **settings | options)


def after(steps):
    """An answer to ``stop`` that is True after so many steps."""
    asked = itertools.count(1)
    return lambda: next(asked) >= steps


def without_times(history):
    return [replace(record, timing={}) for record in history]


def tensors(objective):
    return [t.detach().clone() for t in (*objective.parameters(), *objective.buffers())]


@pytest.mark.parametrize("stops", [(1,), (7,), (5, 5), (1, 1, 1, 1)])  # 5 steps an epoch
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bit_for_bit(name, stops, tmp_path):
    straight = build(name)
    expected = run(straight, test=images(30))
    checkpoints = Checkpoints(tmp_path)
    for steps in stops:
        torch.manual_seed(99)  # the weights that a resumed process draws, and its noise, are not used
        with pytest.raises(TrainingStoppedError):
            run(build(name), test=images(30), checkpoints=checkpoints, resume=checkpoints.load(), stop=after(steps))
    resumed = build(name)
    history = run(resumed, test=images(30), checkpoints=checkpoints, resume=checkpoints.load())
    assert equal(tensors(resumed), tensors(straight))
    assert without_times(history) == without_times(expected)


@pytest.mark.parametrize("name", ["iwae", "dropout and batch norm"])
def test_bit_for_bit_traced(name, traced, tmp_path):
    compiled_and_resumed(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elbo", "iwae", "dropout and batch norm"])
def test_bit_for_bit_compiled(name, tmp_path):
    compiled_and_resumed(name, tmp_path)


def compiled_and_resumed(name, tmp_path):
    """Whichever steps are checked against eager ones, and those depend on where a process began."""
    straight = build(name)
    options = {"epochs": 4, "compile": True}
    expected = run(straight, **options)
    checkpoints = Checkpoints(tmp_path)
    for steps in (6, 1, 4):
        with pytest.raises(TrainingStoppedError):
            run(build(name), **options, checkpoints=checkpoints, resume=checkpoints.load(), stop=after(steps))
    resumed = build(name)
    history = run(resumed, **options, checkpoints=checkpoints, resume=checkpoints.load())
    assert equal(tensors(resumed), tensors(straight))
    assert without_times(history) == without_times(expected)


def stopped_and_resumed(folder, make, stops, **options):
    """The training without a stop and the one with some: their tensors and records are the same; the records."""
    straight = make()
    expected = run(straight, **options)
    checkpoints = Checkpoints(folder)
    for steps in stops:
        with pytest.raises(TrainingStoppedError):
            run(make(), **options, checkpoints=checkpoints, resume=checkpoints.load(), stop=after(steps))
    resumed = make()
    history = run(resumed, **options, checkpoints=checkpoints, resume=checkpoints.load())
    assert equal(tensors(resumed), tensors(straight))
    assert without_times(history) == without_times(expected)
    return history


def eager_and_traced(cases, *, fast):
    """Each case with compile=False and True; a trace takes seconds, so those that are not among the fast are slow tests."""
    slow = [pytest.param(case, True, marks=[] if case in fast else pytest.mark.slow, id=f"{case}, traced") for case in cases]
    return [*(pytest.param(case, False, id=f"{case}, eager") for case in cases), *slow]


@pytest.mark.parametrize(("optimizer", "compile"), eager_and_traced(OPTIMIZERS, fast=["SGD", "Adam, eps"]))
def test_bit_for_bit_with_any_optimizer(optimizer, compile, traced, tmp_path):
    stopped_and_resumed(tmp_path, lambda: build("elbo"), (3, 5), optimizer=OPTIMIZERS[optimizer], compile=compile)


@pytest.mark.parametrize("optimizer", ["Adam, eps", "SGD"])
@pytest.mark.parametrize(("schedule", "compile"), eager_and_traced(SCHEDULES, fast=["OneCycleLR"]))
def test_bit_for_bit_with_any_schedule(schedule, optimizer, compile, traced, tmp_path):
    schedule, unit = SCHEDULES[schedule]
    options = {"schedule": schedule, "schedule_by": unit, "optimizer": OPTIMIZERS[optimizer], "compile": compile}
    stopped_and_resumed(tmp_path, lambda: build("elbo"), (3, 2, 7), test=images(30), epochs=4, **options)  # 5: a record


@pytest.mark.parametrize(
    ("beta", "compile"),
    eager_and_traced([LinearWarmup(8), LinearWarmup(30, start=0.5), CyclicWarmup(4, cycles=2)], fast=[LinearWarmup(8)]),
)
@pytest.mark.filterwarnings("ignore:the schedule of beta is at")
def test_bit_for_bit_with_a_warm_up(beta, compile, traced, tmp_path):
    def make(beta=beta):
        torch.manual_seed(5)
        return NegativeELBO(make_vae(), beta=beta, free_bits=0.05)

    stopped_and_resumed(tmp_path, make, (3, 4), test=images(30), compile=compile)
    changed, state = make(LinearWarmup(99)), Checkpoints(tmp_path).load()
    with pytest.raises(CheckpointError, match=r"objective: .*Warmup\(steps=.*\) -> .*beta=LinearWarmup\(steps=99"):
        run(changed, test=images(30), compile=compile, resume=state)


def test_patience_counts_on_after_a_stop(tmp_path):
    """A run that overfits: stopped by patience at the same record, and for good."""
    options = {"data": Data(images(16)), "epochs": 60, "lr": 0.05, "test": images(40)[20:], "patience": 3}
    history = stopped_and_resumed(tmp_path, lambda: build("elbo"), (2, 1, 1), **options)
    scores = [record.test["neg_elbo"] for record in history]
    assert 4 < len(scores) < 60
    assert scores.index(min(scores)) == len(scores) - 4
    again = build("elbo")
    checkpoints, said = Checkpoints(tmp_path), []
    assert run(again, **options, checkpoints=checkpoints, resume=checkpoints.load(), on_record=said.append) == history
    assert not said
    with pytest.raises(CheckpointError, match="patience: 3 -> 4"):
        run(build("elbo"), **options | {"patience": 4}, checkpoints=checkpoints, resume=checkpoints.load())


def test_another_optimizer_or_schedule_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    step = functools.partial(lr_scheduler.StepLR, step_size=2)
    first = {"optimizer": OPTIMIZERS["SGD"], "schedule": step}
    run(build("elbo"), checkpoints=checkpoints, **first)
    for changes, words in (
        ({"optimizer": torch.optim.SGD}, r"optimizer: SGD\(.*momentum=0\.9.* -> SGD\(.*momentum=0,"),
        ({"optimizer": None}, r"optimizer: SGD\(.* -> Adam\("),
        ({"schedule": None}, r"schedule: StepLR\(.*by epoch -> "),
        (
            {"schedule": functools.partial(lr_scheduler.StepLR, step_size=3)},
            "schedule: StepLR.*step_size=2.* -> .*step_size=3",
        ),
        ({"schedule_by": "step"}, "schedule: .*by epoch -> .*by step"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(build("elbo"), checkpoints=checkpoints, resume=checkpoints.load(), **first | changes)
    run(build("elbo"), checkpoints=checkpoints, resume=checkpoints.load(), epochs=5, **first)  # longer it may be


def test_bit_for_bit_by_steps_with_records_of_their_own(tmp_path):
    straight = build("elbo")
    expected = run(straight, steps=23, record_every=6)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(TrainingStoppedError, match="stopped after step 10"):
        run(build("elbo"), steps=23, record_every=6, checkpoints=checkpoints, stop=after(10))
    resumed = build("elbo")
    history = run(resumed, steps=23, record_every=6, checkpoints=checkpoints, resume=checkpoints.load())
    assert equal(weights(resumed), weights(straight))
    assert without_times(history) == without_times(expected)
    assert [record.step for record in history] == [6, 12, 18, 23]


def test_more_epochs_go_on_where_fewer_ended(tmp_path):
    straight = build("elbo")
    expected = run(straight, epochs=5)
    checkpoints = Checkpoints(tmp_path)
    run(build("elbo"), epochs=2, checkpoints=checkpoints)
    resumed = build("elbo")
    history = run(resumed, epochs=5, checkpoints=checkpoints, resume=checkpoints.load())
    assert equal(weights(resumed), weights(straight))
    assert without_times(history) == without_times(expected)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = build("elbo")
    expected = run(first, checkpoints=checkpoints)
    again = build("elbo")
    records = []
    assert run(again, checkpoints=checkpoints, resume=checkpoints.load(), on_record=records.append) == expected
    assert equal(weights(again), weights(first))
    assert not records  # each record is announced once
    with pytest.raises(CheckpointError, match="15 steps were made, and only 10 are requested"):
        run(build("elbo"), epochs=2, checkpoints=checkpoints, resume=checkpoints.load())


def test_checkpoints_every_so_many_steps(tmp_path):
    saved = []

    class Counting(Checkpoints):
        def save(self, step, content):
            saved.append(step)
            super().save(step, content)

    run(build("elbo"), checkpoints=Counting(tmp_path), checkpoint_every=4)
    assert saved == [4, 8, 12, 15]  # and at the end
    assert {path.name for path in tmp_path.iterdir()} == {"step-000000012.pt", "step-000000015.pt", "best.pt"}


def test_by_default_a_fast_run_makes_one_at_the_end(tmp_path):
    run(build("elbo"), checkpoints=Checkpoints(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"step-000000015.pt", "best.pt"}


def test_the_best_is_that_of_the_lowest_test_loss(tmp_path):
    kept = []
    objective = build("elbo")
    history = run(
        objective,
        data=Data(images(16)),  # so few that it overfits, and the last is not the best
        epochs=30,
        lr=0.05,
        test=images(40)[20:],
        checkpoints=Checkpoints(tmp_path),
        on_record=lambda record: kept.append(tensors(objective)),
    )
    scores = [record.test["neg_elbo"] for record in history]
    best = scores.index(min(scores))
    assert 0 < best < 25
    content = torch.load(tmp_path / "best.pt", weights_only=True)
    assert equal(list(content["tensors"].values()), kept[best])
    assert content["progress"]["best"] == scores[best]


def test_changed_settings_are_listed_and_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    run(build("elbo"), checkpoints=checkpoints)
    for changes, words in (
        ({"lr": 0.02, "batch_size": 8}, r"batch_size: 16 -> 8; lr: 0.01 -> 0.02"),
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"clip_grad_norm": 1.0}, "clip_grad_norm: None -> 1.0"),
        ({"precision": "medium"}, "precision: highest -> medium"),
        ({"data": Data(images())}, "binarization dynamic.* -> .*binarization none"),
        ({"data": Data(255 - images(), binarization="dynamic")}, "CRC-32 .* -> .*CRC-32"),
        ({"test": images(30)}, "test:  -> 30 of shape"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(build("elbo"), checkpoints=checkpoints, resume=checkpoints.load(), **changes)
    with pytest.raises(CheckpointError, match=r"objective: NegativeELBO\(.*\) -> NegativeIWAE\("):
        run(build("iwae"), checkpoints=checkpoints, resume=checkpoints.load())
    with pytest.raises(CheckpointError, match=r"shape of pair.module.encoder.*\(16, 16\) -> \(9, 16\)"):
        run(NegativeELBO(make_vae(hidden=(9,))), checkpoints=checkpoints, resume=checkpoints.load())
    run(build("elbo"), checkpoints=checkpoints, resume=checkpoints.load(), verbose=True, checkpoint_every=1)


class Conditional(Objective):
    """Squared distance of x from a mean for each label."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(2, *SHAPE))

    def forward(self, x, y):
        return {"loss": (x - self.mean[y]).square().mean()}


def test_a_conditional_run_goes_on_with_the_same_labels_alone(tmp_path):
    data = Data(images(), torch.arange(70) % 2, inputs=("x", "labels"))
    straight = Conditional()
    run(straight, data=data, test=data)
    assert not torch.equal(straight.mean[0], straight.mean[1])
    checkpoints, resumed = Checkpoints(tmp_path), Conditional()
    with pytest.raises(TrainingStoppedError):
        run(Conditional(), data=data, test=data, checkpoints=checkpoints, stop=after(7))
    changed = replace(data, labels=1 - data.labels)
    with pytest.raises(CheckpointError, match=r"data: .*labels of shape \(\), CRC-32 .* -> .*labels of shape"):
        run(resumed, data=changed, test=data, checkpoints=checkpoints, resume=checkpoints.load())
    with pytest.raises(CheckpointError, match=r"test: .*labels of shape \(\), CRC-32 .* -> .*labels of shape"):
        run(resumed, data=data, test=changed, checkpoints=checkpoints, resume=checkpoints.load())
    run(resumed, data=data, test=data, checkpoints=checkpoints, resume=checkpoints.load())
    assert torch.equal(resumed.mean, straight.mean)


def test_training_and_test_data_have_the_same_inputs():
    class Either(Conditional):
        def forward(self, x, y=None):
            return {"loss": x.square().mean()}

    data = Data(images(), torch.arange(70) % 2, inputs=("x", "labels"))
    alone = replace(data, inputs=("x",), name="alone")
    with pytest.raises(ValueError, match=r"alone: a batch has x, which does not match Conditional.forward\(x, y\): missing"):
        run(Conditional(), data=alone)
    with pytest.raises(ValueError, match=r"test: expected batches of x, labels .*found x\. Give both the same inputs"):
        run(Either(), data=data, test=alone)


def test_a_refused_resume_changes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    run(build("elbo"), checkpoints=checkpoints)
    objective = NegativeELBO(make_vae())
    before = weights(objective)
    with pytest.raises(CheckpointError):
        run(objective, checkpoints=checkpoints, resume=checkpoints.load(), lr=1.0)
    assert equal(weights(objective), before)


def test_checkpoints_of_an_earlier_run_are_not_replaced_by_accident(tmp_path):
    run(build("elbo"), checkpoints=Checkpoints(tmp_path))
    with pytest.raises(CheckpointError, match=r"has checkpoints of an earlier run.*resume=checkpoints.load"):
        run(build("elbo"), checkpoints=Checkpoints(tmp_path))


@pytest.mark.parametrize("content", [{}, {"settings": {}}, {"settings": 1, "conditions": 2, "tensors": 3, "progress": {}}])
def test_a_state_of_something_else_is_refused(content):
    with pytest.raises(CheckpointError, match="not a checkpoint of fit"):
        run(build("elbo"), resume=content)


def test_other_threads_are_said(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    run(build("elbo"), epochs=1, checkpoints=checkpoints)
    torch.set_num_threads(THREADS + 1)
    with pytest.warns(ReproducibilityWarning, match=f"threads: {THREADS} -> {THREADS + 1}"):
        run(build("elbo"), epochs=2, checkpoints=checkpoints, resume=checkpoints.load())


def test_stop_without_checkpoints():
    objective = build("elbo")
    with pytest.raises(TrainingStoppedError, match="stopped after step 4") as stopped:
        run(objective, stop=after(4))
    assert stopped.value.step == 4
    straight = build("elbo")
    run(straight, steps=4)
    assert equal(weights(objective), weights(straight))


def test_stop_at_the_last_step_is_the_end(tmp_path):
    assert len(run(build("elbo"), stop=after(15), checkpoints=Checkpoints(tmp_path))) == 3


def test_resuming_another_devices_noise_is_not_needed_at_the_start_of_an_epoch(tmp_path):
    """At the start of an epoch, the noise is seeded anew: a state of it that is of no use there does no harm."""
    checkpoints = Checkpoints(tmp_path)
    run(build("elbo"), epochs=1, checkpoints=checkpoints)
    state = checkpoints.load()
    state["noise"] = [{"cpu": torch.zeros(1, dtype=torch.uint8)}]
    straight, resumed = build("elbo"), build("elbo")
    run(straight)
    run(resumed, resume=state)
    assert equal(weights(resumed), weights(straight))


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    objective = build("elbo")
    (tmp_path / "file").touch()
    before = weights(objective)
    with pytest.raises(CheckpointError, match=r"file/checkpoints: cannot be written to \(Not a directory\)"):
        fit(objective, Data(images()), epochs=1, checkpoints=Checkpoints(tmp_path / "file" / "checkpoints"), verbose=False)
    assert equal(weights(objective), before)


def test_another_processor_is_said(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    run(build("elbo"), epochs=1, checkpoints=checkpoints)
    state = checkpoints.load()
    monkeypatch.setattr("pyro_vae.training.state.processor", lambda: "Zuse Z3")
    with pytest.warns(ReproducibilityWarning, match=r"conditions have changed \(processor: .* -> Zuse Z3\)"):
        run(build("elbo"), resume=state)
    del state["conditions"]["processor"]  # as in a checkpoint of an earlier version
    run(build("elbo"), resume=state)


@pytest.mark.parametrize("part", ["progress", "optimizer", "scheduler", "noise", "not_compiled", "conditions", "tensors"])
def test_a_checkpoint_without_one_of_its_parts_is_refused_and_changes_nothing(tmp_path, part):
    checkpoints, objective = Checkpoints(tmp_path), build("elbo")
    run(build("elbo"), epochs=1, checkpoints=checkpoints)
    before = weights(objective)
    for content in ({}, None):
        state = checkpoints.load()
        if content is None:
            del state[part]
        elif part in ("scheduler", "not_compiled", "conditions"):
            continue  # which may be empty
        else:
            state[part] = content
        with pytest.raises(CheckpointError, match="resume: "):
            run(objective, resume=state)
        assert equal(weights(objective), before)
