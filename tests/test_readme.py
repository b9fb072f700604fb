"""Every Python block of the README and of the pages in docs, run in its order, each page by itself.

A block that begins with ```python is run. One that cannot be, since it needs what is not installed here, begins with ```py.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script

ROOT = Path(__file__).resolve().parents[1]

# Any warning fails it but the one that a barely trained model earns.
STRICT = "import warnings; warnings.simplefilter('error'); warnings.filterwarnings('ignore', 'log_marginal: .*heavy')\n"


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run(blocks, cwd):
    subprocess.run([sys.executable, "-c", STRICT + "\n".join(blocks)], cwd=cwd, check=True)


def test_python_blocks_of_the_readme(tmp_path):
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) >= 5
    script = [sys.executable, str(ROOT / "scripts" / "svi_mnist.py")]
    options = ["--dataset", "digits", "--epochs", "1", "--no-figures", "--out", "runs/demo"]
    subprocess.run(script + options, cwd=tmp_path, check=True)
    checks = """
assert draws["z"].shape == (16, 1, 20) and draws["x"].shape == (16, 1, 1, 8, 8)
assert reconstruction.shape == (5, 1, 8, 8) and replicates.shape == (100, 5, 1, 8, 8)
assert images.shape == (16, 1, 1, 8, 8)
"""
    run([*blocks, checks], tmp_path)


DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md")) if python_blocks(page)}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@pytest.mark.filterwarnings("ignore:log_marginal. .*heavy")  # which a barely trained model earns
def test_python_blocks_of_the_docs(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    for command in re.findall(r"^    python scripts/svi_mnist.py (--dataset digits .*)", text, flags=re.MULTILINE):
        assert load_script("svi_mnist").main([*command.split(), "--epochs", "2", "--no-figures"]) == 0
    # The page with all but its blocks blank, so that a traceback names the line of the page.
    parts = re.split(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = "".join(part if n % 2 else "\n" * (part.count("\n") + (n < len(parts) - 1)) for n, part in enumerate(parts))
    exec(compile(code, str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *DOCS.rglob("*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_and_pages_that_are_linked_exist(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


# The start of a line of the README that ends with a figure of ours, and where the scoreboard has it.
FIGURES = {
    "| `bernoulli-z20` |": ("A ELBO", "train -ELBO, epoch 40"),
    "| `bernoulli-z10` |": ("B", "train -ELBO, epoch 5"),
    "| `gaussian-z2` |": ("D gaussian-z2", "train loss"),
    "| `conv-gaussian` |": ("D conv-gaussian", "train loss"),
    "| autoencoder, 2 latents |": ("D autoencoder-z2", "test loss"),
    "| VAE, 2 latents |": ("D gaussian-z2", "test loss"),
    "| VAE, 2 latents, KL weight 100 |": ("D gaussian-z2-beta100", "test loss"),
    "| convolutional autoencoder, 64 latents |": ("D conv-autoencoder", "test loss"),
    "| convolutional VAE, 64 latents, KL weight 0.8 |": ("D conv-gaussian", "test loss"),
}


@pytest.mark.parametrize(("start", "place"), FIGURES.items(), ids=FIGURES)
def test_figures_of_the_readme_are_those_of_the_scoreboard_by_its_tolerances(start, place):
    """Both may be of other runs, on other processors."""
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(start)]
    board = json.loads((DOCS / "scoreboard.json").read_text())
    (row,) = [row for row in board["rows"] if (row["system"], row["quantity"]) == place]
    ours = float(re.findall(r"\d+\.\d+", line)[-1])
    assert abs(ours - row["ours"]) <= row["tolerance"]
    assert abs(ours - row["published"]) <= row["tolerance"]


@pytest.mark.parametrize("name", ["scoreboard", "benchmark-cpu"])
def test_pages_of_measurements_name_their_processor(name):
    board = json.loads((DOCS / f"{name}.json").read_text())
    assert (board.get("hardware") or board["processor"]) in (DOCS / f"{name}.md").read_text()


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((docs/[^)]+)\)|(?:^    )((?:pyro_vae|scripts)/[\w./]*)", text, flags=re.MULTILINE):
        assert (ROOT / (path[0] or path[1])).exists(), path
