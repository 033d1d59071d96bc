"""Settings of Sphinx. Build: ``make docs``, or ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from sphinx.application import Sphinx  # noqa: E402

import sb3_clipvf  # noqa: E402

project = "sb3_clipvf"
author = "sb3_clipvf contributors"
copyright = "sb3_clipvf contributors, MIT licence"
release = version = sb3_clipvf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "mathml_renderer"]
# results/ is written by the benchmarks: pages include its tables, and experiments.md lists the reports of suites.
exclude_patterns = ["_build", "results/*.md"]

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
# GitHub draws these blocks, too, and does not change their backslashes.
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
# The drawing belongs to the browser, see _ext/mathml_renderer.py.
html_math_renderer = "mathml"

html_theme = "furo"
html_title = f"sb3_clipvf {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

_SOURCE = re.compile(r"^(\s*)(Source): (.*)$")
_LITERAL = re.compile(r"(``.*?``)")


def as_restructured_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn the house's ``Source:`` lines into fields, and keep ``|`` of ``KL(p || q)`` from being read as markup."""
    in_source = False
    for index, line in enumerate(lines):
        match = _SOURCE.match(line)
        if match:
            line, in_source = f"{match[1]}:{match[2]}: {match[3]}", True
        elif in_source and line.strip() and not line.startswith("    "):
            line = f"    {line}"
        in_source = in_source and bool(line.strip())
        parts = _LITERAL.split(line)
        lines[index] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def setup(app: Sphinx) -> None:
    """Connect the treatment of docstrings."""
    app.connect("autodoc-process-docstring", as_restructured_text)
