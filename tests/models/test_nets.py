import pytest
import torch
from torch import nn

from pyro_vae import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder


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


def test_no_activation_after_the_last_hidden_layer_on_request():
    encoder = MLPEncoder((4,), hidden=(6, 3), latent_dim=2, last_activation=False)
    h = torch.relu(encoder.body[0](x := torch.randn(9, 4)))
    torch.testing.assert_close(torch.cat(encoder(x), dim=1), encoder.heads(encoder.body[2](h)))


@pytest.mark.parametrize(
    "encoder", [MLPEncoder((1, 8, 8), hidden=(6,), latent_dim=4, heads=1), ConvEncoder((1, 8, 8), heads=1)]
)
def test_one_head_is_a_code(encoder):
    assert encoder(torch.rand(3, 1, 8, 8)).shape == (3, encoder.latent_dim)


@pytest.mark.parametrize("heads", [2, 3, 7])
def test_any_number_of_heads(heads):
    for encoder in (
        MLPEncoder((1, 8, 8), hidden=(6,), latent_dim=4, heads=heads),
        ConvEncoder((1, 8, 8), channels=(2, 3, 4), heads=heads),
    ):
        output = encoder(torch.rand(3, 1, 8, 8))
        assert isinstance(output, tuple)
        assert [part.shape for part in output] == [(3, 4)] * heads


@pytest.mark.parametrize("batch", [(), (7,), (2, 3)])
def test_context_stands_beside_the_input(batch):
    """Of any type and shape, flattened per observation: the same as one net on the tensors joined by hand."""
    counts, grid = torch.randint(9, (*batch, 2)), torch.rand(*batch, 3, 1)
    number = torch.rand(batch, dtype=torch.float64)
    joined = torch.cat([counts.float(), grid.flatten(-2), number.float().unsqueeze(-1)], -1)
    for make, event in ((MLPEncoder, (1, 4, 3)), (MLPDecoder, (2,))):
        sizes = {"hidden": (6,), "latent_dim": 2}
        net = make((1, 4, 3), context_dim=6, **sizes)
        assert net.takes_context
        value = torch.rand(*batch, *event)
        found = net(value, counts, grid, number)
        h = torch.cat([value.flatten(-len(event)), joined], -1)
        expected = (
            net.heads(net.body(h)).split(2, -1) if make is MLPEncoder else net.output(net.body(h)).unflatten(-1, (1, 4, 3))
        )
        torch.testing.assert_close(found, expected)
        assert not make((1, 4, 3), **sizes).takes_context


@pytest.mark.parametrize(
    ("context", "match"),
    [
        ((), r"context of 3 numbers per observation, its context_dim, for \(5,\) observations, found shapes \[\]"),
        ((torch.zeros(5),), r"context of 3 .* found shapes \[\(5,\)\].*one_hot"),
        ((torch.zeros(4, 3),), r"context of 3 .* found shapes \[\(4, 3\)\]"),
        ((torch.zeros(1, 15),), r"context of 3 .* found shapes \[\(1, 15\)\]"),
    ],
)
def test_context_of_another_width_is_refused(context, match):
    with pytest.raises(ValueError, match="MLPEncoder: expected " + match):
        MLPEncoder((4,), hidden=(3,), latent_dim=2, context_dim=3)(torch.rand(5, 4), *context)
    with pytest.raises(ValueError, match="MLPDecoder: expected " + match):
        MLPDecoder((4,), hidden=(3,), latent_dim=2, context_dim=3)(torch.rand(5, 2), *context)


def test_context_to_a_net_that_takes_none_is_refused():
    with pytest.raises(ValueError, match="MLPEncoder: expected context of 0 numbers"):
        MLPEncoder((4,), hidden=(3,), latent_dim=2)(torch.rand(5, 4), torch.rand(5, 1))
    with pytest.raises(ValueError, match="context_dim: expected a whole number >= 0, found -1"):
        MLPDecoder((4,), hidden=(3,), latent_dim=2, context_dim=-1)
    with pytest.raises(ValueError, match="heads: expected a whole number >= 1, found 0"):
        MLPEncoder((4,), hidden=(3,), latent_dim=2, heads=0)


def test_convolutional_layers_are_those_of_the_reference():
    """conv 1-8 (k5), 8-16 (k3), 16-4 (k3) without bias, batch norm after each, two heads; back by 4-16, 16-8, 8-1."""
    encoder = ConvEncoder((1, 32, 32))
    decoder = ConvDecoder((1, 32, 32), code_shape=(4, 4, 4))
    norms = 2 * (8 + 16 + 4), 2 * (16 + 8)
    heads = 2 * (4 * 4 * 9 + 4)
    assert sum(p.numel() for p in encoder.parameters()) == 8 * 25 + 8 * 16 * 9 + 16 * 4 * 9 + norms[0] + heads
    assert sum(p.numel() for p in decoder.parameters()) == 4 * 16 * 9 + 16 * 8 * 9 + 8 * 4 + 1 + norms[1]
    assert encoder.code_shape == (4, 4, 4)
    assert [layer.stride for layer in encoder.body if isinstance(layer, nn.Conv2d)] == [(2, 2)] * 3


def test_code_is_the_flattened_image_and_heads_are_apart():
    encoder = ConvEncoder((1, 32, 32)).eval()
    x = torch.rand(3, 1, 32, 32)
    loc, log_variance = encoder(x)
    h = encoder.body(x)
    both = torch.nn.functional.conv2d(h, encoder.heads.weight, encoder.heads.bias, padding=1)
    torch.testing.assert_close(loc.unflatten(1, (4, 4, 4)), both[:, :4])
    torch.testing.assert_close(log_variance.unflatten(1, (4, 4, 4)), both[:, 4:])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ConvEncoder((28, 28)), r"\(channels, height, width\), found \(28, 28\)"),
        (lambda: ConvEncoder((1, 2, 2)), "too small"),
        (lambda: ConvEncoder((1, 32, 32), channels=(8, 4)), "found 2 channels, 3 kernels"),
        (lambda: ConvDecoder((1, 28, 28), code_shape=(4, 4, 4)), r"to \(1, 32, 32\), expected \(1, 28, 28\)"),
        (lambda: ConvDecoder((1, 32, 32), code_shape=(4, 4, 4), kernels=(3, 2)), "channels, and those of the image"),
        (lambda: ConvEncoder((1, 32, 32), heads=0), "heads: expected a whole number >= 1"),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
