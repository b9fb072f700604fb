#!/usr/bin/env python
"""Run folders to one self-contained HTML page: ``pyro-vae report``, from a checkout; --help lists the options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

from pyro_vae import cli


def main(argv: list[str] | None = None) -> int:
    return cli.report(sys.argv[1:] if argv is None else argv, prog=Path(__file__).name)


if __name__ == "__main__":
    sys.exit(main())
