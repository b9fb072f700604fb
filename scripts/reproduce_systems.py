"""The reference systems of reproduce.py: the command of each, the published results, and where to find ours."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyro_vae._files import read_json
from pyro_vae.runs.folder import read_records

Table = dict[int, tuple[float, float]]  # by epoch: what was published, and the tolerance


@dataclass(frozen=True)
class Quantity:
    """What was published, if it was, how near ours must come, in its units, and where ours is found.

    Args:
        name: of the quantity.
        published: None: nothing is compared.
        tolerance: None: nothing is compared.
        run: folder of the run, below that of all.
        keys: to ours in its metrics.json; to a term of the training average where there is an epoch.
        epoch: of a line of metrics.jsonl, which is what the references print; it has no standard error of its own.
    """

    name: str
    published: float | None
    tolerance: float | None
    run: str
    keys: tuple[str, ...]
    epoch: int | None = None

    def read(self, out: Path) -> tuple[float, float | None]:
        """Ours, and its standard error where it has one."""
        *above, last = self.keys
        if self.epoch is not None:
            records = read_records(out / self.run / "metrics.jsonl")
            return next(record.train[last] for record in records if record.epoch == self.epoch), None
        found = functools.reduce(operator.getitem, above, read_json(out / self.run / "metrics.json"))
        if isinstance(found[last], dict):
            return found[last]["value"], found[last]["standard_error"]
        return found[last], found.get(f"{last}_error")


@dataclass(frozen=True)
class System:
    """One command, its folder (--out), and its results."""

    name: str
    command: Sequence[str]
    out: str
    quantities: Sequence[Quantity]

    @property
    def key(self) -> str:
        return self.name.replace(" ", "-")


# Results of the first epochs change fast and depend on the initial parameters; the last one is decisive.
ELBO: Table = {1: (165.64, 3.0), 2: (121.76, 1.0), 3: (114.68, 0.5), 5: (109.86, 0.5)}
ELBO |= {10: (106.19, 0.35), 20: (103.96, 0.35), 30: (102.94, 0.35), 40: (102.28, 0.35)}
RECONSTRUCTION: Table = {1: (150.72, 3.0), 10: (81.07, 0.5), 20: (78.59, 0.5), 40: (76.82, 0.5)}
KL: Table = {1: (14.92, 1.0), 10: (25.12, 0.5), 20: (25.36, 0.5), 40: (25.46, 0.5)}
DIRECT: Table = {1: (186.81, 10.0), 2: (151.57, 3.0), 5: (144.54, 0.6), 10: (143.16, 0.6)}
DIRECT |= {20: (142.41, 0.6), 30: (142.17, 0.6), 40: (142.09, 0.6)}
Z10: Table = {1: (147.484892, 5.0), 2: (122.673746, 1.5), 3: (119.444152, 0.6), 4: (118.063614, 0.5), 5: (117.056634, 0.5)}
LOSSES = {  # of system D, train and test; the tolerance is a share of the figure
    "autoencoder-z2": (0.029244, 0.029576, 0.05),
    "gaussian-z2": (36.6588, 36.8696, 0.03),
    "gaussian-z2-beta100": (57.9027, 58.1640, 0.03),
    "conv-autoencoder": (0.0041889, 0.0040063, 0.15),
    "conv-gaussian": (44.0664, 43.6685, 0.03),
}
QUICK_EPOCHS, QUICK_STEPS = 2, 250


def systems(out: Path, data: Sequence[str], *, quick: bool) -> list[System]:
    """All of them, in their order.

    Args:
        out: folder of all runs.
        data: options that say where the data are.
        quick: short runs, beside what was published for so many epochs, where anything was.
    """
    short = ["--epochs", str(QUICK_EPOCHS)] if quick else []
    bare = [*short, "--importance-samples", "0", "--no-figures"] if quick else []

    def epochs(run: str, name: str, key: str, table: Table) -> list[Quantity]:
        kept = {epoch: pair for epoch, pair in table.items() if epoch <= QUICK_EPOCHS or not quick}
        return [Quantity(f"train {name}, epoch {epoch}", *pair, run, (key,), epoch) for epoch, pair in kept.items()]

    def tests(run: str, names: dict[str, str]) -> list[Quantity]:
        return [Quantity(f"test {name}", None, None, run, ("test", key)) for name, key in names.items()]

    def svi(name: str, run: str, preset: str, quantities: list[Quantity]) -> System:
        bounds = {} if quick else {"-ELBO": "neg_elbo", "log p, importance sampling": "log_marginal"}
        command = ["svi_mnist.py", "--preset", preset, *bare, *data]
        return System(name, command, run, [*quantities, *tests(run, bounds)])

    training = [*epochs("A", "-ELBO", "neg_elbo", ELBO), *epochs("A", "rec", "reconstruction", RECONSTRUCTION)]
    quick_direct = ["--encoder-epochs", "1", "--images", "100", "--importance-samples", "100", "--no-figures"]
    direct = ["direct_mnist.py", "--elbo-run", str(out / "A"), *short, *(quick_direct if quick else []), *data]
    return [
        svi("A ELBO", "A", "bernoulli-z20", [*training, *epochs("A", "kl", "kl", KL)]),
        System("A direct", direct, "A-direct", epochs("A-direct", "-log p, 64 draws", "loss", DIRECT)),
        svi("B", "B", "bernoulli-z10", epochs("B", "-ELBO", "neg_elbo", Z10)),
        svi("C", "C", "gaussian-z4", tests("C", {"squared error": "squared_error", "kl": "kl"})),
        *(quick_autoencoders(data) if quick else autoencoders(data)),
        toy(quick=quick),
    ]


def autoencoders(data: Sequence[str]) -> list[System]:
    """System D, a system for each of its runs."""
    result = []
    for name, (train, test, share) in LOSSES.items():
        # The last one of them finds the others done and makes the pictures of all.
        runs = list(LOSSES) if name == "conv-gaussian" else [name, "--no-figures"]
        losses = [("train loss", train, "train_loss"), ("test loss", test, "test_loss")]
        quantities = [Quantity(what, value, share * value, f"D/{name}", (key,)) for what, value, key in losses]
        result.append(System(f"D {name}", ["autoencoders_mnist.py", "--runs", *runs, *data], "D", quantities))
    return result


def quick_autoencoders(data: Sequence[str]) -> list[System]:
    """System D in one process; nothing was published for so short a run."""
    quantities = [
        Quantity(f"{name}: {part} loss, step {QUICK_STEPS}", None, None, f"D/{name}", (f"{part}_loss",))
        for name in LOSSES
        for part in ("train", "test")
    ]
    return [System("D", ["autoencoders_mnist.py", "--steps", str(QUICK_STEPS), "--no-figures", *data], "D", quantities)]


def toy(*, quick: bool) -> System:
    """System E, with known truth."""
    entropy = Quantity("entropy of the truth", 2.694036, 1e-6, "E", ("entropy",))
    if quick:
        kl = Quantity("KL(true ‖ VAE), epoch 3", None, None, "E", ("table", "VAE", "kl"))
        return System("E toy", ["gaussian2d.py", "--epochs", "3", "--no-figures"], "E", [kl, entropy])
    direct = ("table", "direct fit, 256 redrawn", "kl")
    quantities = [
        Quantity("KL(true ‖ VAE)", 0.0, 0.01, "E", ("table", "VAE", "kl")),
        Quantity("KL(true ‖ direct fit, redrawn)", None, None, "E", direct),
        Quantity("VAE: log p, importance sampling", None, None, "E", ("table", "VAE", "log_p")),
        entropy,
    ]
    return System("E toy", ["gaussian2d.py"], "E", quantities)
