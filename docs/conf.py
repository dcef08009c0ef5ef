"""The documentation site: `make docs` builds it from the Markdown files of the repository.

The source folder is the whole repository, because pages link to the README and to the committed
results.
"""

import re

import robsparse

project = "robsparse"
author = copyright = "The robsparse authors"
release = version = robsparse.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxarg.ext"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "results/reference/*/README.md"]
exclude_patterns = [".*"]
html_extra_path = ["site"]  # the page at the root of the site, which leads to docs/index.html

myst_enable_extensions = ["html_image"]  # <img>, which has a width
myst_heading_anchors = 4  # as a code host makes them: pages link to them
smartquotes = False  # quotation marks and dashes of commands stay as they are
default_role = "code"  # `word` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
nitpick_ignore_regex = [("py:.*", r"(?!robsparse).*")]  # types of other libraries

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = "robsparse"
html_show_sourcelink = False


def mark(app, what, *rest):
    """Make RST of the lines of a docstring: |x| is a length, and a class lists `name: text`."""
    lines = rest[-1]
    lines[:] = [re.sub(r"(?<!`)\|(\w+)\|", r"\\|\1\\|", line) for line in lines]
    if what == "class":
        fields = (re.match(r"(\w+(?:, \w+)*)(: .*)", line) for line in lines)
        pairs = zip(lines, fields, strict=True)
        lines[:] = [f":ivar {f[1].replace(', ', ',')}{f[2]}" if f else line for line, f in pairs]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", mark)
