"""The negative ELBO against Pyro's own estimators and against closed forms."""

import math

import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from conftest import LIKELIHOODS, make_vae
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_vae import (
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NegativeIWAE,
    NormalLikelihood,
    Objective,
    fit,
    scale_latents,
)
from pyro_vae.models.vae import VAE

X = torch.rand(7, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
PYRO = {"trace": Trace_ELBO, "mean-field": TraceMeanField_ELBO}


def gradients(loss, vae):
    return torch.autograd.grad(loss, list(vae.parameters()))


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
@pytest.mark.parametrize("beta", [1.0, 4.0, 0.3])
@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("estimator", ["trace", "mean-field"])
def test_value_and_gradient_equal_pyros_for_the_same_noise(estimator, particles, beta, likelihood):
    vae = make_vae(likelihood=likelihood).double()
    torch.manual_seed(5)
    ours = NegativeELBO(vae, estimator=estimator, num_particles=particles, beta=beta)(X)["loss"]
    elbo = PYRO[estimator](num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
    model, guide = scale_latents(vae.model, beta), scale_latents(vae.guide, beta)
    torch.manual_seed(5)
    theirs = elbo.differentiable_loss(model, guide, X) / len(X)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, vae), gradients(theirs, vae), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_steps_equal_those_of_pyros_svi():
    """Same noise, same batches: Adam on our loss and SVI with pyro.optim.Adam move the weights to the same place."""
    ours, theirs = make_vae().double(), make_vae().double()
    theirs.load_state_dict(ours.state_dict())
    objective = NegativeELBO(ours)
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2, fused=True)
    mean = 1 / len(X)  # SVI sums over the batch
    svi = SVI(
        poutine.scale(theirs.model, mean), poutine.scale(theirs.guide, mean), pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()
    )
    for step in range(20):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = objective(X)["loss"]
        loss.backward()
        optimizer.step()
        torch.manual_seed(step)
        assert svi.step(X) == pytest.approx(loss.item(), rel=1e-9)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_closed_form_kl_is_the_formula(vae64):
    q = vae64.encode(X)
    mu, sigma = q.base_dist.loc, q.base_dist.scale
    expected = 0.5 * (mu**2 + sigma**2 - (sigma**2).log() - 1).sum(-1).mean()
    torch.testing.assert_close(NegativeELBO(vae64, estimator="mean-field")(X)["kl"], expected)


def test_closed_form_kl_within_pyros_estimate(vae64):
    """Value: Pyro's log q(z|x) - log p(z) over many draws, within 5 of its own standard errors."""
    n = 20_000
    with torch.no_grad():
        _, draws = NegativeELBO(vae64).per_observation(X, num_particles=n)  # (n, images)
        exact = kl_divergence(vae64.encode(X), vae64.prior().expand((len(X),)))
    error = draws.std(0) / math.sqrt(n)
    assert (error > 0).all()
    assert ((draws.mean(0) - exact).abs() < 5 * error).all()


def test_gradient_of_closed_form_kl_within_pyros_estimate():
    """Gradient with respect to loc and log-scale, image by image, against the pathwise estimate draw by draw."""
    n = 20_000
    loc = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor([0.2, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    prior = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0)
    exact = torch.autograd.grad(kl_divergence(dist.Normal(loc, log_scale.exp()), prior).sum(), (loc, log_scale))
    torch.testing.assert_close(exact, (loc.detach(), (2 * log_scale.detach()).exp() - 1))  # mu and sigma^2 - 1
    many = [p.detach().expand(n, 3).clone().requires_grad_() for p in (loc, log_scale)]  # one leaf per draw
    q = dist.Normal(many[0], many[1].exp())
    z = q.rsample()
    estimates = torch.autograd.grad((q.log_prob(z) - prior.log_prob(z)).sum(), many)
    for estimate, truth in zip(estimates, exact, strict=True):
        error = estimate.std(0) / math.sqrt(n)
        assert ((estimate.mean(0) - truth).abs() < 5 * error).all()


class LinearGaussian(VAE):
    """z ~ N(0, 1), x | z ~ N(w z, s^2 I): posterior and marginal in closed form."""

    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    variance = 0.5

    def __init__(self, shift=0.0, stretch=1.0):
        decoder = torch.nn.Linear(1, 2, bias=False, dtype=torch.float64)
        decoder.weight.data[:, 0] = self.w
        likelihood = NormalLikelihood(variance=self.variance, mean="identity")
        super().__init__(torch.nn.Identity(), decoder, latent_dim=1, event_shape=(2,), likelihood=likelihood)
        self.double()
        self.shift, self.stretch = shift, stretch

    def exact_posterior(self, x):
        precision = 1 + self.w @ self.w / self.variance
        return dist.Normal((x @ self.w / self.variance / precision).unsqueeze(-1), precision**-0.5).to_event(1)

    def encode(self, x):
        q = self.exact_posterior(x).base_dist
        return dist.Normal(q.loc + self.shift, q.scale * self.stretch).to_event(1)

    def log_marginal(self, x):
        covariance = torch.outer(self.w, self.w) + self.variance * torch.eye(2, dtype=torch.float64)
        return dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance).log_prob(x)


def test_exact_posterior_as_guide_gives_log_marginal_without_variance():
    model = LinearGaussian()
    x = torch.randn(6, 2, dtype=torch.float64)
    reconstruction, kl = NegativeELBO(model).per_observation(x, num_particles=50)
    torch.testing.assert_close(-(reconstruction + kl), model.log_marginal(x).expand(50, 6), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", ["trace", "mean-field"])
def test_elbo_is_log_marginal_minus_kl_to_the_posterior(estimator):
    model = LinearGaussian(shift=0.3, stretch=1.5)
    x, n = torch.randn(6, 2, dtype=torch.float64), 40_000
    gap = kl_divergence(model.encode(x), model.exact_posterior(x))
    reconstruction, kl = NegativeELBO(model, estimator=estimator).per_observation(x, num_particles=n)
    elbo = -(reconstruction + kl)
    error = elbo.std(0) / math.sqrt(n)
    assert (gap > 0.05).all()
    assert ((elbo.mean(0) - (model.log_marginal(x) - gap)).abs() < 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_are_of_the_models_type(dtype):
    vae = make_vae().to(dtype)
    for objective in (NegativeELBO(vae, beta=0.3), NegativeELBO(lambda x: vae.model(x), lambda x: vae.guide(x))):
        assert {value.dtype for value in objective(X.to(dtype)).values()} == {dtype}
    (record,) = fit(NegativeELBO(lambda x: vae.model(x), lambda x: vae.guide(x)), X.to(dtype), epochs=1, verbose=False)
    assert math.isfinite(record.train["loss"])


def test_terms_add_up_and_beta_weighs_kl_alone(vae64):
    terms = {}
    for beta in (1.0, 4.0):
        torch.manual_seed(2)
        terms[beta] = NegativeELBO(vae64, beta=beta)(X)
    for name in ("neg_elbo", "reconstruction", "kl"):
        torch.testing.assert_close(terms[1.0][name], terms[4.0][name])
    t = terms[4.0]
    torch.testing.assert_close(t["loss"], t["reconstruction"] + 4 * t["kl"])
    torch.testing.assert_close(t["neg_elbo"], t["reconstruction"] + t["kl"])
    torch.testing.assert_close(terms[1.0]["loss"], terms[1.0]["neg_elbo"])


def test_squared_error_is_that_of_the_drawn_latents():
    vae = make_vae(likelihood=LIKELIHOODS["normal-sigmoid"]).double()
    torch.manual_seed(4)
    terms = NegativeELBO(vae, estimator="mean-field")(X)
    torch.manual_seed(4)
    z = vae.encode(X).rsample()
    expected = ((X - vae.decode(z).mean) ** 2).flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["squared_error"], expected)


def test_each_image_is_scored_by_itself(vae64):
    """No mixing over the batch: an image's terms are the same whatever stands beside it."""
    objective = NegativeELBO(vae64, estimator="mean-field")
    _, together = objective.per_observation(X)
    alone = torch.cat([objective.per_observation(x.unsqueeze(0))[1] for x in X], dim=1)
    torch.testing.assert_close(together, alone)


def test_more_particles_less_variance_same_mean(vae64):
    with torch.no_grad():
        values = {k: torch.stack([NegativeELBO(vae64, num_particles=k)(X)["loss"] for _ in range(300)]) for k in (1, 16)}
    error = math.hypot(*(v.std().item() / math.sqrt(len(v)) for v in values.values()))
    assert abs(values[1].mean() - values[16].mean()) < 5 * error
    ratio = (values[1].var() / values[16].var()).item()
    assert 16 / 1.6 < ratio < 16 * 1.6  # a ratio of two variances on 300 draws each spreads by about 12 %


def test_score_function_guide_is_refused(vae64):
    class Discrete(VAE):
        def encode(self, x):
            return dist.Poisson(torch.ones(len(x), self.latent_dim, dtype=x.dtype)).to_event(1)

    vae64.__class__ = Discrete
    del vae64.prior  # a module; a function may take its place
    vae64.prior = lambda: dist.Poisson(torch.ones(3, dtype=torch.float64)).to_event(1)
    with pytest.raises(ValueError, match="reparameterised guide"):
        NegativeELBO(vae64)(X)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"estimator": "jit"}, "trace, mean-field, found 'jit'"),
        ({"num_particles": 0}, "num_particles: expected a whole number >= 1"),
        ({"beta": 0.0}, "beta: expected a finite number from 1e-30"),
        ({"beta": float("nan")}, "beta: expected a finite number from 1e-30"),
    ],
)
def test_bad_settings(vae, arguments, match):
    with pytest.raises(ValueError, match=match):
        NegativeELBO(vae, **arguments)


def test_objective_without_forward():
    with pytest.raises(NotImplementedError, match="must define forward"):
        Objective()(X)


def test_diagnose_is_of_the_data_alone(vae64):
    expected = f"largest |x| {X.abs().max().item():g}"
    assert NegativeELBO(vae64).diagnose(X) == expected
    with torch.no_grad():
        for p in vae64.parameters():
            p.fill_(torch.nan)
    assert NegativeELBO(vae64).diagnose(X) == expected


# --- the importance-weighted bound ---


@pytest.mark.parametrize("particles", [1, 2, 7])
def test_iwae_equals_pyros_renyi_elbo_image_by_image(vae64, particles):
    """Value and gradient for the same noise. One image at a time: on a batch Pyro weighs all images together."""
    for x in X[:3].split(1):
        torch.manual_seed(5)
        ours = NegativeIWAE(vae64, num_particles=particles)(x)["loss"]
        renyi = RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
        vae64.zero_grad()
        torch.manual_seed(5)
        theirs = renyi.loss_and_grads(vae64.model, vae64.guide, x)
        assert ours.item() == pytest.approx(theirs, rel=1e-12)
        for gradient, p in zip(gradients(ours, vae64), vae64.parameters(), strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-9, atol=1e-12)


def test_iwae_of_a_batch_is_the_mean_over_images_and_not_the_joint_weight(vae64):
    objective = NegativeIWAE(vae64, num_particles=4)
    torch.manual_seed(3)
    reconstruction, kl = objective.per_observation(X)
    log_weights = -(reconstruction + kl)
    torch.manual_seed(3)
    torch.testing.assert_close(objective(X)["loss"], -(log_weights.logsumexp(0) - math.log(4)).mean())
    # The known failure, weights summed over the batch before the mean over draws, is a looser bound: this test sees it.
    with torch.no_grad():
        off = NegativeIWAE(LinearGaussian(shift=0.5, stretch=0.6), num_particles=4)
        x = torch.randn(7, 2, dtype=torch.float64)
        draws = -torch.stack([sum(off.per_observation(x)) for _ in range(1000)])  # (1000, 4, batch)
    per_image = (draws.logsumexp(1) - math.log(4)).mean(1)
    joint = (draws.sum(2).logsumexp(1) - math.log(4)) / len(x)
    difference = per_image - joint
    assert difference.mean() > 5 * difference.std() / math.sqrt(1000)


def test_iwae_with_one_particle_is_the_elbo(vae64):
    torch.manual_seed(3)
    iwae = NegativeIWAE(vae64, num_particles=1)(X)
    torch.manual_seed(3)
    elbo = NegativeELBO(vae64)(X)
    for name in ("loss", "neg_elbo", "reconstruction", "kl"):
        torch.testing.assert_close(iwae[name], elbo[name])


def test_bounds_are_nested_below_log_marginal():
    model = LinearGaussian(shift=0.3, stretch=1.5)
    x, exact = torch.randn(6, 2, dtype=torch.float64), None
    exact = model.log_marginal(x).mean().item()
    values, errors = [], []
    for k in (1, 5, 50):
        draws = torch.stack([-NegativeIWAE(model, num_particles=k)(x)["loss"] for _ in range(2000)])
        values.append(draws.mean().item())
        errors.append(draws.std().item() / math.sqrt(len(draws)))
    assert values[0] + 5 * errors[0] < values[1] < values[1] + 5 * errors[1] < values[2]
    assert values[2] < exact
    assert exact - values[2] < 0.05 * (exact - values[0])


# --- direct maximum likelihood ---


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_direct_loss_and_gradient_equal_those_of_the_large_tensor(likelihood):
    """Against the same estimate written with a (batch, M, pixels) tensor."""
    vae = make_vae(likelihood=likelihood).double()
    objective = NegativeDirectLogLikelihood(vae, num_particles=20).double()
    ours = objective(X)["loss"]
    log_p = vae.decode(objective.z).log_prob(X.unsqueeze(1))  # (batch, M), by way of (batch, M, 1, 4, 4)
    theirs = -(log_p.logsumexp(1) - math.log(20)).mean()
    torch.testing.assert_close(ours, theirs)
    parameters = list(vae.decoder.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_direct_draws_are_kept_or_redrawn(vae):
    x = torch.rand(5, 1, 4, 4)
    fixed, fresh = NegativeDirectLogLikelihood(vae), NegativeDirectLogLikelihood(vae, redraw=True)
    assert fixed.z.shape == (64, 3)
    assert fixed(x)["loss"] == fixed(x)["loss"]
    assert fresh(x)["loss"] != fresh(x)["loss"]


class Shift(VAE):
    """x | z ~ N(z + b, 1), z ~ N(0, 1): the marginal is N(b, 2), whose maximum-likelihood b is the mean of the data."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.b = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, z):
            return z + self.b

    def __init__(self):
        likelihood = NormalLikelihood(variance=1.0, mean="identity")
        super().__init__(torch.nn.Identity(), self.Decoder(), latent_dim=1, event_shape=(1,), likelihood=likelihood)
        self.double()


def test_direct_gradient_and_optimum_against_the_closed_form():
    """d/db of the mean of log N(x; b, 2) is (mean of x - b) / 2; it vanishes at the mean of x."""
    model = Shift()
    x = torch.randn(50, 1, dtype=torch.float64) * 1.4 + 0.7
    objective = NegativeDirectLogLikelihood(model, num_particles=200_000)
    for b in (0.0, 0.4, x.mean().item()):
        model.decoder.b.data.fill_(b)
        (gradient,) = torch.autograd.grad(objective(x)["loss"], model.decoder.b)
        assert -gradient.item() == pytest.approx((x.mean().item() - b) / 2, abs=0.01)  # of 200,000 draws: about 0.002


def test_direct_needs_a_draw(vae):
    with pytest.raises(ValueError, match="num_particles: expected a whole number >= 1"):
        NegativeDirectLogLikelihood(vae, num_particles=0)
