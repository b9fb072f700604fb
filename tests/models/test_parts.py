"""Parts of a VAE that are not what they should be: the error names the part, what it returned, and what it should."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_vae
from torch import nn

from pyro_vae import VAE, Data, MLPDecoder, MLPEncoder, NegativeELBO, evaluate, fit

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
NORMAL = torch.distributions.Normal(0.0, 1.0)


def trained(**parts):
    return fit(NegativeELBO(make_vae(**parts)), X, steps=1, verbose=False)


@pytest.mark.parametrize("part", ["prior", "posterior", "likelihood"])
def test_a_part_that_returns_no_distribution_of_pyro(part):
    for value, found in (
        (torch.zeros(3), "found Tensor"),
        (torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), 1.0), 1), "one of torch.distributions"),
    ):
        with pytest.raises(
            ValueError, match=f"expected the {part} to return a distribution of pyro.distributions, .*{found}"
        ):
            trained(**{part: lambda *_, value=value: value})


@pytest.mark.parametrize("part", ["prior", "posterior", "likelihood"])
@pytest.mark.parametrize("value", [dist.Normal(torch.zeros(3), 1.0).to_event(1), NORMAL])
def test_a_distribution_in_place_of_a_part(part, value):
    with pytest.raises(
        ValueError, match=f"expected a {part} that is called and returns a distribution, found a distribution"
    ):
        make_vae(**{part: value})


@pytest.mark.parametrize(
    ("likelihood", "found"),
    [
        (lambda o: dist.Laplace(o, 0.1).to_event(3), r"batch shape \(6,\), event shape \(1, 4, 4\)"),
        (lambda o: dist.Laplace(o[..., 0, :], 0.1), r"batch shape \(6, 1, 4\), event shape \(\)"),
        (lambda o: dist.Categorical(logits=o), r"batch shape \(6, 1, 4\), event shape \(\)"),
    ],
)
def test_a_likelihood_of_another_shape_is_named_and_not_the_decoder(likelihood, found):
    expected = r"expected a likelihood of batch shape \(6, 1, 4, 4\) and no event dimensions.*found "
    with pytest.raises(ValueError, match=expected + found + r", for decoder output of shape \(6, 1, 4, 4\)"):
        trained(likelihood=likelihood)


def test_a_decoder_of_another_shape_is_still_named():
    decoder = MLPDecoder((1, 4, 5), hidden=(8,), latent_dim=3)
    encoder = MLPEncoder((1, 4, 4), hidden=(8,), latent_dim=3)
    vae = VAE(encoder, decoder, latent_dim=3, event_shape=(1, 4, 4))
    with pytest.raises(ValueError, match=r"expected a decoder that maps .* found \(6, 1, 4, 5\)"):
        fit(NegativeELBO(vae), X, steps=1, verbose=False)


# --- what fit finds before its first step ---


def gamma():
    return dist.Gamma(torch.ones(3), 1.0).to_event(1)


def categories():
    return dist.Poisson(torch.ones(3)).to_event(1)


def log_normal(output):
    return dist.LogNormal(output[0], output[1].exp()).to_event(1)


def negative_scale(output):
    return dist.Laplace(output[0], -output[1].exp()).to_event(1)


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (
            {"prior": gamma},
            r"site 'z': Normal in the guide draws values outside the support of Gamma in the model.*another prior",
        ),
        ({"prior": categories}, r"'z' is continuous in the guide \(Normal\) and discrete in the model \(Poisson\)"),
        (
            {"posterior": lambda output: dist.Delta(output[0], event_dim=1)},
            r"'z' is a point mass in the guide \(Delta\).*ReconstructionError",
        ),
        ({"posterior": negative_scale}, r"site 'z': Laplace in the guide has scale of -.*expected GreaterThan"),
        (
            {"prior": lambda: dist.Laplace(torch.zeros(3), -torch.ones(3)).to_event(1)},
            r"site 'z': Laplace in the model has scale of -1, -1, -1, \.\.\., expected GreaterThan",
        ),
    ],
)
def test_a_posterior_and_a_prior_that_do_not_suit_are_refused_before_the_first_step(parts, match):
    with pytest.raises(ValueError, match=match):
        trained(**parts)


@pytest.mark.parametrize(
    "parts",
    [
        {"prior": gamma, "posterior": log_normal},
        {"prior": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), "posterior": log_normal},  # within the support
        {
            # An angle: the support that VonMises declares is the line, and its draws are within the circle.
            "prior": lambda: dist.Uniform(-3.1416 * torch.ones(3), 3.1416 * torch.ones(3)).to_event(1),
            "posterior": lambda output: Circle(output[0], 1.0 + 0 * output[1]).to_event(1),
        },
    ],
)
def test_draws_within_the_support_are_trained(parts):
    assert torch.isfinite(torch.tensor(trained(**parts)[-1].train["loss"]))


class Circle(dist.Normal):
    """Draws on a circle, by a distribution that declares the whole line."""

    def rsample(self, sample_shape=()):
        return torch.remainder(super().rsample(sample_shape) + torch.pi, 2 * torch.pi) - torch.pi


def test_the_sites_are_looked_at_once_and_the_noise_is_as_before(monkeypatch):
    import pyro_vae.training.objectives as module

    seen, look = [], module.check_sites
    monkeypatch.setattr(module, "check_sites", lambda sites: seen.append(len(sites)) or look(sites))
    objective = NegativeELBO(make_vae())
    state = torch.get_rng_state()
    objective.prepare(X)
    assert torch.equal(state, torch.get_rng_state())
    fit(objective, X, steps=4, batch_size=3, verbose=False)
    assert seen == [2, 2]  # prepare above, and that of fit


def test_evaluate_refuses_a_point_mass():
    vae = make_vae(posterior=lambda output: dist.Delta(output[0], event_dim=1))
    with pytest.raises(ValueError, match="'z' is a point mass in the guide"):
        evaluate(vae, X)


def test_auxiliary_sites_of_autoguides_are_as_before():
    """Their other sites are point masses at transforms of the auxiliary draw."""
    net = nn.Linear(16, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 16), 1.0).to_event(1), obs=x.flatten(1)
            )

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(net(x.flatten(1)), 0.5).to_event(1), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u, event_dim=1))

    fit(NegativeELBO(model, guide), X, steps=1, verbose=False)


# --- context ---


class Labelled(nn.Module):
    """A net of one's own that takes labels as numbers."""

    takes_context = True

    def __init__(self):
        super().__init__()
        self.first, self.net = nn.Linear(3, 16), MLPEncoder((1, 4, 4), hidden=(8,), latent_dim=3)

    def forward(self, x, y):
        return self.net(x + self.first(y).unflatten(-1, (1, 4, 4)))


@pytest.mark.parametrize("encoder", [Labelled, lambda: MLPEncoder((1, 4, 4), hidden=(8,), latent_dim=3, context_dim=3)])
def test_labels_as_whole_numbers_where_the_net_wants_them_one_hot(encoder):
    decoder = MLPDecoder((1, 4, 4), hidden=(8,), latent_dim=3)
    vae = VAE(encoder(), decoder, latent_dim=3, event_shape=(1, 4, 4))
    data = Data(X, torch.arange(6) % 3, inputs=("x", "labels"))
    expected = (
        r"the encoder cannot use its context, torch.int64 of shape \(6,\).*Labels are whole numbers: pass them one-hot"
    )
    with pytest.raises(ValueError, match=expected):
        fit(NegativeELBO(vae), data, steps=1, verbose=False)
