"""Each check that protects a run is removed in turn, and a test of this folder fails."""

import json
import shutil

import pytest
import test_changes_on_resume as changes
import test_damaged_runs as damaged
from small_runs import attempt

from lmnotes import core, files
from lmnotes.core import read_json
from lmnotes.runs import folder as folder_module
from lmnotes.runs import load as load_module
from lmnotes.runs import setup
from lmnotes.training import checkpoint

trained, place, uninterrupted = changes.trained, changes.place, changes.uninterrupted


def unchecked(*args, **kwargs):
    "Check nothing"


def wrong(case):
    "Return a test of a wrong combination"
    return lambda place: changes.test_a_wrong_combination(place, case)


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

    return test


def flip(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def edit(**values):
    return lambda data: json.dumps(json.loads(data) | values).encode()


def edit_config(**values):
    return lambda data: json.dumps(json.loads(data) | dict(config=json.loads(data)["config"] | values)).encode()


def edit_sample(data):
    return data + b'{"step": 6, "split": "sample"}\n'


MUTANTS = {  # {mutant: (owner, name, mutated function, test)}
    "hashes of equal length": (checkpoint, "sha256_file", lambda path: Same(), damage("step_*/model.safetensors", flip)),
    "verify_checkpoint reads nothing": (checkpoint, "verify_checkpoint", lambda folder: folder, damage("step_*/model.safetensors", flip)),
    "a step folder of any name": (checkpoint, "checkpoint_name", lambda step: Same(), wrong("renamed step")),
    "any base weights": (checkpoint, "_verify_base_weights", unchecked, wrong("other base weights")),
    "a missing last step": (checkpoint, "_warn_if_not_last", lambda folder: folder, lambda place: last_step_missing(place)),
    "any format of a checkpoint": (checkpoint, "check_format", unchecked, wrong("newer checkpoint")),
    "any format of a record": (folder_module, "check_format", unchecked, wrong("newer record")),
    "a record without types": (folder_module, "_wrong_entries", lambda info: iter(()), damage("run.json", edit(data=5))),
    "a record with unknown parameters": (folder_module, "_wrong_entries", lambda info: iter(()), damage("run.json", edit_config(unknown=1))),
    "load of any record": (load_module, "check_same_record", unchecked, damage("run.json", edit_config(lr=0.5))),
    "resume of any record": (setup, "check_same_record", unchecked, wrong("record of another run")),
    "fork of any record": (folder_module, "check_same_record", unchecked, lambda place: fork_of_another_step(place)),
    "any tokenizer": (setup, "check_same_tokenizer", unchecked, wrong("tokenizer of bytes")),
    "any tokenizer in load": (load_module, "check_same_tokenizer", unchecked, lambda place: load_with_another_tokenizer(place)),
    "any data": (setup, "check_same_data", unchecked, wrong("text edited at the same size")),
    "any parameters": (setup, "check_unchanged", lambda *args: {}, wrong("another tokenizer given")),
    "any line is a record": (files, "_is_record", lambda value: True, damage("samples.jsonl", edit_sample, "attach")),
    "any owner": (load_module, "read_owner", lambda folder: read_json(folder / ".owner.json"), lambda place: attach_with_a_bad_owner(place)),
    "pointers to anywhere": (checkpoint, "path_inside", lambda folder, name, *args, **kwargs: folder / name, lambda place: pointer_outside(place)),
    "the environment is not compared": (setup, "environment_changes", lambda before, device: "", changes.test_two_threads),
}  # fmt: skip


class Same(str):
    "A text that is equal to every other"

    __hash__ = str.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def fork_of_another_step(place):
    changes.put_step("seed")
    with pytest.raises(core.CheckpointError, match=r"run\.json has seed=0"):
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
    with pytest.raises(core.CheckpointError, match="would not name a file"):
        load_module.load("runs/r", "interrupted")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(place, monkeypatch, mutant):
    "A test that passes fails when one check of the library is removed"
    owner, name, function, test = MUTANTS[mutant]
    again = place.parent / "again"
    shutil.copytree(place, again)
    test(place)
    monkeypatch.chdir(again)
    monkeypatch.setattr(owner, name, function)
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(again)
