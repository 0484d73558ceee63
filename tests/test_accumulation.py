"""Gradient accumulation and data-parallel ranks change a gradient by rounding only, with dropout and noise, in every architecture."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import lmnotes
from lmnotes.data.batches import IGNORE_INDEX, Batch
from lmnotes.nn.lora import LoRAConfig, add_lora
from lmnotes.training.trainer import TrainConfig, Trainer

SMALL = dict(d_model=16, n_layers=2, n_heads=2, dropout=0.3)
ARCHITECTURES = {
    "gpt": SMALL,
    "lora": SMALL,
    "gru": dict(arch="rnn", d_model=16, d_hidden=16, n_layers=2, dropout=0.3),
    "lstm": dict(arch="rnn", d_model=16, d_hidden=16, n_layers=2, cell="lstm", dropout=0.3),
    "scratch_gpt": SMALL,
    "gpt2": SMALL | dict(n_positions=16),
    "bytepatch": SMALL | dict(d_byte=16, ngram_rows=64, thinking_steps=2),
    "agiformer": SMALL | dict(arch="bytepatch", preset="agiformer"),
    "streams": SMALL,
    "ssm": dict(d_model=16, n_layers=2, head_dim=8, d_state=4, dropout=0.3),
    "nanothink_s6": dict(arch="ssm", preset="nanothink_s6", d_model=16, d_inner=32, n_layers=1, d_state=4),
    "nanothink": dict(
        transformer="gpt,d_model=16,n_layers=1,n_heads=2",
        diffuser="diffusion,block=1,d_model=16,n_layers=1,n_heads=2",
        **dict(d_model=16, n_heads=2, head_dim=8, kv_latent_dim=8, rope_dim=4, dropout=0.3, balance_loss=0.0),
    ),
    "diffusion": SMALL,
    "diffusion in blocks": SMALL | dict(arch="diffusion", block=4, causal_share=0.4),
    "diffusion of one id": SMALL | dict(arch="diffusion", block=1, objective="mse"),
}


class Uneven:
    "A batch of 8 sequences with 2 to 16 targets each"

    def __getitem__(self, step):
        ids = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(step))
        has_target = torch.arange(16) < 2 * torch.arange(1, 9)[:, None]
        return Batch(ids[:, :-1], torch.where(has_target, ids[:, 1:], IGNORE_INDEX))


def gradient(name, accum, world_size):
    "Return the gradient of one step, computed by `world_size` ranks one after another"
    config = dict(dict(arch=name.replace("lora", "gpt"), vocab_size=256, ctx_len=16), **ARCHITECTURES[name])
    torch.manual_seed(0)
    lm = lmnotes.new_lm(config.pop("arch"), **config)
    lm = add_lora(lm, LoRAConfig(rank=2, dropout=0.3)) or lm if name == "lora" else lm
    for i, p in enumerate(lm.parameters()):  # Layers that start at zero would hide the masks before them
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    for rank in range(world_size):
        trainer = Trainer(lm.train(), Uneven(), TrainConfig(accum=accum, dtype="float32"))
        trainer.rank, trainer.world_size, trainer.objective.no_sync = rank, world_size, nullcontext
        trainer._backward(trainer.batches[0])
    return torch.cat([p.grad.flatten() / world_size for p in lm.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_micro_batches_and_ranks_do_not_change_the_gradient(name):
    whole = gradient(name, 1, 1)
    for accum, world_size in ((2, 1), (8, 1), (1, 2), (2, 2)):
        difference = (gradient(name, accum, world_size) - whole).abs().max() / whole.abs().max()
        assert difference < 1e-5, (accum, world_size, float(difference))


@pytest.mark.parametrize("name", ["gpt", "diffusion"])
def test_a_mask_by_micro_batch_is_noticed(name, monkeypatch):
    "Mutant: dropout as in PyTorch, which depends on the micro-batch"
    for module in ("attention", "blocks", "denoising", "layers"):
        monkeypatch.setattr(f"lmnotes.nn.{module}.row_dropout", nn.functional.dropout)
    with pytest.raises(AssertionError):
        test_micro_batches_and_ranks_do_not_change_the_gradient(name)


def test_every_dropout_is_drawn_by_row():
    "No module of the package applies PyTorch's dropout, which depends on the micro-batch"
    root = Path(lmnotes.__file__).parent
    found = [path.name for path in root.rglob("*.py") if re.search(r"F\.dropout\(", path.read_text("utf-8"))]
    assert found == ["row_random.py"]
