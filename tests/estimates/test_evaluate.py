import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from conftest import LIKELIHOODS, make_vae
from torch.distributions import kl_divergence

from pyro_vae import (
    VAE,
    BernoulliLikelihood,
    Data,
    MLPDecoder,
    MLPEncoder,
    NegativeELBO,
    NormalLikelihood,
    evaluate,
)

X = torch.rand(23, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_figures_are_whole_set_averages(likelihood):
    vae = make_vae(likelihood=likelihood).double()
    n = 4000
    figures = evaluate(vae, X, num_samples=n, batch_size=10)
    torch.manual_seed(99)
    q = vae.encode(X)
    draws = -vae.decode(q.sample((n,))).log_prob(X)
    kl = kl_divergence(q, vae.prior().expand((23,))).mean().item()
    assert figures["kl"].value == pytest.approx(kl, rel=1e-12)
    assert (figures["kl"].standard_error, figures["kl"].num_samples) == (0, 0)
    reconstruction = figures["reconstruction"]
    assert abs(reconstruction.value - draws.mean().item()) < 5 * math.sqrt(2) * reconstruction.standard_error
    assert figures["neg_elbo"].value == pytest.approx(reconstruction.value + kl, rel=1e-12)
    assert figures["neg_elbo"].num_samples == n


def test_standard_error_is_the_spread_over_repeated_evaluations():
    vae = make_vae().double()
    runs = [evaluate(vae, X, num_samples=5, seed=seed)["neg_elbo"] for seed in range(200)]
    spread = torch.tensor([run.value for run in runs]).std().item()
    reported = sum(run.standard_error for run in runs) / len(runs)
    assert reported == pytest.approx(spread, rel=0.25)  # a spread of 200 runs is known to 5 %


def test_squared_error_and_its_error_scale_with_the_variance():
    vae = make_vae(likelihood=NormalLikelihood(variance=0.1)).double()
    figures = evaluate(vae, X, num_samples=1000)
    q = vae.encode(X)
    expected = ((X - vae.decode(q.sample((1000,))).mean) ** 2).flatten(2).sum(-1).mean().item()
    squared_error = figures["squared_error"]
    assert abs(squared_error.value - expected) < 5 * math.sqrt(2) * squared_error.standard_error
    assert squared_error.standard_error == pytest.approx(0.2 * figures["reconstruction"].standard_error)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 1000])
def test_batches_change_no_exact_figure(batch_size):
    vae = make_vae().double()
    assert evaluate(vae, X, batch_size=batch_size)["kl"].value == pytest.approx(evaluate(vae, X)["kl"].value, rel=1e-12)


def test_evaluation_changes_nothing(vae):
    vae.train()
    weights = [p.detach().clone() for p in vae.parameters()]
    state = torch.random.get_rng_state()
    data = Data(X.float(), binarization="dynamic")
    assert evaluate(vae, data, seed=1) == evaluate(vae, data, seed=1)
    assert vae.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, vae.parameters(), strict=True))
    assert all(p.grad is None for p in vae.parameters())


def test_one_draw_has_no_error(vae):
    with pytest.raises(ValueError, match="num_samples: expected a whole number >= 2, found 1"):
        evaluate(vae, X.float(), num_samples=1)


def test_unsuitable_data(vae):
    with pytest.raises(ValueError, match="BernoulliLikelihood"):
        evaluate(vae, X.float() + 1)


class OtherPrior(VAE):
    """Of its own model: z ~ N(0.3, 0.8), and a second latent, the offset of all logits."""

    def model(self, x=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.3, 0.8).expand([self.latent_dim]).to_event(1))
            shift = pyro.sample("shift", dist.Normal(-0.5, 0.5))
            logits = self.decoder(z.reshape(-1, self.latent_dim)).reshape(*z.shape[:-1], *self.event_shape)
            logits = logits + shift.reshape(*shift.shape, 1, 1, 1)
            pyro.sample("x", BernoulliLikelihood()(logits).to_event(3), obs=x)

    def guide(self, x=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encode(x))
            pyro.sample("shift", dist.Normal(x.flatten(1).mean(1) - 1, 0.7))


def test_a_vae_of_another_model_is_measured_by_that_model():
    """Nothing is taken from the VAE's own prior: evaluate, the objective and the formula agree, and log p bounds them."""
    shape = {"event_shape": (1, 4, 4), "latent_dim": 3}
    vae = OtherPrior(MLPEncoder(hidden=(16,), **shape), MLPDecoder(hidden=(16,), **shape), **shape).double()
    figures = evaluate(vae, X, num_samples=4000, importance_samples=4000)
    shift = dist.Normal(X.flatten(1).mean(1) - 1, 0.7)
    kl = kl_divergence(vae.encode(X), dist.Normal(X.new_tensor(0.3), 0.8).expand([3]).to_event(1))
    kl = kl + kl_divergence(shift, dist.Normal(-0.5, 0.5))
    assert figures["kl"].value == pytest.approx(kl.mean().item(), rel=1e-6)  # of numbers that are float32
    z = vae.encode(X).sample((4000,))
    logits = vae.decoder(z.flatten(0, 1)).reshape(4000, 23, 16) + shift.sample((4000,))[..., None]
    draws = (F.softplus(logits) - X.flatten(1) * logits).sum(-1)
    error = figures["reconstruction"].standard_error
    assert abs(figures["reconstruction"].value - draws.mean().item()) < 5 * math.sqrt(2) * error
    with torch.no_grad():
        terms = NegativeELBO(vae, num_particles=4000)(X)
    kl_error = 5 * (4 * 2 / 4000 / 23) ** 0.5 * 10  # log q - log p at the draws: a few nats each
    assert terms["neg_elbo"].item() == pytest.approx(figures["neg_elbo"].value, abs=10 * error + kl_error)
    assert figures["log_marginal"].value > -figures["neg_elbo"].value
