import math

import pytest
import torch
from conftest import LIKELIHOODS, make_vae
from test_importance import integral

from pyro_vae import MLPDecoder, NegativeDirectLogLikelihood, direct_log_marginal, prior_search
from pyro_vae.estimates.prior_sampling import direct_log_prob

X = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_against_quadrature(likelihood):
    vae = make_vae(latent_dim=2, likelihood=likelihood).double()
    with torch.no_grad():
        exact = integral(lambda z, image: vae.decode(z).log_prob(image), X)
    result = direct_log_marginal(vae, X, num_samples=50_000)
    assert ((result.value - exact).abs() < 5 * result.standard_error).all()
    assert (result.standard_error < 0.05).all()
    assert abs(result.mean.value - exact.mean().item()) < 5 * result.mean.standard_error


def test_error_of_the_mean_knows_that_all_images_share_the_draws():
    vae = make_vae(latent_dim=2).double()
    with torch.no_grad():
        vae.decoder.output.weight *= 5  # so that z matters
    x = X[:1].expand(6, 1, 4, 4)  # the extreme: one image six times, whose errors are the same
    runs = [direct_log_marginal(vae, x, num_samples=400) for _ in range(200)]
    spread = torch.tensor([run.mean.value for run in runs]).std().item()
    reported = sum(run.mean.standard_error for run in runs) / len(runs)
    assert reported == pytest.approx(spread, rel=0.25)
    independent = torch.stack([run.standard_error for run in runs]).mean().item() / math.sqrt(6)
    assert reported > 2 * independent


@pytest.mark.parametrize("num_samples", [20, 21, 5000, 120_001])
def test_every_draw_counts_once(num_samples):
    """A decoder that ignores z makes the answer exact, whatever the groups."""
    vae = make_vae().double()
    with torch.no_grad():
        vae.decoder.output.weight.zero_()
        exact = vae.decode(torch.zeros(3, dtype=torch.float64)).log_prob(X)
    result = direct_log_marginal(vae, X, num_samples=num_samples)
    torch.testing.assert_close(result.value, exact)
    torch.testing.assert_close(result.ess, torch.full((6,), float(num_samples), dtype=torch.float64))
    assert result.num_samples == num_samples
    assert result.mean.standard_error == pytest.approx(0, abs=1e-9)


def test_direct_log_prob_is_the_log_of_the_mean(vae64):
    z = torch.randn(9, 3, dtype=torch.float64)
    expected = torch.stack([vae64.decode(z).log_prob(x).exp().mean().log() for x in X])
    torch.testing.assert_close(direct_log_prob(vae64, z, X), expected)


def test_prior_search_against_every_draw():
    vae = make_vae(latent_dim=2).double()
    torch.manual_seed(4)
    best, average = prior_search(vae, X, num_samples=7000)
    torch.manual_seed(4)
    z = vae.prior().sample((7000,))
    with torch.no_grad():
        for i, x in enumerate(X):
            log_p = vae.decode(z).log_prob(x)
            means = vae.decode(z).mean
            torch.testing.assert_close(best[i], means[log_p.argmax()])
            weights = (log_p - log_p.max()).exp()
            torch.testing.assert_close(average[i], (weights[:, None, None, None] * means).sum(0) / weights.sum())


def test_prior_search_finds_a_decoded_latent():
    vae = make_vae(latent_dim=1, hidden=(32,))
    with torch.no_grad():
        vae.decoder.output.weight *= 20
        z = torch.tensor([[-1.0], [0.3], [1.5]])
        x = vae.decode(z).mean.round()
        best, _ = prior_search(vae, x, num_samples=5000)
        assert (vae.decode(z).log_prob(x) <= vae.likelihood(torch.logit(best)).log_prob(x).flatten(1).sum(1) + 1e-3).all()


def test_a_single_observation_needs_its_dimension(vae):
    for estimate in (direct_log_marginal, prior_search):
        with pytest.raises(ValueError, match=r"expected x of shape \(batch, 1, 4, 4\), found shape \(1, 4, 4\)"):
            estimate(vae, torch.rand(1, 4, 4))


def test_data_that_the_likelihood_does_not_score(vae):
    for estimate in (direct_log_marginal, prior_search):
        with pytest.raises(ValueError, match="scores values in"):
            estimate(vae, torch.full((2, 1, 4, 4), 255.0))


def test_decoder_of_another_shape_is_refused(vae):
    vae.decoder = MLPDecoder((4, 4), hidden=(8,), latent_dim=3)
    x = torch.rand(2, 1, 4, 4)
    for estimate in (direct_log_marginal, prior_search, lambda vae, x: NegativeDirectLogLikelihood(vae)(x)):
        with pytest.raises(ValueError, match="Make decoder and event_shape agree"):
            estimate(vae, x)


def test_decoder_is_in_evaluation_mode_meanwhile(vae):
    vae.decoder.body.append(torch.nn.Dropout(0.5))
    x = torch.rand(2, 1, 4, 4)
    state = torch.random.get_rng_state()
    values = []
    for _ in range(2):
        torch.random.set_rng_state(state)
        values.append(direct_log_marginal(vae, x, num_samples=20).value)
    assert torch.equal(*values)
    best, _ = prior_search(vae, x, num_samples=1)
    torch.testing.assert_close(best[0], best[1])
    assert vae.decoder.body[-1].training


def test_too_few_draws(vae):
    with pytest.raises(ValueError, match="num_samples: expected a whole number >= 20, found 19"):
        direct_log_marginal(vae, torch.rand(2, 1, 4, 4), num_samples=19)
