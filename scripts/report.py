#!/usr/bin/env python
"""Make one self-contained HTML file of run folders: what was run, figures with their errors, pictures, what to beware of,
and a decoder to play with in the page; of several runs, a comparison that ranks only what can be compared.

The file needs no network and no server. One that is there already is replaced: it holds nothing but what the runs do.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package this script belongs to, installed or not

from pyro_vae import CheckpointError
from pyro_vae.report import write_report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, as svi_mnist.py leaves it")
    where = "file to write (default: RUN/report.html for one run, report.html here for several)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    parser.add_argument("--title", help="of the page (default: the run's name, or the number of runs)")
    args = parser.parse_args(argv)
    try:
        path = write_report(args.runs, args.out, title=args.title)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
