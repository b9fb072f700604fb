import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pyro_vae import (
    PRESETS,
    BernoulliLikelihood,
    Data,
    NegativeELBO,
    NegativeIWAE,
    NormalLikelihood,
    evaluate,
    fit,
    load_preset,
)
from pyro_vae.runs.presets import Settings, fitting_likelihood


def linear_sizes(module):
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "likelihood", "training"),
    [
        ("bernoulli-z20", [(784, 400), (400, 40)], [(20, 400), (400, 784)], BernoulliLikelihood(), (40, 128, 1e-3)),
        ("bernoulli-z10", [(784, 200), (200, 20)], [(10, 200), (200, 784)], BernoulliLikelihood(), (5, 128, 1e-2)),
        (
            "gaussian-z4",
            [(784, 64), (64, 32), (32, 8)],
            [(4, 32), (32, 64), (64, 784)],
            NormalLikelihood(variance=0.5, mean="sigmoid"),
            (50, 200, 1e-3),
        ),
    ],
)
def test_presets_are_the_reference_systems(name, encoder, decoder, likelihood, training):
    settings = load_preset(name)
    vae = settings.build_vae((1, 28, 28))
    assert linear_sizes(vae.encoder) == encoder
    assert linear_sizes(vae.decoder) == decoder
    assert vae.likelihood == likelihood
    assert (settings.epochs, settings.batch_size, settings.lr) == training
    assert (settings.beta, settings.particles, settings.binarization) == (1, 1, "none")


def test_system_d_shares_its_nets_between_autoencoder_and_vae():
    settings = {name: load_preset(name) for name in ("gaussian-z2", "autoencoder-z2", "conv-gaussian", "conv-autoencoder")}
    for of_d in settings.values():
        assert (of_d.batch_size, of_d.lr, of_d.record_every, of_d.image_size) == (64, 5e-4, 250, 32)
    assert [of_d.steps for of_d in settings.values()] == [25_000, 25_000, 30_000, 30_000]
    models = {name: of_d.build_model((1, 32, 32)) for name, of_d in settings.items()}
    vae, autoencoder = models["gaussian-z2"], models["autoencoder-z2"]
    chain = [(1024, 128), (128, 64), (64, 32)]
    assert linear_sizes(vae.encoder) == [*chain, (32, 4)]
    assert linear_sizes(autoencoder.encoder) == [*chain, (32, 2)]
    assert linear_sizes(vae.decoder) == linear_sizes(autoencoder.decoder) == [(2, 32), (32, 64), (64, 128), (128, 1024)]
    assert sum(isinstance(module, torch.nn.ReLU) for module in vae.encoder.modules()) == 2  # none after the last
    assert vae.likelihood == NormalLikelihood(variance=0.5, mean="sigmoid")
    assert settings["conv-gaussian"].beta == 0.8
    for name, model in models.items():
        terms = settings[name].build_objective(model)(torch.rand(3, 1, 32, 32))
        terms["loss"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match="plain autoencoder"):
        settings["autoencoder-z2"].build_vae((1, 32, 32))
    with pytest.raises(ValueError, match=r"latent_dim: expected 64, .* found 2"):
        load_preset("conv-gaussian", latent_dim=2).build_vae((1, 32, 32))


def test_epochs_and_steps_take_each_others_place():
    assert (
        load_preset("gaussian-z2", epochs=3).training() | {"epochs": 3, "steps": None}
        == load_preset("gaussian-z2", epochs=3).training()
    )
    assert load_preset("bernoulli-z20", steps=7).epochs is None
    with pytest.raises(ValueError, match="either epochs or steps"):
        load_preset("bernoulli-z20", steps=7, epochs=1)


def test_the_preset_of_the_iwae_paper_trains_by_the_papers_schedule():
    """Stage i of 3^(i-1) epochs at 1e-3 * 10^(-(i-1)/7), Adam with eps 1e-4: by the preset alone."""
    settings = load_preset("bernoulli-z50")
    arguments = settings.training()
    optimizer = arguments["optimizer"]([torch.zeros(3, requires_grad=True)], lr=arguments["lr"])
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["eps"] == 1e-4
    schedule, rates = arguments["schedule"](optimizer), []
    for _ in range(settings.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [1e-3 * 10 ** (-(i - 1) / 7) for i in range(1, 9) for _ in range(3 ** (i - 1))]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert {"optimizer", "schedule"}.isdisjoint(load_preset("bernoulli-z20").training())
    vae = load_preset("bernoulli-z50", hidden=(4,)).build_vae((1, 4, 4))
    few = load_preset("bernoulli-z50", epochs=2).training()
    fit(NegativeELBO(vae), torch.rand(40, 1, 4, 4), verbose=False, **few)


def test_the_preset_of_the_iwae_paper_has_its_initial_weights(digits):
    settings = load_preset("bernoulli-z50")
    assert settings.uses_moments
    mean, deviation = digits[0].moments()
    moments = replace(digits[0], binarization="dynamic").moments()  # of the draws, of which none is made
    torch.testing.assert_close(moments[0], mean, rtol=0, atol=0)
    varied = (mean > 0) & (mean < 1)
    assert (moments[1] >= deviation)[varied].all()
    vae = settings.build_vae(digits[0].event_shape, moments=moments)
    probabilities = vae.decoder.output.bias.sigmoid()
    assert torch.allclose(probabilities.double(), mean.clamp(0.001, 0.999).flatten(), atol=1e-6)
    for head in vae.encoder.heads.weight.detach().chunk(2):  # each Glorot uniform for (200, 50)
        assert head.abs().max() == pytest.approx((6 / 250) ** 0.5, rel=0.01)
        assert head.std() == pytest.approx((6 / 250) ** 0.5 / 3**0.5, rel=0.03)
    others = [module.bias for module in vae.modules() if isinstance(module, nn.Linear) and module is not vae.decoder.output]
    assert all(not bias.any() for bias in others)
    with pytest.raises(ValueError, match="init: expected default with convolutional nets"):
        load_preset("conv-gaussian", init="glorot")


def test_changes_leave_the_preset_alone():
    settings = load_preset("bernoulli-z20", latent_dim=2, beta=4.0, objective="mean-field", particles=3)
    assert PRESETS["bernoulli-z20"].latent_dim == 20
    vae = settings.build_vae((1, 8, 8))
    objective = settings.build_objective(vae)
    assert (vae.latent_dim, vae.event_shape) == (2, (1, 8, 8))
    assert (objective.beta, objective.estimator, objective.num_particles) == (4.0, "mean-field", 3)
    objective = load_preset("bernoulli-z20", objective="iwae", particles=5).build_objective(vae)
    assert (type(objective), objective.num_particles) == (NegativeIWAE, 5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"latent_dim": 0}, "latent_dim: expected a whole number >= 1, found 0"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number"),
        ({"hidden": (10, 0)}, r"hidden: expected whole numbers >= 1, such as \(400, 200\), found \(10, 0\)"),
        ({"hidden": 10}, "hidden: expected whole numbers"),
        ({"lr": float("nan")}, "lr: expected a positive number"),
        ({"beta": -1}, "beta: expected a finite number from 1e-30 on"),
        ({"likelihood": "gamma"}, "likelihood: expected one of bernoulli, normal, learned-normal, poisson, none"),
        ({"objective": "renyi"}, "objective: expected one of trace, mean-field, iwae"),
        ({"objective": "iwae", "beta": 2.0, "particles": 5}, "beta: expected 1 with objective iwae"),
        ({"objective": "iwae"}, "particles: expected at least 2 with objective iwae"),
        ({"binarization": "dither"}, "binarization: expected one of none, threshold, dynamic"),
        ({"eps": 0}, "eps: expected a positive number, found 0"),
        ({"schedule": "cosine"}, "schedule: expected one of constant, stages, found 'cosine'"),
        ({"learning_rate": 1.0}, "no setting learning_rate; the settings are preset, likelihood"),
    ],
)
def test_bad_changes(changes, match):
    with pytest.raises(ValueError, match=match):
        load_preset("bernoulli-z20", **changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="bernoulli-z20, .*, bernoulli-z50, found 'vae'"):
        load_preset("vae")


def test_no_hidden_layer_is_a_linear_model():
    settings = Settings("own", "bernoulli", (), latent_dim=2, epochs=1, batch_size=1, lr=0.1)
    assert linear_sizes(settings.build_vae((3,)).encoder) == [(3, 4)]


@pytest.mark.parametrize(
    ("x", "binarization", "expected"),
    [
        (torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8), "none", "bernoulli"),
        (torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8), "none", "normal"),
        (255 * torch.randint(0, 2, (9, 3, 4, 4), dtype=torch.uint8), "none", "bernoulli"),
        (torch.rand(9, 3, 4, 4), "dynamic", "bernoulli"),
        (torch.randint(0, 2, (9, 5)).float(), "none", "bernoulli"),
        (torch.rand(9, 4, 4), "none", "bernoulli"),
        (torch.rand(9, 5), "none", "learned-normal"),
        (100 * torch.randn(9, 3, 4, 4), "none", "learned-normal"),
        (torch.randint(0, 2, (9, 5)), "none", "bernoulli"),
        (torch.randint(0, 9, (9, 5)), "none", "learned-normal"),
        (torch.randint(0, 9, (9, 3, 4, 4)), "none", "learned-normal"),
    ],
)
def test_likelihood_that_fits_the_data(x, binarization, expected):
    assert fitting_likelihood(Data(x, binarization=binarization))[0] == expected


def test_likelihood_of_what_is_no_pixels():
    x = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8)
    for data, expected in (
        (Data(x, pixels=False), "learned-normal"),
        (Data(x.flatten(1), pixels=True), "bernoulli"),
        (Data(x % 2, pixels=False), "bernoulli"),
        (Data(x / 255, pixels=False), "learned-normal"),
    ):
        assert fitting_likelihood(data)[0] == expected


def test_learned_normal_in_any_units_is_the_same_model():
    """x in grams or in tonnes: the same ELBO but for the Jacobian."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) @ torch.randn(3, 3) + 5
    found = []
    for unit in (1.0, 1e6):
        data = Data(unit * x)
        torch.manual_seed(0)
        settings = load_preset("bernoulli-z20", likelihood="learned-normal", hidden=(16,), latent_dim=2)
        vae = settings.build_vae((3,), moments=data.moments())
        fit(NegativeELBO(vae), data, epochs=3, batch_size=50, verbose=False)
        found.append(evaluate(vae, data)["neg_elbo"].value)
    assert found[1] - found[0] == pytest.approx(3 * math.log(1e6), abs=1e-3)


def test_learned_normal_needs_fully_connected_nets():
    with pytest.raises(ValueError, match="likelihood: expected bernoulli or normal with convolutional nets"):
        load_preset("conv-gaussian", likelihood="learned-normal")
