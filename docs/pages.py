"""A notebook's cells as Markdown: for the README, and for the pages of the site. Nothing is executed."""

import base64
import json
import re
from pathlib import Path

FORMATS = ("text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/latex", "text/plain")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def joined(text):
    "A notebook keeps text as one string or as a list of lines"
    return text if isinstance(text, str) else "".join(text)


def directives(source):
    "The `#| key: value` lines at the top of a cell, as a dict, and the source below them"
    found = {}
    lines = source.splitlines()
    while lines and (match := re.match(r"#\|\s*([\w-]+)\s*:?\s*(.*)", lines[0])):
        found[match[1]] = match[2].strip() or "true"
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def as_on_a_terminal(text):
    "Text without colours, and with carriage returns carried out, as progress bars use them"
    lines = COLOURS.sub("", text).split("\n")
    return "\n".join(line.rstrip("\r").split("\r")[-1] for line in lines).rstrip()


def fenced(text, head=""):
    "A code block, whatever backticks the text contains"
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{head}\n{text}\n{fence}"


def without_links(markdown):
    "Markdown whose Python blocks hold no links: nbdev also puts them on names in comments there"
    link = re.compile(r"\[(`[^`]+`)\]\([^)]*\)")
    return re.sub(r"^```python\n.*?^```", lambda block: link.sub(r"\1", block[0]), markdown, flags=re.M | re.S)


def output_markdown(output, picture):
    "One output of a cell; `picture(bytes, ending)` stores an image and returns its path"
    kind = output["output_type"]
    if kind == "stream":
        return fenced(as_on_a_terminal(joined(output["text"])), "text")
    if kind == "error":
        return fenced(as_on_a_terminal("\n".join(output["traceback"])), "text")
    data = output["data"]
    found = next((name for name in FORMATS if name in data), None)
    if found is None:
        return ""
    text = joined(data[found])
    if found in ("image/png", "image/jpeg"):
        return f"![]({picture(base64.b64decode(text), found.split('/')[1])})"
    if found in ("text/html", "image/svg+xml"):
        return f"<div>{text}</div>"
    return fenced(as_on_a_terminal(text), "text") if found == "text/plain" else without_links(text)


def cell_markdown(cell, picture):
    "The blocks that a cell becomes"
    source = joined(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    marks, code = directives(source)
    if cell["cell_type"] != "code" or marks.keys() & {"hide", "default_exp"} or marks.get("include") == "false":
        return []
    blocks = [fenced(code, "python")] if code and marks.get("echo") != "false" else []
    if marks.get("output") != "false":
        blocks += [output_markdown(output, picture) for output in cell["outputs"]]
    return [block for block in blocks if block]


def front_matter(notebook):
    "What nbdev noted in a raw cell at the top: title, description, output-file"
    import yaml

    first = notebook["cells"][0]
    if first["cell_type"] != "raw":
        return {}
    return yaml.safe_load(joined(first["source"]).strip().strip("-")) or {}


def read_notebook(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))
