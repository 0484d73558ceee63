"""The diagrams of the notebooks: written by `python docs/diagrams.py`, used, legible, and true of the code."""

import re
import xml.etree.ElementTree as ElementTree

import diagrams
import diagrams_of_layers as layers
import drawing
import nbformat
import numpy as np
import pytest
import torch
from helpers import ROOT

from lmnotes.data.batches import RandomBatches
from lmnotes.data.tokenizer import ByteTokenizer, CharTokenizer
from lmnotes.models.streams import attention_mask
from lmnotes.nn.attention import KVCache, causal_mask
from lmnotes.nn.denoising import BlockAttention
from lmnotes.nn.lm import get_arch
from lmnotes.nn.lora import LoRAConfig

each = pytest.mark.parametrize("name", drawing.DIAGRAMS)
SVG = "{http://www.w3.org/2000/svg}"


def test_the_pictures_are_those_that_the_code_draws():
    committed = {path.stem: path.read_text(encoding="utf-8") for path in diagrams.PICTURES.glob("*.svg")}
    assert committed == {name: drawing.render(name) for name in drawing.DIAGRAMS}, "run python docs/diagrams.py"


ARCHITECTURES = "bigram rnn gpt scratch_gpt gpt2 ssm bytepatch diffusion nanothink streams".split()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_a_diagram(name):
    notebook, *_ = drawing.DIAGRAMS[name]
    assert f'@arch(\\"{name}\\")' in (ROOT / f"nbs/{notebook}.ipynb").read_text(encoding="utf-8")


@each
def test_the_diagram_is_at_the_top_of_its_notebook(name):
    "The second cell shows it, and a sentence before it says what to see"
    notebook, title, *_ = drawing.DIAGRAMS[name]
    cell = nbformat.read(ROOT / f"nbs/{notebook}.ipynb", 4).cells[1]
    assert cell.cell_type == "markdown"
    assert re.search(rf"^[A-Z].+:\n\n!\[{re.escape(title)}\]\(\.\./pictures/{name}\.svg\)$", cell.source, re.M)


def test_the_notebooks_show_no_other_pictures():
    shown = {
        name
        for path in (ROOT / "nbs").rglob("*.ipynb")
        for name in re.findall(r"\(\.\./pictures/([^)]+)\)", path.read_text(encoding="utf-8"))
    }
    assert shown == {f"{name}.svg" for name in drawing.DIAGRAMS}


@each
def test_the_diagram_can_be_read(name):
    "It has a title and a description, no font below 12 pixels at its width of 700, and no text outside"
    text = drawing.render(name)
    root = ElementTree.fromstring(text)
    title, description = root.find(f"{SVG}title").text, root.find(f"{SVG}desc").text
    assert len(title) > 8 and len(description) > 60 and description.endswith(".")
    assert int(root.get("width")) <= 720 and len(text) < 40_000
    height = int(root.get("height"))
    for words in root.iter(f"{SVG}text"):
        assert float(words.get("font-size")) >= 12
        assert 0 <= float(words.get("x")) <= int(root.get("width")) and 8 <= float(words.get("y")) <= height - 4
    for box in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
        assert 0 <= x and 0 <= y and x + w <= int(root.get("width")) and y + h <= height


def luminance(color):
    "Return the relative luminance of a color such as #2b69b0 (WCAG)"
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


def test_colors_are_readable_on_light_and_dark_pages():
    for color in drawing.KINDS.values():
        assert contrast(color, "#ffffff") > 4.5, "the white text of a box"
    style = drawing.STYLE
    for fill, words in zip(
        re.findall(r"\.note rect { fill: (#\w+)", style), re.findall(r"\.note text { fill: (#\w+)", style)
    ):
        assert contrast(fill, words) > 7
    for line in set(re.findall(r"stroke: (#\w+)", style)):
        assert contrast(line, "#ffffff") > 3 and contrast(line, "#111111") > 3


# True of the code


@pytest.mark.parametrize("T, S, window", [(6, 6, 0), (6, 6, 3), (2, 6, 4)])
def test_the_causal_masks_are_those_of_the_code(T, S, window):
    assert layers.causal_rows(T, S, window) == causal_mask(T, S, window, "cpu").tolist()


@pytest.mark.parametrize("block", [1, 3])
def test_the_masks_of_diffusion_are_those_of_the_code(block):
    positions = torch.cat([torch.arange(6), torch.arange(1, 7)])
    assert layers.block_rows(6, block) == BlockAttention(6, positions, block, window=6)._noisy_mask(6).tolist()


def test_the_mask_across_streams_is_that_of_the_code():
    time, head = [0, 0, 1, 2, 3, 1, 2, 4, 5, 4], [0, 0, 0, 0, 0, 0, 0, 1, 1, 2]
    expected = attention_mask(torch.tensor(time), torch.tensor(head), 8)
    assert layers.stream_rows(time, head, 8) == expected.tolist()


def test_the_slots_of_the_kv_cache_are_those_of_the_code():
    cache, held = KVCache(4), []
    for position in range(6):
        cache(*torch.full((2, 1, 1, 1, 1), float(position)))
        held.append("".join(str(int(p)) for p in cache.k.flatten()))
    assert [f'"{slots}"' in (ROOT / "docs/diagrams_of_layers.py").read_text() for slots in held[3:]] == [True] * 3


def test_the_example_ids_and_rows_are_those_of_the_code():
    ids, chars = ByteTokenizer().encode("naïve"), CharTokenizer.train(["to be or not to be\n"], eot=False)
    shown = (ROOT / "docs/diagrams_of_data.py").read_text()
    starts = RandomBatches(np.arange(1000), 8, 8).start_positions(3)
    for numbers in (ids, chars.encode("to be"), starts):
        assert f"({', '.join(map(str, numbers.tolist()))})" in shown


@pytest.mark.parametrize(
    "arch, values",
    [
        ("rnn", dict(d_model=128, d_hidden=256, n_layers=1)),
        (
            "gpt",
            dict(norm="rms", pos="rope", act="relu2", tie=False, qk_norm=True, mix=True, zero_init=True, softcap=15),
        ),
        ("gpt2", dict(tie=True)),
        ("ssm", dict(kind="ssd", d_state=32, d_conv=4, gated_norm=True, mix=True, tie=False, softcap=15)),
        ("bytepatch", dict(patch_size=4, n_layers=4, window=256, thinking_steps=3, byte_layers=1, byte_window=64)),
        ("bytepatch", dict(ngrams=4, byte_path="local", mixer="attention")),
        ("diffusion", dict(objective="masked", block=0, softcap=15, sampler="ancestral")),
        ("nanothink", dict(d_model=384, head_dim=64, n_heads=6, kv_latent_dim=128, rope_dim=32, fusion="mixture")),
        ("nanothink", dict(entropy_reg=0.01, balance_loss=0.01, z_loss=0.001, attention_first=False)),
        ("streams", dict(inputs="internal_voice", outputs="internal_text")),
    ],
)
def test_the_numbers_in_the_diagrams_are_the_defaults(arch, values):
    defaults = vars(get_arch(arch).Config())
    assert {name: defaults[name] for name in values} == values


def test_the_numbers_of_lora_are_the_defaults():
    assert (LoRAConfig().rank, LoRAConfig().alpha) == (16, 0.0)
