"""A run writes over no file that was there before, and every executed notebook remains in the folder of its run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import DEADLINE, ROOT, TINY, read_log, run_in_process, run_recipe, train, write_corpus
from test_resume_alone import EXPERT, RECIPES, write_material

pytestmark = pytest.mark.usefixtures("short_texts")
PAPERMILL = str(Path(sys.executable).parent / "papermill")
OWN = "run.json", ".lock", ".owner.json", "best", "last", "final", "interrupted"  # They mark the folder of a run


def run_case(folder, name, **changes):
    "Run a recipe, or `lmnotes.run`, in a new process. Return the exit code"
    if name == "train":
        return run_in_process(folder, train, **TINY | dict(steps=5, save_every=5) | changes)
    params, _, data, place, _ = RECIPES[name]
    return run_in_process(folder, run_recipe, ROOT / f"nbs/recipes/{name}.ipynb", **params | {data: place} | changes)


def written_files(folder, run):
    "Return the files of a run, in its folder and next to it"
    inside = [p for p in (folder / run).rglob("*") if p.is_file()]
    beside = [p for p in (folder / run).parent.glob(f"{Path(run).name}*.pt")]
    return [p.relative_to(folder) for p in (*inside, *beside)]


@pytest.mark.parametrize("name", ["train", *RECIPES])
def test_no_file_is_overwritten(name, tmp_path):
    "Files with all names that a run writes are still there after a failed command and after a run"
    data, run = ("data", "runs/r") if name == "train" else (RECIPES[name][2], RECIPES[name][4])
    folders = [tmp_path / case for case in ("names", "other", "earlier")]
    for folder in folders:
        write_material(folder)
        write_corpus(folder / "texts")
    changes = dict(data="texts") if name == "train" else {}
    assert run_case(folders[0], name, **changes) == 0, read_log(folders[0])
    names = written_files(folders[0], run)
    assert len(names) > 8
    for folder in folders[1:]:
        of_another_program = folder.name == "other"
        kept = {}
        for path in names:
            if of_another_program and (path.name in OWN or path.parent.name.startswith("step_")):
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(kept.setdefault(str(path), f"precious {path}"))
        assert run_case(folder, name, **changes | {data: "nowhere"}) != 0
        assert {n: (folder / n).read_text() for n in kept} == kept, "a failed command changed a file"
        assert run_case(folder, name, **changes) == 0, read_log(folder)
        found = [p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.stat().st_size < 1000]
        assert not [n for n in kept if kept[n].encode() not in found], read_log(folder)[-2000:]


@pytest.mark.nightly
def test_five_commands_leave_five_reports(tmp_path):
    "Three experts, a resume and a failed command each leave their executed notebook"
    write_material(tmp_path)
    notebook = tmp_path / "nbs/recipes/pretrain_expert.ipynb"
    notebook.parent.mkdir(parents=True)
    notebook.write_bytes((ROOT / "nbs/recipes/pretrain_expert.ipynb").read_bytes())
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LMNOTES_")}

    def papermill(**params):
        words = [word for name, value in params.items() for word in ("-p", name, str(value))]
        command = [PAPERMILL, "nbs/recipes/pretrain_expert.ipynb", *words, "--start-timeout", str(DEADLINE)]
        options = dict(cwd=tmp_path, env=environ | dict(MPLBACKEND="agg"), stdin=subprocess.DEVNULL)
        return subprocess.run(command, capture_output=True, text=True, **options)

    small = EXPERT | dict(data_dir="domains", max_epochs=1, d_inner=32, causal_share=1.0)
    experts = "transformer", "state_space", "diffuser"
    for expert in experts:
        done = papermill(**small | dict(expert=expert))
        assert done.returncode == 0, done.stderr
        assert "step 10/" in done.stdout and "Unable to parse" not in done.stderr
        commands = [f"lmnotes {command} --run {expert}_expert" for command in ("generate", "evaluate")]
        assert done.stderr.splitlines()[-3:] == ["lmnotes: next:", *commands]
        assert re.search(rf"^{expert}_expert: validation ", done.stderr, re.M)
    assert papermill(expert="transformer", resume=True, max_epochs=2).returncode == 0
    assert papermill(expert="transformer", resume="nowhere.pt").returncode == 1
    found = {str(p.relative_to(tmp_path / "checkpoints")) for p in (tmp_path / "checkpoints").rglob("*.ipynb")}
    reports = {f"{expert}_expert/pretrain_expert.ipynb" for expert in experts}
    assert found == reports | {"transformer_expert/pretrain_expert-1.ipynb", "notebooks/pretrain_expert.ipynb"}
