"""How Sphinx makes the documentation's site of the Markdown files here: `make docs`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util import logging

import ummunotify

project = "ummunotify"
version = release = ummunotify.__version__
html_title = f"ummunotify {version}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
html_theme = "furo"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"sidebar_hide_name": False}

smartquotes = False  # they would make a dash of the hyphens of an option
myst_heading_anchors = 4  # as forges make them: #what-is-guaranteed
suppress_warnings = ["misc.highlighting_failure"]  # pseudocode, such as `a = mmap(ONE_PAGE);  # b == a`
default_role = "literal"  # a name between single backticks, in docstrings
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

_ROOT = Path(__file__).resolve().parents[1]


class ManualPage(Directive):
    """A page of the manual, as mandoc renders it: the same source as for `man`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        source = _ROOT / "man" / self.arguments[0]
        command = ["mandoc", "-T", "html", "-O", "fragment", source]
        html = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        self.state.document.settings.record_dependencies.add(str(source))
        # A page has one level of titles more above it, and names that other pages have too.
        html = re.sub(r"<(/?)h1\b", r"<\1h3", re.sub(r' id="[^"]*"', "", html))
        html = re.sub(r'<a class="permalink" href="[^"]*">(.*?)</a>', r"\1", html, flags=re.DOTALL)
        return [nodes.raw("", f'<div class="manual-page">{html}</div>', format="html")]


def _link_files(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to files outside this folder, which a forge shows, become downloads on the site."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+)\)", r"](path:\1)", source[0])


def _see_that_fields_are_described(
    app: Sphinx, what: str, name: str, _: object, options: object, lines: list[str]
) -> None:
    """Those of a NamedTuple have a docstring that says nothing."""
    if lines and lines[0].startswith("Alias for field number"):
        logging.getLogger(__name__).warning("%s has no description", name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("manual-page", ManualPage)
    app.connect("source-read", _link_files)
    app.connect("autodoc-process-docstring", _see_that_fields_are_described)
    return {"parallel_read_safe": True}
