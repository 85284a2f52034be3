"""Training step and sampling of a small decoder, against PyTorch and `transformers`; memory.

    python benchmarks/language_step.py --rounds 10 --one_core --out results.json

With `--one_core` each process has one core, the last: on a machine where other programs want the
same cores PyTorch's threads wait for each other in a spin, and its times say little.

The decoder is GPT-2's layout: width 128, 4 blocks, 4 heads, 256 tokens, sequences of 128, batch 32,
float32. Every variant lives in a process of its own and takes its turn in every round.

* `train`: cross-entropy of the next token, AdamW. PyTorch is eager, with its fused attention and
  optimizer.
* `sample`: 64 tokens for each of 32 prompts of 64. "torch" is `generate` of `transformers` with its
  cache; "jax_naive" reads the whole sequence again for every token.
* `memory`: temporary memory that XLA plans for the gradient of a loss over 49,152 tokens, 8
  sequences of 1,024, width 256, 2 blocks: from all logits, and from what is asked of them.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import _turns

D, DEPTH, HEADS, V, B, T, P = 128, 4, 4, 256, 32, 128, 64
SIZES = {"vocabulary": V, "layout": "gpt2", "width": D, "depth": DEPTH, "heads": HEADS}
VARIANTS = {"train": ("torch", "jax"), "sample": ("torch", "jax", "jax_naive")}
STEPS = {"train": 2, "sample": 1}
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


def torch_train() -> Callable[[], Any]:
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x):
            b, t, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(T, D)
            self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
            self.norm = nn.LayerNorm(D)

        def forward(self, x):
            h = self.tokens(x) + self.positions.weight[None, : x.shape[1]]
            return self.norm(self.blocks(h)) @ self.tokens.weight.T

    model = Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, V, (B, T + 1))

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).reshape(-1, V), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def jax_train() -> Callable[[], Any]:
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    import optax

    from distill_jax.models import transformer

    model = transformer.make(**SIZES, max_length=T)
    tokens = jax.random.randint(jax.random.key(1), (B, T + 1), 0, V)
    params, _ = model.init(jax.random.key(0), tokens[:, :-1])
    tx = optax.adamw(1e-4)

    def train(carry, tokens):
        params, opt_state = carry

        def loss(params):
            x = {"tokens": tokens[:, :-1], "ask": tokens[:, 1:, None]}
            return -model.apply(params, {}, x, train=False)[0]["log_probs"].mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    compiled = jax.jit(train, donate_argnums=0)
    carry = params, tx.init(params)

    def step():
        nonlocal carry
        carry, value = compiled(carry, tokens)
        return value.block_until_ready()

    return step


def torch_sample() -> Callable[[], Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": D, "n_layer": DEPTH, "n_head": HEADS, "n_positions": T}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, **sizes, **ids)).eval()
    prompt = torch.randint(0, V, (B, P))
    mask = torch.ones_like(prompt)

    def step():
        with torch.no_grad():
            out = model.generate(
                prompt, attention_mask=mask, max_new_tokens=T - P, do_sample=True, top_k=0
            )
        assert out.shape == (B, T)
        return out[0, -1]

    return step


def jax_sample(cached: bool) -> Callable[[], Any]:
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    import jax.numpy as jnp

    from distill_jax.core import sampling
    from distill_jax.models import transformer

    model = transformer.make(**SIZES, max_length=T)
    prompt = jax.random.randint(jax.random.key(1), (B, P), 0, V)
    params, _ = model.init(jax.random.key(0), prompt)

    def apply(params, tokens, mask):
        return model.apply(params, {}, {"tokens": tokens, "mask": mask}, train=False)[0]["logits"]

    decode = model.decode if cached else sampling.uncached(apply, V)
    batch = {"epoch": jnp.zeros(B, jnp.int32), "index": jnp.arange(B)}
    keys = sampling.keys_of(jax.random.key(2), batch)
    assert decode is not None
    draw = jax.jit(lambda params: sampling.sample(decode, params, prompt, keys, steps=T - P))
    return lambda: draw(params).tokens[0, 0, -1].block_until_ready()


def memory() -> dict[str, Any]:
    """Returns MiB of temporaries for dense losses and for those of what is asked."""
    import jax
    import jax.numpy as jnp
    import optax

    from distill_jax.losses import sequence
    from distill_jax.models import transformer

    b, t, v, k = 8, 1024, 49_152, 16
    model = transformer.make(vocabulary=v, layout="llama", width=256, depth=2, heads=4)
    tokens = jax.ShapeDtypeStruct((b, t), jnp.int32)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), tokens)
    top = sequence.TopLogProbs(
        jax.ShapeDtypeStruct((b, t, k), jnp.int32),
        jax.ShapeDtypeStruct((b, t, k), jnp.float32),
        jax.ShapeDtypeStruct((b, t), jnp.float32),
    )
    logits = jax.ShapeDtypeStruct((b, t, v), jnp.float32)

    def outputs(params, tokens, **given):
        return model.apply(params, {}, {"tokens": tokens, **given}, train=False)[0]

    def dense(params, tokens, target):
        logits = outputs(params, tokens)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    def asked(params, tokens, target):
        return -outputs(params, tokens, ask=target[..., None])["log_probs"].mean()

    def dense_kd(params, tokens, teacher):
        p, log_q = (
            jax.nn.log_softmax(teacher),
            jax.nn.log_softmax(outputs(params, tokens)["logits"]),
        )
        return (jnp.exp(p) * (p - log_q)).sum(-1).mean()

    def sparse_kd(params, tokens, top):
        student = outputs(params, tokens, ask=top.index)["log_probs"]
        return sequence.sparse_divergence("forward", top, student).mean()

    result = {}
    losses = {"dense": (dense, tokens), "asked": (asked, tokens)}
    losses |= {"dense_kd": (dense_kd, logits), "sparse_kd": (sparse_kd, top)}
    for name, (loss, given) in losses.items():
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params, tokens, given).compile()
        analysis = compiled.memory_analysis()
        result[f"{name}_mib"] = round(analysis.temp_size_in_bytes / 2**20, 1)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(given))
        result[f"{name}_inputs_mib"] = round(size / 2**20, 1)
    result["asked_of_dense"] = round(result["asked_mib"] / result["dense_mib"], 3)
    result["sparse_kd_of_dense_kd"] = round(result["sparse_kd_mib"] / result["dense_kd_mib"], 3)
    return result


def serve(what: str, variant: str) -> None:
    make = {
        "train:torch": torch_train,
        "train:jax": jax_train,
        "sample:torch": torch_sample,
        "sample:jax": lambda: jax_sample(True),
        "sample:jax_naive": lambda: jax_sample(False),
    }
    _turns.serve(make[f"{what}:{variant}"]())


def measure(what: str, rounds: int) -> dict[str, Any]:
    if what == "memory":
        return memory()
    alone = {"OMP_NUM_THREADS": "1"} if len(os.sched_getaffinity(0)) == 1 else {}
    variants = {name: alone for name in VARIANTS[what]}
    times = _turns.take_turns(__file__, variants, net=what, rounds=rounds, steps=STEPS[what])
    rows: dict[str, Any] = {"rounds": rounds, **_turns.speeds(times)}
    if what == "sample":
        rows["naive_over_cached_cpu"] = _turns.ratio(times["jax_naive"], times["jax"], "cpu")
        rows["naive_over_cached_wall"] = _turns.ratio(times["jax_naive"], times["jax"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", default="train,sample,memory")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="benchmarks/results/language_step.json")
    parser.add_argument("--one_core", action="store_true", help="one core for each process")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*args.serve.split(":"))
    if args.one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    _turns.report(
        args.what.split(","),
        lambda what: measure(what, args.rounds),
        packages=PACKAGES,
        out=args.out,
        one_core=args.one_core,
    )


if __name__ == "__main__":
    main()
