"""What must hold on two processes: run by test_processes.py under torchrun; writes what it has found as JSON."""

import copy
import json
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import rooms  # noqa: F401, for the tests that it takes from
import torch
from conftest import make_vae
from test_resume import OBJECTIVES, build, images

from pyro_vae import Checkpoints, Data, TrainingStoppedError, evaluate, fit, log_marginal
from pyro_vae import _processes as processes
from pyro_vae.training.distributed import DistributedStep
from pyro_vae.training.step import EagerStep

# Batch norm mixes the images of a share, and redrawn latents differ from process to process.
EXACT = [name for name in OBJECTIVES if name not in ("dropout and batch norm", "direct, redrawn")]


def noise_by_image(self, sample_shape=()):
    """Draws that depend on the image and on the number of the draw, not on who draws and in which order.

    Their slope is 10: a rounding of the encoder's output, which may differ with the size of a share, is one of the draws ten
    times as large at most.
    """
    shape = self._extended_shape(torch.Size(sample_shape))
    loc = self.loc.expand(shape)
    draws = torch.arange(shape[:-2].numel(), dtype=loc.dtype).reshape(*shape[:-2], 1, 1)
    return loc + self.scale * torch.sin(10 * loc.detach() + draws)


def norm_of_gradient(step, index):
    step.optimizer.zero_grad(set_to_none=True)
    step._backward(index)
    return torch.stack([p.grad.norm() for p in step.parameters if p.grad is not None]).norm().item()


def gradients():
    """Largest difference from one process's gradient on the whole batch, by objective and batch, relative to what is summed:
    the norms of the images' own gradients, averaged. It is more than the norm of the gradient where they cancel."""
    torch.distributions.Normal.rsample, before = noise_by_image, torch.distributions.Normal.rsample
    found = {}
    for name in EXACT:
        for dtype in (torch.float32, torch.float64):
            objective = build(name).to(dtype)
            data = Data(images(20)).to("cpu", dtype)
            pairs = []
            for kind, copied in ((EagerStep, copy.deepcopy(objective)), (DistributedStep, objective)):
                step = kind(copied, data, torch.optim.Adam([p for p in copied.parameters() if p.requires_grad], fused=True))
                pairs.append(step)
            for size in (8, 7, 1):  # shares of 4 and 4, of 4 and 3, of 1 and 0
                index = torch.arange(20)[-size:]
                terms = [{k: v.item() for k, v in step._backward(index).items()} for step in pairs]
                one, two = ([p.grad for p in step.parameters] for step in pairs)
                assert [g is None for g in one] == [g is None for g in two]
                worst = max((a - b).norm().item() for a, b in zip(one, two, strict=True) if a is not None)
                worst /= sum(norm_of_gradient(pairs[0], index[i : i + 1]) for i in range(size)) / size
                loss = abs(terms[0]["loss"] / terms[1]["loss"] - 1)
                found[f"{name}, {str(dtype)[6:]}, batch of {size}"] = max(worst, loss)
                for step in pairs:
                    step.optimizer.zero_grad(set_to_none=True)
    torch.distributions.Normal.rsample = before
    return found


def training(folder):
    """Weights of all processes after training; after the same, stopped by the second process alone and resumed."""
    options = {"epochs": 3, "batch_size": 16, "lr": 0.01, "seed": 3, "verbose": False, "test": images(31)}
    data = Data(images(), binarization="dynamic")
    straight = build("elbo")
    noises = []
    history = fit(straight, data, **options, on_record=lambda record: noises.append(torch.get_rng_state()))
    checkpoints = Checkpoints(folder)
    asked = iter(range(1, 100))
    stop = (lambda: next(asked) >= 7) if processes.rank() == 1 else (lambda: False)
    stopped = None
    try:
        fit(build("elbo"), data, **options, checkpoints=checkpoints, stop=stop)
    except TrainingStoppedError as error:
        stopped = error.step
    resumed = build("elbo")
    fit(resumed, data, **options, checkpoints=checkpoints, resume=checkpoints.load())
    flat = [torch.cat([p.detach().flatten() for p in o.parameters()]) for o in (straight, resumed)]
    everywhere = processes.gather_objects([w.tolist() for w in flat])
    return {
        "stopped": processes.gather_objects(stopped),
        "equal": all(w == everywhere[0][0] for rank in everywhere for w in rank),
        "losses": processes.gather_objects([record.train["loss"] for record in history]),
        "noises differ": not torch.equal(*processes.gather_objects(noises[-1])),
    }


def whole_sets():
    """Whole-set figures on two processes, in float64: a KL is a sum of terms that nearly cancel."""
    autoencoder = build("autoencoder").double()
    vae = make_vae().double()

    def model(x):  # z ~ N(0, 1), x | z ~ N(z, 1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.linspace(-3, 3, 7).double()
    history = fit(autoencoder, images(), epochs=1, test=images(31), verbose=False)
    data = Data(images(31)).to("cpu", torch.float64)
    (batch,) = data.batch(torch.arange(31))
    with torch.no_grad():
        test_loss = autoencoder.eval()(batch)["loss"].item()
        kl = torch.distributions.kl_divergence(vae.encode(batch), vae.prior()).mean().item()
    return {
        "log_marginal": [
            log_marginal(model, guide, x, num_samples=50).value.tolist(),
            dist.Normal(torch.zeros_like(x), 2**0.5).log_prob(x).tolist(),
        ],
        "test loss": [history[0].test["loss"], test_loss],
        "kl": [evaluate(vae, data)["kl"].value, kl],
        "evaluate": processes.gather_objects([e.value for e in evaluate(vae, data, importance_samples=30).values()]),
    }


def errors():
    def wrong():
        raise ValueError("only the first process knows")

    try:
        processes.on_rank_zero(wrong)
    except ValueError as error:
        return processes.gather_objects(str(error))


if __name__ == "__main__":
    with processes.group():
        results = {
            "processes": processes.world_size(),
            "gradients": gradients(),
            "training": training(Path(sys.argv[1]) / "checkpoints"),
            "sets": whole_sets(),
            "errors": errors(),
        }
        if processes.rank() == 0:
            Path(sys.argv[1], "found.json").write_text(json.dumps(results))
