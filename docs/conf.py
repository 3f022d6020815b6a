"""Sphinx: `make docs` builds the site from these pages and the docstrings, without a network."""

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

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

default_role = "code"
highlight_language = "none"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_param = False  # several arguments share a line
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
# Names of other libraries, for which there is no network to look them up, and private ones.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|nn|collections|pathlib|typing|Path|Tensor)\b.*"),
    (r"py:.*", r"fusedconvbn\..*\._\w+"),
    (r"py:.*", r"(.*\.)?[MPR]"),  # variables for types
]

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"fusedconvbn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

copybutton_exclude = ".linenos, .gp, .go"  # prompts and what was printed


def _within_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns links to two files beside docs/ into links to the pages that include them."""
    for name in ("CHANGELOG", "CONTRIBUTING"):
        source[0] = source[0].replace(f"](../{name}.md", f"]({name.lower()}.md")


def _spatial(app: Sphinx, what: str, name: str, obj: object, options: object, *signature: str):
    """Writes out TorchScript's type of an int or a list of them, which is None at run time."""
    arguments, returned = signature
    if name == "fusedconvbn.conv_bn":
        return arguments.replace(": None = None", ": int | list[int] | None = None"), returned


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", _within_the_site)
    app.connect("autodoc-process-signature", _spatial)
    # As browsers know it: MathJax would come from a network.
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
