"""
Formulas as MathML, which browsers draw by themselves: pages need no script and no network.

docutils, which Sphinx stands on, translates LaTeX to MathML while the pages are built. An error in a formula is a
warning of the build.
"""

from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)

_MATHML = "{http://www.w3.org/1998/Math/MathML}"
_APPLY_FUNCTION = "\u2061"
_BRACKETS = ("(", "[", "{")
_ACCENTS = ("ˆ", "˜", "¯", "~", "^")


def visit_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """Write an inline formula."""
    translator.body.append(f'<span class="math">{_mathml(node, as_block=False)}</span>')
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.Element) -> None:
    """Write a displayed formula."""
    translator.body.append(f'<div class="math-block">{_mathml(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def _mathml(node: nodes.Element, as_block: bool) -> str:
    try:
        text = tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return ""
    # The entity is HTML's; XML does not know it.
    formula = ElementTree.fromstring(text.replace("&ApplyFunction;", _APPLY_FUNCTION))
    for element in formula.iter():
        # docutils indents; the white space would be drawn around an inline formula.
        element.text, element.tail = (element.text or "").strip(), None
        _lift_index_of_accent(element)
        _space_function_names(element)
    ElementTree.register_namespace("", _MATHML[1:-1])
    return ElementTree.tostring(formula, encoding="unicode")


def _lift_index_of_accent(element: ElementTree.Element) -> None:
    r"""docutils puts the index of ``\hat{A}_t`` under the letter; it belongs beside it."""
    if element.tag != f"{_MATHML}munderover" or (element[2].text or "").strip() not in _ACCENTS:
        return
    letter, index, accent = element
    hat = ElementTree.Element(f"{_MATHML}mover", {"accent": "true"})
    hat.extend([letter, accent])
    element.tag = f"{_MATHML}msub"
    element[:] = [hat, index]


def _space_function_names(element: ElementTree.Element) -> None:
    r"""``\log p`` has a thin space, ``\log(p)`` has none; browsers give none to either."""
    children = list(element)
    for child, following in zip(children, children[1:], strict=False):
        if (child.text or "").strip() == _APPLY_FUNCTION and (following.text or "").strip() not in _BRACKETS:
            child.set("rspace", "0.167em")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer as ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
