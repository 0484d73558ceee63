"""Write README.md from nbs/index.ipynb: `python docs/readme.py`."""

from pathlib import Path

from pages import cell_markdown, read_notebook

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by docs/readme.py: edit the notebook, not this file. -->"


def no_pictures(data, ending):
    raise ValueError("nbs/index.ipynb: a README has no place for pictures; remove that output")


def readme():
    "The README's text"
    title, *rest = [
        block for cell in read_notebook(ROOT / "nbs/index.ipynb")["cells"] for block in cell_markdown(cell, no_pictures)
    ]
    return "\n\n".join([NOTE, title, *rest]) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
