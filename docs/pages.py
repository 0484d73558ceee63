"""Convert notebook cells to Markdown for the README and the site, without executing anything."""

import base64
import json
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/latex", "text/plain")
COLORS = re.compile(r"\x1b\[[0-9;]*m")


def settings():
    "Return the DEFAULT section of settings.ini"
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def joined(text):
    "Return a cell's text, which a notebook stores as one string or as a list of lines"
    return text if isinstance(text, str) else "".join(text)


def directives(source):
    "Return the `#| key: value` lines at the top of a cell as a dict, and the source below them"
    found = {}
    lines = source.splitlines()
    while lines and (match := re.match(r"#\|\s*([\w-]+)\s*:?\s*(.*)", lines[0])):
        found[match[1]] = match[2].strip() or "true"
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def as_on_a_terminal(text):
    "Return text without colors and with carriage returns applied, as a terminal shows progress bars"
    lines = COLORS.sub("", text).split("\n")
    return "\n".join(line.rstrip("\r").split("\r")[-1] for line in lines).rstrip()


def fenced(text, head=""):
    "Return a fenced code block. The fence is longer than any run of backticks in the text"
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{head}\n{text}\n{fence}"


def output_markdown(output, picture, head="text", alt=""):
    "Return one output as Markdown. `picture(bytes, ending)` stores an image and returns its path, `head` follows a text fence"
    kind = output["output_type"]
    if kind == "stream":
        return fenced(as_on_a_terminal(joined(output["text"])), head)
    if kind == "error":
        return fenced(as_on_a_terminal("\n".join(output["traceback"])), head)
    data = output["data"]
    found = next((name for name in FORMATS if name in data), None)
    if found is None:
        return ""
    text = joined(data[found])
    if found in ("image/png", "image/jpeg"):
        return f"![{alt}]({picture(base64.b64decode(text), found.split('/')[1])})"
    if found in ("text/html", "image/svg+xml"):
        return f'<div class="output">{text}</div>'
    return fenced(as_on_a_terminal(text), head) if found == "text/plain" else text


def cell_markdown(cell, picture):
    "Return the Markdown blocks of a cell"
    source = joined(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    marks, code = directives(source)
    if cell["cell_type"] != "code" or marks.keys() & {"hide", "default_exp"} or marks.get("include") == "false":
        return []
    blocks = [fenced(code, "python")] if code and marks.get("echo") != "false" else []
    if marks.get("output") != "false":
        blocks += [output_markdown(output, picture, alt=marks.get("fig-alt", "")) for output in cell["outputs"]]
    return [block for block in blocks if block]


def read_notebook(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))
