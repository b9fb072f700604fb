"""Posteriors: the encoder's output as a distribution, and the closed-form KL of a full covariance."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import (
    VAE,
    ConvEncoder,
    DiagonalNormal,
    FullCovarianceNormal,
    MLPDecoder,
    MLPEncoder,
    NegativeELBO,
    NormalMixture,
    StandardNormal,
    evaluate,
    fit,
    log_marginal,
)
from pyro_vae.analysis.latent import kl_per_dimension
from pyro_vae.models.scales import bounded_scale

SHAPE = {"event_shape": (1, 4, 4), "hidden": (16,), "latent_dim": 3}


def vae_with(posterior, encoder=None):
    encoder = encoder or MLPEncoder(**SHAPE, heads=posterior.heads)
    return VAE(encoder, MLPDecoder(**SHAPE), latent_dim=3, event_shape=(1, 4, 4), posterior=posterior)


def heads(d, *batch):
    return tuple(torch.randn(*batch, d, dtype=torch.float64) for _ in range(1 + d))


@pytest.mark.parametrize("batch", [(), (7,), (2, 7)])
@pytest.mark.parametrize("d", [1, 3])
def test_shapes_for_any_leading_dimensions(batch, d):
    output = heads(d, *batch)
    for posterior in (DiagonalNormal(), FullCovarianceNormal(d)):
        q = posterior(output[: posterior.heads])
        assert (q.batch_shape, q.event_shape) == (batch, (d,))
        assert q.rsample((4,)).shape == (4, *batch, d)


def test_diagonal_normal_is_the_arithmetic_it_always_was(vae):
    x = torch.rand(5, 1, 4, 4)
    loc, log_variance = vae.encoder(x)
    q = vae.encode(x)
    assert torch.equal(q.base_dist.loc, loc)
    assert torch.equal(q.base_dist.scale, (0.5 * log_variance).exp())
    assert torch.equal(q.base_dist.scale, bounded_scale(log_variance))


def test_full_covariance_is_of_the_factor_that_its_rows_say():
    loc, *rows = heads(3, 5)
    q = FullCovarianceNormal(3)((loc, *rows))
    for b in range(5):
        factor = torch.zeros(3, 3, dtype=torch.float64)
        for j in range(3):
            factor[j, :j] = rows[j][b, :j]
            factor[j, j] = (0.5 * rows[j][b, j]).exp()
        torch.testing.assert_close(q.covariance_matrix[b], factor @ factor.T)
        torch.testing.assert_close(q.mean[b], loc[b])


def test_full_covariance_without_correlations_is_diagonal():
    loc, log_variance = heads(3, 5)[:2]
    rows = log_variance.diag_embed().unbind(-2)
    full, diagonal = FullCovarianceNormal(3)((loc, *rows)), DiagonalNormal()((loc, log_variance))
    z = torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(full.log_prob(z), diagonal.log_prob(z))
    p = StandardNormal(3).double()()
    torch.testing.assert_close(kl_divergence(full, p), kl_divergence(diagonal, p))


@pytest.mark.parametrize("posterior", [DiagonalNormal(), FullCovarianceNormal(1)])
def test_density_integrates_to_one(posterior):
    q = posterior((torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)))
    z = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    assert torch.trapezoid(q.log_prob(z.unsqueeze(-1)).exp(), z).item() == pytest.approx(1, abs=1e-10)


def test_density_in_two_dimensions_integrates_to_one():
    q = FullCovarianceNormal(2)(tuple(torch.tensor(v, dtype=torch.float64) for v in ([0.3, -0.2], [0.5, 9.0], [1.1, -0.7])))
    grid = torch.linspace(-15, 15, 1501, dtype=torch.float64)
    density = q.log_prob(torch.cartesian_prod(grid, grid)).exp().view(1501, 1501)
    assert torch.trapezoid(torch.trapezoid(density, grid), grid).item() == pytest.approx(1, abs=1e-8)


# --- the closed form ---


def random_pair(d, *batch):
    p = dist.Normal(torch.randn(d, dtype=torch.float64), torch.rand(d, dtype=torch.float64) + 0.3).to_event(1)
    return FullCovarianceNormal(d)(heads(d, *batch)), p


@pytest.mark.parametrize("batch", [(), (6,), (2, 6)])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_kl_is_that_of_two_multivariate_normals(d, batch):
    """By torch's own formula, which factorises both covariances."""
    q, p = random_pair(d, *batch)
    same = torch.distributions.MultivariateNormal(p.base_dist.loc, scale_tril=p.base_dist.scale.diag_embed())
    kl = kl_divergence(q, p)
    assert kl.shape == batch
    torch.testing.assert_close(kl, kl_divergence(q, same), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kl, kl_divergence(q, p.expand(batch)), rtol=1e-12, atol=1e-12)
    assert (kl > 0).all()


def test_kl_and_its_gradient_within_the_monte_carlo_estimate():
    n = 40_000
    output = [h.requires_grad_() for h in heads(3, 4)]
    q = FullCovarianceNormal(3)(tuple(output))
    p = StandardNormal(3).double()()
    closed = kl_divergence(q, p)
    truth = torch.autograd.grad(closed.sum(), output)
    z = q.rsample((n,))
    draws = (q.log_prob(z) - p.log_prob(z)).detach()
    assert ((draws.mean(0) - closed).abs() < 4 * draws.std(0) / math.sqrt(n)).all()

    # The gradient in 50 independent groups of draws, whose spread gives its error.
    found = []
    for _ in range(50):
        q = FullCovarianceNormal(3)(tuple(output))
        z = q.rsample((1000,))
        found.append(torch.autograd.grad((q.log_prob(z) - p.log_prob(z)).mean(0).sum(), output))
    for i, expected in enumerate(truth):
        groups = torch.stack([g[i] for g in found])
        error = groups.std(0) / math.sqrt(50)
        assert ((groups.mean(0) - expected).abs() <= 4.5 * error + 1e-9).all(), i  # 48 numbers


def test_kl_to_what_has_no_closed_form_is_not_made_up():
    q, _ = random_pair(3, 5)
    for p in (
        dist.Laplace(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1),
        dist.Normal(torch.zeros(5, 3, dtype=torch.float64), 1.0).to_event(2),
        NormalMixture(3).double()(),
    ):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, p)


def test_closed_form_elbo_equals_pyros_for_the_same_noise():
    vae = vae_with(FullCovarianceNormal(3)).double()
    x = torch.rand(7, 1, 4, 4, dtype=torch.float64)
    torch.manual_seed(2)
    terms = NegativeELBO(vae, estimator="mean-field")(x)
    torch.manual_seed(2)
    theirs = TraceMeanField_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, x) / 7
    torch.testing.assert_close(terms["loss"], theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms["kl"], kl_divergence(vae.encode(x), vae.prior()).mean(), rtol=1e-12, atol=1e-12)


# --- in a VAE ---


@pytest.mark.filterwarnings("ignore::pyro_vae.estimates.records.UnreliableEstimateWarning")  # a lower bound all the same
def test_full_covariance_everywhere(digits):
    """fit, evaluate, log_marginal: the bound rises, and lies below log p(x)."""
    train, test = digits
    shape = {"event_shape": (1, 8, 8), "hidden": (32,), "latent_dim": 2}
    posterior = FullCovarianceNormal(2)
    vae = VAE(
        MLPEncoder(**shape, heads=posterior.heads),
        MLPDecoder(**shape),
        latent_dim=2,
        event_shape=(1, 8, 8),
        posterior=posterior,
    )
    before = evaluate(vae, test)["neg_elbo"].value
    fit(NegativeELBO(vae, estimator="mean-field"), train, epochs=10, lr=3e-3, verbose=False, compile=False)
    after = evaluate(vae, test)["neg_elbo"]
    assert after.value < before - 5
    (x,) = test.batch(torch.arange(len(test)))
    found = log_marginal(vae.model, vae.guide, x, num_samples=200).mean
    assert found.value > -after.value - 5 * math.hypot(after.standard_error, found.standard_error)
    off = vae.encode(x).covariance_matrix[:, 0, 1].abs().mean()
    assert off > 1e-3  # it uses what it has
    with pytest.raises(ValueError, match="kl_per_dimension: site 'z': the KL is a sum over dimensions.*MultivariateNormal"):
        kl_per_dimension(vae, test)


def test_convolutional_encoder_with_the_heads_of_a_full_covariance():
    encoder = ConvEncoder((1, 8, 8), channels=(2, 3, 2), kernels=(3, 3, 3), heads=3)
    assert encoder.latent_dim == 2
    q = FullCovarianceNormal(2)(encoder(torch.rand(5, 1, 8, 8)))
    assert q.mean.shape == (5, 2)


def test_draws_and_particles_in_further_leading_dimensions():
    vae = vae_with(FullCovarianceNormal(3)).double()
    x = torch.rand(2, 5, 1, 4, 4, dtype=torch.float64)
    q = vae.encode(x)
    assert q.batch_shape == (2, 5)
    torch.testing.assert_close(q.covariance_matrix[1], vae.encode(x[1]).covariance_matrix)
    assert NegativeELBO(vae, num_particles=4)(x[0])["loss"].isfinite()


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1)[:, :3])


def test_a_posterior_of_ones_own_takes_whatever_the_encoder_returns():
    def laplace(output):
        return dist.Laplace(output[..., 0, :], output[..., 1, :].exp()).to_event(1)

    vae = vae_with(laplace, Returns(lambda h: torch.stack([h, -h], 1)))
    x = torch.rand(2, 5, 1, 4, 4)
    q = vae.encode(x)
    assert (q.batch_shape, q.event_shape) == ((2, 5), (3,))
    assert torch.equal(q.mean, x.flatten(2)[..., :3])


BAD = {
    "too few": (
        FullCovarianceNormal(3),
        lambda h: (h, h),
        r"4 tensors \(loc, row 1, row 2, row 3\), found 2 tensors",
    ),
    "too many": (DiagonalNormal(), lambda h: (h, h, h), r"a pair of tensors \(loc, log_variance\), found 3 .* heads=2"),
    "a tensor": (FullCovarianceNormal(3), lambda h: h, "found Tensor. Give the encoder heads=4"),
    "a narrow row": (FullCovarianceNormal(3), lambda h: (h, h, h, h[:, :1]), r"encoder's row 3 of shape \(5, 3\).*\(5, 1\)"),
    "other latents": (DiagonalNormal(), lambda h: (h[:, :2],) * 2, r"encoder's loc of shape \(5, 3\), .* found \(5, 2\)"),
    "no batch": (lambda h: dist.Normal(h, 1.0).to_event(1), lambda h: h.sum(0), r"each of length 5, found \(3,\)"),
    "a number": (lambda h: dist.Normal(h, 1.0).to_event(1), lambda h: (h, 3), r"each of length 5, found \(5, 3\), int"),
    "no event": (lambda h: dist.Normal(h, 1.0), lambda h: h, r"event shape \(3,\), found \(5, 3\) and \(\)"),
    "other posterior": (FullCovarianceNormal(2), lambda h: (h,) * 3, r"\(\*batch, 2\), found \(5, 3\)"),
}


@pytest.mark.parametrize(("posterior", "function", "match"), BAD.values(), ids=BAD)
def test_output_that_does_not_suit_is_refused(posterior, function, match):
    with pytest.raises(ValueError, match=match):
        vae_with(posterior, Returns(function)).encode(torch.rand(5, 1, 4, 4))


@pytest.mark.parametrize("posterior", ["diagonal", DiagonalNormal])
def test_what_is_no_posterior(posterior):
    with pytest.raises(ValueError, match=r"DiagonalNormal\(\)"):
        vae_with(posterior, MLPEncoder(**SHAPE))


def test_wild_factors_stay_finite():
    """Log-variances that would overflow, as of an encoder gone wild."""
    big = torch.full((1, 2), 300.0)
    q = FullCovarianceNormal(2)((big, big, -big))
    assert kl_divergence(q, StandardNormal(2)()).isfinite().all()
    assert q.log_prob(q.mean).isfinite().all()
