"""Parameter names of other libraries work like ours, and every printed line that resumes a run can be pasted."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import StopAtSteps, command_line_args, lmnotes_command, read_log, run_in_process
from test_cli import TINY

import lmnotes
from lmnotes.apps.cli import run_notebook, take_aliases
from lmnotes.apps.papermill_engine import (
    check_parameters,
    fill_in_command,
    given_parameters,
    interface_variables,
    notebook_parameters,
    parse_command,
    replace_parameter_aliases,
    temporary_environment,
)
from lmnotes.nn.lm import archs, get_arch
from lmnotes.runs.config import ALIASES, MODEL_PARAMS, RunConfig, format_params, resolve_config
from lmnotes.runs.folder import resume_command
from lmnotes.runs.run import run

ROOT = Path(__file__).parent.parent
# Names that nanoGPT, Hugging Face, Lightning, litgpt and peft use, with a value, and the parameter here
NAMES = dict(
    learning_rate=(0.1, dict(lr=0.1)),
    max_lr=(0.1, dict(lr=0.1)),
    min_learning_rate=(0.1, dict(min_lr=0.1)),
    max_steps=(7, dict(steps=7)),
    num_steps=(7, dict(steps=7)),
    max_iters=(7, dict(steps=7)),
    num_train_epochs=(3, dict(epochs=3.0)),
    max_epochs=(3, dict(epochs=3.0)),
    warmup_steps=(7, dict(warmup=7.0)),
    warmup_iters=(7, dict(warmup=7.0)),
    warmup_ratio=(0.1, dict(warmup=0.1)),
    lr_scheduler_type=("cosine", dict(schedule="cosine")),
    grad_accum_steps=(4, dict(accum=4)),
    gradient_accumulation_steps=(4, dict(accum=4)),
    grad_clip=(0.5, dict(clip=0.5)),
    max_grad_norm=(0.5, dict(clip=0.5)),
    block_size=(64, dict(ctx_len=64)),
    max_seq_len=(64, dict(ctx_len=64)),
    context_length=(64, dict(ctx_len=64)),
    global_batch_size=(32, dict(batch_size=32)),
    eval_steps=(5, dict(eval_every=5)),
    eval_interval=(5, dict(eval_every=5)),
    eval_iters=(5, dict(eval_batches=5)),
    save_steps=(5, dict(save_every=5)),
    save_total_limit=(3, dict(keep=3)),
    logging_steps=(5, dict(log_every=5)),
    log_interval=(5, dict(log_every=5)),
    output_dir=("there", dict(out_dir="there")),
    run_name=("mine", dict(run="mine")),
    dataset=("stdlib", dict(data="stdlib")),
    num_processes=(2, dict(procs=2)),
    early_stopping_patience=(3, dict(patience=3)),
    bf16=(True, dict(dtype="bfloat16")),
    precision=("fp16", dict(dtype="float16")),
    torch_compile=(True, dict(compile=True)),
    lora_r=(8, dict(lora_rank=8)),
    target_modules=("qkv", dict(lora_targets="qkv")),
    n_layer=(4, dict(model_args="n_layers=4")),
    num_hidden_layers=(4, dict(model_args="n_layers=4")),
    n_head=(2, dict(model_args="n_heads=2")),
    n_embd=(64, dict(model_args="d_model=64")),
    hidden_size=(64, dict(model_args="d_model=64")),
    intermediate_size=(64, dict(model_args="d_ff=64")),
    d_model=(64, dict(model_args="d_model=64")),
    n_layers=(4, dict(model_args="n_layers=4")),
    beta2=(0.99, dict(betas="0.9 0.99")),
)


def changed(cfg):
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_libraries(name):
    value, expected = NAMES[name]
    assert changed(resolve_config({name: value}, environ={})[0]) == expected
    assert changed(resolve_config({}, environ={f"LMNOTES_{name.upper()}": str(value)})[0]) == expected
    flag = f"--{name.replace('_', '-')}"
    given = [flag] if value is True else [flag, str(value)]
    flags = {"bf16", "torch_compile"}
    assert take_aliases(given, NAMES, flags) == ([], {name: str(value).lower() if value is True else str(value)})
    assert changed(resolve_config(take_aliases(given, NAMES, flags)[1], environ={})[0]) == expected


def test_every_alias_has_a_parameter():
    known = {f.name for f in fields(RunConfig)} | set(MODEL_PARAMS)
    assert set(ALIASES.values()) <= known and not set(ALIASES) & known
    for name in archs():  # model_args of an architecture are never taken for another parameter
        assert not {f.name for f in fields(get_arch(name).Config)} & set(ALIASES)


def test_an_alias_and_its_parameter_are_an_error():
    for given in (dict(lr=1, learning_rate=1), dict(n_layer=1, model_args="n_layers=1"), dict(betas="1 1", beta1=0.5)):
        with pytest.raises(ValueError, match="give"):
            resolve_config(given, environ={})


def test_command_line(workdir):
    "The aliases of `train` and `generate` are in the help, and have an effect"
    tiny = {name: value for name, value in TINY.items() if name not in ("steps", "ctx_len", "model_args", "dtype")}
    given = [
        "--fp32",
        "--max-steps",
        "4",
        "--block-size=16",
        "--n-layer",
        "1",
        "--n-embd",
        "16",
        "--no-torch-compile",
        "--n-heads",
        "2",
    ]
    assert run_in_process(workdir, lmnotes_command, "train", *command_line_args(**tiny), *given) == 0, read_log(workdir)
    r = lmnotes.load(workdir / "runs/r")
    assert (r.config.steps, r.config.ctx_len, r.config.model_args) == (4, 16, "n_layers=1 n_heads=2 d_model=16")
    assert r.config.dtype == "float32"
    output = [
        "generate",
        "--run",
        "runs/r",
        "--prompt",
        "wave",
        "--max-new-tokens",
        "3",
        "--no-do-sample",
        "--checkpoint",
        "final",
    ]
    assert run_in_process(workdir, lmnotes_command, *output) == 0, read_log(workdir)
    assert r.generate("wave", max_new_tokens=3, do_sample=False) == r.generate("wave", 3, temperature=0.0)
    assert read_log(workdir).splitlines()[-1] == "wave" + r.generate("wave", 3, temperature=0.0)
    for twice in (["train", "--lr", "1", "--max-lr", "1"], [*output, "--n", "3"]):
        assert run_in_process(workdir, lmnotes_command, *twice) == 2 and "are the same parameter" in read_log(
            workdir
        ), read_log(workdir)
    help_text = subprocess.run(
        [sys.executable, "-m", "lmnotes", "train", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    shown = set(re.findall(r"\w+", help_text.stdout))
    assert shown >= set(ALIASES), set(ALIASES) - shown


def test_hint_on_the_command_line(workdir):
    assert run_in_process(workdir, lmnotes_command, "train", "--micro-batch-size", "4") == 2
    assert "'micro_batch_size' is not a parameter; pass batch_size, the global batch size" in read_log(workdir)


def test_papermill_replaces_aliases():
    notebook = str(ROOT / "nbs/train.ipynb")
    given = "-p bf16 True --parameters learning_rate 1e-3 -p n_layer 4 -r model_args n_heads=2 -p steps 7".split()
    argv, _ = fill_in_command(["papermill", "-p", "save_steps", "3", notebook, "out.ipynb", *given])
    assert argv[:3] == ["papermill", notebook, "out.ipynb"] and argv[-2:] == ["--engine", "lmnotes"]
    expected = dict(save_every=3, lr=1e-3, dtype="bfloat16", model_args="n_heads=2 n_layers=4", steps=7)
    assert given_parameters(parse_command(argv)[1]) == expected
    argv, _ = fill_in_command(["papermill", str(ROOT / "nbs/generate.ipynb"), "-", "-p", "max_new_tokens", "5"])
    assert given_parameters(parse_command(argv)[1]) == dict(n=5)
    with pytest.raises(ValueError, match="learning_rate and lr are the same parameter"):
        fill_in_command(["papermill", notebook, "-", "-p", "learning_rate", "1", "-p", "lr", "1"])
    with pytest.raises(ValueError, match="'learning_rate' is not a parameter of generate.ipynb"):
        check_parameters(ROOT / "nbs/generate.ipynb", dict(learning_rate="1"))


def test_recipes_keep_their_own_names():
    "A recipe's parameter that has the name of an alias stays what it is"
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        own = dict.fromkeys(notebook_parameters(notebook), "1")
        assert replace_parameter_aliases(own | dict(unknown="1"), own) == own | dict(unknown="1"), notebook


def test_run_notebook_replaces_aliases(workdir):
    params = {name: value for name, value in TINY.items() if name not in ("steps", "ctx_len")}
    assert run_in_process(workdir, run_aliased, max_steps=4, block_size=16, **params) == 0, read_log(workdir)
    r = lmnotes.load(workdir / "runs/r")
    assert (r.config.steps, r.config.ctx_len) == (4, 16)


def run_aliased(**params):
    names = run_notebook(ROOT / "nbs/train.ipynb", params)
    return 0 if names["r"].status == "done" else 1


def interrupted(**params):
    run(hooks=[StopAtSteps(8)], **params)
    return 0


def pasted_python(line):
    "Evaluate a printed line, as pasted into a notebook or a script"
    return 0 if eval(line, dict(lmnotes=lmnotes)).status == "done" else 1


def test_python_line_resumes(workdir):
    assert run_in_process(workdir, interrupted, **TINY) == 0, read_log(workdir)
    line = re.search(r"Resume with: (lmnotes\.run\(.*\))$", read_log(workdir), re.M)[1]
    assert run_in_process(workdir, pasted_python, line) == 0, read_log(workdir)
    assert "r: done at step 40 of 40" in read_log(workdir)


def test_command_line_resumes(workdir, monkeypatch):
    assert run_in_process(workdir, interrupted, **TINY) == 0, read_log(workdir)
    monkeypatch.setenv("LMNOTES_COMMAND", f"{sys.executable} -m lmnotes train")
    line = resume_command(workdir / "runs/r", steps=44, allow_change="steps")
    shown = run_in_process(workdir, lmnotes_command, "watch", "--run", "runs/r")
    assert shown == 0 and "resume with: lmnotes train --resume --run r" in read_log(workdir), read_log(workdir)
    done = subprocess.run(line, shell=True, cwd=workdir, capture_output=True, text=True, env=dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0 and "r: done at step 44 of 44" in done.stdout, done.stderr


def test_only_a_notebook_with_these_parameters_resumes(tmp_path, monkeypatch):
    "The line names the notebook in use, or `lmnotes train` if the notebook cannot resume a run by its name"
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LMNOTES_OUT_DIR", str(tmp_path))
    expected = dict(train="papermill nbs/train.ipynb -p resume True -p run r", compare="lmnotes train --resume --run r")
    for name, line in expected.items():
        with temporary_environment(**interface_variables("papermill {}", f"nbs/{name}.ipynb", {})):
            assert resume_command(tmp_path / "r") == line
            assert format_params(out_dir="there") == "-p out_dir there"


def test_help_loads_no_torch():
    "`lmnotes --help` does not load torch, and lists every command"
    code = "import sys; from lmnotes.apps.cli import COMMANDS, execute_command; execute_command(['--help'])"
    check = "; print('torch' in sys.modules, 'tyro' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False False" and "\n  train  " in done.stdout, done.stdout + done.stderr
