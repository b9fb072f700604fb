import math

import numpy as np
import pytest
import torch
from conftest import make_vae

from pyro_vae import Data
from pyro_vae.latent import denoise, interpolate, latent_means, sample_like, tsne

X = torch.rand(30, 1, 4, 4)
LABELS = torch.arange(30) % 3


def test_latent_means_in_the_order_of_the_data(vae):
    torch.testing.assert_close(latent_means(vae, Data(X), batch_size=7), vae.encode(X).mean)


def test_interpolation_starts_and_ends_at_its_ends(vae):
    latent, pixel = interpolate(vae, X[0], X[1], steps=5)
    assert latent.shape == pixel.shape == (5, 1, 4, 4)
    means = vae.encode(X[:2]).mean
    torch.testing.assert_close(latent[[0, -1]], vae.decode(means).mean)
    torch.testing.assert_close(latent[2], vae.decode(means.mean(0)).mean)
    torch.testing.assert_close(pixel[[0, 2, -1]], torch.stack([X[0], (X[0] + X[1]) / 2, X[1]]))
    with pytest.raises(ValueError, match="at least 2"):
        interpolate(vae, X[0], X[1], steps=1)


def test_denoise_flips_the_given_share(vae):
    x = torch.rand(2000, 1, 4, 4)
    binary, noisy, reconstruction = denoise(vae, x, flip_rate=0.1)
    assert torch.equal(binary, (x > 0.5).float())
    flipped = (binary != noisy).float()
    assert abs(flipped.mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / flipped.numel())
    assert set(noisy.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(reconstruction, vae.decode(vae.encode(noisy).mean).mean)
    with pytest.raises(ValueError, match="probability"):
        denoise(vae, x, flip_rate=1.5)


def test_sample_like_uses_images_of_the_label_alone():
    vae = make_vae(event_shape=(1,), latent_dim=1, hidden=())
    with torch.no_grad():  # an encoder that keeps the pixel and hardly adds noise, a decoder that returns it
        vae.encoder.heads.weight.copy_(torch.tensor([[1.0], [0.0]]))
        vae.encoder.heads.bias.copy_(torch.tensor([0.0, -20.0]))
        vae.decoder.output.weight.fill_(1.0)
        vae.decoder.output.bias.fill_(0.0)
    x = LABELS.float().unsqueeze(1) / 2
    images = sample_like(vae, Data(x, LABELS), 2, num_samples=50)
    torch.testing.assert_close(images, torch.sigmoid(torch.ones(50, 1)), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="has label 7; found labels 0, 1, 2"):
        sample_like(vae, Data(x, LABELS), 7, num_samples=1)
    with pytest.raises(ValueError, match="expected labelled data"):
        sample_like(vae, Data(x), 1, num_samples=1)


def test_tsne_keeps_clusters_apart_and_is_reproducible():
    points = torch.cat([torch.randn(40, 5), torch.randn(40, 5) + 20])
    embedded = tsne(points, perplexity=10)
    assert embedded.shape == (80, 2)
    assert np.array_equal(embedded, tsne(points, perplexity=10))
    a, b = embedded[:40], embedded[40:]
    assert np.linalg.norm(a.mean(0) - b.mean(0)) > 2 * max(a.std(), b.std())
    with pytest.raises(ValueError, match="more observations than the perplexity"):
        tsne(points[:20], perplexity=30)
