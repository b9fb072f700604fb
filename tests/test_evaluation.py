import math

import pytest
import torch
from conftest import LIKELIHOODS, make_vae
from torch.distributions import kl_divergence

from pyro_vae import Data, NormalLikelihood, evaluate

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
