"""Every weights file that a recipe writes under a name of its guide opens in `load`, `generate`, `evaluate` and `init_from`."""

import shutil

import pytest
import torch
from helpers import ROOT, execute_command, run_notebook
from test_resume_alone import RECIPES, write_material

import lmnotes
from lmnotes.core import CheckpointError
from lmnotes.nn.lm import new_lm
from lmnotes.training.weights import load_initial_weights

pytestmark = pytest.mark.usefixtures("short_texts")
FILES = {  # {recipe: pattern of its files}
    "tisslm": "my_model/*.pt",
    "agiformer": "checkpoints/ap/*.pth",
    "text_only": "out/text/*.pt",
    "pretrain_expert": "checkpoints/*.pt",
}


@pytest.mark.parametrize("name", FILES)
def test_files_open(name, tmp_path, monkeypatch, capsys):
    write_material(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMNOTES_OUT_DIR", raising=False)
    params, _, data, place, run = RECIPES[name]
    whole = run_notebook(ROOT / f"nbs/recipes/{name}.ipynb", params | {data: place})["r"]
    files = sorted(tmp_path.glob(FILES[name]))
    assert files
    for file in files:
        r = lmnotes.load(file, device="cpu")
        assert r.folder == tmp_path / run and r.generate("a", 3, seed=0) == r.generate("a", 3, seed=0)
        assert r.evaluate()["loss"] > 0
        assert execute_command(["generate", "--run", str(file), "--prompt", "a", "--n", "3"]) == 0
        again = load_initial_weights(new_lm(whole.config.arch, **whole.info["model"]), file)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), r.lm.parameters()))
    last = [file for file in files if "final" in file.name or "last" in file.name]
    for file in last:
        same = zip(lmnotes.load(file, device="cpu").lm.parameters(), lmnotes.load(run, device="cpu").lm.parameters())
        assert all(torch.equal(a, b) for a, b in same)
    with pytest.raises(ValueError, match="is a file, which holds one state of the weights"):
        lmnotes.load(files[0], "best")
    alone = shutil.copy(files[0], tmp_path / "alone.pt")
    with pytest.raises(CheckpointError, match="alone.pt: no run folder next to this file"):
        lmnotes.load(alone)
