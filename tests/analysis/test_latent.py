import math

import numpy as np
import pytest
import torch
from conftest import make_vae
from torch import nn

from pyro_vae import VAE, Autoencoder, Data, MLPDecoder, MLPEncoder, NormalLikelihood, TrainingRecord, evaluate
from pyro_vae.analysis import latent
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
    tsne,
)

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
    with pytest.raises(ValueError, match="steps: expected a whole number >= 2"):
        interpolate(vae, X[0], X[1], steps=1)
    with pytest.raises(ValueError, match="interpolate: expected two observations"):
        interpolate(vae, X[0], X[1:3])
    with pytest.raises(ValueError, match="batch_size: expected a whole number >= 1, found 0"):
        latent_means(vae, X, batch_size=0)


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


@pytest.fixture
def autoencoder():
    shape = {"event_shape": (1, 4, 4), "hidden": (8,), "latent_dim": 3}
    return Autoencoder(MLPEncoder(**shape, heads=1), MLPDecoder(**shape), latent_dim=3, event_shape=(1, 4, 4))


def test_an_autoencoders_code_stands_where_a_vae_has_its_mean(autoencoder):
    torch.testing.assert_close(latent_means(autoencoder, X, batch_size=7), autoencoder.encode(X))
    way, _ = interpolate(autoencoder, X[0], X[1], steps=3)
    torch.testing.assert_close(way[1:2], autoencoder.decode(autoencoder.encode(X[:2]).mean(0, keepdim=True)))
    assert manifold_grid(autoencoder, size=3)[0].shape == (9, 1, 4, 4)
    _, noisy, back = denoise(autoencoder, X)
    torch.testing.assert_close(back, autoencoder(noisy))
    for needs_posterior in (kl_per_dimension, active_units):
        with pytest.raises(ValueError, match="expected a model and guide, found an Autoencoder"):
            needs_posterior(autoencoder, X)


def test_spherical_way_keeps_to_the_sphere_and_turns_evenly():
    vae = make_vae(event_shape=(2,), latent_dim=2, hidden=())
    with torch.no_grad():  # the posterior mean is x, the logits are z
        vae.encoder.heads.weight.copy_(torch.cat([torch.eye(2), torch.zeros(2, 2)]))
        vae.encoder.heads.bias.zero_()
        vae.decoder.output.weight.copy_(torch.eye(2))
        vae.decoder.output.bias.zero_()
    a, b = 2 * torch.tensor([1.0, 0.0]), 2 * torch.tensor([0.5, 0.75**0.5])  # 60 degrees apart, both at distance 2
    way = interpolate(vae, a, b, steps=5, path="spherical")[0].logit()
    torch.testing.assert_close(way.norm(dim=1), torch.full((5,), 2.0), atol=1e-4, rtol=0)
    angles = torch.atan2(way[:, 1], way[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 3, 5), atol=1e-4, rtol=0)
    straight = interpolate(vae, a, b, steps=5)[0].logit()
    assert straight.norm(dim=1)[2] < 1.75  # the chord passes nearer to 0
    same = interpolate(vae, a, 2 * a, steps=3, path="spherical")[0].logit()  # no angle between them: the line
    torch.testing.assert_close(same[1], 1.5 * a, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="'linear' or 'spherical'"):
        interpolate(vae, a, b, path="geodesic")


def test_manifold_grid_reads_like_a_page(vae):
    images, first, second = manifold_grid(vae, size=5, limits=(-1.0, 1.0, -2.0, 2.0), axes=(2, 0))
    assert torch.equal(first, torch.linspace(-1, 1, 5))
    assert torch.equal(second, torch.linspace(-2, 2, 5))
    corner = torch.tensor([[2.0, 0.0, -1.0]])  # top left: second axis at its highest, first at its lowest
    torch.testing.assert_close(images[:1], vae.decode(corner).mean)
    torch.testing.assert_close(images[9:10], vae.decode(torch.tensor([[1.0, 0.0, 1.0]])).mean)  # end of the second row
    _, quantiles, again = manifold_grid(vae, size=10, spacing="probability")
    p = torch.distributions.Normal(0.0, 1.0).cdf(quantiles)
    torch.testing.assert_close(p, torch.arange(0.05, 1, 0.1))
    assert torch.equal(quantiles, again)


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"axes": (0, 0)}, {"axes": (0, 3)}, {"spacing": "log"}, {"limits": (1.0, -1.0, 0.0, 1.0)}]
)
def test_grids_that_make_no_sense_are_refused(vae, wrong):
    with pytest.raises(ValueError, match=f"manifold_grid: .*{next(iter(wrong))}|size: expected"):
        manifold_grid(vae, **wrong)


def test_kl_per_dimension_sums_to_the_kl(vae64):
    x = X.double()
    kl = kl_per_dimension(vae64, x, batch_size=7)
    q = vae64.encode(x).base_dist
    expected = 0.5 * (q.loc**2 + q.scale**2 - 2 * q.scale.log() - 1).mean(0)
    torch.testing.assert_close(kl, expected)
    assert kl.sum().item() == pytest.approx(evaluate(vae64, x)["kl"].value)


def test_active_units_are_those_whose_mean_varies(vae):
    with torch.no_grad():
        vae.encoder.heads.weight[:3].mul_(torch.tensor([[10.0], [0.0], [10.0]]))  # the second mean is a constant
    assert active_units(vae, X).tolist() == [True, False, True]
    variance = latent_means(vae, X).var(0, correction=0)
    middle = variance.sort().values[1:].mean().item()
    assert int(active_units(vae, X, threshold=middle).sum()) == 1


def test_batch_norm_is_read_and_not_moved():
    from pyro_vae import load_preset

    vae = load_preset("conv-gaussian").build_vae((1, 32, 32))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    x = torch.rand(6, 1, 32, 32)
    all_at_once = latent_means(vae, x)
    torch.testing.assert_close(all_at_once, latent_means(vae, x, batch_size=2))  # a batch's own mean would tell them apart
    assert vae.training
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


class Shifted(nn.Module):
    """A net that sees its input plus some times the label."""

    def __init__(self, net, times):
        super().__init__()
        self.net, self.times = net, times

    def forward(self, value, y):
        return self.net(value + self.times * y.to(value.dtype).reshape(-1, *[1] * (value.dim() - 1)))


def conditional():
    torch.manual_seed(0)
    plain = make_vae((1, 4, 4), likelihood=NormalLikelihood(mean="identity"))
    options = {"latent_dim": 3, "event_shape": (1, 4, 4), "likelihood": plain.likelihood}
    return plain, VAE(Shifted(plain.encoder, -1), Shifted(plain.decoder, 1), **options)


def test_the_context_of_a_batch_reaches_encoder_and_decoder():
    plain, shifted = conditional()
    y = torch.arange(20) % 2
    x = torch.rand(20, 1, 4, 4)
    data = Data(x, y, inputs=("x", "labels"))
    less = x - y[:, None, None, None]
    for found in (latent_means(shifted, data, batch_size=7), latent_means(shifted, (x, y))):
        torch.testing.assert_close(found, latent_means(plain, less))
    torch.testing.assert_close(kl_per_dimension(shifted, data), kl_per_dimension(plain, less))
    assert torch.equal(active_units(shifted, data), active_units(plain, less))
    assert latent_record(shifted, data, limit=5)["means"] == latent_record(plain, less, limit=5)["means"]
    moved = y[:, None].expand(20, 3).float()
    torch.testing.assert_close(decoder_mean(shifted, torch.zeros(20, 3), y), decoder_mean(plain, moved))
    assert sample_like(shifted, data, 1, num_samples=6).shape == (6, 1, 4, 4)
    assert denoise(shifted, x, y)[2].shape == x.shape
    with pytest.raises(ValueError, match="context tensors for the encoder"):  # never passed over
        latent_means(shifted, x)


def test_pictures_of_a_conditional_run():
    _, shifted = conditional()
    data = Data(torch.rand(20, 1, 4, 4), torch.arange(20) % 2, inputs=("x", "labels"))
    terms = {"loss": 1.0, "neg_elbo": 1.0, "reconstruction": 1.0, "kl": 0.0}
    history = [TrainingRecord(epoch, 10 * epoch, terms) for epoch in (1, 2)]
    names = [name for name, _ in run_figures(shifted, data, data, history, title="shifted")]
    assert {"reconstructions", "reconstructions_train", "prior_samples", "denoising", "samples_by_label"} <= set(names)
    assert "interpolation" not in names  # between two contexts there is no way


def test_tsne_of_latents_that_are_all_the_same_is_refused():
    """scikit-learn divides by their deviation, and ends the process."""
    for z in (torch.zeros(50, 2), torch.ones(500, 5), 1 + 1e-8 * torch.rand(50, 2), torch.full((40, 1), -3.0)):
        with pytest.raises(ValueError, match=f"tsne: expected latents that differ, found {len(z)} all the same"):
            latent.tsne(z)
    for value in (torch.nan, torch.inf):
        z = torch.rand(50, 2)
        z[7] = value
        with pytest.raises(ValueError, match="tsne: expected finite latents"):
            latent.tsne(z)


def test_tsne_takes_arrays_and_refuses_other_shapes():
    z = np.random.default_rng(0).normal(size=(50, 2))
    assert latent.tsne(z).shape == latent.tsne(torch.arange(100).reshape(50, 2)).shape == (50, 2)
    for other in (z[:, 0], z[None], z[:, :0]):
        with pytest.raises(ValueError, match=r"tsne: expected latents of shape \(N, latent_dim\)"):
            latent.tsne(other)
    with pytest.raises(ValueError, match="perplexity: expected a positive number"):
        latent.tsne(z, perplexity=float("nan"))


@pytest.mark.parametrize("distinct", [2, 3])
def test_tsne_of_few_distinct_latents(distinct):
    points = latent.tsne(torch.randn(distinct, 2)[torch.arange(60) % distinct])
    assert points.shape == (60, 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize("scale", [1e-38, 1e18, 1e37])
def test_tsne_does_not_depend_on_the_scale(scale):
    z = torch.randn(60, 3, dtype=torch.float64)
    z = torch.cat([z, 5 + z])
    for points in (latent.tsne((z * scale).float()), latent.tsne(z)):
        apart = np.linalg.norm(points[:60].mean(0) - points[60:].mean(0))
        assert apart > 2 * points[:60].std(0).max()  # two clusters
