"""The documentation site builds without warnings, every link has a target, and a browser shows it offline."""

import ast
import dataclasses
import functools
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urldefrag

import build_docs
import finish
import notebook_page
import pytest
import reference
from browser import chromium, new_context, open_browser, watch
from names import Names
from pages import as_on_a_terminal, directives, fenced

from lmnotes.runs.config import PARAM_GROUPS

ROOT = Path(__file__).parent.parent

# Parts: definitions of a cell


CELL = """
@dataclass
class Wide(Narrow, Low):
    "A `Wide` one"

    width: int = 1 << 4  # How wide; a | b
    _hidden: int = 0  # Private
    kind: str = "x"

    def grow(self, by=1e-4):  # Meters -> meters
        "Become wider"

    @classmethod
    def read(
        cls,
        path,  # A file
        *,
        strict=True,  # Refuse what is not known
    ):  # A `Wide`
        "From a file"

    def _secret(self): ...


def area(a, b=(1, 2), *rest, key=None, **more) -> float: ...


def open(file): ...


class Door(Wide):
    open = False  # Is it?

    def __init__(
        self,
        height=2,  # Meters
    ): ...
"""


def test_definitions_are_read_from_the_source():
    wide, area, _, door = reference.definitions(CELL)
    assert wide.head == "@dataclass\nclass Wide(Narrow, Low)"
    assert [(p.name, p.type, p.default, p.comment) for p in wide.fields] == [
        ("width", "int", "1 << 4", "How wide; a | b"),
        ("kind", "str", '"x"', ""),
    ]
    grow, read = wide.members
    assert grow.head == "def grow(by=1e-4)  # Meters -> meters"
    assert (read.name, read.anchor) == ("Wide.read", "wide.read")
    assert read.head == "@classmethod\ndef read(path, *, strict=True)"
    assert [p.comment for p in read.parameters] == ["A file", "Refuse what is not known"]
    assert read.returns == "A `Wide`"
    assert area.head == "def area(a, b=(1, 2), *rest, key=None, **more) -> float"
    assert door.head == "class Door(Wide)\nDoor(height=2)"
    assert ([p.name for p in door.fields], [p.comment for p in door.parameters]) == (["open"], ["Meters"])


def test_tables_omit_empty_columns():
    wide = reference.definitions(CELL)[0]
    lines = notebook_page.table(wide.fields, "Field").split("\n")
    assert lines[0] == "| Field | Type | Default | Description |"
    assert lines[2] == r"| <code class='parameter'>width</code> | `int` | `1 << 4` | How wide; a \| b |"
    assert notebook_page.table(wide.members[1].parameters).startswith("| Parameter | Default | Description |")
    assert notebook_page.table(wide.members[0].parameters) == ""


def test_parameters_of_a_run_are_in_the_groups_of_the_help():
    notebook = notebook_page.read(ROOT / "nbs/train.ipynb", ROOT / "nbs")
    page = notebook_page.page_text(notebook, lambda *picture: "", {}, "")
    shown = re.findall(r"^\*\*(\w[^*]*)\*\*$|^\| <code class='parameter'>(\w+)</code>", page, re.M)
    expected = [
        [(heading.capitalize(), ""), *(("", name) for name in names.split())] for heading, names in PARAM_GROUPS.items()
    ]
    assert shown == sum(expected, [])
    cell = reference.variables("steps = 5  # How many\nother = 1  # Another")
    assert notebook_page.parameter_tables(cell) == [notebook_page.table(cell)]


def test_import_cells_are_recognized():
    assert reference.only_imports("import os\n_all_ = ['x']")
    assert not reference.only_imports("import os\nx = 1")


# Parts: names


@pytest.fixture
def names():
    names = Names(ROOT, "https://host/blob")
    names.add_page("a.md", "lmnotes.a", "nbs/00_a")
    names.add_page("results.md", "docs/results.md")
    names.add_page("models/b.md", "lmnotes.models.b", "nbs/models/10_b", "10_b")
    for page, code in {"a.md": CELL, "models/b.md": "def area(): ...\ndef volume(): ..."}.items():
        for definition in reference.definitions(code):
            names.add(page, definition)
    return names


@pytest.mark.parametrize(
    ("text", "page", "shown"),
    [
        ("`volume`", "a.md", "[`volume`](models/b.md#volume)"),
        ("`volume()`, `b`", "models/b.md", "[`volume()`](#volume), `b`"),
        ("`open` `open()`", "models/b.md", "`open` [`open()`](../a.md#open)"),  # A field and a function have this name
        ("`Wide.grow`", "models/b.md", "[`Wide.grow`](../a.md#wide.grow)"),
        ("`grow`", "a.md", "[`grow`](#wide.grow)"),
        ("`grow`", "models/b.md", "`grow`"),  # Only its own page links a method by its name
        ("`area`", "LOG.md", "`area`"),  # Two definitions have this name
        ("`lmnotes.models.b.area`", "LOG.md", "[`lmnotes.models.b.area`](models/b.md#area)"),
        ("`nbs/models/10_b.ipynb` `10_b`", "a.md", "[`nbs/models/10_b.ipynb`](models/b.md) [`10_b`](models/b.md)"),
        ("`tests/browser.py::watch`", "a.md", "[`tests/browser.py::watch`](https://host/blob/tests/browser.py)"),
        ("[`volume`](x) `no/such.py`", "a.md", "[`volume`](x) `no/such.py`"),
        ("[next](models/10_b.ipynb)", "a.md", "[next](models/b.md)"),
        ("[back](../00_a.ipynb)", "models/b.md", "[back](../a.md)"),
        ('<a href="models/10_b.ipynb">', "a.md", '<a href="models/b.html">'),
        ('<a href="models/no.ipynb">', "a.md", '<a href="models/no.ipynb">'),
        ("[all](docs/results.md)", "index.md", "[all](results.md)"),
        ("[all](../results.md)", "guides/c.md", "[all](../results.md)"),
        (
            "```\n`volume`\n```\n\n    `volume`\n\n# `volume`",
            "a.md",
            "```\n`volume`\n```\n\n    `volume`\n\n# `volume`",
        ),
    ],
)
def test_names_in_prose_become_links(names, text, page, shown):
    assert names.in_prose(text, page) == shown


def test_names_in_code_become_links(names):
    code = (
        '<div class="language-python highlight"><pre><code>{}<span class="n">volume</span>{}</code></pre></div>'.format
    )
    call = '<span class="p">(</span>'
    assert 'href="models/b.html#volume"' in names.in_code(code("", call), "a.md")
    assert "href" not in names.in_code(code("", ""), "a.md")  # It may be a variable
    assert "href" not in names.in_code(code('<span class="o">.</span>', call), "a.md")  # An attribute of something else


# Parts: text


def test_terminal_text():
    assert as_on_a_terminal("\x1b[31m10%\r100%\x1b[0m\nend\n") == "100%\nend"
    assert fenced("```") == "````\n```\n````"
    assert directives("#| export\n#| code-fold: true\n\nx = 1") == ({"export": "true", "code-fold": "true"}, "x = 1")


def test_formulas_become_mathml_and_code_keeps_its_dollars():
    from markdown import Markdown

    extensions = ["pymdownx.arithmatex", "pymdownx.superfences"]
    markdown = Markdown(extensions=extensions, extension_configs={"pymdownx.arithmatex": {"generic": True}})

    def convert(text):
        return finish.FORMULA.sub(finish.mathml, markdown.convert(text))

    inline = convert(r"so $h_t = \sigma(x)<1$ is")
    assert "<math" in inline and 'alttext="h_t = \\sigma(x)&lt;1"' in inline and "$" not in inline
    assert 'display="block"' in convert("$$\n\\frac{1}{2}\n$$")
    assert convert("costs `$5` and `$6`") == "<p>costs <code>$5</code> and <code>$6</code></p>"
    assert "$HOME" in convert("```\necho $HOME $x$\n```") and "<math" not in convert("```\n$x$\n```")


def test_words_of_code_stay_whole_outside_of_blocks():
    text = "<p><code>--quick</code>, <code>a=1,b=2,c=3,d=4,e=5,f=6,g=7</code></p><pre><code>--quick</code></pre>"
    assert finish.unbroken(text) == (
        '<p><code><span class="word">--quick</span></code>, <code>a=1,<wbr>b=2,<wbr>c=3,<wbr>d=4,<wbr>e=5,<wbr>f=6,<wbr>g=7</code></p>'
        "<pre><code>--quick</code></pre>"
    )


def test_options_stay_whole_in_commands():
    block = '<div class="language-{} highlight"><pre><code id="a--b">lmnotes {} b-c</code></pre></div>'
    whole = '<span class="word">--init-from</span>'
    assert finish.unbroken(block.format("sh", "--init-from")) == block.format("sh", whole)
    assert finish.unbroken(block.format("python", "--init-from")) == block.format("python", "--init-from")


def test_the_parts_of_a_default_string_are_joined():
    (field,) = reference.variables('own: str = (\n    "rnn: n_layers=1; "\n    "ssm: n_layers=6"\n)  # Overrides')
    assert field.default == '"rnn: n_layers=1; ssm: n_layers=6"' and field.comment == "Overrides"


def test_cells_of_a_table_have_their_titles_and_numbers_a_class():
    text = """<table><thead><tr><th>Name</th><th>Bits</th><th>Note</th></tr></thead><tbody>
        <tr><td><code>x --long-name</code></td><td>≤ 1,971.5 ± 0.008</td><td>2 x</td></tr>
        <tr><td>y</td><td></td><td>as <code>tests/test_longer.py::test_b</code></td></tr></tbody></table>"""
    shown = finish.unbroken(finish.TABLE.sub(finish.table, text))
    assert '<th class="number">Bits</th><th>Note</th>' in shown
    assert (
        '<td class="number" data-label="Bits">≤ 1,971.5\u00a0±\u00a00.008</td><td data-label="Note">2\u00a0x</td>'
        in shown
    )
    assert (
        '<code>x <span class="word">--long-name</span></code>' in shown
        and "tests/<wbr>test_longer.py::<wbr>test_b" in shown
    )


def test_a_badge_becomes_a_link():
    cell = dict(cell_type="markdown", source="[![Open](https://a.b/c.svg)](https://a.b/c) ![x](y.svg)")
    assert notebook_page.cell_blocks(cell, None, "", {}) == ["[Open](https://a.b/c) ![x](y.svg)"]


def test_notebook_without_a_title_is_rejected(tmp_path):
    (tmp_path / "x.ipynb").write_text('{"cells": [{"cell_type": "markdown", "metadata": {}, "source": "text"}]}')
    with pytest.raises(ValueError, match="must begin with `# Title`"):
        notebook_page.read(tmp_path / "x.ipynb", tmp_path)


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Build the site as `make docs` does, without a warning, and return its folder"
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, str(ROOT / "docs/build_docs.py"), "--to", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return folder


class Links(HTMLParser):
    "The ids, links and loaded files of a page"

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag != "a" and given.get("rel") != "canonical":
            self.loads += [given[key] for key in ("src", "href") if given.get(key)]


@pytest.fixture(scope="module")
def pages(site):
    "Return {path: `Links`} of all pages except 404.html, which contains the address of the published site"
    return {path: Links(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_every_notebook_and_text_has_a_page(site, pages):
    expected = {notebook_page.read(path, ROOT / "nbs").page for path in build_docs.notebooks()}
    expected |= {build_docs.text_page(path) for path in build_docs.texts()}
    found = {path.relative_to(site).with_suffix(".md").as_posix() for path in pages}
    assert found == expected


def test_links_have_targets(site, pages):
    wrong = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            if re.match(r"https?:|mailto:|data:", link):
                continue
            target, anchor = urldefrag(unquote(link))
            file = Path(os.path.normpath(path.parent / target)) if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in pages and anchor not in (*pages[file].ids, "__codelineno")):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert not wrong


@pytest.mark.parametrize("path", [ROOT / "README.md", *build_docs.texts()], ids=lambda path: path.stem)
def test_links_of_texts_have_targets(path):
    "The pages are also read on the repository's site, where links are relative to the folder of the text"
    text = re.sub(r"(`+).*?\1", "", path.read_text(encoding="utf-8"))  # Without code
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert not [link for link in links if not re.match(r"https?:|mailto:", link) and not (path.parent / link).exists()]


def test_ids_are_unique(site, pages):
    for path, page in pages.items():
        assert [id for id, count in Counter(page.ids).items() if count > 1] == [], path.relative_to(site)


def test_pages_load_nothing_external(pages):
    assert not [link for page in pages.values() for link in page.loads if re.match("(https?:)?//", link)]


def test_nbdev_links_have_targets(site, pages):
    "`nbdev` notes in lmnotes/_modidx.py where each definition is in the site"
    from lmnotes._modidx import d

    missing = []
    for symbols in d["syms"].values():
        for name, (link, _) in symbols.items():
            target, anchor = urldefrag(link.removeprefix(d["settings"]["doc_baseurl"]).lstrip("/"))
            public = not any(part.startswith("_") for part in name.rpartition("lmnotes.")[2].split("."))
            if public and anchor not in pages[site / target].ids:
                missing.append(name)
    assert not missing


RENAMED_MEMBERS = "## Methods, attributes and parameters"


def test_every_name_of_version_0_1_leads_to_a_name():
    page = (ROOT / "docs/renamed.md").read_text(encoding="utf-8").partition(RENAMED_MEMBERS)[0]
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| (?:`(\w+)`|–) \|$", page, re.M)
    assert len(rows) == len(re.findall(r"^\| `", page, re.M)) > 400
    missing = [row for row in rows if not hasattr(import_module(row[1]), row[2] or row[0])]
    assert not missing


def test_every_renamed_member_exists():
    section = (ROOT / "docs/renamed.md").read_text(encoding="utf-8").partition(RENAMED_MEMBERS)[2]
    rows = re.findall(r"^\| `([\w.]+)\.(\w+)` \| `\w+` \| `(\w+)` \|$", section, re.M)
    assert len(rows) == len(re.findall(r"^\| `", section, re.M)) > 100
    for module, owner, name in rows:
        source = inspect.getsource(getattr(import_module(module), owner))
        assert re.search(rf"\b{name}\b", source), f"{module}.{owner} has no {name}"


def test_no_page_contains_local_paths(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert str(ROOT) not in text and str(site) not in text, path


@pytest.mark.parametrize("link", ["nowhere.md", "index.md#nothing"])
def test_a_broken_link_stops_the_build(tmp_path, link):
    (tmp_path / "pages/assets").mkdir(parents=True)
    (tmp_path / "pages/index.md").write_text(f"# Title\n\n[good](index.md#title)\n\n[bad]({link})\n")
    with pytest.raises(SystemExit, match=re.escape(f"[bad]({link})")):
        build_docs.make_site(tmp_path, nav=["index.md"])
    (tmp_path / "pages/index.md").write_text("# Title\n\n[good](index.md#title)\n")
    build_docs.make_site(tmp_path, nav=["index.md"])


def test_navigation_has_its_groups_in_order(tmp_path):
    "The reference comes after what learners read, and the chapter that all others build on is its last"
    site = build_docs.Site(tmp_path)
    tabs = {title: pages for tab in site.navigation() for title, pages in tab.items()}
    order = ["Get started", "Learn", "How-to", "Architectures", "Results", "Reference", "Migration guides", "Project"]
    assert list(tabs) == [title for title in order if title in tabs] and len(tabs) > 5
    assert [next(iter(heading)) for heading in tabs["Reference"]][-1] == "Core"
    shown = re.findall(r"[\w/]+\.md", str(tabs))
    assert len(shown) == len(set(shown))
    assert set(shown) == {n.page for n in site.notebooks} | {build_docs.text_page(path) for path in build_docs.texts()}


def test_pages_lead_to_the_repository_and_to_their_sources(site):
    for page, source in {
        "models/gpt": "/blob/main/nbs/models/31_gpt.ipynb",
        "results": "/edit/main/docs/results.md",
        "index": "/blob/main/nbs/index.ipynb",
        "guides/nanothink": "/edit/main/docs/guides/nanothink.md",
        "LOG": "/edit/main/LOG.md",
    }.items():
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        repository = build_docs.addresses()["repo_url"]
        assert re.findall(r'<a href="([^"]+)"[^>]* rel="edit"', text) == [repository + source]
        assert f'<a href="{repository}"' in text


def test_page_name_collision_is_rejected(tmp_path):
    one = notebook_page.read(ROOT / "nbs/nn/20_lm.ipynb", ROOT / "nbs")
    site = build_docs.Site(tmp_path)
    site.notebooks = [one, dataclasses.replace(one, path=Path("nbs/lm.ipynb"))]
    with pytest.raises(ValueError, match="would both be nn/lm.md. Rename one of them"):
        site.learn_names()


# The site that nbdev itself builds, which needs Quarto for its last step

QUARTO = """
import warnings
from execnb.nbio import read_nb
from nbdev.processors import FilterDefaults
from nbdev.quarto import refresh_quarto_yml

warnings.simplefilter("error", UserWarning)
refresh_quarto_yml()
notebook = read_nb("nbs/inference/51_evaluation.ipynb")
FilterDefaults()(notebook)
print([output for cell in notebook.cells for output in cell.get("outputs", []) if "evaluate" in str(output)])
"""


def test_quarto_export_works(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs/inference").mkdir(parents=True)
    shutil.copy(ROOT / "nbs/inference/51_evaluation.ipynb", tmp_path / "nbs/inference")
    done = subprocess.run([sys.executable, "-c", QUARTO], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "source" in done.stdout and "evaluate" in done.stdout
    assert (tmp_path / "nbs/_quarto.yml").is_file()


@pytest.mark.parametrize("path", build_docs.notebooks(), ids=lambda path: path.stem)
def test_import_cells_hold_only_imports(path):
    "nbdev runs cells with imports when it makes its site, and must not run anything else"
    for cell in notebook_page.read_notebook(path)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "nbdev_export()" in source or "#| export" in source:
            continue
        nodes = list(ast.walk(ast.parse(source)))
        imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in nodes)
        assert not (imports and any(isinstance(node, (ast.Expr, ast.Assign)) for node in nodes)), source


# The site in a browser


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def home(site):
    "Yield the address of the site"
    chromium()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(home):
    with open_browser() as context:
        yield context.browser


@pytest.fixture
def page(browser, home, request):
    "Yield a page that must cause no errors, in the light scheme unless the test passes `dark`"
    scheme = request.param if hasattr(request, "param") else "light"
    context = new_context(browser, color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    errors, outside = watch(page, home)
    yield page
    context.close()
    assert (errors, outside) == ([], [])


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_pages_load(page, home, site, pages, every):
    for path in list(pages)[::every]:
        address = home + path.relative_to(site).as_posix()
        assert page.goto(address).status == 200
        assert page.locator("article h1").count() == 1, address
        width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert width <= 0, f"{address} is {width} pixels too wide"


def found_by(page, home, words):
    "Return the address of the first page that the search finds"
    page.goto(home + "index.html")
    page.locator(".md-search__button").click()
    page.get_by_role("combobox").fill(words)
    first = page.locator("a[href*='?h=']").first
    first.wait_for()
    return first.get_attribute("href").removeprefix(home)


def test_search_finds_a_definition(page, home):
    address = found_by(page, home, "parse_model_args")
    assert address.startswith("nn/lm.html") and address.endswith("#parse_model_args")
    page.goto(home + address)
    assert page.locator("#parse_model_args").count() == 1


@pytest.mark.parametrize(
    ("words", "found"),
    {
        "install": "start/install.html",
        "quickstart": "start/quickstart.html",
        "own data": "howto/own_data.html",
        "resume": "howto/resume.html",
        "fine-tune": "howto/fine_tune.html",
        "early stopping": "howto/early_stopping.html",
        "overfitting": "howto/overfitting.html",
        "out of memory": "howto/out_of_memory.html",
        "export": "howto/export.html",
        "multi-GPU": "howto/multi_gpu.html",
    }.items(),
)
def test_search_finds_the_page_of_a_task(page, home, words, found):
    assert found_by(page, home, words).partition("?")[0] == found


def test_math_is_rendered(page, home):
    page.goto(home + "nn/scans.html")
    boxes = [formula.bounding_box() for formula in page.locator("math").all()[:5]]
    assert len(boxes) == 5 and all(box["width"] > 5 and box["height"] > 5 for box in boxes)
    assert page.locator("math msub").count() > 5
    assert "\\(" not in page.locator("article").inner_text()


def test_folded_code_expands(page, home):
    page.goto(home + "nn/lm.html")
    code = page.locator("details.code").first.locator("pre")
    assert not code.is_visible()
    page.locator("details.code summary").first.click()
    assert code.is_visible()
    page.locator("button.fold-all").click()
    assert page.locator("details.code:not([open])").count() == 0
    page.goto(home + "training/optim.html")
    assert page.locator("details.code:not([open])").count() == 0  # The browser stores the choice
    page.locator("button.fold-all").click()
    assert page.locator("details.code[open]").count() == 0


def test_names_link_to_their_definitions(page, home):
    page.goto(home + "models/gpt.html")
    page.locator("article a.name", has_text="LMConfig").first.click()
    page.wait_for_url("**/nn/lm.html#lmconfig")
    assert "vocab_size" in page.locator("#lmconfig ~ div table").first.inner_text()


# Contrast of text and background, as defined by WCAG
CONTRAST = """(selector) => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  const paint = canvas.getContext("2d", {willReadFrequently: true})
  const color = (layers) => {
    paint.clearRect(0, 0, 1, 1)
    for (const layer of layers) { paint.fillStyle = layer; paint.fillRect(0, 0, 1, 1) }
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)
  }
  const light = (rgb) => rgb.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  return [...document.querySelectorAll(selector)].filter((e) => e.offsetParent && e.textContent.trim()).slice(0, 60).map((e) => {
    const behind = []
    for (let node = e; node; node = node.parentElement) behind.unshift(getComputedStyle(node).backgroundColor)
    const under = light(color(behind)), over = light(color([...behind, getComputedStyle(e).color]))
    const ratio = (Math.max(under, over) + 0.05) / (Math.min(under, over) + 0.05)
    return [Math.round(ratio * 100) / 100, e.textContent.trim().slice(0, 30)]
  })
}"""
READ = {
    "article p, article td, article th, article li, article summary": 4.5,
    "article code, article code span": 3,
    "article div.output span": 3,
}


@pytest.mark.parametrize(
    "name",
    [
        "inspect/tokens",
        "train",
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("index", "nn/lm", "results")),
    ],
)
def test_contrast_in_both_color_schemes(page, home, name):
    page.goto(f"{home}{name}.html")
    backgrounds = []
    for scheme in ("default", "slate"):
        assert page.locator("body").get_attribute("data-md-color-scheme") == scheme
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector, least in READ.items():
            found = page.evaluate(CONTRAST, selector)
            assert found or "output" in selector  # Not every page has colored output
            assert not [pair for pair in found if pair[0] < least], f"{scheme} {selector}"
        page.locator("form[data-md-component=palette] label:visible").click()
    assert backgrounds[0] != backgrounds[1]
    page.wait_for_function("document.body.dataset.mdColorScheme == 'default'")


@pytest.mark.parametrize("page", ["dark"], indirect=True)
@pytest.mark.parametrize(("name", "kind"), [("training/optim", ".figure"), ("results", "[src*=step_profile]")])
def test_figures_show_the_page_behind_them_in_dark_mode(page, home, name, kind):
    page.goto(f"{home}{name}.html")
    assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
    picture = page.locator(f"article img{kind}").first
    assert picture.evaluate("e => getComputedStyle(e).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert picture.evaluate("e => e.complete && e.naturalWidth") > 100
    assert picture.get_attribute("alt")


@pytest.fixture
def phone(browser, home):
    "Yield a page of the size of a phone"
    context = new_context(browser, viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    yield context.new_page()
    context.close()


@pytest.mark.parametrize(
    "name", ["index", "results", "models/gpt", "guides/nanothink", "trust", "runs/config", "compare", "gallery"]
)
def test_a_phone_shows_cards_and_scrolls_only_down(phone, home, name):
    phone.goto(f"{home}{name}.html")
    assert phone.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    for table in phone.locator("article table:has(td[data-label]):not(:has(td.number))").all()[:5]:
        cell = table.locator("td").first
        if cell.is_visible():
            assert cell.evaluate("e => getComputedStyle(e).display") == "block"
            assert cell.evaluate("e => getComputedStyle(e, '::before').content").strip('"') == cell.get_attribute(
                "data-label"
            )
            assert table.evaluate("e => e.scrollWidth - e.clientWidth") <= 1


def test_figures_on_a_phone_keep_a_legible_size(phone, home):
    for page in ("results", "models/gpt"):
        phone.goto(f"{home}{page}.html")
        assert phone.locator("article img").first.evaluate("e => e.clientWidth") >= 600


def test_tables_and_lines_fit_a_laptop(page, home):
    page.goto(home + "results.html")
    table = page.locator("table:has(th:nth-child(9))").first
    assert table.evaluate("e => e.closest('.output').scrollWidth - e.closest('.output').clientWidth") <= 0
    number = table.locator("td.number").first
    assert number.evaluate("e => getComputedStyle(e).textAlign") == "right"
    assert "tabular-nums" in number.evaluate("e => getComputedStyle(e).fontVariantNumeric")
    page.goto(home + "models/gpt.html")
    lengths = page.evaluate(LINES)
    assert len(lengths) > 5 and 65 <= sum(lengths) / len(lengths) <= 85


# Characters in each full line of the paragraphs
LINES = """() => [...document.querySelectorAll("article > p:not([class])")].flatMap((p) => {
  const lines = {}
  for (const walk = document.createTreeWalker(p, NodeFilter.SHOW_TEXT); walk.nextNode();)
    for (let i = 0; i < walk.currentNode.length; i++) {
      const range = document.createRange()
      range.setStart(walk.currentNode, i)
      range.setEnd(walk.currentNode, i + 1)
      const y = Math.round(range.getBoundingClientRect().bottom / 12)
      lines[y] = (lines[y] || 0) + 1
    }
  return Object.values(lines).slice(0, -1)
})"""
