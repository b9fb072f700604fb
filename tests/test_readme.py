"""Every Python block of the README, run in its order in one process."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_python_blocks(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 5
    script = [sys.executable, str(ROOT / "scripts" / "svi_mnist.py")]
    options = ["--dataset", "digits", "--epochs", "1", "--no-figures", "--out", "runs/demo"]
    subprocess.run(script + options, cwd=tmp_path, check=True)
    checks = """
assert draws["z"].shape == (16, 1, 20) and draws["x"].shape == (16, 1, 1, 8, 8)
assert reconstruction.shape == (5, 1, 8, 8) and replicates.shape == (100, 5, 1, 8, 8)
assert images.shape == (16, 1, 1, 8, 8)
"""
    # Any warning fails it but the one that a barely trained model earns.
    strict = "import warnings; warnings.simplefilter('error'); warnings.filterwarnings('ignore', 'log_marginal: .*heavy')\n"
    subprocess.run([sys.executable, "-c", strict + "\n".join(blocks) + checks], cwd=tmp_path, check=True)


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((docs/[^)]+)\)|(?:^    )((?:pyro_vae|scripts)/[\w./]*)", text, flags=re.MULTILINE):
        assert (ROOT / (path[0] or path[1])).exists(), path
