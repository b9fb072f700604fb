"""Pyro's examples with neural nets, and those of pyro.contrib, as cases; see benchmark_svi_examples.py."""

import contextlib
import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from benchmark_svi_examples import ENUMERATION, NETS, OTHER, SMALL_CASES, Case, Examples, Program, adam, batches
from pyro import optim
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceTMC_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, init_to_sample


def scheduled(lr: float, milestone: int) -> optim.PyroOptim:
    """Adam whose learning rate is multiplied by a factor at a step."""
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "milestones": [milestone], "gamma": 0.5}
    return optim.MultiStepLR(options)


def one_hot(size: int, classes: int) -> torch.Tensor:
    return torch.eye(classes)[torch.randint(0, classes, (size,))]


def vae(load: Examples) -> Program:
    model = load("vae/vae.py").VAE(z_dim=50, hidden_dim=400)
    return Program(model.model, model.guide, adam(1e-3), Trace_ELBO(), (torch.rand(256, 1, 28, 28),))


def vae_comparison(load: Examples) -> Program:
    model = load("vae/vae_comparison.py").PyroVAEImpl(Namespace(jit=False, batch_size=128), None, None)
    return Program(model.model, model.guide, adam(1e-3), Trace_ELBO(), (torch.rand(128, 784),))


def cvae(load: Examples) -> Program:
    net = load("cvae/baseline.py").BaselineNet(500, 500)
    model = load("cvae/cvae.py").CVAE(200, 500, 500, net)
    y = (torch.rand(128, 28, 28) < 0.3).to(torch.get_default_dtype())
    x = y.clone()
    x[:, :14] = -1  # a missing pixel
    return Program(model.model, model.guide, adam(1e-3), Trace_ELBO(), (x, y))


def ss_vae(load: Examples, labelled: bool, enumerate: str | None = "parallel", aux: bool = False) -> Program:
    model = load("vae/ss_vae_M2.py").SSVAE(z_dim=50, hidden_layers=[500], config_enum=enumerate, aux_loss_multiplier=46)
    batch = (torch.rand(200, 784), one_hot(200, 10))[: 2 if labelled else 1]
    optimizer = optim.Adam({"lr": 0.00042, "betas": (0.9, 0.999)})
    if aux:
        return Program(model.model_classify, model.guide_classify, optimizer, Trace_ELBO(), batch)
    guide = config_enumerate(model.guide, enumerate, expand=True)
    loss = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    return Program(model.model, guide, optimizer, loss, batch)


def scanvi(load: Examples, batch: Callable[[int], str]) -> Program:
    model = load("scanvi/scanvi.py").SCANVI(num_genes=200, num_labels=4, l_loc=2.0, l_scale=0.5, scale_factor=1 / 20_000)
    x, y = torch.poisson(torch.full((100, 200), 3.0)), one_hot(100, 4)
    scheduler = scheduled(0.005, 2)
    guide = config_enumerate(model.guide, "parallel", expand=True)
    loss = TraceEnum_ELBO(strict_enumeration_warning=False)

    def arguments(number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return x, y if batch(number) == "labelled" else None

    def after(number: int) -> None:
        if number % 40 == 39:  # an epoch
            scheduler.step()

    return Program(model.model, guide, scheduler, loss, arguments, after=after)


def cevae(load: Examples) -> Program:
    from pyro.contrib.cevae import CEVAE, PreWhitener, TraceCausalEffect_ELBO

    x, t, y, _ = load("contrib/cevae/synthetic.py").generate_data(Namespace(num_data=1000, feature_dim=5))
    model = CEVAE(feature_dim=5, latent_dim=20, hidden_dim=200, num_layers=3, num_samples=10)
    model.whiten = PreWhitener(x)
    x = model.whiten(x)
    optimizer = optim.ClippedAdam({"lr": 1e-3, "weight_decay": 1e-4, "lrd": 0.1 ** (1 / 500)})
    data = batches(100, x, t, y)
    return Program(model.model, model.guide, optimizer, TraceCausalEffect_ELBO(), data, {"size": 1000})


def air(load: Examples, baselines: bool = True, annealed: bool = False) -> Program:
    """Attend, infer, repeat, of two objects; the example's main passes another function of the prior at each step."""
    model = (
        load("air/air.py")
        .AIR(
            num_steps=2,
            x_size=50,
            window_size=28,
            z_what_size=50,
            rnn_hidden_size=256,
            encoder_net=[200],
            decoder_net=[200],
            predict_net=[200],
            bl_predict_net=[200],
            use_baselines=baselines,
            likelihood_sd=0.3,
        )
        .to(torch.get_default_dtype())
    )

    def prior(step: int, t: int) -> float:
        return 0.5 ** (t + 1) * math.exp(-step / 1000)

    def keywords(number: int) -> dict[str, Any]:
        return {"batch_size": 64, "z_pres_prior_p": partial(prior, number)}

    optimizer = optim.Adam(lambda name: {"lr": 1e-3 if "bl_" in name else 1e-4})
    constant = {"batch_size": 64, "z_pres_prior_p": partial(prior, 0)}
    data = (torch.rand(256, 50, 50),)
    return Program(model.model, model.guide, optimizer, TraceGraph_ELBO(), data, keywords if annealed else constant)


def dmm(load: Examples, variant: str = "") -> Program:
    import pyro.contrib.examples.polyphonic_data_loader as poly

    model = load("dmm.py").DMM(
        input_dim=88,
        z_dim=20,
        emission_dim=50,
        transition_dim=50,
        rnn_dim=100,
        num_iafs=1 if variant == "iaf" else 0,
        iaf_dim=50,
    )
    sequences = (torch.rand(20, 5, 88) < 0.1).to(torch.get_default_dtype())
    lengths = torch.tensor([5, 4, 3, 5, 2, 5, 5, 4, 3, 5] * 2)
    batch = poly.get_mini_batch(torch.arange(20), sequences, lengths)
    settings = {"lr": 3e-4, "betas": (0.96, 0.999), "clip_norm": 10.0, "lrd": 0.99996, "weight_decay": 2.0}

    def annealed(number: int) -> tuple[Any, ...]:
        return (*batch, min(1.0, 0.2 + 0.005 * number))

    guide, loss = model.guide, Trace_ELBO()
    if variant.startswith("tmc"):
        guide = config_enumerate(model.guide, default="parallel", num_samples=3, expand=False)
        loss = TraceTMC_ELBO() if variant == "tmc" else TraceEnum_ELBO()
    arguments = annealed if variant == "annealed" else (*batch, 1.0)
    return Program(model.model, guide, optim.ClippedAdam(settings), loss, arguments)


def deep_kernel(load: Examples) -> Program:
    """The data of each step are attributes of the model, by ``set_data``."""
    example = load("contrib/gp/sv-dkl.py")
    gp, x, y = example.gp, torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,))
    rbf = gp.kernels.RBF(input_dim=10, lengthscale=torch.ones(10))
    model = gp.models.VariationalSparseGP(
        X=x[:16],
        y=None,
        kernel=gp.kernels.Warping(rbf, iwarping_fn=example.CNN()),
        Xu=x[:16].clone(),
        likelihood=gp.likelihoods.MultiClass(num_classes=10),
        latent_shape=torch.Size([10]),
        num_data=60_000,
        whiten=True,
        jitter=2e-6,
    )
    model.set_data(x, y)

    def after(number: int) -> None:
        model.set_data(x.roll(number, 0), y.roll(number, 0))

    return Program(model.model, model.guide, adam(0.01), TraceMeanField_ELBO(), after=after)


def gaussian_process(load: Examples, name: str) -> Program:
    """The models of pyro.contrib.gp, as in Pyro's tutorial."""
    import pyro.contrib.gp as gp

    x = torch.linspace(0, 3, 20)
    y = x.sin() + 0.1 * torch.randn(20)
    kernel, noise, loss = gp.kernels.RBF(input_dim=1), torch.tensor(0.1), Trace_ELBO()
    if name == "regression":
        model = gp.models.GPRegression(x, y, kernel, noise=noise)
        kernel.lengthscale = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    elif name == "sparse":
        model = gp.models.SparseGPRegression(x, y, kernel, Xu=x[::3].clone(), noise=noise)
    elif name == "variational":
        labels, loss = (y > 0).to(x.dtype), TraceMeanField_ELBO()
        model = gp.models.VariationalGP(x, labels, kernel, likelihood=gp.likelihoods.Binary())
    else:
        kernel = gp.kernels.RBF(input_dim=2, lengthscale=torch.ones(2))
        z = torch.randn(8, 2)
        model = gp.models.GPLVM(gp.models.SparseGPRegression(z, torch.randn(4, 8), kernel, Xu=z[:4].clone(), noise=noise))
    return Program(model.model, model.guide, adam(0.01), loss)


def mue(load: Examples, name: str) -> Program:
    from pyro.contrib.mue import models

    example = load(f"contrib/mue/{name}.py")
    torch.set_default_dtype(torch.float64)  # as the example's main does
    data = example.generate_data(True, False, torch.device("cpu"))
    scheduler, sequences, size = scheduled(0.01, 50), torch.stack([data[0][0], data[2][0]]), torch.tensor(1.5)
    if name == "ProfileHMM":
        profile = models.ProfileHMM(5, data.alphabet_length)
        return Program(
            profile.model, profile.guide, scheduler, Trace_ELBO(), (sequences, size), after=lambda number: scheduler.step()
        )
    factor = models.FactorMuE(data.max_length, data.alphabet_length, 2, batch_size=2, latent_seq_length=5)

    def annealed(number: int) -> tuple[torch.Tensor, ...]:
        return sequences, size, torch.tensor(min(1.0, (number + 1) / 50))

    return Program(factor.model, factor.guide, scheduler, Trace_ELBO(), annealed, after=lambda number: scheduler.step())


def forecast(load: Examples, optimizer: type[optim.PyroOptim]) -> Program:
    """Model, guide and optimiser as the Forecaster of pyro.contrib.forecast makes them."""
    model = load("contrib/forecast/bart.py").Model()
    data, covariates = torch.randn(336, 2), torch.zeros(336, 0)
    guide = AutoNormal(model, init_loc_fn=init_to_sample, init_scale=0.1)
    guide(data, covariates)
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "lrd": 0.1 ** (1 / 500), "clip_norm": 10.0}
    return Program(model, guide, optimizer(settings), Trace_ELBO(), (data, covariates))


def time_series(load: Examples) -> Program:
    from pyro.contrib.timeseries import LinearlyCoupledMaternGP

    torch.set_default_dtype(torch.float64)  # as the example's main does
    process = LinearlyCoupledMaternGP(nu=1.5, obs_dim=3, num_gps=2, length_scale_init=1.5 * torch.ones(2)).double()

    def model(data: torch.Tensor) -> None:
        pyro.module("process", process)
        pyro.factor("log_prob", process.log_prob(data).sum() / len(data))

    optimizer = optim.Adam({"lr": 0.01, "betas": (0.5, 0.999), "amsgrad": True})
    return Program(model, lambda data: None, optimizer, Trace_ELBO(), (torch.randn(10, 3),))


def experiment_design(load: Examples) -> Program:
    """The posterior of ab_test.py for one outcome, as ``vi_eig`` fits it."""
    from pyro.contrib.oed.glmm import group_assignment_matrix, zero_mean_unit_obs_sd_lm

    model, guide = zero_mean_unit_obs_sd_lm(torch.tensor([10.0, 2.5]))
    design = torch.stack([group_assignment_matrix(torch.tensor([n, 100 - n])) for n in (25, 75)])
    conditioned = pyro.condition(model, data={"y": torch.randn(2, 100)})
    loss = TraceEnum_ELBO(strict_enumeration_warning=False).differentiable_loss
    return Program(conditioned, guide, adam(0.05), loss, (design.to(torch.get_default_dtype()),))


def epidemiology(load: Examples) -> Program:
    """What ``fit_svi`` of a compartmental model passes to SVI, which it makes itself."""
    from pyro.contrib.epidemiology import compartmental
    from pyro.contrib.epidemiology.models import SimpleSIRModel

    model = SimpleSIRModel(100, 3.0, torch.tensor([0.0, 1.0, 2.0, 4.0, 3.0, 2.0, 1.0]))
    with patch.object(compartmental, "SVI", side_effect=InterruptedError) as svi, contextlib.suppress(InterruptedError):
        model.fit_svi(num_samples=2, num_steps=100)
    return Program(*svi.call_args.args)


NET_CASES = (
    Case("vae", NETS, vae),
    Case("vae_comparison", NETS, vae_comparison),
    Case("cvae", NETS, cvae),
    Case("ss_vae-labelled", NETS, partial(ss_vae, labelled=True)),
    Case("ss_vae-labelled-sequential", NETS, partial(ss_vae, labelled=True, enumerate="sequential")),
    Case("ss_vae-labelled-sampled", NETS, partial(ss_vae, labelled=True, enumerate=None)),
    Case("ss_vae-unlabelled", NETS, partial(ss_vae, labelled=False)),
    Case("ss_vae-unlabelled-sequential", NETS, partial(ss_vae, labelled=False, enumerate="sequential")),
    Case("ss_vae-unlabelled-sampled", NETS, partial(ss_vae, labelled=False, enumerate=None), dynamic=True),
    Case("ss_vae-aux-labelled", NETS, partial(ss_vae, labelled=True, aux=True)),
    Case("ss_vae-aux-unlabelled", NETS, partial(ss_vae, labelled=False, aux=True)),
    Case("cevae", NETS, cevae),
    Case("scanvi-labelled", NETS, partial(scanvi, batch=lambda number: "labelled")),
    Case("scanvi-unlabelled", NETS, partial(scanvi, batch=lambda number: "unlabelled")),
    Case("scanvi-both", NETS, partial(scanvi, batch=lambda number: ("labelled", "unlabelled")[number % 2])),
    Case("air", NETS, air),
    Case("air-no-baselines", NETS, partial(air, baselines=False)),
    Case("air-annealed", NETS, partial(air, annealed=True), dynamic=True),
    Case("dmm", NETS, dmm),
    Case("dmm-annealed", NETS, partial(dmm, variant="annealed")),
    Case("dmm-iaf", NETS, partial(dmm, variant="iaf")),
    Case("dmm-tmc", NETS, partial(dmm, variant="tmc")),
    Case("dmm-tmcelbo", NETS, partial(dmm, variant="tmcelbo")),
    Case("sv-dkl", NETS, deep_kernel, dynamic=True),
)
CONTRIB_CASES = (
    *(Case(f"gp-{name}", OTHER, partial(gaussian_process, name=name)) for name in ("regression", "sparse", "variational")),
    Case("gp-latent-variables", OTHER, partial(gaussian_process, name="latent variables"), dynamic=True),
    Case("mue-ProfileHMM", OTHER, partial(mue, name="ProfileHMM")),
    Case("mue-FactorMuE", OTHER, partial(mue, name="FactorMuE")),
    Case("forecast-bart", OTHER, partial(forecast, optimizer=optim.ClippedAdam)),
    Case("forecast-bart-dct", OTHER, partial(forecast, optimizer=optim.DCTAdam)),
    Case("timeseries", OTHER, time_series),
    Case("oed-ab_test", OTHER, experiment_design),
    Case("epidemiology-sir", OTHER, epidemiology),
)
GROUPS = (OTHER, ENUMERATION, NETS)
CASES = {
    case.name: case for case in sorted((*SMALL_CASES, *CONTRIB_CASES, *NET_CASES), key=lambda case: GROUPS.index(case.group))
}
