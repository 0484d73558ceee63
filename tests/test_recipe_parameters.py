"""Each parameter of a recipe changes the run that it starts or resumes, and messages name the parameters of the recipe."""

import json
import re

import pytest
from helpers import ROOT, recipe_parameters, run_notebook
from test_resume_alone import RECIPES, write_material

import lmnotes
from lmnotes.apps.papermill_engine import check_parameters, notebook_parameters
from lmnotes.parameters import describe_kind

pytestmark = pytest.mark.usefixtures("short_texts")
NOTEBOOKS = {name: ROOT / f"nbs/recipes/{name}.ipynb" for name in (*RECIPES, "train_mla")}
# Other values of texts and truth values, and of numbers for which twice the value is not possible
OTHERS = {
    "tisslm": dict(CORPUS_PATH="domains/sea", SAVE_DIR="other", epochs=2),
    "agiformer": dict(DEVICE="auto", DTYPE="bfloat16", DATA="corpus/a.txt", DATA_FUNCTION="no_such:module")
    | dict(STRONG=True, INIT_FROM="weights.pth", run="other", NUM_HEADS=1, PATCH_SIZE=1, FINAL_BATCHES=2),
    "text_only": dict(config="other.yaml", data="corpus", dry_run=True, tokenizer="bytes", token_dtype="uint16")
    | dict(max_steps=5, batch_size=2, learning_rate=0.1, device="auto", save_dir="other", prompt="Hello"),
    "pretrain_expert": dict(data_dir="corpus", domains="sea", device="auto", schedule="linear")
    | dict(
        n_layers=2, lr=0.1, weight_decay=0.3, warmup_steps=3, batch_size=2, use_amp=True, amp_dtype="fp16", n_heads=1
    )
    | dict(tokenizer="chars", strong=True),
    "train_mla": dict(data_dir="corpus", domains="sea", device="auto", use_vector_store=False, transformer_ckpt="")
    | dict(
        state_space_ckpt="", diffuser_ckpt="", fusion="hidden", attention_first=True, use_amp=True, amp_dtype="fp16"
    ),
}
USED_LATER = {"prompt", "FINAL_BATCHES"}  # After the run, for samples and a further evaluation
JOINED = dict(
    d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4, max_seq_len=32, memory_chunk=8, max_epochs=2
)
JOINED |= dict(
    batch_size=8, grad_accum_steps=2, warmup_steps=2, lr=1e-2, use_amp=False, device="cpu", use_vector_store=True
)


class Started(Exception):
    "Raised in place of a run, with a description of its arguments"


def describe(value):
    "Return nested plain values of the arguments of a run"
    if isinstance(value, dict):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if callable(value):  # A function, with the values that it was made from
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        return [getattr(value, "__qualname__", ""), [c for c in cells if isinstance(c, (int, float, str))]]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return [type(value).__name__, describe(vars(value))] if hasattr(value, "__dict__") else str(value)


@pytest.fixture
def start(monkeypatch, tmp_path):
    "Return a function that runs a recipe up to its run, and returns a description of it"
    write_material(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("LMNOTES_OUT_DIR", raising=False)
    yaml = (tmp_path / "project/small.yaml").read_text()
    (tmp_path / "project/other.yaml").write_text(yaml.replace("hidden_dim: 16", "hidden_dim: 32"))
    train = lmnotes.run

    def stub(**arguments):
        raise Started(json.dumps(describe(arguments), sort_keys=True))

    def start(name, is_real=False, **params):
        monkeypatch.setattr(lmnotes, "run", train if is_real else stub)
        try:
            run_notebook(NOTEBOOKS[name], params)
        except Started as e:
            return str(e)

    return start


def other_value(name, parameter, value):
    "Return another value of a parameter of a recipe"
    if parameter == "expert":
        return "transformer" if value == "state_space" else "state_space"
    if parameter in OTHERS[name]:
        return OTHERS[name][parameter]
    return value / 2 if isinstance(value, float) else value * 2 if value else 3


def is_named(parameter, value, text):
    "Return whether a message names a parameter, or its value if that is a text, such as a path"
    value = value if isinstance(value, str) and value else "no text"
    return re.search(rf"\b{parameter}=|-p {parameter}\b|Leave out {parameter}\b|\b{re.escape(value)}", text)


def idle_parameters(start, name, given, base, capsys):
    "Return the parameters whose change neither changes the run, nor is rejected or reported under the parameter's name"
    before, idle = start(name, **base), []
    for parameter, value in recipe_parameters(NOTEBOOKS[name]).items():
        if parameter in ("resume", *USED_LATER):
            continue
        changed = base | {parameter: other_value(name, parameter, given.get(parameter, value))}
        capsys.readouterr()
        try:
            is_idle = start(name, **changed) == before
            reported = re.findall(r"given, but not used by this \w+: (.*)", capsys.readouterr().out)
            if is_idle and not any(parameter in line.split(", ") for line in reported):
                idle.append(parameter)
        except ValueError as e:
            if not is_named(parameter, changed[parameter], str(e)):
                idle.append(f"{parameter}: {e}")
    return idle


def check_parameters_take_effect(start, name, given, identity, capsys):
    "In a new run and in a resumed one"
    assert idle_parameters(start, name, given, given, capsys) == []
    start(name, is_real=True, **given)
    assert idle_parameters(start, name, given, identity | dict(resume="True"), capsys) == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_takes_effect(name, start, capsys):
    params, identity, data, place, _ = RECIPES[name]
    check_parameters_take_effect(start, name, params | {data: place}, {n: params[n] for n in identity}, capsys)


def test_every_parameter_of_the_experts_takes_effect(start, capsys):
    params, _, data, place, _ = RECIPES["pretrain_expert"]
    start("pretrain_expert", is_real=True, **params | {data: place})
    for expert in ("state_space", "diffuser"):
        given = params | {data: place, "expert": expert, "d_inner": 32}
        check_parameters_take_effect(start, "pretrain_expert", given, dict(expert=expert), capsys)
    check_parameters_take_effect(start, "train_mla", JOINED | {data: place}, {}, capsys)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_values_out_of_range_are_rejected_by_name(name):
    "By papermill, before a kernel starts"
    numbers = {n: k for n, k in notebook_parameters(NOTEBOOKS[name]).items() if k not in (str, bool) and n != "resume"}
    assert len(numbers) > 2
    for parameter, kind in numbers.items():
        for value in ("-1", "abc", "nan"):
            message = f"{parameter}={value!r}, expected {describe_kind(kind)}"
            with pytest.raises(ValueError, match=re.escape(message)):
                check_parameters(NOTEBOOKS[name], {parameter: value})


NO_TEXT = "is not one of docstrings, pydocs, stdlib, tinyshakespeare, enwik8, wikitext-2"
MESSAGES = {  # {recipe: [(parameters, message)]}
    "tisslm": [
        (dict(CORPUS_PATH="nope"), f"CORPUS_PATH='nope' {NO_TEXT}"),
        (dict(SAVE_DIR="a*b"), "SAVE_DIR='a*b' is not a folder name for a run"),
        (dict(SAVE_DIR="."), "SAVE_DIR='.' is the project folder or contains it"),
        (dict(seq_len=10_000), "seq_len=10000 needs at least 10,001. Use a smaller seq_len or more text"),
        (dict(batch_size=10**8), "batch_size=100000000 x seq_len=16 is over"),
        (dict(stride=10**8), "stride=100000000 leaves gaps between sequences of seq_len=16. Use 1 to 17"),
    ],
    "agiformer": [
        (dict(DATA="nope"), f"DATA='bytes:nope' {NO_TEXT}"),
        (dict(NUM_HEADS=5), "D_MODEL=16 is not a multiple of NUM_HEADS=5"),
        (dict(SEQ_LEN=10**6), "SEQ_LEN=1000000 needs at least"),
        (dict(INIT_FROM="nope"), "INIT_FROM='nope': there is no such run"),
        (dict(DTYPE="half"), "DTYPE='half', expected auto"),
        (dict(DATA_FUNCTION="no:where"), "DATA_FUNCTION='no:where': No module named 'no'. Give module:function"),
    ],
    "text_only": [
        (dict(batch_size=10**8), "batch_size=100000000 x model.encoders.internal_voice.max_seq_length=32 is over"),
        (dict(token_dtype="int12"), "token_dtype='int12', expected auto, uint8"),
        (dict(save_dir=".."), "save_dir='..' is the project folder or contains it"),
    ],
    "pretrain_expert": [
        (dict(data_dir="nope"), f"data_dir='nope' {NO_TEXT}"),
        (dict(batch_size=10**8), "batch_size=100000000 x max_seq_len=32 is over"),
        (dict(data_dir="corpus/a.txt"), "Use data with several documents, or the split first90"),
    ],
}
CHANGES = {  # Of a run that is resumed
    "tisslm": [
        (dict(seq_len=8), "this run has seq_len=16, not 8, and that cannot change"),
        (dict(seed=5), "this run has seed=0, not 5. Leave out seed to resume exactly, or start a new run"),
        (dict(epochs=0.5), "Increase epochs, or fork an older step"),
    ],
    "agiformer": [
        (dict(D_MODEL=32), "this run has D_MODEL=16, not 32, and that cannot change"),
        (dict(MAX_STEPS=3), "the run is already at step 12, past its end at step 3. Increase MAX_STEPS"),
        (dict(DATA="corpus/a.txt"), "Leave out DATA to resume exactly, or start a new run"),
    ],
    "text_only": [(dict(config="other.yaml"), "this run has model.transformer.hidden_dim=16, not 32")],
    "pretrain_expert": [
        (dict(max_seq_len=16), "this run has max_seq_len=32, not 16"),
        (dict(max_epochs=1), "Increase max_epochs"),
    ],
}


@pytest.mark.parametrize("name", RECIPES)
def test_messages_name_the_parameters_of_the_recipe(name, start):
    params, identity, data, place, _ = RECIPES[name]
    given = params | {data: place}

    def check(params, message):
        with pytest.raises(ValueError) as error:
            start(name, is_real=True, **params)
        assert message in str(error.value)

    for changed, message in MESSAGES[name]:
        check(given | changed, message)
    start(name, is_real=True, **given)
    for changed, message in CHANGES[name]:
        check({n: params[n] for n in identity} | dict(resume="True") | changed, message)
