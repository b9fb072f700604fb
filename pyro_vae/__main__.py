"""``python -m pyro_vae``."""

import sys

from pyro_vae.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m pyro_vae"))
