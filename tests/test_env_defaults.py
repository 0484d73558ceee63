"""Environment variables of the fresh-or-resume guide: their defaults in every mode, and the effect of changing them."""

import os
import random
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmnotes.nn.lm import new_lm
from lmnotes.nn.lora import LoRAConfig, add_lora
from lmnotes.recipes import fresh_or_resume
from lmnotes.recipes.fresh_or_resume import ParameterReport, from_env, parameter_statistics
from lmnotes.recipes.fresh_or_resume_config import (
    TrainingConfig,
    load_config_fresh_from_env,
    load_config_from_checkpoint,
    to_run_params,
)
from lmnotes.runs.load import Run

ALL = {f.name for f in fields(TrainingConfig)}
GPT2 = dict(MODEL_TYPE="gpt2")
LORA = dict(USE_LORA="True")
TINY = dict(
    TRAINING_DATA_SOURCE="text.txt",
    BATCH_SIZE="4",
    BLOCK_SIZE="16",
    N_EMBD="8",
    N_HEAD="2",
    N_LAYER="1",
    TRAINING_STEPS="2",
    EVAL_ITERS="2",
    DEVICE="cpu",
)


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    "Return the current folder, which holds only a text, with a clean environment"
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LMNOTES_")]:
        monkeypatch.delenv(name)
    draw = random.Random(0)
    Path("text.txt").write_text("".join(draw.choice("wave salt tide foam\n") for _ in range(2000)))
    return tmp_path


# Every default, by hand

SAME_IN_ALL_MODES = dict(
    use_lora=False,
    training_data_source="pydocs",  # The fresh-or-resume guide's own default is a file that it does not ship
    start_step=0,
    gpt2_model_name="gpt2",
    custom_vocab_size=None,
    enable_checkpoints=False,
    checkpoint_interval=500,
    checkpoint_dir="checkpoints",
    log_dir="logs",
    enable_output_to_file=True,
    output_dir="outputs",
    max_new_tokens=300,
    generation_temperature=0.7,
    generation_top_k=50,
    device="auto",
    use_lr_warmup=True,
    lora_rank=16,
    lora_alpha=32.0,
    lora_dropout=0.0,
)
# fmt: off
BY_MODE = {
    "field":               ("test",         "from_scratch", "gpt2"),
    "model_type":          ("from_scratch", "from_scratch", "gpt2"),
    "test_mode":           (True,           False,          False),
    "tokenization_method": ("character",    "character",    "gpt2"),
    "batch_size":          (32,             64,             16),
    "block_size":          (64,             128,            128),
    "training_steps":      (1000,           5000,           5000),
    "eval_interval":       (100,            500,            500),
    "eval_iters":          (50,             50,             20),
    "learning_rate":       (3e-4,           3e-4,           2e-5),
    "n_embd":              (128,            256,            ...),  # GPT-2's shape comes with its weights
    "n_head":              (4,              4,              ...),
    "n_layer":             (3,              4,              ...),
    "dropout":             (0.2,            0.2,            ...),
}
# fmt: on
MODES = dict(test=dict(TEST_MODE="True"), from_scratch=dict(MODEL_TYPE="from_scratch"), gpt2=GPT2)


@pytest.mark.parametrize("mode", MODES)
def test_every_default(mode):
    "Only the mode is set"
    column = BY_MODE["field"].index(mode)
    expected = SAME_IN_ALL_MODES | {name: row[column] for name, row in BY_MODE.items() if name != "field"}
    assert set(expected) == ALL
    config = vars(load_config_fresh_from_env(MODES[mode]))
    known = {name: value for name, value in expected.items() if value is not ...}
    assert {name: config[name] for name in known} == known
    assert {name: type(config[name]) for name in known} == {name: type(value) for name, value in known.items()}


def test_default_model_type_is_from_scratch():
    assert load_config_fresh_from_env({}) == load_config_fresh_from_env(MODES["from_scratch"])


def test_empty_variable_counts_as_unset():
    empty = {name.upper(): " " for name in ALL}
    assert load_config_fresh_from_env(empty) == load_config_fresh_from_env({})


# Parameters that no variable sets: 100 warmup steps are 2% of 5,000
RECIPE = dict(split="first90", sampler="random", seed=1337, dtype="float32", prompt="")
RECIPE |= dict(optimizer="adamw", weight_decay=0.01, betas="0.9 0.999", schedule="constant", warmup=0.0, clip=0.0)
TUNED = RECIPE | dict(prompt="QUESTION: ", warmup=100.0)


RECIPES = {
    "from_scratch": ({}, RECIPE),
    "from_scratch lora": (LORA, RECIPE),
    "gpt2": (GPT2, TUNED | dict(clip=1.0)),
    "gpt2 lora": (GPT2 | LORA, TUNED | dict(clip=2.0)),
    "gpt2, 50 warm-up steps at least": (GPT2 | dict(TRAINING_STEPS="51"), TUNED | dict(clip=1.0, warmup=50.0)),
    "gpt2, too short to warm up": (GPT2 | dict(TRAINING_STEPS="50"), TUNED | dict(clip=1.0, warmup=0.0)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_matches_the_guide(name):
    "Optimizer, clipping, warmup, seed and split match the fresh-or-resume guide"
    variables, expected = RECIPES[name]
    params = to_run_params(load_config_fresh_from_env(variables))
    assert {name: params[name] for name in expected} == expected


# Every effect: field -> (other variables that are set, its value, {parameter of the run that changes: new value}).
# A parameter that is not given has the value None here.

SHAPE = dict(d_model=256, n_heads=4, n_layers=4, dropout=0.2)


def model_args(**changes):
    return " ".join(f"{name}={value}" for name, value in (SHAPE | changes).items())


TESTED = dict(batch_size=32, ctx_len=64, steps=1000, eval_every=100, save_every=1000)
TO_GPT2 = dict(arch="gpt2", init_from="gpt2", model_args=None, tokenizer="gpt2", batch_size=16, eval_batches=20)
TO_GPT2 |= dict(lr=2e-5, warmup=100.0, clip=1.0, prompt="QUESTION: ")
ADAPTED = dict(
    lora_rank=16, lora_alpha=32.0, lora_dropout=0.0, lora_targets="*", lora_train="embed.* positions.* *norm*"
)
EFFECTS = dict(
    model_type=({}, "gpt2", TO_GPT2),
    use_lora=({}, "True", ADAPTED),
    training_data_source=({}, "text.txt", dict(data="text.txt")),
    batch_size=({}, "7", dict(batch_size=7)),
    block_size=({}, "7", dict(ctx_len=7)),
    training_steps=({}, "700", dict(steps=700, save_every=700)),  # Without checkpoints it is saved at the end
    learning_rate=({}, "0.5", dict(lr=0.5)),
    n_embd=({}, "8", dict(model_args=model_args(d_model=8))),
    n_head=({}, "2", dict(model_args=model_args(n_heads=2))),
    n_layer=({}, "7", dict(model_args=model_args(n_layers=7))),
    dropout=({}, "0.5", dict(model_args=model_args(dropout=0.5))),
    gpt2_model_name=(GPT2, "gpt2-xl", dict(init_from="gpt2-xl")),
    tokenization_method=({}, "custom_bpe", dict(tokenizer="bpe")),
    custom_vocab_size=(dict(TOKENIZATION_METHOD="custom_bpe"), "700", dict(tokenizer="bpe:700")),
    enable_checkpoints=({}, "True", dict(save_every=500, keep="all")),
    checkpoint_interval=(dict(ENABLE_CHECKPOINTS="True"), "7", dict(save_every=7)),
    checkpoint_dir=({}, "elsewhere", dict(out_dir="elsewhere")),
    test_mode=({}, "True", TESTED | dict(model_args=model_args(d_model=128, n_layers=3))),
    eval_interval=({}, "7", dict(eval_every=7)),
    eval_iters=({}, "7", dict(eval_batches=7)),
    device=({}, "cpu", dict(device="cpu")),
    use_lr_warmup=(GPT2, "False", dict(warmup=0.0)),
    lora_rank=(LORA, "4", dict(lora_rank=4)),
    lora_alpha=(LORA, "8", dict(lora_alpha=8.0)),
    lora_dropout=(LORA, "0.5", dict(lora_dropout=0.5)),
)


def changes(before, after):
    "Return {name: new value} of everything that differs"
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return {name: after.get(name) for name in names}


@pytest.mark.parametrize("field", EFFECTS)
def test_a_variable_changes_the_run(field, workdir):
    "A variable changes its own field and the parameters in the table, and no others"
    beside, value, expected = EFFECTS[field]
    a, b = (load_config_fresh_from_env(beside | more) for more in ({}, {field.upper(): value}))
    assert vars(a)[field] != vars(b)[field]
    before, after = to_run_params(a), to_run_params(b)
    if "out_dir" in expected:
        expected = dict(out_dir=str(workdir / expected["out_dir"]))
    assert changes(before, after) == expected


# Effects of a variable on the files and the generated text of a session

SEEN = dict(log="logs", output="outputs", test="false", prompt="", n=300, temperature=0.7, top_k=50)
WRITTEN = dict(
    log_dir=("elsewhere", dict(log="elsewhere")),
    enable_output_to_file=("False", dict(output=None, test=None)),
    output_dir=("elsewhere", dict(output="elsewhere")),
    test_mode=("True", dict(test="true")),
    max_new_tokens=("7", dict(n=7)),
    generation_temperature=("0.2", dict(temperature=0.2)),
    generation_top_k=("3", dict(top_k=3)),
)
# Fields that no variable sets
NOT_SET = dict(start_step="0, or the step of the checkpoint that CHECKPOINT_PATH names")


def session(workdir, monkeypatch, **variables):
    "Train with the variables set, and return the run and its visible effects"
    asked = {}

    def generate(run, prompts="", n=200, **sampling):
        asked.update(prompt=prompts, n=n, **sampling)
        return "written text"

    monkeypatch.setattr(Run, "generate", generate)
    run = from_env(TINY | variables)
    (log,) = workdir.glob("*/*training_log_*.log")
    output = next(workdir.glob("*/build_llm_output_*.txt"), None)
    tested = output and output.name.partition("_test=")[2].partition("_")[0]
    return run, dict(log=log.parent.name, output=output and output.parent.name, test=tested, **asked)


def test_a_session_with_the_defaults(workdir, monkeypatch, capsys):
    assert session(workdir, monkeypatch)[1] == SEEN
    assert "note: below 5 million parameters" not in capsys.readouterr().out


@pytest.mark.parametrize("field", WRITTEN)
def test_variables_change_the_output_files(field, workdir, monkeypatch):
    value, expected = WRITTEN[field]
    assert changes(SEEN, session(workdir, monkeypatch, **{field.upper(): value})[1]) == expected


def test_start_step_comes_from_the_checkpoint(workdir, monkeypatch):
    "No variable sets it. It determines the total number of steps and the name of the log"
    assert load_config_fresh_from_env(dict(START_STEP="7")).start_step == 0
    config = load_config_fresh_from_env({})
    more = changes(to_run_params(config), to_run_params(replace(config, start_step=7)))
    assert more == dict(steps=5007, save_every=5007)
    first, _ = session(workdir, monkeypatch)
    for log in workdir.glob("logs/*"):
        log.unlink()
    second, _ = session(workdir, monkeypatch, CHECKPOINT_PATH=str(first.folder), RESUME_STEPS="3")
    (log,) = workdir.glob("logs/*")
    assert second.step == 5 and log.name.startswith("resume_training_log_")
    assert log.read_text().startswith("Resuming from step 2 - ")


def test_a_resumed_session_has_its_own_defaults(workdir, monkeypatch):
    "RESUME_STEPS is 5000, checkpoints stay, and everything else is as in the session before"
    first, _ = session(workdir, monkeypatch)
    configs = []

    def look(checkpoint, environ):
        configs.append(load_config_from_checkpoint(checkpoint, environ))
        raise InterruptedError("that was enough")

    monkeypatch.setattr(fresh_or_resume, "load_config_from_checkpoint", look)
    with pytest.raises(InterruptedError):
        from_env(dict(CHECKPOINT_PATH=str(first.folder)))
    changed = changes(vars(load_config_fresh_from_env(TINY)), vars(configs[0]))
    changed.pop("use_lr_warmup", None)  # Only GPT-2 has it
    assert changed == dict(start_step=2, training_steps=5000, enable_checkpoints=True)


EVERYTHING = dict(
    USE_LORA="True",
    LORA_RANK="3",
    LORA_ALPHA="5",
    LORA_DROPOUT="0.1",
    DROPOUT="0.3",
    LEARNING_RATE="0.01",
    TOKENIZATION_METHOD="custom_bpe",
    CUSTOM_VOCAB_SIZE="270",
    ENABLE_CHECKPOINTS="True",
    CHECKPOINT_INTERVAL="3",
    CHECKPOINT_DIR="kept",
    EVAL_INTERVAL="2",
    TRAINING_STEPS="4",
)


def test_all_values_reach_the_run_and_the_output_file(workdir, monkeypatch, capsys):
    "The run's record has each parameter, the output file each field, and the log the note on small models"
    run, _ = session(workdir, monkeypatch, **EVERYTHING)
    config = load_config_fresh_from_env(TINY | EVERYTHING)
    params = to_run_params(config)
    assert {name: vars(run.config)[name] for name in params} == params
    assert run.folder.parent == workdir / "kept"
    (output,) = workdir.glob("outputs/*.txt")
    lines = output.read_text().partition("\n\nOUTPUT\n")[0].splitlines()[2:]
    assert lines == [f"{name} = {value}" for name, value in vars(config).items()]
    assert "note: below 5 million parameters" in capsys.readouterr().out


def test_every_field_has_a_test():
    assert set(EFFECTS) | set(WRITTEN) | set(NOT_SET) == ALL
    assert not set(NOT_SET) & (set(EFFECTS) | set(WRITTEN))


# The note on small models


def report_of(lm, capsys, rank=0):
    "Return the report on a model over two steps"
    report = ParameterReport()
    for _ in range(2):
        report.after_step(SimpleNamespace(lm=lm, rank=rank))  # The report uses nothing else of a trainer
    return capsys.readouterr().out


def model(vocab_size, lora):
    lm = new_lm("scratch_gpt", vocab_size=vocab_size, ctx_len=16, d_model=64, n_layers=1, n_heads=2)
    return add_lora(lm, LoRAConfig(4)) if lora else lm


@pytest.mark.parametrize("lora", [True, False])
def test_small_model_note_only_with_adapters(lora, capsys):
    captured_output = report_of(model(100, lora), capsys)
    assert captured_output.count("parameters: total ") == 1
    assert captured_output.count("note: below 5 million parameters") == lora


def test_small_model_note_limit_is_five_million(capsys):
    "One more token means 133 more parameters: two rows of 64, a bias, and 4 of the adapter"
    few = parameter_statistics(model(100, True))["total"]
    most = 100 + (4_999_999 - few) // 133
    sizes = [parameter_statistics(model(size, True))["total"] for size in (most, most + 1)]
    assert sizes[0] < 5_000_000 <= sizes[1] == sizes[0] + 133
    notes = [report_of(model(size, True), capsys).count("note: below 5 million") for size in (most, most + 1)]
    assert notes == [1, 0]


def test_only_the_first_process_reports(capsys):
    assert report_of(model(100, True), capsys, rank=1) == ""
