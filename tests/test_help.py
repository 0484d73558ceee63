"""Every parameter and every command-line option that a reader can see has an explanation."""

import re

import build_docs
import notebook_page
import pytest
import reference
from pages import directives, joined

import lmnotes
from lmnotes.apps.cli import COMMAND_GROUPS, COMMANDS, EXAMPLES, execute_command
from lmnotes.runs.config import PARAM_GROUPS


def with_members(definition):
    "Yield a definition and the definitions inside it"
    yield definition
    for member in definition.members:
        yield from with_members(member)


def parameter_groups(cell):
    "Yield (name, parameters) of every table of parameters that the site shows for a cell"
    for definition in (inner for outer in cell["defines"] for inner in with_members(outer)):
        yield definition.name, definition.fields
        yield definition.name, definition.parameters
    if "parameters" in cell["metadata"].get("tags", []):
        yield "parameters", reference.variables(directives(joined(cell["source"]))[1])


def blank_rows(cells):
    "Return (number of rows in the tables, names of the rows without a description)"
    rows, blank = 0, []
    for name, parameters in (group for cell in cells for group in parameter_groups(cell)):
        if notebook_page.table(parameters):
            shown = [p for p in parameters if p.type or p.default or p.comment]
            rows += len(shown)
            blank += [f"{name}: {p.name}" for p in shown if not p.comment]
    return rows, blank


def test_blank_rows_are_found():
    code = "def area(\n    width,  # Meters\n    height=1,\n): ...\n\n\ndef volume(width, height=1): ..."
    cell = dict(defines=reference.definitions(code), metadata={}, source=code)
    assert blank_rows([cell]) == (2, ["area: height"])


def test_every_parameter_on_the_site_has_a_description():
    rows, blank = 0, []
    for path in build_docs.notebooks():
        notebook = notebook_page.read(path, build_docs.NBS)
        found = blank_rows([cell for cell in notebook.cells if cell["cell_type"] == "code"])
        rows += found[0]
        blank += [f"{path.name}: {name}" for name in found[1]]
    assert rows > 1000 and not blank


def options_in(text):
    "Return {option: explanation without its default} from a help text"
    lines = [line.strip("│| ") for line in text.splitlines() if re.search(r"\w", line)]
    items = re.split(r"^(?=-)", "\n".join(lines), flags=re.M)[1:]
    heads = re.compile(r"(?:-h, )?(--[\w-]+)(?:, --no-[\w-]+)?(?:[ \n](?:[A-Z]+|\{[^}]*\}|\[[^\]]*\])(?= |\n|$))*\s*")
    found = {}
    for item in items:
        head = heads.match(item)
        explanation = " ".join(item[head.end() :].split())
        found[head[1]] = re.sub(r"\(alias: [^)]*\)|\((default: .*|required)\)", "", explanation).strip()
    return found


def test_options_without_explanation_are_found():
    text = "│ --steps INT  Optimizer steps (default: 5) │\n│ --run STR  (default: '')  │\n│ --lr, --no-lr │\n│  (default: False) │"
    assert options_in(text) == {"--steps": "Optimizer steps", "--run": "", "--lr": ""}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_an_explanation(command, capsys):
    with pytest.raises(SystemExit) as end:
        execute_command([command, "--help"])
    options = options_in(capsys.readouterr().out)
    assert end.value.code == 0 and options
    assert not [option for option, explanation in options.items() if not explanation]


def test_version_is_printed(capsys):
    assert execute_command(["--version"]) == 0
    assert capsys.readouterr().out == f"lmnotes {lmnotes.__version__}\n"


def test_help_groups_all_commands_and_ends_with_the_guides(capsys):
    assert execute_command(["--help"]) == 0
    shown = capsys.readouterr().out
    headings = [shown.index(f"\n{heading}:\n") for heading in COMMAND_GROUPS]
    assert headings == sorted(headings) and list(COMMAND_GROUPS)[-1] == "Guides"
    assert re.findall(r"^  ([a-z-]+)  +[A-Z]", shown, re.M) == list(COMMANDS)


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_use_known_options(command, capsys):
    with pytest.raises(SystemExit):
        execute_command([command, "--help"])
    known = options_in(capsys.readouterr().out)
    for line in EXAMPLES[command]:
        assert line.startswith(f"lmnotes {command} ") and set(re.findall(r"--[\w-]+", line)) <= set(known)


def test_train_help_has_groups_all_architectures_and_two_examples(capsys):
    with pytest.raises(SystemExit):
        execute_command(["train", "--help"])
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    headings = [shown.index(f" {heading} options ") for heading in PARAM_GROUPS]
    assert headings == sorted(headings)
    assert " | ".join(lmnotes.archs()) in shown
    assert all(f"{line} {text}" in shown for line, text in EXAMPLES["train"].items()) and len(EXAMPLES["train"]) == 2


def test_options_of_guides_are_the_last_group(capsys):
    with pytest.raises(SystemExit):
        execute_command(["generate", "--help"])
    assert list(options_in(capsys.readouterr().out.partition("Guides options")[2])) == ["--preset"]
