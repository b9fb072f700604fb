"""Sphinx's configuration: ``sphinx-build -W -b html docs build/docs``. The pages are Markdown, which GitHub shows as well."""

import pyro_vae

project = "pyro_vae"
author = "The pyro_vae developers"
project_copyright = "The pyro_vae developers, Apache-2.0"
release = version = pyro_vae.__version__

# MathJax comes with the pages, so that their formulas need no network.
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
exclude_patterns = ["build"]

# Markdown as GitHub reads it: $maths$ and $$maths$$, anchors at headings.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The reference is the docstrings, in the order of the source.
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
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
