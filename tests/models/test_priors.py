"""Priors: densities that integrate to one, in closed form where there is one, learned where they have parameters."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_vae
from pyro.infer import Predictive
from torch import nn
from torch.distributions import kl_divergence

from pyro_vae import (
    VAE,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NormalMixture,
    StandardNormal,
    log_marginal,
)

SHAPE = {"event_shape": (1, 4, 4), "hidden": (16,), "latent_dim": 3}


def vae_with(prior):
    return VAE(MLPEncoder(**SHAPE), MLPDecoder(**SHAPE), latent_dim=3, event_shape=(1, 4, 4), prior=prior)


def learned(latent_dim, components):
    """A mixture that is not where it starts."""
    prior = NormalMixture(latent_dim, components).double()
    with torch.no_grad():
        for p in prior.parameters():
            p.copy_(torch.randn_like(p))
    return prior


@pytest.mark.parametrize("prior", [StandardNormal(1).double(), learned(1, 1), learned(1, 7)], ids=["normal", "1", "7"])
def test_density_integrates_to_one(prior):
    z = torch.linspace(-40, 40, 80_001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        density = prior().log_prob(z).exp()
    assert torch.trapezoid(density, z.squeeze(-1)).item() == pytest.approx(1, abs=1e-10)


def test_standard_normal_is_the_formula_and_has_nothing_to_save():
    prior, z = StandardNormal(3).double(), torch.randn(5, 3, dtype=torch.float64)
    assert (prior().batch_shape, prior().event_shape) == ((), (3,))
    torch.testing.assert_close(prior().log_prob(z), -0.5 * (z**2).sum(-1) - 1.5 * math.log(2 * math.pi))
    assert not prior.state_dict()
    assert not list(prior.parameters())


def test_default_parts_add_no_name_to_the_saved_weights(vae):
    """Folders of runs hold these names."""
    assert {name.split(".")[0] for name in vae.state_dict()} == {"encoder", "decoder"}


def test_mixture_is_the_sum_of_its_normals():
    prior, z = learned(3, 4), torch.randn(2, 5, 3, dtype=torch.float64)
    p = prior()
    assert (p.batch_shape, p.event_shape) == ((), (3,))
    parts = dist.Normal(prior.locs, (0.5 * prior.log_variances).exp()).log_prob(z.unsqueeze(-2)).sum(-1)
    expected = (prior.logits.softmax(0) * parts.exp()).sum(-1).log()
    torch.testing.assert_close(p.log_prob(z), expected, rtol=1e-12, atol=1e-12)


def test_mixture_starts_with_equal_weights_unit_scales_and_locs_of_the_standard_normal():
    prior = NormalMixture(20, components=500)
    p = prior()
    torch.testing.assert_close(p.mixture_distribution.probs, torch.full((500,), 1 / 500))
    assert torch.equal(p.component_distribution.base_dist.scale, torch.ones(500, 20))
    n = prior.locs.numel()
    assert abs(prior.locs.mean()) < 5 / math.sqrt(n)
    assert abs(prior.locs.var() - 1) < 5 * math.sqrt(2 / n)


def test_draws_of_a_mixture_have_its_moments():
    prior = learned(2, 3)
    n = 40_000
    with torch.no_grad():
        p = prior()
        z = p.sample((n,))
    assert ((z.mean(0) - p.mean).abs() < 5 * p.stddev / math.sqrt(n)).all()
    square = (z - p.mean) ** 2
    assert ((square.mean(0) - p.variance).abs() < 5 * square.std(0) / math.sqrt(n)).all()


def test_every_parameter_of_a_mixture_learns():
    prior = NormalMixture(3, components=4)
    vae = vae_with(prior)
    NegativeELBO(vae, num_particles=2)(torch.rand(5, 1, 4, 4))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_a_mixture_of_one_at_the_origin_is_the_standard_normal():
    """Two ways to one number: ELBO, value and gradient, for the same noise."""
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    prior = NormalMixture(3, components=1)
    with torch.no_grad():
        prior.locs.zero_()
    mixture, normal = vae_with(prior).double(), vae_with(None).double()
    normal.load_state_dict(mixture.state_dict(), strict=False)
    losses = []
    for vae in (mixture, normal):
        torch.manual_seed(1)
        losses.append(NegativeELBO(vae, num_particles=3)(x)["loss"])
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for a, b in zip(mixture.encoder.parameters(), normal.encoder.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_a_mixture_has_no_closed_form_kl(vae):
    with pytest.raises(NotImplementedError):
        kl_divergence(vae.encode(torch.rand(5, 1, 4, 4)), NormalMixture(3)())


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_mixture(parallel):
    prior = NormalMixture(3, components=2)
    with torch.no_grad():
        prior.locs.copy_(torch.tensor([[100.0, 0, 0], [-100.0, 0, 0]]))
    vae = vae_with(prior)
    with torch.no_grad():
        z = Predictive(vae.model, num_samples=20, parallel=parallel)(size=10)["z"]
    assert z.shape == (20, 10, 3)
    side = (z[..., 0] > 0).double()
    assert (z[..., 0].abs() - 100).abs().max() < 6
    assert abs(side.mean() - 0.5) < 5 * 0.5 / math.sqrt(200)


def test_log_marginal_is_that_of_the_mixture_by_quadrature():
    """z in one dimension: log p(x) by importance sampling against the integral."""
    shape = {"event_shape": (4,), "hidden": (8,), "latent_dim": 1}
    prior = learned(1, 3)
    vae = VAE(MLPEncoder(**shape), MLPDecoder(**shape), latent_dim=1, event_shape=(4,), prior=prior).double()
    x = (torch.rand(6, 4) < 0.5).double()
    z = torch.linspace(-30, 30, 20_001, dtype=torch.float64).unsqueeze(-1)
    with torch.no_grad():
        joint = vae.decode(z.unsqueeze(1)).log_prob(x) + prior().log_prob(z).unsqueeze(1)
    exact = torch.trapezoid(joint.exp(), z[:, 0], dim=0).log()

    def wide(x):  # covers all components, so that the error can be trusted
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 4.0).to_event(1))

    found = log_marginal(vae.model, wide, x, num_samples=20_000)
    assert ((found.value - exact).abs() < 5 * found.standard_error).all()


# --- priors of a user's own ---


class OfLabel(nn.Module):
    """p(z | y) = N(m_y, I): one distribution per row of context."""

    def __init__(self):
        super().__init__()
        self.locs = nn.Parameter(torch.tensor([[-50.0, 0.0, 0.0], [50.0, 0.0, 0.0]]))

    def forward(self, labels):
        return dist.Normal(self.locs[labels], 1.0).to_event(1)


def test_prior_that_takes_context():
    vae = vae_with(OfLabel())
    y = torch.tensor([0, 1, 1, 0, 1])
    assert vae.prior_of(y).batch_shape == (5,)
    z = Predictive(vae.model, num_samples=4, parallel=True)(None, y)["z"]
    assert torch.equal(z[..., 0] > 0, (y == 1).expand(4, 5))
    with pytest.raises(ValueError, match="context tensors for the prior.* expected 1, found 0"):
        vae.model(size=5)


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (StandardNormal(2), r"event shape \(3,\), .* found event shape \(2,\)"),
        (lambda: dist.Normal(torch.zeros(3), 1.0), r"found event shape \(\), batch shape \(3,\).* \.to_event\(1\)"),
    ],
)
def test_prior_of_another_shape_is_refused(prior, match):
    with pytest.raises(ValueError, match=match):
        vae_with(prior).model(size=2)


@pytest.mark.parametrize(("prior", "match"), [("normal", "found 'normal'"), (StandardNormal, r"StandardNormal\(\), found")])
def test_what_is_no_prior(prior, match):
    with pytest.raises(ValueError, match=match):
        vae_with(prior)


def test_copies_have_priors_of_their_own():
    vae = vae_with(NormalMixture(3))
    for clone in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert not {*map(id, clone.parameters())} & {*map(id, vae.parameters())}
        assert torch.equal(clone.prior.locs, vae.prior.locs)


# --- the direct fit ---


def test_redrawn_latents_of_the_standard_normal_are_the_noise_of_torch(vae):
    objective = NegativeDirectLogLikelihood(vae, num_particles=20, redraw=True)
    x = torch.rand(5, 1, 4, 4)
    torch.manual_seed(3)
    loss = objective(x)["loss"]
    torch.manual_seed(3)
    objective.redraw, objective.z = False, torch.randn(20, 3)
    assert torch.equal(loss, objective(x)["loss"])


def test_redrawn_latents_are_those_of_the_prior():
    prior = NormalMixture(3, components=2)
    with torch.no_grad():
        prior.locs.fill_(30.0)
    vae = vae_with(prior)
    drawn = []
    vae.decoder.register_forward_pre_hook(lambda net, inputs: drawn.append(inputs[0]))
    NegativeDirectLogLikelihood(vae, num_particles=50, redraw=True)(torch.rand(5, 1, 4, 4))
    assert (drawn[0] > 20).all()


def test_a_prior_whose_draws_carry_a_gradient_learns_in_the_direct_fit():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(3))

        def forward(self):
            return dist.Normal(self.loc, 1.0).to_event(1)

    vae = vae_with(Learned())
    NegativeDirectLogLikelihood(vae, redraw=True)(torch.rand(5, 1, 4, 4))["loss"].backward()
    assert vae.prior.loc.grad.abs().sum() > 0


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="components: expected a whole number >= 1, found 0"):
        NormalMixture(2, components=0)
    with pytest.raises(ValueError, match="latent_dim: expected a whole number >= 1, found 0"):
        StandardNormal(0)
    assert make_vae().prior().event_shape == (3,)
