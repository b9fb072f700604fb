"""What a module is, by which a resumed run, and a model that weights are loaded into, are compared."""

import functools
import subprocess
import sys
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from conftest import make_vae
from pyro import poutine
from torch import nn

from pyro_vae import LinearWarmup, NegativeELBO, NormalLikelihood, Objective
from pyro_vae.models.description import description, differences


class Plain:
    """A likelihood that is an object like any other."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, output):
        return dist.Laplace(output, self.scale)


@dataclass(frozen=True)
class Frozen:
    scale: float

    def __call__(self, output):
        return dist.Laplace(output, self.scale)


class Weighted(Objective):
    def __init__(self, vae, weight=1.0, flags=(True, "mean")):
        super().__init__()
        self.vae, self.weight, self.flags = vae, weight, flags
        self._calls = 0
        self.mask = torch.ones(3)


def prior(scale):
    return lambda: dist.Normal(torch.zeros(3), scale).to_event(1)


def with_default(output, scale=0.2):
    return dist.Laplace(output, scale)


def changed(a, b):
    return differences(description(a), description(b))


def test_plain_settings_tell_parts_from_each_other():
    for one, other, text in [
        (make_vae(likelihood=NormalLikelihood(0.5)), make_vae(likelihood=NormalLikelihood(0.01)), "variance: 0.5 -> 0.01"),
        (make_vae(likelihood=Plain(0.5)), make_vae(likelihood=Plain(2)), "likelihood.scale: 0.5 -> 2"),
        (make_vae(likelihood=Frozen(0.5)), make_vae(likelihood=Frozen(0.6)), "likelihood.scale: 0.5 -> 0.6"),
        (make_vae(prior=prior(1.0)), make_vae(prior=prior(9.0)), "prior.scale: 1.0 -> 9.0"),
        (nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2)), "0.p: 0.1 -> 0.2"),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.Tanh()), "class: Sequential of 1 -> Sequential of 2"),
        (Weighted(make_vae(), 10.0), Weighted(make_vae(), 1000.0), "weight: 10.0 -> 1000.0"),
        (Weighted(make_vae()), Weighted(make_vae(), flags=(True, "sum")), "flags: (True, 'mean') -> (True, 'sum')"),
        (functools.partial(dist.Laplace, scale=0.1), functools.partial(dist.Laplace, scale=0.3), "scale: 0.1 -> 0.3"),
        (make_vae(likelihood=with_default), make_vae(likelihood=Plain(0.2)), "likelihood: with_default -> Plain"),
    ]:
        (found,) = changed(one, other)
        assert found.endswith(text), found


def test_programs_under_handlers():
    def pair(scale):
        vae = make_vae()
        return NegativeELBO(poutine.scale(vae.model, scale=scale), vae.guide)

    assert any("scale: 0.5 -> 0.25" in text for text in changed(pair(0.5), pair(0.25)))
    assert changed(pair(0.5), pair(0.5)) == []


def test_values_of_tensors_names_with_an_underscore_and_the_mode_are_no_part_of_it():
    one, other = Weighted(make_vae()), Weighted(make_vae()).eval()
    other._calls, other.mask = 7, torch.zeros(3)
    assert not torch.equal(one.vae.encoder.heads.weight, other.vae.encoder.heads.weight)
    assert description(one) == description(other)


def test_only_what_was_saved_is_compared():
    now = description(make_vae(likelihood=NormalLikelihood()))
    assert differences({}, now) == []
    saved = {name: text for name, text in now.items() if name != "likelihood.mean"}
    assert differences(saved, now) == []
    assert differences(now, saved) == ["likelihood.mean: 'sigmoid' -> none"]


def test_a_part_that_holds_itself_and_a_long_list_end():
    part = Plain(1.0)
    part.again, part.numbers = part, list(range(10_000))
    assert description(part)["numbers"].startswith("10,000 values, CRC-32 ")
    assert "again" not in description(part)


def test_the_same_in_another_process():
    code = (
        "from pyro_vae import *; from pyro_vae.models.description import description;"
        "s = dict(event_shape=(1, 4, 4), latent_dim=3);"
        "v = VAE(MLPEncoder(hidden=(16,), **s), MLPDecoder(hidden=(16,), **s), likelihood=lambda o: o, **s);"
        "print(description(NegativeELBO(v, beta=LinearWarmup(7))))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = description(NegativeELBO(make_vae(likelihood=eval("lambda o: o")), beta=LinearWarmup(7)))
    assert shown.strip() == str(here)
