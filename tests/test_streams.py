"""`models/38_streams`: other streams train beside the text and leak nothing, and no loss holds all logits."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import read_log, run_in_process
from torch.utils._python_dispatch import TorchDispatchMode

from lmnotes.data.batches import Batch
from lmnotes.models import streams
from lmnotes.nn import layers
from lmnotes.nn.lm import new_lm
from lmnotes.nn.lora import LoRAConfig, add_lora, merge_and_unload
from lmnotes.runs.run import run
from lmnotes.training.checkpoint import save_checkpoint
from lmnotes.training.trainer import TrainConfig, Trainer
from lmnotes.training.weights import freeze, load_initial_weights

TINY = dict(vocab_size=16, ctx_len=8, d_model=64, n_layers=2, n_heads=2)
ALL = dict(inputs=" ".join(streams.INPUTS), outputs=" ".join(streams.OUTPUTS))
POSES = F.normalize(torch.randn(8, 24, 4, generator=torch.Generator().manual_seed(5)), dim=-1)
BEGIN = 15  # The id at the start of a text


def touch_of(surfaces):
    "Return touch inputs for a number of contacts"
    n, contacts = surfaces.shape
    zeros = torch.zeros(n, contacts, 1)
    ids = dict(touch_active=torch.ones_like(surfaces).bool(), touch_points=surfaces * 0, touch_surfaces=surfaces)
    return ids | dict(touch_forces=zeros, touch_positions=zeros.expand(-1, -1, 3))


class Felt:
    "Batches of eight contacts and a text of their surfaces. Half of it follows from its other half. The first contact sets a pose"

    def __getitem__(self, step):
        g = torch.Generator().manual_seed(step)
        surfaces = torch.randint(8, (32, 8), generator=g)
        surfaces[:, 1::2] = (surfaces[:, ::2] + 3) % 8
        x = F.pad(surfaces[:, :-1], (1, 0), value=BEGIN)
        pose = POSES[surfaces[:, :1]]
        return Batch(x, surfaces, touch_of(surfaces) | dict(target_animation_body=pose))


class TextOf:
    "Batches reduced to their text"

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, step):
        return self.batches[step]._replace(extras={})


def train(lm, batches, steps):
    settings = dict(optimizer="adamw", lr=3e-3, schedule="constant", dtype="float32")
    return Trainer(lm, batches, TrainConfig(steps=steps, **settings)).fit()


@torch.no_grad()
def losses(lm, batches):
    return {name: float(value) for name, value in lm.eval().loss(batches[10**6]).items() if name.startswith("loss_")}


def test_streams_in_two_stages(tmp_path):
    "Train on text, then add touch and a movement with the trained part frozen. The touch input lowers the text loss"
    torch.manual_seed(0)
    first = new_lm("streams", **TINY)
    train(first, TextOf(Felt()), 150)
    alone = losses(first, TextOf(Felt()))["loss_internal_text"]
    assert math.log(8) / 2 - 0.02 < alone < math.log(8) / 2 + 0.1  # Only every second word follows from the text
    folder = save_checkpoint(tmp_path, first, 150)

    both = dict(
        inputs="internal_voice touch", outputs="internal_text animation", loss_weights="internal_text=1 animation=0.6"
    )
    lm = load_initial_weights(new_lm("streams", **TINY, **both), folder)
    assert losses(lm, TextOf(Felt()))["loss_internal_text"] == pytest.approx(alone, abs=1e-5)

    held = {name: p.clone() for name, p in lm.named_parameters() if name.startswith(("embed", "heads.internal_text"))}
    freeze(lm, "embed.* heads.internal_text_head.*")
    before = losses(lm, Felt())
    train(lm, Felt(), 200)
    after = losses(lm, Felt())
    assert all(torch.equal(lm.get_parameter(name), p) for name, p in held.items())
    assert after["loss_internal_text"] < 0.1 < alone
    assert after["loss_animation"] < 0.1 < before["loss_animation"]


def test_a_weight_of_zero_is_used():
    "A head whose weight is zero is not evaluated, and gets no gradient"
    lm = new_lm(
        "streams",
        **TINY,
        inputs="internal_voice touch",
        outputs="internal_text animation",
        loss_weights="internal_text=1 animation=0",
    )
    out = lm.loss(Felt()[0])
    out["loss"].backward()
    assert "loss_animation" not in out
    assert all(p.grad is None for name, p in lm.named_parameters() if name.startswith("heads.animation"))
    lm = new_lm(
        "streams", **TINY, inputs="internal_voice touch", outputs="internal_text animation", loss_weights="animation=1"
    )
    out = lm.loss(Felt()[0])
    out["loss"].backward()
    assert out["loss"].item() == out["loss_animation"].item() and lm.heads["internal_text_head"].weight.grad is None


def noise(step):
    "Return a batch of uniformly random targets (two texts, sound) and unrelated random inputs"
    g = torch.Generator().manual_seed(step)
    w, e = torch.randint(16, (16, 9), generator=g), torch.randint(16, (16, 7), generator=g)
    more = touch_of(torch.randint(8, (16, 3), generator=g))
    more |= dict(
        proprioception_positions=torch.randn(16, 2, 24, 3, generator=g),
        audio_waveform=torch.randn(16, 640, generator=g),
    )
    more["proprioception_rotations"] = torch.randn(16, 2, 24, 4, generator=g)
    more |= dict(external_voice_tokens=e[:, :-1], target_external_text=e[:, 1:])
    more["target_audio"] = torch.randint(1024, (16, 4), generator=g)
    return Batch(w[:, :-1], w[:, 1:], more)


def test_nothing_is_learned_from_noise():
    "The text-only guide's system reached 0.17 nats on 15 random symbols, because each position saw the next one"

    class Noise:
        def __getitem__(self, step):
            return noise(step)

    torch.manual_seed(0)
    lm = new_lm("streams", **TINY, **ALL)
    train(lm, Noise(), 100)
    found = losses(lm, Noise())
    assert found["loss_internal_text"] > 0.97 * math.log(16)
    assert found["loss_external_text"] > 0.97 * math.log(16)
    assert found["loss_audio"] > 0.97 * math.log(1024)


def test_a_row_without_contact_is_no_nan():
    "In the text-only guide's system, a sample without contact made all its positions NaN"
    torch.manual_seed(0)
    lm = new_lm("streams", **TINY, inputs="internal_voice touch", outputs="internal_text animation")
    batch = Felt()[0]
    batch.extras["touch_active"][0] = False
    out = lm.loss(batch)
    out["loss"].backward()
    assert out["loss"].isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in lm.parameters())


class Peak(TorchDispatchMode):
    "Mode that records the size of the largest tensor that any operation returns"

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("rows", [64, 256])
def test_loss_never_holds_all_logits(monkeypatch, rows):
    "No tensor in the loss has the size of positions x vocabulary"
    monkeypatch.setattr(layers, "LOGITS_PER_CHUNK", 16 * 1000)
    lm = new_lm("streams", **TINY | dict(vocab_size=1000, ctx_len=8))
    x = torch.randint(1000, (rows, 8))
    with Peak() as peak:
        lm.loss(Batch(x, x.roll(-1, 1)))["loss"].backward()
    assert peak.largest <= max(64 * 1000, rows * 8 * 64 * 4) < rows * 8 * 1000


def text_run(**params):
    model = "d_model=16 n_layers=1 n_heads=2"
    common = dict(
        arch="streams",
        tokenizer="bytes",
        ctx_len=16,
        batch_size=4,
        steps=4,
        device="cpu",
        dtype="float32",
        out_dir="runs",
    )
    return dict(done=0)[run(model_args=" ".join([model, *params.pop("more", [])]), **common | params).status]


def test_stages_as_runs(workdir):
    "Two stages work as runs with init_from, freeze and loss_weights"
    assert run_in_process(workdir, text_run, data="corpus", run="text") == 0, read_log(workdir)
    second = [
        "inputs=internal_voice,touch",
        "outputs=internal_text,animation",
        "loss_weights=internal_text=1,animation=0.5",
    ]
    params = dict(data="corpus", run="touch", init_from="text", freeze="embed.*", more=second)
    assert run_in_process(workdir, text_run, **params) == 0, read_log(workdir)
    assert re.search("newly initialized: .*encoders.touch", read_log(workdir))


@pytest.mark.parametrize("null", ["null_token", "zeros"])
def test_every_parameter_gets_a_gradient_from_placeholders(null):
    "Every parameter gets a gradient, so data-parallel training need not search for unused ones"
    lm = new_lm("streams", **TINY, inputs=ALL["inputs"], null=null)
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randint(16, (2, 8))
    lm.loss(Batch(x, x.roll(-1, 1)))["loss"].backward()
    assert [name for name, p in lm.named_parameters() if p.grad is None] == []


def test_adapters_train_the_text_heads():
    "Adapters of the head train too, although the loss uses its matrix without calling the layer"
    torch.manual_seed(0)
    lm = new_lm("streams", **TINY, inputs="internal_voice external_voice", outputs="internal_text external_text")
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.1)
    add_lora(lm, LoRAConfig(rank=2, targets="*text_head qkv"))
    for name, p in lm.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p)
    batch = noise(0)
    batch = batch._replace(extras={name: t for name, t in batch.extras.items() if "external" in name})
    loss = lm.loss(batch)["loss"]
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in lm.parameters() if p.requires_grad)
    plain = merge_and_unload(lm)
    assert torch.allclose(plain.loss(batch)["loss"], loss, atol=1e-4)
    assert torch.allclose(plain(batch.x), lm(batch.x), atol=1e-4)


def test_bfloat16_weights():
    "A model with bfloat16 weights reads its inputs and generates"
    lm = new_lm("streams", **TINY, inputs=ALL["inputs"]).bfloat16().eval()
    g = torch.Generator().manual_seed(0)
    felt = touch_of(torch.randint(8, (2, 3), generator=g)) | dict(audio_waveform=torch.randn(2, 640, generator=g))
    new = torch.cat(list(lm.generate(torch.full((2, 1), BEGIN), 12, lambda logits: logits.argmax(-1), **felt)), 1)
    assert new.shape == (2, 12)
