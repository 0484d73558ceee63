"""Read the definitions of a cell from its source: signatures, parameters with their comments, methods. Nothing is imported."""

import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass, field

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SHOWN_DECORATORS = ("property", "classmethod", "staticmethod", "dataclass", "contextmanager")
WIDTH = 100  # Longer signatures are written with one parameter per line
COMMENT_WIDTH = 80  # A comment that does not fit next to a signature goes below it


@dataclass
class Parameter:
    "A parameter of a function, or a field of a class"

    name: str
    type: str = ""
    default: str = ""
    comment: str = ""


@dataclass
class Definition:
    "A class, function or method"

    name: str  # Qualified name within the module: `LM.forward`
    head: str  # Signature as Python code
    doc: str = ""
    fields: list = field(default_factory=list)  # Fields of a class
    parameters: list = field(default_factory=list)
    returns: str = ""  # The comment at the end of a signature
    members: list = field(default_factory=list)  # Public methods of a class
    anchor: str = ""  # Anchor on its page

    def __post_init__(self):
        self.anchor = self.name.lower()  # The form that nbdev's links use


class Source:
    "Code of a cell, with the comment of each line"

    def __init__(self, code):
        self.code, self.lines = code, code.split("\n")
        self.tree = ast.parse(code)
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        found = [token for token in tokens if token.type == tokenize.COMMENT]
        self.notes = {token.start[0]: token.string.lstrip("# ").rstrip() for token in found}

    def text(self, node):
        "Return the source of an expression on one line, with the parts of a string joined"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.end_lineno > node.lineno:
            return json.dumps(node.value, ensure_ascii=False)
        return " ".join(ast.get_source_segment(self.code, node).split()) if node else ""

    def note(self, node):
        "Return the comment on the last line of a node, or on another of its lines"
        lines = [node.end_lineno, *range(node.lineno, node.end_lineno)]
        return next((self.notes[line] for line in lines if line in self.notes), "")

    def note_above(self, node):
        "Return the comment on the line above a node, if that line holds nothing else"
        line = self.lines[node.lineno - 2].strip() if node.lineno > 1 else ""
        return self.notes[node.lineno - 1] if line.startswith("# ") else ""


def decorators(node, source):
    "Return the decorators that matter to a caller"
    found = [source.text(decorator) for decorator in node.decorator_list]
    return [f"@{name}" for name in found if re.split(r"\W", name)[0] in (*SHOWN_DECORATORS, "arch")]


def every_argument(args):
    "Return [(argument, default or None, stars)] of a function in order"
    plain = args.posonlyargs + args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    found = [(arg, default, "") for arg, default in zip(plain, defaults)]
    found += [(args.vararg, None, "*")] if args.vararg else []
    found += [(arg, default, "") for arg, default in zip(args.kwonlyargs, args.kw_defaults)]
    return found + ([(args.kwarg, None, "**")] if args.kwarg else [])


def arguments(node, source, owner):
    "Return the parameters of a function with the comments on their lines"
    found = []
    for arg, default, stars in every_argument(node.args):
        kind, value = source.text(arg.annotation), source.text(default)
        found.append(Parameter(stars + arg.arg, kind, value, source.note(default or arg)))
    static = any(source.text(decorator) == "staticmethod" for decorator in node.decorator_list)
    return found[1:] if owner and not static else found


def signature(node, parameters, name, source):
    "Return `name(x, y=1) -> T`, without types: the table of parameters shows them"
    keyword_only = {arg.arg for arg in node.args.kwonlyargs}
    parts = []
    for arg in parameters:
        if arg.name in keyword_only and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(f"{arg.name}={arg.default}" if arg.default else arg.name)
    returns = f" -> {source.text(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def is_one_line(node):
    "Return whether a signature fits on one line, where a comment describes the whole function"
    ends = [(default or arg).end_lineno for arg, default, _ in every_argument(node.args)]
    return all(end == node.lineno for end in ends)


def ending(node, source):
    "Return the comment at the end of a signature of several lines, which describes the return value"
    last = max((default or arg).end_lineno for arg, default, _ in every_argument(node.args))
    lines = range(last + 1, node.body[0].lineno)
    return next((source.notes[line] for line in lines if line in source.notes), "")


def function(node, source, owner="", name=""):
    "Return the definition of a function or a method of class `owner`. `name` replaces the displayed name"
    parameters = arguments(node, source, owner)
    returns = ""
    comment = ""
    if is_one_line(node):
        comment = source.notes.get(node.lineno, "")
        parameters = [Parameter(arg.name, arg.type, arg.default) for arg in parameters]
    else:
        returns = ending(node, source)
    line = signature(node, parameters, name or f"def {node.name}", source)
    if comment:
        line += ("  # " if len(line + comment) < COMMENT_WIDTH else "\n# ") + comment
    qualified = f"{owner}.{node.name}" if owner else node.name
    head = "\n".join([*decorators(node, source), line])
    return Definition(qualified, head, ast.get_docstring(node) or "", [], parameters, returns)


def fields(node, source):
    "Return the public fields of a class, or variables of a cell, that have a type or a comment"
    found = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign):
            target, kind = item.target, source.text(item.annotation)
        elif isinstance(item, ast.Assign) and len(item.targets) == 1 and source.note(item):
            target, kind = item.targets[0], ""
        else:
            continue
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            comment = source.note(item) or source.note_above(item)
            found.append(Parameter(target.id, kind, source.text(item.value), comment))
    return found


def a_class(node, source):
    "Return the definition of a class: its fields, the parameters of `__init__`, and its public methods"
    methods = [item for item in node.body if isinstance(item, FUNCTIONS)]
    bases = [source.text(base) for base in node.bases]
    lines = [*decorators(node, source), f"class {node.name}" + (f"({', '.join(bases)})" if bases else "")]
    parameters = []
    for item in methods:
        if item.name == "__init__":
            init = function(item, source, node.name, node.name)
            lines.append(init.head)
            parameters = init.parameters if any(arg.comment or arg.type for arg in init.parameters) else []
    members = [function(item, source, node.name) for item in methods if not item.name.startswith("_")]
    doc = ast.get_docstring(node) or ""
    return Definition(node.name, "\n".join(lines), doc, fields(node, source), parameters, "", members)


def definitions(code):
    "Return the public classes and functions of a cell"
    source = Source(code)
    found = []
    for node in source.tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            found.append(a_class(node, source) if isinstance(node, ast.ClassDef) else function(node, source))
    return found


def helpers(code):
    "Return the names of all functions and classes of a cell, private ones too"
    return [node.name for node in ast.parse(code).body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]


def variables(code):
    "Return the variables that a parameters cell sets"
    source = Source(code)
    return fields(source.tree, source)


def constant(code, name):
    "Return the value of a literal that a module assigns to a name"
    values = {node.targets[0].id: node.value for node in ast.parse(code).body if is_assignment(node)}
    return ast.literal_eval(values[name])


def is_assignment(node):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)


def only_imports(code):
    "Return whether a cell holds only imports and perhaps the re-exported names (`_all_`)"
    rest = [node for node in ast.parse(code).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    return all(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_all_" for node in rest)


def lines_of_definitions(code):
    "Return {qualified name: line} of a module's classes, functions and methods"
    found = {}
    for node in ast.parse(code).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            found[node.name] = node.lineno
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{item.name}": item.lineno for item in inner if isinstance(item, FUNCTIONS)}
    return found
