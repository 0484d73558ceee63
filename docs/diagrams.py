"""Write the diagrams at the top of the notebooks: `python docs/diagrams.py`."""

from pathlib import Path

import diagrams_of_data
import diagrams_of_layers
import diagrams_of_models
from drawing import DIAGRAMS, render

MODULES = diagrams_of_data, diagrams_of_layers, diagrams_of_models  # Each registers its diagrams
PICTURES = Path(__file__).resolve().parent.parent / "nbs/pictures"


def main():
    PICTURES.mkdir(exist_ok=True)
    for old in PICTURES.glob("*.svg"):
        if old.stem not in DIAGRAMS:
            old.unlink()
    for name in DIAGRAMS:
        (PICTURES / f"{name}.svg").write_text(render(name), encoding="utf-8", newline="\n")
    print(f"{len(DIAGRAMS)} diagrams are in nbs/pictures/")


if __name__ == "__main__":
    main()
