#!/usr/bin/env python
"""The main job: ``pyro-vae train``, from a checkout.

It trains a VAE by stochastic variational inference, on MNIST or on your own data, evaluates it, and leaves a run folder;
--help lists the options. Several processes share the work under torchrun --standalone --nproc-per-node N
scripts/svi_mnist.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

from pyro_vae import cli


def main(argv: list[str] | None = None) -> int:
    return cli.train(sys.argv[1:] if argv is None else argv, prog=Path(__file__).name, again=sys.argv[0])


if __name__ == "__main__":
    sys.exit(main())
