"""log p(x) by importance sampling against closed forms, and against the known ways of getting it wrong."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LIKELIHOODS, compile_by, make_vae
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae.estimates.importance
from pyro_vae import NegativeELBO, evaluate, fit, log_marginal
from pyro_vae.engine.tracing import NotCompiledWarning
from pyro_vae.estimates.psis import Accumulator, pareto_k
from pyro_vae.estimates.records import UnreliableEstimateWarning

X = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


class LinearGaussian:
    """z ~ N(0, I_2), x | z ~ N(W z, s^2 I_3): exact posterior and marginal; the guide is shifted and stretched off it."""

    def __init__(self, shift=0.0, stretch=1.0):
        self.w = torch.tensor([[1.0, 0.5], [-2.0, 0.3], [0.2, 1.5]], dtype=torch.float64)
        self.variance, self.shift, self.stretch = 0.5, shift, stretch
        eye = torch.eye(2, dtype=torch.float64)
        self.covariance = torch.linalg.inv(eye + self.w.T @ self.w / self.variance)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T, self.variance**0.5).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = x @ self.w / self.variance @ self.covariance + self.shift
            pyro.sample("z", dist.MultivariateNormal(loc, self.covariance * self.stretch**2))

    def log_marginal(self, x):
        covariance = self.w @ self.w.T + self.variance * torch.eye(3, dtype=torch.float64)
        return dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)


def test_exact_posterior_gives_exact_answer_and_full_sample_size():
    toy = LinearGaussian()
    result = log_marginal(toy.model, toy.guide, X, num_samples=50)
    torch.testing.assert_close(result.value, toy.log_marginal(X), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.ess, torch.full((9,), 50.0, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (result.standard_error < 1e-7).all()
    assert result.value.shape == result.pareto_k.shape == (9,)


def test_wrong_guide_is_right_within_its_error_over_20_seeds():
    toy = LinearGaussian(shift=0.1, stretch=1.3)
    exact, k = toy.log_marginal(X), 2000
    for seed in range(20):
        torch.manual_seed(seed)
        result = log_marginal(toy.model, toy.guide, X, num_samples=k)
        bias = (k / result.ess - 1) / (2 * k)  # of the log of a mean, to first order
        assert ((result.value - exact).abs() < 4 * result.standard_error + bias).all()  # 180 comparisons
        assert (result.ess < k).all()


def test_reported_errors_are_the_spread_over_seeds():
    toy = LinearGaussian(shift=0.1, stretch=1.3)
    runs = []
    for seed in range(200):
        torch.manual_seed(seed)
        runs.append(log_marginal(toy.model, toy.guide, X, num_samples=300))
    spread = torch.stack([run.value for run in runs]).std(0)
    reported = torch.stack([run.standard_error for run in runs]).mean(0)
    torch.testing.assert_close(reported, spread, rtol=0.3, atol=0)  # a spread of 200 is known to 5 %; 9 of them
    whole = torch.tensor([run.mean.value for run in runs]).std().item()
    assert sum(run.mean.standard_error for run in runs) / len(runs) == pytest.approx(whole, rel=0.25)


def test_bound_from_below_that_tightens():
    toy = LinearGaussian(shift=0.5, stretch=0.7)
    exact = toy.log_marginal(X).mean().item()
    means = []
    for k in (1, 5, 50):
        values = []
        for seed in range(300):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UnreliableEstimateWarning)
                values.append(log_marginal(toy.model, toy.guide, X, num_samples=k).mean.value)
        means.append(torch.tensor(values).mean().item())
    assert means[0] < means[1] < means[2] < exact


@pytest.mark.parametrize("sizes", [[50], [7] * 7 + [1], [1] * 50, [49, 1]])
def test_streaming_equals_all_at_once(sizes):
    log_weights = torch.randn(50, 4, dtype=torch.float64) * 3 - 500
    accumulator = Accumulator(50)
    for chunk in log_weights.split(sizes):
        accumulator.add(chunk)
    value, error, ess, k = accumulator.results()
    w = (log_weights + 500).exp()
    torch.testing.assert_close(value, w.mean(0).log() - 500, rtol=0, atol=1e-9)
    torch.testing.assert_close(ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(error, w.std(0) / w.mean(0) / math.sqrt(50), rtol=1e-9, atol=0)
    whole = pareto_k(log_weights.sort(0, descending=True).values[:11])
    torch.testing.assert_close(k, whole, rtol=1e-9, atol=1e-12)  # ceil(0.2 * 50) and the one below


@pytest.mark.parametrize("chunk_size", [1, 7, 20, 60, 61, 10_000])
def test_chunks_change_nothing_but_the_order_of_the_draws(chunk_size):
    """K = 20 draws of 9 images, chunks that divide and chunks that do not: right everywhere, and the counts are kept."""
    toy = LinearGaussian()
    result = log_marginal(toy.model, toy.guide, X, num_samples=20, chunk_size=chunk_size)
    torch.testing.assert_close(result.value, toy.log_marginal(X), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.ess, torch.full((9,), 20.0, dtype=torch.float64), rtol=0, atol=1e-6)
    assert result.num_samples == 20


def test_chunks_give_the_same_value_for_the_same_draws(monkeypatch):
    """Fixed noise, indexed by draw and image, so that chunking alone can differ."""
    toy = LinearGaussian(shift=0.3, stretch=1.2)
    noise = torch.randn(23, 9, 2, dtype=torch.float64)
    root = torch.linalg.cholesky(toy.covariance) * toy.stretch

    def value(chunk_size):
        draws = min(23, chunk_size)
        blocks = [
            noise[k : k + draws, b : b + max(1, chunk_size // draws)]
            for b in range(0, 9, max(1, chunk_size // draws))
            for k in range(0, 23, draws)
        ]
        queue = iter(blocks)

        def guide(x):
            with pyro.plate("data", len(x)):
                loc = x @ toy.w / toy.variance @ toy.covariance + toy.shift
                q = dist.MultivariateNormal(loc, toy.covariance * toy.stretch**2)
                z = loc + next(queue) @ root.T
                q.rsample = q.sample = lambda shape=None: z
                q.expand = lambda shape: q
                pyro.sample("z", q)

        return log_marginal(toy.model, guide, X, num_samples=23, chunk_size=chunk_size).value

    reference = value(1000)
    for chunk_size in (1, 4, 23, 46, 50):
        torch.testing.assert_close(value(chunk_size), reference, rtol=0, atol=1e-9)


def test_each_image_has_its_own_weights():
    """The known failure: weights summed over the batch before the mean over draws are wrong for every image."""
    toy = LinearGaussian(shift=0.2, stretch=1.2)
    together = log_marginal(toy.model, toy.guide, X, num_samples=20_000)
    alone = torch.cat([log_marginal(toy.model, toy.guide, x.unsqueeze(0), num_samples=20_000).value for x in X])
    assert ((together.value - alone).abs() < 6 * together.standard_error).all()
    assert ((together.value - toy.log_marginal(X)).abs() < 6 * together.standard_error).all()


def test_guide_that_does_nothing_is_prior_sampling():
    toy = LinearGaussian()
    result = log_marginal(toy.model, lambda x: None, X, num_samples=200_000)
    good = ~result.unreliable
    assert good.sum() > 4
    assert ((result.value - toy.log_marginal(X)).abs() < 5 * result.standard_error + 1e-3)[good].all()


def test_several_latent_sites_and_a_partial_guide():
    """z1 -> z2 -> x, all normal: x ~ N(0, 1 + 1 + 0.25); the guide proposes z1 alone and leaves z2 to the model."""

    def model(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 0.5), obs=x)

    def both(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 2.25, 1.2))
            pyro.sample("z2", dist.Normal((4 * x + z1) / 5, 0.5))

    def first(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(x / 2.25, 1.2))

    x = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    exact = dist.Normal(torch.zeros((), dtype=x.dtype), 1.5).log_prob(x)
    for guide in (both, first):
        result = log_marginal(model, guide, x, num_samples=50_000)
        assert ((result.value - exact).abs() < 5 * result.standard_error).all()
        assert (result.standard_error < 0.02).all()


class TutorialVAE(nn.Module):
    """A VAE as Pyro's own tutorial shapes it: its own modules, pyro.module, sites latent and obs, images flattened."""

    class Decoder(nn.Module):
        def __init__(self, z_dim, hidden_dim):
            super().__init__()
            self.fc1, self.fc21 = nn.Linear(z_dim, hidden_dim), nn.Linear(hidden_dim, 16)
            self.softplus, self.sigmoid = nn.Softplus(), nn.Sigmoid()

        def forward(self, z):
            return self.sigmoid(self.fc21(self.softplus(self.fc1(z))))

    class Encoder(nn.Module):
        def __init__(self, z_dim, hidden_dim):
            super().__init__()
            self.fc1, self.fc21, self.fc22 = (
                nn.Linear(16, hidden_dim),
                nn.Linear(hidden_dim, z_dim),
                nn.Linear(hidden_dim, z_dim),
            )
            self.softplus = nn.Softplus()

        def forward(self, x):
            hidden = self.softplus(self.fc1(x.reshape(-1, 16)))
            return self.fc21(hidden), torch.exp(self.fc22(hidden))

    def __init__(self, z_dim=2, hidden_dim=8):
        super().__init__()
        self.encoder, self.decoder = self.Encoder(z_dim, hidden_dim), self.Decoder(z_dim, hidden_dim)
        self.z_dim = z_dim

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], self.z_dim)))
            z_scale = x.new_ones(torch.Size((x.shape[0], self.z_dim)))
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(loc_img, validate_args=False).to_event(1), obs=x.reshape(-1, 16))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def integral(decode_log_prob, x, half_width=7.0, n=281):
    """log p(x) of a model with two latents by quadrature over the plane."""
    axis = torch.linspace(-half_width, half_width, n, dtype=x.dtype)
    z = torch.cartesian_prod(axis, axis)  # (n^2, 2)
    log_prior = dist.Normal(torch.zeros((), dtype=x.dtype), 1.0).log_prob(z).sum(-1)
    return torch.stack([(decode_log_prob(z, image) + log_prior).logsumexp(0) for image in x]) + 2 * math.log(
        axis[1] - axis[0]
    )


def test_a_third_partys_vae_works_unchanged_and_is_right():
    vae = TutorialVAE().double()
    with torch.no_grad():
        vae.encoder.fc22.bias += 0.5  # untrained, it would be narrower than the posterior, which is close to the prior
    x = (torch.rand(6, 1, 4, 4) > 0.5).double()
    result = log_marginal(vae.model, vae.guide, x, num_samples=20_000)
    exact = integral(lambda z, image: dist.Bernoulli(vae.decoder(z)).log_prob(image.reshape(16)).sum(-1), x)
    assert ((result.value - exact).abs() < 5 * result.standard_error).all()
    assert (result.standard_error < 0.05).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_our_vae_against_quadrature(likelihood):
    vae = make_vae(latent_dim=2, likelihood=likelihood).double()
    x = torch.rand(4, 1, 4, 4, dtype=torch.float64)
    result = log_marginal(vae.model, vae.guide, x, num_samples=20_000)
    exact = integral(lambda z, image: vae.decode(z).log_prob(image), x)
    assert ((result.value - exact).abs() < 5 * result.standard_error).all()
    figures = evaluate(vae, x, importance_samples=5000)
    estimate = figures["log_marginal"]
    assert abs(estimate.value - exact.mean().item()) < 5 * estimate.standard_error
    assert estimate.num_samples == 5000
    assert 1 <= estimate.median_ess <= 5000
    assert estimate.value > -figures["neg_elbo"].value


@pytest.mark.filterwarnings("ignore::pyro_vae.estimates.records.UnreliableEstimateWarning")
def test_state_and_mode_are_left_as_found():
    class Noisy(TutorialVAE):
        def __init__(self):
            super().__init__()
            self.decoder.softplus = nn.Sequential(nn.Softplus(), nn.Dropout(0.5))

    vae = Noisy()
    vae.encoder.eval()
    x = torch.rand(5, 16).round()
    state = torch.random.get_rng_state()
    first, second = (log_marginal(vae.model, vae.guide, x, num_samples=30) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.value, second.value)
    assert vae.training
    assert vae.decoder.softplus[1].training
    assert not vae.encoder.training
    assert all(p.grad is None for p in vae.parameters())
    assert not first.value.requires_grad


def test_scaling_handlers_are_no_part_of_the_density():
    toy = LinearGaussian()
    scaled = pyro.poutine.scale(toy.model, 7.0), pyro.poutine.scale(toy.guide, 7.0)
    torch.testing.assert_close(log_marginal(*scaled, X, num_samples=10).value, toy.log_marginal(X), rtol=0, atol=1e-10)


# --- health ---


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_recovers_the_tail_of_a_known_distribution(shape):
    """exp(shape * E), E exponential, is Pareto with tail index shape; 40 columns tell bias from spread."""
    n = 20_000
    keep = math.ceil(3 * math.sqrt(n)) + 1
    log_weights = torch.empty(n, 40, dtype=torch.float64).exponential_() * shape
    k = pareto_k(log_weights.topk(keep, dim=0).values)
    spread = (1 + shape) / math.sqrt(keep)  # asymptotic standard deviation of the estimator
    assert abs(k.mean().item() - shape) < 5 * spread / math.sqrt(40) + 10 * abs(0.5 - shape) / keep
    assert k.std().item() == pytest.approx(spread, rel=0.5)


def test_pareto_k_at_its_edges():
    equal = torch.zeros(20, 1)
    assert pareto_k(equal).item() == -math.inf
    assert pareto_k(torch.full((20, 1), -math.inf)).item() == math.inf
    dominated = torch.full((20, 1), -5000.0)
    dominated[0] = 0
    assert pareto_k(dominated).item() == math.inf
    assert pareto_k(torch.zeros(5, 1)).isnan().all()


def test_unreliable_weights_are_told_once_with_their_number():
    toy = LinearGaussian(stretch=0.2)  # a guide far too narrow: infinite variance
    with pytest.warns(UnreliableEstimateWarning, match=r"of 9 observations .*Draw more than 500") as record:
        result = log_marginal(toy.model, toy.guide, X, num_samples=500)
    assert len(record) == 1
    assert str(record[0].message).split(":")[1].split()[0] == str(int(result.unreliable.sum()))
    assert result.mean.unreliable == result.unreliable.sum() > 0


def test_impossible_observations_are_minus_infinity_and_unreliable():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Uniform(z, z + 1.0, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - 0.9, x - 0.1) if x[0] < 100 else dist.Normal(0.0, 1.0))

    with pytest.warns(UnreliableEstimateWarning, match="1 of 1 "):
        result = log_marginal(model, guide, torch.tensor([1000.0]), num_samples=50)
    assert result.value.item() == -math.inf
    assert (result.ess.item(), result.standard_error.item(), result.pareto_k.item()) == (0, math.inf, math.inf)
    assert log_marginal(model, guide, torch.tensor([0.5]), num_samples=50).value.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_name_the_site(bad):
    class Broken(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) + torch.tensor([0.0, bad])

        def expand(self, batch_shape, _instance=None):
            return Broken(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            pyro.sample("pixels", Broken(z, torch.ones(2)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))

    with pytest.raises(ValueError, match=r"nan or \+inf log weight, from site 'pixels', for 1 of the 2 observations"):
        log_marginal(model, guide, torch.zeros(2), num_samples=5)


# --- errors ---


def test_site_outside_the_plate_is_named():
    def model(x):
        w = pyro.sample("weights", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("weights", dist.Normal(0.0, 1.0))

    for proposal in (guide, lambda x: None):
        for chunk_size in (None, 5):  # also where a chunk holds one observation, and the shapes would agree
            with pytest.raises(ValueError, match="site 'weights' is outside the data plate"):
                log_marginal(model, proposal, torch.zeros(3), num_samples=5, chunk_size=chunk_size)


def test_values_that_would_broadcast_against_the_draws_are_refused():
    """x of shape (B, 1) for a scalar site, K = B: every shape agrees, and every number would be wrong."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for x in (torch.zeros(4, 1), torch.zeros(4, 4)):
        with pytest.raises(ValueError, match=r"site 'x' observes values of batch shape \(4, .\), expected \(4,\)"):
            log_marginal(model, lambda x: None, x, num_samples=4)


def test_a_model_that_observes_nothing_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="observes nothing"):
        log_marginal(model, lambda x: None, torch.zeros(3), num_samples=4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: functools.partial(m),
        lambda m: pyro.poutine.scale(m, scale=2.0),
        lambda m: pyro.poutine.condition(m, data={}),
    ],
    ids=["partial", "scale", "condition"],
)
def test_evaluation_mode_is_found_under_handlers(wrap):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.9)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample("x", dist.Normal(self.dropout(z), 1.0), obs=x)

    model, x = Model(), torch.tensor([0.0, 1.0])
    result = log_marginal(wrap(model), lambda x: None, x, num_samples=50_000)
    assert ((result.value - dist.Normal(0.0, 2**0.5).log_prob(x)).abs() < 5 * result.standard_error).all()
    assert model.training


def test_site_in_the_guide_alone_is_named():
    toy = LinearGaussian()

    def guide(x):
        toy.guide(x)
        with pyro.plate("more", len(x)):
            pyro.sample("extra", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(ValueError, match="'extra' is in the guide but not in the model"):
        log_marginal(toy.model, guide, X, num_samples=5)


@pytest.mark.parametrize(
    ("x", "arguments", "match"),
    [
        (X, {"num_samples": 0}, "num_samples: expected a whole number >= 1, found 0"),
        (X, {"chunk_size": 0}, "chunk_size: expected a whole number >= 1, found 0"),
        (X[:0], {}, r"found shape \(0, 3\)"),
        (torch.tensor(1.0), {}, r"found shape \(\)"),
    ],
)
def test_bad_arguments(x, arguments, match):
    toy = LinearGaussian()
    with pytest.raises(ValueError, match=match):
        log_marginal(toy.model, toy.guide, x, **arguments)


def test_one_draw_is_the_elbo_estimate_and_has_no_error():
    toy = LinearGaussian(shift=0.5)
    result = log_marginal(toy.model, toy.guide, X, num_samples=1)
    assert result.standard_error.isnan().all()
    assert (result.ess == 1).all()
    assert result.mean.unreliable is None  # unknown, not zero
    with pytest.raises(ValueError, match="importance_samples: expected 0 or a whole number >= 2, found 1"):
        evaluate(make_vae(), torch.rand(3, 1, 4, 4), importance_samples=1)


def one_latent(q):
    """x | z ~ N(z, 1), z ~ N(0, 1), and a guide that draws z from q."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return model, guide


@pytest.mark.parametrize("q", [lambda x: dist.Delta(x / 2), lambda x: dist.Poisson(1.0).expand(x.shape)])
def test_a_guide_without_a_density_is_refused(q):
    """log p(x, z) at one point is no estimate of log p(x), and its weights would look perfect: all equal."""
    with pytest.raises(ValueError, match="'z' is (a point mass|discrete) in the guide .* continuous in the model"):
        log_marginal(*one_latent(q), torch.tensor([0.5, 1.0]), num_samples=30)


def test_a_guide_that_observes_is_refused():
    model, _ = one_latent(None)
    with pytest.raises(ValueError, match="the guide observes site 'x'"):
        log_marginal(model, model, torch.tensor([0.5, 1.0]), num_samples=30)


def test_factors_deterministic_sites_and_reparameterised_models():
    from pyro.infer.reparam import LocScaleReparam

    x = torch.tensor([0.5, -1.0], dtype=torch.float64)

    def model(x):
        pyro.deterministic("shift", torch.tensor(1.0))  # outside the plate, and no part of the density
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.factor("x", dist.Normal(z, 1.0).log_prob(x))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.deterministic("loc", x / 2)
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    exact = dist.Normal(torch.zeros(2, dtype=x.dtype), 2**0.5).log_prob(x)
    torch.testing.assert_close(log_marginal(model, guide, x, num_samples=50).value, exact)

    plain, _ = one_latent(None)
    decentered = pyro.poutine.reparam(plain, config={"z": LocScaleReparam(0.0)})
    estimate = log_marginal(decentered, lambda x: None, x, num_samples=4000)
    assert ((estimate.value - exact).abs() < 5 * estimate.standard_error).all()


def test_a_plate_over_pixels_is_told_to_use_to_event():
    def model(x):
        with pyro.plate("data", len(x)), pyro.plate("pixels", 3, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"collides with that of the draws.*to_event"):
        log_marginal(model, lambda x: None, torch.rand(4, 3), num_samples=30)


def test_ties_at_the_threshold_are_no_heavy_tail():
    """Bounded weights, many of them 0: the error is right, and Pareto k says so."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    _, guide = one_latent(lambda x: dist.Normal(x / 2, 0.9))
    x = torch.full((50,), -3.0, dtype=torch.float64)  # the guide's draws fall below 0 but for one in twenty
    estimate = log_marginal(model, guide, x, num_samples=2000)
    unit = dist.Normal(0.0, 1.0)
    exact = (unit.cdf(torch.tensor(4.0, dtype=x.dtype)) - unit.cdf(torch.tensor(3.0, dtype=x.dtype))).log()
    z_scores = (estimate.value - exact) / estimate.standard_error
    assert z_scores.abs().max() < 5
    assert 0.7 < z_scores.std() < 1.3
    assert estimate.unreliable.sum() <= 5


@pytest.fixture
def traced(monkeypatch):
    """The traced graph itself in place of the compiled one, and how often it was traced."""
    shapes = []

    def inductor(graph, inputs):
        shapes.append(tuple(inputs[0].shape))
        return graph

    compile_by(monkeypatch, inductor)
    return shapes


def twice(model, guide, x, **options):
    """log_marginal run eagerly and compiled, from the same state of the noise, and numbers drawn after it."""
    results = []
    for compile in (False, True):
        torch.manual_seed(3)
        results.append((log_marginal(model, guide, x, compile=compile, **options), torch.randn(3)))
    (eager, noise), (compiled, same_noise) = results
    assert torch.equal(noise, same_noise)
    return eager, compiled


@pytest.mark.parametrize("chunk_size", [20, 24, 1000])  # of 10 draws: 2 images, the last alone; 24 is no multiple
@pytest.mark.filterwarnings("ignore:log_marginal.*heavy")
def test_compiled_weights_are_the_eager_ones(vae64, traced, chunk_size):
    x = torch.rand(9, 1, 4, 4).double()
    eager, compiled = twice(vae64.model, vae64.guide, x, num_samples=10, chunk_size=chunk_size)
    for name in ("value", "standard_error", "ess"):
        torch.testing.assert_close(getattr(compiled, name), getattr(eager, name), rtol=1e-9, atol=1e-12)
    assert len(traced) == 1


def test_compiled_weights_of_programs_that_are_no_modules(traced):
    shift = torch.tensor(0.5).double()

    def model(x):  # z ~ N(0, 1), x | z ~ N(z + shift, 1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - shift) / 2, 0.5**0.5))

    x = torch.linspace(-3, 3, 7).double()
    estimate = log_marginal(model, guide, x, num_samples=50, chunk_size=100, compile=True)
    torch.testing.assert_close(estimate.value, dist.Normal(shift, 2**0.5).log_prob(x))
    assert traced == [(2,)]


@pytest.mark.filterwarnings("ignore:log_marginal.*heavy")
def test_inductor_gives_the_eager_weights(vae):
    eager, compiled = twice(vae.model, vae.guide, torch.rand(7, 1, 4, 4), num_samples=10, chunk_size=30)
    torch.testing.assert_close(compiled.value, eager.value)


def test_a_program_that_decides_by_a_value_is_guarded(traced):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0 if x.sum() > 0 else 2.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
    eager, compiled = twice(model, guide, x, num_samples=10, chunk_size=20)
    torch.testing.assert_close(compiled.value, eager.value)
    assert len(traced) == 1


def test_what_cannot_be_compiled_is_said_and_run_eagerly(traced, monkeypatch):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0 if x.sum().tolist() > 0 else 2.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.warns(
        NotCompiledWarning, match="log_marginal, run eagerly, not compiled: it reads a tensor's values"
    ) as caught:
        eager, compiled = twice(model, guide, torch.ones(6), num_samples=10, chunk_size=20)
    assert len(caught) == 1
    assert torch.equal(eager.value, compiled.value)
    wrong = lambda graph, inputs: lambda x: (graph(x)[0], graph(x)[1] + 0.1)  # noqa: E731
    compile_by(monkeypatch, wrong)
    prior = lambda x: None  # noqa: E731
    with pytest.warns(NotCompiledWarning, match="its log weights are not those of the eager call"):
        eager, compiled = twice(model, prior, torch.ones(6), num_samples=10, chunk_size=20)
    assert torch.equal(eager.value, compiled.value)


def test_a_weight_that_is_not_finite_names_its_site_compiled_too(traced):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, (x / x).abs()), obs=x)

    x = torch.ones(6)
    x[-1] = 0.0  # not in the first chunk
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="nan or .inf log weight, from site 'x', for 1 of the 2"),
    ):
        log_marginal(model, lambda x: None, x, num_samples=10, chunk_size=20, compile=True)
    assert len(traced) == 1


def test_compiling_is_by_default_for_many_chunks(vae, traced, monkeypatch):
    x = torch.rand(6, 1, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableEstimateWarning)
        for chunks, compiled in ((7, 0), (6, 1)):
            monkeypatch.setattr(pyro_vae.estimates.importance, "_PAYS", chunks)
            log_marginal(vae.model, vae.guide, x, num_samples=10, chunk_size=10)
            assert len(traced) == compiled
    with pytest.raises(ValueError, match="compile: expected True, False or None, found 'yes'"):
        log_marginal(vae.model, vae.guide, x, compile="yes")


def test_a_third_partys_vae_is_trained_by_its_name_alone():
    """NegativeELBO(v) is Pyro's own objective of v.model and v.guide for the same noise, and fit trains both nets."""
    vae, x = TutorialVAE().double(), (torch.rand(6, 1, 4, 4) > 0.5).double()
    torch.manual_seed(3)
    ours = NegativeELBO(vae)(x)["loss"].item()
    torch.manual_seed(3)
    assert ours == pytest.approx(Trace_ELBO().loss(vae.model, vae.guide, x) / 6, rel=1e-9)
    before = [p.detach().clone() for p in vae.parameters()]
    history = fit(NegativeELBO(vae), x, epochs=30, verbose=False)
    assert history[-1].train["loss"] < history[0].train["loss"]
    assert not any(torch.equal(p, q) for p, q in zip(vae.parameters(), before, strict=True))


def test_the_warning_points_at_the_users_line():
    toy = LinearGaussian(stretch=0.2)
    for measure in (
        lambda: log_marginal(toy.model, toy.guide, X, num_samples=500),
        lambda: evaluate(toy.model, toy.guide, X, importance_samples=500),
    ):
        with pytest.warns(UnreliableEstimateWarning) as seen:
            measure()
        assert [warning.filename for warning in seen] == [__file__]
