"""Markdown extension that converts the formulas found by pymdownx.arithmatex to MathML, so that pages need no math script."""

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

NAMESPACE = ' xmlns="http://www.w3.org/1998/Math/MathML"'  # Not needed in HTML
AFTER_INLINE = 15  # Markdown's own inline processors run at 20


def mathml(formula, display="inline"):
    "Return the MathML element of a LaTeX formula, with the formula as its alternative text"
    element = ElementTree.fromstring(convert(formula, display=display).replace(NAMESPACE, ""))
    element.set("alttext", formula)
    return element


class Formulas(Treeprocessor):
    "Tree processor that replaces the text of `arithmatex` elements with MathML"

    def run(self, root):
        for element in root.iter():
            if element.get("class") == "arithmatex":
                formula = re.sub(r"^\\[(\[]|\\[)\]]$", "", element.text.strip()).strip()
                display = "inline" if element.tag == "span" else "block"
                element.text = None
                element.append(mathml(formula, display))


class MathML(Extension):
    def extendMarkdown(self, md):
        md.treeprocessors.register(Formulas(md), "mathml", AFTER_INLINE)


def makeExtension(**options):
    return MathML(**options)
