"""The site: `make docs` builds it into build/site from the pages that also read well in a checkout.

Sources are the whole repository's pages, so that links between docs/, experiments/ and benchmarks/ hold in both places.
"""

from sphinx.ext.napoleon import Config, GoogleDocstring

import gemma4_tpu

project = "gemma4-tpu"
copyright = "the authors of gemma4-tpu"
version = release = gemma4_tpu.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/site/index"
include_patterns = [
    "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/concepts/*.md", "docs/site/*.md", "benchmarks/*.md",
    "experiments/**.md", "examples/README.md",
]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "multirun", "outputs", "tests"]

myst_heading_anchors = 4
# Pages link to folders, which are none on the site (dead links: tests/house/test_links.py), and to unlisted pages.
suppress_warnings = ["myst.header", "myst.xref_missing", "toc.not_included"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "code"  # docstrings write `names` as Markdown does
html_theme = "furo"
html_title = "gemma4-tpu"
html_copy_source = False


def setup(app):
    """Reads docstrings in Google's form, but for fields: Napoleon takes what stands before a colon there as a type."""

    def parsed(app, what, name, obj, options, lines):
        if what != "attribute":
            lines[:] = GoogleDocstring(lines, Config(), app, what, name, obj, options).lines()  # type: ignore[arg-type]

    app.connect("autodoc-process-docstring", parsed)
