"""`nbs/recipes/agiformer.ipynb` keeps the promises of the AGIFORMER guide and avoids the mistakes of its code."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import (
    differences,
    lmnotes_command,
    paste_resume_line,
    printed_text,
    read_log,
    read_records,
    recipe_parameters,
    run_in_process,
    run_papermill,
    run_ranks,
    run_recipe,
    run_results,
    stop_before_step,
)

import lmnotes
from lmnotes.data.batches import get_batches
from lmnotes.data.tokens import open_tokens
from lmnotes.nn.lm import n_params

pytestmark = pytest.mark.usefixtures("short_texts")
NOTEBOOK = Path(__file__).parent.parent / "nbs/recipes/agiformer.ipynb"
DEFAULTS = dict(
    D_MODEL=512,
    N_LAYERS=6,
    NUM_HEADS=8,
    PATCH_SIZE=4,
    WINDOW_SIZE=128,
    THINKING_STEPS=3,
    BATCH_SIZE=4,
    SEQ_LEN=1024,
    MAX_STEPS=5000,
    BASE_LR=3e-4,
    WARMUP_STEPS=100,
    GRAD_CLIP=0.5,
    VAL_INTERVAL=200,
)
SMALL = dict(D_MODEL=16, N_LAYERS=1, NUM_HEADS=2, WINDOW_SIZE=8, THINKING_STEPS=2, BATCH_SIZE=2, SEQ_LEN=64)
QUICK = SMALL | dict(MAX_STEPS=20, VAL_INTERVAL=10, DATA="text", FINAL_BATCHES=2)
TRAIN = re.compile(r"^Step (\d+): Loss = (\d+\.\d{4}) \| BPC = (\d+\.\d{4}) \| LR = (\d\.\d\de-\d\d)$", re.M)
VALID = re.compile(r"^-- VALIDATION: Loss = \d+\.\d{4} \| BPC = \d+\.\d{4} --", re.M)


def write_text(workdir):
    (workdir / "text").write_bytes((b"the patch thinks \xff\x00 " * 400)[:8_000])


@pytest.fixture
def workdir(tmp_path):
    "Return a folder with a file of bytes that are not text"
    write_text(tmp_path)
    return tmp_path


def recipe(**params):
    return run_recipe(NOTEBOOK, **params)


def folder(workdir, run="agiformer"):
    return workdir / "checkpoints" / run


def weights(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module", params=["process", pytest.param("papermill", marks=pytest.mark.nightly)])
def uninterrupted(request, short_texts, tmp_path_factory):
    "Return a folder in which the recipe has run without a stop"
    workdir = tmp_path_factory.mktemp("whole")
    write_text(workdir)
    if request.param == "papermill":
        return run_papermill(workdir, NOTEBOOK, **QUICK)
    assert run_in_process(workdir, recipe, **QUICK) == 0, read_log(workdir)
    return workdir


def test_parameter_names_and_defaults_match_the_guide():
    found = recipe_parameters(NOTEBOOK)
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS
    assert list(found)[: len(DEFAULTS)] == list(DEFAULTS)
    assert found["DATA"] == "enwik8" and found["resume"] == ""


def test_default_model_matches_the_guide(tmp_path):
    lm = lmnotes.new_lm("bytepatch", "agiformer", vocab_size=256, ctx_len=1024)
    assert n_params(lm) == 31_199_744
    sizes = dict(d_model=512, n_layers=6, n_heads=8, patch_size=4, window=128, thinking_steps=3)
    assert {name: vars(lm.cfg)[name] for name in sizes} == sizes


def test_log_lines_match_the_guide(uninterrupted):
    text = printed_text(uninterrupted)
    assert "[*] Creating AGIFORMER model...\n    - d_model=16, n_layers=1, thinking_steps=2\n[*] Parameters: " in text
    lines = TRAIN.findall(text)
    assert [int(step) for step, *_ in lines] == [10, 20]
    assert all(abs(float(bpc) - float(loss) / 0.693147) < 2e-4 for _, loss, bpc, _ in lines)
    assert len(VALID.findall(text)) == 2  # Steps 10 and 20. The split is so small that both evaluations cover all of it
    assert text.index("-- VALIDATION") < text.index("Saved best_model.pth") < text.index("Saved last_model.pth")
    assert "--- SYSTEM 2 DIAGNOSTICS ---" in text and "untrained" in text
    assert "the same as trained: True" in text


def test_three_figures_in_the_report(uninterrupted):
    for name in ("AGIFORMER's: 20 batches of 4 windows", "the whole split  ", "2 batches of it, windows that overlap"):
        (line,) = re.findall(rf"^{name}.*$", printed_text(uninterrupted), re.M)
        assert re.search(r"\d\.\d{4} ± \d\.\d{4}", line)


def test_the_files_are_plain_state_dicts(uninterrupted):
    last, run = weights(folder(uninterrupted) / "last_model.pth"), lmnotes.load(folder(uninterrupted))
    assert all(torch.equal(last[name], tensor) for name, tensor in run.lm.state_dict().items())
    best = lmnotes.load(folder(uninterrupted), "best").lm.state_dict()
    assert all(
        torch.equal(tensor, best[name]) for name, tensor in weights(folder(uninterrupted) / "best_model.pth").items()
    )


def test_constant_learning_rate_after_warmup(workdir):
    assert run_in_process(workdir, recipe, **QUICK | dict(WARMUP_STEPS=5)) == 0, read_log(workdir)
    assert {rate for *_, rate in TRAIN.findall(read_log(workdir))} == {"3.00e-04"}


def test_interrupted_and_resumed(workdir):
    "Ctrl+C writes last_model.pth with a message, and the resumed run is bit-identical to an uninterrupted one"
    many = QUICK | dict(MAX_STEPS=25)
    assert stop_before_step(13, workdir, recipe, **many) == 130, read_log(workdir)
    stopped = lmnotes.load(folder(workdir))
    assert stopped.status == "interrupted" and stopped.step == 13
    last = weights(folder(workdir) / "last_model.pth")
    assert all(torch.equal(last[name], tensor) for name, tensor in stopped.lm.state_dict().items())
    assert "Saved last_model.pth" in read_log(workdir)
    assert paste_resume_line(workdir) == 0, read_log(workdir)  # Other parameters keep their values
    assert "Resumed from checkpoint" in read_log(workdir) and "changed " not in read_log(workdir)
    assert run_in_process(workdir, recipe, **many, run="at_once") == 0, read_log(workdir)
    assert not differences(run_results(folder(workdir)), run_results(folder(workdir, "at_once")))


def test_more_steps_extend_a_finished_run(workdir):
    assert run_in_process(workdir, recipe, **QUICK) == 0, read_log(workdir)
    assert run_in_process(workdir, recipe, MAX_STEPS=30, BASE_LR=1e-4, resume=True) == 0, read_log(workdir)
    assert "changed MAX_STEPS to 30 (was 20)" in read_log(workdir)
    assert lmnotes.load(folder(workdir)).config.lr == 1e-4
    assert [int(step) for step, *_ in TRAIN.findall(read_log(workdir))] == [10, 20, 30]


def test_fine_tuning_on_another_text_from_weights(workdir):
    assert run_in_process(workdir, recipe, **QUICK) == 0, read_log(workdir)
    shutil.copy(folder(workdir) / "best_model.pth", workdir / "begin.pth")
    (workdir / "other").write_bytes(b"a domain of its own. " * 2000)
    more = dict(INIT_FROM="begin.pth", DATA="other", run="mine", WARMUP_STEPS=1, MAX_STEPS=1, VAL_INTERVAL=1)
    assert run_in_process(workdir, recipe, **QUICK | more) == 0, read_log(workdir)
    begun = lmnotes.load(folder(workdir, "mine")).lm.state_dict()
    far = max((begun[name] - w).abs().max() for name, w in weights(workdir / "begin.pth").items())
    assert 0 < far < 1e-2  # They differ by one step


LOADER = """
import torch

calls = []


def loader(batch_size, seq_len):
    calls.append(1)
    return torch.full((batch_size, seq_len), len(calls) % 256)


def wrong(batch_size, seq_len):
    return torch.full((batch_size, seq_len), 256)
"""


def test_data_function(workdir):
    "The function's batches are stored and read in order, so that its run can be resumed"
    (workdir / "mine.py").write_text(LOADER)
    (workdir / "settings.ini").write_text("[DEFAULT]\nlib_name = lmnotes\n")
    given = QUICK | dict(DATA_FUNCTION="mine:loader", MAX_STEPS=100)
    assert stop_before_step(13, workdir, recipe, number=signal.SIGTERM, **given) == 130, read_log(workdir)
    assert TRAIN.findall(read_log(workdir))[0][3] == "3.00e-05"  # Step 10 of 100 warmup steps
    assert run_in_process(workdir, recipe, resume=True, MAX_STEPS=20) == 0, read_log(workdir)
    result = lmnotes.load(folder(workdir))
    assert result.step == 20 and result.info["data"]["tokens"]["train"] == 100 * 2 * 64
    tokens = open_tokens(next(workdir.glob("data/recorded/*/train.bin")))
    batches = get_batches(tokens, 2, result.config.ctx_len, sampler="sequential", stride=result.config.stride)
    assert all((batches[step].x == step + 1).all() and (batches[step].y == step + 1).all() for step in range(100))
    assert run_in_process(workdir, recipe, **QUICK | dict(DATA_FUNCTION="mine:wrong")) != 0
    assert "wrong, call 1: returned ids from 256 to 256, needs ids from 0 to 255" in read_log(workdir)


def test_a_short_validation_split(workdir):
    "Only the validation loss by AGIFORMER's protocol needs more than one sequence"
    (workdir / "text").write_bytes(bytes(range(256)) * 8)
    assert run_in_process(workdir, recipe, **QUICK | dict(MAX_STEPS=2, VAL_INTERVAL=2)) == 0, read_log(workdir)
    assert "one byte apart  " not in read_log(workdir) and "windows that overlap" in read_log(workdir)


@pytest.mark.parametrize(
    "name, value, words", [("MAX_STEPS", "20k", "a whole number"), ("STRONG", "perhaps", "True or False")]
)
def test_wrong_types_are_rejected(workdir, name, value, words):
    assert (
        run_in_process(workdir, lmnotes_command, "notebook", "--path", str(NOTEBOOK), "--params", f"{name}={value}")
        == 2
    )
    assert f"{name}={value!r}, expected {words}" in read_log(workdir)


def test_without_thinking(workdir):
    assert run_in_process(workdir, recipe, **QUICK | dict(THINKING_STEPS=0)) == 0, read_log(workdir)
    assert "thinking is off" in read_log(workdir) and "DIAGNOSTICS" not in read_log(workdir)


def test_bytepatch_defaults_at_the_same_sizes(workdir):
    assert run_in_process(workdir, recipe, **QUICK | dict(STRONG=True)) == 0, read_log(workdir)
    cfg = lmnotes.load(folder(workdir)).lm.cfg
    assert (cfg.byte_path, cfg.d_model, cfg.thinking_steps) == ("local", 16, 2)


def test_other_thinking_steps_at_generation(workdir):
    assert run_in_process(workdir, recipe, **QUICK) == 0, read_log(workdir)
    words = ["generate", "--run", "agiformer", "--preset", "agiformer", "--n", "20"]
    assert run_in_process(workdir, lmnotes_command, *words) == 0, read_log(workdir)
    assert run_in_process(workdir, lmnotes_command, *words, "--model-args", "thinking_steps=5") == 0, read_log(workdir)
    assert read_log(workdir).count("The history of ") >= 2
    assert lmnotes.load(folder(workdir), model_args="thinking_steps=5").lm.cfg.thinking_steps == 5


def diverging(**params):
    "Run the recipe with a model whose loss is NaN from the fifth step on"
    from lmnotes.nn.lm import get_arch

    cls = get_arch("bytepatch")
    loss, calls = cls.loss, []

    def poisoned(self, batch):
        calls.append(1)
        out = loss(self, batch)
        return dict(out, loss=out["loss"] * (float("nan") if self.training and len(calls) > 4 else 1.0))

    cls.loss = poisoned
    return recipe(**params)


def test_nan_is_said_and_ends_the_run(workdir):
    assert run_in_process(workdir, diverging, **QUICK) == 3, read_log(workdir)
    assert "CRITICAL: NaN Loss at step 5. Skipping batch." in read_log(workdir)
    assert "agiformer: diverged at step 9 of 20" in read_log(workdir)
    assert paste_resume_line(workdir, "with a lower learning rate") == 0, read_log(workdir)
    assert lmnotes.load(folder(workdir)).config.lr == 1.5e-4


def out_of_memory(**params):
    from lmnotes.nn.lm import get_arch

    def loss(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    get_arch("bytepatch").loss = loss
    return recipe(**params)


def test_out_of_memory_names_the_guides_parameters(workdir):
    assert run_in_process(workdir, out_of_memory, **QUICK) != 0
    assert re.search(r"reduce BATCH_SIZE \(2\), D_MODEL or N_LAYERS", read_log(workdir))


def test_learning_rates_outside_the_guides_range(workdir):
    assert run_in_process(workdir, recipe, **QUICK | dict(BASE_LR=0.01)) == 0, read_log(workdir)
    assert "BASE_LR=0.01 is outside 1e-05 to 0.0005" in read_log(workdir)


def test_no_enwik8_and_no_network(workdir):
    "The message names the folder in which to put the file"
    shutil.rmtree(workdir / "data", ignore_errors=True)
    code = run_in_process(workdir, recipe, **{name: value for name, value in QUICK.items() if name != "DATA"})
    assert code != 0 and "[*] Downloading enwik8..." in read_log(workdir)
    assert re.search(r"enwik8\.zip: download failed .* put it at \S*data/enwik8/enwik8\.zip", read_log(workdir))


def test_two_processes(workdir, uninterrupted):
    "Of two processes only one prints, and it writes as many records as a single process"
    words = ["notebook", "--path", NOTEBOOK, "--params", *(f"{name}={value}" for name, value in QUICK.items())]
    assert run_ranks(workdir, 2, lmnotes_command, *words) == [0, 0], read_log(workdir)
    assert read_log(workdir).count("Creating AGIFORMER model") == 1
    two, one = (read_records(folder(place) / "metrics.jsonl") for place in (workdir, uninterrupted))
    assert len(two) == len(one)
    assert (folder(workdir) / "best_model.pth").exists()
