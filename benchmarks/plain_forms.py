"""Fast forms of latent attention, of a mixture's loss and of diffusion, as multiples of the speed of the plain forms that the notebooks teach.

The plain forms: latent attention that expands the latents of all cached positions for each new one (`nbs/nn/27_mixture`), a mixture's
loss from mixed log-probabilities over the whole vocabulary (the same notebook), masked diffusion with a network call in each step
(`nbs/nn/28_denoising`), and generation in blocks without a cache (`nbs/models/36_diffusion`). The notebooks test that both forms give the
same results. Weights are random. Attention and loss have NanoThink's shapes: six heads of 64, a latent of 128, width 384, three frozen
experts, GPT-2's vocabulary.
"""

from common import interleave, parse_options, ratio, report, timing_columns  # isort: skip
import torch
import torch.nn.functional as F

from lmnotes.core import pick_dtype
from lmnotes.inference.generation import TokenSampler, generate_ids
from lmnotes.models.diffusion import row_generators
from lmnotes.models.nanothink import NanoThinkConfig
from lmnotes.nn.attention import KVCache
from lmnotes.nn.denoising import unmask, unmasked_per_step
from lmnotes.nn.lm import new_lm
from lmnotes.nn.mixture import Experts, LatentAttention, MixtureFusion, new_expert

GOAL = 1.5


class ExpandedAttention(LatentAttention):
    "Latent attention that decodes in the plain form"

    attend_absorbed = LatentAttention.attend_expanded


def decode(layer_class, rows, n_positions):
    "Return a function that decodes ten positions with a full cache of `n_positions`"
    torch.manual_seed(0)
    layer, cache = layer_class(NanoThinkConfig(ctx_len=n_positions)).eval(), KVCache(n_positions)
    x = torch.randn(rows, n_positions, layer.c.d_model)
    with torch.inference_mode():
        layer(x, 0, cache)

    @torch.inference_mode()
    def decode_ten():
        for _ in range(10):
            layer(x[:, -1:], cache.n_seen, cache)

    return decode_ten


def mixture_loss(is_plain, vocab_size, T, dtype):
    "Return a function that computes the loss of a mixture from the states of its frozen experts, with gradients"
    torch.manual_seed(0)
    spec, names = "gpt,d_model=384,n_layers=1,n_heads=6", ("transformer", "state_space", "diffuser")
    experts = Experts({name: new_expert(spec, vocab_size, T) for name in names}).requires_grad_(False)
    states, y = {name: torch.randn(1, T, 384) for name in names}, torch.randint(vocab_size, (1, T))
    router, fusion = torch.randn(1, T, 3, requires_grad=True), MixtureFusion()

    def loss():
        if is_plain:
            return F.cross_entropy(fusion(router, states, experts).flatten(0, 1), y.flatten())
        return -(router.log_softmax(-1) + experts.log_probs(states, y)).logsumexp(-1).mean()

    def loss_and_gradients():
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            total = loss()
        total.backward()

    return loss_and_gradients


def unmask_plain(x, holes, hidden_states, logits, sample_fn, steps, generators):
    "Fill the holes in random order, with a network call in each step"
    rows, order = torch.arange(len(x))[:, None], [torch.rand(holes.shape[1], generator=g) for g in generators]
    holes = holes.gather(1, torch.stack(order).argsort(1))
    for n in unmasked_per_step(holes.shape[1], steps):
        z, now, holes = logits(hidden_states(x)), holes[:, :n], holes[:, n:]
        if n:
            x[rows, now] = sample_fn(z[rows, now])


def fill_window(fill, lm, steps):
    "Return a function that fills eight windows but for their first id"

    @torch.inference_mode()
    def filled():
        x = torch.full((8, lm.cfg.ctx_len + 1), lm.cfg.vocab_size)
        x[:, 0] = torch.arange(8)
        holes, sampler = torch.arange(1, x.shape[1]).expand(8, -1), TokenSampler(seed=1).reset(x[:, :1])
        generators = row_generators(sampler, 8)
        fill(x, holes, lambda x: lm.hidden_states(lm.embed_ids(x)), lm.logits, sampler, steps, generators)
        return x.tolist()

    return filled


@torch.inference_mode()
def blocks_plain(lm, prompts, n):
    "Generate `n` ids block by block, without a cache"
    x, block = torch.tensor(prompts), lm.cfg.block
    sampler = TokenSampler(seed=1).reset(x)
    generators, holes = row_generators(sampler, len(x)), torch.arange(block).expand(len(x), -1)
    for _ in range(0, n, block):
        at, clean, new = x.shape[1] + holes[0], lm.embed_ids(x), torch.full(holes.shape, lm.cfg.vocab_size)

        def hidden_states(new, clean=clean, at=at):
            return lm._block_states(clean, lm.embed_ids(new), at, block)

        unmask(new, holes, hidden_states, lm.logits, sampler, lm.cfg.sample_steps * block // lm.cfg.ctx_len, generators)
        x = torch.cat([x, new], 1)
    return x[:, len(prompts[0]) :].tolist()


def build_diffusion(**config):
    "Return a small masked diffusion model with random weights"
    torch.manual_seed(0)
    lm = new_lm("diffusion", "tiny", vocab_size=65, **config).eval()
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return lm


def main():
    args = parse_options(__doc__, rounds=(7, "timed calls of each form"))
    sizes = [(1, 32)] if args.quick else [(1, 256), (1, 1024), (16, 256), (16, 1024)]
    vocab_size, T, steps, n = (256, 16, 80, 16) if args.quick else (50257, 256, 256, 64)
    pairs = {  # {case: (plain form, fast form)}
        f"latent attention, {'one text' if rows == 1 else f'{rows} texts'}, {S:,} cached positions: absorbed decode": (
            decode(ExpandedAttention, rows, S),
            decode(LatentAttention, rows, S),
        )
        for rows, S in sizes
    }
    for dtype in dict.fromkeys([torch.float32, getattr(torch, pick_dtype("cpu")[0])]):
        case = f"mixture, {T} x {vocab_size:,} logits in {str(dtype)[6:]}: loss from the targets' probabilities"
        pairs[case] = tuple(mixture_loss(is_plain, vocab_size, T, dtype) for is_plain in (True, False))
    lm = build_diffusion(ctx_len=64)
    case = f"diffusion, 64 ids in {steps} steps: network calls only for new ids"
    pairs[case] = fill_window(unmask_plain, lm, steps), fill_window(unmask, lm, steps)
    blocks = build_diffusion(ctx_len=256, block=8, sample_steps=128)
    prompts = [[i] * 128 for i in range(4)]
    pairs[f"diffusion, {n} ids in blocks of 8 after 128: KV cache"] = (
        lambda: blocks_plain(blocks, prompts, n),
        lambda: generate_ids(blocks, prompts, n, temperature=1.0, seed=1),
    )
    rows, goals = [], []
    for case, (plain, fast) in pairs.items():
        clocks = interleave({"plain": plain, "fast": fast}, 1 if args.quick else args.rounds)
        rows += [dict(form=f"{case}, {name}", **timing_columns(of)) for name, of in clocks.items()]
        times = ratio(clocks, "plain", "fast")
        goals.append((f"{case}, times the speed of the plain form (goal {GOAL})", times, times >= GOAL))
    report(args, rows, goals)


if __name__ == "__main__":
    main()
