"""A newcomer does each task with the commands of its page, at most two, in a folder that holds only settings.ini and README.md."""

import json
import re
import runpy
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    differences,
    files_of_page,
    lmnotes_command,
    page_blocks,
    pause_before_step,
    read_log,
    run_in_process,
    run_program,
    run_results,
    start_process,
    stop_before_step,
    wait_for_exit,
    wait_until,
    with_environment,
)

import lmnotes
from lmnotes.data.tokenizer import BPETokenizer
from lmnotes.models.gpt2 import save_hf
from lmnotes.nn.lm import new_lm
from lmnotes.runs.config import RunConfig

TASKS = {  # {task: (page, words in the block with its commands)}
    "train a model": ("docs/start/2_quickstart.md", "lmnotes train --run first --steps 60"),
    "use it": ("docs/start/2_quickstart.md", "lmnotes generate"),
    "watch a run from a second terminal": ("docs/start/2_quickstart.md", "lmnotes watch"),
    "train on your own text": ("docs/howto/01_own_data.md", "--run mine "),
    "resume": ("docs/howto/02_resume.md", "--run first --resume\n"),
    "train longer": ("docs/howto/02_resume.md", "--run first --resume --steps"),
    "train your own architecture": ("docs/howto/11_own_architecture.md", "python average.py"),
    "fine-tune GPT-2 with LoRA": ("docs/howto/03_fine_tune.md", "--init-from gpt2 "),
    "open a model in transformers": ("docs/howto/08_export.md", "--format transformers"),
    "compare two runs": ("docs/howto/06_compare.md", "lmnotes diff"),
}
SMALL = dict(LMNOTES_BATCH_SIZE="8", LMNOTES_CTX_LEN="32", LMNOTES_EVAL_BATCHES="2", LMNOTES_DEVICE="cpu")
TINY = SMALL | dict(LMNOTES_MODEL_ARGS="d_model=32 n_layers=1")


def commands(task):
    "Return the commands of a task, each as the words of a line"
    page, words = TASKS[task]
    (block,) = [block for kind in ("sh", "text") for block in page_blocks(ROOT / page, kind) if words in block]
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_needs_at_most_two_commands(task):
    lines = commands(task)
    assert 1 <= len(lines) <= 2
    assert all(line[0] in ("lmnotes", "python") and not {"&&", "||", "|", ";", "\\"} & {*line} for line in lines)


@pytest.mark.parametrize("page", sorted({page for page, _ in TASKS.values()}))
def test_the_readme_links_to_the_page_of_each_task(page):
    assert f"]({page})" in (ROOT / "README.md").read_text(encoding="utf-8")


def run_file(path, *words):
    "Run a Python file as `python` does"
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")
    return 0


def function_of(line):
    "Return what runs a command line: a function and its arguments"
    return (lmnotes_command, *line[1:]) if line[0] == "lmnotes" else (run_file, *line[1:])


def run_task(task, folder, environ=TINY):
    "Run the commands of a task, and return what they printed"
    printed = []
    for line in commands(task):
        (folder / "log").unlink(missing_ok=True)
        assert run_in_process(folder, with_environment, environ, *function_of(line)) == 0, read_log(folder)
        printed.append(read_log(folder))
    return SimpleNamespace(printed=printed, runs=folder / "checkpoints")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "Return a folder with the run `first`, an empty data folder and a text, README.md"
    folder = tmp_path_factory.mktemp("project")
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "data").mkdir()
    run_task("train a model", folder)
    return folder


def record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_train_a_model_and_use_it(project):
    done = record(project / "checkpoints/first")
    assert (done["status"], done["step"], done["config"]["arch"]) == ("done", 60, "gpt")
    text, table = run_task("use it", project).printed
    assert text.startswith("The") and len(text) > 20 and "bpb" in table


def test_watch_a_run_from_a_second_terminal(project, tmp_path):
    (tmp_path / "settings.ini").touch()
    (tmp_path / "data").symlink_to(project / "data")
    (train,), (watch,) = commands("train a model"), commands("watch a run from a second terminal")
    process = start_process(tmp_path, with_environment, TINY, pause_before_step, 30, *function_of(train))
    wait_until((tmp_path / "reached").exists, process)
    (watched := tmp_path / "watched").touch()
    second = start_process(tmp_path, *function_of(watch), output=str(watched))
    wait_until(lambda: f"first: gpt on {RunConfig.data} | running at step" in watched.read_text(), second)
    (tmp_path / "go").touch()
    assert wait_for_exit(process) == wait_for_exit(second) == 0
    assert "done at step 60 of 60" in watched.read_text()


def test_train_on_your_own_text(project):
    runs = run_task("train on your own text", project).runs
    done = record(runs / "mine")
    assert done["status"] == "done" and done["data"]["what"] == "README"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokenizer = lmnotes.load_tokenizer(runs / "mine/tokenizer")
    assert len(tokenizer.encode(" lmnotes")) < len(lmnotes.load_tokenizer(runs / "first/tokenizer").encode(" lmnotes"))
    assert abs(sum(done["data"]["tokens"].values()) - len(tokenizer.encode(text))) < 20


def test_resume_gives_the_same_bits_and_then_train_longer(project, tmp_path):
    shutil.copy(project / "settings.ini", tmp_path)
    (tmp_path / "data").symlink_to(project / "data")
    (train,) = commands("train a model")
    assert stop_before_step(25, tmp_path, with_environment, TINY, *function_of(train)) == 130
    assert record(tmp_path / "checkpoints/first")["status"] == "interrupted"
    run_task("resume", tmp_path)
    assert not differences(run_results(project / "checkpoints/first"), run_results(tmp_path / "checkpoints/first"))
    run_task("train longer", tmp_path)
    done = record(tmp_path / "checkpoints/first")
    assert (done["status"], done["step"]) == ("done", 120)


def test_train_your_own_architecture(project):
    for name, code in files_of_page(ROOT / "docs/howto/11_own_architecture.md").items():
        (project / name).write_text(code, encoding="utf-8")
    done = run_task("train your own architecture", project, SMALL)
    assert done.printed[1].startswith("The") and record(done.runs / "mine")["config"]["arch"] == "average"
    check = (
        "import average\nfrom lmnotes.nn.lm import check_contract\ncheck_contract('average', vocab_size=11, ctx_len=8)"
    )
    assert run_in_process(project, run_program, f"import sys\nsys.path.insert(0, '.')\n{check}") == 0, read_log(project)
    (project / "log").unlink()
    assert run_in_process(project, lmnotes_command, "generate", "--run", "mine") == 2
    assert "names no architecture of lmnotes. Use a whole checkpoint or run your own file" in read_log(project)


def test_fine_tune_gpt2_with_lora(project):
    tokenizer = BPETokenizer.train(iter([(ROOT / "README.md").read_text(encoding="utf-8")]), 300)
    tokenizer.save(project / "gpt2")
    torch.manual_seed(0)
    lm = new_lm("gpt2", vocab_size=300, ctx_len=32, n_positions=32, d_model=32, n_layers=2, n_heads=2)
    save_hf(lm, project / "gpt2")
    runs = run_task("fine-tune GPT-2 with LoRA", project, SMALL).runs
    done = record(runs / "tuned_gpt2")
    assert done["status"] == "done" and done["config"]["arch"] == "gpt2" and done["model"]["n_layers"] == 2
    r = lmnotes.load(runs / "tuned_gpt2")
    assert r.tokenizer.fingerprint == tokenizer.fingerprint and r.lm.lora.rank == 8
    weights = r.lm.transformer.h[0].mlp.c_fc
    assert torch.equal(
        weights.base.weight if hasattr(weights, "base") else weights.weight, lm.transformer.h[0].mlp.c_fc.weight
    )


def test_open_a_model_in_transformers(project):
    runs = run_task("open a model in transformers", project).runs
    (code,) = [code for code in page_blocks(ROOT / "docs/howto/08_export.md", "python") if "transformers" in code]
    (project / "log").unlink()
    assert run_in_process(project, run_program, code) == 0, read_log(project)
    r = lmnotes.load(runs / "nano")
    n = int(re.search(r"max_new_tokens=(\d+)", code)[1])
    assert "The" + r.generate("The", n, temperature=0) in read_log(project)


def test_compare_two_runs(project):
    shown = run_task("compare two runs", project, SMALL).printed[1]
    assert re.search(r"arch +gpt +rnn", shown) and "first" in shown and "second" in shown and "bpb" in shown
