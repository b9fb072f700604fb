import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vae import log_marginal
from pyro_vae.models.linear_gaussian import ENTROPY, MEAN, LinearGaussian, covariance, sample, truth


def test_entropy_of_the_reference():
    assert pytest.approx(2.694036, abs=5e-7) == ENTROPY
    assert truth().entropy().item() == pytest.approx(ENTROPY, rel=1e-12)


def test_samples_have_the_mean_the_covariance_and_the_entropy():
    state = torch.random.get_rng_state()
    n = 200_000
    x = sample(n, seed=1).double()
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(x[:5].float(), sample(n, seed=1)[:5])
    assert not torch.equal(x[:5].float(), sample(5, seed=2))
    assert ((x.mean(0) - torch.tensor(MEAN)).abs() < 5 / math.sqrt(n)).all()
    assert ((x.T.cov() - covariance()).abs() < 5 * 1.5 / math.sqrt(n)).all()
    log_p = truth().log_prob(x)
    assert abs(log_p.mean().item() + ENTROPY) < 5 * log_p.std().item() / math.sqrt(n)


def model_of(toy):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(toy.weight.shape[1], dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ toy.weight.T + toy.bias, toy.variance**0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", toy.posterior(x))

    return model, guide


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_bayes_rule_holds_for_prior_likelihood_posterior_and_marginal(latent_dim):
    torch.manual_seed(latent_dim)
    weight, bias = torch.randn(3, latent_dim, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    toy = LinearGaussian(weight, bias, variance=0.3)
    x, z = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, latent_dim, dtype=torch.float64)
    prior = dist.Normal(torch.zeros(latent_dim, dtype=torch.float64), 1.0).to_event(1)
    likelihood = dist.Normal(z @ weight.T + bias, 0.3**0.5).to_event(1)
    joint = prior.log_prob(z) + likelihood.log_prob(x)
    torch.testing.assert_close(toy.marginal().log_prob(x), joint - toy.posterior(x).log_prob(z))
    result = log_marginal(*model_of(toy), x, num_samples=20)
    torch.testing.assert_close(result.value, toy.marginal().log_prob(x), rtol=0, atol=1e-10)


def test_fit_is_the_maximum_of_the_likelihood():
    torch.manual_seed(0)
    x = torch.randn(500, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 1
    best = LinearGaussian.fit(x, latent_dim=2)

    def log_likelihood(weight, bias, log_variance):
        toy = LinearGaussian(weight, bias, log_variance.exp())
        return toy.marginal().log_prob(x).mean()

    at = [p.clone().requires_grad_() for p in (best.weight, best.bias, torch.tensor(best.variance, dtype=x.dtype).log())]
    value = log_likelihood(*at)
    for gradient in torch.autograd.grad(value, at):
        assert gradient.abs().max() < 1e-8
    for _ in range(20):
        moved = [p.detach() + 0.05 * torch.randn_like(p) for p in at]
        assert log_likelihood(*moved) < value


def test_fit_with_all_but_one_dimension_is_the_full_covariance():
    x = sample(10_000).double()
    marginal = LinearGaussian.fit(x, latent_dim=1).marginal()
    torch.testing.assert_close(marginal.covariance_matrix, (x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    assert kl_divergence(truth(), marginal).item() < 5 * 5 / (2 * len(x))  # 5 parameters: expected 5 / 2N


@pytest.mark.parametrize("latent_dim", [0, 2])
def test_fit_needs_a_noise_dimension(latent_dim):
    with pytest.raises(ValueError, match="latent_dim must be from 1 to 1 for 2 columns"):
        LinearGaussian.fit(sample(10), latent_dim=latent_dim)


@pytest.mark.parametrize(
    ("x", "latent_dim", "match"),
    [
        (torch.zeros(5), 1, r"\(N, D\).*\(5,\)"),
        (torch.zeros(5, 3).numpy(), 1, "ndarray"),
        (torch.zeros(5, 3, dtype=torch.int64), 1, "int64"),
        (torch.full((5, 3), math.nan), 1, "finite"),
        (torch.randn(1, 3), 1, "N > 1"),
        (torch.ones(5, 3), 1, "no maximum"),
        (torch.randn(3, 5, dtype=torch.float64), 2, "no maximum"),  # rank 2
        (torch.randn(9, 3), 3, "from 1 to 2"),
    ],
)
def test_data_without_a_maximum_are_refused(x, latent_dim, match):
    with pytest.raises(ValueError, match=match):
        LinearGaussian.fit(x, latent_dim=latent_dim)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(D, latent_dim\)"):
        LinearGaussian(torch.zeros(3), torch.zeros(3), 1.0)
    with pytest.raises(ValueError, match="variance"):
        LinearGaussian(torch.zeros(3, 1), torch.zeros(3), -1.0)
    with pytest.raises(ValueError, match=r"\(\*batch, 3\)"):
        LinearGaussian(torch.zeros(3, 1), torch.zeros(3), 1.0).posterior(torch.zeros(4, 1))
    with pytest.raises(ValueError, match="n: expected"):
        sample(-1)
