"""`nbs/recipes/text_only.ipynb` keeps the promises of the text-only guide and avoids the mistakes of its code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    differences,
    paste_resume_line,
    printed_text,
    read_log,
    read_records,
    recipe_parameters,
    run_in_process,
    run_papermill,
    run_recipe,
    run_results,
    stop_before_step,
)

from lmnotes import load
from lmnotes.data.prepare import prepare_data
from lmnotes.nn.lm import new_lm
from lmnotes.recipes.text_only import text_run_params
from lmnotes.recipes.text_only_config import DEFAULT_SETTINGS, load_text_config

pytestmark = pytest.mark.usefixtures("short_texts")
NOTEBOOK = Path(__file__).parent.parent / "nbs/recipes/text_only.ipynb"
CONFIG = NOTEBOOK.with_name("text_only_config.yaml")

TOKENS = 6000

# With tabs, as in the text-only guide
SMALL = """
training:
	max_steps: 30
	batch_size: 4
	log_interval: 5
	save_interval: 10
	scheduler:
		warmup_steps: 5
	optimizer:
		lr: 1e-2

model:
	transformer:
		num_layers: 1       # Tiny model depth
		hidden_dim: 16
		num_attention_heads: 2
		ffn_dim: 64
		max_position_embeddings: 32

	encoders:
		internal_voice:
			vocab_size: 256
			embedding_dim: 16
			max_seq_length: 32
"""


@pytest.fixture(scope="module")
def prepared_data(tmp_path_factory):
    "Return a folder with a text, its tokens and a configuration"
    from pydoc_data.topics import topics

    workdir, text = tmp_path_factory.mktemp("made"), topics["debugger"] + topics["formatstrings"]
    (workdir / "corpus.txt").write_bytes(text.encode("ascii", "ignore")[:TOKENS])
    assert run_in_process(workdir, prepare) == 0, read_log(workdir)
    (workdir / "small.yaml").write_text(SMALL)
    return workdir


@pytest.fixture
def workdir(prepared_data, tmp_path):
    return shutil.copytree(prepared_data, tmp_path / "place")


def prepare():
    prepare_data("corpus.bin", "corpus.txt", "bytes")


def recipe(**params):
    return run_recipe(NOTEBOOK, **(dict(config="small.yaml", data="corpus.bin", prompt="def ") | params))


@pytest.fixture(scope="module", params=["process", pytest.param("papermill", marks=pytest.mark.nightly)])
def uninterrupted(request, short_texts, prepared_data, tmp_path_factory):
    "A folder in which the recipe has run without a stop"
    workdir = shutil.copytree(prepared_data, tmp_path_factory.mktemp("whole") / "place")
    if request.param == "papermill":
        return run_papermill(workdir, NOTEBOOK, config="small.yaml", data="corpus.bin", prompt="def")
    assert run_in_process(workdir, recipe, prompt="def") == 0, read_log(workdir)
    return workdir


def in_order(words, text):
    "Check that the `words` occur in `text` in this order"
    at = 0
    for word in words:
        found = text.find(word, at)
        assert found >= 0, f"{word!r} is not in what follows:\n{text[at:]}"
        at = found + len(word)


def test_configuration_matches_the_guide():
    "The file has the default settings, and the parameters match the text-only guide's commands"
    assert load_text_config(CONFIG) == DEFAULT_SETTINGS
    found = recipe_parameters(NOTEBOOK)
    assert list(found)[:4] == ["config", "data", "dry_run", "resume"] and found["prompt"] == "Once upon a time"


def test_dry_run(workdir):
    "A dry run trains ten steps, prints the text-only guide's lines, writes and reads a checkpoint, and leaves no files"
    before = set(workdir.rglob("*"))
    assert run_in_process(workdir, recipe, dry_run=True) == 0, read_log(workdir)
    loaded, n = f"Loaded {TOKENS:,} tokens from corpus.bin", (TOKENS * 9 // 10 - 1) // 32
    steps = [f"Step {i}/10 | Loss: " for i in range(1, 11)]
    lines = ["Loading config from small.yaml...", "Using device: cpu", "Creating dataset from corpus.bin...", loaded]
    lines += [f"Creating {n} samples of length 32...", "Creating DataLoader with batch_size=4..."]
    lines += ["Initializing MultiModalCreature model...", "Model parameters: 11,264 total, 11,264 trainable"]
    lines += [
        "*** DRY RUN MODE: Training for only 10 steps ***",
        "Initializing Trainer...",
        "=" * 80,
        "Starting training...",
    ]
    lines += [*steps, "written and read back", "=" * 80, "Training complete!", "=" * 80]
    in_order(lines, read_log(workdir))
    assert read_log(workdir).count(" | loss_internal_text: ") == read_log(workdir).count(" | samples/sec: ") == 10
    assert {path.name for path in set(workdir.rglob("*")) - before} <= {"checkpoints"}


def test_the_guides_files(uninterrupted):
    folder = uninterrupted / "checkpoints/text_only"
    files = {path.name for path in folder.glob("*.pt")}
    assert files == {"model_step_10.pt", "model_step_20.pt", "model_step_30.pt", "model_final.pt"}
    for path in folder.glob("*.pt"):
        checkpoint = torch.load(path, weights_only=True)
        assert list(checkpoint) == ["step", "model_state_dict", "optimizer_state_dict", "config"]
        assert checkpoint["step"] == (30 if "final" in path.name else int(path.stem.rpartition("_")[2]))
        assert checkpoint["optimizer_state_dict"]["state"]
    logged = [r["step"] for r in read_records(folder / "metrics.jsonl") if r["split"] == "train"]
    assert logged == [5, 10, 15, 20, 25, 30]


def test_the_report(uninterrupted):
    text = printed_text(uninterrupted)
    in_order(["Step 5/30 | Loss: ", "Step 30/30 | Loss: ", "Training complete!", "def"], text)
    assert "DRY RUN" not in text


def test_mistake_the_generation_script_crashed(uninterrupted):
    "The text-only guide's script generates fifty tokens from model_final.pt alone, the same as `generate` with its KV cache"
    checkpoint = torch.load(
        uninterrupted / "checkpoints/text_only/model_final.pt", map_location="cpu", weights_only=True
    )
    model = new_lm("streams", **checkpoint["config"])
    model.load_state_dict(checkpoint["model_state_dict"])
    model.eval()
    input_ids = torch.tensor([list(b"Once upon a time")])
    with torch.no_grad():
        for _ in range(50):
            outputs = model(internal_voice_tokens=input_ids, return_hidden_states=True)
            next_token_logits = outputs["logits_internal_text"][0, -1, :]
            next_token = torch.argmax(next_token_logits, dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, next_token.unsqueeze(0)], dim=1)
    assert input_ids.shape == (1, 66)
    r = load(uninterrupted / "checkpoints/text_only")
    same = r.tokenizer.decode(input_ids[0, 16:].tolist())
    assert r.generate("Once upon a time", 50, temperature=0.0) == same


def test_mistake_ctrl_c_saved_nothing(workdir):
    "The text-only guide's runs could not be resumed. Here the resumed run is bit-identical"
    assert stop_before_step(13, workdir, recipe, max_steps=40) == 130, read_log(workdir)
    assert (workdir / "checkpoints/text_only/model_step_10.pt").exists()
    step = json.loads((workdir / "checkpoints/text_only/run.json").read_bytes())["step"]
    assert step == 13 and f"Training was interrupted at step {step}\n" in read_log(workdir)
    assert paste_resume_line(workdir) == 0, read_log(workdir)
    assert run_in_process(workdir, recipe, max_steps=40, save_dir="at_once/text_only") == 0, read_log(workdir)
    a, b = workdir / "checkpoints/text_only", workdir / "at_once/text_only"
    assert not differences(run_results(a), run_results(b))
    assert {p.name for p in a.glob("*.pt")} == {p.name for p in b.glob("*.pt")}


def test_what_the_advice_says_can_be_followed(uninterrupted, tmp_path):
    "Accumulation, batch size and learning rate can change on resume, as the messages on memory and loss advise"
    workdir = shutil.copytree(uninterrupted, tmp_path / "place")
    changed = SMALL.replace("lr: 1e-2", "lr: 5e-3").replace(
        "batch_size: 4", "batch_size: 8\n\tgradient_accumulation_steps: 2"
    )
    (workdir / "small.yaml").write_text(changed)
    assert run_in_process(workdir, recipe, max_steps=35, resume=True) == 0, read_log(workdir)
    words = ["changed batch_size to 8 (was 4)", "changed learning_rate to 0.005 (was 0.01)"]
    words += ["changed training.gradient_accumulation_steps to 2"]
    assert all(word in read_log(workdir) for word in words), read_log(workdir)


@pytest.mark.parametrize("prompt", ["", 5])
def test_any_prompt(workdir, prompt):
    assert run_in_process(workdir, recipe, max_steps=1, prompt=prompt) == 0, read_log(workdir)


@pytest.mark.parametrize("kind", ["bin", "npy", "pt"])
def test_token_files_of_any_origin(workdir, kind):
    ids = np.fromfile(workdir / "corpus.bin", np.uint16)
    if kind == "bin":
        ids.tofile(workdir / "theirs.bin")
    elif kind == "npy":
        np.save(workdir / "theirs.npy", ids)
    else:
        torch.save(torch.from_numpy(ids.astype(np.int64)), workdir / "theirs.pt")
    assert run_in_process(workdir, recipe, data=f"theirs.{kind}", tokenizer="bytes", max_steps=1) == 0, read_log(
        workdir
    )
    assert f"Loaded {TOKENS:,} tokens from theirs.{kind}" in read_log(workdir)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(data="data/none.bin"), ["Token file not found: data/none.bin", "lmnotes prepare --data"]),
        (dict(data="wide.bin", tokenizer="bytes"), ["wide.bin: id 700 at position 6 is not in the vocabulary of 256"]),
        (dict(config="other.yaml"), ["vocab_size is 50257, but corpus.bin was made with bytes, which has 256 ids"]),
        (
            dict(config="typo.yaml"),
            ["typo.yaml, line 2: training.max_step is not a setting, did you mean 'training.max_steps'?"],
        ),
        (dict(config="nowhere.yaml"), ["nowhere.yaml: no such file"]),
    ],
)
def test_what_does_not_fit(workdir, change, words):
    np.array([1, 2, 3, 4, 5, 6, 700, 8] * 100, np.uint16).tofile(workdir / "wide.bin")
    (workdir / "other.yaml").write_text("training:\n  max_steps: 10\n")
    (workdir / "typo.yaml").write_text("training:\n  max_step: 10\n")
    assert run_in_process(workdir, recipe, **change) == 1
    assert all(word in read_log(workdir) for word in words), read_log(workdir)
    assert not (workdir / "checkpoints/text_only").exists()


def test_a_gpu_that_is_not_there(workdir):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run_in_process(workdir, recipe, device="cuda", dry_run=True) == 0, read_log(workdir)
    assert "Using device: cpu (no cuda device)" in read_log(workdir)


@pytest.mark.parametrize(
    "name, dtype", [("auto", "auto"), ("no", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")]
)
def test_mixed_precision(workdir, monkeypatch, name, dtype):
    monkeypatch.chdir(workdir)
    Path("other.yaml").write_text(SMALL.replace("training:\n", f"training:\n\tmixed_precision: {name}\n"))
    params = text_run_params(load_text_config("other.yaml"), "corpus.bin")
    assert params.get("dtype", "auto") == dtype
