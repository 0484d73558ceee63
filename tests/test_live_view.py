"""The view in a training cell is live: the step and the remaining time without log records, redraws, and axes of the whole run."""

import json
from types import SimpleNamespace

import pytest
from helpers import TINY
from matplotlib.figure import Figure

import lmnotes
from lmnotes.runs import monitor
from lmnotes.runs.monitor import LiveDisplay, Progress, RunView, ShowLiveView


class Clock:
    "Seconds that only a test changes"

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def shown(monkeypatch):
    "Return the list of what a kernel shows, in order, as (output, update, content)"
    shown = []

    def display(content, raw=False, display_id=None):
        handle = SimpleNamespace(number=len({number for number, *_ in shown}))
        handle.update = lambda content, raw=False: shown.append((handle.number, True, content))
        shown.append((handle.number, False, content))
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(monitor, "is_notebook", lambda: True)
    return shown


def live_view(folder, clock, cost=0.0):
    "Return a hook with a clock, whose drawing takes `cost` seconds, and the times at which it draws"
    hook, times = ShowLiveView(folder, quiet=True), []
    view = hook.screen.view
    hook.screen = LiveDisplay(view, clock=clock)
    view.progress = Progress(clock=clock)

    def refresh():
        times.append(clock.now)
        clock.now += cost

    view.refresh = refresh
    return hook, times


def trainer(step, steps=100_000):
    return SimpleNamespace(step=step, cfg=SimpleNamespace(steps=steps))


def test_step_and_remaining_time_need_no_log_record(tmp_path, shown):
    clock = Clock()
    hook, _ = live_view(tmp_path, clock)
    for step in range(1, 301):
        clock.now += 0.25
        hook.after_step(trainer(step))
    texts = [content["text/plain"] for *_, content in shown if isinstance(content, dict)]
    assert texts[0] == "step 1 of 100,000" and texts[1] == "step 5 of 100,000 | 6h56m left"
    assert texts[-1] == "step 297 of 100,000 | 6h55m left"
    updates = [int(text.split()[1]) for text in texts]
    assert max(0.25 * (b - a) for a, b in zip(updates, updates[1:])) <= 2


def test_first_step_shows_a_line_and_below_it_the_figure(tmp_path, shown):
    hook, _ = live_view(tmp_path, Clock())
    hook.after_step(trainer(1))
    (line, _, text), (figure, _, view) = shown
    assert line != figure and text == {"text/plain": "step 1 of 100,000"} and view is hook.screen.view
    assert view.step == 1


@pytest.mark.parametrize("cost", [0.0, 0.1, 0.5, 1.0, 5.0])
def test_redraws_are_at_most_ten_seconds_apart(tmp_path, shown, cost):
    clock = Clock()
    hook, times = live_view(tmp_path, clock, cost)
    for step in range(1, 1000):
        clock.now += 0.1
        hook.after_step(trainer(step))
    between = [b - a for a, b in zip(times, times[1:])]
    assert len(times) > 9 and max(between) <= 10
    assert min(between[1:]) >= max(2, min(9, 21 * cost)) - 1e-6


def test_slow_drawing_leaves_a_third_of_the_time(tmp_path, shown):
    clock = Clock()
    hook, times = live_view(tmp_path, clock, cost=60.0)
    for step in range(1, 10_000):
        clock.now += 0.1
        hook.after_step(trainer(step))
    assert 60 * len(times[1:]) <= clock.now * 2 / 3


def test_axes_show_the_whole_run_from_the_first_step(tmp_path):
    data = dict(what="text", fingerprint="0", start="", tokens={})
    tokenizer = dict(name="bytes", vocab_size=256, fingerprint="0")
    record = dict(status="running", step=0, config=dict(arch="gpt", steps=500), data=data, tokenizer=tokenizer)
    record |= dict(model={}, origins={}, dtype="float32", n_params=1)
    (tmp_path / "run.json").write_text(json.dumps(record))
    empty = RunView(tmp_path).refresh().figure()
    line = dict(step=10, split="train", loss=4.0, lr=0.1, tok_per_s=9)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    one = RunView(tmp_path).refresh().figure()
    for figure in (empty, one):
        assert isinstance(figure, Figure)
        assert [ax.get_xlim() for ax in figure.axes] == [(0, 500)] * 3


def test_a_run_shows_its_steps_between_two_log_records(tmp_path, monkeypatch, shown, corpus):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Progress, "update", lambda p, step, steps: (vars(p).update(step=step, steps=steps), True)[1])
    lmnotes.run(**TINY | dict(data=str(corpus), steps=9, log_every=9, eval_every=0, sample_every=0))
    lines = [content["text/plain"] for *_, content in shown if isinstance(content, dict)]
    assert lines == [f"step {step} of 9" for step in [*range(10), 9]]
    assert str(shown[-1][2]).startswith("r: gpt on corpus | done at step 9 of 9")
