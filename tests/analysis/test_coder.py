"""Any model and guide, whoever wrote them, in everything that looks at a model."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_vae
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints

from pyro_vae import (
    VAE,
    Autoencoder,
    Data,
    FullCovarianceNormal,
    MLPDecoder,
    MLPEncoder,
    NormalMixture,
    TrainingRecord,
    evaluate,
    log_marginal,
)
from pyro_vae.analysis.coder import Coder, UndefinedError
from pyro_vae.analysis.gallery import run_figures
from pyro_vae.analysis.latent import (
    active_units,
    decoder_mean,
    denoise,
    interpolate,
    kl_per_dimension,
    latent_means,
    latent_record,
    manifold_grid,
    sample_like,
)
from pyro_vae.models.programs import ProgramPair

EVENT = (1, 4, 4)
X = torch.rand(24, *EVENT, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
SHAPE = {"event_shape": EVENT, "hidden": (6,), "latent_dim": 2}


class PyrosOwn(nn.Module):
    """In the spirit of Pyro's examples/vae: modules registered in the programs, images observed flattened."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 4), nn.Linear(2, 16)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 2), 1.0).to_event(1))
            pixels = dist.Bernoulli(logits=self.decoder(z), validate_args=False).to_event(1)
            pyro.sample("obs", pixels, obs=x.reshape(-1, 16))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x.reshape(-1, 16)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def pyros_own():
    own = PyrosOwn()
    return own, lambda x: own.encoder(x.flatten(1))[:, :2], lambda z: own.decoder(z).sigmoid().reshape(-1, *EVENT)


def of_vae(posterior=None, prior=None):
    heads = 2 if posterior is None else posterior.heads
    encoder, decoder = MLPEncoder(**SHAPE, heads=heads), MLPDecoder(**SHAPE)
    vae = VAE(encoder, decoder, latent_dim=2, event_shape=EVENT, posterior=posterior, prior=prior)
    return vae, lambda x: vae.encode(x).mean, lambda z: vae.decode(z).mean


def two_sites():
    """z1 of two dimensions, then z2 of one that depends on it; functions, a parameter in Pyro's store."""
    encoder, decoder = nn.Linear(16, 2), nn.Linear(3, 16)

    def model(x):
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            second = pyro.sample("second", dist.Normal(first.sum(-1), 1.0))
            logits = decoder(torch.cat([first, second.unsqueeze(-1)], -1))
            pyro.sample("pixels", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x.flatten(1))

    def guide(x):
        width = pyro.param("width", torch.tensor(0.3), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            first = pyro.sample("first", dist.Normal(encoder(x.flatten(1)), width).to_event(1))
            pyro.sample("second", dist.Normal(2 * first[..., 0], width))

    def means(x):
        first = encoder(x.flatten(1))
        return torch.cat([first, 2 * first[:, :1]], 1)

    return (model, guide), means, lambda z: decoder(z).sigmoid().reshape(-1, *EVENT)


def constrained():
    """A Beta of two elements: its KL to another is a sum over dimensions in closed form."""
    encoder, decoder = nn.Linear(16, 4), nn.Linear(2, 16)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("share", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x.flatten(1))

    def parameters(x):
        return (encoder(x.flatten(1)).exp() + 1).chunk(2, -1)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("share", dist.Beta(*parameters(x)).to_event(1))

    def means(x):
        a, b = parameters(x)
        return a / (a + b)

    return ProgramPair(model, guide), means, lambda z: decoder(z).reshape(-1, *EVENT)


KINDS = {
    "VAE": of_vae,
    "learned prior": lambda: of_vae(prior=NormalMixture(2, components=3)),
    "full covariance": lambda: of_vae(posterior=FullCovarianceNormal(2)),
    "Pyro's own": pyros_own,
    "two sites": two_sites,
    "constrained": constrained,
}
NO_KL = ("learned prior", "full covariance")  # their dimensions are not independent


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def case(kind):
    return KINDS[kind]()


def test_means_and_what_is_decoded_from_them(case):
    model, means, decode = case
    z = latent_means(model, X, batch_size=7)
    torch.testing.assert_close(z, means(X))
    torch.testing.assert_close(decoder_mean(model, z, like=X), decode(z))
    assert active_units(model, X).tolist() == (means(X).var(0, correction=0) > 0.01).tolist()
    way, pixels = interpolate(model, X[0], X[1], steps=3)
    torch.testing.assert_close(way[1:2], decode(means(X[:2]).mean(0, keepdim=True)))
    assert pixels.shape == way.shape == (3, *EVENT)
    _, noisy, back = denoise(model, X[:5])
    torch.testing.assert_close(back, decode(means(noisy)))
    assert sample_like(model, Data(X, LABELS), 1, num_samples=4).shape == (4, *EVENT)


def test_the_kl_of_each_dimension_sums_to_the_kl(case, kind):
    model, *_ = case
    if kind in NO_KL:
        with pytest.raises(UndefinedError, match="the KL is a sum over dimensions"):
            kl_per_dimension(model, X)
        assert latent_record(model, X)["kl_per_dimension"] is None
        return
    state = torch.get_rng_state()
    found = kl_per_dimension(model, X, batch_size=7)
    assert torch.equal(state, torch.get_rng_state())
    whole = evaluate(model, X, num_samples=2000)["kl"]
    # Of two sites, the KL of the second depends on the first one's draw: one here, 2,000 there.
    error = 5 * whole.standard_error * math.sqrt(2000)
    assert found.sum().item() == pytest.approx(whole.value, abs=error + 1e-4)
    assert latent_record(model, X)["kl_per_dimension"] == pytest.approx(found.tolist(), rel=1e-6, abs=error)


def test_a_plane_of_latent_space(case, kind):
    model, _, decode = case
    images, first, second = manifold_grid(model, size=3, limits=(0.1, 0.9, 0.2, 0.8), like=X)
    z = torch.zeros(9, len(latent_means(model, X)[0]))
    z[:, :2] = torch.cartesian_prod(second.flip(0), first).flip(1)
    torch.testing.assert_close(images, decode(z))
    if kind == "constrained":
        with pytest.raises(UndefinedError, match="site 'share': expected latents in the support of its Beta"):
            manifold_grid(model, size=3, like=X)


def test_all_pictures(case, kind):
    model, *_ = case
    data, terms = Data(X, LABELS), {"loss": 1.0, "neg_elbo": 1.0, "reconstruction": 1.0, "kl": 0.0}
    history, reasons = [TrainingRecord(1, 5, terms), TrainingRecord(2, 10, terms)], []
    names = [name for name, _ in run_figures(model, data, data, history, title=kind, left_out=reasons.append)]
    assert set(names) == {
        *("training_curves", "reconstructions", "reconstructions_train", "prior_samples", "interpolation", "denoising"),
        *("samples_by_label", "latent_pairs", "tsne"),
    }
    assert reasons == []


def test_a_pair_is_a_pair_everywhere():
    (model, guide), *_ = two_sites()
    for pair in ((model, guide), ProgramPair(model, guide)):
        assert latent_means(pair, X).shape == (24, 3)
        assert evaluate(pair, X, num_samples=2)["kl"].value > 0
        assert log_marginal(pair, X, num_samples=3).value.shape == (24,)
    with pytest.raises(ValueError, match="expected a model and a guide"):
        latent_means((model, guide, guide), X)


class Conditional(nn.Module):
    """The label moves z and x; it is no VAE of ours."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 2), nn.Linear(2, 16)

    def model(self, x, y):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(y.float().unsqueeze(-1).expand(-1, 2), 1.0).to_event(1))
            loc = self.decoder(z) + y.float().unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc.reshape(-1, *EVENT), 1.0).to_event(3), obs=x)

    def guide(self, x, y):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.flatten(1)) * y.float().unsqueeze(-1), 1.0).to_event(1))


def test_context_goes_along():
    model, data = Conditional(), Data(X, LABELS, inputs=("x", "labels"))
    y = LABELS.float().unsqueeze(-1)
    torch.testing.assert_close(latent_means(model, data, batch_size=7), model.encoder(X.flatten(1)) * y)
    z = torch.randn(24, 2)
    expected = (model.decoder(z) + y).reshape(-1, *EVENT)
    torch.testing.assert_close(decoder_mean(model, z, LABELS, like=X), expected)
    images, *_ = manifold_grid(model, torch.tensor([2]), size=3, limits=(0, 1, 0, 1), like=X)
    torch.testing.assert_close(images[6], (model.decoder(torch.zeros(2)) + 2).reshape(EVENT))
    kl = kl_per_dimension(model, data)
    torch.testing.assert_close(kl, (0.5 * (latent_means(model, data) - y) ** 2).mean(0))
    history = [TrainingRecord(1, 5, {"loss": 1.0})]
    names = [name for name, _ in run_figures(model, data, data, history, title="conditional")]
    assert "samples_by_label" in names
    assert "interpolation" not in names


def with_guide(q, prior=None, site="z", observed=1):
    """x of 16 elements and a guide of one site."""

    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample(site, prior or dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for part in range(observed):
                pyro.sample(f"x{part}", dist.Normal(x.new_zeros(16), 1.0).to_event(1), obs=x.flatten(1))

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample(site, q)

    return model, guide


def test_what_is_not_defined_is_refused():
    sigmoid = dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.SigmoidTransform()]
    )
    for q, match in (
        (sigmoid, "site 'z': expected a distribution with a mean; .* has none in closed form"),
        (dist.Cauchy(torch.zeros(2), 1.0).to_event(1), "site 'z': .* Cauchy has none, or is not finite"),
    ):
        with pytest.raises(UndefinedError, match=match):
            latent_means(with_guide(q), X)
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(UndefinedError, match="expected one site that observes x.*'x0'.*'x1'"):
        decoder_mean(with_guide(normal, observed=2), torch.zeros(3, 2), like=X)
    with pytest.raises(ValueError, match="of the sites z of 2; found"):
        decoder_mean(with_guide(normal), torch.zeros(3, 3), like=X)
    with pytest.raises(ValueError, match=r"decoder_mean: the shape of an observation is not known.*like=x\[:1\]"):
        decoder_mean(with_guide(normal), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="expected two of the 1 latent dimensions"):
        manifold_grid(make_vae(latent_dim=1), size=3)
    with pytest.raises(UndefinedError, match="the guide has no latent site"):
        latent_means((with_guide(normal)[0], lambda x: None), X)


def test_pictures_that_the_model_does_not_allow_are_left_out_with_the_reason():
    cauchy = with_guide(dist.Cauchy(torch.zeros(2), 1.0).to_event(1))
    reasons = []
    history = [TrainingRecord(1, 5, {"loss": 1.0})]
    figures = run_figures(cauchy, Data(X, LABELS), Data(X), history, title="Cauchy", left_out=reasons.append)
    assert [name for name, _ in figures] == ["training_curves", "prior_samples", "samples_by_label"]
    assert len(reasons) == 1
    assert "Cauchy" in reasons[0]


def test_a_kl_without_closed_form_is_estimated():
    q = dist.StudentT(8.0, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])).to_event(1)
    pair = with_guide(q)
    found = kl_per_dimension(pair, X, num_samples=4000)
    z = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    each = dist.StudentT(8.0, torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[1.0], [0.5]]).double())
    integrand = each.log_prob(z).exp() * (each.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z))
    torch.testing.assert_close(found.double(), integrand.sum(1) * (z[1] - z[0]), atol=0.03, rtol=0)


def test_an_autoguide_of_pyro_is_looked_at_without_its_auxiliary_sites():
    """Its site is a Delta at a transform of the auxiliary draw."""

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(-1, 16), 1.0).to_event(1), obs=x.flatten(1))

    guide = AutoNormal(model)
    guide(X)
    z = latent_means((model, guide), X, batch_size=24)
    torch.testing.assert_close(z.squeeze(1), guide.median(X)["z"])  # the transform of the mean
    torch.testing.assert_close(decoder_mean((model, guide), z, like=X), z.reshape(-1, 1, 1, 1).expand(-1, *EVENT))


def test_an_autoencoder_has_no_prior():
    nets = MLPEncoder(**SHAPE, heads=1), MLPDecoder(**SHAPE)
    autoencoder = Autoencoder(*nets, latent_dim=2, event_shape=EVENT)
    with pytest.raises(UndefinedError, match="no prior"):
        Coder(autoencoder).decode(None, X)
    history = [TrainingRecord(1, 5, {"loss": 1.0, "squared_error": 16.0})]
    data = Data(X, LABELS)
    names = [name for name, _ in run_figures(autoencoder, data, data, history, title="autoencoder")]
    assert {"reconstructions", "interpolation", "latent_pairs"} <= set(names)
    assert not {"prior_samples", "samples_by_label"} & set(names)
    assert latent_record(autoencoder, X)["kl_per_dimension"] is None
