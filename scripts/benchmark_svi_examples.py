"""Pyro's own examples as cases of benchmark_svi.py: what each passes to SVI, on small synthetic data.

The models and guides are read from the folder of Pyro's examples, at run time. Builders are here for models without nets,
and in benchmark_svi_nets.py for the others.
"""

import importlib.util
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import optim, poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, TraceTMC_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)

ENUMERATION, NETS, OTHER = "discrete latents, enumerated", "with neural nets", "continuous latents"
_NOT_THE_MODEL = ("seaborn", "visdom", "wget")  # imported by examples for their plots and downloads


@dataclass
class Program:
    """What an example passes to SVI.

    Args:
        model, guide, optim, loss: arguments of SVI.
        arguments: those of each step, the same; or a function of the number of the step.
        after: what the example does after each step, a function of its number.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    optim: Any
    loss: Any
    arguments: tuple[Any, ...] | Callable[[int], tuple[Any, ...]] = ()
    keywords: dict[str, Any] | Callable[[int], dict[str, Any]] | None = None
    after: Callable[[int], Any] | None = None

    @property
    def constant(self) -> bool:
        """Whether all steps have the same arguments, with nothing between them."""
        return not callable(self.arguments) and not callable(self.keywords) and self.after is None

    def step(self, svi: Any, number: int) -> Any:
        """A step of the example's loop."""
        arguments = self.arguments(number) if callable(self.arguments) else self.arguments
        keywords = self.keywords(number) if callable(self.keywords) else self.keywords or {}
        loss = svi.step(*arguments, **keywords)
        if self.after is not None:
            self.after(number)
        return loss


class Examples:
    """Modules of Pyro's examples, by their path in a folder of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, path: str) -> Any:
        """Import one; its folder goes first on the path, as if the example were started from there."""
        file = self.folder / path
        sys.path.insert(0, str(file.parent))
        missing = [name for name in _NOT_THE_MODEL if importlib.util.find_spec(name) is None]
        for name in missing:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__["Visdom"] = None  # from visdom import Visdom
        try:
            spec: Any = importlib.util.spec_from_file_location(f"example_{file.stem}", file)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        finally:
            for name in missing:
                del sys.modules[name]
        return module


@dataclass(frozen=True)
class Case:
    """A variant of an example.

    Args:
        name: of the variant.
        group: kind of model.
        build: makes it.
        dynamic: the operations of a step, or its arguments that are no tensors, differ from step to step.
    """

    name: str
    group: str
    build: Callable[[Examples], Program]
    dynamic: bool = False


def adam(lr: float) -> optim.PyroOptim:
    return optim.Adam({"lr": lr})


def batches(size: int, *tensors: torch.Tensor) -> Callable[[int], tuple[torch.Tensor, ...]]:
    """Minibatches in turn."""
    count = len(tensors[0]) // size
    return lambda number: tuple(t[size * (number % count) :][:size] for t in tensors)


def minipyro(load: Examples) -> Program:
    """The model of minipyro.py, which is local to its main function."""

    def model(data: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)

    def guide(data: torch.Tensor) -> None:
        loc = pyro.param("guide_loc", torch.tensor(0.0))
        scale = pyro.param("guide_scale_log", torch.tensor(0.0)).exp()
        pyro.sample("loc", dist.Normal(loc, scale))

    return Program(model, guide, adam(0.02), Trace_ELBO(), (torch.randn(100) + 3.0,))


def regression(load: Examples, path: str, local: bool = False) -> Program:
    pyro.settings.set(module_local_params=local)
    cls, size = load(path).Model, 1000
    x = torch.randn(size)
    with torch.no_grad():
        y = cls(size)(x)
    model = cls(size)
    return Program(model, AutoNormal(model), adam(0.01), Trace_ELBO(), batches(100, x, y))


def eight_schools(load: Examples) -> Program:
    example = load("eight_schools/svi.py")
    return Program(example.model, example.guide, adam(0.01), Trace_ELBO(), (example.data.to(torch.get_default_dtype()),))


def baseball(load: Examples, model: str, guide: Callable[..., Any]) -> Program:
    """By Monte Carlo in the example; the same models with an autoguide."""
    program = getattr(load("baseball.py"), model)
    at_bats = torch.full((18,), 45.0)
    hits = dist.Binomial(45, torch.full((18,), 0.27)).sample()
    return Program(program, guide(program), adam(0.01), Trace_ELBO(), (at_bats, hits))


def sparse_regression(load: Examples) -> Program:
    example = load("sparse_regression.py")
    x, y, _, _ = example.get_data(N=40, P=16, S=3, Q=2)
    hypers = {"expected_sparsity": 3.0, "alpha1": 3.0, "beta1": 1.0, "alpha2": 3.0, "beta2": 1.0, "alpha3": 1.0, "c": 1.0}
    guide = AutoDelta(example.model, init_loc_fn=example.init_loc_fn)
    return Program(example.model, guide, adam(0.05), Trace_ELBO(), (x, y, hypers))


def neutra(load: Examples, guide: str) -> Program:
    example = load("neutra.py")
    model = example.model
    guides: dict[str, Callable[[], Any]] = {
        "diagonal": lambda: AutoDiagonalNormal(model, init_scale=0.05),
        "iaf": lambda: AutoIAFNormal(model),
        "bnaf": lambda: AutoNormalizingFlow(model, partial(example.iterated, 1, example.block_autoregressive)),
    }
    return Program(model, guides[guide](), adam(0.01), Trace_ELBO(), (1.15, 1.0))


def autoname(load: Examples, name: str) -> Program:
    example = load(f"contrib/autoname/{name}.py")
    data = torch.tensor([0.0, 1.0, 2.0, 20.0, 30.0, 40.0])
    if name == "mixture":
        return Program(example.model, example.guide, adam(0.1), Trace_ELBO(), (data,), {"k": 2})
    if name == "scoping_mixture":
        guide = config_enumerate(example.guide)
        return Program(example.model, guide, adam(0.1), TraceEnum_ELBO(max_plate_nesting=1), (2, data))
    one = torch.tensor(1.0)
    nouns = {"concrete": 4 * one, "abstract": 6 * one}
    tree = {"foo": one, "bar": [0 * one, 1 * one, 2 * one], "baz": {"noun": nouns, "verb": 2 * one}}
    return Program(example.model, example.guide, adam(0.1), Trace_ELBO(), (tree,))


def sparse_gamma(load: Examples, guide: str) -> Program:
    example = load("sparse_gamma_def.py")
    model = example.SparseGammaDEF()
    model.image_size = 400
    x = torch.poisson(torch.full((100, model.image_size), 20.0))
    guides: dict[str, Callable[[], Any]] = {
        "custom": lambda: model.guide,
        "auto": lambda: AutoDiagonalNormal(model.model, init_loc_fn=example.init_to_feasible),
        "easy": lambda: example.MyEasyGuide(model.model),
    }
    rates = {"eta": 4.5, "t": 0.1} if guide == "custom" else {"eta": 0.2, "t": 0.05}
    after = (lambda number: example.clip_params()) if guide == "custom" else None
    return Program(model.model, guides[guide](), optim.AdagradRMSProp(rates), TraceMeanField_ELBO(), (x,), after=after)


def sampled_sum(model: Callable[..., Any]) -> Any:
    """Tensor Monte Carlo: three draws of each discrete latent in place of all its values."""

    def config(site: dict[str, Any]) -> dict[str, Any]:
        enumerated = site["infer"].get("enumerate") == "parallel"
        return {"num_samples": 3, "expand": False} if enumerated else {}

    return poutine.infer_config(model, config)


def hmm(load: Examples, number: str, batch_size: int | None = None, raftery: bool = False, tmc: bool = False) -> Program:
    example = load("hmm.py")
    example.tones_generator = None  # of model 5, made anew
    args = Namespace(hidden_dim=16, jit=False, nn_dim=48, nn_channels=2, raftery_parameterization=raftery)
    lengths = torch.tensor([5, 3, 4, 5, 2, 5])
    sequences = (torch.rand(6, 5, 7) < 0.4).to(torch.get_default_dtype())
    model = example.models[number]
    guide = AutoDelta(poutine.block(model, expose_fn=lambda site: site["name"].startswith("probs_")))
    nesting = 1 if number == "0" else 2
    loss = TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=number != "7")
    if tmc:
        model, loss = sampled_sum(model), TraceTMC_ELBO(max_plate_nesting=nesting)
    return Program(model, guide, adam(0.05), loss, (sequences, lengths), {"args": args, "batch_size": batch_size})


def lda(load: Examples) -> Program:
    example = load("lda.py")
    args = Namespace(num_topics=8, num_words=100, num_docs=100, num_words_per_doc=16, layer_sizes="100-100")
    data = example.model(args=args)[2]
    guide = partial(example.parametrized_guide, example.make_predictor(args))
    optimizer, loss = optim.ClippedAdam({"lr": 0.001}), TraceEnum_ELBO(max_plate_nesting=2)
    return Program(example.model, guide, optimizer, loss, (data,), {"args": args, "batch_size": 32})


def cjs(load: Examples, number: str, tmc: bool = False) -> Program:
    example = load("capture_recapture/cjs.py")

    def read(name: str) -> torch.Tensor:
        file = load.folder / "capture_recapture" / f"dipper_{name}.csv"
        return torch.tensor(example.np.genfromtxt(file, delimiter=",")).to(torch.get_default_dtype())

    history, sex = read("capture_history")[:, 1:6], read("sex")[:, 1] if number in "45" else None
    model = example.models[number]
    guide = AutoDiagonalNormal(poutine.block(model, expose_fn=lambda site: site["name"][:3] in ("phi", "rho")))
    loss = TraceEnum_ELBO(max_plate_nesting=1, num_particles=4, vectorize_particles=True)
    if tmc:
        model, loss = sampled_sum(model), TraceTMC_ELBO(max_plate_nesting=1)
    return Program(model, guide, adam(0.002), loss, (history, sex))


def toy_mixture(load: Examples) -> Program:
    example = load("toy_mixture_model_discrete_enumeration.py")
    prior, _, data = example.generate_data(100)
    return Program(example.model, example.guide, adam(0.01), TraceEnum_ELBO(max_plate_nesting=1), (prior, data, 100))


def mixed_hmm(load: Examples, group: str | None, individual: str | None) -> Program:
    example = load("mixed_hmm/model.py")
    observed = torch.rand(3, 2, 4, 3) * 0.8 + 0.1
    observed[0, 0, 1] = missing = 1e-6
    mask = torch.ones(3, 2, 4).bool()
    mask[1, 1, 3] = False
    config = {
        "MISSING": missing,
        "sizes": {"state": 3, "random": 2, "group": 2, "individual": 3, "timesteps": 4},
        "group": {"random": group, "fixed": None},
        "individual": {"random": individual, "fixed": None, "mask": torch.ones(3, 2).bool()},
        "timestep": {"random": None, "fixed": None, "mask": mask},
        "observations": {name: observed[..., place] for place, name in enumerate(("step", "angle", "omega"))},
    }
    model, guide = partial(example.model_generic, config), partial(example.guide_generic, config)
    return Program(model, guide, adam(0.05), TraceEnum_ELBO(max_plate_nesting=2))


SMALL_CASES = (
    Case("minipyro", OTHER, minipyro),
    Case("svi_torch", OTHER, partial(regression, path="svi_torch.py")),
    Case("svi_torch-local-params", OTHER, partial(regression, path="svi_torch.py", local=True)),
    Case("svi_horovod", OTHER, partial(regression, path="svi_horovod.py")),
    Case("svi_lightning", OTHER, partial(regression, path="svi_lightning.py")),
    Case("eight_schools", OTHER, eight_schools),
    Case("baseball-fully-pooled", OTHER, partial(baseball, model="fully_pooled", guide=AutoNormal)),
    Case("baseball-not-pooled", OTHER, partial(baseball, model="not_pooled", guide=AutoNormal)),
    Case("baseball-partially-pooled", OTHER, partial(baseball, model="partially_pooled", guide=AutoNormal)),
    Case("baseball-full-covariance", OTHER, partial(baseball, model="partially_pooled", guide=AutoMultivariateNormal)),
    Case("baseball-logit", OTHER, partial(baseball, model="partially_pooled_with_logit", guide=AutoNormal)),
    Case("sparse_regression", OTHER, sparse_regression),
    *(Case(f"neutra-{guide}", OTHER, partial(neutra, guide=guide)) for guide in ("diagonal", "iaf", "bnaf")),
    Case("autoname-mixture", OTHER, partial(autoname, name="mixture")),
    Case("autoname-tree_data", OTHER, partial(autoname, name="tree_data")),
    *(Case(f"sparse_gamma_def-{guide}", OTHER, partial(sparse_gamma, guide=guide)) for guide in ("custom", "auto", "easy")),
    Case("toy_mixture", ENUMERATION, toy_mixture),
    Case("autoname-scoping_mixture", ENUMERATION, partial(autoname, name="scoping_mixture")),
    *(Case(f"hmm-{number}", ENUMERATION, partial(hmm, number=number)) for number in "01234567"),
    Case("hmm-6-raftery", ENUMERATION, partial(hmm, number="6", raftery=True)),
    # The number of time steps is that of the longest sequence of a batch.
    *(Case(f"hmm-{n}-batch", ENUMERATION, partial(hmm, number=n, batch_size=3), dynamic=True) for n in "01234567"),
    Case("hmm-1-batch-tmc", ENUMERATION, partial(hmm, number="1", batch_size=3, tmc=True), dynamic=True),
    Case("lda", ENUMERATION, lda),
    *(Case(f"cjs-{number}", ENUMERATION, partial(cjs, number=number)) for number in "12345"),
    Case("cjs-1-tmc", ENUMERATION, partial(cjs, number="1", tmc=True)),
    Case("mixed_hmm", ENUMERATION, partial(mixed_hmm, group=None, individual=None)),
    Case("mixed_hmm-discrete-none", ENUMERATION, partial(mixed_hmm, group="discrete", individual=None)),
    *(
        Case(f"mixed_hmm-{kind}", ENUMERATION, partial(mixed_hmm, group=kind, individual=kind))
        for kind in ("discrete", "continuous")
    ),
)
