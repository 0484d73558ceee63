"""Generation of 192 tokens, greedily: lmnotes and transformers, both with a KV cache, on a model of 10.7 M parameters in the same shape.

The peer is transformers' GPT-2, whose blocks have the same matrices. Batches of one and of 16 texts, also with prompts of 1 to 31 ids. lmnotes also generates with int8 weights. With
`--large`, the models have the shapes of GPT-2 (124 M parameters) and of a Llama with 135 M parameters. The same model without its cache shows that the
cache changes no token, and the loss of a trained model shows what int8 weights cost.
"""

from common import load_corpus, timing_columns, report, interleave, min_cpu, parse_options, build_parts, ratio  # isort: skip
from copy import deepcopy

import torch

from lmnotes.inference.evaluation import evaluate
from lmnotes.inference.generation import generate_ids
from lmnotes.inference.quantization import quantize
from lmnotes.nn.lm import new_lm
from lmnotes.training.trainer import Trainer

MIXED = "16 prompts of different lengths"


def fill_zero_weights(lm):
    "Replace zero-initialized weights by random ones, because otherwise the model repeats one letter"
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim == 2 and not p.any():
                p.normal_(std=p.shape[1] ** -0.5)


def uncached(lm, prompt, n):
    "Return `n` greedily decoded ids after `prompt`, recomputing everything for each"
    x = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            x = torch.cat([x, lm(x[:, -lm.cfg.ctx_len :])[:, -1].argmax(-1, keepdim=True)], 1)
    return x[0, len(prompt) :].tolist()


def of_transformers(model, prompts, n):
    "Generate with a model of transformers, with padding on the left"
    longest = max(len(prompt) for prompt in prompts)
    x = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = dict(max_new_tokens=n, do_sample=False, use_cache=True, pad_token_id=0)
    with torch.inference_mode():
        return model.eval().generate(x, attention_mask=real, **options)


def gpt2_peer(vocab_size, ctx_len, n_layers, n_heads, d_model):
    from transformers import GPT2Config, GPT2LMHeadModel

    no_end = dict(bos_token_id=None, eos_token_id=None)
    shape = dict(n_positions=ctx_len, n_layer=n_layers, n_head=n_heads, n_embd=d_model)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape, **no_end))


def llama_peer():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(num_hidden_layers=30, num_attention_heads=9, hidden_size=576, intermediate_size=1536)
    no_end = dict(bos_token_id=None, eos_token_id=None, tie_word_embeddings=True)
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, max_position_embeddings=256, **shape, **no_end))


def large_models():
    "Return {name: (model of lmnotes, model of transformers in the same shape)}"
    gpt2 = new_lm("gpt2", ctx_len=256, n_positions=256)
    llama = dict(d_model=576, n_layers=30, n_heads=9, d_ff=2304, act="swiglu", norm="rms_gain", tie=True, mix=False)
    llama = new_lm("gpt", vocab_size=49152, ctx_len=256, qk_norm=False, zero_init=False, softcap=0.0, **llama)
    return {"124 M": (gpt2, gpt2_peer(50257, 256, 12, 12, 768)), "135 M": (llama, llama_peer())}


def cost_of_int8(quick):
    "Return the bits per byte that int8 weights cost a model that was trained for a while"
    cfg, data = load_corpus(
        quick, ctx_len=64, batch_size=12, steps=10 if quick else 300, preset="tiny", dtype="float32"
    )
    lm, batches, val = build_parts(cfg, data)
    Trainer(lm, batches, cfg).fit()
    before, after = (evaluate(m, val.subset(2 if quick else 0))["loss"] for m in (lm, quantize(deepcopy(lm))))
    return (after - before) / 0.6931


def main():
    args = parse_options(__doc__, rounds=(5, "timed texts of each"), large=(0, "1: also 124 M and 135 M parameters"))
    rounds = 1 if args.quick else args.rounds
    n, shape = (12, (2, 2, 64)) if args.quick else (192, (6, 6, 384))
    cfg, data = load_corpus(args.quick, ctx_len=256)
    lm, _, _ = build_parts(cfg, data, **dict(zip(("n_layers", "n_heads", "d_model"), shape)))
    fill_zero_weights(lm.eval())
    prompt, small = data.tokens["train"].ids[:16].tolist(), quantize(deepcopy(lm))
    peer = gpt2_peer(data.tokenizer.vocab_size, 256, *shape)
    ways = {}
    mixed = [data.tokens["train"].ids[: 2 * i + 1].tolist() for i in range(16)]
    for texts, prompts in {1: [prompt], 16: [prompt] * 16, MIXED: mixed}.items():
        ways["transformers", texts] = lambda prompts=prompts: of_transformers(peer, prompts, n)
        for name, model in dict(lmnotes=lm, int8=small).items():
            ways[name, texts] = lambda model=model, prompts=prompts: generate_ids(model, prompts, n, temperature=0)
    for name, (ours, theirs) in large_models().items() if args.large else ():
        fill_zero_weights(ours.eval())
        ways["transformers", name] = lambda model=theirs: of_transformers(model, [prompt], n)
        ways["lmnotes", name] = lambda model=ours: generate_ids(model, [prompt], n, temperature=0)
        quarter = quantize(deepcopy(ours))
        ways["int8", name] = lambda model=quarter: generate_ids(model, [prompt], n, temperature=0)
    same = ways["lmnotes", 1]()[0] == uncached(lm, prompt, n)
    clocks = interleave(ways, rounds, warmup=0)
    rows = [
        {
            "program": name,
            "texts": texts,
            **timing_columns(of, "s"),
            "tok/CPU s": n * (16 if texts in (16, MIXED) else 1) / min_cpu(of),
        }
        for (name, texts), of in clocks.items()
    ]
    bars = {("lmnotes", 1): 1.5, ("int8", 1): 1.8, ("lmnotes", 16): 1.5, ("int8", 16): None, ("lmnotes", MIXED): 1.5}
    bars |= {("lmnotes", "124 M"): 1.2, ("lmnotes", "135 M"): 1.2} if args.large else {}
    goals = []
    for (name, texts), bar in bars.items():
        what = {1: "one text", 16: "16 texts", MIXED: MIXED}.get(texts, f"one text, {texts}")
        value = ratio(clocks, ("transformers", texts), (name, texts))
        goal = f"{what}{', int8 weights' if name == 'int8' else ''}: times the speed of transformers"
        goals.append((goal + (f" (goal {bar})" if bar else ""), value, None if bar is None else value >= bar))
    cost = cost_of_int8(args.quick)
    goals.append(("int8 weights cost at most 0.01 bits per character", f"{cost:+.4f}", cost <= 0.01))
    goals.append(("the same tokens with the cache and without", "the same" if same else "different", same))
    report(args, rows, goals)


if __name__ == "__main__":
    main()
