"""The documentation: the model's graph, and the reference to every module. ``python tests/test_docs.py`` draws the graph."""

import re
from pathlib import Path

import pyro
import pytest
import torch

import pyro_vae
from pyro_vae import VAE, MLPDecoder, MLPEncoder

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PICTURE = DOCS / "images" / "model.svg"
MODULES = sorted(module.stem for module in (ROOT / "pyro_vae").glob("*.py") if module.stem != "__init__")


def model_graph():
    """A ``graphviz.Digraph``, whatever the nets."""
    shape = {"event_shape": (1, 8, 8), "hidden": (64,), "latent_dim": 2}
    vae = VAE(MLPEncoder(**shape), MLPDecoder(**shape), latent_dim=2, event_shape=(1, 8, 8))
    graph = pyro.render_model(vae.model, model_args=(torch.rand(5, 1, 8, 8),))
    graph.attr("graph", rankdir="LR", bgcolor="white")  # white: the lines must be seen on a dark page too
    return graph


def test_the_picture_of_the_model_shows_its_graph():
    source, drawn = model_graph().source, PICTURE.read_text()
    assert set(re.findall(r"^\s*(\w+) \[label", source, flags=re.MULTILINE)) == {"z", "x"}
    titles = set(re.findall(r"<title>(.*?)</title>", drawn)) - {"%3"}  # some versions' name of a graph without one
    assert titles == {"cluster_data", "z", "x", "z&#45;&gt;x"}
    assert "z -> x" in source
    assert "label=data" in source


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_in_the_reference_once(name):
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert pages.count(f".. automodule:: pyro_vae.{name}\n") == 1


def test_the_map_has_every_module_and_imports_run_upward_in_it():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map of the house")[2].partition("## Contracts")[0]
    order = re.findall(r"`(\w+)\.py`", "".join(line for line in table.splitlines(keepends=True) if line.startswith("|")))
    assert sorted(order) == MODULES
    for place, name in enumerate(order):
        code = (ROOT / "pyro_vae" / f"{name}.py").read_text()
        imported = set(re.findall(r"^from pyro_vae\.(\w+) import", code, flags=re.MULTILINE))
        imported |= {
            word
            for names in re.findall(r"^from pyro_vae import (.*)", code, flags=re.MULTILINE)
            for word in names.split(", ")
        }
        assert imported <= set(order[:place]), name


def test_one_version():
    assert f"\nversion: {pyro_vae.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{pyro_vae.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_page_is_in_the_table_of_contents():
    listed = {
        (page.parent / entry).resolve()
        for page in DOCS.rglob("index.md")
        for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(), flags=re.DOTALL)
        for entry in block.splitlines()
        if entry and not entry.startswith(":")
    }
    pages = {page.with_suffix("") for page in DOCS.rglob("*.md") if page != DOCS / "index.md"}
    assert pages == listed


if __name__ == "__main__":
    PICTURE.write_bytes(model_graph().pipe(format="svg"))
