"""Values from files are only text, and secrets are rejected.

A value from a file of someone else never becomes a path, a Python name, HTML, Markdown or a terminal sequence. Every test uses a file or a parameter that an attacker or a mistake could produce."""

import ast
import html.parser
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import mistune
import pytest
import torch
from filelock import FileLock
from helpers import (
    ROOT,
    TINY,
    lmnotes_command,
    read_log,
    run_in_process,
    run_program,
    run_recipe,
    start_process,
    train,
    wait_until,
    with_environment,
)

import lmnotes
from lmnotes.apps import papermill_engine
from lmnotes.apps.cli import execute_command
from lmnotes.core import CheckpointError, TokenizerError, sha256_file
from lmnotes.data.batches import get_batches
from lmnotes.data.tokenizer import CharTokenizer
from lmnotes.export.export import export
from lmnotes.export.hub import upload
from lmnotes.inference.evaluation import Table
from lmnotes.inspect.report import inspect_run, summarize_run
from lmnotes.inspect.tokens import HtmlDisplay, show_batch, show_tokens
from lmnotes.nn.lm import new_lm
from lmnotes.recipes.fresh_or_resume import from_env
from lmnotes.recipes.nanothink import check_experts_share_tokenizer, extract_tokenizer, recipe_params
from lmnotes.recipes.nanothink_checkpoints import content_hash, write_text_files
from lmnotes.recipes.text_only_config import load_text_config
from lmnotes.runs.compare import compare
from lmnotes.runs.config import resolve_config
from lmnotes.runs.data import load_data
from lmnotes.runs.folder import last_run_name, runs_folder
from lmnotes.training.checkpoint import find_checkpoint
from lmnotes.training.trainer import Hook
from lmnotes.training.weights import load_initial_weights
from lmnotes.untrusted import escape_terminal, find_secret

RUN = TINY | dict(steps=8, save_every=4, eval_every=4, sample_every=4, prompt="the ", patience=0)
SCRIPT = '<img src=x onerror="window.attacked=1">'
ESCAPES = "\x1b]0;attacked\x07\x1b[2J\r\x9b31m\u202e"
HOSTILE = f"{SCRIPT}|`$\\href{{javascript:alert()}}{{x}}$` [a](javascript:b) {ESCAPES}"
OUTSIDE = "../../outside", "/etc/outside", "..", "a/b", "a\\b", "", "a\nb", ".\x00"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus):
    "Return a folder with the corpus and a small trained run"
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "corpus")
    assert run_in_process(folder, train, **RUN) == 0, read_log(folder)
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    "Change to a copy of the folder with the trained run"
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LMNOTES_OUT_DIR", str(folder / "runs"))
    return folder


def edit_json(path, change):
    "Change the object in a JSON file"
    obj = json.loads(path.read_bytes())
    path.write_text(json.dumps(change(obj) or obj))


def with_every_text(value, text):
    "Return a JSON object with `text` appended to every string in it that is not a number or a name of the code"
    if isinstance(value, dict):
        return {key: with_every_text(v, text) for key, v in value.items()}
    if isinstance(value, list):
        return [with_every_text(v, text) for v in value]
    return value + text if isinstance(value, str) else value


def make_hostile(folder):
    "Put `HOSTILE` into the texts of a run that are displayed: its record, samples and metrics"
    info = json.loads((folder / "run.json").read_bytes())
    for name in ("status", "device", "started", "updated", "versions"):
        info[name] = with_every_text(info[name], HOSTILE)
    info["data"]["what"] = info["tokenizer"]["name"] = HOSTILE
    info["forked_from"], info["origins"] = HOSTILE, {HOSTILE: "resume", **info["origins"]}
    info["changes"] = [dict(step=0, name="data", before=info["config"]["data"], after=HOSTILE)]
    info["data"]["start"] = info["config"]["prompt"] = info["config"]["data"] = HOSTILE
    info["data"]["tokens"] |= {HOSTILE: 1}
    (folder / "run.json").write_text(json.dumps(info))
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_bytes().splitlines()]
    (folder / "samples.jsonl").write_text("".join(json.dumps(x | dict(text=HOSTILE + "\n# x")) + "\n" for x in lines))


class Elements(html.parser.HTMLParser):
    "Collects the elements, links and event handlers of a page"

    def __init__(self, page):
        super().__init__()
        self.found, self.bad = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.bad += [(tag, name) for name, value in attrs if name.startswith("on") or "script:" in (value or "")]


def check_rich_output(obj):
    "Fail if an object's HTML or Markdown holds an element, a link or a formula that the library does not write"
    if hasattr(obj, "_repr_html_"):
        page = Elements(obj._repr_html_())
        allowed = {"div", "span", "br", "ruby", "rp", "rt", "table", "tr", "th", "td", "em"}
        assert page.found <= allowed and not page.bad, obj._repr_html_()
    if hasattr(obj, "_repr_markdown_"):
        check_markdown(obj._repr_markdown_())
    for text in (repr(obj), str(obj)):
        assert escape_terminal(text) == text


def check_markdown(text, allowed=("table", "thead", "tbody", "tr", "th", "td", "span")):
    page = Elements(mistune.html(text))
    assert page.found <= {*allowed} and not page.bad, text
    assert escape_terminal(text) == text
    code = re.sub(r"^(`{3,})sh\n.*?^\1$|^    .*?$", "", text, flags=re.S | re.M)
    assert not re.search(r"(?<!<span>)\$", code), "a dollar sign starts a formula"


# --- paths


def expert(**run):
    "Return the content of an expert's checkpoint file"
    lm, tokenizer = new_lm("gpt", vocab_size=3, ctx_len=8, d_model=16, n_layers=1, n_heads=2), CharTokenizer("abc")
    config = dict(arch="gpt", run="transformer_expert", tokenizer="chars", patience=0)
    record = dict(started="now", config=config, model=asdict(lm.cfg), data=dict(fingerprint="0" * 64), n_params=1)
    record |= dict(tokenizer=dict(name="chars", fingerprint=tokenizer.fingerprint)) | run
    texts = {"tokenizer.json": json.dumps(tokenizer.to_json())}
    content = dict(model_state=lm.state_dict(), optimizer_state=[], step=4, epoch=1, recipe={}, run=record)
    content |= dict(counters=dict(last=dict(loss=1.0, ppl=2.0), best_step=4), tokenizer=texts)
    return content | dict(sha256=content_hash(content))


def files_in(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@pytest.mark.parametrize("name", ["Makefile", "sitecustomize.py", ".bashrc", *OUTSIDE])
def test_expert_writes_only_files_of_a_tokenizer(work, name):
    content, before = expert(), files_in(work.parent)
    content["tokenizer"][name] = "attacked"
    with pytest.raises((CheckpointError, TokenizerError)):
        extract_tokenizer(content)
    with pytest.raises(CheckpointError):
        write_text_files(work / "tokenizer", content["tokenizer"])
    assert files_in(work.parent) == before


@pytest.mark.parametrize(
    "fingerprint", ["../..", "/tmp/lmn-1/", "W/", "Makefile", "0" * 63, "A" * 64, "0" * 64, None, 7, ["x"]]
)
def test_expert_cannot_name_the_folder_of_its_tokenizer(work, fingerprint):
    before = files_in(work.parent)
    with pytest.raises((CheckpointError, TokenizerError)):
        extract_tokenizer(expert(tokenizer=dict(name="chars", fingerprint=fingerprint)))
    assert files_in(work.parent) == before


def test_expert_does_not_replace_the_tokenizer_of_another(work):
    honest = expert()
    folder = runs_folder() / "tokenizers" / honest["run"]["tokenizer"]["fingerprint"][:12]
    extract_tokenizer(honest)
    text = (folder / "tokenizer.json").read_text()
    forged = dict(honest, tokenizer={"tokenizer.json": json.dumps(CharTokenizer("xyz").to_json())})
    with pytest.raises(TokenizerError, match="holds the tokenizer"):
        extract_tokenizer(forged)
    assert (folder / "tokenizer.json").read_text() == text


def test_second_stage_with_the_checkpoint_of_someone_else(work):
    "A recipe that opens a downloaded expert writes nothing to the paths in the project that the expert names"
    content = expert()
    content["run"]["tokenizer"]["fingerprint"] = "../.."
    content["tokenizer"] |= {"Makefile": "attacked", "sitecustomize.py": "attacked"}
    content["sha256"] = content_hash({n: v for n, v in content.items() if n != "sha256"})
    torch.save(content, work / "downloaded.pt")
    before = files_in(work.parent)
    params = dict(
        transformer_ckpt=str(work / "downloaded.pt"), state_space_ckpt="", diffuser_ckpt="", data_dir="corpus"
    )
    code = run_in_process(work, run_recipe, ROOT / "nbs/recipes/train_mla.ipynb", device="cpu", **params)
    assert code and "Error" in read_log(work)
    new = {n for n in files_in(work.parent) - before if not n.startswith("work/data/tokens")}
    assert new <= {"work/log", "work/data", "work/checkpoints"}, new


def test_message_on_different_tokenizers_names_no_other_folder(work):
    one, other = expert(), expert(tokenizer=dict(name="x", fingerprint="1" * 64))
    one["run"]["config"]["run"] = "../../outside"
    with pytest.raises(TokenizerError) as error:
        check_experts_share_tokenizer({"a.pt": one, "b.pt": other})
    assert "outside" not in str(error.value)


def test_recipe_json_sets_no_other_names(work):
    (work / "recipe.json").write_text(json.dumps(dict(lr=0.1, runs_folder="x", name="../../outside")))
    with pytest.raises(CheckpointError, match="'runs_folder' is not a parameter of this recipe"):
        recipe_params(work, True, dict(lr=0.1, __annotations__=dict(lr=float)))


@pytest.mark.parametrize("name", [n for n in OUTSIDE if n])
def test_last_run_is_in_the_folder_of_runs(work, name):
    outside = work.parent / "outside"
    shutil.copytree(work / "runs/r", outside)
    (work / "runs/.last").write_text(name + "\n")
    with pytest.raises(CheckpointError, match=r"\.last"):
        last_run_name(work / "runs")


@pytest.mark.parametrize("name", ["../other/step_00000008", "/etc", "..", "", "step_x", "step_00000008/../../x"])
@pytest.mark.parametrize("pointer", ["best", "last", "final"])
def test_pointer_names_a_step_of_its_run(work, pointer, name):
    shutil.copytree(work / "runs/r", work / "runs/other")
    (work / "runs/r" / pointer).write_text(name)
    if pointer != "final":  # Lmnotes does not read the other two files: the newest checkpoint names both
        assert find_checkpoint(work / "runs/r", pointer).parent == work / "runs/r"
        return
    with pytest.raises(CheckpointError, match=pointer):
        find_checkpoint(work / "runs/r", pointer)
    with pytest.raises(CheckpointError, match=pointer):
        from_env(dict(CHECKPOINT_PATH=str(work / "runs/r" / pointer), RESUME_STEPS="1"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_manifest_lists_only_files_of_its_folder(work, name):
    def add_file(manifest):
        manifest["files"][name] = dict(size=0, sha256="0" * 64)

    edit_json(work / "runs/r/step_00000008/manifest.json", add_file)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        find_checkpoint(work / "runs/r/step_00000008")


@pytest.mark.parametrize("variable", ["CHECKPOINT_DIR", "LOG_DIR", "OUTPUT_DIR"])
def test_env_json_names_no_folder_outside_the_project(work, variable):
    settings = dict(MODEL_TYPE="from_scratch", TRAINING_DATA_SOURCE="corpus", TRAINING_STEPS="2", CHECKPOINT_DIR="runs")
    settings |= dict(N_EMBD="16", N_LAYER="1", N_HEAD="2", BLOCK_SIZE="8", BATCH_SIZE="2", EVAL_ITERS="1", DEVICE="cpu")
    (work / "text.txt").write_text("the sea and the wood\n" * 40)
    settings |= dict(TRAINING_DATA_SOURCE="text.txt", TOKENIZATION_METHOD="character", MAX_NEW_TOKENS="1")
    r = from_env(settings)
    folder = work.parent / "outside"
    edit_json(r.folder / "env.json", lambda env: env | {variable.lower(): str(folder)})
    resume = dict(CHECKPOINT_PATH=str(r.folder), RESUME_STEPS="1")
    with pytest.raises(ValueError, match=f"Set {variable} to write there"):
        from_env(resume)
    assert not folder.exists()
    assert from_env(resume | {variable: str(folder)}).status == "done"  # Given by the user


def test_yaml_names_no_run_folder_outside_the_project(work):
    (work / "c.yaml").write_text("defaults:\n  save_dir: ../outside\n")
    with pytest.raises(ValueError, match="line 2: defaults.save_dir is outside the project"):
        load_text_config("c.yaml")
    given = load_text_config("c.yaml", **{"defaults.save_dir": "../outside"})
    assert given["defaults.save_dir"] == "../outside"


def test_corpus_names_no_folder_of_tokens(work):
    (work / "..x").mkdir()
    path = work / "..x" / "..%2f..\\a\nb.txt"
    path.write_text("the sea and the wood\n" * 40)
    cfg, _ = resolve_config(dict(data=str(path), tokenizer="bytes"))
    before = files_in(work.parent)
    load_data(cfg, log_fn=None)
    new = files_in(work.parent) - before
    assert new and all(re.fullmatch(r"work/data(/tokens(/[\w-]+(/[\w.]+)?)?)?", name) for name in new), new


# --- Python names


@pytest.mark.parametrize("dtype", ["load", "hub", "__dict__", "float16; x", "", None, 3, ["float32"]])
def test_record_cannot_name_an_attribute_of_torch(work, dtype):
    edit_json(work / "runs/r/run.json", lambda info: info | dict(dtype=dtype))
    with pytest.raises(CheckpointError, match="dtype"):
        lmnotes.load(work / "runs/r", device="cpu")


@pytest.mark.parametrize("arch", ["os.system", "../x", "gpt.GPT", "__init__", "lm", ""])
def test_checkpoint_names_a_registered_architecture(work, arch):
    from lmnotes.training.checkpoint import new_lm_from_checkpoint

    folder = work / "runs/r/step_00000008"
    edit_json(folder / "config.json", lambda config: config | dict(arch=arch))
    with pytest.raises(ValueError):
        new_lm_from_checkpoint(folder)


# --- HTML and Markdown


def test_record_is_text_in_tables_and_views(work):
    make_hostile(work / "runs/r")
    r = lmnotes.load(work / "runs/r", device="cpu")
    r.tokenizer.name = HOSTILE
    view = lmnotes.attach(work / "runs/r")
    for obj in (r, view, summarize_run(r), show_tokens(r.tokenizer, HOSTILE)):
        check_rich_output(obj)
    assert set(view._repr_mimebundle_()) == {"image/png", "text/plain"}
    for obj in inspect_run_of(work, r):
        check_rich_output(obj)


def test_names_and_values_are_text_in_tables(work):
    check_rich_output(Table([{HOSTILE: HOSTILE}]))


def inspect_run_of(work, r):
    "Return the displays of a run whose recorded data no longer matches"
    r.config.data = str(work / "corpus")
    return [look for look in inspect_run(r, HOSTILE, HOSTILE) if isinstance(look, HtmlDisplay)]


def test_names_in_a_corpus_are_text(work):
    folder = work / "domains"
    for name in ("<b>|$x$\x1b[2J", "`[a](b)`"):
        shutil.copytree(work / "corpus/sea", folder / name.replace("/", ""))
    cfg, _ = resolve_config(dict(data=str(folder), tokenizer="bytes"))
    data = load_data(cfg, log_fn=None)
    for tokens in data.tokens.values():
        check_rich_output(tokens)
        check_rich_output(
            Table(dict(domain=name, tokens=stop - start) for name, (start, stop) in tokens.domains.items())
        )
    batches = get_batches(data.tokens["train"], 2, 8, 0, "random")
    check_rich_output(show_batch(data.tokenizer, batches[0]))
    from lmnotes.inspect.routing import plot_router_usage

    plot_router_usage(Table(dict(domain=name, a=1.0) for name in data.tokens["train"].domains)).canvas.draw()


def test_tokens_of_a_tokenizer_file_are_text(work):
    tokenizer = CharTokenizer([*HOSTILE])
    tokenizer.save(work / "t")
    edit_json(work / "t/tokenizer.json", lambda obj: obj | dict(name=HOSTILE, note=HOSTILE))
    loaded = lmnotes.load_tokenizer(work / "t")
    check_rich_output(show_tokens(loaded, HOSTILE))
    assert escape_terminal(repr(loaded)) == repr(loaded)


def test_model_card_of_a_hostile_run(work):
    make_hostile(work / "runs/r")
    edit_json(
        work / "runs/r/run.json", lambda info: info | dict(config=info["config"] | dict(prompt="\n```\n" + HOSTILE))
    )
    os.rename(work / "runs/r", work / "runs/<img src=x onerror=a()>")
    folder = export(work / "runs/<img src=x onerror=a()>", work / "out")
    card = (folder / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    known = "table thead tbody tr th td span h1 h2 p code pre img a"
    page = Elements(mistune.html(body))
    assert page.found <= {*known.split()} and not page.bad, page.bad
    assert mistune.html(body).count("<img") == 1  # The curve
    assert "javascript:b)" not in re.sub(r"^(`{3,})sh\n.*?^\1$|^    .*?$", "", body, flags=re.S | re.M).replace(
        "&#93;(javascript:b)", ""
    )
    assert escape_terminal(card) == card


def test_jupyterlab_runs_no_script_of_a_run(work):
    "A real JupyterLab runs no script of a run from someone else"
    from browser import chromium, open_browser
    from test_jupyterlab import jupyterlab, kernel, until

    chromium()
    make_hostile(work / "runs/r")
    for name in ("<img src=x onerror='window.attacked=1'>", "x"):
        shutil.copytree(work / "corpus/sea", work / "domains" / name.replace("/", ""))
    cells = [
        "import lmnotes\nfrom IPython.display import display\nfrom lmnotes.inspect.report import summarize_run\n"
        "from lmnotes.inspect.tokens import show_tokens\nfrom lmnotes.inference.evaluation import Table",
        "r = lmnotes.load('runs/r', device='cpu')\nr.tokenizer.name = r.info['data']['what']\nsummarize_run(r)",
        "show_tokens(r.tokenizer, r.info['data']['what'])",
        "display(lmnotes.attach('runs/r'))\nr.metrics[-1]['step']",
        "Table(dict(domain=d, tokens=len(t)) for d, t in lmnotes.open_tokens('t.bin').domains.items())",
        "Table([dict(formula='$x^2$', link='https://example.org www.example.org', other='\\\\(x\\\\) \\\\begin{align}x\\\\end{align}')])",
        "'the last ' + 'cell'",
    ]
    from lmnotes.data.prepare import prepare_data

    prepare_data("t.bin", "domains", "bytes")
    with jupyterlab(work) as address, open_browser(viewport=dict(width=1400, height=1000)) as browser:
        import nbformat

        nb = nbformat.v4.new_notebook(metadata=dict(kernelspec=dict(name="python3", display_name="python3")))
        nb.cells = [nbformat.v4.new_code_cell(f"import os; os.chdir({str(work)!r})\n{source}") for source in cells]
        nbformat.write(nb, work / "nbs/look.ipynb")
        page = browser.new_page()
        page.goto(address.replace("train.ipynb", "look.ipynb"))
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        until(page, lambda: kernel(address) == "idle")
        page.locator(".lm-MenuBar-item", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
        until(page, lambda: page.locator(".jp-OutputArea-output", has_text="the last cell").count())
        page.wait_for_timeout(2000)  # Formulas and broken images come after the text
        outputs = page.locator(".jp-OutputArea-output")
        shown = "\n".join(outputs.all_inner_texts())
        assert "Error" not in shown, shown
        assert page.evaluate("window.attacked") is None
        assert "<img src=x onerror=" in shown  # As text
        assert page.locator(".jp-RenderedMarkdown img, .jp-RenderedMarkdown a, .jp-RenderedHTML img").count() == 0
        assert page.locator(".jp-OutputArea-output mjx-container").count() == 0 and "$x^2$" in shown


# --- terminals


def on_terminal(work, *words, code=0, program=""):
    "Run a command of lmnotes or a program in a terminal, and return what it printed, without our own redrawing and colors"
    environ, printed = dict(LMNOTES_OUT_DIR=str(work / "runs"), TERM="xterm", COLUMNS="200"), []
    call = (run_program, program) if program else (lmnotes_command, *words)
    ours, theirs = pty.openpty()

    def read_until_end():
        while select.select([ours], [], [], 0.01)[0]:
            printed.append(os.read(ours, 65536))
        return process.exitcode is not None and not select.select([ours], [], [], 0)[0]

    process = start_process(work, with_environment, environ, *call, output=os.ttyname(theirs))
    wait_until(read_until_end)
    os.close(theirs)
    os.close(ours)
    shown = b"".join(printed).decode("utf-8", "replace").replace("\r\n", "\n")
    assert process.exitcode == code, shown
    return re.sub(r"\x1b\[\d+A\x1b\[J", "", shown)


REDRAWING = r"\x1b\[(\?25[hl]|[\d;]*m|1A|2K)|\r(?=\x1b)"  # The cursor, colors and lines of the progress of a run
COMMANDS = {
    "train": ["train", "--run", "r", "--resume", "--steps", "12"],
    "watch": ["watch", "--run", "r"],
    "generate": ["generate", "--run", "r", "--n", "30"],
    "evaluate": ["evaluate", "--run", "r", "--data", "domains", "--by-domain"],
    "export": ["export", "--run", "r", "--to", "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_send_no_escape_sequence_of_a_file(work, name):
    make_hostile(work / "runs/r")
    for domain in ("a", "z\x1b[2J\x1b]0;attacked\x07"):
        shutil.copytree(work / "corpus/sea", work / "domains" / domain)
    shown = re.sub(REDRAWING, "", on_terminal(work, *COMMANDS[name]))
    assert escape_terminal(shown) == shown, repr(shown)
    assert "⟨U+00" in shown or name == "export"


def test_errors_send_no_escape_sequence_of_a_file(work):
    def rename(config):
        return config | dict(arch="\x1b[2Jgpt")

    edit_json(
        work / "runs/r/run.json", lambda info: info | dict(config=rename(info["config"]), device="\x1b[2Jcpu (x)")
    )
    for words, code in ((["train", "--run", "r", "--resume", "--arch", "rnn"], 2), (["watch", "--run", "\x1b[2J"], 2)):
        shown = on_terminal(work, *words, code=code)
        assert escape_terminal(shown) == shown, repr(shown)


FAILING_COMMAND = """
from lmnotes.apps import cli

def fail(argv):
    raise RuntimeError("\\x1b[2J")

cli.COMMANDS["doctor"] = fail
cli.main(["doctor"])
"""


def test_unexpected_errors_send_no_escape_sequence_of_a_file(work):
    edit_json(work / "runs/r/run.json", lambda info: info | {"\x1b[2J": 1, "config": {"\x1b[2J": 1}})
    shown = on_terminal(work, "generate", "--run", "r", code=2)
    assert escape_terminal(shown) == shown, repr(shown)
    shown = on_terminal(work, program=FAILING_COMMAND, code=1)
    assert "⟨U+001B⟩" in shown and escape_terminal(shown) == shown, repr(shown)


PROGRAM = """
import lmnotes
from lmnotes.training.trainer import Hook

class Colors(Hook):
    def at_end(self, trainer):
        print("\\x1b[1mYOURS\\x1b[0m")

folder = "runs/r"
print(lmnotes.attach(folder), lmnotes.load(folder, device="cpu"), lmnotes.verify(folder), lmnotes.doctor(folder))
print(lmnotes.diff(folder, folder))
lmnotes.fork(folder, "forked")
longer = dict(run="r", resume=True, steps=12, allow_change="steps")
lmnotes.run(**longer, hooks=[Colors()], make_batches=lambda s: s.batches)
"""


LOAD = "import lmnotes; lmnotes.load('runs/r', device='cpu')"
LOAD_WEIGHTS = (
    "from lmnotes.nn.lm import new_lm; from lmnotes.training.weights import load_initial_weights; "
    "load_initial_weights(new_lm('bigram', vocab_size=8), 'w.pt')"
)
LOAD_SETTINGS = "from lmnotes.recipes.text_only_config import load_text_config; load_text_config('c.yaml')"
LOCK = "from lmnotes.files import RunLock; RunLock('runs/r').__enter__()"
UNCAUGHT = {
    "an entry of a record": (LOAD, "CheckpointError"),
    "a tensor": (LOAD_WEIGHTS, "CheckpointError"),
    "a setting": (LOAD_SETTINGS, "ValueError"),
    "a repeated setting": (LOAD_SETTINGS, "ValueError"),
    "the owner of a lock": (LOCK, "RunLockedError"),
}


@pytest.mark.parametrize("name", UNCAUGHT)
def test_uncaught_errors_send_no_escape_sequence_of_a_file(work, name):
    "Python prints the message of an error that no code catches. A name from a file is only text in it"
    program, kind = UNCAUGHT[name]
    edit_json(work / "runs/r/run.json", lambda info: info | dict(origins={ESCAPES: 1}))
    torch.save(new_lm("bigram", vocab_size=8).state_dict() | {ESCAPES: torch.zeros(1)}, work / "w.pt")
    (work / "c.yaml").write_text('"a\\e[2J": 1\n' * (2 if "repeated" in name else 1))
    owner = dict(pid=os.getpid(), host=ESCAPES, start="now")
    with FileLock(work / "runs/r/.lock") if "lock" in name else nullcontext():
        (work / "runs/r/.owner.json").write_text(json.dumps(owner))
        shown = on_terminal(work, code=1, program=program)
    message = shown[shown.rindex(f"{kind}: ") :]
    assert "⟨U+001B⟩" in message, shown
    assert escape_terminal(shown) == shown, repr(shown)


def test_python_sends_no_escape_sequence_of_a_file(work):
    "The functions of the library print a file's values as text in a terminal, and a hook of yours can print colors"
    changed = {"cpu": "\x1b[2Jattacked", "torch": HOSTILE}
    edit_json(work / "runs/r/run.json", lambda info: info | dict(environment=info["environment"] | changed))
    for path in (work / "runs/r").glob("step_*"):
        edit_json(path / "config.json", lambda saved: saved | dict(environment=saved["environment"] | changed))
        edit_json(path / "config.json", lambda saved: saved | dict(batches="\x1b[2Jbatches"))
        edit_json(path / "config.json", lambda saved: saved | dict(versions=saved["versions"] | dict(torch=HOSTILE)))
        sizes = {p.name: dict(size=p.stat().st_size, sha256=sha256_file(p)) for p in path.iterdir()}
        edit_json(path / "manifest.json", lambda m, sizes=sizes: m | dict(files={n: sizes[n] for n in m["files"]}))
    shown = on_terminal(work, program=PROGRAM)
    assert "bits may differ from here on" in shown and "cpu ⟨U+001B⟩[2Jattacked" in shown, shown
    assert "make_batches ⟨U+001B⟩[2Jbatches → <lambda>" in shown, shown
    assert shown.count("\x1b[1mYOURS\x1b[0m") == 1, shown
    shown = shown.replace("\x1b[1mYOURS\x1b[0m", "")
    assert escape_terminal(shown) == shown, repr(shown)


def test_output_in_a_file_stays_as_it_is(work):
    r = lmnotes.load(work / "runs/r", device="cpu")
    words = "generate", "--run", "r", "--n", "30", "--prompt", "a\x1b[2Jb"
    (work / "log").unlink()
    environ = dict(LMNOTES_OUT_DIR=str(work / "runs"))
    assert run_in_process(work, with_environment, environ, lmnotes_command, *words) == 0
    assert read_log(work) == "a\x1b[2Jb" + r.generate("a\x1b[2Jb", 30, temperature=0.8) + "\n"


def test_names_in_weights_and_settings_are_text(work, capsys):
    lm = new_lm("nanothink", vocab_size=256, ctx_len=8)
    extra = {pattern.replace("*", "\x1b[2J.weight"): torch.zeros(1) for pattern in lm.optional_weights}
    torch.save(lm.state_dict() | extra, work / "w.pt")
    load_initial_weights(lm, work / "w.pt")
    (work / "c.yaml").write_text('training:\n  "wandb\\e[2J": 1\n')
    load_text_config("c.yaml")
    shown = capsys.readouterr().out
    assert "⟨U+001B⟩" in shown and escape_terminal(shown) == shown


# --- secrets

LETTERS = "A1b2C3d4" * 4
TOKENS = {
    "hf": "hf_" + LETTERS,
    "sk": "sk-proj-" + LETTERS,
    "ghp": "ghp_" + LETTERS,
    "AKIA": "AKIA" + "A1B2" * 4,
    "wandb": "0a1b2" * 8,
    "url": "https://user:" + LETTERS + "@host/x.txt",
}


def contains(folder, text):
    "Return the files in a folder that contain a text"
    return [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("name", ["prompt", "data", "init_from", "run", "model_args"])
def test_run_rejects_secrets(work, kind, name, capsys):
    before = files_in(work)
    with pytest.raises(ValueError, match=f"{name} looks like a secret") as error:
        lmnotes.run(**RUN | dict(run="new") | {name: TOKENS[kind]})
    assert TOKENS[kind] not in str(error.value) + capsys.readouterr().out and files_in(work) == before


def test_parameters_reject_secrets(work):
    for token in TOKENS.values():
        with pytest.raises(ValueError, match="prompt looks like a secret"):
            resolve_config(dict(prompt=token), environ={})
        with pytest.raises(ValueError, match="prompt looks like a secret"):
            resolve_config({}, environ=dict(LMNOTES_PROMPT=token))


@pytest.mark.parametrize("fails", [False, True])
def test_tokens_of_the_environment_are_in_no_file(work, monkeypatch, capsys, fails):
    "Access tokens in the environment, and in the message of an error, are in no file of a run and in no output"
    for name, kind in dict(HF_TOKEN="hf", WANDB_API_KEY="wandb", GITHUB_TOKEN="ghp").items():
        monkeypatch.setenv(name, TOKENS[kind])

    class Fails(Hook):
        def after_step(self, t):
            if fails and t.step == 3:
                raise RuntimeError(f"401 for {TOKENS['url']} with {os.environ['HF_TOKEN']}")

    with pytest.raises(RuntimeError) if fails else nullcontext():
        lmnotes.run(hooks=[Fails()], view=False, **RUN | dict(run="new"))
        export("runs/new", work / "out")
    info = json.loads((work / "runs/new/run.json").read_bytes())
    assert info["status"] == ("failed" if fails else "done") and ("***" in info.get("error", "")) == fails
    shown = "".join(capsys.readouterr())
    for kind in ("hf", "wandb", "ghp", "url"):
        assert not contains(work, TOKENS[kind]) and TOKENS[kind] not in shown


def test_environment_and_recipe_parameters_reject_secrets(work, monkeypatch):
    with pytest.raises(ValueError, match="prompt looks like a secret"):
        lmnotes.run(recipe=dict(prompt=TOKENS["hf"]), **RUN | dict(run="new") | dict(prompt="x"))
    monkeypatch.setenv("LMNOTES_PROMPT", TOKENS["hf"])
    with pytest.raises(ValueError, match="prompt looks like a secret"):
        resolve_config({})
    with pytest.raises(ValueError, match="TRAINING_DATA_SOURCE looks like a secret"):
        from_env(dict(TRAINING_DATA_SOURCE=TOKENS["url"]))
    with pytest.raises(ValueError, match="CHECKPOINT_PATH looks like a secret"):
        from_env(dict(CHECKPOINT_PATH=TOKENS["url"]))
    with pytest.raises(ValueError, match="data_dir looks like a secret"):
        recipe_params(work, False, dict(data_dir=TOKENS["url"], __annotations__=dict(data_dir=str)))
    with pytest.raises(ValueError, match="data looks like a secret"):
        compare(data=TOKENS["url"])
    with pytest.raises(ValueError, match="data looks like a secret"):
        lmnotes.get_corpus(TOKENS["url"])
    (work / "c.yaml").write_text(f"defaults:\n  device: {TOKENS['hf']}\n")
    with pytest.raises(ValueError, match="line 2: defaults.device looks like a secret") as error:
        load_text_config("c.yaml")
    assert LETTERS not in str(error.value)
    assert not (work / "logs").exists()


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize(
    "words",
    [
        ["train", "--prompt", "TOKEN"],
        ["train", "--prompt=TOKEN"],
        ["train", "--no-such-option", "TOKEN"],
        ["train", "TOKEN"],
        ["train", "--steps", "TOKEN"],
        ["prepare", "--data", "TOKEN", "--out", "out"],
        ["generate", "--run", "r", "--prompt", "TOKEN"],
        ["notebook", "--path", str(ROOT / "nbs/train.ipynb"), "--params", "prompt=TOKEN"],
        ["notebook", "--path", str(ROOT / "nbs/train.ipynb"), "--params", "steps=TOKEN"],
        ["upload", "out", "--repo", "TOKEN"],
        ["TOKEN"],
    ],
    ids=" ".join,
)
def test_command_line_rejects_secrets(work, kind, words, capsys):
    before = files_in(work)
    assert execute_command([word.replace("TOKEN", TOKENS[kind]) for word in words]) == 2
    shown = "".join(capsys.readouterr())
    assert TOKENS[kind] not in shown and "secret" in shown and files_in(work) == before


@pytest.mark.parametrize("option", ["-p", "-r", "-y", "-f"])
def test_papermill_rejects_secrets(work, option):
    notebook, token = ROOT / "nbs/train.ipynb", TOKENS["hf"]
    (work / "p.yaml").write_text("prompt: x")
    given = dict.fromkeys(("-p", "-r"), ["prompt", token]) | {"-y": [f"prompt: {token}"], "-f": ["p.yaml"]}
    if option == "-f":
        (work / "p.yaml").write_text(f"prompt: {token}")
    command = [str(Path(sys.executable).parent / "papermill"), str(notebook), "out/r.ipynb", option, *given[option]]
    environ = {n: v for n, v in os.environ.items() if not n.startswith("LMNOTES_")} | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True)
    assert done.returncode and "prompt looks like a secret" in done.stderr
    assert token not in done.stdout + done.stderr and not (work / "out").exists()


def test_papermill_engine_rejects_secrets(work):
    import papermill

    papermill.engines.papermill_engines.register("lmnotes", papermill_engine.GracefulEngine)
    with pytest.raises(ValueError, match="prompt looks like a secret"):
        papermill.execute_notebook(
            ROOT / "nbs/train.ipynb", "r.ipynb", dict(prompt=TOKENS["hf"]), engine_name="lmnotes", progress_bar=False
        )
    assert not contains(work, TOKENS["hf"])


@pytest.mark.parametrize("kind", TOKENS)
def test_upload_uses_the_same_pattern(work, kind):
    folder = export(work / "runs/r", work / "out")
    separate = kind == "wandb"  # Without a prefix, only as a whole file
    (folder / "README.md").write_text(("" if separate else "x ") + TOKENS[kind])
    with pytest.raises(ValueError, match=r"README.md:1: contains something like a secret") as error:
        upload(folder, "me/x", dry_run=True)
    assert TOKENS[kind] not in str(error.value)


def test_library_contains_nothing_like_a_secret():
    "The source of the library, which an export contains, has nothing like a secret, so an upload accepts it"
    for path in (ROOT / "lmnotes").rglob("*.py"):
        assert not find_secret(path.read_bytes()), path


# --- sources

PACKAGE = ROOT / "lmnotes"
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
SOURCES.pop("_modidx.py")
# The objects with rich output. Their HTML and Markdown are tested above
RICH = {"inference/evaluation.py:Table", "inspect/tokens.py:HtmlDisplay", "runs/monitor.py:RunView"}
RICH |= {"apps/doctor.py:Checkup", "inspect/diff.py:RunDiff", "inspect/verify.py:Verification"}
# HTML fragments of inspect, made by functions that escape
FRAGMENTS = "_MONO _BOX style hue red green blue strength span head cell c i size body faint listed before text title idea".split()
# Attributes and modules whose names are computed, none of them from a file
COMPUTED = {
    "__init__.py": {
        "getattr(import_module(f'lmnotes.{_HOMES[name]}'), name)",
        "import_module(f'lmnotes.{_HOMES[name]}')",
    },
    "nn/lm.py": {"import_module(f'lmnotes.models.{module.name}')"},
    "apps/cli.py": {"getattr(RunConfig, name, '')"},
    "runs/config.py": {"getattr(RunConfig, n)"},
    "runs/compare.py": {"getattr(_ATEN, name)", "getattr(p, o)", "import_module(module)"},
    "training/trainer.py": {"getattr(torch, pick_dtype(device, cfg.dtype)[0])"},
    "runs/load.py": {
        "getattr(torch, self.info['dtype'])",  # `read_run_record` has checked it
        "getattr(torch, pick_dtype(device, dtype)[0])",
    },
    "data/untrusted_files.py": {"getattr(torch, attribute, None)"},  # Only compared with torch.dtype
    "recipes/nanothink.py": {"getattr(torch, s.cfg.dtype)"},  # `RunSetup` has passed it through `pick_dtype`
    "untrusted.py": {"getattr(self.stream, name)"},
}

CHECKED_PATHS = {
    "project_root() / Path(settings['defaults.save_dir']).expanduser()",  # `load_text_config` has checked it
    "runs_folder(cfg.out_dir) / params['run']",  # Made by `comparison_run_params`
    "folder / checkpoint_name(info['step'])",  # The format `08d` accepts only a number
}


def is_path(node):
    "Return True if an expression looks like a path: the left side of a `/`"
    while isinstance(node, ast.BinOp):
        node = node.left
    text = ast.unparse(node)
    return bool(re.search(r"(?i)path|folder|root|parent|_dir\b|\b(run|runs|to|tmp|new|old|aside|HERE)$", text))


def from_a_file(node):
    "Return True if an expression takes a value out of a record or a file"
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and ast.unparse(part.func).endswith(
            ("read_text", "read_bytes", "read_json", "loads")
        ):
            return True
        if (
            isinstance(part, ast.Subscript)
            and isinstance(part.slice, ast.Constant)
            and isinstance(part.slice.value, str)
        ):
            return True
    return False


def sinks(name, source):
    "Return the lines of a source that use a value from a file without a function of `lmnotes.untrusted`: [(line, reason)]"
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ClassDef):
            rich = [
                f.name for f in node.body if isinstance(f, ast.FunctionDef) and re.match(r"_repr_|_ipython_", f.name)
            ]
            if rich and f"{name}:{node.name}" not in RICH:
                found.append((line, f"{node.name} has {rich[0]}"))
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Div)
            and is_path(node.left)
            and from_a_file(node.right)
        ):
            if ast.unparse(node) not in CHECKED_PATHS:
                found.append((line, f"{ast.unparse(node)} needs path_inside"))
        if isinstance(node, ast.Import) and name != "untrusted.py":
            found += [(line, "imports html") for alias in node.names if alias.name == "html"]
        if isinstance(node, ast.Call):
            text, function = ast.unparse(node), ast.unparse(node.func)
            if function in ("getattr", "setattr", "import_module", "__import__", "globals().update"):
                computed = function == "globals().update" or not isinstance(
                    node.args[function.endswith("attr")], ast.Constant
                )
                found += [(line, text)] * (computed and text not in COMPUTED.get(name, ()))
            if function.endswith("joinpath") and any(map(from_a_file, node.args)):
                found.append((line, f"{text} needs path_inside"))
            if function == "open" and re.search(r"'a[bt+]*'", text) and "opener=" not in text:
                found.append((line, f"{text} needs open_for_append"))
            if function.endswith(".replace") and node.args and ast.unparse(node.args[0]) in ("'|'", "'<'", "'&'"):
                found.append((line, f"{text} needs escape_markdown"))
            if function.split(".")[-1] in ("HTML", "Markdown", "Javascript", "JSON", "SVG", "Latex"):
                found.append((line, f"{text} displays a text of its own"))
        if isinstance(node, ast.JoinedStr) and name != "untrusted.py":
            text = "".join(v.value for v in node.values if isinstance(v, ast.Constant))
            if re.search(r"</?[a-z]+[ >/]", text):
                for value in node.values:
                    if isinstance(value, ast.FormattedValue) and not is_safe_html(value):
                        found.append((line, f"{{{ast.unparse(value.value)}}} needs escape_html"))
    return found


def is_safe_html(value):
    inner = value.value
    if isinstance(inner, ast.Call):
        return ast.unparse(inner.func) in ("escape_html", "_tokens_html", "_html_table", "_span", "''.join")
    return value.format_spec is not None or ast.unparse(inner) in FRAGMENTS


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_values_from_files_pass_through_the_functions(name):
    assert not sinks(name, SOURCES[name])


@pytest.mark.parametrize(
    "source",
    [
        "folder / info['name']",
        "runs_folder() / 'tokenizers' / content['run']['fingerprint'][:12]",
        "found.parent / found.read_text().strip()",
        "Path(folder).joinpath(info['x'])",
        "class A:\n def _repr_html_(self): return self.x",
        "import html",
        "cell.replace('|', '\\\\|')",
        "f'<b>{name}</b>'",
        "HTML(text)",
        "getattr(torch, info['x'])",
        "import_module(info['x'])",
        "globals().update(saved)",
        "open(path, 'ab' if resumes else 'wb')",
    ],
)
def test_sinks_are_found(source):
    assert sinks("x.py", source)


@pytest.mark.parametrize(
    "source", ["path_inside(folder, info['name'])", "row['a'] / row['b']", "f'<b>{escape_html(x)}</b>'"]
)
def test_escaped_values_are_accepted(source):
    assert not sinks("x.py", source)


def test_every_promise_of_security_md_has_a_test():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| (?!Promise|-)", line)]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`|`(nbs/[\w/]+\.ipynb)`", row.rsplit("|", 2)[1])
        assert named, f"no test in the last column: {row}"
        for path, test, notebook in named:
            file = ROOT / (path or notebook)
            assert file.is_file(), f"{file} does not exist"
            assert not test or re.search(rf"^def {test}\(", file.read_text(), re.M), f"{path} has no test {test}"
