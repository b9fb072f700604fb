import math

import pyro.distributions as dist
import pytest
import torch
from conftest import LIKELIHOODS, make_vae
from pyro.infer import Predictive

from pyro_vae import (
    VAE,
    BernoulliLikelihood,
    Data,
    LearnedNormalLikelihood,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NegativeIWAE,
    NormalLikelihood,
    PoissonLikelihood,
    StandardizedNormalLikelihood,
    direct_log_marginal,
    evaluate,
    fit,
    load_preset,
    log_marginal,
    prior_search,
)
from pyro_vae.analysis import latent
from pyro_vae.analysis.gallery import run_figures


def test_bernoulli_log_prob_is_exact_where_probabilities_saturate():
    logits = torch.tensor([200.0, -200.0, 0.0, 3.0], requires_grad=True)
    x = torch.tensor([0.0, 1.0, 1.0, 0.0])
    log_prob = BernoulliLikelihood()(logits).log_prob(x)
    expected = torch.tensor([-200.0, -200.0, -math.log(2), -math.log1p(math.exp(3.0))])
    torch.testing.assert_close(log_prob, expected)
    log_prob.sum().backward()
    torch.testing.assert_close(logits.grad, x - torch.sigmoid(logits.detach()))  # never zero where it is wrong


def test_bernoulli_on_grey_is_minus_binary_cross_entropy():
    logits, x = torch.randn(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    p = torch.sigmoid(logits)
    expected = x * p.log() + (1 - x) * (1 - p).log()
    torch.testing.assert_close(BernoulliLikelihood()(logits).log_prob(x), expected)


@pytest.mark.parametrize("batch", [(), (7,), (3, 5)])
@pytest.mark.parametrize("event", [(1, 28, 28), (127,), (1,), (600, 600)])  # (600, 600): rows in several blocks
def test_bernoulli_joint_log_prob_is_the_same_without_gradients(batch, event):
    logits = 10 * torch.randn(*batch, *event, dtype=torch.float64)
    x = torch.rand(*batch[-1:], *event, dtype=torch.float64)
    slow = BernoulliLikelihood()(logits).log_prob(x).sum(tuple(range(-len(event), 0)))
    fast = BernoulliLikelihood()(logits).to_event(len(event)).log_prob(x)
    torch.testing.assert_close(fast, slow)
    assert not fast.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bernoulli_joint_log_prob_in_half_precision(dtype):
    logits, x = torch.zeros(2, 784, dtype=dtype), torch.ones(2, 784, dtype=dtype)
    log_prob = BernoulliLikelihood()(logits).to_event(1).log_prob(x)
    torch.testing.assert_close(log_prob, torch.full((2,), -784 * math.log(2), dtype=dtype), rtol=0.01, atol=0)


def test_bernoulli_samples_are_binary_with_the_right_mean():
    logits = torch.tensor([-2.0, 0.0, 1.0])
    draws = BernoulliLikelihood()(logits).sample((20_000,))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = torch.sigmoid(logits)
    error = (p * (1 - p) / len(draws)).sqrt()
    assert ((draws.mean(0) - p).abs() < 5 * error).all()


@pytest.mark.parametrize("value", [255.0, -0.1, float("nan")])
def test_pyro_validation_catches_a_value_out_of_range(value):
    with pytest.raises(ValueError, match="support|Expected value"):
        BernoulliLikelihood()(torch.zeros(1)).log_prob(torch.tensor([value]))


def test_bernoulli_check_names_the_range():
    with pytest.raises(ValueError, match=r"\[0, 1\].*from 0 to 255"):
        BernoulliLikelihood().check(torch.tensor([0.0, 255.0]))
    BernoulliLikelihood().check(torch.tensor([0.0, 0.3, 1.0]))


@pytest.mark.parametrize("mean", ["sigmoid", "identity"])
@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_normal_splits_into_squared_error_and_constant(mean, variance):
    likelihood = NormalLikelihood(variance=variance, mean=mean)
    output, x = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 6, dtype=torch.float64)
    m = torch.sigmoid(output) if mean == "sigmoid" else output
    squared_error = ((x - m) ** 2).sum(-1)
    nll = -likelihood(output).log_prob(x).sum(-1)
    torch.testing.assert_close(nll, squared_error / (2 * variance) + likelihood.constant((6,)))
    torch.testing.assert_close(likelihood.terms(nll, (6,))["squared_error"], squared_error)


def test_normal_constant_of_the_reference():
    """Variance 1/2, 784 pixels: 784 / 2 * log(pi)."""
    assert NormalLikelihood().constant((1, 28, 28)) == pytest.approx(392 * math.log(math.pi), abs=1e-10)


def test_normal_density_integrates_to_one():
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = NormalLikelihood(variance=0.7, mean="identity")(torch.tensor(0.3, dtype=torch.float64)).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("arguments", [{"variance": 0}, {"variance": -1}, {"variance": math.nan}, {"mean": "tanh"}])
def test_normal_refuses_what_is_no_density(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NormalLikelihood(**arguments)


def test_normal_check():
    with pytest.raises(ValueError, match="NaN or infinity"):
        NormalLikelihood().check(torch.tensor([1.0, float("nan")]))
    NormalLikelihood().check(torch.tensor([-1e6, 1e6]))


@pytest.mark.parametrize(
    "shapes", [((5, 4, 300), (4, 300)), ((4, 300), (4, 300)), ((3, 5, 4, 300), (4, 300)), ((300,), (300,))]
)
def test_joint_log_prob_without_gradient_equals_the_sum_over_pixels(shapes):
    output_shape, x_shape = shapes
    output, x = torch.randn(output_shape, dtype=torch.float64) * 20, torch.rand(x_shape, dtype=torch.float64)
    output.view(-1)[:3] = torch.tensor([800.0, -800.0, 0.0])
    expected = BernoulliLikelihood()(output).log_prob(x).sum(-1)
    torch.testing.assert_close(BernoulliLikelihood()(output).to_event(1).log_prob(x), expected, rtol=1e-12, atol=1e-9)
    in_single = BernoulliLikelihood()(output.float()).to_event(1).log_prob(x.float())
    torch.testing.assert_close(in_single.double(), expected, rtol=1e-5, atol=1e-3)


def test_joint_log_prob_with_gradient_equals_the_sum_over_pixels():
    output, x = torch.randn(5, 4, 30, dtype=torch.float64, requires_grad=True), torch.rand(4, 30, dtype=torch.float64)
    joint = BernoulliLikelihood()(output).to_event(1).log_prob(x)
    torch.testing.assert_close(joint, BernoulliLikelihood()(output).log_prob(x).sum(-1))
    (gradient,) = torch.autograd.grad(joint.sum(), output)
    torch.testing.assert_close(gradient, x - torch.sigmoid(output.detach()))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # by torch's own rules of forward differentiation
@pytest.mark.parametrize("shapes", [((3, 8), (3, 8)), ((2, 3, 8), (3, 8)), ((8,), (3, 8)), ((3, 131), (131,))])
def test_gradients_of_the_joint_log_prob(shapes):
    """Of both orders, forwards and in batches, for the logits and for grey values, against finite differences."""
    logits, x = (f(shape, dtype=torch.float64) for f, shape in zip((torch.randn, torch.rand), shapes, strict=True))

    def log_prob(logits, x):
        return BernoulliLikelihood()(2 * logits).to_event(1).log_prob(x).exp()

    inputs = (logits.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(log_prob, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(log_prob, inputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("hessian", [lambda f: torch.func.jacrev(torch.func.jacrev(f)), torch.func.hessian])
def test_hessian_of_the_joint_log_prob_by_functorch(hessian):
    logits, x = torch.randn(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    found = hessian(lambda v: BernoulliLikelihood()(v).to_event(1).log_prob(x))(logits)
    p = logits.sigmoid()
    torch.testing.assert_close(found, torch.diag(-p * (1 - p)))


def test_joint_log_prob_of_many_by_vmap():
    logits, x = torch.randn(5, 3, 8), torch.rand(8)
    found = torch.func.vmap(lambda v: BernoulliLikelihood()(v).to_event(1).log_prob(x))(logits)
    torch.testing.assert_close(found, BernoulliLikelihood()(logits).log_prob(x).sum(-1))


@pytest.mark.parametrize("scale", [1, 10, 1e3, 1e6])
@pytest.mark.parametrize("gradient", [False, True])
def test_joint_log_prob_keeps_its_digits_where_the_decoder_is_saturated(scale, gradient):
    """All pixels right, so that log p is small beside the logits."""
    x = (torch.rand(4, 784) < 0.3).float()
    logits = (2 * x - 1) * torch.rand(300, 4, 784) * scale  # larger than a block that is worked on at once
    exact = BernoulliLikelihood()(logits.double()).log_prob(x.double()).sum(-1)
    found = BernoulliLikelihood()(logits.requires_grad_(gradient)).to_event(1).log_prob(x)
    # What a logarithm is taken of is a product of one factor near 1 for each pixel: 2 x 784 roundings of half a unit in the
    # last place, which add up like a random walk; those of the rest are relative to log p.
    rounding = (2 * 784) ** 0.5 * torch.finfo(torch.float32).eps / 2  # 2.4e-6
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=rounding)
    assert (found <= 0).all()


def test_logits_that_are_broadcast_over_pixels():
    logits, x = torch.randn(4, 1, 1), torch.rand(4, 8, 8)
    found = BernoulliLikelihood()(logits).to_event(2).log_prob(x)
    torch.testing.assert_close(found, BernoulliLikelihood()(logits).log_prob(x).sum((1, 2)))


def test_joint_log_prob_still_checks_the_values():
    with pytest.raises(ValueError, match="Expected value"):
        BernoulliLikelihood()(torch.zeros(3, 4)).to_event(1).log_prob(torch.full((3, 4), 255.0))


def test_joint_distribution_expands_and_samples():
    p = BernoulliLikelihood()(torch.zeros(2, 3)).to_event(1).expand((7, 2))
    assert (p.batch_shape, p.event_shape) == ((7, 2), (3,))
    assert p.sample().shape == (7, 2, 3)
    torch.testing.assert_close(p.log_prob(torch.ones(3)), torch.full((7, 2), -3 * math.log(2)))


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS.values(), LearnedNormalLikelihood()], ids=[*LIKELIHOODS, "learned"])
def test_pairwise_log_prob_is_that_of_every_pair(likelihood):
    learned = isinstance(likelihood, LearnedNormalLikelihood)
    output = torch.randn(5, 1, 4, 3, *((2,) if learned else ()), dtype=torch.float64)
    x = torch.rand(7, 1, 4, 3, dtype=torch.float64)
    expected = torch.stack([likelihood(o).log_prob(x).flatten(1).sum(1) for o in output])  # one draw at a time
    torch.testing.assert_close(likelihood.pairwise_log_prob(output, x), expected)


def test_learned_normal_is_the_formula():
    output, x = torch.randn(3, 6, 2, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    mean, log_variance = output[..., 0], output[..., 1]
    expected = -0.5 * ((x - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi))
    torch.testing.assert_close(LearnedNormalLikelihood()(output).log_prob(x), expected)
    with pytest.raises(ValueError, match="NaN or infinity"):
        LearnedNormalLikelihood().check(torch.tensor([float("inf")]))
    assert LearnedNormalLikelihood().terms(torch.tensor(1.0), (6,)) == {}


@pytest.mark.parametrize("likelihood", [NormalLikelihood(variance=0.01, mean="identity"), LearnedNormalLikelihood()])
def test_pairwise_log_prob_keeps_its_digits_far_from_zero(likelihood):
    mean, x = 1000 + torch.randn(5, 2), 1000 + torch.randn(7, 2)
    output = (
        torch.stack([mean, torch.full_like(mean, -4.0)], -1) if isinstance(likelihood, LearnedNormalLikelihood) else mean
    )
    exact = torch.stack([likelihood(o).log_prob(x.double()).sum(-1) for o in output.double()])
    torch.testing.assert_close(likelihood.pairwise_log_prob(output, x).double(), exact, rtol=1e-4, atol=1e-2)


def test_standardized_normal_is_a_density_of_the_data_in_their_own_units():
    loc, scale = torch.tensor([1e4, -3.0], dtype=torch.float64), torch.tensor([500.0, 1e-3], dtype=torch.float64)
    likelihood = StandardizedNormalLikelihood(loc, scale)
    output, u = torch.randn(2, 2, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    x = loc + scale * u
    of_u = LearnedNormalLikelihood()
    jacobian = scale.log().sum()
    one_by_one = torch.stack([likelihood(o).log_prob(x).sum(-1) for o in output])
    torch.testing.assert_close(one_by_one, torch.stack([of_u(o).log_prob(u).sum(-1) for o in output]) - jacobian)
    torch.testing.assert_close(likelihood.pairwise_log_prob(output, x), one_by_one)


def test_standardized_normal_keeps_what_float32_would_round():
    """Seconds since 1970, whose neighbours in float32 are 128 s apart, in a model of float32."""
    loc, scale = torch.tensor([1.7e9, -3.0], dtype=torch.float64), torch.tensor([1000.0, 1e-3], dtype=torch.float64)
    shape = {"event_shape": (2,), "hidden": (4,), "latent_dim": 2}
    encoder, decoder = MLPEncoder(**shape), MLPDecoder(outputs=2, **shape)
    sizes = {"latent_dim": 2, "event_shape": (2,)}
    vae = VAE(encoder, decoder, likelihood=StandardizedNormalLikelihood(loc, scale), **sizes)
    for change in ("half", "double", "float"):  # of the parameters
        getattr(vae, change)()
    likelihood = vae.likelihood
    assert torch.equal(likelihood.loc, loc)
    assert torch.equal(likelihood.scale, scale)
    u, z = torch.randn(7, 2), torch.randn(7, 2)
    x = loc + scale * u.double()
    p = vae.decode(z)
    assert p.log_prob(x).dtype == torch.float32
    mean, log_variance = vae.decoder_output(z).double().unbind(-1)
    by_hand = -0.5 * ((u - mean) ** 2 / log_variance.exp() + log_variance + math.log(2 * math.pi)) - scale.log()
    torch.testing.assert_close(p.log_prob(x).double(), by_hand.sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(likelihood.standardize(x), u.double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vae.encode(x).mean, encoder(u)[0])
    torch.testing.assert_close((p.mean - loc) / scale, mean, rtol=1e-6, atol=1e-6)
    draws = p.expand_by([20_000]).sample()
    assert draws.dtype == torch.float64
    error = ((draws.mean(0) - p.mean) / p.stddev).abs() * 20_000**0.5
    assert error.max() < 5
    vae.encode(x.float())  # what comes rounded is taken as it is
    with pytest.raises(ValueError, match="expected x of shape .* found torch.int64"):
        vae.encode(x.long())


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_standardized_normal_of_numbers_whose_squares_float32_does_not_hold(unit):
    likelihood = StandardizedNormalLikelihood(torch.zeros(1), torch.full((1,), unit))
    log_prob = likelihood(torch.zeros(1, 2)).log_prob(torch.tensor([unit]))
    assert log_prob.item() == pytest.approx(-0.5 - 0.5 * math.log(2 * math.pi) - math.log(unit), rel=1e-6)


def test_everything_takes_a_standardised_vae_in_float64():
    """Images far from 0, of which float32 holds no digit that varies."""
    offset, x = 1e9, torch.randn(40, 1, 4, 4, dtype=torch.float64)
    found = []
    for shift in (0.0, offset):
        data = Data(shift + x, torch.arange(40) % 2)
        torch.manual_seed(0)
        settings = load_preset("bernoulli-z20", likelihood="learned-normal", latent_dim=2, hidden=(8,))
        vae = settings.build_vae((1, 4, 4), moments=data.moments())
        (record,) = fit(NegativeIWAE(vae, num_particles=3), data, epochs=1, verbose=False)
        torch.manual_seed(1)
        measured = [
            torch.tensor([record.train["loss"], evaluate(vae, data)["neg_elbo"].value]),
            log_marginal(vae, data, num_samples=20).value,
            direct_log_marginal(vae, data.x, num_samples=20).value,
            NegativeDirectLogLikelihood(vae, num_particles=5)(data.x)["loss"],
            latent.latent_means(vae, data),
            latent.kl_per_dimension(vae, data),
        ]
        images = [
            *prior_search(vae, data.x, num_samples=30),
            *(part for path in ("linear", "spherical") for part in latent.interpolate(vae, *data.x[:2], path=path)),
            latent.sample_like(vae, data, 1, num_samples=3),
            Predictive(vae.model, num_samples=2)(size=3)["x"],
        ]
        found.append([*measured, *(part - shift for part in images)])
        list(run_figures(vae, data, data, [record], title="shifted"))
    for near, far in zip(*found, strict=True):
        torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


class Counts:
    """A likelihood of a user's own that checks nothing."""

    def __call__(self, output):
        return dist.Binomial(16, logits=output)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_what_lies_outside_the_support_is_refused_and_a_few_values_shown(dtype):
    x = (255 * torch.rand(60, 1, 8, 8)).to(dtype) / (1 if dtype == torch.uint8 else 255)
    vae = make_vae((1, 8, 8), likelihood=Counts())
    for measure in (
        lambda: fit(NegativeELBO(vae), x, steps=1, verbose=False),
        lambda: evaluate(vae, x),
        lambda: log_marginal(vae, Data(x)),
    ):
        with pytest.raises(
            ValueError, match=r"support of the likelihood, Binomial: .* found values outside, [\d.]+, "
        ) as error:
            measure()
        assert len(str(error.value)) < 300
    fit(NegativeELBO(vae), Data(torch.randint(0, 17, (60, 1, 8, 8))), steps=1, verbose=False)


@pytest.mark.parametrize("scale", [[1.0, 0.0], [1.0, math.inf], [1.0]])
def test_standardized_normal_refuses_scales_that_are_none(scale):
    with pytest.raises(ValueError, match="scale"):
        StandardizedNormalLikelihood(torch.zeros(2), torch.tensor(scale))


# --- counts ---


def test_poisson_is_the_formula_and_torchs_own():
    output, x = torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(20, (3, 5)).double()
    found = PoissonLikelihood()(output).log_prob(x)
    torch.testing.assert_close(found, x * output - output.exp() - (x + 1).lgamma(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, torch.distributions.Poisson(output.exp()).log_prob(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("log_rate", [-8.0, 0.3, 4.0])
@pytest.mark.parametrize("exposure", [None, 2.5])
def test_poisson_probabilities_sum_to_one(log_rate, exposure):
    output, counts = torch.full((1, 1), log_rate, dtype=torch.float64), torch.arange(2000, dtype=torch.float64)
    context = () if exposure is None else (torch.tensor([exposure]),)
    p = PoissonLikelihood(exposure=None if exposure is None else 0)(output, *context)
    assert p.log_prob(counts.unsqueeze(-1).unsqueeze(-1)).exp().sum().item() == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1), (3, 2, 5)])
@pytest.mark.parametrize("particles", [(), (4,)])
def test_exposure_multiplies_the_rate(shape, particles):
    output = torch.randn(*particles, 3, 2, 5, dtype=torch.float64)
    e = torch.rand(shape, dtype=torch.float64) + 0.1
    labels = torch.zeros(3)
    p = PoissonLikelihood(exposure=1)(output, labels, e.expand(*particles, *shape))
    rate = output.exp() * e.reshape(*shape, *(1,) * (3 - len(shape)))
    torch.testing.assert_close(p.mean, rate, rtol=1e-12, atol=1e-12)
    x = torch.randint(9, (3, 2, 5)).double()
    expected = x * (output + (rate / output.exp()).log()) - rate - (x + 1).lgamma()
    torch.testing.assert_close(p.log_prob(x), expected, rtol=1e-10, atol=1e-10)


def test_poisson_draws_have_the_mean_of_the_rate():
    output = torch.tensor([-1.0, 0.5, 3.0])
    draws = PoissonLikelihood()(output).sample((20_000,))
    assert torch.equal(draws, draws.round())
    error = (output.exp() / len(draws)).sqrt()
    assert ((draws.mean(0) - output.exp()).abs() < 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poisson_rates_never_overflow_and_always_have_a_gradient(dtype):
    plain = torch.linspace(-20, 20, 101, dtype=dtype)
    torch.testing.assert_close(PoissonLikelihood()(plain).mean, plain.exp(), rtol=0, atol=0)
    output = torch.tensor([-1e30, -200.0, -25.0, 25.0, 200.0, 1e30], dtype=dtype, requires_grad=True)
    for x in (0.0, 5.0, 1e6):
        log_prob = PoissonLikelihood()(output).log_prob(torch.full((6,), x, dtype=dtype))
        (gradient,) = torch.autograd.grad(log_prob.sum(), output)
        assert log_prob.isfinite().all()
        assert gradient.isfinite().all()
        assert (gradient[1:-1] != 0).all()
        assert gradient.square().sum().isfinite()


@pytest.mark.parametrize("x", [[0.5], [-1.0], [math.nan], [math.inf]])
def test_poisson_refuses_what_is_no_count(x):
    with pytest.raises(ValueError, match=r"PoissonLikelihood: found x .*expected whole numbers >= 0"):
        PoissonLikelihood().check(torch.tensor(x))
    PoissonLikelihood().check(torch.tensor([0.0, 1.0, 1e6]))


def test_what_poisson_says_of_bad_data_is_short():
    x = torch.arange(100_000.0) + 0.25
    x[0] = 3
    with pytest.raises(ValueError, match=r"found x 1.25, 2.25, 3.25, \.\.\. \(99,999 of 100,000\), expected") as error:
        PoissonLikelihood().check(x)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("e", [0.0, -1.0, math.nan, math.inf])
def test_poisson_refuses_exposure_that_is_none(e):
    likelihood, x = PoissonLikelihood(exposure=0), torch.ones(2, 3)
    with pytest.raises(ValueError, match="PoissonLikelihood: found exposure .*, expected finite numbers above 0"):
        likelihood.check(x, torch.tensor([1.0, e]))
    likelihood.check(x, torch.tensor([1.0, 2.0]))


def test_poisson_pairs():
    output, x = torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(9, (7, 4, 3)).double()
    likelihood = PoissonLikelihood()
    expected = torch.stack([likelihood(o).log_prob(x).flatten(1).sum(1) for o in output])
    torch.testing.assert_close(likelihood.pairwise_log_prob(output, x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="expected no exposure"):
        PoissonLikelihood(exposure=0).pairwise_log_prob(output, x)


def test_poisson_arguments():
    for exposure in (-1, 1.0, True, "e"):
        with pytest.raises(ValueError, match="exposure: expected a whole number >= 0"):
            PoissonLikelihood(exposure=exposure)
    with pytest.raises(ValueError, match="expected the exposure as context tensor 1, .* found 1 context tensors"):
        PoissonLikelihood(exposure=1)(torch.zeros(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected exposure of shape .*, found \(2, 2\) for rates of shape \(2, 3\)"):
        PoissonLikelihood(exposure=0)(torch.zeros(2, 3), torch.ones(2, 2))


def poisson_vae(exposure=None):
    shape = {"event_shape": (4,), "hidden": (8,), "latent_dim": 2}
    likelihood = PoissonLikelihood(exposure=exposure)
    return VAE(MLPEncoder(**shape), MLPDecoder(**shape), latent_dim=2, event_shape=(4,), likelihood=likelihood).double()


def test_a_vae_passes_the_exposure_on():
    vae = poisson_vae(exposure=0)
    e, z = torch.tensor([0.5, 2.0, 8.0]), torch.randn(6, 3, 2, dtype=torch.float64)
    p = vae.decode(z, e)
    torch.testing.assert_close(p.mean, vae.decode(z, torch.ones(3)).mean * e.double().unsqueeze(-1))
    assert vae.decode(z[0], e[:, None]).mean.shape == vae.decode(z[0], e[:, None].expand(3, 4)).mean.shape == (3, 4)
    with pytest.raises(ValueError, match="context tensors for the likelihood.* expected at least 1, found 0"):
        vae.decode(z)
    with pytest.raises(ValueError, match="found exposure 0, expected finite"):
        vae.check(torch.ones(3, 4, dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0]))


def test_counts_are_fitted_and_grey_values_refused():
    rate = torch.tensor([0.5, 3.0, 10.0, 40.0])
    x = torch.poisson(rate.expand(300, 4)).double()
    vae = poisson_vae()
    fit(NegativeELBO(vae), x, epochs=60, batch_size=50, lr=2e-2, verbose=False, compile=False)
    with torch.no_grad():
        z = vae.prior().sample((4000,))
        mean = vae.decode(z).mean.mean(0)
    assert ((mean - x.mean(0)).abs() < 0.1 * x.mean(0) + 0.1).all()
    # No latent is needed: log p(x) is nearly that of four independent Poissons, the largest there is.
    best = torch.distributions.Poisson(x.mean(0)).log_prob(x).sum(-1).mean()
    found = direct_log_marginal(vae, x, num_samples=2000).mean
    assert best - 0.5 < found.value < best + 0.5
    with pytest.raises(ValueError, match="expected whole numbers >= 0"):
        fit(NegativeELBO(vae), x / 255, epochs=1, verbose=False)


@pytest.mark.parametrize("logit", [math.inf, -math.inf])
@pytest.mark.parametrize("x", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("way", ["grad", "no grad", "elementwise"])
def test_infinite_logits_are_scored_by_the_formula(logit, x, way):
    """log p(x) is x log p + (1 - x) log(1 - p), 0 log 0 = 0: 0 where p is x, and of the largest number's order elsewhere."""
    p = BernoulliLikelihood()
    output, pixels = torch.tensor([[logit, 0.7, -2.0]]), torch.tensor([[x, 1.0, 0.25]])
    rest = p(output[:, 1:]).to_event(1).log_prob(pixels[:, 1:])
    if way == "elementwise":
        found = p(output).log_prob(pixels).sum(-1)
    else:
        found = p(output.requires_grad_(way == "grad")).to_event(1).log_prob(pixels)
    if x == (logit > 0):
        assert torch.allclose(found, rest)
    else:
        assert found.item() < -1e37  # -inf, or x or 1 - x times the largest number
