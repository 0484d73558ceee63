"""Draw plain SVG: boxes, notes, arrows, frames and grids, readable on light and dark pages."""

from html import escape
from typing import NamedTuple

WIDTH = 700  # Pixels, about the width of a text column
MARKER = ' marker-end="url(#tip)"'
SIZE, SMALL = 14, 13  # Font sizes of the first line of a text and of the others
KINDS = dict(  # Fill colors. Text on them is white, and they contrast with white and with dark gray pages
    layer="#2b69b0", function="#1d7570", data="#4d5a6e", state="#7649b0", result="#2c7a3a", noise="#ad4a17"
)
NAMES = dict(
    layer="learned weights", function="no weights", data="data", state="state or cache", result="result", noise="noise"
)
STYLE = """<style>
text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #fff }
.note rect { fill: #e6e9ef } .note text { fill: #1c2230 }
.line { fill: none; stroke: #7b8494; stroke-width: 2 } .tip { fill: #7b8494 }
.frame { fill: none; stroke: #7b8494; stroke-width: 1.5; stroke-dasharray: 5 4 }
.empty { fill: none; stroke: #7b8494 }
@media (prefers-color-scheme: dark) { .note rect { fill: #394150 } .note text { fill: #eef1f6 } }
"""
WIDTHS = {0.32: "iIjl.,:;'| !·", 0.42: "tfr()[]/-", 0.87: "mwMW@%→←↓×+−=<≥≤…"}  # Per em, in DejaVu Sans, a wide font


def text_width(text, size=SIZE):
    "Return the width of a text in pixels, estimated for a wide font"
    return size * sum(next((w for w, chars in WIDTHS.items() if c in chars), 0.64) for c in text)


class Box(NamedTuple):
    "A rectangle, and the points at which arrows touch it"

    x: float
    y: float
    w: float
    h: float

    top = property(lambda b: (b.x + b.w / 2, b.y))
    bottom = property(lambda b: (b.x + b.w / 2, b.y + b.h))
    left = property(lambda b: (b.x, b.y + b.h / 2))
    right = property(lambda b: (b.x + b.w, b.y + b.h / 2))


class Drawing:
    "An SVG picture of a given height"

    def __init__(self, height):
        self.height, self.parts = height, []

    def _add(self, part):
        self.parts.append(part)

    def _text(self, box, text):
        lines = text.split("\n")
        sizes = [SIZE] + [SMALL] * (len(lines) - 1)
        widest = max(map(text_width, lines, sizes))
        if (
            widest > box.w - 6
            and len(text) > 2
            or 17 * len(lines) > box.h + 1
            or box.y < 0
            or box.y + box.h > self.height
        ):
            raise ValueError(f"{text!r} needs {widest:.0f} x {17 * len(lines)} pixels, but its box is {box}")
        y = box.y + box.h / 2 - 8.5 * (len(lines) - 1)
        for i, (line, size) in enumerate(zip(lines, sizes)):
            place = f'x="{box.x + box.w / 2:g}" y="{y + 17 * i + 0.36 * size:.1f}"'
            self._add(f'<text {place} font-size="{size}" text-anchor="middle">{escape(line)}</text>')

    def box(self, x, y, w, h, text="", kind="layer") -> Box:
        "Draw a filled box with one line of text, or several"
        box = Box(x, y, w, h)
        self._add(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{min(5, h / 5):g}"/>')
        if text:
            self._text(box, text)
        return box

    def note(self, x, y, text, align="middle") -> Box:
        "Draw a remark at a point, which is the middle of the box or the middle of its left or right side"
        lines = text.split("\n")
        w, h = max(map(text_width, lines, [SIZE] + [SMALL] * len(lines))) + 12, 17 * len(lines) + 6
        box = Box(x - w * dict(left=0, middle=0.5, right=1)[align], y - h / 2, w, h)
        if box.x < 0 or box.x + w > WIDTH:
            raise ValueError(f"{text!r} does not fit into the picture: {box}")
        self._add('<g class="note">')
        self._add(f'<rect x="{box.x:.1f}" y="{box.y:g}" width="{w:.1f}" height="{h}" rx="9"/>')
        self._text(box, text)
        self._add("</g>")
        return box

    def arrow(self, *points, tip=True):
        "Draw an arrow through points, or a line without a tip"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add(f'<polyline class="line" points="{path}"{tip * MARKER}/>')

    def frame(self, x, y, w, h, text, at=0.5) -> Box:
        "Draw a dashed frame with a remark on its upper side, at a share of the width"
        self._add(f'<rect class="frame" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8"/>')
        self.note(x + at * w, y, text)
        return Box(x, y, w, h)

    def circle(self, x, y, text) -> Box:
        "Draw a circle with a sign such as +"
        self._add(f'<circle class="function" cx="{x:g}" cy="{y:g}" r="11"/>')
        box = Box(x - 11, y - 11, 22, 22)
        self._text(box, text)
        return box

    def grid(self, x, y, rows, cell=26, wide=0) -> list:
        "Draw cells given as (text, kind), row by row. An empty kind draws an outline. Return the boxes"
        out, w = [], wide or cell
        for i, row in enumerate(rows):
            for j, (text, kind) in enumerate(row):
                box = self.box(x + j * w + 1, y + i * cell + 1, w - 2, cell - 2, text, kind or "empty")
                out.append(box)
        return out

    def stack(self, x, y, w, items, h=36, gap=16) -> list:
        "Draw boxes given as (text, kind) from top to bottom, with arrows between them"
        boxes = [self.box(x, y + i * (h + gap), w, h, *item) for i, item in enumerate(items)]
        for above, below in zip(boxes, boxes[1:]):
            self.arrow(above.bottom, below.top)
        return boxes

    def branch(self, x, y, boxes, sign="+", drop=30) -> Box:
        "Draw a residual branch: from the stream at `x` through boxes (w, h, text, kind) and back to a circle below"
        tallest, left, previous = max(h for _, h, *_ in boxes), x + 34, (x, 0)
        for w, h, text, kind in boxes:
            box = self.box(left, y + (tallest - h) / 2, w, h, text, kind)
            self.arrow((previous[0], box.left[1]), box.left)
            previous, left = box.right, left + w + 20
        circle = self.circle(x, y + tallest + drop, sign)
        self.arrow(box.bottom, (box.bottom[0], circle.y + 11), circle.right)
        return circle

    def legend(self, y, *kinds):
        "Explain the colors of boxes in a row"
        widths = [text_width(NAMES[kind], SMALL) + 46 for kind in kinds]
        x = (WIDTH - sum(widths)) / 2
        for kind, w in zip(kinds, widths):
            self.box(x, y - 8, 16, 16, kind=kind)
            self.note(x + 20, y, NAMES[kind], "left")
            x += w

    def svg(self, title, description) -> str:
        "Return the picture as SVG"
        fills = "\n".join(f".{kind} {{ fill: {color} }}" for kind, color in KINDS.items())
        tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{WIDTH}" height="{self.height}" '
                f'viewBox="0 0 {WIDTH} {self.height}">',
                f"<title>{escape(title)}</title>",
                f"<desc>{escape(description)}</desc>",
                f"{STYLE}{fills}\n</style>",
                f'<defs>{tip}<path class="tip" d="M0,0 L8,4 L0,8 z"/></marker></defs>',
                *self.parts,
                "</svg>\n",
            ]
        )


DIAGRAMS = {}  # {name: (notebook without its ending, title, description, height, function that draws)}


def diagram(notebook, title, description, height):
    "Return a decorator that registers a function of a `Drawing` under its name"

    def register(draw):
        DIAGRAMS[draw.__name__] = (notebook, title, description, height, draw)
        return draw

    return register


def render(name) -> str:
    "Return a registered diagram as SVG"
    _, title, description, height, draw = DIAGRAMS[name]
    drawing = Drawing(height)
    draw(drawing)
    return drawing.svg(title, description)
