"""Each check that protects a run or its reader is removed in turn, and a test of this folder fails."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import test_changes_on_resume as changes
import test_damaged_runs as damaged
import test_disk_errors as disk_errors
import test_foreign_data as foreign_data
import test_foreign_weights as foreign_weights
import test_power_cuts as power_cuts
import test_untrusted_values as untrusted
from small_runs import SMALL, attempt

from lmnotes import core, files
from lmnotes.core import CheckpointError, DataError, read_json
from lmnotes.data import datasets
from lmnotes.recipes import text_only_config
from lmnotes.runs import folder as folder_module
from lmnotes.runs import load as load_module
from lmnotes.runs import run as run_module
from lmnotes.runs import setup
from lmnotes.runs.config import resolve_config
from lmnotes.training import checkpoint, trainer
from lmnotes.untrusted import EscapedError

trained, place, uninterrupted = changes.trained, changes.place, changes.uninterrupted


def unchecked(*args, **kwargs):
    "Check nothing"


def as_text(value, *args, **kwargs):
    return str(value)


def with_args(function, *args):
    "Return a test with its arguments after the first, which is the folder of the runs"
    call = lambda place: function(place, *args)  # noqa: E731
    call.__name__, call.__module__ = f"{function.__name__}[{'-'.join(args)}]", function.__module__
    return call


def wrong(case):
    "Return a test of a wrong combination"
    return with_args(changes.test_a_wrong_combination, case)


def damage(name, way, use="load"):
    "Return a test that damages one file of a run in one way, and judges one use"

    def test(place):
        folder = place / "runs/r"
        shutil.copytree(folder, place / "copy")
        whole, error, _ = attempt(damaged.USES[use], folder)
        assert not error, error
        shutil.rmtree(folder)
        shutil.copytree(place / "copy", folder)
        path = next(folder.glob(name))
        path.write_bytes(way(path.read_bytes()))
        problem = damaged.judge(path, folder, use, whole, attempt(damaged.USES[use], folder))
        assert not problem, problem

    test.__name__, test.__module__ = damaged.test_every_file_of_a_run_in_more_ways.__name__, damaged.__name__
    return test


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def edit(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


def edit_config(**values):
    return lambda data: json.dumps(json.loads(data) | dict(config=json.loads(data)["config"] | values)).encode()


def edit_sample(data):
    return data + b'{"step": 6, "split": "sample"}\n'


class Same(str):
    "A text that is equal to every other"

    __hash__ = str.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def fork_of_another_step(place):
    changes.put_step("seed")
    with pytest.raises(CheckpointError, match=r"run\.json has seed=0"):
        folder_module.fork("runs/r", "new")


def last_step_missing(place):
    (place / "runs/r/last").write_text("step_00000099\n")
    assert "step_00000099, which is missing" in attempt(damaged.USES["load"], place / "runs/r")[2]


def load_with_another_tokenizer(place):
    changes.put_tokenizer("runs/bytes/tokenizer")
    with pytest.raises(core.TokenizerError, match="is not the tokenizer of the run"):
        load_module.load("runs/r")


def attach_with_a_bad_owner(place):
    (place / "runs/r/.owner.json").write_text("5")
    assert damaged.attach("runs/r").status == "interrupted"


def pointer_outside(place):
    (place / "runs/r/interrupted").write_text("../seed/step_00000006\n")
    with pytest.raises(CheckpointError, match="would not name a file"):
        load_module.load("runs/r", "interrupted")


def manifest_outside(place):
    "A manifest names a file outside its folder, with the right hash"
    (place / "outside").write_bytes(b"a")
    path = changes.step() / "manifest.json"
    files = read_json(path)["files"] | {"../../../outside": dict(size=1, sha256=core.sha256_bytes(b"a"))}
    path.write_bytes(edit(files=files)(path.read_bytes()))
    with pytest.raises(CheckpointError, match="would not name a file"):
        checkpoint.verify_checkpoint(changes.step())


def last_run_outside(place):
    "The file .last names a run outside the folder of runs"
    shutil.copytree("runs/r", "outside")
    (place / "runs/.last").write_text("../outside\n")
    with pytest.raises(CheckpointError, match="would not name a file"):
        folder_module.last_run_name(place / "runs")


def link_in_a_run(place, use, name):
    (place / "runs" / name / "w.pt").symlink_to(place / "yours")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        changes.resume(name) if use == "resume" else folder_module.fork(f"runs/{name}", "new")


def secret_in_an_error(place):
    def fails(t):
        raise RuntimeError(f"401 for {untrusted.TOKENS['url']}")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer.Trainer, "train_step", fails)
        with pytest.raises(RuntimeError):
            changes.resume("r")
    error = read_json("runs/r/run.json")["error"]
    assert "401 for https***host" in error and untrusted.TOKENS["url"] not in error, error


def escape_sequence_in_an_error(place):
    path = place / "runs/r/run.json"
    path.write_bytes(edit(origins={"\x1b[2J": 1})(path.read_bytes()))
    with pytest.raises(CheckpointError, match="origins") as error:
        load_module.load("runs/r")
    assert "\x1b" not in str(error.value)


def alias_in_yaml(place):
    text, message = foreign_data.YAML["a map in itself"]
    (place / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        text_only_config.read_settings("config.yaml")


def other_download(place):
    part = place / "input.txt.part"
    for content in (b"another", b"changed text"):
        part.write_bytes(content)
        with pytest.raises(DataError, match="the download has .*, needs .* and was deleted"):
            datasets.download("http://127.0.0.1:1/input.txt", place / "input.txt", len(content), "0" * 64)
    assert not part.exists() and not (place / "input.txt").exists()


def replaced_while_read(place):
    "A checkpoint that is replaced while it is read, as by a run that keeps one"
    read, folder, reads = checkpoint.read_weights, changes.step(), []

    def read_late(path):
        reads.append(path)
        if len(reads) > 1:
            return read(path)
        shutil.copytree(folder, place / "new")
        shutil.rmtree(folder)
        os.replace(place / "new", folder)
        raise CheckpointError("it was deleted")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "read_weights", read_late)
        assert load_module.load("runs/r").step == 6


def larger_than_its_file(place):
    folder = foreign_weights.save_small(place / "small")
    foreign_weights.with_config(folder, d_model=1024)
    with pytest.raises(CheckpointError, match="has more weights than its file"):
        checkpoint.load_lm(folder)


def weights_of(place, name):
    foreign_weights.test_values_in_a_checkpoint(name, place / "small")


def parent_ends(place):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TORCHELASTIC_RUN_ID", "x")
        signals = core.StopSignals()
        signals.announce = False
        assert not signals
        patched.setattr(os, "getppid", lambda: 1)
        assert signals and signals.name == "SIGHUP"


def power_cut(test, *args):
    "Return a test of the disk after a power cut, with arguments after its first three"

    def cut(place):
        if not os.path.exists("/proc/self/fd"):
            pytest.skip("open files are named through /proc")
        with pytest.MonkeyPatch.context() as patched:
            test(place / "runs/r", place, patched, *args)

    cut.__name__, cut.__module__ = test.__name__, test.__module__
    return cut


def decision_of_rank0(place):
    "A rank that comes late finds the record that rank 0 has just written for a new run"
    decisions = iter([False])
    ranks = SimpleNamespace(is_initialized=lambda: True, barrier=unchecked)
    ranks.broadcast_object_list = lambda values: values.__setitem__(0, next(decisions, values[0]))
    params = SMALL | dict(resume="auto", run="r")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "dist", ranks)
        assert setup.RunSetup(*resolve_config(params, environ={}), place / "runs/r", "cpu", None).info is None


MUTANTS = {  # {mutant: (owner, name, mutated function, test)}
    "accepts any hash of a file of the right size": (checkpoint, "sha256_file", lambda path: Same(), damage("step_*/model.safetensors", flip)),
    "does not verify checkpoints": (checkpoint, "verify_checkpoint", lambda folder: folder, damage("step_*/model.safetensors", flip)),
    "accepts a step folder of any name": (checkpoint, "checkpoint_name", lambda step: Same(), wrong("renamed step")),
    "accepts any base weights": (checkpoint, "_verify_base_weights", unchecked, wrong("other base weights")),
    "does not report a missing last step": (checkpoint, "_warn_if_not_last", lambda folder: folder, last_step_missing),
    "accepts checkpoints of any format": (checkpoint, "check_format", unchecked, wrong("newer checkpoint")),
    "accepts records of any format": (folder_module, "check_format", unchecked, wrong("newer record")),
    "does not check the types in a record": (folder_module, "check_entries", unchecked, damage("run.json", edit(data=5))),
    "`load` accepts any record": (load_module, "check_same_record", unchecked, damage("run.json", edit_config(lr=0.5))),
    "a resume accepts any record": (setup, "check_same_record", unchecked, wrong("record of another run")),
    "`fork` accepts any record": (folder_module, "check_same_record", unchecked, fork_of_another_step),
    "a resume accepts any tokenizer": (setup, "check_same_tokenizer", unchecked, wrong("tokenizer of bytes")),
    "`load` accepts any tokenizer": (load_module, "check_same_tokenizer", unchecked, load_with_another_tokenizer),
    "accepts changed data": (setup, "check_same_data", unchecked, wrong("text edited at the same size")),
    "accepts changed parameters": (setup, "check_unchanged", lambda *args: {}, wrong("another tokenizer given")),
    "accepts any line as a record": (files, "_is_record", lambda value: True, damage("samples.jsonl", edit_sample, "attach")),
    "accepts any content of .owner.json": (load_module, "read_owner", lambda folder: read_json(folder / ".owner.json"), attach_with_a_bad_owner),
    "follows a pointer out of the run folder": (checkpoint, "path_inside", lambda folder, name, *args, **kwargs: folder / name, pointer_outside),
    "accepts a manifest that lists files outside its folder": (checkpoint, "path_inside", lambda folder, name, *args, **kwargs: folder / name, manifest_outside),
    "accepts a last run in any folder": (folder_module, "path_inside", lambda folder, name, *args, **kwargs: folder / name, last_run_outside),
    "accepts links in a run that is resumed": (folder_module, "check_no_links", unchecked, with_args(link_in_a_run, "resume", "r")),
    "accepts links in a run that is forked": (folder_module, "check_no_links", unchecked, with_args(link_in_a_run, "fork", "r")),
    "accepts links in a finished run": (load_module, "check_no_links", unchecked, with_args(link_in_a_run, "resume", "whole")),
    "does not compare the environment": (setup, "environment_changes", lambda before, device: "", changes.test_two_threads),
    "does not check the logs": (setup, "warn_of_damaged_logs", unchecked, changes.test_an_edited_log),
    "does not check the disk space": (run_module, "check_disk_space", unchecked, disk_errors.test_no_space_for_the_final_checkpoint),
    "does not escape HTML": (None, "escape_html", as_text, untrusted.test_record_is_text_in_tables_and_views),
    "does not escape Markdown": (None, "escape_markdown", as_text, untrusted.test_names_and_values_are_text_in_tables),
    "does not escape terminal sequences": (None, "escape_terminal", as_text, untrusted.test_names_and_values_are_text_in_tables),
    "does not escape terminal sequences in errors": (EscapedError, "__str__", Exception.__str__, escape_sequence_in_an_error),
    "does not hide secrets in errors": (None, "hide_secrets", as_text, secret_in_an_error),
    "accepts secrets as parameters": (None, "check_no_secrets", unchecked, untrusted.test_parameters_reject_secrets),
    "accepts downloads of any size and hash": (datasets, "_file_problem", lambda *args: "", other_download),
    "tries only once to read a run that trains": (load_module, "read_while_training", lambda run, read: read(), replaced_while_read),
    "accepts aliases in YAML": (text_only_config.yaml, "AliasEvent", type("Nothing", (), {}), alias_in_yaml),
    "builds models of any size": (checkpoint, "limit_model_size", nullcontext, larger_than_its_file),
    "accepts any values as weights": (checkpoint, "check_weights", unchecked, with_args(weights_of, "NaN")),
    "does not stop a rank whose parent process ended": (core.StopSignals, "parent", property(unchecked, unchecked), parent_ends),
    "flushes only the top folder of an export": (files, "fsync_folders", core.fsync_path, power_cut(power_cuts.test_power_cut_while_an_export_is_replaced, files.exchange_paths)),
    "does not flush a fork": (folder_module, "fsync_folders", unchecked, power_cut(power_cuts.test_power_cut_during_a_fork)),
    "lets each rank decide whether to resume": (setup, "broadcast_from_rank0", lambda value: value, decision_of_rank0),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(place, monkeypatch, mutant):
    "A test that passes fails when one check of the library is removed"
    owner, name, function, test = MUTANTS[mutant]
    everywhere = [module for key, module in sys.modules.items() if key.startswith("lmnotes") and name in vars(module)]
    again = place.parent / "again"
    shutil.copytree(place, again)
    test(place)
    monkeypatch.chdir(again)
    for module in [owner] if owner else everywhere:
        monkeypatch.setattr(module, name, function, raising=False)
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(again)
