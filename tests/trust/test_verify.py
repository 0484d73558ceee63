"""`lmnotes verify` names every damaged or forged file, and a replay gives the same bits or finds the forgery."""

import json
import shutil

import pytest
import torch
from helpers import ROOT, TINY, StopAtSteps, lmnotes_command, read_log, read_records, run_in_process, train
from safetensors.torch import load_file, save_file

from lmnotes.core import CheckpointError, environment, read_json, sha256_file, write_json
from lmnotes.inspect.verify import NOT_CHECKED, verify
from lmnotes.runs import setup
from lmnotes.runs.folder import fork
from lmnotes.runs.replay import BIT_EXACT, MISMATCH, NOT_REPLAYED, OK, OTHER_ENVIRONMENT
from lmnotes.runs.run import run
from lmnotes.training.checkpoint import list_checkpoints
from lmnotes.training.trainer import Hook, Trainer

KEEP = TINY | dict(keep_every=10, keep=1)
FEW = KEEP | dict(steps=20, save_every=5, keep_every=5)
STEPS = [f"step_{step:08d}" for step in (10, 20, 30, 40)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    "Return a folder with a finished run, its corpus and a second run with another seed"
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(corpus, folder / "corpus")
    bpe = dict(tokenizer="bpe:300")
    for params in (KEEP | bpe, KEEP | bpe | dict(run="other", seed=1)):
        assert run_in_process(folder, train, **params) == 0, read_log(folder)
    return folder


@pytest.fixture
def r(trained, tmp_path, monkeypatch):
    "Return a copy of the run, in the current folder"
    shutil.copytree(trained, tmp_path / "again")
    monkeypatch.chdir(tmp_path / "again")
    return tmp_path / "again/runs/r"


def mismatches(folder, **options):
    "Return the names of the parts that do not hold, without warnings about them"
    report = verify(folder, **options)
    assert report.exit_code == (5 if report.parts(MISMATCH) else 0)
    return report.parts(MISMATCH)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def mutate(path, kind, other):
    "Damage a file: flip a bit, cut it, remove it, or put another file in its place"
    if kind == "flip":
        flip(path, path.stat().st_size // 2)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        shutil.copy(other, path)


KINDS = "flip", "cut", "missing", "folder", "swapped"
FILES = "config.json", "model.safetensors", "state.pt", "manifest.json"


def reseal(checkpoint_folder):
    "Write a manifest with the hashes that the files have now, as a forger can"
    manifest = read_json(checkpoint_folder / "manifest.json")
    for name in manifest["files"]:
        path = checkpoint_folder / name
        manifest["files"][name] = dict(size=path.stat().st_size, sha256=sha256_file(path))
    write_json(checkpoint_folder / "manifest.json", manifest)


def forge_json(path, change):
    value = read_json(path)
    change(value)
    write_json(path, value)


# Hashes, records and pointers


def test_an_untouched_run_holds(r):
    "`verify` accepts an unmodified run"
    report = verify(r)
    assert report.exit_code == 0 and not report.parts(MISMATCH)
    assert {"run.json", *STEPS, "tokenizer", "best", "last", "final", "metrics.jsonl"} <= set(report.parts("ok"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_each_file_of_each_checkpoint(r, name, kind):
    for step in STEPS:
        mutate(r / step / name, kind, r.parent / "other" / step / name)
    assert set(STEPS) <= set(mismatches(r))


def test_any_flipped_bit_of_a_manifest(r):
    path = r / STEPS[1] / "manifest.json"
    for at in range(0, path.stat().st_size, 5):
        flip(path, at)
        assert STEPS[1] in mismatches(r), at
        flip(path, at)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_tokenizer_files(r, trained, name, kind):
    if kind == "swapped":
        (r / "tokenizer" / name).write_bytes((r / "tokenizer/merges.txt").read_bytes() + b"a b\n")
    else:
        mutate(r / "tokenizer" / name, kind, None)
    assert mismatches(r) == ["tokenizer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["best", "last", "final"])
def test_pointers(r, name, kind):
    other = r.parent / "other_pointer"
    other.write_text(STEPS[1 if (r / "best").read_text().strip() == STEPS[0] else 0] + "\n")
    mutate(r / name, kind, other)
    assert mismatches(r) == [name]


@pytest.mark.parametrize("content", ["../other/step_00000010\n", "step_00000050\n", "", "\x1b[2J\n", "step_\udce9"])
def test_a_pointer_to_something_else(r, content):
    (r / "last").write_bytes(content.encode(errors="surrogateescape"))
    report = verify(r)
    assert report.parts(MISMATCH) == ["last"] and "\x1b" not in repr(report) + report._repr_markdown_()


@pytest.mark.parametrize("kind", ["cut", "missing", "folder"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "run.json"])
def test_records_cut_or_missing(r, name, kind):
    mutate(r / name, kind, None)
    assert name in mismatches(r)


@pytest.mark.parametrize(
    "line", ["{", '"x"', "[1]", '{"step": 1}', '{"step": "1", "split": "val"}', "\x00", "[" * 5000]
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_damaged_line(r, name, line):
    lines = (r / name).read_text().splitlines()
    (r / name).write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    report = verify(r)
    assert report.parts(MISMATCH) == [name] and f"{name}:2 is damaged" in repr(report)


@pytest.mark.parametrize("content", [None, [], "x", 5, {}, dict(config={}), dict(config=5)])
def test_another_record(r, content):
    write_json(r / "run.json", content)
    assert mismatches(r) == ["run.json"]


def test_every_parameter_of_the_record(r):
    "A parameter that determines the result and was changed in run.json alone is named"
    params = read_json(r / STEPS[-1] / "config.json")["params"]
    assert {"lr", "seed", "steps", "betas", "accum", "dtype", "sampler", "ctx_len", "clip"} <= set(params)
    whole = read_json(r / "run.json")
    for name, value in params.items():
        new = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else value + "x"
        write_json(r / "run.json", whole | dict(config=whole["config"] | {name: new}))
        report = verify(r)
        assert report.parts(MISMATCH) and name in repr(report)


@pytest.mark.parametrize(
    "change",
    [
        lambda info: info.update(step=30),
        lambda info: info.update(tokens=5),
        lambda info: info["result"].update(best=1.5),
        lambda info: info["result"].update(best_step=10),
        lambda info: info["result"]["last"].update(bpb=0.5),
        lambda info: info.update(dtype="bfloat16"),
        lambda info: info.update(n_params=5),
        lambda info: info["tokenizer"].update(name="gpt2"),
        lambda info: info["tokenizer"].update(vocab_size=301),
        lambda info: info["environment"].update(threads=64),
        lambda info: info["versions"].update(torch="0"),
        lambda info: info.update(device="device cuda (H100), float32: as requested"),
        lambda info: info["data"].update(fingerprint="0" * 64),
        lambda info: info["tokenizer"].update(fingerprint="0" * 64),
        lambda info: info["model"].update(d_model=32),
        lambda info: info.pop("origins"),
    ],
)
def test_results_of_the_record(r, change):
    forge_json(r / "run.json", change)
    assert mismatches(r)


@pytest.mark.parametrize(
    "claim", [dict(what="FineWeb"), dict(start="Hello"), dict(tokens=dict(train=5 * 10**12, val=1))]
)
def test_claims_about_the_data(r, claim):
    "A replay prepares the data, so it finds a wrong description of the data"
    forge_json(r / "run.json", lambda info: info["data"].update(claim))
    report = verify(r, replay=1)
    assert report.parts(MISMATCH) == ["steps 30 to 40"] and f"run.json has {min(claim)}=" in repr(report)


def test_an_unknown_file_in_a_checkpoint(r):
    (r / STEPS[0] / "extra.py").write_text("")
    report = verify(r)
    assert report.parts(MISMATCH) == STEPS[:1] and "extra.py is not in the manifest" in repr(report)


def test_checkpoints_that_belong_elsewhere(r):
    (r / STEPS[0]).rename(r / "aside")
    (r / STEPS[1]).rename(r / STEPS[0])
    (r / "aside").rename(r / STEPS[1])
    assert mismatches(r) == STEPS[:2]


def test_the_newest_checkpoint_of_another_run(r):
    shutil.rmtree(r / STEPS[-1])
    shutil.copytree(r.parent / "other" / STEPS[-1], r / STEPS[-1])
    assert f"run.json, {STEPS[-1]}" in mismatches(r)


def test_missing_checkpoints(r):
    shutil.rmtree(r / STEPS[-1])
    assert "last" in mismatches(r)
    for folder in list_checkpoints(r):
        shutil.rmtree(folder)
    assert "checkpoints" in mismatches(r)


def test_the_last_and_the_best_evaluation_are_in_the_checkpoints(r):
    lines = (r / "metrics.jsonl").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if json.loads(line)["split"] == "val")
    lines[last] = json.dumps(json.loads(lines[last]) | dict(bpb=1.0))
    (r / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert mismatches(r) == ["metrics.jsonl"]


def test_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="there is no run here to verify"):
        verify(tmp_path)


# Replays

CASES = {
    "random muon": dict(sampler="random"),
    "epochs adamw": dict(sampler="epochs", optimizer="adamw"),
    "domains": dict(sampler="domains", tokenizer="bpe:300"),
    "documents": dict(sampler="documents"),
    "sequential": dict(sampler="sequential", stride=3),
    "lora": dict(lora_rank=2, lora_dropout=0.1, optimizer="adamw"),
    "frozen": dict(freeze="embed*"),
    "early stop": dict(optimizer="adamw", lr=0.1, patience=2, eval_every=4, steps=40),
    "bfloat16": dict(dtype="bfloat16"),
    "in epochs": dict(epochs=0.5, sampler="epochs", save_every=5, keep_every=5),
}
CASES |= {f"{name} of {arch}": dict(arch=arch, model_args=args) for name, arch, args in [
    ("state space model", "ssm", "d_model=16 n_layers=1 head_dim=8 d_state=4 dropout=0.1"),
    ("diffusion", "diffusion", "d_model=16 n_layers=1 n_heads=2 dropout=0.1"),
    ("byte patches", "bytepatch", "d_model=16 n_layers=1 n_heads=2 d_byte=16 ngrams=2 ngram_rows=32"),
    ("recurrence", "rnn", "d_model=16 d_hidden=16"),
    ("streams", "streams", "d_model=16 n_layers=1 n_heads=2 dropout=0.1 inputs=internal_voice,touch"),
]}  # fmt: skip


def files(folder):
    "Return {path: (content, time of the last change)} of all files in a folder"
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_bit_exact_and_only_reads(workdir, monkeypatch, name):
    params = FEW | CASES[name]
    params = {n: v for n, v in params.items() if n != "steps" or "epochs" not in params}  # The length is given once
    assert run_in_process(workdir, train, **params) == 0, read_log(workdir)
    assert (read_json(workdir / "runs/r/run.json")["status"] == "early_stop") == (name == "early stop")
    monkeypatch.chdir(workdir)
    before = files(workdir / "runs")
    report = verify("runs/r", replay=100)
    assert report.exit_code == 0 and len(report.parts(BIT_EXACT)) >= 2, report
    assert report.parts(BIT_EXACT)[0].startswith("steps 0 to")
    assert files(workdir / "runs") == before


def test_a_run_that_was_stopped_and_changed(workdir, monkeypatch):
    "A run with stops, another learning rate, more steps and other data is replayed from the change of the data on"
    keep = KEEP | dict(keep="all")
    assert run_in_process(workdir, train, 7, **keep) == 130, read_log(workdir)
    resume = dict(run="r", out_dir="runs", resume=True)
    assert run_in_process(workdir, train, 15, **resume, log_every=5, prompt="sea", sample_every=4) == 130
    assert run_in_process(workdir, train, 21, **resume, lr=0.003, accum=1, allow_change="lr accum") == 130
    (workdir / "corpus/sea/all.jsonl").write_bytes((workdir / "corpus/wood/all.jsonl").read_bytes()[:-1] + b"\n\n")
    changed = dict(allow_change="steps data", steps=50, data="other_corpus")
    shutil.copytree(workdir / "corpus", workdir / "other_corpus")
    (workdir / "other_corpus/sea/all.jsonl").write_text(json.dumps(dict(text="tide and foam " * 40)) + "\n")
    assert run_in_process(workdir, train, **resume, **changed) == 0, read_log(workdir)
    monkeypatch.chdir(workdir)
    report = verify("runs/r", replay=100)
    intervals = [row for row in report.rows if row["part"].startswith("steps")]
    later = [row["result"] for row in intervals if int(row["part"].split()[-1]) > 21]
    earlier = [row for row in intervals if int(row["part"].split()[-1]) <= 21]
    assert later and set(later) == {BIT_EXACT}, report
    assert {row["result"] for row in earlier} == {NOT_REPLAYED} and "has changed since" in earlier[0]["detail"], report
    assert report.exit_code == 2


def test_stops_and_changes_are_replayed(workdir, monkeypatch):
    "A run with stops, other log lines, another learning rate and more steps is replayed to the same bits"
    keep = KEEP | dict(keep="all")
    assert run_in_process(workdir, train, 7, **keep) == 130, read_log(workdir)
    resume = dict(run="r", out_dir="runs", resume=True)
    assert run_in_process(workdir, train, 15, **resume, log_every=5, prompt="sea", sample_every=4) == 130
    assert run_in_process(workdir, train, 21, **resume, lr=0.003, accum=1, allow_change="lr accum") == 130
    assert run_in_process(workdir, train, **resume, steps=50, allow_change="steps") == 0, read_log(workdir)
    monkeypatch.chdir(workdir)
    report = verify("runs/r", replay=100)
    assert report.exit_code == 0, report
    assert {"steps 7 to 10", "steps 15 to 20", "steps 20 to 21"} <= set(report.parts(BIT_EXACT))


def test_a_finished_run_whose_data_moves(r):
    "A resume with nothing left to train records the new path, and the run holds"
    for folder in ("texts", "others"):
        shutil.copytree("corpus", folder)
        assert run_in_process(r.parent.parent, train, run="r", out_dir="runs", resume=True, data=folder) == 0
    shutil.rmtree("corpus")
    assert verify(r, replay=1).exit_code == 0 and read_json(r / "run.json")["config"]["data"] == "others"
    forge_json(r / "run.json", lambda info: info["changes"].pop())
    assert "run.json" in mismatches(r)[0]


def test_intervals_are_chosen_evenly_with_the_last(r):
    assert verify(r, replay=1).parts(BIT_EXACT) == ["steps 30 to 40"]
    assert verify(r, replay=2).parts(BIT_EXACT) == ["steps 10 to 20", "steps 30 to 40"]


def test_forged_weights(r):
    path = r / STEPS[1] / "model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    bits = tensors[name].view(torch.int32)
    bits.view(-1)[0] ^= 1  # The smallest possible change
    save_file(tensors, path, dict(format="pt"))
    reseal(path.parent)
    assert mismatches(r) == []
    report = verify(r, replay=4)
    assert report.parts(MISMATCH) == ["steps 10 to 20", "steps 20 to 30"] and name in repr(report)


@pytest.mark.parametrize("part", ["moments", "tokens"])
def test_forged_state(r, part):
    path = r / STEPS[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    if part == "tokens":
        state["counters"]["tokens"] += 64
        forge_json(r / "run.json", lambda info: info.update(tokens=state["counters"]["tokens"]))
    else:
        moments = next(iter(state["optimizers"][0]["state"].values()))
        next(t for t in moments.values() if isinstance(t, torch.Tensor) and t.numel() > 1).view(-1)[0] += 1e-3
    torch.save(state, path)
    reseal(path.parent)
    assert mismatches(r) == []
    assert verify(r, replay=1).parts(MISMATCH) == ["steps 30 to 40"]


def test_forged_configuration(r):
    "A replay finds a wrong learning rate even if all records agree on it"
    forge_json(r / "run.json", lambda info: info["config"].update(lr=0.013))
    for step in STEPS:
        forge_json(r / step / "config.json", lambda then: then["params"].update(lr=0.013))
        reseal(r / step)
    assert mismatches(r) == []
    assert verify(r, replay=4).parts(MISMATCH)


@pytest.mark.parametrize("split, key, step", [("train", "loss", 33), ("train", "grad_norm", 36), ("val", "loss", 35)])
def test_a_forged_figure(r, split, key, step):
    records = [json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()]
    (record,) = [x for x in records if (x["split"], x["step"]) == (split, step)]
    record[key] = float(f"{record[key] * 0.999:.7g}")
    (r / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    assert mismatches(r) in ([], ["metrics.jsonl"])
    report = verify(r, replay=1)
    assert "steps 30 to 40" in report.parts(MISMATCH) and f"{split} at step {step}.{key}" in repr(report)


def test_a_removed_record_or_sample(r):
    for name, step in (("metrics.jsonl", 33), ("metrics.jsonl", 35), ("samples.jsonl", 40)):
        whole = (r / name).read_text()
        (r / name).write_text("".join(s + "\n" for s in whole.splitlines() if json.loads(s)["step"] != step))
        assert mismatches(r, replay=1), (name, step)
        (r / name).write_text(whole)


def test_other_data(r):
    (r.parent.parent / "corpus/sea/all.jsonl").write_text('{"text": "another sea"}\n')
    report = verify(r, replay=1)
    assert report.exit_code == 2 and report.parts(NOT_REPLAYED) == ["steps 30 to 40"]
    shutil.rmtree(r.parent.parent / "corpus")
    assert verify(r, replay=1).exit_code == 2


def add(path, change):
    "Add to the first value of the first tensor of a weights file, and seal its checkpoint again"
    tensors = load_file(path)
    tensor = tensors[min(tensors)]
    tensor.view(-1)[0] += change * float(tensor.abs().max())
    save_file(tensors, path, dict(format="pt"))
    reseal(path.parent)


def test_another_environment(r, monkeypatch):
    "A replay in another environment accepts differences by rounding, and its last line has their size"
    monkeypatch.setattr(setup, "environment", lambda *args: environment(*args) | dict(torch="9.0"))
    assert verify(r, replay=1).parts(BIT_EXACT) == ["steps 30 to 40"]  # Equal bits are equal bits
    add(r / STEPS[-1] / "model.safetensors", 0.003)
    report = verify(r, replay=1)
    assert (report.exit_code, report.parts(OTHER_ENVIRONMENT)) == (0, ["steps 30 to 40"])
    assert "weights: 1 of " in repr(report) and "→ 9.0" in report.conclusion
    assert report.conclusion.endswith("largest difference: 0.003 of a value"), report.conclusion


def test_a_forger_cannot_blame_another_environment(r):
    "A difference that rounding cannot explain is a mismatch in any environment that the files name"
    add(r / STEPS[-1] / "model.safetensors", 0.5)
    forge_json(r / "run.json", lambda info: info["environment"].update(cpu="AVX9"))
    forge_json(r / STEPS[-1] / "config.json", lambda then: then["environment"].update(cpu="AVX9"))
    reseal(r / STEPS[-1])
    report = verify(r, replay=1)
    assert (report.exit_code, report.parts(MISMATCH)) == (5, ["steps 30 to 40"])
    assert "more than rounding explains (at most 2% of a value)" in repr(report)
    assert float(report.conclusion.split()[-4]) > 0.3, report.conclusion


@pytest.mark.parametrize("key, factor", [("tokens", 1.001), ("loss", 1.1)])
def test_a_forged_figure_in_another_environment(r, monkeypatch, key, factor):
    "In another environment, a replay requires equal counts, and losses within a bound"
    monkeypatch.setattr(setup, "environment", lambda *args: environment(*args) | dict(torch="9.0"))
    records = [json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()]
    record = next(x for x in records if (x["split"], x["step"]) == ("train", 33))
    record[key] = type(record[key])(record[key] * factor) + (key == "tokens")
    (r / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    assert verify(r, replay=1).parts(MISMATCH) == ["metrics.jsonl", "steps 30 to 40"]


def test_the_threads_of_the_run_are_used(r):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert verify(r, replay=1).parts(BIT_EXACT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_interval_is_replayed_with_its_own_threads(workdir, monkeypatch):
    "A run whose `threads` changed on resume has no mismatch, also where the number of threads changes the bits"
    monkeypatch.chdir(workdir)
    used, train_step = [], Trainer.train_step

    def record_threads(trainer):
        used.append(torch.get_num_threads())
        return train_step(trainer)

    run(hooks=[StopAtSteps(10)], view=False, **FEW | dict(threads=2))
    run(resume=True, run="r", out_dir="runs", threads=1, view=False)
    monkeypatch.setattr(Trainer, "train_step", record_threads)
    assert verify("runs/r", replay=4).parts(BIT_EXACT) == [f"steps {n} to {n + 5}" for n in (0, 5, 10, 15)]
    assert used == [2] * 10 + [1] * 10


def test_the_command(r):
    folder = r.parent.parent
    (folder / "log").unlink()
    assert run_in_process(folder, lmnotes_command, "verify", "--run", "runs/r", "--replay", "2") == 0
    assert "r: no mismatch; bit-exact intervals: 2" in read_log(folder)
    flip(r / STEPS[0] / "state.pt", 99)
    assert run_in_process(folder, lmnotes_command, "verify", "--run", "runs/r") == 5
    assert "r: MISMATCH in 1 of" in read_log(folder) and STEPS[0] in read_log(folder)
    assert run_in_process(folder, lmnotes_command, "verify", "--run", "runs/none") == 2


def test_erased_figures_of_an_earlier_version(tmp_path):
    "Validation figures that are missing are a mismatch, also in a run whose checkpoints hold no hashes of the logs"
    folder = shutil.copytree(ROOT / "tests/golden/0.1/runs/gpt", tmp_path / "gpt")
    assert not verify(folder).parts(MISMATCH)
    records = read_records(folder / "metrics.jsonl")
    for r in records:
        if r["split"] == "val":
            r["loss"] = None
            r.pop("bpb", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert verify(folder).parts(MISMATCH) == ["metrics.jsonl"]


def test_a_run_with_its_own_batches(workdir, monkeypatch, capsys):
    "A run with `make_batches` records its name, and needs the function for a resume and a replay"
    monkeypatch.chdir(workdir)

    def every_second(s):
        class Half:
            steps_per_epoch = s.batches.steps_per_epoch
            __getitem__ = staticmethod(lambda step: s.batches[2 * step])

        return Half()

    def renamed(s):
        return every_second(s)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(make_batches=every_second, hooks=[StopAtSteps(20)], view=False, **KEEP)
    with pytest.raises(
        CheckpointError, match=r"trained with batches of its own \(make_batches=.*every_second\). Pass the same"
    ):
        run(resume=True, run="r", out_dir="runs", view=False)
    assert "bits may differ" not in capsys.readouterr().out
    run(make_batches=renamed, hooks=[StopAtSteps(25)], resume=True, run="r", out_dir="runs", view=False)
    text = capsys.readouterr().out
    assert "bits may differ from here on: make_batches" in text and "renamed" in text
    run(make_batches=every_second, resume=True, run="r", out_dir="runs", view=False)
    torch.set_num_threads(threads)
    report = verify("runs/r", replay=1)
    assert report.exit_code == 2 and "Pass the same to `verify`" in report.rows[-1]["detail"]
    assert verify("runs/r", replay=1, make_batches=every_second).parts(BIT_EXACT)


def test_a_run_without_its_own_batches(workdir, monkeypatch):
    "A run that was trained without `make_batches` cannot resume with it"
    monkeypatch.chdir(workdir)
    run(hooks=[StopAtSteps(20)], view=False, **KEEP)
    own = lambda s: s.batches  # noqa: E731
    with pytest.raises(CheckpointError, match="trained without make_batches. Pass the same"):
        run(make_batches=own, resume=True, run="r", out_dir="runs", view=False)
    report = verify("runs/r", replay=1, make_batches=own)
    assert report.exit_code == 2 and "without make_batches" in report.rows[-1]["detail"]


def test_a_run_with_its_own_batches_that_has_saved_nothing(workdir, monkeypatch):
    "A run with `make_batches` needs it too when it starts over before its first checkpoint"
    monkeypatch.chdir(workdir)
    with pytest.raises(KeyboardInterrupt):
        run(make_batches=lambda s: s.batches, hooks=[Interrupt()], view=False, **KEEP)
    with pytest.raises(CheckpointError, match="with batches of its own"):
        run(resume=True, run="r", out_dir="runs", view=False)


class Interrupt(Hook):
    "Hook that ends a run before its first save"

    def after_step(self, t):
        if t.step == 1:
            raise KeyboardInterrupt


def test_a_run_without_the_hash_of_its_token_ids(workdir, monkeypatch):
    "A run without the hash of its token ids, and a fork of it, are replayed. A run whose ids differ is not"
    monkeypatch.chdir(workdir)
    r = run(hooks=[StopAtSteps()], view=False, **KEEP)
    info = read_json(r.folder / "run.json")
    assert info["data"].pop("ids")
    write_json(r.folder / "run.json", info)
    for folder in r.folder.glob("step_*"):
        config = read_json(folder / "config.json")
        assert config.pop("ids")
        write_json(folder / "config.json", config)
        reseal(folder)
    assert verify("runs/r", replay=1).parts(BIT_EXACT)
    assert verify(f"runs/{fork('runs/r/' + STEPS[2])}", replay=1).parts(BIT_EXACT)
    for folder in r.folder.glob("step_*"):
        write_json(folder / "config.json", read_json(folder / "config.json") | dict(ids="0" * 64))
        reseal(folder)
    report = verify("runs/r", replay=1)
    assert report.exit_code == 2 and "other token ids now" in report.rows[-1]["detail"]


def test_other_files(workdir, monkeypatch):
    "An extra file of the model is checked by its own checksum, and every file that no hash covers is named"
    monkeypatch.chdir(workdir)
    r = run(hooks=[StopAtSteps(10)], view=False, **KEEP)
    for name in ("memory.safetensors", "recipe.json", "train.ipynb", "step_notes.txt", ".hidden", "tokenizer/evil.py"):
        (r.folder / name).write_text("any")
    (other,) = [row for row in verify("runs/r").rows if row["result"] == NOT_CHECKED]
    assert other["detail"] == ".hidden, memory.safetensors, recipe.json, step_notes.txt, tokenizer/evil.py, train.ipynb"

    def load_extra_files(self, folder):
        if (folder / "memory.safetensors").read_text() != "any":
            raise CheckpointError(f"{folder / 'memory.safetensors'}: damaged")

    monkeypatch.setattr(type(r.lm), "extra_files", ("memory.safetensors",))
    monkeypatch.setattr(type(r.lm), "load_extra_files", load_extra_files)
    report = verify("runs/r")
    assert report.exit_code == 0 and "memory.safetensors" in report.parts(OK)
    (r.folder / "memory.safetensors").write_text("other")
    assert verify("runs/r").parts(MISMATCH) == ["memory.safetensors"]
    (r.folder / "memory.safetensors").unlink()
    assert verify("runs/r").parts(MISMATCH) == ["memory.safetensors"]
