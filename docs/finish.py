"""Finish the pages that Zensical wrote: MathML, tables that fit every screen, links from code, and the sources of the pages."""

import html
import re
from itertools import count
from xml.sax.saxutils import quoteattr

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
TABLE = re.compile(r"<table>.*?</table>", re.S)
CELL = re.compile(r"<(t[hd])[^>]*>(.*?)</\1>", re.S)
NUMBER = re.compile(r"[≤≥]? ?[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?( ± [\d.]+)?( ?[x%])?")
WORD = re.compile(r"(?<!\S)(?=\S*[^\w\s])\S{2,}")
UNIT = re.compile(r"(?<=\d) (?=(?:x|%|µs|ms|s|kB|MB|GB|M)\b)| (?=± )|(?<=±) ")
CODE = re.compile(r"(<pre.*?</pre>)|(<code[^>]*>)([^<]*)(</code>)", re.S)
SHELL = re.compile(r'<div class="language-(?:sh|bash|text) highlight">.*?</pre>', re.S)
OPTION = re.compile(r"(<[^>]*>)|(?<![\w-])--[\w-]+")
LONG = 24  # Longer words may break between the parts of a path or of a list


def mathml(formula):
    "Return the MathML of a formula that the arithmatex extension found, so that pages need no math script"
    tag, latex = formula[1], html.unescape(formula[2])
    element = convert(latex, display="inline" if tag == "span" else "block")
    return f'<{tag} class="math">{element.replace("<math ", f"<math alttext={quoteattr(latex)} ", 1)}</{tag}>'


def plain(cell):
    "Return the text of a cell"
    return html.unescape(re.sub(r"<[^>]+>", "", cell)).strip()


def unbroken(page):
    "Keep the options, paths and names in code whole, which browsers break after hyphens"

    def word(found):
        if len(found[0]) > LONG:
            return re.sub(r"(::|[/,])", r"\1<wbr>", found[0])
        return f'<span class="word">{found[0]}</span>'

    def option(found):
        return found[1] or f'<span class="word">{found[0]}</span>'

    page = SHELL.sub(lambda block: OPTION.sub(option, block[0]), page)
    return CODE.sub(lambda code: code[1] or code[2] + WORD.sub(word, code[3]) + code[4], page)


def table(found):
    "Mark the columns of numbers, and give every cell the title of its column, which small screens show beside it"
    rows = found[0].split("<tr>")
    titles, *body = [[plain(cell[2]) for cell in CELL.finditer(row)] for row in rows[1:]]
    columns = [[text for text in column if text] for column in zip(*body)]
    numbers = [bool(column) and all(map(NUMBER.fullmatch, column)) for column in columns]

    def finished(row):
        position = count()

        def cell(found):
            i = next(position)
            kind = ' class="number"' if i < len(numbers) and numbers[i] else ""
            label = f" data-label={quoteattr(titles[i])}" if found[1] == "td" and titles[i] else ""
            return f"<{found[1]}{kind}{label}>{UNIT.sub(chr(160), found[2])}</{found[1]}>"

        return CELL.sub(cell, row)

    return "<tr>".join(map(finished, rows))


def finish(text, page, names):
    "Return a finished page"
    return names.in_code(unbroken(TABLE.sub(table, FORMULA.sub(mathml, text))), page)
