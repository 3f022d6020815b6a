"""Sphinx: `make docs` builds the site from these pages and the docstrings, without a network."""

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import fusedconvbn

project = "fusedconvbn"
author = "fusedconvbn developers"
copyright = author
version = release = fusedconvbn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["requirements.txt"]

# Links between pages are written for a reader of the repository, too: `page.md#heading`.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

default_role = "code"
highlight_language = "none"
autodoc_member_order = "bysource"
napoleon_use_param = False  # several arguments share a line
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
# There is no network to look these up in.
nitpick_ignore_regex = [(r"py:.*", r"(torch|nn|collections|pathlib|typing|Path|Tensor)\b.*")]

html_theme = "furo"
html_title = f"fusedconvbn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = "$ "


def _within_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns links to two files beside docs/ into links to the pages that include them."""
    for name in ("CHANGELOG", "CONTRIBUTING"):
        source[0] = source[0].replace(f"](../{name}.md", f"]({name.lower()}.md")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _within_the_site)
