"""Convert a notebook to a page of the site: prose, code, saved outputs, and an API reference of the exported definitions."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import reference
from pages import ROOT, directives, fenced, joined, output_markdown, read_notebook

FOLD = 25  # Cells with more lines are folded
OUTPUT = "{ .text .shown }"
PARAM_GROUPS = reference.constant((ROOT / "lmnotes/runs/config.py").read_text(encoding="utf-8"), "PARAM_GROUPS")
BADGE = re.compile(r"\[!\[([^\]]+)\]\(https:[^)]+\)\]")  # The site requests no picture from other servers


@dataclass
class Notebook:
    "A notebook with its titles, its module and the path of its page"

    path: Path  # Notebook file
    name: str  # Path in the project without its ending: `nbs/models/31_gpt`
    page: str  # Path of its page: `models/gpt.md`
    title: str  # Heading of the first cell
    lead: str  # Subtitle: the `> …` line of the first cell
    module: str  # Exported module: `lmnotes.models.gpt`. Empty if it exports none
    hide: str  # Parts of the page to hide, such as `[navigation, toc]`: the `- hide: …` line of the first cell
    cells: list  # Cells, each with the definitions it exports in `defines`

    @property
    def number(self):
        "Return its position in the reading order, or None for a notebook without a number"
        found = re.match(r"\d+", self.path.stem)
        return int(found[0]) if found else None


def read(path, nbs):
    "Read a notebook and the definitions of its cells"
    cells = read_notebook(path)["cells"]
    inside = path.relative_to(nbs)
    name = re.sub(r"^\d+_", "", path.stem)
    if name == path.stem and any(path.parent.glob(f"[0-9]*_{name}.ipynb")):
        name = f"{name}_recipe"  # The module of this recipe has the name that nbdev links to
    page = inside.with_name(f"{name}.md").as_posix()
    first = joined(cells[0]["source"])
    head = re.match(r"# (.+)\n+> (.+)\n*", first)
    if not head:
        raise ValueError(f"{path}: the first cell must begin with `# Title` and `> subtitle`, found {first[:40]!r}")
    rest = re.sub(r"\A(- \w+: .*\n?)+", "", first[head.end() :])
    hide = re.search(r"^- hide: (.+)$", first, re.M)
    modules = [re.search(r"^#\| *default_exp (\S+)", joined(cell["source"]), re.M) for cell in cells]
    module = next((f"lmnotes.{match[1]}" for match in modules if match), "")
    cells = [dict(cell, defines=defined(cell)) for cell in [dict(cells[0], source=rest), *cells[1:]]]
    number_anchors([definition for cell in cells for definition in cell["defines"]])
    name = f"{nbs.name}/{inside.with_suffix('').as_posix()}"
    return Notebook(path, name, page, head[1].strip(), head[2].strip(), module, hide[1] if hide else "", cells)


def is_exported(marks):
    return bool(marks.keys() & {"export", "exports"})


def defined(cell):
    "Return the definitions that a cell exports"
    marks, code = directives(joined(cell["source"]))
    return reference.definitions(code) if cell["cell_type"] == "code" and is_exported(marks) else []


def number_anchors(definitions):
    "Make the anchors of names that differ only in capitals unique, such as `Download` and `download`"
    taken = set()
    for definition in definitions:
        if definition.anchor in taken:
            definition.anchor += "-2"
        taken.add(definition.anchor)


def plain(text):
    "Escape the Markdown of a docstring or comment, except in its code"
    parts = re.split(r"(`[^`]+`)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*_$\\])", r"\\\1", parts[i]).replace("<", "&lt;")
    return "".join(parts)


def table(parameters, first="Parameter"):
    "Return a Markdown table of parameters without empty columns, or an empty string if no parameter has a comment"
    rows = [
        (
            f"<code class='parameter'>{p.name}</code>",
            p.type and f"`{p.type}`",
            p.default and f"`{p.default}`",
            plain(p.comment),
        )
        for p in parameters
        if p.type or p.default or p.comment  # The signature already shows the others
    ]
    titles = (first, "Type", "Default", "Description")
    columns = [column for column in range(4) if any(row[column] for row in rows)]
    if 3 not in columns:
        return ""
    lines = [[titles[column] for column in columns], ["---"] * len(columns)]
    lines += [[re.sub(r"(?<!\\)\|", r"\\|", row[c]) if c == 3 else row[c] for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parameter_tables(parameters):
    "Return the tables of a parameters cell: in the groups of `lmnotes train --help` if it has exactly these parameters"
    named = {p.name: p for p in parameters}
    if sorted(named) != sorted(" ".join(PARAM_GROUPS.values()).split()):
        return [table(parameters)]
    tables = {heading: table([named[name] for name in names.split()]) for heading, names in PARAM_GROUPS.items()}
    return [block for heading, rows in tables.items() for block in (f"**{heading.capitalize()}**", rows)]


def folded(text, title):
    "Return a collapsed code block"
    body = "\n".join(f"    {line}".rstrip() for line in fenced(text, "python").split("\n"))
    return f'??? code "{title}"\n\n{body}'


def entry(definition, source_url, level=3):
    "Return the reference blocks of a definition and its methods"
    blocks = [f"{'#' * level} {definition.name} {{ #{definition.anchor} .api }}"]
    if definition.name in source_url:
        blocks.append(f"[source]({source_url[definition.name]}){{ .source data-search-exclude }}")
    blocks.append(fenced(definition.head, "python"))
    if definition.doc:
        blocks.append(plain(definition.doc))
    is_data = re.search(r"@dataclass|NamedTuple", definition.head)
    blocks += [table(definition.fields, "Field" if is_data else "Attribute"), table(definition.parameters)]
    if definition.returns:
        blocks.append(f"Returns: {plain(definition.returns)}\n{{ .returns }}")
    for member in definition.members:
        blocks += entry(member, source_url, level + 1)
    return [block for block in blocks if block]


def code_blocks(cell, source_url):
    "Return the blocks for a cell's code"
    marks, code = directives(joined(cell["source"]))
    if not code or marks.get("echo") == "false":
        return []
    if cell["defines"]:
        entries = [block for definition in cell["defines"] for block in entry(definition, source_url)]
        return [*entries, folded(code, "Source")]
    if reference.only_imports(code):
        return [folded(code, "Imports")]
    if "parameters" in cell["metadata"].get("tags", []):
        return [*parameter_tables(reference.variables(code)), folded(code, "Source")]
    if is_exported(marks) and (names := reference.helpers(code)):
        return [folded(code, f"Source of {', '.join(names)}")]
    lines = code.count("\n") + 1
    if lines > FOLD or marks.get("code-fold") == "true":
        return [folded(code, f"{lines} lines of code")]
    return [fenced(code, "python")]


def cell_blocks(cell, picture, about, source_url):
    "Return the Markdown blocks of a cell. `about` is the default alternative text of its pictures"
    if cell["cell_type"] != "code":
        return [BADGE.sub(r"[\1]", joined(cell["source"]))] if cell["cell_type"] == "markdown" else []
    marks, _ = directives(joined(cell["source"]))
    if marks.keys() & {"hide", "default_exp", "exporti"} or marks.get("include") == "false":
        return []
    blocks = code_blocks(cell, source_url)
    if marks.get("output") != "false":
        blocks += [output_block(output, picture, marks.get("fig-alt", about)) for output in cell["outputs"]]
    return [block for block in blocks if block]


def output_block(output, picture, about):
    "Return one output as a block that is styled differently from code and prose"
    text = output_markdown(output, picture, OUTPUT)
    if text.startswith("![]"):
        return f"![{about}]{text[3:]}{{ .figure }}"
    if not text or text.startswith(("`", "<div")):
        return text
    return f'<div class="output" markdown="1">\n\n{text}\n\n</div>'


def output_blocks(notebook, picture):
    "Return the tables and pictures of a notebook's saved outputs"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    blocks = [output_block(output, picture, notebook.title) for output in outputs]
    return [block for block in blocks if block and not block.startswith("`")]


def heading(cell, before):
    "Return the last heading in this cell, or `before` if it has none"
    found = re.findall(r"^#+ (.+)$", joined(cell["source"]), re.M) if cell["cell_type"] == "markdown" else []
    return found[-1] if found else before


def page_text(notebook, picture, source_url, blob_url):
    "Return the page of a notebook. `picture(bytes, ending)` stores an image and returns its path"
    front = f"title: {json.dumps(notebook.title)}\ndescription: {json.dumps(notebook.lead)}\n"
    front += f"hide: {notebook.hide}\n" if notebook.hide else ""
    where = f"Notebook [`{notebook.name}`]({blob_url}/{notebook.name}.ipynb)"
    where += f" · module `{notebook.module}`" if notebook.module else ""
    blocks = [
        f"---\n{front}---",
        f"# {notebook.title}",
        f"{notebook.lead}\n{{ .lead }}",
        f"{where}\n{{ .where data-search-exclude }}",
    ]
    about = notebook.title
    for cell in notebook.cells:
        about = heading(cell, about)
        blocks += cell_blocks(cell, picture, about, source_url)
    return "\n\n".join(block for block in blocks if block.strip()) + "\n"
