"""The VAE as a Pyro citizen: every use of Pyro's own inference that the README promises."""

import copy
import inspect
import io
import math
import pickle

import pyro
import pyro.optim
import pytest
import torch
from conftest import LIKELIHOODS, make_vae
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import VAE, BernoulliLikelihood, MLPDecoder, MLPEncoder, NegativeELBO, evaluate, fit
from pyro_vae.likelihoods import bounded_scale


def parameters(vae):
    return [p.detach().clone() for p in vae.parameters()]


def changed(before, vae):
    return [not torch.equal(b, p) for b, p in zip(before, vae.parameters(), strict=True)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
@pytest.mark.parametrize("event_shape", [(6,), (1, 4, 4), (3, 2, 2)])
def test_shapes_and_gradient_to_every_parameter(event_shape, likelihood):
    vae = make_vae(event_shape, likelihood=likelihood)
    x = torch.rand(5, *event_shape)
    q = vae.encode(x)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    p = vae.decode(torch.randn(2, 5, 3))
    assert (p.batch_shape, p.event_shape) == ((2, 5), event_shape)
    assert p.log_prob(x).shape == (2, 5)
    NegativeELBO(vae)(x)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_model_and_guide_have_one_signature():
    assert inspect.signature(VAE.model) == inspect.signature(VAE.guide)


def test_sites_and_plate(vae):
    x = torch.rand(5, 1, 4, 4)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    assert guide.stochastic_nodes == ["data", "z"]
    assert model.observation_nodes == ["x"]
    assert [frame.name for frame in model.nodes["x"]["cond_indep_stack"]] == ["data"]
    model.compute_log_prob()
    z = guide.nodes["z"]["value"]
    torch.testing.assert_close(model.nodes["z"]["log_prob"], -0.5 * (z**2).sum(-1) - 1.5 * math.log(2 * math.pi))
    torch.testing.assert_close(model.nodes["x"]["log_prob"], vae.decode(z).log_prob(x))


# --- Pyro's own training ---


def svi_epochs(vae, x, loss, epochs, lr=3e-3):
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": lr}), loss)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(100):
            svi.step(x[index])


def test_svi_reaches_the_elbo_of_fit_also_for_a_second_vae(digits):
    train, test = digits
    reached = {}
    torch.manual_seed(1)
    start = make_vae((1, 8, 8), latent_dim=4, hidden=(64,))
    untrained = evaluate(start, test)["neg_elbo"]
    fitted = copy.deepcopy(start)
    fit(NegativeELBO(fitted), train, epochs=30, batch_size=100, lr=3e-3, verbose=False)
    reached["fit"] = evaluate(fitted, test)["neg_elbo"]
    for name in ("first", "second"):
        vae = copy.deepcopy(start)
        before = parameters(vae)
        svi_epochs(vae, train.x, Trace_ELBO(), 30)
        assert all(changed(before, vae))
        reached[name] = evaluate(vae, test)["neg_elbo"]
    # Different data order and noise: the same optimum up to the spread between runs, far below the untrained bound.
    assert untrained.value - reached["fit"].value > 15
    assert reached["first"].value == pytest.approx(reached["fit"].value, abs=0.3)
    assert reached["second"].value == pytest.approx(reached["fit"].value, abs=0.3)


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceMeanField_ELBO(num_particles=2, vectorize_particles=True),
        RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True),
        RenyiELBO(alpha=0.5, num_particles=4),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{loss.num_particles}-{loss.vectorize_particles}",
)
def test_svi_trains_under_other_elbos(digits, loss):
    vae = make_vae((1, 8, 8), latent_dim=4, hidden=(64,))
    before, value = parameters(vae), evaluate(vae, digits[1])["neg_elbo"].value
    svi_epochs(vae, digits[0].x[:500], loss, 4)
    assert all(changed(before, vae))
    assert evaluate(vae, digits[1])["neg_elbo"].value < value - 5


def test_copies_share_no_parameter_under_svi(vae):
    """A shared name in Pyro's store would train the original in place of its copy, silently."""
    x = torch.rand(5, 1, 4, 4)
    pickled = pickle.dumps(vae)  # before SVI: Pyro's store hangs weak references on the parameters, which do not pickle
    svi_epochs(vae, x, Trace_ELBO(), 1)
    for clone in (copy.deepcopy(vae), pickle.loads(pickled)):
        before_original, before_clone = parameters(vae), parameters(clone)
        svi_epochs(clone, x, Trace_ELBO(), 1)
        assert not any(changed(before_original, vae))
        assert all(changed(before_clone, clone))


def test_a_dead_vae_leaves_nothing_to_a_new_one():
    x = torch.rand(5, 1, 4, 4)
    for _ in range(5):  # a new VAE often gets the address of the one just freed
        vae = make_vae()
        before = parameters(vae)
        svi_epochs(vae, x, Trace_ELBO(), 1)
        assert all(changed(before, vae))


# --- Predictive, condition, render ---


@pytest.mark.parametrize("parallel", [False, True])
def test_prior_predictive(vae, parallel):
    draws = Predictive(vae.model, num_samples=7, parallel=parallel)(size=5)
    assert draws["x"].shape == (7, 5, 1, 4, 4)
    assert draws["z"].shape == (7, 5, 3)


@pytest.mark.parametrize("parallel", [False, True])
def test_posterior_predictive(vae, parallel):
    x = torch.rand(5, 1, 4, 4)
    n = 2000
    predictive = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=n, parallel=parallel)
    with torch.no_grad():
        draws = predictive(x)
    assert draws["x"].shape == (n, 5, 1, 4, 4)
    assert set(draws["x"].unique().tolist()) == {0.0, 1.0}  # drawn, not the observed grey values
    q = vae.encode(x)
    assert ((draws["z"].reshape(n, 5, 3).mean(0) - q.mean).abs() < 5 * q.stddev / math.sqrt(n)).all()
    expected = vae.decode(draws["z"].reshape(n, 5, 3)).mean  # each draw's pixel has this mean
    error = (expected * (1 - expected)).mean(0).sqrt() / math.sqrt(n)
    assert ((draws["x"] - expected).mean(0).abs() < 5 * error).all()


def test_condition(vae):
    z = torch.randn(4, 3)
    trace = poutine.trace(poutine.condition(vae.model, data={"z": z})).get_trace(size=4)
    assert trace.nodes["z"]["is_observed"]
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], vae.decode(z).log_prob(trace.nodes["x"]["value"]))


def test_render_model(vae):
    graph = pyro.render_model(vae.model, model_args=(torch.rand(5, 1, 4, 4),), render_distributions=True)
    source = graph.source
    assert "z -> x" in source
    assert "data" in source


# --- errors ---


def test_guide_needs_data(vae):
    with pytest.raises(ValueError, match="expected x, found None"):
        vae.guide()


@pytest.mark.parametrize(
    "x", [torch.rand(5, 4, 4), torch.rand(5, 16), torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.rand(4)]
)
def test_encode_names_both_shapes(vae, x):
    with pytest.raises(ValueError, match=r"\(\*batch, 1, 4, 4\) and type torch.float32, found torch\."):
        vae.encode(x)


def test_latent_dim_must_be_positive():
    with pytest.raises(ValueError, match="latent_dim: expected a whole number >= 1, found 0"):
        VAE(nn.Identity(), nn.Identity(), latent_dim=0, event_shape=(1,))


def vae_of(encoder=None, decoder=None, latent_dim=3):
    shape = {"event_shape": (1, 4, 4), "hidden": (8,), "latent_dim": 3}
    encoder, decoder = encoder or MLPEncoder(**shape), decoder or MLPDecoder(**shape)
    return VAE(encoder, decoder, latent_dim=latent_dim, event_shape=(1, 4, 4))


class Returns(nn.Module):
    """A net that returns a function of its input."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.function(x)


DISAGREE = {
    "decoder lacks a dimension": (
        vae_of(decoder=MLPDecoder((4, 4), hidden=(8,), latent_dim=3)),
        "Make decoder and event_shape",
    ),
    "decoder gives one number": (
        vae_of(decoder=Returns(lambda z: z.sum(-1)[:, None, None, None])),
        "Make decoder and event",
    ),
    "decoder drops the batch": (vae_of(decoder=Returns(lambda z: z.new_zeros(1, 4, 4))), "Make decoder and event_shape"),
    "more latents than declared": (vae_of(latent_dim=2), r"encoder's loc of shape \(5, 2\), .* found \(5, 3\)"),
    "log-variance of one number": (vae_of(Returns(lambda x: (x[:, 0, 0, :3], x[:, 0, 0, :1]))), "encoder's log_variance"),
    "encoder sums over the batch": (vae_of(Returns(lambda x: (x[:, 0, 0, :3].sum(0),) * 2)), r"loc of shape \(5, 3\)"),
    "encoder gives one for all": (vae_of(Returns(lambda x: (x[:1, 0, 0, :3],) * 2)), r"found \(1, 3\)"),
    "encoder gives a tensor": (vae_of(Returns(lambda x: x.flatten(1))), "a pair of tensors .*, found Tensor"),
    "encoder gives nothing": (vae_of(Returns(lambda x: None)), "a pair of tensors .*, found NoneType"),
}


@pytest.mark.parametrize(("vae", "match"), DISAGREE.values(), ids=DISAGREE)
def test_nets_that_would_broadcast_are_refused(vae, match):
    """Each of these would train without an error, on numbers that mean nothing."""
    x = torch.rand(5, 1, 4, 4)
    with pytest.raises(ValueError, match=match):
        fit(NegativeELBO(vae), x, epochs=1, verbose=False)
    with pytest.raises(ValueError, match=match):
        evaluate(vae, x)


def test_nets_see_one_batch_dimension():
    """A convolutional decoder takes (batch, latent) alone; draws, predictive and particles come in more dimensions."""
    decoder = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 1, 3, padding=1))
    vae = vae_of(decoder=decoder)
    x = torch.rand(5, 1, 4, 4)
    z = torch.randn(2, 7, 5, 3)
    torch.testing.assert_close(vae.decode(z).mean[1, 3], vae.decode(z[1, 3]).mean)
    assert vae.decode(z[0, 0, 0]).mean.shape == (1, 4, 4)
    assert vae.encode(x.expand(2, 5, 1, 4, 4)).mean.shape == (2, 5, 3)
    NegativeELBO(vae, num_particles=3)(x)
    assert Predictive(vae.model, num_samples=2, parallel=True)(size=4)["x"].shape == (2, 4, 1, 4, 4)
    evaluate(vae, x, importance_samples=10)


@pytest.mark.parametrize("x", [3, torch.rand(4, 4), torch.rand(1, 4, 4), torch.rand(2, 5, 1, 4, 4)])
def test_model_and_guide_take_a_batch(vae, x):
    for program in (vae.model, vae.guide):
        with pytest.raises(ValueError, match=r"VAE: expected x of shape"):
            program(x)
    with pytest.raises(ValueError, match="size: expected a whole number >= 1, found 0"):
        vae.model(size=0)


@pytest.mark.parametrize("likelihood", ["bernoulli", BernoulliLikelihood])
def test_what_is_no_likelihood(likelihood):
    with pytest.raises(ValueError, match=r"BernoulliLikelihood\(\)"):
        make_vae(likelihood=likelihood)


# --- the encoder's scale ---


def test_scale_is_plain_in_the_normal_range():
    log_variance = torch.linspace(-14, 14, 1001, requires_grad=True)
    scale = bounded_scale(log_variance)
    assert torch.equal(scale, (0.5 * log_variance).exp())
    (gradient,) = torch.autograd.grad(scale.sum(), log_variance)
    torch.testing.assert_close(gradient, 0.5 * scale.detach())


def test_scale_never_overflows_and_always_has_a_gradient():
    log_variance = torch.tensor([-1e38, -1e6, -120.0, -20.0, 20.0, 120.0, 1e6, 1e38], requires_grad=True)
    scale = bounded_scale(log_variance)
    assert (scale >= math.exp(-10.001)).all()
    assert (scale <= math.exp(10.001)).all()
    assert (scale.diff() > 0)[[1, 2, 3, 4, 5]].all()
    (gradient,) = torch.autograd.grad(scale.log().sum(), log_variance)
    assert (gradient[1:-1] > 0).all()
    assert gradient.isfinite().all()
    assert bounded_scale(torch.tensor([math.inf, -math.inf])).isfinite().all()


def test_scale_is_twice_differentiable_where_it_bends():
    log_variance = torch.tensor([-14.0, 14.0], dtype=torch.float64, requires_grad=True)
    points = (log_variance + torch.tensor([[-1e-3], [0.0], [1e-3]], dtype=torch.float64)).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda v: bounded_scale(v).log(), points)
    (slope,) = torch.autograd.grad(bounded_scale(points).log().sum(), points)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.5), atol=1e-6, rtol=0)


def test_loss_is_finite_for_an_encoder_gone_wild(vae):
    with torch.no_grad():
        vae.encoder.heads.bias[3:] = 120.0  # log-variances: a plain exp would give e^60, and its square overflows
    terms = NegativeELBO(vae)(torch.rand(5, 1, 4, 4))
    terms["loss"].backward()
    assert terms["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in vae.parameters())


# --- as a module ---


def test_state_dict_round_trip(vae):
    stream = io.BytesIO()
    torch.save(vae.state_dict(), stream)
    stream.seek(0)
    other = make_vae()
    other.load_state_dict(torch.load(stream, weights_only=True))
    z = torch.randn(2, 3)
    assert torch.equal(vae.decode(z).mean, other.decode(z).mean)


def test_prior_follows_dtype(vae64):
    assert vae64.prior().sample().dtype == torch.float64
    assert Predictive(vae64.model, num_samples=2)(size=3)["x"].dtype == torch.float64
