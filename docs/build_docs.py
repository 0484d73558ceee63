"""Build the documentation site from the notebooks and their saved outputs: `python docs/build_docs.py [--to FOLDER]`.

Every notebook becomes a Markdown page (notebook_page.py) with links from names to their definitions (names.py). Zensical then
builds the site. The build executes no notebook and needs no network.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path
from xml.sax.saxutils import quoteattr

import notebook_page
import reference
from latex2mathml.converter import convert
from names import Names
from pages import as_on_a_terminal

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PROJECT_PAGES = (
    "CONTRIBUTING",
    "CHANGELOG",
    "SECURITY",
    "LOG",
    "docs/trust",
    "docs/renamed",
)  # Pages of the heading "Project"
RUNNABLE = ("train", "generate", "prepare", "compare")
CHAPTERS = {  # Folder in nbs/ -> heading in the navigation, in reading order
    "": "Core",
    "data": "Data",
    "nn": "Model building blocks",
    "models": "Architectures",
    "training": "Training",
    "inference": "Inference",
    "runs": "Runs",
    "inspect": "Inspection",
    "export": "Export",
    "recipes": "Recipes",
    "apps": "Command line",
}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def group(notebook):
    "Return the navigation heading of a notebook, or an empty string for the runnable notebooks in nbs/"
    folder = notebook.page.rpartition("/")[0]
    return CHAPTERS[folder] if folder or notebook.number is not None else ""


def settings():
    "Return the DEFAULT section of settings.ini"
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def bars_in_code(row):
    "Remove the backslashes before bars in a table row's code, which GitHub needs and Python-Markdown would print"
    return re.sub(r"(`+)(.+?)\1", lambda code: code[0].replace(r"\|", "|"), row[0])


class Site:
    "The Markdown pages of the site, written into one folder"

    def __init__(self, folder):
        self.folder = folder
        config = settings()
        self.blob_url = f"{config['git_url']}/blob/{config['branch']}"
        self.names = Names(ROOT, self.blob_url)
        self.notebooks = [notebook_page.read(path, NBS) for path in notebooks()]

    def learn_names(self):
        "Collect the definitions of every page"
        taken = {}
        for notebook in self.notebooks:
            other = taken.setdefault(notebook.page, notebook)
            if other is not notebook:
                raise ValueError(f"{other.path} and {notebook.path} would both be {notebook.page}. Rename one of them")
            known = [notebook.name] + [notebook.module] * bool(notebook.module)
            numbered = [notebook.path.stem] if notebook.path.stem[0].isdigit() else []
            self.names.add_page(notebook.page, *known, *numbered)
            for definition in (item for cell in notebook.cells for item in cell["defines"]):
                self.names.add(notebook.page, definition)
        for name in PROJECT_PAGES:
            self.names.add_page(project_page(name), f"{name}.md")
        for path in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs/assets").iterdir()]:
            inside = path.relative_to(ROOT / "docs").as_posix()
            self.names.add_page(inside, f"docs/{inside}")

    def pictures(self, page):
        "Return a function that stores the pictures of a page"
        path = self.folder / page
        stored = []

        def picture(data, ending):
            stored.append(path.with_name(f"{path.stem}_{len(stored) + 1}.{ending}"))
            stored[-1].parent.mkdir(parents=True, exist_ok=True)
            stored[-1].write_bytes(data)
            return stored[-1].name

        return picture

    def write(self, page, text):
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.names.in_prose(text, page), encoding="utf-8")

    def source_urls(self, notebook):
        "Return {definition: URL of its line in the exported module}"
        if not notebook.module:
            return {}
        path = notebook.module.replace(".", "/") + ".py"
        lines = reference.lines_of_definitions((ROOT / path).read_text(encoding="utf-8"))
        return {name: f"{self.blob_url}/{path}#L{line}" for name, line in lines.items()}

    def write_notebook(self, notebook):
        picture = self.pictures(notebook.page)
        self.write(notebook.page, notebook_page.page_text(notebook, picture, self.source_urls(notebook), self.blob_url))

    def write_text(self, source, page):
        "Write a Markdown page. The line `<!-- outputs: nbs/x.ipynb -->` in it is replaced by that notebook's tables and pictures"

        def shown(mark):
            notebook = next((n for n in self.notebooks if f"{n.name}.ipynb" == mark[1]), None)
            if notebook is None:
                raise ValueError(f"{source}: {mark[0]} names no notebook. Write nbs/NAME.ipynb")
            return "\n\n".join(notebook_page.output_blocks(notebook, picture))

        picture = self.pictures(page)
        text = re.sub(r"\A(# .+\n+)> (.+)\n", r"\1\2\n{ .lead }\n", source.read_text(encoding="utf-8"))
        text = re.sub(r"^<!-- outputs: (\S+) -->$", shown, text, flags=re.M)
        self.write(page, re.sub(r"^\|.*$", bars_in_code, text, flags=re.M))
        for name in re.findall(r"\]\((pictures/[\w.]+)\)", text):
            target = (self.folder / page).parent / name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source.parent / name, target)
        return page

    def navigation(self):
        "Write every page and return the navigation, in reading order"
        by_stem = {n.path.stem: n for n in self.notebooks}
        groups = {title: [] for title in CHAPTERS.values()}
        for notebook in self.notebooks:
            self.write_notebook(notebook)
            if title := group(notebook):
                groups[title].append({notebook.title: notebook.page})
        run = [{by_stem[name].title: by_stem[name].page} for name in RUNNABLE if name in by_stem]
        guides = [
            {first_heading(path).removeprefix("Migrating from "): self.write_text(path, f"guides/{path.name}")}
            for path in sorted((ROOT / "docs/guides").glob("*.md"))
        ]
        results = self.write_text(ROOT / "docs/results.md", "results.md")
        project = [self.write_text(ROOT / f"{name}.md", project_page(name)) for name in PROJECT_PAGES]
        start = [{"Home": "index.md"}, *run]
        middle = [{title: pages} for title, pages in groups.items() if pages]
        return [
            {"Get started": start},
            *middle,
            {"Migration guides": guides},
            {"Results": results},
            {"Project": project},
        ]


def project_page(name):
    "Return the page of a Markdown file given by its path without the ending"
    return f"{name.rpartition('/')[2]}.md"


def notebooks():
    "Return the paths of all notebooks, in reading order"
    return sorted(path for path in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.parts))


def first_heading(path):
    return re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.M)[1].replace("`", "")


def mathml(formula):
    "Return the MathML of a formula that the arithmatex extension found, so that pages need no math script"
    tag, latex = formula[1], html.unescape(formula[2])
    element = convert(latex, display="inline" if tag == "span" else "block")
    return f'<{tag} class="math">{element.replace("<math ", f"<math alttext={quoteattr(latex)} ", 1)}</{tag}>'


def finish_pages(site, folder):
    "Convert the formulas of finished pages to MathML, and link the names in their code to the definitions"
    for path in folder.rglob("*.html"):
        page = path.relative_to(folder).with_suffix(".md").as_posix()
        text = FORMULA.sub(mathml, path.read_text(encoding="utf-8"))
        path.write_text(site.names.in_code(text, page), encoding="utf-8")


def toml(value):
    "Return a list, a dict or a text as TOML"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {toml(item)}' for key, item in value.items())}}}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def make_site(folder, **settings):
    "Build the site of the pages in `folder`/pages in `folder`/site, and treat any warning as an error"
    lines = "".join(f"{key} = {toml(value)}\n" for key, value in {"docs_dir": "pages", **settings}.items())
    config = (ROOT / "docs/zensical.toml").read_text(encoding="utf-8").replace("[project]\n", f"[project]\n{lines}", 1)
    (folder / "zensical.toml").write_text(config, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"Zensical did not build the site:\n{as_on_a_terminal(done.stdout + done.stderr)}")


def build(target):
    "Build the site in the folder `target`, which is emptied first"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        site = Site(folder / "pages")
        site.folder.mkdir()
        site.learn_names()
        shutil.copytree(ROOT / "docs/assets", site.folder / "assets")
        shutil.copytree(NBS / "pictures", site.folder / "pictures")  # Diagrams, by their path in the notebooks
        shutil.copy(ROOT / "LICENSE", site.folder)
        ini = settings()
        make_site(folder, nav=site.navigation(), site_url=f"{ini['doc_host']}{ini['doc_baseurl']}/")
        finish_pages(site, folder / "site")
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(folder / "site", target)


def main():
    parser = argparse.ArgumentParser(description="Build the documentation site")
    parser.add_argument("--to", type=Path, default=ROOT / "_docs", help="output folder")
    target = parser.parse_args().to.resolve()
    build(target)
    folder = os.path.relpath(target)
    print(
        f"The site is in {folder}/. To use the search, run: python -m http.server --bind 127.0.0.1 --directory {folder}"
    )


if __name__ == "__main__":
    main()
