import pytest
import torch
from torch import nn

from pyro_vae import Autoencoder, Data, MLPDecoder, MLPEncoder, ReconstructionError, evaluate, fit

SHAPE = {"event_shape": (1, 4, 4), "hidden": (8,), "latent_dim": 2}
X = torch.rand(23, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def autoencoder():
    return Autoencoder(MLPEncoder(**SHAPE, heads=1), MLPDecoder(**SHAPE), latent_dim=2, event_shape=(1, 4, 4))


def test_loss_is_the_mean_squared_error_per_pixel(autoencoder):
    terms = ReconstructionError(autoencoder)(X)
    code = autoencoder.encoder(X)
    expected = (torch.sigmoid(autoencoder.decoder(code)) - X) ** 2
    torch.testing.assert_close(terms["loss"], expected.mean())
    torch.testing.assert_close(terms["squared_error"], expected.flatten(1).sum(1).mean())


def test_a_linear_autoencoder_finds_the_principal_subspace():
    """Baldi and Hornik (1989): the optimum of a linear one is PCA, and its error the sum of the small eigenvalues."""
    torch.manual_seed(0)
    x = torch.randn(400, 2) @ torch.randn(2, 5) + 0.2 * torch.randn(400, 5)
    x = x - x.mean(0)

    class Linear(Autoencoder):
        def decode(self, z):
            return self.decoder(z)  # no sigmoid: closed form

    encoder, decoder = nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False)
    linear = Linear(encoder, decoder, latent_dim=2, event_shape=(5,))
    (*_, last) = fit(ReconstructionError(linear), x, epochs=1500, batch_size=400, lr=0.01, verbose=False)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x))
    assert last.train["squared_error"] == pytest.approx(eigenvalues[:3].sum().item(), rel=2e-3)


def test_evaluation_is_exact_and_does_not_depend_on_batches(autoencoder):
    figures = evaluate(autoencoder, X)
    expected = ((autoencoder(X) - X) ** 2).mean().item()
    assert figures["mean_squared_error"].value == pytest.approx(expected, rel=1e-6)
    assert figures["squared_error"].value == pytest.approx(16 * expected, rel=1e-6)
    assert all((f.standard_error, f.num_samples) == (0.0, 0) for f in figures.values())
    assert evaluate(autoencoder, X, batch_size=5)["squared_error"].value == pytest.approx(figures["squared_error"].value)
    dynamic = Data(X, binarization="dynamic")
    assert evaluate(autoencoder, dynamic, seed=1) == evaluate(autoencoder, dynamic, seed=1)
    assert evaluate(autoencoder, dynamic, seed=1) != evaluate(autoencoder, dynamic, seed=2)


def test_nets_that_do_not_fit_are_refused(autoencoder):
    with pytest.raises(ValueError, match=r"x of shape \('batch', 1, 4, 4\), found \(3, 4, 4\)"):
        autoencoder.encode(torch.rand(3, 4, 4))
    with pytest.raises(ValueError, match=r"z of shape \('batch', 2\), found \(3, 5\)"):
        autoencoder.decode(torch.rand(3, 5))
    two = Autoencoder(MLPEncoder(**SHAPE), MLPDecoder(**SHAPE), latent_dim=2, event_shape=(1, 4, 4))
    with pytest.raises(ValueError, match="found tuple.*heads=1"):
        two.encode(X)
    with pytest.raises(ValueError, match="expected an Autoencoder, found Linear"):
        ReconstructionError(nn.Linear(2, 2))
