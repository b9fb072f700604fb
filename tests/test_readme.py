"""Every Python block of the README and of the pages in docs, run in its order in one process per page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Any warning fails a page but the one that a barely trained model earns.
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
def test_python_blocks_of_the_docs(tmp_path, page):
    run(python_blocks(page), tmp_path)


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *DOCS.rglob("*.md")], ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_and_pages_that_are_linked_exist(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((docs/[^)]+)\)|(?:^    )((?:pyro_vae|scripts)/[\w./]*)", text, flags=re.MULTILINE):
        assert (ROOT / (path[0] or path[1])).exists(), path
