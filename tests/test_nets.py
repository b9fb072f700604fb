import pytest
import torch
from torch import nn

from pyro_vae import MLPDecoder, MLPEncoder


@pytest.mark.parametrize("event_shape", [(5,), (1, 4, 3), (3, 2, 2), (1,)])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3)])
@pytest.mark.parametrize("hidden", [(), (6,), (6, 4)])
def test_shapes_for_any_leading_dimensions(event_shape, batch, hidden):
    encoder = MLPEncoder(event_shape, hidden=hidden, latent_dim=2)
    decoder = MLPDecoder(event_shape, hidden=hidden, latent_dim=2)
    loc, log_variance = encoder(torch.rand(*batch, *event_shape))
    assert loc.shape == log_variance.shape == (*batch, 2)
    assert decoder(torch.randn(*batch, 2)).shape == (*batch, *event_shape)


def test_layers_are_those_of_the_reference():
    """784-400 and two heads of 20; 20-400-784: weights and biases counted by hand."""
    encoder = MLPEncoder((1, 28, 28), hidden=(400,), latent_dim=20)
    decoder = MLPDecoder((1, 28, 28), hidden=(400,), latent_dim=20)
    assert sum(p.numel() for p in encoder.parameters()) == 784 * 400 + 400 + 2 * (400 * 20 + 20)
    assert sum(p.numel() for p in decoder.parameters()) == 20 * 400 + 400 + 400 * 784 + 784


def test_encoder_is_the_composition_of_its_layers():
    encoder = MLPEncoder((2, 2), hidden=(3,), latent_dim=1, activation=nn.Tanh)
    x = torch.rand(5, 2, 2)
    first, heads = encoder.body[0], encoder.heads
    h = torch.tanh(x.reshape(5, 4) @ first.weight.T + first.bias)
    loc, log_variance = encoder(x)
    torch.testing.assert_close(loc, h @ heads.weight[:1].T + heads.bias[:1])
    torch.testing.assert_close(log_variance, h @ heads.weight[1:].T + heads.bias[1:])


def test_no_activation_after_the_output():
    decoder = MLPDecoder((4,), hidden=(3,), latent_dim=2)
    assert decoder(torch.randn(100, 2)).min() < 0
