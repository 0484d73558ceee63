"""Weights of the systems that the guides describe load, and compute the logits of the original models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmnotes.core import CheckpointError
from lmnotes.nn.lm import new_lm
from lmnotes.training.weights import load_initial_weights

D, H, T, V = 16, 2, 12, 30
FLOAT = dict(dtype=torch.float64)


def random_tensors(shapes):
    "Return {name: random tensor} of {name: shape}"
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, **FLOAT) / 3 for name, shape in shapes.items()}


def logits_of_ours(tmp_path, content, arch, preset="", **config):
    "Return the ids and our logits, in float64, with the weights of a file of another program"
    torch.save(content, tmp_path / "weights.pt")
    lm = new_lm(arch, preset, vocab_size=V, ctx_len=T, **config).double().eval()
    x = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, load_initial_weights(lm, tmp_path / "weights.pt")(x)


def attend(q, k, v, scale):  # Each (B,T,D/H)
    "Causal attention of one head"
    scores = (q @ k.mT * scale).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v


def test_tisslm(tmp_path):
    rnn = nn.GRU(D, 2 * D, batch_first=True, **FLOAT)
    tensors = random_tensors({"embed.weight": (V, D), "fc.weight": (V, 2 * D), "fc.bias": (V,)})
    tensors |= {f"rnn.{name}": t for name, t in rnn.state_dict().items()}
    x, ours = logits_of_ours(tmp_path, tensors, "rnn", d_model=D, d_hidden=2 * D)
    expected = rnn(tensors["embed.weight"][x])[0] @ tensors["fc.weight"].T + tensors["fc.bias"]
    torch.testing.assert_close(ours, expected.detach())


def training_py(**more):
    "Return the state dict of the GPT of training.py, with one block"
    norms = {
        f"{name}.{part}": (D,) for name in ("blocks.0.ln1", "blocks.0.ln2", "blocks.1") for part in ("weight", "bias")
    }
    heads = {
        f"blocks.0.sa.heads.{h}.{part}.weight": (D // H, D) for h in range(H) for part in ("key", "query", "value")
    }
    masks = {f"blocks.0.sa.heads.{h}.tril": (T, T) for h in range(H)}
    rest = {"token_embedding_table.weight": (V, D), "position_embedding_table.weight": (T, D), "lm_head.weight": (V, D)}
    layers = {"blocks.0.sa.proj": (D, D), "blocks.0.ffwd.net.0": (4 * D, D), "blocks.0.ffwd.net.2": (D, 4 * D)}
    layers = {f"{name}.weight": shape for name, shape in layers.items()} | {
        f"{n}.bias": s[:1] for n, s in layers.items()
    }
    return random_tensors(norms | heads | masks | rest | layers | {"lm_head.bias": (V,)} | more)


def test_training_py(tmp_path):
    w = training_py()
    content = dict(step=3, model_state_dict=w, optimizer_state_dict={}, hyperparameters={})
    x, ours = logits_of_ours(tmp_path, content, "scratch_gpt", d_model=D, n_layers=1, n_heads=H)

    def linear(h, name):
        return F.linear(h, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(h, name):
        return F.layer_norm(h, (D,), w[f"{name}.weight"], w[f"{name}.bias"])

    h = w["token_embedding_table.weight"][x] + w["position_embedding_table.weight"]
    y, names = norm(h, "blocks.0.ln1"), ("query", "key", "value")
    heads = [attend(*(linear(y, f"blocks.0.sa.heads.{i}.{name}") for name in names), scale=D**-0.5) for i in range(H)]
    h = h + linear(torch.cat(heads, -1), "blocks.0.sa.proj")
    h = h + linear(linear(norm(h, "blocks.0.ln2"), "blocks.0.ffwd.net.0").relu(), "blocks.0.ffwd.net.2")
    torch.testing.assert_close(ours, linear(norm(h, "blocks.1"), "lm_head"))


def test_adapters_of_training_py_are_rejected(tmp_path):
    w = training_py(**{"lm_head.lora_A": (D, 2)})
    with pytest.raises(CheckpointError, match="weights.pt: holds LoRA adapters, but not their scale"):
        logits_of_ours(tmp_path, w, "scratch_gpt", d_model=D, n_layers=1, n_heads=H)


def rms_norm(h, gain):
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * gain


def transformer_expert():
    layer = {f"w{part}.weight": (D, D) for part in "qkvo"} | {"attn_norm.weight": (D,), "ffn_norm.weight": (D,)}
    layer |= {"ffn.w_gate.weight": (4 * D, D), "ffn.w_up.weight": (4 * D, D), "ffn.w_down.weight": (D, 4 * D)}
    shapes = {f"expert.layers.0.{name}": shape for name, shape in layer.items()}
    return random_tensors(shapes | {"expert.norm.weight": (D,), "embedding.weight": (V, D)})


GPT = dict(d_model=D, n_layers=1, n_heads=H, d_ff=6 * D)


def test_transformer_expert_of_nanothink(tmp_path):
    w = transformer_expert()
    w["lm_head.weight"] = w["embedding.weight"]
    x, ours = logits_of_ours(tmp_path, dict(model=w, step=1, epoch=0), "gpt", "nanothink", **GPT)
    layer, width = {n.removeprefix("expert.layers.0."): t for n, t in w.items()}, D // H
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, width, 2, **FLOAT) / width)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(head):
        pairs = torch.view_as_complex(head.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    h = w["embedding.weight"][x]
    q, k, v = ((rms_norm(h, layer["attn_norm.weight"]) @ layer[f"w{part}.weight"].T).split(width, -1) for part in "qkv")
    heads = [attend(rotate(a), rotate(b), c, width**-0.5) for a, b, c in zip(q, k, v)]
    h = h + torch.cat(heads, -1) @ layer["wo.weight"].T
    y = rms_norm(h, layer["ffn_norm.weight"])
    y = F.silu(y @ layer["ffn.w_gate.weight"].T) * (y @ layer["ffn.w_up.weight"].T)
    h = rms_norm(h + y @ layer["ffn.w_down.weight"].T, w["expert.norm.weight"])
    torch.testing.assert_close(ours, h @ w["embedding.weight"].T, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_a_different_style_is_rejected(tmp_path):
    "Values that leave no trace in a state dict, such as the base of the rotary wavelengths, are compared"
    message = "weights.pt: NanoThink's weights need rope_base=10000.0. Pass preset='nanothink' and model_args='rope_base=10000.0'"
    with pytest.raises(CheckpointError, match=message):
        logits_of_ours(tmp_path, transformer_expert(), "gpt", "nanothink", **GPT, rope_base=500.0)


def test_a_missing_tensor_is_named(tmp_path):
    w = transformer_expert()
    del w["expert.layers.0.wk.weight"]
    with pytest.raises(CheckpointError, match="weights.pt: tensor 'expert.layers.0.wk.weight' is missing"):
        logits_of_ours(tmp_path, w, "gpt", "nanothink", **GPT)


def state_space_expert():
    layer = {"norm.weight": (D,), "in_proj.weight": (4 * D, D), "conv1d.weight": (2 * D, 1, 4), "conv1d.bias": (2 * D,)}
    layer |= {"x_proj.weight": (2 * 3 + 1, 2 * D), "dt_proj.weight": (2 * D, 1), "dt_proj.bias": (2 * D,)}
    layer |= {"A_log": (2 * D, 3), "D": (2 * D,), "out_proj.weight": (D, 2 * D)}
    shapes = {f"expert.layers.0.{name}": shape for name, shape in layer.items()}
    return random_tensors(shapes | {"expert.norm.weight": (D,), "embedding.weight": (V, D)})


SSM = dict(d_model=D, n_layers=1, d_inner=2 * D, d_state=3)


def test_state_space_expert_of_nanothink(tmp_path):
    w = state_space_expert()
    with pytest.raises(CheckpointError, match="need norm_embed=False. Pass preset='nanothink_s6'"):
        logits_of_ours(tmp_path, w, "ssm", "nanothink_s6", **SSM)
    x, ours = logits_of_ours(tmp_path, w, "ssm", "nanothink_s6", **SSM, norm_embed=False)
    layer = {n.removeprefix("expert.layers.0."): t for n, t in w.items()}
    h = w["embedding.weight"][x]
    u, z = (rms_norm(h, layer["norm.weight"]) @ layer["in_proj.weight"].T).chunk(2, -1)
    u = F.conv1d(u.mT, layer["conv1d.weight"], layer["conv1d.bias"], padding=3, groups=2 * D)[..., :T].mT
    u = F.silu(u)
    B, C, dt = (u @ layer["x_proj.weight"].T).split((3, 3, 1), -1)
    dt = F.softplus(F.linear(dt, layer["dt_proj.weight"], layer["dt_proj.bias"]))
    state, outputs = torch.zeros(2, 2 * D, 3, **FLOAT), []
    for t in range(T):
        decay = (-layer["A_log"].exp() * dt[:, t, :, None]).exp()
        state = decay * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = (torch.stack(outputs, 1) + u * layer["D"]) * F.silu(z)
    h = rms_norm(h + y @ layer["out_proj.weight"].T, w["expert.norm.weight"])
    torch.testing.assert_close(ours, h @ w["embedding.weight"].T, atol=1e-5, rtol=1e-5, check_dtype=False)


# The logit of byte 65 after each of 20 bytes, of AGIFORMER's own classes (commit f82263e) with the weights of `waves`
AGIFORMER_LOGITS = """
0.171982 -0.433783 0.185247 0.470502 0.171987 -0.042280 0.174206 1.018520 0.171745 0.006443
0.623970 0.151453 0.171377 0.406771 0.425900 0.594268 0.171235 -0.043662 -0.416445 -0.186919"""


def waves(shapes):
    "Return {name: tensor of values that are the same on every CPU} of {name: shape}"
    sizes = {name: torch.Size(shape).numel() for name, shape in sorted(shapes.items())}
    values = {name: (1.7 * torch.arange(n, **FLOAT) + i).sin() / 3 for i, (name, n) in enumerate(sizes.items())}
    return {name: values[name].view(shape) for name, shape in shapes.items()}


def test_agiformer(tmp_path):
    "All tensors of AGIFORMER's state dict have a place, and give the logits of its own classes"
    layer = dict.fromkeys(("attn.qkv", "ssm.qkv"), (3 * D, D))
    layer |= dict.fromkeys(("attn.proj", "ssm.out_proj", "out_proj"), (D, D))
    layer |= {"mlp.0": (4 * D, D), "mlp.2": (D, 4 * D), "ssm.norm": (D,), "norm1": (D,), "norm_mlp": (D,)}
    parts = {f"layers.0.{name}": shape for name, shape in layer.items()}
    parts |= {"encoder.norm": (D,), "norm_f": (D,), "reasoning.norm": (D,), "reasoning.gate": (D, D)}
    parts |= {"reasoning.think_mlp.0": (4 * D, D), "reasoning.think_mlp.2": (D, 4 * D), "head.proj_latent": (256, D)}
    parts |= {"encoder.patch_conv": (D, D, 4), "head.head": (256, 256)}
    shapes = {f"{name}.weight": shape for name, shape in parts.items()} | {f"{n}.bias": s[:1] for n, s in parts.items()}
    shapes |= {"encoder.byte_embedding.weight": (256, D), "head.byte_emb.weight": (256, 256)}
    gru = nn.GRU(512, 256, batch_first=True)
    shapes |= {f"head.rnn.{name}": tuple(t.shape) for name, t in gru.state_dict().items()}
    torch.save(waves(shapes | {"encoder.inv_freq": (D // 2,)}), tmp_path / "best_model.pth")
    sizes = dict(d_model=D, n_layers=1, n_heads=H, window=3, thinking_steps=2)
    lm = new_lm("bytepatch", "agiformer", vocab_size=256, ctx_len=24, **sizes).double().eval()
    with torch.no_grad():
        ours = load_initial_weights(lm, tmp_path / "best_model.pth")((37 * torch.arange(23) % 251)[None])
    expected = torch.tensor([float(word) for word in AGIFORMER_LOGITS.split()], **FLOAT)
    torch.testing.assert_close(ours[0, 3:, 65], expected, atol=1e-5, rtol=0)


def test_an_untied_head_and_another_width_are_rejected(tmp_path):
    w = transformer_expert()
    head = {"lm_head.weight": w["embedding.weight"] + 1}
    with pytest.raises(CheckpointError, match="lm_head.weight and embedding.weight differ, but are tied in this model"):
        logits_of_ours(tmp_path, w | head, "gpt", "nanothink", **GPT)
    with pytest.raises(CheckpointError, match="weights.pt: tensor shapes do not match this model"):
        logits_of_ours(tmp_path, w, "gpt", "nanothink", **GPT | dict(d_model=18, n_heads=3))


def test_two_names_for_one_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="two tensors have the name head.bias after conversion"):
        logits_of_ours(tmp_path, random_tensors({"fc.bias": (V,), "head.bias": (V,)}), "rnn")


def test_gpt2_in_a_wrapper(tmp_path):
    lm = new_lm("gpt2", vocab_size=V, ctx_len=T, d_model=D, n_layers=1, n_heads=H)
    mask = {"model.transformer.h.0.attn.bias": torch.ones(1, 1, T, T)}  # Of older versions of transformers
    torch.save(
        dict(model_state_dict={f"model.{n}": t for n, t in lm.state_dict().items()} | mask), tmp_path / "gpt2.pt"
    )
    other = new_lm("gpt2", vocab_size=V, ctx_len=T, d_model=D, n_layers=1, n_heads=H)
    loaded = load_initial_weights(other, tmp_path / "gpt2.pt").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in lm.state_dict().items())


def test_the_diffuser_of_nanothink_has_no_counterpart(tmp_path):
    with pytest.raises(CheckpointError, match="weights.pt: NanoThink's diffuser predicts noise on hidden states"):
        logits_of_ours(tmp_path, random_tensors({"diffuser.norm.weight": (D,)}), "diffusion", d_model=D, n_heads=H)
