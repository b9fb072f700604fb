"""Sphinx's configuration: ``sphinx-build -W -b html docs build/docs``. The pages are Markdown that GitHub shows as well."""

import sys
from typing import Any

import pyro_vae

project = "pyro_vae"
author = "The pyro_vae developers"
project_copyright = "The pyro_vae developers, Apache-2.0"
release = version = pyro_vae.__version__

# MathJax comes with the pages, so that their formulas need no network.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
exclude_patterns = ["build"]
smartquotes = False  # quotes and dots in messages are as they are typed

# Markdown as GitHub reads it: $maths$ and $$maths$$, anchors at headings.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The reference is the docstrings of what __all__ names, in the order of the source, which Sphinx keeps only without __all__.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True, "ignore-module-all": True, "no-value": True}
autodoc_inherit_docstrings = False  # or every forward() would repeat torch's
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a name described in a class and again by itself would be one too many
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = f"pyro_vae {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def not_public(app: Any, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    return True if what == "module" and module and name not in getattr(module, "__all__", ()) else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", not_public)
