"""The site: `make docs` builds it. Its guides are Markdown that a test runs; the reference is made from docstrings."""

import pathlib
import re

package = pathlib.Path(__file__).parents[1] / "kerascompress" / "__init__.py"
project = "kerascompress"
release = version = re.search(r'__version__ = "(.*)"', package.read_text())[1]
copyright = "the authors of kerascompress"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 3
napoleon_custom_sections = [("Call arguments", "params_style"), "Reference"]
default_role = "literal"  # as in Markdown, in which the docstrings are written
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types in words
autoclass_content = "class"
html_theme = "furo"
html_title = f"kerascompress {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
