"""The VAE as a Pyro citizen: every use of Pyro's own inference that the README promises."""

import copy
import inspect
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
import torch.nn.functional as F
from conftest import LIKELIHOODS, make_vae
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae import (
    VAE,
    BernoulliLikelihood,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    direct_log_marginal,
    evaluate,
    fit,
    log_marginal,
    prior_search,
)
from pyro_vae._checks import SettingError
from pyro_vae.models.scales import bounded_scale


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
    svi_epochs(vae, x, Trace_ELBO(), 1)
    for clone in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        before_original, before_clone = parameters(vae), parameters(clone)
        svi_epochs(clone, x, Trace_ELBO(), 1)
        assert not any(changed(before_original, vae))
        assert all(changed(before_clone, clone))


def test_a_vae_is_saved_after_whatever_pyro_did_with_it(vae, tmp_path):
    """Pyro's store leaves weak references in what param statements return, and those do not pickle."""
    x = torch.rand(5, 1, 4, 4)
    Predictive(vae.model, num_samples=2)(size=3)
    svi_epochs(vae, x, Trace_ELBO(), 1)
    log_marginal(vae, x, num_samples=2)
    fit(NegativeELBO(vae), x, steps=1, verbose=False)
    for thing in (vae, vae.encoder, NegativeELBO(vae)):
        torch.save(thing, tmp_path / "whole.pt")
        again = torch.load(tmp_path / "whole.pt", weights_only=False)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), thing.parameters(), strict=True))
    before = parameters(vae)
    svi_epochs(vae, x, Trace_ELBO(), 1)  # and is trained by Pyro afterwards
    assert all(changed(before, vae))


def test_an_error_of_a_setting_stays_one_under_pyros_handlers(vae):
    """They raise it again, with one argument and what they have traced so far."""
    with pytest.raises(SettingError, match="size: expected a whole number >= 1, found 0"):
        Predictive(vae.model, num_samples=2)(size=0)


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
    with pytest.raises(ValueError, match=r"\(\*batch, 1, 4, 4\) and dtype torch.float32, found torch\."):
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


# --- context ---


class Labelled(nn.Module):
    """A net of its own that takes one tensor of labels, with no word about it but its signature."""

    def __init__(self, net, labels=2):
        super().__init__()
        self.net, self.labels = net, labels
        self.shift = nn.Parameter(torch.randn(labels, 3, dtype=torch.float64))

    def forward(self, z, y):
        return self.net(z + self.shift[y])


def conditional(encoder_context=4, decoder_context=4, **parts):
    """Of a label of three classes and a number: both as context."""
    shape = {"event_shape": (1, 4, 4), "hidden": (16,), "latent_dim": 3}
    encoder, decoder = MLPEncoder(context_dim=encoder_context, **shape), MLPDecoder(context_dim=decoder_context, **shape)
    return VAE(encoder, decoder, latent_dim=3, event_shape=(1, 4, 4), **parts).double()


def context_of(n):
    return F.one_hot(torch.arange(n) % 3, 3), torch.linspace(-1, 1, n, dtype=torch.float64)


def test_conditional_parts_row_by_row():
    """Whatever the leading dimensions, each row of x or z meets its own row of context."""
    vae, context = conditional(), context_of(5)
    x, z = torch.rand(2, 5, 1, 4, 4, dtype=torch.float64), torch.randn(4, 2, 5, 3, dtype=torch.float64)
    q, p = vae.encode(x, *context), vae.decode(z, *context)
    assert (q.batch_shape, p.batch_shape) == ((2, 5), (4, 2, 5))
    for i in range(5):
        row = [c[i : i + 1] for c in context]
        torch.testing.assert_close(q.mean[:, i : i + 1], vae.encode(x[:, i : i + 1], *row).mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            p.mean[:, :, i : i + 1], vae.decode(z[:, :, i : i + 1], *row).mean, rtol=1e-12, atol=1e-12
        )


def test_context_reaches_the_parts_that_take_it_and_no_other():
    context = context_of(5)
    x, z = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    turned = [c.flip(0) for c in context]
    vae = conditional(encoder_context=0)
    assert torch.equal(vae.encode(x, *context).mean, vae.encode(x).mean)
    assert not torch.equal(vae.decode(z, *context).mean, vae.decode(z, *turned).mean)
    vae = conditional(decoder_context=0)
    assert not torch.equal(vae.encode(x, *context).mean, vae.encode(x, *turned).mean)
    assert torch.equal(vae.decode(z, *context).mean, vae.decode(z).mean)


def test_sites_of_a_conditional_model():
    vae, context, x = conditional(), context_of(5), torch.rand(5, 1, 4, 4, dtype=torch.float64)
    guide = poutine.trace(vae.guide).get_trace(x, *context)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x, *context)
    model.compute_log_prob()
    guide.compute_log_prob()
    z = guide.nodes["z"]["value"]
    torch.testing.assert_close(guide.nodes["z"]["log_prob"], vae.encode(x, *context).log_prob(z))
    torch.testing.assert_close(model.nodes["x"]["log_prob"], vae.decode(z, *context).log_prob(x))
    assert "z -> x" in pyro.render_model(vae.model, model_args=(x, *context)).source


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_given_context(parallel):
    vae, context, x = conditional(), context_of(5), torch.rand(5, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        draws = Predictive(vae.model, num_samples=6, parallel=parallel)(None, *context)
        assert draws["x"].shape == (6, 5, 1, 4, 4)  # as many as there are rows of context
        posterior = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=6, parallel=parallel)
        assert posterior(x, *context)["x"].shape == (6, 5, 1, 4, 4)
        z = torch.randn(4, 3, dtype=torch.float64)
        given = poutine.condition(vae.model, data={"z": z})
        trace = poutine.trace(given).get_trace(None, *context_of(4))
    trace.compute_log_prob()
    expected = vae.decode(z, *context_of(4)).log_prob(trace.nodes["x"]["value"])
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected)


def test_size_with_context():
    vae, context = conditional(), context_of(5)
    assert len(vae.model(None, *context)) == len(vae.model(None, *context, size=5)) == 5
    with pytest.raises(ValueError, match="expected context of length 4, the given size, found 5"):
        vae.model(None, *context, size=4)


def test_a_trained_conditional_vae_draws_what_the_label_says():
    """x is dark or bright, and no latent says which: the label must."""
    y = torch.arange(200) % 2
    x = (torch.rand(200, 1, 4, 4) < (0.1 + 0.8 * y)[:, None, None, None]).float()
    label = F.one_hot(y)
    shape = {"event_shape": (1, 4, 4), "hidden": (16,), "latent_dim": 3}
    nets = MLPEncoder(context_dim=2, **shape), MLPDecoder(context_dim=2, **shape)
    vae = VAE(*nets, latent_dim=3, event_shape=(1, 4, 4))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(200):
        svi.step(x, label)
    with torch.no_grad():
        draws = Predictive(vae.model, num_samples=500, parallel=True)(None, torch.eye(2))["x"]  # (500, 2, 1, 4, 4)
    brightness = draws.flatten(2).mean(2)
    mean, error = brightness.mean(0), brightness.std(0) / math.sqrt(500)
    assert ((mean - torch.tensor([0.1, 0.9])).abs() < 5 * error + 0.05).all()  # 0.05: 1600 pixels of each label, 10 % off
    assert mean[1] - mean[0] > 0.6


def test_parts_are_asked_by_signature_and_by_word():
    context = (torch.tensor([0, 1, 0, 1, 1]),)
    z = torch.randn(5, 3, dtype=torch.float64)
    shape = {"event_shape": (1, 4, 4), "hidden": (16,), "latent_dim": 3}
    plain = MLPDecoder(**shape)
    vae = VAE(MLPEncoder(**shape), Labelled(plain), latent_dim=3, event_shape=(1, 4, 4)).double()
    by_hand = plain(z + vae.decoder.shift[context[0]])
    torch.testing.assert_close(vae.decode(z, *context).base_dist.logits, by_hand)
    with pytest.raises(ValueError, match="context tensors for the decoder.* expected 1, found 0"):
        vae.decode(z)
    with pytest.raises(ValueError, match="context tensors for the decoder.* expected 1, found 2"):
        vae.decode(z, *context, *context)

    class Optional(Labelled):
        def forward(self, z, y=None, *, temperature=1.0):
            return self.net(z if y is None else z + self.shift[y])

    vae.decoder = Optional(plain).double()
    torch.testing.assert_close(vae.decode(z).base_dist.logits, plain(z))
    assert not torch.equal(vae.decode(z, *context).base_dist.logits, plain(z))
    vae.decoder.takes_context = False  # the word comes before the signature
    with pytest.raises(ValueError, match="none of encoder, prior, decoder, likelihood takes any"):
        vae.decode(z, *context)

    class Option(Labelled):
        def forward(self, z, scale=1.0):
            return self.net(z * scale)

    vae.decoder = Option(plain).double()  # labels are no scale
    with pytest.raises(ValueError, match="none of encoder, prior, decoder, likelihood takes any"):
        vae.decode(z, *context)

    class Any(Labelled):
        takes_context = True

        def forward(self, z, *context):
            return self.net(z)

    vae.decoder = Any(plain).double()
    vae.decode(z, *context, *context)
    with pytest.raises(ValueError, match="context tensors for the decoder.* expected at least 1, found 0"):
        vae.decode(z)


CONTEXTS = {
    "of another length": (lambda: context_of(4), r"length 5, .* found context of shapes \(4, 3\), \(4,\)"),
    "one of them": (lambda: (context_of(5)[0], context_of(4)[1]), r"length 5, .* shapes \(5, 3\), \(4,\)"),
    "a single row for all": (lambda: context_of(1), "length 5, that of the observations"),
    "no tensor": (lambda: (3,), "context tensors of shape .*, found int"),
    "a scalar": (lambda: (torch.tensor(1.0),), r"found shape \(\)"),
    "too narrow": (lambda: context_of(5)[:1], "context of 4 numbers per observation"),
    "too wide": (lambda: context_of(5) * 2, r"MLPEncoder|MLPDecoder: expected context of 4 numbers"),
    "missing": (lambda: (), "context tensors for the (encoder|decoder).* expected at least 1, found 0"),
}


@pytest.mark.parametrize(("context", "match"), CONTEXTS.values(), ids=CONTEXTS)
def test_context_that_does_not_suit_is_refused(context, match):
    vae, x = conditional(), torch.rand(5, 1, 4, 4, dtype=torch.float64)
    for program in (vae.model, vae.guide, vae.encode, lambda x, *c: vae.decode(x[:, 0, 0, :3], *c)):
        with pytest.raises(ValueError, match=match):
            program(x, *context())


def test_context_needs_a_leading_dimension():
    vae, context = conditional(), context_of(5)
    with pytest.raises(ValueError, match="x or z with a leading dimension"):
        vae.decode(torch.randn(3, dtype=torch.float64), *context)
    with pytest.raises(ValueError, match="x or z with a leading dimension"):
        vae.encode(torch.rand(1, 4, 4, dtype=torch.float64), *context)


def test_context_that_no_part_takes_is_refused(vae):
    x, labels = torch.rand(5, 1, 4, 4), torch.arange(5)
    for program in (vae.model, vae.guide, vae.encode, lambda x, *c: vae.decode(x[:, 0, 0, :3], *c)):
        with pytest.raises(ValueError, match="none of encoder, prior, decoder, likelihood takes any"):
            program(x, labels)


def test_conditional_copies_share_no_parameter_and_sit_in_pickles():
    vae, context, x = conditional(), context_of(5), torch.rand(5, 1, 4, 4, dtype=torch.float64)
    for clone in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert not {*map(id, clone.parameters())} & {*map(id, vae.parameters())}
        assert torch.equal(clone.encode(x, *context).mean, vae.encode(x, *context).mean)


# --- the least that a likelihood is ---


def laplace(output):
    return dist.Laplace(output, 0.3)


@pytest.mark.filterwarnings("ignore::pyro_vae.estimates.records.UnreliableEstimateWarning")
def test_a_likelihood_is_any_function_from_output_to_distribution():
    vae, x = make_vae(likelihood=laplace), torch.rand(20, 1, 4, 4)
    vae.check(x)
    assert vae.terms(torch.tensor(1.0)) == {}
    before = parameters(vae)
    fit(NegativeELBO(vae), x, epochs=1, verbose=False)
    assert all(changed(before, vae))
    assert set(evaluate(vae, x, importance_samples=20)) == {"neg_elbo", "reconstruction", "kl", "log_marginal"}
    assert pickle.loads(pickle.dumps(vae)).likelihood is laplace
    for direct in (
        lambda: NegativeDirectLogLikelihood(vae),
        lambda: direct_log_marginal(vae, x, num_samples=20),
        lambda: prior_search(vae, x, num_samples=5),
    ):
        with pytest.raises(ValueError, match=r"method pairwise_log_prob\(output, x\), found <function laplace"):
            direct()


def test_what_a_likelihood_has_is_asked_through_the_vae():
    vae = make_vae(likelihood=LIKELIHOODS["normal-sigmoid"])
    assert vae.terms(torch.tensor(1.0)) == vae.likelihood.terms(torch.tensor(1.0), (1, 4, 4))
    with pytest.raises(ValueError, match="NaN or infinity"):
        vae.check(torch.full((1, 1, 4, 4), math.nan))


def test_a_module_without_parameters_still_has_a_type():
    class Still(nn.Module):
        def forward(self, z):
            return z[:, :1]

    vae = VAE(nn.Identity(), Still(), latent_dim=2, event_shape=(1,)).double()
    assert vae.like.dtype == torch.float64
    assert vae.decode(torch.randn(5, 2, dtype=torch.float64)).mean.shape == (5, 1)
