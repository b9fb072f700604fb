import math

import pytest
import torch

from pyro_vae import BernoulliLikelihood, NormalLikelihood


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
