"""Build the documentation site from the notebooks and their saved outputs: `python docs/build_docs.py [--to FOLDER]`.

Every notebook becomes a Markdown page (notebook_page.py) with links from names to their definitions (names.py). Zensical then
builds the site. The build executes no notebook and needs no network.

To add a page that is not a notebook, write a Markdown file into docs/start, docs/learn, docs/howto or docs/guides. A number at the
beginning of its name gives its place in the navigation.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import notebook_page
import reference
from finish import finish
from names import Names
from pages import ROOT, as_on_a_terminal, settings

NBS = ROOT / "nbs"
PROJECT_PAGES = ("CONTRIBUTING", "CHANGELOG", "SECURITY", "LOG", "docs/trust", "docs/renamed")
RUNNABLE = ("train.md", "generate.md", "playground.md", "prepare.md", "compare.md")
REFERENCE = {  # Folder in nbs/ -> heading in the reference
    "data": "Data",
    "nn": "Model building blocks",
    "training": "Training",
    "inference": "Inference",
    "runs": "Runs",
    "inspect": "Inspection",
    "export": "Sharing",
    "recipes": "Recipes",
    "apps": "Command line",
    "": "Core",
}


def addresses():
    "Return the settings of Zensical that are addresses"
    ini = settings()
    site, repo = f"{ini['doc_host']}{ini['doc_baseurl']}/", ini["git_url"]
    return dict(site_url=site, repo_url=repo, repo_name=ini["repo"], edit_uri=f"edit/{ini['branch']}")


def bars_in_code(row):
    "Remove the backslashes before bars in a table row's code, which GitHub needs and Python-Markdown would print"
    return re.sub(r"(`+)(.+?)\1", lambda code: code[0].replace(r"\|", "|"), row[0])


class Site:
    "The Markdown pages of the site, written into one folder"

    def __init__(self, folder):
        self.folder = folder
        config = settings()
        self.blob_url = f"{config['git_url']}/blob/{config['branch']}"
        self.edit_url = f"{config['git_url']}/edit/{config['branch']}"
        self.sources = {}  # Page -> URL of its source
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
        for path in texts():
            self.names.add_page(text_page(path), path.relative_to(ROOT).as_posix())
        for path in (ROOT / "docs/assets").iterdir():
            self.names.add_page(f"assets/{path.name}", f"docs/assets/{path.name}")

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
        self.sources[notebook.page] = f"{self.blob_url}/{notebook.name}.ipynb"
        self.write(notebook.page, notebook_page.page_text(notebook, picture, self.source_urls(notebook), self.blob_url))

    def write_text(self, source):
        "Write a page from Markdown. The line `<!-- outputs: nbs/x.ipynb -->` in it is replaced by that notebook's tables and pictures"

        def shown(mark):
            notebook = next((n for n in self.notebooks if f"{n.name}.ipynb" == mark[1]), None)
            if notebook is None:
                raise ValueError(f"{source}: {mark[0]} names no notebook. Write nbs/NAME.ipynb")
            return "\n\n".join(notebook_page.output_blocks(notebook, picture))

        page = text_page(source)
        self.sources[page] = f"{self.edit_url}/{source.relative_to(ROOT).as_posix()}"
        picture = self.pictures(page)
        text = re.sub(r"\A(# .+\n+)> (.+)\n", r"\1\2\n{ .lead }\n", source.read_text(encoding="utf-8"))
        text = re.sub(r"(!\[.+\]\(pictures/[\w.]+\))$", r"\1{ .figure }", text, flags=re.M)
        text = re.sub(r"^<!-- outputs: (\S+) -->$", shown, text, flags=re.M)
        self.write(page, re.sub(r"^\|.*$", bars_in_code, text, flags=re.M))

    def navigation(self):
        "Return the navigation: a tab with its pages or headings, in reading order, for each title that has pages"
        title_of = {notebook.page: notebook.title for notebook in self.notebooks}
        chapters = {}
        for page, title in title_of.items():
            if page not in ("index.md", "gallery.md", *RUNNABLE):
                chapters.setdefault(page.rpartition("/")[0], []).append({title: page})
        tabs = {
            "Get started": [{"Home": "index.md"}, *titles("start"), *({title_of[page]: page} for page in RUNNABLE)],
            "Learn": [*titles("learn"), *chapters.get("learn", [])],
            "How-to": titles("howto"),
            "Architectures": [{title_of["gallery.md"]: "gallery.md"}, *chapters["models"]],
            "Results": "results.md",
            "Reference": [{title: chapters[folder]} for folder, title in REFERENCE.items()],
            "Migration guides": titles("guides", "Migrating from "),
            "Project": [text_page(ROOT / f"{name}.md") for name in PROJECT_PAGES],
        }
        return [{title: pages} for title, pages in tabs.items() if pages]


def texts():
    "Return the paths of all pages that are not notebooks"
    return [*(ROOT / f"{name}.md" for name in PROJECT_PAGES if "/" not in name), *sorted((ROOT / "docs").rglob("*.md"))]


def text_page(path):
    "Return the page of a text: without the number that orders the texts of its folder"
    page = path.relative_to(ROOT / "docs" if (ROOT / "docs") in path.parents else ROOT)
    return page.with_name(re.sub(r"^\d+_", "", page.name)).as_posix()


def titles(folder, prefix=""):
    "Return [{title: page}] of the texts in a folder of docs/, in the order of their file names"
    paths = [path for path in texts() if path.parent == ROOT / "docs" / folder]
    return [{first_heading(path).removeprefix(prefix): text_page(path)} for path in paths]


def notebooks():
    "Return the paths of all notebooks, in reading order"
    return sorted(path for path in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in path.parts))


def first_heading(path):
    return re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.M)[1].replace("`", "")


def finish_pages(site, folder):
    "Finish the pages that Zensical wrote, and lead their edit links to the sources of the pages"
    for path in folder.rglob("*.html"):
        page = path.relative_to(folder).with_suffix(".md").as_posix()
        text = finish(path.read_text(encoding="utf-8"), page, site.names)
        if page in site.sources:
            text = text.replace(f"{site.edit_url}/{page}", site.sources[page])
        path.write_text(text, encoding="utf-8")


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
    shutil.copytree(ROOT / "docs/theme", folder / "theme", dirs_exist_ok=True)
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
        for source in (NBS / "pictures", ROOT / "docs/pictures"):  # Diagrams, and the pictures of texts
            shutil.copytree(source, site.folder / "pictures", dirs_exist_ok=True)
        shutil.copy(ROOT / "docs/theme/.icons/logo.svg", site.folder / "assets")
        shutil.copy(ROOT / "LICENSE", site.folder)
        for notebook in site.notebooks:
            site.write_notebook(notebook)
        for path in texts():
            site.write_text(path)
        make_site(folder, nav=site.navigation(), **addresses())
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
