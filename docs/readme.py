"""Write README.md and its pictures from nbs/index.ipynb and its saved outputs: `python docs/readme.py`."""

import re

from pages import ROOT, cell_markdown, read_notebook, settings

NOTE = "<!-- Made from nbs/index.ipynb by docs/readme.py: edit the notebook, not this file. -->"


def badges():
    "Return the badges, which only the README shows, because the site requests nothing from other servers"
    ini = settings()
    tests, docs = (f"{ini['git_url']}/actions/workflows/{name}.yml" for name in ("test", "docs"))
    shown = [
        f"[![Tests]({tests}/badge.svg)]({tests})",
        f"[![Documentation]({docs}/badge.svg)]({ini['doc_host']}{ini['doc_baseurl']}/)",
        "[![License: Apache-2.0](https://img.shields.io/badge/license-Apache--2.0-blue)](LICENSE)",
    ]
    return " ".join(shown)


def readme():
    "Return {path: content} of the README and its pictures"
    files = {}

    def picture(data, ending):
        path = f"docs/pictures/readme_{len(files) + 1}.{ending}"
        files[path] = data
        return path

    cells = read_notebook(ROOT / "nbs/index.ipynb")["cells"]
    title, *rest = [block for cell in cells for block in cell_markdown(cell, picture)]
    text = "\n\n".join([NOTE, title, badges(), *rest]) + "\n"
    text = re.sub(r"\]\((?=[\w/]+\.ipynb\))", "](nbs/", text)  # In the notebook, links are relative to nbs/
    return files | {"README.md": text.encode()}


if __name__ == "__main__":
    for path, content in readme().items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(content)
