"""Whatever the shapes and settings: a step with a finite loss, or a ValueError that names the argument."""

import math

import hypothesis.strategies as some
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis.extra.numpy import array_shapes

from pyro_vae import (
    VAE,
    BernoulliLikelihood,
    Data,
    MLPDecoder,
    MLPEncoder,
    NegativeDirectLogLikelihood,
    NegativeELBO,
    NegativeIWAE,
    NormalLikelihood,
    fit,
    load_preset,
    log_marginal,
)
from pyro_vae.data.own import as_data

strange = some.sampled_from([0, -1, 1.5, None, True, "3", math.nan, math.inf, -math.inf, 1e300, 10**30])
FILLS = {"grey": 0.5, "black": 0.0, "white": 1.0, "above": 1.001, "below": -0.5, "nan": math.nan, "inf": math.inf}

arrays = some.tuples(
    array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4),
    some.sampled_from(["float32", "float64", "float16", "uint8", "int64", "bool", "complex64", "U1"]),
    some.sampled_from(list(FILLS)),
)
objectives = {
    "trace": lambda vae, k: NegativeELBO(vae, num_particles=k),
    "mean-field": lambda vae, k: NegativeELBO(vae, estimator="mean-field", num_particles=k),
    "iwae": lambda vae, k: NegativeIWAE(vae, num_particles=k),
    "direct": lambda vae, k: NegativeDirectLogLikelihood(vae, num_particles=k),
}


def make_array(shape, dtype, fill):
    if dtype == "uint8":
        return np.full(shape, 200, dtype)
    if dtype == "U1":
        return np.full(shape, "a")
    return np.full(shape, FILLS[fill] if dtype.startswith("float") else 1, dtype)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    array=arrays,
    latent_dim=some.integers(1, 3) | strange,
    hidden=some.lists(some.integers(1, 4), max_size=2) | some.lists(strange, min_size=1, max_size=2) | strange,
    likelihood=some.sampled_from([BernoulliLikelihood(), NormalLikelihood(), NormalLikelihood(mean="identity")]),
    objective=some.sampled_from(list(objectives)),
    particles=some.integers(1, 3) | strange,
    options=some.fixed_dictionaries(
        {},
        optional={
            "batch_size": some.integers(1, 10) | strange,
            "lr": some.floats(1e-5, 1) | strange,
            "patience": some.integers(1, 3) | strange,
            "schedule_by": some.sampled_from(["epoch", "step", "hour", 3]),
            "seed": some.integers(0, 2**63 - 1) | strange,
            "clip_grad_norm": some.floats(0.1, 10) | strange,
            "record_every": some.integers(1, 3) | strange,
            "checkpoint_every": some.integers(1, 3) | strange,
            "precision": some.sampled_from(["highest", "medium", "low", 3]),
            "compile": some.sampled_from([None, False, "no", 1]),
            "device": some.sampled_from(["cpu", "gpu", "", 3.5]),
        },
    ),
)
def test_a_step_or_an_error_that_names_the_argument(array, latent_dim, hidden, likelihood, objective, particles, options):
    torch.manual_seed(0)
    shape = array[0][1:]
    try:
        sizes = {"latent_dim": latent_dim, "hidden": hidden}
        encoder, decoder = MLPEncoder(shape, **sizes), MLPDecoder(shape, **sizes)
        vae = VAE(encoder, decoder, latent_dim=latent_dim, event_shape=shape, likelihood=likelihood)
        goal = objectives[objective](vae, particles)
        (record,) = fit(goal, make_array(*array), steps=1, verbose=False, **options)
    except ValueError as error:
        names = [*options, "latent_dim", "hidden", "num_particles", "num_particles", "event_shape"]
        data = ["array", "observation", "values", "elements"]
        assert any(name in str(error) for name in (*names, *data)), str(error)  # noqa: PT017
    else:
        assert math.isfinite(record.train["loss"])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    size=some.integers(1, 5),
    num_samples=some.integers(1, 40) | strange,
    chunk_size=some.integers(1, 50) | strange,
    fill=some.sampled_from(list(FILLS)),
)
def test_log_marginal_is_finite_or_names_the_argument(size, num_samples, chunk_size, fill):
    torch.manual_seed(0)
    shape = {"event_shape": (2, 2), "latent_dim": 2}
    vae = VAE(MLPEncoder(hidden=(3,), **shape), MLPDecoder(hidden=(3,), **shape), **shape)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *arguments, **options: None)  # few draws
            result = log_marginal(
                vae.model, vae.guide, torch.full((size, 2, 2), FILLS[fill]), num_samples=num_samples, chunk_size=chunk_size
            )
    except ValueError as error:
        assert any(name in str(error) for name in ("num_samples", "chunk_size", "values", "nan")), str(error)  # noqa: PT017
    else:
        assert result.value.isfinite().all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=some.sampled_from(["float64", "float32", "float16", "int64", "int32", "int16", "uint8", "uint16", "bool"]),
    offset=some.sampled_from([0.0, 1.0, -3.5e4, 1.7e9, -1e12]),
    scale=some.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    columns=some.integers(1, 5),
    rows=some.integers(2, 50),
    seed=some.integers(0, 2**32 - 1),
)
def test_log_p_of_a_standardised_table_is_that_of_float64_arithmetic(dtype, offset, scale, columns, rows, seed):
    """Whatever the type, scale and offset of a table, in a model of float32: to 1e-3 nats for each row."""
    assume(scale >= 1e-10 * abs(offset))  # float64 has 16 digits
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        table = offset + scale * rng.normal(size=(rows, columns))
        if dtype[0] in "iu":
            low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
            table = np.clip(np.rint(table), max(low, -(2.0**62)), min(high, 2.0**62))
        table = table.astype(dtype)
    assume(np.isfinite(table.astype(float)).all())  # float16 ends at 65,504
    data = Data(torch.tensor(table), pixels=False) if dtype == "uint8" else as_data(table)
    torch.manual_seed(seed % 1000)
    preset = load_preset("bernoulli-z20", likelihood="learned-normal", latent_dim=2, hidden=(8,))
    vae = preset.build_vae((columns,), moments=data.moments())
    x, z = table.astype(np.float64), torch.randn(rows, 2)
    constant = x.min(0) == x.max(0)
    loc = x[0] + (x - x[0]).mean(0)
    largest = np.where(constant, 1.0, np.abs(x - loc).max(0))
    deviation = np.where(constant, 1.0, largest * ((x - loc) / largest).std(0))
    with torch.no_grad():
        (batch,) = data.to("cpu", vae.example().dtype).batch(torch.arange(rows))
        found = vae.decode(z).log_prob(batch)
        mean, log_variance = (part.double().numpy() for part in vae.decoder_output(z).unbind(-1))
        # What a net of float32 makes of the standardised numbers; its own rounding is not that of the table.
        q = vae.encode(batch)
        expected_q = vae.encoder(torch.tensor((x - loc) / deviation).float())[0]
    u = (x - loc) / deviation
    log_p = -0.5 * ((u - mean) ** 2 * np.exp(-log_variance) + log_variance + math.log(2 * math.pi)) - np.log(deviation)
    assert np.abs(found.double().numpy() - log_p.sum(1)).max() < 1e-3
    torch.testing.assert_close(q.mean, expected_q, rtol=1e-4, atol=1e-4)
    (record,) = fit(NegativeELBO(vae), data, epochs=1, batch_size=rows, verbose=False)
    assert math.isfinite(record.train["loss"])
