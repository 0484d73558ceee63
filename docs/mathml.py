"""A Markdown extension: the formulas that pymdownx.arithmatex finds become MathML, so that a page needs no script for them."""

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

NAMESPACE = ' xmlns="http://www.w3.org/1998/Math/MathML"'  # HTML needs none
AFTER_INLINE = 15  # Markdown's own inline processors run at 20


def mathml(formula, display="inline"):
    "An element for a LaTeX formula, which keeps the formula as its text for those who cannot see it"
    element = ElementTree.fromstring(convert(formula, display=display).replace(NAMESPACE, ""))
    element.set("alttext", formula)
    return element


class Formulas(Treeprocessor):
    "Replaces the text of elements marked `arithmatex`"

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
