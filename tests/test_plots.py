"""All figures of the library have the same style, which is legible on light and dark pages."""

import ast

import pytest
import torch
from helpers import ROOT
from matplotlib.text import Text

from lmnotes.inference.evaluation import Table
from lmnotes.inspect import comparison
from lmnotes.inspect.attention import plot_attention
from lmnotes.inspect.comparison import plot_comparison, plot_panel
from lmnotes.inspect.diff import plot_two_runs
from lmnotes.inspect.routing import plot_router_usage
from lmnotes.inspect.thinking import plot_thinking
from lmnotes.plots import PLOT_GRAY
from lmnotes.runs.compare import CompareConfig
from lmnotes.runs.monitor import plot_metrics

METRICS = [
    dict(step=s, split=split, loss=5.0 / s, lr=0.1, tok_per_s=9) for s in (1, 2, 9) for split in ("train", "val")
]
THINKING = [dict(model=m, steps=s, bpb=s, saved=s, change=s) for m in ("trained", "untrained") for s in (0, 1)]
RESULT = dict(curve=[(1, 4.0, 0.1), (2, 3.0, 0.1)], flops=1e12, steps=2, bound=False, bpb=3.0, error=0.1)
RESULT |= dict(memory=1e8, bytes_per_s=100.0)


class Comparison:
    cfg = CompareConfig()


FIGURES = dict(
    metrics=lambda: plot_metrics(METRICS, "A title\nof two lines", ["step 1 | a sample"], steps=100),
    empty=lambda: plot_metrics([], "A title", steps=100),
    comparison=lambda: plot_comparison(Comparison()),
    panel=lambda: plot_panel([RESULT | dict(name="gpt"), RESULT | dict(name="rnn")], "rnn"),
    attention=lambda: plot_attention([torch.rand(2, 12, 12)] * 2, [f"word {i}" for i in range(12)]),
    routing=lambda: plot_router_usage(Table([dict(domain="sea", a=0.25, b=0.75), dict(domain="hills", a=0.5, b=0.5)])),
    thinking=lambda: plot_thinking(THINKING, "A title"),
    diff=lambda: plot_two_runs([METRICS, METRICS], "ab", dict(step=2)),
)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_transparent_and_their_texts_gray_and_of_ten_points(name, monkeypatch):
    rows = [RESULT | dict(name=f"arch {i}", bpb=3.0 + i) for i in range(10)]
    monkeypatch.setattr(comparison, "comparison_results", lambda c: rows)
    figure = FIGURES[name]()
    figure.canvas.draw()
    assert figure.get_facecolor()[3] == 0 and {ax.get_facecolor()[3] for ax in figure.axes} == {0}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert texts and {text.get_color() for text in texts} == {PLOT_GRAY}
    assert min(text.get_fontsize() for text in texts) >= 10
    assert figure.get_figwidth() * 100 <= 1000  # Pixels, so that a page shows it almost in full size


def test_all_functions_that_make_a_figure_have_the_style():
    for path in (ROOT / "lmnotes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "plt.close(fig)" in ast.unparse(node):
                assert [ast.unparse(word) for word in node.decorator_list] == ["plot_style"], (
                    f"{path.name}: {node.name}"
                )
