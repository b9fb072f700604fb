"""Kills training by SIGKILL at random moments, writes of checkpoints included, resumes it, and compares the weights.

    python tests/kill_runs.py [--runs 50] [--script] [--seed 0]

Each run is killed a few times before it may end. Without --script, fit in a forked process, a checkpoint after each step;
with it, scripts/svi_mnist.py as a user starts it.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pyro_vae import VAE, Checkpoints, Data, MLPDecoder, MLPEncoder, NegativeELBO, fit
from pyro_vae.checkpoint import read_tensors, write_tensors

SCRIPT = Path(__file__).parents[1] / "scripts" / "svi_mnist.py"
OPTIONS = ["--dataset", "digits", "--epochs", "60", "--seed", "3", "--checkpoint-every", "7", "--no-figures"]


def train(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    shape = {"event_shape": (1, 8, 8), "latent_dim": 5}
    vae = VAE(MLPEncoder(hidden=(64,), **shape), MLPDecoder(hidden=(64,), **shape), **shape)
    x = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    checkpoints = Checkpoints(folder / "checkpoints")
    options = {"epochs": 8, "batch_size": 32, "compile": False, "verbose": False}
    data = Data(x, binarization="dynamic")
    fit(
        NegativeELBO(vae),
        data,
        test=x[:50],
        checkpoints=checkpoints,
        checkpoint_every=1,
        resume=checkpoints.load(),
        **options,
    )
    write_tensors(folder / "weights.pt", vae.state_dict())


def forked(folder: Path) -> int:
    """A process that trains; it may be killed."""
    if (process := os.fork()) == 0:
        try:
            train(folder)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return process


def started(folder: Path) -> int:
    run = folder / "run"
    begun = (run / "config.json").is_file()
    place = ["--resume", run, "--no-figures"] if begun else ["--out", run, *OPTIONS]
    return subprocess.Popen([sys.executable, SCRIPT, *place], stdout=subprocess.DEVNULL, stderr=sys.stderr).pid


def attempt(start, folder: Path, seconds: float | None) -> bool:
    """Start it, and kill it after so many seconds unless it has ended; whether it has ended, well."""
    process = start(folder)
    ends = time.monotonic() + (seconds or 1e9)
    while time.monotonic() < ends:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit(f"exit code {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3, help="of each run")
    parser.add_argument("--script", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, weights = (started, "run/checkpoints/weights.pt") if args.script else (forked, "weights.pt")
    moments = random.Random(args.seed)
    equal = kills = torn = 0
    with tempfile.TemporaryDirectory() as place:
        if not args.script:
            train(Path(place))  # what is imported here, no child has to import
        straight = Path(place) / "straight"
        straight.mkdir()
        begin = time.monotonic()
        attempt(start, straight, None)
        whole = time.monotonic() - begin
        expected = read_tensors(straight / weights)
        for number in range(args.runs):
            folder = Path(place) / str(number)
            folder.mkdir()
            for _ in range(args.kills):
                if attempt(start, folder, moments.uniform(0, 0.8 * whole)):
                    break
                kills += 1
                torn += bool(list(folder.rglob("*.tmp")))
            else:
                attempt(start, folder, None)
            found = read_tensors(folder / weights)
            equal += all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    print(f"{equal} of {args.runs} runs ended bit-identical after {kills} kills, {torn} of them in the middle of a write")
    sys.exit(equal != args.runs)


if __name__ == "__main__":
    main()
