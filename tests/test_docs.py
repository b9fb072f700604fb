"""The documentation: the model's graph, and the reference to every module. ``python tests/test_docs.py`` draws the graph."""

import ast
import functools
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
PACKAGE = ROOT / "pyro_vae"
FILES = {
    ".".join(("pyro_vae", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in ("__init__", "__main__", "_public")
}
ROOMS = (
    "data",
    "engine",
    "models",
    "estimates",
    "training",
    "inference",
    "analysis",
    "runs",
    "report",
)  # imports run upward


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


@pytest.mark.parametrize("name", FILES)
def test_every_module_is_in_the_reference_once(name):
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert pages.count(f".. automodule:: {name}\n") == 1


def imports(name):
    """The package's modules that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(FILES[name].read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else node.module)
    return found & FILES.keys()


def room(name):
    """Its place in the order of the rooms; modules outside of them stand above (_checks, ...) or below (cli, sklearn)."""
    parts = name.split(".")
    if len(parts) == 3:
        return ROOMS.index(parts[1])
    return -1 if parts[1].startswith("_") else len(ROOMS)


def test_the_map_has_every_module():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map of the code")[2].partition("Data flow.")[0]
    rows = {line.split("`")[1].rstrip("/"): line for line in table.splitlines() if line.startswith("| `")}
    assert list(rows)[1:-1] == list(ROOMS)
    for name in FILES:
        parts = name.split(".")
        row = rows[parts[1]] if len(parts) == 3 else "".join(rows.values())
        assert f"`{parts[-1]}" in row, name


def test_imports_run_upward_on_eight_levels_at_most():
    @functools.cache
    def level(name):
        return 1 + max((level(other) for other in imports(name)), default=0)  # a circle would never end

    for name in FILES:
        assert all(room(other) <= room(name) for other in imports(name)), name
    assert max(map(level, FILES)) <= 8


def test_no_file_past_400_lines_and_no_function_past_80():
    for name, path in FILES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                lines = node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)
                assert lines <= 80, f"{name}.{node.name}"


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
