"""NaN and infinity in a gradient, a weight, an optimizer state or an evaluation reach no checkpoint, and are reported."""

import math
from functools import partial

import pytest
import torch
from small_runs import SMALL

from lmnotes.core import read_json
from lmnotes.data.untrusted_files import is_finite
from lmnotes.inference import evaluation
from lmnotes.runs.run import run
from lmnotes.training.checkpoint import list_checkpoints, read_state, read_weights
from lmnotes.training.trainer import Hook


class Inject(Hook):
    "Hook that changes a trainer once, after step 5 of 12"

    def __init__(self, change):
        self.change = change

    def after_step(self, t):
        if t.step == 5:
            self.change(t)


def spoil_gradient(value, t):
    "Spoil the next gradient"
    handle = next(t.lm.parameters()).register_hook(lambda g: (handle.remove(), torch.full_like(g, value))[1])


def spoil_loss(value, t):
    "Spoil the next loss"
    loss = t.lm.loss

    def spoiled(batch):
        t.lm.loss = loss
        out = loss(batch)
        return out | dict(loss=out["loss"] * value)

    t.lm.loss = spoiled


def spoil_weight(value, t):
    "Spoil a weight, in a way that the trainer does not notice"
    next(t.lm.parameters()).data.view(-1)[0] = value


def spoil_moment(t):
    "Make a running mean of squared gradients infinite, after which its weight no longer changes"
    state = next(state for opt in t.optimizers for state in opt.state.values() if "exp_avg_sq" in state)
    state["exp_avg_sq"].view(-1)[0] = math.inf


# (change, status, last checkpoint that was saved, part of the output)
NOT_SAVED = "warning: step 8 is not saved: step 8: embed.weight holds NaN or infinity"
VALUES = dict(nan=math.nan, inf=math.inf, minus_inf=-math.inf)
CASES = {f"loss {name}": (partial(spoil_loss, value), "done", 12, "skipped") for name, value in VALUES.items()}
CASES |= {f"gradient {name}": (partial(spoil_gradient, v), "done", 12, "skipped") for name, v in VALUES.items()}
CASES |= {f"weight {name}": (partial(spoil_weight, v), "diverged", 4, NOT_SAVED) for name, v in VALUES.items()}
CASES |= {
    "moment": (spoil_moment, "diverged", 4, "exp_avg_sq holds NaN or infinity and is not saved"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_is_not_finite(workdir, monkeypatch, capsys, case):
    "A run reports NaN or infinity and ends at the next save. No checkpoint holds the value, and the last good checkpoint remains"
    monkeypatch.chdir(workdir)
    change, status, last, text = CASES[case]
    run(hooks=[Inject(change)], view=False, **SMALL | dict(run="r", optimizer="adamw", keep="all"))
    out = capsys.readouterr().out
    assert text in out, out
    assert read_json("runs/r/run.json")["status"] == status
    steps = list_checkpoints("runs/r")
    assert int(steps[-1].name[5:]) == last
    for folder in steps:
        assert all(w.isfinite().all() for w in read_weights(folder).values())
        for opt in read_state(folder)["optimizers"]:
            assert all(v.isfinite().all() for s in opt["state"].values() for v in s.values() if torch.is_tensor(v))


def test_an_evaluation_that_is_not_finite(workdir, monkeypatch):
    "A loss that is NaN is never the best one"
    monkeypatch.chdir(workdir)
    evaluate = evaluation.evaluate

    def spoiled(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        return result | dict(loss=math.nan) if next(steps) == 1 else result

    steps = iter(range(100))
    monkeypatch.setattr(evaluation, "evaluate", spoiled)
    r = run(view=False, **SMALL)
    assert r.status == "done" and math.isfinite(r.info["result"]["best"]) and r.info["result"]["best_step"] != 8
    assert read_json(r.folder / "run.json")["result"]["best"] == r.info["result"]["best"]


def test_tensors_of_every_kind():
    "Every dtype and shape that an optimizer state can have is checked"
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert is_finite(torch.zeros(3).to(dtype)) and is_finite(torch.zeros(0).to(dtype))
        assert not is_finite(torch.tensor([1, math.nan]).to(dtype))
    assert is_finite(torch.arange(3)) and is_finite(torch.tensor([True]))
