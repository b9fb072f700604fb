"""Kills training by SIGKILL at random moments, writes of checkpoints included, resumes it, and compares the weights.

    python tests/kill_runs.py [--runs 50] [--script | --torchrun] [--seed 0]

Each run is killed a few times before it may end. Without --script, fit in a forked process, a checkpoint after each step;
with it, scripts/svi_mnist.py as a user starts it. With --torchrun, one of two processes is, and torchrun restarts both.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pyro_vae import VAE, Checkpoints, Data, MLPDecoder, MLPEncoder, NegativeELBO, fit
from pyro_vae._files import read_tensors, write_tensors

tqdm.set_lock(threading.RLock())  # the default is shared by forks, of which one that is killed may hold it for ever
tqdm.monitor_interval = 0

SCRIPT = Path(__file__).parents[1] / "scripts" / "svi_mnist.py"
OPTIONS = ["--dataset", "digits", "--epochs", "60", "--seed", "3", "--checkpoint-every", "7", "--no-figures"]


def train(folder: Path) -> None:
    torch.set_num_threads(1)  # this is a fork, which OpenMP's threads do not survive
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


def under_torchrun(folder: Path) -> int:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "9",
    ]
    command = [*torchrun, SCRIPT, "--out", folder / "run", *OPTIONS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid


def ended(process: int, seconds: float | None = None) -> bool:
    """Wait for its end, so many seconds at most; whether it has ended, well."""
    ends = time.monotonic() + (seconds or 1e9)
    while time.monotonic() < ends:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            if os.waitstatus_to_exitcode(status) != 0:
                raise SystemExit(f"exit code {os.waitstatus_to_exitcode(status)}")
            return True
        time.sleep(0.0005)
    return False


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def kill_worker(torchrun: int, moments: random.Random) -> bool:
    """Kill one of its processes; whether it had any."""
    workers = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    if workers:
        os.kill(int(moments.choice(workers)), signal.SIGKILL)
    return bool(workers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=3, help="of each run")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--script", action="store_true")
    how.add_argument("--torchrun", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = under_torchrun if args.torchrun else started if args.script else forked
    weights = "weights.pt" if start is forked else "run/checkpoints/weights.pt"
    moments = random.Random(args.seed)
    equal = kills = torn = 0
    with tempfile.TemporaryDirectory() as place:
        if start is forked:
            train(Path(place))  # what is imported here, no child has to import
        straight = Path(place) / "straight"
        straight.mkdir()
        begin = time.monotonic()
        ended(start(straight))
        whole = time.monotonic() - begin
        expected = read_tensors(straight / weights)
        for number in range(args.runs):
            folder = Path(place) / str(number)
            folder.mkdir()
            process = start(folder)
            for _ in range(args.kills):
                if ended(process, moments.uniform(0, 0.8 * whole)):
                    break
                if start is under_torchrun:
                    kills += kill_worker(process, moments)
                    torn += bool(list(folder.rglob("*.tmp")))
                    continue
                kill(process)
                kills += 1
                torn += bool(list(folder.rglob("*.tmp")))
                process = start(folder)
            else:
                ended(process)
            found = read_tensors(folder / weights)
            equal += all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    print(f"{equal} of {args.runs} runs ended bit-identical after {kills} kills, {torn} of them in the middle of a write")
    sys.exit(equal != args.runs)


if __name__ == "__main__":
    main()
